//! Configuration: file, environment and flags, each over the one before, into one typed value.
//!
//! It reads configuration and nothing else: it makes no folder, opens no key and dials nobody. The keys
//! and their bounds stand in `settings`, the layers in `layers`, repository patterns in `pattern`. The
//! defaults are data, too: `config/default.toml`, embedded, is the lowest layer.

mod layers;
mod pattern;
mod settings;
pub mod terms;

use std::path::{Path, PathBuf};

use nostr_sdk::prelude::PublicKey;
use serde::Deserialize;

use crate::{repo, sandbox};

pub use layers::{Origin, Override, Raw, env_name};
pub use pattern::RepoPattern;
pub use settings::{Value, did_you_mean};
pub use terms::{Payment, PriceFor, Rent, Rule, Terms, WalletChoice};

/// The lowest layer: every key with its default and what it means.
pub const DEFAULT_TOML: &str = include_str!("../../config/default.toml");

/// Everything a node is told. Values are within the bounds of `docs/configuration.md`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// ws(s) URLs as the operator wrote them; naming one allows its address.
    pub relays: Vec<String>,
    /// Names of job types; whether each exists is `market`'s business.
    pub skills: Vec<String>,
    pub sandbox: SandboxChoice,
    /// Built ahead, each for one job.
    pub warm_sandboxes: u32,
    /// Absolute. Not made by loading.
    pub data_dir: PathBuf,
    /// The operator's own job types.
    #[serde(deserialize_with = "some_path")]
    pub jobs_dir: Option<PathBuf>,
    /// Absolute; `data_dir/key` unless said otherwise.
    pub key_file: PathBuf,
    /// At least 1: zero in a file became the number of cores.
    pub max_jobs: u32,
    pub drain_timeout_ms: u64,
    /// A level, or directives of tracing's `EnvFilter`.
    pub log_level: String,
    pub announce: Announce,
    pub admission: Admission,
    pub payment: Payment,
    pub queue: Queue,
    pub limits: Limits,
    pub docker: Docker,
    pub logs: Logs,
    pub repo: Repo,
    pub relay: Relay,
}

/// Which backend runs jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SandboxChoice {
    /// The one that needs nothing else: `local`.
    Auto,
    Local,
    Docker,
}

/// What the NIP-89 announcement says.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Announce {
    pub publish: bool,
    /// Shorter than an announcement holds.
    pub renew_ms: u64,
    pub name: String,
    pub about: String,
}

/// Who may order what.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admission {
    /// Empty: any public http(s) URL.
    pub allow_repos: Vec<RepoPattern>,
    pub allow_private_repos: bool,
    pub allow_file_repos: bool,
    pub allow_private_relays: bool,
    /// Empty: everybody. The deny list wins.
    pub allow_customers: Vec<PublicKey>,
    pub deny_customers: Vec<PublicKey>,
    pub max_request_age_ms: u64,
    pub max_future_skew_ms: u64,
    /// Signed refusals, all strangers together.
    pub refusals_per_minute: u32,
    pub quotes_per_minute: u32,
    pub balances_per_minute: u32,
}

/// Bounds of the queue in front of the runner.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Queue {
    /// Accepted and not yet ended, all customers together.
    pub max_open_jobs: u32,
    pub max_open_jobs_per_customer: u32,
    pub max_running_per_customer: u32,
    /// From acceptance to the first attempt.
    pub max_wait_ms: u64,
    /// From 1.
    pub max_attempts: u32,
}

/// The most that any job may use.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    pub wall_ms: u64,
    pub idle_ms: u64,
    pub memory_bytes: u64,
    /// Beyond memory.
    pub swap_bytes: u64,
    /// Thousandths of a core.
    pub cpu_milli: u32,
    pub pids: u32,
    pub disk_bytes: u64,
    pub inodes: u64,
    pub open_files: u32,
    /// stdout and stderr together.
    pub output_bytes: u64,
    pub output_bytes_per_s: u64,
    /// One artifact.
    pub artifact_bytes: u64,
    /// All changed files together, for a patch.
    pub changes_bytes: u64,
}

/// The engine that the docker backend uses.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Docker {
    /// `unix://`, `tcp://` or `ssh://`; none: DOCKER_HOST, or the usual socket.
    #[serde(deserialize_with = "some_text")]
    pub host: Option<String>,
    pub image: String,
    /// None: the engine's default.
    #[serde(deserialize_with = "some_text")]
    pub runtime: Option<String>,
    /// The first of the uids and gids that containers run as, one each, at least 1,000; none: as the engine wants it.
    #[serde(deserialize_with = "some_uid")]
    pub first_uid: Option<u32>,
    /// How many of them, and so how many containers at most.
    pub uids: u32,
}

