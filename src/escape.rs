//! Text from outside, made safe to show on a terminal and in a log: characters that steer a terminal, begin a new line or
//! reorder what is beside them are written as escapes, the rest is left as it is. It decides nothing about where text is
//! shown.

use std::fmt::{self, Write};

/// Whether a terminal or a reader of lines could take this character for more than itself: controls (C0, DEL, C1), line and
/// paragraph separators, bidirectional controls, and characters that are never seen.
pub fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// The text on one line.
pub fn line(text: &str) -> String {
    escaped(text, |_| false)
}

/// The text on its own lines: line feeds and tabs are kept.
pub fn lines(text: &str) -> String {
    escaped(text, |c| matches!(c, '\n' | '\t'))
}

/// Serialised JSON with the same value in which nothing unsafe is left. Only strings can hold such characters.
pub fn json(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unsafe(c) && c != '\n' {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            out.push(c);
        }
    }
    out
}

fn escaped(text: &str, kept: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // Writing to a string cannot fail.
        if kept(c) || write(c, &mut out).is_err() {
            out.push(c);
        }
    }
    out
}

fn write(c: char, to: &mut dyn Write) -> fmt::Result {
    match c {
        '\n' | '\r' | '\t' => write!(to, "{}", c.escape_default()),
        c if is_unsafe(c) => write!(to, "{}", c.escape_unicode()),
        c => to.write_char(c),
    }
}

/// Writes on one line what is written to it, and no more than its room of characters.
pub struct Line<'a> {
    to: &'a mut dyn Write,
    room: usize,
}

impl<'a> Line<'a> {
    pub fn new(to: &'a mut dyn Write, room: usize) -> Line<'a> {
        Line { to, room }
    }
}

impl Write for Line<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match self.room {
                0 => return Ok(()),
                1 => self.to.write_char('…')?,
                _ => write(c, self.to)?,
            }
            self.room -= 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a stranger may send: a window title, a cleared screen in 7 and 8 bits, a forged line, reversed text.
    const NASTY: &str =
        "a\x1b]0;t\x07\x1b[2J\u{9b}2J\r\nINFO forged\u{202e}\u{2067}\u{2028}\0\u{7f}\u{8}\u{e0041}z";

    #[test]
    fn nothing_that_steers_a_terminal_or_begins_a_line_is_left() {
        let shown = line(NASTY);
        assert!(!shown.chars().any(is_unsafe), "{shown:?}");
        assert!(shown.contains("\\u{1b}]0;t\\u{7}") && shown.contains("\\r\\nINFO forged"), "{shown}");
        assert_eq!(line("müßig 日本 🦀"), "müßig 日本 🦀");
        let shown = lines(NASTY);
        assert_eq!(shown.lines().count(), 2, "{shown}");
        assert!(!shown.chars().any(|c| c != '\n' && is_unsafe(c)), "{shown:?}");
    }

    #[test]
    fn json_keeps_its_value() {
        let value = serde_json::json!({ "text": NASTY });
        for text in [serde_json::to_string(&value), serde_json::to_string_pretty(&value)] {
            let shown = json(&text.unwrap());
            assert!(!shown.chars().any(|c| c != '\n' && is_unsafe(c)), "{shown:?}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
        }
    }

    #[test]
    fn a_line_ends_where_its_room_does() {
        let mut text = String::new();
        let mut to = Line::new(&mut text, 4);
        to.write_str("a\n").and_then(|()| to.write_str("bcdef")).unwrap();
        assert_eq!(text, "a\\nb…");
    }
}
