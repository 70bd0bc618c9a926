//! HTTP to one wallet server: every call with its limit of time and of bytes, no redirect, no proxy, no cookie, a new
//! connection each time. What is asked and what the answer means is `lnbits`'s.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use ureq::Timeout;
use ureq::config::Config;
use ureq::tls::{TlsConfig, TlsProvider};
use url::Url;

use super::setup::is_loopback;
use super::{Error, Limits, Secret, brief};

const AGENT: &str = concat!("coinop/", env!("CARGO_PKG_VERSION"));

/// One server and the key to it.
pub(super) struct Http {
    agent: ureq::Agent,
    /// Without a slash at the end.
    base: String,
    host: String,
    key: Secret,
    limits: Limits,
}

/// A whole answer, whatever its status.
#[derive(Debug)]
pub(super) struct Answer {
    pub status: u16,
    pub location: Option<String>,
    pub body: Vec<u8>,
}

impl Http {
    pub fn new(base: &str, key: Secret, allow_plain: bool, limits: Limits) -> Result<Self, Error> {
        let bad = |why: &str| Err(Error::Setup(format!("the server's url: {why}")));
        let Ok(url) = Url::parse(base.trim()) else { return bad("not a URL") };
        let plain_ok = allow_plain || is_loopback(&url);
        if url.scheme() != "https" && !(url.scheme() == "http" && plain_ok) {
            return bad("want https (http only to this machine, or where plain connections are allowed)");
        }
        if !url.username().is_empty() || url.password().is_some() {
            return bad("it carries a user name or password");
        }
        if url.query().is_some() || url.fragment().is_some() {
            return bad("it carries a query");
        }
        let Some(host) = url.host_str() else { return bad("no host") };
        let host = url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
        let usable = |c: char| c.is_ascii_graphic();
        if key.expose().is_empty() || !key.expose().chars().all(usable) {
            return Err(Error::Setup("the key is not one word of plain characters".into()));
        }
        let base = url.as_str().trim_end_matches('/').to_owned();
        Ok(Self { agent: agent(&limits), base, host, key, limits })
    }

    pub fn host(&self) -> &str {
        &self.host
    }

    pub async fn get(&self, path: &str, query: &[(&str, String)]) -> Result<Answer, Error> {
        let request = self.agent.get(format!("{}{path}", self.base)).header("X-Api-Key", self.key.expose());
        let request = request.query_pairs(query.iter().map(|(name, value)| (*name, value.as_str())));
        let limit = self.limits.call;
        let request = request.config().timeout_global(Some(limit)).build();
        self.run(limit, "a question", move || request.call()).await
    }

    /// `within` is the limit of the whole call.
    pub async fn post(&self, path: &str, body: &Value, within: Duration) -> Result<Answer, Error> {
        let request = self.agent.post(format!("{}{path}", self.base)).header("X-Api-Key", self.key.expose());
        let request = request.content_type("application/json").config().timeout_global(Some(within)).build();
        let body = body.to_string();
        self.run(within, "an order", move || request.send(body)).await
    }

    /// The call blocks a thread of its own. Whoever stops waiting does not stop it: a payment that was begun is
    /// carried to its end.
    async fn run<F>(&self, within: Duration, what: &'static str, call: F) -> Result<Answer, Error>
    where
        F: FnOnce() -> Result<ureq::http::Response<ureq::Body>, ureq::Error> + Send + 'static,
    {
        let max_bytes = self.limits.max_answer_bytes;
        let limit_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
        let whole = move || {
            let mut answer = call()?;
            let status = answer.status().as_u16();
            let location = answer.headers().get("location").and_then(|to| to.to_str().ok()).map(brief);
            let body = answer.body_mut().with_config().limit(max_bytes).read_to_vec()?;
            Ok(Answer { status, location, body })
        };
        let called = tokio::task::spawn_blocking(whole).await;
        let called = called.map_err(|error| Error::Cut(format!("the call was ended: {error}")))?;
        called.map_err(|error| explain(&error, what, limit_ms, max_bytes))
    }
}

fn agent(limits: &Limits) -> ureq::Agent {
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    Config::builder()
        .proxy(None)
        .tls_config(tls)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .user_agent(AGENT)
        .accept("application/json")
        .accept_encoding("")
        .max_response_header_size(32 * 1024)
        // A connection kept for later can be closed under the next call, and then nobody knows what became of it.
        .max_idle_connections(0)
        .timeout_connect(Some(limits.connect))
        .build()
        .new_agent()
}

/// Only what surely happened before the request was sent is [`Error::Unreachable`].
fn explain(error: &ureq::Error, what: &'static str, limit_ms: u64, max_bytes: u64) -> Error {
    use std::io::ErrorKind;

    let said = brief(&error.to_string());
    match error {
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Tls(_)
        | ureq::Error::BadUri(_)
        | ureq::Error::Http(_)
        | ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => Error::Unreachable(said),
        ureq::Error::Timeout(_) => Error::Slow { what, limit_ms },
        ureq::Error::BodyExceedsLimit(_) => Error::TooLarge { max_bytes },
        ureq::Error::Io(io) => match io.kind() {
            ErrorKind::ConnectionRefused
            | ErrorKind::NetworkUnreachable
            | ErrorKind::HostUnreachable
            | ErrorKind::AddrNotAvailable => Error::Unreachable(said),
            _ => Error::Cut(said),
        },
        _ => Error::Cut(said),
    }
}
