//! Encoding and reading job feedback (kind 7000): the five states, the codes of errors, quotes and partial
//! results. When to send one, and how often, is `job`'s business.

use std::str::FromStr;

use nostr_sdk::prelude::{Event, EventId, Keys, PublicKey, UnsignedEvent};

use super::Code;
use super::tags::{self, Row, row};
use super::{Error, FEEDBACK_KIND, Request, Scheme, encryption};

/// Most of the third place of a `status` tag, in bytes; longer text is cut.
pub const MAX_EXTRA_BYTES: usize = 1_000;
/// Most that a feedback may take as a signed event's JSON, in bytes.
pub const MAX_BYTES: usize = 48 * 1024;

/// The five states of NIP-90 feedback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    PaymentRequired,
    Processing,
    Error,
    Success,
    Partial,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PaymentRequired => "payment-required",
            Self::Processing => "processing",
            Self::Error => "error",
            Self::Success => "success",
            Self::Partial => "partial",
        }
    }

    /// Whether nothing more is to come after it.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Error | Self::Success)
    }
}

impl FromStr for Status {
    type Err = Error;

    /// Any case, underscores for hyphens (NDK's enum), and NDK's `scheduled`, which is a processing.
    fn from_str(text: &str) -> Result<Self, Error> {
        match text.trim().to_ascii_lowercase().replace('_', "-").as_str() {
            "payment-required" => Ok(Self::PaymentRequired),
            "processing" | "scheduled" => Ok(Self::Processing),
            "error" => Ok(Self::Error),
            "success" => Ok(Self::Success),
            "partial" => Ok(Self::Partial),
            _ => Err(Error::UnknownStatus(super::clip(text.trim(), 64).to_owned())),
        }
    }
}

/// One feedback about one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feedback {
    pub status: Status,
    /// The third element of the `status` tag: for errors `code: what happened`.
    pub extra: Option<String>,
    /// Millisatoshi and, when there is an invoice, its bolt11.
    pub amount: Option<(u64, Option<String>)>,
    pub content: String,
}

/// A feedback as the customer gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    pub request_id: EventId,
    pub provider: PublicKey,
    /// Unix seconds, the provider's clock.
    pub created_at: u64,
    pub feedback: Feedback,
    /// Set when the feedback came encrypted.
    pub encryption: Option<Scheme>,
}

impl Feedback {
    pub fn new(status: Status, extra: impl Into<String>) -> Self {
        let extra = Some(extra.into()).filter(|text| !text.is_empty());
        Self { status, extra, amount: None, content: String::new() }
    }

    /// `error` with `code: what` in the third place.
    pub fn error(code: Code, what: &str) -> Self {
        Self::new(Status::Error, format!("{code}: {what}"))
    }

    /// `payment-required`: no further work until `msat` are paid.
    pub fn payment_required(msat: u64, bolt11: Option<String>, what: &str) -> Self {
        Self { amount: Some((msat, bolt11)), ..Self::new(Status::PaymentRequired, what) }
    }

    /// The code of an error feedback that follows our profile.
    pub fn code(&self) -> Option<Code> {
        let (code, _) = self.extra.as_deref()?.split_once(':')?;
        Code::named(code.trim()).filter(|_| self.status == Status::Error)
    }

    /// Reads a feedback addressed to `keys`; the signature is the caller's to check.
    pub fn decode(event: &Event, keys: &Keys) -> Result<Received, Error> {
        let kind = event.kind.as_u16();
        if kind != FEEDBACK_KIND {
            return Err(Error::WrongKind { kind, wanted: "job feedback (7000)" });
        }
        let request_id =
            tags::first_event_id(tags::rows(event)).ok_or(Error::NoRequest { what: "feedback" })?;
        let is_encrypted = tags::rows(event).any(|row| tags::name(row) == "encrypted");
        let mut hidden = Vec::new();
        let mut encryption = None;
        let mut content = event.content.clone();
        if is_encrypted && !event.content.is_empty() {
            let (plain, scheme) = encryption::decrypt(keys, &event.pubkey, &event.content)?;
            encryption = Some(scheme);
            match tags::parse_rows(&plain) {
                Some(rows) => {
                    hidden = rows;
                    content = String::new();
                }
                // Some providers leave the tags outside and encrypt only a payload.
                None => content = plain,
            }
        }
        // What the ciphertext says comes first.
        let rows = || hidden.iter().map(Vec::as_slice).chain(tags::rows(event));
        let first = |wanted: &'static str| rows().find(move |row| tags::name(row) == wanted);

        let status_row = first("status").ok_or(Error::NoStatus)?;
        let status = tags::value(status_row, 1).ok_or(Error::NoStatus)?.parse()?;
        let extra = tags::value(status_row, 2).map(|text| super::clip(text, MAX_EXTRA_BYTES).to_owned());
        let amount = first("amount").and_then(amount);
        if let Some(text) = hidden.iter().find(|row| tags::name(row) == "content").and_then(|row| row.get(1))
        {
            content = text.clone();
        }
        let feedback = Self { status, extra, amount, content };
        let created_at = event.created_at.as_secs();
        Ok(Received { request_id, provider: event.pubkey, created_at, feedback, encryption })
    }

