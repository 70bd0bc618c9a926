//! Jobs that are paid by a hold invoice: locked when the job is taken, settled when it is delivered, given back when it
//! is not. The wallet is the test's own, with real books (`vault`).

use std::time::Duration;

use coinop::control::Ask;
use coinop::desk::Order;
use coinop::ledger::export::{Format, export};
use coinop::ledger::report::Window;
use coinop::ledger::{self, Purse, transfer};
use coinop::node::Node;
use coinop::protocol::draft::Draft;
use coinop::protocol::{Code, Status};
use coinop::relay::local::LocalRelay;
use coinop::store::money::Account;
use coinop::store::{InvoiceState, JobState};
use nostr_sdk::prelude::{Event, Keys};
use serde_json::Value;
use tempfile::TempDir;

use crate::faults::hash_of;
use crate::support::backend::{Backstage, Step};
use crate::support::buyer::Buyer;
use crate::support::stage::{Stage, job};
use crate::support::{now_s, throughout, until};
use crate::vault::{At, FUNDS_MSAT, Mood, Vault};

/// What a job costs here, msat: not whole sats, so that something is left over.
const PRICE: u64 = 19_500;
/// What is locked for it.
const LOCK: u64 = 20_000;

/// A node's place beside a vault and a relay.
struct Counter {
    vault: Vault,
    relay: LocalRelay,
    stage: Stage,
    _keys: TempDir,
}

impl Counter {
    async fn open() -> Counter {
        Counter::with(&[]).await
    }

    async fn with(more: &[(&str, &str)]) -> Counter {
        let (relay, vault) = (LocalRelay::start().await.expect("a relay"), Vault::open().await);
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("wallet");
        crate::deal::write_secret(&file, &vault.provider);
        let file = file.display().to_string();
        let mut settings = vec![
            ("payment.wallet", "nwc"),
            ("payment.wallet_key_file", file.as_str()),
            ("payment.prices", "* base_msat=19500"),
        ];
        settings.extend(more);
        let stage = Stage::new(&[&relay.url()], &settings);
        Counter { vault, relay, stage, _keys: dir }
    }

    async fn buyer(&self) -> Buyer {
        Buyer::at(&[self.relay.url()], self.stage.keys.public_key()).await
    }

    /// The wallet's sats are where the books say, all are there, and the comparison of both finds nothing.
    async fn check(&self, node: &Node, locked_msat: u64) {
        ledger::verify(node.store()).expect("books that add up");
        let balance = |account| node.ledger().balance(&account).expect("readable");
        assert_eq!(balance(Account::Wallet("nwc".into())), i128::from(self.vault.provider_msat()));
        assert_eq!(balance(Account::Locked("nwc".into())), i128::from(locked_msat));
        let all = self.vault.provider_msat() + self.vault.customer_msat() + locked_msat;
        assert_eq!(all, FUNDS_MSAT, "sats are neither made nor lost");
        let order = Order::Reconcile { from_ms: 0, to_ms: u64::MAX, book: false };
        let order = serde_json::to_value(order).expect("JSON");
        let told = self.stage.ask(Ask::Desk(order)).await.expect("an answer");
        assert_eq!((&told["clean"], &told["balance"]["rest_msat"]), (&true.into(), &0.into()), "{told}");
    }

    /// Nothing is left of the deal: the customer has all it had, here and at home.
    async fn check_whole(&self, node: &Node, buyer: &Buyer, bolt11: &str) {
        until("the invoice to be closed", async || {
            (invoice_state(node, bolt11) == InvoiceState::Closed).then_some(())
        })
        .await;
        assert_eq!((self.vault.at(bolt11), self.vault.customer_msat()), (At::Failed, FUNDS_MSAT));
        assert_eq!(purse(node, buyer), Purse::default());
        self.check(node, 0).await;
    }
}

fn invoice_state(node: &Node, bolt11: &str) -> InvoiceState {
    node.store().invoice(&hash_of(bolt11)).expect("readable").expect("an invoice").1
}

fn purse(node: &Node, buyer: &Buyer) -> Purse {
    node.ledger().purse(&buyer.keys.public_key().to_hex()).expect("readable")
}

