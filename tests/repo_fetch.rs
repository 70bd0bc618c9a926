//! What a fetch does when the server is not what it should be, and what a repository's own configuration
//! can bring about: nothing.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use coinop::repo::{Error, Limits, Options, Repos, serve};
use coinop::sandbox::{Change, Content, Tree};
use tokio::io::AsyncReadExt;

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn repos(dir: &tempfile::TempDir, limits: Limits) -> Repos {
    let options = Options { allow_private: true, allow_file: true, limits, ..Options::default() };
    Repos::open(&dir.path().join("cache"), options).unwrap()
}

/// An HTTP server that answers every request by `answer`.
async fn server(answer: impl Fn(&Request) -> Response + Clone + Send + Sync + 'static) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind(loopback()).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let app = Router::new().fallback(move |request: Request| {
        let answer = answer(&request);
        async move { answer }
    });
    tokio::spawn(async move { axum::serve(listener, app).await });
    addr
}

fn redirect(to: String) -> Response {
    (StatusCode::MOVED_PERMANENTLY, [("location", to)]).into_response()
}

const TAIL: &str = "/info/refs?service=git-upload-pack";

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_to_the_same_repository_is_followed_and_one_to_elsewhere_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sample.git");
    let commit = serve::sample_repo(&path, &[("a", "1")]).unwrap();
    let git = serve::start(&[path], loopback()).await.unwrap();
    // The small server knows `sample.git` only; in front of it, `sample` is sent there.
    let root = git.root();
    let inside = root.clone();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let front = server(move |request| {
        count.fetch_add(1, Ordering::SeqCst);
        match request.uri().path() {
            "/loop/info/refs" => redirect(format!("/loop.git{TAIL}")),
            "/loop.git/info/refs" => redirect(format!("/loop{TAIL}")),
            "/other/info/refs" => redirect(format!("/secret{TAIL}")),
            "/inside/info/refs" => redirect(format!("{inside}inside{TAIL}")),
            _ => redirect("http://[".into()),
        }
    })
    .await;
    let repos = repos(&dir, Limits::default());
    for (path, why, requests) in [
        ("other", "name that URL in the request instead", 1),
        ("inside", "name that URL in the request instead", 1),
        ("broken", "name that URL in the request instead", 1),
        ("loop", "redirects more than 3 times", 4),
    ] {
        asked.store(0, Ordering::SeqCst);
        let error = repos.pin(&format!("http://{front}/{path}"), None).await.unwrap_err();
        assert!(error.to_string().contains(why), "{path}: {error}");
        assert_eq!(asked.load(Ordering::SeqCst), requests, "{path}");
    }
    let pin = repos.pin(&format!("{root}sample.git/"), None).await.unwrap();
    assert_eq!(pin.commit, commit);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_of_the_second_request_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refs = format!("001e# service=git-upload-pack\n0000{:04x}{}", 4 + 10, "version 2\n0000");
    let addr = server(move |request| match request.method().as_str() {
        "GET" => {
            ([("content-type", "application/x-git-upload-pack-advertisement")], refs.clone()).into_response()
        }
        _ => redirect("http://127.0.0.1:1/".into()),
    })
    .await;
    let error = repos(&dir, Limits::default()).pin(&format!("http://{addr}/a"), None).await.unwrap_err();
    assert!(
        matches!(&error, Error::Refused { why } if why.contains("in the middle of the fetch")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_https_url_speaks_tls_and_sends_nothing_in_the_clear() {
    let dir = tempfile::tempdir().unwrap();
    let listener = tokio::net::TcpListener::bind(loopback()).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let heard = tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut bytes = vec![0; 4096];
        let n = tcp.read(&mut bytes).await.unwrap();
        bytes.truncate(n);
        bytes
    });
    let url = format!("https://localhost:{port}/private-path");
    let error = repos(&dir, Limits::default()).pin(&url, None).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    let heard = heard.await.unwrap();
    assert_eq!(heard[..2], [0x16, 0x03], "a TLS handshake");
    assert!(memchr::memmem::find(&heard, b"localhost").is_some(), "with the name asked for");
    assert!(memchr::memmem::find(&heard, b"private-path").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_server_meets_the_stall_cap_long_before_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let listener = tokio::net::TcpListener::bind(loopback()).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let limits = Limits { stall_ms: 300, ..Limits::default() };
    let began = Instant::now();
    let error = repos(&dir, limits).pin(&format!("http://{addr}/a"), None).await.unwrap_err();
    assert!(matches!(&error, Error::Unreachable { why } if why.contains("silent for 300 ms")), "{error}");
    assert!(began.elapsed() < Duration::from_secs(30));
    drop(listener);
}

#[tokio::test(flavor = "multi_thread")]
async fn caps_on_what_is_unpacked_and_on_a_patch_are_told_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sample.git");
    serve::sample_repo(&path, &[("a", &"x".repeat(5000))]).unwrap();
    let git = serve::start(&[path], loopback()).await.unwrap();
    let small = tempfile::tempdir().unwrap();
    let limits = Limits { unpacked_bytes: 2000, ..Limits::default() };
    let error = repos(&small, limits).pin(&git.url(), None).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { what: "bytes unpacked", cap: 2000 }), "{error}");
    let repos = repos(&dir, Limits { patch_bytes: 100, ..Limits::default() });
    let pin = repos.pin(&git.url(), None).await.unwrap();
    let to = Content::File { bytes: b"y\n".repeat(100), executable: false };
    let error = repos.patch(&pin, vec![Change { path: b"b".to_vec(), to }]).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { what: "bytes of a patch", cap: 100 }), "{error}");
}

