//! The node's hand in a workspace that a hostile job has arranged: reading and writing files, and nothing but files.

use std::time::Duration;

use coinop::sandbox::{Content, Error, Sandbox};

use crate::case::cases;
use crate::fixtures::Fixture;
use crate::running::{policy, sh};

cases!(
    everywhere: [
        what_was_written_is_read_byte_for_byte,
        a_path_may_name_the_workspace_or_not,
        a_second_writing_replaces_all_of_the_first,
        the_folders_of_a_file_are_made,
        names_may_hold_what_file_names_hold,
        a_file_may_be_exactly_as_long_as_the_cap,
        a_file_longer_than_the_cap_is_refused,
        what_is_not_there_is_not_found,
        a_name_longer_than_names_can_be_is_not_found,
        a_path_that_leaves_the_workspace_is_not_read,
        a_path_that_leaves_the_workspace_is_not_written,
        files_of_the_job_folder_are_read_and_are_no_change,
    ],
    programs: [
        the_job_may_use_what_was_written,
        the_job_folder_is_readable_and_read_only,
        a_file_that_the_job_wrote_is_read,
        a_file_of_the_base_is_read_as_it_is_now,
        reading_follows_no_link_and_opens_no_pipe,
        writing_follows_no_link_and_opens_no_pipe,
        no_folder_on_the_way_may_be_a_link,
        a_huge_file_is_refused_and_not_loaded,
        a_closed_file_is_read_all_the_same,
        a_closed_workspace_is_read_all_the_same,
        a_write_beyond_the_disk_limit_fails_and_says_so,
    ],
);

async fn what_was_written_is_read_byte_for_byte(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let every: Vec<u8> = (0..=255u8).cycle().take(100_000).collect();
    for (name, bytes) in [("every", every.as_slice()), ("empty", b""), ("text", "grüße\r\n".as_bytes())] {
        sandbox.write_file(name, bytes).await.unwrap();
        assert!(sandbox.read_file(name, 100_000).await.unwrap() == bytes, "{name}");
    }
}

async fn a_path_may_name_the_workspace_or_not(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("a/one", b"1").await.unwrap();
    sandbox.write_file("/workspace/a/two", b"2").await.unwrap();
    for (path, bytes) in
        [("/workspace/a/one", b"1"), ("a/one", b"1"), ("a/two", b"2"), ("/workspace/a/two", b"2")]
    {
        assert_eq!(sandbox.read_file(path, 1).await.unwrap(), bytes, "{path}");
    }
    assert_eq!(sandbox.changes(100).await.unwrap().len(), 2);
}

async fn a_second_writing_replaces_all_of_the_first(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("f", b"a longer text").await.unwrap();
    sandbox.write_file("f", b"short").await.unwrap();
    assert_eq!(sandbox.read_file("f", 100).await.unwrap(), b"short");
    sandbox.write_file("f", b"").await.unwrap();
    assert_eq!(sandbox.read_file("f", 100).await.unwrap(), b"");
}

async fn the_folders_of_a_file_are_made(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("a/b/c/d/e", b"deep").await.unwrap();
    sandbox.write_file("a/b/x", b"beside").await.unwrap();
    sandbox.write_file("/job/in/put.json", b"{}").await.unwrap();
    assert_eq!(sandbox.read_file("a/b/c/d/e", 4).await.unwrap(), b"deep");
    assert_eq!(sandbox.read_file("/job/in/put.json", 2).await.unwrap(), b"{}");
}

async fn names_may_hold_what_file_names_hold(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let long = "n".repeat(255);
    let names =
        [" ", "a b", "-rf", "new\nline", "grüße", "\u{1f980}", "*", "$(id)", "'\"", "...", "\\", &long];
    for name in names {
        sandbox.write_file(name, name.as_bytes()).await.unwrap();
    }
    for name in names {
        assert_eq!(sandbox.read_file(name, 300).await.unwrap(), name.as_bytes(), "{name:?}");
    }
    assert_eq!(sandbox.changes(1 << 16).await.unwrap().len(), names.len());
}

