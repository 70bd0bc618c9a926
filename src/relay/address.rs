//! A relay's address: parsed strictly, resolved under the address policy, dialled at exactly the address that
//! was judged. What is said over the socket is `connection.rs`'s.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::net::TcpStream;
use url::{Host, Url};

use super::Error;
use crate::net::{is_public, without_user};

/// Longest address read, bytes.
const MAX_LEN: usize = 512;
/// Addresses of one name that are tried.
const MAX_TRIED: usize = 4;

/// A `ws://` or `wss://` address in one spelling. Equal addresses are the same relay.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address {
    text: Arc<str>,
    host: Host<String>,
    port: u16,
}

impl Address {
    /// Reads an address. Refused: other schemes, user names and passwords, no host, more than 512 bytes.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let bad = |why| Error::Address { url: without_user(text).chars().take(80).collect(), why };
        if text.len() > MAX_LEN {
            return Err(bad("too long"));
        }
        let mut url = Url::parse(text.trim()).map_err(|_| bad("not a URL"))?;
        if !matches!(url.scheme(), "ws" | "wss") {
            return Err(bad("only ws:// and wss://"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(bad("it carries a user name or password"));
        }
        url.set_fragment(None);
        let host = match url.host() {
            Some(Host::Domain(name)) if !name.is_empty() => {
                Host::Domain(name.trim_end_matches('.').to_owned())
            }
            Some(Host::Ipv4(ip)) => Host::Ipv4(ip),
            Some(Host::Ipv6(ip)) => Host::Ipv6(ip),
            _ => return Err(bad("no host")),
        };
        let port = url.port_or_known_default().ok_or_else(|| bad("no port"))?;
        if port == 0 {
            return Err(bad("port 0"));
        }
        let text = url.as_str().trim_end_matches('/').into();
        Ok(Self { text, host, port })
    }

    /// The one spelling: lower-case host, no default port, no trailing slash.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Same host and port, whatever the path.
    pub(super) fn shares_host(&self, other: &Self) -> bool {
        self.host == other.host && self.port == other.port
    }

    /// The address is written as a private one (an IP, or `localhost`): whoever typed it meant it.
    pub(super) fn is_plainly_private(&self) -> bool {
        match &self.host {
            Host::Ipv4(ip) => !is_public(IpAddr::V4(*ip)),
            Host::Ipv6(ip) => !is_public(IpAddr::V6(*ip)),
            Host::Domain(name) => name == "localhost" || name.ends_with(".localhost"),
        }
    }

    /// Where to connect. Without `allow_private` only public addresses are left; none left is an error
    /// that names one of the others.
    pub(super) async fn resolve(&self, allow_private: bool) -> Result<Vec<SocketAddr>, Error> {
        let found: Vec<SocketAddr> = match &self.host {
            Host::Ipv4(ip) => vec![SocketAddr::new(IpAddr::V4(*ip), self.port)],
            Host::Ipv6(ip) => vec![SocketAddr::new(IpAddr::V6(*ip), self.port)],
            Host::Domain(name) => tokio::net::lookup_host((name.as_str(), self.port))
                .await
                .map_err(|e| Error::Resolve { host: name.clone(), why: e.to_string() })?
                .collect(),
        };
        let host = self.host.to_string();
        let Some(first) = found.first().copied() else {
            return Err(Error::Resolve { host, why: "no address".into() });
        };
        let mut usable: Vec<_> = found.into_iter().filter(|a| allow_private || is_public(a.ip())).collect();
        usable.truncate(MAX_TRIED);
        if usable.is_empty() { Err(Error::Private { host, ip: first.ip() }) } else { Ok(usable) }
    }

    /// Connects to one of the addresses found, with TCP_NODELAY: with Nagle's rule a round trip takes 40 ms.
    pub(super) async fn dial(&self, addresses: &[SocketAddr]) -> Result<TcpStream, Error> {
        let mut last = String::from("no address");
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    stream.set_nodelay(true).map_err(|e| Error::Connect(e.to_string()))?;
                    return Ok(stream);
                }
                Err(e) => last = format!("{address}: {e}"),
            }
        }
        Err(Error::Connect(last))
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_relay_are_equal() {
        let one = Address::parse("wss://Relay.Example.org").unwrap();
        for other in ["wss://relay.example.org/", "wss://relay.example.org:443", " wss://RELAY.example.org/ "]
        {
            assert_eq!(one, Address::parse(other).unwrap(), "{other}");
        }
        assert_ne!(one, Address::parse("wss://relay.example.org/inbox").unwrap());
        assert_ne!(one, Address::parse("ws://relay.example.org").unwrap());
    }

    #[test]
    fn what_is_no_relay_is_refused_with_the_reason() {
        for (text, reason) in [
            ("http://relay.example.org", "only ws"),
            ("file:///etc/passwd", "only ws"),
            ("wss://me:secret@relay.example.org", "user name"),
            ("relay.example.org", "not a URL"),
            ("wss://", "not a URL"),
            ("", "not a URL"),
        ] {
            let error = Address::parse(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
        let error = Address::parse("wss://me:secret@relay.example.org").unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
        let error = Address::parse(&format!("wss://{}.org", "a".repeat(600))).unwrap_err().to_string();
        assert!(error.contains("too long"), "{error}");
    }

    #[tokio::test]
    async fn odd_spellings_of_loopback_are_seen_through() {
        for text in ["ws://127.0.0.1", "ws://2130706433", "ws://0x7f.1", "ws://[::1]", "ws://[::ffff:7f00:1]"]
        {
            let address = Address::parse(text).unwrap();
            assert!(address.is_plainly_private(), "{text}");
            assert!(matches!(address.resolve(false).await, Err(Error::Private { .. })), "{text}");
            assert!(address.resolve(true).await.is_ok(), "{text}");
        }
    }
}
