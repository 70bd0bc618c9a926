//! A backend of the tests' own: every sandbox does what the script says, so that faults of a host come when they
//! are wanted. It isolates nothing.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use coinop::sandbox::{
    Backend, Changes, Check, Command, Error, Event, Exit, Identity, LeaveOut, Policy, Process, Sandbox, Spec,
    Usage,
};
use tokio::sync::{mpsc, watch};

/// What one sandbox does; when the script is over, everything succeeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Every command prints `done` and ends with 0.
    Works,
    /// The host has no room for it.
    HostFails,
    /// It dies under its command.
    Dies,
    /// Its command never ends.
    Hangs,
    /// A bug of ours.
    Panics,
}

/// A scripted backend; clones share the script.
#[derive(Clone)]
pub struct Backstage {
    shared: Arc<Shared>,
}

struct Shared {
    script: Mutex<VecDeque<Step>>,
    made: AtomicU32,
    living: AtomicU32,
    /// Names of the sandboxes in the order of their making.
    names: Mutex<Vec<String>>,
    held: watch::Sender<bool>,
    breaks: AtomicBool,
}

impl Backstage {
    pub fn new(script: &[Step]) -> Backstage {
        let shared = Shared {
            script: Mutex::new(script.iter().copied().collect()),
            made: AtomicU32::new(0),
            living: AtomicU32::new(0),
            names: Mutex::default(),
            held: watch::channel(false).0,
            breaks: AtomicBool::new(false),
        };
        Backstage { shared: Arc::new(shared) }
    }

    /// Sandboxes asked for so far.
    pub fn made(&self) -> u32 {
        self.shared.made.load(Ordering::SeqCst)
    }

    /// Sandboxes that are there now.
    pub fn living(&self) -> u32 {
        self.shared.living.load(Ordering::SeqCst)
    }

    pub fn names(&self) -> Vec<String> {
        lock(&self.shared.names).clone()
    }

    /// From now on there is a bug in what the dispatcher calls.
    pub fn break_admission(&self) {
        self.shared.breaks.store(true, Ordering::SeqCst);
    }

    /// While held, commands do not end.
    pub fn hold(&self, held: bool) {
        self.shared.held.send_replace(held);
    }
}

#[async_trait]
impl Backend for Backstage {
    fn identity(&self) -> Identity {
        Identity { backend: "backstage".into(), image: "none".into() }
    }

    fn checks(&self) -> Vec<Check> {
        Vec::new()
    }

    fn admit(&self, _: &Policy) -> Result<(), Error> {
        assert!(!self.shared.breaks.load(Ordering::SeqCst), "the test says so");
        Ok(())
    }

    async fn create(&self, spec: Spec) -> Result<Box<dyn Sandbox>, Error> {
        self.shared.made.fetch_add(1, Ordering::SeqCst);
        lock(&self.shared.names).push(spec.id.clone());
        let step = lock(&self.shared.script).pop_front().unwrap_or(Step::Works);
        match step {
            Step::HostFails => {
                Err(Error::Host { doing: "make a room", source: std::io::Error::other("no room") })
            }
            Step::Panics => panic!("the script says so"),
            step => {
                self.shared.living.fetch_add(1, Ordering::SeqCst);
                Ok(Box::new(Cell { id: spec.id, step, shared: Arc::clone(&self.shared) }))
            }
        }
    }

    async fn reap(&self) -> Result<usize, Error> {
        Ok(0)
    }
}

struct Cell {
    id: String,
    step: Step,
    shared: Arc<Shared>,
}

impl Drop for Cell {
    fn drop(&mut self) {
        self.shared.living.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Sandbox for Cell {
    fn id(&self) -> &str {
        &self.id
    }

    fn limit(&self) -> Option<coinop::sandbox::Limit> {
        None
    }

    async fn exec(&self, _: Command) -> Result<Process, Error> {
        let (say, events) = mpsc::channel(4);
        let (step, mut held) = (self.step, self.shared.held.subscribe());
        tokio::spawn(async move {
            match step {
                Step::Hangs => say.closed().await,
                Step::Dies => {}
                _ => {
                    held.wait_for(|held| !held).await.map(drop).unwrap_or_default();
                    for event in [Event::Stdout(b"done\n".to_vec()), Event::Exit(Exit::Code { code: 0 })] {
                        say.send(event).await.unwrap_or_default();
                    }
                }
            }
        });
        Ok(Process { stdin: None, events })
    }

    async fn read_file(&self, path: &str, _: u64) -> Result<Vec<u8>, Error> {
        Err(Error::NotFound(path.into()))
    }

    async fn write_file(&self, _: &str, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    async fn changes_except(&self, _: u64, _: LeaveOut) -> Result<Changes, Error> {
        Ok(Changes::default())
    }

    async fn kill(&self) -> Result<(), Error> {
        Ok(())
    }

    async fn usage(&self) -> Result<Usage, Error> {
        Ok(Usage::default())
    }

    async fn destroy(self: Box<Self>) -> Result<Usage, Error> {
        Ok(Usage::default())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
