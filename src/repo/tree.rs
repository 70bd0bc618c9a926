//! What a commit's tree will put on disk, planned from raw tree objects before a single file is made:
//! every name judged, every count capped. It writes nothing.

use git2::{ObjectType, Odb, Oid};

use super::{Error, Limits, ignore, names};

/// Bytes of all folders' paths together: what a plan may hold in memory.
const MAX_ALL_PATHS: u64 = 64 << 20;
/// Bytes of one tree object, some 400,000 names: all of it is in memory at once, and a few kilobytes of a pack
/// can unpack to it.
const MAX_TREE: u64 = 16 << 20;

/// What stands at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Executable,
    Symlink,
    Folder,
    /// A submodule: an empty folder here.
    Submodule,
}

/// One entry of a tree object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub name: Vec<u8>,
    /// As written; old repositories hold more spellings than `kind` tells apart.
    pub mode: u32,
    pub kind: Kind,
    pub id: Oid,
}

/// Reads a tree object without libgit2's own ideas of it; `None` if it has more than `most` entries.
pub(super) fn parse(mut data: &[u8], most: u64) -> Result<Option<Vec<Entry>>, Error> {
    let broken = || Error::broken("a tree object is malformed");
    let mut entries = Vec::new();
    while !data.is_empty() {
        // Before the next entry takes memory: a small pack can unpack to a tree of millions.
        if entries.len() as u64 >= most {
            return Ok(None);
        }
        let blank = data.iter().take(8).position(|b| *b == b' ').ok_or_else(broken)?;
        let (mode, rest) = data.split_at(blank);
        let rest = rest.get(1..).ok_or_else(broken)?;
        let end = rest.iter().position(|b| *b == 0).ok_or_else(broken)?;
        let (name, rest) = rest.split_at(end);
        let id = rest.get(1..21).ok_or_else(broken)?;
        data = rest.get(21..).ok_or_else(broken)?;
        // Digits only: the parser of numbers would take a sign as well.
        let mode = std::str::from_utf8(mode)
            .ok()
            .filter(|m| m.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|m| u32::from_str_radix(m, 8).ok())
            .ok_or_else(broken)?;
        let kind = match mode & 0o170_000 {
            0o100_000 if mode & 0o111 != 0 => Kind::Executable,
            0o100_000 => Kind::File,
            0o120_000 => Kind::Symlink,
            0o040_000 => Kind::Folder,
            0o160_000 => Kind::Submodule,
            _ => return Err(Error::broken(format!("a tree entry has the mode {mode:o}"))),
        };
        entries.push(Entry {
            name: name.to_vec(),
            mode,
            kind,
            id: Oid::from_bytes(id).map_err(Error::broken)?,
        });
    }
    Ok(Some(entries))
}

/// Reads and parses a tree object of at most `MAX_TREE` bytes.
pub(super) fn read(odb: &Odb<'_>, id: Oid) -> Result<Vec<Entry>, Error> {
    Ok(read_at_most(odb, id, u64::MAX)?.unwrap_or_default())
}

/// The same; `None` if it has more than `most` entries.
fn read_at_most(odb: &Odb<'_>, id: Oid, most: u64) -> Result<Option<Vec<Entry>>, Error> {
    let missing = |_| Error::broken(format!("tree {id} is missing"));
    let (size, kind) = odb.read_header(id).map_err(missing)?;
    if kind != ObjectType::Tree {
        return Err(Error::broken(format!("{id} should be a tree and is not")));
    }
    if size as u64 > MAX_TREE {
        return Err(Error::TooLarge { what: "bytes of one folder's list", cap: MAX_TREE });
    }
    parse(odb.read(id).map_err(missing)?.data(), most)
}

/// A file or symlink to make.
#[derive(Debug)]
pub(super) struct File {
    pub name: Vec<u8>,
    pub kind: Kind,
    pub id: Oid,
}

/// A folder to make, with what stands in it.
#[derive(Debug, Default)]
pub(super) struct Folder {
    /// Relative to the top; empty for the top itself. A parent stands before its children.
    pub path: Vec<u8>,
    pub files: Vec<File>,
}

#[derive(Debug, Default)]
pub(super) struct Plan {
    pub folders: Vec<Folder>,
    pub files: u64,
    pub submodules: Vec<Vec<u8>>,
}

impl Plan {
    /// Paths of the files that say what git ignores; one more than are read at most.
    pub fn ignores(&self) -> Vec<Vec<u8>> {
        let rules = |f: &&File| f.name == ignore::NAME && f.kind != Kind::Symlink;
        let paths = self
            .folders
            .iter()
            .flat_map(|folder| folder.files.iter().filter(rules).map(|f| join(&folder.path, &f.name)));
        paths.take(ignore::MAX_FILES + 1).collect()
    }
}

