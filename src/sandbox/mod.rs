//! The sandbox room: the trait every backend implements, and the policy that it must enforce or refuse.
//! It runs commands and hands out files; it knows nothing of jobs, money or Nostr.

pub mod docker;
mod ending;
mod found;
mod idle;
pub mod local;
mod place;
pub mod selftest;
pub mod sim;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// What a job may use. A backend enforces every clause, or refuses the job by name (law 3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Wall time of the whole sandbox, from `create`.
    pub wall_ms: u64,
    /// While a command runs: for so long none of the sandbox's commands printed anything or was given anything on stdin,
    /// none began or ended, and all its processes together used less than a hundredth of the processor time that they may
    /// have (of one core, where that is more). Ends the commands, not the sandbox. As much as `wall_ms` or more never
    /// ends anything.
    pub idle_ms: u64,
    /// Memory of all processes together, file pages of tmpfs included.
    pub memory_bytes: u64,
    /// Swap beyond that: memory and swap together hold no more than both. 0: what is swapped out counts as memory.
    pub swap_bytes: u64,
    /// Processes and threads together.
    pub pids: u32,
    /// Thousandths of a core.
    pub cpu_milli: u32,
    /// Bytes that the job may write: workspace, /tmp and home together.
    pub disk_bytes: u64,
    /// Files and folders that the job may make.
    pub inodes: u64,
    /// Open files a process.
    pub open_files: u32,
    /// Bytes of stdout and stderr together, over all commands; more ends the command.
    pub output_bytes: u64,
    /// Bytes a second of the same, as an average over more than a second's worth. A command that prints faster waits in its
    /// `write`; what stands in its pipes when it ends is taken at once, so that no end waits.
    pub output_bytes_per_s: u64,
    pub network: Network,
}

impl Policy {
    /// What no backend can make a sandbox of.
    ///
    /// # Errors
    /// `BadPolicy`, naming the clause and its least value.
    pub fn usable(&self) -> Result<(), Error> {
        let least: [(bool, &str); 9] = [
            (self.wall_ms >= 1, "wall_ms must be at least 1"),
            (self.idle_ms >= 500, "idle_ms must be at least 500"),
            (self.memory_bytes >= 8 << 20, "memory_bytes must be at least 8 MiB"),
            (self.pids >= 1, "pids must be at least 1"),
            (self.cpu_milli >= 10, "cpu_milli must be at least 10"),
            (self.disk_bytes >= 64 << 10, "disk_bytes must be at least 64 KiB"),
            (self.inodes >= 1, "inodes must be at least 1"),
            (self.open_files >= 8, "open_files must be at least 8"),
            (self.output_bytes_per_s >= 1024, "output_bytes_per_s must be at least 1 KiB"),
        ];
        match least.into_iter().find(|(usable, _)| !usable) {
            Some((_, what)) => Err(Error::BadPolicy(what.to_owned())),
            None => Ok(()),
        }
    }

    /// The same policy with no clause above the ceiling's.
    pub fn capped(&self, ceiling: &Policy) -> Policy {
        Policy {
            wall_ms: self.wall_ms.min(ceiling.wall_ms),
            idle_ms: self.idle_ms.min(ceiling.idle_ms),
            memory_bytes: self.memory_bytes.min(ceiling.memory_bytes),
            swap_bytes: self.swap_bytes.min(ceiling.swap_bytes),
            pids: self.pids.min(ceiling.pids),
            cpu_milli: self.cpu_milli.min(ceiling.cpu_milli),
            disk_bytes: self.disk_bytes.min(ceiling.disk_bytes),
            inodes: self.inodes.min(ceiling.inodes),
            open_files: self.open_files.min(ceiling.open_files),
            output_bytes: self.output_bytes.min(ceiling.output_bytes),
            output_bytes_per_s: self.output_bytes_per_s.min(ceiling.output_bytes_per_s),
            network: self.network,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// No interface but a loopback of its own.
    None,
    /// Through the egress gateway only. No backend offers it yet.
    Egress,
}

/// What a sandbox is made of.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Names the sandbox on this host: `[a-z0-9-]{1,64}`; the reaper finds leftovers by it.
    pub id: String,
    /// A read-only tree that appears, writable and private, as `/workspace`. `None`: an empty one.
    pub base: Option<Arc<dyn Tree>>,
    pub policy: Policy,
}

impl Spec {
    /// # Errors
    /// `BadPolicy`, when the id cannot name a sandbox.
    fn named(&self) -> Result<(), Error> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if self.id.is_empty() || self.id.len() > 64 || !self.id.chars().all(plain) {
            return Err(Error::BadPolicy(format!("{:?} cannot name a sandbox", self.id)));
        }
        Ok(())
    }
}

/// A read-only folder on this host that stays in place as long as this value lives.
pub trait Tree: Send + Sync + std::fmt::Debug {
    fn path(&self) -> &std::path::Path;
}

/// One command; no shell is implied.
#[derive(Debug, Clone, Default)]
pub struct Command {
    pub argv: Vec<String>,
    /// Relative to `/workspace`; must stay inside it.
    pub cwd: PathBuf,
    /// The whole environment; nothing is inherited. A backend adds PATH, HOME and TMPDIR when absent.
    pub env: BTreeMap<String, String>,
    /// Kills the command, not the sandbox.
    pub timeout: Option<Duration>,
    /// Whether stdin is a pipe (`Process::stdin`) or empty.
    pub stdin: bool,
}

