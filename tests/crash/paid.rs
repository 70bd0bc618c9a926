//! A job that costs something, paid from credit: the node is killed at every write of its life, and meets a disk that
//! takes no more at each of them. Afterwards it was charged once, nothing stays held, and the books add up.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use coinop::ledger::{self, Committed, Ledger, transfer};
use coinop::relay::local::LocalRelay;
use coinop::store::money::Account;
use coinop::store::record::Record;
use coinop::store::{self, Head, Holder, Options, Posted, Store};
use futures_util::StreamExt;
use nostr_sdk::prelude::Event;

use super::check_done_once;
use super::disk::stopped;
use super::support::buyer::{Buyer, printed};
use super::support::process::{Home, Running};
use super::support::skip::skip;
use super::support::{PATIENCE, until};
use super::writes::{ABREAST, TOO_MANY, delivered, injecting, lives_through, strace_works};

const GRANT_MSAT: u64 = 100_000;
/// By time, so that the hold is more than the charge and something must come back.
const PRICE: &str = "payment.prices=* base_msat=5000 per_second_msat=10";
/// The first calls of `pwrite64` write zeros ahead of the log, 64 KiB each; one of them stands for all, for the same
/// zeros are met one by one in `writes`.
const ZEROS: Range<u32> = 2..16;

/// A node with a price, and a customer with credit there, before the node's first start.
struct Shop {
    _relay: LocalRelay,
    home: Home,
    buyer: Buyer,
    request: Event,
}

impl Shop {
    async fn open() -> Shop {
        let relay = LocalRelay::start().await.expect("a relay");
        let home = Home::new(&[relay.url()], &["--set", PRICE, "--set", "drain_timeout_ms=500"]);
        let buyer = Buyer::at(&[relay.url()], home.keys.public_key()).await;
        grant(&home, &buyer).await;
        // Before the node starts, so that nothing has to be waited for: it finds the request in the history.
        let request = buyer.post(&buyer.order(None, &["echo sold"])).await;
        Shop { _relay: relay, home, buyer, request }
    }

    fn postings(&self) -> Vec<Posted> {
        self.home.store().postings(&self.customer(), 100).expect("readable")
    }

    fn customer(&self) -> String {
        self.buyer.keys.public_key().to_hex()
    }

    /// What a life that broke off had told the customer is in the log that it left, money and all; the place that
    /// the log had reached.
    async fn check_told(&self, point: &str) -> Head {
        let told = self.buyer.stored(&self.request).await;
        let ends = self.buyer.ends(&self.request).await.len();
        let store = self.home.store();
        for event in &told {
            let kept = store.answer(&event.id.to_hex()).expect("readable");
            assert!(kept.is_some(), "{point}: told and not recorded: {event:?}");
        }
        let id = self.request.id.to_hex();
        let posted = |id: &str| store.transfer(id).expect("readable").is_some();
        assert!(posted("grant:first"), "{point}");
        assert!(told.is_empty() || posted(&transfer::hold_id(&id)), "{point}: taken without a hold");
        assert!(ends == 0 || posted(&transfer::resolve_id(&id)), "{point}: delivered and not charged");
        // No half of a batch: job and hold, end and capture.
        let row = store.job(&id).expect("readable");
        assert_eq!(row.is_some(), posted(&transfer::hold_id(&id)), "{point}: {row:?}");
        let ended = row.as_ref().is_some_and(|row| row.answer.is_some());
        assert_eq!(ended, posted(&transfer::resolve_id(&id)), "{point}: {row:?}");
        ledger::verify_log(&self.home.data).unwrap_or_else(|broken| panic!("{point}: {broken}"));
        store.head()
    }

