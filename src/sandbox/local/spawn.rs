//! The node's hold on its nursery process: starts it, asks it for sandboxes, and passes on what it reports.
//! One thread of its own starts the nursery and reads from it: the nursery's death signal hangs on that thread.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use tokio::sync::oneshot;

use super::life::Life;
use super::wire::{self, FromNursery, Hello, MESSAGE_BYTES, Start, ToNursery};

/// How long the nursery may take to start on a busy host.
const START: Duration = Duration::from_secs(20);

/// Why a sandbox could not be built: the step, and the system's reason.
pub type Failure = (String, io::Error);

pub struct Nursery {
    socket: OwnedFd,
    known: Mutex<HashMap<u64, Known>>,
    dead: AtomicBool,
}

struct Known {
    life: Arc<Life>,
    /// Answered when born, with the errno of a base that could not be mounted.
    built: Option<oneshot::Sender<Result<Option<i32>, Failure>>>,
    base: Option<oneshot::Sender<Result<OwnedFd, i32>>>,
}

impl Nursery {
    /// Starts it and waits for its greeting. It holds the claim of uids for as long as it lives.
    pub fn start(
        helper: &Path,
        start: Start,
        claim: Option<std::fs::File>,
    ) -> Result<(Arc<Nursery>, Hello), io::Error> {
        let (ours, theirs) = wire::pair()?;
        let nursery = Arc::new(Nursery {
            socket: ours,
            known: Mutex::new(HashMap::new()),
            dead: AtomicBool::new(false),
        });
        let (tell, told) = mpsc::channel();
        let reader = nursery.clone();
        let helper = helper.to_owned();
        std::thread::Builder::new().name("coinop-nursery".to_owned()).spawn(move || {
            let spawned = Command::new(&helper)
                // Jobs see it in /proc: no path of the host, then.
                .arg0("coinop")
                .arg("jail-init")
                .env_clear()
                .current_dir("/")
                .stdin(Stdio::from(theirs))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn();
            let mut child = match spawned {
                Ok(child) => child,
                Err(why) => {
                    reader.dead.store(true, Ordering::SeqCst);
                    tell.send(Err(why)).unwrap_or_default();
                    return;
                }
            };
            let beside: Vec<_> = claim.iter().map(AsFd::as_fd).collect();
            let sent = wire::send(reader.socket.as_fd(), &start, &beside);
            let read = sent.and_then(|()| reader.read(&tell));
            if let Err(why) = &read {
                tracing::error!(%why, "the nursery cannot be read");
            }
            // Its end of the socket closes with ours: whatever state it is in, it goes.
            reader.dead.store(true, Ordering::SeqCst);
            if let Err(why) = nix::sys::socket::shutdown(
                std::os::fd::AsRawFd::as_raw_fd(&reader.socket),
                nix::sys::socket::Shutdown::Both,
            ) {
                tracing::debug!(%why, "the nursery's socket was closed");
            }
            if let Err(why) = child.wait() {
                tracing::error!(%why, "the nursery cannot be waited for");
            }
            for (_, known) in reader.known().drain() {
                known.life.end(0, 0);
            }
        })?;
        match told.recv_timeout(START) {
            Ok(Ok(hello)) => Ok((nursery, hello)),
            Ok(Err(why)) => Err(why),
            Err(_) => Err(io::Error::other("the nursery did not start")),
        }
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// Tells it to kill what lives and to end. Its thread ends with it.
    pub fn close(&self) {
        let socket = std::os::fd::AsRawFd::as_raw_fd(&self.socket);
        if let Err(errno) = nix::sys::socket::shutdown(socket, nix::sys::socket::Shutdown::Both) {
            tracing::debug!(%errno, "the nursery had ended");
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<u64, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a sandbox. The answer comes when it is born; its end goes to `life`.
    pub fn build(
        &self,
        life: Arc<Life>,
        control: OwnedFd,
        doors: &[OwnedFd],
        base: Option<&str>,
    ) -> io::Result<oneshot::Receiver<Result<Option<i32>, Failure>>> {
        let (built, answer) = oneshot::channel();
        let (n, uid) = (life.n, life.slot.uid());
        self.known().insert(n, Known { life, built: Some(built), base: None });
        let mut beside = vec![control.as_fd()];
        beside.extend(doors.iter().map(AsFd::as_fd));
        let request = ToNursery::Build { n, uid, base: base.map(str::to_owned) };
        let sent = wire::send(self.socket.as_fd(), &request, &beside);
        if sent.is_err() || self.is_dead() {
            self.known().remove(&n);
        }
        sent.map(|()| answer)
    }

    /// Asks for the mount of a base.
    pub fn base(&self, life: &Life, path: &str) -> io::Result<oneshot::Receiver<Result<OwnedFd, i32>>> {
        let (give, answer) = oneshot::channel();
        if let Some(known) = self.known().get_mut(&life.n) {
            known.base = Some(give);
        }
        let request = ToNursery::Base { n: life.n, uid: life.slot.uid(), path: path.to_owned() };
        wire::send(self.socket.as_fd(), &request, &[]).map(|()| answer)
    }

    fn read(&self, tell: &mpsc::Sender<io::Result<Hello>>) -> io::Result<()> {
        let mut buffer = vec![0; MESSAGE_BYTES];
        while let Some((message, mut beside)) =
            wire::receive::<FromNursery>(self.socket.as_fd(), &mut buffer)?
        {
            match message {
                // Nobody waits for a second greeting, or after the time is up.
                FromNursery::Hello(hello) => tell.send(Ok(hello)).unwrap_or_default(),
                FromNursery::Built { n, base } => {
                    let mut all = self.known();
                    let Some(known) = all.get_mut(&n) else { continue };
                    if let Some(pidfd) = beside.pop() {
                        known.life.born(pidfd);
                    }
                    let heard = known.built.take().is_some_and(|built| built.send(Ok(base)).is_ok());
                    if !heard {
                        known.life.strike();
                    }
                }
                FromNursery::Base { n, errno } => {
                    if let Some(give) = self.known().get_mut(&n).and_then(|known| known.base.take()) {
                        let tree = beside.pop().ok_or(errno.unwrap_or(nix::libc::EIO));
                        // Nobody waits any more: the mount goes with its descriptor.
                        give.send(tree).map_err(drop).unwrap_or_default();
                    }
                }
                FromNursery::Failed { n, step, errno } => {
                    let Some(known) = self.known().remove(&n) else { continue };
                    known.life.end(0, 0);
                    if let Some(built) = known.built {
                        let why = io::Error::from_raw_os_error(errno);
                        built.send(Err((step, why))).map_err(drop).unwrap_or_default();
                    }
                }
                FromNursery::Ended { n, cpu_us, peak_bytes } => {
                    // Not under the lock: removing cgroups takes a moment.
                    let known = self.known().remove(&n);
                    if let Some(known) = known {
                        known.life.end(cpu_us, peak_bytes);
                    }
                }
            }
        }
        Ok(())
    }
}
