//! A living container as the rest of the node holds it: the trait's methods as runs on its line. The engine is asked
//! only where the shim does not answer, and to remove it.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use coinop_shim::wire::{self, FromShim, PAYLOAD_BYTES, Run, ToShim};
use tokio::sync::mpsc;

use super::super::idle::{self, Activity};
use super::super::{Changes, Command, Error, LeaveOut, Limit, Policy, Process, Sandbox, Tree, Usage, place};
use super::container::Started;
use super::engine::Engine;
use super::hardened::SHIM_MEMORY;
use super::line::Line;
use super::{files, running};

/// Events that may wait for their reader before the command itself must wait.
const WAITING: usize = 64;
/// How long a shim may take to end a job's processes before the engine ends it with them.
const KILL_PATIENCE: Duration = Duration::from_millis(500);
/// How long an engine may take to kill a container.
const ENGINE_PATIENCE: Duration = Duration::from_secs(10);
/// How long a shim may take to say what was used.
const USAGE_PATIENCE: Duration = Duration::from_secs(2);

/// How often a living job's container gets more memory, `SHIM_MEMORY` each time.
const RELIEFS: u32 = 4;

/// What the tasks of one sandbox have in common.
pub struct Shared {
    engine: Arc<Engine>,
    container: String,
    pub line: Arc<Line>,
    path: Option<String>,
    began: Instant,
    pub activity: Arc<Activity>,
    output_left: AtomicU64,
    limit: OnceLock<Limit>,
    /// No command starts any more.
    stopped: AtomicBool,
    /// The container's memory now, and how often it was given more.
    memory: AtomicU64,
    swap_bytes: u64,
    relieved: AtomicU32,
    /// Bytes in the writable places before the job came.
    before: AtomicU64,
    /// The most that was ever seen written: what is deleted again was written all the same.
    written: AtomicU64,
    /// What was counted last.
    used: Mutex<wire::Usage>,
    /// The shim works on one file at a time.
    pub files: tokio::sync::Mutex<()>,
}

pub struct Cell {
    id: String,
    started: Started,
    shared: Arc<Shared>,
    base: Option<Arc<dyn Tree>>,
    wall: tokio::task::AbortHandle,
    /// Held for its end: dropping it ends the watch.
    _idle: Option<idle::Guard>,
}

pub fn host(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |why| match why.kind() {
        io::ErrorKind::BrokenPipe => Error::Gone(why.to_string()),
        _ => Error::Host { doing, source: why },
    }
}

impl Cell {
    /// Gives a container to a job: fills its workspace and starts its clock.
    pub async fn new(
        id: String,
        engine: Arc<Engine>,
        started: Started,
        policy: Policy,
        path: Option<String>,
        base: Option<Arc<dyn Tree>>,
        began: Instant,
    ) -> Result<Cell, Error> {
        let wall = Duration::from_millis(policy.wall_ms);
        let shared = Arc::new(Shared {
            engine,
            container: started.container.id().to_owned(),
            line: started.line.clone(),
            activity: Activity::new(),
            output_left: AtomicU64::new(policy.output_bytes),
            path,
            began,
            limit: OnceLock::new(),
            stopped: AtomicBool::new(false),
            memory: AtomicU64::new(started.memory_bytes),
            swap_bytes: policy.swap_bytes,
            relieved: AtomicU32::new(0),
            before: AtomicU64::new(0),
            written: AtomicU64::new(0),
            used: Mutex::default(),
            files: tokio::sync::Mutex::new(()),
        });
        let prepare = async {
            if let Some(base) = base.clone() {
                files::fill(&shared, base).await?;
            }
            shared.ask_usage().await
        };
        let late = || Error::Gone("its time was over before it was filled".to_owned());
        let left = wall.saturating_sub(began.elapsed());
        let usage = tokio::time::timeout(left, prepare).await.map_err(|_| late())??;
        shared.before.store(usage.disk_bytes, Ordering::Relaxed);
        let at_wall = shared.clone();
        let wall = tokio::spawn(async move {
            tokio::time::sleep(wall.saturating_sub(began.elapsed())).await;
            if at_wall.limit.set(Limit::Wall).is_ok()
                && let Err(why) = at_wall.stop().await
            {
                tracing::error!(container = at_wall.container, %why, "a container outlives its time");
            }
        });
        let counted = Arc::downgrade(&shared);
        let idle = shared.activity.watch(&policy, move || cpu_us(counted.upgrade()));
        Ok(Cell { id, started, shared, base, wall: wall.abort_handle(), _idle: idle })
    }
}

