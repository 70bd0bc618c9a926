//! The store, and the books on it, against kill -9 at writes, failing syscalls, a full disk, and power cuts; another process
//! on the same folder. The writer is this very binary, started again with `COINOP_STORE_CHILD` set.
//!
//! Needs strace, and for the disks root with loop devices. Where something is missing a test says SKIPPED
//! and why, and fails instead where parts are required.

#[expect(dead_code, reason = "each test program uses a part of it")]
#[path = "../support/skip.rs"]
mod skip;

mod disk;
mod money;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use coinop::store::record::{Record, Summary, Verdict};
use coinop::store::{Error, Holder, Options, Store};
use disk::Disk;
use skip::skip;

const CHILD: &str = "COINOP_STORE_CHILD";

// --- the writer process -------------------------------------------------------------------------------

/// Does nothing in an ordinary run; in a child it is the writer that gets killed.
#[test]
fn writer_process() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let mut words = order.splitn(3, ' ');
    let (mode, start, dir) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
    let start: u64 = start.parse().unwrap();
    let dir = Path::new(dir);
    match mode {
        "sequence" => sequence(dir, start),
        "crowd" => crowd(dir, start),
        "tills" => money::tills(dir, start),
        "hold" => {
            let _store = open(dir).unwrap();
            say("READY".into());
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        }
        other => panic!("{other}"),
    }
}

/// Nanoseconds of the clock that every process of this host shares.
fn now_ns() -> u128 {
    let mut now = nix::libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec through the pointer, which lives until it returns.
    assert_eq!(unsafe { nix::libc::clock_gettime(nix::libc::CLOCK_MONOTONIC, &mut now) }, 0);
    now.tv_sec as u128 * 1_000_000_000 + now.tv_nsec as u128
}

/// One line, written at once; a test harness's own output stands on other lines.
fn say(line: String) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("\n@{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

/// A fixed walk through everything that writes; each step is said once the store has acknowledged it.
fn sequence(dir: &Path, start: u64) {
    let store = match open(dir) {
        Ok(store) => store,
        Err(e) => return say(format!("OPEN {e:?}")),
    };
    let mut failed = None;
    for n in start..start + 8 {
        for (kind, batch) in [("accepted", vec![accepted(n)]), ("closed", closing(n))] {
            match (store.append_blocking(batch), &failed) {
                (Ok(_), None) => say(format!("ACK {kind} {n}")),
                (Ok(_), Some(e)) => panic!("an append went through after {e:?}"),
                (Err(e), _) => {
                    assert!(
                        matches!(e, Error::Full { .. } | Error::Io { .. } | Error::Index { .. }),
                        "{e:?}"
                    );
                    let health = store.health().poisoned.expect("health says so");
                    assert_eq!(health.to_string(), e.to_string());
                    let lazy = store.append_lazily(vec![cursor(n)]);
                    assert_eq!(lazy.unwrap_err().to_string(), e.to_string());
                    failed.get_or_insert(e);
                }
            }
        }
        if n == start + 2
            && let Ok(sha) = store.put_blob(&blob(n))
        {
            say(format!("ACK blob {sha}"));
        }
        if failed.is_none() {
            store.append_lazily(vec![cursor(n)]).unwrap();
        }
    }
    match (store.close(), failed) {
        (Ok(()), None) => say("END".into()),
        (closed, Some(e)) => {
            assert_eq!(closed.unwrap_err().to_string(), e.to_string());
            say(format!("FAILED {e:?}"));
        }
        (Err(e), None) => say(format!("CLOSE {e:?}")),
    }
}

/// Four threads that write until the disk goes away; each acknowledgement is said with its time.
fn crowd(dir: &Path, start: u64) {
    let store = match open(dir) {
        Ok(store) => store,
        Err(e) => return say(format!("OPEN {e:?}")),
    };
    std::thread::scope(|scope| {
        for lane in 0..4_u64 {
            let store = &store;
            scope.spawn(move || {
                for n in (start + lane..).step_by(4) {
                    if store.append_blocking(vec![accepted(n)]).is_err() {
                        return;
                    }
                    say(format!("AT {} accepted {n}", now_ns()));
                    if store.append_blocking(closing(n)).is_err() {
                        return;
                    }
                    say(format!("AT {} closed {n}", now_ns()));
                    if n % 16 == lane
                        && let Ok(sha) = store.put_blob(&blob(n))
                    {
                        say(format!("AT {} blob {sha}", now_ns()));
                    }
                }
            });
        }
    });
}

fn id(n: u64) -> String {
    format!("{n:064x}")
}

fn accepted(n: u64) -> Record {
    Record::Accepted {
        job: id(n),
        customer: id(1),
        kind: 5930,
        skill: "generic".into(),
        request: "r".repeat(200 + (n % 7) as usize * 300),
        relay: "ws://a".into(),
        deadline_ms: 1,
        agreed: Default::default(),
    }
}

/// Two records that must never be seen apart.
fn closing(n: u64) -> Vec<Record> {
    let (job, answer) = (id(n), id(n + 1_000_000));
    vec![
        Record::Closed {
            job: job.clone(),
            verdict: Verdict::Done,
            answer: answer.clone(),
            summary: Summary::default(),
        },
        Record::Queued {
            event: answer,
            job: Some(job),
            json: "j".repeat(300 + (n % 5) as usize * 400),
            relays: vec!["ws://a".into()],
            give_up_ms: 9,
        },
    ]
}

fn cursor(n: u64) -> Record {
    Record::Cursor { relay: "ws://a".into(), until: n }
}

fn blob(n: u64) -> Vec<u8> {
    vec![n as u8; 9_000]
}

/// Small segments, so that a few dozen batches walk through several.
fn open(dir: &Path) -> Result<Store, Error> {
    let options =
        Options { segment_bytes: 8 * 1024, key_locks: Some(std::env::temp_dir()), ..Options::default() };
    // A key a folder: the tests of this file run at the same time.
    let key: String = dir.to_string_lossy().chars().filter(char::is_ascii_alphanumeric).collect();
    Store::open_with(dir, &Holder::new(format!("test{key}")), options)
}

// --- starting it and judging what it left ---------------------------------------------------------------

fn order(mode: &str, start: u64, dir: &Path) -> String {
    format!("{mode} {start} {}", dir.display())
}

fn child(wrapper: &[String], order: &str) -> Child {
    let me = std::env::current_exe().unwrap();
    let mut command = match wrapper.split_first() {
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments).arg(me);
            command
        }
        None => Command::new(me),
    };
    command
        .args(["--exact", "writer_process", "--nocapture", "--test-threads=1"])
        .env(CHILD, order)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// What a writer said.
