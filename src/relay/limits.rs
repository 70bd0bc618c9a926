//! What a relay says about itself (NIP-11): fetched over plain HTTP from exactly the addresses that were judged,
//! read with caps, believed only where it makes us more modest.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Deserialize;
use ureq::Agent;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

use super::Address;

/// Longest document read, bytes.
const MAX_BYTES: u64 = 128 << 10;

/// The limits that matter to us; `None` where the relay does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(default)]
pub struct Limits {
    /// Longest message it takes, bytes.
    #[serde(deserialize_with = "lenient")]
    pub max_message_length: Option<u64>,
    #[serde(deserialize_with = "lenient")]
    pub max_subscriptions: Option<u64>,
    /// Most events it sends for one filter.
    #[serde(deserialize_with = "lenient")]
    pub max_limit: Option<u64>,
    #[serde(deserialize_with = "lenient_bool")]
    pub auth_required: Option<bool>,
    #[serde(deserialize_with = "lenient_bool")]
    pub payment_required: Option<bool>,
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    limitation: serde_json::Value,
}

fn lenient<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
    let value = serde_json::Value::deserialize(d)?;
    Ok(value.as_u64().or_else(|| value.as_str()?.parse().ok()).filter(|n| *n > 0))
}

fn lenient_bool<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<bool>, D::Error> {
    Ok(serde_json::Value::deserialize(d)?.as_bool())
}

impl Limits {
    /// Reads a NIP-11 document. Whatever is not there or nonsense is no limit.
    pub(super) fn parse(document: &[u8]) -> Option<Self> {
        let document: Document = serde_json::from_slice(document).ok()?;
        // A list would be read as the fields in their order.
        let limits = Some(document.limitation).filter(serde_json::Value::is_object);
        Some(limits.and_then(|limits| serde_json::from_value(limits).ok()).unwrap_or_default())
    }

    /// Asks the relay, at these addresses only. Takes at most `timeout`; no answer is no limit.
    pub(super) async fn fetch(address: &Address, at: &[SocketAddr], timeout: Duration) -> Option<Self> {
        let url = address.as_str().replacen("ws", "http", 1);
        let judged = Judged(at.to_vec());
        let asked = tokio::task::spawn_blocking(move || get(&url, judged, timeout));
        match tokio::time::timeout(timeout, asked).await {
            Ok(Ok(Ok(body))) => Self::parse(&body),
            Ok(Ok(Err(error))) => {
                tracing::debug!(relay = %address, %error, "no NIP-11 document");
                None
            }
            Ok(Err(_)) | Err(_) => None,
        }
    }
}

fn get(url: &str, judged: Judged, timeout: Duration) -> Result<Vec<u8>, ureq::Error> {
    let config = Config::builder()
        .proxy(None)
        .max_redirects(0)
        .timeout_global(Some(timeout))
        .max_idle_connections(0)
        .build();
    let agent = Agent::with_parts(config, DefaultConnector::default(), judged);
    let mut response = agent.get(url).header("accept", "application/nostr+json").call()?;
    response.body_mut().with_config().limit(MAX_BYTES).read_to_vec()
}

/// A resolver that knows only the addresses that passed the policy.
#[derive(Debug)]
struct Judged(Vec<SocketAddr>);

impl Resolver for Judged {
    fn resolve(&self, _: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let mut found = self.empty();
        for address in self.0.iter().take(4) {
            found.push(*address);
        }
        if self.0.is_empty() { Err(ureq::Error::HostNotFound) } else { Ok(found) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_leniently() {
        let text = br#"{"name":"r","limitation":{"max_message_length":"65536","max_subscriptions":-1,
            "max_limit":500,"auth_required":"yes","payment_required":true,"other":[]}}"#;
        let limits = Limits::parse(text).unwrap();
        assert_eq!(limits.max_message_length, Some(65536));
        assert_eq!((limits.max_subscriptions, limits.max_limit), (None, Some(500)));
        assert_eq!((limits.auth_required, limits.payment_required), (None, Some(true)));
        for odd in
            [&br#"{}"#[..], br#"{"limitation":null}"#, br#"{"limitation":[1]}"#, br#"{"limitation":"none"}"#]
        {
            assert_eq!(Limits::parse(odd), Some(Limits::default()));
        }
        assert_eq!(Limits::parse(b"<html>"), None);
    }
}
