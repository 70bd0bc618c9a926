//! LNbits' push: a WebSocket at `/api/v1/ws/<key>`, over which the server says that a payment of the wallet has changed.
//! Each message becomes a hint where to look and proves nothing. The key stands in the address, and addresses get into
//! logs: only a key that cannot spend is used so (docs/decisions/0028).

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::broadcast;
use url::Url;

use super::super::http::Http;
use super::super::socket::Socket;
use super::{judge, lenient};
use crate::backoff::random_unit;
use crate::wallet::{Error, Hint, Limits, Schedule};

const TICK: Duration = Duration::from_secs(5);

/// Listens for ever; whoever started it ends it. A key that may spend ends it at once.
pub(super) async fn listen(http: Arc<Http>, limits: Limits, hints: broadcast::Sender<Hint>) {
    let schedule = Schedule::new(Duration::from_secs(1), Duration::from_secs(60));
    let mut failures = 0;
    loop {
        let began = tokio::time::Instant::now();
        let error = match once(&http, &limits, &hints).await {
            Ok(()) => return tracing::debug!("the wallet's key may spend: its push is not used"),
            Err(error) => error,
        };
        failures =
            if began.elapsed() > Duration::from_secs(30) { 1 } else { u32::saturating_add(failures, 1) };
        let pause = schedule.pause(failures, random_unit());
        // Never the address: it has the key in it.
        tracing::debug!(host = http.host(), %error, ?pause, "the wallet's push was lost");
        tokio::time::sleep(pause).await;
    }
}

/// One connection, to its end. `Ok`: none is made.
async fn once(http: &Http, limits: &Limits, hints: &broadcast::Sender<Hint>) -> Result<(), Error> {
    // Only to the admin key the wallet's id is told.
    let wallet = judge(&http.get("/api/v1/wallet", &[]).await?)?;
    let Some(url) = http.push_url().filter(|_| wallet.get("id").is_none()) else { return Ok(()) };
    let mut socket = Socket::open(&url, limits).await?;
    // What came before is not told again.
    say(hints, Hint::Anything);
    let mut tick = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            text = socket.next() => if let Some(hint) = read(&text?) {
                say(hints, hint);
            },
            _ = tick.tick() => socket.tick().await?,
        }
    }
}

fn say(hints: &broadcast::Sender<Hint>, hint: Hint) {
    if hints.send(hint).is_err() {
        tracing::trace!("nobody listens to the wallet's hints");
    }
}

/// The payment that a message is about.
fn read(text: &str) -> Option<Hint> {
    let told: Value = serde_json::from_str(text).ok()?;
    let hash = lenient::text(told.get("payment")?, "payment_hash")?;
    hash.parse().ok().map(Hint::Changed)
}

/// Where the push of a server at this address is. The key must be one that needs no escape in an address.
pub(in crate::wallet) fn address(base: &str, key: &str) -> Option<Url> {
    let plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric());
    let base = base.strip_prefix("http").filter(|_| plain)?;
    Url::parse(&format!("ws{base}/api/v1/ws/{key}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_a_hint_about_one_payment_or_nothing() {
        let hash = "ab".repeat(32);
        let told = format!(r#"{{"wallet_balance":1,"payment":{{"payment_hash":"{hash}","amount":"x"}}}}"#);
        assert_eq!(read(&told), Some(Hint::Changed(hash.parse().unwrap())));
        for odd in ["", "[]", "{}", r#"{"payment":7}"#, r#"{"payment":{"payment_hash":7}}"#, "ping"] {
            assert_eq!(read(odd), None, "{odd}");
        }
    }

    #[test]
    fn the_address_keeps_the_servers_path_and_its_encryption() {
        let at = |base: &str, key: &str| address(base, key).map(|url| url.to_string());
        assert_eq!(
            at("https://w.example.org/ln", "abc1"),
            Some("wss://w.example.org/ln/api/v1/ws/abc1".into())
        );
        assert_eq!(at("http://127.0.0.1:5000", "abc1"), Some("ws://127.0.0.1:5000/api/v1/ws/abc1".into()));
        assert_eq!((at("http://127.0.0.1", "a/b"), at("http://127.0.0.1", "")), (None, None));
    }
}
