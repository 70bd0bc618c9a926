//! Output: live, in order, byte for byte, apart; bounded where nobody reads; and ended by the one exit.

use coinop::sandbox::sim::Step;
use coinop::sandbox::{Change, Command, Content, Error, Event, Exit, Limit, Policy};

use crate::case::cases;
use crate::fixtures::{Fixture, until};
use crate::running::{collect, collect_bytes, policy, run, sh, words};

cases!(
    everywhere: [
        output_is_live,
        stdout_and_stderr_are_kept_apart,
        bytes_that_are_no_text_arrive_as_they_are,
        a_command_that_says_nothing_gives_only_its_exit,
        the_last_words_before_a_signal_are_not_lost,
        a_reader_that_goes_away_does_not_stop_the_command,
        output_up_to_the_limit_is_no_reason_to_end,
        output_beyond_the_limit_ends_the_command_at_the_byte,
        the_output_limit_counts_both_streams_together,
        the_output_limit_counts_over_all_commands,
        the_sandbox_outlives_a_command_that_said_too_much,
    ],
    programs: [
        half_a_line_is_live_as_well,
        one_stream_keeps_its_order,
        much_output_arrives_whole,
        the_last_words_before_the_exit_are_not_lost,
        two_commands_keep_their_streams_apart,
        a_slow_reader_holds_the_command_back,
        a_flood_of_output_is_cut_at_the_byte,
        an_unread_flood_is_ended_with_its_sandbox,
        what_goes_to_files_is_no_output,
    ],
);

async fn output_is_live(on: &Fixture) {
    let script = "echo first; cat";
    on.plays(script, [Step::Stdout(b"first\n".to_vec()), Step::Echo]);
    let sandbox = on.sandbox().await;
    let command = Command { stdin: true, ..words(["sh", "-c", script]) };
    let mut process = sandbox.exec(command).await.unwrap();
    assert_eq!(process.events.recv().await, Some(Event::Stdout(b"first\n".to_vec())));
    let stdin = process.stdin.take().unwrap();
    stdin.send(b"go\n".to_vec()).await.unwrap();
    assert_eq!(process.events.recv().await, Some(Event::Stdout(b"go\n".to_vec())));
    drop(stdin);
    assert_eq!(collect(process).await.ok(), "");
}

async fn half_a_line_is_live_as_well(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let command = Command { stdin: true, ..words(["sh", "-c", "printf 'name? '; read name; echo $name"]) };
    let mut process = sandbox.exec(command).await.unwrap();
    assert_eq!(process.events.recv().await, Some(Event::Stdout(b"name? ".to_vec())));
    process.stdin.take().unwrap().send(b"job\n".to_vec()).await.unwrap();
    assert_eq!(collect(process).await.ok(), "job\n");
}

async fn stdout_and_stderr_are_kept_apart(on: &Fixture) {
    let script = "echo one; echo two >&2; echo three; echo four >&2";
    let (out, err) = (|text: &str| Step::Stdout(text.into()), |text: &str| Step::Stderr(text.into()));
    on.plays(script, [out("one\n"), err("two\n"), out("three\n"), err("four\n")]);
    let ran = sh(&*on.sandbox().await, script).await;
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("one\nthree\n", "two\nfour\n"));
    assert_eq!(ran.exit, Some(Exit::Code { code: 0 }));
}

async fn bytes_that_are_no_text_arrive_as_they_are(on: &Fixture) {
    let every: Vec<u8> = (0..=255).collect();
    let octal: String = every.iter().map(|byte| format!("\\{byte:03o}")).collect();
    let script = format!("printf '{octal}'; printf '\\377\\000' >&2");
    on.plays(&script, [Step::Stdout(every.clone()), Step::Stderr(vec![255, 0])]);
    let sandbox = on.sandbox().await;
    let ran = collect_bytes(sandbox.exec(words(["sh", "-c", &script])).await.unwrap()).await;
    assert_eq!(ran, (every, vec![255, 0], Some(Exit::Code { code: 0 })));
}

async fn a_command_that_says_nothing_gives_only_its_exit(on: &Fixture) {
    on.plays("exit 5", [Step::Exit(Exit::Code { code: 5 })]);
    let sandbox = on.sandbox().await;
    let mut process = sandbox.exec(words(["sh", "-c", "exit 5"])).await.unwrap();
    assert_eq!(process.events.recv().await, Some(Event::Exit(Exit::Code { code: 5 })));
    assert_eq!(process.events.recv().await, None);
}

