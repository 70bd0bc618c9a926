//! Refunds over a wallet whose answers are the test's: books that were put back from a backup pay nothing out before they
//! were compared with the wallet, a wallet that cannot be asked is not asked to pay, and a fee over the highest is told.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;

use async_trait::async_trait;
use coinop::clock;
use coinop::desk::{Desk, Error, Order};
use coinop::job::Till;
use coinop::ledger::{self, Ledger, Purse, transfer};
use coinop::store::{Holder, Options, Restored, Store};
use coinop::wallet::{
    self, Abilities, Cursor, Direction, Identity, Invoice, Kind, Lookup, Movement, NewInvoice, Outgoing,
    Page, Pay, PayError, Payment, PaymentHash, State, Wallet, read_bolt11,
};
use nostr_sdk::prelude::Keys;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::now_s;
use crate::testing::invoice_to;

const CREDIT: u64 = 100_000;
const MSAT: u64 = 60_000;

/// Pays whatever it is asked to, keeps a list of it, and takes its fee whatever the order says.
#[derive(Default)]
struct Payer {
    paid: Mutex<Vec<Movement>>,
    fee_msat: u64,
    /// It does not answer a look-up.
    deaf: std::sync::atomic::AtomicBool,
}

#[async_trait]
impl Wallet for Payer {
    fn identity(&self) -> Identity {
        Identity { kind: Kind::Nwc, host: "payer".into() }
    }

    async fn abilities(&self) -> Result<Abilities, wallet::Error> {
        Ok(Abilities { pay: true, history: true, ..Abilities::default() })
    }

    async fn make_invoice(&self, _: &NewInvoice) -> Result<Invoice, wallet::Error> {
        panic!("nobody sells here")
    }

    async fn look_up(&self, _: &PaymentHash) -> Result<Lookup, wallet::Error> {
        panic!("nobody sells here")
    }

    async fn pay(&self, order: &Pay) -> Result<Payment, PayError> {
        let payment_hash = read_bolt11(&order.bolt11).expect("an invoice").payment_hash;
        self.paid.lock().expect("whole").push(Movement {
            direction: Direction::Out,
            payment_hash,
            amount_msat: order.amount_msat,
            fee_msat: Some(self.fee_msat),
            state: State::Settled { received_msat: None, settled_at_s: None, fee_msat: None },
            created_at_s: now_s(),
            settled_at_s: None,
            memo: String::new(),
        });
        let (amount_msat, fee_msat) = (order.amount_msat, self.fee_msat);
        Ok(Payment { payment_hash, amount_msat, fee_msat, preimage: None })
    }

    async fn outgoing(&self, hash: &PaymentHash) -> Result<Outgoing, wallet::Error> {
        if self.deaf.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(wallet::Error::Nonsense("not today".into()));
        }
        let paid = self.paid.lock().expect("whole");
        Ok(paid.iter().find(|one| one.payment_hash == *hash).map_or(Outgoing::Unknown, |one| {
            Outgoing::Paid(Payment {
                payment_hash: *hash,
                amount_msat: one.amount_msat,
                fee_msat: self.fee_msat,
                preimage: None,
            })
        }))
    }

    async fn balance_msat(&self) -> Result<i64, wallet::Error> {
        let spent: u64 =
            self.paid.lock().expect("whole").iter().map(|one| one.amount_msat + self.fee_msat).sum();
        Ok(-i64::try_from(spent).expect("msat"))
    }

    async fn history(&self, _: &Cursor, _: u32) -> Result<Page, wallet::Error> {
        let items = self.paid.lock().expect("whole").clone();
        Ok(Page { items, unreadable: Vec::new(), next: None })
    }
}

/// A node's books beside a payer.
struct Books {
    wallet: Arc<Payer>,
    keys: Keys,
    customer: String,
    dir: TempDir,
}

