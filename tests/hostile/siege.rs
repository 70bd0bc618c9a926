//! An attack that lasts, and what the host sees of it meanwhile: how long its neighbours wait, and how soon nothing of
//! it is left once it is killed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use coinop::sandbox::{Event, Policy, Process, Sandbox};

use crate::ground::{self, Ground, attack, echo};
use crate::host::{self, PATIENCE, median, ms};
use crate::plain::{How, Plain};

/// A neighbour's small command may take so many times its time on a quiet host.
const TIMES: u32 = 20;
/// And no less than this counts as late.
const FLOOR: Duration = Duration::from_millis(200);
/// The same for a whole sandbox, made, used and destroyed.
const FRESH_FLOOR: Duration = Duration::from_secs(2);
/// After the kill, nothing is left.
const KILL: Duration = Duration::from_millis(100);
/// Where the machine is so busy that a plain process with as many threads takes longer to end, so many times that.
const PACE: u32 = 3;
/// The machine has moods: one good try of so many counts.
const TRIES: usize = 4;
const ECHOES: usize = 9;

pub struct Siege {
    pub sandbox: Box<dyn Sandbox>,
    /// Not read any more once the attack is at its height.
    _process: Process,
    pub mark: String,
    /// What it said before it was at its height.
    pub said: String,
}

impl Siege {
    /// Starts an attack and waits until it is at its height.
    pub async fn lay(ground: &Ground, policy: Policy, words: &[&str]) -> Siege {
        let sandbox = ground.sandbox(policy).await;
        let mark = host::new_mark();
        let mut process = sandbox.exec(attack(words, &mark)).await.unwrap();
        let mut said = String::new();
        let height = async {
            while let Some(event) = process.events.recv().await {
                match event {
                    Event::Stdout(bytes) | Event::Stderr(bytes) => {
                        said.push_str(&String::from_utf8_lossy(&bytes));
                    }
                    Event::Exit(how) => {
                        assert!(said.contains("ready"), "the attack ended with {how:?}: {said}");
                    }
                }
                // A flood says no other word.
                if said.contains("ready") || said.starts_with("xxx") {
                    return;
                }
            }
        };
        tokio::time::timeout(PATIENCE, height).await.expect("an attack comes to its height");
        Siege { sandbox, _process: process, mark, said }
    }

    pub fn number(&self) -> u64 {
        let line = self.said.lines().next().unwrap_or_default();
        line.parse().unwrap_or_else(|_| panic!("no number: {}", self.said))
    }

    pub fn family(&self) -> BTreeSet<i32> {
        host::family(&self.mark)
    }

    /// Kills the sandbox; how long until the host has nothing of it.
    pub async fn kill(self) -> Duration {
        let before = self.family();
        let started = Instant::now();
        self.sandbox.kill().await.unwrap();
        host::until("a killed attack is gone", || {
            !before.iter().any(|pid| host::exists(*pid)) && host::marked(&self.mark).is_empty()
        });
        let took = started.elapsed();
        self.sandbox.destroy().await.unwrap();
        took
    }
}

/// A sandbox from nothing to nothing.
async fn fresh(ground: &Ground) -> Duration {
    let started = Instant::now();
    let sandbox = ground.sandbox(ground::policy()).await;
    echo(&*sandbox).await;
    sandbox.destroy().await.unwrap();
    started.elapsed()
}

async fn echoes(neighbour: &dyn Sandbox) -> Duration {
    let mut times = Vec::new();
    for _ in 0..ECHOES {
        times.push(echo(neighbour).await);
    }
    median(times)
}

/// How long this machine takes now to end a process in nothing but a pid namespace.
fn pace() -> Option<Duration> {
    let plain = Plain::new();
    let mut loose = plain.start(How::default(), &["stubborn", "20"]).ok()?;
    loose.ready().ok()?;
    Some(loose.end())
}

/// Holds a backend against an attack that lasts; `check` looks at it from the host's side while it is at its height.
///
/// # Panics
/// When `check` does, when the neighbours wait too long, or when something outlives the kill, in every try.
pub async fn hold(
    ground: &Ground,
    policy: Policy,
    words: &[&str],
    check: impl AsyncFn(&Siege) -> String,
) -> String {
    let neighbour = ground.sandbox(ground::policy()).await;
    let mut tried = Vec::new();
    for _ in 0..TRIES {
        let quiet = (echoes(&*neighbour).await, fresh(ground).await);
        let siege = Siege::lay(ground, policy.clone(), words).await;
        let loud = (echoes(&*neighbour).await, fresh(ground).await);
        let seen = check(&siege).await;
        let gone = siege.kill().await;
        let note = format!(
            "{seen}; a neighbour's echo {} → {}, a fresh sandbox {} → {}, gone {} after the kill",
            ms(quiet.0),
            ms(loud.0),
            ms(quiet.1),
            ms(loud.1),
            ms(gone)
        );
        let patient = |quiet: Duration, floor: Duration| (quiet * TIMES).max(floor);
        if loud.0 <= patient(quiet.0, FLOOR) && loud.1 <= patient(quiet.1, FRESH_FLOOR) && gone <= KILL {
            neighbour.destroy().await.unwrap();
            return note;
        }
        let pace = pace();
        let in_time = gone <= KILL || pace.is_some_and(|pace| gone <= pace * PACE);
        if loud.0 <= patient(quiet.0, FLOOR) && loud.1 <= patient(quiet.1, FRESH_FLOOR) && in_time {
            neighbour.destroy().await.unwrap();
            return format!("{note} (a plain process: {})", ms(pace.unwrap_or_default()));
        }
        tried.push(format!("{note} (a plain process: {pace:?})"));
    }
    panic!("not in one try of {TRIES}:\n{}", tried.join("\n"));
}
