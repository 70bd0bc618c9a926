//! A tree of files as bytes, from and to a container: entry by entry, each a head, a path and its content. One side
//! of it is always a stranger's, so every length is bounded before it is believed.

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat2, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstatat, mkdirat};
use nix::unistd::symlinkat;

use crate::beneath::{how, is_dots, kind, open_beneath, open_plain};

/// The longest path of a folder, in bytes; git itself takes no longer one on most systems.
pub const PATH_BYTES: usize = 4096;
/// The deepest folder of a job.
pub const DEPTH: usize = 200;
/// Room for a name below the longest folder.
const LONGEST: usize = PATH_BYTES + 256;
/// The longest target of a link that a system takes.
const TARGET_BYTES: u64 = 4096;
/// Kind (1), length of the path (2), length of the content (8), big-endian.
const HEAD_BYTES: usize = 11;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Folder,
    File,
    /// A file that its owner may execute.
    Program,
    /// Its content is the target.
    Link,
}

/// What comes before the content of one path. Folders come before what is in them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    pub kind: Kind,
    /// Relative, no `.`, `..` or empty component, no NUL.
    pub path: Vec<u8>,
    /// Bytes of content that follow.
    pub len: u64,
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what.to_owned())
}

impl Head {
    /// # Errors
    /// When the path is too long to be told.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let path = u16::try_from(self.path.len()).map_err(|_| Errno::ENAMETOOLONG)?;
        let kind = match self.kind {
            Kind::Folder => b'd',
            Kind::File => b'f',
            Kind::Program => b'x',
            Kind::Link => b'l',
        };
        to.write_all(&[kind])?;
        to.write_all(&path.to_be_bytes())?;
        to.write_all(&self.len.to_be_bytes())?;
        to.write_all(&self.path)
    }

    /// The next head; none after the last one.
    ///
    /// # Errors
    /// Whatever `write` would not have written, and a stream that ends before its end.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Head>> {
        let mut head = [0; HEAD_BYTES];
        from.read_exact(&mut head)?;
        let [kind, p0, p1, len @ ..] = head;
        let len = u64::from_be_bytes(len);
        let kind = match kind {
            b'.' => return Ok(None),
            b'd' if len == 0 => Kind::Folder,
            b'f' => Kind::File,
            b'x' => Kind::Program,
            b'l' if len <= TARGET_BYTES => Kind::Link,
            _ => return Err(wrong("no entry of a tree")),
        };
        let mut path = vec![0; usize::from(u16::from_be_bytes([p0, p1]))];
        if path.len() > LONGEST {
            return Err(Errno::ENAMETOOLONG.into());
        }
        from.read_exact(&mut path)?;
        let plain = |part: &[u8]| !matches!(part, b"" | b"." | b"..") && !part.contains(&0);
        if !path.split(|byte| *byte == b'/').all(plain) {
            return Err(wrong("no path of a tree"));
        }
        Ok(Some(Head { kind, path, len }))
    }
}

fn write_end(to: &mut impl Write) -> io::Result<()> {
    let mut end = [0; HEAD_BYTES];
    end[0] = b'.';
    to.write_all(&end)
}

/// Why a tree was not packed.
#[derive(Debug, thiserror::Error)]
pub enum Unpacked {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The folder at this path is deeper, or its path longer, than is told.
    #[error("its folders are too deep")]
    TooDeep(Vec<u8>),
}

impl From<Errno> for Unpacked {
    fn from(errno: Errno) -> Unpacked {
        Unpacked::Io(errno.into())
    }
}

/// Whose tree is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// All of it.
    Ours,
    /// Without `.git` at the top, and bounded in depth.
    Jobs,
}

/// Packs everything in a folder, in no order but folders first; pipes, sockets and devices are no part of a tree.
///
/// # Errors
/// `TooDeep` only for a job's tree.
pub fn pack(to: &mut impl Write, folder: OwnedFd, whose: Whose) -> Result<(), Unpacked> {
    Packing { to, whose, path: Vec::new() }.folder(folder, 0)?;
    Ok(write_end(to)?)
}

struct Packing<'a, W> {
    to: &'a mut W,
    whose: Whose,
    path: Vec<u8>,
}

