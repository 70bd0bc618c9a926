//! Repositories of strangers, through git2 and a git client of our own: a bare mirror a repository, a
//! read-only base tree a commit, a unified diff of what a job changed. It runs no program, no hook, no
//! filter and no submodule, reads no configuration of this host or of a repository, and reads nothing that
//! a job wrote except as `Change` values that it is handed.

mod address;
mod base;
mod base85;
mod budget;
mod cache;
mod diff_read;
mod diff_write;
mod dot_git;
mod error;
mod fetch;
mod http;
pub mod ignore;
mod lean;
mod links;
mod local;
mod mirror;
mod names;
mod pack;
mod packscan;
mod patch;
mod pkt;
mod remote;
pub mod serve;
mod tree;
mod warn;

use std::path::Path;
use std::sync::{Arc, Once};
use std::time::Instant;

use git2::Oid;
use serde::{Deserialize, Serialize};

pub use address::Location;
pub use base::Base;
pub use error::Error;
pub use fetch::check_ref;
pub use ignore::Ignore;
pub use patch::{Patch, Skipped};
pub use warn::{Kind as WarningKind, MAX_WARNINGS, Warning};

use crate::sandbox::Change;
use budget::{Budget, CancelOnDrop};
use cache::{Cache, Slot};
use fetch::Name;

/// Bounds on what a stranger's repository may cost. Sizes in bytes, times in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes taken from the network for one fetch.
    pub fetch_bytes: u64,
    /// One call of `pin`, `base`, `patch` or `applies`, waiting for its turn included.
    pub time_ms: u64,
    /// Longest silence of a server.
    pub stall_ms: u64,
    /// Objects in one pack.
    pub objects: u64,
    /// Contents of all objects of one pack, unpacked.
    pub unpacked_bytes: u64,
    /// Files, symlinks and folders of a tree.
    pub files: u64,
    /// One file's contents, and any other object.
    pub file_bytes: u64,
    /// Contents of all files of a tree.
    pub tree_bytes: u64,
    /// One path, relative to the top.
    pub path_bytes: u64,
    /// Folders within folders.
    pub depth: u64,
    /// A patch that comes out.
    pub patch_bytes: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            fetch_bytes: 512 << 20,
            time_ms: 120_000,
            stall_ms: 20_000,
            objects: 2_000_000,
            unpacked_bytes: 8 << 30,
            files: 200_000,
            file_bytes: 128 << 20,
            tree_bytes: 2 << 30,
            path_bytes: 1024,
            depth: 128,
            patch_bytes: 32 << 20,
        }
    }
}

/// How the room is built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Clone from private, loopback and link-local addresses, too.
    pub allow_private: bool,
    /// Clone `file://` URLs.
    pub allow_file: bool,
    pub limits: Limits,
    /// Bytes of mirrors and bases, in use or kept for the next job. What is in use is never removed; while that
    /// is as much, nothing is added (`Error::Full`). Work under way, `parallel` at most, may go over it.
    pub cache_bytes: u64,
    /// Repositories worked on at once.
    pub parallel: usize,
    /// How long a server's yes to one customer about one commit is good for, milliseconds.
    pub grace_ms: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            allow_private: false,
            allow_file: false,
            limits: Limits::default(),
            cache_bytes: 8 << 30,
            parallel: 4,
            grace_ms: 60_000,
        }
    }
}

/// One commit of one repository, named so that it cannot move. Whoever holds one was let in to that commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// Cleaned by `Location`, as it is fetched from.
    pub url: String,
    /// 40 hex digits.
    pub commit: String,
    /// What the customer asked for; `None` for the default branch.
    pub git_ref: Option<String>,
}

/// The room. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Repos {
    cache: Arc<Cache>,
}

// === impl Repos ===

impl Repos {
    /// Opens the cache in `dir`, which must be ours alone. What an earlier boot of this host left is
    /// dropped: nothing here was synced to disk, all of it can be fetched again.
    pub fn open(dir: &Path, options: Options) -> Result<Repos, Error> {
        prepare_libgit2();
        Ok(Repos { cache: Arc::new(Cache::open(dir, options)?) })
    }

    /// Finds the commit that `git_ref` means now, and fetches it unless it is here. A branch goes before
    /// a tag of the same name; a full commit id is always a commit; seven or more digits may abbreviate one.
    ///
    /// The server is always asked, even for a commit that is here, unless it said yes to the same customer about the
    /// same commit within `grace_ms`. What it no longer has, or gives only to some, leaves the cache.
    pub async fn pin_for(&self, customer: &str, url: &str, git_ref: Option<&str>) -> Result<Pin, Error> {
        let location = self.location(url)?;
        let name = Name::parse(git_ref)?;
        let pin = |commit: Oid| Pin {
            url: location.text(),
            commit: commit.to_string(),
            git_ref: git_ref.filter(|r| !r.is_empty()).map(str::to_string),
        };
        let slot = self.cache.slot(&location)?;
        if let Name::Commit(id) = name
            && slot.has(id)
            && slot.is_granted(customer, id, self.cache.options.grace_ms)
        {
            return Ok(pin(id));
        }
        let commit = {
            let (location, cache) = (location.clone(), self.cache.clone());
            self.in_turn(slot.clone(), move |slot, budget| cache.ask(slot, &location, &name, budget)).await?
        };
        slot.grant(customer, commit, self.cache.options.grace_ms);
        Ok(pin(commit))
    }

    /// The same, asked by the owner of this node.
    pub async fn pin(&self, url: &str, git_ref: Option<&str>) -> Result<Pin, Error> {
        self.pin_for("", url, git_ref).await
    }

