//! One program that a test started: its output in a file, a bounded wait for it to be ready, an end by its own
//! pid. What the program is, and what ready means, `relays` and `node` say.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

/// A running program. Dropped, it is killed.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it with nothing on stdin and both outputs in a file of `dir`, and without our own COINOP_ variables.
    pub fn start(name: &str, program: &Path, args: &[&OsStr], dir: &Path) -> Self {
        let log = dir.join(format!("{name}.log"));
        let out = File::create(&log).expect("a log file");
        let mut command = Command::new(program);
        for (key, _) in std::env::vars_os() {
            if key.to_string_lossy().starts_with("COINOP_") {
                command.env_remove(key);
            }
        }
        let child = command
            .args(args)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stderr(out.try_clone().expect("a second handle"))
            .stdout(out)
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        Self { name: name.into(), child, log }
    }

    /// True while it runs.
    pub fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Polls `ready` until it is true. False: the program ended, or the time is up.
    pub async fn wait_until<F: AsyncFnMut() -> bool>(&mut self, limit: Duration, mut ready: F) -> bool {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            if !self.alive() {
                return false;
            }
            if ready().await {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }

    /// The end of what it printed, for a message about a failure.
    pub fn tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(40);
        format!("--- {} printed last:\n{}\n---", self.name, lines[from..].join("\n"))
    }

    /// SIGTERM, then up to `limit` for an orderly end.
    ///
    /// # Panics
    /// When it is still there after that.
    pub async fn stop(mut self, limit: Duration) -> ExitStatus {
        if let Some(pid) = self.child.id() {
            let pid = Pid::from_raw(i32::try_from(pid).expect("a pid"));
            kill(pid, Signal::SIGTERM).unwrap_or_else(|error| panic!("{}: SIGTERM: {error}", self.name));
        }
        match tokio::time::timeout(limit, self.child.wait()).await {
            Ok(status) => status.unwrap_or_else(|error| panic!("{}: {error}", self.name)),
            Err(_) => panic!("{} did not end within {limit:?} of SIGTERM\n{}", self.name, self.tail()),
        }
    }
}

/// A port of the loopback that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a loopback port");
    listener.local_addr().expect("its address").port()
}
