//! Adversaries that take all they can get: processes, memory, disk, inodes, descriptors, output, processors; and
//! those that will not die.

use coinop::sandbox::{Exit, Limit, Policy};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::case::{NOT_SHOWN, Outcome, cases};
use crate::ground::{self, Ground, attack, collect, collect_until_ready, policy, run};
use crate::host::PATIENCE;
use crate::plain::{How, MOMENT, Plain};
use crate::siege::{Siege, hold};
use crate::{engine, host, plain};

cases! {
    a_fork_bomb_stays_within_its_processes: "processes", bomb_at_large;
    one_memory_hog_gets_no_more_than_its_limit: "memory", hog_at_large;
    many_memory_hogs_get_no_more_together: "memory", hogs_at_large;
    hogs_one_after_another_leave_the_neighbours_alone: "memory", hog_at_large;
    what_waits_in_connections_counts_as_memory: "memory", tcp_at_large;
    what_waits_in_datagrams_counts_as_memory: "memory", udp_at_large;
    files_without_a_byte_count_as_memory: "memory", empty_files_at_large;
    attributes_of_files_count_as_memory: "memory", attributes_at_large;
    a_filler_of_disks_gets_its_own_bytes: "disk", filler_at_large;
    a_filler_of_inodes_gets_its_own_files: "inodes", inodes_at_large;
    a_hoarder_of_descriptors_gets_its_own: "descriptors", hoarder_at_large;
    a_flood_that_nobody_reads_waits_in_its_pipe: "log flood", flood_at_large;
    a_flood_that_is_read_is_cut_at_the_byte: "log flood", flood_at_large;
    zombies_count_and_go_with_the_kill: "zombies", zombies_at_large;
    orphans_that_end_are_reaped_at_once: "zombies", orphans_at_large;
    daemons_end_with_the_sandbox: "double fork, setsid", daemons_at_large;
    who_stops_itself_and_others_is_killed_all_the_same: "SIGSTOP", stops_at_large;
    who_is_deaf_to_signals_is_killed_with_its_threads: "hard to kill", stubborn_at_large;
    a_burner_of_processors_gets_its_share: "CPU", burner_at_large;
}

// === processes ===

fn bomb_at_large(plain: &Plain) -> Outcome {
    let how = How { limits: &["--nproc=300"], ..How::default() };
    let mut loose = plain.start(how, &["bomb"])?;
    loose.ready()?;
    let most = std::cell::Cell::new(0);
    host::until("a bomb at large passes the policy's limit", || {
        most.set(most.get().max(loose.marked().len()));
        most.get() > 4 * policy().pids as usize
    });
    Ok(format!("{} processes at once, held at 300 by ours", most.get()))
}

async fn a_fork_bomb_stays_within_its_processes(ground: &Ground) -> Outcome {
    let check = async |siege: &Siege| {
        let most = (0..20).map(|_| siege.family().len()).max().unwrap_or_default();
        assert!((12..=policy().pids as usize).contains(&most), "{most} processes");
        format!("{most} processes at most")
    };
    Ok(hold(ground, policy(), &["bomb"], check).await)
}

// === memory ===

const LARGE: &[&str] = &["--as=500000000", "--data=500000000"];

fn hog_at_large(plain: &Plain) -> Outcome {
    let said = plain.run(How { limits: LARGE, ..How::default() }, &["memory", "160"])?;
    assert_eq!(said, "took it\n");
    Ok("160 MiB for one process".to_owned())
}

fn hogs_at_large(plain: &Plain) -> Outcome {
    let mut loose = plain.start(How { limits: LARGE, ..How::default() }, &["memories", "8", "60"])?;
    host::until("eight hogs at large", || loose.marked().len() == 9);
    for _ in 0..8 {
        assert_eq!(loose.line()?, "took it");
    }
    Ok("8 × 60 MiB".to_owned())
}

/// What a hog of this kind got: not what it wanted, and no more than its limit by the kernel's count.
async fn starves(ground: &Ground, words: &[&str]) -> String {
    let sandbox = ground.sandbox(policy()).await;
    let (said, exit) = run(&*sandbox, words).await;
    let wanted = if words[0] == "memory" { 1 } else { 8 };
    assert!(said.matches("took it").count() < wanted, "{said}");
    // A process may be refused, where each has a limit of its own; else the kernel or the node ends it.
    let ended = matches!(exit, Some(Exit::Limit { limit: Limit::Memory } | Exit::Code { code: 12 }));
    assert!(ended, "{exit:?}: {said}");
    let peak = sandbox.destroy().await.unwrap().peak_memory_bytes;
    // The docker backend's own process has 4 MiB beside; the base lies in memory there, too. Where nothing but a look
    // every 20 ms counts the sum, it is passed by what two processors can fill in that time: less than was wanted.
    let room = if ground.watched { 192 << 20 } else { 8 << 20 };
    assert!(peak > 0 && peak <= policy().memory_bytes + room, "{peak}");
    format!("{} MiB at most", peak >> 20)
}

