//! What a job changed, as a unified diff that `git apply` takes, and whether such a diff applies. Both work
//! on objects in memory over the mirror's: no work tree, no index file, nothing that a job could have laid out.

use std::collections::BTreeMap;
use std::path::Path;

use git2::{ObjectType, Odb, Oid};
use serde::{Deserialize, Serialize};

use super::diff_read::{self, Part};
use super::diff_write::{self, Side};
use super::links::Links;
use super::tree::{self, Entry, Kind, shown};
use super::{Error, Limits, Warning, mirror, names};
use crate::sandbox::{Change, Content};

/// Most skipped paths named.
const MAX_SKIPPED: usize = 20;

/// A diff from the pinned commit to the changed tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Patch {
    /// UTF-8; empty if nothing differs.
    pub diff: Vec<u8>,
    pub files_changed: u64,
    pub lines_added: u64,
    pub lines_removed: u64,
    /// Changes that a patch cannot carry; at most 20 are named.
    pub skipped: Vec<Skipped>,
    /// Symlinks that it brings and that lead out of the repository or into `.git`, or that take too long to follow. All
    /// of them, for whoever applies the patch writes through them.
    pub links_out: Vec<Warning>,
}

/// A change left out of a patch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Escaped to printable ASCII, at most 200 characters.
    pub path: String,
    pub why: String,
}

/// Changes sorted into folders.
#[derive(Default)]
struct Node<'a> {
    own: Option<&'a Content>,
    below: BTreeMap<&'a [u8], Node<'a>>,
}

/// Makes the patch. Renames are not looked for, so the text depends on the two trees alone.
pub(super) fn make(objects: &Path, commit: Oid, changes: &[Change], limits: &Limits) -> Result<Patch, Error> {
    let odb = in_memory(objects)?;
    let old = mirror::tree_of(&odb, commit)?;
    let mut skipped = Vec::new();
    let mut top = Node::default();
    for change in changes {
        match unfit(&change.path, &change.to, limits) {
            Some(why) => skip(&mut skipped, &change.path, why),
            None => top.place(&change.path, &change.to),
        }
    }
    let new = match rebuild(&odb, Some(old), &top, b"", &mut skipped)? {
        Some(id) => id,
        None => odb.write(ObjectType::Tree, b"").map_err(Error::broken)?,
    };
    let mut patch = Patch { skipped, ..Patch::default() };
    let mut links = Links::new(&odb, new);
    let mut write = |path: &[u8], old: Option<&Entry>, new: Option<&Entry>| {
        differ(&odb, path, old, new, &mut patch)?;
        if let Some(link) = new.filter(|new| new.kind == Kind::Symlink) {
            patch.links_out.extend(links.leads_out(path, link.id)?);
        }
        if patch.diff.len() as u64 > limits.patch_bytes {
            return Err(Error::TooLarge { what: "bytes of a patch", cap: limits.patch_bytes });
        }
        Ok(())
    };
    compare(&odb, Some(old), Some(new), b"", &mut write)?;
    Ok(patch)
}

type Write<'a> = dyn FnMut(&[u8], Option<&Entry>, Option<&Entry>) -> Result<(), Error> + 'a;

/// Calls `write` for every file that differs, in the order of paths. As deep as the deeper of two trees
/// that both passed `limits.depth`.
fn compare(
    odb: &Odb<'_>,
    old: Option<Oid>,
    new: Option<Oid>,
    path: &[u8],
    write: &mut Write<'_>,
) -> Result<(), Error> {
    if old == new {
        return Ok(());
    }
    let entries = |id: Option<Oid>| -> Result<BTreeMap<Vec<u8>, Entry>, Error> {
        let list = id.map_or(Ok(Vec::new()), |id| tree::read(odb, id))?;
        Ok(list.into_iter().map(|e| (e.name.clone(), e)).collect())
    };
    let (old, new) = (entries(old)?, entries(new)?);
    let names: std::collections::BTreeSet<&Vec<u8>> = old.keys().chain(new.keys()).collect();
    for name in names {
        let (a, b) = (old.get(name), new.get(name));
        if a == b {
            continue;
        }
        let here = tree::join(path, name);
        let is_file = |e: &&Entry| matches!(e.kind, Kind::File | Kind::Executable | Kind::Symlink);
        let (file_a, file_b) = (a.filter(is_file), b.filter(is_file));
        let folder = |e: Option<&Entry>| e.filter(|e| e.kind == Kind::Folder).map(|e| e.id);
        let same_kind = |a: &Entry, b: &Entry| (a.kind == Kind::Symlink) == (b.kind == Kind::Symlink);
        // What goes is written before what takes its place.
        match (file_a, file_b) {
            (Some(a), Some(b)) if same_kind(a, b) => write(&here, Some(a), Some(b))?,
            (Some(a), Some(b)) => {
                write(&here, Some(a), None)?;
                write(&here, None, Some(b))?;
            }
            (Some(a), None) => {
                write(&here, Some(a), None)?;
                compare(odb, None, folder(b), &here, write)?;
            }
            (None, Some(b)) => {
                compare(odb, folder(a), None, &here, write)?;
                write(&here, None, Some(b))?;
            }
            (None, None) => compare(odb, folder(a), folder(b), &here, write)?,
        }
    }
    Ok(())
}

