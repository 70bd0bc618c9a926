//! One WebSocket to a wallet's relay, and the few relay messages that matter here. A small brother of the node's own
//! relay connections, which stand in a room above: no catch-up, no outbox, a smaller frame cap. It checks no
//! signature; `link.rs` does.

use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use nostr_sdk::prelude::Event;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Bytes, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, client_async_tls_with_config};
use url::Url;

use crate::wallet::{Error, Limits, brief};

const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
const PING_EVERY: Duration = Duration::from_secs(25);
const IDLE_TIMEOUT: Duration = Duration::from_secs(70);

/// An open connection.
pub(super) struct Socket {
    stream: WebSocketStream<MaybeTlsStream<TcpStream>>,
    heard: Instant,
    pinged: Option<Instant>,
}

/// What a relay says, as far as it is of use.
pub(super) enum Said {
    /// Not verified.
    Event(Box<Event>),
    Ok {
        event: String,
        accepted: bool,
        reason: String,
    },
    Auth(String),
    Closed(String),
    Other,
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

    /// The next message. Cancel safe.
    pub async fn next(&mut self) -> Result<Said, Error> {
        loop {
            let message = match self.stream.next().await {
                None => return Err(Error::Cut("the relay closed the connection".into())),
                Some(Err(error)) => return Err(Error::Cut(brief(&error.to_string()))),
                Some(Ok(message)) => message,
            };
            self.heard = Instant::now();
            self.pinged = None;
            match message {
                Message::Text(text) => return Ok(read(&text)),
                Message::Close(_) => return Err(Error::Cut("the relay closed the connection".into())),
                // Binary is not Nostr; pings are answered underneath.
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
            Err(_) => Err(Error::Cut("the relay does not read".into())),
        }
    }

    /// Pings a quiet relay; one that is quiet for long is an error.
    pub async fn tick(&mut self) -> Result<(), Error> {
        let quiet = self.heard.elapsed();
        if quiet >= IDLE_TIMEOUT {
            return Err(Error::Cut("the relay is silent".into()));
        }
        if quiet >= PING_EVERY && self.pinged.is_none_or(|at| at.elapsed() >= PING_EVERY) {
            self.pinged = Some(Instant::now());
            return self.write(Message::Ping(Bytes::new())).await;
        }
        Ok(())
    }
}

/// Reads a message; whatever cannot be read is `Other`.
fn read(text: &str) -> Said {
    let Ok(mut parts) = serde_json::from_str::<Vec<Value>>(text) else { return Said::Other };
    let words = |n: usize| parts.get(n).and_then(Value::as_str).map(str::to_owned).unwrap_or_default();
    match words(0).as_str() {
        "EVENT" => match parts.get_mut(2).and_then(|event| serde_json::from_value(event.take()).ok()) {
            Some(event) => Said::Event(Box::new(event)),
            None => Said::Other,
        },
        "OK" => Said::Ok {
            event: words(1),
            accepted: parts.get(2).and_then(Value::as_bool).unwrap_or(false),
            reason: brief(&words(3)),
        },
        "AUTH" => Said::Auth(words(1).chars().take(1_024).collect()),
        "CLOSED" => Said::Closed(brief(&words(2))),
        _ => Said::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_nothing_and_never_a_panic() {
        let deep = format!("[\"EVENT\",\"s\",{}", "[".repeat(100_000));
        for text in ["", "{}", "[]", "[1,2]", r#"["EVENT"]"#, r#"["EVENT","s",{"id":1}]"#, "[\"é", &deep] {
            assert!(matches!(read(text), Said::Other), "{text:.40}");
        }
        assert!(matches!(read(r#"["OK","ab"]"#), Said::Ok { accepted: false, .. }));
        assert!(
            matches!(read(r#"["CLOSED","s","auth-required: x"]"#), Said::Closed(why) if why.starts_with("auth"))
        );
    }
}
