//! Zap receipts to our key (kind 9735), from now on: somebody says that an invoice was paid. They go past the intake:
//! none is remembered, moves a cursor or is fetched again, and one that finds no room is dropped unread. What a receipt
//! is good for is the node's to know; here it is only an event whose signature holds.

use std::sync::Arc;

use nostr_sdk::prelude::{Event, Filter, Kind, PublicKey, Timestamp};
use tokio::sync::mpsc;

use super::Glance;
use super::limits::Limits;
use super::verify::{Counts, Source, Wanted, check};

/// The subscription's id.
pub(super) const HINTS: &str = "hints";
/// The node lives with this many others on one connection: those of `follow.rs`, and one of `finder.rs`.
const OTHERS: u64 = 4;

/// What is asked for; `None` where the relay lets us have no subscription more.
pub(super) fn wanted(me: PublicKey, now_s: u64, limits: &Limits) -> Option<Arc<Wanted>> {
    let room = limits.max_subscriptions.is_none_or(|most| most > OTHERS);
    let receipts = Filter::new().kind(Kind::ZapReceipt).pubkey(me).since(Timestamp::from(now_s));
    room.then(|| Wanted::new(vec![receipts]))
}

/// Hands an event up that came under [`HINTS`], if there is room and it is genuine. Does not wait.
pub(super) fn hear(
    tell: Option<&mpsc::Sender<Event>>,
    source: &Source,
    wanted: &Wanted,
    glance: &Glance,
    frame: &str,
) {
    if !wanted.may_match(glance) {
        return Counts::add(&source.counts.unwanted);
    }
    // Room first: a flood is not worth its signatures.
    let Some(Ok(room)) = tell.map(mpsc::Sender::try_reserve) else { return };
    if let Some(event) = check(frame, wanted, &source.counts) {
        room.send(event);
    }
}

#[cfg(test)]
mod tests {
    use nostr_sdk::prelude::{EventBuilder, JsonUtil, Keys, Tag};

    use super::super::message::{self, Message};
    use super::*;

    const NOW_S: u64 = 1_790_000_000;

    fn receipt(to: &Keys, at_s: u64) -> String {
        let event = EventBuilder::new(Kind::ZapReceipt, "")
            .tag(Tag::public_key(to.public_key()))
            .custom_created_at(Timestamp::from(at_s))
            .sign_with_keys(&Keys::generate())
            .unwrap();
        format!(r#"["EVENT","{HINTS}",{}]"#, event.as_json())
    }

    #[test]
    fn genuine_receipts_to_us_are_handed_up_while_there_is_room_and_nothing_else_is() {
        let (me, source) = (Keys::generate(), Source::new("wss://ours".into(), None));
        let asked = wanted(me.public_key(), NOW_S, &Limits::default()).unwrap();
        let (tell, mut told) = mpsc::channel(2);
        let hear = |frame: &str| {
            let Some(Message::Event { glance, .. }) = message::look(frame) else { panic!("{frame}") };
            hear(Some(&tell), &source, &asked, &glance, frame);
        };
        hear(&receipt(&Keys::generate(), NOW_S));
        hear(&receipt(&me, NOW_S - 1));
        hear(&receipt(&me, NOW_S).replace(r#""content":"""#, r#""content":"paid""#));
        assert!(told.try_recv().is_err());
        let counts = &source.counts;
        assert_eq!((Counts::of(&counts.unwanted), Counts::of(&counts.forged)), (2, 1));

        (0..5).for_each(|n| hear(&receipt(&me, NOW_S + n)));
        let all: Vec<_> = std::iter::from_fn(|| told.try_recv().ok()).collect();
        assert_eq!(all.len(), 2, "there was room for two");
        assert_eq!(source.progress.open(), 0, "no cursor waits for them");
    }

    #[test]
    fn a_relay_with_few_subscriptions_is_not_asked() {
        let asked = |most| {
            let limits = Limits { max_subscriptions: most, ..Limits::default() };
            wanted(Keys::generate().public_key(), NOW_S, &limits).is_some()
        };
        assert_eq!([None, Some(20), Some(5), Some(4), Some(1)].map(asked), [true, true, true, false, false]);
    }
}