    fn rows(&self) -> Vec<Row> {
        let mut status = row(&["status", self.status.as_str()]);
        status.extend(self.extra.as_deref().map(|text| super::clip(text, MAX_EXTRA_BYTES).to_owned()));
        let mut rows = vec![status];
        rows.extend(self.amount.as_ref().map(amount_row));
        rows
    }
}

/// `["amount", msat, bolt11?]`.
pub(super) fn amount_row((msat, bolt11): &(u64, Option<String>)) -> Row {
    let mut amount = row(&["amount", &msat.to_string()]);
    amount.extend(bolt11.clone());
    amount
}

pub(super) fn amount(row: &[String]) -> Option<(u64, Option<String>)> {
    let msat = tags::msat(tags::value(row, 1)?)?;
    Some((msat, tags::value(row, 2).map(str::to_owned)))
}

/// The feedback event, ready to be signed by `keys`, encrypted when the request was: then a JSON array of
/// tags (`status`, `amount`, `content`) is the ciphertext, and outside only `e`, `p` and `encrypted` show.
pub fn unsigned(
    request: &Request,
    feedback: &Feedback,
    keys: &Keys,
    relay_hint: Option<&str>,
    now_s: u64,
) -> Result<UnsignedEvent, Error> {
    let mut rows = address(&request.id, &request.customer, relay_hint);
    let mut hidden = feedback.rows();
    let mut content = feedback.content.clone();
    if let Some(scheme) = request.encryption {
        if !content.is_empty() {
            hidden.push(row(&["content", &content]));
        }
        let plain = serde_json::Value::from_iter(hidden).to_string();
        content = encryption::encrypt(scheme, keys, &request.customer, &plain)?;
        rows.push(row(&["encrypted"]));
    } else {
        rows.append(&mut hidden);
    }
    finish(tags::unsigned(keys, FEEDBACK_KIND, rows, content, now_s))
}

/// An `error` about a request that could not be decoded, so that only its event is known. It is plain: it
/// tells nothing but the code and `what`, so `what` must not repeat the request.
pub fn refusal(
    event: &Event,
    code: Code,
    what: &str,
    keys: &Keys,
    relay_hint: Option<&str>,
    now_s: u64,
) -> Result<UnsignedEvent, Error> {
    let mut rows = address(&event.id, &event.pubkey, relay_hint);
    rows.append(&mut Feedback::error(code, what).rows());
    finish(tags::unsigned(keys, FEEDBACK_KIND, rows, String::new(), now_s))
}

/// `["e", request, relay?]`, `["p", customer]`: the head of every answer, `e` first because NDK finds the
/// request by the first `e`.
pub(super) fn address(request: &EventId, customer: &PublicKey, relay_hint: Option<&str>) -> Vec<Row> {
    let mut e = row(&["e", &request.to_hex()]);
    e.extend(relay_hint.map(str::to_owned));
    vec![e, row(&["p", &customer.to_hex()])]
}

fn finish(event: UnsignedEvent) -> Result<UnsignedEvent, Error> {
    let bytes = tags::signed_len(&event);
    if bytes > MAX_BYTES {
        return Err(Error::TooLarge { what: "feedback", bytes, cap_bytes: MAX_BYTES });
    }
    Ok(event)
}
