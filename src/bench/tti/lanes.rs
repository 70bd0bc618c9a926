//! What a time to interactive is measured of: our sandboxes, cold and from a pool, on this host and on an engine, and
//! what others offer beside them. A lane does one start and one `echo`; when, and how many at once, is said elsewhere.

use std::path::{Path, PathBuf};
use std::process::{Command as Plain, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

use super::Options;
use crate::sandbox::docker::{Docker, Options as DockerOptions};
use crate::sandbox::local::{Local, Options as LocalOptions};
use crate::sandbox::{Backend, Command, Error, Event, Exit, Network, Policy, Spec, Tree};

const PROGRAM: &str = "/bin/echo";
const ARGUMENT: &str = "ready";
/// A start that is not done by then has failed: a hundred at once queue up in an engine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Whose time it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Name {
    /// The program alone, without any sandbox.
    Plain,
    /// The local backend, nothing built ahead.
    Cold,
    /// The local backend, from its pool.
    Warm,
    Bwrap,
    /// The docker backend, from its pool.
    DockerWarm,
    /// The docker backend, nothing started ahead.
    DockerCold,
    /// The engine's own client, hardened by its flags.
    DockerRun,
}

impl Name {
    pub fn as_str(self) -> &'static str {
        match self {
            Name::Plain => "plain",
            Name::Cold => "cold",
            Name::Warm => "warm",
            Name::Bwrap => "bwrap",
            Name::DockerWarm => "docker_warm",
            Name::DockerCold => "docker_cold",
            Name::DockerRun => "docker_run",
        }
    }

    /// Ours: of these every start must succeed.
    pub fn is_sandbox(self) -> bool {
        matches!(self, Name::Cold | Name::Warm | Name::DockerWarm | Name::DockerCold)
    }

    pub fn needs_engine(self) -> bool {
        matches!(self, Name::DockerWarm | Name::DockerCold | Name::DockerRun)
    }

    fn has_pool(self) -> bool {
        matches!(self, Name::Warm | Name::DockerWarm)
    }
}

/// One start.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Of ours until `create` returned, of `docker run` until the line was read; else none.
    pub first: Option<Duration>,
    pub whole: Duration,
}

enum Means {
    Process,
    Sandbox(Arc<dyn Backend>),
}

pub struct Lane {
    pub name: Name,
    means: Means,
    base: Arc<Base>,
    engine: Option<DockerOptions>,
}

/// All lanes of one mode.
pub struct Lanes {
    pub all: Vec<Arc<Lane>>,
    /// Lanes that cannot be had here, and why.
    pub skipped: Vec<(Name, String)>,
    /// Removes what the pool of an engine held.
    sweeper: Option<Arc<Docker>>,
}

#[derive(Debug)]
struct Base(PathBuf);

impl Tree for Base {
    fn path(&self) -> &Path {
        &self.0
    }
}

/// What a usual job may use. Its time is as long as the bench's patience.
pub fn policy() -> Policy {
    Policy {
        wall_ms: 120_000,
        idle_ms: 60_000,
        memory_bytes: 512 << 20,
        swap_bytes: 0,
        pids: 128,
        cpu_milli: 2000,
        disk_bytes: 256 << 20,
        inodes: 100_000,
        open_files: 1024,
        output_bytes: 1 << 20,
        output_bytes_per_s: 1 << 20,
        network: Network::None,
    }
}

pub fn local(options: &Options, folder: &str, warm: usize) -> Result<Local, Error> {
    let state_dir = options.state_dir.join(folder);
    Local::new(LocalOptions { helper: options.helper.clone(), warm, ..LocalOptions::new(state_dir) })
}

