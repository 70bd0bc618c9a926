//! What of a job's changes goes into its patch: all that git tracks, and of what is new only what no `.gitignore`
//! names. What a rule means is `repo`'s to know, what changed the sandbox's.

use std::sync::Arc;

use super::runner::sandbox_failure;
use super::{Failure, repo_failure};
use crate::market::Code;
use crate::repo::{Base, Ignore, ignore};
use crate::sandbox::{Change, Changes, Content, Error, LeaveOut, Sandbox};

/// Times that the rules may turn out to be others. Each time those of one more level of folders are known.
const MAX_ROUNDS: usize = 16;

/// The changes to deliver, at most `cap_bytes` of them, and how many new files were left out. A job often brings rules
/// of its own (`.venv/.gitignore`); then its changes are gone through again.
///
/// # Errors
/// The sandbox's; `resource_limit` for more changes than the cap and for more rules than are read.
pub(super) async fn changes(sandbox: &dyn Sandbox, base: &Arc<Base>, cap: u64) -> Result<Changes, Failure> {
    let mut own: Vec<Change> = Vec::new();
    for _ in 0..MAX_ROUNDS {
        let rules = Arc::new(rules(base, own.clone()).await?);
        let found = sandbox.changes_except(cap, leave_out(&rules, false)).await;
        let now = match &found {
            Ok(found) => touching(base, &found.delivered),
            // With the job's own rules it may be less.
            Err(Error::TooLarge { .. }) => {
                let found = sandbox.changes_except(cap, leave_out(&rules, true)).await;
                touching(base, &found.map_err(|e| sandbox_failure(&e))?.delivered)
            }
            Err(_) => Vec::new(),
        };
        rules.in_time().map_err(|e| repo_failure(&e))?;
        if now == own || matches!(&found, Err(e) if !matches!(e, Error::TooLarge { .. })) {
            return found.map(|found| finish(found, &rules, base)).map_err(|e| sandbox_failure(&e));
        }
        own = now;
    }
    Err(Failure::new(Code::ResourceLimit, "the job's .gitignore files lie too deep in one another"))
}

async fn rules(base: &Arc<Base>, own: Vec<Change>) -> Result<Ignore, Failure> {
    let base = Arc::clone(base);
    let read = tokio::task::spawn_blocking(move || Ignore::read(&base, &own)).await;
    read.map_err(|e| Failure::new(Code::Internal, e.to_string()))?.map_err(|e| repo_failure(&e))
}

fn touching(base: &Base, changes: &[Change]) -> Vec<Change> {
    changes.iter().filter(|change| ignore::touches_rules(base, change)).cloned().collect()
}

/// What the rules name, but for the files of rules themselves, which must be read; with `all_new`, all other new files.
fn leave_out(rules: &Arc<Ignore>, all_new: bool) -> LeaveOut {
    let rules = Arc::clone(rules);
    Arc::new(move |path, is_folder| {
        let keep = !is_folder && ignore::is_rules(path);
        !keep && ((all_new && !is_folder) || rules.is_ignored(path, is_folder))
    })
}

/// Leaves out those new files of rules that were kept only to be read.
fn finish(mut found: Changes, rules: &Ignore, base: &Base) -> Changes {
    let before = found.delivered.len();
    found.delivered.retain(|change| {
        change.to == Content::Deleted
            || !ignore::is_rules(&change.path)
            || ignore::is_tracked(base, &change.path)
            || !rules.is_ignored(&change.path, false)
    });
    found.left_out += (before - found.delivered.len()) as u64;
    found
}