/// A request that is quoted, and its invoice.
async fn quoted(buyer: &Buyer) -> (Event, String) {
    quoted_for(buyer, PRICE).await
}

/// The same, where so much is missing.
async fn quoted_for(buyer: &Buyer, missing_msat: u64) -> (Event, String) {
    quoted_as(buyer, &buyer.order(None, &["true"]), missing_msat).await
}

async fn quoted_as(buyer: &Buyer, draft: &Draft, missing_msat: u64) -> (Event, String) {
    let request = buyer.post(draft).await;
    let told = buyer.feedback(&request, Status::PaymentRequired).await;
    let (msat, bolt11) = told.amount.expect("an amount");
    assert_eq!(msat, missing_msat.div_ceil(1_000) * 1_000);
    (request, bolt11.expect("an invoice"))
}

fn posted(node: &Node, id: &str) -> bool {
    node.ledger().transfer(id).expect("readable").is_some()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_locked_is_taken_when_the_job_is_delivered_and_charged_and_the_rest_is_credit() {
    let counter = Counter::open().await;
    let stage = Backstage::new(&[]);
    stage.hold(true);
    let (node, buyer) = (counter.stage.start_on(stage.clone()).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    assert!(counter.vault.is_hold(&bolt11));
    let quote = buyer.feedback(&request, Status::PaymentRequired).await.extra.expect("words");
    assert!(quote.contains("given back when it is not"), "{quote}");
    counter.vault.pays(&bolt11, LOCK);
    buyer.accepted(&request).await;
    assert_eq!(counter.vault.at(&bolt11), At::Locked(LOCK), "nothing is taken before there is a result");
    let (held, rest) = (i128::from(PRICE), i128::from(LOCK - PRICE));
    assert_eq!(purse(&node, &buyer), Purse { available_msat: rest, held_msat: held, refunding_msat: 0 });
    counter.check(&node, LOCK).await;
    let (mut journal, zone) = (Vec::new(), jiff::tz::TimeZone::UTC);
    let all = Window { from_ms: 0, to_ms: u64::MAX, zone };
    export(&counter.stage.config.data_dir, &all, Format::Hledger, &mut journal).expect("exported");
    let journal = String::from_utf8(journal).expect("text");
    assert!(journal.contains("    assets:locked:nwc  20000 msat\n"), "{journal}");

    stage.hold(false);
    buyer.result(&request).await;
    assert_eq!(counter.vault.at(&bolt11), At::Settled(LOCK));
    assert_eq!(purse(&node, &buyer), Purse { available_msat: rest, ..Purse::default() });
    assert_eq!(invoice_state(&node, &bolt11), InvoiceState::Paid);
    counter.check(&node, 0).await;
    // The whole corridor in the customer's books, and no preimage in the log.
    let (id, hash) = (request.id.to_hex(), hash_of(&bolt11));
    let postings = node.store().postings(&buyer.keys.public_key().to_hex(), 10).expect("readable");
    let ids: Vec<String> = postings.into_iter().rev().map(|p| p.transfer.id).collect();
    let wanted = [
        transfer::locked_id(&hash),
        transfer::hold_id(&id),
        transfer::unlocked_id(&hash),
        transfer::paid_id(&hash),
        transfer::resolve_id(&id),
    ];
    assert_eq!(ids, wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_fails_or_is_cancelled_gives_back_all_that_was_locked() {
    let counter = Counter::open().await;
    let script = [Step::Dies, Step::Hangs];
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&script)).await, counter.buyer().await);
    let (fails, bolt11) = quoted(&buyer).await;
    counter.vault.pays(&bolt11, LOCK);
    buyer.error(&fails, Code::Internal).await;
    counter.check_whole(&node, &buyer, &bolt11).await;

    let (cancelled, bolt11) = quoted(&buyer).await;
    counter.vault.pays(&bolt11, LOCK);
    buyer.accepted(&cancelled).await;
    counter.check(&node, LOCK).await;
    buyer.cancel(&cancelled).await;
    buyer.error(&cancelled, Code::Cancelled).await;
    counter.check_whole(&node, &buyer, &bolt11).await;
    assert_eq!(counter.vault.asked("settle_hold_invoice"), 0);
    assert!(!posted(&node, &transfer::paid_id(&hash_of(&bolt11))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn less_than_was_asked_is_given_back_and_the_customer_is_told() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    counter.vault.pays(&bolt11, LOCK - 1);
    let words = "20000 msat are asked for, and 19999 are locked; nothing of it is taken";
    until("the refusal", async || {
        let said = buyer.feedbacks(&request).await.into_iter();
        said.filter_map(|f| f.extra).any(|extra| extra.contains(words)).then_some(())
    })
    .await;
    counter.check_whole(&node, &buyer, &bolt11).await;
    assert!(job(node.store(), &request).is_none());
    assert!(node.store().balances().expect("readable").is_empty(), "nobody's account has moved");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_locked_for_a_request_that_was_taken_back_is_given_back() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    buyer.cancel(&request).await;
    let id = request.id.to_hex();
    let recorded = async || (!node.store().cancelled(&id).expect("readable").is_empty()).then_some(());
    until("the cancel to be recorded", recorded).await;
    counter.vault.pays(&bolt11, LOCK);
    let reason = buyer.error(&request, Code::Cancelled).await;
    assert!(reason.contains("nothing of it is taken"), "{reason}");
    counter.check_whole(&node, &buyer, &bolt11).await;
    assert!(job(node.store(), &request).is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_is_gone_before_the_delivery_delivers_nothing() {
    let counter = Counter::open().await;
    let stage = Backstage::new(&[]);
    stage.hold(true);
    let (node, buyer) = (counter.stage.start_on(stage.clone()).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    counter.vault.pays(&bolt11, LOCK);
    buyer.accepted(&request).await;
    counter.vault.lock_runs_out(&bolt11);
    stage.hold(false);
    let reason = buyer.error(&request, Code::PaymentRequired).await;
    assert!(reason.contains("the lock is gone"), "{reason}");
    counter.check_whole(&node, &buyer, &bolt11).await;
    assert_eq!(job(node.store(), &request).expect("known").state, JobState::Failed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wallet_that_will_not_settle_or_is_away_is_asked_again_and_nothing_is_delivered_until_it_does() {
    for mood in [Mood::WillNotSettle, Mood::Away, Mood::SettlesInSilence] {
        let counter = Counter::open().await;
        let stage = Backstage::new(&[]);
        stage.hold(true);
        let (node, buyer) = (counter.stage.start_on(stage.clone()).await, counter.buyer().await);
        let (request, bolt11) = quoted(&buyer).await;
        counter.vault.pays(&bolt11, LOCK);
        buyer.accepted(&request).await;
        counter.vault.is(mood);
        stage.hold(false);
        let asked = async || (counter.vault.asked("settle_hold_invoice") > 0).then_some(());
        until("the wallet to be asked", asked).await;
        let span = Duration::from_secs(1);
        throughout(span, "nothing is delivered unpaid", async || {
            buyer.ends(&request).await.is_empty() || mood == Mood::SettlesInSilence
        })
        .await;
        counter.vault.is(Mood::Well);
        buyer.result(&request).await;
        assert_eq!(counter.vault.at(&bolt11), At::Settled(LOCK), "{mood:?}");
        counter.check(&node, 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_waits_for_the_wallet_can_be_cancelled_and_ends_at_its_deadline() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    counter.vault.is(Mood::WillNotSettle);
    let asked = || counter.vault.asked("settle_hold_invoice");
    let (cancelled, bolt11) = quoted(&buyer).await;
    counter.vault.pays(&bolt11, LOCK);
    until("the wallet to be asked", async || (asked() > 0).then_some(())).await;
    buyer.cancel(&cancelled).await;
    buyer.error(&cancelled, Code::Cancelled).await;
    counter.check_whole(&node, &buyer, &bolt11).await;

    let before = asked();
    let expires = Draft { expiration: Some(now_s() + 6), ..buyer.order(None, &["true"]) };
    let (late, bolt11) = quoted_as(&buyer, &expires, PRICE).await;
    counter.vault.pays(&bolt11, LOCK);
    let reason = buyer.error(&late, Code::PaymentRequired).await;
    assert!(reason.contains("so says the vault"), "{reason}");
    assert!(asked() > before + 2, "asked again and again: {} times", asked() - before);
    counter.check_whole(&node, &buyer, &bolt11).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_could_not_be_given_back_is_given_back_later_also_by_the_next_life() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[Step::Hangs])).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    counter.vault.pays(&bolt11, LOCK);
    buyer.accepted(&request).await;
    counter.vault.is(Mood::WillNotCancel);
    buyer.cancel(&request).await;
    buyer.error(&request, Code::Cancelled).await;
    until("the wallet to be asked", async || (counter.vault.asked("cancel_hold_invoice") > 1).then_some(()))
        .await;
    assert_eq!(
        (counter.vault.at(&bolt11), invoice_state(&node, &bolt11)),
        (At::Locked(LOCK), InvoiceState::Open)
    );
    assert_eq!(purse(&node, &buyer), Purse::default(), "in the books it is gone with the job");
    node.drain().await.expect("an end");
    counter.vault.is(Mood::Well);
    let node = counter.stage.start_on(Backstage::new(&[])).await;
    counter.check_whole(&node, &buyer, &bolt11).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stops_while_the_wallet_will_not_settle_delivers_in_its_next_life() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    counter.vault.is(Mood::WillNotSettle);
    counter.vault.pays(&bolt11, LOCK);
    until("the wallet to be asked", async || (counter.vault.asked("settle_hold_invoice") > 0).then_some(()))
        .await;
    node.drain().await.expect("an end");
    assert!(buyer.ends(&request).await.is_empty());
    assert_eq!(counter.vault.at(&bolt11), At::Locked(LOCK));
    counter.vault.is(Mood::Well);
    let node = counter.stage.start_on(Backstage::new(&[])).await;
    buyer.result(&request).await;
    assert_eq!(counter.vault.at(&bolt11), At::Settled(LOCK));
    counter.check(&node, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_taken_for_a_job_that_fails_after_all_is_credit() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    counter.vault.is(Mood::SettlesAndIsAway);
    counter.vault.pays(&bolt11, LOCK);
    let settled = async || (counter.vault.at(&bolt11) == At::Settled(LOCK)).then_some(());
    until("the wallet to settle", settled).await;
    node.drain().await.expect("an end");
    assert!(buyer.ends(&request).await.is_empty());
    counter.vault.is(Mood::Well);
    let node = counter.stage.start_on(Backstage::new(&[Step::Dies])).await;
    buyer.error(&request, Code::Internal).await;
    until("the payment to be booked", async || {
        (invoice_state(&node, &bolt11) == InvoiceState::Paid).then_some(())
    })
    .await;
    assert_eq!(purse(&node, &buyer), Purse { available_msat: LOCK.into(), ..Purse::default() });
    counter.check(&node, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_locked_can_be_taken_after_the_setting_was_turned_off() {
    let mut counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[Step::Hangs])).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    counter.vault.pays(&bolt11, LOCK);
    buyer.accepted(&request).await;
    node.drain().await.expect("an end");
    counter.stage.config.payment.hold_invoices = false;
    let node = counter.stage.start_on(Backstage::new(&[])).await;
    buyer.result(&request).await;
    counter.check(&node, 0).await;
    let (_, bolt11) = quoted_for(&buyer, PRICE - (LOCK - PRICE)).await;
    assert!(!counter.vault.is_hold(&bolt11));
}

/// `coinop request --pay` with the customer's purse; what it printed as JSON, what it said, and its exit code.
async fn ordered(counter: &Counter, more: &[&str]) -> (Value, String, Option<i32>) {
    let dir = tempfile::tempdir().expect("a folder");
    let (key, wallet) = (dir.path().join("key"), dir.path().join("purse"));
    coinop::keys::create(&key, &Keys::generate(), None).expect("a key file");
    crate::deal::write_secret(&wallet, &counter.vault.customer);
    let (key, provider) = (key.display().to_string(), counter.stage.keys.public_key().to_hex());
    let wallet = format!("payment.wallet_key_file={}", wallet.display());
    let mut args = vec!["request", "--pay", "--json", "--key", &key, "--provider", &provider, "--relay"];
    let relay = counter.relay.url();
    args.extend([&relay, "--max", "50000", "--set", "payment.wallet=nwc", "--set", &wallet]);
    args.extend(["--kind", "5930", "--cmd", "true"]);
    args.extend(if more.is_empty() { &["--timeout", "60"] } else { more });
    let out = crate::deal::run(dir.path().join("home"), &args).await;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    let told = serde_json::from_slice(&out.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    (told, said, out.status.code())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_customer_whose_payment_is_locked_waits_for_the_result_and_has_paid_when_it_comes() {
    let counter = Counter::open().await;
    let stage = Backstage::new(&[]);
    stage.hold(true);
    let node = counter.stage.start_on(stage.clone()).await;
    let goes_on = async {
        let locked = async || (counter.vault.customer_msat() == FUNDS_MSAT - LOCK).then_some(());
        until("the payment to be locked", locked).await;
        until("the job to run", async || (stage.made() > 0).then_some(())).await;
        stage.hold(false);
    };
    let ((told, said, exit), ()) = tokio::join!(ordered(&counter, &[]), goes_on);
    assert_eq!((told["status"].as_str(), exit), (Some("result"), Some(0)), "{said}");
    assert_eq!(
        (&told["paid"]["amount_msat"], &told["paid"]["fee_msat"]),
        (&LOCK.into(), &0.into()),
        "{told}"
    );
    let order = [": processing", "paid 20 sat"].map(|word| said.find(word).expect(&said));
    assert!(order.is_sorted(), "the customer listens while its payment is under way: {said}");
    assert!(said.contains("result "), "{said}");
    counter.check(&node, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_customer_whose_payment_comes_back_has_lost_nothing_and_is_told_so() {
    let counter = Counter::open().await;
    let node = counter.stage.start_on(Backstage::new(&[Step::Dies])).await;
    let (told, said, exit) = ordered(&counter, &[]).await;
    assert_eq!((told["status"].as_str(), exit), (Some("failed"), Some(4)), "{said}");
    assert_eq!(told["paid"], Value::Null, "{said}");
    assert!(said.contains("not paid: "), "{said}");
    assert_eq!(counter.vault.customer_msat(), FUNDS_MSAT);
    counter.check(&node, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_customer_who_has_waited_for_too_long_takes_the_request_back_and_its_payment_comes_back() {
    let counter = Counter::open().await;
    let node = counter.stage.start_on(Backstage::new(&[Step::Hangs])).await;
    let (told, said, exit) = ordered(&counter, &["--timeout", "4"]).await;
    assert_eq!((told["status"].as_str(), exit), (Some("timeout"), Some(5)), "{said}");
    assert_eq!(told["paid"], Value::Null, "{said}");
    assert_eq!(counter.vault.customer_msat(), FUNDS_MSAT);
    counter.check(&node, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_hold_invoices_by_setting_or_by_the_wallet_or_for_long_enough_jobs_are_paid_ahead() {
    let off = Counter::with(&[("payment.hold_invoices", "false")]).await;
    let (refused, short) = (Counter::open().await, Counter::open().await);
    refused.vault.is(Mood::MayNotHold);
    // An hour in the queue alone may be twelve blocks; eighteen are the wallet's own margin.
    short.vault.locks_for(12 + 18);
    let long = Counter::with(&[("queue.max_wait_ms", "172_800_000")]).await;
    for counter in [off, refused, short, long] {
        let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
        let (request, bolt11) = quoted(&buyer).await;
        assert!(!counter.vault.is_hold(&bolt11));
        counter.vault.pays(&bolt11, LOCK);
        buyer.result(&request).await;
        counter.check(&node, 0).await;
        assert!(!posted(&node, &transfer::locked_id(&hash_of(&bolt11))));
    }
}
