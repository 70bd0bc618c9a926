//! Looks into a pack while it streams by, before libgit2 sees it: how many objects it announces, how large
//! each will be unpacked and what a delta will grow to. libgit2 allocates what a pack tells it to, so a few
//! kilobytes of a hostile pack could otherwise take all memory. It keeps nothing and judges no contents.

use std::io::{self, Write};

use flate2::{Decompress, FlushDecompress, Status};
use git2::Indexer;

use super::{Error, Limits};

/// What the next byte belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// `PACK`, version, count: bytes so far.
    Head(usize),
    /// Kind and size of an object; how far the size is shifted.
    Size { shift: u32 },
    /// The distance to an offset delta's base.
    Offset,
    /// The id of a delta's base: bytes left.
    Base(usize),
    /// Compressed contents.
    Contents,
    /// The checksum at the end.
    Trailer,
}

/// Passes a pack on to the indexer unless it announces or unpacks to too much.
pub(super) struct Scan<'a> {
    to: Indexer<'a>,
    look: Look,
}

impl<'a> Scan<'a> {
    pub fn new(to: Indexer<'a>, limits: &Limits) -> Scan<'a> {
        Scan { to, look: Look::new(limits) }
    }

    /// The indexer, once the whole pack has passed.
    pub fn finish(self) -> Result<Indexer<'a>, Error> {
        match self.look.state {
            State::Trailer => Ok(self.to),
            _ => Err(Error::unreachable("the server stopped in the middle of the pack")),
        }
    }
}

impl Write for Scan<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.look.at(bytes).map_err(Error::into_io)?;
        self.to.write_all(bytes).map_err(|e| Error::broken(e).into_io())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The pack's shape, byte by byte.
struct Look {
    state: State,
    head: [u8; 12],
    left: u64,
    kind: u8,
    size: u64,
    /// Bytes of this object unpacked so far.
    out: u64,
    /// The beginning of a delta, where its sizes stand.
    delta: Vec<u8>,
    inflate: Decompress,
    scratch: Vec<u8>,
    /// Bytes of all objects, deltas as what they grow to.
    total: u64,
    max_objects: u64,
    max_object: u64,
    max_total: u64,
}

impl Look {
    fn new(limits: &Limits) -> Look {
        Look {
            state: State::Head(0),
            head: [0; 12],
            left: 0,
            kind: 0,
            size: 0,
            out: 0,
            delta: Vec::with_capacity(20),
            inflate: Decompress::new(true),
            scratch: vec![0; 64 * 1024],
            total: 0,
            max_objects: limits.objects,
            max_object: limits.file_bytes,
            max_total: limits.unpacked_bytes,
        }
    }

    fn at(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while let Some((first, rest)) = bytes.split_first() {
            match self.state {
                State::Contents => {
                    bytes = self.contents(bytes)?;
                    continue;
                }
                State::Trailer => return Ok(()),
                State::Head(n) => self.head(n, *first)?,
                State::Size { shift } => self.size(shift, *first)?,
                State::Offset => {
                    if first & 0x80 == 0 {
                        self.begin();
                    }
                }
                State::Base(1) => self.begin(),
                State::Base(n) => self.state = State::Base(n - 1),
            }
            bytes = rest;
        }
        Ok(())
    }

    fn head(&mut self, n: usize, byte: u8) -> Result<(), Error> {
        if let Some(slot) = self.head.get_mut(n) {
            *slot = byte;
        }
        self.state = State::Head(n + 1);
        if n + 1 < self.head.len() {
            return Ok(());
        }
        let [p, a, c, k, _, _, _, version, counts @ ..] = self.head;
        if [p, a, c, k] != *b"PACK" || !matches!(version, 2 | 3) {
            return Err(Error::broken("this is not a pack"));
        }
        self.left = u64::from(u32::from_be_bytes(counts));
        if self.left > self.max_objects {
            return Err(Error::TooLarge { what: "objects", cap: self.max_objects });
        }
        self.next();
        Ok(())
    }

    fn next(&mut self) {
        self.state = if self.left == 0 { State::Trailer } else { State::Size { shift: 0 } };
    }

    fn size(&mut self, shift: u32, byte: u8) -> Result<(), Error> {
        if shift == 0 {
            self.kind = (byte >> 4) & 7;
            self.size = u64::from(byte & 15);
        } else {
            self.size |= u64::from(byte & 0x7f) << shift;
        }
        if byte & 0x80 != 0 {
            let shift = if shift == 0 { 4 } else { shift + 7 };
            if shift > 48 {
                return Err(Error::broken("an object of an impossible size"));
            }
            self.state = State::Size { shift };
            return Ok(());
        }
        self.grow(self.size)?;
        match self.kind {
            1..=4 => self.begin(),
            6 => self.state = State::Offset,
            7 => self.state = State::Base(20),
            _ => return Err(Error::broken("an object of an unknown kind")),
        }
        Ok(())
    }

    /// An object or a delta's result of this size will be in memory.
    fn grow(&mut self, size: u64) -> Result<(), Error> {
        if size > self.max_object {
            return Err(Error::TooLarge { what: "bytes of a file", cap: self.max_object });
        }
        self.total = self.total.saturating_add(size);
        if self.total > self.max_total {
            return Err(Error::TooLarge { what: "bytes unpacked", cap: self.max_total });
        }
        Ok(())
    }

