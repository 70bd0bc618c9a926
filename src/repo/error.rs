//! What can go wrong with a stranger's repository, typed so that each has its own answer. It decides nothing.

use std::io;

/// Every variant but `Full`, `Host` and `Busy` is about the customer's repository, not about this node.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A rule of this node; asking again will not help.
    #[error("the repository is refused: {why}")]
    Refused { why: String },
    #[error("the repository has no branch, tag or commit {git_ref:?}")]
    RefNotFound { git_ref: String },
    #[error("the abbreviated commit {git_ref:?} fits more than one commit; give more digits")]
    RefAmbiguous { git_ref: String },
    /// The server lets only those in whom it knows.
    #[error("the repository is refused: the server asks for a login; only public repositories are cloned")]
    LoginAsked,
    #[error("the repository cannot be reached: the server knows no such repository")]
    NoSuchRepository,
    /// The host, the network or the server; asking again later may help.
    #[error("the repository cannot be reached: {why}")]
    Unreachable { why: String },
    /// `cap` is in bytes for bytes, else a count.
    #[error("the repository is too large: {what} over {cap}")]
    TooLarge { what: &'static str, cap: u64 },
    /// `cap` in bytes: the cache's. Asking again later helps.
    #[error("no room: repositories of other jobs under way take all {cap} bytes; ask again later")]
    Full { cap: u64 },
    #[error("the repository took longer than {cap_ms} ms")]
    Timeout { cap_ms: u64 },
    /// The caller went away.
    #[error("the work on the repository was cancelled")]
    Cancelled,
    /// The data break git's own rules, or objects are missing.
    #[error("the repository's data are broken: {why}")]
    Broken { why: String },
    #[error("the patch does not apply: {why}")]
    DoesNotApply { why: String },
    /// The host failed us, not the repository; may be tried again.
    #[error("could not {doing}: {source}")]
    Host { doing: &'static str, source: io::Error },
    #[error("the repository folder {folder} is in use by another process")]
    Busy { folder: String },
}

impl Error {
    pub(super) fn refused(why: impl Into<String>) -> Error {
        Error::Refused { why: why.into() }
    }

    pub(super) fn unreachable(why: impl Into<String>) -> Error {
        Error::Unreachable { why: why.into() }
    }

    pub(super) fn broken(why: impl std::fmt::Display) -> Error {
        Error::Broken { why: why.to_string() }
    }

    /// For `map_err`: names what this host could not do.
    pub(super) fn host<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
        move |e| Error::Host { doing, source: e.into() }
    }

    /// Whether the server said that the repository is not, or no longer, for everybody.
    pub(super) fn is_withdrawal(&self) -> bool {
        matches!(self, Error::LoginAsked | Error::NoSuchRepository)
    }

    /// Carries one of ours through an interface that only knows `io::Error`; `from_io` takes it out again.
    pub(super) fn into_io(self) -> io::Error {
        io::Error::other(self)
    }

    /// An error met while reading from a server: one of ours that travelled through, or the network's.
    pub(super) fn from_io(e: io::Error, cap_ms: u64) -> Error {
        match e.downcast::<Error>() {
            Ok(ours) => ours,
            Err(e) => match e.downcast::<ureq::Error>() {
                Ok(e) => Error::from_ureq(e, cap_ms),
                Err(e) if matches!(e.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                    Error::Timeout { cap_ms }
                }
                Err(e) => Error::unreachable(e.to_string()),
            },
        }
    }

    pub(super) fn from_ureq(e: ureq::Error, cap_ms: u64) -> Error {
        match e {
            ureq::Error::Io(e) => Error::from_io(e, cap_ms),
            ureq::Error::Timeout(_) => Error::Timeout { cap_ms },
            ureq::Error::HostNotFound => Error::unreachable("the host name is not known"),
            other => Error::unreachable(other.to_string()),
        }
    }
}
