//! What must not be left behind: not after a thousand sandboxes, not after a node or its helper was killed.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use coinop::sandbox::local::{Local, Options};
use coinop::sandbox::{Backend, Spec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{
    Folder, bench, collect, is_gone, is_root, policy, processes_with, sh, unique_sleep, wait_until, words,
};

/// Cgroups of this node, and mounts of sandboxes that this process sees.
fn traces(state: &Path) -> (Vec<PathBuf>, Vec<String>) {
    use sha2::Digest;
    let state = state.canonicalize().unwrap();
    let hash = hex::encode(sha2::Sha256::digest(state.to_str().unwrap().as_bytes()));
    let prefix = format!("coinop-{}-", &hash[..8]);
    let mut groups = Vec::new();
    let mut folders = vec![(PathBuf::from("/sys/fs/cgroup"), 0)];
    while let Some((folder, depth)) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                groups.push(entry.path());
            } else if depth < 6 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push((entry.path(), depth + 1));
            }
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let ours = |line: &&str| line.contains("tmpfs box") || line.contains("overlay workspace");
    let mounts = mounts.lines().filter(ours).map(str::to_owned).collect();
    (groups, mounts)
}

/// Runs a test of this file again, in a process without other tests; whether this is that process.
fn alone(test: &str) -> bool {
    if std::env::var_os("COINOP_TEST_ALONE").is_some() {
        return true;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([&format!("leftovers::{test}"), "--exact", "--nocapture"])
        .env("COINOP_TEST_ALONE", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    false
}

fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

#[tokio::test]
async fn a_thousand_sandboxes_leave_nothing() {
    if !alone("a_thousand_sandboxes_leave_nothing") {
        return;
    }
    let Some(bench) = bench!() else { return };
    let state = bench.dir.path().join("state");
    let base = bench.dir.path().join("base");
    std::fs::create_dir(&base).unwrap();
    let base = Arc::new(Folder(base));
    let sleep = unique_sleep();
    let (me, nursery) = (std::process::id(), children_named("coinop-nursery", std::process::id())[0]);
    let nursery = u32::try_from(nursery).unwrap();
    let mut before = (0, 0);
    let mut all = Vec::new();
    for round in 0..1000 {
        if round == 10 {
            wait_until("the first ten are gone", || children_of(nursery).is_empty());
            before = (open_files(me), open_files(nursery));
        }
        let spec = Spec { id: format!("many-{round}"), base: Some(base.clone()), policy: policy() };
        let sandbox = bench.local.create(spec).await.unwrap();
        if round % 10 == 0 {
            sh(&*sandbox, &format!("setsid sleep {sleep} & echo x > f")).await.ok();
        }
        all.push(sandbox);
        if all.len() == 10 {
            for sandbox in all.drain(..) {
                sandbox.destroy().await.unwrap();
            }
        }
    }
    assert_eq!(children_of(nursery), Vec::<i32>::new(), "no init, and so no namespace of one");
    assert_eq!(processes_with(&sleep), Vec::<i32>::new());
    assert_eq!(traces(&state), (vec![], vec![]));
    assert_eq!(bench.local.reap().await.unwrap(), 0);
    // Tasks that have heard of the end may still be letting go of theirs.
    let mut after = (0, 0);
    for _ in 0..1000 {
        after = (open_files(me), open_files(nursery));
        if after.0 <= before.0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(after.0 <= before.0, "open files of the node: {before:?} became {after:?}");
    // User namespaces of bases' owners are kept, one a slot.
    assert!(after.1 <= before.1 + 16, "open files of the helper: {before:?} became {after:?}");
    let left: Vec<_> = std::fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["probe"], "the folder that new nodes try an overlay on, and no other");
}

/// Not a test by itself: the node that the next tests kill. It lives in a process of its own.
#[tokio::test]
async fn a_node_to_be_killed() {
    let Some(sleep) = std::env::var("COINOP_TEST_VICTIM").ok() else { return };
    let state = PathBuf::from(std::env::var("COINOP_TEST_STATE").unwrap());
    let options = Options { helper: Some(crate::common::helper()), warm: 1, ..Options::new(state) };
    let local = Local::new(options).unwrap();
    local.warm_up(&policy()).await.unwrap();
    let mut kept = Vec::new();
    for n in 0..3 {
        let sandbox =
            local.create(Spec { id: format!("v-{n}"), base: None, policy: policy() }).await.unwrap();
        sh(&*sandbox, &format!("setsid sh -c 'trap \"\" TERM; sleep {sleep} & wait' & echo")).await.ok();
        kept.push(sandbox);
    }
    wait_until("all sleep", || processes_with(&sleep).len() >= 6);
    println!("\nVICTIM READY");
    tokio::time::sleep(Duration::from_secs(600)).await;
}

/// A node with three sandboxes at work and one built ahead. Its state folder, and the sleep that marks its jobs.
fn victim(state: &Path, sleep: &str) -> Child {
    let mut node = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["leftovers::a_node_to_be_killed", "--exact", "--nocapture"])
        .env("COINOP_TEST_VICTIM", sleep)
        .env("COINOP_TEST_STATE", state)
        .env("COINOP_TEST_HELPER", crate::common::helper())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let ready =
        BufReader::new(node.stdout.take().unwrap()).lines().any(|line| line.unwrap() == "VICTIM READY");
    assert!(ready, "the node did not come up");
    node
}

#[tokio::test]
async fn a_node_killed_with_signal_9_leaves_nothing() {
    let Some(bench) = bench!() else { return };
    let state = bench.dir.path().join("victim");
    let sleep = unique_sleep();
    let mut node = victim(&state, &sleep);
    assert!(!is_root() || bench.memory_is_watched() || !traces(&state).0.is_empty());
    node.kill().unwrap();
    node.wait().unwrap();
    wait_until("no process is left", || processes_with(&sleep).is_empty());
    wait_until("no cgroup is left", || traces(&state).0.is_empty());
}

/// As when the memory of the host runs out, or its power: nobody was there to clean up.
#[tokio::test]
async fn a_node_killed_with_its_helper_leaves_no_process_and_its_next_life_removes_the_rest() {
    let Some(bench) = bench!() else { return };
    let state = bench.dir.path().join("victim");
    let sleep = unique_sleep();
    let mut node = victim(&state, &sleep);
    let nurseries = children_named("coinop-nursery", node.id());
    assert_eq!(nurseries.len(), 1);
    let inits = children_of(u32::try_from(nurseries[0]).unwrap());
    assert_eq!(inits.len(), 4);
    // Stopped first, the helper cannot see the node go.
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        kill(Pid::from_raw(nurseries[0]), signal).unwrap();
        kill(Pid::from_raw(node.id().cast_signed()), signal).unwrap();
    }
    node.wait().unwrap();
    wait_until("no process is left", || processes_with(&sleep).is_empty());
    let lives = |pid: &i32| Path::new(&format!("/proc/{pid}")).exists();
    wait_until("no init is left, and so no namespace or mount of one", || !inits.iter().any(lives));
    let left = traces(&state).0.len();
    assert_eq!(left > 0, is_root() && !bench.memory_is_watched(), "only a sweep removes cgroups");
    let options = Options { helper: Some(crate::common::helper()), ..Options::new(&state) };
    let next = Local::new(options).unwrap();
    let reaped = next.reap().await.unwrap();
    assert!(if left > 0 { reaped >= 4 } else { reaped == 0 }, "{reaped} of {left} folders");
    // The new life's own first try may still be ending.
    wait_until("no cgroup is left", || traces(&state).0.is_empty());
    let sandbox = next.create(Spec { id: "next".to_owned(), base: None, policy: policy() }).await.unwrap();
    assert_eq!(sh(&*sandbox, "echo on").await.ok(), "on\n");
}

