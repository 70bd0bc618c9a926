//! The local backend's own about files: bases that it must copy, and what Python alone can lay out. What every backend
//! promises stands in `tests/conformance/`.

use std::path::PathBuf;
use std::sync::Arc;

use coinop::sandbox::{Backend, Content, Error, Spec};

use crate::common::{Folder, bench, policy, python, python_bench, sh};
use crate::skip::skip;

/// A base of the host's own; an ordinary user's node cannot lay an overlay over it, and copies it.
#[tokio::test]
async fn a_base_that_belongs_to_someone_else_works_as_well() {
    let Some(bench) = bench!() else { return };
    let base = PathBuf::from("/usr/lib/python3/dist-packages");
    let base = if base.is_dir() { base } else { PathBuf::from("/usr/share/keyrings") };
    let Some(first) = std::fs::read_dir(&base).ok().and_then(|mut all| all.next()).and_then(Result::ok)
    else {
        return skip(
            "a_base_that_belongs_to_someone_else_works_as_well",
            &format!("nothing in {}", base.display()),
        );
    };
    let first = first.file_name().into_string().unwrap();
    let spec = Spec { id: "t".to_owned(), base: Some(Arc::new(Folder(base))), policy: policy() };
    let sandbox = bench.local.create(spec).await.unwrap();
    assert_eq!(sandbox.changes(0).await.unwrap(), []);
    let written = sandbox.usage().await.unwrap().disk_written_bytes;
    assert!(written < 64 << 10, "{written} bytes: the base counts as the job's");
    sh(&*sandbox, &format!("rm -r '{first}' && echo x > zz-new")).await.ok();
    let changes = sandbox.changes(1000).await.unwrap();
    let told: Vec<_> = changes.iter().map(|change| (change.path.as_slice(), &change.to)).collect();
    let new = Content::File { bytes: b"x\n".to_vec(), executable: false };
    assert_eq!(told, [(first.as_bytes(), &Content::Deleted), (b"zz-new".as_slice(), &new)]);
}

/// Many systems begin with 1,024 open files: too few for two readers of deep trees beside some sandboxes.
#[tokio::test]
async fn the_node_uses_all_the_open_files_that_it_may_have() {
    let Some(_bench) = bench!() else { return };
    let (soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    assert_eq!(soft, hard);
}

#[tokio::test]
async fn a_socket_is_neither_read_nor_told() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox().await;
    python(&*sandbox, "import os\nos.mknod('sock', 0o140600)").await.ok();
    let read = sandbox.read_file("sock", 100).await;
    assert!(matches!(&read, Err(Error::BadPath(said)) if said == "sock"), "{read:?}");
    assert_eq!(sandbox.changes(0).await.unwrap(), []);
}
