//! From a configured wallet to one that can be asked. The `config` room fills [`Setup`]; what is in its files is
//! checked here, once, before the first call.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Error, Lnbits, Nwc, Secret, Uri, Wallet};
use crate::clock;

/// The kinds of wallet there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// An LNbits server, over its REST interface.
    Lnbits,
    /// Whatever speaks NIP-47, over Nostr relays.
    Nwc,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Lnbits => "lnbits",
            Kind::Nwc => "nwc",
        })
    }
}

/// Where the key stands.
#[derive(Debug, Clone)]
pub enum Key {
    Text(Secret),
    /// One line, mode 0600.
    File(PathBuf),
}

/// Time-outs and caps of one wallet.
#[derive(Debug, Clone)]
pub struct Limits {
    /// For name look-up, TCP and TLS (and the WebSocket upgrade) together.
    pub connect: Duration,
    /// For one call, from its beginning to the last byte of its answer.
    pub call: Duration,
    /// The same for a payment: a route has to be found.
    pub pay: Duration,
    /// Longest answer read, bytes.
    pub max_answer_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            call: Duration::from_secs(10),
            pay: Duration::from_secs(60),
            max_answer_bytes: 1 << 20,
        }
    }
}

/// One wallet, as the operator names it.
#[derive(Debug, Clone)]
pub struct Setup {
    pub kind: Kind,
    /// The server's address, for LNbits. NWC has its relays in the key.
    pub url: Option<String>,
    /// LNbits: the invoice key to receive, the admin key to pay as well. NWC: the whole `nostr+walletconnect://` line.
    pub key: Key,
    /// Plain `http://` and `ws://` to other hosts than this one. The key goes over the wire readable.
    pub allow_plain: bool,
    pub limits: Limits,
}

impl Setup {
    /// With default limits, and encrypted to other hosts.
    pub fn new(kind: Kind, url: Option<String>, key: Key) -> Self {
        Self { kind, url, key, allow_plain: false, limits: Limits::default() }
    }
}

/// Checks the setup and makes the wallet. Nothing is asked yet; NWC begins to connect, so this runs inside a tokio
/// runtime.
pub fn open(setup: &Setup) -> Result<Arc<dyn Wallet>, Error> {
    let key = match &setup.key {
        Key::Text(secret) => secret.clone(),
        Key::File(path) => Secret::from_file(path)?,
    };
    match (setup.kind, &setup.url) {
        (Kind::Lnbits, Some(url)) => {
            Ok(Arc::new(Lnbits::new(url, key, setup.allow_plain, setup.limits.clone(), clock::system())?))
        }
        (Kind::Lnbits, None) => Err(Error::Setup("lnbits needs the server's url".into())),
        (Kind::Nwc, None) => {
            let uri = Uri::parse(key.expose(), setup.allow_plain)?;
            Ok(Arc::new(Nwc::start(uri, setup.limits.clone(), clock::system())?))
        }
        (Kind::Nwc, Some(_)) => {
            Err(Error::Setup("nwc takes no url: its relays stand in the connection line".into()))
        }
    }
}

/// Whether a URL's host is this machine itself, by its spelling.
pub(super) fn is_loopback(url: &url::Url) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(setup: &Setup) -> String {
        match open(setup) {
            Ok(wallet) => panic!("{} was opened", wallet.identity()),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_setup_that_cannot_work_is_refused_with_the_reason_and_without_the_key() {
        let key = || Key::Text(Secret::new("5ecre7"));
        let lnbits = |url: &str| Setup::new(Kind::Lnbits, Some(url.into()), key());
        for (setup, reason) in [
            (Setup::new(Kind::Lnbits, None, key()), "needs the server's url"),
            (lnbits("http://wallet.example.org"), "https"),
            (lnbits("ftp://wallet.example.org"), "https"),
            (lnbits("https://me:5ecre7@wallet.example.org"), "user name"),
            (lnbits("https://wallet.example.org/?api-key=5ecre7"), "query"),
            (lnbits("wallet"), "not a URL"),
            (
                Setup::new(
                    Kind::Lnbits,
                    Some("https://w.example.org".into()),
                    Key::Text(Secret::new("a b\nc")),
                ),
                "key",
            ),
            (Setup::new(Kind::Nwc, Some("https://wallet.example.org".into()), key()), "takes no url"),
            (Setup::new(Kind::Nwc, None, key()), "nostr+walletconnect"),
        ] {
            let why = refusal(&setup);
            assert!(why.contains(reason), "{why}");
            assert!(!why.contains("5ecre7"), "{why}");
        }
    }

    #[test]
    fn plain_http_is_taken_on_this_machine_and_where_it_is_allowed() {
        let key = || Key::Text(Secret::new("abc"));
        for url in [
            "http://127.0.0.1:5000",
            "http://localhost:5000/",
            "http://[::1]:5000",
            "https://w.example.org/lnbits/",
        ] {
            assert!(open(&Setup::new(Kind::Lnbits, Some(url.into()), key())).is_ok(), "{url}");
        }
        let mut plain = Setup::new(Kind::Lnbits, Some("http://w.example.org".into()), key());
        plain.allow_plain = true;
        assert_eq!(open(&plain).unwrap().identity().to_string(), "lnbits at w.example.org");
    }
}
