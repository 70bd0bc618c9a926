//! Birth, work, death, and what must not be left behind.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coinop::sandbox::{Backend, Command, Error, Event, Exit, Spec};

use crate::common::{
    Folder, bench, bench_with, collect, is_gone, is_root, policy, processes_with, run, sh, unique_sleep,
    wait_until, words,
};

#[tokio::test]
async fn a_program_that_cannot_start_says_why() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    sh(&*sandbox, "echo x > plain; printf 'junk' > junk; chmod +x junk; mkdir folder").await.ok();
    for (program, errno) in
        [("no-such-program", 2), ("./missing", 2), ("./plain", 13), ("./folder", 13), ("./junk", 8), ("", 2)]
    {
        let exit = run(&*sandbox, words([program])).await.exit;
        assert_eq!(exit, Some(Exit::NotStarted { errno }), "{program:?}");
    }
    let in_path =
        Command { env: [("PATH".to_owned(), "/workspace:/nowhere".to_owned())].into(), ..words(["plain"]) };
    assert_eq!(run(&*sandbox, in_path).await.exit, Some(Exit::NotStarted { errno: 13 }));
    assert!(matches!(run(&*sandbox, Command::default()).await.exit, Some(Exit::NotStarted { .. })));
}

#[tokio::test]
async fn exits_and_signals_are_told_apart() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    assert_eq!(sh(&*sandbox, "exit 7").await.exit, Some(Exit::Code { code: 7 }));
    assert_eq!(sh(&*sandbox, "kill -SEGV $$").await.exit, Some(Exit::Signal { signal: 11 }));
    assert_eq!(sh(&*sandbox, "kill -9 $$").await.exit, Some(Exit::Signal { signal: 9 }));
}

#[tokio::test]
async fn several_commands_run_at_once_and_stdin_reaches_the_right_one() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    let cat = Command { stdin: true, ..words(["cat"]) };
    let (mut one, mut two) = (sandbox.exec(cat.clone()).await.unwrap(), sandbox.exec(cat).await.unwrap());
    two.stdin.take().unwrap().send(b"second".to_vec()).await.unwrap();
    assert_eq!(collect(two).await.ok(), "second");
    let stdin = one.stdin.take().unwrap();
    stdin.send(vec![b'x'; 300_000]).await.unwrap();
    drop(stdin);
    assert_eq!(collect(one).await.ok().len(), 300_000);
}

#[tokio::test]
async fn output_is_live() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    let mut process = sandbox
        .exec(Command { stdin: true, ..words(["sh", "-c", "echo first; read x; echo $x"]) })
        .await
        .unwrap();
    assert_eq!(process.events.recv().await, Some(Event::Stdout(b"first\n".to_vec())));
    process.stdin.take().unwrap().send(b"go\n".to_vec()).await.unwrap();
    assert_eq!(collect(process).await.ok(), "go\n");
}

#[tokio::test]
async fn a_daemon_does_not_hold_its_command_open() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    let start = Instant::now();
    assert_eq!(sh(&*sandbox, "sleep 300 & echo started").await.ok(), "started\n");
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(sh(&*sandbox, "pgrep sleep | wc -l").await.ok().trim(), "1");
}

#[tokio::test]
async fn a_kill_ends_everything_within_a_tenth_of_a_second() {
    let Some(bench) = bench!() else { return };
    let mut times = Vec::new();
    for _ in 0..5 {
        let sandbox = bench.sandbox().await;
        let sleep = unique_sleep();
        let script = format!(
            "trap '' TERM HUP INT; for i in 1 2 3 4; do setsid sh -c 'sleep {sleep} & sleep {sleep}' & done; \
             (sleep {sleep} & kill -STOP $!) ; sleep {sleep} & kill -STOP $!; echo up; wait"
        );
        let mut process = sandbox.exec(words(["sh", "-c", &script])).await.unwrap();
        assert_eq!(process.events.recv().await, Some(Event::Stdout(b"up\n".to_vec())));
        wait_until("all sleep", || processes_with(&sleep).len() >= 10);
        let start = Instant::now();
        sandbox.kill().await.unwrap();
        times.push(start.elapsed());
        assert_eq!(processes_with(&sleep), Vec::<i32>::new());
        assert_eq!(collect(process).await.exit, None, "a killed sandbox gives no exit");
        assert!(is_gone(sandbox.exec(words(["true"])).await));
        sandbox.kill().await.unwrap();
        sandbox.destroy().await.unwrap();
    }
    // The best of five: the others are the machine's mood.
    assert!(times.iter().min().unwrap() < &Duration::from_millis(100), "{times:?}");
}

