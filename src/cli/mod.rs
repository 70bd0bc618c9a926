//! The command line: one file per command. Prints data on stdout and messages on stderr; leaves every decision
//! to the modules below.

pub mod balance;
pub mod bench;
pub mod common;
pub mod completions;
pub mod config;
pub mod connect;
pub mod credits;
pub mod demo;
pub mod doctor;
pub mod earnings;
pub mod exit;
pub mod follow;
pub mod image;
pub mod init;
pub mod jobs;
pub mod keys;
pub mod ledger;
pub mod output;
mod payment;
pub mod request;
pub mod scan;
pub mod signals;
pub mod span;
pub mod status;
pub mod verify;

use clap::{Parser, Subcommand};

pub use common::Common;
pub use exit::{Exit, Failure, Outcome};

/// A coin-operated agent: serves Nostr job requests (NIP-90) that name a git repository, in sandboxes.
#[derive(Debug, Parser)]
#[command(name = "coinop", version, arg_required_else_help = true)]
#[command(
    after_help = "Data goes to stdout, messages to stderr. Every command takes the flags of `coinop --help` under Configuration. `coinop demo` shows a whole job."
)]
#[command(after_long_help = exit::help())]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a configuration file and make the node's key
    Init(init::Args),
    /// Serve job requests from relays
    #[command(visible_alias = "serve")]
    Connect(connect::Args),
    /// Send a job request and wait for its result
    Request(Box<request::Args>),
    /// List the requests on relays, and which of them this node would take
    Scan(scan::Args),
    /// Show the state of the running node: its relays, its jobs
    Status(status::Args),
    /// List, show and cancel the jobs of this node
    Jobs(jobs::Args),
    /// Show the output of a job's commands: short for `jobs logs`
    Logs(jobs::Logs),
    /// Manage customer balances, grants, top-ups and refunds
    Credits(credits::Args),
    /// Show your balance with a provider
    Balance(balance::Args),
    /// Report revenue, costs and profit of a period
    Earnings(earnings::Args),
    /// Work with the ledger: balances, check, export, backup
    Ledger(ledger::Args),
    /// Check a result event: signature, hashes, and that its patch applies
    Verify(verify::Args),
    /// Manage the node's key
    Keys(keys::Args),
    /// Check this machine, the configuration and the sandbox
    Doctor(doctor::Args),
    /// Run a whole job here: relay, repository, node and customer in one process
    Demo(demo::Args),
    /// Build the image that jobs run in, on a Docker engine
    Image(image::Args),
    /// Show and check the effective configuration
    Config(config::Args),
    /// Run the benchmarks of docs/SPEC.md
    Bench(bench::Args),
    /// Print a completion script for a shell
    Completions(completions::Args),
}

/// Runs one command to its end.
pub fn run(cli: Cli) -> Outcome {
    let Cli { command, common } = cli;
    match command {
        Command::Init(args) => init::run(args, &common),
        Command::Connect(args) => connect::run(args, &common),
        Command::Request(args) => request::run(*args, &common),
        Command::Scan(args) => scan::run(args, &common),
        Command::Status(args) => status::run(args, &common),
        Command::Jobs(args) => jobs::run(args, &common),
        Command::Logs(args) => jobs::run(jobs::Args { command: jobs::Command::Logs(args) }, &common),
        Command::Credits(args) => credits::run(args, &common),
        Command::Balance(args) => balance::run(args, &common),
        Command::Earnings(args) => earnings::run(args, &common),
        Command::Ledger(args) => ledger::run(args, &common),
        Command::Verify(args) => verify::run(args, &common),
        Command::Keys(args) => keys::run(args, &common),
        Command::Doctor(args) => doctor::run(args, &common),
        Command::Demo(args) => demo::run(args, &common),
        Command::Image(args) => image::run(args, &common),
        Command::Config(args) => config::run(args, &common),
        Command::Bench(args) => bench::run(args, &common),
        Command::Completions(args) => completions::run(args),
    }
}
