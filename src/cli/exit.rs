//! Exit codes, one list for the program, `--help` and `docs/cli.md`. It ends nothing itself; `main` does.

use std::process::ExitCode;

use crate::{job, node, store, wallet};

/// How a command ended, for the shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Ok = 0,
    Failure = 1,
    Usage = 2,
    Config = 3,
    Refused = 4,
    Timeout = 5,
    Unverified = 6,
    Held = 7,
    Unreachable = 8,
    CommandsFailed = 9,
    Store = 10,
}

/// Every code with its meaning, in order.
pub const CODES: &[(Exit, &str)] = &[
    (Exit::Ok, "done"),
    (Exit::Failure, "any other failure"),
    (Exit::Usage, "the command line is wrong"),
    (Exit::Config, "the configuration or the key is wrong or missing"),
    (Exit::Refused, "the provider refused the job, asked for payment, or ended it with an error"),
    (Exit::Timeout, "no answer came in time"),
    (Exit::Unverified, "a signature, a hash or a patch is wrong"),
    (Exit::Held, "the data folder or the key is in use by another node, or no node is running"),
    (Exit::Unreachable, "no relay could be reached, or none accepted the event"),
    (Exit::CommandsFailed, "the result is genuine and says that the job's commands failed"),
    (Exit::Store, "no access to the data folder, a full or failing disk, or a damaged log"),
];

impl Exit {
    /// The code of what the store says.
    pub fn of_store(error: &store::Error) -> Exit {
        match error {
            store::Error::Held { .. } | store::Error::KeyHeld { .. } => Exit::Held,
            store::Error::OtherKey { .. } => Exit::Config,
            _ => Exit::Store,
        }
    }
}

/// The list for `--help`.
pub fn help() -> String {
    let rows = CODES.iter().map(|(exit, what)| format!("  {}  {what}", *exit as u8));
    format!("Exit codes:\n{}", rows.collect::<Vec<_>>().join("\n"))
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// What went wrong, and with which code to end.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub error: anyhow::Error,
}

impl Failure {
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Failure {
        Failure { exit, error: error.into() }
    }

    /// A failure in words.
    pub fn say(exit: Exit, words: impl std::fmt::Display) -> Failure {
        Failure { exit, error: anyhow::anyhow!("{words}") }
    }
}

impl std::fmt::Display for Failure {
    /// The error with its causes. One that is quoted already is not repeated.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = String::new();
        for cause in self.error.chain().map(ToString::to_string) {
            match (shown.is_empty(), shown.contains(&cause)) {
                (true, _) => shown = cause,
                (false, true) => {}
                (false, false) => shown.push_str(&format!(": {cause}")),
            }
        }
        f.write_str(&shown)
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        let error = error.into();
        Failure { exit: exit_of(&error), error }
    }
}

/// The code of an error that got none where it arose.
fn exit_of(error: &anyhow::Error) -> Exit {
    use node::Error as Node;
    let of_store = match error.downcast_ref::<Node>() {
        Some(Node::Catalog(_) | Node::Payment(_) | Node::Wallet(wallet::Error::Setup(_))) => {
            return Exit::Config;
        }
        Some(Node::Store(error) | Node::Job(job::Error::Store(error))) => Some(error),
        _ => error.downcast_ref::<store::Error>(),
    };
    match of_store {
        Some(error) => Exit::of_store(error),
        None if is_of_the_disk(error) => Exit::Store,
        None => Exit::Failure,
    }
}

/// Whether the disk is full or takes nothing: one code for it, whatever was being done.
fn is_of_the_disk(error: &anyhow::Error) -> bool {
    use std::io::ErrorKind as Io;
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|error| matches!(error.kind(), Io::StorageFull | Io::QuotaExceeded | Io::ReadOnlyFilesystem))
}

/// Gives an error its exit code: `load().or_exit(Exit::Config)?`.
pub trait OrExit<T> {
    fn or_exit(self, exit: Exit) -> Result<T, Failure>;
}

impl<T, E: Into<anyhow::Error>> OrExit<T> for Result<T, E> {
    fn or_exit(self, exit: Exit) -> Result<T, Failure> {
        self.map_err(|error| {
            let error = error.into();
            let exit = if is_of_the_disk(&error) { Exit::Store } else { exit };
            Failure { exit, error }
        })
    }
}

/// A command's end.
pub type Outcome = Result<Exit, Failure>;

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_cause_that_is_quoted_already_is_not_repeated() {
        let refused = || std::io::Error::other("denied");
        let quoted = store::Error::Io { doing: "read", path: "/x".into(), source: refused().into() };
        assert_eq!(Failure::from(quoted).to_string(), "could not read /x: denied");
        let told = Failure::from(Err::<(), _>(refused()).context("cannot read /x").unwrap_err());
        assert_eq!(told.to_string(), "cannot read /x: denied");
    }

    #[test]
    fn a_full_disk_ends_with_its_code_wherever_it_was_met() {
        let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        let sandbox = crate::sandbox::Error::Host { doing: "make a folder", source: full() };
        assert_eq!(Failure::from(crate::node::Error::Sandbox(sandbox)).exit, Exit::Store);
        assert_eq!(Failure::from(std::io::Error::other("odd")).exit, Exit::Failure);
    }

    #[test]
    fn each_code_has_one_line_in_order_and_one_in_the_documentation() {
        let docs = include_str!("../../docs/cli.md");
        for (n, (exit, what)) in CODES.iter().enumerate() {
            assert_eq!(*exit as usize, n);
            assert!(docs.contains(&format!("| {n} | {what} |")), "docs/cli.md lacks code {n}");
        }
    }
}
