//! Files in and out, and what changed: the node's hand in a workspace that a hostile job has arranged.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use coinop::sandbox::{Backend, Change, Content, Error, Sandbox, Spec};

use crate::common::{Folder, bench, policy, python_bench, sh};
use crate::skip::skip;

fn fill(base: &Path) {
    std::fs::create_dir_all(base.join("dir/deep")).unwrap();
    std::fs::create_dir_all(base.join(".git")).unwrap();
    for (path, text) in [
        ("keep", "keep\n"),
        ("edit", "one\n"),
        ("gone", "gone\n"),
        ("dir/a", "a\n"),
        ("dir/deep/b", "b\n"),
        ("script", "#!/bin/sh\n"),
        (".git/config", "[core]\n"),
        ("becomes-dir", "file\n"),
    ] {
        std::fs::write(base.join(path), text).unwrap();
    }
    symlink("keep", base.join("link")).unwrap();
}

fn told(changes: &[Change]) -> Vec<(String, String)> {
    let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    changes
        .iter()
        .map(|change| {
            let to = match &change.to {
                Content::File { bytes, executable } => {
                    format!("{}{}", if *executable { "x:" } else { "f:" }, shown(bytes).trim_end())
                }
                Content::Symlink { target } => format!("l:{}", shown(target)),
                Content::Deleted => "-".to_owned(),
            };
            (shown(&change.path), to)
        })
        .collect()
}

async fn changes(sandbox: &dyn Sandbox) -> Vec<(String, String)> {
    told(&sandbox.changes(1 << 20).await.unwrap())
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(path, to)| ((*path).to_owned(), (*to).to_owned())).collect()
}

#[tokio::test]
async fn changes_are_exactly_what_the_job_did() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox_over(fill).await;
    assert_eq!(changes(&*sandbox).await, []);
    let script = "touch keep; echo two >> edit; rm gone; chmod +x script; ln -sf edit link; \
                  mkdir -p new/er; echo n > new/er/file; mkdir empty; rm -r dir; mkdir dir; echo c > dir/c; \
                  rm becomes-dir; mkdir becomes-dir; echo in > becomes-dir/in; mkfifo pipe; \
                  echo hostile > .git/config; echo h > .git/hook; printf 'x' > \"$(printf 'odd\\nname')\"";
    sh(&*sandbox, script).await.ok();
    let expected = pairs(&[
        ("becomes-dir", "-"),
        ("becomes-dir/in", "f:in"),
        ("dir/a", "-"),
        ("dir/c", "f:c"),
        ("dir/deep", "-"),
        ("edit", "f:one\ntwo"),
        ("gone", "-"),
        ("link", "l:edit"),
        ("new/er/file", "f:n"),
        ("odd\nname", "f:x"),
        ("script", "x:#!/bin/sh"),
    ]);
    assert_eq!(changes(&*sandbox).await, expected);
    sandbox.kill().await.unwrap();
    assert_eq!(changes(&*sandbox).await, expected, "after the kill");
    let base = bench.dir.path().join("base");
    assert_eq!(std::fs::read_to_string(base.join("edit")).unwrap(), "one\n");
    assert!(base.join("gone").exists() && base.join("dir/deep/b").exists());
}

#[tokio::test]
async fn a_workspace_without_a_base_is_all_change() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    sh(&*sandbox, "mkdir d; echo x > d/f; ln -s /etc/passwd l").await.ok();
    assert_eq!(changes(&*sandbox).await, pairs(&[("d/f", "f:x"), ("l", "l:/etc/passwd")]));
}

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
    assert_eq!(changes(&*sandbox).await, []);
    let written = sandbox.usage().await.unwrap().disk_written_bytes;
    assert!(written < 64 << 10, "{written} bytes: the base counts as the job's");
    sh(&*sandbox, &format!("rm -r '{first}' && echo x > zz-new")).await.ok();
    assert_eq!(changes(&*sandbox).await, pairs(&[(&first, "-"), ("zz-new", "f:x")]));
}

#[tokio::test]
async fn a_closed_file_is_read_all_the_same() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox_over(fill).await;
    sh(&*sandbox, "mkdir d; echo x > d/f; chmod 0 d/f d").await.ok();
    assert_eq!(changes(&*sandbox).await, pairs(&[("d/f", "f:x")]));
    assert_eq!(sandbox.read_file("d/f", 10).await.unwrap(), b"x\n");
}

#[tokio::test]
async fn more_change_than_the_cap_is_refused_not_loaded() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    sh(&*sandbox, "truncate -s 60M hole").await.ok();
    let refused = sandbox.changes(1000).await;
    assert!(matches!(refused, Err(Error::TooLarge { cap_bytes: 1000, .. })), "{refused:?}");
}

