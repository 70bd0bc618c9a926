//! Repositories to clone: one that is served, and a server that keeps a clone waiting until it is let go.

use std::net::{Ipv4Addr, SocketAddr};

use coinop::repo::serve;
use tempfile::TempDir;

use super::gate::Gate;

pub const README: &str = "Coins, counted.\n";

/// A small repository, served over http as long as this lives.
pub struct Served {
    pub url: String,
    pub commit: String,
    pub folder: std::path::PathBuf,
    address: SocketAddr,
    _server: serve::Server,
    _dir: TempDir,
}

impl Served {
    pub async fn start() -> Served {
        let dir = tempfile::tempdir().expect("a folder");
        let folder = dir.path().join("coins");
        let commit = serve::sample_repo(&folder, &[("README.md", README)]).expect("a repository");
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let server = serve::start(std::slice::from_ref(&folder), any).await.expect("a git server");
        let address = server.root().trim_start_matches("http://").trim_end_matches('/').parse();
        let address = address.expect("an address");
        Served { url: server.url(), commit, folder, address, _server: server, _dir: dir }
    }

    /// A gate before this server, and the repository's URL by way of it.
    pub async fn behind_a_gate(&self) -> (Gate, String) {
        let gate = Gate::before(self.address).await;
        let url = format!("http://{}/coins", gate.address());
        (gate, url)
    }
}
