//! The docker backend: a hardened container a sandbox, on any engine that speaks Docker's API, near or far, with any
//! image. This file holds the engine's answers against the policy and keeps a pool of started containers; `engine`
//! makes them, `cell` is a living one, `line` speaks with the shim inside, `files` and `tree` carry files.

mod cell;
mod checks;
mod container;
mod engine;
mod files;
mod hardened;
mod line;
mod running;
mod shim;
mod sockets;
mod tree;
mod uids;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bollard::models::{SystemInfo, SystemInfoCgroupVersionEnum};
use coinop_shim::wire::{FromShim, Hello, Ready, ToShim, VERSION};

use super::{Backend, Check, Error, Identity, Policy, Sandbox, Spec};
use cell::Cell;
use checks::Unmet;
use container::{Container, Started};
pub use engine::Importer;
use engine::{Engine, Image};
use hardened::{Place, Size, Ways};
use line::Line;
pub(super) use shim::SHIM;
use uids::Uids;

const BACKEND: &str = "docker";
/// As many containers as may live at once, unless the operator says otherwise.
const UIDS: u32 = 1024;
/// How long a shim may take to answer in a container that has started.
const GREETING: Duration = Duration::from_secs(20);
/// A started container that waited longer is not given to a job.
const MAX_AGE: Duration = Duration::from_secs(15 * 60);
/// A base that would take more of a waiting container's disk than one part in so many gets a container of its own size.
const BASE_PART: u64 = 4;

#[derive(Debug, Clone)]
pub struct Options {
    /// `unix://`, `tcp://` or `ssh://`; none: DOCKER_HOST, or the usual socket.
    pub host: Option<String>,
    /// Name, tag or digest of the image that jobs run in.
    pub image: String,
    /// The engine's runtime, such as `runsc` or `kata`; none: its default.
    pub runtime: Option<String>,
    /// Names this node to the engine, `[a-z0-9]{1,32}`; leftovers are known by it.
    pub node: String,
    /// How many containers stand started for the next job of the last policy, each used once.
    pub warm: usize,
    /// The first of the uids that containers run as, one each; none: as suits the engine.
    pub first_uid: Option<u32>,
    /// How many uids there are, from 1: no more containers live at once.
    pub uids: u32,
}

impl Options {
    /// An engine where it usually is, its default runtime, no pool.
    pub fn new(image: impl Into<String>, node: impl Into<String>) -> Options {
        let (image, node) = (image.into(), node.into());
        Options { host: None, image, runtime: None, node, warm: 0, first_uid: None, uids: UIDS }
    }
}

