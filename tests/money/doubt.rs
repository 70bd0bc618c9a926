//! Refunds whose sending was left in doubt, by a wallet that tells of all it has sent and by one that does not: none is
//! given back that may have been paid. The wallet's answers and the time are the test's.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use coinop::desk::{Desk, Error, Order};
use coinop::job::Till;
use coinop::ledger::{Ledger, Purse, transfer};
use coinop::store::{Holder, Options, Store};
use coinop::wallet::{
    self, Abilities, Cursor, Direction, Identity, Invoice, Kind, Lookup, Movement, NewInvoice, Outgoing,
    Page, Pay, PayError, Payment, PaymentHash, State, Wallet, read_bolt11,
};
use nostr_sdk::prelude::Keys;
use serde_json::Value;
use tempfile::TempDir;

use crate::testing::{Made, invoice_to};

const BEGIN_S: u64 = 1_790_000_000;
const EXPIRY_S: u64 = 600;
const DAY_S: u64 = 86_400;
const MSAT: u64 = 60_000;

/// Looked up by hash it knows nothing of what it has sent. The first try to pay gets no answer, the second one a no, and
/// every later one goes through.
struct Forgetful {
    /// It says that it tells of all.
    tells: bool,
    tries: AtomicU64,
    now_s: Arc<AtomicU64>,
    list: Mutex<Vec<Movement>>,
}

#[async_trait]
impl Wallet for Forgetful {
    fn identity(&self) -> Identity {
        Identity { kind: Kind::Nwc, host: "forgetful".into() }
    }

    async fn abilities(&self) -> Result<Abilities, wallet::Error> {
        Ok(Abilities { pay: true, history: true, outgoing: self.tells, ..Abilities::default() })
    }

    async fn make_invoice(&self, _: &NewInvoice) -> Result<Invoice, wallet::Error> {
        panic!("nobody sells here")
    }

    async fn look_up(&self, _: &PaymentHash) -> Result<Lookup, wallet::Error> {
        panic!("nobody sells here")
    }

    async fn pay(&self, order: &Pay) -> Result<Payment, PayError> {
        let terms = read_bolt11(&order.bolt11).expect("an invoice");
        if terms.expires_at_s <= self.now_s.load(Ordering::SeqCst) {
            return Err(PayError::Refused(wallet::Error::Invoice("it expired".into())));
        }
        let why = wallet::Error::Slow { what: "an order", limit_ms: 1 };
        let (payment_hash, expires_at_s) = (terms.payment_hash, terms.expires_at_s);
        match self.tries.fetch_add(1, Ordering::SeqCst) {
            0 => Err(PayError::InDoubt { payment_hash, expires_at_s, why }),
            1 => {
                let (code, message) = ("OTHER".to_owned(), "already paid".to_owned());
                Err(PayError::Refused(wallet::Error::Said { code, message }))
            }
            _ => Ok(Payment { payment_hash, amount_msat: order.amount_msat, fee_msat: 0, preimage: None }),
        }
    }

    async fn outgoing(&self, _: &PaymentHash) -> Result<Outgoing, wallet::Error> {
        Ok(Outgoing::Unknown)
    }

    async fn balance_msat(&self) -> Result<i64, wallet::Error> {
        Ok(0)
    }

    async fn history(&self, _: &Cursor, _: u32) -> Result<Page, wallet::Error> {
        Ok(Page { items: self.list.lock().expect("whole").clone(), unreadable: Vec::new(), next: None })
    }
}

/// A desk without a node, whose customer has asked for its credit back and was left in doubt.
struct Doubt {
    wallet: Arc<Forgetful>,
    desk: Desk,
    customer: String,
    bolt11: String,
    hash: PaymentHash,
    now_s: Arc<AtomicU64>,
    _dir: TempDir,
}

impl Doubt {
    async fn left(tells: bool) -> Doubt {
        let dir = tempfile::tempdir().expect("a folder");
        let now_s = Arc::new(AtomicU64::new(BEGIN_S));
        let hands = Arc::clone(&now_s);
        let clock: coinop::clock::Clock = Arc::new(move || hands.load(Ordering::SeqCst) * 1_000);
        let locks = dir.path().join("locks");
        std::fs::create_dir_all(&locks).expect("a folder");
        let options = Options { key_locks: Some(locks), clock: Arc::clone(&clock), ..Options::default() };
        let keys = Keys::generate();
        let holder = Holder::new(keys.public_key().to_hex());
        let store = Store::open_with(&dir.path().join("data"), &holder, options).expect("a store");
        let wallet = Arc::new(Forgetful {
            tells,
            tries: AtomicU64::default(),
            now_s: Arc::clone(&now_s),
            list: Mutex::default(),
        });
        let (till, _found) = Till::open(wallet.clone(), 600_000, &store).expect("a till");
        let desk = Desk::new(Ledger::new(store), Some(till), keys, clock);
        let customer = Keys::generate().public_key().to_hex();
        desk.ledger.post(transfer::grant("g", &customer, 100_000, "")).await.expect("a grant");
        let Made { bolt11, hash } = invoice_to(PaymentHash::from_bytes([7; 32]), MSAT, BEGIN_S, EXPIRY_S);
        let doubt = Doubt { wallet, desk, customer, bolt11, hash, now_s, _dir: dir };
        let told = doubt.desk.serve(doubt.order()).await.expect_err("no answer came");
        assert!(matches!(told, Error::InDoubt(_)), "{told}");
        assert_eq!(doubt.purse(), doubt.set_aside());
        doubt
    }

