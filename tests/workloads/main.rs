//! The workload suite: what real work needs of a sandbox, row by row on each backend. A row passes, or it stands in
//! `rows` that this backend refuses it, and why; then it must fail in that way. `--table` shows the rows by backend.

mod columns;
#[expect(dead_code, reason = "each test program uses a part of it")]
#[path = "../support/engine.rs"]
mod engine;
mod rows;
#[expect(dead_code, reason = "each test program uses a part of it")]
#[path = "../support/running.rs"]
mod running;
#[expect(dead_code, reason = "each test program uses a part of it")]
#[path = "../support/skip.rs"]
mod skip;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use coinop::sandbox::{Exit, Sandbox};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use serde::{Deserialize, Serialize};

use columns::Column;
use rows::{Refusal, Row};
use running::{Ran, sh};

/// Where it stands, this program runs the row of that name on `local` as the user it is, and prints its verdict.
const ALONE: &str = "COINOP_WORKLOAD";
/// No row takes longer; one that hangs must not hold the others.
const LONGEST: Duration = Duration::from_secs(60);

/// How a row ended, other than by a failure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Verdict {
    Passed,
    /// As it stands in `rows`.
    Refused(String),
    /// The backend has not got this program.
    Absent(String),
    /// The backend cannot start here.
    Skipped(String),
}

type Key = (&'static str, &'static str);
type Table = Arc<Mutex<BTreeMap<Key, Option<Verdict>>>>;

fn main() -> ExitCode {
    // The local backend starts this program again as its helper, as it does the node.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "jail-init") {
        return coinop::sandbox::local::jail_main();
    }
    if let Ok(name) = std::env::var(ALONE) {
        return alone(&name);
    }
    let (tables, arguments): (Vec<_>, Vec<_>) = std::env::args().partition(|argument| argument == "--table");
    let arguments = Arguments::from_iter(arguments);
    let table = Table::default();
    let rows = rows::rows();
    let mut trials = Vec::new();
    for column in columns::columns() {
        for row in &rows {
            let (row, table) = (row.clone(), table.clone());
            trials.push(Trial::ignorable_test(format!("{}::{}", column.name, row.name), move || {
                let key = (row.name, column.name);
                locked(&table).insert(key, None);
                let verdict = match column.uid {
                    Some(uid) => columns::as_user(uid, ALONE, row.name)?,
                    None => run(&column, &row)?,
                };
                locked(&table).insert(key, Some(verdict.clone()));
                Ok(match verdict {
                    Verdict::Passed => Completion::Completed,
                    Verdict::Refused(why) => Completion::ignored_with(format!("refused: {why}")),
                    Verdict::Absent(what) => Completion::ignored_with(format!("no {what} there")),
                    Verdict::Skipped(why) => Completion::ignored_with(format!("skipped: {why}")),
                })
            }));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !tables.is_empty() && !arguments.list {
        print(&rows, &locked(&table));
    }
    conclusion.exit_code()
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn alone(name: &str) -> ExitCode {
    let row = rows::rows().into_iter().find(|row| row.name == name).expect("a row of this name");
    match run(&columns::ordinary(), &row) {
        Ok(verdict) => {
            println!("{}", serde_json::to_string(&verdict).unwrap());
            ExitCode::SUCCESS
        }
        Err(failed) => {
            println!("{}", failed.message().unwrap_or("it failed"));
            ExitCode::FAILURE
        }
    }
}

fn run(column: &Column, row: &Row) -> Result<Verdict, Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let verdict = runtime.block_on(async {
        let place = match column.start().await {
            Ok(place) => place,
            Err(why) => {
                skip::skip(row.name, &why);
                return Ok(Verdict::Skipped(why));
            }
        };
        let watched = !place.backend.caveats().is_empty();
        let sandbox = place.sandbox(row).await;
        let judged = tokio::time::timeout(LONGEST, judge(column, watched, row, &*sandbox));
        let verdict = judged.await.unwrap_or_else(|_| Err(Failed::from(format!("not within {LONGEST:?}"))));
        sandbox.destroy().await.map_err(|why| Failed::from(why.to_string()))?;
        verdict
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    verdict
}

async fn judge(column: &Column, watched: bool, row: &Row, sandbox: &dyn Sandbox) -> Result<Verdict, Failed> {
    for program in row.programs {
        if sh(sandbox, &format!("command -v {program}")).await.exit != Some(Exit::Code { code: 0 }) {
            return Ok(Verdict::Absent((*program).to_owned()));
        }
    }
    let ran = sh(sandbox, row.script).await;
    let failed = |why: &str| Failed::from(format!("{why}\n{}\n{}\n{:?}", ran.out, ran.err, ran.exit));
    let passed = ran.exit == Some(Exit::Code { code: 0 }) && ran.out.contains(row.says);
    let refusal = row.refused.iter().find(|refusal| refusal.applies(column, watched));
    match refusal {
        None if passed => in_time_and_quiet(row, &ran).map(|()| Verdict::Passed).map_err(failed),
        None => Err(failed("it does not work")),
        Some(_) if passed => Err(failed("it works, and stands as refused")),
        Some(Refusal { sign, why, .. }) if ran.out.contains(sign) || ran.err.contains(sign) => {
            Ok(Verdict::Refused((*why).to_owned()))
        }
        Some(Refusal { sign, .. }) => Err(failed(&format!("it is refused, but not with {sign:?}"))),
    }
}

/// What worked may not complain either.
fn in_time_and_quiet(row: &Row, ran: &Ran) -> Result<(), &'static str> {
    match row.complaint {
        Some(complaint) if ran.err.contains(complaint) => Err("it works, but complains"),
        _ => Ok(()),
    }
}

fn print(rows: &[Row], table: &BTreeMap<Key, Option<Verdict>>) {
    let columns = columns::columns();
    let mut notes: Vec<&str> = Vec::new();
    println!("\n{:48}{}", "workload", columns.iter().map(|c| format!("{:14}", c.name)).collect::<String>());
    for row in rows.iter().filter(|row| table.keys().any(|(name, _)| *name == row.name)) {
        let cells = columns.iter().map(|column| {
            let cell = match table.get(&(row.name, column.name)) {
                None => String::new(),
                Some(None) => "FAILED".to_owned(),
                Some(Some(Verdict::Passed)) => "passes".to_owned(),
                Some(Some(Verdict::Absent(what))) => format!("no {what}"),
                Some(Some(Verdict::Skipped(_))) => "skipped".to_owned(),
                Some(Some(Verdict::Refused(why))) => {
                    let at = notes.iter().position(|note| note == why).unwrap_or_else(|| {
                        notes.push(why);
                        notes.len() - 1
                    });
                    format!("refused [{}]", at + 1)
                }
            };
            format!("{cell:14}")
        });
        println!("{:48}{}", row.name, cells.collect::<String>().trim_end());
    }
    println!();
    for (n, note) in notes.iter().enumerate() {
        println!("[{}] {note}", n + 1);
    }
}
