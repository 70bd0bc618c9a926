//! A result's content from what the agent did: report, patch, JSON or text, cut to fit an event. Pure; the
//! signing is `answer`'s business.

use serde::Serialize;

use super::Failure;
use super::reached::Reached;
use crate::agent::{Stream, Work, exit_code};
use crate::market::Code;
use crate::repo::Patch;
use crate::sandbox::{Exit, Usage};

/// An artifact that the order named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Artifact {
    pub path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The plain content and the `["result", key, value]` tags that go with it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Content {
    pub text: String,
    pub tags: Vec<(String, String)>,
}

/// What a run leaves for its report.
#[derive(Debug, Default)]
pub struct Ran {
    pub work: Work,
    pub artifacts: Vec<Artifact>,
    pub warnings: Vec<String>,
    pub usage: Usage,
    /// The limit that ended it, if one did.
    pub reached: Option<Reached>,
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Ended<'a>>,
    exit_code: i32,
    /// For readers of the 5930 profile, which has both names twice. What was printed stands with its command.
    stdout: &'static str,
    stderr: &'static str,
    command_results: Vec<CommandResult<'a>>,
    artifacts: &'a [Artifact],
    usage: UsageOut,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    warnings: &'a [String],
}

/// Why there is no result.
#[derive(Serialize)]
struct Ended<'a> {
    code: Code,
    reason: &'a str,
    #[serde(flatten)]
    reached: Option<&'a Reached>,
}

#[derive(Serialize)]
struct CommandResult<'a> {
    command: &'a str,
    exit_code: i32,
    stdout: String,
    stderr: String,
    /// Bytes printed; more than what is shown when the output was cut.
    stdout_bytes: usize,
    stderr_bytes: usize,
    duration_ms: u64,
}

/// `None` is what is not known.
#[derive(Serialize)]
struct UsageOut {
    cpu_time_ms: Option<u64>,
    peak_memory_bytes: u64,
    disk_writes_bytes: Option<u64>,
    network_bytes: u64,
}

/// The report of all commands, with at most about so many bytes of each stream; of a job that failed, with the reason.
///
/// # Errors
/// `internal`, when it cannot be written as JSON.
pub fn report(ran: &Ran, failure: Option<&Failure>, stream_bytes: usize) -> Result<Content, Failure> {
    let command_results = ran.work.commands.iter().map(|run| {
        let (stdout, stderr) = (run.printed(Stream::Stdout), run.printed(Stream::Stderr));
        CommandResult {
            command: &run.command,
            exit_code: exit_code(run.exit),
            stdout: cut(stdout, stream_bytes),
            stderr: cut(stderr, stream_bytes),
            stdout_bytes: stdout.len(),
            stderr_bytes: stderr.len(),
            duration_ms: run.duration.as_millis().try_into().unwrap_or(u64::MAX),
        }
    });
    let reached = ran.reached.as_ref();
    let report = Report {
        error: failure.map(|why| Ended { code: why.code, reason: &why.reason, reached }),
        exit_code: ran.work.exit_code(),
        stdout: "",
        stderr: "",
        command_results: command_results.collect(),
        artifacts: &ran.artifacts,
        usage: UsageOut {
            cpu_time_ms: ran.usage.whole_cpu_ms(),
            peak_memory_bytes: ran.usage.peak_memory_bytes,
            // No kernel counts what is written to files in memory.
            disk_writes_bytes: None,
            network_bytes: 0,
        },
        warnings: &ran.warnings,
    };
    let text = serde_json::to_string(&report).map_err(|e| Failure::new(Code::Internal, e.to_string()))?;
    Ok(Content { text, tags: Vec::new() })
}

/// How near to the most that fits `longest` comes.
const STEP: usize = 16;

/// What `make` makes of the largest number up to `most` that it does not call `result_too_large`, within `STEP`.
///
/// # Errors
/// Any other of `make`'s; `result_too_large` when even 0 is.
pub(super) fn longest<T>(
    most: usize,
    mut make: impl FnMut(usize) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let too_large =
        |made: &Result<T, Failure>| made.as_ref().is_err_and(|failure| failure.code == Code::ResultTooLarge);
    let whole = make(most);
    if !too_large(&whole) {
        return whole;
    }
    let (mut best, mut fits, mut over) = (None, 0, most);
    while over - fits > STEP {
        let half = fits + (over - fits) / 2;
        let made = make(half);
        if too_large(&made) {
            over = half;
        } else {
            (best, fits) = (Some(made?), half);
        }
    }
    best.map_or_else(|| make(0), Ok)
}

