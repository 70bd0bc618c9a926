//! The bare mirror of one repository: objects that came in, and one ref a commit that is here in full
//! with its tree. It never opens the mirror as a repository with configuration; libgit2 sees an object
//! folder only.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use git2::{Indexer, ObjectType, Odb, Oid};

use super::budget::Budget;
use super::packscan::Scan;
use super::remote::{Source, Want};
use super::{Error, Limits};

/// Annotated tags of tags followed.
const MAX_TAGS: usize = 8;
/// Bytes of a commit or an annotated tag; it is read whole.
const MAX_MESSAGE: u64 = 1 << 20;

/// A mirror's folder. The caller holds the repository's lock while it writes.
#[derive(Debug, Clone)]
pub(super) struct Mirror {
    dir: PathBuf,
}

impl Mirror {
    /// Opens or makes the mirror in `dir`.
    pub fn open(dir: &Path) -> Result<Mirror, Error> {
        let make = || -> io::Result<()> {
            std::fs::create_dir_all(dir.join("objects/pack"))?;
            std::fs::create_dir_all(dir.join("refs/pins"))?;
            // Two files make it a bare repository that a person can look into with git.
            std::fs::write(dir.join("HEAD"), "ref: refs/heads/none\n")?;
            std::fs::write(dir.join("config"), "[core]\n\trepositoryformatversion = 0\n\tbare = true\n")
        };
        if !dir.join("config").exists() {
            make().map_err(Error::host("make a mirror's folder"))?;
        }
        Ok(Mirror { dir: dir.to_path_buf() })
    }

    pub fn objects(&self) -> PathBuf {
        self.dir.join("objects")
    }

    /// A fresh view of the objects; each thread takes its own.
    pub fn odb(&self) -> Result<Odb<'static>, Error> {
        open_odb(&self.objects())
    }

    fn pin_file(&self, commit: Oid) -> PathBuf {
        self.dir.join("refs/pins").join(commit.to_string())
    }

    /// Whether the commit is here with its whole tree.
    pub fn has(&self, commit: Oid) -> bool {
        self.pin_file(commit).exists()
    }

    /// The commits that are here in full, newest first, at most `most`.
    pub fn pins(&self, most: usize) -> Vec<Oid> {
        let Ok(entries) = std::fs::read_dir(self.dir.join("refs/pins")) else { return Vec::new() };
        let mut found: Vec<_> = entries
            .flatten()
            .filter_map(|e| {
                let id = super::remote::full_id(e.file_name().to_str()?)?;
                Some((e.metadata().ok()?.modified().ok()?, id))
            })
            .collect();
        found.sort_by(|a, b| b.cmp(a));
        found.into_iter().take(most).map(|(_, id)| id).collect()
    }

    /// Packs here; each fetch adds one.
    pub fn packs(&self) -> usize {
        let packs = |e: &std::fs::DirEntry| e.path().extension().is_some_and(|x| x == "pack");
        std::fs::read_dir(self.objects().join("pack")).map_or(0, |d| d.flatten().filter(packs).count())
    }

    /// Bytes of the packs and their indexes.
    pub fn bytes(&self) -> u64 {
        std::fs::read_dir(self.objects().join("pack"))
            .map_or(0, |d| d.flatten().filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum())
    }

    /// Marks a commit as here in full.
    pub fn pin(&self, commit: Oid) -> Result<(), Error> {
        let write = || -> io::Result<()> {
            let temporary = self.dir.join(format!("refs/{commit}.new"));
            std::fs::write(&temporary, format!("{commit}\n"))?;
            std::fs::rename(temporary, self.pin_file(commit))?;
            // For a person with git: the history behind a pin is not here.
            let mut shallow =
                std::fs::OpenOptions::new().create(true).append(true).open(self.dir.join("shallow"))?;
            writeln!(shallow, "{commit}")
        };
        write().map_err(Error::host("note a fetched commit"))
    }

    /// Fetches and indexes a pack. libgit2 computes every object's id from its bytes as it indexes.
    pub fn receive(
        &self,
        source: &mut dyn Source,
        want: &Want,
        limits: &Limits,
        budget: &Budget,
    ) -> Result<(), Error> {
        let odb = self.odb()?;
        let mut indexer =
            Indexer::new(Some(&odb), &self.objects().join("pack"), 0o444, false).map_err(Error::broken)?;
        indexer.progress(|_| budget.left().is_ok());
        let mut scan = Scan::new(indexer, limits);
        source.fetch(want, &mut scan).map_err(|e| prefer_budget(budget, e))?;
        let indexer = scan.finish()?;
        indexer.commit().map_err(|e| prefer_budget(budget, Error::broken(e)))?;
        Ok(())
    }
}

