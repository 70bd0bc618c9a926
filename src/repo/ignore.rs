//! Which new files of a job its patch leaves out: what the `.gitignore` files of the base and of the job name. Whether
//! a path is new is the caller's to know: what git tracks is never ignored.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use ignore::gitignore::{Gitignore, GitignoreBuilder};

use super::{Base, Error};
use crate::sandbox::{Change, Content, Tree};

/// The name of the files that hold the rules.
pub(super) const NAME: &[u8] = b".gitignore";
/// Files of rules read; more are an error.
pub(super) const MAX_FILES: usize = 1_000;
/// Bytes of all of them.
pub const MAX_BYTES: u64 = 256 * 1024;
/// Rules in all of them.
const MAX_RULES: usize = 4_000;
/// Bytes of one rule; a longer one is passed over, as one that cannot be read.
const MAX_RULE: usize = 1_024;
/// Time that all questions together may take. The matching is linear in rules and path, but both are a stranger's.
const MAX_TIME: Duration = Duration::from_secs(10);

/// The rules of one workspace.
#[derive(Debug)]
pub struct Ignore {
    /// By folder, `""` for the top.
    levels: BTreeMap<Vec<u8>, Gitignore>,
    /// The folder asked about last, and the answer: questions come folder by folder.
    last: Mutex<Option<(Vec<u8>, bool)>>,
    spent_us: AtomicU64,
}

/// Whether this path is a file of rules.
pub fn is_rules(path: &[u8]) -> bool {
    path.rsplit(|b| *b == b'/').next() == Some(NAME)
}

/// Whether a change may change the rules of a workspace on this base.
pub fn touches_rules(base: &Base, change: &Change) -> bool {
    is_rules(&change.path) || base.meta.ignores.iter().any(|rules| is_at_or_below(rules, &change.path))
}

/// Whether the base has this file of rules.
pub fn is_tracked(base: &Base, path: &[u8]) -> bool {
    base.meta.ignores.iter().any(|rules| rules == path)
}

fn is_at_or_below(path: &[u8], above: &[u8]) -> bool {
    path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

impl Ignore {
    /// The rules of `base` after `changes`. Blocks.
    ///
    /// # Errors
    /// `TooLarge` for more rules than are read.
    pub fn read(base: &Base, changes: &[Change]) -> Result<Ignore, Error> {
        let mut files: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut left = MAX_BYTES;
        let too_large = || Error::TooLarge { what: "bytes of .gitignore files", cap: MAX_BYTES };
        for path in &base.meta.ignores {
            if changes.iter().any(|change| is_at_or_below(path, &change.path)) {
                continue;
            }
            let at = base.path().join(Path::new(OsStr::from_bytes(path)));
            let mut bytes = Vec::new();
            File::open(at)
                .and_then(|file| file.take(left + 1).read_to_end(&mut bytes))
                .map_err(Error::host("read a base's .gitignore"))?;
            left = left.checked_sub(bytes.len() as u64).ok_or_else(too_large)?;
            files.insert(folder(path).to_vec(), bytes);
        }
        for change in changes.iter().filter(|change| is_rules(&change.path)) {
            // A symlink of that name is not followed; git does not follow one, either.
            if let Content::File { bytes, .. } = &change.to {
                left = left.checked_sub(bytes.len() as u64).ok_or_else(too_large)?;
                files.insert(folder(&change.path).to_vec(), bytes.clone());
            }
        }
        Ignore::new(files)
    }

    fn new(files: BTreeMap<Vec<u8>, Vec<u8>>) -> Result<Ignore, Error> {
        if files.len() > MAX_FILES {
            return Err(Error::TooLarge { what: ".gitignore files", cap: MAX_FILES as u64 });
        }
        let mut rules = 0;
        let mut levels = BTreeMap::new();
        for (folder, bytes) in files {
            let mut builder = GitignoreBuilder::new(".");
            let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
            for line in text.split(|b| *b == b'\n') {
                let line = line.strip_suffix(b"\r").unwrap_or(line);
                let Ok(line) = std::str::from_utf8(line) else { continue };
                if line.is_empty() || line.starts_with('#') || line.len() > MAX_RULE {
                    continue;
                }
                rules += 1;
                if rules > MAX_RULES {
                    return Err(Error::TooLarge { what: "rules in .gitignore files", cap: MAX_RULES as u64 });
                }
                if let Err(e) = builder.add_line(None, &literal_braces(line)) {
                    tracing::debug!(error = %e, "a rule of a .gitignore is passed over");
                }
            }
            let built = builder.build().map_err(|_| Error::TooLarge {
                what: "work to match .gitignore rules",
                cap: MAX_RULES as u64,
            })?;
            levels.insert(folder, built);
        }
        Ok(Ignore { levels, last: Mutex::new(None), spent_us: AtomicU64::new(0) })
    }

    /// Whether git would ignore this path, if it does not track it. Once all questions have taken too long, everything
    /// is: see `in_time`.
    pub fn is_ignored(&self, path: &[u8], is_folder: bool) -> bool {
        if self.levels.is_empty() {
            return false;
        }
        if self.in_time().is_err() {
            return true;
        }
        let began = Instant::now();
        let above = folder(path);
        let ignored = (!above.is_empty() && self.is_folder_ignored(above)) || self.is_named(path, is_folder);
        self.spent_us.fetch_add(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX), Relaxed);
        ignored
    }

    /// # Errors
    /// `TooLarge`, when the questions took so long that the answers are not to be used.
    pub fn in_time(&self) -> Result<(), Error> {
        if Duration::from_micros(self.spent_us.load(Relaxed)) < MAX_TIME {
            return Ok(());
        }
        Err(Error::TooLarge { what: "seconds to match .gitignore rules", cap: MAX_TIME.as_secs() })
    }

    /// Whether the folder or one above it is ignored; nothing below such a one can be brought back.
    fn is_folder_ignored(&self, path: &[u8]) -> bool {
        if let Ok(last) = self.last.lock()
            && let Some((asked, answer)) = last.as_ref()
            && asked == path
        {
            return *answer;
        }
        let ends = path.iter().enumerate().filter(|(_, b)| **b == b'/').map(|(at, _)| at).chain([path.len()]);
        let answer = ends.into_iter().any(|end| self.is_named(path.get(..end).unwrap_or_default(), true));
        if let Ok(mut last) = self.last.lock() {
            *last = Some((path.to_vec(), answer));
        }
        answer
    }

    /// The last rule that names the path, of the file nearest to it.
    fn is_named(&self, path: &[u8], is_folder: bool) -> bool {
        let mut level = Some(folder(path));
        while let Some(at) = level {
            if let Some(rules) = self.levels.get(at) {
                let below = if at.is_empty() { path } else { path.get(at.len() + 1..).unwrap_or_default() };
                let found = rules.matched(Path::new(OsStr::from_bytes(below)), is_folder);
                if !found.is_none() {
                    return found.is_ignore();
                }
            }
            level = (!at.is_empty()).then(|| folder(at));
        }
        false
    }
}

