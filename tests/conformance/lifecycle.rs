//! A sandbox's life: made under its id, used once, killed, destroyed or dropped; and what holds after each of these.

use std::sync::Arc;

use coinop::sandbox::sim::Step;
use coinop::sandbox::{Error, Event, Exit, Sandbox, Spec};
use futures_util::future::join_all;

use crate::case::{Outcome, Unmet, cases};
use crate::fixtures::{Fixture, until};
use crate::running::{collect, is_gone, policy, sh, unique_sleep, words};

cases!(
    everywhere: [
        a_sandbox_keeps_the_id_it_was_given,
        an_id_that_is_not_plain_is_refused,
        the_longest_plain_id_is_taken,
        many_sandboxes_start_at_once,
        a_killed_sandbox_gives_its_commands_no_exit,
        after_a_kill_nothing_runs_and_nothing_is_written,
        after_a_kill_the_files_can_still_be_read,
        after_a_kill_the_changes_can_still_be_read,
        after_a_kill_the_usage_can_still_be_read,
        a_kill_may_be_repeated,
        destroying_ends_the_streams_of_what_still_runs,
        dropping_ends_the_streams_of_what_still_runs,
        a_sandbox_that_was_never_used_is_destroyed_as_well,
        one_sandbox_ends_and_the_other_goes_on,
        files_of_one_sandbox_are_not_in_another,
        a_base_is_held_as_long_as_its_sandbox_lives_and_no_longer,
        with_nothing_left_behind_the_reaper_finds_nothing,
        the_reaper_leaves_the_living_alone,
    ],
    programs: [
        a_kill_ends_every_process_before_it_returns,
        destroying_ends_every_process_before_it_returns,
        dropping_a_sandbox_ends_its_processes,
        two_sandboxes_do_not_see_each_other,
        a_new_sandbox_is_empty,
        a_second_command_finds_what_the_first_left,
    ],
);

async fn a_sandbox_keeps_the_id_it_was_given(on: &Fixture) {
    let spec = on.spec(policy(), None);
    let id = spec.id.clone();
    let sandbox = on.backend.create(spec).await.unwrap();
    assert_eq!(sandbox.id(), id);
    sandbox.kill().await.unwrap();
    assert_eq!(sandbox.id(), id);
}

async fn an_id_that_is_not_plain_is_refused(on: &Fixture) {
    let long = "x".repeat(65);
    for id in ["", "../x", "a/b", "A", "a b", "a_b", "a.b", "ä", "a\n", &long] {
        let made = on.backend.create(Spec { id: id.to_owned(), base: None, policy: policy() }).await;
        assert!(matches!(made.err(), Some(Error::BadPolicy(_))), "{id:?}");
    }
}

async fn the_longest_plain_id_is_taken(on: &Fixture) {
    let id = format!("{:0>64}", format!("-9z-{}", std::process::id()));
    let spec = Spec { id: id.clone(), base: None, policy: policy() };
    assert_eq!(on.backend.create(spec).await.unwrap().id(), id);
}

async fn many_sandboxes_start_at_once(on: &Fixture) {
    let one = async |n: usize| {
        let sandbox = on.sandbox().await;
        let said = sh(&*sandbox, &format!("echo {n}")).await.ok();
        sandbox.destroy().await.unwrap();
        assert_eq!(said, format!("{n}\n"));
    };
    for n in 0..16 {
        on.plays(&format!("echo {n}"), [Step::Stdout(format!("{n}\n").into_bytes())]);
    }
    join_all((0..16).map(one)).await;
}

/// A command that says `up` and then stays, and its sandbox.
async fn with_a_command_that_stays(on: &Fixture) -> (Box<dyn Sandbox>, coinop::sandbox::Process) {
    let script = "echo up; sleep 600";
    on.plays(script, [Step::Stdout(b"up\n".to_vec()), Step::Wait(std::time::Duration::from_secs(600))]);
    let sandbox = on.sandbox().await;
    let mut process = sandbox.exec(words(["sh", "-c", script])).await.unwrap();
    assert_eq!(process.events.recv().await, Some(Event::Stdout(b"up\n".to_vec())));
    (sandbox, process)
}