impl Books {
    fn new(fee_msat: u64) -> Books {
        let wallet = Arc::new(Payer { fee_msat, ..Payer::default() });
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::create_dir_all(dir.path().join("locks")).expect("a folder");
        Books { wallet, keys: Keys::generate(), customer: Keys::generate().public_key().to_hex(), dir }
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn open(&self) -> Desk {
        let options = Options { key_locks: Some(self.dir.path().join("locks")), ..Options::default() };
        let holder = Holder::new(self.keys.public_key().to_hex());
        let store = Store::open_with(&self.data(), &holder, options).expect("a store");
        let (till, _found) = Till::open(self.wallet.clone(), 600_000, &store).expect("a till");
        Desk::new(Ledger::new(store), Some(till), self.keys.clone(), clock::system())
    }

    /// With this credit, and a backup of the books as they are then.
    async fn backed_up(&self) -> (Desk, PathBuf) {
        let desk = self.open();
        desk.ledger.post(transfer::grant("g", &self.customer, CREDIT, "")).await.expect("a grant");
        let backup = self.dir.path().join("backup");
        desk.ledger.store().backup(&backup).expect("a copy");
        (desk, backup)
    }

    /// A refund to an invoice of its own.
    async fn refund(&self, desk: &Desk, nth: u8, max_fee_msat: u64) -> Result<Value, Error> {
        let bolt11 = invoice_to(PaymentHash::from_bytes([nth; 32]), MSAT, now_s(), 600).bolt11;
        desk.serve(Order::Refund { customer: self.customer.clone(), bolt11, max_fee_msat }).await
    }

    fn purse(&self, desk: &Desk) -> Purse {
        desk.ledger.purse(&self.customer).expect("readable")
    }

    fn paid(&self) -> usize {
        self.wallet.paid.lock().expect("whole").len()
    }
}

fn close(desk: Desk) {
    let store = desk.ledger.store().clone();
    drop(desk);
    store.close().expect("closed");
}

async fn reconciled(desk: &Desk, book: bool) -> Value {
    desk.serve(Order::Reconcile { from_ms: 0, to_ms: u64::MAX, book }).await.expect("an answer")
}

#[tokio::test]
async fn a_refund_that_a_restored_backup_has_forgotten_is_found_again_before_anything_is_paid_out() {
    for aside_is_there in [true, false] {
        let books = Books::new(7);
        let (desk, backup) = books.backed_up().await;
        books.refund(&desk, 1, 10).await.expect("paid");
        assert_eq!((books.purse(&desk).available_msat, books.paid()), (40_000, 1));
        close(desk);
        let (_, aside) = Store::restore(&books.data(), &backup).expect("restored");
        if !aside_is_there {
            std::fs::remove_dir_all(aside.expect("a log was there")).expect("removed");
        }

        let desk = books.open();
        assert_eq!(books.purse(&desk).available_msat, CREDIT.into(), "it has come to life again");
        let waits = async || {
            let why = books.refund(&desk, 2, 10).await.expect_err("not before they are compared");
            assert!(matches!(why, Error::Restored), "{why}");
            desk.resume().await;
            assert_eq!(books.paid(), 1);
        };
        waits().await;
        assert_eq!(reconciled(&desk, false).await["restored"], true, "looking alone puts nothing right");
        waits().await;

        let told = reconciled(&desk, true).await;
        assert_eq!((&told["restored"], &told["clean"]), (&false.into(), &true.into()), "{told}");
        assert_eq!(told["balance"]["rest_msat"], 0, "{told}");
        assert_eq!(Restored::read(&books.data()).expect("readable"), None);
        let done = told["differences"][0]["done"].as_str().expect("words");
        if aside_is_there {
            assert_eq!(done, "the refund is booked as paid");
            assert_eq!(books.purse(&desk).available_msat, 40_000);
            let why = books.refund(&desk, 2, 10).await.expect_err("it is spent");
            assert!(matches!(why, Error::TooMuch { available_msat: 40_000, .. }), "{why}");
        } else {
            assert_eq!(done, "in suspense", "nobody is left who could say whose it was");
        }
        assert_eq!(books.paid(), 1);
        ledger::verify(desk.ledger.store()).expect("books that add up");
        close(desk);
    }
}

#[tokio::test]
async fn a_wallet_that_cannot_be_asked_before_anything_is_sent_refuses_the_refund_and_the_credit_stays() {
    let books = Books::new(0);
    let (desk, _) = books.backed_up().await;
    books.wallet.deaf.store(true, std::sync::atomic::Ordering::SeqCst);
    let why = books.refund(&desk, 1, 10).await.expect_err("no answer");
    assert!(matches!(why, Error::Wallet(wallet::Error::Nonsense(_))), "{why}");
    let whole = Purse { available_msat: CREDIT.into(), ..Purse::default() };
    assert_eq!((books.purse(&desk), books.paid()), (whole, 0));
    // The same invoice is good as soon as the wallet answers.
    books.wallet.deaf.store(false, std::sync::atomic::Ordering::SeqCst);
    books.refund(&desk, 1, 10).await.expect("paid");
    assert_eq!((books.purse(&desk).available_msat, books.paid()), (40_000, 1));
}

#[tokio::test]
async fn a_fee_over_the_highest_that_was_allowed_is_booked_and_told() {
    for (max_fee_msat, over) in [(5_000, false), (4_999, true)] {
        let books = Books::new(5_000);
        let (desk, _) = books.backed_up().await;
        let told = books.refund(&desk, 1, max_fee_msat).await.expect("paid");
        assert_eq!((&told["fee_msat"], &told["fee_over_max"]), (&5_000.into(), &over.into()), "{told}");
    }
}