async fn one_memory_hog_gets_no_more_than_its_limit(ground: &Ground) -> Outcome {
    Ok(starves(ground, &["memory", "160"]).await)
}

async fn many_memory_hogs_get_no_more_together(ground: &Ground) -> Outcome {
    Ok(starves(ground, &["memories", "8", "60"]).await)
}

async fn hogs_one_after_another_leave_the_neighbours_alone(ground: &Ground) -> Outcome {
    let check = async |siege: &Siege| format!("{} processes", siege.family().len());
    Ok(hold(ground, policy(), &["hogs", "160"], check).await)
}

/// Three times what the policy gives.
const WANTED_MIB: u64 = 192;

fn sockets_at_large(plain: &Plain, kind: &str) -> Outcome {
    let how = How { network: Some("ip link set lo up"), root: true, ..How::default() };
    let mut loose = plain.start(how, &[kind, "8", &WANTED_MIB.to_string()])?;
    let took: u64 = loose.ready()?[0].parse().unwrap();
    assert!(took > 2 * policy().memory_bytes, "{took}");
    Ok(format!("{} MiB wait unread", took >> 20))
}

fn tcp_at_large(plain: &Plain) -> Outcome {
    sockets_at_large(plain, "tcp")
}

fn udp_at_large(plain: &Plain) -> Outcome {
    sockets_at_large(plain, "udp")
}

/// What a job keeps in its sockets is within its memory, and its peak tells of it.
async fn sockets_count(ground: &Ground, kind: &str) -> String {
    let siege = Siege::lay(ground, policy(), &[kind, "8", &WANTED_MIB.to_string()]).await;
    let took = siege.number();
    let peak = siege.sandbox.usage().await.unwrap().peak_memory_bytes;
    siege.kill().await;
    if ground.watched {
        assert_eq!(took, 0, "there are no sockets where nobody counts them");
        return "no sockets here".to_owned();
    }
    assert!(took > 0 && took <= policy().memory_bytes, "{took}");
    // The docker backend's own process has 4 MiB beside, and the attack program lies in memory there.
    let most = policy().memory_bytes + if ground.engine.is_some() { 8 << 20 } else { 0 };
    assert!((took..=most).contains(&peak), "a peak of {peak}, while {took} waited");
    format!("{} KiB wait unread, a peak of {} MiB", took >> 10, peak >> 20)
}

async fn what_waits_in_connections_counts_as_memory(ground: &Ground) -> Outcome {
    Ok(sockets_count(ground, "tcp").await)
}

async fn what_waits_in_datagrams_counts_as_memory(ground: &Ground) -> Outcome {
    Ok(sockets_count(ground, "udp").await)
}

/// As many files, or KiB of attributes, as the policy's memory cannot hold.
const INODES: u64 = 200_000;

fn empty_files_at_large(plain: &Plain) -> Outcome {
    let mut loose = plain.start(How::default(), &["inodes", "20000", "."])?;
    assert_eq!(loose.ready()?, ["20000"]);
    Ok("20,000, as many as it wanted".to_owned())
}

fn attributes_at_large(plain: &Plain) -> Outcome {
    let mut loose = plain.start(How::default(), &["attributes", "200", "."])?;
    match loose.ready()?[0].parse::<u64>().unwrap() {
        0 => Err(format!("{NOT_SHOWN}no file here takes attributes")),
        took => Ok(format!("{took} KiB, on a disk")),
    }
}

/// A job that is allowed far more inodes than it has memory for is ended for its memory.
async fn inodes_count(ground: &Ground, word: &str) -> String {
    let policy = Policy { inodes: INODES, ..policy() };
    let sandbox = ground.sandbox(policy.clone()).await;
    let running = sandbox.exec(attack(&[word, &INODES.to_string(), "/workspace"], "unmarked")).await.unwrap();
    // It ends, or says that it has all it can get.
    let (said, exit) = match tokio::time::timeout(PATIENCE, collect_until_ready(running)).await {
        Ok(ended) => ended,
        Err(late) => panic!("{late}"),
    };
    let peak = sandbox.destroy().await.unwrap().peak_memory_bytes;
    if said.starts_with("0\n") {
        return "no file here takes attributes".to_owned();
    }
    assert_eq!(exit, Some(Exit::Limit { limit: Limit::Memory }), "{said}");
    assert!(peak > policy.memory_bytes / 2, "a peak of {peak}");
    format!("ended at {} MiB", peak >> 20)
}