    /// After everything: one end, one charge, the rest is back, and the log goes on from where it was.
    async fn check_sold_once(&self, point: &str, before: &Head) {
        check_done_once(&self.home, &self.buyer, &self.request).await;
        let hash = store::hash_of(&self.home.data, before.seq).expect("readable");
        assert_eq!(hash.as_ref(), Some(&before.hash), "{point}: what was in the log still is");
        let store = self.home.store();
        let id = self.request.id.to_hex();
        let history = store.history(&id).expect("readable");
        let seqs = |f: fn(&Record) -> bool| {
            history.iter().filter(|e| f(&e.record)).map(|e| e.seq).collect::<Vec<_>>()
        };
        let accepted = seqs(|record| matches!(record, Record::Accepted { .. }));
        let closed = seqs(|record| matches!(record, Record::Closed { .. }));
        assert_eq!((accepted.len(), closed.len()), (1, 1), "{point}");
        let mut posted: Vec<(String, u64)> =
            self.postings().into_iter().map(|p| (p.transfer.id, p.seq)).collect();
        posted.reverse();
        let (hold, resolve) = (transfer::hold_id(&id), transfer::resolve_id(&id));
        let grant = ("grant:first".to_owned(), posted[0].1);
        assert_eq!(posted, [grant, (hold, accepted[0]), (resolve, closed[0])], "{point}");

        let price =
            store.job(&id).expect("readable").and_then(|row| row.summary).expect("a summary").price_msat;
        assert!((5_000..GRANT_MSAT).contains(&price), "{point}: {price}");
        let balance = |account: Account| store.balance(&account).expect("readable");
        assert_eq!(balance(Account::Credit(self.customer())), i128::from(price) - i128::from(GRANT_MSAT));
        assert_eq!(balance(Account::Held(self.customer())), 0, "{point}");
        let revenue = Account::Revenue { skill: "generic".into(), place: "local".into() };
        assert_eq!(balance(revenue), -i128::from(price), "{point}");
        let verified = ledger::verify(&store).unwrap_or_else(|broken| panic!("{point}: {broken}"));
        assert_eq!((verified.sum_msat, verified.open_holds, verified.transfers), (0, 0, 3), "{point}");
    }
}

/// What the owner's command does while the node is down.
async fn grant(home: &Home, buyer: &Buyer) {
    let holder = Holder::new(home.keys.public_key().to_hex());
    let locks = home.data.parent().expect("a folder").to_path_buf();
    let options = Options { key_locks: Some(locks), ..Options::default() };
    let store = Store::open_with(&home.data, &holder, options).expect("a store");
    let gift = transfer::grant("first", &buyer.keys.public_key().to_hex(), GRANT_MSAT, "to begin with");
    let given = Ledger::new(store.clone()).post(gift).await.expect("a grant");
    assert!(matches!(given, Committed::New(_)));
    store.close().expect("an orderly end");
}

// === killed