    fn begin(&mut self) {
        self.out = 0;
        self.delta.clear();
        self.inflate.reset(true);
        self.state = State::Contents;
    }

    /// Unpacks, looks, forgets. Returns what belongs to the next object.
    fn contents<'b>(&mut self, bytes: &'b [u8]) -> Result<&'b [u8], Error> {
        let (had_in, had_out) = (self.inflate.total_in(), self.inflate.total_out());
        let status = self
            .inflate
            .decompress(bytes, &mut self.scratch, FlushDecompress::None)
            .map_err(|_| Error::broken("an object's contents do not unpack"))?;
        let took = (self.inflate.total_in() - had_in) as usize;
        let gave = (self.inflate.total_out() - had_out) as usize;
        self.out += gave as u64;
        if self.out > self.size {
            return Err(Error::broken("an object is longer than it says"));
        }
        if self.kind >= 6 && self.delta.len() < 20 {
            let fresh = self.scratch.get(..gave).unwrap_or_default();
            let room = 20 - self.delta.len();
            self.delta.extend(fresh.iter().take(room));
        }
        if status == Status::StreamEnd {
            if self.out != self.size {
                return Err(Error::broken("an object is shorter than it says"));
            }
            if self.kind >= 6 {
                let grown =
                    delta_result(&self.delta).ok_or_else(|| Error::broken("a delta without its sizes"))?;
                self.grow(grown)?;
            }
            self.left -= 1;
            self.next();
        } else if took == 0 && gave == 0 {
            return Err(Error::broken("an object's contents do not go on"));
        }
        Ok(bytes.get(took..).unwrap_or_default())
    }
}

/// The second of the two sizes at a delta's beginning.
fn delta_result(delta: &[u8]) -> Option<u64> {
    let mut bytes = delta.iter();
    let mut size = 0u64;
    for _ in 0..2 {
        size = 0;
        let mut shift = 0u32;
        loop {
            let byte = bytes.next()?;
            if shift > 56 {
                return None;
            }
            size |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
    }
    Some(size)
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::ZlibEncoder;

    use super::*;

    fn limits() -> Limits {
        Limits { objects: 10, file_bytes: 1000, unpacked_bytes: 3000, ..Limits::default() }
    }

    fn zip(bytes: &[u8]) -> Vec<u8> {
        let mut z = ZlibEncoder::new(Vec::new(), Compression::best());
        z.write_all(bytes).unwrap();
        z.finish().unwrap()
    }

    fn object(kind: u8, size: u64, extra: &[u8], contents: &[u8]) -> Vec<u8> {
        let mut out = vec![(kind << 4) | (size & 15) as u8];
        let mut rest = size >> 4;
        while rest > 0 {
            *out.last_mut().unwrap() |= 0x80;
            out.push((rest & 0x7f) as u8);
            rest >>= 7;
        }
        [out, extra.to_vec(), zip(contents)].concat()
    }

    fn pack(count: u32, objects: &[Vec<u8>]) -> Vec<u8> {
        [b"PACK\0\0\0\x02".to_vec(), count.to_be_bytes().to_vec(), objects.concat(), vec![0; 20]].concat()
    }

    /// Fed whole and byte by byte, which must give the same.
    fn look(bytes: &[u8]) -> Result<State, String> {
        let mut whole = Look::new(&limits());
        let all = whole.at(bytes).map(|()| whole.state).map_err(|e| e.to_string());
        let mut single = Look::new(&limits());
        let one =
            bytes.iter().try_for_each(|b| single.at(&[*b])).map(|()| single.state).map_err(|e| e.to_string());
        assert_eq!(all, one);
        all
    }

    #[test]
    fn an_honest_pack_passes_however_it_is_cut() {
        let delta = [10u8, 20, 1, b'x'];
        let objects = [
            object(3, 300, b"", &[7; 300]),
            object(6, 4, &[0x81, 0x02], &delta),
            object(7, 4, &[9; 20], &delta),
            object(3, 0, b"", b""),
        ];
        assert_eq!(look(&pack(4, &objects)), Ok(State::Trailer));
    }

    #[test]
    fn bombs_are_seen_before_they_go_off() {
        let huge = [1u8, 0xff, 0xff, 0xff, 0xff, 0x7f];
        for (bytes, why) in [
            (pack(11, &[]), "objects over 10"),
            (pack(1, &[object(3, 1 << 40, b"", b"")]), "bytes of a file over 1000"),
            (pack(1, &[object(6, 6, &[1], &huge)]), "bytes of a file over 1000"),
            (pack(9, &vec![object(3, 900, b"", &[0; 900]); 9]), "bytes unpacked over 3000"),
            (pack(1, &[object(3, 10, b"", &[0; 900])]), "longer than it says"),
            (pack(1, &[object(3, 10, b"", b"x")]), "shorter than it says"),
            (pack(1, &[object(5, 0, b"", b"")]), "unknown kind"),
            (pack(1, &[vec![0x30, 1, 2, 3, 4, 5, 6]]), "do not unpack"),
            (b"PACKxxxxxxxxx".to_vec(), "not a pack"),
            (pack(1, &[vec![0xff; 30]]), "impossible size"),
        ] {
            let error = look(&bytes).unwrap_err();
            assert!(error.contains(why), "{why}: {error}");
        }
    }
}
