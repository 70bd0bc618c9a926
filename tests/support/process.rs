//! The binary as an operator runs it: `coinop connect --nip90` as a child process with its own data folder and
//! key, killed or ended by its pid, its log in a file, its state read from the log of its store.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use coinop::control::{self, Ask};
use coinop::store::{JobRow, Store};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nostr_sdk::prelude::Keys;
use tempfile::TempDir;

use super::{PATIENCE, until_within};

/// A node's folder, key and command line; it may be started again and again.
pub struct Home {
    pub keys: Keys,
    pub data: PathBuf,
    args: Vec<String>,
    dir: TempDir,
    lives: std::sync::atomic::AtomicU32,
}

/// One life of the node.
pub struct Running {
    child: Child,
    /// The child is a program that watches the node.
    watched: bool,
    data: PathBuf,
    log: PathBuf,
}

impl Home {
    /// `more` are flags after the usual ones.
    pub fn new(relays: &[String], more: &[&str]) -> Home {
        let dir = tempfile::tempdir().expect("a folder for the node");
        let data = dir.path().join("data");
        Home::over(dir, data, relays, more)
    }

    /// With the data in a folder of the caller's.
    pub fn over(dir: TempDir, data: PathBuf, relays: &[String], more: &[&str]) -> Home {
        Home::of(Keys::generate(), dir, data, relays, more)
    }

    /// Another folder with the same key.
    pub fn twin(&self, relays: &[String]) -> Home {
        let dir = tempfile::tempdir().expect("a folder for the node");
        let data = dir.path().join("data");
        Home::of(self.keys.clone(), dir, data, relays, &[])
    }

    /// Another key on the same folder.
    pub fn heir(&self, relays: &[String]) -> Home {
        let dir = tempfile::tempdir().expect("a folder for the key");
        Home::of(Keys::generate(), dir, self.data.clone(), relays, &[])
    }

    fn of(keys: Keys, dir: TempDir, data: PathBuf, relays: &[String], more: &[&str]) -> Home {
        let key = dir.path().join("key");
        coinop::keys::create(&key, &keys, None).expect("a key file");
        let mut args: Vec<String> =
            ["connect", "--nip90", "--allow-private-repos", "--data-dir"].map(str::to_string).to_vec();
        args.push(data.display().to_string());
        args.extend(["--set".into(), format!("key_file={}", key.display())]);
        for relay in relays {
            args.extend(["--relay".into(), relay.clone()]);
        }
        args.extend(more.iter().map(|flag| (*flag).to_string()));
        Home { keys, data, args, dir, lives: 0.into() }
    }

    pub fn start(&self) -> Running {
        self.start_under(&[])
    }

    /// Starts it as an argument of another program, such as strace.
    pub fn start_under(&self, program: &[String]) -> Running {
        let life = self.lives.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let log = self.dir.path().join(format!("log-{life}"));
        let out = File::create(&log).expect("a file for its log");
        let mut words = program.to_vec();
        words.push(env!("CARGO_BIN_EXE_coinop").into());
        words.extend(self.args.iter().cloned());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null());
        // Nothing of the tester's own configuration.
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", self.dir.path());
        command.stdout(out.try_clone().expect("the same file")).stderr(out);
        let child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", words[0]));
        Running { child, watched: !program.is_empty(), data: self.data.clone(), log }
    }

    /// What the log of the store says, whether a node runs or not.
    pub fn store(&self) -> Store {
        Store::read_only(&self.data).expect("a store that can be read")
    }

    /// A job by its log; `None` before there is one.
    pub fn job(&self, id: &str) -> Option<JobRow> {
        Store::read_only(&self.data).ok()?.job(id).expect("a readable job")
    }
}

impl Running {
    /// Ends it at once, with whatever was started to watch it.
    pub async fn kill(mut self) {
        self.child.kill().expect("it can be killed");
        self.ended(PATIENCE).await;
    }

    /// SIGTERM to the node itself.
    pub fn terminate(&self) {
        signal(self.pid(), Signal::SIGTERM);
    }

