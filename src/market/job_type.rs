//! A job type as data: the schema of `job.toml`, read strictly and checked. Where the files come from is
//! `catalog`'s business; what is done with them `agent`'s.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Price;
use crate::sandbox::{Network, Policy};

/// A job type: what stands in its `job.toml`, and the other files of its folder.
#[derive(Debug, Clone)]
pub struct JobType {
    pub manifest: Manifest,
    /// Files beside `job.toml` by relative name; in the sandbox they stand, read-only, under `/job/type/`.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// The whole of `job.toml`. Unknown keys are errors.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The skill's name: `[a-z][a-z0-9-]{0,31}`, unique in a node.
    pub name: String,
    /// One line for people, at most 120 characters.
    pub title: String,
    /// Request kinds served, each in 5000–5999; no kind in two types of a node.
    pub kinds: Vec<u16>,
    pub agent: Agent,
    #[serde(default)]
    pub script: Script,
    #[serde(default)]
    pub input: Needs,
    pub output: Output,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default)]
    pub price: Price,
}

/// What does the work inside the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Agent {
    /// Commands in order; the only agent of this version.
    Script,
}

/// The script agent's part.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// The type's own commands, each given to `sh -c`. Empty: the customer's commands are run.
    #[serde(default)]
    pub commands: Vec<String>,
}

/// What a request must bring.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Needs {
    #[serde(default)]
    pub repo: Need,
    #[serde(default)]
    pub task: Need,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Need {
    Required,
    #[default]
    Optional,
}

/// What the result's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Output {
    /// JSON: every command with exit code and output, artifacts, usage.
    Report,
    /// The unified diff of what the commands changed.
    Patch,
    /// The last command's stdout, which must be one JSON value.
    Json,
    /// The last command's stdout as text.
    Text,
}

/// Defaults for what a request leaves open, and the most that it may ask for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    pub wall_ms: u64,
    pub max_wall_ms: u64,
    pub idle_ms: u64,
    pub memory_bytes: u64,
    pub max_memory_bytes: u64,
    /// Beyond memory.
    pub swap_bytes: u64,
    pub disk_bytes: u64,
    pub max_disk_bytes: u64,
    pub cpu_milli: u32,
    pub max_cpu_milli: u32,
    pub pids: u32,
    pub inodes: u64,
    pub open_files: u32,
    pub output_bytes: u64,
    pub output_bytes_per_s: u64,
}

const MIB: u64 = 1024 * 1024;

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            wall_ms: 300_000,
            max_wall_ms: 3_600_000,
            idle_ms: 120_000,
            memory_bytes: 1024 * MIB,
            max_memory_bytes: 4096 * MIB,
            swap_bytes: 0,
            disk_bytes: 512 * MIB,
            max_disk_bytes: 4096 * MIB,
            cpu_milli: 1000,
            max_cpu_milli: 2000,
            pids: 256,
            inodes: 200_000,
            open_files: 1024,
            output_bytes: 4 * MIB,
            output_bytes_per_s: MIB,
        }
    }
}

impl Limits {
    /// The policy of a job that asks for nothing.
    pub fn policy(&self) -> Policy {
        Policy {
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
            network: Network::None,
        }
    }

    /// The most that a job may ask for.
    pub fn most(&self) -> Policy {
        Policy {
            wall_ms: self.max_wall_ms,
            memory_bytes: self.max_memory_bytes,
            disk_bytes: self.max_disk_bytes,
            cpu_milli: self.max_cpu_milli,
            ..self.policy()
        }
    }
}

impl Manifest {
    /// Reads and checks a `job.toml`.
    ///
    /// # Errors
    /// One line that says what is wrong; with the line number where the text itself is at fault.
    pub fn parse(text: &str) -> Result<Manifest, Fault> {
        if text.len() > 64 * 1024 {
            return Err(Fault::new(None, "larger than 64 KiB"));
        }
        let manifest: Manifest = toml::from_str(text).map_err(|e| {
            let line = e.span().and_then(|s| text.get(..s.start)).map(|t| t.matches('\n').count() + 1);
            Fault::new(line, e.message().to_string())
        })?;
        manifest.check().map_err(|(key, why)| Fault::at(text, key, format!("{key}: {why}")))?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        let name_ok = self.name.len() <= 32
            && self.name.starts_with(|c: char| c.is_ascii_lowercase())
            && self.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        ensure(name_ok, "name", "must be a-z, 0-9 and -, start with a letter, at most 32 characters")?;
        let title_ok = (1..=120).contains(&self.title.chars().count());
        ensure(title_ok, "title", "must have 1 to 120 characters")?;
        ensure((1..=16).contains(&self.kinds.len()), "kinds", "must name 1 to 16 kinds")?;
        for kind in &self.kinds {
            ensure((5000..6000).contains(kind), "kinds", format!("{kind} is not in 5000–5999"))?;
        }
        if matches!(self.output, Output::Json | Output::Text) {
            ensure(!self.script.commands.is_empty(), "output", "json and text need [script] commands")?;
        }
        if self.output == Output::Patch {
            let named = self.input.repo == Need::Required;
            ensure(named, "output", "a patch needs [input] repo = \"required\"")?;
        }
        let l = &self.limits;
        let pairs = [
            ("wall_ms", l.wall_ms, l.max_wall_ms, 86_400_000),
            ("memory_bytes", l.memory_bytes, l.max_memory_bytes, 1 << 40),
            ("disk_bytes", l.disk_bytes, l.max_disk_bytes, 1 << 40),
            ("cpu_milli", l.cpu_milli.into(), l.max_cpu_milli.into(), 1_024_000),
        ];
        for (key, default, most, sane) in pairs {
            ensure(default > 0 && default <= most, key, "must be above 0 and at most its max_ value")?;
            ensure(most <= sane, key, format!("its maximum is above {sane}"))?;
        }
        ensure((1_000..=86_400_000).contains(&l.idle_ms), "idle_ms", "must be 1000 to 86400000")?;
        ensure(l.swap_bytes <= 1 << 40, "swap_bytes", "must be at most 1 TiB")?;
        ensure((1..=65_536).contains(&l.pids), "pids", "must be 1 to 65536")?;
        ensure(l.inodes >= 16, "inodes", "must be 16 or more")?;
        ensure((16..=1_048_576).contains(&l.open_files), "open_files", "must be 16 to 1048576")?;
        ensure((1..=64 * MIB).contains(&l.output_bytes), "output_bytes", "must be 1 byte to 64 MiB")?;
        let rates = 1024..=1024 * MIB;
        ensure(rates.contains(&l.output_bytes_per_s), "output_bytes_per_s", "must be 1 KiB to 1 GiB")?;
        self.price.fault().map_or(Ok(()), Err)
    }
}

