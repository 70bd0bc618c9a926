//! Whether a customer pays what a provider asks: only an invoice of the provider that it asked, over exactly what the
//! `amount` tag says, within its own maximum, and once. Pure; the wallet is the caller's.

use nostr_sdk::prelude::PublicKey;

use crate::protocol::{Feedback, Reply, Status};
use crate::wallet::{self, PaymentHash};

/// How much, at most, and to whom.
#[derive(Debug, Clone)]
pub struct Purse {
    pub provider: PublicKey,
    pub max_msat: u64,
}

/// An invoice that is to be paid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payable {
    pub bolt11: String,
    pub payment_hash: PaymentHash,
    pub amount_msat: u64,
}

/// Why not, in a sentence for the customer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("not by the provider that was asked")]
    Stranger,
    #[error("it asks for no payment")]
    NotAsked,
    #[error("it names no amount")]
    NoAmount,
    #[error("it brings no invoice")]
    NoInvoice,
    #[error("its invoice cannot be read: {0}")]
    Unreadable(String),
    #[error("its invoice names no amount")]
    Open,
    #[error("its invoice is over {invoice_msat} msat, its amount tag says {tag_msat}")]
    OtherAmount { invoice_msat: u64, tag_msat: u64 },
    #[error("it asks {msat} msat, and the most you pay is {max_msat}")]
    TooDear { msat: u64, max_msat: u64 },
    #[error("its invoice has expired")]
    Expired,
    #[error("a payment for this request was sent already")]
    Paid,
}

impl Purse {
    /// Judges one feedback at `now_s` (Unix seconds). `paid`: whether anything was paid for this request.
    ///
    /// # Errors
    /// The first reason against it.
    pub fn judge(&self, by: &PublicKey, said: &Feedback, paid: bool, now_s: u64) -> Result<Payable, Refusal> {
        if *by != self.provider {
            return Err(Refusal::Stranger);
        }
        if said.status != Status::PaymentRequired {
            return Err(Refusal::NotAsked);
        }
        self.weigh(said.amount.clone().ok_or(Refusal::NoAmount)?, paid, now_s)
    }

    /// Judges what a result that holds still asks for, as [`Purse::judge`].
    ///
    /// # Errors
    /// The first reason against it.
    pub fn judge_result(&self, reply: &Reply, paid: bool, now_s: u64) -> Result<Payable, Refusal> {
        if reply.provider != self.provider {
            return Err(Refusal::Stranger);
        }
        let asked = (reply.amount_msat.ok_or(Refusal::NoAmount)?, reply.invoice.clone());
        self.weigh(asked, paid, now_s)
    }

    fn weigh(
        &self,
        (tag_msat, bolt11): (u64, Option<String>),
        paid: bool,
        now_s: u64,
    ) -> Result<Payable, Refusal> {
        let bolt11 = bolt11.ok_or(Refusal::NoInvoice)?;
        if paid {
            return Err(Refusal::Paid);
        }
        let terms = wallet::read_bolt11(&bolt11).map_err(|e| Refusal::Unreadable(e.to_string()))?;
        let invoice_msat = terms.amount_msat.ok_or(Refusal::Open)?;
        if invoice_msat != tag_msat {
            return Err(Refusal::OtherAmount { invoice_msat, tag_msat });
        }
        if invoice_msat > self.max_msat {
            return Err(Refusal::TooDear { msat: invoice_msat, max_msat: self.max_msat });
        }
        if terms.expires_at_s <= now_s {
            return Err(Refusal::Expired);
        }
        Ok(Payable { bolt11, payment_hash: terms.payment_hash, amount_msat: invoice_msat })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nostr_sdk::Keys;

    /// The second example of BOLT 11: 2,500 µBTC (250,000,000 msat), of 1496314658, for 60 seconds.
    const COFFEE: &str = "lnbc2500u1pvjluezsp5zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zygspp5qqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdq5xysxxatsyp3k7enxv4jsxqzpu9qrsgquk0rl77nj30yxdy8j9vdx85fkpmdla2087ne0xh8nhedh8w27kyke0lp53ut353s06fv3qfegext0eh0ymjpf39tuven09sam30g4vgpfna3rh";
    const MADE: u64 = 1_496_314_658;

    #[test]
    fn only_the_asked_providers_exact_invoice_within_the_maximum_is_paid_and_once() {
        let provider = Keys::generate().public_key();
        let purse = Purse { provider, max_msat: 250_000_000 };
        let ask =
            |msat, bolt11: Option<&str>| Feedback::payment_required(msat, bolt11.map(str::to_owned), "pay");
        let good = ask(250_000_000, Some(COFFEE));
        let payable = purse.judge(&provider, &good, false, MADE + 59).unwrap();
        assert_eq!(payable.amount_msat, 250_000_000);
        assert_eq!(
            payable.payment_hash.to_hex(),
            "0001020304050607080900010203040506070809000102030405060708090102"
        );
        let refused =
            |by: &PublicKey, said: &Feedback, paid, now_s| purse.judge(by, said, paid, now_s).unwrap_err();
        let stranger = Keys::generate().public_key();
        assert_eq!(refused(&stranger, &good, false, MADE), Refusal::Stranger);
        assert_eq!(refused(&provider, &good, true, MADE), Refusal::Paid);
        assert_eq!(refused(&provider, &good, false, MADE + 60), Refusal::Expired);
        let (invoice_msat, tag_msat) = (250_000_000, 249_999_999);
        assert_eq!(
            refused(&provider, &ask(tag_msat, Some(COFFEE)), false, MADE),
            Refusal::OtherAmount { invoice_msat, tag_msat }
        );
        assert_eq!(refused(&provider, &ask(1, None), false, MADE), Refusal::NoInvoice);
        let bent = COFFEE.replace("2500u", "2400u");
        assert!(matches!(
            refused(&provider, &ask(240_000_000, Some(&bent)), false, MADE),
            Refusal::Unreadable(_)
        ));
        let other = Feedback::new(Status::Processing, "");
        assert_eq!(refused(&provider, &other, false, MADE), Refusal::NotAsked);
        let bare = Feedback::new(Status::PaymentRequired, "");
        assert_eq!(refused(&provider, &bare, false, MADE), Refusal::NoAmount);
        let mut reply = Reply {
            id: nostr_sdk::EventId::all_zeros(),
            request_id: nostr_sdk::EventId::all_zeros(),
            provider,
            kind: 6_000,
            created_at: MADE,
            content: String::new(),
            proof: None,
            facts: Vec::new(),
            amount_msat: Some(250_000_000),
            invoice: Some(COFFEE.to_owned()),
            encryption: None,
        };
        assert_eq!(purse.judge_result(&reply, false, MADE), Ok(payable));
        assert_eq!(purse.judge_result(&reply, true, MADE), Err(Refusal::Paid));
        reply.provider = stranger;
        assert_eq!(purse.judge_result(&reply, false, MADE), Err(Refusal::Stranger));
        let poor = Purse { provider, max_msat: 249_999_999 };
        let dear = poor.judge(&provider, &good, false, MADE).unwrap_err();
        assert_eq!(dear, Refusal::TooDear { msat: 250_000_000, max_msat: 249_999_999 });
    }
}
