//! Each limit of the policy, against a job that does all it can to pass it.

use std::time::{Duration, Instant};

use coinop::sandbox::{Backend, Error, Exit, Limit, Network, Policy};

use crate::common::{
    Bench, bench, is_gone, is_root, policy, processes_with, python, python_bench, run, sh, unique_sleep,
    words,
};

#[tokio::test]
async fn a_fork_bomb_ends_at_the_pids_limit() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { pids: 24, ..policy() }).await;
    let bomb = "
import os, sys, time
n = 1
try:
    while n < 500:
        if os.fork() == 0:
            time.sleep(60)
        n += 1
except OSError as e:
    assert e.errno == 11, e
print(n, flush=True)
os._exit(0)";
    let alive = python(&*sandbox, bomb).await.number();
    assert_eq!(alive, 24);
    sandbox.destroy().await.unwrap();
}

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

/// Full pipes and pairs of sockets, and nothing in the processes themselves.
/// Usual tools have a few of each open.
#[tokio::test]
async fn the_disk_limit_holds_over_all_writable_places_together() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { disk_bytes: 8 << 20, ..policy() }).await;
    let fill = "for d in /workspace /tmp ~ /dev/shm; do dd if=/dev/zero of=$d/f bs=64k 2>&1 | grep -o 'No space' ; done; \
                cat /workspace/f /tmp/f ~/f /dev/shm/f | wc -c";
    let said = sh(&*sandbox, fill).await.ok();
    assert_eq!(said.matches("No space").count(), 4, "{said}");
    let bytes: u64 = said.lines().last().unwrap().trim().parse().unwrap();
    assert!((7 << 20..=8 << 20).contains(&bytes), "{bytes}");
    assert!(sandbox.usage().await.unwrap().disk_written_bytes <= 8 << 20);
}

#[tokio::test]
async fn the_inode_limit_holds() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { inodes: 100, ..policy() }).await;
    let fill = "
import os
n = 0
try:
    while n < 1000:
        os.mkdir(f'/tmp/{n}') if n % 2 else open(f'/workspace/{n}', 'w').close()
        n += 1
except OSError as e:
    assert e.errno == 28, e
print(n)";
    let made = python(&*sandbox, fill).await.number();
    assert!((95..=105).contains(&made), "{made}");
}

#[tokio::test]
async fn a_process_opens_no_more_files_than_its_limit() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { open_files: 32, ..policy() }).await;
    let open = "
import resource, os
try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
except (ValueError, OSError):
    pass
fds = []
try:
    while len(fds) < 1000:
        fds.append(os.dup(1))
except OSError as e:
    assert e.errno == 24, e
os.write(1, b'%d' % (len(fds) + 3))";
    assert_eq!(python(&*sandbox, open).await.number(), 32);
}

#[tokio::test]
async fn a_flood_of_output_is_cut_at_the_byte() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { output_bytes: 100_000, ..policy() }).await;
    assert_eq!(sh(&*sandbox, "echo 123456789").await.ok().len(), 10);
    let ran = sh(&*sandbox, "yes & yes >&2 & wait").await;
    ran.hit(Limit::Output);
    assert_eq!(ran.out.len() + ran.err.len(), 99_990);
    // The sandbox lives on, its output spent.
    assert_eq!(sh(&*sandbox, "true").await.exit, Some(Exit::Code { code: 0 }));
    sh(&*sandbox, "echo more; sleep 60").await.hit(Limit::Output);
}

#[tokio::test]
async fn the_wall_limit_ends_the_sandbox_and_says_so() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { wall_ms: 400, ..policy() }).await;
    let start = Instant::now();
    sh(&*sandbox, "trap '' TERM INT; sleep 60; sleep 60").await.hit(Limit::Wall);
    assert!(start.elapsed() < Duration::from_secs(20));
    assert!(is_gone(sandbox.exec(words(["true"])).await));
}

