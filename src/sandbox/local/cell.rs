//! A living sandbox as the rest of the node holds it: the trait's methods over what its tasks share (`shared`). How
//! it is built stands in `mod`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use coinop_shim::beneath::used_bytes;
use tokio::sync::mpsc;

use super::super::idle;
use super::super::place::{Place, folder, place};
use super::super::{Change, Command, Error, Limit, Policy, Process, Sandbox, Tree, Usage};
use super::exec::{self, Running};
use super::files;
use super::life::Life;
use super::shared::{Control, Folders, Shared};
use super::wire::{MESSAGE_BYTES, ToInit};
use super::{changes, watch};

/// The trait's sandbox.
pub struct Cell {
    shared: Arc<Shared>,
    base: Option<Arc<dyn Tree>>,
    /// The uid whose rights the node takes when it writes; none where it is the node's own.
    uid: Option<u32>,
    commands: AtomicU64,
    wall: tokio::task::AbortHandle,
    /// Held for their end: dropping them ends the watches.
    _watches: (Option<watch::Guard>, Option<idle::Guard>),
}

impl Cell {
    pub fn new(
        id: String,
        life: Arc<Life>,
        policy: Policy,
        base: Option<Arc<dyn Tree>>,
        uid: Option<u32>,
        (control, folders, buffer): (Control, Folders, Vec<u8>),
        watched: bool,
    ) -> Cell {
        let left = std::time::Duration::from_millis(policy.wall_ms).saturating_sub(life.wall());
        let shared = Arc::new(Shared::new(id, life.clone(), policy, folders, control));
        tokio::spawn(shared.clone().listen(buffer));
        let timed = shared.clone();
        let wall = tokio::spawn(async move {
            tokio::time::sleep(left).await;
            watch::look(&timed);
            life.strike_for(Limit::Wall);
        });
        let watch = watched.then(|| watch::watch(shared.clone()));
        let counted = Arc::downgrade(&shared);
        let idle = shared.activity.watch(&shared.policy, move || watch::cpu_us(counted.upgrade()));
        let (wall, commands) = (wall.abort_handle(), AtomicU64::new(0));
        Cell { shared, base, uid, commands, wall, _watches: (watch, idle) }
    }

    fn alive(&self) -> Result<(), Error> {
        if self.shared.life.has_ended() {
            let why = match self.shared.life.limit() {
                Some(limit) => format!("it reached its {limit:?} limit"),
                None => "it has ended".to_owned(),
            };
            return Err(Error::Gone(why));
        }
        Ok(())
    }

    /// Ends everything inside; what it has used is looked at first.
    async fn end(&self) -> Result<Usage, Error> {
        watch::look(&self.shared);
        self.shared.life.strike();
        self.shared.life.gone().await?;
        Ok(watch::look(&self.shared))
    }

    /// File work blocks: it has its own thread, and this one waits without holding up others.
    async fn on_files<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Shared) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let shared = self.shared.clone();
        let done = tokio::task::spawn_blocking(move || act(&shared)).await;
        done.unwrap_or_else(|why| {
            Err(Error::Host { doing: "reach its files", source: io::Error::other(why) })
        })
    }

    /// Fills the workspace of a sandbox without an overlay; not counted as the job's writing.
    pub(super) async fn copy_base(&self, base: Arc<dyn Tree>) -> Result<(), Error> {
        let uid = self.uid;
        self.on_files(move |shared| {
            // Until it is all there, nothing is the job's.
            shared.leave_out(u64::MAX);
            let host = |source| Error::Host { doing: "copy the base", source };
            let top = std::fs::File::open(base.path()).map_err(host)?;
            files::as_user(uid, || files::copy(top.into(), shared.folders.workspace.as_fd()))
                .map_err(host)?;
            let copied = used_bytes(shared.folders.upper.as_fd());
            shared.leave_out(copied);
            Ok(())
        })
        .await
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        self.wall.abort();
        self.shared.life.strike();
    }
}

