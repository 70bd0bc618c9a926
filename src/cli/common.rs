//! What every command shares: the flags of configuration, the start of logging, the runtime, the key.

use std::future::Future;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::format;

use super::exit::{Exit, Failure, OrExit, Outcome};
use super::output;
use crate::config::{Config, Loaded, Override, Raw, Sources, Value};
use crate::escape;
use crate::keys::{self, NodeKey};

/// Of one field of a log line.
const LOG_FIELD_CHARS: usize = 4_000;

/// Flags that any command takes.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Common {
    /// Configuration file [default: ~/.config/coinop/config.toml, if there]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Configuration", hide_short_help = true)]
    pub config: Option<PathBuf>,
    /// Folder for the log, index, repositories and key [default: ~/.local/state/coinop]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Configuration", hide_short_help = true)]
    pub data_dir: Option<PathBuf>,
    /// Override a configuration key; may be repeated
    #[arg(
        long, global = true, value_name = "KEY=VALUE", value_parser = assignment, help_heading = "Configuration",
        hide_short_help = true
    )]
    pub set: Vec<(String, String)>,
    /// Log level on stderr: error, warn, info, debug, trace, off, or directives
    #[arg(long, global = true, value_name = "LEVEL", help_heading = "Configuration", hide_short_help = true)]
    pub log_level: Option<String>,
}

fn assignment(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    Ok((key.trim().to_string(), value.to_string()))
}

/// Flags of a command as the top layer of configuration.
#[derive(Debug, Default)]
pub struct Overrides(Vec<Override>);

impl Overrides {
    /// Replaces the list, when the flag was given at all.
    pub fn list(&mut self, key: &str, flag: &str, items: &[String]) {
        if !items.is_empty() {
            self.push(key, flag, Value::List(items.to_vec()));
        }
    }

    pub fn text(&mut self, key: &str, flag: &str, text: Option<String>) {
        if let Some(text) = text {
            self.push(key, flag, Value::Text(text));
        }
    }

    pub fn number(&mut self, key: &str, flag: &str, number: Option<u64>) {
        if let Some(number) = number {
            self.push(key, flag, Value::Number(number));
        }
    }

    /// A flag without a value can only switch on.
    pub fn on(&mut self, key: &str, flag: &str, given: bool) {
        if given {
            self.push(key, flag, Value::Flag(true));
        }
    }

    fn push(&mut self, key: &str, flag: &str, value: Value) {
        self.0.push(Override { key: key.into(), value: Raw::Typed(value), flag: flag.into() });
    }
}

impl Common {
    /// All layers; `over` are the command's own flags, the topmost.
    pub fn sources(&self, over: Overrides) -> Sources {
        let mut flags: Vec<Override> = Vec::new();
        for (key, value) in &self.set {
            let flag = format!("--set {key}");
            flags.push(Override { key: key.clone(), value: Raw::Text(value.clone()), flag });
        }
        let path = |path: &PathBuf| path.to_string_lossy().into_owned();
        let mut own = Overrides::default();
        own.text("data_dir", "--data-dir", self.data_dir.as_ref().map(path));
        own.text("log_level", "--log-level", self.log_level.clone());
        flags.extend(own.0);
        flags.extend(over.0);
        Sources::of_process(self.config.clone(), flags)
    }

    /// The configuration and every value's origin; does not start the log.
    pub fn loaded(&self, over: Overrides) -> Result<Loaded, Failure> {
        let loaded = Config::load(&self.sources(over)).or_exit(Exit::Config)?;
        let dir = &loaded.config.data_dir;
        if dir.exists() && !dir.is_dir() {
            let words =
                format!("the data folder {} is not a folder; choose another with --data-dir", dir.display());
            return Err(Failure::say(Exit::Config, words));
        }
        Ok(loaded)
    }

    /// For a command that plays its own stage in `folder`: the defaults and what stands on the command line. The
    /// node that this machine may be configured to be has no part in it.
    pub fn stage(&self, folder: &Path) -> Result<Config, Failure> {
        let mut over = Overrides::default();
        let text = |path: PathBuf| Some(path.to_string_lossy().into_owned());
        over.text("data_dir", "stage", text(folder.join("data")));
        let own = Common { data_dir: None, ..self.clone() };
        let mut sources = own.sources(over);
        sources.env = vec![("HOME".into(), folder.to_string_lossy().into_owned())];
        let loaded = Config::load(&sources).or_exit(Exit::Config)?;
        log_at(quiet_level(&loaded));
        Ok(loaded.config)
    }

