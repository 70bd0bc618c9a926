//! kill -9 in each state of a job: waiting, cloning, running, closed and undelivered, delivered. The state is
//! read from the log after the kill, so a test that missed it fails.

use std::time::Duration;

use coinop::protocol::Status;
use coinop::relay::local::LocalRelay;
use coinop::store::JobState;

use super::check_done_once;
use super::support::buyer::{Buyer, printed};
use super::support::gate::{Gate, Way};
use super::support::git::{README, Served};
use super::support::process::{Home, Nap};
use super::support::until;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_waits_behind_another_is_run_after_the_restart_in_the_old_order() {
    let relay = LocalRelay::start().await.expect("a relay");
    let home = Home::new(&[relay.url()], &["--max-jobs", "1"]);
    let buyer = Buyer::at(&[relay.url()], home.keys.public_key()).await;
    let node = home.start();
    let nap = Nap::new();
    let first = buyer.post(&buyer.order(None, &[&nap.command(), "echo one"])).await;
    nap.begun().await;
    let second = buyer.post(&buyer.order(None, &["echo two"])).await;
    buyer.accepted(&second).await;
    let third = buyer.post(&buyer.order(None, &["echo three"])).await;
    buyer.accepted(&third).await;

    node.kill().await;
    nap.gone(Duration::from_secs(5)).await;
    let states: Vec<_> =
        [&first, &second, &third].map(|job| home.job(&job.id.to_hex()).map(|j| j.state)).to_vec();
    assert_eq!(states, [Some(JobState::Running), Some(JobState::Accepted), Some(JobState::Accepted)]);

    let node = home.start();
    nap.wake().await;
    for (job, words) in [(&first, "one\n"), (&second, "two\n"), (&third, "three\n")] {
        assert_eq!(printed(&buyer.result(job).await), words);
    }
    assert!(node.stop().await.success());
    for job in [&first, &second, &third] {
        check_done_once(&home, &buyer, job).await;
    }
    let ended = |job: &nostr_sdk::Event| home.job(&job.id.to_hex()).expect("known").updated_ms;
    assert!(ended(&first) <= ended(&second) && ended(&second) <= ended(&third), "first come, first served");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_killed_while_it_clones_is_cloned_again() {
    let relay = LocalRelay::start().await.expect("a relay");
    let served = Served::start().await;
    let (gate, url) = served.behind_a_gate().await;
    gate.set(Way::Stall);
    let home = Home::new(&[relay.url()], &[]);
    let buyer = Buyer::at(&[relay.url()], home.keys.public_key()).await;
    let node = home.start();
    let request = buyer.post(&buyer.order(Some(&url), &["cat README.md"])).await;
    until("the clone to begin", async || (gate.came() > 0).then_some(())).await;

    node.kill().await;
    let row = home.job(&request.id.to_hex()).expect("the job is known");
    assert_eq!((row.state, row.attempt, row.commit), (JobState::Running, 1, None));

    gate.set(Way::Open);
    let node = home.start();
    let answer = buyer.result(&request).await;
    assert_eq!(printed(&answer), README);
    assert_eq!(answer.reply.proof.as_ref().and_then(|p| p.commit.clone()), Some(served.commit.clone()));
    assert!(node.stop().await.success());
    check_done_once(&home, &buyer, &request).await;
    assert_eq!(home.job(&request.id.to_hex()).expect("known").attempt, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_killed_while_it_runs_leaves_no_process_and_runs_again_on_the_same_commit() {
    let relay = LocalRelay::start().await.expect("a relay");
    let served = Served::start().await;
    let home = Home::new(&[relay.url()], &[]);
    let buyer = Buyer::at(&[relay.url()], home.keys.public_key()).await;
    let node = home.start();
    let nap = Nap::new();
    let request = buyer.post(&buyer.order(Some(&served.url), &[&nap.command(), "cat README.md"])).await;
    nap.begun().await;

    node.kill().await;
    nap.gone(Duration::from_secs(5)).await;
    let row = home.job(&request.id.to_hex()).expect("the job is known");
    assert_eq!((row.state, row.attempt), (JobState::Running, 1));
    assert_eq!(row.commit.as_ref(), Some(&served.commit));
    // The branch moves on meanwhile; the job does not.
    coinop::repo::serve::sample_repo(&served.folder, &[("README.md", "other\n")]).expect("a commit");

    let node = home.start();
    nap.wake().await;
    let answer = buyer.result(&request).await;
    assert_eq!(printed(&answer), README);
    assert_eq!(answer.reply.proof.as_ref().and_then(|p| p.commit.clone()), Some(served.commit.clone()));
    assert!(node.stop().await.success());
    check_done_once(&home, &buyer, &request).await;
    let said = buyer.feedbacks(&request).await;
    assert_eq!(said.iter().filter(|f| f.status == Status::Processing).count(), 1, "{said:?}");
}

/// The answer is signed and on disk when the node dies. `way`: what is wrong with its relay.
async fn killed_before_delivery(way: Way) {
    let relay = LocalRelay::start().await.expect("a relay");
    let gate = Gate::before(relay.address()).await;
    let home = Home::new(&[format!("ws://{}", gate.address())], &[]);
    let buyer = Buyer::at(&[relay.url()], home.keys.public_key()).await;
    let node = home.start();
    let nap = Nap::new();
    let request = buyer.post(&buyer.order(None, &[&nap.command(), "echo counted"])).await;
    buyer.accepted(&request).await;
    nap.begun().await;
    gate.set(way);
    nap.wake().await;
    let id = request.id.to_hex();
    let answer = until("the job to be closed", async || home.job(&id).and_then(|job| job.answer)).await;
    if way == Way::Mute {
        // It has the result; only its OK is missing.
        until("the result at the relay", async || buyer.ends(&request).await.pop()).await;
    }

    node.kill().await;
    assert_eq!(home.job(&id).expect("known").state, JobState::Done);
    assert_eq!(home.store().deliveries(&answer).expect("readable"), [], "nobody has said OK");

    gate.set(Way::Open);
    let node = home.start();
    assert_eq!(printed(&buyer.result(&request).await), "counted\n");
    until("the relay's OK in the log", async || {
        let words = home.store().deliveries(&answer).expect("readable");
        (!words.is_empty()).then_some(())
    })
    .await;
    assert!(node.stop().await.success());
    check_done_once(&home, &buyer, &request).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_result_signed_while_the_relay_was_gone_is_delivered_after_the_restart() {
    killed_before_delivery(Way::Shut).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_result_whose_ok_never_came_is_sent_again_under_its_one_id() {
    killed_before_delivery(Way::Mute).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_was_delivered_is_not_touched_by_a_kill_and_a_replay() {
    let relay = LocalRelay::start().await.expect("a relay");
    let home = Home::new(&[relay.url()], &[]);
    let buyer = Buyer::at(&[relay.url()], home.keys.public_key()).await;
    let node = home.start();
    let request = buyer.post(&buyer.order(None, &["echo once"])).await;
    let answer = buyer.result(&request).await;
    let id = answer.reply.id.to_hex();
    until("the OK in the log", async || {
        (!home.store().deliveries(&id).expect("readable").is_empty()).then_some(())
    })
    .await;
    let before = home.store().history(&request.id.to_hex()).expect("readable").len();

    node.kill().await;
    let node = home.start();
    // A job after it shows that the history was read again.
    let next = buyer.post(&buyer.order(None, &["echo next"])).await;
    assert_eq!(printed(&buyer.result(&next).await), "next\n");
    assert!(node.stop().await.success());
    assert_eq!(home.store().history(&request.id.to_hex()).expect("readable").len(), before);
    check_done_once(&home, &buyer, &request).await;
}