    /// SIGTERM once it serves, and its end.
    pub async fn stop(mut self) -> ExitStatus {
        super::until("the node to serve", async || {
            let ended = self.try_ended();
            assert!(ended.is_none(), "the node ended at its start, {ended:?}:\n{}", tail(&self.log));
            self.status()
        })
        .await;
        self.terminate();
        let status = self.ended(PATIENCE).await;
        if !status.success() {
            eprintln!("{status}:\n{}", tail(&self.log));
        }
        status
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// With its log, when it goes on.
    pub async fn ended(&mut self, within: Duration) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.try_ended() {
                return status;
            }
            let waited = started.elapsed();
            assert!(waited < within, "the node goes on after {waited:?}; it says:\n{}", tail(&self.log));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// How it ended, if it did.
    pub fn try_ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our child")
    }

    /// What it answers on its control socket; `None` while it does not.
    pub fn status(&self) -> Option<serde_json::Value> {
        control::ask(&self.data, &Ask::Status).ok()
    }

    pub fn pid(&self) -> u32 {
        self.node().unwrap_or(self.child.id())
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The node's pid when another program started it for us.
    fn node(&self) -> Option<u32> {
        if !self.watched {
            return None;
        }
        let watcher = self.child.id();
        processes().into_iter().find(|p| p.parent == watcher && p.name() == "coinop").map(|p| p.pid)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            if let Some(node) = self.node() {
                signal(node, Signal::SIGKILL);
            }
            self.child.kill().unwrap_or_else(|error| eprintln!("not killed: {error}"));
            self.child.wait().map(drop).unwrap_or_else(|error| eprintln!("not waited for: {error}"));
        }
    }
}

fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid"));
    kill(pid, signal).unwrap_or_else(|error| eprintln!("{signal} to {pid}: {error}"));
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}

/// One process of this machine.
#[derive(Debug)]
pub struct Process {
    pub pid: u32,
    pub parent: u32,
    pub words: Vec<String>,
}

impl Process {
    fn name(&self) -> &str {
        self.words.first().map_or("", |word| word.rsplit('/').next().unwrap_or(word))
    }
}

/// Everything that runs here.
pub fn processes() -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    entries.filter_map(|entry| read_process(entry.file_name().to_str()?.parse().ok()?)).collect()
}

fn read_process(pid: u32) -> Option<Process> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let parent = rest.split_whitespace().nth(1)?.parse().ok()?;
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words = words.split(|byte| *byte == 0).filter(|word| !word.is_empty());
    let words = words.map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    Some(Process { pid, parent, words })
}

/// A `sleep` that a job runs and that can be told from every other: the test sees it from outside, and lets the
/// job go on by ending it.
pub struct Nap {
    length: String,
}

impl Nap {
    pub fn new() -> Nap {
        let mark = u64::from_str_radix(&Keys::generate().public_key().to_hex()[..10], 16).expect("hex");
        Nap { length: format!("600.{mark:013}") }
    }

    /// The command for the job; a success however the nap ends.
    pub fn command(&self) -> String {
        format!("sleep {} || true", self.length)
    }

    fn pids(&self) -> Vec<u32> {
        let is_ours = |p: &Process| p.name() == "sleep" && p.words.get(1) == Some(&self.length);
        processes().into_iter().filter(is_ours).map(|p| p.pid).collect()
    }

    pub async fn begun(&self) {
        super::until("the job's command to run", async || (!self.pids().is_empty()).then_some(())).await;
    }

    pub async fn gone(&self, within: Duration) {
        until_within(within, "the sandbox's processes to be gone", async || {
            self.pids().is_empty().then_some(())
        })
        .await;
    }

    pub fn is_running(&self) -> bool {
        !self.pids().is_empty()
    }

    /// Ends the nap; the job goes on with its next command.
    pub async fn wake(&self) {
        self.begun().await;
        for pid in self.pids() {
            signal(pid, Signal::SIGKILL);
        }
        self.gone(PATIENCE).await;
    }
}