/// The diff, with the figures of the 5932 profile. `ignored`: new files that are not in it, since a `.gitignore` names
/// them.
///
/// # Errors
/// `invalid_input` when a command failed, since half a change is none; `result_too_large`.
pub fn patch(
    work: &Work,
    patch: Patch,
    ignored: u64,
    warnings: &[String],
    cap_bytes: usize,
) -> Result<Content, Failure> {
    must_have_worked(work)?;
    if patch.diff.len() > cap_bytes {
        return Err(too_large("the patch", patch.diff.len(), cap_bytes));
    }
    let skipped = patch.skipped.iter().map(|s| ("skipped".to_string(), format!("{}: {}", s.path, s.why)));
    // What is not UTF-8 stands in it as a binary patch.
    let diff =
        String::from_utf8(patch.diff).map_err(|_| Failure::new(Code::Internal, "the patch is not UTF-8"))?;
    let duration: u128 = work.commands.iter().map(|c| c.duration.as_millis()).sum();
    let mut tags = vec![
        ("files_changed".to_string(), patch.files_changed.to_string()),
        ("lines_added".to_string(), patch.lines_added.to_string()),
        ("lines_removed".to_string(), patch.lines_removed.to_string()),
        ("duration_ms".to_string(), duration.to_string()),
        ("ignored_files".to_string(), ignored.to_string()),
    ];
    tags.extend(skipped.take(8));
    // Before those of the repository: these are about what the customer is about to apply.
    let links = patch.links_out.iter().map(|link| ("warning".to_string(), link.to_string()));
    tags.extend(links.take(MAX_LINKS));
    if let Some(more) = patch.links_out.len().checked_sub(MAX_LINKS).filter(|more| *more > 0) {
        tags.push(("warning".to_string(), format!("{more} more symlinks lead out of the repository")));
    }
    tags.extend(warning_tags(warnings));
    Ok(Content { text: diff, tags })
}

/// The last command's stdout; `json` says that it must be one JSON value.
///
/// # Errors
/// `internal` when the type's own commands failed or printed something else; `result_too_large`.
pub fn printed(work: &Work, json: bool, warnings: &[String], cap_bytes: usize) -> Result<Content, Failure> {
    must_have_worked(work)?;
    let stdout = work.commands.last().map(|c| c.printed(Stream::Stdout)).unwrap_or_default();
    let text = String::from_utf8_lossy(stdout).into_owned();
    if json && serde_json::from_str::<serde::de::IgnoredAny>(&text).is_err() {
        return Err(Failure::new(Code::Internal, "the job type's commands printed no valid JSON"));
    }
    if text.len() > cap_bytes {
        return Err(too_large("the output", text.len(), cap_bytes));
    }
    Ok(Content { text, tags: warning_tags(warnings).collect() })
}

fn must_have_worked(work: &Work) -> Result<(), Failure> {
    let Some(failed) = work.commands.iter().find(|c| c.exit != (Exit::Code { code: 0 })) else {
        return Ok(());
    };
    let mut shown = failed.printed(Stream::Stderr);
    if shown.is_empty() {
        shown = failed.printed(Stream::Stdout);
    }
    let reason = format!(
        "`{}` ended with exit code {}: {}",
        cut(failed.command.as_bytes(), 200),
        exit_code(failed.exit),
        cut(shown, 400)
    );
    Err(Failure::new(Code::CommandFailed, reason))
}

/// Symlinks of a patch that are named one by one.
const MAX_LINKS: usize = 20;

fn warning_tags(warnings: &[String]) -> impl Iterator<Item = (String, String)> + '_ {
    warnings.iter().take(8).map(|w| ("warning".to_string(), w.clone()))
}

fn too_large(what: &str, bytes: usize, cap_bytes: usize) -> Failure {
    Failure::new(Code::ResultTooLarge, format!("{what} has {bytes} bytes, at most {cap_bytes} fit a result"))
}