/// A fault in one `job.toml`; the catalog adds the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub line: Option<usize>,
    pub reason: String,
}

impl Fault {
    fn new(line: Option<usize>, reason: impl Into<String>) -> Fault {
        Fault { line, reason: reason.into() }
    }

    /// At the line that sets `key`, or else its maximum.
    pub(super) fn at(text: &str, key: &str, reason: impl Into<String>) -> Fault {
        let line = line_of(text, key).or_else(|| line_of(text, &format!("max_{key}")));
        Fault::new(line, reason)
    }
}

fn ensure(ok: bool, key: &'static str, why: impl Into<String>) -> Result<(), (&'static str, String)> {
    if ok { Ok(()) } else { Err((key, why.into())) }
}

/// The first line that sets `key` (or opens its table).
fn line_of(text: &str, key: &str) -> Option<usize> {
    text.lines()
        .position(|line| {
            let line = line.trim_start().trim_start_matches('[');
            line.strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with(['=', ']']))
        })
        .map(|i| i + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str =
        "name = \"x\"\ntitle = \"X\"\nkinds = [5000]\nagent = \"script\"\noutput = \"report\"\n";

    fn fault(text: &str) -> Fault {
        Manifest::parse(text).expect_err("must be refused")
    }

    #[test]
    fn the_shortest_good_file_gets_the_default_limits() {
        let policy = Manifest::parse(GOOD).unwrap().limits.policy();
        assert_eq!(policy.wall_ms, 300_000);
        assert_eq!(policy.network, Network::None);
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let fault = fault(&format!("{GOOD}colour = \"red\"\n"));
        assert_eq!(fault.line, Some(6));
        assert!(fault.reason.contains("colour"), "{}", fault.reason);
    }

    #[test]
    fn a_kind_that_is_no_request_is_refused_with_its_line() {
        let fault = fault(&GOOD.replace("5000", "6000"));
        assert_eq!((fault.line, fault.reason.as_str()), (Some(3), "kinds: 6000 is not in 5000–5999"));
    }

    #[test]
    fn a_patch_without_a_required_repository_is_refused_with_the_line_of_the_output() {
        let patch = GOOD.replace("report", "patch");
        for text in [patch.clone(), format!("{patch}[input]\nrepo = \"optional\"\n")] {
            let fault = fault(&text);
            let why = "output: a patch needs [input] repo = \"required\"";
            assert_eq!((fault.line, fault.reason.as_str()), (Some(5), why));
        }
        assert!(Manifest::parse(&format!("{patch}[input]\nrepo = \"required\"\n")).is_ok());
    }

    #[test]
    fn a_price_that_contradicts_itself_is_refused_with_its_line() {
        let good = Manifest::parse(&format!("{GOOD}[price]\nbase_msat = 1000\n")).unwrap();
        assert_eq!(good.price.base_msat, 1_000);
        let fault = fault(&format!("{GOOD}[price]\nminimum_msat = 1000\nceiling_msat = 999\n"));
        assert_eq!((fault.line, fault.reason.as_str()), (Some(7), "minimum_msat: above ceiling_msat"));
    }

    #[test]
    fn a_default_above_its_maximum_is_refused() {
        let both = fault(&format!("{GOOD}[limits]\nwall_ms = 10\nmax_wall_ms = 5\n"));
        assert_eq!(both.line, Some(7));
        let only_the_maximum = fault(&format!("{GOOD}[limits]\nmax_wall_ms = 5\n"));
        assert_eq!(only_the_maximum.line, Some(7));
    }
}
