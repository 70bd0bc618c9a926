//! How fast a sandbox dies, and those built ahead. What every backend promises stands in
//! `tests/conformance/lifecycle.rs`; what must not be left behind, in `leftovers`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use coinop::sandbox::{Backend, Event, Spec};

use crate::common::{
    Folder, bench, bench_with, collect, is_gone, policy, processes_with, sh, unique_sleep, wait_until, words,
};

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
        wait_until("all sleep", || processes_with(&format!("sleep {sleep}")).len() >= 15);
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
async fn a_pre_built_sandbox_is_used_once() {
    let Some(bench) = bench_with("a_pre_built_sandbox_is_used_once", 2) else { return };
    bench.local.warm_up(&policy()).await.unwrap();
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

/// As after `nohup`: what whoever started the node had ignored is not handed on to jobs.
#[tokio::test]
async fn a_signal_that_the_node_ignores_is_none_that_a_job_ignores() {
    if std::env::var_os("COINOP_TEST_IGNORING").is_none() {
        let output = std::process::Command::new("sh")
            .args(["-c", "trap '' HUP INT QUIT TERM; exec \"$0\" --exact \"$1\""])
            .arg(std::env::current_exe().unwrap())
            .arg("life::a_signal_that_the_node_ignores_is_none_that_a_job_ignores")
            .env("COINOP_TEST_IGNORING", "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return;
    }
    let ignored = |status: &str| {
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
        u64::from_str_radix(mask, 16).unwrap() & 0x7fff_ffff
    };
    assert_ne!(ignored(&std::fs::read_to_string("/proc/self/status").unwrap()), 0, "nothing is tried");
    let Some(bench) = bench!() else { return };
    let status = sh(&*bench.sandbox().await, "exec cat /proc/self/status").await.ok();
    assert_eq!(ignored(&status), 0, "{status}");
}
