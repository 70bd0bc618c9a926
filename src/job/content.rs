//! A result's content from what the agent did: report, patch, JSON or text, cut to fit an event. Pure; the
//! signing is `answer`'s business.

use serde::Serialize;

use super::Failure;
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

#[derive(Serialize)]
struct Report<'a> {
    exit_code: i32,
    stdout: String,
    stderr: String,
    command_results: Vec<CommandResult<'a>>,
    artifacts: &'a [Artifact],
    usage: UsageOut,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    warnings: &'a [String],
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

#[derive(Serialize)]
struct UsageOut {
    cpu_time_ms: u64,
    peak_memory_bytes: u64,
    disk_writes_bytes: u64,
    network_bytes: u64,
}

/// The report of all commands, with the longest outputs that `cap_bytes` allows.
///
/// # Errors
/// `result_too_large` when it does not fit even with all output left out.
pub fn report(
    work: &Work,
    artifacts: &[Artifact],
    usage: Usage,
    warnings: &[String],
    cap_bytes: usize,
) -> Result<Content, Failure> {
    let runs: Vec<_> =
        work.commands.iter().map(|c| (c, c.printed(Stream::Stdout), c.printed(Stream::Stderr))).collect();
    let mut each = cap_bytes / 2;
    loop {
        let mut all = [Vec::new(), Vec::new()];
        for (_, stdout, stderr) in &runs {
            all[0].extend_from_slice(stdout);
            all[1].extend_from_slice(stderr);
        }
        let report = Report {
            exit_code: work.exit_code(),
            stdout: cut(&all[0], each),
            stderr: cut(&all[1], each),
            command_results: runs
                .iter()
                .map(|(run, stdout, stderr)| CommandResult {
                    command: &run.command,
                    exit_code: exit_code(run.exit),
                    stdout: cut(stdout, each),
                    stderr: cut(stderr, each),
                    stdout_bytes: stdout.len(),
                    stderr_bytes: stderr.len(),
                    duration_ms: run.duration.as_millis().try_into().unwrap_or(u64::MAX),
                })
                .collect(),
            artifacts,
            usage: UsageOut {
                cpu_time_ms: usage.cpu_ms,
                peak_memory_bytes: usage.peak_memory_bytes,
                disk_writes_bytes: usage.disk_written_bytes,
                network_bytes: 0,
            },
            warnings,
        };
        let text = serde_json::to_string(&report).map_err(|e| Failure::new(Code::Internal, e.to_string()))?;
        if text.len() <= cap_bytes {
            return Ok(Content { text, tags: Vec::new() });
        }
        if each == 0 {
            return Err(too_large("the report", text.len(), cap_bytes));
        }
        each = if each < 64 { 0 } else { each / 2 };
    }
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
                output,
            }],
        }
    }

    #[test]
    fn a_report_fits_its_cap_however_much_was_printed() {
        let noisy = work(&[1u8; 1_000_000], 0);
        let content = report(&noisy, &[], Usage::default(), &[], 8_192).unwrap();
        assert!(content.text.len() <= 8_192);
        let value: serde_json::Value = serde_json::from_str(&content.text).unwrap();
        assert_eq!(value["command_results"][0]["stdout_bytes"], 1_000_000);
    }

    #[test]
    fn a_report_that_cannot_fit_says_so() {
        let many = Work { commands: vec![work(b"", 0).commands[0].clone(); 500] };
        let failure = report(&many, &[], Usage::default(), &[], 8_192).unwrap_err();
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
