//! Looks at a pack's header while it streams by, before libgit2 allocates for it.

use std::io::{self, Write};

use git2::Indexer;

use super::{Error, Limits};

/// Passes a pack on to the indexer unless it announces too much.
pub(super) struct Scan<'a> {
    to: Indexer<'a>,
    head: Vec<u8>,
    max_objects: u64,
}

impl<'a> Scan<'a> {
    pub fn new(to: Indexer<'a>, limits: &Limits) -> Scan<'a> {
        Scan { to, head: Vec::with_capacity(12), max_objects: limits.objects }
    }

    pub fn finish(self) -> Result<Indexer<'a>, Error> {
        if self.head.len() < 12 {
            return Err(Error::broken("the pack ends in its header"));
        }
        Ok(self.to)
    }

    fn look(&self) -> Result<(), Error> {
        let count = self.head.get(8..12).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
        match (self.head.get(..4), count) {
            (Some(b"PACK"), Some(n)) if u64::from(n) > self.max_objects => {
                Err(Error::TooLarge { what: "objects", cap: self.max_objects })
            }
            (Some(b"PACK"), Some(_)) => Ok(()),
            _ => Err(Error::broken("this is not a pack")),
        }
    }
}

impl Write for Scan<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.head.len() < 12 {
            let need = 12 - self.head.len();
            self.head.extend(bytes.iter().take(need));
            if self.head.len() == 12 {
                self.look().map_err(Error::into_io)?;
            }
        }
        self.to.write_all(bytes).map_err(|e| Error::broken(e).into_io())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
