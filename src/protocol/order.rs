//! What a request orders, read from its inputs and params in every style we know (plain NIP-90 params and
//! the 593x agent-job profile). Whether the node accepts the order is `market`'s business.
//!
//! A number that cannot be read counts as not given. What will be executed (commands, environment,
//! paths) is taken whole or refused: a cut or guessed command is another command.

use std::collections::BTreeMap;

use super::request::{Input, InputKind, Request};
use super::tags;

pub const MAX_COMMANDS: usize = 64;
/// One command, or one value of the environment, in bytes.
pub const MAX_COMMAND_BYTES: usize = 32 * 1024;
pub const MAX_ENV: usize = 128;
pub const MAX_ARTIFACTS: usize = 64;
/// URL, ref, folder or path, in bytes.
pub const MAX_NAME_BYTES: usize = 1024;
/// The task in words, in bytes.
pub const MAX_TASK_BYTES: usize = 256 * 1024;

/// The work ordered. Strings are capped, numbers clamped to what fits their type; nothing else is checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Order {
    /// Repository URL: `i` url with marker `repo`, or param `repo`/`repository`/`repo_url`.
    pub repo: Option<String>,
    /// Branch, tag or commit: `git_ref`, `ref`, `branch`, `tag`, `commit`, `head_ref`, the first of these.
    pub git_ref: Option<String>,
    /// In order: `cmd_0…`, or else every `cmd`, or else every `command`.
    pub commands: Vec<String>,
    /// Relative folder to run in.
    pub workdir: Option<String>,
    /// `env_<KEY>` params.
    pub env: BTreeMap<String, String>,
    /// Paths to return as artifacts: `artifact`/`artifact_N`.
    pub artifacts: Vec<String>,
    /// The task in words: `i` text (marker `issue`, `prompt` or none), param `task`/`issue`/`prompt`.
    pub task: Option<String>,
    /// What the customer asks to be allowed; `None` where it did not say. Seconds and mebibytes are clamped
    /// to `u32`, so that they can be scaled to milliseconds and bytes without care.
    pub time_secs: Option<u64>,
    pub memory_mb: Option<u64>,
    pub disk_mb: Option<u64>,
    /// Thousandths of a core, at least 1.
    pub cpu_milli: Option<u32>,
    pub network: bool,
    /// Whether what a command leaves running may go on under the next ones.
    pub keep_background: bool,
    /// There is an input that orders nothing here: an event, another job's result, or a URL without a marker.
    pub unread: bool,
    /// Every other param by key, and every other marked input by marker (`diff`, `pr`), for job types to
    /// hand to their agent. The first value counts.
    pub extra: BTreeMap<String, String>,
}

