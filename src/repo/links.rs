//! Where the symlinks of a patched tree lead: each is followed through the tree's own links, as the kernel would. It
//! looks at no disk.

use std::collections::HashMap;

use git2::{Odb, Oid};

use super::names::is_dot_git;
use super::tree::{self, Kind, shown};
use super::{Error, Warning, WarningKind};

/// Links followed for one; the kernel follows no more.
const MAX_HOPS: usize = 40;
/// Names looked up, and entries of folders read, for all links of a patch.
const MAX_WORK: u64 = 2_000_000;
/// Bytes of a target shown.
const MAX_SHOWN: usize = 100;

/// The links of one tree.
pub(super) struct Links<'a> {
    odb: &'a Odb<'a>,
    top: Oid,
    /// Folders and links of the trees read so far.
    known: HashMap<Oid, HashMap<Vec<u8>, (Kind, Oid)>>,
    left: u64,
}

/// Why a link is warned of.
enum Leads {
    Absolute,
    Out,
    Git,
    Unknown,
}

impl<'a> Links<'a> {
    pub fn new(odb: &'a Odb<'a>, top: Oid) -> Links<'a> {
        Links { odb, top, known: HashMap::new(), left: MAX_WORK }
    }

    /// A warning if the link at `path`, whose target is the object `id`, leads out of the tree.
    pub fn leads_out(&mut self, path: &[u8], id: Oid) -> Result<Option<Warning>, Error> {
        let target = self.odb.read(id).map_err(Error::broken)?.data().to_vec();
        let Some(leads) = self.follow(path, &target)? else { return Ok(None) };
        let to = target.get(..target.len().min(MAX_SHOWN)).unwrap_or_default().escape_ascii();
        let what = match leads {
            Leads::Absolute => format!("a symlink to the absolute path {to}"),
            Leads::Out => format!("a symlink out of the repository, to {to}"),
            Leads::Git => format!("a symlink into .git, to {to}"),
            Leads::Unknown => format!("a symlink that takes too long to follow, to {to}"),
        };
        let path = shown(path, b"").trim_end_matches('/').to_string();
        Ok(Some(Warning { kind: WarningKind::LinkOut, path, what }))
    }

    fn follow(&mut self, path: &[u8], target: &[u8]) -> Result<Option<Leads>, Error> {
        let mut at: Vec<Vec<u8>> = path.split(|b| *b == b'/').map(<[u8]>::to_vec).collect();
        let mut todo: Vec<Vec<u8>> = Vec::new();
        let mut target = target.to_vec();
        for _ in 0..=MAX_HOPS {
            if target.starts_with(b"/") {
                return Ok(Some(Leads::Absolute));
            }
            // The target stands in the link's place; the last name is the next.
            at.pop();
            todo.extend(target.split(|b| *b == b'/').rev().map(<[u8]>::to_vec));
            let next = loop {
                let Some(name) = todo.pop() else { return Ok(None) };
                match name.as_slice() {
                    b"" | b"." => continue,
                    b".." if at.pop().is_none() => return Ok(Some(Leads::Out)),
                    b".." => continue,
                    git if is_dot_git(git) => return Ok(Some(Leads::Git)),
                    _ => at.push(name),
                }
                match self.entry(&at)? {
                    Found::Link(id) => break id,
                    Found::Other => {}
                    Found::TooMuch => return Ok(Some(Leads::Unknown)),
                }
            };
            target = self.odb.read(next).map_err(Error::broken)?.data().to_vec();
        }
        // A ring of links leads nowhere.
        Ok(None)
    }

    fn entry(&mut self, path: &[Vec<u8>]) -> Result<Found, Error> {
        let mut folder = self.top;
        for (n, name) in path.iter().enumerate() {
            if !self.known.contains_key(&folder) {
                let list = tree::read(self.odb, folder)?;
                self.left = self.left.saturating_sub(list.len() as u64);
                let wanted = list.into_iter().filter(|e| matches!(e.kind, Kind::Folder | Kind::Symlink));
                self.known.insert(folder, wanted.map(|e| (e.name, (e.kind, e.id))).collect());
            }
            self.left = self.left.saturating_sub(1);
            if self.left == 0 {
                return Ok(Found::TooMuch);
            }
            match self.known.get(&folder).and_then(|list| list.get(name)) {
                Some((Kind::Folder, id)) => folder = *id,
                Some((_, id)) if n + 1 == path.len() => return Ok(Found::Link(*id)),
                _ => return Ok(Found::Other),
            }
        }
        Ok(Found::Other)
    }
}

enum Found {
    Link(Oid),
    Other,
    TooMuch,
}
