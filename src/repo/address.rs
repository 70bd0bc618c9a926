//! Which URLs a clone may go to: their shape, before anything is opened. It opens and resolves nothing itself;
//! the IP addresses behind a name are judged by `net` when `http.rs` has resolved it.

use std::path::PathBuf;

use sha2::{Digest, Sha256};
use url::{Host, Url};

use super::Error;
use crate::canonical::{canonical, clean};

/// Longest URL read, in bytes.
pub const MAX_URL_BYTES: usize = 2048;

/// Where a repository is fetched from: cleaned, but with `.git` at the end if the customer wrote it, for some servers
/// know only one of both. The cache, the rules and the books know it as `canonical`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// http or https, with a host, without user, query or fragment, no slash at the end.
    Http(Url),
    /// An absolute path on this host.
    File(PathBuf),
}

impl Location {
    /// Reads a customer's URL. Only `http`, `https` and, if `allow_file`, `file` are known; anything
    /// that parsers are known to disagree about is refused instead of mended.
    pub fn parse(text: &str, allow_file: bool) -> Result<Location, Error> {
        if text.len() > MAX_URL_BYTES {
            return Err(Error::refused(format!("the URL is longer than {MAX_URL_BYTES} bytes")));
        }
        if text.chars().any(|c| c.is_control() || c.is_whitespace() || c == '\\') {
            return Err(Error::refused("the URL contains blanks, control characters or backslashes"));
        }
        let (scheme, rest) = text.split_once("://").ok_or_else(|| {
            Error::refused("the repository must be named by an http or https URL (no ssh, no host:path)")
        })?;
        match scheme.to_ascii_lowercase().as_str() {
            "http" | "https" => Location::http(text, rest),
            "file" if allow_file => Location::file(text),
            "file" => Err(Error::refused("file:// is not allowed on this node")),
            other => Err(Error::refused(format!(
                "the scheme {:?} is not spoken here; use http or https",
                other.chars().take(20).collect::<String>()
            ))),
        }
    }

    fn http(text: &str, rest: &str) -> Result<Location, Error> {
        // `http:///host` is mended by browsers' rules; we do not guess.
        if rest.starts_with('/') {
            return Err(Error::refused("the URL has no host"));
        }
        let mut url = Url::parse(text).map_err(|e| Error::refused(format!("not a URL: {e}")))?;
        if !url.username().is_empty() || url.password().is_some() || authority(rest).contains('@') {
            return Err(Error::refused(
                "the URL carries credentials; they would be public, and only public repositories are cloned",
            ));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(Error::refused("the URL has a query or a fragment"));
        }
        if url.port() == Some(0) {
            return Err(Error::refused("the URL names port 0"));
        }
        let Some(Host::Domain(_) | Host::Ipv4(_) | Host::Ipv6(_)) = url.host() else {
            return Err(Error::refused("the URL has no host"));
        };
        if let Some(Host::Domain(name)) = url.host()
            && (name.len() > 253 || name.ends_with('.') || name.split('.').any(str::is_empty))
        {
            return Err(Error::refused("the host name is malformed"));
        }
        let lowered = url.path().to_ascii_lowercase();
        if ["%00", "%0a", "%0d", "%2f", "%5c"].iter().any(|bad| lowered.contains(bad)) {
            return Err(Error::refused("the URL's path hides control characters or slashes"));
        }
        let path = clean(url.path());
        if path == "/" {
            return Err(Error::refused("the URL names a host, not a repository"));
        }
        url.set_path(&path);
        Ok(Location::Http(url))
    }

    fn file(text: &str) -> Result<Location, Error> {
        let url = Url::parse(text).map_err(|e| Error::refused(format!("not a URL: {e}")))?;
        url.to_file_path()
            .map(Location::File)
            .map_err(|()| Error::refused("a file:// URL must name an absolute path on this host"))
    }

    /// The URL to fetch from.
    pub fn text(&self) -> String {
        match self {
            Location::Http(url) => url.as_str().to_string(),
            Location::File(path) => format!("file://{}", path.display()),
        }
    }

    /// The one spelling, by which the repository is known everywhere but to its server.
    pub fn canonical(&self) -> String {
        match self {
            Location::Http(url) => canonical(url),
            Location::File(path) => {
                Url::from_file_path(path).map_or_else(|()| self.text(), |url| canonical(&url))
            }
        }
    }

    /// Folder name of its mirror: 32 hex digits of the one spelling's SHA-256.
    pub(super) fn folder(&self) -> String {
        hex::encode(Sha256::digest(self.canonical().as_bytes())).chars().take(32).collect()
    }
}

fn authority(rest: &str) -> &str {
    rest.split(['/', '?', '#']).next().unwrap_or(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(text: &str) -> String {
        match Location::parse(text, false) {
            Err(Error::Refused { why }) => why,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn one_repository_has_one_spelling() {
        let spell = |t: &str| Location::parse(t, false).unwrap().text();
        assert_eq!(spell("HTTPS://Example.COM:443/a//b.git/"), "https://example.com/a/b.git");
        assert_eq!(spell("https://example.com/a/./x/../b.git"), "https://example.com/a/b.git");
        assert_eq!(spell("http://0x7f.1/a"), "http://127.0.0.1/a");
        assert_eq!(spell("http://2130706433/a"), "http://127.0.0.1/a");
        let known_as = |t: &str| Location::parse(t, true).unwrap().canonical();
        assert_eq!(known_as("https://example.com/a/b.git"), known_as("https://example.com/a/b/"));
        assert_eq!(known_as("file:///srv/a.git"), "file:///srv/a");
        let folder = |t: &str| Location::parse(t, false).unwrap().folder();
        assert_eq!(folder("https://example.com/a/b.git"), folder("https://example.com/a//x/../b"));
    }

    #[test]
    fn other_transports_are_refused_by_name() {
        for text in ["ssh://h/a", "git://h/a", "ftp://h/a", "ext::sh", "ext://x", "javascript://h/a"] {
            let why = why(text);
            assert!(why.contains("http"), "{text}: {why}");
        }
        assert!(why("git@github.com:a/b.git").contains("no ssh, no host:path"));
        assert!(why("/etc/passwd").contains("http or https URL"));
        assert!(why("file:///srv/a").contains("not allowed on this node"));
        assert!(matches!(Location::parse("file:///srv/a", true), Ok(Location::File(_))));
        assert!(Location::parse("file://other.host/srv/a", true).is_err());
    }

    #[test]
    fn credentials_and_tricks_in_the_url_are_refused() {
        assert!(why("https://user:pw@h.example/a").contains("credentials"));
        assert!(why("https://@h.example/a").contains("credentials"));
        assert!(why("https://h.example/a?token=1").contains("query"));
        assert!(why("https://h.example/a#x").contains("fragment"));
        assert!(why("https://h.example/a\r\nHost: b").contains("control"));
        assert!(why("ext::sh -c x").contains("blanks"));
        assert!(why("https://h.example\\@b/a").contains("backslash"));
        assert!(why("https:///h/a").contains("no host"));
        assert!(why("https://h.example./a").contains("malformed"));
        assert!(why("https://h..example/a").contains("malformed"));
        assert!(why("https://h.example").contains("not a repository"));
        assert!(why("https://h.example/a%0d%0ab").contains("control"));
        assert!(why("https://h.example/a%2Fb").contains("slashes"));
        assert!(why(&format!("https://h.example/{}", "a".repeat(3000))).contains("longer"));
    }
}
