//! The streams of commands over the one line to a container: nobody waits for a slow reader but its own command, and
//! nothing that was printed is lost.

use std::time::Duration;

use coinop::sandbox::{Exit, Limit, Policy};

use crate::common::{IMAGE, OK, backend, name, policy, rest, sandbox, sandbox_with, sh, soon, start};

/// Sizes around what can be on its way unread, so that some of these commands end with their last bytes in their pipe.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_that_was_printed_arrives_however_late_it_is_read() {
    let host = engine!();
    let backend = backend(&host, &name("late"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox_with(&backend, Policy { output_bytes: 256 << 20, ..policy() }, None).await;
    let mut running = Vec::new();
    for step in 0..24 {
        let bytes = 320_000 + step * 100_000;
        running.push((bytes, start(&*sandbox, &format!("head -c {bytes} /dev/zero"), None, false).await));
    }
    // The readers are busy elsewhere, longer than output may come after a command's end.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    for (bytes, process) in &mut running {
        let (out, exit) = rest(process).await;
        assert_eq!((out.len(), exit), (*bytes, OK));
    }
    sandbox.destroy().await.unwrap();
}

#[tokio::test]
async fn a_time_out_ends_a_command_whose_output_nobody_takes() {
    let host = engine!();
    let backend = backend(&host, &name("unread"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox_with(&backend, Policy { output_bytes: 256 << 20, ..policy() }, None).await;
    let mut flood = start(&*sandbox, "exec yes", Some(Duration::from_millis(400)), false).await;
    let late = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        let (names, _) = sh(&*sandbox, "cat /proc/[0-9]*/comm").await;
        if !names.lines().any(|name| name == "yes") {
            break;
        }
        assert!(std::time::Instant::now() < late, "it runs on: {names}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(rest(&mut flood).await.1, Some(Exit::Timeout));
    sandbox.destroy().await.unwrap();
}

#[tokio::test]
async fn an_unread_flood_holds_up_neither_commands_nor_files_nor_the_kill() {
    let host = engine!();
    let backend = backend(&host, &name("flood"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox_with(&backend, Policy { output_bytes: 256 << 20, ..policy() }, None).await;
    let mut floods = Vec::new();
    for _ in 0..3 {
        floods.push(start(&*sandbox, "exec yes", None, false).await);
    }
    // One whose reader has gone goes on printing into nothing.
    drop(start(&*sandbox, "exec head -c 10000000 /dev/zero", None, false).await);
    assert_eq!(sh(&*sandbox, "echo heard").await, ("heard\n".to_owned(), OK));
    soon("a write", sandbox.write_file("big", &vec![7; 3 << 20])).await.unwrap();
    assert_eq!(soon("a read", sandbox.read_file("big", 4 << 20)).await.unwrap().len(), 3 << 20);
    assert_eq!(soon("the changes", sandbox.changes(4 << 20)).await.unwrap().len(), 1);
    soon("the kill", sandbox.kill()).await.unwrap();
    assert_eq!(soon("a read", sandbox.read_file("big", 4 << 20)).await.unwrap().len(), 3 << 20);
    for mut flood in floods {
        assert_eq!(rest(&mut flood).await.1, None, "it ended with its sandbox");
    }
    sandbox.destroy().await.unwrap();
}

#[tokio::test]
async fn stdin_flows_while_the_output_waits_for_its_reader() {
    let host = engine!();
    let backend = backend(&host, &name("stdin"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    // More pieces of output than are kept for a reader, before it looks at its stdin.
    let script = "i=0; while [ $i -lt 100 ]; do echo; usleep 5000; i=$((i+1)); done; wc -c";
    let mut process = start(&*sandbox, script, None, true).await;
    let stdin = process.stdin.take().unwrap();
    let giving = async {
        for _ in 0..40 {
            stdin.send(vec![1; 100_000]).await.unwrap();
        }
    };
    soon("a stdin that is read", giving).await;
    drop(stdin);
    let (out, exit) = rest(&mut process).await;
    assert_eq!((String::from_utf8_lossy(&out).trim(), exit), ("4000000", OK));
    sandbox.destroy().await.unwrap();
}

#[tokio::test]
async fn a_stdin_that_nobody_reads_ends_with_its_command() {
    let host = engine!();
    let backend = backend(&host, &name("deaf"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    for script in ["sleep 1", "exec 0<&-; sleep 1", "true"] {
        let mut process = start(&*sandbox, script, None, true).await;
        let stdin = process.stdin.take().unwrap();
        let giving = tokio::spawn(async move { while stdin.send(vec![1; 100_000]).await.is_ok() {} });
        assert_eq!(rest(&mut process).await.1, OK, "{script}");
        soon("a writer whose command has ended", giving).await.unwrap();
    }
    assert_eq!(sh(&*sandbox, "echo on").await, ("on\n".to_owned(), OK));
    sandbox.destroy().await.unwrap();
}

/// Each piece a byte: what waits is bounded in pieces, too.
#[tokio::test]
async fn many_small_pieces_arrive_in_order() {
    let host = engine!();
    let backend = backend(&host, &name("small"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    let script = "i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); done";
    let (mut first, mut second) =
        (start(&*sandbox, script, None, false).await, start(&*sandbox, script, None, false).await);
    let expected: String = (0..3000).map(|i| format!("{i}\n")).collect();
    for process in [&mut second, &mut first] {
        let (out, exit) = rest(process).await;
        assert_eq!((String::from_utf8(out).unwrap(), exit), (expected.clone(), OK));
    }
    sandbox.destroy().await.unwrap();
}

#[tokio::test]
async fn output_beyond_the_limit_ends_even_what_the_command_left_behind() {
    let host = engine!();
    let backend = backend(&host, &name("cut"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox_with(&backend, Policy { output_bytes: 100_000, ..policy() }, None).await;
    let mut process = start(&*sandbox, "yes & exit 3", None, false).await;
    let (out, exit) = rest(&mut process).await;
    assert!(out.len() <= 100_000, "{}", out.len());
    assert!(matches!(exit, Some(Exit::Code { code: 3 } | Exit::Limit { limit: Limit::Output })), "{exit:?}");
    sandbox.destroy().await.unwrap();
}

/// Keys that would let go of a terminal among them.
#[tokio::test]
async fn every_byte_passes_both_ways() {
    let host = engine!();
    let backend = backend(&host, &name("bytes"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    let all: Vec<u8> = (0..=255).flat_map(|byte| [byte, 16, 17, 0]).cycle().take(200_000).collect();
    let mut process = start(&*sandbox, "cat", None, true).await;
    let (stdin, given) = (process.stdin.take().unwrap(), all.clone());
    tokio::spawn(async move { stdin.send(given).await });
    let (out, exit) = rest(&mut process).await;
    assert!((out == all, exit) == (true, OK), "{} bytes, {exit:?}", out.len());
    sandbox.destroy().await.unwrap();
}

/// A job may take a larger pipe; what it left there when it ended is its output as well.
#[tokio::test]
async fn what_waits_in_a_pipe_that_a_job_enlarged_arrives_too() {
    let host = engine!();
    let agent = backend(&host, &name("pipe"), "coinop-test:agent", 0).await;
    let Ok(backend) = agent else {
        return crate::skip::skip(
            "what_waits_in_a_pipe_that_a_job_enlarged_arrives_too",
            "there is no coinop-test:agent",
        );
    };
    let sandbox = sandbox_with(&backend, Policy { output_bytes: 256 << 20, ..policy() }, None).await;
    let script =
        "exec python3 -c 'import fcntl, os; fcntl.fcntl(1, 1031, 1 << 20); fcntl.fcntl(2, 1031, 1 << 20)
for n in range(BLOCKS): os.write(1 + n % 2, b\"x\" * 1000)'";
    let mut running = Vec::new();
    for blocks in [900, 1800, 2600, 3400, 4200] {
        let script = script.replace("BLOCKS", &blocks.to_string());
        running.push((blocks, start(&*sandbox, &script, None, false).await));
    }
    // The readers are busy elsewhere, longer than output may come after a command's end.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    for (blocks, process) in &mut running {
        let (out, exit) = rest(process).await;
        assert_eq!((out.len(), exit), (*blocks * 1000, OK));
    }
    sandbox.destroy().await.unwrap();
}
