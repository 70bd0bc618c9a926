//! The backends under test, one column each, and what every case is given: a fresh backend with folders of its own.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use coinop::sandbox::docker;
use coinop::sandbox::local::{Local, Options};
use coinop::sandbox::sim::{Rule, Script, Sim, Step};
use coinop::sandbox::{Backend, Error, Policy, Sandbox, Spec, Tree};
use tempfile::TempDir;

use crate::case::Unmet;
use crate::running::{Folder, policy, processes_with};

/// `nobody`, whom no host gives anything.
const NOBODY: u32 = 65_534;
/// A group that `nobody` is not in.
const OTHERS: u32 = 54_321;

type Starting = Pin<Box<dyn Future<Output = Result<Fixture, String>>>>;

/// A user as whom cases run, each in a process of its own, and the group that the bases made there belong to.
#[derive(Clone, Copy)]
pub struct User {
    pub uid: u32,
    pub bases_group: u32,
}

/// A backend as the table shows it.
#[derive(Clone, Copy)]
pub struct Column {
    pub name: &'static str,
    /// Who runs it, if not we.
    pub user: Option<User>,
    /// The files whose cases are of interest here; none named, all are.
    pub groups: &'static [&'static str],
    /// Makes the backend anew, or says why it cannot start on this host.
    pub start: fn() -> Starting,
}

/// Every backend that is tested here. Another one is one more column and the function that starts it.
pub fn columns() -> Vec<Column> {
    let here = Column { name: "local", user: None, groups: &[], start: || Box::pin(local()) };
    let mut all = vec![here];
    if nix::unistd::geteuid().is_root() {
        let nobody = User { uid: NOBODY, bases_group: NOBODY };
        all.push(Column { name: "ordinary", user: Some(nobody), ..here });
        // Over such bases an ordinary user's node lays no overlay: it copies them.
        let user = Some(User { bases_group: OTHERS, ..nobody });
        all.push(Column {
            name: "copied",
            user,
            groups: &["files", "changes", "changes_caps", "usage"],
            ..here
        });
    }
    all.push(Column { name: "docker", start: || Box::pin(docker()), ..here });
    // No part that must be there: where there is none the suite says so, once.
    if podman_host().is_some() {
        all.push(Column {
            name: "podman",
            groups: &["limits", "walls"],
            start: || Box::pin(podman()),
            ..here
        });
    }
    all.push(Column { name: "sim", start: || Box::pin(sim()), ..here });
    all
}

async fn local() -> Result<Fixture, String> {
    let dir = tempfile::tempdir().unwrap();
    // No helper is named: this very program is its own, see `main`.
    let local = Local::new(Options::new(dir.path().join("state"))).map_err(|why| why.to_string())?;
    Fixture::of(dir, Arc::new(local))
}

/// On the engine of the tests alone, never on the machine's own.
async fn docker() -> Result<Fixture, String> {
    on_engine(crate::engine::found()?).await
}

/// Where a Podman for tests listens, if there is one.
pub fn podman_host() -> Option<String> {
    std::env::var("E2E_PODMAN_HOST").ok().filter(|host| !host.is_empty())
}

async fn podman() -> Result<Fixture, String> {
    on_engine(podman_host().ok_or("E2E_PODMAN_HOST names none")?).await
}

async fn on_engine(host: String) -> Result<Fixture, String> {
    let dir = tempfile::tempdir().unwrap();
    let node = format!("conformance{}n{}", std::process::id(), number());
    let options = docker::Options { host: Some(host), ..docker::Options::new("coinop-test:busybox", node) };
    let docker = docker::Docker::connect(options).await.map_err(|why| why.to_string())?;
    Fixture::of(dir, Arc::new(docker))
}

async fn sim() -> Result<Fixture, String> {
    let sim = Sim::new(Script::default());
    let fixture = Fixture::of(tempfile::tempdir().unwrap(), Arc::new(sim.clone()))?;
    Ok(Fixture { sim: Some(sim), ..fixture })
}

