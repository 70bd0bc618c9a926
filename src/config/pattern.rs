//! Patterns of repository URLs (`admission.allow_repos`). They compare the one spelling of a URL; addresses and schemes
//! are judged elsewhere.

use serde::Deserialize;
use url::Url;

use crate::canonical::without_git;
use crate::repo::Location;

/// A host or URL with wildcards: `github.com/acme/*`, `https://*.example.org/**`, `git.example.org`.
///
/// `*` stands for any run of characters without a slash, `**` for any run at all. A pattern without a
/// scheme fits any; without a path, every repository of the host. `.git` and a slash at the end do not
/// count, on either side. Host names compare without case, paths with it. The port counts.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct RepoPattern {
    scheme: Option<String>,
    /// Host with port, lower case; empty for `file://`.
    host: String,
    /// Without the slash in front; `None`: every path.
    path: Option<String>,
}

impl RepoPattern {
    /// Says why when it cannot be a pattern.
    pub fn parse(text: &str) -> Result<RepoPattern, String> {
        let wrong = |why: &str| format!("{text:?} is not a repository pattern: {why}");
        if text.is_empty() || text.len() > 1_024 || text.contains(char::is_whitespace) {
            return Err(wrong("it must be 1 to 1024 bytes without spaces"));
        }
        let (scheme, rest) = match text.split_once("://") {
            None => (None, text),
            Some((scheme @ ("http" | "https" | "file"), rest)) => (Some(scheme.to_string()), rest),
            Some(_) => return Err(wrong("the scheme must be http, https or file")),
        };
        if rest.contains(['@', '?', '#', '\\']) {
            return Err(wrong("user names, queries and fragments never match"));
        }
        let (host, path) = rest.split_once('/').map_or((rest, None), |(host, path)| (host, Some(path)));
        if host.is_empty() && scheme.as_deref() != Some("file") {
            return Err(wrong("it names no host; write * for any"));
        }
        // As in `git@github.com:acme/tool`, which no http URL looks like.
        if let Some((name, port)) = host.rsplit_once(':')
            && !host.ends_with(']')
            && !port.bytes().all(|b| b.is_ascii_digit() || b == b'*')
        {
            let rest = path.map(|path| format!("/{path}")).unwrap_or_default();
            return Err(wrong(&format!("{port:?} is not a port; write {name}/{port}{rest}")));
        }
        let path = path.map(bare).filter(|path| !path.is_empty()).map(str::to_string);
        let mut host = host.to_ascii_lowercase();
        // A URL's one spelling has no default port.
        for (scheme_of, port) in [("https", ":443"), ("http", ":80")] {
            if scheme.as_deref() == Some(scheme_of)
                && let Some(bare) = host.strip_suffix(port)
            {
                host = bare.to_string();
            }
        }
        Ok(RepoPattern { scheme, host, path })
    }

    /// Whether this URL is meant, however it is spelt. One that `Location` refuses never is: a user name, a password,
    /// a query, a fragment, an encoded slash.
    pub fn matches(&self, url: &str) -> bool {
        let Ok(location) = Location::parse(url, true) else { return false };
        let Ok(url) = Url::parse(&location.canonical()) else { return false };
        if self.scheme.as_ref().is_some_and(|scheme| scheme != url.scheme()) {
            return false;
        }
        let path = url.path().trim_start_matches('/');
        let mut host = url.host_str().unwrap_or_default().to_ascii_lowercase();
        if let Some(port) = url.port() {
            host = format!("{host}:{port}");
        }
        let fits_path = self.path.as_ref().is_none_or(|want| glob(want.as_bytes(), path.as_bytes()));
        fits_path && glob(self.host.as_bytes(), host.as_bytes())
    }
}

impl TryFrom<String> for RepoPattern {
    type Error = String;
    fn try_from(text: String) -> Result<RepoPattern, String> {
        RepoPattern::parse(&text)
    }
}

impl std::fmt::Display for RepoPattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(scheme) = &self.scheme {
            write!(f, "{scheme}://")?;
        }
        write!(f, "{}", self.host)?;
        self.path.as_ref().map_or(Ok(()), |path| write!(f, "/{path}"))
    }
}

fn bare(path: &str) -> &str {
    without_git(path.trim_matches('/'))
}

