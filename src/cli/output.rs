//! How things are printed: data on stdout, messages on stderr, tables aligned, colour on a terminal only. Whatever is
//! printed here is escaped first ([`crate::escape`]), so that no caller can forget it. It formats; what is printed is the
//! commands' business.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};

use serde::Serialize;

use crate::escape;

/// What [`Paint`] writes, and the only control sequences that pass [`shown`].
const STYLES: [&str; 5] = ["\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"];

/// Colours, when the stream is a terminal, `NO_COLOR` is unset and `TERM` is not `dumb`.
#[derive(Debug, Clone, Copy)]
pub struct Paint(bool);

impl Paint {
    pub fn stdout() -> Paint {
        Paint(std::io::stdout().is_terminal() && wanted())
    }

    pub fn stderr() -> Paint {
        Paint(std::io::stderr().is_terminal() && wanted())
    }

    pub fn on(on: bool) -> Paint {
        Paint(on)
    }

    pub fn is_on(self) -> bool {
        self.0
    }

    pub fn good(self, text: &str) -> String {
        self.wrap("32", text)
    }

    pub fn bad(self, text: &str) -> String {
        self.wrap("31", text)
    }

    pub fn unsure(self, text: &str) -> String {
        self.wrap("33", text)
    }

    pub fn faint(self, text: &str) -> String {
        self.wrap("2", text)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }
}

fn wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
        && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
}

/// A line, or several, as they may be shown: escaped, except for line feeds, tabs and our own colours.
fn shown(text: &str, paint: Paint) -> Cow<'_, str> {
    if !text.contains(|c| !matches!(c, '\n' | '\t') && escape::is_unsafe(c)) {
        return Cow::Borrowed(text);
    }
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some((before, after)) = rest.split_once('\x1b') {
        out.push_str(&escape::lines(before));
        let style = STYLES.iter().find(|style| {
            paint.is_on() && style.strip_prefix('\x1b').is_some_and(|style| after.starts_with(style))
        });
        out.push_str(style.map_or(&*escape::lines("\x1b"), |style| style));
        rest = style.and_then(|style| after.get(style.len() - 1..)).unwrap_or(after);
    }
    out.push_str(&escape::lines(rest));
    Cow::Owned(out)
}

/// One line of data on stdout.
///
/// # Errors
/// That of the pipe; `main` takes a closed one for a quiet end.
pub fn data(line: &str) -> std::io::Result<()> {
    let line = shown(line, Paint::stdout());
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.write_all(b"\n")
}

/// Bytes as they are on stdout: for files of ours, and for results that another program reads.
pub fn raw(bytes: &[u8]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// One JSON value on stdout, indented when a person looks.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    let pretty = std::io::stdout().is_terminal();
    let text = if pretty { serde_json::to_string_pretty(value)? } else { serde_json::to_string(value)? };
    Ok(data(&escape::json(&text))?)
}

/// A message on stderr. Its further lines are indented, so that text from outside cannot pass for another message. One that
/// cannot be written is no reason to stop.
pub fn talk(line: &str) {
    let line = shown(line, Paint::stderr()).replace('\n', "\n  ");
    if writeln!(std::io::stderr().lock(), "{line}").is_err() {
        tracing::trace!("stderr is closed");
    }
}

/// An aligned table; columns are as wide as their widest cell.
#[derive(Debug, Default)]
pub struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<Cell>>,
}

/// A cell with the colour it gets after it was measured.
#[derive(Debug, Clone)]
pub struct Cell {
    pub text: String,
    pub tone: Tone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Good,
    Bad,
    Unsure,
    Faint,
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Cell {
        Cell { text: text.into(), tone: Tone::Plain }
    }
}

impl Cell {
    pub fn toned(text: impl Into<String>, tone: Tone) -> Cell {
        Cell { text: text.into(), tone }
    }
}

impl Table {
    /// Column names; one that begins with `>` is aligned to the right, without the sign.
    pub fn new(columns: &[&str]) -> Table {
        let right = columns.iter().map(|c| c.starts_with('>')).collect();
        let head = columns.iter().map(|c| Cell::toned(c.trim_start_matches('>'), Tone::Faint)).collect();
        Table { right, rows: vec![head] }
    }

    /// A table of names and values, without a head.
    pub fn pairs() -> Table {
        Table::default()
    }

    /// Each cell is one line, whatever is in it.
    pub fn row(&mut self, mut cells: Vec<Cell>) {
        for cell in &mut cells {
            cell.text = escape::line(&cell.text);
        }
        self.rows.push(cells);
    }

    pub fn is_empty(&self) -> bool {
        self.rows.len() <= 1
    }

