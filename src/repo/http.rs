//! HTTP to a stranger's git server: the address policy on the very addresses connected to, deadlines
//! and byte caps, no proxy, no cookie, no credential, no redirect to elsewhere. It knows nothing of git.

use std::io::{self, BufReader};
use std::sync::Arc;

use ureq::config::Config;
use ureq::http::Uri;
use ureq::tls::{TlsConfig, TlsProvider};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Connector, NextTimeout, RustlsConnector, TcpConnector};
use url::Url;

use super::budget::{Budget, Metered};
use super::{Error, Location};
use crate::net::is_public;

/// Redirects followed on the first request.
const MAX_REDIRECTS: usize = 3;
const AGENT: &str = concat!("git/coinop-", env!("CARGO_PKG_VERSION"));

/// A body being read; it spends the budget.
pub(super) type Body<'a> = BufReader<Metered<'a, ureq::BodyReader<'static>>>;

/// One server, for one fetch.
pub(super) struct Http<'a> {
    agent: ureq::Agent,
    base: Url,
    budget: &'a Budget,
}

impl<'a> Http<'a> {
    pub fn new(base: Url, allow_private: bool, budget: &'a Budget) -> Http<'a> {
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let config = Config::builder()
            .proxy(None)
            .tls_config(tls)
            .max_redirects(0)
            .http_status_as_error(false)
            .user_agent(AGENT)
            .accept("*/*")
            .accept_encoding("")
            .max_response_header_size(32 * 1024)
            .timeout_per_read(Some(budget.stall))
            .timeout_per_write(Some(budget.stall))
            .build();
        let connector = ().chain(TcpConnector::default()).chain(RustlsConnector::default());
        let agent = ureq::Agent::with_parts(
            config,
            connector,
            Guarded { inner: DefaultResolver::default(), allow_private },
        );
        budget.watch(agent.clone());
        Http { agent, base, budget }
    }

    /// The server's advertisement; protocol version 2 is offered.
    pub fn advertisement(&mut self) -> Result<Body<'a>, Error> {
        for _ in 0..=MAX_REDIRECTS {
            let url = format!("{}/info/refs?service=git-upload-pack", self.base);
            let left = self.budget.left()?;
            let answer = self
                .agent
                .get(&url)
                .header("Git-Protocol", "version=2")
                .config()
                .timeout_global(Some(left))
                .build()
                .call()
                .map_err(|e| self.explain(e))?;
            let status = answer.status().as_u16();
            if matches!(status, 301 | 302 | 303 | 307 | 308) {
                let to = answer.headers().get("location").and_then(|v| v.to_str().ok()).unwrap_or("");
                self.base = same_repository(&self.base, to)?;
                continue;
            }
            return self.body(answer, "application/x-git-upload-pack-advertisement");
        }
        Err(Error::unreachable(format!("the server redirects more than {MAX_REDIRECTS} times")))
    }

    /// One request to `git-upload-pack`.
    pub fn upload_pack(&self, request: &[u8], v2: bool) -> Result<Body<'a>, Error> {
        let left = self.budget.left()?;
        let mut post = self
            .agent
            .post(format!("{}/git-upload-pack", self.base))
            .header("Accept", "application/x-git-upload-pack-result")
            .content_type("application/x-git-upload-pack-request");
        if v2 {
            post = post.header("Git-Protocol", "version=2");
        }
        let answer =
            post.config().timeout_global(Some(left)).build().send(request).map_err(|e| self.explain(e))?;
        self.body(answer, "application/x-git-upload-pack-result")
    }

    fn body(&self, answer: ureq::http::Response<ureq::Body>, want_type: &str) -> Result<Body<'a>, Error> {
        match answer.status().as_u16() {
            200 => {}
            401 | 403 => return Err(Error::LoginAsked),
            404 | 410 => return Err(Error::NoSuchRepository),
            301..=303 | 307 | 308 => {
                return Err(Error::refused("the server redirects in the middle of the fetch"));
            }
            status => {
                return Err(Error::unreachable(format!("the server answers with HTTP status {status}")));
            }
        }
        // None was asked for, and git clients undo none that was not.
        if let Some(coding) = answer.headers().get("content-encoding").and_then(|v| v.to_str().ok())
            && !coding.eq_ignore_ascii_case("identity")
        {
            let coding: String = coding.chars().filter(|c| !c.is_control()).take(40).collect();
            return Err(Error::unreachable(format!("the server compresses its answer ({coding}) unasked")));
        }
        let kind = answer.headers().get("content-type").and_then(|v| v.to_str().ok()).unwrap_or("");
        if kind.split(';').next().map(str::trim) != Some(want_type) {
            return Err(Error::unreachable("the server does not speak git's smart HTTP protocol"));
        }
        let from = answer.into_body().into_reader();
        Ok(BufReader::with_capacity(128 * 1024, Metered { from, budget: self.budget }))
    }

    fn explain(&self, e: ureq::Error) -> Error {
        self.budget.explain(io::Error::other(e))
    }
}

