//! The backends under attack, one column each, and what a case is given: sandboxes with the attack program in their
//! workspace. A column's backend lives for the whole run, so that what one attack leaves would show in the next.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use coinop::sandbox::docker::{self, Docker};
use coinop::sandbox::local::{Local, Options};
use coinop::sandbox::{Backend, Command, Event, Exit, Network, Policy, Process, Sandbox, Spec, Tree};
use libtest_mimic::Failed;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use crate::case::{Case, Outcome};
use crate::{engine, plain};

/// Where it stands, this program runs the case of that name on `local` as the user it is.
pub const ALONE: &str = "COINOP_HOSTILE_CASE";
/// `nobody`, whom no host gives anything.
const NOBODY: u32 = 65_534;
const IMAGE: &str = "coinop-test:busybox";
/// What stands in the file that the node has open while it starts sandboxes.
pub const OPEN_SECRET: &str = "kept-open-by-the-node";

#[derive(Clone, Copy)]
pub struct Column {
    pub name: &'static str,
    make: fn() -> Result<Ground, String>,
    user: Option<u32>,
}

pub fn columns() -> Vec<Column> {
    let mut all = vec![Column { name: "local", make: local, user: None }];
    if nix::unistd::geteuid().is_root() {
        all.push(Column { name: "ordinary", make: local, user: Some(NOBODY) });
    }
    all.push(Column { name: "docker", make: docker, user: None });
    all
}

/// A backend, or why it is not to be had here.
type Made = Result<Arc<Ground>, String>;

/// Backends of this run, by column.
static MADE: Mutex<Vec<(&'static str, Made)>> = Mutex::new(Vec::new());

impl Column {
    /// # Errors
    /// When the case fails in a process of its own; in this one it panics.
    pub fn run(&self, case: Case, on: fn(&Ground, Case) -> Outcome) -> Result<Outcome, Failed> {
        match self.user {
            Some(user) => as_user(user, case.name),
            None => Ok(self.ground().and_then(|ground| on(&ground, case))),
        }
    }

    /// A backend that no other case uses.
    pub fn new_ground(&self) -> Result<Ground, String> {
        (self.make)()
    }

    fn ground(&self) -> Made {
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, ground)) = made.iter().find(|(name, _)| *name == self.name) {
            return ground.clone();
        }
        let ground = (self.make)().map(Arc::new);
        made.push((self.name, ground.clone()));
        ground
    }
}