/// A tree still to be read.
struct Open {
    folder: usize,
    id: Oid,
    depth: u64,
}

/// Plans the tree `id`.
pub(super) fn plan(odb: &Odb<'_>, id: Oid, limits: &Limits) -> Result<Plan, Error> {
    let mut plan = Plan { folders: vec![Folder::default()], ..Plan::default() };
    let mut stack = vec![Open { folder: 0, id, depth: 0 }];
    let mut count = 0u64;
    let mut path_bytes = 0u64;
    // An explicit stack: depth is the customer's choice, our call stack is not.
    while let Some(open) = stack.pop() {
        let too_many = || Error::TooLarge { what: "files and folders", cap: limits.files };
        let entries = read_at_most(odb, open.id, limits.files.saturating_sub(count))?.ok_or_else(too_many)?;
        count += entries.len() as u64;
        let parent = plan.folders.get(open.folder).map(|f| f.path.clone()).unwrap_or_default();
        let mut files = Vec::new();
        let mut below = Vec::new();
        for entry in entries {
            if let Some(why) = names::problem(&entry.name) {
                return Err(Error::refused(format!("{why}: {}", shown(&parent, &entry.name))));
            }
            let length = parent.len() as u64 + 1 + entry.name.len() as u64;
            if length > limits.path_bytes {
                return Err(Error::TooLarge { what: "bytes of a path", cap: limits.path_bytes });
            }
            match entry.kind {
                Kind::Folder | Kind::Submodule => {
                    if open.depth + 1 > limits.depth {
                        return Err(Error::TooLarge { what: "depth of folders", cap: limits.depth });
                    }
                    path_bytes += length;
                    if path_bytes > MAX_ALL_PATHS {
                        return Err(Error::TooLarge { what: "bytes of all paths", cap: MAX_ALL_PATHS });
                    }
                    let path = join(&parent, &entry.name);
                    if entry.kind == Kind::Submodule {
                        plan.submodules.push(path.clone());
                    } else {
                        below.push(Open { folder: plan.folders.len(), id: entry.id, depth: open.depth + 1 });
                    }
                    plan.folders.push(Folder { path, files: Vec::new() });
                }
                kind => {
                    plan.files += 1;
                    files.push(File { name: entry.name, kind, id: entry.id });
                }
            }
        }
        if let Some(folder) = plan.folders.get_mut(open.folder) {
            folder.files = files;
        }
        stack.extend(below.into_iter().rev());
    }
    Ok(plan)
}

pub(super) fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}

/// A path made safe to show, at most 200 characters.
pub(super) fn shown(parent: &[u8], name: &[u8]) -> String {
    join(parent, name).escape_ascii().to_string().chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_tree_is_an_error_and_never_a_panic() {
        let id = [7u8; 20];
        let good = [b"100644 a\0".as_slice(), &id].concat();
        assert_eq!(parse(&good, 1).unwrap().unwrap().len(), 1);
        for cut in 1..good.len() {
            assert!(parse(&good[..cut], 1).is_err(), "cut at {cut}");
        }
        for mode in ["170000", "0", "999999", "-100644", "+100644", "100644100644", "020000"] {
            let bad = [mode.as_bytes(), b" a\0", &id].concat();
            assert!(parse(&bad, 1).is_err(), "{mode}");
        }
    }

    #[test]
    fn a_list_of_many_megabytes_is_refused_by_its_size_and_one_of_many_names_by_their_number() {
        let odb = Odb::new().unwrap();
        odb.add_new_mempack_backend(1).unwrap();
        let entry = |n: u32| [format!("100644 {n:012}\0").as_bytes(), &[7; 20]].concat();
        let put = |names: u32| {
            let list: Vec<u8> = (0..names).flat_map(entry).collect();
            odb.write(ObjectType::Tree, &list).unwrap()
        };
        let (large, long) = (put(450_000), put(400));
        let told = |id, files| {
            let limits = Limits { files, ..Limits::default() };
            plan(&odb, id, &limits).err().map(|e| e.to_string())
        };
        let why = format!("bytes of one folder's list over {MAX_TREE}");
        assert!(told(large, 1_000_000).is_some_and(|e| e.contains(&why)));
        assert!(read(&odb, large).is_err_and(|e| e.to_string().contains(&why)));
        assert!(told(long, 399).is_some_and(|e| e.contains("files and folders over 399")));
        assert_eq!(told(long, 400), None);
    }

    #[test]
    fn entries_beyond_the_most_are_not_even_looked_at() {
        let entry = [b"100644 a\0".as_slice(), &[7; 20]].concat();
        let data = [entry.as_slice(), &entry, b"no entry at all"].concat();
        assert_eq!(parse(&data, 2).unwrap(), None);
        assert!(parse(&data, 3).is_err());
    }
}
