//! The files of a sandbox, as runs of its shim's worker: one at a time, and bounded by what was asked for, whatever the
//! other side says.

use std::io;
use std::sync::Arc;

use coinop_shim::wire::{Ended, FromShim, PIECE_BYTES, Place, Run};
use nix::errno::Errno;
use nix::libc;
use tokio::sync::mpsc;

use super::super::found::PATH_BYTES;
use super::super::{Changes, Error, LeaveOut, Tree, found, place};
use super::cell::{Shared, host};
use super::tree::{self, Packed};

const READ: &str = "read a file";
const WRITE: &str = "write a file";
const CHANGES: &str = "read what the job changed";
const FILL: &str = "copy the base";
/// Pieces between the line and a thread that reads or writes trees.
const WAITING: usize = 4;

fn wire_place(path: &str) -> Result<(Place, String), Error> {
    let (place, below) = match place::place(path)? {
        place::Place::Workspace(below) => (Place::Workspace, below),
        place::Place::Job(below) => (Place::Job, below),
    };
    // It came out of a string.
    Ok((place, below.to_string_lossy().into_owned()))
}

fn done(ended: Ended) -> io::Result<()> {
    match ended.errno {
        None => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// How work on one file failed, in the trait's words.
fn file_error(path: &str, cap_bytes: u64, doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |why| match why.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => Error::NotFound(path),
        Some(Errno::ENOTDIR | Errno::ENAMETOOLONG) if doing == READ => Error::NotFound(path),
        Some(
            Errno::ELOOP
            | Errno::EXDEV
            | Errno::ENXIO
            | Errno::ENODEV
            | Errno::EISDIR
            | Errno::ENOTDIR
            | Errno::ENAMETOOLONG,
        ) => Error::BadPath(path),
        Some(Errno::EFBIG) if doing == READ => Error::TooLarge { what: path, cap_bytes },
        _ => host(doing)(why),
    }
}

pub async fn read(shared: &Shared, path: &str, cap_bytes: u64) -> Result<Vec<u8>, Error> {
    let (place, below) = wire_place(path)?;
    let failed = || file_error(path, cap_bytes, READ);
    let _alone = shared.files.lock().await;
    let mut open = shared.line.open(Run::Read { place, path: below, cap_bytes }).await.map_err(failed())?;
    let mut bytes = Vec::new();
    while let Some(said) = open.next().await {
        match said {
            FromShim::Stdout(piece) if (bytes.len() + piece.len()) as u64 > cap_bytes => {
                return Err(Error::TooLarge { what: path.to_owned(), cap_bytes });
            }
            FromShim::Stdout(piece) => {
                bytes.extend(&piece);
                open.took(piece.len()).await.map_err(failed())?;
            }
            FromShim::Ended(ended) => return done(ended).map(|()| bytes).map_err(failed()),
            _ => {}
        }
    }
    Err(shared.gone())
}

pub async fn write(shared: &Shared, path: &str, bytes: &[u8]) -> Result<(), Error> {
    let (place, below) = wire_place(path)?;
    let failed = || file_error(path, 0, WRITE);
    let _alone = shared.files.lock().await;
    let open = shared.line.open(Run::Write { place, path: below }).await.map_err(failed())?;
    let (to, pieces) = mpsc::channel(1);
    let sending = async move {
        for piece in bytes.chunks(PIECE_BYTES) {
            if to.send(piece.to_vec()).await.is_err() {
                break;
            }
        }
    };
    let (ended, ()) = tokio::join!(open.feed(pieces), sending);
    ended.and_then(done).map_err(failed())
}

/// Fills the empty workspace with a base.
pub async fn fill(shared: &Shared, base: Arc<dyn Tree>) -> Result<(), Error> {
    let (to, pieces) = mpsc::channel(WAITING);
    let packing = tokio::task::spawn_blocking(move || tree::pack(&*base, to));
    let open = shared.line.open(Run::Unpack).await.map_err(host(FILL))?;
    let ended = open.feed(pieces).await.map_err(host(FILL))?;
    let packed = packing.await.unwrap_or_else(|why| Err(io::Error::other(why)));
    // What the shim says comes first: when it stops early, the packing breaks, too.
    done(ended).map_err(host(FILL))?;
    packed.map_err(host(FILL))
}

pub async fn changes(
    shared: &Shared,
    base: Option<Arc<dyn Tree>>,
    cap_bytes: u64,
    leave_out: LeaveOut,
) -> Result<Changes, Error> {
    let _alone = shared.files.lock().await;
    let mut open = shared.line.open(Run::Pack).await.map_err(host(CHANGES))?;
    let (to, pieces) = mpsc::channel::<io::Result<Vec<u8>>>(WAITING);
    let told = tokio::task::spawn_blocking(move || {
        tree::changes(Packed::new(pieces), base.as_deref(), cap_bytes, leave_out)
    });
    let mut too_long = Vec::new();
    let ended = loop {
        match open.next().await {
            Some(FromShim::Stdout(piece)) => {
                let len = piece.len();
                if to.send(Ok(piece)).await.is_err() {
                    // Enough was seen, or it cannot be read: the rest is not sent.
                    open.way().kill().await.map_err(host(CHANGES))?;
                }
                open.took(len).await.map_err(host(CHANGES))?;
            }
            Some(FromShim::Stderr(path)) => too_long = path,
            Some(FromShim::Ended(ended)) => break done(ended),
            Some(_) => {}
            None => return Err(shared.gone()),
        }
    };
    if !too_long.is_empty() {
        found::bounded(&too_long, if too_long.len() > PATH_BYTES { 0 } else { usize::MAX })?;
    }
    if let Err(why) = ended
        && why.raw_os_error() != Some(libc::ECANCELED)
        && to.send(Err(why)).await.is_err()
    {
        tracing::trace!("the reader has its own reason");
    }
    drop(to);
    told.await.unwrap_or_else(|why| Err(host(CHANGES)(io::Error::other(why))))
}