/// The folder that a path is in; empty for the top.
fn folder(path: &[u8]) -> &[u8] {
    path.iter().rposition(|b| *b == b'/').and_then(|at| path.get(..at)).unwrap_or_default()
}

/// Braces are plain characters to git, and alternatives to the crate.
fn literal_braces(rule: &str) -> String {
    let mut out = String::with_capacity(rule.len());
    let mut escaped = false;
    let mut in_class = false;
    for c in rule.chars() {
        if matches!(c, '{' | '}') && !escaped && !in_class {
            out.push('\\');
        }
        match c {
            '[' if !escaped => in_class = true,
            ']' if !escaped => in_class = false,
            _ => {}
        }
        escaped = c == '\\' && !escaped;
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(files: &[(&str, &str)]) -> Ignore {
        let files = files.iter().map(|(at, text)| (at.as_bytes().to_vec(), text.as_bytes().to_vec()));
        Ignore::new(files.collect()).unwrap()
    }

    #[test]
    fn rules_mean_what_they_mean_to_git() {
        let ignore = rules(&[
            ("", "*.o\n/build/\n__pycache__/\n!keep.o\ndocs/*.html\n\\#x\na{b,c}\n*.log\r\n"),
            ("src", "!wanted.log\n/gen\n"),
            (".venv", "*\n"),
        ]);
        for path in [
            "a.o",
            "deep/er/a.o",
            "build/out",
            "build/keep.o",
            "x/__pycache__/a.pyc",
            "docs/a.html",
            "#x",
            "a{b,c}",
            "a.log",
            "src/gen",
            ".venv/.gitignore",
            ".venv/lib/a",
        ] {
            assert!(ignore.is_ignored(path.as_bytes(), false), "{path}");
        }
        for path in [
            "keep.o",
            "x/keep.o",
            "x/build/out",
            "build",
            "__pycache__",
            "docs/x/a.html",
            "ab",
            "src/wanted.log",
            "src/x/gen",
            "gen",
            "venv/a",
        ] {
            assert!(!ignore.is_ignored(path.as_bytes(), false), "{path}");
        }
        assert!(ignore.is_ignored(b"build", true));
    }

    #[test]
    fn more_rules_than_are_read_are_an_error_by_name() {
        let many = "a\n".repeat(MAX_RULES + 1);
        let files = BTreeMap::from([(Vec::new(), many.into_bytes())]);
        let error = Ignore::new(files).unwrap_err();
        assert!(error.to_string().contains("rules in .gitignore files over 4000"), "{error}");
        let files = (0..=MAX_FILES).map(|n| (n.to_string().into_bytes(), Vec::new())).collect();
        assert!(Ignore::new(files).is_err());
    }

    #[test]
    fn a_rule_that_cannot_be_read_is_passed_over_and_the_others_stay() {
        let long = "x".repeat(MAX_RULE + 1);
        let text = [b"[z-a\n\xff\xfe\n".as_slice(), long.as_bytes(), b"\n*.o\n"].concat();
        let ignore = Ignore::new(BTreeMap::from([(Vec::new(), text)])).unwrap();
        assert!(ignore.is_ignored(b"a.o", false));
        assert!(!ignore.is_ignored(long.as_bytes(), false));
    }

    #[test]
    fn rules_made_to_take_long_end_in_an_error_and_not_in_hours() {
        let rule = |n: usize| format!("**/{n}*a*a*a*a*a*a*a*a*/**/*b*b*b*b*b*b\n");
        let ignore = rules(&[("", &(0..500).map(rule).collect::<String>())]);
        let began = Instant::now();
        let path = "1aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa/".repeat(10);
        for n in 0..20 {
            ignore.is_ignored(format!("{path}{n}").as_bytes(), false);
        }
        assert!(began.elapsed() < MAX_TIME * 3, "{:?}", began.elapsed());
    }
}