/// Processor time of all that ran there so far; none when nobody can tell now.
async fn cpu_us(shared: Option<Arc<Shared>>) -> Option<u64> {
    let shared = shared.filter(|shared| !shared.is_stopped())?;
    let asked = tokio::time::timeout(USAGE_PATIENCE, shared.ask_usage()).await;
    match asked.ok()?.ok()?.cpu_us {
        Some(counted) => Some(counted),
        None => {
            let used = tokio::time::timeout(USAGE_PATIENCE, shared.engine.used(&shared.container)).await;
            used.ok()?.ok()?.cpu_us
        }
    }
}

impl Shared {
    fn alive(&self) -> Result<(), Error> {
        let ended = self.limit.get().is_some() || self.line.ended().is_some();
        if ended || self.stopped.load(Ordering::SeqCst) { Err(self.gone()) } else { Ok(()) }
    }

    /// Why it is gone.
    pub fn gone(&self) -> Error {
        Error::Gone(match (self.limit.get(), self.line.ended()) {
            (Some(limit), _) => format!("it reached its {limit:?} limit"),
            (None, Some(why)) => why.to_owned(),
            (None, None) => "it was killed".to_owned(),
        })
    }

    /// The limit that ended it.
    pub fn limit(&self) -> Option<Limit> {
        self.limit.get().copied()
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    async fn ask_usage(&self) -> Result<wire::Usage, Error> {
        let doing = "read what it used";
        match self.line.ask(&ToShim::Usage).await {
            Ok(FromShim::Usage(usage)) => {
                *self.used.lock().unwrap_or_else(PoisonError::into_inner) = usage;
                Ok(usage)
            }
            Ok(other) => Err(host(doing)(io::Error::other(format!("the shim said {other:?}")))),
            Err(why) => Err(host(doing)(why)),
        }
    }

    /// Ends every process of the job. The shim stays, and with it the files; unless it does not answer.
    async fn stop(&self) -> Result<(), Error> {
        self.stopped.store(true, Ordering::SeqCst);
        let asked = self.line.ask(&ToShim::KillAll);
        if let Ok(Ok(FromShim::Killed { starved })) = tokio::time::timeout(KILL_PATIENCE, asked).await {
            if starved {
                self.relieve().await;
            }
            return Ok(());
        }
        // The engine's counts end with the container.
        if let Ok(Ok(used)) = tokio::time::timeout(KILL_PATIENCE, self.engine.used(&self.container)).await {
            let mut last = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            last.cpu_us = last.cpu_us.max(used.cpu_us);
            last.peak_memory_bytes = last.peak_memory_bytes.max(used.peak_memory_bytes);
        }
        let killing = tokio::time::timeout(ENGINE_PATIENCE, self.engine.kill(&self.container)).await;
        let killed = killing
            .unwrap_or_else(|late| Err(Error::Host { doing: "kill its container", source: late.into() }));
        // Whoever still waits for its word waits in vain, even where the engine does not answer either.
        self.line.cut("it was killed");
        killed
    }

    /// More memory, for the shim: a job may have left files up to the limit, and reading them takes some.
    pub async fn relieve(&self) {
        let times = self.relieved.fetch_add(1, Ordering::Relaxed);
        // A job that asks for it again and again gets no more until it has ended.
        if times >= RELIEFS && !self.stopped.load(Ordering::SeqCst) {
            return;
        }
        let bytes = self.memory.fetch_add(SHIM_MEMORY, Ordering::Relaxed).saturating_add(SHIM_MEMORY);
        if let Err(why) = self.engine.give_memory(&self.container, bytes, self.swap_bytes).await {
            tracing::debug!(container = self.container, %why, "its memory stays as it is");
        }
    }

    /// As many of these bytes of output as are still allowed.
    pub fn allowed(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        let take = |left: u64| Some(left.saturating_sub(bytes.len() as u64));
        let left = match self.output_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(left) | Err(left) => left,
        };
        bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        bytes
    }

