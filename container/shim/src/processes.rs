//! The processes of this sandbox as /proc tells them, and how a command's whole family is ended.

use std::collections::BTreeSet;
use std::{fs, io};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Kills what descends from `root` or is of its session; a daemon that left both stays until the sandbox goes.
pub fn kill_family(root: i32) {
    signal(root, Signal::SIGSTOP);
    stop_family(root).into_iter().for_each(|pid| signal(pid, Signal::SIGKILL));
}

/// Kills what a command left that was reaped: of its session, or a descendant of such.
pub fn kill_left_by(root: i32) {
    // Not itself: its number may be another's by now.
    let left = stop_family(root).into_iter().filter(|pid| *pid != root);
    left.for_each(|pid| signal(pid, Signal::SIGKILL));
}

/// Stops the family before any of it is killed: a child of one that has ended is nobody's family any more. Again until
/// no new one is found: one may fork while the list is read. `root` is in what is returned, and is left alone.
fn stop_family(root: i32) -> BTreeSet<i32> {
    let mut doomed = BTreeSet::from([root]);
    for _ in 0..64 {
        let found = family(&doomed);
        if found.is_empty() {
            break;
        }
        found.iter().for_each(|pid| signal(*pid, Signal::SIGSTOP));
        doomed.extend(found);
    }
    doomed
}

fn signal(pid: i32, signal: Signal) {
    // One that has ended meanwhile is no loss.
    kill(Pid::from_raw(pid), signal).unwrap_or_default();
}

/// Kills every process that this user may, process 1 and the caller excepted. False when there was none, not even one
/// that has ended and was not reaped.
pub fn kill_all() -> bool {
    kill(Pid::from_raw(-1), Signal::SIGKILL).is_ok()
}

/// The pids that /proc shows.
///
/// # Errors
/// When it cannot be read to its end, for want of memory say.
pub fn all() -> io::Result<Vec<i32>> {
    let entries = fs::read_dir("/proc")?.collect::<io::Result<Vec<_>>>()?;
    Ok(entries.iter().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// Living processes that descend from these or are of their sessions, without these.
fn family(of: &BTreeSet<i32>) -> BTreeSet<i32> {
    // Where /proc cannot be read, nobody is found who is not known yet.
    let all: Vec<(i32, i32, i32)> = all()
        .unwrap_or_default()
        .into_iter()
        .filter_map(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The name in brackets may hold anything: count from the last bracket.
            let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
            let state = fields.next()?;
            let (parent, _group, session) =
                (fields.next()?.parse().ok()?, fields.next()?, fields.next()?.parse().ok()?);
            (state != "Z").then_some((pid, parent, session))
        })
        .collect();
    let mut found = BTreeSet::new();
    loop {
        let ours = |pid: &i32| of.contains(pid) || found.contains(pid);
        let more: Vec<i32> = all
            .iter()
            .filter(|(pid, parent, session)| !ours(pid) && (ours(parent) || ours(session)))
            .map(|(pid, ..)| *pid)
            .collect();
        if more.is_empty() {
            return found;
        }
        found.extend(more);
    }
}
