//! One WebSocket to a wallet's relay or server, as lines of text: connected within its limit, capped, pinged when quiet.
//! What the lines mean is each wallet's own.

use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Bytes, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, client_async_tls_with_config};
use url::Url;

use super::{Error, Limits, brief};

const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
const PING_EVERY: Duration = Duration::from_secs(25);
const IDLE_TIMEOUT: Duration = Duration::from_secs(70);

/// An open connection.
pub(super) struct Socket {
    stream: WebSocketStream<MaybeTlsStream<TcpStream>>,
    heard: Instant,
    pinged: Option<Instant>,
}

impl Socket {
    pub async fn open(url: &Url, limits: &Limits) -> Result<Self, Error> {
        let cap = usize::try_from(limits.max_answer_bytes).unwrap_or(usize::MAX);
        let config = WebSocketConfig::default()
            .read_buffer_size(16 << 10)
            .write_buffer_size(16 << 10)
            .max_write_buffer_size(4 << 20)
            .max_message_size(Some(cap))
            .max_frame_size(Some(cap));
        // Whoever was first stays; the node's relay room installs the same.
        if rustls::crypto::ring::default_provider().install_default().is_err() {
            tracing::trace!("a TLS provider was there already");
        }
        let opening = async {
            let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
            let port = url.port_or_known_default().unwrap_or(443);
            let stream = TcpStream::connect((host, port)).await.map_err(|error| error.to_string())?;
            // With Nagle's rule a round trip takes 40 ms.
            stream.set_nodelay(true).map_err(|error| error.to_string())?;
            let upgraded = client_async_tls_with_config(url.as_str(), stream, Some(config), None).await;
            upgraded.map(|(stream, _)| stream).map_err(|error| brief(&error.to_string()))
        };
        match timeout(limits.connect, opening).await {
            Ok(Ok(stream)) => Ok(Self { stream, heard: Instant::now(), pinged: None }),
            Ok(Err(why)) => Err(Error::Unreachable(why)),
            Err(_) => {
                Err(Error::Unreachable(format!("no connection within {} ms", limits.connect.as_millis())))
            }
        }
    }

    /// The next text. Cancel safe.
    pub async fn next(&mut self) -> Result<String, Error> {
        loop {
            let message = match self.stream.next().await {
                None => return Err(Error::Cut("the other side closed the connection".into())),
                Some(Err(error)) => return Err(Error::Cut(brief(&error.to_string()))),
                Some(Ok(message)) => message,
            };
            self.heard = Instant::now();
            self.pinged = None;
            match message {
                Message::Text(text) => return Ok(text.as_str().to_owned()),
                Message::Close(_) => return Err(Error::Cut("the other side closed the connection".into())),
                // Nobody speaks binary here; pings are answered underneath.
                _ => {}
            }
        }
    }

    pub async fn send(&mut self, text: &str) -> Result<(), Error> {
        self.write(Message::text(text)).await
    }

    async fn write(&mut self, message: Message) -> Result<(), Error> {
        match timeout(WRITE_TIMEOUT, self.stream.send(message)).await {
            Ok(sent) => sent.map_err(|error| Error::Cut(brief(&error.to_string()))),
            Err(_) => Err(Error::Cut("the other side does not read".into())),
        }
    }

    /// Pings a quiet connection; one that is quiet for long is an error.
    pub async fn tick(&mut self) -> Result<(), Error> {
        let quiet = self.heard.elapsed();
        if quiet >= IDLE_TIMEOUT {
            return Err(Error::Cut("the other side is silent".into()));
        }
        if quiet >= PING_EVERY && self.pinged.is_none_or(|at| at.elapsed() >= PING_EVERY) {
            self.pinged = Some(Instant::now());
            return self.write(Message::Ping(Bytes::new())).await;
        }
        Ok(())
    }
}
