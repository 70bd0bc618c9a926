//! What the sandbox tests share: a backend on this host, and Python in it. Running commands is `running`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coinop::sandbox::local::{Local, Options};
use coinop::sandbox::{Backend, Exit, Policy, Sandbox, Spec};

pub use crate::running::{
    Folder, Ran, collect, is_gone, policy, processes_with, run, sh, unique_sleep, words,
};
use crate::skip::skip;

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The program whose `jail-init` is tested.
pub fn helper() -> PathBuf {
    std::env::var_os("COINOP_TEST_HELPER").map_or_else(|| env!("CARGO_BIN_EXE_coinop").into(), PathBuf::from)
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

pub async fn python(sandbox: &dyn Sandbox, script: &str) -> Ran {
    run(sandbox, words(["python3", "-c", script])).await
}

/// Waits for something to become true; at most 20 s, for a busy machine.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < until, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
