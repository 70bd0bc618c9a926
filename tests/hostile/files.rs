//! What a job lays out for whoever reads, writes or walks its files from the host's side: links that change places,
//! trees without end, names that are none, configuration that a tool would obey. Classes 6, 7 and 10. What a hostile
//! repository does to the clone, class 8, is `tests/repo_hostile.rs`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coinop::sandbox::{Change, Content, Error, Policy, Sandbox};
use tempfile::TempDir;

use crate::case::{Outcome, cases};
use crate::ground::{Folder, Ground, policy, run};
use crate::plain::{How, Plain, readable};
use crate::siege::Siege;
use crate::{host, plain};

cases! {
    a_link_in_a_folder_s_place_is_not_read_through: "7: paths that change", read_through;
    a_link_in_a_folder_s_place_is_not_written_through: "7: paths that change", written_through;
    a_walk_over_folders_that_become_links_stays_inside: "10: links in trees", walked_through;
    odd_names_links_and_pipes_come_out_as_they_are: "10: links in trees", odd_at_large;
    a_tree_too_deep_is_refused_at_once: "10: trees without end", deep_at_large;
    a_file_of_a_terabyte_is_refused_unread: "10: trees without end", sparse_at_large;
    a_file_that_grows_and_shrinks_holds_nobody_up: "10: trees that change", breath_at_large;
    configuration_in_the_repository_runs_nothing_on_the_host: "6: configuration that widens", configuration_obeyed;
}

const SECRET: &str = "a secret of the host";
const CAP: u64 = 4 << 20;

/// A folder of the host with a secret in it.
fn elsewhere() -> (TempDir, String) {
    use std::os::unix::fs::PermissionsExt;
    let dir = readable();
    std::fs::write(dir.path().join("secret"), SECRET).unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let path = dir.path().to_str().unwrap().to_owned();
    (dir, path)
}

/// Tries until it succeeds: a race is won in the end.
fn won(what: &str, mut attempt: impl FnMut() -> bool) -> Outcome {
    let (started, mut tries) = (Instant::now(), 1);
    while !attempt() {
        assert!(started.elapsed() < host::PATIENCE, "never won: {what}");
        tries += 1;
    }
    Ok(format!("{what} at try {tries}"))
}

fn read_through(plain: &Plain) -> Outcome {
    let (_dir, path) = elsewhere();
    let mut loose = plain.start(How::default(), &["swaps", "d", &path])?;
    loose.ready()?;
    let file = plain.workspace().join("d/secret");
    won("the host's secret was read", || std::fs::read(&file).is_ok_and(|bytes| bytes == SECRET.as_bytes()))
}

fn written_through(plain: &Plain) -> Outcome {
    let (_dir, path) = elsewhere();
    let mut loose = plain.start(How::default(), &["swaps", "d", &path])?;
    loose.ready()?;
    let (file, there) = (plain.workspace().join("d/written"), Path::new(&path).join("written"));
    won("the host's folder was written", || {
        // In the folder's own place it may well be refused: it belongs to somebody else.
        std::fs::write(&file, "x").unwrap_or_default();
        there.exists()
    })
}

/// Walks as one does without thinking of strangers: everything that is there is opened by its path.
fn naive_walk(folder: &Path, found: &mut Vec<Vec<u8>>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        match std::fs::metadata(&path) {
            Ok(meta) if meta.is_dir() && path.components().count() < 20 => naive_walk(&path, found),
            Ok(meta) if meta.is_file() => found.extend(std::fs::read(&path)),
            _ => {}
        }
    }
}

fn walked_through(plain: &Plain) -> Outcome {
    let (_dir, path) = elsewhere();
    let mut loose = plain.start(How::default(), &["swaps", "d", &path])?;
    loose.ready()?;
    won("a walk brought the host's secret home", || {
        let mut found = Vec::new();
        naive_walk(&plain.workspace(), &mut found);
        found.contains(&SECRET.as_bytes().to_vec())
    })
}

