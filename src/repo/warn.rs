//! Warnings that go into a result: likely secrets and agent configuration in the customer's tree, by path
//! and by a cheap look at small files. It finds what is careless, not what is hidden, and shows no contents.

use memchr::memmem::find;
use serde::{Deserialize, Serialize};

use super::tree::{Plan, shown};

/// Most warnings kept for a tree.
pub const MAX_WARNINGS: usize = 50;
/// Only files up to this long are looked into, in bytes.
const MAX_LOOK: usize = 64 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The name is one that secrets have.
    SecretPath,
    /// The contents look like a secret.
    SecretContent,
    /// Files that agents or git obey when they run inside the tree.
    AgentConfiguration,
    /// A submodule: an empty folder here.
    Submodule,
    /// A large-file pointer instead of the file.
    LfsPointer,
    /// A symlink that a patch brings and that leads out of the repository.
    LinkOut,
}

/// One thing the customer should know of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Warning {
    pub kind: Kind,
    /// Escaped to printable ASCII, at most 200 characters.
    pub path: String,
    pub what: String,
}

impl Warning {
    pub(super) fn secret_content(path: String, what: Found) -> Warning {
        let kind = if what == Found::Lfs { Kind::LfsPointer } else { Kind::SecretContent };
        Warning { kind, path, what: what.text().to_string() }
    }
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path, self.what)
    }
}

/// What a file's contents look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    PrivateKey,
    Token,
    NostrKey,
    NpmToken,
    Lfs,
}

impl Found {
    fn text(self) -> &'static str {
        match self {
            Found::PrivateKey => "looks like a private key",
            Found::Token => "looks like it holds an access token",
            Found::NostrKey => "looks like it holds a Nostr secret key",
            Found::NpmToken => "looks like it holds a package registry token",
            Found::Lfs => "a large-file pointer; the file itself was not fetched",
        }
    }
}

/// Sorts, removes doubles, cuts to `MAX_WARNINGS`.
pub(super) fn settle(mut warnings: Vec<Warning>) -> Vec<Warning> {
    warnings.sort();
    warnings.dedup();
    warnings.truncate(MAX_WARNINGS);
    warnings
}

/// Warnings by path alone.
pub(super) fn paths(plan: &Plan) -> Vec<Warning> {
    let mut found = Vec::new();
    let mut add = |kind, path: String, what: &str| {
        if found.len() < MAX_WARNINGS {
            found.push(Warning { kind, path, what: what.to_string() });
        }
    };
    for folder in &plan.folders {
        let name = folder.path.rsplit(|b| *b == b'/').next().unwrap_or_default();
        if let Some(what) = agent_folder(name) {
            add(Kind::AgentConfiguration, shown(&folder.path, b"").trim_end_matches('/').to_string(), what);
        }
        let has = |n: &[u8]| folder.files.iter().any(|f| f.name == n);
        if has(b"HEAD") && has(b"config") {
            let path = shown(&folder.path, b"config");
            add(
                Kind::AgentConfiguration,
                path,
                "looks like a bare repository; git run there obeys its configuration",
            );
        }
        for file in &folder.files {
            if let Some(what) = secret_name(&file.name) {
                add(Kind::SecretPath, shown(&folder.path, &file.name), what);
            }
            if let Some(what) = agent_file(&file.name) {
                add(Kind::AgentConfiguration, shown(&folder.path, &file.name), what);
            }
        }
    }
    for path in &plan.submodules {
        add(
            Kind::Submodule,
            shown(path, b"").trim_end_matches('/').to_string(),
            "a submodule; it is an empty folder here",
        );
    }
    found
}

fn secret_name(name: &[u8]) -> Option<&'static str> {
    let name = String::from_utf8_lossy(name).to_ascii_lowercase();
    let example = [".example", ".sample", ".template", ".dist", ".pub"].iter().any(|end| name.ends_with(end));
    if example {
        return None;
    }
    let exact = [
        ".npmrc",
        ".pypirc",
        ".netrc",
        "_netrc",
        ".pgpass",
        ".htpasswd",
        ".git-credentials",
        "id_rsa",
        "id_dsa",
        "id_ecdsa",
        "id_ed25519",
        "credentials",
        "credentials.json",
        "service-account.json",
        "terraform.tfstate",
        ".dockercfg",
    ];
    let ends = [".pem", ".p12", ".pfx", ".key", ".keystore", ".jks", ".kdbx", ".ppk"];
    if name == ".env" || name.starts_with(".env.") || name == ".envrc" {
        return Some("environment files often hold secrets");
    }
    if exact.contains(&name.as_str()) || ends.iter().any(|end| name.ends_with(end)) {
        return Some("files of this name often hold secrets");
    }
    None
}

