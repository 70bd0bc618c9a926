//! Writes one file's change in git's patch format. The lines that differ are libgit2's finding; the headers,
//! the quoting of names and the binary form are ours, because libgit2's own printer makes patches that
//! `git apply` refuses (a binary file of which only the mode changed). Which files differ is decided in `patch`.

use std::io::Write;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use git2::{DiffOptions, Patch};

use super::{Error, base85};

/// One side of a change.
#[derive(Debug, Clone, Copy)]
pub(super) struct Side<'a> {
    pub mode: u32,
    /// 40 hex digits.
    pub id: &'a str,
    pub bytes: &'a [u8],
}

/// Lines that came and went.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lines {
    pub added: u64,
    pub removed: u64,
}

const NO_ID: &str = "0000000000000000000000000000000000000000";

/// Appends the change from `old` to `new` at `path`. Both of one kind (a file or a symlink), or one absent.
pub(super) fn file(
    out: &mut Vec<u8>,
    path: &[u8],
    old: Option<Side<'_>>,
    new: Option<Side<'_>>,
) -> Result<Lines, Error> {
    let (from, to) = (quoted(b"a/", path), quoted(b"b/", path));
    out.extend_from_slice(&[b"diff --git ".as_slice(), &from, b" ", &to, b"\n"].concat());
    match (&old, &new) {
        (None, Some(new)) => out.extend_from_slice(format!("new file mode {:o}\n", new.mode).as_bytes()),
        (Some(old), None) => out.extend_from_slice(format!("deleted file mode {:o}\n", old.mode).as_bytes()),
        (Some(old), Some(new)) if old.mode != new.mode => {
            out.extend_from_slice(format!("old mode {:o}\nnew mode {:o}\n", old.mode, new.mode).as_bytes());
        }
        _ => {}
    }
    let id = |s: &Option<Side<'_>>| s.map_or(NO_ID.to_string(), |s| s.id.to_string());
    if id(&old) == id(&new) {
        return Ok(Lines::default());
    }
    out.extend_from_slice(format!("index {}..{}", id(&old), id(&new)).as_bytes());
    if let (Some(old), Some(new)) = (&old, &new)
        && old.mode == new.mode
    {
        out.extend_from_slice(format!(" {:o}", new.mode).as_bytes());
    }
    out.push(b'\n');
    let before = old.map_or(b"".as_slice(), |s| s.bytes);
    let after = new.map_or(b"".as_slice(), |s| s.bytes);
    if before == after {
        return Ok(Lines::default());
    }
    if is_binary(before) || is_binary(after) {
        binary(out, before, after)?;
        return Ok(Lines::default());
    }
    let name = |present: bool, quoted: &[u8]| match present {
        // git ends a name with blanks in it by a tab, to know where it ends.
        true if path.contains(&b' ') && !quoted.starts_with(b"\"") => [quoted, b"\t"].concat(),
        true => quoted.to_vec(),
        false => b"/dev/null".to_vec(),
    };
    out.extend_from_slice(&[b"--- ".as_slice(), &name(old.is_some(), &from), b"\n"].concat());
    out.extend_from_slice(&[b"+++ ".as_slice(), &name(new.is_some(), &to), b"\n"].concat());
    hunks(out, before, after)
}

fn hunks(out: &mut Vec<u8>, before: &[u8], after: &[u8]) -> Result<Lines, Error> {
    let mut options = DiffOptions::new();
    options.context_lines(3).interhunk_lines(0).force_text(true);
    let mut patch =
        Patch::from_buffers(before, None, after, None, Some(&mut options)).map_err(Error::broken)?;
    let mut lines = Lines::default();
    patch
        .print(&mut |_, _, line| {
            match line.origin() {
                sign @ ('+' | '-' | ' ') => {
                    out.push(sign as u8);
                    lines.added += u64::from(sign == '+');
                    lines.removed += u64::from(sign == '-');
                }
                // Hunk headers and the note of a missing newline; libgit2's own file header is left out.
                'H' | '=' | '>' | '<' => {}
                _ => return true,
            }
            out.extend_from_slice(line.content());
            true
        })
        .map_err(Error::broken)?;
    Ok(lines)
}

/// As git decides, by a NUL near the beginning; and what is not UTF-8, which an event could not carry as text.
fn is_binary(bytes: &[u8]) -> bool {
    bytes.iter().take(8000).any(|b| *b == 0) || std::str::from_utf8(bytes).is_err()
}

fn binary(out: &mut Vec<u8>, before: &[u8], after: &[u8]) -> Result<(), Error> {
    out.extend_from_slice(b"GIT binary patch\n");
    for bytes in [after, before] {
        let mut packed = ZlibEncoder::new(Vec::new(), Compression::default());
        let packed = packed
            .write_all(bytes)
            .and_then(|()| packed.finish())
            .map_err(Error::host("compress a patch"))?;
        out.extend_from_slice(format!("literal {}\n", bytes.len()).as_bytes());
        base85::write(out, &packed);
        out.push(b'\n');
    }
    Ok(())
}

/// A name as git writes it with `core.quotePath=false`: as it is, or in double quotes with escapes.
fn quoted(prefix: &[u8], path: &[u8]) -> Vec<u8> {
    let plain = |b: &u8| matches!(b, 0x20..=0x7e) && *b != b'"' && *b != b'\\';
    let full = [prefix, path].concat();
    // Not what a terminal would obey, or show in another order than it stands.
    let shown = |c: char| if c.is_ascii() { plain(&(c as u8)) } else { !c.is_control() && !reorders(c) };
    if std::str::from_utf8(&full).is_ok_and(|text| text.chars().all(shown)) {
        return full;
    }
    let mut out = vec![b'"'];
    for b in full {
        match b {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', b]),
            7 => out.extend_from_slice(b"\\a"),
            8 => out.extend_from_slice(b"\\b"),
            9 => out.extend_from_slice(b"\\t"),
            10 => out.extend_from_slice(b"\\n"),
            11 => out.extend_from_slice(b"\\v"),
            12 => out.extend_from_slice(b"\\f"),
            13 => out.extend_from_slice(b"\\r"),
            b if plain(&b) => out.push(b),
            b => out.extend_from_slice(format!("\\{b:03o}").as_bytes()),
        }
    }
    out.push(b'"');
    out
}

/// Whether the character changes the direction of others, or breaks the line for some readers.
fn reorders(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2028}' | '\u{2029}' | '\u{2066}'..='\u{2069}')
}