/// How many looks a race is given.
const LOOKS: usize = 60;

async fn a_link_in_a_folder_s_place_is_not_read_through(ground: &Ground) -> Outcome {
    let (_dir, path) = elsewhere();
    let siege = Siege::lay(ground, policy(), &["swaps", "d", &path]).await;
    let (mut inside, mut refused) = (0, 0);
    for _ in 0..LOOKS {
        match siege.sandbox.read_file("d/secret", CAP).await {
            Ok(bytes) => {
                assert_eq!(bytes, b"mine", "it was read from elsewhere");
                inside += 1;
            }
            Err(Error::BadPath(_) | Error::NotFound(_)) => refused += 1,
            Err(why) => panic!("{why}"),
        }
    }
    siege.kill().await;
    Ok(format!("{inside} read inside, {refused} refused"))
}

async fn a_link_in_a_folder_s_place_is_not_written_through(ground: &Ground) -> Outcome {
    let (dir, path) = elsewhere();
    let siege = Siege::lay(ground, policy(), &["swaps", "d", &path]).await;
    let (mut inside, mut refused) = (0, 0);
    for n in 0..LOOKS {
        match siege.sandbox.write_file(&format!("d/written-{n}"), b"x").await {
            Ok(()) => inside += 1,
            Err(Error::BadPath(_) | Error::NotFound(_)) => refused += 1,
            Err(why) => panic!("{why}"),
        }
    }
    siege.kill().await;
    let there: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(there, ["secret"], "it was written elsewhere");
    Ok(format!("{inside} written inside, {refused} refused"))
}

fn holds_secret(changes: &[Change]) -> bool {
    let secret = |bytes: &[u8]| bytes.windows(SECRET.len()).any(|part| part == SECRET.as_bytes());
    changes.iter().any(|change| matches!(&change.to, Content::File { bytes, .. } if secret(bytes)))
}

async fn a_walk_over_folders_that_become_links_stays_inside(ground: &Ground) -> Outcome {
    let (_dir, path) = elsewhere();
    let siege = Siege::lay(ground, policy(), &["swaps", "d", &path]).await;
    let mut walks = 0;
    for _ in 0..LOOKS / 2 {
        let changes = siege.sandbox.changes(CAP).await.unwrap();
        assert!(!holds_secret(&changes), "{changes:?}");
        walks += 1;
    }
    siege.kill().await;
    Ok(format!("{walks} walks"))
}

// === trees ===

fn odd_at_large(plain: &Plain) -> Outcome {
    let (_dir, path) = elsewhere();
    plain.run(How::default(), &["odd", &format!("{path}/secret")])?;
    let mut found = Vec::new();
    naive_walk(&plain.workspace(), &mut found);
    assert!(found.contains(&SECRET.as_bytes().to_vec()), "a link was not followed");
    // And who opens the pipe waits.
    let mut reader = std::process::Command::new("cat").arg(plain.workspace().join("pipe")).spawn().unwrap();
    std::thread::sleep(plain::MOMENT);
    let waits = reader.try_wait().unwrap().is_none();
    reader.kill().unwrap();
    reader.wait().unwrap();
    assert!(waits, "a pipe was read");
    Ok("a link is followed to the host's secret, a pipe holds its reader".to_owned())
}

