//! Our own binary as an operator would run it: a key made by `coinop keys new`, then `coinop connect --nip90`
//! with flags and a configuration file, ended by SIGTERM.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::process::Process;

/// A node that serves until it is stopped or dropped.
pub struct Node {
    /// The provider's public key, hex.
    pub public_key: String,
    process: Process,
    _dir: TempDir,
}

/// Everything is at its default but this: the test's repository is served on the loopback.
const CONFIG: &str = "[admission]\nallow_private_repos = true\n";
const STOP_WITHIN: Duration = Duration::from_secs(30);

impl Node {
    /// Starts it on these relays. It need not be connected yet: what was asked before, it catches up on.
    pub fn connect(relays: &[&str]) -> Self {
        let coinop = Path::new(env!("CARGO_BIN_EXE_coinop"));
        let dir = tempfile::tempdir().expect("a folder for the node");
        let config = dir.path().join("coinop.toml");
        std::fs::write(&config, CONFIG).expect("its configuration");
        let data = dir.path().join("data");

        let mut args: Vec<&OsStr> = vec!["connect".as_ref(), "--nip90".as_ref()];
        let place: [&OsStr; 4] = ["--data-dir".as_ref(), data.as_ref(), "--config".as_ref(), config.as_ref()];
        let public_key = make_key(coinop, &place);
        args.extend(place);
        for relay in relays {
            args.extend(["--relay".as_ref(), OsStr::new(relay)]);
        }
        let process = Process::start("coinop", coinop, &args, dir.path());
        Self { public_key, process, _dir: dir }
    }

    /// What it printed last, for a message about a failure.
    pub fn tail(&self) -> String {
        self.process.tail()
    }

    pub async fn stop(self) -> ExitStatus {
        self.process.stop(STOP_WITHIN).await
    }
}

fn make_key(coinop: &Path, place: &[&OsStr]) -> String {
    let output =
        Command::new(coinop).args(["keys", "new", "--json"]).args(place).output().expect("coinop runs");
    let talk = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "keys new: {}\n{talk}", output.status);
    let key: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("keys new: {error}\n{talk}"));
    key["hex"].as_str().expect("the public key in hex").to_string()
}
