//! The local backend: Linux namespaces on this host, no daemon, as root or as an ordinary user. Strong process
//! isolation, not a virtual machine: the kernel is shared. This file builds sandboxes cold or from a pool of
//! pre-built ones; a living one is `cell`, its inside is `nursery`, `mounts` and `init`.

mod cell;
mod cgroup;
mod changes;
mod checks;
mod exec;
mod files;
mod init;
mod life;
mod mounts;
mod nursery;
mod shared;
mod spawn;
mod watch;
mod wire;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use coinop_shim::seccomp::StandIns;
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{getegid, geteuid};
use sha2::{Digest, Sha256};

use super::{Backend, Check, Error, Identity, Policy, Sandbox, Spec};
use cell::Cell;
use cgroup::{Controller, Layout};
use checks::Host;
use life::{Life, Slots};
use shared::{Control, Folders};
use spawn::Nursery;
use wire::{Configure, FromInit, MESSAGE_BYTES, Start, ToInit};

/// The hidden command `jail-init`. `main` calls it before anything else: before threads, logs and libraries.
pub fn jail_main() -> ExitCode {
    match nursery::main() {
        Ok(()) => ExitCode::SUCCESS,
        // The node has closed its end or will see ours close; nobody reads our stderr.
        Err(_) => ExitCode::FAILURE,
    }
}

#[derive(Debug, Clone)]
pub struct Options {
    /// The program whose `jail-init` is run; by default the one that is running.
    pub helper: Option<PathBuf>,
    /// A folder of this node alone; what is left behind is known by it.
    pub state_dir: PathBuf,
    /// How many sandboxes stand pre-built, once `warm_up` has been called or a first one was made. Each is used once,
    /// and costs about half a megabyte.
    pub warm: usize,
    /// Whether this process may change the cgroup that it is in, to get what version 2 keeps from it: give on its
    /// controllers, and move into a group below. A doctor may not; it makes no sandboxes for jobs.
    pub delegate: bool,
}

impl Options {
    pub fn new(state_dir: impl Into<PathBuf>) -> Options {
        Options { helper: None, state_dir: state_dir.into(), warm: 0, delegate: true }
    }
}

/// The backend. Dropping it kills every sandbox that still lives.
pub struct Local {
    inner: Arc<Inner>,
}

struct Inner {
    options: Options,
    host: Host,
    layout: Layout,
    /// What the names of this node's cgroups begin with, and those of this life of it.
    prefix: String,
    run: String,
    nursery: Mutex<Option<Arc<Nursery>>>,
    landlock: AtomicBool,
    slots: Slots,
    numbers: AtomicU64,
    pool: Mutex<Vec<PreBuilt>>,
    filling: tokio::sync::Mutex<()>,
}

/// A sandbox with everything but its policy and workspace.
struct PreBuilt {
    life: Arc<Life>,
    control: OwnedFd,
}

