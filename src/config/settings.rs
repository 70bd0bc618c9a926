//! The table of settings: every key, its type and its bounds. It judges one value; where it came from is
//! `layers`' business, what they default to stands in `config/default.toml`.

use nostr_sdk::prelude::PublicKey;

use super::terms::{Rule, priced, rented};
use super::{Fault, RepoPattern};
use crate::net::without_user;
use crate::price::MOST_MSAT;

/// A setting's value, in one of four shapes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub enum Value {
    Flag(bool),
    Number(u64),
    Text(String),
    List(Vec<String>),
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Value::Flag(flag) => write!(f, "{flag}"),
            Value::Number(number) => write!(f, "{number}"),
            Value::Text(text) => write!(f, "{text:?}"),
            Value::List(items) => write!(f, "{items:?}"),
        }
    }
}

/// One key of the configuration.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting {
    /// Dotted: `limits.wall_ms`.
    pub(super) key: &'static str,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Flag,
    /// Both ends are allowed.
    Number {
        min: u64,
        max: u64,
    },
    /// At most this many bytes.
    Text {
        max_bytes: usize,
    },
    Path,
    Sandbox,
    Wallet,
    LogLevel,
    /// Each item by this check, which returns the item as it is kept.
    List(fn(&str) -> Result<String, String>),
}

const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const LOG_LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
/// Items of one list.
const MAX_ITEMS: usize = 1_000;

const fn flag(key: &'static str) -> Setting {
    Setting { key, kind: Kind::Flag }
}
const fn number(key: &'static str, min: u64, max: u64) -> Setting {
    Setting { key, kind: Kind::Number { min, max } }
}
const fn list(key: &'static str, check: fn(&str) -> Result<String, String>) -> Setting {
    Setting { key, kind: Kind::List(check) }
}
const fn of(key: &'static str, kind: Kind) -> Setting {
    Setting { key, kind }
}

