//! `bench memory`: what a node of its own process keeps when idle, and what each running job adds to the node
//! and to the helper processes of its sandbox. The job's own program is not counted. Linux's proportional
//! set size, so that pages shared between the processes count once.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nostr_sdk::prelude::{Filter, Keys, Kind};
use serde::Serialize;
use tokio::process::{Child, Command};

use crate::protocol::draft::Draft;
use crate::relay::{Client, Wire, local::LocalRelay};
use crate::repo::serve;

pub const IDLE_GOAL_BYTES: u64 = 30 << 20;
pub const JOB_GOAL_BYTES: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub struct Options {
    /// Jobs that run at once for the second figure.
    pub jobs: usize,
    /// An empty folder for the bench alone.
    pub dir: PathBuf,
    /// The program to start as the node; by default the one that is running.
    pub program: Option<PathBuf>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Of the node's process, after it has served one job.
    pub idle_rss_bytes: u64,
    /// The same node with its helper processes and the sandboxes it keeps built ahead, shared pages once.
    pub idle_with_helpers_bytes: u64,
    pub idle_goal_bytes: u64,
    pub jobs: usize,
    /// Growth of the node and its helper processes together, a running job.
    pub per_job_bytes: u64,
    pub per_job_goal_bytes: u64,
    pub met: bool,
}

/// Measures.
///
/// # Errors
/// A node that does not start, or jobs that do not run.
pub async fn run(options: &Options) -> anyhow::Result<Report> {
    let data = options.dir.join("node");
    let mut node = Node::start(options.program.as_deref(), &options.dir, &data, options.jobs).await?;
    node.serve_one().await?;
    let idle = node.settled().await?;
    let idle_rss_bytes = node.rss_bytes()?;
    ensure!(workers(node.pid)?.1 == 0, "a sandbox was left behind");
    for n in 0..options.jobs {
        node.post(format!("exec sleep 9{n:03}")).await?;
    }
    let deadline = Instant::now() + PATIENCE;
    while workers(node.pid)?.1 < options.jobs {
        ensure!(Instant::now() < deadline, "the jobs did not all start");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let busy = node.settled().await?;
    node.end().await?;
    let per_job_bytes = busy.saturating_sub(idle) / options.jobs.max(1) as u64;
    Ok(Report {
        idle_rss_bytes,
        idle_with_helpers_bytes: idle,
        idle_goal_bytes: IDLE_GOAL_BYTES,
        jobs: options.jobs,
        per_job_bytes,
        per_job_goal_bytes: JOB_GOAL_BYTES,
        met: idle_rss_bytes.max(idle) <= IDLE_GOAL_BYTES && per_job_bytes <= JOB_GOAL_BYTES,
    })
}

/// A node of its own process, with a relay and a repository beside it and a customer to order from it.
pub(super) struct Node {
    child: Child,
    pid: u32,
    client: Client,
    keys: Keys,
    repo: String,
    _relay: LocalRelay,
    _server: serve::Server,
}

impl Node {
    /// Starts `program`, by default the one that is running, on the data folder `data`; `dir` is for the repository.
    pub(super) async fn start(
        program: Option<&Path>,
        dir: &Path,
        data: &Path,
        jobs: usize,
    ) -> anyhow::Result<Node> {
        let relay = LocalRelay::start().await?;
        let repo = dir.join("repo");
        std::fs::create_dir_all(&repo)?;
        serve::sample_repo(&repo, &[("README.md", "# A repository\n")])?;
        let server = serve::start(&[repo], ([127, 0, 0, 1], 0).into()).await?;
        let program = match program {
            Some(program) => program.to_path_buf(),
            None => std::env::current_exe().context("cannot find this program")?,
        };
        let child = start(&program, data, &relay.url(), jobs)?;
        let pid = child.id().context("the node ended at once")?;
        let client = Client::connect(&[relay.url()], None, true, Wire::default(), PATIENCE).await?;
        let keys = Keys::generate();
        Ok(Node { child, pid, client, keys, repo: server.url(), _relay: relay, _server: server })
    }

    async fn post(&self, command: String) -> anyhow::Result<()> {
        let draft =
            Draft { kind: 5930, repo: Some(self.repo.clone()), commands: vec![command], ..Draft::default() };
        let request = draft.unsigned(&self.keys, crate::clock::now_s())?.sign_with_keys(&self.keys)?;
        self.client.publish(&request, PATIENCE).await;
        Ok(())
    }

    /// Orders a job of nothing, and waits for its result.
    pub(super) async fn serve_one(&mut self) -> anyhow::Result<()> {
        let mut results = self.client.subscribe(vec![Filter::new().kind(Kind::from(6930u16))]);
        self.post("true".into()).await?;
        tokio::time::timeout(PATIENCE, results.next()).await.context("the node answered no job")?;
        Ok(())
    }

    /// The sum over node and helpers once it has stopped moving: equal to 1 % twice, half a second apart.
    pub(super) async fn settled(&mut self) -> anyhow::Result<u64> {
        let mut last = 0u64;
        for _ in 0..60 {
            if let Some(status) = self.child.try_wait()? {
                bail!("the node ended: {status}");
            }
            let now = workers(self.pid)?.0;
            if now.abs_diff(last) * 100 <= now {
                return Ok(now);
            }
            last = now;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        bail!("the node's memory does not settle")
    }

    pub(super) fn rss_bytes(&self) -> anyhow::Result<u64> {
        rss_bytes(self.pid)
    }

    /// Kills it.
    pub(super) async fn end(mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("cannot end the node")
    }
}

fn start(program: &Path, data: &Path, relay: &str, jobs: usize) -> anyhow::Result<Child> {
    let mut command = Command::new(program);
    command
        .args(["connect", "--nip90", "--relay", relay, "--allow-private-repos", "--data-dir"])
        .arg(data)
        .args(["--max-jobs", &jobs.to_string(), "--log-level", "off"]);
    for (key, value) in
        [("queue.max_running_per_customer", jobs), ("queue.max_open_jobs_per_customer", jobs + 1)]
    {
        command.arg("--set").arg(format!("{key}={value}"));
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    command.spawn().context("cannot start the node")
}

/// Bytes of the node and of every process below it but the jobs' own programs, and how many of those there are.
pub(super) fn workers(pid: u32) -> anyhow::Result<(u64, usize)> {
    let (mut bytes, mut programs) = (0, 0);
    let mut todo = vec![pid];
    while let Some(pid) = todo.pop() {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let name = std::fs::read_to_string(folder.join("comm")).unwrap_or_default();
        if name.trim() == "sleep" {
            programs += 1;
        } else {
            bytes += pss_bytes(&folder);
        }
        let Ok(threads) = std::fs::read_dir(folder.join("task")) else { continue };
        for thread in threads.flatten() {
            let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            todo.extend(children.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
    }
    Ok((bytes, programs))
}

pub(super) fn rss_bytes(pid: u32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    field(&status, "VmRSS:").context("the kernel does not say the node's memory")
}

/// 0 for a process that has just ended.
fn pss_bytes(folder: &Path) -> u64 {
    let rollup = std::fs::read_to_string(folder.join("smaps_rollup")).unwrap_or_default();
    field(&rollup, "Pss:").unwrap_or(0)
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}
