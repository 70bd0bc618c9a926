//! A relay inside this process, for the demo, the benches and the tests: rust-nostr's relay behind a listener of
//! ours, because its own leaves Nagle's rule on (40 ms a round trip) and allows 60 notes a minute. Memory only;
//! not for the internet.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use nostr_relay_builder::builder::{RateLimit, RelayBuilder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::Error;

/// Longest request head taken, bytes.
const MAX_HEAD: usize = 8 << 10;
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
const DOCUMENT: &str = r#"{"name":"coinop local relay","description":"in memory, for demo and tests","supported_nips":[1,9,11],"limitation":{"max_limit":5000,"max_subscriptions":500}}"#;

/// A running relay. Dropping it stops it and forgets its events.
#[derive(Debug)]
pub struct LocalRelay {
    relay: nostr_relay_builder::LocalRelay,
    address: SocketAddr,
    listener: JoinHandle<()>,
}

impl LocalRelay {
    /// Listens on 127.0.0.1 at a free port.
    pub async fn start() -> Result<Self, Error> {
        Self::start_at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await
    }

    /// Listens at this address; port 0 is a free one.
    pub async fn start_at(address: SocketAddr) -> Result<Self, Error> {
        let limit = RateLimit { max_reqs: 500, notes_per_minute: 100_000_000 };
        let builder =
            RelayBuilder::default().rate_limit(limit).max_filter_limit(5000).default_filter_limit(500);
        let relay = nostr_relay_builder::LocalRelay::new(builder);
        let listener = TcpListener::bind(address).await.map_err(Error::Listen)?;
        let address = listener.local_addr().map_err(Error::Listen)?;
        let listener = tokio::spawn(listen(listener, relay.clone()));
        Ok(Self { relay, address, listener })
    }

    /// `ws://127.0.0.1:port`.
    pub fn url(&self) -> String {
        format!("ws://{}", self.address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for LocalRelay {
    fn drop(&mut self) {
        self.listener.abort();
        self.relay.shutdown();
    }
}

async fn listen(listener: TcpListener, relay: nostr_relay_builder::LocalRelay) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    connections.spawn(serve(stream, peer, relay.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "the local relay cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(mut stream: TcpStream, peer: SocketAddr, relay: nostr_relay_builder::LocalRelay) {
    let upgraded = async {
        stream.set_nodelay(true)?;
        let head = tokio::time::timeout(HEAD_TIMEOUT, read_head(&mut stream)).await??;
        let Some(key) = header(&head, "sec-websocket-key") else {
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/nostr+json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{DOCUMENT}",
                DOCUMENT.len()
            );
            stream.write_all(answer.as_bytes()).await?;
            stream.shutdown().await?;
            return Ok(false);
        };
        let accept = derive_accept_key(key.as_bytes());
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: {accept}\r\n\r\n"
        );
        stream.write_all(answer.as_bytes()).await?;
        Ok::<_, std::io::Error>(true)
    };
    match upgraded.await {
        Ok(true) => {
            if let Err(error) = relay.take_connection(stream, peer).await {
                tracing::debug!(%error, "a connection to the local relay ended");
            }
        }
        Ok(false) => {}
        Err(error) => tracing::debug!(%error, "no upgrade on the local relay"),
    }
}

/// Reads up to the empty line. A client sends no frame before our answer, so nothing is read too far.
async fn read_head(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    let mut piece = [0; 1024];
    while !head.ends_with(b"\r\n\r\n") {
        let read = stream.read(&mut piece).await?;
        if read == 0 || head.len() + read > MAX_HEAD {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        head.extend_from_slice(piece.get(..read).unwrap_or_default());
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let fields = head.lines().filter_map(|line| line.split_once(':'));
    fields.into_iter().find(|(key, _)| key.trim().eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}
