//! The node's signature over the head of its log: whoever has noted one can tell later that nothing before it was
//! changed. An event of kind 30078 (NIP-78) that is kept in the log and published nowhere by itself.

use nostr_sdk::prelude::{Event, EventBuilder, JsonUtil, Keys, Kind, Tag, Timestamp};

use super::{Error, Ledger};
use crate::store::Head;
use crate::store::record::Record;

/// NIP-78: data of one application.
const KIND: u16 = 30_078;
const DAY_S: u64 = 86_400;
const NAME: &str = "coinop-ledger-head";

#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error(transparent)]
    Ledger(#[from] Error),
    #[error("the head could not be signed: {0}")]
    Sign(String),
}

impl Ledger {
    /// Whether money has moved since the last signature, and that is a day old.
    pub fn seal_due(&self, now_s: u64) -> Result<bool, Error> {
        let Some((_, event)) = self.store().last_seal()? else {
            return Ok(!self.store().balances()?.is_empty());
        };
        let signed_s = Event::from_json(&event).map_or(0, |event| event.created_at.as_secs());
        Ok(signed_s.saturating_add(DAY_S) <= now_s)
    }

    /// Signs the present head and writes the signature down; the signed event as JSON.
    ///
    /// # Errors
    /// The store's.
    pub async fn seal(&self, keys: &Keys, now_s: u64) -> Result<(Head, String), SealError> {
        let head = self.store().head();
        let sign = |e: &dyn std::fmt::Display| SealError::Sign(e.to_string());
        let content = serde_json::to_string(&head).map_err(|e| sign(&e))?;
        let event = EventBuilder::new(Kind::Custom(KIND), content)
            .tag(Tag::identifier(NAME))
            .custom_created_at(Timestamp::from(now_s))
            .sign_with_keys(keys)
            .map_err(|e| sign(&e))?
            .as_json();
        self.commit(vec![Record::Sealed { seq: head.seq, event: event.clone() }]).await?;
        Ok((head, event))
    }
}