async fn a_file_may_be_exactly_as_long_as_the_cap(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("f", &[7; 1000]).await.unwrap();
    sandbox.write_file("empty", b"").await.unwrap();
    assert_eq!(sandbox.read_file("f", 1000).await.unwrap().len(), 1000);
    assert_eq!(sandbox.read_file("f", u64::MAX).await.unwrap().len(), 1000);
    assert_eq!(sandbox.read_file("empty", 0).await.unwrap(), b"");
}

async fn a_file_longer_than_the_cap_is_refused(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("f", &[7; 1000]).await.unwrap();
    for cap in [0, 1, 999] {
        let read = sandbox.read_file("f", cap).await;
        assert!(matches!(read, Err(Error::TooLarge { cap_bytes, .. }) if cap_bytes == cap), "{read:?}");
    }
}

async fn what_is_not_there_is_not_found(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("file", b"").await.unwrap();
    for path in ["nothing", "no/folder", "/job/nothing", "/workspace/x", "file/below"] {
        let read = sandbox.read_file(path, 10).await;
        assert!(matches!(&read, Err(Error::NotFound(said)) if said == path), "{path}: {read:?}");
    }
}

/// Whatever stands there, these name nothing in the workspace or in `/job`.
const OUTSIDE: [&str; 21] = [
    "",
    "/",
    ".",
    "..",
    "../x",
    "a/../../x",
    "a/../b",
    "/etc/passwd",
    "/tmp/x",
    "/home/job/x",
    "/proc/self/environ",
    "/workspace",
    "/workspace/",
    "/workspace/../etc/passwd",
    "/workspaces/x",
    "/job",
    "/job/../etc/passwd",
    "/jobs/x",
    "a/",
    "a\0b",
    "//etc/passwd",
];

async fn a_path_that_leaves_the_workspace_is_not_read(on: &Fixture) {
    let sandbox = on.sandbox().await;
    for path in OUTSIDE {
        let read = sandbox.read_file(path, 1 << 20).await;
        assert!(matches!(&read, Err(Error::BadPath(said)) if said == path), "{path:?}: {read:?}");
    }
}

async fn a_path_that_leaves_the_workspace_is_not_written(on: &Fixture) {
    let sandbox = on.sandbox().await;
    for path in OUTSIDE {
        let written = sandbox.write_file(path, b"x").await;
        assert!(matches!(&written, Err(Error::BadPath(said)) if said == path), "{path:?}: {written:?}");
    }
    assert_eq!(sandbox.changes(1000).await.unwrap(), []);
}

async fn files_of_the_job_folder_are_read_and_are_no_change(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("/job/order.json", b"{}").await.unwrap();
    sandbox.write_file("order.json", b"mine").await.unwrap();
    assert_eq!(sandbox.read_file("/job/order.json", 10).await.unwrap(), b"{}");
    assert_eq!(sandbox.read_file("order.json", 10).await.unwrap(), b"mine");
    let changes = sandbox.changes(100).await.unwrap();
    let [only] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!(only.path, b"order.json");
    assert_eq!(only.to, Content::File { bytes: b"mine".to_vec(), executable: false });
}

async fn the_job_may_use_what_was_written(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("in/put", b"text\n").await.unwrap();
    let script = "cat in/put && echo more >> in/put && mv in/put in/moved && echo new > in/new && cat in/moved && \
                  rm -r in && echo gone";
    assert_eq!(sh(&*sandbox, script).await.ok(), "text\ntext\nmore\ngone\n");
}

