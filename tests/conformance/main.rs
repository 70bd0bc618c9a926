//! The conformance suite: every clause of the traits `Backend` and `Sandbox` as a case, run on every backend. A case
//! holds, or the backend refuses its clause by name. This file runs them; `--table` shows them case by backend.

mod admit;
mod case;
mod changes;
mod changes_caps;
#[expect(dead_code, reason = "each test program uses a part of it")]
#[path = "../support/engine.rs"]
mod engine;
mod exec;
mod files;
mod fixtures;
mod lifecycle;
mod limits;
mod pace;
#[path = "../support/running.rs"]
mod running;
#[expect(dead_code, reason = "no case here needs git")]
#[path = "../support/skip.rs"]
mod skip;
mod starting;
mod streams;
mod table;
mod usage;
mod walls;

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use case::{Case, Verdict};
use fixtures::{Column, User};
use table::Table;

/// Where it stands, this program runs the case of that name on `local` as the user it is, and prints its verdict.
const ALONE: &str = "COINOP_CONFORMANCE_CASE";
/// No case takes longer; one that hangs must not hold the others.
const LONGEST: Duration = Duration::from_secs(90);

/// All cases, by the file they stand in.
fn groups() -> Vec<(&'static str, Vec<Case>)> {
    vec![
        ("lifecycle", lifecycle::cases()),
        ("starting", starting::cases()),
        ("exec", exec::cases()),
        ("streams", streams::cases()),
        ("files", files::cases()),
        ("changes", changes::cases()),
        ("changes_caps", changes_caps::cases()),
        ("limits", limits::cases()),
        ("pace", pace::cases()),
        ("walls", walls::cases()),
        ("usage", usage::cases()),
        ("admit", admit::cases()),
    ]
}

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
    let wanted = !tables.is_empty() || std::env::var_os("CONFORMANCE_TABLE").is_some();
    let table = Table::default();
    let mut trials = Vec::new();
    for column in fixtures::columns() {
        let wanted = |group: &str| column.groups.is_empty() || column.groups.contains(&group);
        let cases = groups().into_iter().filter(|(group, _)| wanted(group));
        for case in cases.flat_map(|(_, cases)| cases) {
            let table = table.clone();
            let name = format!("{}::{}", column.name, case.name);
            trials.push(Trial::ignorable_test(name.clone(), move || {
                table.record(case.name, column.name, None);
                let verdict = verdict(&column, case, &name)?;
                table.record(case.name, column.name, Some(verdict.clone()));
                Ok(match verdict {
                    Verdict::Held => Completion::Completed,
                    Verdict::Refused { clause, why } => {
                        Completion::ignored_with(format!("refused: {clause}: {why}"))
                    }
                    Verdict::Skipped { why } => Completion::ignored_with(format!("skipped: {why}")),
                })
            }));
        }
    }
    if fixtures::podman_host().is_none() && !arguments.list {
        eprintln!("SKIPPED podman::*: E2E_PODMAN_HOST names no Podman (`.ci/podman start` starts one)");
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if wanted && !arguments.list {
        table.print(&groups(), &fixtures::columns());
    }
    conclusion.exit_code()
}

fn verdict(column: &Column, case: Case, name: &str) -> Result<Verdict, Failed> {
    match column.user {
        Some(user) => as_user(user, case.name),
        None => Ok(run(column, case, name)),
    }
}

/// Runs a case on a backend made for it. A case that fails panics.
fn run(column: &Column, case: Case, name: &str) -> Verdict {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().unwrap();
    let verdict = runtime.block_on(async {
        let fixture = match (column.start)().await {
            Ok(fixture) => fixture,
            Err(why) => return skipped(name, &why),
        };
        if case.programs && !fixture.runs_programs() {
            return Verdict::Skipped { why: "runs no program".to_owned() };
        }
        let running = tokio::time::timeout(LONGEST, (case.run)(&fixture));
        running.await.unwrap_or_else(|_| panic!("{name} did not end within {LONGEST:?}"))
    });
    // A read that a case gave up on may still wait in a thread of the pool.
    runtime.shutdown_timeout(Duration::from_secs(5));
    verdict
}

/// Runs a case in a process of this user, who owns nothing but a folder for temporary files.
fn as_user(User { uid, bases_group }: User, case: &str) -> Result<Verdict, Failed> {
    let home = tempfile::Builder::new().prefix("coinop-ordinary").tempdir_in("/var/tmp").unwrap();
    if std::os::unix::fs::chown(home.path(), Some(uid), Some(bases_group)).is_err() {
        return Ok(skipped(case, "this root has no other user to be"));
    }
    // What is made below belongs to the same group.
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o2755)).unwrap();
    // By this link a user may start the program even where its path is closed to others.
    let mut child = std::process::Command::new("/proc/self/exe");
    child.env(ALONE, case).env("TMPDIR", home.path()).env("HOME", home.path()).current_dir("/");
    let output = match child.uid(uid).gid(uid).output() {
        Err(why) if why.kind() == ErrorKind::PermissionDenied => {
            return Ok(skipped(case, "this program's file is closed to other users"));
        }
        output => output?,
    };
    let said = String::from_utf8_lossy(&output.stdout);
    match said.lines().last().map(serde_json::from_str) {
        Some(Ok(verdict)) if output.status.success() => Ok(verdict),
        _ => Err(Failed::from(format!("{said}{}", String::from_utf8_lossy(&output.stderr)))),
    }
}

/// What the host lacks: told aloud, and a failure where parts are required.
fn skipped(case: &str, why: &str) -> Verdict {
    skip::skip(case, why);
    Verdict::Skipped { why: why.to_owned() }
}

fn alone(name: &str) -> ExitCode {
    let all = groups().into_iter().flat_map(|(_, cases)| cases);
    let case = all.into_iter().find(|case| case.name == name).expect("a case of this name");
    let column = fixtures::columns()[0];
    let verdict = run(&column, case, &format!("{} as uid {}::{name}", column.name, nix::unistd::geteuid()));
    println!("{}", serde_json::to_string(&verdict).unwrap());
    ExitCode::SUCCESS
}