async fn one_stream_keeps_its_order(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let out = sh(&*sandbox, "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done").await.ok();
    let expected: String = (0..20_000).map(|n| format!("{n}\n")).collect();
    assert!(out == expected, "{} bytes instead of {}", out.len(), expected.len());
}

async fn much_output_arrives_whole(on: &Fixture) {
    let sandbox = on.sandbox_with(Policy { output_bytes: 64 << 20, ..policy() }).await;
    let script = "dd if=/dev/zero bs=1048576 count=16 2>/dev/null; { dd if=/dev/zero bs=1000 count=999 2>/dev/null; } >&2";
    let process = sandbox.exec(words(["sh", "-c", script])).await.unwrap();
    let (out, err, exit) = collect_bytes(process).await;
    assert_eq!((out.len(), err.len(), exit), (16 << 20, 999_000, Some(Exit::Code { code: 0 })));
}

async fn the_last_words_before_the_exit_are_not_lost(on: &Fixture) {
    let sandbox = on.sandbox().await;
    for round in 0..15 {
        let ran = sh(&*sandbox, &format!("echo out {round}; echo err {round} >&2; exit 3")).await;
        assert_eq!((ran.out, ran.err), (format!("out {round}\n"), format!("err {round}\n")));
        assert_eq!(ran.exit, Some(Exit::Code { code: 3 }));
    }
}

async fn the_last_words_before_a_signal_are_not_lost(on: &Fixture) {
    let script = "echo last; kill -9 $$";
    on.plays(script, [Step::Stdout(b"last\n".to_vec()), Step::Exit(Exit::Signal { signal: 9 })]);
    let ran = sh(&*on.sandbox().await, script).await;
    assert_eq!((ran.out.as_str(), ran.exit), ("last\n", Some(Exit::Signal { signal: 9 })));
}

async fn two_commands_keep_their_streams_apart(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let say =
        |what: &str| format!("i=0; while [ $i -lt 2000 ]; do echo {what}; echo {what} >&2; i=$((i+1)); done");
    let (a, b) = (say("a"), say("b"));
    let (one, two) = tokio::join!(sh(&*sandbox, &a), sh(&*sandbox, &b));
    for (ran, line) in [(one, "a\n"), (two, "b\n")] {
        assert!(ran.out == line.repeat(2000) && ran.err == line.repeat(2000), "not only {line}");
    }
}

async fn a_reader_that_goes_away_does_not_stop_the_command(on: &Fixture) {
    let script = "dd if=/dev/zero bs=65536 count=8 2>/dev/null; echo done > done";
    let done = Content::File { bytes: b"done\n".to_vec(), executable: false };
    let done = Step::Change(Change { path: b"done".to_vec(), to: done });
    on.plays(script, [Step::Stdout(vec![0; 1 << 19]), done]);
    let sandbox = on.sandbox().await;
    drop(sandbox.exec(words(["sh", "-c", script])).await.unwrap());
    until("the command gets to its end", async || match sandbox.read_file("done", 10).await {
        Ok(bytes) if bytes == b"done\n" => Some(()),
        Ok(_) | Err(Error::NotFound(_)) => None,
        Err(other) => panic!("{other}"),
    })
    .await;
}

/// The node must not take up what nobody reads.
async fn a_slow_reader_holds_the_command_back(on: &Fixture) {
    let sandbox = on.sandbox_with(Policy { output_bytes: 1 << 30, ..policy() }).await;
    let script = "i=0; while [ $i -lt 1000 ]; do dd if=/dev/zero bs=65536 count=1 2>/dev/null; i=$((i+1)); \
                  echo $i > at.new; mv at.new at; done";
    let process = sandbox.exec(words(["sh", "-c", script])).await.unwrap();
    let at = async || match sandbox.read_file("at", 10).await {
        Ok(at) => String::from_utf8(at).unwrap().trim().parse().unwrap(),
        Err(_) => 0u32,
    };
    let (mut before, mut same) = (0, 0);
    until("the command waits for its reader", async || {
        let now = at().await;
        same = if now == before && now > 0 { same + 1 } else { 0 };
        before = now;
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        (same == 20).then_some(())
    })
    .await;
    assert!(before < 500, "{before} pieces of 64 KiB were taken up, and nobody had read one");
    let (out, _, exit) = collect_bytes(process).await;
    assert_eq!((out.len(), exit), (1000 << 16, Some(Exit::Code { code: 0 })));
}

