//! The hostile suite: what a stranger's job does to its host, judged from the host's side, on every backend. Each
//! attack is first shown to succeed with its defence off, so that a case can fail. Clauses of the trait are
//! `tests/conformance`'s; here are neighbours, the kill, and what is left. This file runs the cases.

mod case;
#[path = "../support/engine.rs"]
mod engine;
mod files;
mod ground;
mod host;
mod leftovers;
mod pace;
mod plain;
mod resources;
mod siege;
#[expect(dead_code, reason = "no case here asks for git this way")]
#[path = "../support/skip.rs"]
mod skip;
mod table;
mod users;
mod ways_out;

use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use case::{Case, Outcome};
use ground::Ground;
use plain::Plain;
use table::Table;

/// No case takes longer; one that hangs must not hold the others.
const LONGEST: Duration = Duration::from_secs(90);
/// The table's first column: the attack with its defence off.
const OFF: &str = "defence off";

fn cases() -> Vec<Case> {
    [resources::cases(), pace::cases(), users::cases(), ways_out::cases(), files::cases(), leftovers::cases()]
        .concat()
}

fn main() -> ExitCode {
    if let Some(kind) = std::env::var_os(leftovers::NODE) {
        return leftovers::node(&kind.to_string_lossy());
    }
    if let Ok(name) = std::env::var(ground::ALONE) {
        return alone(&name);
    }
    let mut arguments = Arguments::from_args();
    // One attack at a time: what one does must not show in what another measures.
    arguments.test_threads.get_or_insert(1);
    let table = Table::default();
    let mut trials = Vec::new();
    for case in cases() {
        let trial = |column: &'static str, run: Box<dyn FnOnce() -> Result<Outcome, Failed> + Send>| {
            let (table, name) = (table.clone(), format!("{}::{}", column.replace(' ', "_"), case.name));
            Trial::ignorable_test(name.clone(), move || {
                table.record(case.name, column, None);
                let outcome = run()?;
                table.record(case.name, column, Some(outcome.clone()));
                // What was measured stands in the table.
                Ok(match outcome {
                    Ok(_) => Completion::Completed,
                    Err(why) => {
                        if !why.starts_with(case::NOT_SHOWN) {
                            skip::skip(&name, &why);
                        }
                        Completion::ignored_with(why)
                    }
                })
            })
        };
        trials.push(trial(OFF, Box::new(move || Ok((case.off)(&Plain::new())))));
        for column in ground::columns() {
            trials.push(trial(column.name, Box::new(move || column.run(case, on))));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if std::env::var_os("HOSTILE_TABLE").is_some() && !arguments.list {
        let columns: Vec<_> = [OFF].into_iter().chain(ground::columns().iter().map(|c| c.name)).collect();
        table.print(&cases(), &columns);
    }
    ground::close();
    conclusion.exit_code()
}

/// Runs a case on a backend. A case that fails panics.
fn on(ground: &Ground, case: Case) -> Outcome {
    ground.runtime.block_on(async {
        let running = tokio::time::timeout(LONGEST, (case.on)(ground));
        running.await.unwrap_or_else(|_| panic!("{} did not end within {LONGEST:?}", case.name))
    })
}

/// A case on `local` as the user that this process is; its outcome is the last line.
fn alone(name: &str) -> ExitCode {
    let case = cases().into_iter().find(|case| case.name == name).expect("a case of this name");
    let outcome = ground::local().and_then(|ground| on(&ground, case));
    println!("{}", serde_json::to_string(&outcome).unwrap());
    ExitCode::SUCCESS
}
