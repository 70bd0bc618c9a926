//! Encoding and reading job results (kind 6xxx), within size limits. What the content means is the job
//! type's business; what the proof is worth is `proof.rs`'s.

use nostr_sdk::prelude::{Event, EventId, Keys, PublicKey, UnsignedEvent};

use super::feedback::{address, amount, amount_row};
use super::tags::{self, Row, row};
use super::{Error, Proof, RESULT_OFFSET, Request, Scheme, encryption};

/// Longest `request` echo, in bytes; a longer one is left out, never cut: clients parse it as JSON.
pub const MAX_REQUEST_ECHO: usize = 4 * 1024;
/// Longest value of an `i` echo, in bytes: strfry refuses single-letter tags above it.
pub const MAX_INPUT_ECHO: usize = 1024;
/// `["result", key, value]` tags that are read.
pub const MAX_FACTS: usize = 256;

/// A result as the customer gets it, ours or another provider's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub id: EventId,
    pub request_id: EventId,
    pub provider: PublicKey,
    /// 6000–6999.
    pub kind: u16,
    /// Unix seconds, the provider's clock.
    pub created_at: u64,
    /// Plain.
    pub content: String,
    /// `None` when there is none or it is malformed; `proof::check` tells which.
    pub proof: Option<Proof>,
    /// `["result", key, value]` tags in order.
    pub facts: Vec<(String, String)>,
    /// What the provider asks for, millisatoshi, and its bolt11.
    pub amount_msat: Option<u64>,
    pub invoice: Option<String>,
    /// Set when the result came encrypted.
    pub encryption: Option<Scheme>,
}

/// Makes the result event, ready to be signed by `keys`; `facts` become `["result", key, value]` tags, `owed` is what is
/// still to be paid, msat and bolt11: without it the `amount` tag names the price.
///
/// Plain: `e`, `p`, then `amount`, `result` and `proof` tags, then the echoes of `i` and `request` where
/// they are short. Encrypted: `e`, `p`, `encrypted`, and one `["proof", ciphertext]` that holds the other
/// tags as a JSON array, so that nothing leaks (R18).
///
/// `max_bytes` bounds the signed event as JSON; echoes give way first, then it is [`Error::TooLarge`].
#[expect(clippy::too_many_arguments, reason = "each is a fact of one event; a struct would only rename them")]
pub fn unsigned(
    request: &Request,
    content: &str,
    proof: &Proof,
    facts: &[(String, String)],
    owed: Option<(u64, String)>,
    keys: &Keys,
    relay_hint: Option<&str>,
    now_s: u64,
    max_bytes: usize,
) -> Result<UnsignedEvent, Error> {
    let kind = request.result_kind();
    let mut rows = address(&request.id, &request.customer, relay_hint);
    let mut told = Vec::new();
    match owed {
        Some((msat, bolt11)) => told.push(amount_row(&(msat, Some(bolt11)))),
        None if proof.price_msat > 0 => told.push(amount_row(&(proof.price_msat, None))),
        None => {}
    }
    told.extend(facts.iter().map(|(key, value)| row(&["result", key, value])));
    told.extend(proof.rows());

    if let Some(scheme) = request.encryption {
        let sealed = |plain: &str| encryption::encrypt(scheme, keys, &request.customer, plain);
        // NIP-44 cannot hold nothing; an empty content stays empty, and reads back as such.
        let content = if content.is_empty() { String::new() } else { sealed(content).map_err(too_large)? };
        let told = sealed(&serde_json::Value::from_iter(told).to_string()).map_err(too_large)?;
        rows.push(row(&["encrypted"]));
        rows.push(row(&["proof", &told]));
        return fitting(tags::unsigned(keys, kind, rows, content, now_s), max_bytes);
    }

    rows.append(&mut told);
    let bare = fitting(tags::unsigned(keys, kind, rows, content.to_owned(), now_s), max_bytes)?;
    let mut left = max_bytes - tags::signed_len(&bare);
    let mut event = bare;
    for echo in echoes(request) {
        // Its own JSON and the comma before it.
        let bytes = serde_json::Value::from(echo.clone()).to_string().len() + 1;
        if bytes <= left {
            left -= bytes;
            event.tags.push(tags::tag(echo));
        }
    }
    Ok(event)
}

