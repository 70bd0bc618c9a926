//! The wallet room against wallets: a real LNbits, Alby's wallet service on a relay, and servers and services that
//! break, dawdle and lie. What the node does with an answer is tested elsewhere.

mod lnbits_real;
mod lnbits_rogue;
mod nwc_real;
mod nwc_rogue;
mod rogue_relay;
mod tls;

#[path = "../support/lnbits.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod lnbits;
#[path = "../support/nwc.rs"]
mod nwc;
#[path = "../e2e/parts.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod parts;
#[path = "../support/skip.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod skip;
#[path = "../../src/wallet/testing.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod testing;

use std::sync::Arc;
use std::time::{Duration, Instant};

use coinop::wallet::{
    Invoice, Key, Kind, Limits, NewInvoice, Pay, PayError, Payment, PaymentHash, Preimage, Secret, Setup,
    Wallet, open,
};

/// A wallet of this server, by one of its keys.
pub fn lnbits_wallet(url: &str, key: &str, limits: Limits) -> Arc<dyn Wallet> {
    let mut setup = Setup::new(Kind::Lnbits, Some(url.into()), Key::Text(Secret::new(key)));
    setup.limits = limits;
    open(&setup).expect("a wallet")
}

/// A wallet behind this connection line.
pub fn nwc_wallet(uri: &str, limits: Limits) -> Arc<dyn Wallet> {
    let mut setup = Setup::new(Kind::Nwc, None, Key::Text(Secret::new(uri)));
    setup.limits = limits;
    open(&setup).expect("a wallet")
}

/// Short limits, for a wallet that is not going to answer.
pub fn hasty() -> Limits {
    let (call, pay) = (Duration::from_millis(1_000), Duration::from_millis(1_500));
    Limits { connect: Duration::from_millis(800), call, pay, ..Limits::default() }
}

pub fn new_invoice(amount_msat: u64) -> NewInvoice {
    NewInvoice { amount_msat, memo: "a job".into(), expiry_s: 600, description_hash: None }
}

/// An order to pay just this invoice, for a fee as LNbits reserves it at most.
pub fn pay(invoice: &Invoice) -> Pay {
    Pay { bolt11: invoice.bolt11.clone(), amount_msat: invoice.amount_msat, max_fee_msat: 10_000 }
}

/// The refusal of a payment that was surely not made.
pub fn refused(result: Result<Payment, PayError>) -> coinop::wallet::Error {
    match result {
        Err(PayError::Refused(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

/// Why it is not known whether a payment was made.
pub fn in_doubt(result: Result<Payment, PayError>) -> coinop::wallet::Error {
    match result {
        Err(PayError::InDoubt { why, .. }) => why,
        other => panic!("no doubt: {other:?}"),
    }
}

/// Waits until the condition gives something.
///
/// # Panics
/// After twenty seconds.
pub async fn until<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = condition().await {
            return found;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
