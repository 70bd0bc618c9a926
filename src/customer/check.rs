//! What a customer can know before anything is signed: whether the order reads as it was meant, whether nodes could
//! take it, and what of it looks like a secret. Pure; whether it is sent is the caller's.

use nostr_sdk::prelude::Keys;

use crate::market::{Catalog, fits, is_shared};
use crate::net::without_user;
use crate::price::MOST_MSAT;
use crate::protocol::draft::Draft;
use crate::protocol::{Order, Request};
use crate::repo::{self, Location};

/// Why an order is not sent, in a sentence for the customer. No URL is repeated with its user part.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--repo {shown}: {why}")]
    Repo { shown: String, why: String },
    #[error("--ref {git_ref:?}: {why}")]
    Ref { git_ref: String, why: String },
    #[error("a command is blank")]
    BlankCommand,
    #[error(
        "no commands: add --cmd; --task alone is no work for this job type (--kind sends it all the same)"
    )]
    NoCommands,
    #[error("{0} (--kind sends it all the same)")]
    Unfit(String),
    #[error("others use kind {0} too: add --repo or --provider, or no node takes it for its own")]
    Shared(u16),
    #[error("{0}: 0 is not a limit one can work under")]
    Zero(&'static str),
    #[error("--bid: more than a bitcoin")]
    Bid,
    #[error("the order cannot be read back: {0}")]
    Unreadable(String),
}

/// Checks an order. `foreign`: the customer chose the kind, so that what our job types need is not asked.
///
/// # Errors
/// The first reason against sending it.
pub fn check(draft: &Draft, foreign: bool) -> Result<(), Error> {
    let unreadable = |error: &dyn std::fmt::Display| Error::Unreadable(error.to_string());
    let order = {
        // In plain and under a key of nobody: what is checked is how a provider reads it.
        let (trial, keys) = (Draft { encrypt: None, ..draft.clone() }, Keys::generate());
        let event = trial.unsigned(&keys, 0).map_err(|e| unreadable(&e))?;
        let event = event.sign_with_keys(&keys).map_err(|e| unreadable(&e))?;
        let request = Request::decode_plain(&event).map_err(|e| unreadable(&e))?;
        if draft.bid_msat.is_some_and(|bid| bid > MOST_MSAT) {
            return Err(Error::Bid);
        }
        Order::read(&request).map_err(|e| unreadable(&e))?
    };
    if let Some(url) = &order.repo {
        // Whether a node clones files of its own host is its owner's to say.
        Location::parse(url, true)
            .map_err(|error| Error::Repo { shown: without_user(url), why: error.to_string() })?;
    }
    if let Some(git_ref) = draft.git_ref.as_ref().or(order.git_ref.as_ref()) {
        let bad = |why: String| Error::Ref { git_ref: git_ref.clone(), why };
        if git_ref.trim().is_empty() {
            return Err(bad("it is empty".into()));
        }
        repo::check_ref(git_ref).map_err(|error| bad(error.to_string()))?;
    }
    if !draft.commands.is_empty() && order.commands.len() != draft.commands.len() {
        return Err(Error::BlankCommand);
    }
    let limits =
        [("--time-secs", draft.time_secs), ("--memory-mb", draft.memory_mb), ("--disk-mb", draft.disk_mb)];
    if let Some((flag, _)) = limits.into_iter().find(|(_, limit)| *limit == Some(0)) {
        return Err(Error::Zero(flag));
    }
    if foreign {
        return Ok(());
    }
    if is_shared(draft.kind) && draft.provider.is_none() && order.repo.is_none() {
        return Err(Error::Shared(draft.kind));
    }
    let catalog = Catalog::built_in().map_err(|e| unreadable(&e))?;
    let Some(job_type) = catalog.for_kind(draft.kind) else { return Ok(()) };
    if order.commands.is_empty() && job_type.manifest.script.commands.is_empty() {
        return Err(Error::NoCommands);
    }
    fits(job_type, &order).map_err(|refusal| Error::Unfit(refusal.reason))
}

