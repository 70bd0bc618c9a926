//! One socket to one relay: opened under the address policy, every wait and every size bounded. It moves text
//! and knows nothing of Nostr.

use std::time::Instant;

use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Bytes, Error as WsError, Message, Utf8Bytes};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, client_async_tls_with_config};

use super::limits::Limits;
use super::{Address, Error, Wire};

/// An open WebSocket with its clocks.
pub(super) struct Connection {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    wire: Wire,
    heard: Instant,
    pinged: Option<Instant>,
}

/// What asking NIP-11 may delay a connection.
const LIMITS_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(3);

impl Connection {
    /// Resolves, judges, dials, speaks TLS where asked, upgrades. With `ask_limits` the NIP-11 document is
    /// fetched beside it; `None` then means that the relay did not tell.
    pub(super) async fn open(
        address: &Address,
        wire: &Wire,
        allow_private: bool,
        ask_limits: bool,
    ) -> Result<(Self, Option<Limits>), Error> {
        let limit = wire.connect_timeout;
        let opening = async {
            let at = address.resolve(allow_private).await?;
            let limits = async {
                if ask_limits { Limits::fetch(address, &at, LIMITS_TIMEOUT.min(limit)).await } else { None }
            };
            let upgraded = async {
                let stream = address.dial(&at).await?;
                let request = address.as_str();
                client_async_tls_with_config(request, stream, Some(config(wire)), None)
                    .await
                    .map_err(|e| Error::Connect(brief(&e)))
            };
            let (upgraded, limits) = tokio::join!(upgraded, limits);
            Ok((upgraded?.0, limits))
        };
        let (socket, limits) = timeout(limit, opening)
            .await
            .map_err(|_| Error::Slow { what: "connecting", limit_ms: millis(limit) })??;
        Ok((Self { socket, wire: wire.clone(), heard: Instant::now(), pinged: None }, limits))
    }

    /// The next text message. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Utf8Bytes, Error> {
        loop {
            match self.socket.next().await {
                None => return Err(Error::Gone),
                Some(Err(e)) => return Err(broken(&e)),
                Some(Ok(message)) => {
                    self.heard = Instant::now();
                    self.pinged = None;
                    match message {
                        Message::Text(text) => return Ok(text),
                        Message::Close(_) => return Err(Error::Gone),
                        // Binary is not Nostr; pings are answered underneath.
                        _ => {}
                    }
                }
            }
        }
    }

    /// Queues a message; it goes out with the next `flush`. Waits when the other side does not read.
    pub(super) async fn feed(&mut self, text: String) -> Result<(), Error> {
        let limit = self.wire.write_timeout;
        match timeout(limit, self.socket.feed(Message::text(text))).await {
            Ok(fed) => fed.map_err(|e| broken(&e)),
            Err(_) => Err(Error::Slow { what: "writing", limit_ms: millis(limit) }),
        }
    }

    pub(super) async fn flush(&mut self) -> Result<(), Error> {
        let limit = self.wire.write_timeout;
        match timeout(limit, self.socket.flush()).await {
            Ok(flushed) => flushed.map_err(|e| broken(&e)),
            Err(_) => Err(Error::Slow { what: "writing", limit_ms: millis(limit) }),
        }
    }

    /// Pings a quiet relay; a dead one is an error.
    pub(super) async fn tick(&mut self) -> Result<(), Error> {
        let quiet = self.heard.elapsed();
        if quiet >= self.wire.idle_timeout {
            return Err(Error::Slow {
                what: "an answer to a ping",
                limit_ms: millis(self.wire.idle_timeout),
            });
        }
        let due = self.pinged.is_none_or(|at| at.elapsed() >= self.wire.ping_every);
        if quiet >= self.wire.ping_every && due {
            self.pinged = Some(Instant::now());
            let limit = self.wire.write_timeout;
            return match timeout(limit, self.socket.send(Message::Ping(Bytes::new()))).await {
                Ok(sent) => sent.map_err(|e| broken(&e)),
                Err(_) => Err(Error::Slow { what: "writing", limit_ms: millis(limit) }),
            };
        }
        Ok(())
    }

    /// When the relay was last heard, for the cursor: what it sent before that has arrived.
    pub(super) fn heard(&self) -> Instant {
        self.heard
    }

    /// Says goodbye, briefly.
    pub(super) async fn close(mut self) {
        let goodbye = timeout(std::time::Duration::from_millis(500), self.socket.close(None)).await;
        if !matches!(goodbye, Ok(Ok(()))) {
            tracing::trace!("a relay did not take our goodbye");
        }
    }
}

fn config(wire: &Wire) -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(16 << 10)
        .write_buffer_size(16 << 10)
        .max_write_buffer_size(8 << 20)
        .max_message_size(Some(wire.max_frame_bytes))
        .max_frame_size(Some(wire.max_frame_bytes))
}

fn broken(error: &WsError) -> Error {
    match error {
        WsError::ConnectionClosed | WsError::AlreadyClosed => Error::Gone,
        WsError::Capacity(e) => Error::Hostile(e.to_string()),
        other => Error::Broken(brief(other)),
    }
}

/// An error of a stranger's making, cut to a line.
fn brief(error: &WsError) -> String {
    error.to_string().chars().take(200).collect()
}

fn millis(d: std::time::Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}