async fn the_job_folder_is_readable_and_read_only(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("/job/order.json", b"{}").await.unwrap();
    assert_eq!(sh(&*sandbox, "cat /job/order.json").await.ok(), "{}");
    for act in [
        "echo x > /job/order.json",
        "echo x >> /job/order.json",
        "echo x > /job/new",
        "rm -f /job/order.json",
        "mv /job/order.json /job/b",
        "mkdir /job/d",
        "chmod 777 /job/order.json",
        "ln -s /etc /job/l",
    ] {
        let ran = sh(&*sandbox, act).await;
        assert!(
            ran.exit != Some(coinop::sandbox::Exit::Code { code: 0 }) && !ran.err.is_empty(),
            "{act}: {ran:?}"
        );
    }
    // The node may go on writing there while the job runs.
    sandbox.write_file("/job/later", b"later").await.unwrap();
    assert_eq!(sh(&*sandbox, "cat /job/later /job/order.json").await.ok(), "later{}");
}

async fn a_file_that_the_job_wrote_is_read(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "mkdir -p out; printf 'a\\000b' > out/f").await.ok();
    assert_eq!(sandbox.read_file("out/f", 3).await.unwrap(), b"a\0b");
}

async fn a_file_of_the_base_is_read_as_it_is_now(on: &Fixture) {
    let base = on.base(|base| {
        std::fs::create_dir(base.join("d")).unwrap();
        for name in ["same", "edit", "gone", "d/in"] {
            std::fs::write(base.join(name), name).unwrap();
        }
    });
    let sandbox = on.over(base).await;
    sh(&*sandbox, "echo ed >> edit; rm gone").await.ok();
    assert_eq!(sandbox.read_file("same", 10).await.unwrap(), b"same");
    assert_eq!(sandbox.read_file("d/in", 10).await.unwrap(), b"d/in");
    assert_eq!(sandbox.read_file("edit", 10).await.unwrap(), b"edited\n");
    assert!(matches!(sandbox.read_file("gone", 10).await, Err(Error::NotFound(_))));
    sandbox.write_file("same", b"new").await.unwrap();
    assert_eq!(sh(&*sandbox, "cat same").await.ok(), "new");
}

/// Whatever the job has laid out, the node answers soon.
async fn read(sandbox: &dyn Sandbox, path: &str) -> Result<Vec<u8>, Error> {
    let read = tokio::time::timeout(Duration::from_secs(20), sandbox.read_file(path, 1000)).await;
    read.unwrap_or_else(|_| panic!("reading {path} held the node"))
}

async fn write(sandbox: &dyn Sandbox, path: &str) -> Result<(), Error> {
    let written = tokio::time::timeout(Duration::from_secs(20), sandbox.write_file(path, b"x")).await;
    written.unwrap_or_else(|_| panic!("writing {path} held the node"))
}

const LAID_OUT: &str = "echo k > keep; ln -s keep near; ln -s nowhere dangling; ln -s near twice; ln -s . self; \
                        ln -s /etc/passwd out; ln -s loop loop; mkfifo pipe; mkdir folder; \
                        ln -s /proc/self/fd/0 magic; ln -s /dev/zero zero";

async fn reading_follows_no_link_and_opens_no_pipe(on: &Fixture) {
    let secret = on.dir.path().join("secret");
    std::fs::write(&secret, "s").unwrap();
    let sandbox = on.sandbox().await;
    sh(&*sandbox, &format!("{LAID_OUT}; ln -s '{}' host", secret.display())).await.ok();
    for path in
        ["near", "dangling", "twice", "self", "out", "loop", "pipe", "folder", "magic", "zero", "host"]
    {
        let read = read(&*sandbox, path).await;
        assert!(matches!(&read, Err(Error::BadPath(said)) if said == path), "{path}: {read:?}");
    }
    assert_eq!(read(&*sandbox, "keep").await.unwrap(), b"k\n");
}

async fn writing_follows_no_link_and_opens_no_pipe(on: &Fixture) {
    let target = on.dir.path().join("target");
    std::fs::create_dir(&target).unwrap();
    let sandbox = on.sandbox().await;
    sh(&*sandbox, &format!("{LAID_OUT}; ln -s '{}/new' host", target.display())).await.ok();
    for path in
        ["near", "dangling", "twice", "self", "out", "loop", "pipe", "folder", "magic", "zero", "host"]
    {
        let written = write(&*sandbox, path).await;
        assert!(matches!(&written, Err(Error::BadPath(said)) if said == path), "{path}: {written:?}");
    }
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0);
    assert_eq!(sh(&*sandbox, "cat keep; ls nowhere new 2>/dev/null; true").await.ok(), "k\n");
}

