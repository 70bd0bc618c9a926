//! Other people's relays, started for one test each: on the loopback, on a free port, with their own data, open
//! for every kind and rate. A relay is ready once it answers NIP-11 with the name that this start gave it.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::parts::Part;
use crate::process::{Process, free_port};

/// Which relay a test talks to.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    NostrRsRelay,
    PyNostrRelay,
}

/// A relay that runs until it is dropped.
pub struct Relay {
    pub url: String,
    process: Process,
    /// Its configuration, data and log.
    _dir: TempDir,
}

const READY: Duration = Duration::from_secs(30);
/// Another program can take the port between our look and the relay's.
const TRIES: u32 = 3;

impl Kind {
    pub fn part(self) -> Part {
        match self {
            Kind::NostrRsRelay => Part::NostrRsRelay,
            Kind::PyNostrRelay => Part::NostrRelay,
        }
    }

    /// # Panics
    /// When the relay is not ready in time, with what it printed.
    pub async fn start(self, program: &Path) -> Relay {
        let mut printed = String::new();
        for attempt in 0..TRIES {
            let dir = tempfile::tempdir().expect("a folder for the relay");
            let port = free_port();
            let name = format!("e2e-{}-{port}-{attempt}", std::process::id());
            let mut process = self.spawn(program, dir.path(), port, &name);
            if process.wait_until(READY, async || says_its_name(port, &name).await).await {
                return Relay { url: format!("ws://127.0.0.1:{port}"), process, _dir: dir };
            }
            printed = process.tail();
        }
        panic!("{self:?} was not ready within {READY:?}, {TRIES} times\n{printed}");
    }

    fn spawn(self, program: &Path, dir: &Path, port: u16, name: &str) -> Process {
        let data = dir.display();
        let (file, text) = match self {
            Kind::NostrRsRelay => ("config.toml", rs_config(&data.to_string(), port, name)),
            Kind::PyNostrRelay => ("config.yaml", py_config(&data.to_string(), port, name)),
        };
        let config = dir.join(file);
        std::fs::write(&config, text).expect("the relay's configuration");
        let args: Vec<&OsStr> = match self {
            Kind::NostrRsRelay => vec!["--config".as_ref(), config.as_ref()],
            Kind::PyNostrRelay => {
                vec!["-c".as_ref(), config.as_ref(), "serve".as_ref(), "--use-uvicorn".as_ref()]
            }
        };
        Process::start("relay", program, &args, dir)
    }
}

impl Relay {
    /// What it printed last, for a message about a failure.
    pub fn tail(&self) -> String {
        self.process.tail()
    }
}

fn rs_config(data: &str, port: u16, name: &str) -> String {
    format!(
        r#"[info]
relay_url = "ws://127.0.0.1:{port}/"
name = "{name}"
[database]
data_directory = "{data}"
[network]
address = "127.0.0.1"
port = {port}
[limits]
messages_per_sec = 0
subscriptions_per_min = 0
max_event_bytes = 1048576
max_ws_message_bytes = 2097152
max_ws_frame_bytes = 2097152
"#
    )
}

/// Its own defaults, but for the 4 KiB on an event's content and the switch that allows only some kinds.
fn py_config(data: &str, port: u16, name: &str) -> String {
    format!(
        r#"relay_name: {name}
storage:
  sqlalchemy.url: sqlite+aiosqlite:///{data}/relay.sqlite3
  validators:
    - nostr_relay.validators.is_not_too_large
    - nostr_relay.validators.is_signed
    - nostr_relay.validators.is_recent
gunicorn:
  bind: 127.0.0.1:{port}
  workers: 1
authentication:
  enabled: false
verification:
  nip05_verification: disabled
max_event_size: 1048576
"#
    )
}

/// Asks for the NIP-11 document. Any failure is a no: the caller asks again.
async fn says_its_name(port: u16, name: &str) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        let question = format!(
            "GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: application/nostr+json\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(question.as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        stream.take(64 * 1024).read_to_end(&mut answer).await.ok()?;
        Some(String::from_utf8_lossy(&answer).contains(name))
    };
    matches!(tokio::time::timeout(Duration::from_secs(2), ask).await, Ok(Some(true)))
}
