//! kill -9 at every write: strace ends the unmodified binary at its N-th sync, write, rename or removal, for
//! every N until a run comes through. Then the node is started again, and the job must end once. The count is
//! strace's, for each thread on its own.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use coinop::relay::local::LocalRelay;
use futures_util::StreamExt;
use nostr_sdk::prelude::Event;

use super::check_done_once;
use super::support::buyer::{Buyer, printed};
use super::support::git::{README, Served};
use super::support::process::{Home, Running};
use super::support::skip::skip;
use super::support::{PATIENCE, until};

/// Runs at once.
pub const ABREAST: usize = 4;
/// More writes than one job can need.
pub const TOO_MANY: u32 = 400;

/// Whether strace can change what a program's calls do, here.
pub fn strace_works() -> Result<(), String> {
    let tried = Command::new("strace")
        .args([
            "-qq",
            "-f",
            "-o",
            "/dev/null",
            "-e",
            "trace=fsync",
            "-e",
            "inject=fsync:error=EIO:when=1",
            "true",
        ])
        .output();
    match tried {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_string()),
        Err(error) => Err(format!("strace: {error}")),
    }
}

/// The words before the node's own that make some of these calls go wrong; `when` as strace has it.
pub fn injecting(calls: &str, fault: &str, when: &str) -> Vec<String> {
    let trace = format!("trace={calls}");
    let inject = format!("inject={calls}:{fault}:when={when}");
    ["strace", "-qq", "-f", "-o", "/dev/null", "-e", &trace, "-e", &inject].map(str::to_string).to_vec()
}

/// One killed life and the one after it. `false`: the N-th call never came, and the first life did all the work.
async fn point(served: &Served, calls: &'static str, n: u32) -> bool {
    let relay = LocalRelay::start().await.expect("a relay");
    let home = Home::new(&[relay.url()], &[]);
    let buyer = Buyer::at(&[relay.url()], home.keys.public_key()).await;
    // Before the node starts, so that nothing has to be waited for: it finds the request in the history.
    let request = buyer.post(&buyer.order(Some(&served.url), &["cat README.md"])).await;
    let mut node = home.start_under(&injecting(calls, "signal=SIGKILL", &n.to_string()));
    let survived = lives_through(&mut node, &home, &buyer, &request).await;
    if survived {
        node.terminate();
    }
    // The kill may also come during the orderly end.
    let killed = !node.ended(PATIENCE).await.success();
    drop(node);

    let node = home.start();
    let answer = buyer.result(&request).await;
    assert_eq!(printed(&answer), README, "{calls} {n}");
    delivered(&home, &buyer, &request).await;
    assert!(node.stop().await.success(), "{calls} {n}");
    check_done_once(&home, &buyer, &request).await;
    killed
}

/// Waits until the result is delivered or the node is dead.
pub async fn lives_through(node: &mut Running, home: &Home, buyer: &Buyer, request: &Event) -> bool {
    until("the job's end or the node's", async || {
        if node.try_ended().is_some() {
            return Some(false);
        }
        let answer = home.job(&request.id.to_hex())?.answer?;
        let words = home.store().deliveries(&answer).ok()?;
        (!words.is_empty() && !buyer.ends(request).await.is_empty()).then_some(true)
    })
    .await
}

/// Waits until a relay has the answer, and the log its OK.
pub async fn delivered(home: &Home, buyer: &Buyer, request: &Event) {
    until("the OK in the log", async || {
        let answer = home.job(&request.id.to_hex())?.answer?;
        let words = home.store().deliveries(&answer).expect("readable");
        (!words.is_empty() && !buyer.ends(request).await.is_empty()).then_some(())
    })
    .await;
}

async fn killed_at_every(test: &str, calls: &'static str) {
    if let Err(why) = strace_works() {
        return skip(test, &why);
    }
    let served = Served::start().await;
    let last = AtomicU32::new(TOO_MANY);
    // Not as tasks of their own: a point is more waiting than work.
    futures_util::stream::iter(1..TOO_MANY)
        .for_each_concurrent(ABREAST, async |n| {
            if n < last.load(Ordering::SeqCst) && !point(&served, calls, n).await {
                last.fetch_min(n, Ordering::SeqCst);
            }
        })
        .await;
    let points = last.load(Ordering::SeqCst);
    assert!((2..TOO_MANY).contains(&points), "{calls}: {points} points");
    eprintln!("{calls}: killed at {} calls", points - 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_sync_of_the_log_the_job_ends_once() {
    killed_at_every("killed_at_every_sync_of_the_log_the_job_ends_once", "fdatasync").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_write_into_a_file_the_job_ends_once() {
    killed_at_every("killed_at_every_write_into_a_file_the_job_ends_once", "pwrite64").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_sync_of_a_file_or_folder_the_job_ends_once() {
    killed_at_every("killed_at_every_sync_of_a_file_or_folder_the_job_ends_once", "fsync").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_every_rename_removal_and_cut_the_job_ends_once() {
    let calls = "rename,renameat,renameat2,unlink,unlinkat,ftruncate";
    killed_at_every("killed_at_every_rename_removal_and_cut_the_job_ends_once", calls).await;
}
