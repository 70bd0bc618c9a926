//! A scripted backend with the whole trait, for tests of the control path: it starts no process and touches no
//! file. What a real sandbox enforces, it only obeys where a script says so.

use std::collections::BTreeMap;
use std::path::{Component, Path};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use coinop_shim::pace::Pace;
use tokio::sync::{mpsc, watch};

use super::idle::{self, Activity};
use super::{
    Backend, Change, Changes, Check, Command, Content, Error, Event, Exit, Identity, LeaveOut, Limit,
    Network, Policy, Process, Sandbox, Spec, Usage,
};

/// What a command does. The first rule that matches is taken.
#[derive(Debug, Clone)]
pub struct Rule {
    /// The command line's first words; empty matches every command.
    pub argv: Vec<String>,
    pub steps: Vec<Step>,
}

#[derive(Debug, Clone)]
pub enum Step {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    /// Sends what arrives on stdin to stdout, until stdin is closed.
    Echo,
    /// In silence, without working.
    Wait(Duration),
    /// The workspace changes; a later change of the same path replaces an earlier one.
    Change(Change),
    Exit(Exit),
    /// The whole sandbox is gone, without an exit.
    Die,
    /// The whole sandbox ends by a limit of its policy.
    Exceed(Limit),
}

impl Rule {
    /// Commands that begin with these words do these steps.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>, steps: Vec<Step>) -> Rule {
        Rule { argv: argv.into_iter().map(Into::into).collect(), steps }
    }

    fn matches(&self, argv: &[String]) -> bool {
        argv.starts_with(&self.argv)
    }
}

/// How `create` fails.
#[derive(Debug, Clone)]
pub enum CreateFault {
    /// This clause cannot be enforced; `admit` refuses, too.
    Unenforceable(&'static str),
    /// The host fails, this many times; then it works.
    Host(u32),
}

#[derive(Debug, Clone, Default)]
pub struct Script {
    pub rules: Vec<Rule>,
    pub create: Option<CreateFault>,
    /// How long `create` takes.
    pub create_delay: Duration,
    pub usage: Usage,
    /// Leftovers that the next `reap` finds.
    pub leftovers: usize,
    pub caveats: Vec<String>,
}

/// The backend. Cheap to clone; clones share the script and the count.
#[derive(Clone)]
pub struct Sim {
    script: Arc<Mutex<Script>>,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    created: AtomicU64,
    living: AtomicU64,
    commands: Mutex<Vec<(String, Vec<String>)>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sim {
    pub fn new(script: Script) -> Sim {
        Sim { script: Arc::new(Mutex::new(script)), seen: Arc::default() }
    }

    /// Changes what happens from now on.
    pub fn rescript(&self, change: impl FnOnce(&mut Script)) {
        change(&mut locked(&self.script));
    }

    /// Sandboxes made so far.
    pub fn created(&self) -> u64 {
        self.seen.created.load(Ordering::SeqCst)
    }

    /// Sandboxes not yet destroyed or dropped.
    pub fn living(&self) -> u64 {
        self.seen.living.load(Ordering::SeqCst)
    }

    /// Every command so far: (sandbox id, argv), in order of their start.
    pub fn commands(&self) -> Vec<(String, Vec<String>)> {
        locked(&self.seen.commands).clone()
    }
}

#[async_trait]
impl Backend for Sim {
    fn identity(&self) -> Identity {
        Identity { backend: "sim".to_owned(), image: "script".to_owned() }
    }

    fn checks(&self) -> Vec<Check> {
        let clauses = [
            "wall_ms",
            "idle_ms",
            "memory_bytes",
            "swap_bytes",
            "pids",
            "cpu_milli",
            "disk_bytes",
            "inodes",
            "open_files",
            "output_bytes",
            "output_bytes_per_s",
            "network",
        ];
        let check = |name: &str, how: &str| Check {
            name: name.to_owned(),
            ok: true,
            how: how.to_owned(),
            mend: None,
        };
        let mut all = vec![check("isolation", "scripted: nothing is run")];
        all.extend(clauses.map(|name| match name {
            "wall_ms" => check(name, "a timer"),
            "idle_ms" => check(name, "a timer, while the script says nothing"),
            "output_bytes" => check(name, "counted as the script speaks"),
            "output_bytes_per_s" => check(name, "the script speaks no faster"),
            _ => check(name, "scripted: passed where the script says so"),
        }));
        all
    }

