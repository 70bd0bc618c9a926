//! Trees to and from a shim: packs a base for a workspace, and tells from a packed workspace what a job changed. All
//! blocks; the names and contents that come back are a stranger's.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use coinop_shim::beneath::{is_dots, kind, open_beneath, open_plain};
use coinop_shim::tree::{self, Head, Kind, Unpacked, Whose};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, readlinkat};
use nix::sys::stat::{SFlag, fstatat};
use tokio::sync::mpsc;

use super::super::found::{Found, bounded};
use super::super::{Changes, Content, Error, LeaveOut, Tree};
use super::hardened::Size;

/// Bytes compared, and bytes sent, at once.
const CHUNK: usize = 32 * 1024;
/// A tmpfs gives whole pages.
const PAGE: u64 = 4096;

/// What a tree will take in a workspace.
pub fn size(tree: &dyn Tree) -> io::Result<Size> {
    let mut size = Size::default();
    let mut folders = vec![tree.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let found = entry.metadata()?;
            size.entries += 1;
            if found.is_dir() {
                folders.push(entry.path());
            } else {
                size.bytes += found.len().div_ceil(PAGE) * PAGE;
            }
        }
    }
    Ok(size)
}

/// Packs a tree, piece by piece, as long as somebody takes the pieces.
pub fn pack(tree: &dyn Tree, to: mpsc::Sender<Vec<u8>>) -> io::Result<()> {
    let mut to = io::BufWriter::with_capacity(CHUNK, Pieces(to));
    tree::pack(&mut to, File::open(tree.path())?.into(), Whose::Ours).map_err(|why| match why {
        Unpacked::Io(why) => why,
        Unpacked::TooDeep(_) => io::Error::other(why),
    })?;
    to.flush()
}

struct Pieces(mpsc::Sender<Vec<u8>>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = bytes.get(..bytes.len().min(CHUNK)).unwrap_or_default();
        let sent = self.0.blocking_send(piece.to_vec());
        sent.map(|()| piece.len()).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The bytes of a packed workspace as they come; an error in place of the rest when it was not sent whole.
pub struct Packed {
    pieces: mpsc::Receiver<io::Result<Vec<u8>>>,
    piece: io::Cursor<Vec<u8>>,
}

impl Packed {
    pub fn new(pieces: mpsc::Receiver<io::Result<Vec<u8>>>) -> Packed {
        Packed { pieces, piece: io::Cursor::default() }
    }
}

impl Read for Packed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let len = self.piece.read(into)?;
            if len > 0 {
                return Ok(len);
            }
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = io::Cursor::new(piece?),
                None => return Ok(0),
            }
        }
    }
}

fn host(source: io::Error) -> Error {
    Error::Host { doing: "read what the job changed", source }
}

/// Everything in which a packed workspace differs from its base, sorted by path.
pub fn changes(
    mut packed: impl Read,
    base: Option<&dyn Tree>,
    cap_bytes: u64,
    leave_out: LeaveOut,
) -> Result<Changes, Error> {
    let base = base.map(|tree| File::open(tree.path()).map(OwnedFd::from)).transpose().map_err(host)?;
    let mut found = Found::new(cap_bytes, leave_out);
    // Every path of the base that is there now, and whether it is a folder.
    let mut now: BTreeMap<Vec<u8>, bool> = BTreeMap::new();
    while let Some(head) = Head::read(&mut packed).map_err(host)? {
        let path = &head.path;
        bounded(path, path.iter().filter(|byte| **byte == b'/').count())?;
        let at = Path::new(OsStr::from_bytes(path));
        let was = match &base {
            Some(base) => look(base.as_fd(), at).map_err(host)?,
            None => None,
        };
        if was.is_some() {
            now.insert(path.clone(), head.kind == Kind::Folder);
        }
        // Where the base has the same kind here.
        let of_base = base.as_ref().map(AsFd::as_fd).filter(|_| was == Some(head.kind));
        let is_new = head.kind != Kind::Folder && was.is_none_or(|was| was == Kind::Folder);
        if is_new && found.leaves_out(path, false) {
            found.left_out(1);
            io::copy(&mut (&mut packed).take(head.len), &mut io::sink()).map_err(host)?;
            // What the base has below this name is gone all the same.
            if was.is_some() {
                found.tell(path, Content::Deleted)?;
            }
            continue;
        }
        match head.kind {
            Kind::Folder if was.is_some_and(|was| was != Kind::Folder) => {
                found.tell(path, Content::Deleted)?;
            }
            Kind::Folder => {}
            Kind::Link => {
                let target = tree::target(&head, &mut packed).map_err(host)?;
                let before = of_base.map(|base| link(base, at)).transpose().map_err(host)?.flatten();
                if before.as_ref() != Some(&target) {
                    found.tell(path, Content::Symlink { target })?;
                }
            }
            Kind::File | Kind::Program => {
                let before = of_base.map(|base| open_at(base, at)).transpose().map_err(host)?.flatten();
                let mut content = (&mut packed).take(head.len);
                match differing(&mut content, head.len, before, found.left()).map_err(host)? {
                    Differs::Same => {}
                    Differs::TooLarge => return Err(found.too_large()),
                    Differs::Bytes(bytes) => {
                        let executable = head.kind == Kind::Program;
                        found.tell(path, Content::File { bytes, executable })?;
                    }
                }
            }
        }
    }
    if let Some(base) = base {
        gone(base, &mut Vec::new(), &now, &mut found)?;
    }
    Ok(found.sorted())
}

