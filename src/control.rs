//! The socket by which the command line asks a running node: one JSON line in, one out, for the owner
//! only. What is done with a question is the handler's business.
//!
//! It lies in the data directory, which belongs to one node at a time, so a socket found there at the
//! start is a dead node's. A stranger is kept out twice: by the socket's mode (0600) and by the kernel's
//! word on who connects.

use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// The socket's name in the data directory.
pub const SOCKET: &str = "control.sock";
/// Longest question and longest answer.
const MAX_LINE_BYTES: u64 = 4 << 20;
/// Questions answered at once; more wait in the kernel's queue.
const MAX_AT_ONCE: usize = 16;
/// Longer than a wallet may take to pay.
const PATIENCE: Duration = Duration::from_secs(75);

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Stop this job; the id of its request in full.
    Cancel(String),
    /// What this running job has printed so far; the id of its request in full.
    Logs(String),
    Status,
    /// An order about money, as `desk` spells it.
    Desk(serde_json::Value),
}

/// The node's side.
#[async_trait]
pub trait Handler: Send + Sync {
    /// Stops an open job in the owner's name. `Err` says why not, in a sentence.
    async fn cancel(&self, job: &str) -> Result<(), String>;
    /// What a running job has printed, or the end of it. `Err` says why not, in a sentence.
    async fn logs(&self, job: &str) -> Result<String, String>;
    /// Carries out an order about money. `Err` says why not, in a sentence.
    async fn desk(&self, order: serde_json::Value) -> Result<serde_json::Value, String>;
    /// What the node is doing, as an object.
    async fn status(&self) -> serde_json::Value;
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Ok(serde_json::Value),
    Error(String),
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no node runs on {}", .0.display())]
    NotRunning(PathBuf),
    #[error("node: {0}")]
    Refused(String),
    #[error("the control socket in {}: cannot {doing}: {source}", dir.display())]
    Io { doing: &'static str, dir: PathBuf, source: std::io::Error },
    #[error("the running node answered with something else than an answer; is it another version?")]
    Garbled,
}

/// The listening socket. Dropping it removes the file.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    file: PathBuf,
}

impl Server {
    /// Makes the socket in `dir`, in place of a dead node's. The caller holds the directory's lock, and
    /// calls from inside the runtime.
    pub fn bind(dir: &Path) -> Result<Server, Error> {
        let io = |doing| move |source| Error::Io { doing, dir: dir.to_path_buf(), source };
        let file = dir.join(SOCKET);
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io("remove the old one")(error));
            }
            _ => {}
        }
        let listener = short_path(dir, UnixListener::bind).map_err(io("make it"))?;
        std::fs::set_permissions(&file, Permissions::from_mode(0o600)).map_err(io("close it to others"))?;
        Ok(Server { listener, file })
    }

    /// Answers until `stop`. Never fails: one bad caller is logged and forgotten.
    pub async fn run(self, handler: Arc<dyn Handler>, stop: CancellationToken) {
        let slots = Arc::new(Semaphore::new(MAX_AT_ONCE));
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!("control socket: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let handler = Arc::clone(&handler);
            tokio::spawn(async move {
                match tokio::time::timeout(PATIENCE, answer(stream, handler.as_ref())).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!("control socket: a caller was left: {error}"),
                    Err(_) => tracing::debug!("control socket: a caller was too slow"),
                }
                drop(slot);
            });
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.file) {
            tracing::debug!("control socket: not removed: {error}");
        }
    }
}

async fn answer(stream: UnixStream, handler: &dyn Handler) -> std::io::Result<()> {
    let (caller, me) = (stream.peer_cred()?.uid(), nix::unistd::geteuid().as_raw());
    let (read, mut write) = stream.into_split();
    let answer = if caller != me && caller != 0 {
        tracing::warn!("control socket: user {caller} was turned away");
        Answer::Error("only the node's own user may ask".into())
    } else {
        let mut line = String::new();
        tokio::io::BufReader::new(read.take(MAX_LINE_BYTES)).read_line(&mut line).await?;
        match serde_json::from_str(&line) {
            Ok(Ask::Cancel(job)) => match handler.cancel(&job).await {
                Ok(()) => Answer::Ok(serde_json::Value::Null),
                Err(why) => Answer::Error(why),
            },
            Ok(Ask::Logs(job)) => match handler.logs(&job).await {
                Ok(log) => Answer::Ok(log.into()),
                Err(why) => Answer::Error(why),
            },
            Ok(Ask::Status) => Answer::Ok(handler.status().await),
            Ok(Ask::Desk(order)) => match handler.desk(order).await {
                Ok(answer) => Answer::Ok(answer),
                Err(why) => Answer::Error(why),
            },
            Err(error) => Answer::Error(format!("not understood: {error}")),
        }
    };
    let mut line = serde_json::to_vec(&answer)?;
    if line.len() as u64 >= MAX_LINE_BYTES {
        let why =
            format!("the answer has {} bytes, and {MAX_LINE_BYTES} fit: ask for less at once", line.len());
        line = serde_json::to_vec(&Answer::Error(why))?;
    }
    line.push(b'\n');
    write.write_all(&line).await?;
    write.shutdown().await
}

