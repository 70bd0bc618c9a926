//! Orders of every fate (paid, paid too much, not paid, taken back, failed) over a wallet that leaves out or garbles every
//! field that decides nothing, with a node that is killed again and again: afterwards the books say what the wallet says.
//! `MIXED_ORDERS` sets how many orders; a few by default.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use coinop::clock;
use coinop::desk::{Desk, Order};
use coinop::job::Till;
use coinop::ledger::{self, Ledger};
use coinop::protocol::{Code, Status};
use coinop::relay::local::LocalRelay;
use coinop::store::money::Account;
use coinop::store::{Holder, Store};
use coinop::wallet::{self, Key, Kind, Secret, Setup};
use futures_util::StreamExt;
use nostr_sdk::prelude::Event;

use crate::support::buyer::{Buyer, End};
use crate::support::process::Home;
use crate::support::{until, until_within};
use crate::vault::{FUNDS_MSAT, Mood, Vault};

const PRICE: u64 = 20_000;
/// Customers at the same time.
const AT_ONCE: usize = 8;
/// A customer waits through some deaths of the node.
const WAIT: Duration = Duration::from_secs(240);

/// What becomes of an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Paid,
    PaidTooMuch,
    Unpaid,
    TakenBack,
    PaidAndTakenBack,
    Fails,
}

impl Fate {
    fn of(n: usize) -> Fate {
        [
            Fate::Paid,
            Fate::PaidTooMuch,
            Fate::Paid,
            Fate::Unpaid,
            Fate::Paid,
            Fate::TakenBack,
            Fate::Fails,
            Fate::PaidAndTakenBack,
        ][n % 8]
    }
}

struct World {
    vault: Vault,
    relay: LocalRelay,
    home: Home,
}

impl World {
    async fn quote(&self, buyer: &Buyer, request: &Event) -> String {
        let quote = until_within(WAIT, "a quote", async || {
            let said = buyer.feedbacks(request).await;
            said.into_iter().find_map(|f| f.amount.filter(|_| f.status == Status::PaymentRequired)?.1)
        });
        quote.await
    }

    async fn end(&self, buyer: &Buyer, request: &Event) -> End {
        until_within(WAIT, "an end", async || buyer.ends(request).await.pop()).await
    }