impl Limits {
    /// The ceiling as a sandbox policy, without network.
    pub fn policy(&self) -> sandbox::Policy {
        sandbox::Policy {
            wall_ms: self.wall_ms,
            idle_ms: self.idle_ms,
            memory_bytes: self.memory_bytes,
            swap_bytes: self.swap_bytes,
            pids: self.pids,
            cpu_milli: self.cpu_milli,
            disk_bytes: self.disk_bytes,
            inodes: self.inodes,
            open_files: self.open_files,
            output_bytes: self.output_bytes,
            output_bytes_per_s: self.output_bytes_per_s,
            network: sandbox::Network::None,
        }
    }
}

/// What is kept of the jobs' output.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logs {
    /// All logs together, at least `store::BLOB_MAX_BYTES`.
    pub max_bytes: u64,
}

/// Caps on one repository, and the cache of all.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repo {
    pub max_fetch_bytes: u64,
    pub max_tree_bytes: u64,
    pub max_file_bytes: u64,
    pub max_files: u64,
    pub max_path_bytes: u32,
    pub fetch_timeout_ms: u64,
    pub cache_bytes: u64,
}

impl Repo {
    /// For `repo::Repos::open`; which addresses are allowed is `admission`'s word.
    pub fn options(&self) -> repo::Options {
        let limits = repo::Limits {
            fetch_bytes: self.max_fetch_bytes,
            time_ms: self.fetch_timeout_ms,
            files: self.max_files,
            file_bytes: self.max_file_bytes,
            tree_bytes: self.max_tree_bytes,
            path_bytes: self.max_path_bytes.into(),
            ..repo::Limits::default()
        };
        repo::Options { limits, cache_bytes: self.cache_bytes, ..repo::Options::default() }
    }
}

/// Talking to relays.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relay {
    /// How far back to ask a relay without a cursor.
    pub lookback_ms: u64,
    pub outbox_give_up_ms: u64,
    /// Relays of the customer's choosing for one answer, from the request or its NIP-65 list.
    pub max_answer_relays: u32,
    /// Of a whole event as JSON.
    pub max_event_bytes: u64,
}

/// Where configuration comes from. All of it is a value, so that a test can hold it still.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// `--config`; it must exist.
    pub file: Option<PathBuf>,
    /// The process's environment. Only `COINOP_…`, `HOME` and `XDG_…` are looked at.
    pub env: Vec<(String, String)>,
    /// In the order given; a later one wins.
    pub flags: Vec<Override>,
    /// The folder that relative paths of environment and flags start from.
    pub cwd: PathBuf,
}

impl Sources {
    /// This process's environment and working folder. A variable that is not UTF-8 is read lossily, so
    /// that a bad `COINOP_…` value is refused by its check.
    pub fn of_process(file: Option<PathBuf>, flags: Vec<Override>) -> Sources {
        let env = std::env::vars_os()
            .map(|(k, v)| (k.to_string_lossy().into_owned(), v.to_string_lossy().into_owned()))
            .collect();
        let cwd = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        Sources { file, env, flags, cwd }
    }

    fn var(&self, name: &str) -> Option<&str> {
        self.env.iter().find(|(k, v)| k == name && !v.is_empty()).map(|(_, v)| v.as_str())
    }

    fn home(&self) -> Option<PathBuf> {
        self.var("HOME").map(PathBuf::from).filter(|home| home.is_absolute())
    }

    /// `$XDG…/coinop`, or `~/fallback/coinop`; relative XDG values are ignored, as the standard says.
    fn folder(&self, xdg: &str, fallback: &str) -> Option<PathBuf> {
        let xdg = self.var(xdg).map(PathBuf::from).filter(|path| path.is_absolute());
        xdg.or_else(|| self.home().map(|home| home.join(fallback))).map(|path| path.join("coinop"))
    }

    /// The file to read: `--config`, `COINOP_CONFIG` (both must exist), or the user's, if it exists.
    fn config_file(&self) -> Option<PathBuf> {
        let named = self.file.is_some() || self.var(layers::CONFIG_VAR).is_some();
        // One that may not be looked at is there: reading it says so.
        self.target_file().filter(|file| named || file.try_exists().unwrap_or(true))
    }

