//! The node tries its own sandboxes before strangers do: a small program of ours runs against every wall and over every
//! limit, on the backend that jobs will get. What fails is told with how to mend it; what to do then is `node`'s.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coinop_shim::probe::{Finding, NO_MEMORY};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::docker::SHIM;
use super::{
    Backend, Check, Command, Error, Event, Exit, Identity, Limit, Network, Policy, Sandbox, Spec, Tree,
};

/// Longer than any probe takes; one that hangs has failed.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longer than a whole self-test takes: a backend that hangs does not hold up the node for ever.
const WHOLE: Duration = Duration::from_secs(180);
/// How long two busy threads are let run, and how much longer a look at them may take.
const BURN: Duration = Duration::from_millis(300);
const LATE_MS: u64 = 2000;
/// Cores that those threads may have, in thousandths, and milliseconds of a core that a quota gives too early.
const BURN_MILLI: u32 = 1000;
const QUOTA_SLACK_MS: u64 = 150;
/// The least idle limit that there is.
const IDLE_MS: u64 = 500;
/// Bytes a second, so many seconds' worth to be printed, and how long that takes at least: the first second's worth passes
/// at once, and what stands in the pipe at the end.
const RATE: u64 = 128 << 10;
const PRINTED: u64 = 2;
const SLOWED: Duration = Duration::from_millis(400);

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    pub sandbox: Identity,
    pub checks: Vec<Check>,
}

impl Report {
    pub fn holds(&self) -> bool {
        self.checks.iter().all(|check| check.ok)
    }

    /// The report as it is kept.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// sha256 of that, in hex: what the announcement carries.
    pub fn hash(&self) -> String {
        hex::encode(Sha256::digest(self.to_json()))
    }
}

/// A folder with the probe in it, under `/workspace` inside.
#[derive(Debug)]
struct Base(PathBuf);

impl Base {
    /// Always of one name: what a node that was killed has left is replaced.
    fn new(below: &Path) -> io::Result<Base> {
        let base = Base(below.join("selftest"));
        match std::fs::remove_dir_all(&base.0) {
            Err(why) if why.kind() != io::ErrorKind::NotFound => return Err(why),
            _ => std::fs::create_dir(&base.0)?,
        }
        std::fs::write(base.0.join("probe"), SHIM)?;
        // The modes that trees of commits have, whatever the node keeps to itself.
        for path in [base.0.join("probe"), base.0.clone()] {
            std::fs::set_permissions(path, Permissions::from_mode(0o755))?;
        }
        Ok(base)
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        if let Err(why) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %why, "the self-test's folder stays until the next start");
        }
    }
}

impl Tree for Base {
    fn path(&self) -> &Path {
        &self.0
    }
}

fn policy() -> Policy {
    Policy {
        wall_ms: 60_000,
        idle_ms: 60_000,
        memory_bytes: 64 << 20,
        swap_bytes: 0,
        pids: 16,
        cpu_milli: BURN_MILLI,
        disk_bytes: 8 << 20,
        inodes: 400,
        open_files: 32,
        output_bytes: 64 << 10,
        output_bytes_per_s: 1 << 30,
        network: Network::None,
    }
}

/// Tries the backend; `folder` is one of the node's own, on the disk that bases lie on. Takes about a second, and four
/// sandboxes.
///
/// # Errors
/// When a sandbox cannot be made at all, the host fails, or it is not done after three minutes.
pub async fn run(backend: &dyn Backend, folder: &Path) -> Result<Report, Error> {
    let tried = tokio::time::timeout(WHOLE, try_all(backend, folder)).await;
    tried.unwrap_or_else(|late| Err(Error::Host { doing: "end its self-test in time", source: late.into() }))
}

async fn try_all(backend: &dyn Backend, folder: &Path) -> Result<Report, Error> {
    let host = |source| Error::Host { doing: "make a folder for the self-test", source };
    let base: Arc<dyn Tree> = Arc::new(Base::new(folder).map_err(host)?);
    let started = Instant::now();
    let first = sandbox(backend, &base, policy()).await?;
    // A sandbox's time begins with its making.
    let mut time = BURN + 2 * started.elapsed();
    let (checks, idle, rate) =
        tokio::join!(try_limits(first, folder), try_idle(backend, &base), try_rate(backend, &base));
    let mut checks = checks?;
    checks.extend([idle?, rate?]);
    for last in [false, false, true] {
        match try_wall(backend, &base, time).await {
            Ok(found) if last || found.iter().all(|check| check.ok) => {
                checks.extend(found);
                break;
            }
            // A host that is busy in this moment is late by itself; a sandbox that does not hold is late each time.
            Ok(_) => {}
            // Over before it began.
            Err(Error::Gone(_)) if !last => {}
            Err(why) => return Err(why),
        }
        time *= 2;
    }
    Ok(Report { sandbox: backend.identity(), checks })
}

