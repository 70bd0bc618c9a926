//! `coinop bench`: which measurements, how often, and their table. Measuring is `bench`'s business.

use clap::ValueEnum;

use super::common::Common;
use super::exit::{Exit, Failure, Outcome};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to measure
    #[arg(value_enum, default_value = "all")]
    pub what: What,
    /// Rounds of each; a ratio is taken within a round [default: as docs/SPEC.md says]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rounds: Option<u32>,
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// Sandbox made → first command done
    Tti,
    /// Events read and verified
    Intake,
    /// Repository cloned and checked out
    Checkout,
    /// Job published → result received
    Job,
    All,
}

pub fn run(_args: Args, _common: &Common) -> Outcome {
    Err(Failure::say(Exit::Failure, "not built yet"))
}