    /// A folder of its own for such a stage, in `--data-dir` where that is given. Dropping it removes it.
    pub fn stage_folder(&self, prefix: &str) -> Result<tempfile::TempDir, Failure> {
        let mut folder = tempfile::Builder::new();
        folder.prefix(prefix);
        Ok(match &self.data_dir {
            None => folder.tempdir()?,
            Some(within) => {
                std::fs::create_dir_all(within)?;
                folder.tempdir_in(within)?
            }
        })
    }

    /// For a command that serves: logs at the configured level.
    pub fn start(&self, over: Overrides) -> Result<Config, Failure> {
        let config = self.loaded(over)?.config;
        log_at(&config.log_level);
        Ok(config)
    }

    /// For a command that answers and ends: logs warnings only, unless a level was asked for here or in
    /// the environment.
    pub fn start_quietly(&self, over: Overrides) -> Result<Config, Failure> {
        let loaded = self.loaded(over)?;
        log_at(quiet_level(&loaded));
        Ok(loaded.config)
    }
}

fn quiet_level(loaded: &Loaded) -> &str {
    use crate::config::Origin;
    let row = loaded.rows.iter().find(|row| row.key == "log_level");
    match row.map(|row| &row.origin) {
        Some(Origin::Env { .. } | Origin::Flag { .. }) => &loaded.config.log_level,
        _ => "warn",
    }
}

/// Sends tracing to stderr. A bare level is ours; the libraries below us then only warn, and the demo's relay,
/// which calls it an error when a peer hangs up, says nothing.
pub fn log_at(level: &str) {
    let plain = !level.contains(['=', ',']);
    let directives = match level.trim() {
        "off" => "off".to_string(),
        "error" => "error,nostr_relay_builder=off".to_string(),
        level if plain => format!("warn,coinop={level},nostr_relay_builder=off"),
        level => level.to_string(),
    };
    let filter = EnvFilter::try_new(&directives).unwrap_or_else(|_| EnvFilter::new("warn"));
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .fmt_fields(format::debug_fn(field).delimited(" "))
        .with_writer(|| Stderr)
        .with_ansi(output::Paint::stderr().is_on())
        .with_target(!plain)
        .try_init();
    if started.is_err() {
        tracing::debug!("the log was started before; its level stays");
    }
}

/// One field of a log line, its value escaped and cut: any of them may come from outside. Names are our own.
fn field(
    to: &mut format::Writer<'_>,
    field: &tracing::field::Field,
    value: &dyn std::fmt::Debug,
) -> std::fmt::Result {
    use std::fmt::Write;
    if field.name() != "message" {
        let name = output::Paint::on(to.has_ansi_escapes()).faint(&format!("{}=", field.name()));
        to.write_str(&name)?;
    }
    write!(escape::Line::new(to, LOG_FIELD_CHARS), "{value:?}")
}

/// Less free space than this is warned of.
pub const LOW_SPACE_BYTES: u64 = 1 << 30;

/// What is free where the folder is, or will be. `None` where that cannot be asked.
pub fn free_space(dir: &Path) -> Option<u64> {
    let there = dir.ancestors().find(|path| path.exists())?;
    let stat = nix::sys::statvfs::statvfs(there).ok()?;
    Some(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// What is free, where that is little.
pub fn low_space(dir: &Path) -> Option<u64> {
    free_space(dir).filter(|free| *free < LOW_SPACE_BYTES)
}

/// Stderr for the log. Whoever read it may be gone (`connect 2>&1 | tee`, ended by Ctrl-C): that is no reason to end
/// otherwise than in order, so what cannot be written is dropped.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(std::io::stderr().write(bytes).unwrap_or(bytes.len()))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Runs a command that waits. Only such commands pay for a runtime.
pub fn block_on(task: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let outcome = runtime.block_on(task);
    // Blocking threads (a clone, a name look-up) may hang on; the process ends anyway.
    runtime.shutdown_background();
    outcome
}

/// The node's key; made now, and said so, when there is none.
pub fn node_key(config: &Config) -> Result<NodeKey, Failure> {
    let (key, new) =
        keys::load_or_create(&config.key_file, &keys::password_from_env_or_terminal).or_exit(Exit::Config)?;
    if new {
        output::talk(&format!("Made a new key in {}: {}", config.key_file.display(), key.npub()));
    }
    Ok(key)
}
