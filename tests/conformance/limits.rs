//! Each limit of the policy: what stays below it works, what passes it ends or is refused, and the rest goes on.

use std::time::{Duration, Instant};

use coinop::sandbox::sim::Step;
use coinop::sandbox::{Command, Exit, Limit, Policy, Sandbox};

use crate::case::{Outcome, Unmet, cases};
use crate::fixtures::{Fixture, until};
use crate::running::{collect, is_gone, policy, run, sh, unique_sleep, words};

cases!(
    everywhere: [
        the_wall_limit_ends_a_command_and_says_so,
        the_wall_limit_ends_an_idle_sandbox,
        after_the_wall_limit_the_files_can_still_be_read,
        a_command_s_own_time_out_is_told_and_the_sandbox_lives_on,
        a_command_that_ends_in_time_is_not_timed_out,
        what_was_said_before_the_time_out_arrives,
        a_time_out_ends_its_own_command_and_no_other,
        the_memory_limit_is_told_by_its_name,
    ],
    programs: [
        a_command_that_times_out_leaves_nothing_and_the_sandbox_lives_on,
        one_process_does_not_get_more_memory_than_the_limit,
        many_processes_together_do_not_get_more_memory_either,
        memory_and_swap_together_hold_no_more_than_both,
        files_in_memory_count_as_memory,
        memory_below_the_limit_is_given,
        a_fork_bomb_ends_at_the_pids_limit,
        processes_below_the_limit_are_given,
        a_fork_bomb_leaves_its_neighbour_alone,
        the_disk_limit_holds_over_all_writable_places_together,
        disk_below_the_limit_is_given_and_may_be_used_again,
        the_inode_limit_holds,
        a_process_opens_no_more_files_than_its_limit,
        a_limit_of_open_files_cannot_be_raised,
        a_job_gets_no_more_than_a_core,
        a_job_gets_no_more_than_its_share_of_a_core,
    ],
);

fn wait(seconds: u64) -> Step {
    Step::Wait(Duration::from_secs(seconds))
}

/// Long enough for any backend to start a command.
const SHORT_WALL: u64 = 2500;

async fn the_wall_limit_ends_a_command_and_says_so(on: &Fixture) {
    let script = "trap '' TERM INT HUP; echo up; sleep 600; sleep 600";
    on.plays(script, [Step::Stdout(b"up\n".to_vec()), wait(600)]);
    let begun = Instant::now();
    let sandbox = on.sandbox_with(Policy { wall_ms: SHORT_WALL, ..policy() }).await;
    let ran = sh(&*sandbox, script).await;
    ran.hit(Limit::Wall);
    assert_eq!(ran.out, "up\n");
    let took = begun.elapsed();
    assert!((2400..20_000).contains(&took.as_millis()), "it ended after {took:?}");
    assert!(is_gone(sandbox.exec(words(["true"])).await));
}

async fn the_wall_limit_ends_an_idle_sandbox(on: &Fixture) {
    let sandbox = on.sandbox_with(Policy { wall_ms: SHORT_WALL, ..policy() }).await;
    until("the idle sandbox ends", async || is_gone(sandbox.write_file("x", b"").await).then_some(())).await;
    let usage = sandbox.destroy().await.unwrap();
    assert!((2400..20_000).contains(&usage.wall_ms), "{usage:?}");
}

async fn after_the_wall_limit_the_files_can_still_be_read(on: &Fixture) {
    on.plays("sleep 600", [wait(600)]);
    let sandbox = on.sandbox_with(Policy { wall_ms: SHORT_WALL, ..policy() }).await;
    sandbox.write_file("kept", b"kept").await.unwrap();
    sh(&*sandbox, "sleep 600").await.hit(Limit::Wall);
    assert_eq!(sandbox.read_file("kept", 4).await.unwrap(), b"kept");
    assert_eq!(sandbox.changes(100).await.unwrap().len(), 1);
}

fn within(millis: u64, script: &str) -> Command {
    Command { timeout: Some(Duration::from_millis(millis)), ..words(["sh", "-c", script]) }
}