impl Drop for PreBuilt {
    fn drop(&mut self) {
        // One that became a job's is struck by its cell instead; here only those never used end.
        if Arc::strong_count(&self.life) <= 2 {
            self.life.strike();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(nursery) = self.nursery.get_mut().unwrap_or_else(PoisonError::into_inner) {
            nursery.close();
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn host_error(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Host { doing, source }
}

/// Each sandbox holds some descriptors of this process, and each folder of a deep tree two more while its changes are
/// read: 1,024, where most systems begin, is soon spent. Commands inside get the limit of their policy.
fn allow_open_files() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(())
}

/// A step of the inside that failed, as the outside tells it.
fn broken(step: &str, source: io::Error) -> Error {
    let source = io::Error::new(source.kind(), format!("{step}: {source}"));
    Error::Host { doing: "build its namespaces", source }
}

impl Local {
    /// Starts the nursery and tries one sandbox, to know what this host can do. Fails only when the helper cannot
    /// be started; a host that cannot build sandboxes says so in `checks` and refuses in `admit`.
    pub fn new(options: Options) -> Result<Local, Error> {
        std::fs::create_dir_all(&options.state_dir).map_err(host_error("make its state folder"))?;
        allow_open_files().map_err(host_error("raise its limit of open files"))?;
        let state = options.state_dir.canonicalize().map_err(host_error("find its state folder"))?;
        let hash = hex::encode(Sha256::digest(std::os::unix::ffi::OsStrExt::as_bytes(state.as_os_str())));
        let prefix = format!("coinop-{}-", hash.get(..8).unwrap_or_default());
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let run = format!("{prefix}{:x}-", started ^ u128::from(std::process::id()));
        let layout = Layout::detect(&format!("{run}probe"), options.delegate);
        let mut inner = Inner {
            host: Host::default(),
            layout,
            prefix,
            run,
            nursery: Mutex::new(None),
            landlock: AtomicBool::new(false),
            slots: Slots::new(),
            numbers: AtomicU64::new(1),
            pool: Mutex::new(Vec::new()),
            filling: tokio::sync::Mutex::new(()),
            options: Options { state_dir: state, ..options },
        };
        // A thread of its own: this may be called inside a runtime, which must not be blocked by waiting on it.
        let host = std::thread::scope(|scope| {
            scope
                .spawn(|| checks::look(&inner))
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        inner.host = host;
        Ok(Local { inner: Arc::new(inner) })
    }
}

impl Inner {
    /// The nursery, started anew when it has died.
    fn nursery(&self) -> Result<Arc<Nursery>, Error> {
        let mut kept = locked(&self.nursery);
        if let Some(nursery) = kept.as_ref().filter(|nursery| !nursery.is_dead()) {
            return Ok(nursery.clone());
        }
        let start = Start {
            cgroup_parents: self
                .layout
                .parents()
                .iter()
                .filter_map(|p| p.to_str())
                .map(str::to_owned)
                .collect(),
            cgroup_prefix: self.run.clone(),
            stand_ins: StandIns {
                memory: self.layout.version(Controller::Memory).is_none(),
                cores: self.layout.version(Controller::Cpu).is_none(),
            },
        };
        let helper = self.options.helper.as_deref().unwrap_or(Path::new("/proc/self/exe"));
        let (nursery, hello) = Nursery::start(helper, start).map_err(host_error("start its helper"))?;
        if let Some((step, errno)) = hello.failed {
            return Err(broken(&step, io::Error::from_raw_os_error(errno)));
        }
        self.landlock.store(hello.landlock, Ordering::Relaxed);
        *kept = Some(nursery.clone());
        Ok(nursery)
    }

    fn new_life(&self) -> Result<Arc<Life>, Error> {
        let slot = self.slots.take()?;
        let n = self.numbers.fetch_add(1, Ordering::Relaxed);
        let group = self.layout.make(&format!("{}{n}", self.run)).map_err(host_error("make its cgroup"))?;
        Ok(Arc::new(Life::new(n, slot, group)))
    }

    async fn pre_build(&self) -> Result<PreBuilt, Error> {
        let nursery = self.nursery()?;
        let life = self.new_life()?;
        let doors = life.group.doors().map_err(host_error("open its cgroup"))?;
        let (ours, theirs) = wire::pair().map_err(host_error("make a socket"))?;
        let built =
            nursery.build(life.clone(), theirs, &doors, None).map_err(host_error("ask its helper"))?;
        let pre_built = PreBuilt { life, control: ours };
        match built.await {
            Ok(Ok(_)) => Ok(pre_built),
            Ok(Err((step, why))) => Err(broken(&step, why)),
            Err(_) => Err(Error::Gone("its helper has ended".to_owned())),
        }
    }

    /// One at a time, so that two who find the pool short do not both fill it.
    async fn fill_pool(&self) -> Result<(), Error> {
        let _alone = self.filling.lock().await;
        while locked(&self.pool).len() < self.options.warm {
            let one = self.pre_build().await?;
            locked(&self.pool).push(one);
        }
        Ok(())
    }

    /// What init is told of the policy. `extra` is room for a base that must be copied: (bytes, entries).
    fn configure(&self, policy: &Policy, life: &Life, base: bool, extra: (u64, u64)) -> Configure {
        Configure {
            disk_bytes: policy.disk_bytes.saturating_add(extra.0),
            inodes: policy.inodes.saturating_add(extra.1),
            pids: policy.pids,
            open_files: policy.open_files,
            data_bytes: (!self.host.memory_cgroup)
                .then_some(policy.memory_bytes.saturating_add(policy.swap_bytes)),
            cores: self.host.cores_for(policy.cpu_milli, life.slot.number()),
            base,
            probe: false,
        }
    }

    /// Clones the namespaces and furnishes them, all now.
    async fn cold(&self, spec: &Spec, base: Option<&str>, extra: (u64, u64)) -> Result<Built, Error> {
        let nursery = self.nursery()?;
        let life = self.new_life()?;
        let mut guard = Strike(Some(life.clone()));
        life.group.limit(&spec.policy).map_err(host_error("limit its cgroup"))?;
        let doors = life.group.doors().map_err(host_error("open its cgroup"))?;
        let (ours, theirs) = wire::pair().map_err(host_error("make a socket"))?;
        // Its policy waits in the socket until it is born.
        let configure = ToInit::Configure(self.configure(&spec.policy, &life, base.is_some(), extra));
        wire::send(ours.as_fd(), &configure, &[]).map_err(host_error("pass the policy"))?;
        let built =
            nursery.build(life.clone(), theirs, &doors, base).map_err(host_error("ask its helper"))?;
        match built.await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(errno))) => {
                return Err(broken("overlay", io::Error::from_raw_os_error(errno)));
            }
            Ok(Err((step, why))) => return Err(broken(&step, why)),
            Err(_) => return Err(Error::Gone("its helper has ended".to_owned())),
        }
        let control = Control::new(ours).map_err(host_error("watch its socket"))?;
        let moved_in = moved_in(control).await?;
        guard.0 = None;
        Ok(Built { life, moved_in })
    }

    /// Gives a pre-built sandbox its policy and its base.
    async fn warm(&self, pre_built: PreBuilt, spec: &Spec, base: Option<&str>) -> Result<Built, Error> {
        let life = pre_built.life.clone();
        life.start_clock();
        let mut guard = Strike(Some(life.clone()));
        let asked = match base {
            None => None,
            Some(path) => Some(self.nursery()?.base(&life, path).map_err(host_error("ask its helper"))?),
        };
        life.group.limit(&spec.policy).map_err(host_error("limit its cgroup"))?;
        let tree = match asked {
            None => None,
            Some(asked) => {
                let tree = asked.await.map_err(|_| Error::Gone("its helper has ended".to_owned()))?;
                Some(tree.map_err(|errno| broken("overlay", io::Error::from_raw_os_error(errno)))?)
            }
        };
        let configure = ToInit::Configure(self.configure(&spec.policy, &life, tree.is_some(), (0, 0)));
        let beside: Vec<BorrowedFd<'_>> = tree.iter().map(AsFd::as_fd).collect();
        wire::send(pre_built.control.as_fd(), &configure, &beside).map_err(host_error("pass the policy"))?;
        let socket = pre_built.control.try_clone().map_err(host_error("watch its socket"))?;
        let control = Control::new(socket).map_err(host_error("watch its socket"))?;
        let moved_in = moved_in(control).await?;
        guard.0 = None;
        Ok(Built { life, moved_in })
    }

    async fn build(&self, spec: &Spec) -> Result<Built, Error> {
        let base = spec.base.as_deref().map(super::Tree::path);
        let base = match base.map(Path::to_str) {
            Some(Some(path)) if self.host.overlay && (self.host.root || is_ours(path)) => Some(path),
            None => None,
            Some(_) => return self.cold_copy(spec).await,
        };
        loop {
            let Some(ready) = locked(&self.pool).pop() else { break };
            if ready.life.has_ended() {
                continue;
            }
            match self.warm(ready, spec, base).await {
                Ok(built) => return Ok(built),
                Err(why) => tracing::debug!(id = spec.id, %why, "a pre-built sandbox could not be used"),
            }
        }
        match self.cold(spec, base, (0, 0)).await {
            Err(why) if base.is_some() => {
                tracing::debug!(id = spec.id, %why, "no overlay over this base: it is copied");
                self.cold_copy(spec).await
            }
            other => other,
        }
    }

    async fn cold_copy(&self, spec: &Spec) -> Result<Built, Error> {
        let Some(base) = spec.base.clone() else { return self.cold(spec, None, (0, 0)).await };
        let sized = tokio::task::spawn_blocking(move || files::size(&*base)).await;
        let extra =
            sized.map_err(io::Error::other).and_then(|size| size).map_err(host_error("size the base"))?;
        self.cold(spec, None, extra).await
    }
}

/// Whether an ordinary user's node may lay an overlay over this base: a job cannot write over what belongs to an
/// owner or group that its user namespace does not have. Asked here, where owners show as they are.
fn is_ours(base: &str) -> bool {
    let ours = (geteuid().as_raw(), getegid().as_raw());
    std::fs::metadata(base).is_ok_and(|found| (found.uid(), found.gid()) == ours)
}

/// A sandbox whose init is ready for commands.
struct Built {
    life: Arc<Life>,
    moved_in: (Control, Folders, Vec<u8>),
}

/// Kills what was half built when its builder gives up, or is given up.
struct Strike(Option<Arc<Life>>);

impl Drop for Strike {
    fn drop(&mut self) {
        if let Some(life) = &self.0 {
            life.strike();
        }
    }
}

/// An init that is neither ready nor broken by then is not coming.
const READY: Duration = Duration::from_secs(30);

async fn moved_in(control: Control) -> Result<(Control, Folders, Vec<u8>), Error> {
    let mut buffer = vec![0; MESSAGE_BYTES];
    let answer = tokio::time::timeout(READY, control.receive(&mut buffer)).await;
    let timed_out = || io::Error::from(io::ErrorKind::TimedOut);
    match answer.unwrap_or_else(|_| Err(timed_out())).map_err(host_error("hear from its init"))? {
        Some((FromInit::Ready { overlay, .. }, beside)) => {
            let mut beside = beside.into_iter();
            let (Some(upper), Some(workspace), Some(job), Some(proc)) =
                (beside.next(), beside.next(), beside.next(), beside.next())
            else {
                return Err(Error::Gone("its init passed no folders".to_owned()));
            };
            Ok((control, Folders { upper, workspace, job, proc, overlay }, buffer))
        }
        Some((FromInit::Broken { step, errno }, _)) => {
            Err(broken(&step, io::Error::from_raw_os_error(errno)))
        }
        Some(_) => Err(broken("greet", io::Error::from_raw_os_error(libc::EPROTO))),
        None => Err(Error::Gone("its init ended at once".to_owned())),
    }
}

#[async_trait]
impl Backend for Local {
    fn identity(&self) -> Identity {
        checks::identity()
    }

    fn checks(&self) -> Vec<Check> {
        self.inner.host.checks(&self.inner.layout)
    }

    fn caveats(&self) -> Vec<String> {
        self.inner.host.caveats()
    }

    fn admit(&self, policy: &Policy) -> Result<(), Error> {
        self.inner.host.admit(policy)
    }

    async fn create(&self, spec: Spec) -> Result<Box<dyn Sandbox>, Error> {
        self.admit(&spec.policy)?;
        spec.named()?;
        let inner = &self.inner;
        let Built { life, moved_in } = inner.build(&spec).await?;
        let overlay = moved_in.1.overlay;
        let uid = inner.host.root.then(|| life.slot.uid());
        let watched = !inner.host.memory_cgroup;
        let cell = Cell::new(spec.id, life, spec.policy, spec.base.clone(), uid, moved_in, watched);
        if let Some(base) = spec.base.filter(|_| !overlay) {
            cell.copy_base(base).await?;
        }
        if inner.options.warm > 0 {
            let inner = inner.clone();
            tokio::spawn(async move {
                // The job goes first.
                tokio::time::sleep(REFILL_AFTER).await;
                if let Err(why) = inner.fill_pool().await {
                    tracing::warn!(%why, "no sandbox could be built ahead");
                }
            });
        }
        Ok(Box::new(cell))
    }

    /// Builds sandboxes until the pool is full, for any policy; none where no sandbox can be built.
    async fn warm_up(&self, _: &Policy) -> Result<(), Error> {
        if self.inner.host.broken.is_some() {
            return Ok(());
        }
        self.inner.fill_pool().await
    }

    async fn reap(&self) -> Result<usize, Error> {
        let inner = self.inner.clone();
        let swept = tokio::task::spawn_blocking(move || {
            cgroup::sweep(inner.layout.parents().into_iter(), &inner.prefix, Some(&inner.run))
        });
        swept.await.map_err(io::Error::other).map_err(host_error("look for leftovers"))
    }
}

/// How long the pool waits before it builds a successor, so that it does not slow the first command.
const REFILL_AFTER: Duration = Duration::from_millis(10);
