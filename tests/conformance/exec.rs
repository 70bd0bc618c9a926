//! How commands end and go together: exits and signals, stdin, several at once, and what they leave running.

use std::time::{Duration, Instant};

use coinop::sandbox::sim::Step;
use coinop::sandbox::{Command, Error, Exit, Sandbox};

use futures_util::future::join_all;

use crate::case::{Outcome, cases};
use crate::fixtures::{Fixture, until};
use crate::running::{collect, run, sh, unique_sleep, words};

cases!(
    everywhere: [
        exit_codes_are_told,
        a_signal_is_told_by_its_number,
        a_high_exit_code_is_no_signal,
        a_program_that_is_not_there_is_told_as_errno_2,
        a_command_without_words_starts_nothing,
        commands_in_a_row_each_have_their_own_exit,
        a_dozen_commands_run_at_once_and_each_has_its_own_exit,
        several_commands_run_at_once_and_stdin_reaches_the_right_one,
        stdin_is_closed_when_its_sender_is_dropped,
        without_stdin_there_is_none_to_write_and_it_is_empty,
    ],
    programs: [
        a_program_that_may_not_be_executed_is_told_as_errno_13,
        a_file_that_is_no_program_starts_nothing,
        a_word_with_a_nul_starts_nothing,
        commands_at_once_share_the_sandbox,
        much_stdin_arrives_whole,
        stdin_waits_for_a_slow_reader,
        a_command_that_closes_its_stdin_ends_as_it_likes,
        a_command_that_closes_its_output_is_waited_for_all_the_same,
        a_daemon_does_not_hold_its_command_open,
        what_a_command_leaves_is_gone_before_its_exit_is_told,
        what_a_command_leaves_neither_writes_into_the_next_one_nor_kills_it,
        what_a_command_leaves_is_gone_while_another_runs_which_goes_on,
        orphans_that_end_are_reaped,
        one_command_killed_by_another_says_so,
    ],
);

fn exit(code: i32) -> Step {
    Step::Exit(Exit::Code { code })
}

async fn exit_codes_are_told(on: &Fixture) {
    for code in [0, 1, 2, 7, 126, 127, 255] {
        on.plays(&format!("exit {code}"), [exit(code)]);
    }
    let sandbox = on.sandbox().await;
    for code in [0, 1, 2, 7, 126, 127, 255] {
        assert_eq!(sh(&*sandbox, &format!("exit {code}")).await.exit, Some(Exit::Code { code }));
    }
}

async fn a_signal_is_told_by_its_number(on: &Fixture) {
    for signal in [15, 9, 11, 6] {
        on.plays(&format!("kill -{signal} $$"), [Step::Exit(Exit::Signal { signal })]);
    }
    let sandbox = on.sandbox().await;
    for signal in [15, 9, 11, 6] {
        let ended = sh(&*sandbox, &format!("kill -{signal} $$")).await.exit;
        assert_eq!(ended, Some(Exit::Signal { signal }));
    }
}

/// Some engines tell a signal as 128 and its number; that must not be told apart by guessing.
async fn a_high_exit_code_is_no_signal(on: &Fixture) {
    for code in [128, 137, 139, 143] {
        on.plays(&format!("exit {code}"), [exit(code)]);
    }
    let sandbox = on.sandbox().await;
    for code in [128, 137, 139, 143] {
        assert_eq!(sh(&*sandbox, &format!("exit {code}")).await.exit, Some(Exit::Code { code }));
    }
}

async fn a_program_that_is_not_there_is_told_as_errno_2(on: &Fixture) {
    let sandbox = on.sandbox().await;
    for program in ["no-such-program", "./missing", "/nowhere/x", ""] {
        let exit = run(&*sandbox, words([program])).await.exit;
        assert_eq!(exit, Some(Exit::NotStarted { errno: 2 }), "{program:?}");
    }
}

async fn a_command_without_words_starts_nothing(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let ran = run(&*sandbox, Command::default()).await;
    assert!(matches!(ran.exit, Some(Exit::NotStarted { .. })), "{ran:?}");
}