/// Where the order, sent in plain, would show what looks like a secret: `--env GITHUB_TOKEN`. The values are left out.
pub fn secrets(draft: &Draft) -> Vec<String> {
    if draft.encrypt.is_some() {
        return Vec::new();
    }
    let named = |flag: &'static str| {
        move |(name, value): (&String, &String)| {
            let is_secret =
                (has_secret_name(name) && is_filled(value)) || is_token(value) || holds_secret(value);
            is_secret.then(|| format!("{flag} {name}"))
        }
    };
    let free = |flag: &'static str, text: &String| holds_secret(text).then(|| flag.to_owned());
    let mut found: Vec<String> = draft.env.iter().filter_map(named("--env")).collect();
    found.extend(draft.params.iter().map(|(name, value)| (name, value)).filter_map(named("--param")));
    found.extend(draft.commands.iter().filter_map(|text| free("--cmd", text)));
    found.extend(draft.task.iter().filter_map(|text| free("--task", text)));
    found
}

fn has_secret_name(name: &str) -> bool {
    let name = name.to_ascii_uppercase().replace('-', "_");
    ["TOKEN", "SECRET", "PASSWORD", "PASSWD", "API_KEY", "APIKEY", "PRIVATE_KEY", "ACCESS_KEY", "CREDENTIAL"]
        .iter()
        .any(|word| name.contains(word))
}

/// More than a switch or a reference to a variable.
fn is_filled(value: &str) -> bool {
    value.chars().count() >= 6 && !value.starts_with('$')
}

/// Begins like a token that a known service gives out.
fn is_known_token(word: &str) -> bool {
    const HEADS: [&str; 17] = [
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
        "github_pat_",
        "glpat-",
        "sk-",
        "sk_live_",
        "rk_live_",
        "xoxb-",
        "xoxp-",
        "AKIA",
        "ASIA",
        "npm_",
        "pypi-",
        "nsec1",
        "ncryptsec1",
    ];
    let is_long = word.len() >= 16;
    is_long && (HEADS.iter().any(|head| word.starts_with(head)) || is_jwt(word))
}

fn is_jwt(word: &str) -> bool {
    word.starts_with("eyJ") && word.bytes().filter(|b| *b == b'.').count() == 2
}

/// One long word of mixed letters and digits. Ids in hex are none: commits and hashes look so.
fn is_token(value: &str) -> bool {
    let value = value.trim();
    let has = |what: fn(&u8) -> bool| value.as_bytes().iter().any(what);
    let one_word = value.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/_=-".contains(&b));
    value.len() >= 24
        && one_word
        && has(u8::is_ascii_uppercase)
        && has(u8::is_ascii_lowercase)
        && has(u8::is_ascii_digit)
}