#[derive(Default, Debug)]
struct Said {
    acknowledged: BTreeSet<String>,
    last: String,
}

impl Said {
    fn take(&mut self, line: &str) {
        let Some(line) = line.strip_prefix('@') else { return };
        self.last = line.into();
        if let Some(ack) = line.strip_prefix("ACK ") {
            self.acknowledged.insert(ack.into());
        }
    }
    fn all(&mut self, child: &mut Child) {
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            self.take(&line.unwrap());
        }
    }
}

/// Opens what was left behind and holds it against what was acknowledged: all of it is there, nothing is
/// half there, log and index agree, and the store works on.
fn judge(dir: &Path, said: &Said) {
    let store = open(dir).unwrap_or_else(|e| panic!("after {said:?}: {e}"));
    let mut kept = 0;
    for ack in &said.acknowledged {
        match ack.split_once(' ').unwrap() {
            ("accepted", n) => assert!(store.job(&id(n.parse().unwrap())).unwrap().is_some(), "lost {ack}"),
            ("closed", n) => {
                let row = store.job(&id(n.parse().unwrap())).unwrap().unwrap();
                assert_eq!(row.verdict, Some(Verdict::Done), "lost {ack}");
            }
            ("blob", sha) => assert!(store.blob(sha, 1 << 20).unwrap().is_some(), "lost {ack}"),
            other => panic!("{other:?}"),
        }
        kept += 1;
    }
    assert_eq!(kept, said.acknowledged.len());
    let all = coinop::store::JobFilter { limit: 10_000, ..Default::default() };
    for row in store.jobs(&all).unwrap() {
        match row.answer {
            Some(answer) => assert!(store.answer(&answer).unwrap().is_some(), "half a batch: {}", row.job),
            None => assert!(row.state.is_open(), "half a batch: {}", row.job),
        }
    }
    assert_eq!(store.verify().unwrap(), store.head());
    let look = Store::read_only(dir).unwrap();
    assert_eq!(look.dump_index().unwrap(), store.dump_index().unwrap());
    store.append_blocking(vec![cursor(1)]).unwrap();
    let head = store.head();
    store.close().unwrap();
    let store = open(dir).unwrap();
    assert!(!store.was_rebuilt());
    assert_eq!(store.head().seq, head.seq + 1);
}