/// A killed life, at each sync of the log a second one that is killed at the same call, and one that lasts. `false`:
/// the N-th call never came, and the first life did all the work.
async fn killed_at(calls: &'static str, n: u32) -> bool {
    let point = format!("{calls} {n}");
    let shop = Shop::open().await;
    let mut befores = Vec::new();
    let mut killed = Vec::new();
    for _ in 0..if calls == "fdatasync" { 2 } else { 1 } {
        let mut node = shop.home.start_under(&injecting(calls, "signal=SIGKILL", &n.to_string()));
        if lives_through(&mut node, &shop.home, &shop.buyer, &shop.request).await {
            // The second life may find everything done while it still starts.
            let up = async || (node.try_ended().is_some() || node.status().is_some()).then_some(());
            until("the node to serve or to end", up).await;
            if node.try_ended().is_none() {
                node.terminate();
            }
        }
        // The kill may also come during the orderly end.
        killed.push(!node.ended(PATIENCE).await.success());
        drop(node);
        befores.push(shop.check_told(&point).await);
    }

    let node = shop.home.start();
    assert_eq!(printed(&shop.buyer.result(&shop.request).await), "sold\n", "{point}");
    delivered(&shop.home, &shop.buyer, &shop.request).await;
    assert!(node.stop().await.success(), "{point}");
    for before in &befores {
        shop.check_sold_once(&point, before).await;
    }
    killed[0]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paid_job_killed_at_every_write_is_charged_once() {
    if let Err(why) = strace_works() {
        return skip("a_paid_job_killed_at_every_write_is_charged_once", &why);
    }
    for calls in ["fdatasync", "pwrite64", "fsync", "rename,renameat,renameat2,unlink,unlinkat,ftruncate"] {
        let points = at_every(calls, zeros(calls), ABREAST, async |n| killed_at(calls, n).await).await;
        eprintln!("paid, {calls}: killed at {points} calls");
    }
}

/// The points that another one stands for.
fn zeros(calls: &str) -> Range<u32> {
    if calls == "pwrite64" { ZEROS } else { 0..0 }
}

/// Tries one point after the other, `abreast` at once, until one is never met, without those that are left out. How many
/// were met.
pub async fn at_every(
    calls: &str,
    left_out: Range<u32>,
    abreast: usize,
    met: impl AsyncFn(u32) -> bool,
) -> u32 {
    let (last, tried) = (AtomicU32::new(TOO_MANY), AtomicU32::new(0));
    // Not as tasks of their own: a point is more waiting than work.
    futures_util::stream::iter((1..TOO_MANY).filter(|n| !left_out.contains(n)))
        .for_each_concurrent(abreast, async |n| {
            if n >= last.load(Ordering::SeqCst) {
                return;
            }
            if met(n).await {
                tried.fetch_add(1, Ordering::SeqCst);
            } else {
                last.fetch_min(n, Ordering::SeqCst);
            }
        })
        .await;
    let last = last.load(Ordering::SeqCst);
    assert!((2..TOO_MANY).contains(&last), "{calls}: {last} points");
    tried.load(Ordering::SeqCst)
}

// === a disk that takes no more

/// From the N-th call on each one fails; then the disk is mended and the node started again. `false`: the call never
/// came, and the first life did all the work.
async fn failing(calls: &'static str, errno: &'static str, n: u32) -> bool {
    let point = format!("{calls} {errno} {n}");
    let shop = Shop::open().await;
    let mut node = shop.home.start_under(&injecting(calls, &format!("error={errno}"), &format!("{n}+")));
    let words = said_or_served(&mut node, &shop, &point).await;
    let met = match &words {
        Some(words) => {
            let wanted = if errno == "ENOSPC" { "the disk is full" } else { "nput/output error" };
            assert!(words.contains(wanted), "{point}: {words}");
            if node.try_ended().is_none() {
                assert!(node.log().contains("no more jobs are taken"), "{point}: {}", node.log());
                node.terminate();
            }
            // An end that lost a write is no success.
            assert_eq!(node.ended(PATIENCE).await.code(), Some(10), "{point}: {}", node.log());
            true
        }
        None => {
            node.terminate();
            // The fault may also come during the orderly end.
            !node.ended(PATIENCE).await.success()
        }
    };
    drop(node);
    let before = shop.check_told(&point).await;

    let node = shop.home.start();
    assert_eq!(printed(&shop.buyer.result(&shop.request).await), "sold\n", "{point}");
    delivered(&shop.home, &shop.buyer, &shop.request).await;
    assert!(node.stop().await.success(), "{point}");
    shop.check_sold_once(&point, &before).await;
    met
}

/// What the node says when it stops taking jobs or ends; `None` once it has delivered.
async fn said_or_served(node: &mut Running, shop: &Shop, point: &str) -> Option<String> {
    until(&format!("{point}: the node to stop, to end, or to serve"), async || {
        if let Some(status) = node.try_ended() {
            assert_eq!(status.code(), Some(10), "{point}: {}", node.log());
            return Some(Some(node.log()));
        }
        if let Some(words) = stopped(node) {
            return Some(Some(words));
        }
        let answer = shop.home.job(&shop.request.id.to_hex())?.answer?;
        let words = shop.home.store().deliveries(&answer).ok()?;
        (!words.is_empty() && !shop.buyer.ends(&shop.request).await.is_empty()).then_some(None)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paid_job_on_a_disk_that_fails_at_any_write_is_charged_once() {
    if let Err(why) = strace_works() {
        return skip("a_paid_job_on_a_disk_that_fails_at_any_write_is_charged_once", &why);
    }
    // What is wrong with the disk makes no difference to the order of things, so the two take turns.
    for calls in ["fdatasync", "pwrite64"] {
        let errno = |n: u32| if n.is_multiple_of(2) { "ENOSPC" } else { "EIO" };
        let points = at_every(calls, zeros(calls), ABREAST, async |n| failing(calls, errno(n), n).await);
        eprintln!("paid, {calls}: failed from {} calls on", points.await);
    }
}
