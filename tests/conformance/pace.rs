//! Commands that do nothing, and commands that say more than they may in a second: the first end by name, the second are
//! slowed, and neither is taken for the other.

use std::time::{Duration, Instant};

use coinop::sandbox::sim::Step;
use coinop::sandbox::{Command, Event, Exit, Limit, Policy, Sandbox};

use crate::case::{Outcome, cases};
use crate::fixtures::{Fixture, until};
use crate::running::{Ran, collect, collect_bytes, policy, run, sh, unique_sleep, words};

cases!(
    everywhere: [
        a_command_that_does_nothing_ends_at_the_idle_limit_and_the_sandbox_lives_on,
        idle_time_counts_from_the_last_output,
        a_sandbox_without_a_command_is_not_idle,
        one_command_s_output_keeps_the_others_from_being_idle,
        what_is_given_on_stdin_keeps_a_command_from_being_idle,
        an_output_that_nobody_reads_is_no_idleness,
        an_idle_limit_as_long_as_the_wall_s_ends_nothing,
        output_faster_than_its_rate_is_slowed_and_nothing_is_lost,
        the_rate_counts_both_streams_and_all_commands_together,
        a_command_that_is_slowed_still_times_out_in_time,
        a_sandbox_that_is_slowed_is_killed_at_once,
    ],
    programs: [
        a_command_that_works_in_silence_is_not_idle,
        a_job_of_a_small_share_that_works_in_silence_is_not_idle,
        work_in_the_background_keeps_its_command_from_being_idle,
        many_short_processes_are_work,
        a_loop_that_only_sleeps_is_idle,
        who_stops_itself_is_idle,
        the_idle_limit_ends_all_that_its_command_started,
        the_end_of_a_command_does_not_wait_for_its_rate,
        a_flood_does_not_hold_up_the_end_of_another_command,
        two_floods_share_the_rate,
    ],
);

const IDLE: Duration = Duration::from_millis(1000);

fn idle() -> Policy {
    Policy { idle_ms: 1000, ..policy() }
}

fn wait(millis: u64) -> Step {
    Step::Wait(Duration::from_millis(millis))
}

fn said(word: &str) -> Step {
    Step::Stdout(format!("{word}\n").into_bytes())
}

async fn a_command_that_does_nothing_ends_at_the_idle_limit_and_the_sandbox_lives_on(on: &Fixture) {
    let script = "trap '' TERM INT HUP; echo up; sleep 600; sleep 600";
    on.plays(script, [said("up"), wait(600_000)]);
    on.plays("exit 4", [Step::Exit(Exit::Code { code: 4 })]);
    let sandbox = on.sandbox_with(idle()).await;
    let begun = Instant::now();
    let ran = sh(&*sandbox, script).await;
    ran.hit(Limit::Idle);
    assert_eq!(ran.out, "up\n");
    assert!(begun.elapsed() >= IDLE && begun.elapsed().as_secs() < 20, "after {:?}", begun.elapsed());
    assert_eq!(sh(&*sandbox, "exit 4").await.exit, Some(Exit::Code { code: 4 }));
    sandbox.write_file("on", b"on").await.unwrap();
}

async fn idle_time_counts_from_the_last_output(on: &Fixture) {
    let script = "for i in 1 2 3; do sleep 1; echo $i; done; sleep 600";
    let steps = ["1", "2", "3"].map(|word| [wait(1000), said(word)]).into_iter().flatten();
    on.plays(script, steps.chain([wait(600_000)]));
    let sandbox = on.sandbox_with(Policy { idle_ms: 2500, ..policy() }).await;
    let begun = Instant::now();
    let ran = sh(&*sandbox, script).await;
    ran.hit(Limit::Idle);
    assert_eq!(ran.out, "1\n2\n3\n");
    assert!(begun.elapsed() >= Duration::from_millis(5400), "after {:?}", begun.elapsed());
}

