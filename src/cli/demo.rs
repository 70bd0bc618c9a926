//! `coinop demo`: flags in, the demo's report out. What the demo does is `node`'s business.

use super::common::Common;
use super::exit::{Exit, Failure, Outcome};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// One JSON object instead of the story
    #[arg(long)]
    pub json: bool,
    /// Leave relay, repository and node running, to play with
    #[arg(long)]
    pub keep: bool,
}

pub fn run(_args: Args, _common: &Common) -> Outcome {
    Err(Failure::say(Exit::Failure, "not built yet"))
}
