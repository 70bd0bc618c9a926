//! The repository room from outside: against our own small server, against real git where it is installed,
//! and against repositories made byte by byte to do harm.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use coinop::repo::serve::{self, Server};
use coinop::repo::{Error, Options, Pin, Repos};
use coinop::sandbox::Tree;

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

struct House {
    dir: tempfile::TempDir,
    repo: PathBuf,
    server: Server,
    repos: Repos,
}

async fn house(files: &[(&str, &str)]) -> (House, String) {
    let dir = tempfile::tempdir().unwrap();
    let repo = dir.path().join("sample.git");
    let commit = serve::sample_repo(&repo, files).unwrap();
    let server = serve::start(&[repo.clone()], loopback()).await.unwrap();
    let repos = Repos::open(&dir.path().join("cache"), open_options()).unwrap();
    (House { dir, repo, server, repos }, commit)
}

fn open_options() -> Options {
    Options { allow_private: true, allow_file: true, ..Options::default() }
}

fn read(base: &dyn Tree, path: &str) -> String {
    std::fs::read_to_string(base.path().join(path)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_branch_is_pinned_and_its_files_stand_there() {
    let (house, commit) = house(&[("a.txt", "one\n"), ("d/e/run.sh*", "#!/bin/sh\n")]).await;
    let pin = house.repos.pin(&house.server.url(), None).await.unwrap();
    assert_eq!(pin.commit, commit);
    let base = house.repos.base(&pin).await.unwrap();
    assert_eq!(read(&*base, "a.txt"), "one\n");
    use std::os::unix::fs::PermissionsExt;
    let mode = |p: &str| std::fs::metadata(base.path().join(p)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("a.txt"), mode("d/e/run.sh"), mode("d/e")), (0o644, 0o755, 0o755));
    assert_eq!((base.files(), base.bytes()), (2, 14));
}
