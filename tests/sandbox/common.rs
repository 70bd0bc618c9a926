//! What the sandbox tests share: a backend on this host, a policy, and short ways to run a command.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coinop::sandbox::local::{Local, Options};
use coinop::sandbox::{
    Backend, Command, Error, Event, Exit, Limit, Network, Policy, Process, Sandbox, Spec, Tree,
};

use crate::skip::skip;

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The program whose `jail-init` is tested.
pub fn helper() -> PathBuf {
    std::env::var_os("COINOP_TEST_HELPER").map_or_else(|| env!("CARGO_BIN_EXE_coinop").into(), PathBuf::from)
}

#[derive(Debug)]
pub struct Folder(pub PathBuf);

impl Tree for Folder {
    fn path(&self) -> &Path {
        &self.0
    }
}

pub fn policy() -> Policy {
    Policy {
        wall_ms: 60_000,
        memory_bytes: 256 << 20,
        pids: 64,
        cpu_milli: 2000,
        disk_bytes: 64 << 20,
        inodes: 5000,
        open_files: 128,
        output_bytes: 1 << 20,
        network: Network::None,
    }
}

/// A backend with a state folder and a place for bases of its own.
pub struct Bench {
    pub local: Local,
    pub dir: tempfile::TempDir,
}

/// Starts a backend, or says aloud why the test is skipped. In CI nothing is skipped.
pub fn bench_with(test: &str, warm: usize) -> Option<Bench> {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { helper: Some(helper()), warm, ..Options::new(dir.path().join("state")) };
    let local = Local::new(options).unwrap();
    match local.admit(&policy()) {
        Ok(()) => Some(Bench { local, dir }),
        Err(why) => {
            assert!(std::env::var_os("CI").is_none(), "no local sandbox in CI: {why}");
            skip(test, &why.to_string());
            None
        }
    }
}

/// `let Some(bench) = bench!() else { return }`, with the test's name in the message.
macro_rules! bench {
    () => {
        crate::common::bench_with(std::thread::current().name().unwrap_or("a test"), 0)
    };
}
pub(crate) use bench;

/// The same for a test whose job is written in Python, where the sandbox's own PATH has one.
pub async fn bench_for_python(test: &str) -> Option<Bench> {
    let bench = bench_with(test, 0)?;
    let found = sh(&*bench.sandbox().await, "command -v python3").await;
    if found.exit != Some(Exit::Code { code: 0 }) {
        skip(test, "no python3 inside the sandbox");
        return None;
    }
    Some(bench)
}

macro_rules! python_bench {
    () => {
        crate::common::bench_for_python(std::thread::current().name().unwrap_or("a test")).await
    };
}
pub(crate) use python_bench;

impl Bench {
    pub async fn sandbox(&self) -> Box<dyn Sandbox> {
        self.sandbox_with(policy()).await
    }

    pub async fn sandbox_with(&self, policy: Policy) -> Box<dyn Sandbox> {
        self.local.create(Spec { id: "t".to_owned(), base: None, policy }).await.unwrap()
    }

    /// A sandbox over a base that `fill` has made.
    pub async fn sandbox_over(&self, fill: impl FnOnce(&Path)) -> Box<dyn Sandbox> {
        let base = self.dir.path().join("base");
        std::fs::create_dir(&base).unwrap();
        fill(&base);
        let spec = Spec { id: "t".to_owned(), base: Some(Arc::new(Folder(base))), policy: policy() };
        self.local.create(spec).await.unwrap()
    }

    pub fn memory_is_watched(&self) -> bool {
        self.local
            .checks()
            .iter()
            .any(|check| check.name == "memory_bytes" && check.how.starts_with("watched"))
    }

    pub fn cpu_is_in_cores(&self) -> bool {
        self.local.checks().iter().any(|check| check.name == "cpu_milli" && check.how.starts_with("kept"))
    }
}

#[derive(Debug)]
pub struct Ran {
    pub out: String,
    pub err: String,
    pub exit: Option<Exit>,
}

impl Ran {
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

pub async fn collect(mut process: Process) -> Ran {
    let (mut out, mut err, mut exit) = (Vec::new(), Vec::new(), None);
    while let Some(event) = process.events.recv().await {
        assert!(exit.is_none(), "something came after the exit: {event:?}");
        match event {
            Event::Stdout(bytes) => out.extend(bytes),
            Event::Stderr(bytes) => err.extend(bytes),
            Event::Exit(how) => exit = Some(how),
        }
    }
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { out: text(out), err: text(err), exit }
}

pub fn words<'a>(words: impl IntoIterator<Item = &'a str>) -> Command {
    Command { argv: words.into_iter().map(str::to_owned).collect(), ..Command::default() }
}

pub async fn run(sandbox: &dyn Sandbox, command: Command) -> Ran {
    collect(sandbox.exec(command).await.unwrap()).await
}

pub async fn sh(sandbox: &dyn Sandbox, script: &str) -> Ran {
    run(sandbox, words(["sh", "-c", script])).await
}

pub async fn python(sandbox: &dyn Sandbox, script: &str) -> Ran {
    run(sandbox, words(["python3", "-c", script])).await
}

pub fn is_gone<T>(asked: Result<T, Error>) -> bool {
    matches!(asked, Err(Error::Gone(_)))
}

/// Waits for something to become true; at most 20 s, for a busy machine.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < until, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
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

/// A number of seconds that no other process of this host sleeps.
pub fn unique_sleep() -> String {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let next = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    format!("{}.{next:03}", 100_000 + std::process::id())
}