/// Why a request orders nothing that can be run. The text is fit for the customer.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("more than {cap} {what}")]
    TooLarge { what: &'static str, cap: usize },
    #[error("{what}: {why}")]
    Invalid { what: String, why: &'static str },
}

const REPO_MARKERS: [&str; 3] = ["repo", "repository", "git"];
const TASK_MARKERS: [&str; 3] = ["issue", "prompt", "task"];
const REF_KEYS: [&str; 6] = ["git_ref", "ref", "branch", "tag", "commit", "head_ref"];

impl Order {
    /// Reads the order; the same request always reads the same.
    pub fn read(request: &Request) -> Result<Self, Error> {
        let mut order = Self::default();
        let mut tasks = Vec::new();
        for input in &request.inputs {
            order.input(input, request.kind, &mut tasks);
        }
        if !tasks.is_empty() {
            order.task = Some(tasks.join("\n\n"));
        }
        let mut commands = Commands::default();
        let mut artifacts = BTreeMap::new();
        let mut git_refs: [Option<&str>; REF_KEYS.len()] = Default::default();
        for (n, (key, values)) in request.params.iter().enumerate() {
            let first = values.first().map(String::as_str).unwrap_or_default();
            let rank = REF_KEYS.iter().position(|name| name == key);
            if let Some(slot) = rank.and_then(|rank| git_refs.get_mut(rank)) {
                *slot = slot.or(Some(first.trim()).filter(|text| !text.is_empty()));
            }
            if commands.take(key, values)? {
                continue;
            }
            match key.as_str() {
                "artifact" | "artifacts" => drop(artifacts.insert((u64::MAX, n), values.as_slice())),
                "git_ref" | "ref" | "branch" | "tag" | "commit" => {}
                _ => match (index(key, "artifact_"), key.strip_prefix("env_")) {
                    (Some(place), _) => drop(artifacts.insert((place, n), values.as_slice())),
                    (_, Some(name)) => order.environment(name, first)?,
                    _ => order.param(key, first),
                },
            }
        }
        order.commands = commands.finish()?;
        order.git_ref = git_refs.into_iter().flatten().next().map(str::to_owned);
        order.artifacts =
            artifacts.into_values().flatten().filter(|path| !path.is_empty()).cloned().collect();
        order.check()?;
        Ok(order)
    }

    /// Whether a repository is named: on kinds shared with other trades (5100, 5200, 5300) this, or our
    /// key in a `p` tag, tells a request for us from one for image or video makers.
    pub fn names_repo(&self) -> bool {
        self.repo.is_some()
    }

    /// The values of `prefix_0`, `prefix_1`, … among the other params (`include_N`, `commit_N`, `focus_N`),
    /// in order of their numbers.
    pub fn listed(&self, prefix: &str) -> Vec<&str> {
        let numbered = |key: &str| index(key.strip_prefix(prefix)?, "_");
        let mut found: Vec<(u64, &str)> =
            self.extra.iter().filter_map(|(key, value)| Some((numbered(key)?, value.as_str()))).collect();
        found.sort_by_key(|(n, _)| *n);
        found.into_iter().map(|(_, value)| value).collect()
    }

    fn input(&mut self, input: &Input, kind: u16, tasks: &mut Vec<String>) {
        let marker = input.marker.as_deref();
        let data = || input.data.trim().to_owned();
        match (input.kind, marker) {
            (_, Some(marker)) if REPO_MARKERS.contains(&marker) => drop(self.repo.get_or_insert_with(data)),
            (InputKind::Text, None) => tasks.push(input.data.clone()),
            (InputKind::Text, Some(marker)) if TASK_MARKERS.contains(&marker) => {
                tasks.push(input.data.clone())
            }
            // Nobody else uses 593x, and no picture or video is called `.git`.
            (InputKind::Url, None)
                if (5930..=5939).contains(&kind) || input.data.trim().ends_with(".git") =>
            {
                self.repo.get_or_insert_with(data);
            }
            (InputKind::Url | InputKind::Text, Some(marker)) => {
                self.extra.entry(marker.to_owned()).or_insert_with(|| input.data.clone());
            }
            (InputKind::Url | InputKind::Event | InputKind::Job, _) => self.unread = true,
        }
    }

    fn param(&mut self, key: &str, value: &str) {
        let text = || Some(value.trim().to_owned()).filter(|text| !text.is_empty());
        let number = || tags::whole(value).map(|n| n.min(u32::MAX.into()));
        match key {
            "repo" | "repository" | "repo_url" => self.repo = self.repo.take().or_else(text),
            "workdir" => self.workdir = self.workdir.take().or_else(text),
            "task" | "issue" | "prompt" => self.task = self.task.take().or_else(text),
            "max_time_secs" | "time_limit_secs" | "timeout_secs" => {
                self.time_secs = self.time_secs.or_else(number);
            }
            "max_memory_mb" | "memory_mb" => self.memory_mb = self.memory_mb.or_else(number),
            "max_disk_mb" | "disk_mb" => self.disk_mb = self.disk_mb.or_else(number),
            "max_cpu_cores" | "cpu_cores" => self.cpu_milli = self.cpu_milli.or_else(|| milli(value)),
            "allow_network" | "network" => self.network |= is_yes(value),
            "keep_background" => self.keep_background |= is_yes(value),
            _ => drop(self.extra.entry(key.to_owned()).or_insert_with(|| value.to_owned())),
        }
    }

    fn environment(&mut self, name: &str, value: &str) -> Result<(), Error> {
        let mut bytes = name.bytes();
        let starts_well = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
        if !starts_well || !bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return Err(invalid("env_…", "the name of a variable is letters, digits and underscores"));
        }
        if value.len() > MAX_COMMAND_BYTES {
            return Err(Error::TooLarge { what: "bytes in a variable", cap: MAX_COMMAND_BYTES });
        }
        if self.env.len() == MAX_ENV && !self.env.contains_key(name) {
            return Err(Error::TooLarge { what: "variables", cap: MAX_ENV });
        }
        no_nul("env_…", value)?;
        match self.env.insert(name.to_owned(), value.to_owned()) {
            Some(before) if before != value => Err(invalid("env_…", "one variable is given two values")),
            _ => Ok(()),
        }
    }

    fn check(&self) -> Result<(), Error> {
        if self.artifacts.len() > MAX_ARTIFACTS {
            return Err(Error::TooLarge { what: "artifacts", cap: MAX_ARTIFACTS });
        }
        let names = [("repo", &self.repo), ("git_ref", &self.git_ref), ("workdir", &self.workdir)];
        let names = names.into_iter().filter_map(|(what, value)| Some((what, value.as_deref()?)));
        for (what, value) in names.chain(self.artifacts.iter().map(|path| ("artifact", path.as_str()))) {
            if value.len() > MAX_NAME_BYTES {
                let what = "bytes in a URL, ref, folder or path";
                return Err(Error::TooLarge { what, cap: MAX_NAME_BYTES });
            }
            no_nul(what, value)?;
        }
        if self.task.as_ref().is_some_and(|task| task.len() > MAX_TASK_BYTES) {
            return Err(Error::TooLarge { what: "bytes in the task", cap: MAX_TASK_BYTES });
        }
        Ok(())
    }
}

