//! Jobs that cost something, paid from credit: held before they run, charged for what they used, and given back whole
//! when they are not delivered.

use super::support::backend::{Backstage, Step};
use super::support::buyer::Buyer;
use super::support::stage::{Stage, job};
use super::support::until;
use coinop::ledger::{self, transfer};
use coinop::node::Node;
use coinop::protocol::{Code, Status};
use coinop::relay::local::LocalRelay;
use coinop::sandbox::sim::{Rule, Script, Sim};
use coinop::store::money::Account;
use coinop::store::{JobState, Posted};

const PRICE: &str = "generic base_msat=5000 per_second_msat=10,* free";

async fn stage(settings: &[(&str, &str)]) -> (LocalRelay, Stage, Buyer) {
    let relay = LocalRelay::start().await.expect("a relay");
    let stage = Stage::new(&[&relay.url()], settings);
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    (relay, stage, buyer)
}

async fn give(node: &Node, buyer: &Buyer, msat: u64) {
    let gift = transfer::grant("test", &buyer.keys.public_key().to_hex(), msat, "to begin with");
    node.ledger().post(gift).await.expect("a grant");
}

fn available(node: &Node, buyer: &Buyer) -> i128 {
    let purse = node.ledger().purse(&buyer.keys.public_key().to_hex()).expect("readable");
    assert_eq!(purse.held_msat, 0, "nothing stays held");
    purse.available_msat
}

