//! What a sandbox has used: measured from outside, by the kernel or the engine, and never less than before.

use std::time::{Duration, Instant};

use coinop::sandbox::sim::Step;
use coinop::sandbox::{Sandbox, Usage};

use crate::case::{Outcome, cases};
use crate::fixtures::{Fixture, until};
use crate::running::{sh, words};

cases!(
    everywhere: [
        wall_time_counts_from_the_making,
        the_last_usage_is_not_below_a_live_one,
        usage_stands_still_after_a_kill_but_for_the_clock,
    ],
    programs: [
        processor_time_is_measured,
        processor_time_of_children_and_orphans_counts,
        processor_time_of_children_that_nobody_waits_for_counts_or_is_said_to_be_missing,
        an_idle_sandbox_uses_next_to_nothing,
        the_peak_of_memory_is_kept,
        written_bytes_are_measured,
        a_base_is_not_counted_as_written,
        two_sandboxes_are_measured_apart,
        a_job_cannot_change_what_was_measured,
    ],
);

async fn until_used(sandbox: &dyn Sandbox, what: &str, enough: impl Fn(&Usage) -> bool) -> Usage {
    until(what, async || Some(sandbox.usage().await.unwrap()).filter(|usage| enough(usage))).await
}

async fn wall_time_counts_from_the_making(on: &Fixture) {
    let begun = Instant::now();
    let sandbox = on.sandbox().await;
    until_used(&*sandbox, "300 ms have passed", |usage| usage.wall_ms >= 300).await;
    let last = sandbox.destroy().await.unwrap();
    let outside = begun.elapsed().as_millis();
    assert!(last.wall_ms >= 300 && u128::from(last.wall_ms) <= outside, "{last:?}, {outside} ms outside");
}

fn at_least(later: &Usage, before: &Usage) {
    let fields =
        |usage: &Usage| [usage.wall_ms, usage.cpu_ms, usage.peak_memory_bytes, usage.disk_written_bytes];
    let grown = fields(later).into_iter().zip(fields(before)).all(|(later, before)| later >= before);
    assert!(grown, "{before:?} became {later:?}");
}

async fn the_last_usage_is_not_below_a_live_one(on: &Fixture) {
    let script = "dd if=/dev/zero of=f bs=1048576 count=8 2>/dev/null; i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done";
    on.plays(script, []);
    on.plays("rm f", []);
    let sandbox = on.sandbox().await;
    let mut usage = sandbox.usage().await.unwrap();
    for act in [script, "rm f"] {
        sh(&*sandbox, act).await.ok();
        let now = sandbox.usage().await.unwrap();
        at_least(&now, &usage);
        usage = now;
    }
    at_least(&sandbox.destroy().await.unwrap(), &usage);
}

async fn usage_stands_still_after_a_kill_but_for_the_clock(on: &Fixture) {
    on.plays("i=0; while :; do i=$((i+1)); done", [Step::Wait(Duration::from_secs(600))]);
    let sandbox = on.sandbox().await;
    let process = sandbox.exec(words(["sh", "-c", "i=0; while :; do i=$((i+1)); done"])).await.unwrap();
    if on.runs_programs() {
        until_used(&*sandbox, "it has worked", |usage| usage.cpu_ms >= 50).await;
    }
    sandbox.kill().await.unwrap();
    drop(process);
    // An engine may count the last tick of what was killed a moment later.
    let mut first = sandbox.usage().await.unwrap();
    until("it stands still", async || {
        let before = std::mem::replace(&mut first, sandbox.usage().await.unwrap());
        (before.cpu_ms == first.cpu_ms).then_some(())
    })
    .await;
    let last = sandbox.destroy().await.unwrap();
    at_least(&last, &first);
    assert_eq!((last.cpu_ms, last.peak_memory_bytes), (first.cpu_ms, first.peak_memory_bytes));
}

async fn processor_time_is_measured(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let begun = Instant::now();
    let process = sandbox.exec(words(["sh", "-c", "while :; do :; done"])).await.unwrap();
    let used = until_used(&*sandbox, "a loop uses 300 ms", |usage| usage.cpu_ms >= 300).await;
    // One loop: no more than one core since it began, and what its making took.
    let outside = u64::try_from(begun.elapsed().as_millis()).unwrap();
    assert!(used.cpu_ms <= outside + 300, "{used:?} in {outside} ms");
    sandbox.kill().await.unwrap();
    drop(process);
    at_least(&sandbox.destroy().await.unwrap(), &used);
}

async fn processor_time_of_children_and_orphans_counts(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let before = sandbox.usage().await.unwrap().cpu_ms;
    // Each works until it has used a quarter of a second of its own, and ends.
    let work = "while :; do i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; read -r s < /proc/self/stat; set -- ${s##*) }; \
                [ ${12} -ge 25 ] && exit 0; done";
    let script = format!("for n in 1 2; do sh -c '{work}'; done; (sh -c '{work}' >/dev/null 2>&1 &)");
    sh(&*sandbox, &script).await.ok();
    until_used(&*sandbox, "two children and an orphan are counted", |usage| usage.cpu_ms >= before + 700)
        .await;
    assert!(sandbox.destroy().await.unwrap().cpu_ms >= before + 700);
}