    fn caveats(&self) -> Vec<String> {
        locked(&self.script).caveats.clone()
    }

    fn admit(&self, policy: &Policy) -> Result<(), Error> {
        policy.usable()?;
        if policy.network == Network::Egress {
            let why = "there is no gateway in a script".to_owned();
            return Err(Error::Unenforceable { backend: "sim", clause: "network", why });
        }
        match locked(&self.script).create {
            Some(CreateFault::Unenforceable(clause)) => {
                Err(Error::Unenforceable { backend: "sim", clause, why: "the script says so".to_owned() })
            }
            _ => Ok(()),
        }
    }

    async fn create(&self, spec: Spec) -> Result<Box<dyn Sandbox>, Error> {
        self.admit(&spec.policy)?;
        spec.named()?;
        let delay = locked(&self.script).create_delay;
        tokio::time::sleep(delay).await;
        let mut script = locked(&self.script);
        if let Some(CreateFault::Host(left)) = &mut script.create
            && *left > 0
        {
            *left -= 1;
            let source = std::io::Error::other("the script says so");
            return Err(Error::Host { doing: "create", source });
        }
        self.seen.created.fetch_add(1, Ordering::SeqCst);
        self.seen.living.fetch_add(1, Ordering::SeqCst);
        let state = State {
            script: script.clone(),
            files: Mutex::default(),
            changes: Mutex::default(),
            limit: Mutex::default(),
            output_left: AtomicU64::new(spec.policy.output_bytes),
            pace: Mutex::new(Pace::new(spec.policy.output_bytes_per_s)),
            began: Instant::now(),
            activity: Activity::new(),
            commands: AtomicU64::new(0),
            dead: watch::Sender::new(false),
        };
        let state = Arc::new(state);
        let wall = {
            let (state, time) = (state.clone(), Duration::from_millis(spec.policy.wall_ms));
            tokio::spawn(async move {
                tokio::time::sleep(time).await;
                state.end(Some(Limit::Wall));
            })
        };
        let idle = state.activity.watch(&spec.policy, async || Some(0));
        Ok(Box::new(Scripted {
            spec,
            state,
            seen: self.seen.clone(),
            started: Instant::now(),
            wall: wall.abort_handle(),
            _idle: idle,
            counted: AtomicBool::new(true),
        }))
    }

