//! The places that the job may write in: mounted here where the engine cannot, opened for the job's user, and measured.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::OwnedFd;

use coinop_shim::wire::{self, Hello, Mount, Room};
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::sys::statvfs::statvfs;

use super::serve::as_job;

pub const WORKSPACE: &CStr = c"/workspace";
/// One whose bytes count as memory.
const SHARED: &CStr = c"/dev/shm";

/// Those whose bytes are counted as files.
fn places(hello: &Hello) -> io::Result<Vec<CString>> {
    let runtime = CString::new(wire::runtime_folder(hello.uid))?;
    let fixed = [WORKSPACE, c"/tmp", c"/var/tmp", c"/home/job"].map(CStr::to_owned);
    Ok(fixed.into_iter().chain([runtime]).collect())
}

/// Mounts a file system in memory where the job writes.
pub fn make(place: &Mount) -> io::Result<()> {
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    flags.set(MsFlags::MS_NOEXEC, !place.exec);
    let tmpfs = Some("tmpfs");
    mount(tmpfs, place.path.as_str(), tmpfs, flags, Some(place.options.as_str())).map_err(|errno| {
        io::Error::other(format!("{} cannot be mounted with {}: {errno}", place.path, place.options))
    })
}

/// How large the writable places really are.
pub fn measure_all(hello: &Hello) -> io::Result<Vec<Room>> {
    places(hello)?.iter().map(CString::as_c_str).chain([SHARED]).map(measure).collect()
}

fn measure(place: &CStr) -> io::Result<Room> {
    let found = statvfs(place)?;
    let bytes = found.blocks().saturating_mul(found.fragment_size());
    Ok(Room { path: place.to_string_lossy().into_owned(), bytes, inodes: found.files() })
}

/// Opens the writable places whose bytes are counted, and has each let its job in: an engine gives a mount the mode of the
/// image's own folder.
pub fn open_all(hello: &Hello) -> io::Result<Vec<OwnedFd>> {
    let opened = places(hello)?.iter().map(|place| open_one(place, hello)).collect::<io::Result<Vec<_>>>();
    opened.map_err(|why| io::Error::new(why.kind(), "a writable place is missing"))
}

fn open_one(place: &CStr, hello: &Hello) -> io::Result<OwnedFd> {
    let folder = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let found = fstat(open(place, OFlag::O_PATH | folder, Mode::empty())?)?;
    // Only its owner may change it, and this root may do no more with another's folder than anybody.
    let opened = move || {
        let opened = open(place, OFlag::O_RDONLY | folder, Mode::empty())?;
        let mode = found.st_mode & 0o7777;
        // One that is the job's alone stays so, as programs want it of their runtime folder.
        let least = match found.st_uid {
            0 => 0o777,
            _ if mode == 0o700 => 0o700,
            _ => 0o755,
        };
        if found.st_uid == 0 || found.st_uid == hello.uid {
            fchmod(&opened, Mode::from_bits_truncate(mode | least))?;
        }
        Ok(opened)
    };
    if found.st_uid == hello.uid { as_job(hello, opened)? } else { opened() }
}
