//! What a result says to prove itself: the tags, their reading, and the checks that need only the events
//! (the pure part of `coinop verify`). Whether a patch applies to its commit needs the repository.

use nostr_sdk::prelude::{Event, Keys, PublicKey};
use serde_json::Value;

use super::tags::{self, Row, row};
use super::{RESULT_OFFSET, Reply, Request, request, result, sha256_hex};

/// Longest value of a proof tag that is read, in bytes.
pub const MAX_VALUE_BYTES: usize = 1024;

/// The facts a result is signed with. In a plain result one tag each; in an encrypted one a single
/// encrypted tag, so that nothing leaks (R18).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// Full object id of the commit that the job ran on; absent when no repository was named.
    pub commit: Option<String>,
    pub backend: String,
    pub image: String,
    /// The limits that the job ran under, as [`canonical`] JSON; not every provider says them.
    pub policy: Option<String>,
    /// sha256 (hex) of the policy's canonical JSON.
    pub policy_sha256: String,
    /// sha256 (hex) of the plain content.
    pub output_sha256: String,
    pub wall_ms: u64,
    /// `None` where the provider cannot count it.
    pub cpu_ms: Option<u64>,
    pub peak_memory_bytes: u64,
    pub price_msat: u64,
}

/// Why proof tags are no proof.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("the proof lacks {0}")]
    Missing(&'static str),
    #[error("the proof's {key} is malformed: {value:?}")]
    Malformed { key: &'static str, value: String },
    #[error("the proof gives two values for {0}")]
    Twice(&'static str),
}

impl Proof {
    /// `["proof", key, value]` for every fact, in a fixed order.
    pub(super) fn rows(&self) -> Vec<Row> {
        let numbers = [
            ("wall_ms", Some(self.wall_ms)),
            ("cpu_ms", self.cpu_ms),
            ("peak_memory_bytes", Some(self.peak_memory_bytes)),
            ("price_msat", Some(self.price_msat)),
        ];
        let texts = [
            ("backend", &self.backend),
            ("image", &self.image),
            ("policy_sha256", &self.policy_sha256),
            ("output_sha256", &self.output_sha256),
        ];
        let commit = self.commit.iter().map(|commit| row(&["proof", "commit", commit]));
        let policy = self.policy.iter().map(|policy| row(&["proof", "policy", policy]));
        let texts = texts.into_iter().map(|(key, text)| row(&["proof", key, text]));
        let known = numbers.into_iter().filter_map(|(key, n)| Some((key, n?)));
        let numbers = known.map(|(key, n)| row(&["proof", key, &n.to_string()]));
        commit.chain(policy).chain(texts).chain(numbers).collect()
    }

    /// Reads the proof from a result's tags (the decrypted ones, when it was encrypted): `None` when there
    /// are no proof tags, which is no fault of a provider that makes none. Unknown keys are passed over.
    pub fn read<'a>(rows: impl Iterator<Item = &'a [String]>) -> Result<Option<Self>, Error> {
        let facts: Vec<(&str, &str)> = rows
            .filter(|row| tags::name(row) == "proof")
            .filter_map(|row| Some((row.get(1)?.as_str(), row.get(2)?.as_str())))
            .collect();
        if facts.is_empty() {
            return Ok(None);
        }
        let optional = |key: &'static str| {
            let mut values = facts.iter().filter(|(name, _)| *name == key).map(|(_, value)| *value);
            let first = values.next();
            if values.any(|value| Some(value) != first) { Err(Error::Twice(key)) } else { Ok(first) }
        };
        let text = |key| optional(key)?.ok_or(Error::Missing(key));
        let malformed = |key, value: &str| Error::Malformed { key, value: super::clip(value, 80).to_owned() };
        let short = |key| {
            let value = text(key)?;
            let fits = !value.is_empty() && value.len() <= MAX_VALUE_BYTES;
            fits.then(|| value.to_owned()).ok_or_else(|| malformed(key, value))
        };
        let hash = |key| {
            let value = text(key)?;
            is_hex(value, &[64]).then(|| value.to_owned()).ok_or_else(|| malformed(key, value))
        };
        // Our own encoder writes plain digits; anything else was not written by it.
        let digits = |key, value: &str| {
            let plain = value.bytes().all(|b| b.is_ascii_digit());
            value.parse().ok().filter(|_| plain).ok_or_else(|| malformed(key, value))
        };
        let number = |key| digits(key, text(key)?);
        let commit = optional("commit")?;
        if let Some(commit) = commit.filter(|commit| !is_hex(commit, &[40, 64])) {
            return Err(malformed("commit", commit));
        }
        let policy = optional("policy")?;
        if let Some(policy) = policy.filter(|policy| policy.len() > MAX_VALUE_BYTES) {
            return Err(malformed("policy", policy));
        }
        Ok(Some(Self {
            commit: commit.map(str::to_owned),
            policy: policy.map(str::to_owned),
            backend: short("backend")?,
            image: short("image")?,
            policy_sha256: hash("policy_sha256")?,
            output_sha256: hash("output_sha256")?,
            wall_ms: number("wall_ms")?,
            cpu_ms: optional("cpu_ms")?.map(|value| digits("cpu_ms", value)).transpose()?,
            peak_memory_bytes: number("peak_memory_bytes")?,
            price_msat: number("price_msat")?,
        }))
    }
}

