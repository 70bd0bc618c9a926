//! The node's hand inside a sandbox: reads and writes by folder descriptors, never following what the job has laid
//! out. What changed is worked out in `changes`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use coinop_shim::beneath::{self, how, is_dots, kind, open_plain, read_capped};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat2, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

use super::super::{Error, Tree};

/// Reads one plain file.
pub fn read(folder: BorrowedFd<'_>, path: &Path, shown: &str, cap_bytes: u64) -> Result<Vec<u8>, Error> {
    let host = |source: io::Error| Error::Host { doing: "read a file", source };
    let opened = open_plain(folder, path).map_err(|errno| match errno {
        Errno::ENOENT | Errno::ENOTDIR | Errno::ENAMETOOLONG => Error::NotFound(shown.to_owned()),
        other => host(other.into()),
    })?;
    let Some((file, _)) = opened else { return Err(Error::BadPath(shown.to_owned())) };
    let read = read_capped(file, cap_bytes).map_err(host)?;
    read.ok_or_else(|| Error::TooLarge { what: shown.to_owned(), cap_bytes })
}

/// Writes one plain file, making its folders.
pub fn write(folder: BorrowedFd<'_>, path: &Path, shown: &str, bytes: &[u8]) -> Result<(), Error> {
    let host = |source: io::Error| match source.raw_os_error().map(Errno::from_raw) {
        Some(
            Errno::ELOOP | Errno::EXDEV | Errno::ENXIO | Errno::EISDIR | Errno::ENOTDIR | Errno::ENAMETOOLONG,
        ) => Error::BadPath(shown.to_owned()),
        _ => Error::Host { doing: "write a file", source },
    };
    let created = beneath::create(folder, path).map_err(host)?;
    let mut file = created.ok_or_else(|| Error::BadPath(shown.to_owned()))?;
    file.set_len(0).and_then(|()| file.write_all(bytes)).map_err(host)
}

/// Runs with another user's rights over files, in a thread of its own: files made are the job's, and what the job
/// may not write is not written. `None` runs as ourselves.
pub fn as_user<T: Send>(uid: Option<u32>, act: impl FnOnce() -> T + Send) -> T {
    let Some(uid) = uid else { return act() };
    let done = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                setfsgid(Gid::from_raw(uid));
                setfsuid(Uid::from_raw(uid));
                // The call cannot fail aloud; asking again tells what holds.
                let (gid, uid_now) = (setfsgid(Gid::from_raw(uid)), setfsuid(Uid::from_raw(uid)));
                assert!(gid.as_raw() == uid && uid_now.as_raw() == uid, "the kernel refused the job's user");
                act()
            })
            .join()
    });
    match done {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Bytes and entries of a tree, for hosts where it must be copied.
pub fn size(tree: &dyn Tree) -> io::Result<(u64, u64)> {
    let (mut bytes, mut entries) = (0u64, 0u64);
    let mut folders = vec![tree.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let found = entry.metadata()?;
            entries += 1;
            // The tmpfs gives whole pages.
            bytes += found.len().div_ceil(4096) * 4096;
            if found.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    Ok((bytes, entries))
}

/// Copies a tree of ours into an empty workspace, both open already: the job's user, with whose rights we write, may
/// not get to either by its path.
pub fn copy(from: OwnedFd, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut listed = Dir::from_fd(from.try_clone()?)?;
    for entry in listed.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if is_dots(name) {
            continue;
        }
        let found = fstatat(&from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        match kind(found.st_mode) {
            SFlag::S_IFDIR => {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
                let below = openat2(&from, name, how(flags))?;
                mkdirat(to, name, Mode::from_bits_truncate(0o755))?;
                copy(below, openat2(to, name, how(flags))?.as_fd())?;
            }
            SFlag::S_IFLNK => nix::unistd::symlinkat(readlinkat(&from, name)?.as_os_str(), to, name)?,
            SFlag::S_IFREG => {
                let old = openat2(&from, name, how(OFlag::O_RDONLY))?;
                let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
                let mode = Mode::from_bits_truncate(if found.st_mode & 0o100 == 0 { 0o644 } else { 0o755 });
                let new = openat2(to, name, how(flags).mode(mode))?;
                io::copy(&mut File::from(old), &mut File::from(new))?;
            }
            _ => {}
        }
    }
    Ok(())
}
