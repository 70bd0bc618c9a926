//! The connection line of a wallet, `nostr+walletconnect://<wallet's key>?relay=…&secret=…`: parsed strictly, never
//! shown. Whoever has it can spend what the wallet allows it.

use std::fmt;

use nostr_sdk::prelude::{Keys, PublicKey, SecretKey};
use url::Url;

use crate::wallet::Error;
use crate::wallet::setup::is_loopback;

const SCHEME: &str = "nostr+walletconnect";
/// Longest line read, bytes.
const MAX_LEN: usize = 4_096;
/// Relays used; more are left out.
const MAX_RELAYS: usize = 4;

/// Who the wallet is, where it listens, and the key that we speak with.
#[derive(Clone)]
pub struct Uri {
    pub(super) wallet: PublicKey,
    pub(super) relays: Vec<Url>,
    pub(super) keys: Keys,
}

impl Uri {
    /// # Errors
    /// [`Error::Setup`], which never repeats the line. `ws://` is taken to this machine, elsewhere only with
    /// `allow_plain`.
    pub fn parse(text: &str, allow_plain: bool) -> Result<Self, Error> {
        let bad = |why: &str| Error::Setup(format!("not a usable {SCHEME}:// line: {why}"));
        let text = text.trim();
        if text.len() > MAX_LEN {
            return Err(bad("it is too long"));
        }
        let url = Url::parse(text).map_err(|_| bad("it is not a URL"))?;
        if url.scheme() != SCHEME {
            return Err(bad("it begins otherwise"));
        }
        // Some wallets leave the slashes out.
        let wallet = url.host_str().unwrap_or_else(|| url.path());
        let wallet =
            PublicKey::from_hex(wallet).map_err(|_| bad("the wallet's public key is not 64 hex digits"))?;
        let values = |name: &'static str| {
            url.query_pairs().filter(move |(key, _)| key == name).map(|(_, value)| value)
        };
        let secret = values("secret").next().ok_or_else(|| bad("it has no secret"))?;
        let secret = SecretKey::from_hex(&secret).map_err(|_| bad("its secret is not 64 hex digits"))?;
        let mut relays = Vec::new();
        for relay in values("relay") {
            let relay = Url::parse(&relay).map_err(|_| bad("a relay is not a URL"))?;
            let plain_ok = allow_plain || is_loopback(&relay);
            if relay.scheme() != "wss" && !(relay.scheme() == "ws" && plain_ok) {
                return Err(bad(
                    "a relay is not wss:// (ws:// only to this machine, or where plain connections are allowed)",
                ));
            }
            if relay.host_str().is_none_or(str::is_empty)
                || !relay.username().is_empty()
                || relay.password().is_some()
            {
                return Err(bad("a relay has no host, or a user name"));
            }
            if !relays.contains(&relay) && relays.len() < MAX_RELAYS {
                relays.push(relay);
            }
        }
        if relays.is_empty() {
            return Err(bad("it has no relay"));
        }
        let keys = Keys::new(secret);
        if keys.public_key() == wallet {
            return Err(bad("its secret is the wallet's own"));
        }
        Ok(Self { wallet, relays, keys })
    }

    /// The relays' hosts, as they may be shown.
    pub fn hosts(&self) -> String {
        let hosts = self.relays.iter().map(|relay| {
            let host = relay.host_str().unwrap_or_default();
            relay.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
        });
        hosts.collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Debug for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Uri({} at {})", self.wallet, self.hosts())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WALLET: &str = "b889ff5b1513b641e2a139f661a661364979c5beee91842f8f0ef42ab558e9d4";
    const SECRET: &str = "71a8c14c1407c113601079c4302dab36460f0ccd0ad506f1f2dc73b5100e4f3c";

    #[test]
    fn a_line_is_read_and_its_secret_is_not_shown() {
        for line in [
            format!(
                "nostr+walletconnect://{WALLET}?relay=wss%3A%2F%2Frelay.example.org&secret={SECRET}&lud16=a@b.c"
            ),
            format!("nostr+walletconnect:{WALLET}?secret={SECRET}&relay=wss://relay.example.org/"),
        ] {
            let uri = Uri::parse(&format!(" {line}\n"), false).unwrap();
            assert_eq!(uri.wallet.to_hex(), WALLET);
            assert_eq!(uri.hosts(), "relay.example.org");
            assert!(!format!("{uri:?}").contains(SECRET));
        }
    }

    #[test]
    fn many_relays_are_cut_and_doubles_are_one() {
        let relays: String =
            (0..9).map(|n| format!("&relay=wss://r{n}.example.org&relay=wss://r0.example.org")).collect();
        let uri =
            Uri::parse(&format!("nostr+walletconnect://{WALLET}?secret={SECRET}{relays}"), false).unwrap();
        assert_eq!(uri.hosts(), "r0.example.org, r1.example.org, r2.example.org, r3.example.org");
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_the_reason() {
        let line = |rest: &str| format!("nostr+walletconnect://{WALLET}?{rest}");
        for (text, reason) in [
            (String::new(), "not a URL"),
            (format!("nostr://{WALLET}"), "begins otherwise"),
            (format!("nostr+walletconnect://ab?secret={SECRET}&relay=wss://r.example.org"), "public key"),
            (line("relay=wss://r.example.org"), "no secret"),
            (line(&format!("secret={SECRET}0&relay=wss://r.example.org")), "64 hex"),
            (line(&format!("secret={SECRET}")), "no relay"),
            (line(&format!("secret={SECRET}&relay=ws://r.example.org")), "wss"),
            (line(&format!("secret={SECRET}&relay=wss://me:pw@r.example.org")), "user name"),
        ] {
            let error = Uri::parse(&text, false).unwrap_err().to_string();
            assert!(error.contains(reason) && !error.contains(SECRET), "{text}: {error}");
        }
        let loopback = line(&format!("secret={SECRET}&relay=ws://127.0.0.1:7777"));
        assert!(Uri::parse(&loopback, false).is_ok());
        assert!(Uri::parse(&line(&format!("secret={SECRET}&relay=ws://r.example.org")), true).is_ok());
    }
}