fn is_hex(text: &str, lengths: &[usize]) -> bool {
    lengths.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Canonical JSON: keys sorted by bytes at every depth, no white space.
pub fn canonical(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(key, _)| key.as_str());
            let parts: Vec<String> = entries
                .into_iter()
                .map(|(key, value)| format!("{}:{}", Value::from(key.as_str()), canonical(value)))
                .collect();
            format!("{{{}}}", parts.join(","))
        }
        Value::Array(items) => {
            format!("[{}]", items.iter().map(canonical).collect::<Vec<_>>().join(","))
        }
        scalar => scalar.to_string(),
    }
}

/// One thing looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub what: &'static str,
    pub verdict: Verdict,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Ok,
    /// It was checked and does not hold.
    Bad(String),
    /// It could not be checked, and why.
    Unchecked(String),
}

/// Checks a result by itself and, where given, against its request. Without the request, the result's own
/// `request` echo stands in for it when the echo's signature holds. An encrypted result stays closed here.
///
/// The findings, always all and in this order: `signature`, `kind`, `request`, `customer`, `provider`,
/// `proof`, `policy`, `output`, `price`, `claims`.
pub fn check(event: &Event, request: Option<&Event>) -> Vec<Finding> {
    Check::new(event, request, None).run()
}

/// As [`check`], and opens an encrypted result with the customer's or the provider's keys.
pub fn check_with_keys(event: &Event, request: Option<&Event>, keys: &Keys) -> Vec<Finding> {
    Check::new(event, request, Some(keys)).run()
}

struct Check<'a> {
    event: &'a Event,
    /// The request and whether it was given or taken from the echo.
    request: Option<(Event, &'static str)>,
    keys: Option<&'a Keys>,
    /// The result's content and tags in plain, or why not.
    open: Result<(String, Vec<Row>), String>,
}

impl<'a> Check<'a> {
    fn new(event: &'a Event, request: Option<&Event>, keys: Option<&'a Keys>) -> Self {
        let echo = || {
            let echo = result::echo(event).filter(|echo| echo.verify().is_ok());
            echo.map(|echo| (echo, "echo"))
        };
        let request = request.map(|request| (request.clone(), "request")).or_else(echo);
        Self { event, request, keys, open: open(event, keys) }
    }

    fn run(&self) -> Vec<Finding> {
        let proof = self.proof();
        [
            ("signature", self.signature()),
            ("kind", self.kind()),
            ("request", self.names_request()),
            ("customer", self.customer()),
            ("provider", self.provider()),
            ("proof", verdict_of(&proof)),
            ("policy", policy(&proof)),
            ("output", self.output(&proof)),
            ("price", self.price(&proof)),
            ("claims", claims(&proof)),
        ]
        .into_iter()
        .map(|(what, verdict)| Finding { what, verdict })
        .collect()
    }

    fn signature(&self) -> Verdict {
        if !self.event.verify_id() {
            return Verdict::Bad("the id is not the hash of the event".into());
        }
        holds(self.event.verify_signature(), "the signature is not the author's")
    }

    fn kind(&self) -> Verdict {
        let kind = self.event.kind.as_u16();
        if !result::is_result_kind(kind) {
            return Verdict::Bad(format!("kind {kind} is no job result"));
        }
        let Some((request, _)) = &self.request else { return no_request() };
        let wanted = request.kind.as_u16().saturating_add(RESULT_OFFSET);
        holds(kind == wanted, format!("kind {kind}, but the request asks for {wanted}"))
    }

    fn names_request(&self) -> Verdict {
        let Some(named) = tags::first_event_id(tags::rows(self.event)) else {
            return Verdict::Bad("no e tag names a request".into());
        };
        let Some((request, from)) = &self.request else { return no_request() };
        if named != request.id {
            return Verdict::Bad(format!("answers request {named}, not {}", request.id));
        }
        if *from == "request" && request.verify().is_err() {
            return Verdict::Bad("the request's own id or signature does not hold".into());
        }
        if !request::is_request_kind(request.kind.as_u16()) {
            return Verdict::Bad(format!("what it answers is of kind {}, no job request", request.kind));
        }
        Verdict::Ok
    }

    fn customer(&self) -> Verdict {
        let Some(customer) = customer(self.event) else {
            return Verdict::Bad("no p tag names the customer".into());
        };
        let Some((request, _)) = &self.request else { return no_request() };
        holds(customer == request.pubkey, "the p tag is not the request's author")
    }

    fn provider(&self) -> Verdict {
        let Some((request, _)) = &self.request else { return no_request() };
        let asked: Vec<PublicKey> = request::asked(request).collect();
        if asked.is_empty() {
            return Verdict::Unchecked("the request names no provider, so anybody may answer".into());
        }
        holds(asked.contains(&self.event.pubkey), "the request asked for another provider")
    }