    /// The lines, without spaces at their ends. Within `most` columns, where that is given: the widest columns are made
    /// narrower, and what does not fit goes on below.
    pub fn lines(&self, paint: Paint, most: Option<usize>) -> Vec<String> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |n: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(n));
            cells.map(|cell| cell.text.chars().count()).max().unwrap_or(0)
        };
        let mut widths: Vec<usize> = (0..columns).map(width).collect();
        if let Some(most) = most {
            narrow(&mut widths, most);
        }
        self.rows.iter().flat_map(|row| self.row_lines(row, &widths, paint)).collect()
    }

    fn row_lines(&self, row: &[Cell], widths: &[usize], paint: Paint) -> Vec<String> {
        let cells: Vec<Vec<String>> =
            row.iter().zip(widths).map(|(cell, width)| wrapped(&cell.text, *width)).collect();
        let height = cells.iter().map(Vec::len).max().unwrap_or(0);
        let line = |nth: usize| {
            let mut line = String::new();
            for (n, ((cell, parts), width)) in row.iter().zip(&cells).zip(widths).enumerate() {
                let part = parts.get(nth).map(String::as_str).unwrap_or_default();
                let pad = " ".repeat(width.saturating_sub(part.chars().count()));
                let text = match cell.tone {
                    _ if part.is_empty() => String::new(),
                    Tone::Plain => part.to_owned(),
                    Tone::Good => paint.good(part),
                    Tone::Bad => paint.bad(part),
                    Tone::Unsure => paint.unsure(part),
                    Tone::Faint => paint.faint(part),
                };
                let gap = if n == 0 { "" } else { GAP };
                match self.right.get(n) {
                    Some(true) => line.extend([gap, &pad, &text]),
                    _ => line.extend([gap, &text, &pad]),
                }
            }
            line.trim_end().to_string()
        };
        (0..height).map(line).collect()
    }

    /// On a terminal within its width; in a pipe each row is one line, whole.
    pub fn print(&self) -> std::io::Result<()> {
        self.lines(Paint::stdout(), columns()).iter().try_for_each(|line| data(line))
    }
}

/// Between two columns.
const GAP: &str = "  ";
/// No column is made narrower than this.
const NARROWEST: usize = 8;

/// Columns of the terminal that is stdout: `COLUMNS`, else 80. `None` in a pipe, unless `COLUMNS` is set.
fn columns() -> Option<usize> {
    let set = std::env::var("COLUMNS").ok().and_then(|text| text.trim().parse().ok());
    let set = set.filter(|columns| (20..=1_000).contains(columns));
    set.or_else(|| std::io::stdout().is_terminal().then_some(80))
}

/// Takes from the widest columns until all of them fit, or none can give more.
fn narrow(widths: &mut [usize], most: usize) {
    let gaps = GAP.len() * widths.len().saturating_sub(1);
    while widths.iter().sum::<usize>() + gaps > most {
        match widths.iter_mut().max().filter(|widest| **widest > NARROWEST) {
            Some(widest) => *widest -= 1,
            None => return,
        }
    }
}

/// The text in lines of at most `width` characters, broken between words where that is possible.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let width = width.max(1);
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split(' ') {
        let mut rest: Vec<char> = word.chars().collect();
        let is_first = used == 0;
        if !is_first && used + 1 + rest.len() > width {
            lines.push(String::new());
            used = 0;
        } else if !is_first {
            lines.last_mut().into_iter().for_each(|line| line.push(' '));
            used += 1;
        }
        while used + rest.len() > width {
            let tail = rest.split_off(width.saturating_sub(used).min(rest.len()));
            lines.last_mut().into_iter().for_each(|line| line.extend(&rest));
            lines.push(String::new());
            (rest, used) = (tail, 0);
        }
        used += rest.len();
        lines.last_mut().into_iter().for_each(|line| line.extend(&rest));
    }
    lines
}

/// `1234567` → `1,234,567`.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `1 relay`, `2 relays`.
pub fn count(number: usize, of: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {of}{plural}", thousands(number as u64))
}

/// Millisatoshi as sats: `1,234 sat`, with the thousandths where there are some.
pub fn sats(msat: u64) -> String {
    match msat % 1000 {
        0 => format!("{} sat", thousands(msat / 1000)),
        rest => format!("{}.{rest:03} sat", thousands(msat / 1000)),
    }
}

/// As [`sats`], below zero as well.
pub fn signed_sats(msat: i128) -> String {
    let size = sats(u64::try_from(msat.unsigned_abs()).unwrap_or(u64::MAX));
    if msat < 0 { format!("-{size}") } else { size }
}

/// A span of time in its largest useful unit: `340 ms`, `12.3 s`, `4 min 5 s`, `3 h 20 min`, `2 d 3 h`.
pub fn span(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        _ if ms < 1_000 => format!("{ms} ms"),
        _ if s < 60 => format!("{}.{} s", s, ms % 1000 / 100),
        _ if s < 3_600 => format!("{} min {} s", s / 60, s % 60),
        _ if s < 86_400 => format!("{} h {} min", s / 3_600, s % 3_600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3_600),
    }
}

