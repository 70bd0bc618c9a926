//! What the tests of the docker backend share: an engine or a skip, one policy, and how a command is run to its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use coinop::sandbox::docker::{Docker, Options};
use coinop::sandbox::{Backend, Command, Error, Event, Exit, Network, Policy, Process, Sandbox, Spec, Tree};

use crate::engine;

/// The engine's address, or the test is skipped by its name.
macro_rules! engine {
    () => {
        match crate::engine::host(std::thread::current().name().unwrap_or("a test")) {
            Some(host) => host,
            None => return,
        }
    };
}

pub const IMAGE: &str = "coinop-test:busybox";

pub fn policy() -> Policy {
    Policy {
        wall_ms: 60_000,
        idle_ms: 30_000,
        memory_bytes: 128 << 20,
        swap_bytes: 0,
        pids: 32,
        cpu_milli: 1000,
        disk_bytes: 32 << 20,
        inodes: 2000,
        open_files: 128,
        output_bytes: 1 << 20,
        output_bytes_per_s: 1 << 30,
        network: Network::None,
    }
}

/// A name that no other test gives its node.
pub fn name(test: &str) -> String {
    format!("{test}{}", std::process::id())
}

pub async fn backend(host: &str, node: &str, image: &str, warm: usize) -> Result<Docker, Error> {
    let host = Some(host.to_owned());
    Docker::connect(Options { host, warm, ..Options::new(image, node) }).await
}

pub async fn sandbox(backend: &Docker) -> Box<dyn Sandbox> {
    backend.create(Spec { id: "t".to_owned(), base: None, policy: policy() }).await.unwrap()
}

pub async fn run(sandbox: &dyn Sandbox, argv: &[&str]) -> (String, Option<Exit>) {
    let argv = argv.iter().map(|word| (*word).to_owned()).collect();
    let command = Command { argv, keep_background: true, ..Command::default() };
    let mut process = sandbox.exec(command).await.unwrap();
    let (mut out, mut exit) = (Vec::new(), None);
    while let Some(event) = process.events.recv().await {
        match event {
            Event::Stdout(bytes) | Event::Stderr(bytes) => out.extend(bytes),
            Event::Exit(how) => exit = Some(how),
        }
    }
    (String::from_utf8_lossy(&out).into_owned(), exit)
}

/// The containers of a node, running or not, as the engine tells them.
pub fn containers(host: &str, node: &str) -> Vec<serde_json::Value> {
    let filter = format!("%7B%22label%22%3A%5B%22coinop.node%3D{node}%22%5D%7D");
    let answer = engine::get(host, &format!("/containers/json?all=1&filters={filter}")).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    serde_json::from_str(body).unwrap_or_else(|why| panic!("{why}: {answer}"))
}

/// Waits for something to become true; at most 20 s, for a busy machine.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let late = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < late, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A folder of this test's own as a base.
#[derive(Debug)]
pub struct Base(pub tempfile::TempDir);

impl Base {
    pub fn new() -> Base {
        Base(tempfile::tempdir().unwrap())
    }
}

impl Tree for Base {
    fn path(&self) -> &std::path::Path {
        self.0.path()
    }
}

pub async fn sandbox_with(backend: &Docker, policy: Policy, base: Option<Base>) -> Box<dyn Sandbox> {
    let base = base.map(|base| Arc::new(base) as Arc<dyn Tree>);
    backend.create(Spec { id: "t".to_owned(), base, policy }).await.unwrap()
}

/// A command of a shell, started.
pub async fn start(sandbox: &dyn Sandbox, script: &str, timeout: Option<Duration>, stdin: bool) -> Process {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    sandbox.exec(Command { argv, timeout, stdin, keep_background: true, ..Command::default() }).await.unwrap()
}

/// Everything it still has to say, and its end; at most 30 s.
pub async fn rest(process: &mut Process) -> (Vec<u8>, Option<Exit>) {
    let all = async {
        let (mut out, mut exit) = (Vec::new(), None);
        while let Some(event) = process.events.recv().await {
            match event {
                Event::Stdout(bytes) | Event::Stderr(bytes) => out.extend(bytes),
                Event::Exit(how) => exit = Some(how),
            }
        }
        (out, exit)
    };
    soon("the end of a command", all).await
}

/// What must not hang.
pub async fn soon<T>(what: &str, act: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(Duration::from_secs(30), act).await;
    done.unwrap_or_else(|_| panic!("this hangs: {what}"))
}

pub async fn sh(sandbox: &dyn Sandbox, script: &str) -> (String, Option<Exit>) {
    let (out, exit) = rest(&mut start(sandbox, script, None, false).await).await;
    (String::from_utf8_lossy(&out).into_owned(), exit)
}

pub const OK: Option<Exit> = Some(Exit::Code { code: 0 });