/// Everything by which a repository of this host could start a program: hooks, helpers in its configuration,
/// alternates that lead elsewhere. Over `file://`, where git itself would obey some of them.
#[tokio::test(flavor = "multi_thread")]
async fn hooks_and_configuration_of_a_local_repository_run_nothing() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("evil.git");
    let proof = dir.path().join("ran");
    let command = format!("touch {}", proof.display());
    serve::sample_repo(
        &path,
        &[("a.txt", "one\r\n"), (".gitattributes", "* filter=evil diff=evil text eol=crlf\n")],
    )
    .unwrap();
    std::fs::create_dir_all(path.join("hooks")).unwrap();
    for hook in
        ["post-checkout", "pre-receive", "reference-transaction", "post-index-change", "fsmonitor-watchman"]
    {
        let hook = path.join("hooks").join(hook);
        std::fs::write(&hook, format!("#!/bin/sh\n{command}\n")).unwrap();
        std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let config = format!(
        "[core]\n\trepositoryformatversion = 0\n\tbare = true\n\tfsmonitor = {command}\n\tsshCommand = {command}\n\
         \thooksPath = {0}/hooks\n\talternateRefsCommand = {command}\n\tgitProxy = {command}\n\
         [filter \"evil\"]\n\tsmudge = {command}\n\tclean = {command}\n\tprocess = {command}\n\trequired = true\n\
         [diff \"evil\"]\n\tcommand = {command}\n\ttextconv = {command}\n\
         [uploadpack]\n\tpackObjectsHook = {command}\n[credential]\n\thelper = !{command}\n\
         [include]\n\tpath = {0}/more\n",
        path.display()
    );
    std::fs::write(path.join("config"), config).unwrap();
    let repos = repos(&dir, Limits::default());
    let pin = repos.pin(&format!("file://{}", path.display()), None).await.unwrap();
    let base = repos.base(&pin).await.unwrap();
    assert_eq!(std::fs::read(base.path().join("a.txt")).unwrap(), b"one\r\n");
    let to = Content::File { bytes: b"two\r\n".to_vec(), executable: false };
    let patch = repos.patch(&pin, vec![Change { path: b"a.txt".to_vec(), to }]).await.unwrap();
    repos.applies(&pin.url, &pin.commit, patch.diff).await.unwrap();
    assert!(!proof.exists(), "something was run");
    // The same over http: the small server reads the same configuration, and runs as little.
    let git = serve::start(&[path], loopback()).await.unwrap();
    repos.base(&repos.pin(&git.url(), None).await.unwrap()).await.unwrap();
    assert!(!proof.exists(), "something was run");
}

/// A git server that can begin to answer with another status, and counts what it is asked.
struct Moody {
    url: String,
    commit: String,
    repo: std::path::PathBuf,
    status: Arc<AtomicU16>,
    asked: Arc<AtomicUsize>,
    _git: serve::Server,
}

impl Moody {
    async fn start(dir: &Path) -> Moody {
        let repo = dir.join("sample.git");
        let commit = serve::sample_repo(&repo, &[("a", "secret\n")]).unwrap();
        let git = serve::start(std::slice::from_ref(&repo), loopback()).await.unwrap();
        let (status, asked) = (Arc::new(AtomicU16::new(200)), Arc::new(AtomicUsize::new(0)));
        let (mood, count, inside) = (status.clone(), asked.clone(), git.root());
        let listener = tokio::net::TcpListener::bind(loopback()).await.unwrap();
        let url = format!("http://{}/sample.git", listener.local_addr().unwrap());
        let app = Router::new().fallback(move |request: Request| {
            count.fetch_add(1, Ordering::SeqCst);
            let (mood, inside) = (mood.load(Ordering::SeqCst), inside.clone());
            async move {
                if mood != 200 {
                    return StatusCode::from_u16(mood).unwrap().into_response();
                }
                pass_on(inside, request).await
            }
        });
        tokio::spawn(async move { axum::serve(listener, app).await });
        Moody { url, commit, repo, status, asked, _git: git }
    }

