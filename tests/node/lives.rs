//! The node as a process among its relays: it is told to end, its relays go and come back, and a second one is
//! started beside it. What a kill -9 and a full disk do stands in `tests/crash/`.

use std::time::{Duration, Instant};

use super::support::buyer::{Buyer, printed};
use super::support::gate::{Gate, Way};
use super::support::process::{Home, Nap};
use super::support::{PATIENCE, until};
use coinop::relay::local::LocalRelay;
use coinop::store::JobState;
use nostr_sdk::prelude::{Event, Filter, Kind};

/// The result that the buyer's relay has, whoever may read it.
async fn result(buyer: &Buyer, request: &Event) -> Option<Event> {
    buyer.stored(request).await.into_iter().find(|event| event.kind.as_u16() == 6930)
}

async fn home(flags: &[&str]) -> (LocalRelay, Home, Buyer) {
    let relay = LocalRelay::start().await.expect("a relay");
    let home = Home::new(&[relay.url()], flags);
    let buyer = Buyer::at(&[relay.url()], home.keys.public_key()).await;
    (relay, home, buyer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_lets_the_running_job_finish_and_leaves_the_rest_to_the_next_start() {
    let (_relay, home, buyer) = home(&["--max-jobs", "1"]).await;
    let mut node = home.start();
    let nap = Nap::new();
    let running = buyer.post(&buyer.order(None, &[&nap.command(), "echo finished"])).await;
    nap.begun().await;
    let waiting = buyer.post(&buyer.order(None, &["echo waited"])).await;
    buyer.accepted(&waiting).await;
    node.terminate();
    until("the drain", async || node.status()?["jobs"]["draining"].as_bool().filter(|draining| *draining))
        .await;
    // It is not offered any more what it would not take, although it has still work to do.
    until("the announcement to be taken back", async || {
        buyer.query(Filter::new().author(buyer.provider).kind(Kind::EventDeletion)).await.pop()
    })
    .await;
    assert!(nap.is_running());
    let late = buyer.post(&buyer.order(None, &["echo late"])).await;
    nap.wake().await;
    assert!(node.ended(PATIENCE).await.success());
    assert_eq!(printed(&buyer.result(&running).await), "finished\n", "delivered before the end");
    assert_eq!(home.job(&waiting.id.to_hex()).expect("kept").state, JobState::Accepted);
    assert!(home.job(&late.id.to_hex()).is_none(), "nothing is taken any more");

    let node = home.start();
    assert_eq!(printed(&buyer.result(&waiting).await), "waited\n");
    assert_eq!(printed(&buyer.result(&late).await), "late\n", "and nothing is missed");
    assert!(node.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_outlasts_the_drain_is_stopped_and_taken_up_at_the_next_start() {
    let (_relay, home, buyer) = home(&["--set", "drain_timeout_ms=200"]).await;
    let mut node = home.start();
    let nap = Nap::new();
    let request = buyer.post(&buyer.order(None, &[&nap.command(), "echo again"])).await;
    nap.begun().await;
    node.terminate();
    assert!(node.ended(PATIENCE).await.success());
    nap.gone(Duration::from_secs(5)).await;
    assert!(buyer.ends(&request).await.is_empty(), "an open job is not answered");

    let node = home.start();
    nap.wake().await;
    assert_eq!(printed(&buyer.result(&request).await), "again\n");
    assert!(node.log().contains("attempt=2"), "the same number as `jobs show`: {}", node.log());
    assert!(node.stop().await.success());
    assert_eq!(home.job(&request.id.to_hex()).expect("kept").attempt, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_sigterm_ends_the_node_at_once_and_nothing_is_lost() {
    let (_relay, home, buyer) = home(&["--set", "drain_timeout_ms=600000"]).await;
    let mut node = home.start();
    let nap = Nap::new();
    let request = buyer.post(&buyer.order(None, &[&nap.command(), "echo kept"])).await;
    nap.begun().await;
    node.terminate();
    until("the drain", async || node.log().contains("Stopping").then_some(())).await;
    let asked = Instant::now();
    node.terminate();
    assert_eq!(node.ended(PATIENCE).await.code(), Some(1));
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    assert!(node.log().contains("stopped at once; open jobs are resumed at the next start"));
    nap.gone(Duration::from_secs(5)).await;

    let node = home.start();
    nap.wake().await;
    assert_eq!(printed(&buyer.result(&request).await), "kept\n");
    assert!(node.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_relays_gone_while_a_job_runs_cost_nothing_once_they_are_back() {
    let relays = [LocalRelay::start().await.expect("a relay"), LocalRelay::start().await.expect("a relay")];
    let gates = [Gate::before(relays[0].address()).await, Gate::before(relays[1].address()).await];
    let urls: Vec<String> = gates.iter().map(|gate| format!("ws://{}", gate.address())).collect();
    let home = Home::new(&urls, &[]);
    let buyer = Buyer::at(&[relays[0].url()], home.keys.public_key()).await;
    let elsewhere = Buyer::at(&[relays[1].url()], home.keys.public_key()).await;
    let node = home.start();
    let nap = Nap::new();
    let running = buyer.post(&buyer.order(None, &[&nap.command(), "echo through"])).await;
    nap.begun().await;
    for gate in &gates {
        gate.set(Way::Shut);
    }
    nap.wake().await;
    until("the job's end in the log", async || home.job(&running.id.to_hex())?.answer).await;
    let missed = buyer.post(&buyer.order(None, &["echo missed"])).await;
    for there in [&buyer, &elsewhere] {
        assert!(result(there, &running).await.is_none());
    }

    gates[0].set(Way::Open);
    assert_eq!(printed(&buyer.result(&running).await), "through\n");
    assert_eq!(printed(&buyer.result(&missed).await), "missed\n", "asked while all were gone");
    gates[1].set(Way::Open);
    let there =
        until("the same result on the other relay", async || result(&elsewhere, &running).await).await;
    assert_eq!(home.job(&running.id.to_hex()).expect("kept").answer, Some(there.id.to_hex()));
    assert!(node.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_node_on_the_same_folder_or_the_same_key_is_told_who_holds_it() {
    let (relay, home, _buyer) = home(&[]).await;
    let node = home.start();
    until("the node to serve", async || node.status()).await;
    let pid = format!("process {}", node.pid());
    let twin = home.twin(&[relay.url()]);
    for (second, words) in [(home.start(), "the data folder"), (twin.start(), "one key serves one node")] {
        let mut second = second;
        assert_eq!(second.ended(PATIENCE).await.code(), Some(7), "{}", second.log());
        assert!(second.log().contains(&pid) && second.log().contains(words), "{}", second.log());
    }
    assert!(node.stop().await.success(), "the first one did not notice");
    let freed = twin.start();
    assert!(freed.stop().await.success(), "the key is free with its holder's end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_key_on_a_folder_with_open_jobs_is_refused_and_told_what_to_do() {
    let (relay, home, buyer) = home(&["--max-jobs", "1"]).await;
    let node = home.start();
    let nap = Nap::new();
    let request = buyer.post(&buyer.order(None, &[&nap.command(), "echo mine"])).await;
    nap.begun().await;
    node.kill().await;
    nap.gone(Duration::from_secs(5)).await;
    let other = home.heir(&[relay.url()]);
    let mut refused = other.start();
    assert_eq!(refused.ended(PATIENCE).await.code(), Some(3), "{}", refused.log());
    for words in [home.keys.public_key().to_hex(), "start with that key".into(), "--data-dir".into()] {
        assert!(refused.log().contains(&words), "{}", refused.log());
    }

    let node = home.start();
    nap.wake().await;
    assert_eq!(printed(&buyer.result(&request).await), "mine\n");
    assert!(node.stop().await.success());
    assert!(other.start().stop().await.success(), "without open jobs it may");
}