async fn sandbox(
    backend: &dyn Backend,
    base: &Arc<dyn Tree>,
    policy: Policy,
) -> Result<Box<dyn Sandbox>, Error> {
    backend.create(Spec { id: "selftest".to_owned(), base: Some(base.clone()), policy }).await
}

/// What a probe printed, as far as the node let it, and how it ended; a time-out of the node's own stands behind the
/// command's.
async fn probe(sandbox: &dyn Sandbox, words: &[&str]) -> Result<(Vec<u8>, Option<Exit>), Error> {
    let argv = ["/workspace/probe", "probe"].iter().chain(words).map(|word| (*word).to_owned()).collect();
    let command = Command { argv, timeout: Some(PATIENCE), ..Command::default() };
    let mut process = sandbox.exec(command).await?;
    let (mut said, mut exit) = (Vec::new(), None);
    let until = tokio::time::Instant::now() + 2 * PATIENCE;
    while let Ok(Some(event)) = tokio::time::timeout_at(until, process.events.recv()).await {
        match event {
            Event::Stdout(bytes) | Event::Stderr(bytes) => said.extend(bytes),
            Event::Exit(how) => exit = Some(how),
        }
    }
    Ok((said, exit))
}

fn check(name: &str, ok: bool, how: String) -> Check {
    let mend =
        (!ok).then(|| "strangers' jobs are not safe here: see docs/security.md, and report it".to_owned());
    Check { name: name.to_owned(), ok, how, mend }
}

/// Walls, and the limits that a command meets without its sandbox ending.
async fn try_limits(sandbox: Box<dyn Sandbox>, folder: &Path) -> Result<Vec<Check>, Error> {
    let policy = policy();
    let outside = folder.canonicalize().unwrap_or_else(|_| PathBuf::from(folder));
    let (said, _) = probe(&*sandbox, &["walls", &outside.to_string_lossy()]).await?;
    let mut checks = match serde_json::from_slice::<Vec<Finding>>(&said) {
        Ok(found) => found.into_iter().map(|found| check(&found.name, found.ok, found.how)).collect(),
        Err(_) => vec![check("walls", false, format!("the probe said {:?}", String::from_utf8_lossy(&said)))],
    };
    // Each asks for far more than is allowed. Itself counts, the three descriptors that it is born with, and the two files
    // that probes before it have left in each of three places.
    for (name, ask, most, own) in [
        ("pids", "tasks", u64::from(policy.pids), 1),
        ("open_files", "files", u64::from(policy.open_files), 3),
        ("disk_bytes", "disk", policy.disk_bytes, 0),
        ("inodes", "inodes", policy.inodes, 6),
    ] {
        let (said, exit) = probe(&*sandbox, &[ask, &(most * 4).to_string()]).await?;
        let got = std::str::from_utf8(&said).ok().and_then(|said| said.trim().parse::<u64>().ok());
        let ok = got.is_some_and(|got| got > 0 && got + own <= most);
        // Not the number itself: it may differ from start to start, and the report's hash should not.
        let how = match got {
            Some(_) if ok => format!("no more than {most}"),
            Some(got) => format!("{} instead of at most {most}", got + own),
            None => format!("no answer; it ended with {exit:?}"),
        };
        checks.push(check(name, ok, how));
    }
    // What waits in sockets is memory, too.
    let (said, exit) = probe(&*sandbox, &["sockets", &(policy.memory_bytes * 2).to_string()]).await?;
    let got = std::str::from_utf8(&said).ok().and_then(|said| said.trim().parse::<u64>().ok());
    let limited = exit == Some(Exit::Limit { limit: Limit::Memory });
    let ok = limited || got.is_some_and(|got| got <= policy.memory_bytes);
    let how = match got {
        _ if ok => format!("no more than {}", policy.memory_bytes),
        Some(got) => format!("{got} bytes instead of at most {}", policy.memory_bytes),
        None => format!("no answer; it ended with {exit:?}"),
    };
    checks.push(check("sockets", ok, how));
    let (said, exit) = probe(&*sandbox, &["output", &(policy.output_bytes * 4).to_string()]).await?;
    let ok = exit == Some(Exit::Limit { limit: Limit::Output }) && said.len() as u64 <= policy.output_bytes;
    checks.push(check("output_bytes", ok, ended(ok, policy.output_bytes, exit)));
    // The last, as some backends end the sandbox for it.
    let (_, exit) = probe(&*sandbox, &["memory", &(policy.memory_bytes * 2).to_string()]).await?;
    let ok = matches!(exit, Some(Exit::Limit { limit: Limit::Memory } | Exit::Code { code: NO_MEMORY }));
    checks.push(check("memory_bytes", ok, ended(ok, policy.memory_bytes, exit)));
    // Where the host has swap, more of it would have let the same probe go on.
    checks.push(check("swap_bytes", ok, ended(ok, policy.memory_bytes + policy.swap_bytes, exit)));
    sandbox.destroy().await?;
    Ok(checks)
}

