//! The cache on disk: which mirrors and bases are here, and which are in use.
//! Layout: `r/<repository>/{mirror,bases/<commit>/{tree,base.json}}`, `tmp/`, `trash/`. What to fetch and how
//! a tree is written is decided elsewhere; what goes when room is needed, in `room`.

mod room;

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use git2::Oid;
use nix::fcntl::{Flock, FlockArg};
use tokio::sync::Semaphore;

use super::base::{self, Base, Meta, Older};
use super::budget::Budget;
use super::fetch::{Fetch, Name};
use super::mirror::{self, Mirror};
use super::{Error, Location, Options, dot_git, tree, warn};

/// What a file takes on disk beyond its bytes, on average.
const FILE_OVERHEAD: u64 = 4096;

#[derive(Debug)]
pub(super) struct Cache {
    root: PathBuf,
    pub options: Options,
    /// Repositories worked on at once.
    pub gate: Arc<Semaphore>,
    slots: Mutex<HashMap<String, Arc<Slot>>>,
    clock: AtomicU64,
    names: AtomicU64,
    _lock: Flock<File>,
}

/// One repository.
#[derive(Debug)]
pub(super) struct Slot {
    dir: PathBuf,
    /// Held by whoever writes to the mirror or builds a base.
    pub turn: Arc<tokio::sync::Mutex<()>>,
    bases: Mutex<HashMap<Oid, Kept>>,
    mirror_bytes: AtomicU64,
    /// What the mirror had, or would have had, when it was last made anew.
    lean_bytes: AtomicU64,
    used: AtomicU64,
}

/// A base on disk.
#[derive(Debug)]
struct Kept {
    meta: Meta,
    live: Weak<Base>,
    used: u64,
}

impl Kept {
    fn disk(&self) -> u64 {
        let bytes = self.meta.bytes.saturating_add(self.meta.git_bytes.unwrap_or(0));
        bytes.saturating_add(self.meta.files.saturating_mul(FILE_OVERHEAD))
    }
}

// === impl Cache ===