async fn files_without_a_byte_count_as_memory(ground: &Ground) -> Outcome {
    Ok(inodes_count(ground, "inodes").await)
}

async fn attributes_of_files_count_as_memory(ground: &Ground) -> Outcome {
    Ok(inodes_count(ground, "attributes").await)
}

// === files ===

/// Every place where somebody might look for room.
const PLACES: &[&str] =
    &["/workspace", "/tmp", "/home/job", "/dev/shm", "/dev", "/job", "/var/tmp", "/run", "/etc", "/"];

fn filler_at_large(plain: &Plain) -> Outcome {
    let mut loose =
        plain.start(How { limits: &["--fsize=50000000"], ..How::default() }, &["fill", "24", "."])?;
    let took: u64 = loose.ready()?[0].parse().unwrap();
    assert!(took >= 24 << 20 && took > policy().disk_bytes, "{took}");
    assert_eq!(std::fs::metadata(plain.workspace().join("filler")).unwrap().len(), took);
    Ok(format!("{} MiB, as much as it wanted", took >> 20))
}

async fn a_filler_of_disks_gets_its_own_bytes(ground: &Ground) -> Outcome {
    let words: Vec<&str> = ["fill", "64"].iter().chain(PLACES).copied().collect();
    let check = async |siege: &Siege| {
        let (took, most) = (siege.number(), policy().disk_bytes);
        assert!(took > most / 2 && took <= most, "{took}");
        let told = siege.sandbox.usage().await.unwrap().disk_written_bytes;
        assert!(told <= most, "{told}");
        format!("{} of {} KiB{}", took >> 10, most >> 10, on_the_engine_s_disk(ground))
    };
    Ok(hold(ground, policy(), &words, check).await)
}

/// What the containers of this node have written to the disk of their engine: nothing.
fn on_the_engine_s_disk(ground: &Ground) -> &'static str {
    let Some((host, node)) = &ground.engine else { return "" };
    let filter = format!("%7B%22label%22%3A%5B%22coinop.node%3D{node}%22%5D%7D");
    let answer = engine::get(host, &format!("/containers/json?all=1&size=1&filters={filter}")).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let found: Vec<serde_json::Value> = serde_json::from_str(body).unwrap();
    assert!(!found.is_empty(), "{answer}");
    for one in &found {
        assert_eq!(one["SizeRw"].as_u64().unwrap_or(0), 0, "{one}");
    }
    ", 0 on the engine's disk"
}

fn inodes_at_large(plain: &Plain) -> Outcome {
    let mut loose = plain.start(How::default(), &["inodes", "1500", "."])?;
    let made: u64 = loose.ready()?[0].parse().unwrap();
    assert_eq!(made, 1500);
    Ok(format!("{made} files, as many as it wanted"))
}

async fn a_filler_of_inodes_gets_its_own_files(ground: &Ground) -> Outcome {
    let words: Vec<&str> = ["inodes", "5000"].iter().chain(PLACES).copied().collect();
    let check = async |siege: &Siege| {
        let (made, most) = (siege.number(), policy().inodes);
        // A container's runtime folder, which is not filled here, has a share of its own.
        let least = if ground.engine.is_some() { most - most / 32 } else { most };
        assert!(made >= least && made <= most, "{made} of {most}");
        format!("{made} of {most} files")
    };
    Ok(hold(ground, policy(), &words, check).await)
}

fn hoarder_at_large(plain: &Plain) -> Outcome {
    let mut loose = plain
        .start(How { limits: &["--nofile=2000"], ..How::default() }, &["descriptors-hoard", "4", "4096"])?;
    let had: u64 = loose.ready()?[0].parse().unwrap();
    assert!(had > 1900, "{had}");
    Ok(format!("{had} descriptors in one process, held at 2,000 by ours"))
}

async fn a_hoarder_of_descriptors_gets_its_own(ground: &Ground) -> Outcome {
    let check = async |siege: &Siege| {
        let most = u64::from(policy().open_files);
        assert!(siege.number() < most, "{}", siege.said);
        let held: Vec<usize> = siege.family().into_iter().filter_map(host::open_files).collect();
        assert!(held.iter().all(|held| *held as u64 <= most), "{held:?}");
        format!("{} of {most} descriptors a process", held.iter().max().copied().unwrap_or_default())
    };
    Ok(hold(ground, policy(), &["descriptors-hoard", "4", "4096"], check).await)
}