impl<W: Write> Packing<'_, W> {
    fn folder(&mut self, folder: OwnedFd, depth: usize) -> Result<(), Unpacked> {
        let jobs = self.whose == Whose::Jobs;
        if jobs && (depth > DEPTH || self.path.len() > PATH_BYTES) {
            return Err(Unpacked::TooDeep(self.path.clone()));
        }
        // One at a time: a list of all names is memory that a job decides upon.
        let mut listed = Dir::from_fd(folder.try_clone()?)?;
        for entry in listed.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if is_dots(name) || (jobs && depth == 0 && name.to_bytes() == b".git") {
                continue;
            }
            let before = self.path.len();
            if before > 0 {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(name.to_bytes());
            self.one(folder.as_fd(), name, depth)?;
            self.path.truncate(before);
        }
        Ok(())
    }

    fn one(&mut self, folder: BorrowedFd<'_>, name: &CStr, depth: usize) -> Result<(), Unpacked> {
        // One that the job removed while we looked is no error.
        let Some(found) = there(fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW))? else {
            return Ok(());
        };
        match kind(found.st_mode) {
            SFlag::S_IFREG => {
                let Some(Some((file, found))) = there(open_plain(folder, name))? else { return Ok(()) };
                let len = u64::try_from(found.st_size).unwrap_or_default();
                self.head(if found.st_mode & 0o100 == 0 { Kind::File } else { Kind::Program }, len)?;
                // A file that shrinks while it is read is told with zeros to its first length.
                io::copy(&mut file.chain(io::repeat(0)).take(len), self.to)?;
                Ok(())
            }
            SFlag::S_IFLNK => {
                let Some(target) = there(readlinkat(folder, name))? else { return Ok(()) };
                self.head(Kind::Link, target.len() as u64)?;
                Ok(self.to.write_all(target.as_bytes())?)
            }
            SFlag::S_IFDIR => {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
                let Some(below) = there(open_beneath(folder, name, flags))? else { return Ok(()) };
                self.head(Kind::Folder, 0)?;
                self.folder(below, depth + 1)
            }
            _ => Ok(()),
        }
    }

    fn head(&mut self, kind: Kind, len: u64) -> io::Result<()> {
        Head { kind, path: self.path.clone(), len }.write(self.to)
    }
}

fn there<T>(found: nix::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        // EINVAL: a link that became something else while we looked.
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::EINVAL | Errno::ELOOP) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The content of a link.
pub fn target(head: &Head, from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut target = Vec::new();
    from.take(head.len.min(TARGET_BYTES)).read_to_end(&mut target)?;
    if target.len() as u64 == head.len { Ok(target) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

/// Fills an empty folder with a tree.
pub fn unpack(from: &mut impl Read, top: BorrowedFd<'_>) -> io::Result<()> {
    while let Some(head) = Head::read(from)? {
        let path = Path::new(OsStr::from_bytes(&head.path));
        let Some(name) = path.file_name() else { return Err(Errno::EINVAL.into()) };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let folder = OFlag::O_PATH | OFlag::O_DIRECTORY;
        let parent = openat2(top, parent.unwrap_or(Path::new(".")), how(folder))?;
        let mode = match head.kind {
            Kind::Folder => {
                mkdirat(&parent, name, Mode::from_bits_truncate(0o755))?;
                continue;
            }
            Kind::Link => {
                symlinkat(OsStr::from_bytes(&target(&head, from)?), &parent, name)?;
                continue;
            }
            Kind::File => 0o644,
            Kind::Program => 0o755,
        };
        let flags = how(OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL);
        let made = openat2(&parent, name, flags.mode(Mode::from_bits_truncate(mode)))?;
        if io::copy(&mut from.take(head.len), &mut File::from(made))? < head.len {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(heads: &[(Kind, &[u8], u64)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, path, len) in heads {
            Head { kind: *kind, path: path.to_vec(), len: *len }.write(&mut bytes).unwrap();
            bytes.extend(vec![b'x'; *len as usize]);
        }
        bytes
    }

    #[test]
    fn a_head_comes_out_as_it_went_in_whatever_its_name() {
        for path in [&b"a"[..], b"a/b/c", b"\xff\n", b"-rf", b"...", &[b'n'; LONGEST]] {
            for kind in [Kind::Folder, Kind::File, Kind::Program, Kind::Link] {
                let len = u64::from(kind != Kind::Folder) * 4096;
                let head = Head { kind, path: path.to_vec(), len };
                let mut bytes = Vec::new();
                head.write(&mut bytes).unwrap();
                assert_eq!(Head::read(&mut &*bytes).unwrap(), Some(head));
            }
        }
        let mut end = Vec::new();
        write_end(&mut end).unwrap();
        assert_eq!(Head::read(&mut &*end).unwrap(), None);
    }

    #[test]
    fn what_no_tree_holds_is_refused_before_it_is_kept() {
        for path in [&b""[..], b"/", b"/a", b"a/", b"a//b", b".", b"a/../b", b"..", b"a/./b", b"a\0b"] {
            let refused = Head::read(&mut &*packed(&[(Kind::File, path, 0)])).unwrap_err();
            assert_eq!(refused.to_string(), "no path of a tree", "{path:?}");
        }
        let long = packed(&[(Kind::File, &[b'n'; LONGEST + 1], 0)]);
        let refused = Head::read(&mut &*long).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::ENAMETOOLONG as i32));
        for (kind, len) in [(b'd', 1), (b'l', TARGET_BYTES + 1), (b'?', 0)] {
            let mut head = packed(&[(Kind::File, b"a", 0)]);
            head[0] = kind;
            head[3..11].copy_from_slice(&u64::to_be_bytes(len));
            assert_eq!(Head::read(&mut &*head).unwrap_err().to_string(), "no entry of a tree");
        }
        // Cut anywhere, it is not taken for whole.
        let whole = packed(&[(Kind::Link, b"a", 9)]);
        for cut in 0..whole.len() {
            let mut rest = &whole[..cut];
            let read = Head::read(&mut rest).and_then(|head| target(&head.unwrap(), &mut rest));
            assert_eq!(read.unwrap_err().kind(), ErrorKind::UnexpectedEof, "cut at {cut}");
        }
    }
}
