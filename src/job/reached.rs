//! The limit that ended a job, as its customer is told: which, what it allows, what was counted, and the command that ran
//! then. Pure; keeping to the limits is `sandbox`'s.

use serde::Serialize;

use super::Failure;
use super::content::cut;
use crate::agent::{CommandRun, Work};
use crate::market::Code;
use crate::sandbox::{Limit, Policy, Usage};

/// Bytes of the command that are told beside the figures; the report has all of it.
const COMMAND_BYTES: usize = 200;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reached {
    /// The clause of the policy. Milliseconds or bytes, as its name says.
    pub limit: &'static str,
    pub allowed: u64,
    /// What was counted when the job was ended, in the same unit. `None` where nobody counted.
    pub used: Option<u64>,
    /// `None` when no command had begun.
    pub command: Option<String>,
}

impl Reached {
    pub fn new(limit: Limit, work: &Work, policy: &Policy, usage: &Usage) -> Reached {
        let command: Option<&CommandRun> = work.limit().map(|(_, run)| run);
        // At least the limit, by the sandbox's own clock.
        let silent =
            |run: &CommandRun| u64::try_from(run.silent.as_millis()).unwrap_or(u64::MAX).max(policy.idle_ms);
        let (limit, allowed, used) = match limit {
            Limit::Wall => ("wall_ms", policy.wall_ms, Some(usage.wall_ms)),
            Limit::Idle => ("idle_ms", policy.idle_ms, command.map(silent)),
            Limit::Memory => {
                let counted = Some(usage.peak_memory_bytes).filter(|bytes| *bytes > 0);
                ("memory_bytes", policy.memory_bytes, counted)
            }
            Limit::Output => ("output_bytes", policy.output_bytes, Some(work.printed_bytes())),
        };
        let command = command.map(|run| cut(run.command.as_bytes(), COMMAND_BYTES));
        Reached { limit, allowed, used, command }
    }

    pub fn failure(&self) -> Failure {
        let (what, code, unit) = match self.limit {
            "wall_ms" => ("time", Code::Timeout, "ms used"),
            "idle_ms" => ("idle", Code::Timeout, "ms without output or work"),
            "memory_bytes" => ("memory", Code::ResourceLimit, "bytes used"),
            _ => ("output", Code::ResourceLimit, "bytes printed"),
        };
        let allowed = if code == Code::Timeout { time(self.allowed) } else { size(self.allowed) };
        let used = self.used.map(|used| format!(": {used} {unit}")).unwrap_or_default();
        let command = self.command.as_ref().map(|run| format!(", while running `{run}`")).unwrap_or_default();
        Failure::new(code, format!("the job exceeded its {what} limit ({allowed}){used}{command}"))
    }
}

fn time(ms: u64) -> String {
    if ms.is_multiple_of(1000) { format!("{} s", ms / 1000) } else { format!("{ms} ms") }
}

fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let whole = units.into_iter().find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    whole.map_or_else(|| format!("{bytes} bytes"), |(shift, unit)| format!("{} {unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_told_with_what_it_allows_what_was_counted_and_the_command() {
        let reached = |limit, allowed, used, command: Option<&str>| {
            Reached { limit, allowed, used, command: command.map(str::to_owned) }.failure()
        };
        for (told, code, sentence) in [
            (
                reached("wall_ms", 2000, Some(2013), Some("sleep 9")),
                Code::Timeout,
                "the job exceeded its time limit (2 s): 2013 ms used, while running `sleep 9`",
            ),
            (
                reached("idle_ms", 1500, Some(1600), Some("sleep 9")),
                Code::Timeout,
                "the job exceeded its idle limit (1500 ms): 1600 ms without output or work, while running `sleep 9`",
            ),
            (
                reached("memory_bytes", 48 << 20, None, Some("hog")),
                Code::ResourceLimit,
                "the job exceeded its memory limit (48 MiB), while running `hog`",
            ),
            (
                reached("output_bytes", 4097, Some(4097), None),
                Code::ResourceLimit,
                "the job exceeded its output limit (4097 bytes): 4097 bytes printed",
            ),
        ] {
            assert_eq!((told.code, told.reason.as_str()), (code, sentence));
        }
    }
}
