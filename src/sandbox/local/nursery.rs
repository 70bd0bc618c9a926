//! `coinop jail-init`, the nursery: one single-threaded process a node, in which every sandbox is born by one
//! clone into new namespaces. It keeps the host's mounts at hand for bases and the read-only root for jobs; it
//! never speaks with a job. When the node goes, however it goes, the nursery kills every sandbox, removes their
//! cgroups and ends.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use coinop_shim::seccomp::StandIns;
use coinop_shim::sys;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, getegid, geteuid, setgroups, setsid};

use super::life::is_root_with_slots;
use super::mounts::{INSIDE_UID, Named, Step};
use super::wire::{FromNursery, Hello, MESSAGE_BYTES, Start, ToNursery};
use super::{cgroup, init, mounts, wire};

/// Namespaces of a sandbox at birth; its network and cgroup namespaces follow when it is in its cgroup.
const AT_BIRTH: i32 =
    libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

/// Enough for every slot and a few owners of bases.
const MAPPINGS_KEPT: usize = 4096;

struct Nursery {
    root: bool,
    uid: u32,
    gid: u32,
    host: OwnedFd,
    inside: OwnedFd,
    stand_ins: StandIns,
    /// Living sandboxes by the pid of their init.
    living: HashMap<i32, u64>,
    /// User namespaces that map a base's owner (uid, gid) to a sandbox's uid.
    mappings: HashMap<(u32, u32, u32), OwnedFd>,
}

/// The whole life of the nursery. Its socket to the node is stdin.
pub fn main() -> io::Result<()> {
    // The root's folders are for the jobs' users to read, whatever the node keeps to itself.
    umask(Mode::from_bits_truncate(0o022));
    let socket = io::stdin();
    let socket = socket.as_fd();
    // The node's end closes with the node; this is the second string.
    prctl::set_pdeathsig(Signal::SIGTERM)?;
    prctl::set_name(c"coinop-nursery")?;
    sys::close_from(3, false)?;
    setsid()?;
    heed_signals()?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.add(Signal::SIGTERM);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&signals), None)?;
    let ended = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let mut buffer = vec![0; MESSAGE_BYTES];
    // Held to the end: the node's uids are claimed as long as its sandboxes may live.
    let Some((start, _claim)) = wire::receive::<Start>(socket, &mut buffer)? else { return Ok(()) };
    let mut nursery = match open(start.stand_ins) {
        Ok(nursery) => nursery,
        Err((step, why)) => {
            let hello = Hello { failed: Some((step, errno(&why))), landlock: false };
            return wire::send(socket, &FromNursery::Hello(hello), &[]);
        }
    };
    wire::send(socket, &FromNursery::Hello(Hello { failed: None, landlock: sys::has_landlock() }), &[])?;
    let served = nursery.serve(socket, &ended, &mut buffer);
    nursery.close(&start);
    served
}

/// What whoever started the node had ignored (`nohup` does it), neither the nursery nor a job ignores. Of a broken
/// pipe the nursery wants to hear as an error; a command does not.
fn heed_signals() -> io::Result<()> {
    for signal in Signal::iterator() {
        if !matches!(signal, Signal::SIGKILL | Signal::SIGSTOP | Signal::SIGPIPE) {
            // SAFETY: the default action is no handler of ours.
            unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }?;
        }
    }
    Ok(())
}

fn errno(why: &io::Error) -> i32 {
    why.raw_os_error().unwrap_or(libc::EIO)
}