    fn order(&self) -> Order {
        Order::Refund { customer: self.customer.clone(), bolt11: self.bolt11.clone(), max_fee_msat: 0 }
    }

    fn purse(&self) -> Purse {
        self.desk.ledger.purse(&self.customer).expect("readable")
    }

    fn set_aside(&self) -> Purse {
        Purse { available_msat: 40_000, held_msat: 0, refunding_msat: MSAT.into() }
    }

    fn given_back(&self) -> Purse {
        Purse { available_msat: 100_000, held_msat: 0, refunding_msat: 0 }
    }

    fn pass(&self, s: u64) {
        self.now_s.fetch_add(s, Ordering::SeqCst);
    }

    async fn reconciled(&self, book: bool) -> Value {
        let all = Order::Reconcile { from_ms: 0, to_ms: u64::MAX, book };
        self.desk.serve(all).await.expect("an answer")
    }
}

#[tokio::test]
async fn a_refund_that_a_wallet_does_not_tell_of_is_not_given_back_by_itself() {
    let doubt = Doubt::left(false).await;
    // Tried again, the wallet says no: because it has paid, or for any other reason.
    doubt.desk.resume().await;
    assert_eq!((doubt.purse(), doubt.wallet.tries.load(Ordering::SeqCst)), (doubt.set_aside(), 2));
    doubt.pass(EXPIRY_S);
    doubt.desk.resume().await;
    assert_eq!(doubt.purse(), doubt.set_aside(), "expired, and perhaps paid before");
    // What was sent may be under way for a while yet.
    let told = doubt.reconciled(true).await;
    let row = &told["differences"][0];
    assert_eq!((&row["what"], &row["booked"]), (&"refund_unpaid".into(), &false.into()), "{told}");
    assert!(row["done"].as_str().is_some_and(|done| done.contains("a day after")), "{told}");
    doubt.pass(DAY_S);
    assert_eq!(doubt.reconciled(false).await["clean"], false);
    assert_eq!(doubt.purse(), doubt.set_aside(), "nobody has ordered it");
    let told = doubt.reconciled(true).await;
    assert_eq!((&told["clean"], &told["differences"][0]["done"]), (&true.into(), &"given back".into()));
    assert_eq!(doubt.purse(), doubt.given_back());
    assert_eq!(doubt.reconciled(true).await["read"], 0, "that is the end of it");
}

#[tokio::test]
async fn a_refund_that_only_the_wallets_list_tells_of_is_ended_as_paid() {
    let doubt = Doubt::left(false).await;
    doubt.pass(EXPIRY_S + DAY_S);
    doubt.desk.resume().await;
    doubt.wallet.list.lock().expect("whole").push(Movement {
        direction: Direction::Out,
        payment_hash: doubt.hash,
        amount_msat: MSAT,
        fee_msat: Some(7),
        state: State::Settled { received_msat: None, settled_at_s: None, fee_msat: None },
        created_at_s: BEGIN_S,
        settled_at_s: None,
        memo: String::new(),
    });
    let told = doubt.reconciled(true).await;
    let row = &told["differences"][0];
    assert_eq!((&row["what"], &row["booked"]), (&"refund_paid".into(), &true.into()), "{told}");
    let paid_out = Purse { available_msat: 40_000, held_msat: 0, refunding_msat: 0 };
    assert_eq!(doubt.purse(), paid_out);
}

#[tokio::test]
async fn a_refund_that_a_wallet_which_tells_of_all_does_not_know_is_given_back() {
    let doubt = Doubt::left(true).await;
    doubt.pass(EXPIRY_S);
    doubt.desk.resume().await;
    assert_eq!((doubt.purse(), doubt.wallet.tries.load(Ordering::SeqCst)), (doubt.given_back(), 1));
}

#[tokio::test]
async fn a_refund_that_has_failed_is_not_paid_by_who_waited_for_its_turn() {
    let doubt = Doubt::left(true).await;
    // Both have found it on its way.
    tokio::join!(doubt.desk.resume(), doubt.desk.resume());
    assert_eq!((doubt.purse(), doubt.wallet.tries.load(Ordering::SeqCst)), (doubt.given_back(), 2));
    let told = doubt.desk.serve(doubt.order()).await.expect_err("it has failed");
    assert!(matches!(&told, Error::Before(why) if why.contains("already paid")), "{told}");
    assert_eq!((doubt.purse(), doubt.wallet.tries.load(Ordering::SeqCst)), (doubt.given_back(), 2));
}
