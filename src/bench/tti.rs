//! Time to interactive: from `create` to the end of the first `echo`, for a cold and a pre-built local sandbox,
//! beside a plain spawn of the same program and, where it is installed, bwrap. One interleaved run, so that the
//! ratios hold whatever the host's mood.

use std::path::{Path, PathBuf};
use std::process::{Command as Plain, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::sandbox::local::{Local, Options as LocalOptions};
use crate::sandbox::{Backend, Command, Error, Event, Exit, Network, Policy, Spec, Tree};

const PROGRAM: &str = "/bin/echo";
const ARGUMENT: &str = "ready";

#[derive(Debug, Clone)]
pub struct Options {
    /// Rounds that count; one in ten more goes before them, unmeasured.
    pub rounds: usize,
    /// The program whose `jail-init` is run; by default the one that is running.
    pub helper: Option<PathBuf>,
    /// An empty folder for the bench alone.
    pub state_dir: PathBuf,
}

/// Milliseconds of one lane.
#[derive(Debug, Clone, Serialize)]
pub struct Lane {
    pub name: &'static str,
    pub p50_ms: f64,
    pub p95_ms: f64,
    pub p99_ms: f64,
    pub min_ms: f64,
    /// Of a sandbox's p50: until `create` returned, the rest being the command. None for other lanes.
    pub create_p50_ms: Option<f64>,
    /// p50 over the plain spawn's p50.
    pub ratio: f64,
    /// Rounds in which the program ended with 0 and its line was read.
    pub successes: usize,
}

#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub rounds: usize,
    pub as_root: bool,
    /// plain, cold, warm and, when installed, bwrap.
    pub lanes: Vec<Lane>,
    /// Cold p50 over bwrap's p50; none without bwrap.
    pub cold_to_bwrap: Option<f64>,
}

#[derive(Debug)]
struct Base(PathBuf);

impl Tree for Base {
    fn path(&self) -> &Path {
        &self.0
    }
}

fn policy() -> Policy {
    Policy {
        wall_ms: 60_000,
        memory_bytes: 512 << 20,
        pids: 128,
        cpu_milli: 2000,
        disk_bytes: 256 << 20,
        inodes: 100_000,
        open_files: 1024,
        output_bytes: 1 << 20,
        network: Network::None,
    }
}

