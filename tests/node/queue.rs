//! Whose turn it is, how many may wait, and for how long.

use super::support::backend::{Backstage, Step};
use super::support::buyer::Buyer;
use super::support::stage::{Stage, job};
use super::support::{now_s, until};
use coinop::protocol::Code;
use coinop::protocol::draft::Draft;
use coinop::relay::local::LocalRelay;
use nostr_sdk::prelude::Event;

async fn stage(settings: &[(&str, &str)]) -> (LocalRelay, Stage) {
    let relay = LocalRelay::start().await.expect("a relay");
    let stage = Stage::new(&[&relay.url()], settings);
    (relay, stage)
}

/// The sandbox's name begins with the request's id.
fn order(backend: &Backstage, requests: &[&Event]) -> Vec<usize> {
    let which = |name: &String| requests.iter().position(|r| name.starts_with(&r.id.to_hex()[..16]));
    backend.names().iter().filter_map(which).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_customer_with_many_jobs_does_not_keep_another_waiting() {
    let (relay, stage) = stage(&[("max_jobs", "1")]).await;
    let backend = Backstage::new(&[]);
    backend.hold(true);
    let node = stage.start_on(backend.clone()).await;
    let greedy = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let modest = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let mut posted = Vec::new();
    for buyer in [&greedy, &greedy, &greedy, &modest] {
        let request = buyer.post(&buyer.order(None, &["true"])).await;
        buyer.accepted(&request).await;
        posted.push(request);
    }
    assert_eq!(node.engine().status().await.waiting, 3);
    backend.hold(false);
    modest.result(&posted[3]).await;
    for request in &posted[..3] {
        greedy.result(request).await;
    }
    assert_eq!(order(&backend, &posted.iter().collect::<Vec<_>>()), [0, 1, 3, 2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_customer_does_not_get_every_slot() {
    let (relay, stage) = stage(&[("max_jobs", "3"), ("queue.max_running_per_customer", "2")]).await;
    let backend = Backstage::new(&[]);
    backend.hold(true);
    let node = stage.start_on(backend.clone()).await;
    let greedy = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let modest = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let mut posted = Vec::new();
    for _ in 0..3 {
        let request = greedy.post(&greedy.order(None, &["true"])).await;
        greedy.accepted(&request).await;
        posted.push(request);
    }
    until("two to run", async || (backend.living() == 2).then_some(())).await;
    assert_eq!(node.engine().status().await.waiting, 1);
    let other = modest.post(&modest.order(None, &["true"])).await;
    until("the other customer's to run", async || (backend.living() == 3).then_some(())).await;
    backend.hold(false);
    modest.result(&other).await;
    for request in &posted {
        greedy.result(request).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_open_jobs_than_a_customer_or_the_node_may_have_are_rate_limited() {
    let limits = [("queue.max_open_jobs", "3"), ("queue.max_open_jobs_per_customer", "2"), ("max_jobs", "1")];
    let (relay, stage) = stage(&limits).await;
    let backend = Backstage::new(&[]);
    backend.hold(true);
    let _node = stage.start_on(backend.clone()).await;
    let [first, second, third] = [
        Buyer::at(&[relay.url()], stage.keys.public_key()).await,
        Buyer::at(&[relay.url()], stage.keys.public_key()).await,
        Buyer::at(&[relay.url()], stage.keys.public_key()).await,
    ];
    let mut open = Vec::new();
    for buyer in [&first, &first, &second] {
        let request = buyer.post(&buyer.order(None, &["true"])).await;
        buyer.accepted(&request).await;
        open.push((buyer, request));
    }
    let own = first.post(&first.order(None, &["true"])).await;
    let all = third.post(&third.order(None, &["true"])).await;
    let reason = third.error(&all, Code::RateLimited).await;
    assert!(reason.contains("3 jobs are open here"), "{reason}");
    first.error(&own, Code::RateLimited).await;
    backend.hold(false);
    for (buyer, request) in &open {
        buyer.result(request).await;
    }
    let later = third.post(&third.order(None, &["true"])).await;
    third.result(&later).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_customers_own_limit_is_named_before_the_nodes() {
    let (relay, stage) = stage(&[("queue.max_open_jobs_per_customer", "1"), ("max_jobs", "1")]).await;
    let backend = Backstage::new(&[]);
    backend.hold(true);
    let _node = stage.start_on(backend.clone()).await;
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let open = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.accepted(&open).await;
    let more = buyer.post(&buyer.order(None, &["true"])).await;
    let reason = buyer.error(&more, Code::RateLimited).await;
    assert!(reason.contains("1 of your jobs"), "{reason}");
    backend.hold(false);
    buyer.result(&open).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_whose_turn_does_not_come_in_time_ends_with_a_timeout_and_never_runs() {
    let (relay, stage) = stage(&[("max_jobs", "1"), ("queue.max_wait_ms", "1000")]).await;
    let backend = Backstage::new(&[Step::Hangs]);
    let node = stage.start_on(backend.clone()).await;
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let first = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.accepted(&first).await;
    let second = buyer.post(&buyer.order(None, &["true"])).await;
    let reason = buyer.error(&second, Code::Timeout).await;
    assert!(reason.contains("turn did not come in time"), "{reason}");
    let row = job(node.store(), &second).expect("the job");
    assert_eq!((row.attempt, backend.made()), (0, 1));
    assert!(row.updated_ms < row.deadline_ms);
}

/// An order that is dead in a few seconds.
fn short_lived(buyer: &Buyer, seconds: u64) -> (Draft, u64) {
    let expiration = now_s() + seconds;
    (Draft { expiration: Some(expiration), ..buyer.order(None, &["true"]) }, expiration)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_expires_while_it_waits_ends_as_expired_and_never_runs() {
    let (relay, stage) = stage(&[("max_jobs", "1")]).await;
    let backend = Backstage::new(&[Step::Hangs]);
    let node = stage.start_on(backend.clone()).await;
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let first = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.accepted(&first).await;
    let (draft, expiration) = short_lived(&buyer, 3);
    let second = buyer.post(&draft).await;
    let reason = buyer.error(&second, Code::Expired).await;
    assert!(reason.contains("expiration passed"), "{reason}");
    let row = job(node.store(), &second).expect("it was a job");
    assert_eq!((row.attempt, backend.made(), row.deadline_ms), (0, 1, expiration * 1000));
    assert!(row.updated_ms >= expiration * 1000, "not sooner, either");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_expires_while_the_node_is_away_ends_as_expired_and_never_runs() {
    let (relay, stage) = stage(&[("max_jobs", "1"), ("drain_timeout_ms", "0")]).await;
    let backend = Backstage::new(&[Step::Hangs]);
    let node = stage.start_on(backend.clone()).await;
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let first = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.accepted(&first).await;
    let (draft, expiration) = short_lived(&buyer, 3);
    let second = buyer.post(&draft).await;
    buyer.accepted(&second).await;
    node.drain().await.expect("an orderly end");
    until("its last second", async || (now_s() >= expiration).then_some(())).await;

    let node = stage.start_on(backend.clone()).await;
    buyer.error(&second, Code::Expired).await;
    buyer.result(&first).await;
    assert_eq!(job(node.store(), &second).expect("the job").attempt, 0);
    assert_eq!(backend.made(), 2, "both for the other one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_expires_while_it_runs_ends_as_expired() {
    let (relay, stage) = stage(&[]).await;
    let backend = Backstage::new(&[Step::Hangs]);
    let _node = stage.start_on(backend.clone()).await;
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let request = buyer.post(&short_lived(&buyer, 2).0).await;
    buyer.error(&request, Code::Expired).await;
    assert_eq!((backend.made(), backend.living()), (1, 0));
}