async fn a_sandbox_without_a_command_is_not_idle(on: &Fixture) {
    on.plays("exit 0", []);
    let sandbox = on.sandbox_with(idle()).await;
    for _ in 0..2 {
        let begun = Instant::now();
        until("nothing happens", async || (begun.elapsed() > 2 * IDLE).then_some(())).await;
        sh(&*sandbox, "exit 0").await.ok();
    }
}

async fn one_command_s_output_keeps_the_others_from_being_idle(on: &Fixture) {
    let (silent, loud) = ("sleep 4; exit 5", "for i in 1 2 3 4 5; do sleep 1; echo $i; done");
    on.plays(silent, [wait(4000), Step::Exit(Exit::Code { code: 5 })]);
    on.plays(loud, ["1", "2", "3", "4", "5"].map(|word| [wait(1000), said(word)]).into_iter().flatten());
    let sandbox = on.sandbox_with(Policy { idle_ms: 2500, ..policy() }).await;
    let (silent, loud) = tokio::join!(sh(&*sandbox, silent), sh(&*sandbox, loud));
    assert_eq!(silent.exit, Some(Exit::Code { code: 5 }));
    loud.ok();
}

async fn what_is_given_on_stdin_keeps_a_command_from_being_idle(on: &Fixture) {
    on.plays_words(&["sh", "-c", "cat > /dev/null"], [wait(3000)]);
    let sandbox = on.sandbox_with(Policy { idle_ms: 2500, ..policy() }).await;
    let command = Command { stdin: true, ..words(["sh", "-c", "cat > /dev/null"]) };
    let mut process = sandbox.exec(command).await.unwrap();
    let stdin = process.stdin.take().unwrap();
    let begun = Instant::now();
    while on.runs_programs() && begun.elapsed() < Duration::from_secs(5) {
        stdin.send(b"x".to_vec()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    drop(stdin);
    if on.runs_programs() {
        collect(process).await.ok();
    }
}

async fn an_output_that_nobody_reads_is_no_idleness(on: &Fixture) {
    let script = "dd if=/dev/zero bs=65536 count=100 2>/dev/null";
    on.plays(script, (0..100).map(|_| Step::Stdout(vec![0; 1 << 16])));
    let sandbox = on.sandbox_with(Policy { output_bytes: 1 << 30, ..idle() }).await;
    let process = sandbox.exec(words(["sh", "-c", script])).await.unwrap();
    let begun = Instant::now();
    until("nobody reads", async || (begun.elapsed() > 3 * IDLE).then_some(())).await;
    let (out, _, exit) = collect_bytes(process).await;
    assert_eq!((out.len(), exit), (100 << 16, Some(Exit::Code { code: 0 })));
}

async fn an_idle_limit_as_long_as_the_wall_s_ends_nothing(on: &Fixture) {
    on.plays("sleep 600", [wait(600_000)]);
    let sandbox = on.sandbox_with(Policy { wall_ms: 2500, idle_ms: 2500, ..policy() }).await;
    sh(&*sandbox, "sleep 600").await.hit(Limit::Wall);
}

/// Works for so many milliseconds of processor time, as the process itself is told by the kernel.
fn work(millis: u64) -> String {
    let ticks = millis / 10;
    format!(
        "while :; do i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done; read -r s < /proc/self/stat; set -- ${{s##*) }}; \
         [ ${{12}} -ge {ticks} ] && break; done"
    )
}

async fn a_command_that_works_in_silence_is_not_idle(on: &Fixture) {
    let sandbox = on.sandbox_with(idle()).await;
    sh(&*sandbox, &format!("{}; echo done", work(2000))).await.ok();
}

async fn a_job_of_a_small_share_that_works_in_silence_is_not_idle(on: &Fixture) -> Outcome {
    let sandbox = on.about("cpu_milli", Policy { cpu_milli: 50, ..idle() }).await?;
    // Four seconds and more at such a share.
    sh(&*sandbox, &format!("{}; echo done", work(200))).await.ok();
    Ok(())
}

async fn work_in_the_background_keeps_its_command_from_being_idle(on: &Fixture) {
    let sandbox = on.sandbox_with(idle()).await;
    let script =
        format!("({} >/dev/null 2>&1; echo > done) & while [ ! -e done ]; do sleep 1; done", work(2000));
    sh(&*sandbox, &script).await.ok();
}

async fn many_short_processes_are_work(on: &Fixture) {
    let sandbox = on.sandbox_with(idle()).await;
    // Each of them too short to be seen at two looks; their shell does not wait for them, nor does it hear of their ends.
    let script = "trap '' CHLD; n=0; while [ $n -lt 40 ]; do sh -c 'i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done'; \
                  n=$((n+1)); done";
    sh(&*sandbox, script).await.ok();
}

async fn a_loop_that_only_sleeps_is_idle(on: &Fixture) {
    let sandbox = on.sandbox_with(Policy { idle_ms: 4000, ..policy() }).await;
    sh(&*sandbox, "while :; do sleep 1; done").await.hit(Limit::Idle);
}

async fn who_stops_itself_is_idle(on: &Fixture) {
    let sandbox = on.sandbox_with(idle()).await;
    sh(&*sandbox, "kill -STOP $$; echo on").await.hit(Limit::Idle);
}

async fn the_idle_limit_ends_all_that_its_command_started(on: &Fixture) -> Outcome {
    let sandbox = on.sandbox_with(Policy { idle_ms: 2500, ..policy() }).await;
    let sleep = format!("sleep {}", unique_sleep());
    let script = format!("setsid sh -c '{sleep} & {sleep}' & ({sleep} &) ; {sleep} & kill -STOP $!; {sleep}");
    let process = sandbox.exec(words(["sh", "-c", &script])).await.unwrap();
    on.until_processes(&sleep, |many| many >= 5).await?;
    collect(process).await.hit(Limit::Idle);
    assert_eq!(on.processes(&sleep)?, 0);
    assert_eq!(sh(&*sandbox, "echo on").await.ok(), "on\n");
    Ok(())
}

const KIB: usize = 1024;

fn paced(kib: u64) -> Policy {
    Policy { output_bytes: 1 << 30, output_bytes_per_s: kib << 10, ..policy() }
}

/// Says so many KiB, half of them on each stream where they are two.
fn says(on: &Fixture, kib: usize, streams: usize) -> String {
    let each = kib / streams;
    let say = |to: &str| format!("dd if=/dev/zero bs=1024 count={each} 2>/dev/null {to}");
    let script = match streams {
        1 => say(""),
        _ => format!("({}) & (exec >&2; {}) & wait", say(""), say("")),
    };
    let bytes = vec![0; each * KIB];
    let steps = [Step::Stdout(bytes.clone()), Step::Stderr(bytes)];
    on.plays(&script, steps.into_iter().take(streams));
    script
}

async fn taken(sandbox: &dyn Sandbox, script: &str) -> usize {
    let (out, err, exit) = collect_bytes(sandbox.exec(words(["sh", "-c", script])).await.unwrap()).await;
    assert_eq!(exit, Some(Exit::Code { code: 0 }));
    assert!(out.iter().chain(&err).all(|byte| *byte == 0));
    out.len() + err.len()
}

async fn output_faster_than_its_rate_is_slowed_and_nothing_is_lost(on: &Fixture) {
    let script = says(on, 1024, 1);
    let sandbox = on.sandbox_with(paced(256)).await;
    let begun = Instant::now();
    assert_eq!(taken(&*sandbox, &script).await, 1024 * KIB);
    // A second's worth passes at once, and what stands in the pipe at the end.
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(2500), "1 MiB at 256 KiB a second took {took:?}");
}

async fn the_rate_counts_both_streams_and_all_commands_together(on: &Fixture) {
    let (two, one) = (says(on, 512, 2), says(on, 256, 1));
    let sandbox = on.sandbox_with(paced(256)).await;
    let begun = Instant::now();
    let (first, second) = tokio::join!(taken(&*sandbox, &two), taken(&*sandbox, &one));
    let third = taken(&*sandbox, &says(on, 256, 1)).await;
    assert_eq!((first, second, third), (512 * KIB, 256 * KIB, 256 * KIB));
    // Four pipes of 64 KiB at most are drained at their ends.
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(1900), "1 MiB at 256 KiB a second took {took:?}");
}

