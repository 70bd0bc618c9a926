//! `coinop completions SHELL`: the completion script on stdout. Installs nothing.

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, Exit, Outcome, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Whose completion
    #[arg(value_enum)]
    pub shell: Shell,
}

pub fn run(args: Args) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "coinop", &mut script);
    output::raw(&script)?;
    Ok(Exit::Ok)
}