fn differ(
    odb: &Odb<'_>,
    path: &[u8],
    old: Option<&Entry>,
    new: Option<&Entry>,
    patch: &mut Patch,
) -> Result<(), Error> {
    let read = |e: Option<&Entry>| e.map(|e| odb.read(e.id).map_err(Error::broken)).transpose();
    let (old_object, new_object) = (read(old)?, read(new)?);
    let (old_id, new_id) = (old.map(|e| e.id.to_string()), new.map(|e| e.id.to_string()));
    let side = |e: Option<&Entry>,
                id: &Option<String>,
                object: &Option<git2::OdbObject<'_>>|
     -> Option<(u32, String, Vec<u8>)> {
        Some((plain_mode(e?), id.clone()?, object.as_ref()?.data().to_vec()))
    };
    let old = side(old, &old_id, &old_object);
    let new = side(new, &new_id, &new_object);
    fn view(s: &Option<(u32, String, Vec<u8>)>) -> Option<Side<'_>> {
        s.as_ref().map(|(mode, id, bytes)| Side { mode: *mode, id, bytes })
    }
    let lines = diff_write::file(&mut patch.diff, path, view(&old), view(&new))?;
    patch.files_changed += 1;
    patch.lines_added += lines.added;
    patch.lines_removed += lines.removed;
    Ok(())
}

/// The modes a patch may name.
fn plain_mode(e: &Entry) -> u32 {
    match e.kind {
        Kind::Executable => 0o100_755,
        Kind::Symlink => 0o120_000,
        _ => 0o100_644,
    }
}

/// Whether the diff applies to the commit's tree.
pub(super) fn check(objects: &Path, commit: Oid, diff: &[u8], limits: &Limits) -> Result<(), Error> {
    if diff.len() as u64 > limits.patch_bytes {
        return Err(Error::TooLarge { what: "bytes of a patch", cap: limits.patch_bytes });
    }
    if diff.is_empty() {
        return Ok(());
    }
    let not = |why: String| Error::DoesNotApply { why: why.chars().take(300).collect() };
    let parts = diff_read::parse(diff, limits.file_bytes).map_err(not)?;
    let odb = mirror::open_odb(objects)?;
    let top = mirror::tree_of(&odb, commit)?;
    let mut after = After { odb: &odb, top, changed: BTreeMap::new() };
    let mut total = 0u64;
    for part in &parts {
        let path = part.new.as_ref().or(part.old.as_ref()).map(|p| shown(p, b"")).unwrap_or_default();
        let told = |why: String| not(format!("{}: {why}", path.trim_end_matches('/')));
        let written = after.apply(part, limits)?.map_err(told)?;
        total += written;
        if total > limits.tree_bytes {
            return Err(Error::TooLarge { what: "bytes that a patch writes", cap: limits.tree_bytes });
        }
    }
    after.settle()?.map_err(not)
}

/// The commit's tree with what the patch has changed so far.
struct After<'a> {
    odb: &'a Odb<'a>,
    top: Oid,
    /// `None`: gone.
    changed: BTreeMap<Vec<u8>, Option<(Kind, Vec<u8>)>>,
}

/// The outer error is the repository's, the inner one the patch's.
type Verdict<T> = Result<Result<T, String>, Error>;