async fn odd_names_links_and_pipes_come_out_as_they_are(ground: &Ground) -> Outcome {
    let (_dir, path) = elsewhere();
    let secret = format!("{path}/secret");
    let sandbox = ground.sandbox(policy()).await;
    let (said, _) = run(&*sandbox, &["odd", &secret]).await;
    assert!(said.ends_with("ready\n"), "{said}");
    let found = within_reason(&*sandbox).await.unwrap();
    sandbox.destroy().await.unwrap();
    let file = |text: &str| Content::File { bytes: text.into(), executable: false };
    let link = |text: &str| Content::Symlink { target: text.into() };
    let mut expected: Vec<(Vec<u8>, Content)> = vec![
        (b"line\nbreak".to_vec(), file("a")),
        (b"not\xff\xfeutf".to_vec(), file("b")),
        (b"-rf".to_vec(), file("c")),
        (b"hard".to_vec(), file("c")),
        (b"back\\slash".to_vec(), file("d")),
        (b"...".to_vec(), file("e")),
        (vec![b'n'; 255], file("f")),
        (b"link".to_vec(), link(&secret)),
        (b"up".to_vec(), link("../../../../../etc/passwd")),
        (b"magic".to_vec(), link("/proc/self/root/etc/shadow")),
    ];
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    let found: Vec<_> = found.into_iter().map(|change| (change.path, change.to)).collect();
    assert_eq!(found, expected);
    Ok(format!("{} as they are, pipe and socket left out", found.len()))
}

/// What the job changed, or why not; nobody waits for it long.
async fn within_reason(sandbox: &dyn Sandbox) -> Result<Vec<Change>, Error> {
    let looked = tokio::time::timeout(Duration::from_secs(10), sandbox.changes(CAP)).await;
    looked.expect("a walk ends in time")
}

fn deep_at_large(plain: &Plain) -> Outcome {
    plain.run(How::default(), &["deep", "3000"])?;
    let mut path = plain.workspace();
    let mut levels = 0;
    let why = loop {
        match std::fs::read_dir(&path) {
            Ok(_) => (levels, path) = (levels + 1, path.join("d")),
            Err(why) => break why,
        }
    };
    assert_eq!(why.raw_os_error(), Some(nix::libc::ENAMETOOLONG), "{why}");
    Ok(format!("who goes by paths is lost after {levels} of 3000 folders"))
}

async fn a_tree_too_deep_is_refused_at_once(ground: &Ground) -> Outcome {
    let sandbox = ground.sandbox(Policy { inodes: 5000, ..policy() }).await;
    let (said, _) = run(&*sandbox, &["deep", "3000"]).await;
    assert_eq!(said, "ready\n");
    let why = within_reason(&*sandbox).await.unwrap_err();
    assert!(matches!(why, Error::TooDeep { .. }), "{why}");
    sandbox.destroy().await.unwrap();
    Ok(why.to_string().chars().take(48).collect())
}

fn sparse_at_large(plain: &Plain) -> Outcome {
    plain.run(How::default(), &["sparse", "1024"])?;
    let size = std::fs::metadata(plain.workspace().join("sparse")).unwrap().len();
    // Reading it would take the machine's memory: that it would be read is plain to see.
    assert_eq!(size, 1024 << 30);
    Ok("a read would want 1 TiB; not tried".to_owned())
}

async fn a_file_of_a_terabyte_is_refused_unread(ground: &Ground) -> Outcome {
    let sandbox = ground.sandbox(policy()).await;
    let (said, _) = run(&*sandbox, &["sparse", "1024"]).await;
    assert_eq!(said, "ready\n");
    let before = host::own_memory();
    let why = within_reason(&*sandbox).await.unwrap_err();
    assert!(matches!(why, Error::TooLarge { cap_bytes: CAP, .. }), "{why}");
    let why = sandbox.read_file("sparse", CAP).await.unwrap_err();
    assert!(matches!(why, Error::TooLarge { cap_bytes: CAP, .. }), "{why}");
    let grown = host::own_memory().saturating_sub(before);
    assert!(grown < 32 << 20, "the node grew by {grown} bytes");
    // Whoever was reading has let go: the sandbox still works.
    assert!(sandbox.read_file(&plain::program().unwrap().name, CAP).await.is_ok());
    sandbox.destroy().await.unwrap();
    Ok(format!("refused, the node grew by {} KiB", grown >> 10))
}