/// A text that holds a known token, a private key, or a URL with a password.
fn holds_secret(text: &str) -> bool {
    let between = |c: char| c.is_whitespace() || "\"'`=,;()<>|&:".contains(c);
    let password = |rest: &str| {
        let authority =
            rest.split(|c: char| "/?#\"'".contains(c) || c.is_whitespace()).next().unwrap_or_default();
        authority.rsplit_once('@').is_some_and(|(user, _)| user.contains(':') && !user.contains('$'))
    };
    text.split(between).any(is_known_token)
        || (text.contains("-----BEGIN") && text.contains("PRIVATE KEY"))
        || text.split("://").skip(1).any(password)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Scheme;

    fn order() -> Draft {
        Draft { kind: 5930, commands: vec!["make".into()], ..Draft::default() }
    }

    fn why(draft: &Draft) -> String {
        check(draft, false).expect_err("refused").to_string()
    }

    #[test]
    fn a_repository_with_credentials_is_refused_however_it_is_given_and_not_repeated() {
        let with = |repo: &str| Draft { repo: Some(repo.into()), ..order() };
        let param = |key: &str| Draft {
            params: vec![(key.into(), "https://me:hunter2@git.example/a".into())],
            ..order()
        };
        for draft in [
            with("https://me:hunter2@git.example/a"),
            with("https://hunter2@git.example/a"),
            param("repo"),
            param("repo_url"),
        ] {
            let why = why(&draft);
            assert!(why.contains("credentials") && !why.contains("hunter2"), "{why}");
        }
        for (url, words) in [
            ("git@github.com:a/b.git", "http"),
            ("ssh://git.example/a", "http"),
            ("https://git.example/a?token=x", "query"),
            ("https://git.example", "not a repository"),
        ] {
            assert!(why(&with(url)).contains(words), "{url}");
        }
        assert!(check(&with("https://git.example/a"), false).is_ok());
    }

    #[test]
    fn ref_commands_limits_and_bid_are_checked_before_anything_is_signed() {
        let bad_ref = |text: &str| Draft { git_ref: Some(text.into()), ..order() };
        for text in ["--upload-pack=x", "a b", "a..b", " ", "-"] {
            assert!(why(&bad_ref(text)).contains("--ref"), "{text}");
        }
        assert!(check(&bad_ref("release/1.0"), false).is_ok());
        let commands =
            |all: &[&str]| Draft { commands: all.iter().map(|c| (*c).to_owned()).collect(), ..order() };
        assert!(why(&commands(&["make", " "])).contains("blank"));
        assert!(why(&commands(&["a\0b"])).contains("NUL"));
        assert!(why(&commands(&["x"; 65])).contains("more than 64 commands"));
        assert!(why(&Draft { time_secs: Some(0), ..order() }).contains("--time-secs"));
        assert!(why(&Draft { bid_msat: Some(MOST_MSAT + 1), ..order() }).contains("--bid"));
        assert!(why(&Draft { env: [("A-B".into(), "1".into())].into(), ..order() }).contains("variable"));
    }

    #[test]
    fn an_order_that_no_node_could_run_is_refused_at_once_unless_its_kind_was_chosen() {
        let task = |kind| Draft { kind, task: Some("fix it".into()), ..Draft::default() };
        let code = Draft { repo: Some("https://git.example/a".into()), ..task(5100) };
        for draft in [Draft { kind: 5930, ..Draft::default() }, code.clone(), task(5932)] {
            assert!(why(&draft).contains("no commands: add --cmd"), "{draft:?}");
            assert!(check(&draft, true).is_ok(), "somebody else may serve that kind");
        }
        assert!(why(&Draft { commands: vec!["x".into()], ..task(5300) }).contains("--repo or --provider"));
        let patch = Draft { artifacts: vec!["a".into()], commands: vec!["x".into()], ..code };
        assert!(why(&patch).contains("no artifacts"));
    }

    #[test]
    fn what_looks_like_a_secret_is_told_by_its_name_and_only_when_it_would_be_public() {
        let env = |name: &str, value: &str| Draft { env: [(name.into(), value.into())].into(), ..order() };
        for draft in [
            env("GITHUB_TOKEN", "hunter22"),
            env("X", "ghp_0123456789abcdefghij"),
            env("X", "aB3dE6gH9jK2mN5pQ8sT1vW4"),
            env("X", "https://me:pw@h.example/a"),
        ] {
            assert_eq!(secrets(&draft).len(), 1, "{draft:?}");
            assert!(secrets(&Draft { encrypt: Some(Scheme::Nip44), ..draft }).is_empty());
        }
        let cmd = |text: &str| secrets(&Draft { commands: vec![text.into()], ..order() });
        assert_eq!(cmd("curl -H 'Authorization: Bearer ghp_0123456789abcdefghij' x"), ["--cmd"]);
        assert_eq!(cmd("git clone https://me:pw@h.example/a"), ["--cmd"]);
        assert!(cmd("git clone https://h.example/@a && make").is_empty());
        let param = Draft { params: vec![("api-key".into(), "0123456".into())], ..order() };
        assert_eq!(secrets(&param), ["--param api-key"]);
        for (name, value) in [
            ("commit_0", "0123456789abcdef0123456789abcdef01234567"),
            ("TOKEN", "$TOKEN"),
            ("MODE", "release"),
            ("USE_TOKEN", "no"),
        ] {
            assert!(secrets(&env(name, value)).is_empty(), "{name}");
        }
    }
}