async fn a_killed_sandbox_gives_its_commands_no_exit(on: &Fixture) {
    let (sandbox, process) = with_a_command_that_stays(on).await;
    sandbox.kill().await.unwrap();
    assert_eq!(collect(process).await.exit, None);
}

async fn after_a_kill_nothing_runs_and_nothing_is_written(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.kill().await.unwrap();
    assert!(is_gone(sandbox.exec(words(["true"])).await));
    assert!(is_gone(sandbox.write_file("late", b"x").await));
    let late = sandbox.read_file("late", 10).await;
    assert!(matches!(late, Err(Error::NotFound(_))), "{late:?}");
}

async fn after_a_kill_the_files_can_still_be_read(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("dir/kept", b"kept").await.unwrap();
    sandbox.kill().await.unwrap();
    assert_eq!(sandbox.read_file("dir/kept", 4).await.unwrap(), b"kept");
}

async fn after_a_kill_the_changes_can_still_be_read(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("kept", b"kept").await.unwrap();
    let before = sandbox.changes(100).await.unwrap();
    sandbox.kill().await.unwrap();
    assert_eq!(before.len(), 1);
    assert_eq!(sandbox.changes(100).await.unwrap(), before);
}

async fn after_a_kill_the_usage_can_still_be_read(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let before = sandbox.usage().await.unwrap();
    sandbox.kill().await.unwrap();
    assert!(sandbox.usage().await.unwrap().wall_ms >= before.wall_ms);
    sandbox.destroy().await.unwrap();
}

async fn a_kill_may_be_repeated(on: &Fixture) {
    let (sandbox, process) = with_a_command_that_stays(on).await;
    for _ in 0..3 {
        sandbox.kill().await.unwrap();
    }
    assert_eq!(collect(process).await.exit, None);
    sandbox.destroy().await.unwrap();
}

async fn destroying_ends_the_streams_of_what_still_runs(on: &Fixture) {
    let (sandbox, process) = with_a_command_that_stays(on).await;
    sandbox.destroy().await.unwrap();
    assert_eq!(collect(process).await.exit, None, "the end of a sandbox is no command's success");
}

async fn dropping_ends_the_streams_of_what_still_runs(on: &Fixture) {
    let (sandbox, process) = with_a_command_that_stays(on).await;
    drop(sandbox);
    assert_eq!(collect(process).await.exit, None, "the end of a sandbox is no command's success");
}

async fn a_sandbox_that_was_never_used_is_destroyed_as_well(on: &Fixture) {
    let usage = on.sandbox().await.destroy().await.unwrap();
    assert!(usage.wall_ms < 60_000, "{usage:?}");
}

async fn one_sandbox_ends_and_the_other_goes_on(on: &Fixture) {
    on.plays("echo on", [Step::Stdout(b"on\n".to_vec())]);
    let (doomed, process) = with_a_command_that_stays(on).await;
    let other = on.sandbox().await;
    doomed.destroy().await.unwrap();
    assert_eq!(collect(process).await.exit, None);
    assert_eq!(sh(&*other, "echo on").await.ok(), "on\n");
}

async fn files_of_one_sandbox_are_not_in_another(on: &Fixture) {
    let (one, two) = (on.sandbox().await, on.sandbox().await);
    one.write_file("mine", b"1").await.unwrap();
    one.write_file("/job/mine", b"1").await.unwrap();
    for path in ["mine", "/job/mine"] {
        let seen = two.read_file(path, 10).await;
        assert!(matches!(seen, Err(Error::NotFound(_))), "{seen:?}");
    }
    assert_eq!(two.changes(100).await.unwrap(), []);
}

async fn a_base_is_held_as_long_as_its_sandbox_lives_and_no_longer(on: &Fixture) {
    let base = on.base(|base| std::fs::write(base.join("a"), "a").unwrap());
    let sandbox = on.over(base.clone()).await;
    assert!(Arc::strong_count(&base) > 1);
    sandbox.kill().await.unwrap();
    assert!(Arc::strong_count(&base) > 1, "its changes can still be asked for");
    sandbox.destroy().await.unwrap();
    until("the base is let go", async || (Arc::strong_count(&base) == 1).then_some(())).await;
}

