//! The backends on which the rows run, and the base that they run over: a commit as the node's own cache gives it.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use coinop::repo::{self, Repos};
use coinop::sandbox::docker::{self, Docker};
use coinop::sandbox::local::{Local, Options};
use coinop::sandbox::{Backend, Policy, Sandbox, Spec, Tree};
use libtest_mimic::Failed;
use tempfile::TempDir;

use crate::Verdict;
use crate::rows::Row;
use crate::running::policy;

/// `nobody`, whom no host gives anything.
const NOBODY: u32 = 65_534;

#[derive(Clone, Copy)]
pub struct Column {
    pub name: &'static str,
    /// Who runs it, if not we.
    pub uid: Option<u32>,
    docker: bool,
}

pub fn ordinary() -> Column {
    Column { name: "ordinary", uid: Some(NOBODY), docker: false }
}

pub fn columns() -> Vec<Column> {
    let mut all = vec![Column { name: "local", uid: None, docker: false }];
    if nix::unistd::geteuid().is_root() {
        all.push(ordinary());
    }
    all.push(Column { name: "docker", uid: None, docker: true });
    all
}

/// A backend and the folders that it needs.
pub struct Place {
    pub backend: Arc<dyn Backend>,
    dir: TempDir,
}

fn number() -> u32 {
    static NUMBERS: AtomicU32 = AtomicU32::new(0);
    NUMBERS.fetch_add(1, Ordering::Relaxed)
}

impl Column {
    pub async fn start(&self) -> Result<Place, String> {
        let dir = tempfile::tempdir().unwrap();
        let backend: Arc<dyn Backend> = if self.docker {
            let host = crate::engine::found()?;
            let node = format!("workloads{}n{}", std::process::id(), number());
            let options =
                docker::Options { host: Some(host), ..docker::Options::new("coinop-test:agent", node) };
            Arc::new(Docker::connect(options).await.map_err(|why| why.to_string())?)
        } else {
            Arc::new(Local::new(Options::new(dir.path().join("state"))).map_err(|why| why.to_string())?)
        };
        backend.admit(&enough()).map_err(|why| why.to_string())?;
        Ok(Place { backend, dir })
    }
}

/// Enough for a compiler and a Java machine.
fn enough() -> Policy {
    let megabytes = 1 << 20;
    Policy {
        memory_bytes: 1024 * megabytes,
        pids: 256,
        disk_bytes: 256 * megabytes,
        open_files: 1024,
        ..policy()
    }
}

impl Place {
    /// A sandbox over a commit with this row's files.
    pub async fn sandbox(&self, row: &Row) -> Box<dyn Sandbox> {
        let path = self.dir.path().join("sample.git");
        let source = git2::Repository::init_bare(&path).unwrap();
        let mut tree = source.treebuilder(None).unwrap();
        for (name, text) in row.files.iter().chain(&[("README.md", "sample\n")]) {
            tree.insert(*name, source.blob(text.as_bytes()).unwrap(), 0o100_644).unwrap();
        }
        let tree = source.find_tree(tree.write().unwrap()).unwrap();
        let who = git2::Signature::new("A", "a@example.com", &git2::Time::new(1_700_000_000, 0)).unwrap();
        let first = source.commit(None, &who, &who, "first", &tree, &[]).unwrap();
        let first = source.find_commit(first).unwrap();
        source.commit(Some("refs/heads/main"), &who, &who, "second", &tree, &[&first]).unwrap();
        source.set_head("refs/heads/main").unwrap();
        let options = repo::Options { allow_file: true, ..repo::Options::default() };
        let repos = Repos::open(&self.dir.path().join("cache"), options).unwrap();
        let pin = repos.pin(&format!("file://{}", path.display()), None).await.unwrap();
        let base: Arc<dyn Tree> = repos.base(&pin).await.unwrap();
        let id = format!("workload-{}-{}", std::process::id(), number());
        self.backend.create(Spec { id, base: Some(base), policy: enough() }).await.unwrap()
    }
}

/// Runs a row in a process of this user, who owns nothing but a folder for temporary files.
pub fn as_user(uid: u32, variable: &str, row: &str) -> Result<Verdict, Failed> {
    let home = tempfile::Builder::new().prefix("coinop-ordinary").tempdir_in("/var/tmp")?;
    let skipped = |why: &str| {
        crate::skip::skip(row, why);
        Ok(Verdict::Skipped(why.to_owned()))
    };
    if std::os::unix::fs::chown(home.path(), Some(uid), Some(uid)).is_err() {
        return skipped("this root has no other user to be");
    }
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o2755))?;
    // By this link a user may start the program even where its path is closed to others.
    let mut child = std::process::Command::new("/proc/self/exe");
    child.env(variable, row).env("TMPDIR", home.path()).env("HOME", home.path()).current_dir("/");
    let output = match child.uid(uid).gid(uid).output() {
        Err(why) if why.kind() == ErrorKind::PermissionDenied => {
            return skipped("this program's file is closed to other users");
        }
        output => output?,
    };
    let said = String::from_utf8_lossy(&output.stdout);
    match said.lines().last().map(serde_json::from_str) {
        Some(Ok(verdict)) if output.status.success() => Ok(verdict),
        _ => Err(Failed::from(format!("{said}{}", String::from_utf8_lossy(&output.stderr)))),
    }
}