/// Says so many bytes on stdout.
fn bytes(on: &Fixture, many: usize) -> String {
    let script = format!("printf '%0{many}d' 0");
    on.plays(&script, [Step::Stdout(vec![b'0'; many])]);
    script
}

async fn output_up_to_the_limit_is_no_reason_to_end(on: &Fixture) {
    let script = bytes(on, 1000);
    let sandbox = on.sandbox_with(Policy { output_bytes: 1000, ..policy() }).await;
    assert_eq!(sh(&*sandbox, &script).await.ok().len(), 1000);
    on.plays("exit 0", []);
    assert_eq!(sh(&*sandbox, "exit 0").await.out, "");
}

async fn output_beyond_the_limit_ends_the_command_at_the_byte(on: &Fixture) {
    let script = bytes(on, 1001);
    let sandbox = on.sandbox_with(Policy { output_bytes: 1000, ..policy() }).await;
    let ran = sh(&*sandbox, &script).await;
    ran.hit(Limit::Output);
    assert_eq!(ran.out.len(), 1000);
}

async fn the_output_limit_counts_both_streams_together(on: &Fixture) {
    let script = "printf '%0600d' 0; printf '%0600d' 0 >&2; sleep 600";
    on.plays(script, [Step::Stdout(vec![b'0'; 600]), Step::Stderr(vec![b'0'; 600])]);
    let sandbox = on.sandbox_with(Policy { output_bytes: 1000, ..policy() }).await;
    let ran = sh(&*sandbox, script).await;
    ran.hit(Limit::Output);
    assert_eq!(ran.out.len() + ran.err.len(), 1000);
}

async fn the_output_limit_counts_over_all_commands(on: &Fixture) {
    let (first, second, third) = (bytes(on, 400), bytes(on, 599), bytes(on, 2));
    let sandbox = on.sandbox_with(Policy { output_bytes: 1000, ..policy() }).await;
    assert_eq!(sh(&*sandbox, &first).await.ok().len(), 400);
    assert_eq!(sh(&*sandbox, &second).await.ok().len(), 599);
    let ran = sh(&*sandbox, &third).await;
    ran.hit(Limit::Output);
    assert_eq!(ran.out, "0");
}

async fn the_sandbox_outlives_a_command_that_said_too_much(on: &Fixture) {
    let script = bytes(on, 2000);
    on.plays("exit 6", [Step::Exit(Exit::Code { code: 6 })]);
    let sandbox = on.sandbox_with(Policy { output_bytes: 1000, ..policy() }).await;
    sh(&*sandbox, &script).await.hit(Limit::Output);
    assert_eq!(
        sh(&*sandbox, "exit 6").await.exit,
        Some(Exit::Code { code: 6 }),
        "its output is spent, not more"
    );
    sandbox.write_file("on", b"on").await.unwrap();
    let ran = sh(&*sandbox, &script).await;
    ran.hit(Limit::Output);
    assert_eq!(ran.out, "");
}

async fn a_flood_of_output_is_cut_at_the_byte(on: &Fixture) {
    let sandbox = on.sandbox_with(Policy { output_bytes: 100_000, ..policy() }).await;
    assert_eq!(sh(&*sandbox, "echo 123456789").await.ok().len(), 10);
    let ran = sh(&*sandbox, "yes & yes >&2 & wait").await;
    ran.hit(Limit::Output);
    assert_eq!(ran.out.len() + ran.err.len(), 99_990);
    assert_eq!(run(&*sandbox, words(["true"])).await.exit, Some(Exit::Code { code: 0 }));
    sh(&*sandbox, "echo more; sleep 600").await.hit(Limit::Output);
}

async fn an_unread_flood_is_ended_with_its_sandbox(on: &Fixture) {
    let sandbox = on.sandbox_with(Policy { output_bytes: 1 << 30, ..policy() }).await;
    let process = sandbox.exec(words(["yes"])).await.unwrap();
    until("it has begun", async || (!process.events.is_empty()).then_some(())).await;
    // Nobody reads it, and nobody ever will.
    sandbox.destroy().await.unwrap();
    assert_eq!(collect(process).await.exit, None);
}

async fn what_goes_to_files_is_no_output(on: &Fixture) {
    let sandbox = on.sandbox_with(Policy { output_bytes: 100, ..policy() }).await;
    sh(&*sandbox, "dd if=/dev/zero of=file bs=65536 count=4 2>/dev/null; cat file > copy").await.ok();
    assert_eq!(sandbox.read_file("copy", 1 << 20).await.unwrap().len(), 1 << 18);
}