impl Lanes {
    /// Makes the lanes that can be had here, `pool` sandboxes in each pool.
    ///
    /// # Errors
    /// A folder that cannot be written, or a local backend that does not start at all.
    pub async fn make(options: &Options, pool: usize) -> Result<Lanes, Error> {
        let host = |doing| move |source| Error::Host { doing, source };
        let base = options.state_dir.join("base");
        std::fs::create_dir_all(&base).map_err(host("make the bench's folder"))?;
        std::fs::write(base.join("README"), "a base\n").map_err(host("make the bench's folder"))?;
        let base = Arc::new(Base(base));
        let mut lanes = Lanes { all: Vec::new(), skipped: Vec::new(), sweeper: None };
        let engine = lanes.reach(options).await;
        for &name in &options.lanes {
            let means = match (name, &engine) {
                (Name::Plain | Name::Bwrap, _) => Ok(Means::Process),
                (Name::Cold, _) => Ok(Means::Sandbox(Arc::new(local(options, "cold", 0)?))),
                (Name::Warm, _) => Ok(Means::Sandbox(Arc::new(local(options, "warm", pool)?))),
                (Name::DockerWarm | Name::DockerCold | Name::DockerRun, Err(why)) => Err(why.clone()),
                (Name::DockerRun, Ok(_)) => Ok(Means::Process),
                (Name::DockerCold, Ok((_, cold))) => Ok(Means::Sandbox(cold.clone())),
                (Name::DockerWarm, Ok((known, _))) => {
                    let warm = Docker::connect(DockerOptions { warm: pool, ..known.clone() }).await;
                    warm.map(|warm| Means::Sandbox(Arc::new(warm))).map_err(|why| why.to_string())
                }
            };
            let engine = engine.as_ref().ok().map(|(known, _)| known.clone());
            let tried = match means {
                Ok(means) => {
                    let lane = Arc::new(Lane { name, means, base: base.clone(), engine });
                    lane.usable().await.map(|()| lane)
                }
                Err(why) => Err(why),
            };
            match tried {
                Ok(lane) => lanes.all.push(lane),
                Err(why) => lanes.skipped.push((name, why)),
            }
        }
        Ok(lanes)
    }

    /// The engine, where a lane wants it and one answers.
    async fn reach(&mut self, options: &Options) -> Result<(DockerOptions, Arc<Docker>), String> {
        let known = options.engine.clone().ok_or("no engine was named")?;
        if !options.lanes.iter().any(|lane| lane.needs_engine()) {
            return Err("no lane wants it".to_owned());
        }
        let cold = Docker::connect(DockerOptions { warm: 0, ..known.clone() }).await;
        let cold = Arc::new(cold.map_err(|why| why.to_string())?);
        self.sweeper = Some(cold.clone());
        Ok((known, cold))
    }

    /// Ends them, and waits until nothing of their pools is left to disturb what comes next.
    pub async fn close(self) {
        drop(self.all);
        let Some(sweeper) = self.sweeper else { return };
        let until = Instant::now() + PATIENCE;
        loop {
            match sweeper.reap().await {
                Ok(0) => return,
                Ok(_) if Instant::now() < until => tokio::time::sleep(Duration::from_millis(50)).await,
                left => return tracing::warn!(?left, "containers of the bench are left on the engine"),
            }
        }
    }
}

impl Lane {
    /// Whether it works here at all.
    async fn usable(&self) -> Result<(), String> {
        match &self.means {
            Means::Sandbox(backend) => backend.admit(&policy()).map_err(|why| why.to_string()),
            Means::Process => self.once("try", Instant::now(), false).await.map(drop),
        }
    }

    /// Fills its pool; afterwards nothing of it is at work.
    ///
    /// # Errors
    /// Why it is not full, for people.
    pub async fn ready(&self) -> Result<(), String> {
        match &self.means {
            Means::Sandbox(backend) if self.name.has_pool() => {
                backend.warm_up(&policy()).await.map_err(|why| why.to_string())
            }
            _ => Ok(()),
        }
    }

    /// One start and its first `echo`, counted from `from`. `alone`: nothing else runs, a plain process may block.
    ///
    /// # Errors
    /// Why it is no success, for people.
    pub async fn once(&self, id: &str, from: Instant, alone: bool) -> Result<Times, String> {
        let work = async {
            match &self.means {
                Means::Process if alone && self.name != Name::DockerRun => time(self.command(), from),
                Means::Process => time_beside_others(self.command(), from).await,
                Means::Sandbox(backend) => {
                    let id = format!("{}-{id}", self.name.as_str().replace('_', "-"));
                    let base: Arc<dyn Tree> = self.base.clone();
                    let spec = Spec { id, base: Some(base), policy: policy() };
                    first_echo(&**backend, spec, from).await
                }
            }
        };
        let times = tokio::time::timeout(PATIENCE, work).await;
        let mut times = times.unwrap_or_else(|_| Err(format!("not done after {PATIENCE:?}")))?;
        if matches!(self.name, Name::Plain | Name::Bwrap) {
            times.first = None;
        }
        Ok(times)
    }

    /// A sandbox to keep, for other measurements.
    pub async fn keep(&self, id: &str) -> Result<Box<dyn crate::sandbox::Sandbox>, Error> {
        match &self.means {
            Means::Sandbox(backend) => {
                backend.create(Spec { id: id.to_owned(), base: None, policy: policy() }).await
            }
            Means::Process => Err(Error::NotFound(format!("{} has no sandboxes", self.name.as_str()))),
        }
    }

