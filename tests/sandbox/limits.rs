//! Limits against jobs that need Python to pass them, and what is the local backend's own way to keep them. What every
//! backend promises stands in `tests/conformance/limits.rs`.

use std::time::{Duration, Instant};

use coinop::sandbox::{Backend, Policy};

use crate::common::{bench, is_root, policy, python, python_bench, sh, words};

#[tokio::test]
async fn threads_count_as_processes() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { pids: 10, ..policy() }).await;
    let threads = "
import threading, time, os
n = 1
try:
    while n < 100:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        n += 1
except RuntimeError:
    pass
print(n, flush=True)
os._exit(0)";
    assert_eq!(python(&*sandbox, threads).await.number(), 10);
}

/// What the kernel counts by user would else be one count for jobs of both.
#[tokio::test]
async fn two_root_nodes_on_one_host_have_no_uid_in_common() {
    let (Some(one), Some(other)) = (bench!(), bench!()) else { return };
    // An ordinary user's jobs all have that user's uid.
    if !is_root() {
        return;
    }
    let mut uids = Vec::new();
    for bench in [&one, &other] {
        let claimed = bench.local.checks().into_iter().find(|check| check.name == "uids").unwrap();
        assert!(claimed.how.ends_with("claimed on this host"), "{claimed:?}");
        for _ in 0..3 {
            let sandbox = bench.sandbox().await;
            // As the host's own user namespace calls it.
            let map = sh(&*sandbox, "read inside outside count < /proc/self/uid_map; echo $outside").await;
            uids.push((map.number(), sandbox));
        }
    }
    let apart: std::collections::BTreeSet<_> = uids.iter().map(|(uid, _)| *uid).collect();
    assert_eq!(apart.len(), 6, "{apart:?}");
}

/// Counted by the kernel for a sandbox's user namespace and for the user who made it.
#[tokio::test]
async fn what_the_kernel_counts_by_user_is_limited_for_each_sandbox() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    let host = std::fs::read_to_string("/proc/sys/fs/inotify/max_user_watches").unwrap();
    let watches = host.trim().parse::<u64>().unwrap() / 16;
    for (name, most) in [
        ("max_inotify_instances", 8),
        ("max_inotify_watches", watches),
        ("max_fanotify_groups", 2),
        ("max_fanotify_marks", 128),
        ("max_user_namespaces", 0),
    ] {
        let file = format!("/proc/sys/user/{name}");
        if std::path::Path::new(&file).exists() {
            assert_eq!(sh(&*sandbox, &format!("cat {file}")).await.ok(), format!("{most}\n"), "{name}");
        }
    }
}

#[tokio::test]
async fn zombies_and_orphans_of_one_command_are_gone_before_the_next() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { pids: 24, ..policy() }).await;
    let breed = "
import os, time
for n in range(20):
    if os.fork() == 0:
        os._exit(0)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(0.05)
        os._exit(0)
    os._exit(0)
time.sleep(0.2)
print(sum(open(f'/proc/{p}/stat').read().rsplit(')')[-1].split()[0] == 'Z' for p in os.listdir('/proc') if p.isdigit()))";
    for round in 0..3 {
        // The orphan is init's, who reaps it; the others are the command's own until it ends.
        assert_eq!(python(&*sandbox, breed).await.number(), 21, "round {round}");
    }
}

/// What the neighbours feel: a job that takes all it can get leaves the node and other jobs at work.
#[tokio::test]
async fn a_greedy_job_does_not_hold_up_its_neighbour() {
    let Some(bench) = python_bench!() else { return };
    let greedy = bench.sandbox_with(Policy { cpu_milli: 1000, pids: 32, ..policy() }).await;
    let script = "
import os
while True:
    try:
        if os.fork() == 0:
            while True:
                os.write(1, b'x' * 4096)
                try: os.fork()
                except OSError: pass
    except OSError: pass";
    let mut flood = greedy.exec(words(["python3", "-c", script])).await.unwrap();
    assert!(flood.events.recv().await.is_some());
    // From here on nobody reads the flood.
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        let neighbour = bench.sandbox().await;
        assert_eq!(sh(&*neighbour, "echo on").await.ok(), "on\n");
        neighbour.destroy().await.unwrap();
        best = best.min(start.elapsed());
    }
    assert!(best < Duration::from_secs(2), "a neighbour took {best:?}");
    let start = Instant::now();
    greedy.kill().await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test]
async fn cores_that_a_job_is_kept_to_cannot_be_widened() {
    let Some(bench) = python_bench!() else { return };
    if !bench.cpu_is_in_cores() || std::thread::available_parallelism().unwrap().get() == 1 {
        return; // A cgroup gives a share of all of them, or there is one only.
    }
    let sandbox = bench.sandbox_with(Policy { cpu_milli: 1000, ..policy() }).await;
    let widen = "import os\nos.sched_setaffinity(0, range(os.cpu_count()))";
    assert!(python(&*sandbox, widen).await.err.contains("PermissionError"));
}

/// An ordinary user's memory is watched, not capped; that must not read like the same thing.
#[tokio::test]
async fn a_watched_limit_does_not_read_like_a_kept_one() {
    let Some(bench) = bench!() else { return };
    let checks = bench.local.checks();
    assert!(checks.iter().all(|check| check.ok), "{checks:?}");
    let said = |name: &str| checks.iter().find(|check| check.name == name).unwrap().how.clone();
    assert_eq!(
        bench.memory_is_watched(),
        said("memory_bytes").contains("not counted: the kernel's own lists")
    );
    assert_eq!(bench.memory_is_watched(), said("network").contains("no sockets but pairs"));
    assert_eq!(bench.memory_is_watched(), !is_root() || bench.cpu_is_in_cores());
}