/// `*` without slashes, `**` with them. Takes pattern × text steps and no recursion, whatever they are.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    // `fits` has one entry a place between bytes: whether the pattern so far can end there.
    let mut fits = vec![false; text.len() + 1];
    fits[0] = true;
    let mut rest = pattern;
    while let Some((&c, mut tail)) = rest.split_first() {
        let deep = c == b'*' && tail.first() == Some(&b'*');
        if deep {
            tail = tail.get(1..).unwrap_or_default();
        }
        let mut next: Vec<bool> = Vec::with_capacity(fits.len());
        // What held at the place before, and the byte since.
        let mut before: Option<(bool, u8)> = None;
        for (here, byte) in fits.iter().zip(text.iter().map(Some).chain([None])) {
            let arrives = match (c, before) {
                (b'*', None) => *here,
                (b'*', Some((_, b))) => *here || (next.last() == Some(&true) && (deep || b != b'/')),
                (_, Some((was, b))) => was && b == c,
                (_, None) => false,
            };
            next.push(arrives);
            before = byte.map(|byte| (*here, *byte));
        }
        fits = next;
        rest = tail;
    }
    fits.last() == Some(&true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(pattern: &str, url: &str) -> bool {
        RepoPattern::parse(pattern).unwrap().matches(url)
    }

    #[test]
    fn a_star_stops_at_a_slash_and_two_do_not() {
        assert!(fits("github.com/acme/*", "https://github.com/acme/tool.git"));
        assert!(!fits("github.com/acme/*", "https://github.com/acme/group/tool"));
        assert!(fits("github.com/acme/**", "https://github.com/acme/group/tool"));
        assert!(!fits("github.com/acme/*", "https://github.com/acmes/tool"));
    }

    #[test]
    fn a_host_alone_means_all_its_repositories_and_no_other_host() {
        assert!(fits("git.example.org", "http://GIT.example.org/a/b"));
        assert!(!fits("git.example.org", "http://git.example.org.evil.net/a/b"));
        assert!(!fits("example.org", "http://git.example.org/a"));
        assert!(fits("*.example.org", "https://git.example.org/a"));
        assert!(!fits("*.example.org", "https://example.org/a"));
        assert!(!fits("git.example.org", "http://git.example.org:8080/a"));
        assert!(fits("127.0.0.1:*", "http://127.0.0.1:8080/a"));
    }

    #[test]
    fn every_spelling_of_a_repository_meets_the_same_patterns() {
        for url in [
            "https://git.example/acme/tool",
            "https://git.example/acme/tool.git/",
            "https://git.example:443/acme//tool",
            "https://git.example/other/../acme/tool",
            "https://git.example/%61cme/tool",
        ] {
            for pattern in
                ["git.example/acme/tool", "git.example/acme/*", "https://git.example:443/acme/tool.git"]
            {
                assert!(fits(pattern, url), "{pattern} {url}");
            }
            assert!(!fits("git.example/other/**", url), "{url}");
        }
    }

    #[test]
    fn tricks_in_the_url_do_not_match() {
        let pattern = "github.com/acme/**";
        assert!(!fits(pattern, "https://github.com@evil.net/acme/tool"));
        assert!(!fits(pattern, "https://user:pass@github.com/acme/tool"));
        assert!(!fits(pattern, "https://github.com/acme/../evil/tool"));
        assert!(!fits(pattern, "https://github.com/acme/%2e%2e%2fevil/tool"));
        assert!(!fits(pattern, "https://github.com/acme/tool?x=1"));
        assert!(!fits(pattern, "not a url"));
    }

    #[test]
    fn a_scheme_in_the_pattern_counts() {
        assert!(!fits("https://github.com/acme/*", "http://github.com/acme/tool"));
        assert!(fits("file:///srv/git/*", "file:///srv/git/tool.git"));
        assert!(!fits("file:///srv/git/*", "file:///srv/other/tool.git"));
    }

    #[test]
    fn a_bad_pattern_says_why() {
        assert!(RepoPattern::parse("ftp://x/y").unwrap_err().contains("scheme"));
        assert!(RepoPattern::parse("/just/a/path").unwrap_err().contains("host"));
        assert!(RepoPattern::parse("a b").unwrap_err().contains("spaces"));
        let why = RepoPattern::parse("github.com:acme/tool").unwrap_err();
        assert!(why.ends_with("\"acme\" is not a port; write github.com/acme/tool"), "{why}");
        for good in ["127.0.0.1:*", "git.example.org:8080/a", "[::1]", "[::1]:8080/a"] {
            assert!(RepoPattern::parse(good).is_ok(), "{good}");
        }
    }
}