impl After<'_> {
    fn apply(&mut self, part: &Part, limits: &Limits) -> Verdict<u64> {
        for path in part.old.iter().chain(&part.new) {
            if let Some(why) = path.split(|b| *b == b'/').find_map(names::problem) {
                return Ok(Err(why.to_string()));
            }
        }
        let before = match &part.old {
            Some(path) => match self.file(path, limits)? {
                Some(found) => Some(found),
                None => return Ok(Err("there is no such file".to_string())),
            },
            None => None,
        };
        let renamed = part.old.is_some() && part.new.is_some() && part.old != part.new;
        if let Some(new) = part.new.as_ref().filter(|_| before.is_none() || renamed)
            && self.file(new, limits)?.is_some()
        {
            return Ok(Err("the file is there already".to_string()));
        }
        let mode = |m: u32| match m {
            0o120_000 => Kind::Symlink,
            m if m & 0o111 != 0 => Kind::Executable,
            _ => Kind::File,
        };
        let kind = before.as_ref().map(|(k, _)| *k);
        if let (Some(said), Some(kind)) = (part.old_mode.map(mode), kind)
            && said != kind
        {
            return Ok(Err(format!("it is a {kind:?} and not a {said:?}")));
        }
        let old = before.map(|(_, bytes)| bytes).unwrap_or_default();
        let bytes = match part.apply(&old, limits.file_bytes) {
            Ok(bytes) => bytes,
            Err(why) => return Ok(Err(why)),
        };
        if part.new.is_none() && !matches!(part.change, diff_read::Change::Nothing) && !bytes.is_empty() {
            return Ok(Err("it goes, but something is left in it".to_string()));
        }
        if let Some(old) = part.old.as_ref().filter(|_| !part.copy && (renamed || part.new.is_none())) {
            self.changed.insert(old.clone(), None);
        }
        let written = bytes.len() as u64;
        if let Some(new) = &part.new {
            let kind = part.new_mode.map(mode).or(kind).unwrap_or(Kind::File);
            self.changed.insert(new.clone(), Some((kind, bytes)));
        }
        Ok(Ok(written))
    }

    /// A file or symlink at `path`, as it stands now.
    fn file(&self, path: &[u8], limits: &Limits) -> Result<Option<(Kind, Vec<u8>)>, Error> {
        if let Some(known) = self.changed.get(path) {
            return Ok(known.clone());
        }
        let Some(entry) = self.entry(path)? else { return Ok(None) };
        if matches!(entry.kind, Kind::Folder | Kind::Submodule) {
            return Ok(None);
        }
        let (size, _) = self.odb.read_header(entry.id).map_err(Error::broken)?;
        if size as u64 > limits.file_bytes {
            return Err(Error::TooLarge { what: "bytes of a file", cap: limits.file_bytes });
        }
        Ok(Some((entry.kind, self.odb.read(entry.id).map_err(Error::broken)?.data().to_vec())))
    }

    fn entry(&self, path: &[u8]) -> Result<Option<Entry>, Error> {
        let mut tree = Some(self.top);
        let mut found = None;
        for name in path.split(|b| *b == b'/') {
            let Some(id) = tree else { return Ok(None) };
            found = tree::read(self.odb, id)?.into_iter().find(|e| e.name == name);
            tree = found.as_ref().filter(|e| e.kind == Kind::Folder).map(|e| e.id);
        }
        Ok(found)
    }

    /// No path may be a file and a folder once all is done.
    fn settle(&self) -> Verdict<()> {
        for (path, now) in &self.changed {
            if now.is_none() {
                continue;
            }
            for (at, _) in path.iter().enumerate().filter(|(_, b)| **b == b'/') {
                let above = path.get(..at).unwrap_or_default();
                let is_file = match self.changed.get(above) {
                    Some(known) => known.is_some(),
                    None => self.entry(above)?.is_some_and(|e| e.kind != Kind::Folder),
                };
                if is_file {
                    return Ok(Err(format!(
                        "{} is a file, not a folder",
                        shown(above, b"").trim_end_matches('/')
                    )));
                }
            }
            if let Some(folder) = self.entry(path)?.filter(|e| e.kind == Kind::Folder)
                && self.left_in(folder.id, path)?
            {
                return Ok(Err(format!(
                    "{} is a folder, not a file",
                    shown(path, b"").trim_end_matches('/')
                )));
            }
        }
        Ok(Ok(()))
    }

    /// Whether anything of the old folder stays.
    fn left_in(&self, folder: Oid, path: &[u8]) -> Result<bool, Error> {
        let mut stack = vec![(folder, path.to_vec())];
        while let Some((id, at)) = stack.pop() {
            for entry in tree::read(self.odb, id)? {
                let here = tree::join(&at, &entry.name);
                match entry.kind {
                    Kind::Folder => stack.push((entry.id, here)),
                    _ if self.changed.get(&here) == Some(&None) => {}
                    _ => return Ok(true),
                }
            }
        }
        Ok(false)
    }
}

/// The mirror's objects to read, memory to write.
fn in_memory(objects: &Path) -> Result<Odb<'static>, Error> {
    let odb = mirror::open_odb(objects)?;
    odb.add_new_mempack_backend(1000).map_err(Error::broken)?;
    Ok(odb)
}

impl<'a> Node<'a> {
    /// Whether the path is no folder now: deletions below a new file only repeat what the file says.
    fn is_leaf(&self) -> bool {
        let put = matches!(self.own, Some(Content::File { .. } | Content::Symlink { .. }));
        self.below.is_empty() || (put && self.below.values().all(Node::only_deletes))
    }

