//! Running commands in a sandbox, for tests: a policy, short ways to a command and its whole output, and the host's
//! list of processes. Which backend it is, is the test's to say.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use coinop::sandbox::{Command, Error, Event, Exit, Limit, Network, Policy, Process, Sandbox, Tree};

/// A base of the test's own.
#[derive(Debug)]
pub struct Folder(pub PathBuf);

impl Tree for Folder {
    fn path(&self) -> &Path {
        &self.0
    }
}

/// Enough for every case that is not about a limit.
pub fn policy() -> Policy {
    Policy {
        wall_ms: 60_000,
        idle_ms: 30_000,
        memory_bytes: 256 << 20,
        swap_bytes: 0,
        pids: 64,
        cpu_milli: 2000,
        disk_bytes: 64 << 20,
        inodes: 5000,
        open_files: 128,
        output_bytes: 1 << 20,
        output_bytes_per_s: 1 << 30,
        network: Network::None,
    }
}

/// All that a command said, and its end; `None` where it had none of its own.
#[derive(Debug)]
pub struct Ran {
    pub out: String,
    pub err: String,
    pub exit: Option<Exit>,
}

impl Ran {
    /// Its output, if it succeeded.
    pub fn ok(self) -> String {
        assert_eq!(self.exit, Some(Exit::Code { code: 0 }), "{}\n{}", self.out, self.err);
        self.out
    }

    /// The number that is all of its output.
    pub fn number(self) -> u64 {
        let said = self.ok();
        said.trim().parse().unwrap_or_else(|_| panic!("not a number: {said}"))
    }

    pub fn hit(&self, limit: Limit) {
        assert_eq!(self.exit, Some(Exit::Limit { limit }), "{self:?}");
    }
}

/// Reads a command to its end; nothing may come after its exit.
pub async fn collect(process: Process) -> Ran {
    let (out, err, exit) = collect_bytes(process).await;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { out: text(out), err: text(err), exit }
}

/// The same for output that is no text: stdout, stderr, exit.
pub async fn collect_bytes(mut process: Process) -> (Vec<u8>, Vec<u8>, Option<Exit>) {
    let (mut out, mut err, mut exit) = (Vec::new(), Vec::new(), None);
    while let Some(event) = process.events.recv().await {
        assert!(exit.is_none(), "something came after the exit: {event:?}");
        match event {
            Event::Stdout(bytes) => out.extend(bytes),
            Event::Stderr(bytes) => err.extend(bytes),
            Event::Exit(how) => exit = Some(how),
        }
    }
    (out, err, exit)
}

/// What it leaves running goes on: cases look at what a sandbox does with it.
pub fn words<'a>(words: impl IntoIterator<Item = &'a str>) -> Command {
    let argv = words.into_iter().map(str::to_owned).collect();
    Command { argv, keep_background: true, ..Command::default() }
}

pub async fn run(sandbox: &dyn Sandbox, command: Command) -> Ran {
    collect(sandbox.exec(command).await.unwrap()).await
}

pub async fn sh(sandbox: &dyn Sandbox, script: &str) -> Ran {
    run(sandbox, words(["sh", "-c", script])).await
}

pub fn is_gone<T>(asked: Result<T, Error>) -> bool {
    matches!(asked, Err(Error::Gone(_)))
}

/// Living processes of the whole host whose command line holds this text.
pub fn processes_with(text: &str) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains(text).then_some(pid)
        })
        .collect()
}

/// A number of seconds that no other process of this host sleeps; whole ones, as every `sleep` takes.
pub fn unique_sleep() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{}", (100_000 + std::process::id()) * 100 + next % 100)
}