    async fn reap(&self) -> Result<usize, Error> {
        Ok(std::mem::take(&mut locked(&self.script).leftovers))
    }
}

struct State {
    script: Script,
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    changes: Mutex<BTreeMap<Vec<u8>, Content>>,
    limit: Mutex<Option<Limit>>,
    output_left: AtomicU64,
    pace: Mutex<Pace>,
    began: Instant,
    activity: Arc<Activity>,
    commands: AtomicU64,
    dead: watch::Sender<bool>,
}

impl State {
    fn end(&self, limit: Option<Limit>) {
        let mut kept = locked(&self.limit);
        if !*self.dead.borrow() {
            *kept = limit;
            self.dead.send_replace(true);
        }
    }
}

struct Scripted {
    spec: Spec,
    state: Arc<State>,
    seen: Arc<Seen>,
    started: Instant,
    wall: tokio::task::AbortHandle,
    /// Held for its end: dropping it ends the watch.
    _idle: Option<idle::Guard>,
    counted: AtomicBool,
}

impl Scripted {
    fn alive(&self) -> Result<(), Error> {
        if *self.state.dead.borrow() { Err(Error::Gone("the script ended it".to_owned())) } else { Ok(()) }
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.wall.abort();
        self.state.end(None);
        if self.counted.swap(false, Ordering::SeqCst) {
            self.seen.living.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn workspace_path(path: &str) -> Result<&str, Error> {
    let inside = path.strip_prefix("/workspace/").unwrap_or(path);
    let plain = inside.strip_prefix("/job/").unwrap_or(inside);
    if plain.contains('\0') || plain.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(Error::BadPath(path.to_owned()));
    }
    Ok(inside)
}

/// Whether a command's folder is said to lie in the workspace.
fn is_inside(cwd: &Path) -> bool {
    let inside = cwd.strip_prefix("/workspace").unwrap_or(cwd);
    inside.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

fn is_git(path: &[u8]) -> bool {
    path == b".git" || path.starts_with(b".git/")
}

#[async_trait]
impl Sandbox for Scripted {
    fn id(&self) -> &str {
        &self.spec.id
    }

    fn limit(&self) -> Option<Limit> {
        *locked(&self.state.limit)
    }

    async fn exec(&self, command: Command) -> Result<Process, Error> {
        self.alive()?;
        if !is_inside(&command.cwd) {
            return Err(Error::BadPath(command.cwd.display().to_string()));
        }
        if let Some(name) = command.env.keys().find(|name| name.is_empty() || name.contains('=')) {
            return Err(Error::BadPolicy(format!("{name:?} cannot name an environment variable")));
        }
        locked(&self.seen.commands).push((self.spec.id.clone(), command.argv.clone()));
        let (stdin, input) = mpsc::channel(64);
        let (events, read) = mpsc::channel(64);
        let steps = self.state.script.rules.iter().find(|rule| rule.matches(&command.argv));
        let not_found = vec![Step::Exit(Exit::NotStarted { errno: 2 })];
        let steps = steps.map_or(not_found, |rule| rule.steps.clone());
        let state = self.state.clone();
        let (n, mut busy) = (state.commands.fetch_add(1, Ordering::Relaxed), state.activity.begin());
        let timeout = command.timeout;
        tokio::spawn(async move {
            let mut dead = state.dead.subscribe();
            let told = Told { n, state: &state, events: &events };
            let exit = tokio::select! {
                exit = play(told, steps, input) => exit,
                () = busy.is_idle() => Some(Exit::Limit { limit: Limit::Idle }),
                () = async { tokio::time::sleep(timeout.unwrap_or(Duration::MAX)).await } => Some(Exit::Timeout),
                _ = dead.wait_for(|dead| *dead) => None,
            };
            let exit = match (*state.dead.borrow(), exit) {
                (true, _) => locked(&state.limit).map(|limit| Exit::Limit { limit }),
                (false, exit) => exit,
            };
            if let Some(exit) = exit
                && events.send(Event::Exit(exit)).await.is_err()
            {
                tracing::trace!("nobody waits for this exit");
            }
        });
        Ok(Process { stdin: command.stdin.then_some(stdin), events: read })
    }

    async fn read_file(&self, path: &str, cap_bytes: u64) -> Result<Vec<u8>, Error> {
        let shown = || path.to_owned();
        let path = workspace_path(path)?;
        let written = locked(&self.state.files).get(path).cloned();
        let changed = match locked(&self.state.changes).get(path.as_bytes()) {
            Some(Content::File { bytes, .. }) => Some(bytes.clone()),
            Some(Content::Symlink { .. }) => return Err(Error::BadPath(shown())),
            Some(Content::Deleted) | None => None,
        };
        let bytes = changed.or(written).ok_or_else(|| Error::NotFound(shown()))?;
        if bytes.len() as u64 > cap_bytes {
            return Err(Error::TooLarge { what: path.to_owned(), cap_bytes });
        }
        Ok(bytes)
    }

    async fn write_file(&self, path: &str, bytes: &[u8]) -> Result<(), Error> {
        self.alive()?;
        let path = workspace_path(path)?;
        locked(&self.state.files).insert(path.to_owned(), bytes.to_owned());
        if !path.starts_with("/job/") {
            let content = Content::File { bytes: bytes.to_owned(), executable: false };
            locked(&self.state.changes).insert(path.as_bytes().to_owned(), content);
        }
        Ok(())
    }

    async fn changes_except(&self, cap_bytes: u64, leave_out: LeaveOut) -> Result<Changes, Error> {
        // There is no base: what is not a deletion is new.
        let (left_out, changes): (Vec<Change>, Vec<Change>) = locked(&self.state.changes)
            .iter()
            .filter(|(path, _)| !is_git(path))
            .map(|(path, to)| Change { path: path.clone(), to: to.clone() })
            .partition(|change| change.to != Content::Deleted && leave_out(&change.path, false));
        let size = |change: &Change| match &change.to {
            Content::File { bytes, .. } => bytes.len(),
            Content::Symlink { target } => target.len(),
            Content::Deleted => 0,
        };
        let total: usize = changes.iter().map(|change| change.path.len() + size(change)).sum();
        if total as u64 > cap_bytes {
            return Err(Error::TooLarge { what: "what the job changed".to_owned(), cap_bytes });
        }
        Ok(Changes { delivered: changes, left_out: left_out.len() as u64 })
    }

    async fn kill(&self) -> Result<(), Error> {
        self.state.end(None);
        Ok(())
    }

    async fn usage(&self) -> Result<Usage, Error> {
        let wall_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(Usage { wall_ms, ..self.state.script.usage })
    }

    async fn destroy(self: Box<Self>) -> Result<Usage, Error> {
        self.usage().await
    }
}

/// Where a command's output goes.
#[derive(Clone, Copy)]
struct Told<'a> {
    n: u64,
    state: &'a State,
    events: &'a mpsc::Sender<Event>,
}

/// Plays the steps; `None` when the sandbox died of them.
async fn play(told: Told<'_>, steps: Vec<Step>, mut input: mpsc::Receiver<Vec<u8>>) -> Option<Exit> {
    for step in steps {
        match step {
            Step::Stdout(bytes) if told.tell(&bytes, Event::Stdout).await => {}
            Step::Stderr(bytes) if told.tell(&bytes, Event::Stderr).await => {}
            Step::Stdout(_) | Step::Stderr(_) => return Some(TOO_MUCH),
            Step::Echo => {
                while let Some(bytes) = input.recv().await {
                    if !told.tell(&bytes, Event::Stdout).await {
                        return Some(TOO_MUCH);
                    }
                }
            }
            Step::Wait(time) => tokio::time::sleep(time).await,
            Step::Change(change) => {
                locked(&told.state.changes).insert(change.path, change.to);
            }
            Step::Exit(exit) => return Some(exit),
            Step::Die => {
                told.state.end(None);
                return None;
            }
            Step::Exceed(limit) => {
                told.state.end(Some(limit));
                return None;
            }
        }
    }
    Some(Exit::Code { code: 0 })
}

const TOO_MUCH: Exit = Exit::Limit { limit: Limit::Output };

impl Told<'_> {
    /// Whether that was within the policy; the command ends where it was not.
    async fn tell(self, bytes: &[u8], wrap: fn(Vec<u8>) -> Event) -> bool {
        let Told { n, state, events } = self;
        let left = state.output_left.load(Ordering::SeqCst);
        let allowed = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        state.output_left.store(left - allowed as u64, Ordering::SeqCst);
        let mut rest = bytes.get(..allowed).unwrap_or_default();
        while !rest.is_empty() {
            let (room, wait) = {
                let (pace, now) = (locked(&state.pace), state.began.elapsed());
                (pace.room(now, n), pace.wait(now, n))
            };
            if room == 0 {
                tokio::time::sleep(wait).await;
                continue;
            }
            let (piece, later) = rest.split_at(room.min(rest.len()));
            rest = later;
            locked(&state.pace).took(state.began.elapsed(), n, piece.len());
            if state.activity.waits(events.send(wrap(piece.to_vec()))).await.is_err() {
                tracing::trace!("nobody reads this output");
            }
        }
        allowed == bytes.len()
    }
}

#[cfg(test)]
#[path = "sim_tests.rs"]
mod tests;
