//! The few system calls that no crate wraps, each made safe here, for the shim and for the local jail. It decides
//! nothing: callers hold the policy.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;

/// Attributes of a mount, as `mount_setattr(2)` names them.
pub const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
pub const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
pub const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
pub const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = check(result)? as RawFd;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The child's side of a clone, or the parent's with the child's pid and a pidfd.
pub enum Forked {
    Child,
    Parent { pid: i32, pidfd: OwnedFd },
}

/// Forks into new namespaces in one call. The caller must have one thread only, or the child may find locks
/// held by threads that it does not have.
pub fn fork_into(namespaces: u64) -> io::Result<Forked> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain numbers; zero is a valid value for each.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces | libc::CLONE_PIDFD as u64;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: no shared memory and no new stack: the child gets a copy of this single-threaded process, as with
    // fork(2). `args` and `pidfd` live until the call returns.
    let pid = check(unsafe {
        libc::syscall(libc::SYS_clone3, &raw const args, std::mem::size_of::<libc::clone_args>())
    })?;
    if pid == 0 {
        return Ok(Forked::Child);
    }
    // SAFETY: CLONE_PIDFD made this descriptor for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Forked::Parent { pid: pid as i32, pidfd })
}

/// A detached copy of the mounts at `path`, submounts included when `recursive`.
pub fn open_tree(path: &CStr, recursive: bool) -> io::Result<OwnedFd> {
    let deep = if recursive { libc::AT_RECURSIVE as u32 } else { 0 };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | deep;
    // SAFETY: a NUL-terminated path and flags; the kernel keeps neither.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })
}

/// Puts a detached mount at `path`.
pub fn move_mount(tree: BorrowedFd<'_>, path: &CStr) -> io::Result<()> {
    // SAFETY: a live descriptor and two NUL-terminated paths.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// Sets attributes on a detached mount and all below it; `users` also maps its owners through that namespace.
pub fn set_attributes(tree: BorrowedFd<'_>, set: u64, users: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set | users.map_or(0, |_| libc::MOUNT_ATTR_IDMAP),
        attr_clr: 0,
        propagation: 0,
        userns_fd: users.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    let flags = libc::AT_EMPTY_PATH | if users.is_none() { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: a live descriptor, an empty path and a struct that outlives the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            std::mem::size_of::<libc::mount_attr>(),
        )
    })
    .map(drop)
}

/// Sends a signal to the process behind a pidfd; one that has ended already is no error.
pub fn signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a live descriptor and a null siginfo, which the call allows.
    let sent = check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    });
    match sent {
        Err(why) if why.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other.map(drop),
    }
}

/// Empties the bounding set: no exec will ever give a capability. Those that this process has, it keeps.
pub fn bar_capabilities() -> io::Result<()> {
    for cap in 0..64 {
        // SAFETY: only numbers. EINVAL tells that this kernel has no such capability.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, cap, 0, 0, 0) } != 0 {
            break;
        }
    }
    // SAFETY: only numbers.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) }.into())
        .map(drop)
}

/// Keeps the capabilities over a change of uid.
pub fn keep_capabilities_over_setuid() -> io::Result<()> {
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: only numbers.
    check(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0) }.into()).map(drop)
}

/// Whether the overlay marked this folder of its upper layer as hiding all of the lower one.
pub fn is_opaque(folder: BorrowedFd<'_>) -> bool {
    [c"user.overlay.opaque", c"trusted.overlay.opaque"].into_iter().any(|name| {
        let mut value = [0u8; 4];
        // SAFETY: a live descriptor, a NUL-terminated name and a buffer of the length given.
        let len = unsafe {
            libc::fgetxattr(folder.as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), value.len())
        };
        len == 1 && value.first() == Some(&b'y')
    })
}

/// Whether a folder takes the extended attributes that an unprivileged overlay needs.
pub fn takes_user_attributes(folder: BorrowedFd<'_>) -> bool {
    let name = c"user.coinop.probe";
    // SAFETY: a live descriptor, a NUL-terminated name and one byte of value.
    unsafe {
        libc::fsetxattr(folder.as_raw_fd(), name.as_ptr(), c"y".as_ptr().cast(), 1, 0) == 0
            && libc::fremovexattr(folder.as_raw_fd(), name.as_ptr()) == 0
    }
}

/// Brings the loopback interface of this network namespace up.
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: only numbers.
    let socket =
        owned(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) }.into())?;
    // SAFETY: ifreq is plain data; zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: a live socket and a struct of the type that SIOCSIFFLAGS reads.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into()).map(drop)
}