    fn answers(&self, status: u16) {
        self.status.store(status, Ordering::SeqCst);
    }

    /// Requests since the last call.
    fn asked(&self) -> usize {
        self.asked.swap(0, Ordering::SeqCst)
    }
}

async fn pass_on(root: String, request: Request) -> Response {
    let to = format!("{}{}", root.trim_end_matches('/'), request.uri().path_and_query().unwrap());
    let is_get = request.method() == "GET";
    let kind = request.headers().get("content-type").map(|v| v.to_str().unwrap().to_string());
    let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
    let answer = tokio::task::spawn_blocking(move || {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut answer = match is_get {
            true => agent.get(&to).call().unwrap(),
            false => agent.post(&to).content_type(kind.unwrap()).send(&body[..]).unwrap(),
        };
        let kind = answer.headers().get("content-type").map(|v| v.to_str().unwrap().to_string());
        let status = StatusCode::from_u16(answer.status().as_u16()).unwrap();
        (status, kind.unwrap_or_default(), answer.body_mut().read_to_vec().unwrap())
    });
    let (status, kind, bytes) = answer.await.unwrap();
    (status, [("content-type", kind)], bytes).into_response()
}

/// Packs and bases in the cache; those on their way out of it lie elsewhere.
fn kept(dir: &tempfile::TempDir) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![dir.path().join("cache/r")];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == "tree" || name.ends_with(".pack") {
                found.push(name);
            } else if entry.path().is_dir() {
                open.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_is_asked_for_each_job_of_another_customer_and_not_again_within_the_grace_of_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let moody = Moody::start(dir.path()).await;
    let options = |grace_ms| Options { allow_private: true, grace_ms, ..Options::default() };
    let repos = Repos::open(&dir.path().join("cache"), options(600_000)).unwrap();
    let commit = Some(moody.commit.as_str());
    let pin = repos.pin_for("alice", &moody.url, None).await.unwrap();
    repos.base(&pin).await.unwrap();
    assert!(moody.asked() > 0);
    for _ in 0..3 {
        repos.base(&repos.pin_for("alice", &moody.url, commit).await.unwrap()).await.unwrap();
    }
    assert_eq!(moody.asked(), 0, "the same customer, the same commit");
    for customer in ["bob", "carol"] {
        repos.base(&repos.pin_for(customer, &moody.url, commit).await.unwrap()).await.unwrap();
        assert!(moody.asked() > 0, "{customer}");
    }
    repos.base(&repos.pin_again(&moody.url, &moody.commit).unwrap()).await.unwrap();
    assert_eq!(moody.asked(), 0, "a retry of a job that was let in");
    repos.idle().await;
    drop(repos);
    let repos = Repos::open(&dir.path().join("cache"), options(0)).unwrap();
    for _ in 0..2 {
        repos.pin_for("alice", &moody.url, commit).await.unwrap();
        assert!(moody.asked() > 0, "without a grace");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_its_server_withdrew_is_given_to_nobody_and_leaves_the_disk_also_after_a_restart() {
    for (status, restarted) in [(401, false), (403, true), (404, false), (410, true)] {
        let dir = tempfile::tempdir().unwrap();
        let moody = Moody::start(dir.path()).await;
        let mut cache = repos(&dir, Limits::default());
        cache.base(&cache.pin_for("alice", &moody.url, None).await.unwrap()).await.unwrap();
        assert_eq!(kept(&dir).len(), 2, "a pack and a base");
        if restarted {
            cache.idle().await;
            drop(cache);
            cache = repos(&dir, Limits::default());
        }
        moody.answers(status);
        moody.asked();
        // Another spelling is the same repository.
        let url = moody.url.trim_end_matches(".git");
        for customer in ["bob", "alice"] {
            let error = cache.pin_for(customer, url, Some(&moody.commit)).await.unwrap_err();
            let right = match status {
                401 | 403 => matches!(error, Error::LoginAsked),
                _ => matches!(error, Error::NoSuchRepository),
            };
            assert!(right && moody.asked() > 0, "{status} {customer}: {error}");
        }
        assert_eq!(kept(&dir), Vec::<String>::new(), "{status}");
        moody.answers(200);
        cache.base(&cache.pin_for("bob", &moody.url, None).await.unwrap()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_takes_nothing_back_and_gives_nothing_to_others() {
    let dir = tempfile::tempdir().unwrap();
    let moody = Moody::start(dir.path()).await;
    let cache = repos(&dir, Limits::default());
    cache.base(&cache.pin_for("alice", &moody.url, None).await.unwrap()).await.unwrap();
    moody.answers(503);
    let error = cache.pin_for("bob", &moody.url, Some(&moody.commit)).await.unwrap_err();
    assert!(matches!(&error, Error::Unreachable { why } if why.contains("503")), "{error}");
    assert_eq!(kept(&dir).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_keeps_what_it_holds_when_the_server_takes_it_back_and_then_it_goes() {
    for restarted in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let moody = Moody::start(dir.path()).await;
        let cache = repos(&dir, Limits::default());
        let pin = cache.pin_for("alice", &moody.url, None).await.unwrap();
        let held = cache.base(&pin).await.unwrap();
        moody.answers(404);
        cache.pin_for("bob", &moody.url, Some(&moody.commit)).await.unwrap_err();
        cache.pin_for("alice", &moody.url, Some(&moody.commit)).await.unwrap_err();
        assert_eq!(std::fs::read(held.path().join("a")).unwrap(), b"secret\n");
        let to = Content::File { bytes: b"2\n".to_vec(), executable: false };
        let patch = cache.patch(&pin, vec![Change { path: b"a".to_vec(), to }]).await.unwrap();
        assert_eq!(patch.files_changed, 1);
        drop(held);
        if restarted {
            cache.idle().await;
            drop(cache);
            drop(repos(&dir, Limits::default()));
        } else {
            // The next work on any repository.
            cache.pin(&format!("file://{}", moody.repo.display()), Some("nowhere")).await.unwrap_err();
            cache.idle().await;
        }
        assert_eq!(kept(&dir), Vec::<String>::new(), "restarted: {restarted}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_its_server_pruned_is_found_by_nobody_although_it_is_here() {
    let dir = tempfile::tempdir().unwrap();
    let moody = Moody::start(dir.path()).await;
    let cache = repos(&dir, Limits::default());
    cache.base(&cache.pin_for("alice", &moody.url, None).await.unwrap()).await.unwrap();
    // Another repository in its place: the branch is rewritten, the old objects are gone.
    std::fs::remove_dir_all(&moody.repo).unwrap();
    serve::sample_repo(&moody.repo, &[("b", "public\n")]).unwrap();
    for name in [&moody.commit, &moody.commit[..9]] {
        let error = cache.pin_for("bob", &moody.url, Some(name)).await.unwrap_err();
        assert!(matches!(error, Error::RefNotFound { .. }), "{name}: {error}");
    }
    assert!(!kept(&dir).contains(&"tree".to_string()));
    let error = cache.pin_for("alice", &moody.url, Some(&moody.commit)).await.unwrap_err();
    assert!(matches!(error, Error::RefNotFound { .. }), "{error}");
}

/// What a server of protocol 0 or 1 says of an empty repository, and what is no answer of a git server at all.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_repository_has_no_such_ref_however_its_server_says_so() {
    let service = "001e# service=git-upload-pack\n0000";
    let zero = "0".repeat(40);
    let caps = |name: &str| format!("{zero} {name}\0side-band-64k ofs-delta thin-pack shallow\n");
    let line = |text: String| format!("{:04x}{text}", text.len() + 4);
    for (told, is_empty) in [
        (format!("{service}0000"), true),
        (format!("{service}{}0000", line(caps("capabilities^{}"))), true),
        (format!("{service}{}0000", line("version 1\n".into())), true),
        (format!("{service}{}{}0000", line("version 1\n".into()), line(caps("capabilities^{}"))), true),
        (String::new(), false),
        ("0000".to_string(), false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let answer = told.clone();
        let addr = server(move |request| match request.method().as_str() {
            "GET" => ([("content-type", "application/x-git-upload-pack-advertisement")], answer.clone())
                .into_response(),
            _ => StatusCode::NOT_FOUND.into_response(),
        })
        .await;
        let cache = repos(&dir, Limits::default());
        for name in [None, Some("main"), Some("1234567"), Some("1234567890123456789012345678901234567890")] {
            let error = cache.pin(&format!("http://{addr}/a"), name).await.unwrap_err();
            let right = match is_empty {
                true => matches!(error, Error::RefNotFound { .. }),
                false => matches!(&error, Error::Unreachable { why } if why.contains("is empty")),
            };
            assert!(right, "{told:?} {name:?}: {error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_answer_and_an_odd_status_are_told_as_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let addr = server(|request| match request.uri().path() {
        "/gzip/info/refs" => (
            [("content-type", "application/x-git-upload-pack-advertisement"), ("content-encoding", "gzip")],
            "\x1f",
        )
            .into_response(),
        _ => StatusCode::MULTIPLE_CHOICES.into_response(),
    })
    .await;
    let cache = repos(&dir, Limits::default());
    for (path, why) in [("gzip", "compresses its answer (gzip) unasked"), ("choices", "HTTP status 300")] {
        let error = cache.pin(&format!("http://{addr}/{path}"), None).await.unwrap_err();
        assert!(matches!(&error, Error::Unreachable { why: w } if w.contains(why)), "{path}: {error}");
    }
}
