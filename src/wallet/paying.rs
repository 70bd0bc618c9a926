//! How a payment is sent at most once, over any kind of wallet: look first, send, and look again where the answer
//! leaves a doubt. How it is sent is each wallet's own.

use std::future::Future;

use super::{Error, Outgoing, Pay, PayError, Payment, Terms, Wallet, bolt11};

/// Why a payment was not answered with an end.
pub(super) enum Unpaid {
    /// Nothing was sent.
    Before(Error),
    After(Error),
}

/// A payment that is under way.
pub(super) fn pending() -> Error {
    Error::Said { code: "pending".into(), message: "the payment is under way".into() }
}

/// Pays `order` by `send`, which is called once at most.
pub(super) async fn once<W, S, F>(wallet: &W, order: &Pay, now_s: u64, send: S) -> Result<Payment, PayError>
where
    W: Wallet + ?Sized,
    S: FnOnce(Terms) -> F + Send,
    F: Future<Output = Result<Outgoing, Unpaid>> + Send,
{
    let terms = bolt11::payable(&order.bolt11, order.amount_msat, now_s).map_err(PayError::Refused)?;
    let (payment_hash, expires_at_s) = (terms.payment_hash, terms.expires_at_s);
    let in_doubt = |why| PayError::InDoubt { payment_hash, expires_at_s, why };
    match wallet.outgoing(&payment_hash).await.map_err(PayError::Refused)? {
        Outgoing::Paid(payment) => return Ok(payment),
        Outgoing::Pending => return Err(in_doubt(pending())),
        Outgoing::Unknown | Outgoing::Failed => {}
    }
    let why = match send(terms).await {
        Ok(Outgoing::Paid(payment)) => return Ok(payment),
        Ok(_) => pending(),
        Err(Unpaid::Before(why)) => return Err(PayError::Refused(why)),
        Err(Unpaid::After(why)) if !why.leaves_doubt() => return Err(PayError::Refused(why)),
        Err(Unpaid::After(why)) => why,
    };
    match wallet.outgoing(&payment_hash).await {
        Ok(Outgoing::Paid(payment)) => Ok(payment),
        // A clear no, and nothing in the books.
        Ok(Outgoing::Unknown | Outgoing::Failed) if matches!(&why, Error::Said { code, .. } if code != "pending") => {
            Err(PayError::Refused(why))
        }
        Ok(Outgoing::Failed) => Err(PayError::Refused(why)),
        Ok(Outgoing::Unknown | Outgoing::Pending) => Err(in_doubt(why)),
        Err(error) => {
            tracing::debug!(%error, "the wallet does not say what became of a payment");
            Err(in_doubt(why))
        }
    }
}