fn breath_at_large(plain: &Plain) -> Outcome {
    let mut loose = plain.start(How::default(), &["breathes"])?;
    loose.ready()?;
    let file = plain.workspace().join("breath");
    won("a file was not as long as it was said to be", || {
        let said = std::fs::metadata(&file).unwrap().len();
        std::fs::read(&file).unwrap().len() as u64 != said
    })
}

async fn a_file_that_grows_and_shrinks_holds_nobody_up(ground: &Ground) -> Outcome {
    let siege = Siege::lay(ground, policy(), &["breathes"]).await;
    for _ in 0..LOOKS / 4 {
        let changes = within_reason(&*siege.sandbox).await.unwrap();
        assert_eq!(changes.len(), 1, "{changes:?}");
    }
    siege.kill().await;
    Ok(format!("{} walks, one file each", LOOKS / 4))
}

// === configuration ===

/// Makes a repository of this folder whose own configuration wants a program run, which leaves a trace.
fn configured(folder: &Path, trace: &Path) {
    let program = folder.join(".git/hooks/trace");
    for part in ["objects", "refs/heads", "hooks"] {
        std::fs::create_dir_all(folder.join(".git").join(part)).unwrap();
    }
    std::fs::write(folder.join(".git/HEAD"), "ref: refs/heads/main\n").unwrap();
    std::fs::write(&program, format!("#!/bin/sh\necho ran >> {}\n", trace.display())).unwrap();
    let shown = program.display();
    let config = format!(
        "[core]\n\trepositoryformatversion = 0\n\tfsmonitor = {shown}\n\tsshCommand = {shown}\n\tpager = {shown}\n\
         [filter \"x\"]\n\tclean = {shown}\n\tsmudge = {shown}\n[diff]\n\texternal = {shown}\n"
    );
    std::fs::write(folder.join(".git/config"), config).unwrap();
    std::fs::write(folder.join(".gitattributes"), "* filter=x diff=x\n").unwrap();
    for hook in ["post-checkout", "pre-commit", "post-index-change"] {
        std::fs::copy(&program, folder.join(".git/hooks").join(hook)).unwrap();
    }
    let open = |path: PathBuf| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    for entry in std::fs::read_dir(folder.join(".git/hooks")).unwrap() {
        open(entry.unwrap().path());
    }
}

fn configuration_obeyed(plain: &Plain) -> Outcome {
    let trace = plain.dir().join("trace");
    configured(&plain.workspace(), &trace);
    let mut git = std::process::Command::new("git");
    // The folder's owner does not matter here, only what is in it.
    git.args(["-c", "safe.directory=*", "status", "--porcelain"]).current_dir(plain.workspace());
    git.env("HOME", plain.dir());
    git.output().map_err(|why| format!("git cannot be run: {why}"))?;
    let ran = std::fs::read_to_string(&trace).unwrap_or_default();
    assert!(ran.contains("ran"), "git did not obey");
    Ok("git on the host runs what the repository says".to_owned())
}

async fn configuration_in_the_repository_runs_nothing_on_the_host(ground: &Ground) -> Outcome {
    let dir = readable();
    let (base, trace) = (dir.path().join("base"), dir.path().join("trace"));
    std::fs::create_dir(&base).unwrap();
    configured(&base, &trace);
    std::fs::copy(&plain::program()?.path, base.join(&plain::program()?.name)).unwrap();
    let sandbox = ground.over(Arc::new(Folder(base)), policy()).await;
    run(&*sandbox, &["odd", "nowhere"]).await;
    // All that the node does with a workspace.
    let changes = within_reason(&*sandbox).await.unwrap();
    assert!(!changes.is_empty() && !changes.iter().any(|change| change.path.starts_with(b".git/")));
    sandbox.read_file(".git/config", CAP).await.unwrap();
    sandbox.write_file(".git/config.worktree", b"x").await.unwrap();
    sandbox.destroy().await.unwrap();
    assert!(!trace.exists(), "the host ran what the repository says");
    Ok("nothing ran".to_owned())
}