#[tokio::test]
async fn dropping_a_sandbox_kills_it() {
    let Some(bench) = bench!() else { return };
    let sleep = unique_sleep();
    let sandbox = bench.sandbox().await;
    sh(&*sandbox, &format!("sleep {sleep} & echo")).await.ok();
    wait_until("it sleeps", || processes_with(&sleep).len() == 1);
    drop(sandbox);
    wait_until("it is gone", || processes_with(&sleep).is_empty());
}

/// Cgroups of ours, and descriptors and mounts of this process.
fn traces(state: &Path) -> (Vec<PathBuf>, usize, usize) {
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
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
    (groups, fds, mounts)
}

#[tokio::test]
async fn a_hundred_sandboxes_leave_nothing() {
    let Some(bench) = bench!() else { return };
    let state = bench.dir.path().join("state");
    let sleep = unique_sleep();
    let one = bench.sandbox_over(|_| {}).await;
    one.destroy().await.unwrap();
    let (.., mounts) = traces(&state);
    let mut all = Vec::new();
    for round in 0..100 {
        let base = Arc::new(Folder(bench.dir.path().join("base")));
        let spec = Spec { id: format!("many-{round}"), base: Some(base), policy: policy() };
        let sandbox = bench.local.create(spec).await.unwrap();
        sh(&*sandbox, &format!("setsid sleep {sleep} & echo x > f")).await.ok();
        all.push(sandbox);
        if all.len() == 10 {
            for sandbox in all.drain(..) {
                sandbox.destroy().await.unwrap();
            }
        }
    }
    assert_eq!(processes_with(&sleep), Vec::<i32>::new());
    let (groups, _, mounts_after) = traces(&state);
    assert_eq!((groups, mounts_after), (vec![], mounts));
    assert_eq!(bench.local.reap().await.unwrap(), 0);
}

#[tokio::test]
async fn usage_comes_from_the_kernel() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    let work = "
import time
b = bytearray(32 << 20)
end = time.process_time() + 0.5
while time.process_time() < end: pass
open('f', 'wb').write(b'x' * 1000000)";
    crate::common::python(&*sandbox, work).await.ok();
    let now = sandbox.usage().await.unwrap();
    let last = sandbox.destroy().await.unwrap();
    for usage in [now, last] {
        assert!((450..5000).contains(&usage.cpu_ms), "{usage:?}");
        assert!(usage.wall_ms >= 450 && usage.peak_memory_bytes >= 32 << 20, "{usage:?}");
        assert!((1_000_000..2_000_000).contains(&usage.disk_written_bytes), "{usage:?}");
    }
}

#[tokio::test]
async fn a_pre_built_sandbox_is_used_once() {
    let Some(bench) = bench_with("a_pre_built_sandbox_is_used_once", 2) else { return };
    bench.local.warm_up().await.unwrap();
    for round in 0..6 {
        let base = bench.dir.path().join(format!("base-{round}"));
        std::fs::create_dir(&base).unwrap();
        std::fs::write(base.join("mine"), format!("{round}")).unwrap();
        let spec = Spec { id: format!("warm-{round}"), base: Some(Arc::new(Folder(base))), policy: policy() };
        let sandbox = bench.local.create(spec).await.unwrap();
        let said = sh(
            &*sandbox,
            "cat mine; ls -A /tmp ~ /dev/shm | grep -c left; touch /tmp/left ~/left /dev/shm/left mine2",
        )
        .await;
        assert_eq!(said.out, format!("{round}0\n"));
        assert_eq!(sandbox.changes(100).await.unwrap().len(), 1);
        assert!(sandbox.usage().await.unwrap().wall_ms < 20_000);
    }
}