    /// The pin of a job that was let in at this commit before: the server is asked only for what is not here.
    pub fn pin_again(&self, url: &str, commit: &str) -> Result<Pin, Error> {
        let url = self.location(url)?.text();
        let pin = Pin { url, commit: commit.to_string(), git_ref: Some(commit.to_string()) };
        self.read_pin(&pin).map(|_| pin)
    }

    /// The pinned commit's files as a read-only folder, which stays as long as the value lives.
    pub async fn base(&self, pin: &Pin) -> Result<Arc<Base>, Error> {
        let (location, commit) = self.read_pin(pin)?;
        let slot = self.cache.slot(&location)?;
        if let Some(base) = slot.base(commit) {
            return Ok(base);
        }
        let cache = self.cache.clone();
        self.in_turn(slot, move |slot, budget| {
            cache.ensure(slot, &location, commit, budget)?;
            cache.build(slot, commit, budget)
        })
        .await
    }

    /// The unified diff from the pinned commit to what a job made of it, as `git apply` takes it.
    pub async fn patch(&self, pin: &Pin, changes: Vec<Change>) -> Result<Patch, Error> {
        let limits = self.cache.options.limits.clone();
        self.with_objects(pin, move |objects, commit| patch::make(objects, commit, &changes, &limits)).await
    }

    /// Whether a diff applies to the commit, fetched if need be; `DoesNotApply` says why not.
    pub async fn applies(&self, url: &str, commit: &str, diff: Vec<u8>) -> Result<(), Error> {
        let pin = self.pin(url, Some(commit)).await?;
        let limits = self.cache.options.limits.clone();
        self.with_objects(&pin, move |objects, commit| patch::check(objects, commit, &diff, &limits)).await
    }

    /// Waits until no work goes on. Work whose caller went away is told to stop, and ends on its own thread;
    /// after this the folder is free as soon as the last `Repos` is dropped.
    pub async fn idle(&self) {
        let all = u32::try_from(self.cache.options.parallel.max(1)).unwrap_or(u32::MAX);
        if self.cache.gate.acquire_many(all).await.is_err() {
            tracing::trace!("the gate is never closed");
        }
    }

    /// Bytes that mirrors and bases take, as counted for the cap.
    pub fn cached_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    fn location(&self, url: &str) -> Result<Location, Error> {
        Location::parse(url, self.cache.options.allow_file)
    }

    fn read_pin(&self, pin: &Pin) -> Result<(Location, Oid), Error> {
        let location = self.location(&pin.url)?;
        let commit = remote::full_id(&pin.commit)
            .ok_or_else(|| Error::refused("a pin's commit must be 40 hex digits"))?;
        Ok((location, commit))
    }

    async fn with_objects<T: Send + 'static>(
        &self,
        pin: &Pin,
        work: impl FnOnce(&Path, Oid) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (location, commit) = self.read_pin(pin)?;
        let slot = self.cache.slot(&location)?;
        let cache = self.cache.clone();
        self.in_turn(slot, move |slot, budget| {
            cache.ensure(slot, &location, commit, budget)?;
            work(&slot.mirror()?.objects(), commit)
        })
        .await
    }

    /// Runs blocking work on one repository: one at a time a repository, a few at a time in all, within
    /// the time cap. If the caller goes away, the work is told to stop.
    async fn in_turn<T: Send + 'static>(
        &self,
        slot: Arc<Slot>,
        work: impl FnOnce(&Slot, &Budget) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let limits = &self.cache.options.limits;
        let budget =
            Arc::new(Budget::new(limits.time_ms, limits.stall_ms, limits.fetch_bytes, Instant::now()));
        let cancel = CancelOnDrop(budget.clone());
        let cap_ms = limits.time_ms;
        let cache = self.cache.clone();
        let all = async move {
            let turn = slot.turn.clone().lock_owned().await;
            let gate = cache.gate.clone().acquire_owned().await.map_err(|_| Error::Cancelled)?;
            let done = tokio::task::spawn_blocking(move || {
                let result = work(&slot, &budget);
                drop(turn);
                drop(slot);
                cache.trim();
                drop(cache);
                // Last, so that nobody who has passed the gate holds the cache any more: see `idle`.
                drop(gate);
                result
            });
            done.await.map_err(|_| Error::broken("the work on the repository panicked"))?
        };
        let result = tokio::time::timeout(std::time::Duration::from_millis(cap_ms), all).await;
        drop(cancel);
        result.unwrap_or(Err(Error::Timeout { cap_ms }))
    }
}

/// Makes libgit2 read no configuration of this host, once, before the room first uses it.
fn prepare_libgit2() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        use git2::ConfigLevel::{Global, ProgramData, System, XDG};
        for level in [System, Global, XDG, ProgramData] {
            #[expect(unsafe_code, reason = "git2 offers no other way to shut out the host's configuration")]
            // SAFETY: the call changes a C global that libgit2 reads when it opens configuration. Every
            // use of libgit2 in this program is in this room and comes after this `Once` has finished.
            let set = unsafe { git2::opts::set_search_path(level, "") };
            if let Err(e) = set {
                tracing::warn!(error = %e, "libgit2 keeps a configuration search path");
            }
        }
        // A pack's ids were computed from its bytes when it came in; hashing again at each read buys nothing.
        git2::opts::strict_hash_verification(false);
        // Every object is read once or twice; keeping it would only take memory.
        git2::opts::enable_caching(false);
    });
}
