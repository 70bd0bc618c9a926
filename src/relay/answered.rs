//! Which requests have a result already, as our relays show at the start: a node that is new, or was away, must not do
//! work again that is done. Bounded; what is asked, and when, is `follow.rs`'s.

use std::collections::HashMap;
use std::sync::Mutex;

use nostr_sdk::prelude::{Event, Filter, Kind, PublicKey, Timestamp};

use super::lock;
use super::verify::{Counts, Wanted, check};
use crate::protocol::{RESULT_OFFSET, request};

/// The subscription's id.
pub(super) const RESULTS: &str = "results";
/// Requests remembered, and results of each.
const REQUESTS: usize = 10_000;
const RESULTS_EACH: usize = 8;

/// Who has answered which request.
#[derive(Debug, Default)]
pub(super) struct Answered(Mutex<HashMap<[u8; 32], Vec<PublicKey>>>);

impl Answered {
    /// What is asked for: the newest `limit` results to requests of these kinds.
    pub(super) fn wanted(kinds: &[u16], since_s: u64, limit: usize) -> std::sync::Arc<Wanted> {
        let results = kinds.iter().map(|kind| Kind::from(kind.saturating_add(RESULT_OFFSET)));
        Wanted::new(vec![Filter::new().kinds(results).since(Timestamp::from(since_s)).limit(limit)])
    }

    /// An event that came under [`RESULTS`].
    pub(super) fn hear(&self, wanted: &Wanted, frame: &str) {
        if lock(&self.0).len() >= REQUESTS {
            return;
        }
        // Counted for nothing: whoever sends rubbish here is found out elsewhere.
        let Some(event) = check(frame, wanted, &Counts::default()) else { return };
        let Some(request) = event.tags.event_ids().next() else { return };
        let mut known = lock(&self.0);
        let by = known.entry(request.to_bytes()).or_default();
        if by.len() < RESULTS_EACH && !by.contains(&event.pubkey) {
            by.push(event.pubkey);
        }
    }

    /// Whether nobody waits for our answer to this request: we gave it, or, where we were not asked by name, anybody.
    pub(super) fn has(&self, asked: &Event, me: &PublicKey) -> bool {
        let known = lock(&self.0);
        let Some(by) = known.get(asked.id.as_bytes()) else { return false };
        by.contains(me) || (!by.is_empty() && !request::asks_for(asked, me))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nostr_sdk::prelude::{EventBuilder, EventId, JsonUtil, Keys, Tag};

    const NOW_S: u64 = 1_790_000_000;

    fn signed(kind: u16, keys: &Keys, tags: Vec<Tag>) -> Event {
        let event =
            EventBuilder::new(Kind::from(kind), "").tags(tags).custom_created_at(Timestamp::from(NOW_S));
        event.sign_with_keys(keys).unwrap()
    }

    fn result(to: EventId, by: &Keys) -> String {
        format!(r#"["EVENT","{RESULTS}",{}]"#, signed(6930, by, vec![Tag::event(to)]).as_json())
    }

    #[test]
    fn a_strangers_result_counts_for_a_request_to_anybody_and_not_for_one_to_us() {
        let (me, other, customer) = (Keys::generate(), Keys::generate(), Keys::generate());
        let (open, ours) = (
            signed(5930, &customer, vec![]),
            signed(5930, &customer, vec![Tag::public_key(me.public_key())]),
        );
        let (answered, wanted) = (Answered::default(), Answered::wanted(&[5930], NOW_S - 1, 10));
        let has = |event: &Event| answered.has(event, &me.public_key());
        answered.hear(&wanted, &result(open.id, &other).replace(r#""content":"""#, r#""content":"x""#));
        assert!(!has(&open), "a forged result is none");
        for request in [&open, &ours] {
            answered.hear(&wanted, &result(request.id, &other));
        }
        assert!(has(&open) && !has(&ours));
        answered.hear(&wanted, &result(ours.id, &me));
        assert!(has(&ours));
    }
}
