//! The host as it sees a job: processes by their mark, what they hold, and bounded waits. It starts and ends nothing.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for anything that should happen, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What the attack program's name begins with.
pub const PROGRAM: &str = "atk";

/// A word that no other command line of this host has.
pub fn new_mark() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("coinop-hostile-{}-{}-end", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub pid: i32,
    pub parent: i32,
    pub state: char,
    /// At most 15 bytes; a zombie has nothing else.
    pub name: String,
}

fn look(pid: i32) -> Option<Seen> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (head, tail) = stat.rsplit_once(')')?;
    let mut fields = tail.split_whitespace();
    let (state, parent) = (fields.next()?.chars().next()?, fields.next()?.parse().ok()?);
    Some(Seen { pid, parent, state, name: head.split_once('(')?.1.to_owned() })
}

fn pids() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// All processes of the host that are seen for long enough.
pub fn processes() -> Vec<Seen> {
    pids().into_iter().filter_map(look).collect()
}

/// Processes with this in their command line: forks and threads' leaders, but no zombies.
pub fn marked(mark: &str) -> Vec<i32> {
    let holds = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(mark)
    };
    // The programs by which a plain attack is started carry the mark, too.
    let attacks = |pid: &i32| look(*pid).is_some_and(|seen| seen.name.starts_with(PROGRAM));
    pids().into_iter().filter(holds).filter(attacks).collect()
}

/// The marked ones and all that descend from them, zombies included.
pub fn family(mark: &str) -> BTreeSet<i32> {
    let mut family: BTreeSet<i32> = marked(mark).into_iter().collect();
    let all = processes();
    loop {
        let more: Vec<i32> = all
            .iter()
            .filter(|one| family.contains(&one.parent) && !family.contains(&one.pid))
            .map(|one| one.pid)
            .collect();
        if more.is_empty() {
            return family;
        }
        family.extend(more);
    }
}

/// Zombies of a program.
pub fn zombies(program: &str) -> usize {
    processes().into_iter().filter(|one| one.state == 'Z' && one.name == program).count()
}

pub fn exists(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Descriptors that a process holds; none where we may not ask.
pub fn open_files(pid: i32) -> Option<usize> {
    Some(std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count())
}

/// Bytes of memory that this process itself holds.
pub fn own_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Asks again until it holds.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

pub fn ms(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1000.0;
    if ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
}
