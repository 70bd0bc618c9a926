//! Reads a stranger's patch – git's format or plain unified – in bounded memory, and applies one file's part
//! to its old contents, exactly where it says. What the tree holds is asked by `patch`.

use std::io::Read;

use flate2::read::ZlibDecoder;

use super::base85;

/// One file's part of a patch.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Part {
    /// `None`: the file is new.
    pub old: Option<Vec<u8>>,
    /// `None`: the file goes.
    pub new: Option<Vec<u8>>,
    pub old_mode: Option<u32>,
    pub new_mode: Option<u32>,
    /// The old file stays where it was.
    pub copy: bool,
    pub change: Change,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) enum Change {
    #[default]
    Nothing,
    Hunks(Vec<Hunk>),
    Literal(Vec<u8>),
    Delta(Vec<u8>),
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Hunk {
    /// First old line, from 1; with no old line, the line after which it goes in.
    start: usize,
    old: Vec<Vec<u8>>,
    new: Vec<Vec<u8>>,
}

/// Reads a patch. `cap` bounds each binary file's contents, in bytes.
pub(super) fn parse(patch: &[u8], cap: u64) -> Result<Vec<Part>, String> {
    let mut lines = Lines { rest: patch, number: 0 };
    let mut parts = Vec::new();
    while let Some(line) = lines.peek() {
        if let Some(names) = strip(line, "diff --git ") {
            lines.next();
            parts.push(git_part(&mut lines, names, cap)?);
        } else if line.starts_with(b"--- ") && lines.second().is_some_and(|l| l.starts_with(b"+++ ")) {
            let mut part = Part::default();
            names(&mut lines, &mut part)?;
            part.change = Change::Hunks(hunks(&mut lines)?);
            parts.push(part);
        } else if line.starts_with(b"@@ ") {
            return Err(format!("line {}: a hunk without a file", lines.number + 1));
        } else {
            lines.next();
        }
    }
    if parts.is_empty() { Err("it holds no change of a file".to_string()) } else { Ok(parts) }
}

fn git_part(lines: &mut Lines<'_>, header: &[u8], cap: u64) -> Result<Part, String> {
    let (old, new) = header_names(header).map_or((None, None), |(a, b)| (Some(a), Some(b)));
    let mut part = Part { old, new, ..Part::default() };
    let (mut is_new, mut is_gone) = (false, false);
    while let Some(line) = lines.peek() {
        let mode =
            |text: &[u8]| std::str::from_utf8(text).ok().and_then(|t| u32::from_str_radix(t.trim(), 8).ok());
        if let Some(m) = strip(line, "new file mode ") {
            is_new = true;
            part.new_mode = mode(m);
        } else if let Some(m) = strip(line, "deleted file mode ") {
            is_gone = true;
            part.old_mode = mode(m);
        } else if let Some(m) = strip(line, "old mode ") {
            part.old_mode = mode(m);
        } else if let Some(m) = strip(line, "new mode ") {
            part.new_mode = mode(m);
        } else if let Some(n) = strip(line, "rename from ").or_else(|| strip(line, "copy from ")) {
            part.copy = line.starts_with(b"copy");
            part.old = unquote(n);
        } else if let Some(n) = strip(line, "rename to ").or_else(|| strip(line, "copy to ")) {
            part.new = unquote(n);
        } else if line.starts_with(b"--- ") {
            names(lines, &mut part)?;
            part.change = Change::Hunks(hunks(lines)?);
            break;
        } else if line == b"GIT binary patch" {
            lines.next();
            part.change = binary(lines, cap)?;
            break;
        } else if line.starts_with(b"Binary files ") {
            return Err(format!("line {}: a binary file without its contents", lines.number + 1));
        } else if !(line.starts_with(b"index ")
            || line.starts_with(b"similarity ")
            || line.starts_with(b"dissimilarity "))
        {
            break;
        }
        lines.next();
    }
    if is_new {
        part.old = None;
    }
    if is_gone {
        part.new = None;
    }
    if part.old.is_none() && part.new.is_none() {
        return Err(format!("line {}: no file is named", lines.number));
    }
    Ok(part)
}

/// `a/x b/x`, where both are the same but for the first folder.
fn header_names(header: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let (first, second) = if header.starts_with(b"\"") {
        let end = quoted_end(header)?;
        (header.get(..end)?, header.get(end..)?.strip_prefix(b" ")?)
    } else if header.ends_with(b"\"") {
        let at = header.windows(2).position(|w| w == b" \"")?;
        (header.get(..at)?, header.get(at + 1..)?)
    } else {
        let middle = header.len() / 2;
        (header.get(..middle)?, header.get(middle..)?.strip_prefix(b" ")?)
    };
    let (a, b) = (drop_first(&unquote(first)?)?, drop_first(&unquote(second)?)?);
    (a == b).then_some((a, b))
}

/// The two lines with `---` and `+++`.
fn names(lines: &mut Lines<'_>, part: &mut Part) -> Result<(), String> {
    let mut take = |sign: &str| -> Result<Option<Vec<u8>>, String> {
        let line = lines.next().unwrap_or_default();
        let bad = || format!("a malformed file name after {sign:?}");
        let text = strip(line, sign).ok_or_else(bad)?;
        let text =
            if text.starts_with(b"\"") { text } else { text.split(|b| *b == b'\t').next().unwrap_or(text) };
        if text == b"/dev/null" {
            return Ok(None);
        }
        unquote(text).and_then(|n| drop_first(&n)).map(Some).ok_or_else(bad)
    };
    part.old = take("--- ")?;
    part.new = take("+++ ")?;
    Ok(())
}

fn hunks(lines: &mut Lines<'_>) -> Result<Vec<Hunk>, String> {
    let mut all = Vec::new();
    while let Some(header) = lines.peek().and_then(|l| strip(l, "@@ -")) {
        let bad = format!("line {}: a malformed hunk", lines.number + 1);
        lines.next();
        let (mut hunk, mut old_left, mut new_left) = hunk_header(header).ok_or_else(|| bad.clone())?;
        while old_left > 0 || new_left > 0 {
            let line = lines.next_whole().ok_or_else(|| bad.clone())?;
            let (sign, text) = line.split_first().ok_or_else(|| bad.clone())?;
            // Some mailers drop the blank of an empty context line.
            let (sign, text) = if *sign == b'\n' { (&b' ', line) } else { (sign, text) };
            if matches!(sign, b' ' | b'-') {
                old_left = old_left.checked_sub(1).ok_or_else(|| bad.clone())?;
                hunk.old.push(text.to_vec());
            }
            if matches!(sign, b' ' | b'+') {
                new_left = new_left.checked_sub(1).ok_or_else(|| bad.clone())?;
                hunk.new.push(text.to_vec());
            }
            if !matches!(sign, b' ' | b'+' | b'-') {
                return Err(bad);
            }
            if lines.peek().is_some_and(|l| l.starts_with(b"\\ ")) {
                lines.next();
                if matches!(sign, b' ' | b'-') {
                    cut_newline(&mut hunk.old);
                }
                if matches!(sign, b' ' | b'+') {
                    cut_newline(&mut hunk.new);
                }
            }
        }
        all.push(hunk);
    }
    Ok(all)
}

fn cut_newline(lines: &mut [Vec<u8>]) {
    if let Some(last) = lines.last_mut() {
        last.pop_if(|b| *b == b'\n');
    }
}

/// `l,n +l,n @@`
fn hunk_header(text: &[u8]) -> Option<(Hunk, usize, usize)> {
    let text = std::str::from_utf8(text.get(..text.len().min(80))?).or_else(|e| {
        // What follows the second @@ may be anything.
        std::str::from_utf8(text.get(..e.valid_up_to()).unwrap_or_default())
    });
    let (ranges, _) = text.ok()?.split_once(" @@")?;
    let (old, new) = ranges.split_once(" +")?;
    let range = |r: &str| -> Option<(usize, usize)> {
        let (start, count) = r.split_once(',').unwrap_or((r, "1"));
        Some((start.parse().ok()?, count.parse().ok()?))
    };
    let ((start, old), (_, new)) = (range(old)?, range(new)?);
    Some((Hunk { start, ..Hunk::default() }, old, new))
}

fn binary(lines: &mut Lines<'_>, cap: u64) -> Result<Change, String> {
    let bad = format!("line {}: a malformed binary part", lines.number + 1);
    let header = lines.next().ok_or_else(|| bad.clone())?;
    let (literal, size) = match (strip(header, "literal "), strip(header, "delta ")) {
        (Some(n), _) => (true, n),
        (None, Some(n)) => (false, n),
        _ => return Err(bad),
    };
    let size: u64 = std::str::from_utf8(size).ok().and_then(|s| s.parse().ok()).ok_or_else(|| bad.clone())?;
    if size > cap {
        return Err(format!("a binary file of {size} bytes is over the cap of {cap}"));
    }
    let mut packed = Vec::new();
    while let Some(line) = lines.next().filter(|l| !l.is_empty()) {
        base85::read_line(line, &mut packed).ok_or_else(|| bad.clone())?;
    }
    let mut bytes = Vec::new();
    // One byte more than announced is enough to know that it lies.
    ZlibDecoder::new(&packed[..]).take(size + 1).read_to_end(&mut bytes).map_err(|_| bad.clone())?;
    if bytes.len() as u64 != size {
        return Err(bad);
    }
    // The way back, which nobody asked for.
    if lines.peek().is_some_and(|l| l.starts_with(b"literal ") || l.starts_with(b"delta ")) {
        while lines.next().is_some_and(|l| !l.is_empty()) {}
    }
    Ok(if literal { Change::Literal(bytes) } else { Change::Delta(bytes) })
}

impl Part {
    /// The new contents, made of the old.
    pub fn apply(&self, old: &[u8], cap: u64) -> Result<Vec<u8>, String> {
        match &self.change {
            Change::Nothing => Ok(old.to_vec()),
            Change::Literal(bytes) => Ok(bytes.clone()),
            Change::Delta(delta) => {
                apply_delta(old, delta, cap).ok_or_else(|| "a binary delta does not fit".to_string())
            }
            Change::Hunks(hunks) => apply_hunks(old, hunks),
        }
    }
}

fn apply_hunks(old: &[u8], hunks: &[Hunk]) -> Result<Vec<u8>, String> {
    let lines: Vec<&[u8]> = old.split_inclusive(|b| *b == b'\n').collect();
    let mut out = Vec::with_capacity(old.len());
    let mut at = 0usize;
    for hunk in hunks {
        let start = if hunk.old.is_empty() { hunk.start } else { hunk.start.saturating_sub(1) };
        let not = || format!("the lines at {} are not as the patch says", hunk.start);
        let before = lines.get(at..start).ok_or_else(not)?;
        let end = start.checked_add(hunk.old.len()).ok_or_else(not)?;
        let here = lines.get(start..end).ok_or_else(not)?;
        if !here.iter().zip(&hunk.old).all(|(a, b)| *a == b.as_slice()) {
            return Err(not());
        }
        out.extend(before.iter().copied().flatten());
        out.extend(hunk.new.iter().flatten());
        at = end;
    }
    out.extend(lines.get(at..).unwrap_or_default().iter().copied().flatten());
    Ok(out)
}

/// Git's copy-and-insert delta.
fn apply_delta(old: &[u8], delta: &[u8], cap: u64) -> Option<Vec<u8>> {
    let mut bytes = delta.iter().copied();
    let mut size = || -> Option<u64> {
        let (mut value, mut shift) = (0u64, 0u32);
        loop {
            let b = bytes.next()?;
            value |= u64::from(b & 0x7f).checked_shl(shift)?;
            shift += 7;
            if b & 0x80 == 0 {
                return Some(value);
            }
            if shift > 56 {
                return None;
            }
        }
    };
    let (from, to) = (size()?, size()?);
    if from != old.len() as u64 || to > cap {
        return None;
    }
    let mut out: Vec<u8> = Vec::new();
    while let Some(op) = bytes.next() {
        if op & 0x80 != 0 {
            let (mut offset, mut length) = (0usize, 0usize);
            for bit in 0..4 {
                if op & (1 << bit) != 0 {
                    offset |= usize::from(bytes.next()?) << (8 * bit);
                }
            }
            for bit in 0..3 {
                if op & (0x10 << bit) != 0 {
                    length |= usize::from(bytes.next()?) << (8 * bit);
                }
            }
            let length = if length == 0 { 0x10000 } else { length };
            out.extend_from_slice(old.get(offset..offset.checked_add(length)?)?);
        } else {
            if op == 0 {
                return None;
            }
            for _ in 0..op {
                out.push(bytes.next()?);
            }
        }
        if out.len() as u64 > to {
            return None;
        }
    }
    (out.len() as u64 == to).then_some(out)
}

fn strip<'a>(line: &'a [u8], prefix: &str) -> Option<&'a [u8]> {
    line.strip_prefix(prefix.as_bytes())
}

