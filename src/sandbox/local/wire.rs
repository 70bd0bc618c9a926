//! What the node, the nursery process and a sandbox's init say to each other: small JSON messages with file
//! descriptors beside them, over SEQPACKET sockets. It knows the format, not what is done with it.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use coinop_shim::seccomp::StandIns;
use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The longest message. A command line with its environment must fit; SEQPACKET's default buffer holds it.
pub const MESSAGE_BYTES: usize = 128 * 1024;
/// The most descriptors beside one message.
const DESCRIPTORS: usize = 16;

/// Node → nursery.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToNursery {
    /// Makes a sandbox's namespaces. Beside it: the init's control socket, then `cgroup.procs` files to join.
    Build { n: u64, uid: u32, base: Option<String> },
    /// Asks for the mount of a base, for a sandbox that is built already.
    Base { n: u64, uid: u32, path: String },
}

/// Nursery → node.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromNursery {
    Hello(Hello),
    /// Beside it: a pidfd of the init. `base` tells why the base could not be mounted.
    Built {
        n: u64,
        base: Option<i32>,
    },
    /// Beside it: the detached mount, when `errno` is none.
    Base {
        n: u64,
        errno: Option<i32>,
    },
    Failed {
        n: u64,
        step: String,
        errno: i32,
    },
    /// Every process of the sandbox has ended and is reaped.
    Ended {
        n: u64,
        cpu_us: u64,
        peak_bytes: u64,
    },
}

/// What the nursery found when it started.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Hello {
    /// The step that failed and its errno; nothing can be built then.
    pub failed: Option<(String, i32)>,
    pub landlock: bool,
}

/// Node → nursery, once, before all else.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Start {
    /// Folders in which this node makes its cgroups, and what their names begin with.
    pub cgroup_parents: Vec<String>,
    pub cgroup_prefix: String,
    pub stand_ins: StandIns,
}

/// Node → init.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToInit {
    /// Mounts the rest and locks the door. Beside it: the base's mount, unless init was born with it.
    Configure(Configure),
    /// Starts a command. Beside it: stdout, stderr and, with `stdin`, stdin.
    Exec { n: u64, argv: Vec<String>, env: Vec<String>, cwd: String, stdin: bool, keep_background: bool },
    /// Ends a command and all that it started.
    Kill { n: u64 },
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Configure {
    pub disk_bytes: u64,
    pub inodes: u64,
    pub pids: u32,
    pub open_files: u32,
    /// The cap on one process's private memory where no cgroup caps them all.
    pub data_bytes: Option<u64>,
    /// The cores that the job keeps to where no cgroup caps its share.
    pub cores: Option<Vec<usize>>,
    pub base: bool,
    /// Finds out whether the overlay has all it needs, once at the start.
    pub probe: bool,
}

/// Init → node.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromInit {
    /// Beside it: what the job changed, `/workspace`, `/job`, `/proc`, each as a folder.
    Ready {
        overlay: bool,
    },
    Broken {
        step: String,
        errno: i32,
    },
    NotStarted {
        n: u64,
        errno: i32,
    },
    Exited {
        n: u64,
        code: Option<i32>,
        signal: Option<i32>,
    },
}

/// Two connected ends, neither inherited over exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Sends one message whole.
pub fn send(socket: BorrowedFd<'_>, message: &impl Serialize, beside: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_bytes(socket, &encode(message)?, beside)
}

pub fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let bytes = serde_json::to_vec(message).map_err(io::Error::other)?;
    if bytes.len() > MESSAGE_BYTES {
        return Err(io::Error::from(io::ErrorKind::FileTooLarge));
    }
    Ok(bytes)
}

pub fn send_bytes(socket: BorrowedFd<'_>, bytes: &[u8], beside: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = beside.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let iov = [IoSlice::new(bytes)];
    loop {
        let sent = if raw.is_empty() {
            // An init's filter may refuse it the call that can pass descriptors.
            nix::sys::socket::send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)
        } else {
            sendmsg::<()>(socket.as_raw_fd(), &iov, &rights, MsgFlags::MSG_NOSIGNAL, None)
        };
        match sent {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives one message; `None` when the other end is closed. `buffer` is at least `MESSAGE_BYTES` long.
pub fn receive<M: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
    let mut control = cmsg_space!([RawFd; DESCRIPTORS]);
    let mut iov = [IoSliceMut::new(buffer)];
    let (len, beside) = loop {
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut control), flags) {
            Ok(got) => {
                let mut beside = Vec::new();
                for message in got.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(fds) = message {
                        // SAFETY: the kernel has just given us these descriptors; nobody else owns them.
                        beside.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                if got.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
                    return Err(io::Error::from(io::ErrorKind::InvalidData));
                }
                break (got.bytes, beside);
            }
            Err(nix::errno::Errno::EINTR) => {}
            // The other end went without reading all that we sent: what it said before is still here, then its end.
            Err(nix::errno::Errno::ECONNRESET) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    if len == 0 {
        return Ok(None);
    }
    let bytes = buffer.get(..len).unwrap_or_default();
    Ok(Some((serde_json::from_slice(bytes).map_err(io::Error::other)?, beside)))
}
