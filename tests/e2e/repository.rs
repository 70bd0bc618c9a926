//! The repository that the customers' jobs name: two files, one commit, served over http on the loopback by
//! the library's own small git server.

use coinop::repo::serve::{self, Server};
use tempfile::TempDir;

/// What `README.md` says, for a job to print.
pub const README: &str = "Small, but a real repository: naïve café ☕\n";

/// A repository being served until this is dropped.
pub struct Served {
    pub url: String,
    /// The one commit, hex.
    pub commit: String,
    _server: Server,
    _dir: TempDir,
}

impl Served {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder for the repository");
        let path = dir.path().join("demo.git");
        let files = [("README.md", README), ("src/count.sh", "wc -c < README.md\n")];
        let commit = serve::sample_repo(&path, &files).expect("a repository");
        let any_port = ([127, 0, 0, 1], 0).into();
        let server = serve::start(&[path], any_port).await.expect("a git server on the loopback");
        Self { url: server.url(), commit, _server: server, _dir: dir }
    }
}