/// Two mount namespaces: the host's, to fetch bases from, and the one with the root that jobs get.
fn open(stand_ins: StandIns) -> Step<Nursery> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let root = is_root_with_slots();
    let own = "/proc/self/ns/mnt";
    if root {
        setgroups(&[]).step("drop supplementary groups")?;
    } else {
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS).step("make a user namespace")?;
        write_maps("self", (uid, uid), (gid, gid)).step("map the user namespace")?;
    }
    let host = fs::File::open(own).step("keep the mount namespace")?.into();
    unshare(CloneFlags::CLONE_NEWNS).step("make a mount namespace")?;
    // Landlock keeps it from being written; what a job can write, it can share as memory that nobody counts.
    mounts::build_root(!stand_ins.memory || sys::has_landlock())?;
    let inside = fs::File::open(own).step("keep the mount namespace")?.into();
    // Changes of credentials clear it.
    prctl::set_pdeathsig(Signal::SIGTERM).step("watch the node")?;
    Ok(Nursery { root, uid, gid, host, inside, stand_ins, living: HashMap::new(), mappings: HashMap::new() })
}

/// Maps one user and one group, each (inside, outside).
fn write_maps(process: &str, uid: (u32, u32), gid: (u32, u32)) -> io::Result<()> {
    let write = |file: &str, text: &str| {
        // One write call: the kernel takes a map whole or not at all.
        fs::OpenOptions::new().write(true).open(format!("/proc/{process}/{file}"))?.write_all(text.as_bytes())
    };
    write("setgroups", "deny")?;
    write("uid_map", &format!("{} {} 1\n", uid.0, uid.1))?;
    write("gid_map", &format!("{} {} 1\n", gid.0, gid.1))
}

