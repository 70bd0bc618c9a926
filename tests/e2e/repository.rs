//! The repository that the customers' jobs name: a few files, one commit, served over http on the loopback by
//! the library's own small git server.

use std::path::Path;

use git2::{Repository, Signature, Time};
use tempfile::TempDir;

/// What `README.md` says, for a job to print.
pub const README: &str = "Small, but a real repository: naïve café ☕\n";

/// Makes a repository with one commit and returns the commit.
fn make(at: &Path) -> String {
    let repository = Repository::init(at).expect("a repository");
    std::fs::create_dir_all(at.join("src")).expect("a folder");
    std::fs::write(at.join("README.md"), README).expect("a file");
    std::fs::write(at.join("src/count.sh"), "wc -c < README.md\n").expect("a file");
    let mut index = repository.index().expect("its index");
    index.add_all(["*"], git2::IndexAddOption::DEFAULT, None).expect("the files");
    index.write().expect("the index");
    let tree = index.write_tree().and_then(|id| repository.find_tree(id)).expect("a tree");
    let author = Signature::new("A Customer", "customer@example.org", &Time::new(1_700_000_000, 0))
        .expect("an author");
    let commit = repository.commit(Some("HEAD"), &author, &author, "First", &tree, &[]).expect("a commit");
    commit.to_string()
}

/// A repository being served until this is dropped.
pub struct Served {
    pub url: String,
    pub commit: String,
    _dir: TempDir,
}

impl Served {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let commit = make(dir.path());
        Self { url: "http://127.0.0.1:1/demo.git".into(), commit, _dir: dir }
    }
}