#[tokio::test]
async fn folders_without_end_are_refused_by_their_depth() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    let dig = |depth: u32| {
        format!("i=0; while [ $i -lt {depth} ]; do mkdir d && cd d; i=$((i+1)); done; echo x > f")
    };
    sh(&*sandbox, &dig(200)).await.ok();
    assert_eq!(sandbox.changes(1 << 20).await.unwrap().len(), 1);
    sh(&*sandbox, &format!("rm -r d; {}", dig(201))).await.ok();
    let refused = sandbox.changes(1 << 20).await;
    assert!(
        matches!(&refused, Err(Error::TooDeep { cap: 200, path }) if path.starts_with("d/d/")),
        "{refused:?}"
    );
    sh(
        &*sandbox,
        &format!(
            "rm -r d; mkdir {name}; cd {name}; {dig}",
            name = "n".repeat(200),
            dig = "i=0; \
        while [ $i -lt 40 ]; do d=$(printf %0120d $i); mkdir $d && cd -P $d; i=$((i+1)); done; echo x > f"
        ),
    )
    .await
    .ok();
    let refused = sandbox.changes(1 << 20).await;
    assert!(matches!(&refused, Err(Error::TooLarge { what, .. }) if what.contains("path")), "{refused:?}");
}

/// Many systems begin with 1,024 open files: too few for two readers of deep trees beside some sandboxes.
#[tokio::test]
async fn the_node_uses_all_the_open_files_that_it_may_have() {
    let Some(_bench) = bench!() else { return };
    let (soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    assert_eq!(soft, hard);
}

#[tokio::test]
async fn reading_follows_no_link_and_opens_no_pipe() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox_over(fill).await;
    let secret = bench.dir.path().join("secret");
    std::fs::write(&secret, "s").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o644)).unwrap();
    let script = format!(
        "ln -s {} out; ln -s / root; ln -s keep near; mkfifo pipe; mkdir folder; ln -s /proc/self/fd fds; \
         python3 -c \"import os; os.mknod('sock', 0o140600)\"",
        secret.display()
    );
    sh(&*sandbox, &script).await.ok();
    for path in
        ["out", "near", "root/etc/passwd", "pipe", "folder", "sock", "fds/0", "../etc/passwd", "/etc/passwd"]
    {
        let read =
            tokio::time::timeout(std::time::Duration::from_secs(10), sandbox.read_file(path, 100)).await;
        let read = read.unwrap_or_else(|_| panic!("{path} held the node"));
        assert!(matches!(read, Err(Error::BadPath(ref said)) if said == path), "{path}: {read:?}");
    }
    assert!(matches!(sandbox.read_file("nowhere", 100).await, Err(Error::NotFound(_))));
    assert!(matches!(sandbox.read_file("keep", 4).await, Err(Error::TooLarge { cap_bytes: 4, .. })));
    assert_eq!(sandbox.read_file("/workspace/keep", 5).await.unwrap(), b"keep\n");
}

#[tokio::test]
async fn writing_stays_inside_and_the_job_may_use_what_was_written() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox_over(fill).await;
    let target = bench.dir.path().join("target");
    std::fs::create_dir(&target).unwrap();
    std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o777)).unwrap();
    sh(&*sandbox, &format!("ln -s {} out; ln -s edit near; mkfifo pipe", target.display())).await.ok();
    for path in ["out/x", "near", "pipe", "../x", "/etc/x", "dir"] {
        let written = sandbox.write_file(path, b"x").await;
        assert!(matches!(written, Err(Error::BadPath(ref said)) if said == path), "{path}: {written:?}");
    }
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0);
    sandbox.write_file("in/put", b"longer text").await.unwrap();
    sandbox.write_file("in/put", b"text").await.unwrap();
    sandbox.write_file("/job/order.json", b"{}").await.unwrap();
    let used =
        sh(&*sandbox, "cat in/put /job/order.json; echo more >> in/put; rm -r in; echo x > /job/order.json")
            .await;
    assert!(used.out == "text{}" && used.err.contains("Read-only"), "{used:?}");
}

#[tokio::test]
async fn a_write_beyond_the_disk_limit_fails_and_says_so() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox_with(coinop::sandbox::Policy { disk_bytes: 1 << 20, ..policy() }).await;
    let refused = sandbox.write_file("big", &vec![1; 4 << 20]).await;
    assert!(
        matches!(&refused, Err(Error::Host { source, .. }) if source.raw_os_error() == Some(28)),
        "{refused:?}"
    );
}
