//! Puts a planned tree on disk: with several threads, each with its own view of the objects, files made
//! relative to open folders, never through a symlink; unchanged files are hard links into an older base.
//! What may stand there was decided by `tree`; what is worth a warning is decided by `warn`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};

use git2::{Odb, Oid};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{linkat, symlinkat, write};
use serde::{Deserialize, Serialize};

use super::budget::Budget;
use super::tree::{File, Folder, Kind, Plan, shown};
use super::{Error, Limits, Warning, WarningKind, mirror, warn};

/// Threads that write one tree.
const MAX_THREADS: usize = 4;
/// Longest symlink target, in bytes; the kernel takes no longer one.
const MAX_TARGET: usize = 4095;

/// What is known of a finished base; kept beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Meta {
    pub tree: String,
    /// Files and symlinks.
    pub files: u64,
    /// Bytes of their contents.
    pub bytes: u64,
    /// Bytes of its `.git` (`dot_git`); none where an older version made the base.
    #[serde(default)]
    pub git_bytes: Option<u64>,
    pub warnings: Vec<Warning>,
}

/// A read-only tree of one commit on this host. It stays in place as long as this value lives.
#[derive(Debug)]
pub struct Base {
    pub(super) path: PathBuf,
    pub(super) meta: Meta,
}

impl Base {
    /// Likely secrets, agent configuration, submodules and the like; at most `warn::MAX_WARNINGS`.
    pub fn warnings(&self) -> &[Warning] {
        &self.meta.warnings
    }

    /// Files and symlinks.
    pub fn files(&self) -> u64 {
        self.meta.files
    }

    /// Bytes of all files' contents.
    pub fn bytes(&self) -> u64 {
        self.meta.bytes
    }
}

impl crate::sandbox::Tree for Base {
    fn path(&self) -> &Path {
        &self.path
    }
}

/// An older base of the same repository, to share unchanged files with.
#[derive(Debug)]
pub(super) struct Older<'a> {
    pub path: &'a Path,
    pub meta: &'a Meta,
}

/// What all threads share.
struct Work<'a> {
    plan: &'a Plan,
    top: OwnedFd,
    old_top: Option<OwnedFd>,
    next: AtomicUsize,
    bytes: AtomicU64,
    linked: AtomicU64,
    stop: AtomicBool,
    limits: &'a Limits,
    budget: &'a Budget,
    /// Our umask would hide files from the sandbox's user.
    fchmod: bool,
    found: Mutex<Vec<Warning>>,
}

/// Writes the plan into the empty folder `to`. Returns the bytes of all files and the warnings.
pub(super) fn write_tree(
    plan: &Plan,
    objects: &Path,
    to: &Path,
    older: Option<&Older<'_>>,
    limits: &Limits,
    budget: &Budget,
) -> Result<(u64, Vec<Warning>), Error> {
    let folder = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let top = open(to, folder, Mode::empty()).map_err(Error::host("open a new base's folder"))?;
    let old_top = older.and_then(|o| open(o.path, folder, Mode::empty()).ok());
    // Folders first: after this, no symlink can take a folder's place, for every name is made once.
    let fchmod_needed = umask_hides(&top)?;
    for one in plan.folders.iter().skip(1) {
        mkdirat(&top, one.path.as_slice(), Mode::from_bits_truncate(0o755))
            .map_err(|e| made(e, &one.path, b""))?;
        if fchmod_needed {
            let fd = openat(&top, one.path.as_slice(), folder, Mode::empty())
                .map_err(|e| made(e, &one.path, b""))?;
            fchmod(&fd, Mode::from_bits_truncate(0o755)).map_err(|e| made(e, &one.path, b""))?;
        }
    }
    let work = Work {
        plan,
        top,
        old_top,
        next: AtomicUsize::new(0),
        bytes: AtomicU64::new(0),
        linked: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        limits,
        budget,
        fchmod: fchmod_needed,
        found: Mutex::new(Vec::new()),
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).clamp(1, MAX_THREADS);
    let results: Vec<Result<(), Error>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(|| work.run(objects))).collect();
        handles
            .into_iter()
            .map(|h| h.join().unwrap_or_else(|_| Err(Error::broken("a writer panicked"))))
            .collect()
    });
    // The first cause, not the others' "stopped".
    let mut stopped = None;
    for result in results {
        match result {
            Ok(()) => {}
            Err(Error::Cancelled) => stopped = Some(Error::Cancelled),
            Err(e) => return Err(e),
        }
    }
    if let Some(e) = stopped {
        return Err(e);
    }
    let mut found = work.found.into_inner().unwrap_or_default();
    if let Some(older) = older {
        keep_linked(plan, &older.meta.warnings, &mut found);
    }
    Ok((work.bytes.into_inner(), found))
}

/// Content warnings of files that were linked, not read.
fn keep_linked(plan: &Plan, old: &[Warning], found: &mut Vec<Warning>) {
    let by_content = |w: &&Warning| matches!(w.kind, WarningKind::SecretContent | WarningKind::LfsPointer);
    let content: Vec<&Warning> = old.iter().filter(by_content).collect();
    if content.is_empty() {
        return;
    }
    for folder in &plan.folders {
        for file in folder.files.iter().filter(|f| f.same) {
            let path = shown(&folder.path, &file.name);
            found.extend(content.iter().filter(|w| w.path == path).map(|w| (*w).clone()));
        }
    }
}