    /// The file that is read or, where there is none yet, would be.
    pub fn target_file(&self) -> Option<PathBuf> {
        match (&self.file, self.var(layers::CONFIG_VAR)) {
            (Some(file), _) => Some(self.cwd.join(file)),
            (None, Some(file)) => Some(self.cwd.join(file)),
            (None, None) => {
                self.folder("XDG_CONFIG_HOME", ".config").map(|folder| folder.join("config.toml"))
            }
        }
    }
}

/// A configuration with the origin of every value.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub config: Config,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    /// In the order of `config/default.toml`.
    pub rows: Vec<Row>,
}

/// One effective setting, for `config show`.
#[derive(Debug, Clone)]
pub struct Row {
    pub key: &'static str,
    pub value: Value,
    pub origin: Origin,
}

/// One thing wrong, at one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `path/config.toml:12`, `environment variable COINOP_X`, or a flag.
    pub place: String,
    pub fault: Fault,
}

/// What is wrong with a setting.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("{0}")]
    Syntax(String),
    #[error("unknown key `{key}`{}", hint(.nearest))]
    UnknownKey { key: String, nearest: Option<String> },
    #[error("`{key}` is a {expected}, not {got}")]
    WrongType { key: String, expected: &'static str, got: String },
    #[error("`{key}` must be {bounds}, not {got}")]
    OutOfBounds { key: String, bounds: String, got: String },
    #[error("`{key}`: {why}")]
    Bad { key: String, why: String },
}

fn hint(nearest: &Option<String>) -> String {
    nearest.as_ref().map(|key| format!("; did you mean `{key}`?")).unwrap_or_default()
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.place, self.fault)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    /// At least one; every problem that was found, not only the first.
    #[error("{}", lines(.0))]
    Bad(Vec<Problem>),
    #[error("no folder for data: neither HOME nor XDG_STATE_HOME is set; name one with --data-dir")]
    NoHome,
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

impl Config {
    /// Reads all layers and checks every value.
    pub fn load(sources: &Sources) -> Result<Loaded, Error> {
        let file = sources.config_file();
        let mut stack = layers::Stack::defaults()?;
        if let Some(path) = &file {
            stack.add_file(path, &layers::read_capped(path)?);
        }
        stack.add_env(&sources.env);
        for flag in &sources.flags {
            stack.add_flag(flag);
        }
        settle(stack, sources, file)
    }

    /// Reads one file over the defaults, without environment or flags: `config check`.
    pub fn check(path: &Path, sources: &Sources) -> Result<Loaded, Error> {
        let path = sources.cwd.join(path);
        let mut stack = layers::Stack::defaults()?;
        stack.add_file(&path, &layers::read_capped(&path)?);
        settle(stack, sources, Some(path))
    }
}

/// Turns the stack into values: checks bounds, fills what depends on the machine, types it.
fn settle(mut stack: layers::Stack, sources: &Sources, file: Option<PathBuf>) -> Result<Loaded, Error> {
    stack.check();
    if !stack.problems.is_empty() {
        return Err(Error::Bad(stack.problems));
    }
    for key in ["data_dir", "jobs_dir", "key_file", "payment.wallet_key_file"] {
        stack.make_absolute(key, sources);
    }
    if stack.text("data_dir").is_empty() {
        let dir = sources.folder("XDG_STATE_HOME", ".local/state").ok_or(Error::NoHome)?;
        stack.fill("data_dir", Value::Text(dir.to_string_lossy().into_owned()));
    }
    if stack.text("key_file").is_empty() {
        let file = Path::new(stack.text("data_dir")).join("key");
        stack.fill("key_file", Value::Text(file.to_string_lossy().into_owned()));
    }
    if stack.number("max_jobs") == 0 {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        stack.fill("max_jobs", Value::Number(cores));
    }
    let config = serde_path_to_error::deserialize(stack.to_json()).map_err(|error| {
        let key = error.path().to_string();
        let place = stack.place(&key);
        Error::Bad(vec![Problem { place, fault: Fault::Bad { key, why: error.inner().to_string() } }])
    })?;
    Ok(Loaded { config, file, rows: stack.rows() })
}

fn some_path<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
    let text = String::deserialize(from)?;
    Ok(if text.is_empty() { None } else { Some(PathBuf::from(text)) })
}

/// Zero in a file stands for none; those below a thousand are the system's.
fn some_uid<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    match u32::deserialize(from)? {
        0 => Ok(None),
        1..1_000 => {
            Err(serde::de::Error::custom("uids below 1000 are the system's; 0 leaves the choice to the node"))
        }
        first => Ok(Some(first)),
    }
}

/// Empty text in a file stands for none.
fn some_text<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(from)?;
    Ok(Some(text).filter(|text| !text.is_empty()))
}

#[cfg(test)]
mod tests;