/// In the order of `config/default.toml`.
pub(super) const SETTINGS: &[Setting] = &[
    list("relays", relay_url),
    list("skills", skill_name),
    of("sandbox", Kind::Sandbox),
    number("warm_sandboxes", 0, 64),
    of("data_dir", Kind::Path),
    of("jobs_dir", Kind::Path),
    of("key_file", Kind::Path),
    number("max_jobs", 0, 1_024),
    number("drain_timeout_ms", 0, HOUR_MS),
    of("log_level", Kind::LogLevel),
    flag("announce.publish"),
    number("announce.renew_ms", 1_000, 6 * DAY_MS),
    of("announce.name", Kind::Text { max_bytes: 100 }),
    of("announce.about", Kind::Text { max_bytes: 2_000 }),
    list("admission.allow_repos", repo_pattern),
    flag("admission.allow_private_repos"),
    flag("admission.allow_file_repos"),
    flag("admission.allow_private_relays"),
    list("admission.allow_customers", public_key),
    list("admission.deny_customers", public_key),
    number("admission.max_request_age_ms", 60_000, 30 * DAY_MS),
    number("admission.max_future_skew_ms", 0, DAY_MS),
    number("admission.refusals_per_minute", 0, 100_000),
    number("admission.quotes_per_minute", 0, 100_000),
    number("admission.balances_per_minute", 0, 100_000),
    list("payment.rules", payment_rule),
    list("payment.prices", price),
    list("payment.costs", cost),
    number("payment.msat_per_usd", 0, MOST_MSAT),
    of("payment.rate_source", Kind::Text { max_bytes: 100 }),
    number("payment.customer_day_msat", 0, MOST_MSAT),
    number("payment.customer_week_msat", 0, MOST_MSAT),
    number("payment.node_day_msat", 0, MOST_MSAT),
    number("payment.node_week_msat", 0, MOST_MSAT),
    number("payment.quote_ms", 60_000, DAY_MS),
    flag("payment.hold_invoices"),
    of("payment.wallet", Kind::Wallet),
    of("payment.wallet_url", Kind::Text { max_bytes: 1_000 }),
    of("payment.wallet_key_file", Kind::Path),
    number("queue.max_open_jobs", 1, 100_000),
    number("queue.max_open_jobs_per_customer", 1, 100_000),
    number("queue.max_running_per_customer", 1, 1_024),
    number("queue.max_wait_ms", 1_000, 30 * DAY_MS),
    number("queue.max_attempts", 1, 100),
    number("limits.wall_ms", 1_000, DAY_MS),
    number("limits.idle_ms", 1_000, DAY_MS),
    number("limits.memory_bytes", 16 * MIB, TIB),
    number("limits.swap_bytes", 0, TIB),
    number("limits.cpu_milli", 10, 1_024_000),
    number("limits.pids", 4, 100_000),
    number("limits.disk_bytes", MIB, TIB),
    number("limits.inodes", 100, 100_000_000),
    number("limits.open_files", 16, 1_048_576),
    number("limits.output_bytes", 1_024, 1_024 * MIB),
    number("limits.output_bytes_per_s", 1_024, 1_024 * MIB),
    number("limits.artifact_bytes", 0, 1_024 * MIB),
    number("limits.changes_bytes", 1_024, 1_024 * MIB),
    of("docker.host", Kind::Text { max_bytes: 1_000 }),
    of("docker.image", Kind::Text { max_bytes: 500 }),
    of("docker.runtime", Kind::Text { max_bytes: 100 }),
    // All of them are numbers that the kernel takes for a user.
    number("docker.first_uid", 0, 4_000_000_000),
    number("docker.uids", 1, 65_536),
    // The largest log must fit.
    number("logs.max_bytes", 64 * MIB, 1_024 * TIB),
    number("repo.max_fetch_bytes", MIB, TIB),
    number("repo.max_tree_bytes", MIB, TIB),
    number("repo.max_file_bytes", 1_024, TIB),
    number("repo.max_files", 1, 100_000_000),
    number("repo.max_path_bytes", 16, 4_096),
    number("repo.fetch_timeout_ms", 1_000, DAY_MS),
    number("repo.cache_bytes", MIB, 1_024 * TIB),
    number("relay.lookback_ms", 0, 30 * DAY_MS),
    number("relay.outbox_give_up_ms", 60_000, 30 * DAY_MS),
    number("relay.max_answer_relays", 0, 64),
    number("relay.max_event_bytes", 4_096, 16 * MIB),
];

pub(super) fn find(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

/// The known key that looks most like this one, if any looks like it at all.
pub(super) fn nearest(key: &str) -> Option<&'static str> {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_string();
    let score = |known: &str| {
        // A right name in a wrong table is a near miss, too.
        let whole = strsim::normalized_damerau_levenshtein(key, known);
        let name = strsim::normalized_damerau_levenshtein(&last(key), &last(known));
        whole.max(name * 0.95)
    };
    SETTINGS
        .iter()
        .map(|setting| (setting.key, score(setting.key)))
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .filter(|(_, score)| *score > 0.6)
        .map(|(key, _)| key)
}

/// `; did you mean "…"?` where one of the known words looks like this one, else nothing.
pub fn did_you_mean<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let score = |known: &str| strsim::normalized_damerau_levenshtein(word, known);
    known
        .into_iter()
        .max_by(|a, b| score(a).total_cmp(&score(b)))
        .filter(|known| score(known) > 0.6)
        .map(|known| format!("; did you mean {known:?}?"))
        .unwrap_or_default()
}

impl Kind {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Kind::Flag => "true or false",
            Kind::Number { .. } => "whole number",
            Kind::Text { .. } | Kind::Path | Kind::Sandbox | Kind::Wallet | Kind::LogLevel => {
                "text in quotes"
            }
            Kind::List(_) => "list of texts",
        }
    }
}