    fn proof(&self) -> Result<Proof, Verdict> {
        let (_, rows) = self.open.as_ref().map_err(|why| Verdict::Unchecked(why.clone()))?;
        match Proof::read(rows.iter().map(Vec::as_slice)) {
            Ok(Some(proof)) => Ok(proof),
            Ok(None) => Err(Verdict::Unchecked("the result carries no proof".into())),
            Err(error) => Err(Verdict::Bad(error.to_string())),
        }
    }

    fn output(&self, proof: &Result<Proof, Verdict>) -> Verdict {
        match (&self.open, proof) {
            (Ok((content, _)), Ok(proof)) => {
                holds(sha256_hex(content.as_bytes()) == proof.output_sha256, "the content has another hash")
            }
            _ => Verdict::Unchecked("without a readable proof there is no hash to compare".into()),
        }
    }

    /// The amount equals the proof's price, or is at most that price in whole sats where an invoice asks for what is
    /// still to be paid; and the price keeps to the bid where that can be read.
    fn price(&self, proof: &Result<Proof, Verdict>) -> Verdict {
        let (Ok((_, rows)), Ok(proof)) = (&self.open, proof) else {
            return Verdict::Unchecked("without a readable proof there is no price to compare".into());
        };
        let amount = rows.iter().find(|row| tags::name(row) == "amount");
        let (asked, invoice) = amount.and_then(|row| super::feedback::amount(row)).unwrap_or_default();
        let price = proof.price_msat;
        let fits = match invoice {
            Some(_) => asked <= price.div_ceil(1_000).saturating_mul(1_000),
            None => asked == price,
        };
        if !fits {
            return Verdict::Bad(format!("asks {asked} msat, the proof says {price}"));
        }
        let Some((request, _)) = &self.request else { return no_request() };
        match self.bid(request) {
            Ok(Some(bid)) => holds(price <= bid, format!("costs {price} msat, the bid was {bid}")),
            Ok(None) => Verdict::Ok,
            Err(why) => Verdict::Unchecked(why),
        }
    }

    fn bid(&self, event: &Event) -> Result<Option<u64>, String> {
        let request = match self.keys {
            Some(keys) if keys.public_key() == event.pubkey => Request::decode_own(event, keys),
            Some(keys) => Request::decode(event, keys),
            None => Request::decode_plain(event),
        };
        request.map(|request| request.bid_msat).map_err(|error| format!("the bid cannot be read: {error}"))
    }
}

fn policy(proof: &Result<Proof, Verdict>) -> Verdict {
    match proof {
        Ok(Proof { policy: Some(policy), policy_sha256, .. }) => {
            holds(sha256_hex(policy.as_bytes()) == *policy_sha256, "the policy has another hash")
        }
        _ => Verdict::Unchecked("the result does not say the policy whose hash it carries".into()),
    }
}

/// What the provider says and nobody can see from outside.
fn claims(proof: &Result<Proof, Verdict>) -> Verdict {
    Verdict::Unchecked(match proof {
        Ok(proof) if proof.commit.is_some() => {
            "commit, backend, image, policy and usage are the provider's word; the commit can be checked \
             with the repository"
                .into()
        }
        Ok(_) => "backend, image, policy and usage are the provider's word".into(),
        Err(_) => "there is no readable proof".into(),
    })
}

fn open(event: &Event, keys: Option<&Keys>) -> Result<(String, Vec<Row>), String> {
    if !result::is_encrypted(event) {
        return Ok((event.content.clone(), tags::rows(event).map(<[String]>::to_vec).collect()));
    }
    let keys = keys.ok_or("the result is encrypted: only its customer and its provider can read it")?;
    // Both sides share one key; which side are we?
    let peer = if keys.public_key() == event.pubkey {
        customer(event).ok_or("the result is encrypted and names no customer")?
    } else {
        event.pubkey
    };
    let reply = Reply::open(event, keys, &peer).map_err(|error| error.to_string())?;
    let rows = match result::sealed_tags(event) {
        Some(sealed) => {
            let (plain, _) = super::encryption::decrypt(keys, &peer, sealed).map_err(|e| e.to_string())?;
            tags::parse_rows(&plain).unwrap_or_default()
        }
        None => tags::rows(event).map(<[String]>::to_vec).collect(),
    };
    Ok((reply.content, rows))
}

fn customer(event: &Event) -> Option<PublicKey> {
    request::asked(event).next()
}

fn verdict_of(proof: &Result<Proof, Verdict>) -> Verdict {
    proof.as_ref().err().cloned().unwrap_or(Verdict::Ok)
}

fn no_request() -> Verdict {
    Verdict::Unchecked("the request is not at hand".into())
}

fn holds(is_so: bool, otherwise: impl Into<String>) -> Verdict {
    if is_so { Verdict::Ok } else { Verdict::Bad(otherwise.into()) }
}
