//! `coinop init`: the first steps of a new node, a commented configuration file and a key. What exists is left as it is.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::Context;

use super::common::{Common, Overrides, node_key};
use super::exit::{Exit, Failure, OrExit, Outcome};
use super::output;
use crate::config::DEFAULT_TOML;

#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_: Args, common: &Common) -> Outcome {
    let sources = common.sources(Overrides::default());
    let file = sources.target_file().ok_or_else(|| {
        Failure::say(Exit::Config, "no place for a configuration file: HOME is not set; give --config FILE")
    })?;
    if write_new(&file).or_exit(Exit::Config)? {
        output::talk(&format!("Wrote {}: every setting with its default, commented", file.display()));
    } else {
        output::talk(&format!("{} exists; left as it is", file.display()));
    }
    let config = common.start_quietly(Overrides::default())?;
    let key = node_key(&config)?;
    output::data(&key.npub())?;
    output::talk("Next: set `relays` in that file, run `coinop doctor`, then `coinop connect`");
    Ok(Exit::Ok)
}

/// Writes the defaults to a new file; `false` where there is one.
fn write_new(file: &Path) -> anyhow::Result<bool> {
    let shown = file.display();
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(file) {
        Ok(mut new) => {
            new.write_all(DEFAULT_TOML.as_bytes()).with_context(|| format!("cannot write {shown}"))?;
            Ok(true)
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot write {shown}")),
    }
}