    fn command(&self) -> Plain {
        match (self.name, &self.engine) {
            (Name::Bwrap, _) => bwrap(&self.base.0),
            (Name::DockerRun, Some(engine)) => docker_run(engine),
            _ => {
                let mut plain = Plain::new(PROGRAM);
                plain.arg(ARGUMENT);
                plain
            }
        }
    }
}

fn judged(success: bool, out: &[u8], err: &[u8]) -> Result<(), String> {
    if success && out.starts_with(ARGUMENT.as_bytes()) {
        return Ok(());
    }
    let err = String::from_utf8_lossy(err);
    Err(err.lines().next().unwrap_or("it ended badly, without a word").to_owned())
}

/// Start to end with its output read.
fn time(mut command: Plain, from: Instant) -> Result<Times, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|why| why.to_string())?;
    let whole = from.elapsed();
    judged(output.status.success(), &output.stdout, &output.stderr)?;
    Ok(Times { first: None, whole })
}

async fn time_beside_others(command: Plain, from: Instant) -> Result<Times, String> {
    let run = async {
        let mut command = tokio::process::Command::from(command);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn()?;
        let (Some(out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        };
        let (mut out, mut line, mut said) = (BufReader::new(out), String::new(), Vec::new());
        out.read_line(&mut line).await?;
        let first = from.elapsed();
        // Its end closes both.
        err.read_to_end(&mut said).await?;
        let status = child.wait().await?;
        Ok::<_, std::io::Error>((Times { first: Some(first), whole: from.elapsed() }, status, line, said))
    };
    let (times, status, line, said) = run.await.map_err(|why| why.to_string())?;
    judged(status.success(), line.as_bytes(), &said)?;
    Ok(times)
}

/// Until the sandbox was made, and until the echo had ended.
async fn first_echo(backend: &dyn Backend, spec: Spec, from: Instant) -> Result<Times, String> {
    let told = |why: Error| why.to_string();
    let sandbox = backend.create(spec).await.map_err(told)?;
    let first = from.elapsed();
    let argv = vec![PROGRAM.to_owned(), ARGUMENT.to_owned()];
    let mut process = sandbox.exec(Command { argv, ..Command::default() }).await.map_err(told)?;
    let (mut out, mut err, mut exit) = (Vec::new(), Vec::new(), None);
    while let Some(event) = process.events.recv().await {
        match event {
            Event::Stdout(bytes) => out.extend(bytes),
            Event::Stderr(bytes) => err.extend(bytes),
            Event::Exit(how) => exit = Some(how),
        }
    }
    let whole = from.elapsed();
    sandbox.destroy().await.map_err(told)?;
    judged(exit == Some(Exit::Code { code: 0 }), &out, &err).map_err(|why| format!("{why} ({exit:?})"))?;
    Ok(Times { first: Some(first), whole })
}

/// The nearest that bwrap does: the same namespaces and mounts, without limits, seccomp, Landlock or an overlay.
fn bwrap(base: &Path) -> Plain {
    let mut command = Plain::new("bwrap");
    command
        .args(["--unshare-all", "--die-with-parent", "--clearenv", "--uid", "1000", "--gid", "1000"])
        .args(["--cap-drop", "ALL", "--ro-bind", "/usr", "/usr"]);
    for name in ["bin", "sbin", "lib", "lib64"] {
        let link = Path::new("/").join(name);
        if let Ok(target) = std::fs::read_link(&link) {
            command.arg("--symlink").arg(target).arg(link);
        } else if link.is_dir() {
            command.arg("--ro-bind").args([&link, &link]);
        }
    }
    command
        .args(["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--dir", "/workspace"])
        .arg("--bind")
        .arg(base)
        .args(["/workspace", "--chdir", "/workspace", PROGRAM, ARGUMENT]);
    command
}

/// What a careful person types: no network, no powers, nothing written, memory and processes bounded.
fn docker_run(engine: &DockerOptions) -> Plain {
    let (policy, mut command) = (policy(), Plain::new("docker"));
    if let Some(host) = &engine.host {
        command.args(["--host", host]);
    }
    command
        .args(["run", "--rm", "--network", "none", "--cap-drop", "ALL"])
        .args(["--security-opt", "no-new-privileges", "--read-only"])
        .arg(format!("--memory={}", policy.memory_bytes))
        .arg(format!("--pids-limit={}", policy.pids));
    if let Some(runtime) = &engine.runtime {
        command.args(["--runtime", runtime]);
    }
    command.args([&engine.image, PROGRAM, ARGUMENT]);
    command
}