/// Asks the node that runs on `dir` and waits for its answer, ten seconds at most.
pub fn ask(dir: &Path, question: &Ask) -> Result<serde_json::Value, Error> {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    let io = |doing| move |source| Error::Io { doing, dir: dir.to_path_buf(), source };
    let mut stream = match short_path(dir, BlockingStream::connect) {
        Err(error) if matches!(error.kind(), NotFound | ConnectionRefused) => {
            return Err(Error::NotRunning(dir.to_path_buf()));
        }
        other => other.map_err(io("connect to it"))?,
    };
    stream.set_read_timeout(Some(PATIENCE)).map_err(io("set its time-out"))?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(io("set its time-out"))?;
    let mut line = serde_json::to_vec(question).map_err(|_| Error::Garbled)?;
    line.push(b'\n');
    stream.write_all(&line).map_err(io("write to it"))?;
    let mut reply = String::new();
    BufReader::new(stream.take(MAX_LINE_BYTES)).read_line(&mut reply).map_err(io("read from it"))?;
    match serde_json::from_str(&reply) {
        Ok(Answer::Ok(value)) => Ok(value),
        Ok(Answer::Error(why)) => Err(Error::Refused(why)),
        Err(_) => Err(Error::Garbled),
    }
}

/// A socket's path is at most 107 bytes long, a data directory's may be longer: go by way of its open
/// handle, which has a short name.
fn short_path<T>(dir: &Path, act: impl FnOnce(PathBuf) -> std::io::Result<T>) -> std::io::Result<T> {
    let handle = File::open(dir)?;
    act(PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", handle.as_raw_fd())))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Node;

    #[async_trait]
    impl Handler for Node {
        async fn cancel(&self, job: &str) -> Result<(), String> {
            if job == "known" { Ok(()) } else { Err(format!("there is no open job {job}")) }
        }
        async fn logs(&self, job: &str) -> Result<String, String> {
            Ok(format!("log of {job}"))
        }
        async fn desk(&self, order: serde_json::Value) -> Result<serde_json::Value, String> {
            Ok(if order == "much" { "x".repeat(5 << 20).into() } else { order })
        }
        async fn status(&self) -> serde_json::Value {
            serde_json::json!({ "running": 2 })
        }
    }

    async fn asked(dir: &Path, question: Ask) -> Result<serde_json::Value, Error> {
        let dir = dir.to_path_buf();
        tokio::task::spawn_blocking(move || ask(&dir, &question)).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_owner_asks_a_running_node_and_hears_why_not() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a-data-directory-with-a-rather-long-name/".repeat(6));
        std::fs::create_dir_all(&dir).unwrap();
        assert!(matches!(asked(&dir, Ask::Status).await, Err(Error::NotRunning(_))));

        let stop = CancellationToken::new();
        let server = Server::bind(&dir).unwrap();
        let mode = std::fs::metadata(dir.join(SOCKET)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let task = tokio::spawn(server.run(Arc::new(Node), stop.clone()));
        assert_eq!(asked(&dir, Ask::Status).await.unwrap()["running"], 2);
        asked(&dir, Ask::Cancel("known".into())).await.unwrap();
        let error = asked(&dir, Ask::Cancel("x".into())).await.unwrap_err();
        assert!(matches!(error, Error::Refused(why) if why == "there is no open job x"));
        let error = asked(&dir, Ask::Desk("much".into())).await.unwrap_err();
        assert!(matches!(error, Error::Refused(why) if why.contains("ask for less")));

        stop.cancel();
        task.await.unwrap();
        assert!(!dir.join(SOCKET).exists());
        assert!(matches!(asked(&dir, Ask::Status).await, Err(Error::NotRunning(_))));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_dead_nodes_socket_is_replaced_and_nonsense_is_answered() {
        let dir = tempfile::tempdir().unwrap();
        let dead = std::os::unix::net::UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        drop(dead);
        assert!(matches!(asked(dir.path(), Ask::Status).await, Err(Error::NotRunning(_))));
        let server = Server::bind(dir.path()).unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(server.run(Arc::new(Node), stop.clone()));
        let path = dir.path().join(SOCKET);
        let reply = tokio::task::spawn_blocking(move || {
            let mut stream = BlockingStream::connect(path).unwrap();
            stream.write_all(b"{\"launch\":1}\n").unwrap();
            let mut reply = String::new();
            stream.read_to_string(&mut reply).unwrap();
            reply
        });
        let reply = reply.await.unwrap();
        assert!(reply.contains("not understood") && reply.contains("launch"), "{reply}");
        stop.cancel();
        task.await.unwrap();
    }
}