impl Cache {
    pub fn open(root: &Path, options: Options) -> Result<Cache, Error> {
        let host = Error::host::<std::io::Error>;
        fs::create_dir_all(root).map_err(host("make the repository folder"))?;
        let root = root.canonicalize().map_err(host("find the repository folder"))?;
        let file = File::create(root.join("lock")).map_err(host("open the repository folder's lock"))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| Error::Busy { folder: root.display().to_string() })?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let same_boot = !boot.is_empty() && fs::read_to_string(root.join("boot")).is_ok_and(|b| b == boot);
        for (folder, keep) in [("r", same_boot), ("tmp", false), ("trash", false)] {
            let path = root.join(folder);
            if !keep && path.exists() {
                fs::remove_dir_all(&path).map_err(host("empty the repository folder"))?;
            }
            fs::create_dir_all(&path).map_err(host("make the repository folder"))?;
        }
        fs::write(root.join("boot"), &boot).map_err(host("note this host's boot"))?;
        let slots = known(&root.join("r"));
        Ok(Cache {
            gate: Arc::new(Semaphore::new(options.parallel.max(1))),
            slots: Mutex::new(slots),
            clock: AtomicU64::new(1),
            names: AtomicU64::new(0),
            _lock: lock,
            root,
            options,
        })
    }

    /// The repository's place, made if need be.
    pub fn slot(&self, location: &Location) -> Result<Arc<Slot>, Error> {
        let folder = location.folder();
        let mut slots = lock(&self.slots);
        let slot = slots
            .entry(folder.clone())
            .or_insert_with(|| Arc::new(Slot::new(self.root.join("r").join(folder))));
        slot.used.store(self.clock.fetch_add(1, Relaxed), Relaxed);
        Ok(slot.clone())
    }

    /// Makes sure the commit is in the mirror. The caller has the turn.
    pub fn fetch(
        &self,
        slot: &Slot,
        location: &Location,
        name: &Name,
        budget: &Budget,
    ) -> Result<Oid, Error> {
        budget.left()?;
        self.thin_out(slot, budget)?;
        let mirror = slot.mirror()?;
        let scratch = Temporary::new(self)?;
        let fetch = Fetch {
            mirror: &mirror,
            limits: &self.options.limits,
            budget,
            scratch: &scratch.path,
            room: &|| self.make_room(slot, None, budget),
        };
        let commit = fetch.pin(location, name, &self.options);
        slot.mirror_bytes.store(mirror.bytes(), Relaxed);
        commit
    }

    /// Builds the base of a commit that is in the mirror, or finds it built. The caller has the turn.
    pub fn build(&self, slot: &Slot, commit: Oid, budget: &Budget) -> Result<Arc<Base>, Error> {
        if let Some(base) = slot.base(commit) {
            return Ok(base);
        }
        match self.write_base(slot, commit, budget) {
            Err(e @ Error::Broken { .. }) => {
                // Do not trust what this mirror has of the commit, nor tell a server that we have it.
                if slot.in_use() {
                    slot.unpin(commit);
                } else {
                    self.discard(&slot.dir.join("mirror"))?;
                }
                Err(e)
            }
            other => other,
        }
    }

    fn write_base(&self, slot: &Slot, commit: Oid, budget: &Budget) -> Result<Arc<Base>, Error> {
        let host = Error::host::<std::io::Error>;
        let limits = &self.options.limits;
        let mirror = slot.mirror()?;
        let odb = mirror.odb()?;
        let top = mirror::tree_of(&odb, commit)?;
        // Before one of them is held here for its files.
        self.trim();
        let old = slot.newest();
        let old_tree = old.as_ref().and_then(|b| Oid::from_str(&b.meta.tree).ok()).filter(|t| odb.exists(*t));
        let plan = tree::plan(&odb, top, old_tree, limits)?;
        // Only now is it known that the commit's tree is one that could be kept.
        self.make_room(slot, Some(commit), budget)?;
        let made = Temporary::new(self)?;
        let folder = made.path.join("tree");
        fs::create_dir(&folder).map_err(host("make a base's folder"))?;
        let older =
            old.as_ref().filter(|_| old_tree.is_some()).map(|b| Older { path: &b.path, meta: &b.meta });
        let (bytes, found) =
            base::write_tree(&plan, &mirror.objects(), &folder, older.as_ref(), limits, budget)?;
        let git_bytes = dot_git::make(&mirror, commit, &folder, budget)?;
        let warnings = warn::settle(warn::paths(&plan).into_iter().chain(found).collect());
        let meta =
            Meta { tree: top.to_string(), files: plan.files, bytes, git_bytes: Some(git_bytes), warnings };
        let json =
            serde_json::to_vec(&meta).map_err(|e| Error::Host { doing: "note a base", source: e.into() })?;
        fs::write(made.path.join("base.json"), json).map_err(host("note a base"))?;
        fs::create_dir_all(slot.dir.join("bases")).map_err(host("make a base's folder"))?;
        // Complete, then renamed: a base under its own name is whole, even after kill -9.
        fs::rename(&made.path, slot.base_dir(commit)).map_err(host("put a base in its place"))?;
        Ok(slot.remember(commit, meta, self.clock.fetch_add(1, Relaxed)))
    }

    pub fn bytes(&self) -> u64 {
        lock(&self.slots).values().map(|s| s.bytes()).sum()
    }

    /// Out of sight at once; gone when a background thread gets to it, or at the next start.
    fn discard(&self, path: &Path) -> Result<(), Error> {
        let away = self.root.join("trash").join(self.fresh_name());
        fs::rename(path, &away).map_err(Error::host("move something out of the cache"))?;
        std::thread::spawn(move || {
            if let Err(e) = fs::remove_dir_all(&away) {
                tracing::warn!(error = %e, folder = %away.display(), "left in the trash until the next start");
            }
        });
        Ok(())
    }

    fn fresh_name(&self) -> String {
        self.names.fetch_add(1, Relaxed).to_string()
    }
}

// === impl Slot ===

impl Slot {
    fn new(dir: PathBuf) -> Slot {
        Slot {
            dir,
            turn: Arc::new(tokio::sync::Mutex::new(())),
            bases: Mutex::new(HashMap::new()),
            mirror_bytes: AtomicU64::new(0),
            lean_bytes: AtomicU64::new(0),
            used: AtomicU64::new(0),
        }
    }

