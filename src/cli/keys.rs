//! `coinop keys {new,show,import}`: the public half on stdout, the secret half nowhere.

use std::io::{IsTerminal, Read};
use std::path::PathBuf;

use clap::Subcommand;
use nostr_sdk::prelude::Keys;
use serde_json::json;

use super::common::{Common, Overrides};
use super::exit::{Exit, Failure, OrExit, Outcome};
use super::output::{self, Table};
use crate::clock;
use crate::keys::{self, NodeKey};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a key file (mode 0600) and print its npub
    New {
        /// Encrypt it with a password (NIP-49), asked for or from COINOP_KEY_PASSWORD
        #[arg(long)]
        encrypt: bool,
        #[command(flatten)]
        replace: Replace,
        #[command(flatten)]
        place: Place,
    },
    /// Print the npub of the key; the secret is never shown
    Show {
        #[command(flatten)]
        place: Place,
    },
    /// Read a key from stdin (nsec, hex or ncryptsec) into the key file
    ///
    /// There is no argument for the key on purpose: the command line of a process can be read by others.
    Import {
        #[command(flatten)]
        replace: Replace,
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Debug, clap::Args)]
pub struct Place {
    /// Key file [default: the node's]
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
pub struct Replace {
    /// Rename a key file that exists (it is not deleted)
    #[arg(long)]
    pub replace: bool,
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let ask = &keys::password_from_env_or_terminal;
    match args.command {
        Command::New { encrypt, replace, place } => {
            let path = place.file(common)?;
            let password = if encrypt { Some(new_password()?) } else { None };
            replace.make_room(&path)?;
            let key = keys::create(&path, &Keys::generate(), password.as_deref()).or_exit(Exit::Config)?;
            place.print(&key, &path)
        }
        Command::Show { place } => {
            let path = place.file(common)?;
            let key = keys::load(&path, ask).or_exit(Exit::Config)?;
            place.print(&key, &path)
        }
        Command::Import { replace, place } => {
            let path = place.file(common)?;
            let text = read_secret()?;
            // Read it before anything is moved: bad input changes nothing.
            keys::check(&text, ask).or_exit(Exit::Config)?;
            replace.make_room(&path)?;
            let key = keys::import(&path, &text, ask).or_exit(Exit::Config)?;
            place.print(&key, &path)
        }
    }
}

impl Place {
    fn file(&self, common: &Common) -> Result<PathBuf, Failure> {
        match &self.key {
            Some(path) => Ok(path.clone()),
            None => Ok(common.start_quietly(Overrides::default())?.key_file),
        }
    }

    fn print(&self, key: &NodeKey, path: &std::path::Path) -> Outcome {
        let hex = key.public_key().to_hex();
        if self.json {
            output::json(&json!({
                "npub": key.npub(), "hex": hex, "file": path, "encrypted": key.is_protected(),
            }))?;
            return Ok(Exit::Ok);
        }
        let mut table = Table::pairs();
        table.row(vec!["npub".into(), key.npub().into()]);
        table.row(vec!["hex".into(), hex.into()]);
        table.row(vec!["file".into(), path.display().to_string().into()]);
        table.row(vec!["encrypted".into(), if key.is_protected() { "yes" } else { "no" }.into()]);
        table.print()?;
        Ok(Exit::Ok)
    }
}

impl Replace {
    fn make_room(&self, path: &std::path::Path) -> Result<(), Failure> {
        if self.replace
            && let Some(aside) = keys::set_aside(path, clock::now_s()).or_exit(Exit::Config)?
        {
            output::talk(&format!("Renamed the old key to {}", aside.display()));
        }
        Ok(())
    }
}

fn new_password() -> Result<String, Failure> {
    if let Ok(password) = std::env::var(keys::PASSWORD_VAR) {
        return Ok(password);
    }
    let first = keys::ask_hidden("New password: ").or_exit(Exit::Config)?;
    let second = keys::ask_hidden("Again: ").or_exit(Exit::Config)?;
    if first != second {
        return Err(Failure::new(Exit::Config, keys::Error::PasswordsDiffer));
    }
    Ok(first)
}

fn read_secret() -> Result<String, Failure> {
    if std::io::stdin().is_terminal() {
        return keys::ask_hidden("Secret key (nsec, hex or ncryptsec): ").or_exit(Exit::Config);
    }
    let mut text = String::new();
    std::io::stdin().lock().take(4_096).read_to_string(&mut text)?;
    Ok(text)
}