/// Commands by style. A customer that writes two styles means one list, written for two kinds of provider.
#[derive(Default)]
struct Commands<'a> {
    numbered: BTreeMap<u64, &'a str>,
    cmd: Vec<&'a str>,
    command: Vec<&'a str>,
}

impl<'a> Commands<'a> {
    /// Takes a param that holds a command; false when it is another param.
    fn take(&mut self, key: &str, values: &'a [String]) -> Result<bool, Error> {
        let place = index(key, "cmd_");
        if place.is_none() && key != "cmd" && key != "command" {
            return Ok(false);
        }
        let command = values.first().map(String::as_str).unwrap_or_default();
        if values.iter().skip(1).any(|value| !value.is_empty()) {
            return Err(invalid("cmd", "one command a param: write it as one line"));
        }
        if command.len() > MAX_COMMAND_BYTES {
            return Err(Error::TooLarge { what: "bytes in a command", cap: MAX_COMMAND_BYTES });
        }
        no_nul("cmd", command)?;
        match (place, key) {
            (Some(place), _) => {
                if self.numbered.insert(place, command).is_some_and(|before| before != command) {
                    return Err(invalid("cmd", "one number is given two commands"));
                }
            }
            (None, "cmd") => self.cmd.push(command),
            (None, _) => self.command.push(command),
        }
        Ok(true)
    }

    /// Gaps in the numbers are closed: `cmd_4294967295` is merely the last.
    fn finish(self) -> Result<Vec<String>, Error> {
        let list = |commands: Vec<&str>| -> Vec<String> {
            commands.into_iter().filter(|text| !text.trim().is_empty()).map(str::to_owned).collect()
        };
        let styles = [self.numbered.into_values().collect(), self.cmd, self.command];
        let commands = styles.into_iter().map(list).find(|list| !list.is_empty()).unwrap_or_default();
        if commands.len() > MAX_COMMANDS {
            return Err(Error::TooLarge { what: "commands", cap: MAX_COMMANDS });
        }
        Ok(commands)
    }
}

/// The number of `cmd_7`; all digits, clamped to `u64`.
fn index(key: &str, prefix: &str) -> Option<u64> {
    let digits = key.strip_prefix(prefix)?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| tags::digits(digits)).flatten()
}

/// Cores as thousandths, 1 to a million cores.
fn milli(cores: &str) -> Option<u32> {
    const MOST: f64 = 1_000_000_000.0;
    let cores: f64 = cores.trim().parse().ok()?;
    // Within u32 after the clamp; a NaN fails the comparison.
    (cores > 0.0).then(|| (cores * 1000.0).clamp(1.0, MOST).round() as u32)
}

fn is_yes(value: &str) -> bool {
    ["true", "1", "yes"].contains(&value.trim().to_ascii_lowercase().as_str())
}

fn no_nul(what: &str, value: &str) -> Result<(), Error> {
    if value.contains('\0') { Err(invalid(what, "contains a NUL byte")) } else { Ok(()) }
}

fn invalid(what: &str, why: &'static str) -> Error {
    Error::Invalid { what: what.to_owned(), why }
}