/// Whether the process's umask would hide files from the sandbox's user.
fn umask_hides(top: &OwnedFd) -> Result<bool, Error> {
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let probe = b".umask".as_slice();
    let fd = openat(top, probe, flags, Mode::from_bits_truncate(0o755)).map_err(|e| made(e, probe, b""))?;
    let stat = nix::sys::stat::fstat(&fd).map_err(|e| made(e, probe, b""))?;
    nix::unistd::unlinkat(top, probe, nix::unistd::UnlinkatFlags::NoRemoveDir)
        .map_err(|e| made(e, probe, b""))?;
    Ok(stat.st_mode & 0o777 != 0o755)
}

impl Work<'_> {
    fn run(&self, objects: &Path) -> Result<(), Error> {
        let odb = mirror::open_odb(objects)?;
        loop {
            if self.stop.load(Relaxed) {
                return Err(Error::Cancelled);
            }
            let n = self.next.fetch_add(1, Relaxed);
            let Some(folder) = self.plan.folders.get(n) else { return Ok(()) };
            let done = self.budget.left().map(|_| ()).and_then(|()| self.folder(&odb, folder));
            if let Err(e) = done {
                self.stop.store(true, Relaxed);
                return Err(e);
            }
        }
    }

    fn folder(&self, odb: &Odb<'_>, folder: &Folder) -> Result<(), Error> {
        if folder.files.is_empty() {
            return Ok(());
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_PATH | OFlag::O_CLOEXEC;
        let at = |top: &OwnedFd| {
            let path = if folder.path.is_empty() { b".".as_slice() } else { folder.path.as_slice() };
            openat(top, path, flags, Mode::empty())
        };
        let here = at(&self.top).map_err(|e| made(e, &folder.path, b""))?;
        let old =
            self.old_top.as_ref().filter(|_| folder.files.iter().any(|f| f.same)).and_then(|t| at(t).ok());
        for file in &folder.files {
            if file.same && old.as_ref().is_some_and(|old| self.link(odb, old, &here, file)) {
                continue;
            }
            self.file(odb, &here, &folder.path, file)?;
        }
        Ok(())
    }

    /// Shares the older base's file; `false` if that cannot be done, and then it is written anew.
    fn link(&self, odb: &Odb<'_>, old: &OwnedFd, here: &OwnedFd, file: &File) -> bool {
        // Not for symlinks (cheap to make) – and the size comes from the object, not from the disk.
        if file.kind == Kind::Symlink {
            return false;
        }
        let Ok((size, _)) = odb.read_header(file.id) else { return false };
        let name = file.name.as_slice();
        if linkat(old, name, here, name, AtFlags::empty()).is_err() {
            return false;
        }
        self.linked.fetch_add(1, Relaxed);
        self.bytes.fetch_add(size as u64, Relaxed);
        true
    }

    fn file(&self, odb: &Odb<'_>, here: &OwnedFd, folder: &[u8], file: &File) -> Result<(), Error> {
        let missing = |id: Oid| {
            Error::broken(format!("the contents of {} ({id}) are missing", shown(folder, &file.name)))
        };
        // The size is known before anything is unpacked into memory.
        let (size, _) = odb.read_header(file.id).map_err(|_| missing(file.id))?;
        let size = size as u64;
        if size > self.limits.file_bytes {
            return Err(Error::TooLarge { what: "bytes of a file", cap: self.limits.file_bytes });
        }
        if self.bytes.fetch_add(size, Relaxed) + size > self.limits.tree_bytes {
            return Err(Error::TooLarge { what: "bytes of the tree", cap: self.limits.tree_bytes });
        }
        let object = odb.read(file.id).map_err(|_| missing(file.id))?;
        if object.kind() != git2::ObjectType::Blob {
            return Err(Error::broken(format!("{} is not a file's contents", shown(folder, &file.name))));
        }
        let name = file.name.as_slice();
        if file.kind == Kind::Symlink {
            let target = object.data();
            if target.is_empty() || target.len() > MAX_TARGET || target.contains(&0) {
                return Err(Error::refused(format!("an impossible symlink: {}", shown(folder, name))));
            }
            return symlinkat(std::ffi::OsStr::from_bytes(target), here, name)
                .map_err(|e| made(e, folder, name));
        }
        let mode = Mode::from_bits_truncate(if file.kind == Kind::Executable { 0o755 } else { 0o644 });
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let fd = openat(here, name, flags, mode).map_err(|e| made(e, folder, name))?;
        if self.fchmod {
            fchmod(&fd, mode).map_err(|e| made(e, folder, name))?;
        }
        write_all(&fd, object.data()).map_err(|e| made(e, folder, name))?;
        if let Some(what) = warn::content(object.data())
            && let Ok(mut found) = self.found.lock()
            && found.len() < warn::MAX_WARNINGS
        {
            found.push(Warning::secret_content(shown(folder, name), what));
        }
        Ok(())
    }
}

fn write_all(fd: impl AsFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match write(&fd, bytes) {
            Ok(0) => return Err(Errno::EIO),
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// What a failed creation means: a second entry of the same name is the repository's fault.
fn made(e: Errno, folder: &[u8], name: &[u8]) -> Error {
    match e {
        Errno::EEXIST => Error::refused(format!("two entries of one name: {}", shown(folder, name))),
        Errno::ENAMETOOLONG | Errno::EILSEQ | Errno::EINVAL => {
            Error::refused(format!("a name this host cannot hold: {}", shown(folder, name)))
        }
        e => Error::Host { doing: "write a base tree", source: io::Error::from(e) },
    }
}