impl Nursery {
    fn serve(&mut self, socket: BorrowedFd<'_>, ended: &SignalFd, buffer: &mut [u8]) -> io::Result<()> {
        loop {
            let mut ready =
                [PollFd::new(socket, PollFlags::POLLIN), PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let [asked, signalled] = ready.map(|fd| fd.any().unwrap_or(false));
            if signalled {
                while let Some(signal) = ended.read_signal()? {
                    if signal.ssi_signo == Signal::SIGTERM as u32 {
                        return Ok(());
                    }
                }
                while let Some(reaped) = sys::reap_one() {
                    let Some(n) = self.living.remove(&reaped.pid) else { continue };
                    let sys::Reaped { cpu_us, peak_bytes, .. } = reaped;
                    wire::send(socket, &FromNursery::Ended { n, cpu_us, peak_bytes }, &[])?;
                }
            }
            if asked {
                match wire::receive::<ToNursery>(socket, buffer)? {
                    None => return Ok(()),
                    Some((request, beside)) => self.answer(socket, request, beside)?,
                }
            }
        }
    }

    fn answer(
        &mut self,
        socket: BorrowedFd<'_>,
        request: ToNursery,
        mut beside: Vec<OwnedFd>,
    ) -> io::Result<()> {
        match request {
            ToNursery::Base { n, uid, path } => match self.fetch_base(&path, uid) {
                Ok(tree) => wire::send(socket, &FromNursery::Base { n, errno: None }, &[tree.as_fd()]),
                Err(why) => wire::send(socket, &FromNursery::Base { n, errno: Some(errno(&why)) }, &[]),
            },
            ToNursery::Build { n, uid, base } => {
                if beside.is_empty() {
                    return Err(io::Error::from(io::ErrorKind::InvalidData));
                }
                let control = beside.remove(0);
                let (tree, base) = match base.map(|path| self.fetch_base(&path, uid)) {
                    None => (None, None),
                    Some(Ok(tree)) => (Some(tree), None),
                    Some(Err(why)) => (None, Some(errno(&why))),
                };
                let born = init::Born { control, cgroups: beside, base: tree };
                match self.give_birth(born, uid) {
                    Ok((pid, pidfd)) => {
                        self.living.insert(pid, n);
                        wire::send(socket, &FromNursery::Built { n, base }, &[pidfd.as_fd()])
                    }
                    Err((step, why)) => {
                        let errno = errno(&why);
                        wire::send(socket, &FromNursery::Failed { n, step, errno }, &[])
                    }
                }
            }
        }
    }

    fn give_birth(&mut self, born: init::Born, uid: u32) -> Step<(i32, OwnedFd)> {
        let (wait, go) = io::pipe().step("make a pipe")?;
        match sys::fork_into(AT_BIRTH as u64).step("make the sandbox's namespaces")? {
            sys::Forked::Child => {
                drop(go);
                init::main(born, wait.into(), self.stand_ins)
            }
            sys::Forked::Parent { pid, pidfd } => {
                drop((born, wait));
                let (uid, gid) = if self.root { (uid, uid) } else { (self.uid, self.gid) };
                let mapped = write_maps(&pid.to_string(), (INSIDE_UID, uid), (INSIDE_UID, gid));
                // Without the byte the child reads an end and goes; it is reaped with the others.
                mapped.step("map the sandbox's user")?;
                (&go).write_all(b"g").step("start the sandbox's init")?;
                Ok((pid, pidfd))
            }
        }
    }

    /// A detached read-only mount of a folder of the host, its owner mapped to the sandbox's user.
    fn fetch_base(&mut self, path: &str, uid: u32) -> io::Result<OwnedFd> {
        let host_path = std::ffi::CString::new(path)?;
        setns(&self.host, CloneFlags::CLONE_NEWNS)?;
        let fetched =
            fs::symlink_metadata(path).and_then(|found| Ok((found, sys::open_tree(&host_path, false)?)));
        setns(&self.inside, CloneFlags::CLONE_NEWNS)?;
        let (found, tree) = fetched?;
        if !found.is_dir() {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        // Without root the node asks for its own bases only (`mod::is_ours`): from in here, whoever is not
        // mapped looks like `nobody`, and a node may be `nobody`.
        let users = if self.root { Some(self.mapping(uid, found.uid(), found.gid())?) } else { None };
        sys::set_attributes(
            tree.as_fd(),
            sys::RDONLY | sys::NOSUID | sys::NODEV,
            users.as_ref().map(AsFd::as_fd),
        )?;
        Ok(tree)
    }

    fn mapping(&mut self, uid: u32, owner: u32, group: u32) -> io::Result<OwnedFd> {
        if self.mappings.len() > MAPPINGS_KEPT {
            self.mappings.clear();
        }
        if let Some(known) = self.mappings.get(&(uid, owner, group)) {
            return known.try_clone();
        }
        let made = make_mapping((owner, uid), (group, uid))?;
        self.mappings.insert((uid, owner, group), made.try_clone()?);
        Ok(made)
    }

    /// Nothing of this node stays: processes, mounts (they go with them) and cgroups.
    fn close(&mut self, start: &Start) {
        for pid in self.living.keys() {
            if let Err(errno) = kill(Pid::from_raw(*pid), Signal::SIGKILL) {
                tracing::debug!(pid, %errno, "a sandbox was gone before the nursery");
            }
        }
        while nix::sys::wait::wait().is_ok() {}
        if setns(&self.host, CloneFlags::CLONE_NEWNS).is_ok() {
            cgroup::sweep(start.cgroup_parents.iter().map(std::path::Path::new), &start.cgroup_prefix, None);
        }
    }
}

/// A user namespace for an idmapped mount; it lives as long as its descriptor.
fn make_mapping(uid: (u32, u32), gid: (u32, u32)) -> io::Result<OwnedFd> {
    let (mut wait, go) = io::pipe()?;
    match sys::fork_into(libc::CLONE_NEWUSER as u64)? {
        sys::Forked::Child => {
            drop(go);
            // Ends when the parent has what it wants and closes its end.
            let ended = wait.read(&mut [0]).is_ok();
            sys::exit(i32::from(!ended));
        }
        sys::Forked::Parent { pid, pidfd: _ } => {
            let made = write_maps(&pid.to_string(), uid, gid)
                .and_then(|()| fs::File::open(format!("/proc/{pid}/ns/user")));
            drop(go);
            nix::sys::wait::waitpid(Pid::from_raw(pid), None)?;
            Ok(made?.into())
        }
    }
}