/// Runs all lanes in turn, `rounds` times. Blocks; call it outside a runtime.
pub fn run(options: &Options) -> Result<Report, Error> {
    let host = |doing| move |source| Error::Host { doing, source };
    let base = options.state_dir.join("base");
    std::fs::create_dir_all(&base).map_err(host("make the bench's folder"))?;
    std::fs::write(base.join("README"), "a base\n").map_err(host("make the bench's folder"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(host("start a runtime"))?;
    let local = |name: &str, warm| {
        Local::new(LocalOptions {
            helper: options.helper.clone(),
            warm,
            ..LocalOptions::new(options.state_dir.join(name))
        })
    };
    let (cold, warm) = (local("cold", 0)?, local("warm", 1)?);
    let bwrap = bwrap_works(&base);
    let mut creates: [Vec<Duration>; 2] = [Vec::new(), Vec::new()];
    let mut lanes: Vec<(&'static str, Vec<Duration>)> =
        ["plain", "cold", "warm", "bwrap"].into_iter().map(|name| (name, Vec::new())).collect();
    let unmeasured = options.rounds / 10 + 1;
    for round in 0..unmeasured + options.rounds {
        for lane in 0..lanes.len() {
            // Each lane follows each other one in turn.
            let lane = (lane + round) % lanes.len();
            let Some((name, times)) = lanes.get_mut(lane) else { continue };
            let time = match *name {
                "plain" => time(Plain::new(PROGRAM).arg(ARGUMENT)),
                "bwrap" if !bwrap => None,
                "bwrap" => time(&mut bwrap_command(&base)),
                kind => {
                    let backend = if kind == "cold" { &cold } else { &warm };
                    if kind == "warm" {
                        runtime.block_on(warm.warm_up())?;
                    }
                    let spec = Spec {
                        id: format!("{kind}-{round}"),
                        base: Some(Arc::new(Base(base.clone()))),
                        policy: policy(),
                    };
                    let times = runtime.block_on(first_echo(backend, spec))?;
                    if let [cold, warm] = &mut creates
                        && let Some((created, _)) = times.filter(|_| round >= unmeasured)
                    {
                        if kind == "cold" { cold.push(created) } else { warm.push(created) }
                    }
                    times.map(|(_, whole)| whole)
                }
            };
            if let Some(time) = time.filter(|_| round >= unmeasured) {
                times.push(time);
            }
        }
    }
    let plain = lanes.first_mut().map_or(f64::NAN, |(_, times)| percentile(times, 50.0));
    let [cold_creates, warm_creates] = &mut creates;
    let lanes: Vec<Lane> = lanes
        .into_iter()
        .filter(|(_, times)| !times.is_empty())
        .map(|(name, mut times)| {
            let p50_ms = percentile(&mut times, 50.0);
            Lane {
                name,
                p50_ms,
                p95_ms: percentile(&mut times, 95.0),
                p99_ms: percentile(&mut times, 99.0),
                min_ms: percentile(&mut times, 0.0),
                create_p50_ms: match name {
                    "cold" => Some(percentile(cold_creates, 50.0)),
                    "warm" => Some(percentile(warm_creates, 50.0)),
                    _ => None,
                },
                ratio: p50_ms / plain,
                successes: times.len(),
            }
        })
        .collect();
    let p50 = |name| lanes.iter().find(|lane| lane.name == name).map(|lane| lane.p50_ms);
    let cold_to_bwrap = p50("cold").zip(p50("bwrap")).map(|(cold, bwrap)| cold / bwrap);
    let as_root = nix::unistd::geteuid().is_root();
    Ok(Report { rounds: options.rounds, as_root, lanes, cold_to_bwrap })
}

fn percentile(times: &mut [Duration], percent: f64) -> f64 {
    times.sort_unstable();
    let last = times.len().saturating_sub(1) as f64;
    let at = (last * percent / 100.0).round() as usize;
    times.get(at).map_or(f64::NAN, |time| time.as_secs_f64() * 1000.0)
}

/// Start to end with its output read; `None` when it failed.
fn time(command: &mut Plain) -> Option<Duration> {
    let start = Instant::now();
    let output = command.stdin(Stdio::null()).output().ok()?;
    let time = start.elapsed();
    (output.status.success() && output.stdout.starts_with(ARGUMENT.as_bytes())).then_some(time)
}

/// Until the sandbox was made, and until the echo had ended; `None` when it failed.
async fn first_echo(backend: &Local, spec: Spec) -> Result<Option<(Duration, Duration)>, Error> {
    let start = Instant::now();
    let sandbox = backend.create(spec).await?;
    let created = start.elapsed();
    let argv = vec![PROGRAM.to_owned(), ARGUMENT.to_owned()];
    let mut process = sandbox.exec(Command { argv, ..Command::default() }).await?;
    let (mut output, mut exit) = (Vec::new(), None);
    while let Some(event) = process.events.recv().await {
        match event {
            Event::Stdout(bytes) => output.extend(bytes),
            Event::Stderr(_) => {}
            Event::Exit(how) => exit = Some(how),
        }
    }
    let time = start.elapsed();
    sandbox.destroy().await?;
    let right = exit == Some(Exit::Code { code: 0 }) && output.starts_with(ARGUMENT.as_bytes());
    Ok(right.then_some((created, time)))
}

fn bwrap_works(base: &Path) -> bool {
    time(&mut bwrap_command(base)).is_some()
}

/// The nearest that bwrap does: the same namespaces and mounts, without limits, seccomp, Landlock or an overlay.
fn bwrap_command(base: &Path) -> Plain {
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
