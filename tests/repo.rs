//! The repository room from outside: against our own small server, against real git where it is installed,
//! and against repositories made byte by byte to do harm.

#[path = "support/skip.rs"]
mod skip;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use coinop::repo::serve::{self, Server};
use coinop::repo::{Error, Limits, Options, Pin, Repos, WarningKind};
use coinop::sandbox::Tree;
use skip::has_git;

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
    let server = serve::start(std::slice::from_ref(&repo), loopback()).await.unwrap();
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

/// A second commit on the sample repository's `main`.
fn commit_more(house: &House, files: &[(&str, &str)]) -> String {
    serve::sample_repo(&house.repo, files).unwrap()
}

fn tag(house: &House, name: &str, commit: &str, annotated: bool) {
    let repo = git2::Repository::open_bare(&house.repo).unwrap();
    let object = repo.find_object(git2::Oid::from_str(commit).unwrap(), None).unwrap();
    if annotated {
        let who = git2::Signature::new("a", "a@b", &git2::Time::new(0, 0)).unwrap();
        repo.tag(name, &object, &who, "m", false).unwrap();
    } else {
        repo.tag_lightweight(name, &object, false).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn branches_tags_and_commits_full_or_abbreviated_are_found_over_http_and_in_a_folder() {
    let (house, first) = house(&[("a", "1")]).await;
    let second = commit_more(&house, &[("a", "2")]);
    tag(&house, "light", &first, false);
    tag(&house, "heavy", &first, true);
    tag(&house, "main", &first, false);
    for url in [house.server.url(), format!("file://{}", house.repo.display())] {
        let cache = tempfile::tempdir().unwrap();
        let repos = Repos::open(cache.path(), open_options()).unwrap();
        for (name, want) in [
            ("light", &first),
            ("heavy", &first),
            ("refs/tags/heavy", &first),
            ("main", &second),
            ("refs/heads/main", &second),
            ("HEAD", &second),
            ("", &second),
            (first.as_str(), &first),
            (&first[..8], &first),
            (&second[..7], &second),
        ] {
            let pin = repos.pin(&url, Some(name)).await.unwrap_or_else(|e| panic!("{url} {name}: {e}"));
            assert_eq!(&pin.commit, want, "{url} {name}");
            repos.base(&pin).await.unwrap();
        }
        for name in ["nowhere", "refs/heads/light", "abcdef0123", "0000000000000000000000000000000000000001"]
        {
            let error = repos.pin(&url, Some(name)).await.unwrap_err();
            assert!(
                matches!(&error, Error::RefNotFound { git_ref } if git_ref == name),
                "{url} {name}: {error}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_commit_stands_beside_the_base_before_it_and_shares_nothing_that_a_job_could_see() {
    use std::os::unix::fs::MetadataExt;
    let (house, _) =
        house(&[("same", "s"), ("d/same", "s2"), ("d/other", "1"), ("gone", "x"), ("mode", "m")]).await;
    let url = house.server.url();
    let one = house.repos.base(&house.repos.pin(&url, None).await.unwrap()).await.unwrap();
    commit_more(&house, &[("same", "s"), ("d/same", "s2"), ("d/other", "2"), ("new", "y"), ("mode*", "m")]);
    let two = house.repos.base(&house.repos.pin(&url, None).await.unwrap()).await.unwrap();
    let of = |b: &dyn Tree, p: &str| std::fs::symlink_metadata(b.path().join(p)).unwrap();
    assert_ne!(of(&*one, "d/same").ino(), of(&*two, "d/same").ino());
    for base in [&one, &two] {
        for path in ["same", "d", "d/same", "mode", "."] {
            let found = of(&**base, path);
            let times = (found.mtime(), found.mtime_nsec(), found.atime(), found.atime_nsec());
            assert_eq!(times, (946_684_800, 0, 946_684_800, 0), "{path}");
            assert!(found.is_dir() || found.nlink() == 1, "{path}");
        }
    }
    assert_eq!((read(&*one, "d/other"), read(&*two, "d/other")), ("1".into(), "2".into()));
    assert!(!two.path().join("gone").exists() && one.path().join("gone").exists());
    assert_eq!((two.files(), two.bytes()), (5, 1 + 2 + 1 + 1 + 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_warnings_of_a_tree_with_too_many_are_the_same_ones_whatever_thread_finds_them() {
    let names: Vec<String> = (0..200).map(|n| format!("d{}/f{n:03}", n % 7)).collect();
    let token = "aws = AKIAABCDEFGHIJKLMNOP";
    let files: Vec<(&str, &str)> = names.iter().map(|n| (n.as_str(), token)).collect();
    let (house, _) = house(&files).await;
    let mut expected: Vec<String> = names.iter().map(|n| format!("{n}: ")).collect();
    expected.sort();
    for _ in 0..5 {
        let cache = tempfile::tempdir().unwrap();
        let repos = Repos::open(cache.path(), open_options()).unwrap();
        let base = repos.base(&repos.pin(&house.server.url(), None).await.unwrap()).await.unwrap();
        let told: Vec<String> = base.warnings().iter().map(|w| format!("{}: ", w.path)).collect();
        assert_eq!(told, expected[..50]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cached_survives_a_restart_and_a_job_let_in_before_it_needs_no_server() {
    let (house, commit) = house(&[("a", "1")]).await;
    let url = house.server.url();
    house.repos.base(&house.repos.pin(&url, None).await.unwrap()).await.unwrap();
    let House { dir, repos, server, .. } = house;
    server.shutdown();
    let pin = repos.pin(&url, Some(&commit)).await.unwrap();
    assert_eq!(read(&*repos.base(&pin).await.unwrap(), "a"), "1", "within the grace of the same customer");
    drop(repos);
    let repos = Repos::open(&dir.path().join("cache"), open_options()).unwrap();
    let pin = repos.pin_again(&url, &commit).unwrap();
    assert_eq!(read(&*repos.base(&pin).await.unwrap(), "a"), "1");
    let error = repos.pin(&url, Some(&commit)).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "a new job asks: {error}");
    assert_eq!(read(&*repos.base(&pin).await.unwrap(), "a"), "1", "a server that is down takes nothing back");
    let busy = Repos::open(&dir.path().join("cache"), open_options()).unwrap_err();
    assert!(matches!(busy, Error::Busy { .. }), "{busy}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_in_use_is_never_evicted_and_the_others_go_oldest_first() {
    let dir = tempfile::tempdir().unwrap();
    // Room for one mirror and one base of one small file (4,097 bytes), not for two.
    let options = Options { cache_bytes: 9_000, ..open_options() };
    let repos = Repos::open(&dir.path().join("cache"), options).unwrap();
    let path = dir.path().join("r.git");
    serve::sample_repo(&path, &[("a", "1")]).unwrap();
    let url = format!("file://{}", path.display());
    let held = repos.base(&repos.pin(&url, None).await.unwrap()).await.unwrap();
    serve::sample_repo(&path, &[("a", "2")]).unwrap();
    let pin = repos.pin(&url, None).await.unwrap();
    let dropped = repos.base(&pin).await.unwrap().path().to_path_buf();
    // The next call trims.
    repos.patch(&pin, vec![]).await.unwrap();
    assert_eq!(read(&*held, "a"), "1");
    assert!(!dropped.exists());
    assert_eq!(read(&*repos.base(&pin).await.unwrap(), "a"), "2", "and it can be made again");
}

/// Text that hardly compresses, for its period is longer than zlib looks back; another for another `seed`.
fn noise(seed: u64, bytes: usize) -> String {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let digit = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(b' ' + (state >> 58) as u8)
    };
    let block: String = (0..bytes.min(64 * 1024)).map(digit).collect();
    block.repeat(bytes / block.len())
}

fn bytes_below(dir: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().flatten();
    entries
        .map(|e| if e.path().is_dir() { bytes_below(&e.path()) } else { e.metadata().unwrap().len() })
        .sum()
}

const MIB: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn the_cap_holds_while_a_job_keeps_its_repository_in_use_and_its_patch_still_comes_out() {
    use coinop::sandbox::{Change, Content};
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let repos = Repos::open(&cache, Options { cache_bytes: 6 * MIB, ..open_options() }).unwrap();
    let path = dir.path().join("r.git");
    let url = format!("file://{}", path.display());
    let first = noise(0, MIB as usize);
    serve::sample_repo(&path, &[("a", &first)]).unwrap();
    let asleep = repos.pin(&url, None).await.unwrap();
    let held = repos.base(&asleep).await.unwrap();
    for n in 1..=20 {
        serve::sample_repo(&path, &[("a", &noise(n, MIB as usize))]).unwrap();
        let pin = repos.pin(&url, None).await.unwrap();
        let base = repos.base(&pin).await.unwrap();
        assert_eq!(read(&*base, "a"), noise(n, MIB as usize));
        // What one job brings in may go over: a pack and a base.
        assert!(repos.cached_bytes() <= 9 * MIB, "{} after {n}", repos.cached_bytes());
        assert!(bytes_below(&cache.join("r")) <= 9 * MIB, "after {n}");
    }
    assert_eq!(read(&*held, "a"), first);
    // The commit of the job that slept is still here, even if nowhere else.
    std::fs::remove_dir_all(&path).unwrap();
    let to = Content::File { bytes: b"2\n".to_vec(), executable: false };
    let patch = repos.patch(&asleep, vec![Change { path: b"a".to_vec(), to }]).await.unwrap();
    assert_eq!((patch.files_changed, patch.lines_added), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn while_jobs_hold_all_room_more_is_refused_for_now_and_a_job_alone_never() {
    let dir = tempfile::tempdir().unwrap();
    let cap = 8 * MIB;
    let repos =
        Repos::open(&dir.path().join("cache"), Options { cache_bytes: cap, ..open_options() }).unwrap();
    let url = |n: u64| format!("file://{}", dir.path().join(format!("r{n}.git")).display());
    let sample = |n: u64, mib: u64| {
        let path = dir.path().join(format!("r{n}.git"));
        serve::sample_repo(&path, &[("a", &noise(n, (mib * MIB) as usize))]).unwrap();
        url(n)
    };
    let get = async |url: String| repos.base(&repos.pin(&url, None).await?).await;
    // Larger than the cap, and nobody else is here.
    drop(get(sample(0, 10)).await.unwrap());
    let mut held = Vec::new();
    let error = loop {
        match get(sample(held.len() as u64 + 1, 1)).await {
            Ok(base) => held.push(base),
            Err(error) => break error,
        }
        assert!(held.len() < 20 && repos.cached_bytes() < cap + 3 * MIB, "{}", repos.cached_bytes());
    };
    assert!(matches!(error, Error::Full { cap: c } if c == cap), "{error}");
    assert!((3..=5).contains(&held.len()), "{} times mirror and base of 1 MiB fit", held.len());
    // What is here already needs no room.
    get(url(1)).await.unwrap();
    drop(held);
    get(sample(0, 10)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_of_many_packs_starts_anew_under_a_job_that_holds_its_base() {
    let (house, _) = house(&[("a", "0")]).await;
    let url = house.server.url();
    let held = house.repos.base(&house.repos.pin(&url, None).await.unwrap()).await.unwrap();
    let packs = || {
        let repositories = std::fs::read_dir(house.dir.path().join("cache/r")).unwrap();
        let mirror = repositories.flatten().next().unwrap().path().join("mirror/objects/pack");
        let names = std::fs::read_dir(mirror).unwrap().flatten().map(|e| e.path());
        names.filter(|p| p.extension().is_some_and(|x| x == "pack")).count()
    };
    let mut most = 0;
    for n in 1..=90 {
        commit_more(&house, &[("a", &n.to_string())]);
        house.repos.pin(&url, None).await.unwrap();
        most = most.max(packs());
    }
    assert!(most <= 41 && packs() < 30, "{most} at most, {} in the end", packs());
    assert_eq!(read(&*held, "a"), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_callers_at_once_get_one_base() {
    let (house, _) = house(&[("a", "1")]).await;
    let url = house.server.url();
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let (repos, url) = (house.repos.clone(), url.clone());
            tokio::spawn(async move { repos.base(&repos.pin(&url, None).await.unwrap()).await.unwrap() })
        })
        .collect();
    let mut paths = Vec::new();
    for task in tasks {
        paths.push(task.await.unwrap().path().to_path_buf());
    }
    paths.dedup();
    assert_eq!(paths.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_cap_is_told_by_its_name() {
    let (house, _) = house(&[("a/b/c", "123456789"), ("d", "1"), ("e", "2")]).await;
    let url = house.server.url();
    for (limits, what) in [
        (Limits { fetch_bytes: 100, ..Limits::default() }, "bytes to download"),
        (Limits { objects: 3, ..Limits::default() }, "objects"),
        (Limits { files: 4, ..Limits::default() }, "files and folders"),
        (Limits { file_bytes: 8, ..Limits::default() }, "bytes of a file"),
        (Limits { tree_bytes: 10, ..Limits::default() }, "bytes of the tree"),
        (Limits { path_bytes: 4, ..Limits::default() }, "bytes of a path"),
        (Limits { depth: 1, ..Limits::default() }, "depth of folders"),
    ] {
        let cache = tempfile::tempdir().unwrap();
        let repos = Repos::open(cache.path(), Options { limits, ..open_options() }).unwrap();
        let result = match repos.pin(&url, None).await {
            Ok(pin) => repos.base(&pin).await.map(|_| ()),
            Err(e) => Err(e),
        };
        let error = result.unwrap_err();
        assert!(matches!(&error, Error::TooLarge { what: w, .. } if *w == what), "{what}: {error}");
        let left = std::fs::read_dir(cache.path().join("tmp")).unwrap().count();
        assert_eq!(left, 0, "nothing half made stays");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn private_addresses_and_other_transports_are_refused_before_anything_is_sent() {
    let (house, _) = house(&[("a", "1")]).await;
    let cache = tempfile::tempdir().unwrap();
    let repos = Repos::open(cache.path(), Options::default()).unwrap();
    let port = house.server.url().rsplit(':').next().unwrap().to_string();
    let file = format!("file://{}", house.repo.display());
    for (url, why) in [
        (house.server.url(), "not a public address"),
        (format!("http://localhost:{port}"), "not a public address"),
        (format!("http://[::ffff:127.0.0.1]:{port}"), "not a public address"),
        ("http://169.254.169.254/latest/meta-data".to_string(), "not a public address"),
        (file, "not allowed on this node"),
        ("ext::sh -c touch% /tmp/pwned".to_string(), "blanks"),
        ("ssh://host/a".to_string(), "not spoken here"),
    ] {
        let error = repos.pin(&url, None).await.unwrap_err();
        assert!(matches!(&error, Error::Refused { why: w } if w.contains(why)), "{url}: {error}");
    }
}

/// A server that answers every connection with `head`, then a byte each 50 ms for ever.
async fn slow_server(head: &'static str) -> SocketAddr {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind(loopback()).await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut bytes = [0u8; 1024];
                if tcp.read(&mut bytes).await.is_err() || tcp.write_all(head.as_bytes()).await.is_err() {
                    return;
                }
                while tcp.write_all(b"0").await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            });
        }
    });
    addr
}

const SLOW: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/x-git-upload-pack-advertisement\r\n\r\nffe0";

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_drips_bytes_meets_the_deadline() {
    let addr = slow_server(SLOW).await;
    let cache = tempfile::tempdir().unwrap();
    let limits = Limits { time_ms: 700, ..Limits::default() };
    let repos = Repos::open(cache.path(), Options { limits, ..open_options() }).unwrap();
    let start = Instant::now();
    let error = repos.pin(&format!("http://{addr}/a"), None).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { cap_ms: 700 }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_who_goes_away_frees_the_repository_at_once() {
    let addr = slow_server(SLOW).await;
    let cache = tempfile::tempdir().unwrap();
    let repos = Repos::open(cache.path(), Options { parallel: 1, ..open_options() }).unwrap();
    let url = format!("http://{addr}/a");
    let gone = tokio::time::timeout(Duration::from_millis(300), repos.pin(&url, None)).await;
    assert!(gone.is_err(), "it would have gone on");
    // The only place is free again: another repository is served well before the first one's deadline.
    let (house, _) = house(&[("a", "1")]).await;
    let next = tokio::time::timeout(Duration::from_secs(10), repos.pin(&house.server.url(), None)).await;
    next.expect("the place was not freed").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_are_no_git_servers_are_told_apart() {
    for (head, why) in [
        ("HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 0\r\n\r\n", "does not speak git"),
        ("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "no such repository"),
        ("HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n", "asks for a login"),
        ("HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n", "status 500"),
        (
            "HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/x\r\ncontent-length: 0\r\n\r\n",
            "redirects",
        ),
        ("SSH-2.0-OpenSSH\r\n", "cannot be reached"),
    ] {
        let addr = slow_server(head).await;
        let cache = tempfile::tempdir().unwrap();
        let repos = Repos::open(cache.path(), open_options()).unwrap();
        let error = repos.pin(&format!("http://{addr}/a"), None).await.unwrap_err();
        assert!(error.to_string().contains(why), "{why}: {error}");
    }
    let cache = tempfile::tempdir().unwrap();
    let repos = Repos::open(cache.path(), open_options()).unwrap();
    let nobody = std::net::TcpListener::bind(loopback()).unwrap().local_addr().unwrap();
    let error = repos.pin(&format!("http://{nobody}/a"), None).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn likely_secrets_and_agent_configuration_are_warned_of_and_stay_warned_of() {
    let key = "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n";
    let files = [
        (".env", "A=1"),
        ("deploy/key.txt", key),
        (".claude/settings.json", "{}"),
        (".env.example", "A="),
        ("a", "1"),
    ];
    let (house, _) = house(&files).await;
    let url = house.server.url();
    let warned = |base: &coinop::repo::Base| -> Vec<(WarningKind, String)> {
        base.warnings().iter().map(|w| (w.kind, w.path.clone())).collect()
    };
    let want = vec![
        (WarningKind::SecretPath, ".env".to_string()),
        (WarningKind::SecretContent, "deploy/key.txt".to_string()),
        (WarningKind::AgentConfiguration, ".claude".to_string()),
    ];
    let base = house.repos.base(&house.repos.pin(&url, None).await.unwrap()).await.unwrap();
    assert_eq!(warned(&base), want);
    let mut more = files.to_vec();
    more.push(("b", "2"));
    commit_more(&house, &more);
    let next = house.repos.base(&house.repos.pin(&url, None).await.unwrap()).await.unwrap();
    assert_eq!(warned(&next), want, "files that are shared with the base before are not forgotten");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_patch_outlives_the_server_it_came_from() {
    use coinop::sandbox::{Change, Content};
    let (house, _) = house(&[("a", "1\n")]).await;
    let url = house.server.url();
    let pin: Pin = house.repos.pin(&url, None).await.unwrap();
    let _base = house.repos.base(&pin).await.unwrap();
    house.server.shutdown();
    let to = Content::File { bytes: b"2\n".to_vec(), executable: false };
    let patch = house.repos.patch(&pin, vec![Change { path: b"a".to_vec(), to }]).await.unwrap();
    assert!(String::from_utf8(patch.diff.clone()).unwrap().ends_with("-1\n+2\n"));
    house.repos.applies(&url, &pin.commit, patch.diff).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn real_git_clones_from_the_small_server() {
    let git = |args: &[&str]| {
        let out = std::process::Command::new("git").args(args).env("GIT_CONFIG_GLOBAL", "/dev/null").output();
        out.map(|o| (o.status.success(), String::from_utf8_lossy(&o.stderr).into_owned())).ok()
    };
    if !has_git("real_git_clones_from_the_small_server") {
        return;
    }
    let (house, _) = house(&[("a", "1"), ("d/b", "2")]).await;
    commit_more(&house, &[("a", "3"), ("d/b", "2")]);
    let url = house.server.url();
    let (whole, thin) = (house.dir.path().join("whole"), house.dir.path().join("thin"));
    let (whole, thin) = (whole.to_str().unwrap(), thin.to_str().unwrap());
    for args in [
        vec!["clone", "-q", &url, whole],
        vec!["clone", "-q", "--depth", "1", &url, thin],
        vec!["-C", whole, "fsck", "--strict"],
        vec!["-C", thin, "fsck"],
    ] {
        let args2: Vec<String> = args.iter().map(|s| s.to_string()).collect();
        let (ok, err) = tokio::task::spawn_blocking(move || {
            let args: Vec<&str> = args2.iter().map(String::as_str).collect();
            let out = std::process::Command::new("git")
                .args(args)
                .env("GIT_CONFIG_GLOBAL", "/dev/null")
                .output()
                .unwrap();
            (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
        })
        .await
        .unwrap();
        assert!(ok, "{args:?}: {err}");
    }
    commit_more(&house, &[("a", "4")]);
    let ours = format!("{whole}/a");
    let pulled = whole.to_string();
    let (ok, err) =
        tokio::task::spawn_blocking(move || git(&["-C", &pulled, "pull", "-q"]).unwrap()).await.unwrap();
    assert!(ok, "{err}");
    assert_eq!(std::fs::read_to_string(ours).unwrap(), "4");
    assert_eq!(std::fs::read_to_string(format!("{thin}/a")).unwrap(), "3");
}

/// `1 GiB`, `300,000 ms`, `1_073_741_824` as a number.
fn figure(text: &str) -> u64 {
    let text = text.trim().trim_matches('`');
    let (digits, unit) = text.split_once(' ').unwrap_or((text, ""));
    let number: u64 = digits.replace([',', '_'], "").parse().unwrap();
    number
        << match unit {
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            _ => 0,
        }
}

#[test]
fn the_caps_of_repositories_md_are_the_defaults_of_configuration_md() {
    let rows = |doc: &str, key: usize, value: usize| -> std::collections::BTreeMap<String, u64> {
        let text = std::fs::read_to_string(doc).unwrap();
        let cells = text.lines().map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
        cells
            .filter(|row| row.get(key).is_some_and(|cell| cell.starts_with("`repo.")))
            .map(|row| (row[key].to_string(), figure(row[value])))
            .collect()
    };
    let caps = rows("docs/repositories.md", 3, 2);
    assert_eq!(caps, rows("docs/configuration.md", 1, 2));
    assert_eq!(caps.len(), 7);
}