async fn a_command_s_own_time_out_is_told_and_the_sandbox_lives_on(on: &Fixture) {
    on.plays("trap '' TERM INT; sleep 600; sleep 600", [wait(600)]);
    on.plays("exit 4", [Step::Exit(Exit::Code { code: 4 })]);
    let sandbox = on.sandbox().await;
    let start = Instant::now();
    let ran = run(&*sandbox, within(500, "trap '' TERM INT; sleep 600; sleep 600")).await;
    assert_eq!(ran.exit, Some(Exit::Timeout));
    assert!((450..20_000).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
    assert_eq!(sh(&*sandbox, "exit 4").await.exit, Some(Exit::Code { code: 4 }));
}

async fn a_command_that_ends_in_time_is_not_timed_out(on: &Fixture) {
    on.plays("exit 3", [Step::Exit(Exit::Code { code: 3 })]);
    let sandbox = on.sandbox().await;
    assert_eq!(run(&*sandbox, within(30_000, "exit 3")).await.exit, Some(Exit::Code { code: 3 }));
}

async fn what_was_said_before_the_time_out_arrives(on: &Fixture) {
    on.plays("echo said; sleep 600", [Step::Stdout(b"said\n".to_vec()), wait(600)]);
    let sandbox = on.sandbox().await;
    let ran = run(&*sandbox, within(1500, "echo said; sleep 600")).await;
    assert_eq!((ran.out.as_str(), ran.exit), ("said\n", Some(Exit::Timeout)));
}

async fn a_time_out_ends_its_own_command_and_no_other(on: &Fixture) {
    on.plays_words(&["cat"], [Step::Echo]);
    on.plays("sleep 600", [wait(600)]);
    let sandbox = on.sandbox().await;
    let mut other = sandbox.exec(Command { stdin: true, ..words(["cat"]) }).await.unwrap();
    assert_eq!(run(&*sandbox, within(500, "sleep 600")).await.exit, Some(Exit::Timeout));
    other.stdin.take().unwrap().send(b"alive".to_vec()).await.unwrap();
    assert_eq!(collect(other).await.ok(), "alive");
}

async fn a_command_that_times_out_leaves_nothing_and_the_sandbox_lives_on(on: &Fixture) -> Outcome {
    let sandbox = on.sandbox().await;
    let sleep = format!("sleep {}", unique_sleep());
    let script = format!("setsid sh -c '{sleep} & {sleep}' & ({sleep} &) ; {sleep} & kill -STOP $!; {sleep}");
    let process = sandbox.exec(within(3000, &script)).await.unwrap();
    on.until_processes(&sleep, |many| many >= 5).await?;
    assert_eq!(collect(process).await.exit, Some(Exit::Timeout));
    assert_eq!(on.processes(&sleep)?, 0);
    assert_eq!(sh(&*sandbox, "echo on").await.ok(), "on\n");
    Ok(())
}

/// Keeps this many MiB in one process, and says when it has them.
fn hog(mib: u32) -> String {
    format!("dd if=/dev/zero of=/dev/null bs={mib}M count=100000")
}

async fn the_memory_limit_is_told_by_its_name(on: &Fixture) -> Outcome {
    let script =
        "for i in 1 2 3 4 5 6; do (dd if=/dev/zero of=/dev/null bs=30M count=100000 || kill $$) & done; wait";
    on.plays(script, [Step::Exceed(Limit::Memory)]);
    let sandbox = on.about("memory_bytes", Policy { memory_bytes: 64 << 20, ..policy() }).await?;
    sh(&*sandbox, script).await.hit(Limit::Memory);
    Ok(())
}

async fn one_process_does_not_get_more_memory_than_the_limit(on: &Fixture) -> Outcome {
    let sandbox = on.about("memory_bytes", Policy { memory_bytes: 64 << 20, ..policy() }).await?;
    let ran = sh(&*sandbox, &hog(200)).await;
    // Either it is ended, or it is not given the memory and says so itself.
    match ran.exit {
        Some(Exit::Limit { limit: Limit::Memory }) => {}
        Some(Exit::Code { code }) if code != 0 => assert!(ran.err.contains("memory"), "{ran:?}"),
        _ => panic!("{ran:?}"),
    }
    let usage = sandbox.destroy().await.unwrap();
    assert!(usage.peak_memory_bytes <= 68 << 20, "{usage:?}");
    Ok(())
}

async fn many_processes_together_do_not_get_more_memory_either(on: &Fixture) -> Outcome {
    let sandbox = on.about("memory_bytes", Policy { memory_bytes: 96 << 20, ..policy() }).await?;
    let script = format!("for i in 1 2 3 4 5 6 7 8; do ({} 2>/dev/null || kill $$) & done; wait", hog(25));
    sh(&*sandbox, &script).await.hit(Limit::Memory);
    let usage = sandbox.destroy().await.unwrap();
    // A look at intervals may see them a moment too late.
    assert!(usage.peak_memory_bytes <= 256 << 20, "{usage:?}");
    Ok(())
}

/// Where the host has swap, this fails when nobody counts it.
async fn memory_and_swap_together_hold_no_more_than_both(on: &Fixture) -> Outcome {
    let policy = Policy { memory_bytes: 64 << 20, swap_bytes: 32 << 20, ..policy() };
    let sandbox = on.about("swap_bytes", policy).await?;
    let script = format!("for i in 1 2 3 4 5 6 7 8; do ({} 2>/dev/null || kill $$) & done; wait", hog(20));
    sh(&*sandbox, &script).await.hit(Limit::Memory);
    Ok(())
}

async fn files_in_memory_count_as_memory(on: &Fixture) -> Outcome {
    let policy = Policy { memory_bytes: 48 << 20, disk_bytes: 512 << 20, ..policy() };
    let sandbox = on.about("memory_bytes", policy).await?;
    let place = "while read -r _ at kind rest; do [ $kind = tmpfs ] && case $at in /tmp|/dev/shm|/home/job) \
                 echo $at; break;; esac; done < /proc/mounts; true";
    let place = sh(&*sandbox, place).await.ok();
    if place.is_empty() {
        return Err(Unmet::Skipped("no writable place of it lies in memory".to_owned()));
    }
    let fill = format!("dd if=/dev/zero of={}/a bs=1048576 count=200 2>/dev/null && sleep 60", place.trim());
    sh(&*sandbox, &fill).await.hit(Limit::Memory);
    Ok(())
}

async fn memory_below_the_limit_is_given(on: &Fixture) {
    let sandbox = on.sandbox_with(Policy { memory_bytes: 128 << 20, ..policy() }).await;
    let script = "for i in 1 2 3; do dd if=/dev/zero of=/dev/null bs=20M count=2 2>/dev/null & p=\"$p $!\"; done; \
                  for p in $p; do wait $p || exit 1; done; echo done";
    assert_eq!(sh(&*sandbox, script).await.ok(), "done\n");
}

/// Starts sleeps until it can no more; says a line for each.
const BOMB: &str =
    "i=0; while [ $i -lt 300 ]; do sleep 600 >/dev/null 2>&1 & i=$((i+1)); echo $i; done; exit 0";

async fn bomb(sandbox: &dyn Sandbox) -> usize {
    // A shell that cannot fork may try again for a while.
    let ran = run(sandbox, within(20_000, BOMB)).await;
    assert_ne!(ran.exit, Some(Exit::Code { code: 0 }), "300 processes were started: {ran:?}");
    // The shell itself is one more.
    ran.out.lines().count() + 1
}

async fn a_fork_bomb_ends_at_the_pids_limit(on: &Fixture) -> Outcome {
    let sandbox = on.about("pids", Policy { pids: 24, ..policy() }).await?;
    let alive = bomb(&*sandbox).await;
    assert!((20..=24).contains(&alive), "{alive} processes at a limit of 24");
    sandbox.destroy().await.unwrap();
    Ok(())
}

async fn processes_below_the_limit_are_given(on: &Fixture) -> Outcome {
    let sandbox = on.about("pids", Policy { pids: 24, ..policy() }).await?;
    let script = "i=0; while [ $i -lt 18 ]; do sleep 1 & p=\"$p $!\"; i=$((i+1)); done; \
                  for p in $p; do wait $p || exit 1; done; echo done";
    assert_eq!(sh(&*sandbox, script).await.ok(), "done\n");
    Ok(())
}

async fn a_fork_bomb_leaves_its_neighbour_alone(on: &Fixture) -> Outcome {
    let greedy = on.about("pids", Policy { pids: 24, ..policy() }).await?;
    let neighbour = on.about("pids", Policy { pids: 24, ..policy() }).await?;
    bomb(&*greedy).await;
    let script = "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 1 & p=\"$p $!\"; done; for p in $p; do wait $p || exit 1; \
                  done; echo on";
    assert_eq!(sh(&*neighbour, script).await.ok(), "on\n");
    greedy.kill().await.unwrap();
    Ok(())
}

async fn the_disk_limit_holds_over_all_writable_places_together(on: &Fixture) -> Outcome {
    let sandbox = on.about("disk_bytes", Policy { disk_bytes: 8 << 20, ..policy() }).await?;
    let fill = "for d in /workspace /tmp ~ /dev/shm; do [ -w $d ] || continue; \
                dd if=/dev/zero of=$d/f bs=65536 count=1000 2>/dev/null && echo UNLIMITED $d; done; \
                cat /workspace/f /tmp/f ~/f /dev/shm/f 2>/dev/null | wc -c";
    let said = sh(&*sandbox, fill).await.ok();
    assert!(!said.contains("UNLIMITED"), "{said}");
    let bytes: u64 = said.lines().last().unwrap().trim().parse().unwrap();
    assert!((7 << 20..=8 << 20).contains(&bytes), "{bytes}");
    assert!(sandbox.usage().await.unwrap().disk_written_bytes <= 9 << 20);
    let why = sh(&*sandbox, "echo x | dd of=more bs=1000000 count=1; cat /workspace/f > /tmp/more").await.err;
    assert!(why.contains("No space left") || why.contains("quota"), "{why}");
    Ok(())
}

async fn disk_below_the_limit_is_given_and_may_be_used_again(on: &Fixture) -> Outcome {
    let sandbox = on.about("disk_bytes", Policy { disk_bytes: 8 << 20, ..policy() }).await?;
    let script = "for i in 1 2 3; do dd if=/dev/zero of=f bs=65536 count=80 2>/dev/null || exit 1; \
                  [ $(wc -c < f) = 5242880 ] || exit 2; rm f; done; echo done";
    assert_eq!(sh(&*sandbox, script).await.ok(), "done\n");
    Ok(())
}

async fn the_inode_limit_holds(on: &Fixture) -> Outcome {
    let sandbox = on.about("inodes", Policy { inodes: 100, ..policy() }).await?;
    let fill = "n=0; for d in /workspace /tmp ~ /dev/shm; do [ -w $d ] || continue; while [ $n -lt 1000 ]; do \
                if [ $((n % 2)) = 0 ]; then true > $d/$n || break; else mkdir $d/$n || break; fi; n=$((n+1)); done; \
                done; echo $n";
    let ran = sh(&*sandbox, fill).await;
    assert!(ran.err.contains("No space left") || ran.err.contains("quota"), "{ran:?}");
    let made = ran.number();
    assert!((90..=105).contains(&made), "{made} files and folders at a limit of 100");
    Ok(())
}

async fn a_process_opens_no_more_files_than_its_limit(on: &Fixture) -> Outcome {
    let sandbox = on.about("open_files", Policy { open_files: 8, ..policy() }).await?;
    let open = "for n in 3 4 5 6 7 8 9; do eval \"exec $n</dev/null\" || exit 1; echo $n; done";
    let ran = sh(&*sandbox, open).await;
    assert_eq!(ran.out, "3\n4\n5\n6\n7\n", "{ran:?}");
    assert_ne!(ran.exit, Some(Exit::Code { code: 0 }));
    Ok(())
}

async fn a_limit_of_open_files_cannot_be_raised(on: &Fixture) -> Outcome {
    let sandbox = on.about("open_files", Policy { open_files: 64, ..policy() }).await?;
    let ran = sh(&*sandbox, "ulimit -Sn; ulimit -Hn; ulimit -n 4096; ulimit -n").await;
    let said: Vec<&str> = ran.out.lines().collect();
    assert!(said.len() >= 2 && said.iter().all(|limit| *limit == "64"), "{ran:?}");
    assert!(!ran.err.is_empty(), "{ran:?}");
    Ok(())
}

/// Thousandths of a core that four busy loops get over two seconds.
async fn busy(sandbox: &dyn Sandbox) -> f64 {
    let before = sandbox.usage().await.unwrap();
    let start = Instant::now();
    let spin = "for i in 1 2 3 4; do while :; do :; done & done; wait";
    assert_eq!(run(sandbox, within(2000, spin)).await.exit, Some(Exit::Timeout));
    let took = start.elapsed();
    let used = sandbox.usage().await.unwrap().cpu_ms - before.cpu_ms;
    used as f64 / took.as_secs_f64()
}

async fn a_job_gets_no_more_than_a_core(on: &Fixture) -> Outcome {
    let whole = on.about("cpu_milli", Policy { cpu_milli: 1000, ..policy() }).await?;
    let milli = busy(&*whole).await;
    assert!((50.0..1200.0).contains(&milli), "{milli} thousandths of a core instead of 1000");
    Ok(())
}

async fn a_job_gets_no_more_than_its_share_of_a_core(on: &Fixture) -> Outcome {
    let third = on.about("cpu_milli", Policy { cpu_milli: 300, ..policy() }).await?;
    let milli = busy(&*third).await;
    assert!((50.0..450.0).contains(&milli), "{milli} thousandths of a core instead of 300");
    Ok(())
}