/// At most about `cap` bytes of text: the beginning and the end, with a line between that says what is
/// missing. Never cuts within a character.
pub fn cut(bytes: &[u8], cap: usize) -> String {
    if bytes.len() <= cap {
        return String::from_utf8_lossy(bytes).into_owned();
    }
    // A cut before a continuation byte would split a character; text has at most three of them in a row.
    let splits = |at: usize| bytes.get(at).is_some_and(|b| (0x80..0xC0).contains(b));
    let (mut head, mut tail) = (cap / 2, bytes.len() - cap / 2);
    for _ in 0..3 {
        head -= usize::from(head > 0 && splits(head));
        tail += usize::from(splits(tail));
    }
    format!(
        "{}\n[… {} bytes left out …]\n{}",
        String::from_utf8_lossy(bytes.get(..head).unwrap_or_default()),
        tail - head,
        String::from_utf8_lossy(bytes.get(tail..).unwrap_or_default()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::{CommandRun, Output};
    use std::time::Duration;

    fn work(stdout: &[u8], code: i32) -> Work {
        let mut output = Output::default();
        output.push(Stream::Stdout, stdout);
        Work {
            commands: vec![CommandRun {
                command: "x".into(),
                exit: Exit::Code { code },
                duration: Duration::from_millis(5),
                silent: Duration::ZERO,
                output,
            }],
        }
    }

    fn ran(stdout: &[u8]) -> Ran {
        Ran { work: work(stdout, 0), ..Ran::default() }
    }

    /// The longest report of at most so many bytes.
    fn within(ran: &Ran, cap_bytes: usize) -> Result<String, Failure> {
        longest(cap_bytes, |each| match report(ran, None, each)?.text {
            long if long.len() > cap_bytes => Err(too_large("the report", long.len(), cap_bytes)),
            text => Ok(text),
        })
    }

    #[test]
    fn a_report_takes_all_the_room_there_is_and_no_more_whatever_was_printed() {
        for stdout in [&[1u8; 1_000_000][..], &[b'x'; 8_193], &[b'"'; 9_000], &[0xff; 50_000]] {
            let text = within(&ran(stdout), 8_192).unwrap();
            assert!(text.len() <= 8_192 && text.len() > 8_192 - 6 * STEP - 40, "{}", text.len());
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(value["command_results"][0]["stdout_bytes"], stdout.len());
        }
        assert!(within(&ran(&[b'x'; 7_000]), 8_192).unwrap().contains(&"x".repeat(7_000)), "it fits whole");
    }

    #[test]
    fn each_stream_stands_in_a_report_once() {
        let text = report(&ran(b"only-once"), None, 100).unwrap().text;
        assert_eq!(text.matches("only-once").count(), 1, "{text}");
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&value["stdout"], &value["stderr"]),
            (&"".into(), &"".into()),
            "the profile's names stay"
        );
    }

    #[test]
    fn what_was_not_counted_is_null_in_a_report_and_never_zero() {
        let usage = Usage { cpu_ms: 7, cpu_is_partial: true, ..Usage::default() };
        let report_of = |usage| -> serde_json::Value {
            let ran = Ran { usage, ..ran(b"") };
            serde_json::from_str(&report(&ran, None, 0).unwrap().text).unwrap()
        };
        assert!(report_of(usage)["usage"]["cpu_time_ms"].is_null());
        assert!(report_of(usage)["usage"]["disk_writes_bytes"].is_null());
        assert_eq!(report_of(Usage { cpu_is_partial: false, ..usage })["usage"]["cpu_time_ms"], 7);
    }

    #[test]
    fn a_report_that_cannot_fit_says_so() {
        let many = Work { commands: vec![work(b"", 0).commands[0].clone(); 500] };
        let failure = within(&Ran { work: many, ..Ran::default() }, 8_192).unwrap_err();
        assert_eq!(failure.code, Code::ResultTooLarge);
    }

    #[test]
    fn text_is_never_cut_within_a_character() {
        let text = "ä€😀".repeat(100);
        for cap in 0..40 {
            let shown = cut(text.as_bytes(), cap);
            assert!(!shown.contains('\u{FFFD}'), "{cap}: {shown}");
        }
    }

    #[test]
    fn half_a_change_is_no_patch() {
        let failure = patch(&work(b"no such file", 2), Patch::default(), 0, &[], 1000).unwrap_err();
        assert_eq!(failure.code, Code::CommandFailed);
        assert!(failure.reason.contains("no such file"));
    }

    #[test]
    fn output_that_should_be_json_and_is_not_fails() {
        assert_eq!(printed(&work(b"{", 0), true, &[], 100).unwrap_err().code, Code::Internal);
        assert_eq!(printed(&work(b"{}", 0), true, &[], 100).unwrap().text, "{}");
    }
}
