//! What a checkout costs against `git clone --depth 1` of the same URL, taken in turns in one run. The server
//! is git's own `http-backend` behind a small HTTP front, the same for everybody. It measures the repository room
//! and changes nothing of it; git must be installed.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use crate::repo::{Options as RepoOptions, Repos};

/// The size of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Files in the tree, about 1 KB each.
    pub files: usize,
    /// Commits behind the tip, 40 changed files each.
    pub commits: usize,
    /// Times each thing is measured; the median is told.
    pub rounds: usize,
    /// A folder for everything; it is emptied of what the run made.
    pub dir: PathBuf,
}

/// Medians in milliseconds and their ratios to `git_ms`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub files: usize,
    pub commits: usize,
    pub rounds: usize,
    pub server: String,
    /// `git clone --depth 1`.
    pub git_ms: f64,
    /// A depth-1 clone by libgit2 alone, for comparison.
    pub libgit2_ms: f64,
    /// `pin` of a branch and `base`, nothing cached.
    pub first_ms: f64,
    /// Of `first_ms`, until the pack is indexed.
    pub first_fetch_ms: f64,
    /// The same again: the branch is asked for, the commit is here.
    pub cached_ms: f64,
    /// The same by commit id: nobody is asked.
    pub cached_by_id_ms: f64,
    /// After a commit of 40 files.
    pub new_commit_ms: f64,
    pub libgit2_ratio: f64,
    pub first_ratio: f64,
    pub cached_ratio: f64,
    pub new_commit_ratio: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("git is needed for this measurement and did not {doing}: {why}")]
    Git { doing: &'static str, why: String },
    #[error(transparent)]
    Repo(#[from] crate::repo::Error),
    #[error("could not measure: {0}")]
    Io(#[from] std::io::Error),
}

/// Runs the measurement.
pub async fn run(options: Options) -> Result<Report, Error> {
    std::fs::create_dir_all(&options.dir)?;
    let served = options.dir.join("bench.git");
    let mut history = History::make(&served, options.files, options.commits)?;
    let addr = serve(options.dir.clone()).await?;
    let url = format!("http://{addr}/bench.git");
    let mut times = Times::default();
    for _ in 0..options.rounds {
        times.round(&options, &url, &mut history).await?;
    }
    std::fs::remove_dir_all(&served)?;
    let git_ms = median(&times.git);
    let ratio = |t: &[f64]| median(t) / git_ms;
    Ok(Report {
        files: options.files,
        commits: options.commits,
        rounds: options.rounds,
        server: "git http-backend".to_string(),
        git_ms,
        libgit2_ms: median(&times.libgit2),
        first_ms: median(&times.first),
        first_fetch_ms: median(&times.fetch),
        cached_ms: median(&times.cached),
        cached_by_id_ms: median(&times.cached_by_id),
        new_commit_ms: median(&times.new_commit),
        libgit2_ratio: ratio(&times.libgit2),
        first_ratio: ratio(&times.first),
        cached_ratio: ratio(&times.cached),
        new_commit_ratio: ratio(&times.new_commit),
    })
}

#[derive(Debug, Default)]
struct Times {
    git: Vec<f64>,
    libgit2: Vec<f64>,
    first: Vec<f64>,
    fetch: Vec<f64>,
    cached: Vec<f64>,
    cached_by_id: Vec<f64>,
    new_commit: Vec<f64>,
}

impl Times {
    /// Everything once, one after the other, so that all meet the same machine.
    async fn round(&mut self, options: &Options, url: &str, history: &mut History) -> Result<(), Error> {
        let (a, b, cache) = (options.dir.join("git"), options.dir.join("libgit2"), options.dir.join("cache"));
        let to = a.clone();
        let from = url.to_string();
        self.git.push(timed_blocking(move || clone_by_git(&from, &to)).await?);
        let repo_options = RepoOptions { allow_private: true, ..RepoOptions::default() };
        let repos = Repos::open(&cache, repo_options)?;
        let start = Instant::now();
        let pin = repos.pin(url, None).await?;
        self.fetch.push(ms(start));
        let first = repos.base(&pin).await?;
        self.first.push(ms(start));
        let to = b.clone();
        let from = url.to_string();
        self.libgit2.push(timed_blocking(move || clone_by_libgit2(&from, &to)).await?);
        for _ in 0..3 {
            let start = Instant::now();
            let pin = repos.pin(url, None).await?;
            repos.base(&pin).await?;
            self.cached.push(ms(start));
            let start = Instant::now();
            let pin = repos.pin(url, Some(&pin.commit)).await?;
            repos.base(&pin).await?;
            self.cached_by_id.push(ms(start));
        }
        drop(first);
        history.commit()?;
        let start = Instant::now();
        let pin = repos.pin(url, None).await?;
        repos.base(&pin).await?;
        self.new_commit.push(ms(start));
        drop(repos);
        for folder in [a, b, cache] {
            std::fs::remove_dir_all(folder)?;
        }
        Ok(())
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

async fn timed_blocking(work: impl FnOnce() -> Result<(), Error> + Send + 'static) -> Result<f64, Error> {
    let start = Instant::now();
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)??;
    Ok(ms(start))
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn clone_by_git(url: &str, to: &Path) -> Result<(), Error> {
    git(Command::new("git").args(["clone", "-q", "--depth", "1", url]).arg(to), "clone")
}

fn clone_by_libgit2(url: &str, to: &Path) -> Result<(), Error> {
    let mut fetch = git2::FetchOptions::new();
    fetch.depth(1);
    let cloned = git2::build::RepoBuilder::new().fetch_options(fetch).clone(url, to);
    cloned.map(|_| ()).map_err(|e| Error::Git { doing: "clone by libgit2", why: e.message().to_string() })
}

fn git(command: &mut Command, doing: &'static str) -> Result<(), Error> {
    command
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0");
    let out = command.output()?;
    if out.status.success() {
        return Ok(());
    }
    Err(Error::Git { doing, why: String::from_utf8_lossy(&out.stderr).trim().to_string() })
}

/// A repository with a made-up past, the same for the same numbers.
struct History {
    repo: PathBuf,
    files: usize,
    commits: usize,
    seed: u64,
}

impl History {
    fn make(repo: &Path, files: usize, commits: usize) -> Result<History, Error> {
        if repo.exists() {
            std::fs::remove_dir_all(repo)?;
        }
        git(Command::new("git").args(["init", "-q", "--bare", "--initial-branch=main"]).arg(repo), "init")?;
        let mut history = History { repo: repo.to_path_buf(), files, commits: 0, seed: 7 };
        let mut stream = Vec::new();
        for n in 0..=commits {
            history.write_commit(&mut stream, if n == 0 { files } else { 40 }, false)?;
        }
        history.import(&stream)?;
        git(Command::new("git").arg("-C").arg(repo).args(["repack", "-adq"]), "repack")?;
        Ok(history)
    }

    /// One more commit of 40 files.
    fn commit(&mut self) -> Result<(), Error> {
        let mut stream = Vec::new();
        self.write_commit(&mut stream, 40, true)?;
        self.import(&stream)
    }

    fn import(&self, stream: &[u8]) -> Result<(), Error> {
        let mut child = Command::new("git")
            .arg("-C")
            .arg(&self.repo)
            .args(["fast-import", "--quiet"])
            .stdin(Stdio::piped())
            .spawn()?;
        if let Some(stdin) = child.stdin.as_mut() {
            stdin.write_all(stream)?;
        }
        drop(child.stdin.take());
        let status = child.wait()?;
        if status.success() {
            Ok(())
        } else {
            Err(Error::Git { doing: "fast-import", why: status.to_string() })
        }
    }

    fn write_commit(&mut self, out: &mut Vec<u8>, changed: usize, has_parent: bool) -> Result<(), Error> {
        self.commits += 1;
        let when = 1_700_000_000 + self.commits;
        write!(out, "commit refs/heads/main\ncommitter A <a@example.invalid> {when} +0000\ndata 2\nm\n")?;
        // Within one stream fast-import remembers the branch; in a later one it must be told.
        if has_parent {
            writeln!(out, "from refs/heads/main^0")?;
        }
        for n in 0..changed {
            let file = if changed == self.files { n } else { self.random() as usize % self.files };
            let contents = self.contents();
            let (d, e) = (file / 400, (file / 20) % 20);
            write!(out, "M 100644 inline d{d}/e{e}/f{file}.txt\ndata {}\n", contents.len())?;
            out.extend_from_slice(&contents);
            out.push(b'\n');
        }
        Ok(())
    }

    fn contents(&mut self) -> Vec<u8> {
        let lines = 5 + self.random() % 55;
        let mut text = Vec::new();
        for _ in 0..lines {
            for _ in 0..4 {
                let r = self.random();
                text.extend_from_slice(format!("w{} w{} ", r % 4000, (r >> 20) % 4000).as_bytes());
            }
            text.push(b'\n');
        }
        text
    }

    /// Good enough to make files differ.
    fn random(&mut self) -> u64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.seed >> 24
    }
}

/// Serves every repository below `root` through `git http-backend`, until the process ends.
async fn serve(root: PathBuf) -> Result<SocketAddr, Error> {
    let app = Router::new().fallback(backend).with_state(Arc::new(root));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let addr = listener.local_addr()?;
    let listener = axum::serve::ListenerExt::tap_io(listener, |tcp: &mut tokio::net::TcpStream| {
        if let Err(e) = tcp.set_nodelay(true) {
            tracing::debug!(error = %e, "TCP_NODELAY was not taken");
        }
    });
    tokio::spawn(async move {
        if let Err(e) = axum::serve(listener, app).await {
            tracing::warn!(error = %e, "the bench's git server ended");
        }
    });
    Ok(addr)
}

async fn backend(
    State(root): State<Arc<PathBuf>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    request: Request,
) -> Response {
    let body = match axum::body::to_bytes(request.into_body(), 64 << 20).await {
        Ok(body) => body,
        Err(e) => return (StatusCode::PAYLOAD_TOO_LARGE, e.to_string()).into_response(),
    };
    match cgi(&root, &method, &uri, &headers, body).await {
        Ok(response) => response,
        Err(e) => (StatusCode::BAD_GATEWAY, e.to_string()).into_response(),
    }
}

/// One CGI run; its output is passed on as it comes.
async fn cgi(
    root: &Path,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    body: Bytes,
) -> std::io::Result<Response> {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or("").to_string();
    let mut child = tokio::process::Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("PATH_INFO", uri.path())
        .env("QUERY_STRING", uri.query().unwrap_or(""))
        .env("REQUEST_METHOD", method.as_str())
        .env("CONTENT_TYPE", text("content-type"))
        .env("CONTENT_LENGTH", body.len().to_string())
        .env("HTTP_CONTENT_ENCODING", text("content-encoding"))
        .env("HTTP_GIT_PROTOCOL", text("git-protocol"))
        .env("GIT_PROTOCOL", text("git-protocol"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&body).await?;
    }
    let Some(stdout) = child.stdout.take() else { return Err(std::io::ErrorKind::BrokenPipe.into()) };
    let mut stdout = BufReader::with_capacity(64 * 1024, stdout);
    let mut response = Response::builder();
    let mut line = String::new();
    loop {
        line.clear();
        if stdout.read_line(&mut line).await? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.trim().split_once(':') {
            let value = value.trim();
            response = match name.eq_ignore_ascii_case("status") {
                true => response.status(value.get(..3).and_then(|s| s.parse().ok()).unwrap_or(500u16)),
                false => response.header(name, value),
            };
        }
    }
    // The child rides along, so that it is reaped when its output ends.
    let stream = futures_util::stream::unfold((stdout, child), |(mut stdout, mut child)| async move {
        let mut chunk = vec![0u8; 64 * 1024];
        match stdout.read(&mut chunk).await {
            Ok(0) => {
                if let Err(e) = child.wait().await {
                    tracing::debug!(error = %e, "git http-backend was not waited for");
                }
                None
            }
            Ok(n) => {
                chunk.truncate(n);
                Some((Ok::<_, std::io::Error>(Bytes::from(chunk)), (stdout, child)))
            }
            Err(e) => Some((Err(e), (stdout, child))),
        }
    });
    response.body(Body::from_stream(stream)).map_err(std::io::Error::other)
}