/// Ends all backends of this run.
pub fn close() {
    MADE.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

#[derive(Debug)]
pub struct Folder(pub PathBuf);

impl Tree for Folder {
    fn path(&self) -> &Path {
        &self.0
    }
}

pub struct Ground {
    pub name: &'static str,
    pub backend: Arc<dyn Backend>,
    pub dir: TempDir,
    /// The attack program, alone.
    pub base: Arc<Folder>,
    /// The engine's address and this node's name there.
    pub engine: Option<(String, String)>,
    /// Whether memory is watched by the node, as where there is no cgroup.
    pub watched: bool,
    /// Left open for every child of this process, as a careless library would.
    _open: OwnedFd,
    pub runtime: Runtime,
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn bare() -> Result<(TempDir, Arc<Folder>, OwnedFd), String> {
    let program = plain::program()?;
    let dir = plain::readable();
    let base = dir.path().join("base");
    std::fs::create_dir(&base).unwrap();
    std::fs::copy(&program.path, base.join(&program.name)).unwrap();
    let open = dir.path().join(OPEN_SECRET);
    std::fs::write(&open, OPEN_SECRET).unwrap();
    let open: OwnedFd = std::fs::File::open(open).unwrap().into();
    fcntl(&open, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    Ok((dir, Arc::new(Folder(base)), open))
}

/// The program whose `jail-init` is attacked.
pub fn helper() -> PathBuf {
    std::env::var_os("COINOP_TEST_HELPER").map_or_else(|| env!("CARGO_BIN_EXE_coinop").into(), PathBuf::from)
}

pub fn local() -> Result<Ground, String> {
    let (dir, base, open) = bare()?;
    let runtime = runtime();
    let options = Options { helper: Some(helper()), ..Options::new(dir.path().join("state")) };
    let local = runtime.block_on(async { Local::new(options) }).map_err(|why| why.to_string())?;
    local.admit(&policy()).map_err(|why| why.to_string())?;
    let watched =
        local.checks().iter().any(|check| check.name == "memory_bytes" && check.how.starts_with("watched"));
    let backend = Arc::new(local);
    Ok(Ground { name: "local", backend, dir, base, engine: None, watched, _open: open, runtime })
}

/// How the docker backend is reached by a node of this name.
pub async fn dial(host: &str, node: &str) -> Result<Docker, String> {
    let options = docker::Options { host: Some(host.to_owned()), ..docker::Options::new(IMAGE, node) };
    Docker::connect(options).await.map_err(|why| why.to_string())
}

fn docker() -> Result<Ground, String> {
    let (dir, base, open) = bare()?;
    let host = engine::host("hostile::docker").ok_or("no Docker Engine")?;
    let (node, runtime) = (format!("hostile{}", std::process::id()), runtime());
    let docker = runtime.block_on(dial(&host, &node))?;
    docker.admit(&policy()).map_err(|why| why.to_string())?;
    let (backend, engine) = (Arc::new(docker), Some((host, node)));
    Ok(Ground { name: "docker", backend, dir, base, engine, watched: false, _open: open, runtime })
}

pub fn policy() -> Policy {
    Policy {
        wall_ms: 120_000,
        idle_ms: 60_000,
        memory_bytes: 64 << 20,
        swap_bytes: 0,
        pids: 24,
        cpu_milli: 1000,
        disk_bytes: 8 << 20,
        inodes: 400,
        open_files: 64,
        output_bytes: 1 << 20,
        output_bytes_per_s: 1 << 30,
        network: Network::None,
    }
}

impl Ground {
    /// A sandbox over the attack program.
    pub async fn sandbox(&self, policy: Policy) -> Box<dyn Sandbox> {
        self.over(self.base.clone(), policy).await
    }

    pub async fn over(&self, base: Arc<Folder>, policy: Policy) -> Box<dyn Sandbox> {
        static NUMBERS: AtomicU32 = AtomicU32::new(0);
        let id = format!("hostile-{}", NUMBERS.fetch_add(1, Ordering::Relaxed));
        self.backend.create(Spec { id, base: Some(base), policy }).await.unwrap()
    }
}

/// The attack program's command line.
pub fn attack(words: &[&str], mark: &str) -> Command {
    let program = plain::program().expect("made before");
    let argv = std::iter::once(format!("/workspace/{}", program.name))
        .chain(words.iter().map(|word| (*word).to_owned()))
        .chain(std::iter::once(mark.to_owned()));
    Command { argv: argv.collect(), keep_background: true, ..Command::default() }
}

/// All that a process said, and its exit.
pub async fn collect(mut process: Process) -> (String, Option<Exit>) {
    let (mut said, mut exit) = (Vec::new(), None);
    while let Some(event) = process.events.recv().await {
        match event {
            Event::Stdout(bytes) | Event::Stderr(bytes) => said.extend(bytes),
            Event::Exit(how) => exit = Some(how),
        }
    }
    (String::from_utf8_lossy(&said).into_owned(), exit)
}

/// What a process said until it said that it is ready, or its exit.
pub async fn collect_until_ready(mut process: Process) -> (String, Option<Exit>) {
    let mut said = String::new();
    while let Some(event) = process.events.recv().await {
        match event {
            Event::Stdout(bytes) | Event::Stderr(bytes) => said.push_str(&String::from_utf8_lossy(&bytes)),
            Event::Exit(how) => return (said, Some(how)),
        }
        if said.contains("ready") {
            break;
        }
    }
    (said, None)
}

/// Runs an attack to its end.
pub async fn run(sandbox: &dyn Sandbox, words: &[&str]) -> (String, Option<Exit>) {
    let running = sandbox.exec(attack(words, "unmarked")).await.unwrap();
    tokio::time::timeout(crate::host::PATIENCE, collect(running)).await.expect("it ends in time")
}

/// How long one small command takes in a sandbox.
pub async fn echo(sandbox: &dyn Sandbox) -> Duration {
    let started = Instant::now();
    let (said, exit) = run(sandbox, &["say"]).await;
    assert_eq!((said.as_str(), exit), ("said\n", Some(Exit::Code { code: 0 })));
    started.elapsed()
}

/// Runs a case in a process of this user, who owns nothing but a folder for temporary files.
fn as_user(uid: u32, case: &str) -> Result<Outcome, Failed> {
    let home = tempfile::Builder::new().prefix("coinop-hostile").tempdir_in("/var/tmp").unwrap();
    std::os::unix::fs::chown(home.path(), Some(uid), Some(uid)).unwrap();
    let copy = plain::readable();
    let helper_copy = copy.path().join("coinop");
    std::fs::copy(helper(), &helper_copy).unwrap();
    // By this link a user may start the program even where its path is closed to others.
    let mut child = std::process::Command::new("/proc/self/exe");
    child.env(ALONE, case).env("COINOP_TEST_HELPER", &helper_copy);
    child.env("TMPDIR", home.path()).env("HOME", home.path()).current_dir("/");
    let output = match child.uid(uid).gid(uid).output() {
        Err(why) if why.kind() == ErrorKind::PermissionDenied => {
            return Ok(Err("this program's file is closed to other users".to_owned()));
        }
        output => output?,
    };
    let said = String::from_utf8_lossy(&output.stdout);
    match said.lines().last().map(serde_json::from_str) {
        Some(Ok(outcome)) if output.status.success() => Ok(outcome),
        _ => Err(Failed::from(format!("{said}{}", String::from_utf8_lossy(&output.stderr)))),
    }
}
