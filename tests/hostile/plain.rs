//! An attack with its defence off: the program as a plain process of this test, held by nothing but what keeps the
//! machine safe, a pid namespace that ends with it and limits far above a policy's.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

use crate::host::{self, PATIENCE};

/// The user of plain attacks: nobody else's, so that what they use up is nobody's.
const STRANGER: u32 = 1_878_000_123;

/// The attack program, made once, static; its name shows in the list of processes.
pub struct Program {
    _dir: tempfile::TempDir,
    pub path: PathBuf,
    pub name: String,
}

/// # Errors
/// Where there is no C compiler that links statically.
pub fn program() -> Result<&'static Program, String> {
    static MADE: OnceLock<Result<Program, String>> = OnceLock::new();
    MADE.get_or_init(|| {
        let dir = readable();
        let (source, name) =
            (dir.path().join("attack.c"), format!("{}{}", host::PROGRAM, std::process::id()));
        std::fs::write(&source, include_str!("attack.c")).unwrap();
        let path = dir.path().join(&name);
        let made = Command::new("gcc").args(["-static", "-O1", "-o"]).arg(&path).arg(&source).output();
        match made {
            Ok(made) if made.status.success() => Ok(Program { _dir: dir, path, name }),
            Ok(made) => Err(format!(
                "gcc cannot make a static program: {}",
                String::from_utf8_lossy(&made.stderr).lines().next().unwrap_or_default()
            )),
            Err(why) => Err(format!("no gcc: {why}")),
        }
    })
    .as_ref()
    .map_err(Clone::clone)
}

/// A temporary folder that every user may enter.
pub fn readable() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

/// How much of the wall is missing.
#[derive(Clone, Copy, Default)]
pub struct How<'a> {
    /// Options of `prlimit`: the bounds that keep the machine safe.
    pub limits: &'a [&'a str],
    /// A network of its own, with this shell command run in it first.
    pub network: Option<&'a str>,
    /// As root, of this host or of a user namespace.
    pub root: bool,
    /// The attack itself is process 1 of its namespace.
    pub first: bool,
    /// The namespace outlives the attack's own command.
    pub stays: bool,
    /// What a shell says right before the attack.
    pub before: &'a str,
}

pub struct Plain {
    dir: tempfile::TempDir,
}

impl Plain {
    pub fn new() -> Plain {
        use std::os::unix::fs::PermissionsExt;
        let plain = Plain { dir: readable() };
        std::fs::create_dir(plain.workspace()).unwrap();
        std::fs::set_permissions(plain.workspace(), std::fs::Permissions::from_mode(0o777)).unwrap();
        plain
    }

    /// What stands in for a job's workspace: a folder, and nothing around it.
    pub fn workspace(&self) -> PathBuf {
        self.dir.path().join("workspace")
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts the attack.
    ///
    /// # Errors
    /// Where the program or the namespace cannot be made.
    pub fn start(&self, how: How<'_>, words: &[&str]) -> Result<Loose, String> {
        let program = program()?;
        let mut unshare = Command::new("unshare");
        unshare.args(["--pid", "--fork", "--kill-child"]);
        if !geteuid().is_root() {
            unshare.args(["--user", if how.root { "--map-root-user" } else { "--map-current-user" }]);
        }
        if how.network.is_some() {
            unshare.arg("--net");
        }
        let first = how.network.unwrap_or(":");
        let last = match how {
            How { first: true, .. } => "exec \"$@\"",
            How { stays: true, .. } => "\"$@\"; exec sleep 600",
            _ => "\"$@\"; exit $?",
        };
        unshare.args(["sh", "-c", &format!("{first} || exit 70; {} {last}", how.before), "sh"]);
        unshare.arg("prlimit").args(how.limits).arg("--core=0");
        if geteuid().is_root() && !how.root {
            let id = STRANGER.to_string();
            unshare.args(["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups"]);
        }
        let mark = host::new_mark();
        unshare.arg(&program.path).args(words).arg(&mark);
        unshare.current_dir(self.workspace()).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = unshare.spawn().map_err(|why| format!("no unshare: {why}"))?;
        let stdout = child.stdout.take().unwrap();
        Ok(Loose { child, mark, stdout: Some(stdout), lines: None })
    }

    /// Runs the attack to its end; all that it said.
    ///
    /// # Errors
    /// As `start`.
    pub fn run(&self, how: How<'_>, words: &[&str]) -> Result<String, String> {
        let mut loose = self.start(how, words)?;
        let mut stdout = loose.stdout.take().unwrap();
        let (tell, told) = channel();
        std::thread::spawn(move || {
            let mut said = Vec::new();
            stdout.read_to_end(&mut said).map(|_| tell.send(said).unwrap_or_default()).unwrap_or_default();
        });
        let said = told.recv_timeout(PATIENCE).expect("a plain attack ends in time");
        Ok(String::from_utf8_lossy(&said).into_owned())
    }
}

/// An attack at large, until this is dropped.
pub struct Loose {
    child: Child,
    pub mark: String,
    stdout: Option<ChildStdout>,
    lines: Option<Receiver<String>>,
}

impl Loose {
    /// What it says, to be read by the test itself.
    pub fn output(&mut self) -> ChildStdout {
        self.stdout.take().expect("nobody has read it yet")
    }

    /// The next line that it says.
    ///
    /// # Errors
    /// Where it could not be begun, as on a host without the namespaces.
    pub fn line(&mut self) -> Result<String, String> {
        if let Some(stdout) = self.stdout.take() {
            let (tell, told) = channel();
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if tell.send(line).is_err() {
                        return;
                    }
                }
            });
            self.lines = Some(told);
        }
        let lines = self.lines.as_ref().expect("it was not run to its end");
        lines.recv_timeout(PATIENCE).map_err(|why| format!("a plain attack cannot be run here: {why}"))
    }

    /// Waits until it has got as far as it can; the lines that it said before.
    ///
    /// # Errors
    /// As `line`.
    pub fn ready(&mut self) -> Result<Vec<String>, String> {
        let mut lines = Vec::new();
        loop {
            match self.line()? {
                line if line == "ready" => return Ok(lines),
                line => lines.push(line),
            }
        }
    }

    pub fn marked(&self) -> Vec<i32> {
        host::marked(&self.mark)
    }

    /// A signal to each of its processes, as somebody would try.
    pub fn signal(&self, signal: Signal) {
        for pid in self.marked() {
            // ESRCH: it has ended.
            kill(Pid::from_raw(pid), signal).unwrap_or_default();
        }
    }
}

impl Loose {
    /// Kills it with everything it has started; how long until the host has nothing of it.
    pub fn end(&mut self) -> Duration {
        let before = host::family(&self.mark);
        let started = Instant::now();
        self.strike();
        host::until("a plain attack is gone", || !before.iter().any(|pid| host::exists(*pid)));
        started.elapsed()
    }

    fn strike(&self) {
        // Process 1 of the namespace, and with it everything inside. `--kill-child` alone does not reach one that has
        // become another user.
        let own = self.child.id().cast_signed();
        for first in host::processes().into_iter().filter(|one| one.parent == own) {
            kill(Pid::from_raw(first.pid), Signal::SIGKILL).unwrap_or_default();
        }
    }
}

impl Drop for Loose {
    fn drop(&mut self) {
        self.strike();
        self.child.kill().unwrap_or_default();
        self.child.wait().map(drop).unwrap_or_default();
        host::until("a plain attack is over", || self.marked().is_empty());
    }
}

/// How long a thing that must not happen is given to happen.
pub const MOMENT: Duration = Duration::from_millis(100);