/// `@AT nanoseconds what`
fn at(line: &str) -> Option<(u128, String)> {
    let (ns, ack) = line.strip_prefix("@AT ")?.split_once(' ')?;
    Some((ns.parse().unwrap(), ack.into()))
}

fn has_strace() -> bool {
    let asked = Command::new("strace").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
    asked.is_ok_and(|s| s.success())
}

fn strace(inject: &str) -> Vec<String> {
    let call = inject.split(':').next().unwrap();
    let trace = format!("trace={call}");
    let inject = format!("inject={inject}");
    ["strace", "-f", "-qqq", "-o", "/dev/null", "-e", &trace, "-e", &inject].map(String::from).to_vec()
}

// --- the tests ------------------------------------------------------------------------------------------

#[test]
fn killed_at_any_write_nothing_acknowledged_is_lost_and_nothing_is_half_there() {
    const NAME: &str = "killed_at_any_write_nothing_acknowledged_is_lost_and_nothing_is_half_there";
    if !has_strace() {
        return skip(NAME, "no strace");
    }
    // A walk under strace takes well under a second; one that never gets through is a fault of this test.
    const MOST: u32 = 500;
    let (mut points, mut early) = (0, 0);
    // The counter of strace is one a thread and call; each call is tried until the walk gets through. How
    // many there are is not fixed: a walk fills several segments, and each of them is a score of writes.
    for call in ["pwrite64", "fdatasync", "fsync", "ftruncate", "rename", "unlink", "mkdir", "write"] {
        let mut when = 0;
        let through = loop {
            when += 1;
            if when > MOST {
                break false;
            }
            let room = tempfile::tempdir().unwrap();
            let dir = room.path().join("data");
            let inject = format!("{call}:signal=SIGKILL:when={when}");
            let mut said = Said::default();
            let mut killed = false;
            // The second walk meets what the first left, and dies at the same point of its own.
            for start in [0, 100] {
                let mut child = child(&strace(&inject), &order("sequence", start, &dir));
                said.all(&mut child);
                let status = child.wait().unwrap();
                let died = status.signal() == Some(9) || status.code() == Some(137);
                assert!(died || said.last == "END", "{inject}: {status} {said:?}");
                killed |= died;
                points += 1;
                early += usize::from(said.acknowledged.is_empty());
            }
            judge(&dir, &said);
            if !killed {
                break true;
            }
        };
        assert!(through, "{call}: the walk was still killed at its call {MOST}");
        assert!(when > 1, "{call} is never called, so nothing was tried");
    }
    eprintln!("{points} points, {early} of them before the first acknowledgement");
    assert!(points > 60, "only {points} points");
}

#[test]
fn a_failing_write_or_sync_stops_the_store_and_a_reopening_mends_it() {
    const NAME: &str = "a_failing_write_or_sync_stops_the_store_and_a_reopening_mends_it";
    if !has_strace() {
        return skip(NAME, "no strace");
    }
    let mut failures = BTreeSet::new();
    for (call, error) in
        [("pwrite64", "ENOSPC"), ("pwrite64", "EIO"), ("fdatasync", "EIO"), ("fdatasync", "ENOSPC")]
    {
        // From the n-th call on in each thread all fail: the disk stays full or broken.
        for when in [1, 2, 3, 5, 8, 12, 17] {
            let room = tempfile::tempdir().unwrap();
            let dir = room.path().join("data");
            let mut said = Said::default();
            let mut child =
                child(&strace(&format!("{call}:error={error}:when={when}+")), &order("sequence", 0, &dir));
            said.all(&mut child);
            let status = child.wait().unwrap();
            let wanted = if error == "ENOSPC" { "Full" } else { "Io" };
            if said.last != "END" {
                let found = said.last.split(' ').nth(1).unwrap_or_default();
                assert_eq!(found, wanted, "{call} {error} {when}: {status} {said:?}");
            }
            failures.insert(said.last.split(' ').next().unwrap().to_owned());
            judge(&dir, &said);
        }
    }
    assert!(failures.contains("OPEN") && failures.contains("FAILED"), "both were met: {failures:?}");
}

