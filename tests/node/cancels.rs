//! Jobs that are taken back: by their author at every point of their life, by the node's owner, and by those who
//! have no say.

use std::time::{Duration, Instant};

use nostr_sdk::prelude::{Event, EventBuilder, EventId, JsonUtil, Kind, Tag};

use super::support::backend::{Backstage, Step};
use super::support::buyer::Buyer;
use super::support::process::Nap;
use super::support::scripted::Scripted;
use super::support::stage::{Stage, job, jobs};
use super::support::until;
use coinop::control::{self, Ask};
use coinop::node::Node;
use coinop::protocol::{Code, Status};
use coinop::relay::local::LocalRelay;
use coinop::store::record::Record;
use coinop::store::{Holder, JobState, Store};

async fn stage(settings: &[(&str, &str)]) -> (LocalRelay, Stage, Buyer) {
    let relay = LocalRelay::start().await.expect("a relay");
    let stage = Stage::new(&[&relay.url()], settings);
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    (relay, stage, buyer)
}

/// As often as a relay is slow: the state in the log, not the event on the wire.
async fn ended(node: &Node, request: &Event) -> JobState {
    until("the job's end", async || {
        job(node.store(), request).map(|job| job.state).filter(|state| !state.is_open())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_job_that_its_author_takes_back_is_stopped_within_seconds() {
    let (_relay, stage, buyer) = stage(&[]).await;
    let node = stage.start().await;
    let nap = Nap::new();
    let request = buyer.post(&buyer.order(None, &[&nap.command(), "echo never"])).await;
    nap.begun().await;
    let asked = Instant::now();
    buyer.cancel(&request).await;
    nap.gone(Duration::from_secs(5)).await;
    let reason = buyer.error(&request, Code::Cancelled).await;
    assert!(reason.contains("the customer cancelled"), "{reason}");
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    assert_eq!(job(node.store(), &request).expect("the job").state, JobState::Cancelled);
    assert!(node.engine().status().await.open.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_job_that_its_author_takes_back_never_runs_and_the_next_has_its_turn() {
    let (_relay, stage, buyer) = stage(&[("max_jobs", "1")]).await;
    let backend = Backstage::new(&[]);
    backend.hold(true);
    let node = stage.start_on(backend.clone()).await;
    let mut posted = Vec::new();
    for _ in 0..3 {
        let request = buyer.post(&buyer.order(None, &["true"])).await;
        buyer.accepted(&request).await;
        posted.push(request);
    }
    buyer.cancel(&posted[1]).await;
    buyer.error(&posted[1], Code::Cancelled).await;
    assert_eq!(backend.made(), 1, "it ended while the first one ran");
    backend.hold(false);
    buyer.result(&posted[0]).await;
    buyer.result(&posted[2]).await;
    let row = job(node.store(), &posted[1]).expect("the job");
    assert_eq!((row.state, row.attempt, backend.made()), (JobState::Cancelled, 0, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_has_ended_stays_as_it_ended() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[]);
    let node = stage.start_on(Backstage::new(&[])).await;
    let buyer = Buyer::of(stage.keys.public_key());
    let request = buyer.sign(&buyer.order(None, &["true"]));
    relay.push(&request.as_json());
    assert_eq!(ended(&node, &request).await, JobState::Done);
    let before = node.store().history(&request.id.to_hex()).expect("readable").len();
    relay.push(&buyer.sign_cancel(&request).as_json());
    let after = buyer.sign(&buyer.order(None, &["true"]));
    relay.push(&after.as_json());
    assert_eq!(ended(&node, &after).await, JobState::Done);
    assert_eq!(job(node.store(), &request).expect("the job").state, JobState::Done);
    let history = node.store().history(&request.id.to_hex()).expect("readable");
    let delivered = |entry: &&coinop::store::Entry| {
        matches!(entry.record, coinop::store::record::Record::Delivered { .. })
    };
    let late = history.iter().skip(before).filter(|entry| !delivered(entry)).count();
    assert_eq!(late, 0, "nothing but deliveries: {history:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn somebody_elses_cancel_stops_nothing_whether_it_comes_late_or_first() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[("max_jobs", "2")]);
    let backend = Backstage::new(&[]);
    backend.hold(true);
    let node = stage.start_on(backend.clone()).await;
    let [buyer, stranger] = [(); 2].map(|()| Buyer::of(stage.keys.public_key()));
    let [late, first] = [(); 2].map(|()| buyer.sign(&buyer.order(None, &["true"])));
    relay.push(&late.as_json());
    until("the job to run", async || (backend.living() == 1).then_some(())).await;
    relay.push(&stranger.sign_cancel(&late).as_json());
    relay.push(&stranger.sign_cancel(&first).as_json());
    relay.push(&first.as_json());
    until("both to run", async || (backend.living() == 2).then_some(())).await;
    backend.hold(false);
    for request in [&late, &first] {
        assert_eq!(ended(&node, request).await, JobState::Done);
    }
    assert_eq!(backend.made(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_that_came_before_its_request_keeps_it_from_becoming_a_job_after_a_restart_too() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[]);
    let backend = Backstage::new(&[]);
    let buyer = Buyer::of(stage.keys.public_key());
    let request = buyer.sign(&buyer.order(None, &["true"]));
    for life in 0..2 {
        let node = stage.start_on(backend.clone()).await;
        if life == 0 {
            relay.push(&buyer.sign_cancel(&request).as_json());
            let id = request.id.to_hex();
            until("the tombstone", async || {
                node.store()
                    .is_cancelled(&id, &buyer.keys.public_key().to_hex())
                    .expect("readable")
                    .then_some(())
            })
            .await;
        }
        relay.push(&request.as_json());
        let after = buyer.sign(&buyer.order(None, &["true"]));
        relay.push(&after.as_json());
        assert_eq!(ended(&node, &after).await, JobState::Done);
        assert!(job(node.store(), &request).is_none());
        node.drain().await.expect("an orderly end");
    }
    assert!(relay.given_about(&request).is_empty(), "and nothing is said about it");
    assert_eq!(backend.made(), 2, "those after it ran");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_sent_while_the_node_was_away_ends_the_job_that_it_left_open() {
    let (_relay, stage, buyer) = stage(&[("drain_timeout_ms", "0")]).await;
    let backend = Backstage::new(&[Step::Hangs; 2]);
    let node = stage.start_on(backend.clone()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    until("the sandbox", async || (backend.living() == 1).then_some(())).await;
    node.drain().await.expect("an orderly end");
    buyer.cancel(&request).await;
    let node = stage.start_on(backend.clone()).await;
    buyer.error(&request, Code::Cancelled).await;
    assert_eq!(ended(&node, &request).await, JobState::Cancelled);
    assert_eq!(backend.living(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_owner_stops_a_running_and_a_waiting_job_and_is_told_of_one_that_is_not_open() {
    let (_relay, stage, buyer) = stage(&[("max_jobs", "1")]).await;
    let backend = Backstage::new(&[Step::Hangs]);
    let node = stage.start_on(backend.clone()).await;
    let mut posted = Vec::new();
    for _ in 0..2 {
        let request = buyer.post(&buyer.order(None, &["true"])).await;
        buyer.accepted(&request).await;
        posted.push(request);
    }
    for request in posted.iter().rev() {
        stage.ask(Ask::Cancel(request.id.to_hex())).await.expect("an open job");
        let reason = buyer.error(request, Code::Cancelled).await;
        assert!(reason.contains("the node's owner cancelled"), "{reason}");
    }
    assert_eq!((backend.made(), backend.living()), (1, 0));
    let again = stage.ask(Ask::Cancel(posted[0].id.to_hex())).await.expect_err("it has ended");
    assert!(matches!(&again, control::Error::Refused(why) if why.contains("no open job")), "{again}");
    assert_eq!(jobs(node.store()).len(), 2);
    for request in &posted {
        let said = buyer.feedbacks(request).await;
        assert_eq!(said.iter().filter(|f| f.status == Status::Error).count(), 1, "{said:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_who_cancels_hundreds_of_unknown_requests_leaves_room_for_others() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[]);
    let node = stage.start_on(Backstage::new(&[])).await;
    let [stranger, buyer] = [(); 2].map(|()| Buyer::of(stage.keys.public_key()));
    let ids: Vec<EventId> =
        (0..256u32).map(|n| EventId::from_slice(&[n as u8; 32]).expect("an id")).collect();
    let tags = ids.iter().map(|id| Tag::event(*id)).chain([Tag::public_key(stage.keys.public_key())]);
    let flood = EventBuilder::new(Kind::EventDeletion, "").tags(tags).sign_with_keys(&stranger.keys);
    let is_cancelled = |id: &EventId, by: &Buyer| {
        node.store().is_cancelled(&id.to_hex(), &by.keys.public_key().to_hex()).expect("readable")
    };
    let taken = || ids.iter().filter(|id| is_cancelled(id, &stranger)).count();
    relay.push(&flood.expect("a signature").as_json());
    // What has come from a relay later may be verified sooner.
    until("the stranger's tombstones", async || (taken() >= 16).then_some(())).await;
    let request = buyer.sign(&buyer.order(None, &["true"]));
    relay.push(&buyer.sign_cancel(&request).as_json());
    until("the buyer's tombstone", async || is_cancelled(&request.id, &buyer).then_some(())).await;
    assert_eq!(taken(), 16, "the first sixteen");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_owners_cancel_is_written_down_before_anything_is_stopped_and_holds_over_a_restart() {
    let (_relay, stage, buyer) = stage(&[("drain_timeout_ms", "0")]).await;
    let backend = Backstage::new(&[Step::Hangs, Step::Hangs]);
    let node = stage.start_on(backend.clone()).await;
    let me = stage.keys.public_key().to_hex();
    let mut posted = Vec::new();
    for _ in 0..2 {
        posted.push(buyer.post(&buyer.order(None, &["true"])).await);
    }
    until("both to run", async || (backend.living() == 2).then_some(())).await;
    stage.ask(Ask::Cancel(posted[0].id.to_hex())).await.expect("an open job");
    buyer.error(&posted[0], Code::Cancelled).await;
    let history = node.store().history(&posted[0].id.to_hex()).expect("readable");
    let place = |wanted: &dyn Fn(&Record) -> bool| history.iter().position(|entry| wanted(&entry.record));
    let written = place(&|r| matches!(r, Record::Cancelled { by, .. } if *by == me)).expect("a record");
    let closed = place(&|r| matches!(r, Record::Closed { .. })).expect("its end");
    assert!(written < closed && history[written].seq < history[closed].seq, "{history:?}");

    // The node dies between the record and the end of the other one.
    node.drain().await.expect("an orderly end");
    let store = Store::open(&stage.config.data_dir, &Holder::new(me.clone())).expect("the store");
    let cancelled = Record::Cancelled { request: posted[1].id.to_hex(), by: me };
    store.append(vec![cancelled]).await.expect("durable");
    store.close().expect("in order");
    drop(store);
    let _node = stage.start_on(backend.clone()).await;
    let reason = buyer.error(&posted[1], Code::Cancelled).await;
    assert!(reason.contains("the node's owner cancelled"), "{reason}");
    assert_eq!(backend.made(), 2, "it is not begun again");
}
