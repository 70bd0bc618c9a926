//! A TCP gate before a server: open, shut, or holding. It moves bytes and understands none of them.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// What passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Open,
    /// New connections are hung up on, and those that are open are cut.
    Shut,
    /// Connections are taken; what the client says passes, the server's words wait.
    Mute,
    /// Connections are taken and nothing passes.
    Stall,
}

pub struct Gate {
    address: SocketAddr,
    way: watch::Sender<Way>,
    came: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Gate {
    pub async fn before(server: SocketAddr) -> Gate {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let (way, seen) = watch::channel(Way::Open);
        let came = Arc::new(AtomicU64::new(0));
        let task = tokio::spawn(keep(listener, server, seen, Arc::clone(&came)));
        Gate { address, way, came, task }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn set(&self, way: Way) {
        self.way.send_replace(way);
    }

    /// Connections that were tried since the start.
    pub fn came(&self) -> u64 {
        self.came.load(Ordering::SeqCst)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(listener: TcpListener, server: SocketAddr, way: watch::Receiver<Way>, came: Arc<AtomicU64>) {
    let mut passing = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                came.fetch_add(1, Ordering::SeqCst);
                if *way.borrow() != Way::Shut {
                    passing.spawn(pass(client, server, way.clone()));
                }
            }
            Some(_) = passing.join_next() => {}
        }
    }
}

async fn pass(client: TcpStream, server: SocketAddr, mut way: watch::Receiver<Way>) {
    let mut shut = way.clone();
    let through = async {
        if way.wait_for(|way| *way != Way::Stall).await.is_err() {
            return;
        }
        let Ok(server) = TcpStream::connect(server).await else { return };
        for stream in [&client, &server] {
            stream.set_nodelay(true).expect("TCP_NODELAY");
        }
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        let out = pump(from_client, to_server, way.clone(), |way| way != Way::Stall);
        let back = pump(from_server, to_client, way.clone(), |way| way == Way::Open);
        tokio::join!(out, back);
    };
    tokio::select! {
        () = through => {}
        _ = shut.wait_for(|way| *way == Way::Shut) => {}
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut way: watch::Receiver<Way>,
    may_pass: impl Fn(Way) -> bool,
) {
    let mut bytes = vec![0; 16 * 1024];
    loop {
        let Ok(read) = from.read(&mut bytes).await else { return };
        if way.wait_for(|way| may_pass(*way)).await.is_err() {
            return;
        }
        let Some(read) = bytes.get(..read).filter(|read| !read.is_empty()) else {
            // The other direction may go on; a peer that is gone already needs no word.
            return to.shutdown().await.unwrap_or_default();
        };
        if to.write_all(read).await.is_err() {
            return;
        }
    }
}
