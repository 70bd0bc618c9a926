//! A disk that takes no more: errors injected into the log's writes and syncs, and a file system that is really
//! full. The node stops taking jobs, says so, loses nothing it accepted, and serves on after a restart.

use std::path::{Path, PathBuf};
use std::process::Command;

use coinop::relay::local::LocalRelay;
use coinop::store::JobState;
use futures_util::StreamExt;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::check_done_once;
use super::support::buyer::{Buyer, printed};
use super::support::git::{README, Served};
use super::support::process::{Home, Nap, Running};
use super::support::skip::skip;
use super::support::{PATIENCE, throughout, until};
use super::writes::{injecting, strace_works};

/// Why the node takes no more jobs, by its own word.
pub fn stopped(node: &Running) -> Option<String> {
    node.status()?["jobs"]["stopped"].as_str().map(str::to_string)
}

/// From the N-th call on each one fails, for a disk does not get well by itself; then the disk is mended and the node started again.
async fn failing(served: &Served, calls: &'static str, errno: &'static str, n: u32) {
    let point = format!("{calls} {errno} {n}");
    let relay = LocalRelay::start().await.expect("a relay");
    let home = Home::new(&[relay.url()], &["--set", "drain_timeout_ms=2000"]);
    let buyer = Buyer::at(&[relay.url()], home.keys.public_key()).await;
    let request = buyer.post(&buyer.order(Some(&served.url), &["cat README.md"])).await;
    let mut node = home.start_under(&injecting(calls, &format!("error={errno}"), &format!("{n}+")));
    let words = until(&format!("{point}: the node to stop, or to end"), async || {
        if let Some(status) = node.try_ended() {
            assert_eq!(status.code(), Some(10), "{point}: {}", node.log());
            return Some(node.log());
        }
        stopped(&node)
    })
    .await;
    let wanted = if errno == "ENOSPC" { "the disk is full" } else { "nput/output error" };
    assert!(words.contains(wanted), "{point}: {words}");
    if node.try_ended().is_none() {
        assert!(node.log().contains("no more jobs are taken"), "{point}: the log says it, too");
        node.terminate();
        assert_eq!(
            node.ended(PATIENCE).await.code(),
            Some(10),
            "{point}: an end that lost a write is no success"
        );
    }
    drop(node);

    let node = home.start();
    assert_eq!(printed(&buyer.result(&request).await), README, "{point}");
    let next = buyer.post(&buyer.order(None, &["echo next"])).await;
    assert_eq!(printed(&buyer.result(&next).await), "next\n", "{point}");
    assert!(node.stop().await.success(), "{point}");
    check_done_once(&home, &buyer, &request).await;
    check_done_once(&home, &buyer, &next).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_cannot_be_written_stops_the_node_and_loses_nothing() {
    if let Err(why) = strace_works() {
        return skip("a_log_that_cannot_be_written_stops_the_node_and_loses_nothing", &why);
    }
    let served = Served::start().await;
    let points = (1..=5).flat_map(|n| [(n, "EIO"), (n, "ENOSPC")]);
    futures_util::stream::iter(points)
        .for_each_concurrent(4, async |(n, errno)| failing(&served, "fdatasync", errno, n).await)
        .await;
}

/// A file system of a few megabytes, until it is dropped.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path) -> Result<Small, String> {
        std::fs::create_dir(at).expect("a folder");
        let options = Some("size=24m,mode=0755");
        mount(Some("coinop-test"), at, Some("tmpfs"), MsFlags::empty(), options)
            .map_err(|errno| format!("a small file system cannot be mounted: {errno}"))?;
        Ok(Small(at.to_path_buf()))
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    /// Until nothing more goes in.
    fn fill(&self) {
        let status = Command::new("dd")
            .args(["if=/dev/zero", "bs=4k", &format!("of={}", self.filler().display())])
            .stderr(std::process::Stdio::null())
            .status();
        assert!(!status.expect("dd").success(), "dd ends when the disk is full");
    }

    fn make_room(&self) {
        std::fs::remove_file(self.filler()).expect("the filler goes");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap_or_else(|errno| eprintln!("umount: {errno}"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_stops_the_node_which_serves_on_when_there_is_room() {
    let dir = tempfile::tempdir().expect("a folder");
    let small = match Small::mount(&dir.path().join("disk")) {
        Ok(small) => small,
        Err(why) => return skip("a_full_disk_stops_the_node_which_serves_on_when_there_is_room", &why),
    };
    let relay = LocalRelay::start().await.expect("a relay");
    let data = dir.path().join("disk/data");
    let home = Home::over(dir, data, &[relay.url()], &["--set", "drain_timeout_ms=2000"]);
    let buyer = Buyer::at(&[relay.url()], home.keys.public_key()).await;
    let node = home.start();
    let nap = Nap::new();
    let accepted = buyer.post(&buyer.order(None, &[&nap.command(), "echo kept"])).await;
    nap.begun().await;

    small.fill();
    let mut refused = Vec::new();
    // What was reserved in the log may still take some records.
    let words = until("the node to stop", async || {
        if refused.len() < 16 {
            refused.push(buyer.post(&buyer.order(None, &["echo late", &"#".repeat(8_000)])).await);
        }
        stopped(&node)
    })
    .await;
    assert!(words.contains("the disk is full"), "{words}");
    assert!(node.log().contains("no more jobs are taken"));
    let silent = buyer.post(&buyer.order(None, &["echo after"])).await;
    throughout(std::time::Duration::from_secs(1), "a stopped node promises nothing", async || {
        buyer.stored(&silent).await.is_empty()
    })
    .await;
    // What it does not take is not fetched again and again: it listens no more.
    let status = until("the relays to be left alone", async || {
        node.status().filter(|status| status["following"] == false)
    })
    .await;
    let (received, lagged) = (&status["relays"][0]["received"], &status["relays"][0]["lagged"]);
    let unheard = buyer.post(&buyer.order(None, &["echo unheard"])).await;
    throughout(std::time::Duration::from_secs(1), "nothing more comes", async || {
        let now = node.status().expect("it lives");
        &now["relays"][0]["received"] == received && &now["relays"][0]["lagged"] == lagged
    })
    .await;
    assert_eq!(status["relays"][0]["connected"], true, "but delivers");
    assert_eq!(home.job(&accepted.id.to_hex()).expect("kept").state, JobState::Running);
    let before = node.log();
    assert_eq!(node.stop().await.code(), Some(10), "the end of a node that a full disk stopped:\n{before}");

    small.make_room();
    let node = home.start();
    nap.wake().await;
    assert_eq!(printed(&buyer.result(&accepted).await), "kept\n");
    assert_eq!(printed(&buyer.result(&silent).await), "after\n");
    assert_eq!(printed(&buyer.result(&unheard).await), "unheard\n");
    for request in &refused {
        assert_eq!(printed(&buyer.result(request).await), "late\n");
    }
    assert!(node.stop().await.success());
    for request in refused.iter().chain([&accepted, &silent, &unheard]) {
        check_done_once(&home, &buyer, request).await;
    }
    drop(home);
    drop(small);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_log_is_named_at_the_start_and_nothing_is_served() {
    let relay = LocalRelay::start().await.expect("a relay");
    let home = Home::new(&[relay.url()], &[]);
    let buyer = Buyer::at(&[relay.url()], home.keys.public_key()).await;
    let node = home.start();
    let request = buyer.post(&buyer.order(None, &["echo kept"])).await;
    buyer.result(&request).await;
    assert!(node.stop().await.success());

    let mut segments = std::fs::read_dir(home.data.join("log")).expect("the log").flatten();
    let segment = segments.next().expect("a segment").path();
    let good = std::fs::read(&segment).expect("readable");
    let mut bad = good.clone();
    // In the first entry's record.
    bad[140] ^= 1;
    std::fs::write(&segment, &bad).expect("writable");
    let mut node = home.start();
    assert_eq!(node.ended(PATIENCE).await.code(), Some(10), "{}", node.log());
    assert!(node.log().contains("the log is damaged: entry 1 at byte 64 of"), "{}", node.log());
    let jobs = std::process::Command::new(env!("CARGO_BIN_EXE_coinop"))
        .args(["jobs", "list", "--data-dir"])
        .arg(&home.data)
        .output()
        .expect("it runs");
    assert_eq!(jobs.status.code(), Some(10), "{}", String::from_utf8_lossy(&jobs.stderr));

    std::fs::write(&segment, &good).expect("writable");
    assert!(home.start().stop().await.success());
    check_done_once(&home, &buyer, &request).await;
}