/// Without the first folder (`a/`, `b/`).
fn drop_first(name: &[u8]) -> Option<Vec<u8>> {
    let at = name.iter().position(|b| *b == b'/')?;
    name.get(at + 1..).filter(|n| !n.is_empty()).map(<[u8]>::to_vec)
}

/// Where a quoted name at the beginning ends, its quotes included.
fn quoted_end(text: &[u8]) -> Option<usize> {
    let mut escaped = false;
    for (n, b) in text.iter().enumerate().skip(1) {
        match b {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some(n + 1),
            _ => {}
        }
    }
    None
}

/// A name as git writes it, quoted or not.
fn unquote(text: &[u8]) -> Option<Vec<u8>> {
    let Some(inner) = text.strip_prefix(b"\"") else { return Some(text.to_vec()) };
    let inner = inner.strip_suffix(b"\"")?;
    let mut out = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter().copied();
    while let Some(b) = bytes.next() {
        if b != b'\\' {
            out.push(b);
            continue;
        }
        out.push(match bytes.next()? {
            b'a' => 7,
            b'b' => 8,
            b't' => 9,
            b'n' => 10,
            b'v' => 11,
            b'f' => 12,
            b'r' => 13,
            c @ (b'"' | b'\\') => c,
            d @ b'0'..=b'3' => {
                let mut value = u32::from(d - b'0');
                for _ in 0..2 {
                    value = value * 8 + char::from(bytes.next()?).to_digit(8)?;
                }
                u8::try_from(value).ok()?
            }
            _ => return None,
        });
    }
    Some(out)
}

/// Lines one by one.
struct Lines<'a> {
    rest: &'a [u8],
    number: usize,
}

impl<'a> Lines<'a> {
    fn split(text: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        match memchr::memchr(b'\n', text) {
            Some(at) => text.split_at(at + 1),
            None => (text, b""),
        }
    }

    /// The next line without its newline; it is not taken.
    fn peek(&self) -> Option<&'a [u8]> {
        (!self.rest.is_empty()).then(|| super::pkt::text(Lines::split(self.rest).0))
    }

    fn second(&self) -> Option<&'a [u8]> {
        let (_, rest) = Lines::split(self.rest);
        (!rest.is_empty()).then(|| super::pkt::text(Lines::split(rest).0))
    }

    fn next(&mut self) -> Option<&'a [u8]> {
        self.next_whole().map(super::pkt::text)
    }

    /// The next line with its newline.
    fn next_whole(&mut self) -> Option<&'a [u8]> {
        if self.rest.is_empty() {
            return None;
        }
        let (line, rest) = Lines::split(self.rest);
        self.rest = rest;
        self.number += 1;
        Some(line)
    }
}