/// Closes every descriptor from `first` on, or with `on_exec` marks them to be closed by the next exec.
pub fn close_from(first: u32, on_exec: bool) -> io::Result<()> {
    let flags = if on_exec { libc::CLOSE_RANGE_CLOEXEC } else { 0 };
    // SAFETY: only numbers. The caller owns no value above `first` that is used later (without `on_exec`).
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) }).map(drop)
}

/// Closes every descriptor above stderr but those of `keep`.
pub fn close_all_but(keep: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut kept: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd().unsigned_abs()).collect();
    kept.sort_unstable();
    let mut from = 3;
    for fd in kept {
        if from < fd {
            close_between(from, fd - 1)?;
        }
        from = fd + 1;
    }
    close_from(from, false)
}

fn close_between(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: only numbers. In the forked child, the values that own these descriptors are never used or dropped.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

/// Bytes that can be read from a pipe now.
pub fn waiting_bytes(pipe: BorrowedFd<'_>) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: a live descriptor and a place for the one number that this request writes.
    let told = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    if told < 0 { 0 } else { usize::try_from(bytes).unwrap_or_default() }
}

/// Lets every process of a lower number go first on the processor.
pub fn go_last() -> io::Result<()> {
    // SAFETY: only numbers.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) }.into()).map(drop)
}

/// What a child cost, told when it is reaped.
#[derive(Debug, Clone, Copy)]
pub struct Reaped {
    pub pid: i32,
    pub status: i32,
    pub cpu_us: u64,
    pub peak_bytes: u64,
}

/// Reaps one ended child without waiting; `None` when there is none. A child that has made us its tracer, which it need
/// not ask for, and has stopped is let go: it goes on as if nobody traced it.
pub fn reap_one() -> Option<Reaped> {
    // SAFETY: rusage is plain numbers; zero is a valid value.
    let (mut status, mut usage) = (0, unsafe { std::mem::zeroed::<libc::rusage>() });
    let pid = loop {
        // SAFETY: both pointers are live for the call.
        let pid = unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut usage) };
        if pid <= 0 {
            return None;
        }
        if !libc::WIFSTOPPED(status) {
            break pid;
        }
        // The trap is the tracer's, not a signal that somebody sent.
        let signal = Some(libc::WSTOPSIG(status)).filter(|signal| *signal != libc::SIGTRAP).unwrap_or(0);
        // SAFETY: only numbers; one that was killed meanwhile is no longer there, and reaped next.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, pid, 0, signal) };
    };
    let micros = |t: libc::timeval| t.tv_sec as u64 * 1_000_000 + t.tv_usec as u64;
    Some(Reaped {
        pid,
        status,
        cpu_us: micros(usage.ru_utime) + micros(usage.ru_stime),
        peak_bytes: (usage.ru_maxrss as u64).saturating_mul(1024),
    })
}

/// Empties the capability sets of this process. Nothing can be won back.
pub fn drop_capabilities() -> io::Result<()> {
    set_capabilities(0)
}

/// Keeps the capabilities to become another user and group, and no other.
pub fn keep_setuid_and_setgid() -> io::Result<()> {
    const CAP_SETGID: u32 = 6;
    const CAP_SETUID: u32 = 7;
    set_capabilities(1 << CAP_SETGID | 1 << CAP_SETUID)
}

/// Makes these all that this process can do; it must have them. None is inherited.
fn set_capabilities(first_32: u32) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let header = Header { version: 0x2008_0522, pid: 0 };
    // Effective, permitted and inheritable of the first 32, then of the rest.
    let sets = [first_32, first_32, 0, 0, 0, 0];
    // SAFETY: version 3 of the call reads this header and two triples of 32-bit sets.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) }).map(drop)
}

/// Whether this kernel has Landlock and it is on.
pub fn has_landlock() -> bool {
    const VERSION: u32 = 1;
    // SAFETY: asking for the version takes no attributes.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, VERSION) > 0 }
}

/// Ends this process at once, without destructors: the only right end of a forked copy.
pub fn exit(code: i32) -> ! {
    // SAFETY: _exit takes a number and does not return.
    unsafe { libc::_exit(code) }
}

/// Whether the kernel refuses a call as a filter does: as not permitted, not there, or of no such family. Meant for
/// calls that do no harm with these arguments.
pub fn is_refused(call: libc::c_long, [one, two, three]: [libc::c_long; 3]) -> bool {
    // SAFETY: the callers, all in `probe`, pass numbers and null pointers only; a call that dereferences one fails.
    let answer = unsafe { libc::syscall(call, one, two, three, 0, 0, 0) };
    let errno = io::Error::last_os_error().raw_os_error();
    answer < 0 && matches!(errno, Some(libc::EPERM | libc::ENOSYS | libc::EAFNOSUPPORT))
}
