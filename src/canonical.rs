//! The one spelling of a repository's URL, by which rules, cache, ledger and reports know it. Pure; which URLs may be
//! cloned is decided in `repo`.

use url::Url;

/// The one spelling of `url`: without user, query, fragment, default port, slashes at the end, doubled slashes and the
/// last `.git`; `..` resolved, percent signs only where they are needed. The scheme stays.
pub fn canonical(url: &Url) -> String {
    let mut one = url.clone();
    one.set_query(None);
    one.set_fragment(None);
    // A URL without a host has no user, either.
    if one.set_username("").is_err() || one.set_password(None).is_err() {
        tracing::trace!("a URL that cannot have a user");
    }
    let path = clean(one.path());
    one.set_path(without_git(&path));
    one.to_string().trim_end_matches('/').to_string()
}

/// The same from text; what is not a URL stays as it is.
pub fn canonical_text(text: &str) -> String {
    Url::parse(text).map_or_else(|_| text.to_string(), |url| canonical(&url))
}

/// One slash between parts and none at the end; a percent sign stands only where the plain character would mean
/// something else.
pub(crate) fn clean(path: &str) -> String {
    let parts: Vec<String> = path.split('/').filter(|p| !p.is_empty()).map(plain).collect();
    format!("/{}", parts.join("/"))
}

/// A path without the `.git` at its end; a folder called `.git` keeps its name.
pub(crate) fn without_git(path: &str) -> &str {
    path.strip_suffix(".git").filter(|rest| !rest.is_empty() && !rest.ends_with('/')).unwrap_or(path)
}

/// Unreserved characters (RFC 3986) as themselves, all other percent signs with upper-case digits.
fn plain(part: &str) -> String {
    let mut out = String::with_capacity(part.len());
    let mut rest = part;
    while let Some((before, after)) = rest.split_once('%') {
        out.push_str(before);
        let code = after.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code {
            Some(b) if b.is_ascii_alphanumeric() || b"-._~".contains(&b) => out.push(char::from(b)),
            Some(b) => out.push_str(&format!("%{b:02X}")),
            None => out.push('%'),
        }
        rest = if code.is_some() { after.get(2..).unwrap_or_default() } else { after };
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_repository_has_one_spelling_however_it_is_named() {
        for text in [
            "https://git.example/acme/tool",
            "https://git.example/acme/tool/",
            "https://git.example/acme/tool.git",
            "https://git.example/acme/tool.git/",
            "HTTPS://Git.Example:443/acme/tool.git?service=x#top",
            "https://git.example/acme/x/../tool",
            "https://git.example//acme//tool",
            "https://git.example/acme/%74ool%2egit",
            "https://user:secret@git.example/acme/tool",
        ] {
            assert_eq!(canonical_text(text), "https://git.example/acme/tool", "{text}");
        }
        assert_eq!(canonical_text("file:///srv/git/tool.git/"), "file:///srv/git/tool");
    }

    #[test]
    fn different_repositories_keep_different_spellings() {
        for (text, spelling) in [
            ("https://git.example/acme/Tool", "https://git.example/acme/Tool"),
            ("http://git.example/acme/tool", "http://git.example/acme/tool"),
            ("https://git.example:8443/acme/tool", "https://git.example:8443/acme/tool"),
            ("https://git.example/acme/tool.git.git", "https://git.example/acme/tool.git"),
            ("https://git.example/acme/.git", "https://git.example/acme/.git"),
            ("https://git.example/a%c3%a4%20b", "https://git.example/a%C3%A4%20b"),
            ("https://git.example/a%zz", "https://git.example/a%zz"),
            ("not a url", "not a url"),
        ] {
            assert_eq!(canonical_text(text), spelling, "{text}");
        }
    }
}
