//! A mirror made anew with nothing but the commits that are needed, so that one that grew while jobs hold its
//! bases can shrink. When that is due, and for which commits, is `cache`'s business.

use std::io::{self, Write};

use git2::{Oid, Repository};

use super::budget::Budget;
use super::mirror::Mirror;
use super::remote::{Ref, Source, Want};
use super::{Error, Limits, pack};

/// Copies `commits` with their trees, without history, from `old` into the empty mirror `new`; `false` once that
/// takes `most` bytes.
pub(super) fn copy(
    old: &Mirror,
    new: &Mirror,
    commits: &[Oid],
    most: u64,
    limits: &Limits,
    budget: &Budget,
) -> Result<bool, Error> {
    // Wrapped around the objects: no configuration and no refs are read.
    let repo = Repository::from_odb(old.odb()?).map_err(Error::broken)?;
    let mut from = Within { repo, left: most, over: false };
    let mut have = Vec::new();
    for commit in commits {
        let want = Want { commits: vec![*commit], depth: Some(1), have: have.clone(), ..Want::default() };
        let received = new.receive(&mut from, &want, limits, budget);
        if from.over {
            return Ok(false);
        }
        received?;
        new.pin(*commit)?;
        have.push(*commit);
    }
    Ok(new.bytes() < most)
}

/// The old mirror as a source that stops at so many bytes.
struct Within {
    repo: Repository,
    left: u64,
    over: bool,
}

impl Source for Within {
    fn refs(&mut self, _prefixes: &[String]) -> Result<Vec<Ref>, Error> {
        Ok(Vec::new())
    }

    fn gives_any_commit(&self) -> bool {
        true
    }

    fn can_filter(&self) -> bool {
        false
    }

    fn gives(&mut self, _id: Oid) -> Result<(), Error> {
        Ok(())
    }

    fn fetch(&mut self, want: &Want, to: &mut dyn Write) -> Result<(), Error> {
        let contents = pack::contents(&self.repo, want)?;
        let mut to = Capped { to, left: &mut self.left, over: &mut self.over };
        pack::write(&self.repo, &contents.objects, pack::How::Small, &mut to)
    }
}

struct Capped<'a> {
    to: &'a mut dyn Write,
    left: &'a mut u64,
    over: &'a mut bool,
}

impl Write for Capped<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.left.checked_sub(bytes.len() as u64) {
            Some(left) => *self.left = left,
            None => {
                *self.over = true;
                return Err(io::Error::other("the copy is no smaller"));
            }
        }
        self.to.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