async fn processor_time_of_children_that_nobody_waits_for_counts_or_is_said_to_be_missing(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let before = sandbox.usage().await.unwrap().cpu_ms;
    // The kernel adds the time of a child to its parent's when it is waited for, and of these nobody is told.
    let work = "while :; do i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; read -r s < /proc/self/stat; set -- ${s##*) }; \
                [ ${12} -ge 40 ] && : > done && exit 0; done";
    let script = format!("trap '' CHLD; sh -c '{work}' & while [ ! -e done ]; do sleep 1; done");
    sh(&*sandbox, &script).await.ok();
    let usage = sandbox.destroy().await.unwrap();
    match usage.whole_cpu_ms() {
        Some(counted) => assert!(counted >= before + 400, "{usage:?}"),
        None => assert!(usage.cpu_is_partial),
    }
}

async fn an_idle_sandbox_uses_next_to_nothing(on: &Fixture) {
    let sandbox = on.sandbox().await;
    until_used(&*sandbox, "a second has passed", |usage| usage.wall_ms >= 1000).await;
    let usage = sandbox.destroy().await.unwrap();
    assert!(usage.cpu_ms < 500 && usage.peak_memory_bytes < 64 << 20, "{usage:?}");
    assert!(usage.disk_written_bytes < 1 << 20, "{usage:?}");
}

async fn the_peak_of_memory_is_kept(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let hog = "dd if=/dev/zero of=/dev/null bs=40M count=100000";
    let process = sandbox.exec(words(["sh", "-c", hog])).await.unwrap();
    let peak = until_used(&*sandbox, "40 MiB are seen", |usage| usage.peak_memory_bytes >= 40 << 20).await;
    assert!(peak.peak_memory_bytes < 128 << 20, "{peak:?}");
    sh(&*sandbox, "kill -9 -1").await;
    drop(process);
    sh(&*sandbox, "true").await.ok();
    at_least(&sandbox.usage().await.unwrap(), &peak);
    at_least(&sandbox.destroy().await.unwrap(), &peak);
}

async fn written_bytes_are_measured(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let script = "dd if=/dev/zero of=f bs=65536 count=32 2>/dev/null; dd if=/dev/zero of=/tmp/f bs=65536 count=16 2>/dev/null";
    sh(&*sandbox, script).await.ok();
    let live = until_used(&*sandbox, "3 MiB are seen", |usage| usage.disk_written_bytes >= 3 << 20).await;
    let last = sandbox.destroy().await.unwrap();
    for usage in [live, last] {
        assert!((3 << 20..5 << 20).contains(&usage.disk_written_bytes), "{usage:?}");
    }
}

async fn a_base_is_not_counted_as_written(on: &Fixture) {
    let sandbox = on.over(on.base(|base| std::fs::write(base.join("big"), vec![1; 4 << 20]).unwrap())).await;
    assert_eq!(sh(&*sandbox, "wc -c < big").await.number(), 4 << 20);
    let usage = sandbox.destroy().await.unwrap();
    assert!(usage.disk_written_bytes < 1 << 20, "{usage:?}");
}

async fn two_sandboxes_are_measured_apart(on: &Fixture) {
    let (busy, idle) = (on.sandbox().await, on.sandbox().await);
    let script = "dd if=/dev/zero of=f bs=1048576 count=8 2>/dev/null; while :; do :; done";
    let process = busy.exec(words(["sh", "-c", script])).await.unwrap();
    until_used(&*busy, "a loop uses 600 ms", |usage| usage.cpu_ms >= 600).await;
    let other = idle.destroy().await.unwrap();
    assert!(other.cpu_ms < 300 && other.disk_written_bytes < 1 << 20, "{other:?}");
    busy.kill().await.unwrap();
    drop(process);
}

async fn a_job_cannot_change_what_was_measured(on: &Fixture) -> Outcome {
    let sandbox = on.sandbox().await;
    sh(
        &*sandbox,
        "dd if=/dev/zero of=f bs=1048576 count=4 2>/dev/null; dd if=f of=/dev/null bs=8M count=1 2>/dev/null",
    )
    .await
    .ok();
    let before = sandbox.usage().await.unwrap();
    let forge = "for f in $(find /sys/fs/cgroup /proc/self /proc/1 -maxdepth 2 -type f 2>/dev/null | grep -E \
                 'usage|peak|stat|reset|clear_refs'); do (echo 0 > $f; echo 5 > $f) 2>/dev/null; done; rm -f f; true";
    sh(&*sandbox, forge).await.ok();
    at_least(&sandbox.usage().await.unwrap(), &before);
    at_least(&sandbox.destroy().await.unwrap(), &before);
    Ok(())
}