async fn a_program_that_may_not_be_executed_is_told_as_errno_13(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "echo x > plain; mkdir folder").await.ok();
    for program in ["./plain", "./folder", "/workspace/plain"] {
        let exit = run(&*sandbox, words([program])).await.exit;
        assert_eq!(exit, Some(Exit::NotStarted { errno: 13 }), "{program:?}");
    }
    let path = [("PATH".to_owned(), "/workspace:/nowhere".to_owned())];
    let by_name = Command { env: path.into(), ..words(["plain"]) };
    assert_eq!(run(&*sandbox, by_name).await.exit, Some(Exit::NotStarted { errno: 13 }));
}

async fn a_file_that_is_no_program_starts_nothing(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "printf 'echo RAN' > junk; printf '#!/nowhere\\n' > lost; chmod +x junk lost").await.ok();
    for (program, errno) in [("./junk", 8), ("./lost", 2)] {
        let ran = run(&*sandbox, words([program])).await;
        assert_eq!((ran.exit, ran.out.as_str()), (Some(Exit::NotStarted { errno }), ""), "{program}");
    }
}

async fn a_word_with_a_nul_starts_nothing(on: &Fixture) {
    let sandbox = on.sandbox().await;
    match sandbox.exec(words(["echo", "a\0b"])).await {
        Err(Error::BadPolicy(_)) => {}
        Err(other) => panic!("{other}"),
        Ok(process) => {
            let ran = collect(process).await;
            assert!(matches!(ran.exit, Some(Exit::NotStarted { .. })) && ran.out.is_empty(), "{ran:?}");
        }
    }
}

async fn commands_in_a_row_each_have_their_own_exit(on: &Fixture) {
    for code in 0..12 {
        on.plays(
            &format!("echo {code}; exit {code}"),
            [Step::Stdout(format!("{code}\n").into()), exit(code)],
        );
    }
    let sandbox = on.sandbox().await;
    for code in 0..12 {
        let ran = sh(&*sandbox, &format!("echo {code}; exit {code}")).await;
        assert_eq!((ran.out, ran.exit), (format!("{code}\n"), Some(Exit::Code { code })));
    }
}

async fn a_dozen_commands_run_at_once_and_each_has_its_own_exit(on: &Fixture) {
    for code in 0..12 {
        on.plays(
            &format!("echo {code}; exit {code}"),
            [Step::Stdout(format!("{code}\n").into()), exit(code)],
        );
    }
    let sandbox = on.sandbox().await;
    join_all((0..12).map(async |code| {
        let ran = sh(&*sandbox, &format!("echo {code}; exit {code}")).await;
        assert_eq!((ran.out, ran.exit), (format!("{code}\n"), Some(Exit::Code { code })));
    }))
    .await;
}

fn cat() -> Command {
    Command { stdin: true, ..words(["cat"]) }
}

async fn several_commands_run_at_once_and_stdin_reaches_the_right_one(on: &Fixture) {
    on.plays_words(&["cat"], [Step::Echo]);
    let sandbox = on.sandbox().await;
    let (mut one, mut two) = (sandbox.exec(cat()).await.unwrap(), sandbox.exec(cat()).await.unwrap());
    let (first, second) = (one.stdin.take().unwrap(), two.stdin.take().unwrap());
    second.send(b"second".to_vec()).await.unwrap();
    first.send(b"first".to_vec()).await.unwrap();
    drop(second);
    assert_eq!(collect(two).await.ok(), "second");
    first.send(b" and more".to_vec()).await.unwrap();
    drop(first);
    assert_eq!(collect(one).await.ok(), "first and more");
}

async fn stdin_is_closed_when_its_sender_is_dropped(on: &Fixture) {
    on.plays_words(&["cat"], [Step::Echo]);
    let sandbox = on.sandbox().await;
    let mut process = sandbox.exec(cat()).await.unwrap();
    drop(process.stdin.take().unwrap());
    assert_eq!(collect(process).await.ok(), "");
}

async fn without_stdin_there_is_none_to_write_and_it_is_empty(on: &Fixture) {
    on.plays_words(&["cat"], [Step::Echo]);
    let sandbox = on.sandbox().await;
    let process = sandbox.exec(words(["cat"])).await.unwrap();
    assert!(process.stdin.is_none());
    assert_eq!(collect(process).await.ok(), "");
}

