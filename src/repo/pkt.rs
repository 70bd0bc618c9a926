//! Git's packet lines, read with a bound and written; the client and the small server both use it.

use std::io::{self, Read};

/// Largest packet line, its four digits included.
pub(super) const MAX_LINE: usize = 65_520;

/// One packet; data borrow the reader's buffer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pkt<'a> {
    Data(&'a [u8]),
    Flush,
    Delimiter,
    ResponseEnd,
}

/// Reads packets; never holds more than one.
pub(super) struct Reader<R> {
    from: R,
    line: Vec<u8>,
}

impl<R: Read> Reader<R> {
    pub fn new(from: R) -> Reader<R> {
        Reader { from, line: Vec::with_capacity(MAX_LINE) }
    }

    /// The next packet; `None` at a clean end.
    pub fn next(&mut self) -> io::Result<Option<Pkt<'_>>> {
        let mut head = [0u8; 4];
        let mut got = 0;
        while got < head.len() {
            let Some(rest) = head.get_mut(got..) else { break };
            match self.from.read(rest) {
                Ok(0) if got == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        let length = std::str::from_utf8(&head)
            .ok()
            .filter(|h| h.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|h| usize::from_str_radix(h, 16).ok())
            .ok_or_else(|| bad("a packet line does not begin with its length"))?;
        match length {
            0 => Ok(Some(Pkt::Flush)),
            1 => Ok(Some(Pkt::Delimiter)),
            2 => Ok(Some(Pkt::ResponseEnd)),
            3 => Err(bad("a packet line has the impossible length 3")),
            n if n > MAX_LINE => Err(bad("a packet line is longer than git allows")),
            n => {
                self.line.resize(n - 4, 0);
                self.from.read_exact(&mut self.line)?;
                Ok(Some(Pkt::Data(&self.line)))
            }
        }
    }
}

fn bad(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Appends one data packet. Longer data than a packet holds are the caller's fault and are cut into several.
pub(super) fn write(out: &mut Vec<u8>, data: impl AsRef<[u8]>) {
    for part in data.as_ref().chunks(MAX_LINE - 4) {
        out.extend_from_slice(format!("{:04x}", part.len() + 4).as_bytes());
        out.extend_from_slice(part);
    }
}

pub(super) fn flush(out: &mut Vec<u8>) {
    out.extend_from_slice(b"0000");
}

pub(super) fn delimiter(out: &mut Vec<u8>) {
    out.extend_from_slice(b"0001");
}

/// The line without its newline.
pub(super) fn text(data: &[u8]) -> &[u8] {
    data.strip_suffix(b"\n").unwrap_or(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut bytes = Vec::new();
        write(&mut bytes, "hello\n");
        delimiter(&mut bytes);
        flush(&mut bytes);
        let mut reader = Reader::new(&bytes[..]);
        assert_eq!(reader.next().unwrap(), Some(Pkt::Data(b"hello\n")));
        assert_eq!(reader.next().unwrap(), Some(Pkt::Delimiter));
        assert_eq!(reader.next().unwrap(), Some(Pkt::Flush));
        assert_eq!(reader.next().unwrap(), None);
    }

    #[test]
    fn a_lying_length_is_an_error_and_not_an_allocation() {
        for bytes in [&b"ffff"[..], b"0003", b"+00a", b"zzzz", b"00", b"0009abc", b" 00a"] {
            assert!(Reader::new(bytes).next().is_err(), "{bytes:?}");
        }
    }
}
