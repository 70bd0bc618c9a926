//! A repository on this host as a source, for `file://` when the operator allows it. Its configuration
//! runs nothing: only objects and refs are read.

use std::io::Write;
use std::path::Path;

use git2::{Oid, Repository, RepositoryOpenFlags};

use super::remote::{Ref, Source, Want};
use super::{Error, pack};

pub(super) struct Local {
    repo: Repository,
}

impl Local {
    pub fn open(path: &Path) -> Result<Local, Error> {
        super::prepare_libgit2();
        let nowhere: [&Path; 0] = [];
        let repo = Repository::open_ext(path, RepositoryOpenFlags::NO_SEARCH, nowhere)
            .map_err(|e| Error::unreachable(e.message().to_string()))?;
        Ok(Local { repo })
    }
}

impl Source for Local {
    fn refs(&mut self, _prefixes: &[String]) -> Result<Vec<Ref>, Error> {
        pack::refs(&self.repo)
    }

    fn gives_any_commit(&self) -> bool {
        true
    }

    fn can_filter(&self) -> bool {
        true
    }

    fn gives(&mut self, id: Oid) -> Result<(), Error> {
        self.repo.find_commit(id).map(|_| ()).map_err(|_| Error::unreachable(format!("not our ref {id}")))
    }

    fn fetch(&mut self, want: &Want, to: &mut dyn Write) -> Result<(), Error> {
        let contents = pack::contents(&self.repo, want)?;
        pack::write(&self.repo, &contents.objects, pack::How::Fast, to)
    }
}
