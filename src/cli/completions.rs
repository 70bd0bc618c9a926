//! `coinop completions SHELL`: the completion script on stdout. Installs nothing.

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, Exit, Failure, Outcome, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell [default: that of $SHELL]
    #[arg(value_enum)]
    pub shell: Option<Shell>,
}

pub fn run(args: Args) -> Outcome {
    let unknown = "cannot tell your shell from $SHELL: name one, such as `coinop completions bash`";
    let shell = args.shell.or_else(Shell::from_env).ok_or_else(|| Failure::say(Exit::Usage, unknown))?;
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "coinop", &mut script);
    output::raw(&script)?;
    if let Some(place) = place(shell) {
        output::talk(&format!("To install it: coinop completions {shell} > {place}"));
    }
    Ok(Exit::Ok)
}

/// Where the shell looks for it, for this user.
fn place(shell: Shell) -> Option<&'static str> {
    match shell {
        Shell::Bash => Some("~/.local/share/bash-completion/completions/coinop"),
        Shell::Zsh => Some("~/.zfunc/_coinop (with ~/.zfunc in $fpath)"),
        Shell::Fish => Some("~/.config/fish/completions/coinop.fish"),
        Shell::Elvish => Some("~/.config/elvish/lib/coinop.elv (and `use coinop` in rc.elv)"),
        Shell::PowerShell => Some("a file that your $PROFILE loads"),
        _ => None,
    }
}