/// A program that waits ten times as long as it may.
async fn try_idle(backend: &dyn Backend, base: &Arc<dyn Tree>) -> Result<Check, Error> {
    let sandbox = sandbox(backend, base, Policy { idle_ms: IDLE_MS, ..policy() }).await?;
    let started = Instant::now();
    let (_, exit) = probe(&*sandbox, &["sleep", "5000"]).await?;
    let took = started.elapsed();
    sandbox.destroy().await?;
    let ok = exit == Some(Exit::Limit { limit: Limit::Idle }) && took >= Duration::from_millis(IDLE_MS);
    let how = if ok { "ended when idle".to_owned() } else { format!("{exit:?} after {} ms", millis(took)) };
    Ok(check("idle_ms", ok, how))
}

/// A program that prints as fast as it may.
async fn try_rate(backend: &dyn Backend, base: &Arc<dyn Tree>) -> Result<Check, Error> {
    let policy = Policy { output_bytes: 8 * RATE, output_bytes_per_s: RATE, ..policy() };
    let sandbox = sandbox(backend, base, policy).await?;
    let started = Instant::now();
    let (said, exit) = probe(&*sandbox, &["output", &(PRINTED * RATE).to_string()]).await?;
    let took = started.elapsed();
    sandbox.destroy().await?;
    let whole = exit == Some(Exit::Code { code: 0 }) && said.len() as u64 == PRINTED * RATE;
    let ok = whole && took >= SLOWED;
    let how = match ok {
        true => format!("no more than {RATE}"),
        false => format!("{} bytes in {} ms, and {exit:?}", said.len(), millis(took)),
    };
    Ok(check("output_bytes_per_s", ok, how))
}

fn ended(ok: bool, most: u64, exit: Option<Exit>) -> String {
    if ok { format!("ended at {most}") } else { format!("it ended with {exit:?}") }
}

/// Time, and the processor meanwhile.
async fn try_wall(backend: &dyn Backend, base: &Arc<dyn Tree>, time: Duration) -> Result<Vec<Check>, Error> {
    let sandbox = sandbox(backend, base, Policy { wall_ms: millis(time), ..policy() }).await?;
    let (_, exit) = probe(&*sandbox, &["burn", "60000"]).await?;
    let usage = sandbox.destroy().await?;
    let in_time = exit == Some(Exit::Limit { limit: Limit::Wall }) && usage.wall_ms < millis(time) + LATE_MS;
    let wall =
        if in_time { "ended in time".to_owned() } else { format!("{exit:?} after {} ms", usage.wall_ms) };
    let most = usage.wall_ms * u64::from(BURN_MILLI) / 1000 + QUOTA_SLACK_MS;
    let shared = usage.cpu_ms > 0 && usage.cpu_ms <= most;
    let cpu = match shared {
        true => format!("no more than {BURN_MILLI}"),
        false => format!("{} ms of a core in {} ms", usage.cpu_ms, usage.wall_ms),
    };
    Ok(vec![check("wall_ms", in_time, wall), check("cpu_milli", shared, cpu)])
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
