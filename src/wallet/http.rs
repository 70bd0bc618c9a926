//! HTTP to one wallet server: every call with its limit of time and of bytes, no redirect, no proxy, no cookie, a new
//! connection each time. What is asked and what the answer means is `lnbits`'s.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use ureq::Timeout;
use ureq::config::Config;
use ureq::tls::{RootCerts, TlsConfig, TlsProvider};
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
    /// Seconds, as far as a header says so.
    pub retry_after_s: Option<u64>,
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
        Ok(Self { agent: agent(&limits, RootCerts::WebPki), base, host, key, limits })
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

    /// Where the server says by itself what has changed. It has the key in it: not to be shown.
    pub fn push_url(&self) -> Option<Url> {
        super::lnbits::push_address(&self.base, self.key.expose())
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
            let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok());
            let location = header("location").map(brief);
            let retry_after_s = header("retry-after").and_then(|seconds| seconds.trim().parse().ok());
            let body = answer.body_mut().with_config().limit(max_bytes).read_to_vec()?;
            Ok(Answer { status, location, retry_after_s, body })
        };
        let called = tokio::task::spawn_blocking(whole).await;
        let called = called.map_err(|error| Error::Cut(format!("the call was ended: {error}")))?;
        called.map_err(|error| explain(&error, what, limit_ms, max_bytes))
    }
}

/// `roots` sign the servers' certificates: those of Mozilla, compiled in. Nothing of the machine's is read.
fn agent(limits: &Limits, roots: RootCerts) -> ureq::Agent {
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .root_certs(roots)
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
        // The handshake ends before anything is asked, so the key has not left us.
        ureq::Error::Rustls(rustls::Error::InvalidCertificate(why)) => distrusted(why),
        ureq::Error::Io(io) if let Some(why) = bad_certificate(io) => distrusted(why),
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

fn bad_certificate(error: &std::io::Error) -> Option<&rustls::CertificateError> {
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        rustls::Error::InvalidCertificate(why) => Some(why),
        _ => None,
    }
}

fn distrusted(why: &rustls::CertificateError) -> Error {
    Error::Unreachable(brief(&format!("its certificate is not trusted ({why})")))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::path::Path;
    use std::process::{Command, Stdio};
    use std::thread::JoinHandle;

    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use ureq::tls::Certificate;

    use super::*;

    /// An authority, and a certificate by it for `localhost` only.
    const KEYS: &str = r#"
set -e
openssl req -x509 -newkey rsa:2048 -nodes -keyout ca-key.pem -out ca.pem -subj /CN=ca -days 2
printf "subjectAltName=DNS:localhost\n" > ext
openssl req -newkey rsa:2048 -nodes -keyout key.pem -out csr.pem -subj /CN=localhost
openssl x509 -req -in csr.pem -CA ca.pem -CAkey ca-key.pem -CAcreateserial -out cert.pem -days 2 -extfile ext
"#;

    /// Serves one connection; what it was asked in it, or why there was no asking.
    fn served_once(dir: &Path) -> (u16, JoinHandle<Result<String, std::io::Error>>) {
        let certificate = CertificateDer::from_pem_file(dir.join("cert.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_file(dir.join("key.pem")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = std::thread::spawn(move || {
            let (mut tcp, _) = listener.accept()?;
            let mut tls = rustls::ServerConnection::new(Arc::new(config)).unwrap();
            let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
            let mut asked = Vec::new();
            let mut piece = [0; 4096];
            while !asked.ends_with(b"\r\n\r\n") {
                let read = stream.read(&mut piece)?;
                asked.extend_from_slice(&piece[..read]);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")?;
            Ok(String::from_utf8_lossy(&asked).into_owned())
        });
        (port, served)
    }

    /// Asks once with only this authority trusted, or with those of the compiled list.
    async fn asked(
        dir: &Path,
        host: &str,
        knows: bool,
    ) -> (Result<Answer, Error>, Result<String, std::io::Error>) {
        let (port, served) = served_once(dir);
        let limits = Limits::default();
        let url = format!("https://{host}:{port}");
        let mut http = Http::new(&url, Secret::new("5ecre7"), false, limits.clone()).unwrap();
        if knows {
            let root = Certificate::from_pem(&std::fs::read(dir.join("ca.pem")).unwrap()).unwrap();
            http.agent = agent(&limits, RootCerts::Specific(Arc::new(vec![root])));
        }
        let answer = http.get("/api/v1/wallet", &[]).await;
        (answer, served.join().unwrap())
    }

    #[tokio::test]
    async fn a_certificate_counts_by_its_authority_and_its_name_and_otherwise_the_key_is_not_sent() {
        let dir = tempfile::tempdir().unwrap();
        let made = Command::new("sh").args(["-c", KEYS]).current_dir(&dir).stderr(Stdio::null()).status();
        if !made.is_ok_and(|status| status.success()) {
            assert!(std::env::var_os("REQUIRE_PARTS").is_none(), "openssl makes no keys");
            return eprintln!("SKIPPED: openssl makes no keys");
        }
        let (answer, heard) = asked(dir.path(), "localhost", true).await;
        assert_eq!(answer.unwrap().body, b"{}");
        assert!(heard.unwrap().contains("5ecre7"), "the server that is meant gets the key");

        for (host, knows, why) in
            [("localhost", false, "UnknownIssuer"), ("127.0.0.1", true, "not valid for name")]
        {
            let (answer, heard) = asked(dir.path(), host, knows).await;
            let error = answer.unwrap_err();
            let Error::Unreachable(said) = &error else { panic!("{error:?}") };
            assert!(said.contains("certificate is not trusted") && said.contains(why), "{said}");
            assert!(!error.leaves_doubt());
            assert!(heard.is_err(), "{host}: the server was asked {heard:?}");
        }
    }
}