    fn only_deletes(&self) -> bool {
        matches!(self.own, None | Some(Content::Deleted)) && self.below.values().all(Node::only_deletes)
    }

    fn place(&mut self, path: &'a [u8], to: &'a Content) {
        let mut node = self;
        for part in path.split(|b| *b == b'/') {
            node = node.below.entry(part).or_default();
        }
        node.own = Some(to);
    }
}

/// Why a change cannot be carried by a patch.
fn unfit(path: &[u8], to: &Content, limits: &Limits) -> Option<&'static str> {
    if path.len() as u64 > limits.path_bytes {
        return Some("the path is too long");
    }
    if path.split(|b| *b == b'/').count() as u64 > limits.depth {
        return Some("the path is too deep");
    }
    if let Some(why) = path.split(|b| *b == b'/').find_map(names::problem) {
        return Some(why);
    }
    match to {
        Content::Symlink { target } if target.is_empty() || target.contains(&0) => {
            Some("an impossible symlink")
        }
        Content::Symlink { .. } if path.rsplit(|b| *b == b'/').next() == Some(b".gitmodules") => {
            Some("git takes no symlink of this name")
        }
        Content::File { bytes, .. } if bytes.len() as u64 > limits.file_bytes => {
            Some("the file is too large")
        }
        _ => None,
    }
}

fn skip(skipped: &mut Vec<Skipped>, path: &[u8], why: &str) {
    if skipped.len() < MAX_SKIPPED {
        skipped
            .push(Skipped { path: shown(path, b"").trim_end_matches('/').to_string(), why: why.to_string() });
    }
}

/// Writes the tree `old` with the changes below `node`; `None` if nothing is left. As deep as `limits.depth`.
fn rebuild(
    odb: &Odb<'_>,
    old: Option<Oid>,
    node: &Node<'_>,
    path: &[u8],
    skipped: &mut Vec<Skipped>,
) -> Result<Option<Oid>, Error> {
    let mut entries: BTreeMap<Vec<u8>, Entry> = BTreeMap::new();
    if let Some(old) = old {
        entries.extend(tree::read(odb, old)?.into_iter().map(|e| (e.name.clone(), e)));
    }
    for (name, change) in &node.below {
        let here = tree::join(path, name);
        let before = entries.get(*name);
        if before.is_some_and(|e| e.kind == Kind::Submodule) {
            skip(skipped, &here, "it is in a submodule, which is not here");
            continue;
        }
        let entry = |mode: u32, kind: Kind, id: Oid| Entry { name: name.to_vec(), mode, kind, id };
        let after = if change.is_leaf() {
            match change.own {
                None => continue,
                Some(Content::Deleted) => None,
                Some(Content::File { bytes, executable }) => {
                    let id = odb.write(ObjectType::Blob, bytes).map_err(Error::broken)?;
                    // An old spelling of the same mode stays, or the patch would change it.
                    let kind = if *executable { Kind::Executable } else { Kind::File };
                    let mode = before.filter(|e| e.kind == kind).map(|e| e.mode);
                    Some(entry(mode.unwrap_or(if *executable { 0o100_755 } else { 0o100_644 }), kind, id))
                }
                Some(Content::Symlink { target }) => {
                    let id = odb.write(ObjectType::Blob, target).map_err(Error::broken)?;
                    Some(entry(0o120_000, Kind::Symlink, id))
                }
            }
        } else {
            // With changes below, the path is a folder now; `own` only says that nothing old is left in it.
            let old = before.filter(|e| e.kind == Kind::Folder && change.own.is_none()).map(|e| e.id);
            rebuild(odb, old, change, &here, skipped)?.map(|id| entry(0o040_000, Kind::Folder, id))
        };
        match after {
            Some(entry) => entries.insert(name.to_vec(), entry),
            None => entries.remove(*name),
        };
    }
    if entries.is_empty() {
        return Ok(None);
    }
    let mut sorted: Vec<Entry> = entries.into_values().collect();
    // git sorts a folder as if its name ended in a slash.
    let key =
        |e: &Entry| if e.kind == Kind::Folder { [e.name.as_slice(), b"/"].concat() } else { e.name.clone() };
    sorted.sort_by_cached_key(key);
    let mut bytes = Vec::new();
    for e in &sorted {
        bytes.extend_from_slice(format!("{:o} ", e.mode).as_bytes());
        bytes.extend_from_slice(&e.name);
        bytes.push(0);
        bytes.extend_from_slice(e.id.as_bytes());
    }
    odb.write(ObjectType::Tree, &bytes).map(Some).map_err(Error::broken)
}