/// What a case works on.
pub struct Fixture {
    pub backend: Arc<dyn Backend>,
    /// For bases, and for files of the host that a job must not reach.
    pub dir: TempDir,
    /// Whether the processes of its sandboxes stand in the host's own list.
    pub shares_the_host: bool,
    sim: Option<Sim>,
}

/// No two sandboxes of this process have one name, nor two bases.
fn number() -> u32 {
    static NUMBERS: AtomicU32 = AtomicU32::new(0);
    NUMBERS.fetch_add(1, Ordering::Relaxed)
}

impl Fixture {
    /// A backend on this host, unless it cannot serve at all.
    fn of(dir: TempDir, backend: Arc<dyn Backend>) -> Result<Fixture, String> {
        backend.admit(&policy()).map_err(|why| why.to_string())?;
        Ok(Fixture { backend, dir, shares_the_host: true, sim: None })
    }

    pub fn runs_programs(&self) -> bool {
        self.sim.is_none()
    }

    /// What a scripted backend plays when `sh -c script` is run in a sandbox made from now on.
    pub fn plays(&self, script: &str, steps: impl IntoIterator<Item = Step>) {
        self.plays_words(&["sh", "-c", script], steps);
    }

    pub fn plays_words(&self, argv: &[&str], steps: impl IntoIterator<Item = Step>) {
        if let Some(sim) = &self.sim {
            let rule = Rule::new(argv.iter().copied(), steps.into_iter().collect());
            sim.rescript(|script| script.rules.push(rule));
        }
    }

    pub fn spec(&self, policy: Policy, base: Option<Arc<dyn Tree>>) -> Spec {
        Spec { id: format!("conformance-{}-{}", std::process::id(), number()), base, policy }
    }

    pub async fn sandbox(&self) -> Box<dyn Sandbox> {
        self.sandbox_with(policy()).await
    }

    /// With a policy that every backend must take.
    pub async fn sandbox_with(&self, policy: Policy) -> Box<dyn Sandbox> {
        self.backend.create(self.spec(policy, None)).await.unwrap()
    }

    /// With a policy that a backend may refuse, but by no other name than that of this clause; `admit` and `create`
    /// must agree about it.
    pub async fn about(&self, clause: &'static str, policy: Policy) -> Result<Box<dyn Sandbox>, Unmet> {
        let admitted = self.backend.admit(&policy);
        match (admitted, self.backend.create(self.spec(policy, None)).await) {
            (Ok(()), Ok(sandbox)) => Ok(sandbox),
            (
                Err(Error::Unenforceable { clause: first, .. }),
                Err(Error::Unenforceable { clause: second, why, .. }),
            ) if first == clause && second == clause => Err(Unmet::Refused { clause, why }),
            (admitted, made) => {
                panic!("about {clause}: admit said {admitted:?}, create {:?}", made.map(|_| "a sandbox"))
            }
        }
    }

    /// A base of its own that `fill` has made.
    pub fn base(&self, fill: impl FnOnce(&Path)) -> Arc<Folder> {
        let base = self.dir.path().join(format!("base-{}", number()));
        std::fs::create_dir(&base).unwrap();
        fill(&base);
        Arc::new(Folder(base))
    }

    pub async fn over(&self, base: Arc<Folder>) -> Box<dyn Sandbox> {
        self.backend.create(self.spec(policy(), Some(base))).await.unwrap()
    }

    /// Living processes of the host with this in their command line; where they cannot be seen the case is skipped.
    pub fn processes(&self, text: &str) -> Result<usize, Unmet> {
        if !self.shares_the_host {
            return Err(Unmet::Skipped("its processes are not in this host's list".to_owned()));
        }
        Ok(processes_with(text).len())
    }

    /// Waits until as many processes as `enough` wants have this in their command line.
    pub async fn until_processes(&self, text: &str, enough: fn(usize) -> bool) -> Result<(), Unmet> {
        self.processes(text)?;
        until(&format!("as many processes with {text} as should be"), async || {
            enough(processes_with(text).len()).then_some(())
        })
        .await;
        Ok(())
    }
}

/// Asks again until there is an answer; at most 20 s, for a busy machine.
pub async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