    pub fn mirror(&self) -> Result<Mirror, Error> {
        Mirror::open(&self.dir.join("mirror"))
    }

    /// Whether the commit is in the mirror, without making one.
    pub fn has(&self, commit: Oid) -> bool {
        self.dir.join("mirror/refs/pins").join(commit.to_string()).exists()
    }

    fn unpin(&self, commit: Oid) {
        let pin = self.dir.join("mirror/refs/pins").join(commit.to_string());
        if let Err(e) = fs::remove_file(&pin) {
            tracing::warn!(error = %e, pin = %pin.display(), "a broken commit stays in its mirror");
        }
    }

    fn base_dir(&self, commit: Oid) -> PathBuf {
        self.dir.join("bases").join(commit.to_string())
    }

    /// The finished base of a commit.
    pub fn base(&self, commit: Oid) -> Option<Arc<Base>> {
        let mut bases = lock(&self.bases);
        let kept = bases.get_mut(&commit)?;
        kept.used = self.used.load(Relaxed);
        if let Some(live) = kept.live.upgrade() {
            return Some(live);
        }
        let base = Arc::new(Base { path: self.base_dir(commit).join("tree"), meta: kept.meta.clone() });
        kept.live = Arc::downgrade(&base);
        Some(base)
    }

    fn remember(&self, commit: Oid, meta: Meta, used: u64) -> Arc<Base> {
        let base = Arc::new(Base { path: self.base_dir(commit).join("tree"), meta: meta.clone() });
        lock(&self.bases).insert(commit, Kept { meta, live: Arc::downgrade(&base), used });
        base
    }

    /// The base used last, held so that it stays.
    fn newest(&self) -> Option<Arc<Base>> {
        let newest = lock(&self.bases).iter().max_by_key(|(_, k)| k.used).map(|(id, _)| *id)?;
        self.base(newest)
    }

    /// The least lately used base that nobody holds.
    fn oldest(&self) -> Option<(u64, Oid)> {
        lock(&self.bases)
            .iter()
            .filter(|(_, k)| k.live.strong_count() == 0)
            .map(|(id, k)| (k.used, *id))
            .min()
    }

    fn in_use(&self) -> bool {
        lock(&self.bases).values().any(|k| k.live.strong_count() > 0)
    }

    fn bytes(&self) -> u64 {
        self.mirror_bytes.load(Relaxed) + lock(&self.bases).values().map(Kept::disk).sum::<u64>()
    }
}

/// A folder in `tmp/` that goes when this value goes, unless it was renamed away.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    fn new(cache: &Cache) -> Result<Temporary, Error> {
        let path = cache.root.join("tmp").join(cache.fresh_name());
        fs::create_dir(&path).map_err(Error::host("make a temporary folder"))?;
        Ok(Temporary { path })
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.path) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => {
                tracing::warn!(error = %e, folder = %self.path.display(), "left behind until the next start")
            }
        }
    }
}

/// A lock whose holder panicked holds nothing half done here: every change is one insert or remove.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an earlier life of this node left, as far as it is whole.
fn known(repositories: &Path) -> HashMap<String, Arc<Slot>> {
    let mut slots = HashMap::new();
    let Ok(entries) = fs::read_dir(repositories) else { return slots };
    for entry in entries.flatten() {
        let slot = Slot::new(entry.path());
        if let Ok(mirror) = slot.mirror() {
            slot.mirror_bytes.store(mirror.bytes(), Relaxed);
        }
        if let Ok(bases) = fs::read_dir(entry.path().join("bases")) {
            for base in bases.flatten() {
                let id = base.file_name().to_str().and_then(super::remote::full_id);
                let meta: Option<Meta> = fs::read(base.path().join("base.json"))
                    .ok()
                    .and_then(|b| serde_json::from_slice(&b).ok());
                // One that an older version made has no `.git`; what a job sees may not depend on that.
                if let (Some(id), Some(meta)) = (id, meta.filter(|meta| meta.git_bytes.is_some())) {
                    lock(&slot.bases).insert(id, Kept { meta, live: Weak::new(), used: 0 });
                }
            }
        }
        slots.insert(entry.file_name().to_string_lossy().into_owned(), Arc::new(slot));
    }
    slots
}
