//! A small read-only git server over HTTP, for the demo and for tests on hosts without git: protocol
//! version 0, shallow fetches. It is no fortress: it is meant for loopback and for repositories of one's own.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path as UrlPath, RawQuery, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use git2::{Oid, Repository, RepositoryInitOptions, Signature, Time};
use tokio::sync::oneshot;

use super::pkt::{self, Pkt, Reader};
use super::remote::{Want, full_id};
use super::{Error, pack};

const SERVICE: &str = "git-upload-pack";
/// Bytes of a pack in one band packet.
const BAND: usize = 65_515;

/// A running server; it stops when this value is dropped.
#[derive(Debug)]
pub struct Server {
    addr: SocketAddr,
    names: Vec<String>,
    stop: Option<oneshot::Sender<()>>,
}

impl Server {
    /// `http://address/`, with a slash at the end.
    pub fn root(&self) -> String {
        format!("http://{}/", self.addr)
    }

    /// The URL of the first repository.
    pub fn url(&self) -> String {
        format!("{}{}", self.root(), self.names.first().map_or("", String::as_str))
    }

    /// Stops taking connections.
    pub fn shutdown(mut self) {
        self.halt();
    }

    fn halt(&mut self) {
        if let Some(stop) = self.stop.take()
            && stop.send(()).is_err()
        {
            tracing::debug!("the git server had already stopped");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.halt();
    }
}

type Shared = Arc<BTreeMap<String, PathBuf>>;

/// Serves each repository under its folder's name. `addr` may name port 0.
pub async fn start(repositories: &[PathBuf], addr: SocketAddr) -> Result<Server, Error> {
    super::prepare_libgit2();
    let mut known = BTreeMap::new();
    let mut names = Vec::new();
    for path in repositories {
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .ok_or_else(|| Error::refused("a served repository's folder needs a plain name"))?;
        known.insert(name.to_string(), path.clone());
        names.push(name.to_string());
    }
    let app = Router::new()
        .route("/{name}/info/refs", get(advertise))
        .route("/{name}/git-upload-pack", post(upload_pack))
        .with_state(Arc::new(known) as Shared);
    let listener =
        tokio::net::TcpListener::bind(addr).await.map_err(Error::host("listen for git clients"))?;
    let addr = listener.local_addr().map_err(Error::host("listen for git clients"))?;
    let (stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(async move {
        let until = async move {
            // A dropped sender means the same as a sent word.
            if stopped.await.is_err() {
                tracing::debug!("the git server's handle is gone");
            }
        };
        let listener = axum::serve::ListenerExt::tap_io(listener, |tcp: &mut tokio::net::TcpStream| {
            if let Err(e) = tcp.set_nodelay(true) {
                tracing::debug!(error = %e, "TCP_NODELAY was not taken");
            }
        });
        if let Err(e) = axum::serve(listener, app).with_graceful_shutdown(until).await {
            tracing::warn!(error = %e, "the git server ended");
        }
    });
    Ok(Server { addr, names, stop: Some(stop) })
}

/// Makes a bare repository in `dir` with one commit on `main` that holds `files` (path, contents), and
/// returns the commit's id. The same files give the same id. Called again on the same folder it adds a
/// commit with exactly these files. A path ending in `*` is executable and loses the star.
pub fn sample_repo(dir: &Path, files: &[(&str, &str)]) -> Result<String, Error> {
    super::prepare_libgit2();
    let repo = match Repository::open_bare(dir) {
        Ok(repo) => repo,
        Err(_) => {
            let mut options = RepositoryInitOptions::new();
            options.bare(true).mkpath(true).external_template(false).initial_head("main");
            Repository::init_opts(dir, &options).map_err(Error::broken)?
        }
    };
    let mut index = git2::Index::new().map_err(Error::broken)?;
    for (path, contents) in files {
        let (path, mode) = path.strip_suffix('*').map_or((*path, 0o100_644), |p| (p, 0o100_755));
        let id = repo.blob(contents.as_bytes()).map_err(Error::broken)?;
        index.add(&entry(path, mode, id)).map_err(Error::broken)?;
    }
    let tree = index.write_tree_to(&repo).and_then(|id| repo.find_tree(id)).map_err(Error::broken)?;
    let when = Time::new(1_700_000_000, 0);
    let who = Signature::new("Coinop", "sample@example.invalid", &when).map_err(Error::broken)?;
    let parent = repo.head().and_then(|h| h.peel_to_commit()).ok();
    let parents: Vec<_> = parent.iter().collect();
    let id = repo
        .commit(Some("refs/heads/main"), &who, &who, "A sample repository\n", &tree, &parents)
        .map_err(Error::broken)?;
    Ok(id.to_string())
}

fn entry(path: &str, mode: u32, id: Oid) -> git2::IndexEntry {
    let never = git2::IndexTime::new(0, 0);
    git2::IndexEntry {
        ctime: never,
        mtime: never,
        dev: 0,
        ino: 0,
        mode,
        uid: 0,
        gid: 0,
        file_size: 0,
        id,
        flags: 0,
        flags_extended: 0,
        path: path.as_bytes().to_vec(),
    }
}

/// What is asked for in one POST.
#[derive(Debug, Default)]
struct Request {
    want: Want,
    done: bool,
}

async fn advertise(
    State(known): State<Shared>,
    UrlPath(name): UrlPath<String>,
    RawQuery(query): RawQuery,
) -> Response {
    if query.as_deref() != Some("service=git-upload-pack") {
        return (StatusCode::FORBIDDEN, "only git-upload-pack is served").into_response();
    }
    answer(known, name, "application/x-git-upload-pack-advertisement", advertisement).await
}

async fn upload_pack(
    State(known): State<Shared>,
    UrlPath(name): UrlPath<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if headers.contains_key(header::CONTENT_ENCODING) {
        return (StatusCode::UNSUPPORTED_MEDIA_TYPE, "send the request uncompressed").into_response();
    }
    answer(known, name, "application/x-git-upload-pack-result", move |repo| give(repo, &body)).await
}

/// Runs blocking git work on the named repository and wraps what it gives.
async fn answer(
    known: Shared,
    name: String,
    kind: &'static str,
    work: impl FnOnce(&Repository) -> Result<Vec<u8>, Error> + Send + 'static,
) -> Response {
    let Some(path) = known.get(&name).cloned() else {
        return (StatusCode::NOT_FOUND, "no such repository").into_response();
    };
    let work = move || Repository::open(&path).map_err(Error::broken).and_then(|repo| work(&repo));
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(bytes)) => {
            ([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-cache")], bytes).into_response()
        }
        Ok(Err(e)) => {
            let mut bytes = Vec::new();
            pkt::write(&mut bytes, format!("ERR {e}\n"));
            ([(header::CONTENT_TYPE, kind)], bytes).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

fn advertisement(repo: &Repository) -> Result<Vec<u8>, Error> {
    let refs = pack::refs(repo)?;
    let mut capabilities = String::from(
        "side-band-64k ofs-delta shallow no-progress allow-tip-sha1-in-want allow-reachable-sha1-in-want object-format=sha1",
    );
    if let Ok(head) = repo.find_reference("HEAD")
        && let Ok(Some(target)) = head.symbolic_target()
    {
        capabilities.push_str(&format!(" symref=HEAD:{target}"));
    }
    let mut out = Vec::new();
    pkt::write(&mut out, format!("# service={SERVICE}\n"));
    pkt::flush(&mut out);
    let mut lines: Vec<String> = Vec::new();
    for one in &refs {
        lines.push(format!("{} {}", one.id, one.name));
        if let Some(peeled) = one.peeled {
            lines.push(format!("{peeled} {}^{{}}", one.name));
        }
    }
    if lines.is_empty() {
        lines.push(format!("{} capabilities^{{}}", Oid::ZERO_SHA1));
    }
    for (n, line) in lines.iter().enumerate() {
        if n == 0 {
            pkt::write(&mut out, format!("{line}\0{capabilities}\n"));
        } else {
            pkt::write(&mut out, format!("{line}\n"));
        }
    }
    pkt::flush(&mut out);
    Ok(out)
}

fn read_request(body: &[u8]) -> Result<Request, Error> {
    let mut reader = Reader::new(body);
    let mut request = Request::default();
    let mut shallow = Vec::new();
    let bad = |_| Error::broken("a malformed request");
    while let Some(packet) = reader.next().map_err(bad)? {
        let Pkt::Data(data) = packet else { continue };
        let line = String::from_utf8_lossy(pkt::text(data)).into_owned();
        let mut words = line.split(' ');
        match (words.next(), words.next()) {
            (Some("want"), Some(id)) => request.want.commits.extend(full_id(id)),
            (Some("have"), Some(id)) => request.want.have.extend(full_id(id)),
            (Some("shallow"), Some(id)) => shallow.extend(full_id(id)),
            (Some("deepen"), Some(depth)) => request.want.depth = depth.parse().ok().filter(|d| *d > 0),
            (Some("done"), None) => request.done = true,
            _ => {}
        }
    }
    if request.want.depth != Some(1) {
        // What lies behind a shallow commit is not there, so it must not end the walk.
        request.want.have.retain(|id| !shallow.contains(id));
    }
    Ok(request)
}

/// The answer to one POST: shallow lines when a depth was asked for, one acknowledgement, and, once the
/// client is done, the pack.
fn give(repo: &Repository, body: &[u8]) -> Result<Vec<u8>, Error> {
    let request = read_request(body)?;
    let mut out = Vec::new();
    let contents = pack::contents(repo, &request.want)?;
    if request.want.depth.is_some() {
        for id in &contents.shallow {
            pkt::write(&mut out, format!("shallow {id}\n"));
        }
        pkt::flush(&mut out);
    }
    let common = request.want.have.iter().find(|id| repo.find_commit(**id).is_ok());
    match common {
        Some(id) => pkt::write(&mut out, format!("ACK {id}\n")),
        None if request.done || !request.want.have.is_empty() => pkt::write(&mut out, "NAK\n"),
        None => {}
    }
    if request.done {
        let mut packed = Vec::new();
        pack::write(repo, &contents.objects, pack::How::Fast, &mut packed)?;
        for part in packed.chunks(BAND) {
            let mut band = Vec::with_capacity(part.len() + 1);
            band.push(1);
            band.extend_from_slice(part);
            pkt::write(&mut out, band);
        }
        pkt::flush(&mut out);
    }
    Ok(out)
}
