//! `coinop config {show,check,default,path,edit}`: the effective values, where they came from, and whether a file is
//! good.

use std::path::PathBuf;

use anyhow::Context;
use clap::Subcommand;
use serde_json::json;

use super::common::{Common, Overrides};
use super::exit::{Exit, Failure, OrExit, Outcome};
use super::output::{self, Cell, Table, Tone};
use crate::config::{Config, DEFAULT_TOML, Fault, Loaded, Origin, Problem, Value, env_name};
use crate::node;
use crate::units::Unit;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show every effective value and where it came from
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check a file and report everything wrong with it
    Check {
        /// File to check [default: the one in use, see `config path`]
        file: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the commented default configuration
    Default,
    /// Print the path of the configuration file, whether it exists or not
    Path,
    /// Open the configuration file in $VISUAL or $EDITOR, and check it afterwards
    Edit,
}

pub fn run(args: Args, common: &Common) -> Outcome {
    match args.command {
        Command::Show { json } => show(common, json),
        Command::Check { file: None, json } if !target(common)?.exists() => defaults(common, json),
        Command::Check { file, json } => {
            let file = file.map_or_else(|| target(common), Ok)?;
            check(common, &file, json)
        }
        Command::Path => {
            output::data(&target(common)?.display().to_string())?;
            Ok(Exit::Ok)
        }
        Command::Edit => edit(common),
        Command::Default => {
            output::raw(DEFAULT_TOML.as_bytes())?;
            Ok(Exit::Ok)
        }
    }
}

/// The configuration file that is read, or would be.
fn target(common: &Common) -> Result<PathBuf, Failure> {
    let file = common.sources(Overrides::default()).target_file();
    file.ok_or_else(|| {
        Failure::say(Exit::Config, "no configuration file: HOME is not set; give --config FILE")
    })
}

/// `check` where there is no file yet: what is in force without one.
fn defaults(common: &Common, as_json: bool) -> Outcome {
    common.loaded(Overrides::default())?;
    if as_json {
        output::json(&json!({ "file": null, "ok": true, "problems": [] }))?;
    } else {
        let file = target(common)?;
        output::talk(&format!("{} does not exist; using defaults (`coinop init` writes it)", file.display()));
    }
    Ok(Exit::Ok)
}

fn edit(common: &Common) -> Outcome {
    let file = target(common)?;
    if !file.exists() {
        let words = format!("there is no {}; `coinop init` writes one", file.display());
        return Err(Failure::say(Exit::Config, words));
    }
    let editor = ["VISUAL", "EDITOR"].into_iter().find_map(|name| std::env::var(name).ok());
    let editor = editor.filter(|editor| !editor.trim().is_empty()).ok_or_else(|| {
        Failure::say(Exit::Usage, format!("set $EDITOR, or edit {} with any program", file.display()))
    })?;
    // The variable may hold arguments: `code --wait`.
    let mut words = editor.split_whitespace();
    let program = words.next().unwrap_or_default();
    let status = std::process::Command::new(program).args(words).arg(&file).status();
    let status = status.with_context(|| format!("cannot run {program}"))?;
    if !status.success() {
        return Err(Failure::say(Exit::Failure, format!("{program} ended with {status}")));
    }
    check(common, &file, false)
}

fn show(common: &Common, as_json: bool) -> Outcome {
    let loaded = common.loaded(Overrides::default())?;
    if as_json {
        let settings: serde_json::Map<_, _> = loaded
            .rows
            .iter()
            .map(|row| (row.key.to_string(), json!({ "value": row.value, "from": row.origin.to_string() })))
            .collect();
        output::json(&json!({ "file": loaded.file, "settings": settings }))?;
        return Ok(Exit::Ok);
    }
    let mut table = Table::new(&["key", "value", "from"]);
    for row in &loaded.rows {
        let tone = if row.origin == Origin::Default { Tone::Faint } else { Tone::Plain };
        table.row(vec![
            row.key.into(),
            shown(row.key, &row.value).into(),
            Cell::toned(row.origin.to_string(), tone),
        ]);
    }
    table.print()?;
    match &loaded.file {
        Some(file) => output::talk(&format!("file: {}", file.display())),
        None => output::talk("file: none; using defaults (`coinop init` writes one)"),
    }
    output::talk(&format!(
        "As an environment variable, a key is written in capitals: {}",
        env_name("limits.wall_ms")
    ));
    Ok(Exit::Ok)
}

/// A figure with its unit, as the configuration reads it back.
fn shown(key: &str, value: &Value) -> String {
    match (Unit::of_key(key), value) {
        (Some(unit), Value::Number(figure)) => unit.write(*figure),
        _ => value.to_string(),
    }
}

fn check(common: &Common, file: &std::path::Path, as_json: bool) -> Outcome {
    use crate::config::Error;
    let result = Config::check(file, &common.sources(Overrides::default())).and_then(job_types);
    if !as_json {
        result.or_exit(Exit::Config)?;
        output::talk(&format!("{}: OK", file.display()));
        return Ok(Exit::Ok);
    }
    let problems = match &result {
        Ok(_) => vec![],
        Err(Error::Bad(problems)) => {
            problems.iter().map(|p| json!({ "place": p.place, "problem": p.fault.to_string() })).collect()
        }
        Err(other) => vec![json!({ "place": file, "problem": other.to_string() })],
    };
    output::json(&json!({ "file": file, "ok": result.is_ok(), "problems": problems }))?;
    Ok(if result.is_ok() { Exit::Ok } else { Exit::Config })
}

/// A file is good when the job types and prices that it names are there, too.
fn job_types(loaded: Loaded) -> Result<Loaded, crate::config::Error> {
    let problem = |key: &str, why: String| {
        let row = loaded.rows.iter().find(|row| row.key == key);
        let place = row.map_or("configuration".into(), |row| row.origin.to_string());
        Problem { place, fault: Fault::Bad { key: key.into(), why } }
    };
    let problems = match node::catalog(&loaded.config) {
        Ok(_) => return Ok(loaded),
        Err(node::Error::Payment(faults)) => faults.into_iter().map(|(key, why)| problem(key, why)).collect(),
        Err(error) => {
            let unknown =
                matches!(error, node::Error::Catalog(crate::market::catalog::Error::Unknown { .. }));
            vec![problem(if unknown { "skills" } else { "jobs_dir" }, error.to_string())]
        }
    };
    Err(crate::config::Error::Bad(problems))
}
