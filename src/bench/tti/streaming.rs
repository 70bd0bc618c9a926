//! What a sandbox adds to a byte on its way: a byte goes to a `cat` and comes back, through a plain pair of pipes and
//! through each backend, in turns. That is the way in and the way out, so it is more than output alone takes.

use std::io::{self, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command as Plain, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::lanes::{Lane, Name};
use crate::bench::stats::rank;
use crate::sandbox::{Command, Error, Event, Process, Sandbox};

const CAT: &str = "/bin/cat";
/// Between two bytes, so that each finds everybody asleep, as a log line does.
const PAUSE: Duration = Duration::from_millis(1);

/// Milliseconds for a byte in and out again.
#[derive(Debug, Clone, Serialize)]
pub struct Stream {
    pub name: Name,
    pub p50_ms: f64,
    pub p99_ms: f64,
    /// p50 beyond that of the plain pipes; none for these themselves.
    pub adds_ms: Option<f64>,
}

struct Pipes {
    child: Child,
    to: ChildStdin,
    from: ChildStdout,
}

impl Pipes {
    fn open() -> io::Result<Pipes> {
        let mut child = Plain::new(CAT).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(to), Some(from)) => Ok(Pipes { child, to, from }),
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn there_and_back(&mut self) -> io::Result<()> {
        self.to.write_all(b"x")?;
        self.from.read_exact(&mut [0])
    }

    fn close(self) -> io::Result<()> {
        let Pipes { mut child, to, .. } = self;
        drop(to);
        child.wait().map(drop)
    }
}

struct Inside {
    name: Name,
    sandbox: Box<dyn Sandbox>,
    process: Process,
    times: Vec<f64>,
}

impl Inside {
    async fn there_and_back(&mut self) -> Result<(), Error> {
        let gone = || Error::Gone("its cat ended".to_owned());
        let stdin = self.process.stdin.as_ref().ok_or_else(gone)?;
        stdin.send(b"x".to_vec()).await.map_err(|_| gone())?;
        match self.process.events.recv().await {
            Some(Event::Stdout(bytes)) if bytes == b"x" => Ok(()),
            _ => Err(gone()),
        }
    }
}

/// Sends so many bytes through each. Pools have no part in it: only the cold lanes are looked at.
pub async fn measure(lanes: &[Arc<Lane>], bytes: usize) -> Result<Vec<Stream>, Error> {
    let host = |source| Error::Host { doing: "measure a plain pipe", source };
    let mut inside = Vec::new();
    for lane in lanes.iter().filter(|lane| matches!(lane.name, Name::Cold | Name::DockerCold)) {
        let sandbox = lane.keep("stream").await?;
        let command = Command { argv: vec![CAT.to_owned()], stdin: true, ..Command::default() };
        let process = sandbox.exec(command).await?;
        inside.push(Inside { name: lane.name, sandbox, process, times: Vec::new() });
    }
    if inside.is_empty() {
        return Ok(Vec::new());
    }
    let mut pipes = Pipes::open().map_err(host)?;
    let mut plain = Vec::new();
    let ms = |since: Instant| since.elapsed().as_secs_f64() * 1000.0;
    for n in 0..bytes + bytes / 10 {
        let counts = n >= bytes / 10;
        tokio::time::sleep(PAUSE).await;
        let start = Instant::now();
        pipes.there_and_back().map_err(host)?;
        plain.extend(counts.then(|| ms(start)));
        for one in &mut inside {
            tokio::time::sleep(PAUSE).await;
            let start = Instant::now();
            one.there_and_back().await?;
            one.times.extend(counts.then(|| ms(start)));
        }
    }
    pipes.close().map_err(host)?;
    let p50 = rank(&mut plain, 0.50);
    let mut all =
        vec![Stream { name: Name::Plain, p50_ms: p50, p99_ms: rank(&mut plain, 0.99), adds_ms: None }];
    for mut one in inside {
        let (p50_ms, p99_ms) = (rank(&mut one.times, 0.50), rank(&mut one.times, 0.99));
        all.push(Stream { name: one.name, p50_ms, p99_ms, adds_ms: Some(p50_ms - p50) });
        one.sandbox.destroy().await?;
    }
    Ok(all)
}