/// What a command at one KiB a second would need minutes for.
const FLOOD: &str = "dd if=/dev/zero bs=1024 count=300 2>/dev/null; sleep 600";

fn floods(on: &Fixture) {
    on.plays(FLOOD, [Step::Stdout(vec![0; 300 * KIB])]);
}

async fn a_command_that_is_slowed_still_times_out_in_time(on: &Fixture) {
    floods(on);
    on.plays("exit 4", [Step::Exit(Exit::Code { code: 4 })]);
    let sandbox = on.sandbox_with(paced(1)).await;
    let begun = Instant::now();
    let timeout = Some(Duration::from_millis(500));
    let ran = run(&*sandbox, Command { timeout, ..words(["sh", "-c", FLOOD]) }).await;
    assert_eq!(ran.exit, Some(Exit::Timeout));
    assert_eq!(sh(&*sandbox, "exit 4").await.exit, Some(Exit::Code { code: 4 }));
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

async fn a_sandbox_that_is_slowed_is_killed_at_once(on: &Fixture) {
    floods(on);
    let sandbox = on.sandbox_with(paced(1)).await;
    let begun = Instant::now();
    let mut process = sandbox.exec(words(["sh", "-c", FLOOD])).await.unwrap();
    assert!(matches!(process.events.recv().await, Some(Event::Stdout(_))));
    sandbox.kill().await.unwrap();
    let Ran { exit, .. } = collect(process).await;
    assert!(!matches!(exit, Some(Exit::Code { .. })), "{exit:?}");
    sandbox.destroy().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

async fn the_end_of_a_command_does_not_wait_for_its_rate(on: &Fixture) {
    let sandbox = on.sandbox_with(paced(1)).await;
    let begun = Instant::now();
    for _ in 0..3 {
        // All of it stands in its pipes when it ends, most of it longer than we wait.
        let script = "dd if=/dev/zero bs=1024 count=30 2>/dev/null; (dd if=/dev/zero bs=1024 count=30 2>/dev/null) >&2; exit 3";
        let (out, err, exit) = collect_bytes(sandbox.exec(words(["sh", "-c", script])).await.unwrap()).await;
        assert_eq!((out.len(), err.len(), exit), (30 * KIB, 30 * KIB, Some(Exit::Code { code: 3 })));
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

async fn a_flood_does_not_hold_up_the_end_of_another_command(on: &Fixture) {
    let sandbox = on.sandbox_with(paced(1)).await;
    let mut flood = sandbox.exec(words(["sh", "-c", "yes"])).await.unwrap();
    assert!(matches!(flood.events.recv().await, Some(Event::Stdout(_))));
    let reading = tokio::spawn(collect(flood));
    let begun = Instant::now();
    for _ in 0..3 {
        let ran = sh(&*sandbox, "echo last; echo words >&2; exit 3").await;
        assert_eq!((ran.out.as_str(), ran.err.as_str()), ("last\n", "words\n"));
        assert_eq!(ran.exit, Some(Exit::Code { code: 3 }));
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    sandbox.kill().await.unwrap();
    reading.await.unwrap();
}

async fn two_floods_share_the_rate(on: &Fixture) {
    let sandbox = on.sandbox_with(paced(64)).await;
    let within = |script| Command { timeout: Some(Duration::from_secs(4)), ..words(["sh", "-c", script]) };
    let (one, two) = tokio::join!(run(&*sandbox, within("yes 1")), run(&*sandbox, within("yes 2")));
    for ran in [&one, &two] {
        assert_eq!(ran.exit, Some(Exit::Timeout));
        // Of the 320 KiB that they have together, the most that one can leave to the other but for its pipe.
        assert!(ran.out.len() > 64 * KIB + 40 * KIB, "{} and {} bytes", one.out.len(), two.out.len());
    }
}
