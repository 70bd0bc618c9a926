//! A host that fails under a job, and bugs of ours: tried again within bounds, answered within the deadline, and
//! never at the cost of another job.

use super::support::backend::{Backstage, Step};
use super::support::buyer::Buyer;
use super::support::stage::{Stage, job};
use super::support::until;
use coinop::protocol::Code;
use coinop::relay::local::LocalRelay;
use coinop::store::JobState;

async fn stage(settings: &[(&str, &str)]) -> (LocalRelay, Stage, Buyer) {
    let relay = LocalRelay::start().await.expect("a relay");
    let stage = Stage::new(&[&relay.url()], settings);
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    (relay, stage, buyer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_fails_twice_costs_the_customer_nothing() {
    let (_relay, stage, buyer) = stage(&[]).await;
    let backend = Backstage::new(&[Step::HostFails, Step::HostFails]);
    let node = stage.start_on(backend.clone()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.result(&request).await;
    assert_eq!((backend.made(), backend.living()), (3, 0));
    assert_eq!(job(node.store(), &request).expect("the job").attempt, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_fails_three_times_ends_the_job_as_our_fault() {
    let (_relay, stage, buyer) = stage(&[]).await;
    let backend = Backstage::new(&[Step::HostFails; 3]);
    let _node = stage.start_on(backend.clone()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let reason = buyer.error(&request, Code::Internal).await;
    assert!(reason.contains("could not make a room"), "{reason}");
    assert_eq!(backend.made(), 3);
    let next = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.result(&next).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sandbox_that_dies_under_its_command_is_never_a_success() {
    let (_relay, stage, buyer) = stage(&[]).await;
    let backend = Backstage::new(&[Step::Dies]);
    let _node = stage.start_on(backend.clone()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let reason = buyer.error(&request, Code::Internal).await;
    assert!(reason.contains("the sandbox is gone"), "{reason}");
    assert_eq!(backend.living(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_in_a_jobs_task_frees_its_slot_and_the_job_is_begun_again() {
    let (_relay, stage, buyer) = stage(&[("max_jobs", "1")]).await;
    let backend = Backstage::new(&[Step::Panics, Step::Panics]);
    let node = stage.start_on(backend.clone()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.result(&request).await;
    assert_eq!(job(node.store(), &request).expect("the job").attempt, 3);
    let next = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.result(&next).await;
    assert_eq!(node.engine().status().await.running, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_panics_every_time_ends_as_interrupted_after_three_attempts() {
    let (_relay, stage, buyer) = stage(&[("max_jobs", "1")]).await;
    let backend = Backstage::new(&[Step::Panics; 9]);
    let _node = stage.start_on(backend.clone()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let reason = buyer.error(&request, Code::Interrupted).await;
    assert!(reason.contains("broke off 3 times"), "{reason}");
    assert_eq!(backend.made(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_stopped_under_three_lives_of_the_node_ends_as_interrupted() {
    let (_relay, stage, buyer) = stage(&[("drain_timeout_ms", "0")]).await;
    let backend = Backstage::new(&[Step::Hangs; 9]);
    let mut posted = None;
    for life in 1..=3 {
        let node = stage.start_on(backend.clone()).await;
        if life == 1 {
            posted = Some(buyer.post(&buyer.order(None, &["true"])).await);
        }
        until("the sandbox", async || (backend.made() == life && backend.living() == 1).then_some(())).await;
        node.drain().await.expect("an orderly end");
        until("the sandbox to go", async || (backend.living() == 0).then_some(())).await;
    }
    let request = posted.expect("posted in the first life");
    assert!(buyer.ends(&request).await.is_empty(), "an open job is not answered");
    let _node = stage.start_on(backend.clone()).await;
    let reason = buyer.error(&request, Code::Interrupted).await;
    assert!(reason.contains("broke off 3 times"), "{reason}");
    assert_eq!(backend.made(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_never_ends_is_cut_at_the_jobs_deadline() {
    let settings =
        [("queue.max_wait_ms", "1000"), ("repo.fetch_timeout_ms", "1000"), ("limits.wall_ms", "1000")];
    let (_relay, stage, buyer) = stage(&settings).await;
    let backend = Backstage::new(&[Step::Hangs]);
    let node = stage.start_on(backend.clone()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let reason = buyer.error(&request, Code::Timeout).await;
    assert!(reason.contains("within the job's deadline"), "{reason}");
    let row = job(node.store(), &request).expect("the job");
    assert_eq!(row.state, JobState::Failed);
    assert!(row.updated_ms < row.deadline_ms + 2_000, "{row:?}");
    assert_eq!(backend.living(), 0, "the sandbox went with it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_operators_number_of_attempts_holds() {
    let (_relay, stage, buyer) = stage(&[("queue.max_attempts", "1")]).await;
    let backend = Backstage::new(&[Step::HostFails]);
    let _node = stage.start_on(backend.clone()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.error(&request, Code::Internal).await;
    assert_eq!(backend.made(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_whose_deadline_passed_while_the_node_was_away_is_told_so_and_not_run_again() {
    let settings = [
        ("queue.max_wait_ms", "1000"),
        ("repo.fetch_timeout_ms", "1000"),
        ("limits.wall_ms", "1000"),
        ("drain_timeout_ms", "0"),
    ];
    let (_relay, stage, buyer) = stage(&settings).await;
    let backend = Backstage::new(&[Step::Hangs]);
    let node = stage.start_on(backend.clone()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    until("the sandbox", async || (backend.living() == 1).then_some(())).await;
    let deadline_ms = job(node.store(), &request).expect("the job").deadline_ms;
    node.drain().await.expect("an orderly end");
    until("the deadline to pass", async || (coinop::clock::now_ms() > deadline_ms).then_some(())).await;
    let _node = stage.start_on(backend.clone()).await;
    let reason = buyer.error(&request, Code::Timeout).await;
    assert!(reason.contains("within the job's deadline"), "{reason}");
    assert_eq!(backend.made(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_job_against_the_rules_of_today_is_answered_and_not_run_again() {
    let (_relay, mut stage, buyer) = stage(&[("drain_timeout_ms", "0")]).await;
    let backend = Backstage::new(&[Step::Hangs]);
    let node = stage.start_on(backend.clone()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    until("the sandbox", async || (backend.living() == 1).then_some(())).await;
    node.drain().await.expect("an orderly end");
    stage.config.admission.deny_customers.push(buyer.keys.public_key());
    let _node = stage.start_on(backend.clone()).await;
    buyer.error(&request, Code::CustomerRefused).await;
    assert_eq!(backend.made(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dispatcher_that_breaks_off_ends_the_node_with_an_error_and_keeps_what_was_taken() {
    let (_relay, stage, buyer) = stage(&[]).await;
    let backend = Backstage::new(&[]);
    backend.hold(true);
    let node = stage.start_on(backend.clone()).await;
    let taken = buyer.post(&buyer.order(None, &["true"])).await;
    until("the sandbox", async || (backend.living() == 1).then_some(())).await;
    backend.break_admission();
    let fatal = buyer.post(&buyer.order(None, &["true"])).await;
    node.engine().gone().await;
    let error = node.drain().await.expect_err("no orderly end");
    assert!(error.to_string().contains("the dispatcher broke off"), "{error}");

    // What it had begun is cut, and lets go of the rooms when its turn comes: a process would be gone by then.
    let _node = until("a new start", async || stage.try_start_on(Backstage::new(&[])).await.ok()).await;
    assert_eq!(backend.living(), 0);
    for request in [&taken, &fatal] {
        buyer.result(request).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_dropped_without_a_drain_leaves_nothing_running() {
    let (_relay, stage, buyer) = stage(&[]).await;
    let backend = Backstage::new(&[Step::Hangs]);
    let node = stage.start_on(backend.clone()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    until("the sandbox", async || (backend.living() == 1).then_some(())).await;
    drop(node);
    until("the sandbox to go", async || (backend.living() == 0).then_some(())).await;
    let _node = until("a new start", async || stage.try_start_on(backend.clone()).await.ok()).await;
    buyer.result(&request).await;
}