#[async_trait]
impl Sandbox for Cell {
    fn id(&self) -> &str {
        &self.shared.id
    }

    async fn exec(&self, command: Command) -> Result<Process, Error> {
        self.alive()?;
        let cwd = folder(&command)?;
        let host = |source| Error::Host { doing: "start a command", source };
        let (stdout, out) = exec::output_pipe(self.uid).map_err(host)?;
        let (stderr, err) = exec::output_pipe(self.uid).map_err(host)?;
        let input = if command.stdin { Some(exec::input_pipe(self.uid).map_err(host)?) } else { None };
        let n = self.commands.fetch_add(1, Ordering::Relaxed);
        let ended = self.shared.await_exit(n);
        let busy = self.shared.activity.begin();
        // Before it begins: it may run out of memory before anybody watches it.
        let kills_before = self.shared.life.group.memory_kills();
        let message = ToInit::Exec {
            n,
            argv: command.argv,
            env: command.env.into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
            cwd,
            stdin: command.stdin,
        };
        let mut beside = vec![out.as_fd(), err.as_fd()];
        beside.extend(input.iter().map(|(theirs, _)| theirs.as_fd()));
        if let Err(why) = self.shared.ask(&message, &beside).await {
            self.shared.forget(n);
            if why.kind() == io::ErrorKind::FileTooLarge {
                let what = "the command line with its environment".to_owned();
                return Err(Error::TooLarge { what, cap_bytes: MESSAGE_BYTES as u64 });
            }
            self.alive()?;
            return Err(Error::Gone(why.to_string()));
        }
        drop((out, err));
        let stdin = input.map(|(_, ours)| {
            let (give, take) = mpsc::channel(exec::WAITING);
            tokio::spawn(exec::feed(ours, take, self.shared.activity.clone()));
            give
        });
        let (events, read) = mpsc::channel(exec::WAITING);
        let timeout = command.timeout;
        let running = Running { n, stdout, stderr, ended, events, timeout, busy, kills_before };
        tokio::spawn(running.run(self.shared.clone()));
        Ok(Process { stdin, events: read })
    }

    async fn read_file(&self, path: &str, cap_bytes: u64) -> Result<Vec<u8>, Error> {
        let place = place(path)?;
        let shown = path.to_owned();
        self.on_files(move |shared| match place {
            Place::Workspace(path) => files::read(shared.folders.workspace.as_fd(), &path, &shown, cap_bytes),
            Place::Job(path) => files::read(shared.folders.job.as_fd(), &path, &shown, cap_bytes),
        })
        .await
    }

    async fn write_file(&self, path: &str, bytes: &[u8]) -> Result<(), Error> {
        self.alive()?;
        let place = place(path)?;
        let (shown, bytes, uid) = (path.to_owned(), bytes.to_owned(), self.uid);
        self.on_files(move |shared| {
            files::as_user(uid, || match place {
                Place::Workspace(path) => {
                    files::write(shared.folders.workspace.as_fd(), &path, &shown, &bytes)
                }
                Place::Job(path) => files::write(shared.folders.job.as_fd(), &path, &shown, &bytes),
            })
        })
        .await
    }

    async fn changes(&self, cap_bytes: u64) -> Result<Vec<Change>, Error> {
        let base = self.base.clone();
        self.on_files(move |shared| {
            let open = |tree: &Arc<dyn Tree>| std::fs::File::open(tree.path()).map(OwnedFd::from);
            let base = base.as_ref().map(open).transpose();
            let base = base.map_err(|source| Error::Host { doing: "open the base", source })?;
            changes::changes(shared.folders.upper.as_fd(), base, shared.folders.overlay, cap_bytes)
        })
        .await
    }

    async fn kill(&self) -> Result<(), Error> {
        self.end().await.map(drop)
    }

    async fn usage(&self) -> Result<Usage, Error> {
        Ok(watch::look(&self.shared))
    }

    async fn destroy(self: Box<Self>) -> Result<Usage, Error> {
        self.wall.abort();
        self.end().await
    }
}
