//! `coinop bench`: which measurements, how often, and their table. Measuring is `bench`'s business.

mod times;

use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Map, Value};

use super::common::{Common, block_on};
use super::exit::{Exit, Failure, Outcome};
use super::output::{self, Cell, Table};
use crate::bench::{checkout, intake, job, ledger, memory, tti};
use crate::config::Config;
use crate::node;
use crate::sandbox::docker;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to measure
    #[arg(value_enum, default_value = "all")]
    pub what: What,
    /// Rounds per side; the sides of a ratio are measured alternately [default: as in docs/SPEC.md]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rounds: Option<u32>,
    /// tti: only these modes; may be repeated
    #[arg(long, value_enum, value_name = "MODE")]
    pub mode: Vec<tti::Mode>,
    /// tti: only these lanes; may be repeated
    #[arg(long, value_enum, value_name = "LANE")]
    pub lane: Vec<tti::Name>,
    /// tti: also create and destroy N sandboxes and check for memory growth
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    pub soak: Option<u32>,
    /// ledger: number of entries; the goals of docs/SPEC.md apply to the default
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(100..=100_000_000))]
    pub entries: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// Sandbox made → first command done
    Tti,
    /// Events read and verified
    Intake,
    /// Repository cloned and checked out; needs git
    Checkout,
    /// Job published → result received
    Job,
    /// Memory of the idle node and of a running job
    Memory,
    /// Durable commits, and a ledger of a million entries
    Ledger,
    /// All of them, one after another
    All,
}

impl What {
    fn each(self) -> Vec<What> {
        match self {
            What::All => {
                vec![What::Tti, What::Intake, What::Checkout, What::Job, What::Memory, What::Ledger]
            }
            one => vec![one],
        }
    }

    fn name(self) -> &'static str {
        match self {
            What::Tti => "tti",
            What::Intake => "intake",
            What::Checkout => "checkout",
            What::Job => "job",
            What::Memory => "memory",
            What::Ledger => "ledger",
            What::All => "all",
        }
    }
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let (mut figures, mut exit) = (Map::new(), Exit::Ok);
    for what in args.what.each() {
        output::talk(&format!("measuring {} …", what.name()));
        let folder = common.stage_folder("coinop-bench-")?;
        let config = common.stage(folder.path())?;
        // One that cannot be taken here (git is not there, no sandbox) does not take the others along.
        let report = measure(what, &args, folder.path(), config).unwrap_or_else(|failure| {
            exit = Exit::Failure;
            let why = failure.to_string();
            output::talk(&format!("{}: {why}", what.name()));
            serde_json::json!({ "error": why })
        });
        figures.insert(what.name().into(), report);
    }
    if args.json {
        output::json(&figures)?;
    } else {
        print(&figures)?;
    }
    Ok(exit)
}

fn measure(what: What, args: &Args, folder: &std::path::Path, config: Config) -> Result<Value, Failure> {
    let rounds = |usual: usize| args.rounds.map_or(usual, |n| usize::try_from(n).unwrap_or(usual));
    let dir = folder.to_path_buf();
    Ok(match what {
        What::Tti => {
            let chosen =
                |some: bool| if some { args.lane.clone() } else { tti::Name::value_variants().to_vec() };
            let modes = if args.mode.is_empty() { tti::Mode::value_variants() } else { &args.mode };
            let options = tti::Options {
                rounds: rounds(100),
                modes: modes.to_vec(),
                lanes: chosen(!args.lane.is_empty()),
                helper: None,
                state_dir: dir,
                engine: Some(engine(&config)),
                soak: args.soak.map_or(0, |n| usize::try_from(n).unwrap_or(usize::MAX)),
            };
            serde_json::to_value(tti::run(&options)?)?
        }
        What::Intake => {
            let options = intake::Options { rounds: rounds(7), ..intake::Options::default() };
            serde_json::to_value(intake::run(&options)?)?
        }
        What::Checkout => {
            let options = checkout::Options { files: 20_000, commits: 200, rounds: rounds(5), dir };
            wait(async { Ok(checkout::run(options).await?) })?
        }
        What::Job => {
            let dir = config.data_dir.clone();
            let options = job::Options { rounds: rounds(200), at_once: 64, dir };
            wait(job::run(&options, config))?
        }
        What::Memory => wait(memory::run(&memory::Options { jobs: rounds(16), dir, program: None }))?,
        What::Ledger => {
            let options = ledger::Options {
                entries: usize::try_from(args.entries).unwrap_or(usize::MAX),
                rounds: rounds(3),
                at_once: 64,
                commits: usize::try_from(args.entries / 500).unwrap_or(usize::MAX).clamp(100, 2_000),
                dir,
                program: None,
            };
            wait(ledger::run(&options))?
        }
        What::All => Value::Null,
    })
}

/// The engine that is configured or that DOCKER_HOST names; else one that was started for tests, or the usual socket.
fn engine(config: &Config) -> docker::Options {
    let mut engine = node::docker_options(config, 0);
    if engine.host.is_none() && std::env::var_os("DOCKER_HOST").is_none() {
        engine.host = std::env::var("E2E_DOCKER_HOST").ok();
    }
    engine
}

fn wait<T: Serialize>(task: impl Future<Output = anyhow::Result<T>>) -> Result<Value, Failure> {
    let mut report = Value::Null;
    block_on(async {
        report = serde_json::to_value(task.await?)?;
        Ok(Exit::Ok)
    })?;
    Ok(report)
}

/// Every figure by its path: `job.bare.p50_ms`. Those of tti have tables of their own.
fn print(figures: &Map<String, Value>) -> Result<(), Failure> {
    let mut table = Table::new(&["figure", "value"]);
    for (name, report) in figures {
        match report.get("modes") {
            Some(_) => times::print(report)?,
            None => rows(&mut table, name.clone(), report),
        }
    }
    if !table.is_empty() {
        table.print()?;
    }
    Ok(())
}

fn rows(table: &mut Table, path: String, value: &Value) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                rows(table, format!("{path}.{key}"), value);
            }
        }
        Value::Array(items) => {
            for (n, value) in items.iter().enumerate() {
                rows(table, format!("{path}.{n}"), value);
            }
        }
        Value::Number(number) if number.is_f64() => {
            let text = format!("{:.3}", number.as_f64().unwrap_or_default());
            table.row(vec![Cell::from(path), Cell::from(text)]);
        }
        scalar => {
            let text = scalar.as_str().map_or_else(|| scalar.to_string(), str::to_string);
            table.row(vec![Cell::from(path), Cell::from(text)]);
        }
    }
}