/// Each waits for the other: in turn they would never end.
async fn commands_at_once_share_the_sandbox(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "mkfifo there back").await.ok();
    let one = sandbox.exec(words(["sh", "-c", "echo ping > there; cat back"])).await.unwrap();
    let two = sandbox.exec(words(["sh", "-c", "cat there; echo pong > back"])).await.unwrap();
    assert_eq!(
        (collect(one).await.ok(), collect(two).await.ok()),
        ("pong\n".to_owned(), "ping\n".to_owned())
    );
}

async fn much_stdin_arrives_whole(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let mut process = sandbox.exec(cat()).await.unwrap();
    let stdin = process.stdin.take().unwrap();
    let sent: Vec<u8> = (0..700_000u32).map(|n| (n % 251) as u8).collect();
    let chunks: Vec<Vec<u8>> = sent.chunks(7001).map(<[u8]>::to_vec).collect();
    let feed = tokio::spawn(async move {
        for chunk in chunks {
            stdin.send(chunk).await.unwrap();
        }
    });
    let (out, _, exit) = crate::running::collect_bytes(process).await;
    feed.await.unwrap();
    assert!(out == sent && exit == Some(Exit::Code { code: 0 }), "{} bytes, {exit:?}", out.len());
}

/// The node must not take up what the command does not read.
async fn stdin_waits_for_a_slow_reader(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "mkfifo gate").await.ok();
    let command = Command { stdin: true, ..words(["sh", "-c", "read go < gate; wc -c"]) };
    let mut process = sandbox.exec(command).await.unwrap();
    let stdin = process.stdin.take().unwrap();
    let mut sent = 0;
    while tokio::time::timeout(Duration::from_secs(1), stdin.send(vec![b'x'; 1 << 16])).await.is_ok() {
        sent += 1 << 16;
        assert!(sent < 64 << 20, "{sent} bytes were taken up for a command that reads none");
    }
    sh(&*sandbox, "echo go > gate").await.ok();
    drop(stdin);
    assert_eq!(collect(process).await.number(), sent);
}

async fn a_command_that_closes_its_stdin_ends_as_it_likes(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let command = Command { stdin: true, ..words(["sh", "-c", "exec <&-; echo closed; exit 4"]) };
    let mut process = sandbox.exec(command).await.unwrap();
    let stdin = process.stdin.take().unwrap();
    let feed = tokio::spawn(async move { while stdin.send(vec![b'x'; 1 << 16]).await.is_ok() {} });
    let ran = collect(process).await;
    assert_eq!((ran.out.as_str(), ran.exit), ("closed\n", Some(Exit::Code { code: 4 })));
    // Whoever still sends learns that nobody reads.
    tokio::time::timeout(Duration::from_secs(20), feed).await.expect("the sender is told").unwrap();
}

async fn a_command_that_closes_its_output_is_waited_for_all_the_same(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "mkfifo gate").await.ok();
    let script = "echo last; exec >&- 2>&-; read go < gate; exit 5";
    let process = sandbox.exec(words(["sh", "-c", script])).await.unwrap();
    sh(&*sandbox, "echo go > gate").await.ok();
    let ran = collect(process).await;
    assert_eq!((ran.out.as_str(), ran.exit), ("last\n", Some(Exit::Code { code: 5 })));
}

async fn a_daemon_does_not_hold_its_command_open(on: &Fixture) -> Outcome {
    let sandbox = on.sandbox().await;
    let sleep = format!("sleep {}", unique_sleep());
    let start = Instant::now();
    assert_eq!(sh(&*sandbox, &format!("{sleep} & echo started")).await.ok(), "started\n");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    // With `keep_background` it is left to run.
    on.until_processes(&sleep, |many| many == 1).await?;
    sh(&*sandbox, "true").await.ok();
    assert_eq!(on.processes(&sleep)?, 1);
    Ok(())
}

/// A command whose background goes with it.
fn alone(script: &str) -> Command {
    Command { keep_background: false, ..words(["sh", "-c", script]) }
}