/// A stop that libgit2 reports as an error of its own is told as what it was.
pub(super) fn prefer_budget(budget: &Budget, e: Error) -> Error {
    match e {
        Error::Broken { .. } => budget.left().err().unwrap_or(e),
        other => other,
    }
}

/// An object folder alone: no configuration, no refs, no work tree.
pub(super) fn open_odb(objects: &Path) -> Result<Odb<'static>, Error> {
    super::prepare_libgit2();
    let path = objects.to_str().ok_or_else(|| Error::refused("the data folder's path is not UTF-8"))?;
    let odb = Odb::new().map_err(Error::broken)?;
    odb.add_disk_alternate(path).map_err(Error::broken)?;
    Ok(odb)
}

/// The commit behind `id`, through annotated tags.
pub(super) fn peel(odb: &Odb<'_>, mut id: Oid) -> Result<Oid, Error> {
    for _ in 0..MAX_TAGS {
        let object = read_small(odb, id, || format!("the server did not send {id}"))?;
        match object.kind() {
            ObjectType::Commit => return Ok(id),
            ObjectType::Tag => id = header(object.data(), b"object ")?,
            other => return Err(Error::refused(format!("the ref names a {}, not a commit", other.str()))),
        }
    }
    Err(Error::refused(format!("more than {MAX_TAGS} tags of tags")))
}

/// The tree of a commit.
pub(super) fn tree_of(odb: &Odb<'_>, commit: Oid) -> Result<Oid, Error> {
    let object = read_small(odb, commit, || format!("commit {commit} is missing"))?;
    if object.kind() != ObjectType::Commit {
        return Err(Error::refused(format!("{commit} is a {}, not a commit", object.kind().str())));
    }
    header(object.data(), b"tree ")
}

/// Reads a commit or tag, unless it is so large that nobody means it.
fn read_small<'a>(
    odb: &'a Odb<'_>,
    id: Oid,
    missing: impl Fn() -> String,
) -> Result<git2::OdbObject<'a>, Error> {
    let (size, _) = odb.read_header(id).map_err(|_| Error::broken(missing()))?;
    if size as u64 > MAX_MESSAGE {
        return Err(Error::TooLarge { what: "bytes of a commit or tag", cap: MAX_MESSAGE });
    }
    odb.read(id).map_err(|_| Error::broken(missing()))
}

/// The id in an object's first line.
fn header(data: &[u8], key: &[u8]) -> Result<Oid, Error> {
    data.strip_prefix(key)
        .and_then(|rest| rest.get(..40))
        .and_then(|hex| std::str::from_utf8(hex).ok())
        .and_then(super::remote::full_id)
        .ok_or_else(|| Error::broken("a commit or tag without its first line"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_or_tag_of_megabytes_is_refused_by_its_size() {
        let odb = Odb::new().unwrap();
        odb.add_new_mempack_backend(1).unwrap();
        let id = "7".repeat(40);
        for (kind, key) in [(ObjectType::Commit, "tree"), (ObjectType::Tag, "object")] {
            let text = format!("{key} {id}\n\n{}", "m".repeat(2 << 20));
            let large = odb.write(kind, text.as_bytes()).unwrap();
            for told in [peel(&odb, large), tree_of(&odb, large)] {
                assert!(
                    matches!(told, Err(Error::TooLarge { what: "bytes of a commit or tag", .. })),
                    "{told:?}"
                );
            }
        }
    }
}