/// `i` tags and the whole request, those that are short enough.
fn echoes(request: &Request) -> Vec<Row> {
    let inputs = tags::rows(&request.event).filter(|row| tags::name(row) == "i");
    let mut rows: Vec<Row> = inputs
        .filter(|row| row.iter().all(|value| value.len() <= MAX_INPUT_ECHO))
        .map(|row| [vec!["i".to_owned()], row.iter().skip(1).cloned().collect()].concat())
        .collect();
    let json = nostr_sdk::prelude::JsonUtil::try_as_json(&request.event);
    if let Some(json) = json.ok().filter(|json| json.len() <= MAX_REQUEST_ECHO) {
        rows.push(row(&["request", &json]));
    }
    rows
}

fn fitting(event: UnsignedEvent, cap_bytes: usize) -> Result<UnsignedEvent, Error> {
    let bytes = tags::signed_len(&event);
    if bytes > cap_bytes { Err(Error::TooLarge { what: "result", bytes, cap_bytes }) } else { Ok(event) }
}

/// What does not fit the cipher does not fit the event either: one error for the caller.
fn too_large(error: encryption::Error) -> Error {
    match error {
        encryption::Error::TooLarge { bytes, cap_bytes, .. } => {
            Error::TooLarge { what: "result", bytes, cap_bytes }
        }
        other => other.into(),
    }
}

impl Reply {
    /// Reads a result addressed to `keys`; the signature, and whether it answers a request of ours, are
    /// the caller's to check (`proof::check` does both).
    pub fn decode(event: &Event, keys: &Keys) -> Result<Self, Error> {
        Self::open(event, keys, &event.pubkey)
    }

    /// As [`Reply::decode`], with the other side of the encryption named: the provider reads its own
    /// result by naming the customer.
    pub fn open(event: &Event, keys: &Keys, peer: &PublicKey) -> Result<Self, Error> {
        let kind = event.kind.as_u16();
        if !is_result_kind(kind) {
            return Err(Error::WrongKind { kind, wanted: "job result (6000–6999)" });
        }
        let request_id = request_id(event).ok_or(Error::NoRequest { what: "result" })?;
        let mut content = event.content.clone();
        let mut encryption = None;
        let mut hidden = Vec::new();
        if is_encrypted(event) {
            if !content.is_empty() {
                let (plain, scheme) = encryption::decrypt(keys, peer, &content)?;
                content = plain;
                encryption = Some(scheme);
            }
            if let Some(sealed) = sealed_tags(event) {
                let (plain, scheme) = encryption::decrypt(keys, peer, sealed)?;
                hidden = tags::parse_rows(&plain).unwrap_or_default();
                encryption = Some(scheme);
            }
        }
        let rows = || hidden.iter().map(Vec::as_slice).chain(tags::rows(event));
        let amount = rows().find(|row| tags::name(row) == "amount").and_then(amount);
        let fact = |row: &[String]| Some((row.get(1)?.clone(), row.get(2)?.clone()));
        let facts =
            rows().filter(|row| tags::name(row) == "result").filter_map(fact).take(MAX_FACTS).collect();
        let (amount_msat, invoice) = amount.map_or((None, None), |(msat, bolt11)| (Some(msat), bolt11));
        Ok(Self {
            id: event.id,
            request_id,
            provider: event.pubkey,
            kind,
            created_at: event.created_at.as_secs(),
            content,
            proof: Proof::read(rows()).unwrap_or_default(),
            facts,
            amount_msat,
            invoice,
            encryption,
        })
    }

    /// The value of the first `["result", key, value]`.
    pub fn fact(&self, key: &str) -> Option<&str> {
        self.facts.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }
}

/// Whether a kind is in the range of job results.
pub fn is_result_kind(kind: u16) -> bool {
    (5000 + RESULT_OFFSET..=5999 + RESULT_OFFSET).contains(&kind)
}

pub(super) fn is_encrypted(event: &Event) -> bool {
    tags::rows(event).any(|row| tags::name(row) == "encrypted")
}

/// The ciphertext of our `["proof", ciphertext]`.
pub(super) fn sealed_tags(event: &Event) -> Option<&str> {
    let row = tags::rows(event).find(|row| tags::name(row) == "proof" && row.len() == 2)?;
    row.get(1).map(String::as_str)
}

/// The request that a result answers: its first `e`, or else the id in its `request` echo.
pub(super) fn request_id(event: &Event) -> Option<EventId> {
    tags::first_event_id(tags::rows(event)).or_else(|| echo(event).map(|request| request.id))
}

/// The `request` echo, unchecked.
pub(super) fn echo(event: &Event) -> Option<Event> {
    let row = tags::rows(event).find(|row| tags::name(row) == "request")?;
    nostr_sdk::prelude::JsonUtil::from_json(row.get(1)?).ok()
}
