//! What runs in a sandbox for a job type. Today the script agent; it sees a sandbox and an order, never
//! the network, the store or the wire.

mod live;
mod output;
pub mod script;

use std::time::Duration;

use crate::market::JobType;
use crate::protocol::Order;
use crate::sandbox::{self, Exit, Limit};

pub use live::{Feed, Live};
pub use output::Output;

/// What an agent is told to do.
#[derive(Debug, Clone, Copy)]
pub struct Task<'a> {
    pub job_type: &'a JobType,
    pub order: &'a Order,
    /// Hears what the commands print, as it comes.
    pub feed: &'a Feed<'a>,
}

/// What came of it, in the order of events.
#[derive(Debug, Clone, Default)]
pub struct Work {
    pub commands: Vec<CommandRun>,
}

/// One command and all that it printed.
#[derive(Debug, Clone)]
pub struct CommandRun {
    pub command: String,
    pub exit: Exit,
    pub duration: Duration,
    /// How long it had printed nothing when it ended.
    pub silent: Duration,
    pub output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the order cannot be carried out: {0}")]
    BadOrder(String),
    #[error("{0} does not fit the job's disk limit")]
    NoRoom(String),
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
}

impl Work {
    /// The limit of the policy that ended the work, and the command that it ended, if one did.
    pub fn limit(&self) -> Option<(Limit, &CommandRun)> {
        self.commands.iter().find_map(|run| match run.exit {
            Exit::Limit { limit } => Some((limit, run)),
            _ => None,
        })
    }

    /// Bytes that all commands printed.
    pub fn printed_bytes(&self) -> u64 {
        let streams = [Stream::Stdout, Stream::Stderr];
        let printed = self.commands.iter().flat_map(|run| streams.map(|stream| run.printed(stream).len()));
        printed.map(|len| len as u64).sum()
    }

    /// The exit code of the first command that failed, or 0.
    pub fn exit_code(&self) -> i32 {
        self.commands.iter().map(|c| exit_code(c.exit)).find(|&code| code != 0).unwrap_or(0)
    }

    /// All commands and their output as one readable text, for `jobs logs`.
    pub fn log(&self) -> Vec<u8> {
        let mut log = Vec::new();
        for run in &self.commands {
            log.extend_from_slice(format!("$ {}\n", run.command).as_bytes());
            run.output.chunks().for_each(|(_, bytes)| log.extend_from_slice(bytes));
            if !log.ends_with(b"\n") {
                log.push(b'\n');
            }
            log.extend_from_slice(format!("[{}]\n", describe(run.exit)).as_bytes());
        }
        log
    }
}

impl CommandRun {
    /// All that went to this stream.
    pub fn printed(&self, stream: Stream) -> &[u8] {
        self.output.of(stream)
    }
}

/// A shell's convention: 127 not found, 126 not started, 124 timed out, 128 + n for signal n.
pub fn exit_code(exit: Exit) -> i32 {
    const ENOENT: i32 = 2;
    match exit {
        Exit::Code { code } => code,
        Exit::Signal { signal } => 128 + signal,
        Exit::NotStarted { errno: ENOENT } => 127,
        Exit::NotStarted { .. } => 126,
        Exit::Timeout => 124,
        Exit::Limit { .. } => 137,
    }
}

fn describe(exit: Exit) -> String {
    match exit {
        Exit::Code { code } => format!("exit {code}"),
        Exit::Signal { signal } => format!("signal {signal}"),
        Exit::NotStarted { errno } => format!("not started: errno {errno}"),
        Exit::Timeout => "timed out".into(),
        Exit::Limit { limit } => format!("ended by the {limit:?} limit").to_lowercase(),
    }
}
