//! Ends: of one command, of all, of a sandbox; whatever a job does against it, and whoever comes first.

use std::time::{Duration, Instant};

use coinop::sandbox::{Exit, Policy, Sandbox};

use crate::common::{IMAGE, OK, backend, name, policy, rest, run, sandbox, sandbox_with, sh, soon, start};

/// The names of the processes inside, but for the one that looks.
async fn inside(sandbox: &dyn Sandbox) -> Vec<String> {
    let (names, _) =
        run(sandbox, &["sh", "-c", "for p in /proc/[0-9]*; do read -r n < $p/comm; echo $n; done"]).await;
    names.lines().filter(|name| *name != "sh").map(str::to_owned).collect()
}

#[tokio::test]
async fn a_command_is_ended_in_its_first_moment_as_well() {
    let host = engine!();
    let backend = backend(&host, &name("moment"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    for _ in 0..20 {
        let mut first = start(&*sandbox, "sleep 1000", Some(Duration::ZERO), false).await;
        let mut second = start(&*sandbox, "sleep 1000", Some(Duration::ZERO), false).await;
        assert_eq!(rest(&mut first).await.1, Some(Exit::Timeout));
        assert_eq!(rest(&mut second).await.1, Some(Exit::Timeout));
    }
    sandbox.destroy().await.unwrap();
}

#[tokio::test]
async fn the_files_are_there_after_a_kill_in_a_command_s_first_moment() {
    let host = engine!();
    let backend = backend(&host, &name("files"), IMAGE, 0).await.unwrap();
    for _ in 0..4 {
        let sandbox = sandbox(&backend).await;
        sandbox.write_file("kept", b"kept").await.unwrap();
        let mut running = Vec::new();
        for _ in 0..4 {
            running.push(start(&*sandbox, "sleep 1000", None, false).await);
        }
        soon("the kill", sandbox.kill()).await.unwrap();
        assert_eq!(sandbox.read_file("kept", 10).await.unwrap(), b"kept");
        for mut process in running {
            assert_eq!(rest(&mut process).await.1, None, "it ended with its sandbox");
        }
        sandbox.destroy().await.unwrap();
    }
}

#[tokio::test]
async fn of_several_commands_one_is_ended_with_all_that_it_started() {
    let host = engine!();
    let backend = backend(&host, &name("one"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    let mut other = start(&*sandbox, "sleep 3; echo done", None, false).await;
    // Children, children in sessions of their own, stopped ones and one that does not listen.
    let tree = "(trap '' TERM HUP INT; tail -f /dev/null) & setsid tail -f /dev/null & \
                setsid sh -c 'setsid tail -f /dev/null & setsid tail -f /dev/null & wait' & \
                tail -f /dev/null & kill -STOP $!; wait";
    let mut doomed = start(&*sandbox, tree, Some(Duration::from_millis(700)), false).await;
    assert_eq!(rest(&mut doomed).await.1, Some(Exit::Timeout));
    // The end that is told is the command's own; what was killed with it may take a moment to be gone.
    let told = Instant::now();
    loop {
        let left = inside(&*sandbox).await;
        if !left.iter().any(|name| name == "tail") {
            break;
        }
        assert!(told.elapsed() < Duration::from_secs(2), "{left:?}");
    }
    let (out, exit) = rest(&mut other).await;
    assert_eq!((String::from_utf8_lossy(&out).trim(), exit), ("done", OK));
    sandbox.destroy().await.unwrap();
}

/// A job may signal itself only: process 1 and its worker are not its own.
#[tokio::test]
async fn a_job_cannot_end_stop_or_look_into_what_keeps_it() {
    let host = engine!();
    let backend = backend(&host, &name("keeper"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    let script = "for s in KILL STOP TERM INT HUP USR1 QUIT; do kill -$s 1; done 2>/dev/null; \
                  for p in 1 2 3 4 5 6 7 8 9; do [ -d /proc/$p ] && [ $p != $$ ] || continue; \
                  for f in fd environ mem cwd/x root/x maps syscall stack; do \
                  (cat /proc/$p/$f || ls /proc/$p/$f/) >/dev/null 2>&1 && echo open $p $f; done; done; \
                  echo -1000 > /proc/1/oom_score_adj; echo -1000 > /proc/self/oom_score_adj; \
                  cat /proc/self/oom_score_adj; echo alive";
    let (out, exit) = sh(&*sandbox, &format!("({script}) 2>/dev/null")).await;
    assert_eq!((out.as_str(), exit), ("1000\nalive\n", OK));
    // Everything that it may end, it may: itself.
    let (_, exit) = sh(&*sandbox, "sleep 1000 & kill -9 -1; kill -9 $$").await;
    assert_eq!(exit, Some(Exit::Signal { signal: 9 }));
    sandbox.write_file("a", b"b").await.unwrap();
    assert_eq!(sandbox.read_file("a", 1).await.unwrap(), b"b");
    sandbox.destroy().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_greedy_job_with_a_tenth_of_a_core_is_ended_in_time() {
    let host = engine!();
    let backend = backend(&host, &name("greedy"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox_with(&backend, Policy { cpu_milli: 100, ..policy() }, None).await;
    sandbox.write_file("kept", b"kept").await.unwrap();
    let spin = "i=0; while [ $i -lt 25 ]; do (while :; do :; done) & i=$((i+1)); done; echo up; wait";
    let mut process = start(&*sandbox, spin, None, false).await;
    soon("its first word", process.events.recv()).await;
    let asked = Instant::now();
    sandbox.kill().await.unwrap();
    let took = asked.elapsed();
    eprintln!("a kill of 25 that spin on a tenth of a core took {took:?}");
    assert_eq!(rest(&mut process).await.1, None, "it ended with its sandbox");
    assert_eq!(sandbox.read_file("kept", 10).await.unwrap(), b"kept");
    sandbox.destroy().await.unwrap();
}

/// A fork bomb leaves no process for the kill to need.
#[tokio::test]
async fn a_fork_bomb_is_ended_and_the_next_command_starts() {
    let host = engine!();
    let backend = backend(&host, &name("bomb"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    // The first shell itself asks for no process once there may be none left.
    let bomb = "bomb() { bomb | bomb & }; bomb; while :; do :; done";
    let mut process = start(&*sandbox, bomb, Some(Duration::from_secs(1)), false).await;
    assert_eq!(rest(&mut process).await.1, Some(Exit::Timeout));
    assert_eq!(sh(&*sandbox, "echo on").await, ("on\n".to_owned(), OK));
    soon("the kill", sandbox.kill()).await.unwrap();
    sandbox.destroy().await.unwrap();
}

/// Whether a process of this host has these words as its command line.
fn runs(words: &str) -> bool {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = all.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines.into_iter().any(|line| line.split(|byte| *byte == 0).any(|word| word == words.as_bytes()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_dropped_ends_at_once() {
    let host = engine!();
    let backend = backend(&host, &name("dropped"), IMAGE, 0).await.unwrap();
    for round in 0..3 {
        let sandbox = sandbox(&backend).await;
        let long = format!("9876543{round}{}", std::process::id());
        let script = format!("setsid sleep {long} & trap '' TERM; sleep {long} & wait");
        let _running = start(&*sandbox, &script, None, false).await;
        let late = Instant::now() + Duration::from_secs(20);
        while !runs(&long) {
            if Instant::now() > late {
                return crate::skip::skip(
                    "what_is_dropped_ends_at_once",
                    "its processes are not on this host",
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let dropped = Instant::now();
        drop(sandbox);
        while runs(&long) {
            assert!(dropped.elapsed() < Duration::from_secs(1), "it runs on");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        eprintln!("gone {:?} after the drop", dropped.elapsed());
    }
}