fn agent_folder(name: &[u8]) -> Option<&'static str> {
    match name {
        b".claude" | b".codex" | b".cursor" | b".gemini" | b".opencode" | b".aider" => {
            Some("an agent's configuration")
        }
        b".githooks" | b".husky" => Some("git hooks; they are never run by this node"),
        b".vscode" | b".devcontainer" => Some("an editor's configuration that may start programs"),
        _ => None,
    }
}

fn agent_file(name: &[u8]) -> Option<&'static str> {
    match name {
        b".mcp.json" | b"CLAUDE.md" | b"AGENTS.md" | b".cursorrules" | b".aider.conf.yml"
        | b"opencode.json" => Some("instructions or configuration for agents"),
        b".gitmodules" => Some("names submodules; none is fetched"),
        b".lfsconfig" => Some("names a large-file server; it is never asked"),
        _ => None,
    }
}

/// Warnings by content.
pub(super) fn content(data: &[u8]) -> Option<Found> {
    if data.len() > MAX_LOOK || data.len() < 16 {
        return None;
    }
    if data.starts_with(b"version https://git-lfs.github.com/spec/") {
        return Some(Found::Lfs);
    }
    if let Some(at) = find(data, b"-----BEGIN ") {
        let line = data.get(at..).unwrap_or_default();
        let line = line.get(..line.len().min(64)).unwrap_or_default();
        if find(line, b"PRIVATE KEY").is_some() {
            return Some(Found::PrivateKey);
        }
    }
    for (prefix, least, found) in PREFIXES {
        let mut rest = data;
        while let Some(at) = find(rest, prefix) {
            let tail = rest.get(at + prefix.len()..).unwrap_or_default();
            if tail.iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'_' || **b == b'-').count()
                >= *least
            {
                return Some(*found);
            }
            rest = tail;
        }
    }
    None
}

/// A prefix, and how many characters of a token must follow it.
const PREFIXES: &[(&[u8], usize, Found)] = &[
    (b"AKIA", 16, Found::Token),
    (b"ghp_", 30, Found::Token),
    (b"github_pat_", 30, Found::Token),
    (b"glpat-", 20, Found::Token),
    (b"xoxb-", 20, Found::Token),
    (b"sk-ant-", 30, Found::Token),
    (b"nsec1", 58, Found::NostrKey),
    (b":_authToken=", 20, Found::NpmToken),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn careless_names_are_seen_and_their_examples_are_not() {
        for name in [".env", ".env.production", ".ENV", "id_rsa", "server.pem", ".npmrc", "credentials"] {
            assert!(secret_name(name.as_bytes()).is_some(), "{name}");
        }
        for name in [".env.example", "id_rsa.pub", "env", "keys.md", "main.rs", ".environment"] {
            assert!(secret_name(name.as_bytes()).is_none(), "{name}");
        }
    }

    #[test]
    fn careless_contents_are_seen() {
        assert_eq!(content(b"-----BEGIN OPENSSH PRIVATE KEY-----\nabc"), Some(Found::PrivateKey));
        assert_eq!(content(b"-----BEGIN CERTIFICATE-----\nabcdefg"), None);
        assert_eq!(content(b"aws = AKIAABCDEFGHIJKLMNOP"), Some(Found::Token));
        assert_eq!(content(b"AKIA is a prefix of some tokens"), None);
        assert_eq!(content(b"//r.example/:_authToken=0123456789abcdef0123"), Some(Found::NpmToken));
        assert_eq!(content(&[b"nsec1".as_slice(), &[b'q'; 58]].concat()), Some(Found::NostrKey));
        assert_eq!(content(b"version https://git-lfs.github.com/spec/v1\n"), Some(Found::Lfs));
        assert_eq!(content(&vec![b'-'; 100_000]), None);
    }
}
