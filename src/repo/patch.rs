//! What a job changed, as a unified diff that `git apply` takes, and whether such a diff applies. Both work
//! on objects in memory over the mirror's: no work tree, no index file, nothing that a job could have laid out.

use std::collections::BTreeMap;
use std::path::Path;

use git2::{Diff, DiffFormat, DiffOptions, ObjectType, Odb, Oid, Repository};
use serde::{Deserialize, Serialize};

use super::tree::{self, Entry, Kind, shown};
use super::{Error, Limits, mirror, names};
use crate::sandbox::{Change, Content};

/// Most skipped paths named.
const MAX_SKIPPED: usize = 20;

/// A diff from the pinned commit to the changed tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Patch {
    /// Text but for file contents that are not UTF-8; empty if nothing differs.
    pub diff: Vec<u8>,
    pub files_changed: u64,
    pub lines_added: u64,
    pub lines_removed: u64,
    /// Changes that a patch cannot carry; at most 20 are named.
    pub skipped: Vec<Skipped>,
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
    let repo = in_memory(objects)?;
    let odb = repo.odb().map_err(Error::broken)?;
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
    let mut options = DiffOptions::new();
    options.context_lines(3).interhunk_lines(0).show_binary(true).id_abbrev(40).ignore_submodules(true);
    let find = |id| repo.find_tree(id).map_err(Error::broken);
    let diff = repo
        .diff_tree_to_tree(Some(&find(old)?), Some(&find(new)?), Some(&mut options))
        .map_err(Error::broken)?;
    let text = print(&diff, limits.patch_bytes)?;
    let stats = diff.stats().map_err(Error::broken)?;
    Ok(Patch {
        diff: text,
        files_changed: stats.files_changed() as u64,
        lines_added: stats.insertions() as u64,
        lines_removed: stats.deletions() as u64,
        skipped,
    })
}

/// Whether the diff applies to the commit's tree.
pub(super) fn check(objects: &Path, commit: Oid, diff: &[u8], limits: &Limits) -> Result<(), Error> {
    if diff.len() as u64 > limits.patch_bytes {
        return Err(Error::TooLarge { what: "bytes of a patch", cap: limits.patch_bytes });
    }
    if diff.is_empty() {
        return Ok(());
    }
    let repo = in_memory(objects)?;
    let tree = mirror::tree_of(&repo.odb().map_err(Error::broken)?, commit)?;
    let tree = repo.find_tree(tree).map_err(Error::broken)?;
    let not = |e: git2::Error| Error::DoesNotApply { why: e.message().chars().take(300).collect() };
    let diff = Diff::from_buffer(diff).map_err(not)?;
    repo.apply_to_tree(&tree, &diff, None).map_err(not)?;
    Ok(())
}

/// The mirror's objects to read, memory to write.
fn in_memory(objects: &Path) -> Result<Repository, Error> {
    let odb = mirror::open_odb(objects)?;
    odb.add_new_mempack_backend(1000).map_err(Error::broken)?;
    Repository::from_odb(odb).map_err(Error::broken)
}

impl<'a> Node<'a> {
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
        let after = if change.below.is_empty() {
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

fn print(diff: &Diff<'_>, cap: u64) -> Result<Vec<u8>, Error> {
    let mut text = Vec::new();
    let mut over = false;
    let printed = diff.print(DiffFormat::Patch, |_, _, line| {
        if matches!(line.origin(), '+' | '-' | ' ') {
            text.push(line.origin() as u8);
        }
        text.extend_from_slice(line.content());
        over = text.len() as u64 > cap;
        !over
    });
    if over {
        return Err(Error::TooLarge { what: "bytes of a patch", cap });
    }
    printed.map_err(Error::broken)?;
    Ok(text)
}
