//! Taking a request back: kind 5 (NIP-09), both ways. Whether the author may is checked here; what
//! stopping a job means is `job`'s business.

use nostr_sdk::prelude::{Event, EventId, Keys, PublicKey, UnsignedEvent};

use super::Error;
use super::tags::{self, row};

const KIND: u16 = 5;
/// Requests that one cancellation may name; further ones are passed over.
pub const MAX_REQUESTS: usize = 256;
/// Most of the reason that is kept, in bytes.
pub const MAX_REASON_BYTES: usize = 512;

/// A decoded cancellation. It may come before the request that it names, so it is kept with its author.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cancel {
    pub requests: Vec<EventId>,
    pub by: PublicKey,
    pub reason: String,
}

impl Cancel {
    /// Reads a kind 5 event; the signature is the caller's to check. An empty list of requests is no error:
    /// most deletions are about other things.
    pub fn decode(event: &Event) -> Result<Self, Error> {
        let kind = event.kind.as_u16();
        if kind != KIND {
            return Err(Error::WrongKind { kind, wanted: "cancellation (5)" });
        }
        let requests = tags::rows(event)
            .filter(|row| tags::name(row) == "e")
            .filter_map(|row| EventId::from_hex(tags::value(row, 1)?).ok())
            .take(MAX_REQUESTS)
            .collect();
        let reason = super::clip(event.content.trim(), MAX_REASON_BYTES).to_owned();
        Ok(Self { requests, by: event.pubkey, reason })
    }

    /// Whether this cancellation takes that request back: it names it, and has the same author.
    pub fn covers(&self, request: &EventId, author: &PublicKey) -> bool {
        self.by == *author && self.requests.contains(request)
    }
}

/// A kind 5 event that takes `request` (of kind `request_kind`) back. `keys` are the request's author's.
pub fn cancel(request: &EventId, request_kind: u16, reason: &str, keys: &Keys, now_s: u64) -> UnsignedEvent {
    let rows = vec![row(&["e", &request.to_hex()]), row(&["k", &request_kind.to_string()])];
    let reason = super::clip(reason, MAX_REASON_BYTES).to_owned();
    tags::unsigned(keys, KIND, rows, reason, now_s)
}