fn postings(node: &Node, buyer: &Buyer) -> Vec<Posted> {
    node.store().postings(&buyer.keys.public_key().to_hex(), 100).expect("readable")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delivered_job_is_charged_for_what_it_used_and_the_rest_of_its_hold_returns() {
    let (_relay, stage, buyer) = stage(&[("payment.prices", PRICE)]).await;
    let node = stage.start().await;
    give(&node, &buyer, 100_000).await;
    let request = buyer.post(&buyer.order(None, &["sleep 0.3"])).await;
    let answer = buyer.result(&request).await;
    let row = job(node.store(), &request).expect("the job");
    let used = row.summary.expect("a summary");
    assert!(used.wall_ms >= 300, "{used:?}");
    assert_eq!(used.price_msat, 5_000 + used.wall_ms / 100);
    assert_eq!(answer.reply.proof.expect("a proof").price_msat, used.price_msat);
    assert_eq!(available(&node, &buyer), 100_000 - i128::from(used.price_msat));
    let revenue = Account::Revenue { skill: "generic".into(), place: "local".into() };
    assert_eq!(node.ledger().balance(&revenue).expect("readable"), -i128::from(used.price_msat));
    // Hold and acceptance are one entry of the log, capture and end another.
    let all = postings(&node, &buyer);
    let history = node.store().history(&request.id.to_hex()).expect("readable");
    let seq_of = |id: &str| all.iter().find(|p| p.transfer.id.starts_with(id)).expect("posted").seq;
    let entry = |tag: &str| {
        let found = history.iter().find(|e| serde_json::to_value(&e.record).unwrap()["record"] == tag);
        found.expect("recorded").seq
    };
    assert_eq!((seq_of("hold:"), seq_of("resolve:")), (entry("accepted"), entry("closed")));
    ledger::verify(node.store()).expect("books that add up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_fails_or_is_cancelled_costs_nothing() {
    let (_relay, stage, buyer) =
        stage(&[("payment.prices", "* base_msat=5000"), ("queue.max_attempts", "1")]).await;
    let backend = Backstage::new(&[Step::Dies, Step::HostFails, Step::Hangs]);
    let node = stage.start_on(backend.clone()).await;
    give(&node, &buyer, 9_000).await;
    for _ in 0..2 {
        let request = buyer.post(&buyer.order(None, &["true"])).await;
        buyer.error(&request, Code::Internal).await;
        assert_eq!(available(&node, &buyer), 9_000);
    }
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    until("the job runs", async || (backend.living() == 1).then_some(())).await;
    let held = node.ledger().purse(&buyer.keys.public_key().to_hex()).expect("readable");
    assert_eq!((held.available_msat, held.held_msat), (4_000, 5_000));
    buyer.cancel(&request).await;
    buyer.error(&request, Code::Cancelled).await;
    assert_eq!(available(&node, &buyer), 9_000);
    assert_eq!(job(node.store(), &request).expect("the job").state, JobState::Cancelled);
    ledger::verify(node.store()).expect("books that add up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_enough_credit_a_customer_is_told_the_price_and_nothing_runs() {
    let (_relay, stage, buyer) = stage(&[("payment.prices", "* base_msat=5000")]).await;
    let backend = Backstage::new(&[]);
    let node = stage.start_on(backend.clone()).await;
    give(&node, &buyer, 4_999).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let told = buyer.feedback(&request, Status::PaymentRequired).await;
    assert_eq!(told.amount, Some((5_000, None)));
    assert!(told.extra.expect("words").contains("your credit here is 4999"));
    assert!(job(node.store(), &request).is_none());
    assert_eq!((backend.made(), available(&node, &buyer)), (0, 4_999));
    // One more msat, and another request is taken: exactly what it costs is enough.
    let more = transfer::grant("more", &buyer.keys.public_key().to_hex(), 1, "");
    node.ledger().post(more).await.expect("a grant");
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.result(&request).await;
    assert_eq!(available(&node, &buyer), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_host_keeps_from_jobs_stands_in_the_quote_and_in_the_result() {
    let (_relay, stage, buyer) = stage(&[("payment.prices", "* base_msat=5000")]).await;
    let caveat = "jobs can open no sockets here";
    let rules = vec![Rule::new(["sh"], Vec::new())];
    let sim = Sim::new(Script { rules, caveats: vec![caveat.into()], ..Script::default() });
    let node = stage.start_on(sim).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let told = buyer.feedback(&request, Status::PaymentRequired).await.extra.expect("words");
    assert!(told.ends_with(&format!("; note: {caveat}")), "{told}");
    give(&node, &buyer, 5_000).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let report: serde_json::Value =
        serde_json::from_str(&buyer.result(&request).await.reply.content).expect("a report");
    assert_eq!(report["warnings"], serde_json::json!([caveat]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bid_under_the_price_gets_a_quote_and_not_silence() {
    let (_relay, stage, buyer) =
        stage(&[("payment.prices", "* base_msat=5000"), ("payment.rules", "credit")]).await;
    let node = stage.start_on(Backstage::new(&[])).await;
    give(&node, &buyer, 100_000).await;
    let low = coinop::protocol::draft::Draft { bid_msat: Some(4_999), ..buyer.order(None, &["true"]) };
    let request = buyer.post(&low).await;
    let told = buyer.feedback(&request, Status::PaymentRequired).await;
    assert_eq!(told.amount, Some((5_000, None)));
    assert!(told.extra.expect("words").starts_with("over_bid"));
    assert_eq!(available(&node, &buyer), 100_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trusted_customer_works_on_a_line_and_no_further() {
    let rule = "line skill=generic cap_msat=5000";
    let (_relay, stage, buyer) =
        stage(&[("payment.prices", "* base_msat=3000"), ("payment.rules", rule)]).await;
    let node = stage.start_on(Backstage::new(&[])).await;
    let first = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.result(&first).await;
    assert_eq!(available(&node, &buyer), -3_000);
    let second = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.feedback(&second, Status::PaymentRequired).await;
    assert_eq!(available(&node, &buyer), -3_000);
    ledger::verify(node.store()).expect("books that add up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_the_node_dies_under_is_charged_once() {
    let (_relay, stage, buyer) = stage(&[("payment.prices", "* base_msat=5000")]).await;
    let backend = Backstage::new(&[Step::Hangs]);
    let node = stage.start_on(backend.clone()).await;
    give(&node, &buyer, 9_000).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    until("the job runs", async || (backend.living() == 1).then_some(())).await;
    node.drain().await.expect("an end");
    let node = stage.start_on(Backstage::new(&[])).await;
    buyer.result(&request).await;
    assert_eq!(available(&node, &buyer), 4_000);
    assert_eq!(postings(&node, &buyer).len(), 3, "grant, hold, capture");
    ledger::verify(node.store()).expect("books that add up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_job_keeps_its_terms_whatever_the_price_list_says_at_the_next_start() {
    let (relay, mut stage, buyer) = stage(&[("payment.prices", "* base_msat=5000")]).await;
    let backend = Backstage::new(&[Step::Hangs]);
    let node = stage.start_on(backend.clone()).await;
    give(&node, &buyer, 9_000).await;
    let bid = coinop::protocol::draft::Draft { bid_msat: Some(5_000), ..buyer.order(None, &["true"]) };
    let request = buyer.post(&bid).await;
    until("the job runs", async || (backend.living() == 1).then_some(())).await;
    node.drain().await.expect("an end");
    let dearer = [("payment.prices", "* base_msat=8000")];
    stage.config = crate::support::stage::config(&stage.config.data_dir, &[&relay.url()], &dearer);
    let node = stage.start_on(Backstage::new(&[])).await;
    let answer = buyer.result(&request).await;
    assert_eq!(answer.reply.proof.expect("a proof").price_msat, 5_000);
    assert_eq!(available(&node, &buyer), 4_000);
    let dear = buyer.post(&bid).await;
    let told = buyer.feedback(&dear, Status::PaymentRequired).await;
    assert_eq!(told.amount, Some((8_000, None)), "new requests pay the new price");
    ledger::verify(node.store()).expect("books that add up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_was_free_stays_free() {
    let (relay, mut stage, buyer) = stage(&[]).await;
    let backend = Backstage::new(&[Step::Hangs]);
    let node = stage.start_on(backend.clone()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    until("the job runs", async || (backend.living() == 1).then_some(())).await;
    node.drain().await.expect("an end");
    let dearer = [("payment.prices", "* base_msat=8000")];
    stage.config = crate::support::stage::config(&stage.config.data_dir, &[&relay.url()], &dearer);
    let node = stage.start_on(Backstage::new(&[])).await;
    let answer = buyer.result(&request).await;
    assert_eq!(answer.reply.proof.expect("a proof").price_msat, 0);
    assert_eq!((available(&node, &buyer), postings(&node, &buyer).len()), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_customer_has_so_many_free_jobs_a_day_however_fast_it_asks_and_across_a_restart() {
    let prices = "* base_msat=5000 free_jobs_per_day=2";
    let (relay, stage, buyer) = stage(&[("payment.prices", prices)]).await;
    let node = stage.start_on(Backstage::new(&[])).await;
    let mut requests = Vec::new();
    for _ in 0..5 {
        requests.push(buyer.post(&buyer.order(None, &["true"])).await);
    }
    let (mut free, mut priced) = (Vec::new(), 0);
    for request in &requests {
        let answered = async || {
            let said = buyer.stored(request).await;
            let asked = buyer.feedbacks(request).await.iter().any(|f| f.status == Status::PaymentRequired);
            let done = said.iter().any(|event| event.kind.as_u16() >= 6_000 && event.kind.as_u16() < 7_000);
            (asked || done).then_some(done)
        };
        match until("an answer", answered).await {
            true => free.push(buyer.result(request).await),
            false => priced += 1,
        }
    }
    assert_eq!((free.len(), priced), (2, 3));
    for answer in free {
        assert_eq!(answer.reply.proof.expect("a proof").price_msat, 0);
    }
    assert!(postings(&node, &buyer).is_empty());
    node.drain().await.expect("an end");
    let node = stage.start_on(Backstage::new(&[])).await;
    let late = buyer.post(&buyer.order(None, &["true"])).await;
    assert_eq!(buyer.feedback(&late, Status::PaymentRequired).await.amount, Some((5_000, None)));
    // Even one that bids nothing has its own.
    let other = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let nothing = coinop::protocol::draft::Draft { bid_msat: Some(0), ..other.order(None, &["true"]) };
    other.result(&other.post(&nothing).await).await;
    assert_eq!(available(&node, &other), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_job_costs_the_node_is_booked_at_the_rate_and_profit_is_what_is_left() {
    let (_relay, stage, buyer) = stage(&[
        ("payment.prices", "* base_msat=5000"),
        ("payment.costs", "local supplier=landlord per_second=2_000_000"),
        ("payment.msat_per_usd", "1_000_000"),
        ("payment.rate_source", "a test"),
    ])
    .await;
    let node = stage.start().await;
    give(&node, &buyer, 9_000).await;
    let request = buyer.post(&buyer.order(None, &["sleep 0.2"])).await;
    buyer.result(&request).await;
    let used = job(node.store(), &request).expect("the job").summary.expect("a summary");
    let nano = used.wall_ms * 2_000_000 / 1_000;
    let msat = (nano * 1_000_000).div_ceil(1_000_000_000);
    let id = format!("cost:{}:0", request.id.to_hex());
    let booked = node.ledger().transfer(&id).expect("readable").expect("booked").transfer;
    let ledger_usd = serde_json::to_value(&booked.why).expect("JSON")["usd"].clone();
    assert_eq!(
        ledger_usd,
        serde_json::json!({ "nano": nano, "msat_per_usd": 1_000_000, "source": "a test" })
    );
    assert_eq!(
        node.ledger().balance(&Account::Supplier("landlord".into())).expect("readable"),
        -i128::from(msat)
    );
    let all = ledger::report::Window { from_ms: 0, to_ms: u64::MAX, zone: jiff::tz::TimeZone::UTC };
    let report =
        ledger::report::report(&stage.config.data_dir, &all, ledger::report::By::Backend).expect("a report");
    let row = report.rows.iter().find(|row| row.key == "local").expect("a row");
    assert_eq!(row.sums.profit_msat, 5_000 - i128::from(msat));
    assert_eq!((row.sums.revenue_msat, row.sums.container_cost_msat), (5_000, msat.into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_customer_over_its_budget_is_refused_by_that_name() {
    let (_relay, stage, buyer) =
        stage(&[("payment.prices", "* base_msat=5000"), ("payment.customer_day_msat", "9999")]).await;
    let node = stage.start_on(Backstage::new(&[])).await;
    give(&node, &buyer, 100_000).await;
    let first = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.result(&first).await;
    let second = buyer.post(&buyer.order(None, &["true"])).await;
    let reason = buyer.error(&second, Code::OverBudget).await;
    assert!(reason.contains("for 1 days is 9999 msat"), "{reason}");
    assert_eq!(available(&node, &buyer), 95_000);
}
