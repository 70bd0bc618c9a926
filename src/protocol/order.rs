//! What a request orders, read from its inputs and params in every style we know (plain NIP-90 params and
//! the 593x agent-job profile). Whether the node accepts the order is `market`'s business.

use std::collections::BTreeMap;

/// The work ordered. Strings are capped, numbers clamped to what fits their type; nothing else is checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Order {
    /// Repository URL: `i` url with marker `repo`, or param `repo`/`repository`/`repo_url`.
    pub repo: Option<String>,
    /// Branch, tag or commit: `git_ref`, `ref`, `branch`, `commit`, `head_ref`.
    pub git_ref: Option<String>,
    /// In order: `cmd_0…`, `cmd`, `command`.
    pub commands: Vec<String>,
    /// Relative folder to run in.
    pub workdir: Option<String>,
    /// `env_<KEY>` params.
    pub env: BTreeMap<String, String>,
    /// Paths to return as artifacts: `artifact`/`artifact_N`.
    pub artifacts: Vec<String>,
    /// The task in words: `i` text (marker `issue`, `prompt` or none), param `task`/`issue`/`prompt`.
    pub task: Option<String>,
    /// What the customer asks to be allowed; `None` where it did not say.
    pub time_secs: Option<u64>,
    pub memory_mb: Option<u64>,
    pub disk_mb: Option<u64>,
    pub cpu_milli: Option<u32>,
    pub network: bool,
    /// Every other param by key, for job types to hand to their agent.
    pub extra: BTreeMap<String, String>,
}