#[tokio::test]
async fn a_command_that_times_out_leaves_nothing_and_the_sandbox_lives_on() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    let sleep = unique_sleep();
    let mut command = words(["sh", "-c"]);
    command
        .argv
        .push(format!("setsid sh -c 'sleep {sleep} & sleep {sleep}' & (sleep {sleep} &) ; sleep {sleep}"));
    command.timeout = Some(Duration::from_millis(500));
    assert_eq!(run(&*sandbox, command).await.exit, Some(Exit::Timeout));
    assert_eq!(processes_with(&sleep), Vec::<i32>::new());
    assert_eq!(sh(&*sandbox, "echo on").await.ok(), "on\n");
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

async fn busy(bench: &Bench, cpu_milli: u32) -> f64 {
    let sandbox = bench.sandbox_with(Policy { cpu_milli, ..policy() }).await;
    let before = sandbox.usage().await.unwrap();
    let start = Instant::now();
    let spin = "
import os, time
for _ in range(4):
    if os.fork() == 0:
        while True: pass
time.sleep(2)
os._exit(0)";
    python(&*sandbox, spin).await.ok();
    let used = sandbox.usage().await.unwrap().cpu_ms - before.cpu_ms;
    used as f64 / start.elapsed().as_secs_f64() / 1000.0
}

#[tokio::test]
async fn a_job_gets_no_more_than_its_share_of_the_processors() {
    let Some(bench) = python_bench!() else { return };
    if bench.cpu_is_in_cores() {
        let tenth = bench.local.admit(&Policy { cpu_milli: 100, ..policy() });
        assert!(matches!(tenth, Err(Error::Unenforceable { clause: "cpu_milli", .. })), "{tenth:?}");
        let cores = busy(&bench, 1000).await;
        assert!(cores < 1.2, "{cores} cores instead of 1");
        let sandbox = bench.sandbox_with(Policy { cpu_milli: 1000, ..policy() }).await;
        let widen = "import os\nos.sched_setaffinity(0, range(os.cpu_count()))";
        if std::thread::available_parallelism().unwrap().get() > 1 {
            assert!(python(&*sandbox, widen).await.err.contains("PermissionError"));
        }
    } else {
        let cores = busy(&bench, 300).await;
        assert!(cores < 0.45, "{cores} cores instead of 0.3");
    }
}

#[tokio::test]
async fn what_cannot_be_enforced_is_refused_by_name() {
    let Some(bench) = bench!() else { return };
    let egress = bench.local.admit(&Policy { network: Network::Egress, ..policy() });
    assert!(
        matches!(egress, Err(Error::Unenforceable { backend: "local", clause: "network", .. })),
        "{egress:?}"
    );
    for (policy, what) in [
        (Policy { disk_bytes: 0, ..policy() }, "disk_bytes"),
        (Policy { pids: 0, ..policy() }, "pids"),
        (Policy { memory_bytes: 1, ..policy() }, "memory_bytes"),
    ] {
        let refused = bench.local.admit(&policy);
        assert!(matches!(&refused, Err(Error::BadPolicy(why)) if why.contains(what)), "{refused:?}");
    }
}

#[tokio::test]
async fn every_clause_tells_how_it_is_enforced() {
    let Some(bench) = bench!() else { return };
    let checks = bench.local.checks();
    for clause in [
        "wall_ms",
        "memory_bytes",
        "pids",
        "cpu_milli",
        "disk_bytes",
        "inodes",
        "open_files",
        "output_bytes",
        "network",
    ] {
        let found = checks.iter().find(|check| check.name == clause).unwrap_or_else(|| panic!("no {clause}"));
        assert!(found.ok && !found.how.is_empty(), "{found:?}");
    }
    // An ordinary user's memory is watched, not capped; that must not read like the same thing.
    let said = |name: &str| checks.iter().find(|check| check.name == name).unwrap().how.clone();
    assert_eq!(
        bench.memory_is_watched(),
        said("memory_bytes").contains("not counted: the kernel's own lists")
    );
    assert_eq!(bench.memory_is_watched(), said("network").contains("no sockets but pairs"));
    assert_eq!(bench.memory_is_watched(), !is_root() || bench.cpu_is_in_cores());
}