/// The backend. Containers end with it: their shims let go when their lines do.
pub struct Docker {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Arc<Engine>,
    image: Image,
    info: SystemInfo,
    /// What the first container told; why none can be made, otherwise.
    tried: Result<Ready, Unmet>,
    /// Whether the shim or the engine counts the processor time of a container.
    counts_cpu: OnceLock<bool>,
    ways: Ways,
    numbers: AtomicU64,
    uids: Uids,
    warm: usize,
    pool: Mutex<Pool>,
    filling: tokio::sync::Mutex<()>,
    carrying: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Pool {
    policy: Option<Policy>,
    waiting: Vec<(Started, Instant)>,
}

/// Whether a uid inside of its containers is another one on the host.
fn has_uids_apart(info: &SystemInfo) -> bool {
    let options = info.security_options.iter().flatten();
    options.flat_map(|option| option.split(',')).any(|word| word == "name=userns" || word == "name=rootless")
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Docker {
    /// Dials the engine, finds the image, carries the shim there and tries one sandbox.
    ///
    /// # Errors
    /// When the engine cannot be reached or the image is not to be had. An engine that cannot make sandboxes says so
    /// in `checks` and refuses in `admit`.
    pub async fn connect(options: Options) -> Result<Docker, Error> {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let run = format!("{}-{:x}", options.node, started ^ u128::from(std::process::id()));
        let host = options.host.as_deref();
        let engine = Arc::new(Engine::connect(host, options.node, run, options.runtime).await?);
        let info = engine.info().await?;
        let uids = Uids::new(options.first_uid, options.uids, has_uids_apart(&info), &engine.run);
        let image = engine.image(&options.image).await?;
        shim::carry(&engine, &image, 0).await?;
        let sockets_apart = info.cgroup_version == Some(SystemInfoCgroupVersionEnum::_1);
        let ways = Ways { sockets_apart, ..Ways::default() };
        let mut inner = Inner {
            engine,
            image,
            info,
            tried: Err(Unmet { clause: "container", why: "not tried yet".to_owned() }),
            counts_cpu: OnceLock::new(),
            ways,
            numbers: AtomicU64::new(1),
            uids,
            warm: options.warm,
            pool: Mutex::default(),
            filling: tokio::sync::Mutex::new(()),
            carrying: tokio::sync::Mutex::new(()),
        };
        inner.tried = inner.find_ways().await;
        if let Ok(ready) = &inner.tried {
            inner.engine.most_files.get_or_init(|| ready.open_files);
        }
        Ok(Docker { inner: Arc::new(inner) })
    }
}

impl Inner {
    /// Makes a container with the first uid that no other has, of this node or of another; what its shim is told, and
    /// its writable places.
    async fn make(&self, policy: &Policy, base: Size) -> Result<(Container, Hello, Vec<Place>), Error> {
        let mut others = Vec::new();
        loop {
            let lease = self.uids.take()?;
            let uid = lease.uid();
            // From here on it is removed, whatever fails.
            let mut container = Container::of_uid(self.engine.clone(), lease);
            let places = hardened::places(policy, base, uid);
            let body = hardened::body(&self.engine, &self.image, policy, base, &places, self.ways);
            match container.make(body, "make its container").await {
                Ok(true) => {
                    let by_shim = places.iter().filter(|_| self.ways.shim_mounts);
                    let mounts = by_shim.map(|place| place.mount.clone()).collect();
                    let open_files = policy.open_files;
                    let output_bytes_per_s = policy.output_bytes_per_s;
                    let hello =
                        Hello { version: VERSION, uid, gid: uid, open_files, output_bytes_per_s, mounts };
                    return Ok((container, hello, places));
                }
                Ok(false) => {
                    tracing::debug!(uid, "another node's, or not given back yet");
                    others.extend(container.into_uid());
                }
                Err(why) => {
                    container.give_up().await;
                    return Err(why);
                }
            }
        }
    }

    /// Makes and starts a container, and greets its shim.
    async fn start(&self, policy: &Policy, base: Size) -> Result<(Started, Ready), Error> {
        let (container, hello, places) = self.make(policy, base).await?;
        let line = match self.engine.start(container.id()).await {
            Ok(streams) => Line::new(streams),
            Err(why) => {
                container.give_up().await;
                return Err(why);
            }
        };
        let memory_bytes = hardened::memory_bytes(policy, base, self.ways);
        if let Some(bytes) = hardened::socket_bytes(policy, self.ways) {
            // The shim looks whether it holds, and else gives the job no internet sockets.
            if let Err(why) = sockets::bound(&self.engine, container.id(), bytes).await {
                tracing::debug!(container = container.id(), %why, "no limit on its sockets, so it has none");
            }
        }
        let started = Started { container, line, memory_bytes };
        let doing = "greet the shim in its container";
        let host = |source| Error::Host { doing, source };
        let greeted = tokio::time::timeout(GREETING, started.line.ask(&ToShim::Hello(hello))).await;
        match greeted.map_err(|late| host(late.into()))?.map_err(host)? {
            FromShim::Ready(ready) if ready.version == VERSION => {
                match hardened::too_large(&places, &ready.rooms) {
                    None => Ok((started, ready)),
                    Some((clause, why)) => Err(Error::Unenforceable { backend: BACKEND, clause, why }),
                }
            }
            other => Err(host(io::Error::other(format!("it said {other:?}")))),
        }
    }

    /// As `start`, to its end: an engine goes on making what nobody waits for any more, and then it must be removed.
    async fn start_whole(self: &Arc<Inner>, policy: Policy, base: Size) -> Result<Started, Error> {
        let inner = self.clone();
        let starting = tokio::spawn(async move {
            let started = match inner.start(&policy, base).await {
                // Somebody has tidied up on the engine, or another node of this name is just writing it.
                Err(why) if shim::is_missing(&inner.engine, &why) => {
                    tracing::warn!(%why, "the shim is carried to the engine again");
                    {
                        let _alone = inner.carrying.lock().await;
                        let n = inner.numbers.fetch_add(1, Ordering::Relaxed);
                        shim::carry(&inner.engine, &inner.image, n).await?;
                    }
                    inner.start(&policy, base).await
                }
                other => other,
            };
            started.map(|(started, _)| started)
        });
        starting.await.unwrap_or_else(|why| {
            Err(Error::Host { doing: "start its container", source: io::Error::other(why) })
        })
    }

    /// The clauses that a container is made with; the others are the node's to keep. An engine refuses more cores
    /// than it has.
    fn made_with(&self, policy: &Policy) -> Policy {
        let cores = self.info.ncpu.and_then(|cores| u32::try_from(cores).ok()).filter(|cores| *cores > 0);
        let most_milli = cores.map_or(u32::MAX, |cores| cores.saturating_mul(1000));
        let cpu_milli = policy.cpu_milli.min(most_milli);
        Policy { wall_ms: 1, idle_ms: 1, output_bytes: 0, cpu_milli, ..policy.clone() }
    }

    /// A waiting container of this policy that is young and well.
    fn take(&self, policy: &Policy, base: Size) -> Option<Started> {
        let small = base.bytes <= policy.disk_bytes / BASE_PART && base.entries <= policy.inodes / BASE_PART;
        let mut pool = locked(&self.pool);
        if !small || pool.policy.as_ref() != Some(&self.made_with(policy)) {
            return None;
        }
        while let Some((started, since)) = pool.waiting.pop() {
            if since.elapsed() < MAX_AGE && started.line.ended().is_none() {
                return Some(started);
            }
        }
        None
    }

    /// Starts containers of the pool's policy until it is full.
    async fn fill(self: &Arc<Inner>) -> Result<(), Error> {
        let _alone = self.filling.lock().await;
        loop {
            let policy = {
                let mut pool = locked(&self.pool);
                pool.waiting
                    .retain(|(started, since)| since.elapsed() < MAX_AGE && started.line.ended().is_none());
                match &pool.policy {
                    Some(policy) if pool.waiting.len() < self.warm => policy.clone(),
                    _ => return Ok(()),
                }
            };
            let started = self.start_whole(policy.clone(), Size::default()).await?;
            let mut pool = locked(&self.pool);
            if pool.policy.as_ref() == Some(&policy) {
                pool.waiting.push((started, Instant::now()));
            }
        }
    }

    /// From now on the pool is for this policy.
    fn expect(&self, policy: &Policy) {
        let (policy, mut pool) = (self.made_with(policy), locked(&self.pool));
        if pool.policy.as_ref() != Some(&policy) {
            pool.waiting.clear();
            pool.policy = Some(policy);
        }
    }
}

#[async_trait]
impl Backend for Docker {
    fn identity(&self) -> Identity {
        Identity { backend: BACKEND.to_owned(), image: self.inner.image.shown.clone() }
    }

    fn checks(&self) -> Vec<Check> {
        self.inner.checks()
    }

    fn admit(&self, policy: &Policy) -> Result<(), Error> {
        self.inner.admit(policy)
    }

    async fn create(&self, spec: Spec) -> Result<Box<dyn Sandbox>, Error> {
        self.admit(&spec.policy)?;
        spec.named()?;
        let (inner, began) = (&self.inner, Instant::now());
        let base = match spec.base.clone() {
            None => Size::default(),
            Some(tree) => {
                let sized = tokio::task::spawn_blocking(move || tree::size(&*tree)).await;
                let sized = sized.unwrap_or_else(|why| Err(io::Error::other(why)));
                sized.map_err(|source| Error::Host { doing: "measure the base", source })?
            }
        };
        let started = match inner.take(&spec.policy, base) {
            Some(started) => started,
            None => inner.start_whole(inner.made_with(&spec.policy), base).await?,
        };
        let path = inner.image.path.clone();
        let policy = spec.policy.clone();
        let cell =
            Cell::new(spec.id, inner.engine.clone(), started, spec.policy, path, spec.base, began).await?;
        let ahead = Docker { inner: inner.clone() };
        tokio::spawn(async move {
            if let Err(why) = ahead.warm_up(&policy).await {
                tracing::warn!(%why, "no container could be started ahead");
            }
        });
        Ok(Box::new(cell))
    }

    async fn warm_up(&self, policy: &Policy) -> Result<(), Error> {
        if self.inner.warm == 0 || self.inner.tried.is_err() {
            return Ok(());
        }
        self.inner.expect(policy);
        self.inner.fill().await
    }

    async fn reap(&self) -> Result<usize, Error> {
        let left = self.inner.engine.leftovers().await?;
        for container in &left {
            self.inner.engine.remove(container).await?;
        }
        shim::sweep(&self.inner.engine).await?;
        Ok(left.len())
    }
}