enum Differs {
    Same,
    TooLarge,
    Bytes(Vec<u8>),
}

/// Compares a file with the base's, as far as they are the same, without loading either.
fn differing(
    entry: &mut impl Read,
    len: u64,
    before: Option<(File, u64)>,
    cap_bytes: u64,
) -> io::Result<Differs> {
    let mut bytes = Vec::new();
    if let Some((mut before, was_len)) = before
        && was_len == len
    {
        let mut same: u64 = 0;
        let (mut old, mut new) = (Vec::new(), Vec::new());
        loop {
            old.clear();
            new.clear();
            (&mut before).take(CHUNK as u64).read_to_end(&mut old)?;
            entry.take(CHUNK as u64).read_to_end(&mut new)?;
            if old != new {
                break;
            }
            same += new.len() as u64;
            if new.is_empty() {
                return whole(same, len).map(|()| Differs::Same);
            }
        }
        if len > cap_bytes {
            return Ok(Differs::TooLarge);
        }
        // What was the same so far is in the base still.
        before.rewind()?;
        before.take(same).read_to_end(&mut bytes)?;
        bytes.extend(new);
    }
    if len > cap_bytes {
        return Ok(Differs::TooLarge);
    }
    entry.read_to_end(&mut bytes)?;
    whole(bytes.len() as u64, len).map(|()| Differs::Bytes(bytes))
}

fn whole(read: u64, len: u64) -> io::Result<()> {
    if read == len { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Tells what of the base is there no more.
fn gone(
    folder: OwnedFd,
    path: &mut Vec<u8>,
    now: &BTreeMap<Vec<u8>, bool>,
    found: &mut Found,
) -> Result<(), Error> {
    let errno = |errno: Errno| host(errno.into());
    let mut listed = Dir::from_fd(folder.try_clone().map_err(host)?).map_err(errno)?;
    for entry in listed.iter() {
        let entry = entry.map_err(errno)?;
        let name = entry.file_name();
        if is_dots(name) || (path.is_empty() && name.to_bytes() == b".git") {
            continue;
        }
        let before = path.len();
        if before > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(name.to_bytes());
        match now.get(path) {
            None => found.tell(path, Content::Deleted)?,
            Some(true) => {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
                match open_beneath(folder.as_fd(), name, flags) {
                    Ok(below) => gone(below, path, now, found)?,
                    // It was no folder; that has been told.
                    Err(Errno::ENOTDIR | Errno::ELOOP) => {}
                    Err(why) => return Err(errno(why)),
                }
            }
            Some(false) => {}
        }
        path.truncate(before);
    }
    Ok(())
}

/// The folder that holds a path of the base, and its name there; none when the base has no such folder.
fn parent(base: BorrowedFd<'_>, path: &Path) -> io::Result<Option<OwnedFd>> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    there(open_beneath(base, parent, OFlag::O_PATH | OFlag::O_DIRECTORY))
}

fn there<T>(found: nix::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// What the base has here.
fn look(base: BorrowedFd<'_>, path: &Path) -> io::Result<Option<Kind>> {
    let (Some(folder), Some(name)) = (parent(base, path)?, path.file_name()) else { return Ok(None) };
    let found = there(fstatat(&folder, name, AtFlags::AT_SYMLINK_NOFOLLOW))?;
    Ok(found.and_then(|found| match kind(found.st_mode) {
        SFlag::S_IFREG if found.st_mode & 0o100 == 0 => Some(Kind::File),
        SFlag::S_IFREG => Some(Kind::Program),
        SFlag::S_IFDIR => Some(Kind::Folder),
        SFlag::S_IFLNK => Some(Kind::Link),
        _ => None,
    }))
}

fn link(base: BorrowedFd<'_>, path: &Path) -> io::Result<Option<Vec<u8>>> {
    let (Some(folder), Some(name)) = (parent(base, path)?, path.file_name()) else { return Ok(None) };
    Ok(there(readlinkat(&folder, name))?.map(std::os::unix::ffi::OsStringExt::into_vec))
}

fn open_at(base: BorrowedFd<'_>, path: &Path) -> io::Result<Option<(File, u64)>> {
    let opened = there(open_plain(base, path))?.flatten();
    Ok(opened.map(|(file, found)| (file, u64::try_from(found.st_size).unwrap_or_default())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(kind: Kind, path: &[u8], len: u64, content: &[u8]) -> Result<Changes, Error> {
        let mut bytes = Vec::new();
        Head { kind, path: path.to_owned(), len }.write(&mut bytes).unwrap();
        bytes.extend_from_slice(content);
        changes(&*bytes, None, 100, std::sync::Arc::new(|_, _| false))
    }

    #[test]
    fn a_shim_that_lies_about_a_workspace_gets_nothing_but_an_error() {
        let large = told(Kind::File, b"a", u64::MAX, b"x");
        assert!(matches!(large, Err(Error::TooLarge { cap_bytes: 100, .. })), "{large:?}");
        for (path, len, content) in [
            (&b"a"[..], 9, &b"x"[..]), // content that does not come
            (b"a", 1, b"x"),           // no end
            (b"../a", 1, b"x"),        // outside
        ] {
            let refused = told(Kind::File, path, len, content);
            assert!(matches!(refused, Err(Error::Host { .. })), "{refused:?}");
        }
        let deep = told(Kind::File, &[b"a/".repeat(400), b"a".to_vec()].concat(), 0, b"");
        assert!(matches!(deep, Err(Error::TooDeep { .. })), "{deep:?}");
    }
}
