//! kill -9 at each sync and each write of a job that is paid by a hold invoice, delivered or failed: nothing is ever
//! delivered before its payment is taken, it is taken once and charged once, and what is not delivered is given back.
//! The wallet (`vault`) lives on while the node is dead.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use coinop::ledger::{self, transfer};
use coinop::protocol::Status;
use coinop::relay::local::LocalRelay;
use coinop::store::money::Account;
use coinop::store::{InvoiceState, Store};
use futures_util::StreamExt;
use nostr_sdk::prelude::Event;
use tempfile::TempDir;

use crate::faults::hash_of;
use crate::support::buyer::{Buyer, End};
use crate::support::process::{Home, Running};
use crate::support::{PATIENCE, until};
use crate::vault::{At, FUNDS_MSAT, Vault};

const PRICE: u64 = 19_500;
const LOCK: u64 = 20_000;
/// Points beyond any deal.
const TOO_MANY: u32 = 150;
/// The first calls of `pwrite64` write zeros ahead of the log; one of them stands for all.
const ZEROS: u32 = 16;

struct Deal {
    vault: Vault,
    _relay: LocalRelay,
    home: Home,
    buyer: Buyer,
    request: Event,
    _keys: TempDir,
}

impl Deal {
    /// A request that can be carried out, or one whose repository is not there.
    async fn open(fails: bool) -> Deal {
        let (relay, vault) = (LocalRelay::start().await.expect("a relay"), Vault::open().await);
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("wallet");
        crate::deal::write_secret(&file, &vault.provider);
        let file = format!("payment.wallet_key_file={}", file.display());
        let set = ["payment.wallet=nwc", &file, "payment.prices=* base_msat=19500", "drain_timeout_ms=500"];
        let flags: Vec<&str> = set.iter().flat_map(|set| ["--set", set]).collect();
        let home = Home::new(&[relay.url()], &flags);
        let buyer = Buyer::at(&[relay.url()], home.keys.public_key()).await;
        let repo = fails.then_some("http://127.0.0.1:1/nowhere.git");
        let request = buyer.post(&buyer.order(repo, &["echo sold"])).await;
        Deal { vault, _relay: relay, home, buyer, request, _keys: dir }
    }

    /// Locks the payment when it is asked for, and waits until the end is told and nothing is left to do. `None`: the
    /// node died.
    async fn goes_on(&self, node: &mut Running, bolt11: &mut Option<String>) -> Option<()> {
        let id = self.request.id.to_hex();
        until("the end, or the node's", async || {
            if node.try_ended().is_some() {
                return Some(None);
            }
            if bolt11.is_none() {
                let said = self.buyer.feedbacks(&self.request).await;
                let quote = said.into_iter().find(|f| f.status == Status::PaymentRequired)?;
                let (msat, invoice) = quote.amount.expect("an amount");
                let invoice = invoice.expect("an invoice");
                assert_eq!(msat, LOCK);
                self.vault.pays(&invoice, LOCK);
                *bolt11 = Some(invoice);
            }
            self.check_unpaid_is_undelivered(bolt11.as_deref()).await;
            let store = Store::read_only(&self.home.data).ok()?;
            let answer = store.job(&id).ok()??.answer?;
            let told = !store.deliveries(&answer).ok()?.is_empty();
            let hash = hash_of(bolt11.as_deref()?);
            let (_, state) = store.invoice(&hash).ok()??;
            (told && state != InvoiceState::Open).then_some(Some(()))
        })
        .await
    }

    async fn check_unpaid_is_undelivered(&self, bolt11: Option<&str>) {
        let ends = self.buyer.ends(&self.request).await;
        if ends.iter().any(|end| matches!(end, End::Result(_))) {
            let bolt11 = bolt11.expect("delivered without an invoice");
            assert_eq!(self.vault.at(bolt11), At::Settled(LOCK), "delivered unpaid");
        }
    }

    /// What a life that broke off has told is in the log that it left, and its books add up. Whether the payment was
    /// taken and nothing of it is in the log.
    async fn check_left(&self, point: &str, bolt11: Option<&str>) -> bool {
        self.check_unpaid_is_undelivered(bolt11).await;
        let Ok(store) = Store::read_only(&self.home.data) else { return false };
        for event in self.buyer.stored(&self.request).await {
            let kept = store.answer(&event.id.to_hex()).expect("readable");
            assert!(kept.is_some(), "{point}: told and not recorded: {event:?}");
        }
        ledger::verify_log(&self.home.data).unwrap_or_else(|broken| panic!("{point}: {broken}"));
        let booked =
            |bolt11| store.transfer(&transfer::paid_id(&hash_of(bolt11))).expect("readable").is_some();
        bolt11.is_some_and(|bolt11| self.vault.at(bolt11) == At::Settled(LOCK) && !booked(bolt11))
    }

