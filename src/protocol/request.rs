//! Decoding a job request (kind 5000–5999) leniently and safely. What the request *orders* (repository,
//! commands, limits) is read from it by `order.rs`.

use nostr_sdk::prelude::{Event, EventId, PublicKey};

use super::Scheme;

/// A decoded job request. Everything in it comes from a stranger, capped but not believed.
#[derive(Debug, Clone)]
pub struct Request {
    pub id: EventId,
    pub customer: PublicKey,
    pub kind: u16,
    /// Unix seconds, the customer's clock.
    pub created_at: u64,
    pub inputs: Vec<Input>,
    /// `param` tags in order; the first value of each is the key's value, more are kept.
    pub params: Vec<(String, Vec<String>)>,
    pub output: Option<String>,
    /// The customer's maximum, millisatoshi.
    pub bid_msat: Option<u64>,
    /// Where to answer, as written; not yet checked.
    pub relays: Vec<String>,
    /// `p` tags: the providers asked for.
    pub providers: Vec<PublicKey>,
    /// NIP-40, Unix seconds.
    pub expiration: Option<u64>,
    /// Set when inputs and params came encrypted; the answer uses the same scheme.
    pub encryption: Option<Scheme>,
    /// The event itself, for the `request` echo and the proof.
    pub event: Event,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    pub data: String,
    pub kind: InputKind,
    pub relay: Option<String>,
    pub marker: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputKind {
    Url,
    Event,
    Job,
    Text,
}
