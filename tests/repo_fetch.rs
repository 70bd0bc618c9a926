//! What a fetch does when the server is not what it should be, and what a repository's own configuration
//! can bring about: nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
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