/// The living children of a process, by (pid, name).
fn children(parent: u32) -> Vec<(i32, String)> {
    let parent = parent.to_string();
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            let (head, tail) = stat.rsplit_once(')')?;
            let mut fields = tail.split_whitespace();
            (fields.next()? != "Z" && fields.next()? == parent)
                .then(|| Some((pid, head.split_once('(')?.1.to_owned())))?
        })
        .collect()
}

fn children_of(parent: u32) -> Vec<i32> {
    children(parent).into_iter().map(|(pid, _)| pid).collect()
}

fn children_named(name: &str, parent: u32) -> Vec<i32> {
    children(parent).into_iter().filter(|(_, of)| of == name).map(|(pid, _)| pid).collect()
}

#[tokio::test]
async fn without_its_nursery_a_sandbox_is_gone_and_the_next_one_works() {
    // Other tests of this process have nurseries, too.
    if !alone("without_its_nursery_a_sandbox_is_gone_and_the_next_one_works") {
        return;
    }
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    let process = sandbox.exec(words(["sleep", "300"])).await.unwrap();
    let nurseries = children_named("coinop-nursery", std::process::id());
    assert_eq!(nurseries.len(), 1);
    kill(Pid::from_raw(nurseries[0]), Signal::SIGKILL).unwrap();
    assert_eq!(collect(process).await.exit, None);
    assert!(is_gone(sandbox.exec(words(["true"])).await));
    sandbox.destroy().await.unwrap();
    assert_eq!(sh(&*bench.sandbox().await, "echo again").await.ok(), "again\n");
    let (groups, ..) = traces(&bench.dir.path().join("state"));
    assert!(groups.len() <= 4, "only the living one's: {groups:?}");
}

#[tokio::test]
async fn the_reaper_ends_what_an_earlier_life_left() {
    let Some(bench) = bench!() else { return };
    if !is_root() || bench.memory_is_watched() {
        return; // Without cgroups everything ends with the nursery: there is nothing to reap.
    }
    let state = bench.dir.path().join("state");
    let living = bench.sandbox().await;
    let own = traces(&state).0;
    let sample = own.iter().find(|path| path.starts_with("/sys/fs/cgroup/pids")).or(own.first()).unwrap();
    let name = sample.file_name().unwrap().to_str().unwrap();
    let prefix: String = name.splitn(3, '-').take(2).collect::<Vec<_>>().join("-");
    let leftover = sample.parent().unwrap().join(format!("{prefix}-old-1"));
    std::fs::create_dir(&leftover).unwrap();
    let mut orphan = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    std::fs::write(leftover.join("cgroup.procs"), orphan.id().to_string()).unwrap();
    let reaped = tokio::spawn({
        let waited = tokio::task::spawn_blocking(move || orphan.wait().unwrap());
        async move { waited.await.unwrap() }
    });
    assert_eq!(bench.local.reap().await.unwrap(), 1);
    assert!(!reaped.await.unwrap().success());
    assert!(!leftover.exists());
    assert_eq!(sh(&*living, "echo untouched").await.ok(), "untouched\n");
}
