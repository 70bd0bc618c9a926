//! The reasons why a request is not taken, or an accepted job has no result: one word for one thing in
//! feedback events, in the log, in `scan` and in `docs/protocol.md`. When each applies is decided elsewhere.

use serde::{Deserialize, Serialize};

/// Why a job was not taken, or ended without a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request does not say what is needed, or says it wrongly.
    InvalidInput,
    /// Encrypted to us, but not readable with our key.
    Undecryptable,
    /// The kind, an input or a wish that this node does not serve.
    Unsupported,
    /// A kind that others use for other things, without a repository and without our key.
    Foreign,
    /// The request asks for other providers only, or is encrypted to one.
    NotForUs,
    /// The customer is not on the list, or is on the wrong one.
    CustomerRefused,
    /// Past its `expiration`.
    Expired,
    /// Older than the node takes.
    TooOld,
    /// Dated too far ahead of our clock.
    FromTheFuture,
    /// Taken back by its author before it was taken.
    Cancelled,
    /// The job may cost more than the customer bids.
    OverBid,
    /// The customer's credit does not cover what the job may cost.
    PaymentRequired,
    /// What this customer may spend here, or this node on jobs, is used up for now.
    OverBudget,
    /// Asks for more than the node or the job type allows, or used more.
    ResourceLimit,
    /// Too many open jobs, of this customer or of all, or their repositories take all room.
    RateLimited,
    /// The repository is outside the rules, or hostile.
    RepoRefused,
    RepoUnreachable,
    RefNotFound,
    Timeout,
    /// A command on which the result depends ended with another exit code than 0.
    CommandFailed,
    ResultTooLarge,
    /// The node was stopped under the job too often.
    Interrupted,
    /// Our fault.
    Internal,
}

impl Code {
    pub const ALL: [Self; 23] = [
        Self::InvalidInput,
        Self::Undecryptable,
        Self::Unsupported,
        Self::Foreign,
        Self::NotForUs,
        Self::CustomerRefused,
        Self::Expired,
        Self::TooOld,
        Self::FromTheFuture,
        Self::Cancelled,
        Self::OverBid,
        Self::PaymentRequired,
        Self::OverBudget,
        Self::ResourceLimit,
        Self::RateLimited,
        Self::RepoRefused,
        Self::RepoUnreachable,
        Self::RefNotFound,
        Self::Timeout,
        Self::CommandFailed,
        Self::ResultTooLarge,
        Self::Interrupted,
        Self::Internal,
    ];

    /// The name on the wire, in the log and in `--json`.
    pub fn as_str(self) -> &'static str {
        match self {
            Code::InvalidInput => "invalid_input",
            Code::Undecryptable => "undecryptable",
            Code::Unsupported => "unsupported",
            Code::Foreign => "foreign",
            Code::NotForUs => "not_for_us",
            Code::CustomerRefused => "customer_refused",
            Code::Expired => "expired",
            Code::TooOld => "too_old",
            Code::FromTheFuture => "from_the_future",
            Code::Cancelled => "cancelled",
            Code::OverBid => "over_bid",
            Code::PaymentRequired => "payment_required",
            Code::OverBudget => "over_budget",
            Code::ResourceLimit => "resource_limit",
            Code::RateLimited => "rate_limited",
            Code::RepoRefused => "repo_refused",
            Code::RepoUnreachable => "repo_unreachable",
            Code::RefNotFound => "ref_not_found",
            Code::Timeout => "timeout",
            Code::CommandFailed => "command_failed",
            Code::ResultTooLarge => "result_too_large",
            Code::Interrupted => "interrupted",
            Code::Internal => "internal",
        }
    }

    /// The code of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.as_str() == name)
    }
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_on_the_wire_is_the_name_in_json_and_is_found_again() {
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
            assert_eq!(Code::named(code.as_str()), Some(code));
        }
    }
    #[test]
    fn every_code_stands_in_the_wire_profile() {
        let profile = include_str!("../../docs/protocol.md");
        for code in Code::ALL {
            assert!(profile.contains(&format!("`{code}`")), "docs/protocol.md lacks {code}");
        }
    }
}