/// A redirect may only mend the spelling of the same repository: `http` to `https`, `.git` at the end.
/// Anything else would pass by the operator's list of allowed repositories.
fn same_repository(base: &Url, to: &str) -> Result<Url, Error> {
    let elsewhere = || {
        Error::refused(format!(
            "the server redirects to {:?}; name that URL in the request instead",
            to.chars().take(200).collect::<String>()
        ))
    };
    let full = base.join(to).map_err(|_| elsewhere())?;
    let text = full.as_str();
    let new = text.strip_suffix("/info/refs?service=git-upload-pack").ok_or_else(elsewhere)?;
    let Ok(Location::Http(new)) = Location::parse(new, false) else { return Err(elsewhere()) };
    let bare = |u: &Url| u.path().trim_end_matches('/').trim_end_matches(".git").to_string();
    let scheme_ok = new.scheme() == base.scheme() || (base.scheme() == "http" && new.scheme() == "https");
    let port_ok = new.port() == base.port();
    if scheme_ok && port_ok && new.host() == base.host() && bare(&new) == bare(base) {
        Ok(new)
    } else {
        Err(elsewhere())
    }
}

/// Resolves, and lets only public addresses through. ureq connects to exactly what this returns, so
/// there is no second look-up that could answer otherwise.
#[derive(Debug)]
struct Guarded<R> {
    inner: R,
    allow_private: bool,
}

impl<R: Resolver> Resolver for Guarded<R> {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let found = self.inner.resolve(uri, config, timeout).map_err(|e| match e {
            ureq::Error::Io(_) => ureq::Error::HostNotFound,
            other => other,
        })?;
        // One private address among several is a trick, not an accident: all of it is refused.
        if let Some(bad) = found.iter().find(|a| !self.allow_private && !is_public(a.ip())) {
            let error =
                Error::refused(format!("the host resolves to {}, which is not a public address", bad.ip()));
            return Err(ureq::Error::Io(error.into_io()));
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with one list of addresses after the other, as a name server that rebinds does.
    #[derive(Debug)]
    struct Fickle(std::sync::Mutex<Vec<Vec<&'static str>>>);

    impl Resolver for Fickle {
        fn resolve(&self, _: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
            let mut found = self.empty();
            for address in self.0.lock().unwrap().remove(0) {
                found.push(address.parse().unwrap());
            }
            Ok(found)
        }
    }

    #[test]
    fn every_answer_to_a_look_up_is_judged_and_a_rebound_name_is_refused() {
        let answers = vec![
            vec!["9.9.9.9:80"],
            vec!["127.0.0.1:80"],
            vec!["9.9.9.9:80", "[::ffff:10.0.0.1]:80"],
            vec!["[fe80::1]:80"],
            vec!["169.254.169.254:80"],
        ];
        let count = answers.len();
        let guarded = |allow_private| Guarded { inner: Fickle(answers.clone().into()), allow_private };
        let ask = |guarded: &Guarded<Fickle>| {
            let timeout = NextTimeout {
                after: std::time::Duration::from_secs(1).into(),
                per_read: None,
                per_write: None,
                reason: ureq::Timeout::Resolve,
            };
            guarded.resolve(&Uri::from_static("http://h.example/"), &Config::default(), timeout)
        };
        let strict = guarded(false);
        assert_eq!(ask(&strict).unwrap()[0], "9.9.9.9:80".parse().unwrap());
        for _ in 1..count {
            let error = Error::from_ureq(ask(&strict).unwrap_err(), 0);
            assert!(
                matches!(&error, Error::Refused { why } if why.contains("not a public address")),
                "{error}"
            );
        }
        let open = guarded(true);
        assert!((0..count).all(|_| ask(&open).is_ok()));
    }

    #[test]
    fn a_redirect_may_mend_the_spelling_and_nothing_else() {
        let base = Url::parse("http://h.example/a/b").unwrap();
        let tail = "/info/refs?service=git-upload-pack";
        let go = |to: &str| same_repository(&base, &format!("{to}{tail}"));
        assert_eq!(go("https://h.example/a/b").unwrap().as_str(), "https://h.example/a/b");
        assert_eq!(go("/a/b.git").unwrap().as_str(), "http://h.example/a/b.git");
        for to in [
            "http://other.example/a/b",
            "/a/c",
            "http://h.example:81/a/b",
            "ftp://h.example/a/b",
            "http://u@h.example/a/b",
        ] {
            assert!(matches!(go(to), Err(Error::Refused { why }) if why.contains("redirects")), "{to}");
        }
        assert!(same_repository(&base, "/a/b").is_err());
        let secure = Url::parse("https://h.example/a/b").unwrap();
        assert!(
            same_repository(&secure, &format!("http://h.example/a/b{tail}")).is_err(),
            "no way down to http"
        );
    }
}
