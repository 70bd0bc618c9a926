//! The node's announcement (NIP-89) while it serves: published, renewed before it runs out, and taken back at the
//! end. What it says is given; who may run what is not known here.

use std::time::Duration;

use nostr_sdk::prelude::{EventId, JsonUtil, Keys, UnsignedEvent};
use tokio::sync::Mutex;

use crate::clock::Clock;
use crate::protocol::announcement::{self, Announcement};
use crate::relay;
use crate::store::record::Record;
use crate::store::{self, Outgoing, Store};

/// The `d` tag of our announcement: one node, one announcement.
const ANNOUNCED_AS: &str = "coinop";
/// How long an announcement holds without being renewed, seconds.
const ANNOUNCED_FOR_S: u64 = 7 * 86_400;

/// What is announced, and by which means.
pub(crate) struct Announcer {
    pub(crate) store: Store,
    pub(crate) relays: relay::Handle,
    pub(crate) keys: Keys,
    pub(crate) clock: Clock,
    /// Kinds, skills and words; the rest is filled in.
    pub(crate) what: Announcement,
    /// Our relays.
    pub(crate) to: Vec<String>,
    /// How long relays are tried, milliseconds.
    pub(crate) give_up_ms: u64,
    /// Held while something is published, so that nothing is announced after it was taken back.
    pub(crate) state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    /// The last announcement and its time, Unix seconds.
    last: Option<(EventId, u64)>,
    withdrawn: bool,
}

impl Announcer {
    /// Announces from now on.
    ///
    /// # Errors
    /// The store's.
    pub(crate) async fn announce(&self) -> Result<(), store::Error> {
        let mut state = self.state.lock().await;
        if state.withdrawn {
            return Ok(());
        }
        // Of two in one second a relay may keep the older one.
        let after = state.last.map_or(0, |(_, at)| at.saturating_add(1));
        let now_s = ((self.clock)() / 1000).max(after);
        let announcement = Announcement {
            name_tag: ANNOUNCED_AS.into(),
            expiration: Some(now_s.saturating_add(ANNOUNCED_FOR_S)),
            ..self.what.clone()
        };
        let event = self.publish(announcement::unsigned(&announcement, &self.keys, now_s)).await?;
        state.last = event.or(state.last);
        Ok(())
    }

    /// Renews the announcement for ever; ends when the store takes nothing more, or it was taken back.
    pub(crate) async fn renew(&self, every: Duration) {
        loop {
            tokio::time::sleep(every).await;
            if let Err(error) = self.announce().await {
                tracing::error!(%error, "the announcement is not renewed; it ends by itself");
                return;
            }
            if self.state.lock().await.withdrawn {
                return;
            }
        }
    }

    /// Takes the announcement back, if there is one; nothing is announced after that.
    pub(crate) async fn withdraw(&self) {
        let mut state = self.state.lock().await;
        state.withdrawn = true;
        let Some(last) = state.last.take() else { return };
        let now_s = (self.clock)() / 1000;
        for unsigned in announcement::withdrawal(ANNOUNCED_AS, Some(last), &self.keys, now_s) {
            // A store that takes nothing more must not keep the rest from ending in order.
            if let Err(error) = self.publish(unsigned).await {
                tracing::error!(%error, "the announcement was not taken back; it ends by itself");
            }
        }
    }

    /// Owes an event of the node itself to our own relays.
    async fn publish(&self, unsigned: UnsignedEvent) -> Result<Option<(EventId, u64)>, store::Error> {
        let event = match unsigned.sign_with_keys(&self.keys) {
            Ok(event) => event,
            Err(error) => {
                tracing::error!(%error, "an event of the node could not be signed");
                return Ok(None);
            }
        };
        let outgoing = Outgoing {
            event: event.id.to_hex(),
            job: None,
            json: event.as_json(),
            relays_left: self.to.clone(),
            give_up_ms: (self.clock)().saturating_add(self.give_up_ms),
        };
        self.store.append(vec![queued(&outgoing)]).await?;
        self.relays.owe(outgoing);
        Ok(Some((event.id, event.created_at.as_secs())))
    }
}

/// The record that owes an event.
fn queued(outgoing: &Outgoing) -> Record {
    Record::Queued {
        event: outgoing.event.clone(),
        job: outgoing.job.clone(),
        json: outgoing.json.clone(),
        relays: outgoing.relays_left.clone(),
        give_up_ms: outgoing.give_up_ms,
    }
}