/// `then_ms` seen from `now_ms`: `12.3 s ago`, `in 4 min 5 s`, `now`.
pub fn relative(then_ms: u64, now_ms: u64) -> String {
    match (now_ms.checked_sub(then_ms), then_ms.checked_sub(now_ms)) {
        (Some(0..1_000), _) => "now".into(),
        (Some(past), _) => format!("{} ago", span(past)),
        (_, Some(ahead)) => format!("in {}", span(ahead)),
        (None, None) => "now".into(),
    }
}

/// Bytes in binary units: `512 B`, `1.5 KiB`, `2.0 GiB`.
pub fn bytes(number: u64) -> String {
    let mut size = number as f64;
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB"].into_iter();
    let mut unit = units.next().unwrap_or("B");
    while size >= 1024.0 {
        match units.next() {
            Some(next) => (unit, size) = (next, size / 1024.0),
            None => break,
        }
    }
    if unit == "B" { format!("{number} B") } else { format!("{size:.1} {unit}") }
}

/// The first twelve characters of an id, for tables; JSON gets it whole.
pub fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

/// Text from outside for one line of a terminal: escaped, at most `max` characters.
pub fn tame(text: &str, max: usize) -> String {
    let mut out: String = text.chars().take(max).collect();
    if text.chars().nth(max).is_some() {
        out.push('…');
    }
    escape::line(&out)
}

/// Text from outside of many lines for a terminal.
pub fn tame_lines(text: &str) -> String {
    escape::lines(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_end_without_spaces() {
        let mut table = Table::new(&["name", ">size", "note"]);
        table.row(vec!["a".into(), "7".into(), "".into()]);
        table.row(vec!["longer".into(), "1,234".into(), "ü".into()]);
        assert_eq!(
            table.lines(Paint(false), None),
            ["name     size  note", "a           7", "longer  1,234  ü"]
        );
    }

    #[test]
    fn colour_does_not_move_a_column() {
        let mut table = Table::pairs();
        table.row(vec![Cell::toned("ok", Tone::Good), "x".into()]);
        table.row(vec!["failed".into(), "y".into()]);
        assert_eq!(table.lines(Paint(true), None), ["\x1b[32mok\x1b[0m      x", "failed  y"]);
    }

    #[test]
    fn a_table_fits_80_columns_and_loses_nothing() {
        let mut table = Table::new(&["job", ">wall", "end"]);
        let (id, why) = ("q".repeat(64), "repo_unreachable: the server said ".repeat(6));
        table.row(vec![id.as_str().into(), "12.3 s".into(), why.as_str().into()]);
        table.row(vec!["b".into(), "".into(), "äöü".repeat(60).into()]);
        for (most, paint) in [(80, Paint(false)), (40, Paint(false))] {
            let lines = table.lines(paint, Some(most));
            assert!(lines.iter().all(|line| line.chars().count() <= most), "{lines:#?}");
            let said: String = lines.concat().chars().filter(|c| !c.is_whitespace()).collect();
            assert_eq!(said.matches('q').count(), 64, "{lines:#?}");
            assert_eq!((said.matches("ö").count(), said.matches("said").count()), (60, 6), "{lines:#?}");
        }
        assert_eq!(table.lines(Paint(false), None).len(), 3, "a pipe gets a line a row");
    }

    #[test]
    fn numbers_are_read_at_a_glance() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(sats(21_000_500), "21,000.500 sat");
        assert_eq!(bytes(1_536), "1.5 KiB");
        assert_eq!(span(340), "340 ms");
        assert_eq!(span(245_000), "4 min 5 s");
        assert_eq!(relative(1_000, 61_000), "1 min 0 s ago");
        assert_eq!(relative(61_000, 1_000), "in 1 min 0 s");
        assert_eq!(relative(u64::MAX, 0).split(' ').next(), Some("in"));
    }

    #[test]
    fn a_strangers_text_cannot_steer_the_terminal() {
        assert_eq!(tame("a\x1b[2Jb\nc", 100), "a\\u{1b}[2Jb\\nc");
        assert_eq!(tame("müßig", 3), "müß…");
        assert_eq!(tame_lines("a\n\u{202e}b"), "a\n\\u{202e}b");
    }

    #[test]
    fn our_own_colours_pass_on_a_terminal_and_nothing_else_does() {
        let line = format!("{} \x1b[1m\x1b[2J\u{9b}m\r", Paint(true).bad("bad"));
        assert_eq!(shown(&line, Paint(true)), "\x1b[31mbad\x1b[0m \\u{1b}[1m\\u{1b}[2J\\u{9b}m\\r");
        assert!(!shown(&line, Paint(false)).contains('\x1b'));
        let mut table = Table::pairs();
        table.row(vec!["a\nforged".into(), "\x1b[2J".into()]);
        assert_eq!(table.lines(Paint(false), None), ["a\\nforged  \\u{1b}[2J"]);
    }
}
