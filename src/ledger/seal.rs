//! The node's signature over the head of its log: whoever has noted one can tell later that nothing before it was
//! changed. An event of kind 30078 (NIP-78) that is kept in the log and published nowhere by itself.

use nostr_sdk::prelude::{Event, EventBuilder, JsonUtil, Keys, Kind, Tag, Timestamp};
use serde::{Deserialize, Serialize};

use super::{Broken, Error, Ledger};
use crate::store::record::Record;
use crate::store::{Entry, Head, Store};

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

/// A signed head. Its signature holds; whether the signer is the node and the hash the chain's is [`super::verify`]'s.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// The entry that it stands for, with all before it.
    pub head: Head,
    /// Who signed it, hex.
    pub by: String,
    /// When, by the signer's clock, Unix seconds.
    pub at_s: u64,
    /// What was signed, whole: this is to be noted elsewhere.
    pub event: Event,
}

impl Seal {
    /// What a [`Record::Sealed`] says; `None` when it is not signed, or stands for another entry than `of`.
    pub(super) fn read(of: u64, event: &str) -> Option<Seal> {
        let event = Event::from_json(event).ok()?;
        event.verify().ok()?;
        let head: Head = serde_json::from_str(&event.content).ok()?;
        let (by, at_s) = (event.pubkey.to_hex(), event.created_at.as_secs());
        (head.seq == of).then_some(Seal { head, by, at_s, event })
    }
}

impl Seal {
    /// What was noted elsewhere: the seal as `ledger seal --json` prints it, or its event alone. `None`: it is neither, or
    /// is not signed.
    pub fn from_note(text: &str) -> Option<Seal> {
        let note: serde_json::Value = serde_json::from_str(text).ok()?;
        let event = Event::from_json(note.get("event").unwrap_or(&note).to_string()).ok()?;
        let head: Head = serde_json::from_str(&event.content).ok()?;
        Seal::read(head.seq, &event.as_json())
    }
}

/// The newest signed head of a store.
///
/// # Errors
/// The store's, and [`Broken::Seal`] for one that is not signed.
pub fn last_seal(store: &Store) -> Result<Option<Seal>, Broken> {
    match store.last_seal()? {
        Some(Entry { seq, record: Record::Sealed { seq: of, event }, .. }) => {
            Seal::read(of, &event).map(Some).ok_or(Broken::Seal { seq, of })
        }
        _ => Ok(None),
    }
}

impl Ledger {
    /// Whether money has moved since the last signature, and that is a day old.
    pub fn seal_due(&self, now_s: u64) -> Result<bool, Error> {
        match last_seal(self.store()) {
            Ok(Some(seal)) => Ok(seal.at_s.saturating_add(DAY_S) <= now_s),
            Ok(None) => Ok(!self.store().balances()?.is_empty()),
            Err(Broken::Store(error)) => Err(error.into()),
            // One that says nothing is as good as none.
            Err(_) => Ok(true),
        }
    }

    /// Signs the present head and writes the signature down.
    ///
    /// # Errors
    /// The store's.
    pub async fn seal(&self, keys: &Keys, now_s: u64) -> Result<Seal, SealError> {
        let head = self.store().head();
        let sign = |e: &dyn std::fmt::Display| SealError::Sign(e.to_string());
        let content = serde_json::to_string(&head).map_err(|e| sign(&e))?;
        let event = EventBuilder::new(Kind::Custom(KIND), content)
            .tag(Tag::identifier(NAME))
            .custom_created_at(Timestamp::from(now_s))
            .sign_with_keys(keys)
            .map_err(|e| sign(&e))?;
        self.commit(vec![Record::Sealed { seq: head.seq, event: event.as_json() }]).await?;
        Ok(Seal { head, by: event.pubkey.to_hex(), at_s: now_s, event })
    }
}