async fn with_nothing_left_behind_the_reaper_finds_nothing(on: &Fixture) {
    assert_eq!(on.backend.reap().await.unwrap(), 0);
    on.sandbox().await.destroy().await.unwrap();
    assert_eq!(on.backend.reap().await.unwrap(), 0, "what was destroyed is no leftover");
}

async fn the_reaper_leaves_the_living_alone(on: &Fixture) {
    on.plays("echo untouched", [Step::Stdout(b"untouched\n".to_vec())]);
    let sandbox = on.sandbox().await;
    assert_eq!(on.backend.reap().await.unwrap(), 0);
    assert_eq!(sh(&*sandbox, "echo untouched").await.ok(), "untouched\n");
}

/// Does all that a process can to survive its sandbox; answers how it is found.
async fn stubborn(on: &Fixture, sandbox: &dyn Sandbox) -> Result<String, Unmet> {
    let sleep = format!("sleep {}", unique_sleep());
    let script = format!(
        "trap '' TERM HUP INT QUIT; for i in 1 2 3; do setsid sh -c '{sleep} & {sleep}' & done; \
         ({sleep} & kill -STOP $!); {sleep} & kill -STOP $!; echo up; wait"
    );
    let mut process = sandbox.exec(words(["sh", "-c", &script])).await.unwrap();
    assert_eq!(process.events.recv().await, Some(Event::Stdout(b"up\n".to_vec())));
    // Some shells become their last command, and are one less.
    on.until_processes(&sleep, |many| many >= 8).await?;
    Ok(sleep)
}

async fn a_kill_ends_every_process_before_it_returns(on: &Fixture) -> Outcome {
    let sandbox = on.sandbox().await;
    let mark = stubborn(on, &*sandbox).await?;
    sandbox.kill().await.unwrap();
    assert_eq!(on.processes(&mark)?, 0);
    Ok(())
}

async fn destroying_ends_every_process_before_it_returns(on: &Fixture) -> Outcome {
    let sandbox = on.sandbox().await;
    let mark = stubborn(on, &*sandbox).await?;
    sandbox.destroy().await.unwrap();
    assert_eq!(on.processes(&mark)?, 0);
    Ok(())
}

async fn dropping_a_sandbox_ends_its_processes(on: &Fixture) -> Outcome {
    let sandbox = on.sandbox().await;
    let mark = stubborn(on, &*sandbox).await?;
    drop(sandbox);
    on.until_processes(&mark, |many| many == 0).await
}

async fn two_sandboxes_do_not_see_each_other(on: &Fixture) {
    let (one, two) = (on.sandbox().await, on.sandbox().await);
    let sleep = unique_sleep();
    let places = "/tmp /workspace ~ $(test -w /dev/shm && echo /dev/shm)";
    let script = format!("for d in {places}; do echo secret > $d/x; done; sleep {sleep} >/dev/null & true");
    sh(&*one, &script).await.ok();
    let look = format!(
        "for d in {places}; do ls -A $d; done; for p in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $p; done 2>/dev/null"
    );
    let seen = sh(&*two, &look).await.out;
    // Its own command line holds the question, not the answer.
    assert!(!seen.contains("x\n") && !seen.contains(&format!("sleep {sleep}")), "{seen}");
    assert_eq!(sh(&*one, "cat /tmp/x").await.ok(), "secret\n");
}

async fn a_new_sandbox_is_empty(on: &Fixture) {
    let sandbox = on.sandbox().await;
    assert_eq!(sh(&*sandbox, "for d in /workspace /tmp /home/job /job; do ls -A $d; done").await.ok(), "");
    assert_eq!(sandbox.changes(1000).await.unwrap(), []);
}

async fn a_second_command_finds_what_the_first_left(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let first = "echo w > w; echo t > /tmp/t; echo h > ~/h; exit 3";
    assert_eq!(sh(&*sandbox, first).await.exit, Some(Exit::Code { code: 3 }));
    assert_eq!(sh(&*sandbox, "cat w /tmp/t ~/h").await.ok(), "w\nt\nh\n");
}