/// How many processes of the sandbox have this in their command line, as a command inside counts them.
async fn inside(sandbox: &dyn Sandbox, text: &str) -> u64 {
    // In brackets, so that the line that looks is not found.
    let look = format!(
        "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -c '[{}]{}'",
        &text[..1],
        &text[1..]
    );
    let ran = sh(sandbox, &look).await;
    ran.out.trim().parse().unwrap_or_else(|_| panic!("{ran:?}"))
}

async fn what_a_command_leaves_is_gone_before_its_exit_is_told(on: &Fixture) {
    let sandbox = on.sandbox().await;
    for _ in 0..3 {
        let seconds = unique_sleep();
        // In the background, in a session of its own, orphaned twice over, stopped, deaf, with the output still open.
        let leave = format!(
            "sleep {seconds} & setsid sleep {seconds} & (setsid sh -c '(sleep {seconds} &)' &); \
             sleep {seconds} & kill -STOP $!; (trap '' TERM HUP INT; exec sleep {seconds}) & echo left; exit 3"
        );
        let started = Instant::now();
        let ran = run(&*sandbox, alone(&leave)).await;
        assert_eq!((ran.out.as_str(), ran.exit), ("left\n", Some(Exit::Code { code: 3 })));
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        assert_eq!(inside(&*sandbox, &seconds).await, 0, "nothing of it runs, nor is dead and not reaped");
    }
    assert_eq!(run(&*sandbox, alone("echo on")).await.ok(), "on\n");
}

async fn what_a_command_leaves_neither_writes_into_the_next_one_nor_kills_it(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let work = "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done; echo clean";
    let intrude = "while :; do for p in /proc/[0-9]*; do echo INTRUDER > $p/fd/1; done; done";
    run(&*sandbox, alone(&format!("({intrude}) >/dev/null 2>&1 & exit 0"))).await.ok();
    assert_eq!(run(&*sandbox, alone(work)).await.ok(), "clean\n");
    // All but itself: the command that left it is the first.
    run(&*sandbox, alone("(while :; do kill -9 -1; done) >/dev/null 2>&1 & wait")).await;
    assert_eq!(run(&*sandbox, alone(work)).await.ok(), "clean\n");
}

async fn what_a_command_leaves_is_gone_while_another_runs_which_goes_on(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let mut other = sandbox.exec(Command { stdin: true, ..alone("cat") }).await.unwrap();
    let stdin = other.stdin.take().unwrap();
    let seconds = unique_sleep();
    run(&*sandbox, alone(&format!("sleep {seconds} & (sleep {seconds} &); exit 0"))).await.ok();
    until("what it left is gone", async || (inside(&*sandbox, &seconds).await == 0).then_some(())).await;
    stdin.send(b"goes on".to_vec()).await.unwrap();
    drop(stdin);
    assert_eq!(collect(other).await.ok(), "goes on");
}

async fn orphans_that_end_are_reaped(on: &Fixture) {
    let sandbox = on.sandbox().await;
    // Each ends after its parent, so that only process 1 can reap it.
    let breed = "n=0; while [ $n -lt 20 ]; do (sleep 1 >/dev/null 2>&1 &); n=$((n+1)); done";
    sh(&*sandbox, breed).await.ok();
    until("no process is dead and not reaped, and the orphans are gone", async || {
        let look =
            "for s in /proc/[0-9]*/stat; do read -r l < $s && echo \"${l##*) }\"; done 2>/dev/null; true";
        let states = sh(&*sandbox, look).await.ok();
        // The shell itself, and what the backend needs.
        (!states.lines().any(|line| line.starts_with('Z')) && states.lines().count() <= 6).then_some(())
    })
    .await;
}

async fn one_command_killed_by_another_says_so(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let mut process = sandbox.exec(words(["sh", "-c", "echo $$; exec sleep 600"])).await.unwrap();
    let Some(coinop::sandbox::Event::Stdout(pid)) = process.events.recv().await else { panic!("no pid") };
    let pid = String::from_utf8(pid).unwrap();
    sh(&*sandbox, &format!("kill -9 {}", pid.trim())).await.ok();
    assert_eq!(collect(process).await.exit, Some(Exit::Signal { signal: 9 }));
    sh(&*sandbox, "true").await.ok();
}