    async fn check_done(&self, point: &str, bolt11: &str, fails: bool) {
        let store = self.home.store();
        let (id, hash) = (self.request.id.to_hex(), hash_of(bolt11));
        let customer = self.buyer.keys.public_key().to_hex();
        let said = self.buyer.feedbacks(&self.request).await;
        let quotes = said.iter().filter(|f| f.status == Status::PaymentRequired).count();
        assert_eq!(quotes, 1, "{point}: asked once");
        let ends = self.buyer.ends(&self.request).await;
        assert_eq!(ends.len(), 1, "{point}: {ends:?}");
        assert_eq!(matches!(ends[0], End::Error { .. }), fails, "{point}: {ends:?}");

        let posted = store.postings(&customer, 100).expect("readable");
        let mut posted: Vec<String> = posted.into_iter().map(|p| p.transfer.id).collect();
        let mut wanted = vec![
            transfer::locked_id(&hash),
            transfer::unlocked_id(&hash),
            transfer::hold_id(&id),
            transfer::resolve_id(&id),
        ];
        wanted.extend((!fails).then(|| transfer::paid_id(&hash)));
        posted.sort();
        wanted.sort();
        assert_eq!(posted, wanted, "{point}");

        let (at, paid, rest) = match fails {
            true => (At::Failed, 0, 0),
            false => (At::Settled(LOCK), LOCK, LOCK - PRICE),
        };
        assert_eq!(self.vault.at(bolt11), at, "{point}");
        assert_eq!((self.vault.provider_msat(), self.vault.customer_msat()), (paid, FUNDS_MSAT - paid));
        let balance = |account: Account| store.balance(&account).expect("readable");
        assert_eq!(balance(Account::Wallet("nwc".into())), paid.into(), "{point}");
        assert_eq!(balance(Account::Locked("nwc".into())), 0, "{point}");
        assert_eq!(balance(Account::Held(customer.clone())), 0, "{point}");
        assert_eq!(balance(Account::Credit(customer)), -i128::from(rest), "{point}");
        let verified = ledger::verify(&store).unwrap_or_else(|broken| panic!("{point}: {broken}"));
        assert_eq!((verified.sum_msat, verified.open_holds), (0, 0), "{point}");
    }
}

/// One life that is killed at its N-th call, and the one after it: whether it was killed before its work was done, and
/// whether between settling and writing that down.
async fn killed_at(calls: &str, n: u32, fails: bool) -> (bool, bool) {
    let point = format!("{calls} {n}, {}", if fails { "fails" } else { "delivered" });
    let deal = Deal::open(fails).await;
    let mut bolt11 = None;
    let (trace, inject) = (format!("trace={calls}"), format!("inject={calls}:signal=SIGKILL:when={n}"));
    let strace = ["strace", "-qq", "-f", "-o", "/dev/null", "-e", &trace, "-e", &inject];
    let mut node = deal.home.start_under(&strace.map(str::to_owned));
    if deal.goes_on(&mut node, &mut bolt11).await.is_some() {
        node.terminate();
    }
    // The kill may also come during the orderly end.
    let killed = !node.ended(PATIENCE).await.success();
    drop(node);
    let between = deal.check_left(&point, bolt11.as_deref()).await;

    let mut node = deal.home.start();
    let went_on = deal.goes_on(&mut node, &mut bolt11).await;
    assert!(went_on.is_some(), "{point}: {}", node.log());
    assert!(node.stop().await.success(), "{point}");
    deal.check_done(&point, &bolt11.expect("an invoice"), fails).await;
    (killed, between)
}

async fn killed_at_every(test: &str, all: &[&str], fails: bool) {
    if let Err(error) = Command::new("strace").arg("-V").stdout(Stdio::null()).status() {
        return crate::skip::skip(test, &format!("strace: {error}"));
    }
    let betweens = AtomicU32::new(0);
    for calls in all {
        let (last, tried) = (AtomicU32::new(TOO_MANY), AtomicU32::new(0));
        let skipped = |n: &u32| *calls == "pwrite64" && (2..ZEROS).contains(n);
        futures_util::stream::iter((1..TOO_MANY).filter(|n| !skipped(n)))
            .for_each_concurrent(2, async |n| {
                if n >= last.load(Ordering::SeqCst) {
                    return;
                }
                let (killed, between) = killed_at(calls, n, fails).await;
                betweens.fetch_add(u32::from(between), Ordering::SeqCst);
                if killed {
                    tried.fetch_add(1, Ordering::SeqCst);
                } else {
                    last.fetch_min(n, Ordering::SeqCst);
                }
            })
            .await;
        let last = last.load(Ordering::SeqCst);
        assert!((8..TOO_MANY).contains(&last), "{calls}: {last} points");
        let end = if fails { "fails" } else { "is delivered" };
        eprintln!("a job with a lock {end}, {calls}: killed at {} calls", tried.into_inner());
    }
    let betweens = betweens.into_inner();
    eprintln!("{betweens} of them between taking and booking");
    assert_eq!(betweens == 0, fails, "a kill between taking and booking");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_node_killed_at_any_write_takes_what_is_locked_once_and_never_delivers_before() {
    let test = "a_node_killed_at_any_write_takes_what_is_locked_once_and_never_delivers_before";
    killed_at_every(test, &["fdatasync", "pwrite64", "sendto"], false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_node_killed_at_any_sync_or_word_of_a_job_that_fails_gives_back_what_is_locked() {
    let test = "a_node_killed_at_any_sync_or_word_of_a_job_that_fails_gives_back_what_is_locked";
    killed_at_every(test, &["fdatasync", "sendto"], true).await;
}