async fn no_folder_on_the_way_may_be_a_link(on: &Fixture) {
    let target = on.dir.path().join("target");
    std::fs::create_dir(&target).unwrap();
    let sandbox = on.sandbox().await;
    let script = format!(
        "mkdir in; echo x > in/f; ln -s in l; ln -s / root; ln -s '{}' host; mkfifo p",
        target.display()
    );
    sh(&*sandbox, &script).await.ok();
    for path in ["l/f", "root/etc/passwd", "host/f"] {
        let read = read(&*sandbox, path).await;
        assert!(matches!(&read, Err(Error::BadPath(said)) if said == path), "{path}: {read:?}");
        let written = write(&*sandbox, path).await;
        assert!(matches!(&written, Err(Error::BadPath(said)) if said == path), "{path}: {written:?}");
    }
    // A file or a pipe is no folder, either.
    for path in ["in/f/x", "p/x"] {
        let written = write(&*sandbox, path).await;
        assert!(matches!(&written, Err(Error::BadPath(said)) if said == path), "{path}: {written:?}");
    }
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0);
    assert_eq!(sh(&*sandbox, "cat in/f").await.ok(), "x\n");
}

async fn a_huge_file_is_refused_and_not_loaded(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "dd if=/dev/zero of=hole bs=1 count=1 seek=60000000 2>/dev/null").await.ok();
    let read = sandbox.read_file("hole", 1000).await;
    assert!(matches!(read, Err(Error::TooLarge { cap_bytes: 1000, .. })), "{read:?}");
}

async fn a_closed_file_is_read_all_the_same(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "mkdir d; echo x > d/f; chmod 0 d/f d").await.ok();
    assert_eq!(sandbox.read_file("d/f", 10).await.unwrap(), b"x\n");
    let changes = sandbox.changes(1000).await.unwrap();
    assert!(changes.iter().any(|change| change.path == b"d/f"), "{changes:?}");
}

async fn a_closed_workspace_is_read_all_the_same(on: &Fixture) {
    let sandbox = on.over(on.base(|base| std::fs::write(base.join("old"), "old").unwrap())).await;
    sh(&*sandbox, "mkdir d; echo x > d/f; chmod 0 d .").await.ok();
    sandbox.kill().await.unwrap();
    for (path, bytes) in [("old", &b"old"[..]), ("d/f", b"x\n")] {
        assert_eq!(sandbox.read_file(path, 10).await.unwrap(), bytes, "{path}");
    }
    assert!(matches!(sandbox.read_file("none", 10).await, Err(Error::NotFound(_))));
    let changes = sandbox.changes(1000).await.unwrap();
    assert!(changes.len() == 1 && changes[0].path == b"d/f", "{changes:?}");
}

/// 255 bytes are the most that a file system here takes.
async fn a_name_longer_than_names_can_be_is_not_found(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let long = "n".repeat(300);
    for path in [long.clone(), format!("a/{long}/b"), format!("/job/{long}")] {
        let read = sandbox.read_file(&path, 10).await;
        assert!(matches!(&read, Err(Error::NotFound(said)) if *said == path), "{read:?}");
    }
}

async fn a_write_beyond_the_disk_limit_fails_and_says_so(on: &Fixture) -> crate::case::Outcome {
    let small = coinop::sandbox::Policy { disk_bytes: 1 << 20, ..policy() };
    let sandbox = on.about("disk_bytes", small).await?;
    let refused = sandbox.write_file("big", &vec![1; 4 << 20]).await;
    assert!(
        matches!(&refused, Err(Error::Host { source, .. }) if source.raw_os_error() == Some(28)),
        "{refused:?}"
    );
    sh(&*sandbox, "rm -f big; echo on > on").await.ok();
    Ok(())
}
