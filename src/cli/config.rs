//! `coinop config {show,check,default}`: what holds, where it came from, and whether a file is good.

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::json;

use super::common::{Common, Overrides};
use super::exit::{Exit, OrExit, Outcome};
use super::output::{self, Cell, Table, Tone};
use crate::config::{Config, DEFAULT_TOML, Fault, Loaded, Origin, Problem, env_name};
use crate::node;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Every value that holds here, and where it came from
    Show {
        /// JSON on stdout, for programs
        #[arg(long)]
        json: bool,
    },
    /// Read a file over the defaults and name everything wrong with it
    Check {
        file: PathBuf,
        /// JSON on stdout, for programs
        #[arg(long)]
        json: bool,
    },
    /// Print the commented default configuration, to start a file from
    Default,
}

pub fn run(args: Args, common: &Common) -> Outcome {
    match args.command {
        Command::Show { json } => show(common, json),
        Command::Check { file, json } => check(common, &file, json),
        Command::Default => {
            output::raw(DEFAULT_TOML.as_bytes())?;
            Ok(Exit::Ok)
        }
    }
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
            row.value.to_string().into(),
            Cell::toned(row.origin.to_string(), tone),
        ]);
    }
    table.print()?;
    match &loaded.file {
        Some(file) => output::talk(&format!("file: {}", file.display())),
        None => output::talk("file: none; `coinop config default` prints one to start from"),
    }
    output::talk(&format!("a variable is the key in capitals: {}", env_name("limits.wall_ms")));
    Ok(Exit::Ok)
}

fn check(common: &Common, file: &std::path::Path, as_json: bool) -> Outcome {
    use crate::config::Error;
    let result = Config::check(file, &common.sources(Overrides::default())).and_then(job_types);
    if !as_json {
        result.or_exit(Exit::Config)?;
        output::talk(&format!("{}: good", file.display()));
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
