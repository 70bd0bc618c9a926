//! The `.git` of a base, for tools that ask git where they are: the one commit with its tree, no parents, an index, and
//! configuration of ours. Nothing of it is a stranger's but the objects of that commit. A job has it in its overlay, and
//! what it does there comes into no patch: `.git` at the top is no part of the changes.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use git2::{Index, Indexer, Oid, Repository};

use super::budget::Budget;
use super::mirror::{self, Mirror};
use super::remote::Want;
use super::{Error, pack};

/// Git neither packs nor cleans up by itself here: it would start processes that outlive their command.
const CONFIG: &str = "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = false\n\tlogallrefupdates = false\n\
                      [gc]\n\tauto = 0\n[maintenance]\n\tauto = false\n";
/// What makes a folder a repository for git, beside the files below.
const FOLDERS: [&str; 5] = ["objects/info", "objects/pack", "refs/heads", "refs/tags", "info"];

/// Makes it in the folder of a base whose files are all there. Returns its bytes.
pub(super) fn make(mirror: &Mirror, commit: Oid, base: &Path, budget: &Budget) -> Result<u64, Error> {
    let host = Error::host::<io::Error>;
    let git = base.join(".git");
    for folder in FOLDERS {
        fs::create_dir_all(git.join(folder)).map_err(host("make a base's .git"))?;
    }
    for (name, text) in [
        ("HEAD", format!("{commit}\n")),
        // The history behind the commit is not here.
        ("shallow", format!("{commit}\n")),
        ("config", CONFIG.to_owned()),
    ] {
        fs::write(git.join(name), text).map_err(host("make a base's .git"))?;
    }
    // Wrapped around the objects: no configuration and no refs are read.
    let repo = Repository::from_odb(mirror.odb()?).map_err(Error::broken)?;
    copy_objects(&repo, commit, &git.join("objects/pack"), budget)?;
    // Without what a file system says of the files, which differs from host to host: git looks at them once.
    let mut index = Index::open(&git.join("index")).map_err(Error::broken)?;
    let tree = repo.find_commit(commit).and_then(|commit| commit.tree()).map_err(Error::broken)?;
    index.read_tree(&tree).and_then(|()| index.write()).map_err(Error::broken)?;
    open_to_all(&git).map_err(host("make a base's .git"))
}

/// Of this commit alone: a mirror holds what other customers asked for, too.
fn copy_objects(repo: &Repository, commit: Oid, to: &Path, budget: &Budget) -> Result<(), Error> {
    let want = Want { commits: vec![commit], depth: Some(1), ..Want::default() };
    let contents = pack::contents(repo, &want)?;
    let odb = repo.odb().map_err(Error::broken)?;
    let mut indexer = Indexer::new(Some(&odb), to, 0o444, false).map_err(Error::broken)?;
    indexer.progress(|_| budget.left().is_ok());
    let written = pack::write(repo, &contents.objects, pack::How::Small, &mut indexer);
    written.map_err(|e| mirror::prefer_budget(budget, e))?;
    indexer.flush().map_err(Error::host("make a base's .git"))?;
    indexer.commit().map(drop).map_err(|e| mirror::prefer_budget(budget, Error::broken(e)))
}

/// Readable for the job's user, whatever the umask of the node; its bytes.
fn open_to_all(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let found = entry.metadata()?;
        if found.is_dir() {
            bytes += open_to_all(&entry.path())?;
        } else {
            let mode = if found.permissions().mode() & 0o200 == 0 { 0o444 } else { 0o644 };
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(mode))?;
            bytes += found.len();
        }
    }
    Ok(bytes)
}
