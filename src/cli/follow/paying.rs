//! The customer's payment beside the waiting: begun by a quote or by the result, ended by the wallet. What may be paid is
//! `customer::pay`'s to say.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use nostr_sdk::prelude::PublicKey;

use super::{Follow, Paid, Payer, Why};
use crate::cli::output;
use crate::customer::pay::{Payable, Refusal};
use crate::protocol::{Feedback, Reply};
use crate::wallet::{self, Outgoing, Pay, PayError, Payment, PaymentHash, Wallet};

/// How long a payment that is under way is waited for once the job has ended or was taken back: the provider takes or gives
/// back at once.
const PAYMENT_PATIENCE: Duration = Duration::from_secs(10);
/// Pause between two looks at a payment that is under way.
const PAYMENT_LOOK: Duration = Duration::from_secs(1);

/// A payment on its way. A hold invoice is paid when the job is delivered, so nobody may wait for this alone.
pub(super) struct Paying {
    payable: Payable,
    end: Pin<Box<dyn Future<Output = Result<Payment, PayError>> + Send>>,
}

impl Follow<'_> {
    /// Begins to pay what a quote asks, one invoice for this request at most, and says why not otherwise.
    pub(super) fn pay(
        &self,
        payer: &Payer,
        by: &PublicKey,
        said: &Feedback,
        paid: bool,
        paying: &mut Option<Paying>,
    ) {
        let paid = paid || paying.is_some();
        self.begin(payer, payer.purse.judge(by, said, paid, crate::clock::now_s()), paying);
    }

    /// Pays what a result that holds still asks for, where nothing was paid for this request before.
    pub(super) async fn pay_for(&self, reply: &Reply, paying: &mut Option<Paying>, paid: &mut Option<Paid>) {
        let (Some(payer), Some(_)) = (&self.payer, &reply.invoice) else { return };
        let before = paid.is_some() || paying.is_some();
        let mut payment = None;
        self.begin(payer, payer.purse.judge_result(reply, before, crate::clock::now_s()), &mut payment);
        if payment.is_some() {
            // The wallet's own limits bound it.
            let ended = end_of(&mut payment).await;
            self.payment_ended(ended, &mut payment, paid);
            *paying = payment;
        }
    }

    fn begin(&self, payer: &Payer, judged: Result<Payable, Refusal>, paying: &mut Option<Paying>) {
        let payable = match judged {
            Ok(payable) => payable,
            Err(why) => return self.say(&format!("not paid: {why}")),
        };
        let order = Pay {
            bolt11: payable.bolt11.clone(),
            amount_msat: payable.amount_msat,
            max_fee_msat: payer.max_fee_msat,
        };
        let wallet = Arc::clone(&payer.wallet);
        *paying = Some(Paying { payable, end: Box::pin(async move { wallet.pay(&order).await }) });
    }

    /// What the wallet says of the payment that was under way; where it does not know yet it is asked again.
    pub(super) fn payment_ended(
        &self,
        ended: Result<Payment, PayError>,
        paying: &mut Option<Paying>,
        paid: &mut Option<Paid>,
    ) {
        let Some(Paying { payable, .. }) = paying.take() else { return };
        let amount = output::sats(payable.amount_msat);
        match (ended, &self.payer) {
            (Ok(payment), _) => {
                self.say(&format!("paid {amount} (fee {})", output::sats(payment.fee_msat)));
                *paid = Some(Paid { payable, fee_msat: Some(payment.fee_msat) });
            }
            (Err(PayError::Refused(why)), _) => {
                self.say(&format!("not paid: {why}"));
                *paid = None;
            }
            (Err(PayError::InDoubt { why, .. }), payer) => {
                // It may have gone out, or be locked until the job has ended: nothing else is paid for this request.
                self.say(&format!("payment status unknown ({amount}): {why}"));
                *paid = Some(Paid { payable: payable.clone(), fee_msat: None });
                if let Some(payer) = payer {
                    let end = Box::pin(outgoing(Arc::clone(&payer.wallet), payable.payment_hash));
                    *paying = Some(Paying { payable, end });
                }
            }
        }
    }

    /// The job has ended: a payment that was locked for it is taken or given back by now, or soon.
    pub(super) async fn end_payment(&self, why: Why, paying: &mut Option<Paying>, paid: &mut Option<Paid>) {
        let patience = match why {
            Why::Result | Why::Refused | Why::Failed | Why::Unpaid | Why::Timeout => PAYMENT_PATIENCE,
            // Somebody waits at the keyboard.
            Why::Interrupted => PAYMENT_PATIENCE / 4,
            Why::Lost | Why::Untaken => Duration::ZERO,
        };
        let until = tokio::time::Instant::now() + patience;
        while paying.is_some() {
            match tokio::time::timeout_at(until, end_of(paying)).await {
                Ok(ended) => self.payment_ended(ended, paying, paid),
                Err(_) => break,
            }
        }
        if let Some(Paying { payable, .. }) = paying.take() {
            self.say("the payment is still under way; check its outcome in your wallet");
            *paid = Some(Paid { payable, fee_msat: None });
        }
    }
}

/// The end of the payment that is under way; never, when there is none.
pub(super) async fn end_of(paying: &mut Option<Paying>) -> Result<Payment, PayError> {
    match paying {
        Some(paying) => (&mut paying.end).await,
        None => std::future::pending().await,
    }
}

/// Asks until the wallet knows what became of a payment.
async fn outgoing(wallet: Arc<dyn Wallet>, hash: PaymentHash) -> Result<Payment, PayError> {
    loop {
        tokio::time::sleep(PAYMENT_LOOK).await;
        match wallet.outgoing(&hash).await {
            Ok(Outgoing::Paid(payment)) => return Ok(payment),
            Ok(Outgoing::Failed) => {
                let message = "it came back".into();
                return Err(PayError::Refused(wallet::Error::Said { code: "failed".into(), message }));
            }
            Ok(Outgoing::Unknown | Outgoing::Pending) => {}
            Err(error) => tracing::debug!(%error, "the wallet does not say what became of the payment"),
        }
    }
}