    /// As counted now, or as last counted when the shim is gone.
    async fn usage(&self) -> Usage {
        let counted = match tokio::time::timeout(USAGE_PATIENCE, self.ask_usage()).await {
            Ok(Ok(counted)) => counted,
            _ => *self.used.lock().unwrap_or_else(PoisonError::into_inner),
        };
        let written = counted.disk_bytes.saturating_sub(self.before.load(Ordering::Relaxed));
        let before = self.written.fetch_max(written, Ordering::Relaxed);
        Usage {
            wall_ms: u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            cpu_ms: counted.cpu_us.unwrap_or_default() / 1000,
            cpu_is_partial: counted.cpu_us.is_none(),
            peak_memory_bytes: counted.peak_memory_bytes.unwrap_or_default(),
            disk_written_bytes: written.max(before),
        }
    }
}

#[async_trait]
impl Sandbox for Cell {
    fn id(&self) -> &str {
        &self.id
    }

    fn limit(&self) -> Option<Limit> {
        self.shared.limit()
    }

    async fn exec(&self, command: Command) -> Result<Process, Error> {
        self.shared.alive()?;
        let cwd = place::folder(&command)?;
        let mut env: BTreeMap<String, String> = command.env;
        if let Some(path) = &self.shared.path {
            env.entry("PATH".to_owned()).or_insert_with(|| path.clone());
        }
        let run = Run::Command {
            argv: command.argv,
            env: env.into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
            cwd,
            stdin: command.stdin,
            keep_background: command.keep_background,
        };
        let busy = self.shared.activity.begin();
        let open = self.shared.line.open(run).await.map_err(|why| match why.kind() {
            io::ErrorKind::FileTooLarge => Error::TooLarge {
                what: "the command line with its environment".to_owned(),
                cap_bytes: PAYLOAD_BYTES as u64,
            },
            _ => host("start a command")(why),
        })?;
        let (stdin, feeding) = match command.stdin {
            false => (None, None),
            true => {
                let (give, take) = mpsc::channel(WAITING);
                let activity = self.shared.activity.clone();
                (Some(give), Some(tokio::spawn(open.send_all(take, move || activity.heard()))))
            }
        };
        let (events, read) = mpsc::channel(WAITING);
        let carried = running::carry(self.shared.clone(), open, events, command.timeout, busy);
        tokio::spawn(async move {
            carried.await;
            // Whoever still writes to its stdin hears that nobody reads.
            feeding.inspect(|feeding| feeding.abort());
        });
        Ok(Process { stdin, events: read })
    }

    async fn read_file(&self, path: &str, cap_bytes: u64) -> Result<Vec<u8>, Error> {
        files::read(&self.shared, path, cap_bytes).await
    }

    async fn write_file(&self, path: &str, bytes: &[u8]) -> Result<(), Error> {
        self.shared.alive()?;
        files::write(&self.shared, path, bytes).await
    }

    async fn changes_except(&self, cap_bytes: u64, leave_out: LeaveOut) -> Result<Changes, Error> {
        files::changes(&self.shared, self.base.clone(), cap_bytes, leave_out).await
    }

    async fn kill(&self) -> Result<(), Error> {
        self.shared.stop().await
    }

    async fn usage(&self) -> Result<Usage, Error> {
        Ok(self.shared.usage().await)
    }

    async fn destroy(mut self: Box<Self>) -> Result<Usage, Error> {
        self.wall.abort();
        self.shared.stop().await?;
        let usage = self.shared.usage().await;
        self.started.container.remove().await?;
        Ok(usage)
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        self.wall.abort();
    }
}