/// The value as it is kept, or what is wrong with it.
pub(super) fn judge(setting: &Setting, value: &Value) -> Result<Value, Fault> {
    let key = || setting.key.to_string();
    let bad = |why: String| Fault::Bad { key: key(), why };
    match (setting.kind, value) {
        (Kind::Number { min, max }, Value::Number(n)) if *n < min || *n > max => Err(Fault::OutOfBounds {
            key: key(),
            bounds: format!("between {min} and {max}"),
            got: n.to_string(),
        }),
        (Kind::Text { max_bytes }, Value::Text(text)) if text.len() > max_bytes => {
            Err(bad(format!("longer than {max_bytes} bytes")))
        }
        (Kind::Path, Value::Text(text)) if text.contains('\0') => Err(bad("not a path".into())),
        (Kind::Sandbox, Value::Text(text)) => match text.as_str() {
            "auto" | "local" | "docker" => Ok(value.clone()),
            _ => Err(Fault::OutOfBounds {
                key: key(),
                bounds: "\"auto\", \"local\" or \"docker\"".into(),
                got: format!("{text:?}"),
            }),
        },
        (Kind::Wallet, Value::Text(text)) => match text.as_str() {
            "none" | "lnbits" | "nwc" => Ok(value.clone()),
            _ => Err(Fault::OutOfBounds {
                key: key(),
                bounds: "\"none\", \"lnbits\" or \"nwc\"".into(),
                got: format!("{text:?}"),
            }),
        },
        (Kind::LogLevel, Value::Text(text)) => match log_level(text) {
            Ok(()) => Ok(value.clone()),
            Err(why) => Err(bad(why)),
        },
        (Kind::List(_), Value::List(items)) if items.len() > MAX_ITEMS => {
            Err(bad(format!("more than {MAX_ITEMS} items")))
        }
        (Kind::List(check), Value::List(items)) => {
            let kept: Result<Vec<_>, _> = items.iter().map(|item| check(item)).collect();
            let mut kept = kept.map_err(bad)?;
            // Given twice is given once.
            let mut seen = std::collections::HashSet::new();
            kept.retain(|item| seen.insert(item.clone()));
            Ok(Value::List(kept))
        }
        _ => Ok(value.clone()),
    }
}

/// A ws(s) URL with a host and without user name or password.
fn relay_url(text: &str) -> Result<String, String> {
    let wrong = |why: &str| format!("{:?} is not a relay URL: {why}", without_user(text));
    if !text.contains("://") {
        return Err(wrong("add wss:// in front"));
    }
    let url = url::Url::parse(text).map_err(|error| wrong(&error.to_string()))?;
    if !matches!(url.scheme(), "ws" | "wss") {
        return Err(wrong("it must start with ws:// or wss://"));
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err(wrong("it names no host"));
    }
    if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
        return Err(wrong("it must carry no user name, password or fragment"));
    }
    Ok(text.trim().to_string())
}

fn skill_name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
    if (1..=40).contains(&text.len()) && text.chars().all(fits) {
        return Ok(text.to_string());
    }
    Err(format!("{text:?} is not the name of a job type: 1 to 40 of a-z, 0-9, - and _"))
}

fn public_key(text: &str) -> Result<String, String> {
    // Keys::parse would take a secret for a name; and an error must not repeat what may be one.
    PublicKey::parse(text).map(|key| key.to_hex()).map_err(|_| {
        let shown: String =
            if text.starts_with("nsec") { "a secret key".into() } else { format!("{text:?}") };
        format!("{shown} is not a public key (npub1… or 64 hex digits)")
    })
}

fn payment_rule(text: &str) -> Result<String, String> {
    text.parse::<Rule>().map(|_| text.to_string())
}

fn cost(text: &str) -> Result<String, String> {
    rented(text).map(|_| text.to_string())
}

fn price(text: &str) -> Result<String, String> {
    priced(text).map(|_| text.to_string())
}

fn repo_pattern(text: &str) -> Result<String, String> {
    RepoPattern::parse(text).map(|pattern| pattern.to_string())
}

fn log_level(text: &str) -> Result<(), String> {
    let wrong = format!(
        "{text:?} is not a log level: use error, warn, info, debug, trace or off, or directives such as \
         coinop::relay=debug"
    );
    // A single word would be a directive, too: everything of a module of that name.
    let is_word = !text.contains(['=', ',']);
    if is_word && !LOG_LEVELS.contains(&text.trim()) {
        return Err(wrong);
    }
    tracing_subscriber::EnvFilter::try_new(text).map(|_| ()).map_err(|error| format!("{wrong}: {error}"))
}