#[tokio::test]
async fn many_start_at_once() {
    let Some(bench) = bench!() else { return };
    let local = Arc::new(bench.local);
    let tasks: Vec<_> = (0..24)
        .map(|n| {
            let local = local.clone();
            tokio::spawn(async move {
                let spec = Spec { id: format!("n-{n}"), base: None, policy: policy() };
                let sandbox = local.create(spec).await.unwrap();
                let said = sh(&*sandbox, &format!("echo {n}")).await.ok();
                sandbox.destroy().await.unwrap();
                said
            })
        })
        .collect();
    for (n, task) in tasks.into_iter().enumerate() {
        assert_eq!(task.await.unwrap(), format!("{n}\n"));
    }
}

#[tokio::test]
async fn a_name_that_is_not_plain_is_refused() {
    let Some(bench) = bench!() else { return };
    for id in ["", "../x", "A", "a b", &"x".repeat(65)] {
        let made = bench.local.create(Spec { id: id.to_owned(), base: None, policy: policy() }).await;
        assert!(matches!(made.err(), Some(Error::BadPolicy(_))), "{id:?}");
    }
}

/// Not a test by itself: the node that the next tests kill. It lives in a process of its own.
#[tokio::test]
async fn a_node_to_be_killed() {
    let Some(sleep) = std::env::var("COINOP_TEST_VICTIM").ok() else { return };
    let state = PathBuf::from(std::env::var("COINOP_TEST_STATE").unwrap());
    let options = coinop::sandbox::local::Options {
        helper: Some(crate::common::helper()),
        warm: 1,
        ..coinop::sandbox::local::Options::new(state)
    };
    let local = coinop::sandbox::local::Local::new(options).unwrap();
    local.warm_up().await.unwrap();
    let mut kept = Vec::new();
    for n in 0..3 {
        let sandbox =
            local.create(Spec { id: format!("v-{n}"), base: None, policy: policy() }).await.unwrap();
        sh(&*sandbox, &format!("setsid sh -c 'trap \"\" TERM; sleep {sleep} & wait' & echo")).await.ok();
        kept.push(sandbox);
    }
    wait_until("all sleep", || processes_with(&sleep).len() == 3);
    println!("\nVICTIM READY");
    tokio::time::sleep(Duration::from_secs(600)).await;
}

#[tokio::test]
async fn a_node_killed_with_signal_9_leaves_nothing() {
    let Some(bench) = bench!() else { return };
    let state = bench.dir.path().join("victim");
    let sleep = unique_sleep();
    let mut node = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["life::a_node_to_be_killed", "--exact", "--nocapture"])
        .env("COINOP_TEST_VICTIM", &sleep)
        .env("COINOP_TEST_STATE", &state)
        .env("COINOP_TEST_HELPER", crate::common::helper())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let ready =
        BufReader::new(node.stdout.take().unwrap()).lines().any(|line| line.unwrap() == "VICTIM READY");
    assert!(ready, "the node did not come up");
    assert!(!is_root() || !traces(&state).0.is_empty());
    node.kill().unwrap();
    node.wait().unwrap();
    wait_until("no process is left", || processes_with(&sleep).is_empty());
    wait_until("no cgroup is left", || traces(&state).0.is_empty());
}

/// The nursery of this process whose state folder is `state`: the child that holds the fewest secrets.
fn children_named(name: &str) -> Vec<i32> {
    let me = std::process::id().to_string();
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            let (head, tail) = stat.rsplit_once(')')?;
            let parent = tail.split_whitespace().nth(1)?;
            (head.ends_with(name) && parent == me).then_some(pid)
        })
        .collect()
}

#[tokio::test]
async fn without_its_nursery_a_sandbox_is_gone_and_the_next_one_works() {
    if std::env::var_os("COINOP_TEST_ALONE").is_none() {
        // Other tests of this process have nurseries, too: this one runs by itself.
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["life::without_its_nursery_a_sandbox_is_gone_and_the_next_one_works", "--exact"])
            .env("COINOP_TEST_ALONE", "1")
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    let process = sandbox.exec(words(["sleep", "300"])).await.unwrap();
    let nurseries = children_named("coinop-nursery");
    assert_eq!(nurseries.len(), 1);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(nurseries[0]), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
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