#[test]
fn another_process_on_the_folder_is_named_and_its_death_frees_it() {
    let room = tempfile::tempdir().unwrap();
    let dir = room.path().join("data");
    let mut child = child(&[], &order("hold", 0, &dir));
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|l| l.unwrap() == "@READY"), "the child opened the store");
    match open(&dir).map(|_| ()).unwrap_err() {
        Error::Held { holder, .. } => {
            assert_eq!(holder.pid, child.id());
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            assert!(now.as_millis() as u64 - holder.started_ms < 60_000);
        }
        e => panic!("{e}"),
    }
    child.kill().unwrap();
    child.wait().unwrap();
    open(&dir).unwrap();
}

#[test]
fn a_power_cut_loses_nothing_that_was_acknowledged() {
    const NAME: &str = "a_power_cut_loses_nothing_that_was_acknowledged";
    let (mut rounds, mut late, mut late_and_lost) = (0, 0, 0);
    // On each disk the first cut meets a fresh store, the others an aged one.
    for disk_nr in 0..3 {
        let mut disk = match Disk::ext4(96 << 20) {
            Ok(disk) => disk,
            Err(why) => return skip(NAME, &why),
        };
        let dir = disk.at().join("data");
        let mut said = Said::default();
        for round in 0..4_u64 {
            let mut child = child(&[], &order("crowd", round * 100_000, &dir));
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let wanted = [1, 40, 400, 7][((disk_nr + round) % 4) as usize];
            let mut told = Vec::new();
            while told.len() < wanted {
                told.extend(at(&lines.next().expect("the writer goes on").unwrap()));
            }
            let cut_ns = now_ns();
            disk.cut_power();
            // The pipe still holds what was acknowledged before the cut. What the writer heard during it and
            // after it no machine without power has ever heard: the file system that was shut down may call
            // a sync done whose journal entry it has just dropped.
            told.extend(lines.filter_map(|l| at(&l.unwrap())));
            let (before, during): (Vec<_>, Vec<_>) = told.into_iter().partition(|(ns, _)| *ns < cut_ns);
            late += during.len();
            let during: Vec<String> = during.into_iter().map(|(_, ack)| ack).collect();
            said.acknowledged.extend(before.into_iter().map(|(_, ack)| ack));
            child.wait().unwrap();
            disk.unmount();
            disk.mount().unwrap();
            judge(&dir, &said);
            let look = Store::read_only(&dir).unwrap();
            late_and_lost += during
                .iter()
                .filter_map(|ack| ack.strip_prefix("accepted "))
                .filter(|n| look.job(&id(n.parse().unwrap())).unwrap().is_none())
                .count();
            rounds += 1;
        }
        disk.unmount();
    }
    eprintln!(
        "{late} acknowledgements came during the {rounds} cuts and do not count; {late_and_lost} are gone"
    );
    assert_eq!(rounds, 12);
}

#[test]
fn a_full_disk_stops_the_store_with_full_and_room_mends_it() {
    const NAME: &str = "a_full_disk_stops_the_store_with_full_and_room_mends_it";
    for make in [Disk::tmpfs, Disk::ext4] {
        // Changes of the index are kept in memory for a while, so the log alone may fill the disk: the room that is made
        // must be enough for the index, too.
        let mut disk = match make(12 << 20) {
            Ok(disk) => disk,
            Err(why) => return skip(NAME, &why),
        };
        let ballast = disk.at().join("ballast");
        fs::write(&ballast, vec![1; 6 << 20]).unwrap();
        let dir = disk.at().join("data");
        let store = open(&dir).unwrap();
        let mut said = Said::default();
        let mut n = 0;
        let error = loop {
            n += 1;
            assert!(n < 20_000, "the disk never got full");
            match store.append_blocking(vec![accepted(n)]) {
                Ok(_) => said.take(&format!("@ACK accepted {n}")),
                Err(e) => break e,
            }
        };
        assert!(matches!(error, Error::Full { .. }), "{error:?}");
        assert!(error.to_string().contains("disk is full"), "{error}");
        assert!(store.health().poisoned.is_some());
        assert!(store.job(&id(1)).unwrap().is_some(), "it can still be read");
        fs::remove_file(&ballast).unwrap();
        let again = store.append_blocking(vec![accepted(n)]);
        assert!(
            matches!(again, Err(Error::Full { .. })),
            "a failed store stays failed until it is opened again"
        );
        assert!(store.close().is_err());
        drop(store);
        judge(&dir, &said);
        disk.unmount();
    }
}
