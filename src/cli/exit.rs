//! Exit codes, one list for the program, `--help` and `docs/cli.md`. It ends nothing itself; `main` does.

use std::process::ExitCode;

use crate::store;

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
    (Exit::Failure, "something failed that has no code of its own"),
    (Exit::Usage, "the command line is wrong"),
    (Exit::Config, "the configuration or the key is wrong or missing"),
    (Exit::Refused, "the provider refused the job, asked for payment, or ended it with an error"),
    (Exit::Timeout, "no answer came in time"),
    (Exit::Unverified, "a signature, a hash or a patch is not what it should be"),
    (Exit::Held, "another node holds the data directory or the key, or no node runs where one must"),
    (Exit::Unreachable, "no relay could be reached, or none took the event"),
    (Exit::CommandsFailed, "a genuine result came, and it says that the job's commands failed"),
    (Exit::Store, "the data directory cannot be read or written: a full or failing disk, or a damaged log"),
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

    /// A failure told in words.
    pub fn say(exit: Exit, words: impl std::fmt::Display) -> Failure {
        Failure { exit, error: anyhow::anyhow!("{words}") }
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        let error = error.into();
        let exit = error.downcast_ref().map_or(Exit::Failure, Exit::of_store);
        Failure { exit, error }
    }
}

/// Gives an error its exit code: `load().or_exit(Exit::Config)?`.
pub trait OrExit<T> {
    fn or_exit(self, exit: Exit) -> Result<T, Failure>;
}

impl<T, E: Into<anyhow::Error>> OrExit<T> for Result<T, E> {
    fn or_exit(self, exit: Exit) -> Result<T, Failure> {
        self.map_err(|error| Failure { exit, error: error.into() })
    }
}

/// A command's end.
pub type Outcome = Result<Exit, Failure>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_has_one_line_in_order_and_one_in_the_documentation() {
        let docs = include_str!("../../docs/cli.md");
        for (n, (exit, what)) in CODES.iter().enumerate() {
            assert_eq!(*exit as usize, n);
            assert!(docs.contains(&format!("| {n} | {what} |")), "docs/cli.md lacks code {n}");
        }
    }
}