// === output ===

fn flood_at_large(plain: &Plain) -> Outcome {
    let said = plain.run(How::default(), &["flood", "8"])?;
    assert!(said.len() as u64 >= 8 << 20 && said.len() as u64 > policy().output_bytes, "{}", said.len());
    Ok(format!("{} MiB, all of it kept by whoever reads", said.len() >> 20))
}

async fn a_flood_that_nobody_reads_waits_in_its_pipe(ground: &Ground) -> Outcome {
    let (before, engine_before) = (host::own_memory(), engine_memory(ground));
    let unlimited = Policy { output_bytes: u64::MAX >> 1, ..policy() };
    let check = async |_: &Siege| {
        let (grown, engine) =
            (host::own_memory().saturating_sub(before), engine_memory(ground).saturating_sub(engine_before));
        assert!(grown < 16 << 20, "the node grew by {grown} bytes");
        assert!(engine < 64 << 20, "the engine grew by {engine} bytes");
        format!("the node grew by {} KiB", grown >> 10)
    };
    Ok(hold(ground, unlimited, &["flood"], check).await)
}

/// Bytes that the engine's own processes hold; 0 where there is none or it cannot be seen.
fn engine_memory(ground: &Ground) -> u64 {
    let Some((address, _)) = &ground.engine else { return 0 };
    let pid = address.strip_prefix("unix://").and_then(|socket| socket.strip_suffix("sock"));
    let pid = pid.and_then(|run| std::fs::read_to_string(format!("{run}pid")).ok());
    let status = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{}/status", pid.trim())).ok());
    let line = status.as_deref().unwrap_or_default().lines().find(|line| line.starts_with("VmRSS"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

async fn a_flood_that_is_read_is_cut_at_the_byte(ground: &Ground) -> Outcome {
    let sandbox = ground.sandbox(Policy { output_bytes: 100_000, ..policy() }).await;
    let mark = host::new_mark();
    let (said, exit) = collect(sandbox.exec(attack(&["flood"], &mark)).await.unwrap()).await;
    assert_eq!((said.len(), exit), (100_000, Some(Exit::Limit { limit: Limit::Output })));
    host::until("who floods is ended", || host::marked(&mark).is_empty());
    sandbox.destroy().await.unwrap();
    Ok("cut at 100000 bytes".to_owned())
}

// === those that will not go ===

fn zombies_at_large(plain: &Plain) -> Outcome {
    let mut loose = plain.start(How { limits: &["--nproc=300"], ..How::default() }, &["zombies", "100"])?;
    loose.ready()?;
    let program = &plain::program()?.name;
    host::until("a hundred zombies", || host::zombies(program) >= 100);
    Ok("100 zombies".to_owned())
}

async fn zombies_count_and_go_with_the_kill(ground: &Ground) -> Outcome {
    let program = &plain::program()?.name;
    let check = async |siege: &Siege| {
        let most = policy().pids as usize;
        assert!(siege.family().len() <= most);
        host::until("its children have ended", || host::zombies(program) >= most / 2);
        format!("{} zombies", host::zombies(program))
    };
    let note = hold(ground, policy(), &["zombies", "100"], check).await;
    assert_eq!(host::zombies(program), 0, "zombies outlived their sandbox");
    Ok(note)
}

fn orphans_at_large(plain: &Plain) -> Outcome {
    let how = How { limits: &["--nproc=300"], first: true, ..How::default() };
    let mut loose = plain.start(how, &["orphans", "50"])?;
    loose.ready()?;
    let program = &plain::program()?.name;
    host::until("process 1 leaves them lying", || host::zombies(program) >= 50);
    Ok("50 zombies, with a process 1 that does not reap".to_owned())
}

async fn orphans_that_end_are_reaped_at_once(ground: &Ground) -> Outcome {
    let program = &plain::program()?.name;
    // More than there may be at once: without reaping it could not get that far.
    let check = async |_: &Siege| {
        host::until("process 1 has reaped them", || host::zombies(program) == 0);
        "none left of 200".to_owned()
    };
    Ok(hold(ground, policy(), &["orphans", "200"], check).await)
}

fn daemons_at_large(plain: &Plain) -> Outcome {
    let mut loose = plain.start(How { stays: true, ..How::default() }, &["daemons", "6"])?;
    loose.ready()?;
    // The command has ended; whoever ends its session, or asks kindly, ends nothing.
    host::until("the daemons are alone", || loose.marked().len() == 6);
    loose.signal(Signal::SIGTERM);
    loose.signal(Signal::SIGHUP);
    std::thread::sleep(MOMENT);
    assert_eq!(loose.marked().len(), 6);
    Ok("6 daemons outlive their command and SIGTERM".to_owned())
}

async fn daemons_end_with_the_sandbox(ground: &Ground) -> Outcome {
    let check = async |siege: &Siege| {
        host::until("the daemons are alone", || siege.family().len() == 6);
        "6 daemons".to_owned()
    };
    Ok(hold(ground, policy(), &["daemons", "6"], check).await)
}

fn stopped(pids: impl IntoIterator<Item = i32>) -> usize {
    let all = host::processes();
    let pids: Vec<i32> = pids.into_iter().collect();
    all.iter().filter(|one| one.state == 'T' && pids.contains(&one.pid)).count()
}

fn stops_at_large(plain: &Plain) -> Outcome {
    let mut loose = plain.start(How::default(), &["stops", "4"])?;
    loose.ready()?;
    host::until("all have stopped", || stopped(loose.marked()) == 5);
    loose.signal(Signal::SIGTERM);
    std::thread::sleep(MOMENT);
    assert_eq!(stopped(loose.marked()), 5);
    Ok("5 stopped processes outlive SIGTERM".to_owned())
}

async fn who_stops_itself_and_others_is_killed_all_the_same(ground: &Ground) -> Outcome {
    let check = async |siege: &Siege| {
        host::until("all have stopped", || stopped(siege.family()) >= 4);
        // What serves the job inside has not: it still starts commands.
        ground::echo(&*siege.sandbox).await;
        format!("{} stopped", stopped(siege.family()))
    };
    Ok(hold(ground, policy(), &["stops", "4"], check).await)
}

fn stubborn_at_large(plain: &Plain) -> Outcome {
    let mut loose = plain.start(How::default(), &["stubborn", "8"])?;
    loose.ready()?;
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        loose.signal(signal);
    }
    std::thread::sleep(MOMENT);
    let left = loose.marked();
    assert_eq!(left.len(), 1);
    kill(Pid::from_raw(left[0]), None).unwrap();
    Ok("8 threads outlive every signal but SIGKILL".to_owned())
}

async fn who_is_deaf_to_signals_is_killed_with_its_threads(ground: &Ground) -> Outcome {
    let check = async |siege: &Siege| {
        let tasks = |pid: &i32| std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        format!("{} threads", siege.family().iter().map(tasks).sum::<usize>())
    };
    Ok(hold(ground, policy(), &["stubborn", "20"], check).await)
}

// === processors ===

/// Processor time that these processes have used, in milliseconds.
fn used_ms(pids: impl IntoIterator<Item = i32>) -> u64 {
    let ticks = |pid: i32| -> Option<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
    };
    // The kernel tells a hundred ticks a second, everywhere.
    pids.into_iter().filter_map(ticks).sum::<u64>() * 10
}

fn burner_at_large(plain: &Plain) -> Outcome {
    let mut loose = plain.start(How::default(), &["spin", "24"])?;
    loose.ready()?;
    // More than its share would give it in the same time, on however busy a machine.
    let started = std::time::Instant::now();
    let cores = std::cell::Cell::new(0.0);
    host::until("a burner at large passes its share", || {
        assert!(started.elapsed() < PATIENCE * 3 / 4, "{} cores", cores.get());
        cores.set(used_ms(loose.marked()) as f64 / started.elapsed().as_secs_f64() / 1000.0);
        started.elapsed() > MOMENT * 5 && cores.get() > 0.4
    });
    Ok(format!("{:.1} cores", cores.get()))
}

async fn a_burner_of_processors_gets_its_share(ground: &Ground) -> Outcome {
    // Where there is no cgroup for it, a share is whole cores.
    let little = Policy { cpu_milli: 300, ..policy() };
    let (little, most) = match ground.backend.admit(&little) {
        Ok(()) => (little, 0.39),
        Err(_) => (policy(), 1.2),
    };
    let check = async |siege: &Siege| {
        let (started, before) = (std::time::Instant::now(), used_ms(siege.family()));
        tokio::time::sleep(MOMENT * 15).await;
        let used = (used_ms(siege.family()) - before) as f64;
        let cores = used / started.elapsed().as_secs_f64() / 1000.0;
        assert!(cores > 0.02 && cores < most, "{cores} cores");
        format!("{cores:.2} cores of {}", f64::from(little.cpu_milli) / 1000.0)
    };
    Ok(hold(ground, little.clone(), &["spin", "12"], check).await)
}