    /// One order to its end. Whether it was delivered.
    async fn order(&self, n: usize) -> bool {
        let fate = Fate::of(n);
        // Plain invoices and hold invoices.
        self.vault.is(if n.is_multiple_of(3) { Mood::MayNotHold } else { Mood::Well });
        let buyer = Buyer::at(&[self.relay.url()], self.home.keys.public_key()).await;
        let repo = (fate == Fate::Fails).then_some("http://127.0.0.1:1/nowhere.git");
        let request = buyer.post(&buyer.order(repo, &["echo sold"])).await;
        let bolt11 = self.quote(&buyer, &request).await;
        match fate {
            Fate::Unpaid => return false,
            Fate::TakenBack => {
                buyer.cancel(&request).await;
                return false;
            }
            Fate::PaidTooMuch => self.vault.pays(&bolt11, PRICE + 1_500),
            Fate::Paid | Fate::PaidAndTakenBack | Fate::Fails => self.vault.pays(&bolt11, PRICE),
        }
        if fate == Fate::PaidAndTakenBack {
            buyer.cancel(&request).await;
        }
        let end = self.end(&buyer, &request).await;
        match (fate, &end) {
            (Fate::Paid | Fate::PaidTooMuch, End::Result(_))
            | (Fate::PaidAndTakenBack, End::Result(_) | End::Error { code: Code::Cancelled, .. })
            | (Fate::Fails, End::Error { .. }) => {}
            other => panic!("order {n}: {other:?}"),
        }
        assert_eq!(buyer.ends(&request).await.len(), 1, "order {n}: one end");
        matches!(end, End::Result(_))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn mixed_orders_with_kills_over_a_wallet_of_odd_answers_end_with_books_equal_to_the_wallet() {
    let orders = std::env::var("MIXED_ORDERS").map_or(16, |n| n.parse().expect("a number"));
    let kills = (orders / 100).max(2);
    let (relay, vault) = (LocalRelay::start().await.expect("a relay"), Vault::open().await);
    vault.is_odd();
    vault.fund(orders as u64 * PRICE * 2);
    let had = FUNDS_MSAT + orders as u64 * PRICE * 2;
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("wallet");
    crate::deal::write_secret(&file, &vault.provider);
    let file = format!("payment.wallet_key_file={}", file.display());
    let set = [
        "payment.wallet=nwc",
        &file,
        "payment.prices=* base_msat=20000",
        "drain_timeout_ms=500",
        "admission.refusals_per_minute=100000",
    ];
    let flags: Vec<&str> = set.iter().flat_map(|set| ["--set", set]).collect();
    let home = Home::new(&[relay.url()], &flags);
    let world = Arc::new(World { vault, relay, home });
    let began = Instant::now();

    let all_done = AtomicBool::new(false);
    let died = AtomicUsize::new(0);
    let node = async {
        let mut node = world.home.start();
        for kill in 1..=kills {
            // Wherever the orders are then.
            let due = kill * orders / (kills + 1);
            while world.vault.made() < due && !all_done.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            if all_done.load(Ordering::SeqCst) {
                break;
            }
            node.kill().await;
            died.fetch_add(1, Ordering::SeqCst);
            node = world.home.start();
        }
        node
    };
    let customers = async {
        let delivered = futures_util::stream::iter(0..orders)
            .map(|n| {
                let world = Arc::clone(&world);
                async move { usize::from(world.order(n).await) }
            })
            .buffer_unordered(AT_ONCE)
            .fold(0, async |sum, one| sum + one)
            .await;
        all_done.store(true, Ordering::SeqCst);
        delivered
    };
    let (node, delivered) = tokio::join!(node, customers);
    let died = died.into_inner();
    world.vault.is(Mood::Well);
    // What is locked for jobs that have ended is given back.
    until("nothing to be locked", async || {
        let store = Store::read_only(&world.home.data).ok()?;
        let open = store.balance(&Account::Locked("nwc".into())).ok()?;
        (open == 0 && world.vault.locked_msat() == 0).then_some(())
    })
    .await;
    assert!(node.stop().await.success());

    let holder = Holder::new(world.home.keys.public_key().to_hex());
    let store = Store::open(&world.home.data, &holder).expect("the store");
    let verified = ledger::verify(&store).expect("books that add up");
    assert_eq!((verified.sum_msat, verified.open_holds), (0, 0));
    let setup = Setup::new(Kind::Nwc, None, Key::Text(Secret::new(&world.vault.provider)));
    let wallet = wallet::open(&setup).expect("a wallet");
    let (till, _found) = Till::open(wallet, 600_000, &store).expect("a till");
    let desk = Desk::new(Ledger::new(store.clone()), Some(till), world.home.keys.clone(), clock::system());
    // A payment that nobody has waited for any more may still be unbooked: that is credit.
    desk.serve(Order::Reconcile { from_ms: 0, to_ms: u64::MAX, book: true }).await.expect("an answer");
    let told =
        desk.serve(Order::Reconcile { from_ms: 0, to_ms: u64::MAX, book: false }).await.expect("an answer");
    assert_eq!((&told["clean"], &told["balance"]["rest_msat"]), (&true.into(), &0.into()), "{told}");
    let booked = store.balance(&Account::Wallet("nwc".into())).expect("readable");
    assert_eq!(booked, i128::from(world.vault.provider_msat()));
    assert_eq!(world.vault.provider_msat() + world.vault.customer_msat(), had, "nothing is lost on the way");
    let earned = store.balances().expect("readable").into_iter();
    let earned: i128 =
        earned.filter(|(account, _)| matches!(account, Account::Revenue { .. })).map(|(_, msat)| -msat).sum();
    assert_eq!(earned, i128::from(delivered as u64 * PRICE), "each delivery is charged once");
    eprintln!(
        "{orders} mixed orders, {delivered} delivered, {died} kills, {} invoices, {} msat in wallet and books, {:?}",
        world.vault.made(),
        booked,
        began.elapsed()
    );
}