/// A running command.
pub struct Process {
    /// Bytes to its stdin; dropping it closes stdin.
    pub stdin: Option<mpsc::Sender<Vec<u8>>>,
    /// Live output in the order of arrival; the one `Exit` is last. A channel that closes without an
    /// `Exit` means the sandbox died: never a success.
    pub events: mpsc::Receiver<Event>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    Exit(Exit),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "exit", rename_all = "snake_case")]
pub enum Exit {
    Code {
        code: i32,
    },
    Signal {
        signal: i32,
    },
    /// The program could not be started (not found: errno 2; not executable: errno 13).
    NotStarted {
        errno: i32,
    },
    /// The command's own time-out.
    Timeout,
    /// A limit of the policy ended it; `limit` is the clause's field name.
    Limit {
        limit: Limit,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    Wall,
    Idle,
    Memory,
    Output,
}

/// Measured by the kernel or the engine, never by the job.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub wall_ms: u64,
    pub cpu_ms: u64,
    pub peak_memory_bytes: u64,
    pub disk_written_bytes: u64,
}

/// One path under `/workspace` that differs from the base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Relative, raw bytes, no `..`, no empty component.
    pub path: Vec<u8>,
    pub to: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    File {
        bytes: Vec<u8>,
        executable: bool,
    },
    Symlink {
        target: Vec<u8>,
    },
    /// The path (or the whole folder) is gone.
    Deleted,
}

/// What runs the job, said in the result: backend, what stands in for an image, isolation in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub backend: String,
    /// For docker an image digest; for local `os-release` id and version, kernel release, machine.
    pub image: String,
}

/// One clause of the policy, or one need of the backend, on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The clause's field name (`memory_bytes`, …) or a need's name (`user_namespaces`, …).
    pub name: String,
    pub ok: bool,
    /// How it is enforced here, or what is missing.
    pub how: String,
    /// What the operator can do about it.
    pub mend: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The policy cannot be enforced here; the job is refused, never run with less.
    #[error("the {backend} sandbox cannot enforce {clause} here: {why}")]
    Unenforceable { backend: &'static str, clause: &'static str, why: String },
    /// As many are alive as there can be; may be tried again.
    #[error("the {backend} sandbox has no {what} left: all {all} are in use")]
    Full { backend: &'static str, what: &'static str, all: u32 },
    #[error("the policy is not usable: {0}")]
    BadPolicy(String),
    #[error("path {0:?} leaves the workspace or is not a plain file")]
    BadPath(String),
    #[error("no such file in the sandbox: {0}")]
    NotFound(String),
    #[error("{what} is larger than {cap_bytes} bytes")]
    TooLarge { what: String, cap_bytes: u64 },
    #[error("the job left folders more than {cap} deep, at {path:?}")]
    TooDeep { path: String, cap: usize },
    /// The sandbox is no longer there.
    #[error("the sandbox is gone: {0}")]
    Gone(String),
    /// The host failed us, not the job; may be tried again.
    #[error("the sandbox could not {doing}: {source}")]
    Host { doing: &'static str, source: std::io::Error },
}

/// A way to run strangers' code.
#[async_trait]
pub trait Backend: Send + Sync {
    fn identity(&self) -> Identity;
    /// Each clause and need on this host; `doctor` prints it.
    fn checks(&self) -> Vec<Check>;
    /// What jobs find missing here that other hosts give them, in words for the customer.
    fn caveats(&self) -> Vec<String> {
        Vec::new()
    }
    /// Refuses at once what it cannot enforce; makes nothing.
    fn admit(&self, policy: &Policy) -> Result<(), Error>;
    async fn create(&self, spec: Spec) -> Result<Box<dyn Sandbox>, Error>;
    /// Builds ahead what a job with this policy will want, where that helps.
    async fn warm_up(&self, _policy: &Policy) -> Result<(), Error> {
        Ok(())
    }
    /// Removes what an earlier life of this node left behind; returns how many.
    async fn reap(&self) -> Result<usize, Error>;
}

/// One sandbox, for one job of one customer, never used again. Dropping it kills it.
#[async_trait]
pub trait Sandbox: Send + Sync {
    fn id(&self) -> &str;
    /// Starts a command. Several may run at once.
    async fn exec(&self, command: Command) -> Result<Process, Error>;
    /// Reads a plain file under `/workspace`, at most `cap_bytes` long.
    async fn read_file(&self, path: &str, cap_bytes: u64) -> Result<Vec<u8>, Error>;
    /// Writes a file under `/workspace` or under `/job` (read-only for the job); makes its folders.
    async fn write_file(&self, path: &str, bytes: &[u8]) -> Result<(), Error>;
    /// What differs from the base, sorted by path; `.git` at the top is left out.
    async fn changes(&self, cap_bytes: u64) -> Result<Vec<Change>, Error>;
    /// Kills every process inside; the files stay readable until `destroy`.
    async fn kill(&self) -> Result<(), Error>;
    async fn usage(&self) -> Result<Usage, Error>;
    /// Kills, removes everything, and returns the last usage. Safe to call after `kill`.
    async fn destroy(self: Box<Self>) -> Result<Usage, Error>;
}
