//! `coinop jobs`.
use super::common::Common;
use super::exit::{Exit, Failure, Outcome};

#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: Args, _common: &Common) -> Outcome {
    Err(Failure::say(Exit::Failure, "not built yet"))
}
