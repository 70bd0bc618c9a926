//! Reading a relay's message cheaply: what it is, and of an event only id, kind and time, so that most
//! frames are dropped without building anything. The event itself is parsed in `verify.rs`.

use std::borrow::Cow;
use std::fmt;

use nostr_sdk::prelude::Event;
use serde::Deserialize;
use serde::de::{Error as _, IgnoredAny, SeqAccess, Visitor};

/// Longest challenge, reason or notice kept, characters.
const MAX_TALK: usize = 1024;

/// What can be known of an event without building it. Claimed, not verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Glance {
    pub id: [u8; 32],
    pub kind: u16,
    /// Unix seconds.
    pub created_at: u64,
}

/// One message of a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    Event {
        subscription: Cow<'a, str>,
        glance: Glance,
    },
    EndOfStored {
        subscription: Cow<'a, str>,
    },
    Closed {
        subscription: Cow<'a, str>,
        reason: String,
    },
    Ok {
        event: [u8; 32],
        accepted: bool,
        reason: String,
    },
    Auth {
        challenge: String,
    },
    Notice {
        text: String,
    },
    /// COUNT, NEG-… and whatever comes: ours to ignore.
    Other,
}

/// Looks at a frame. `None`: not a relay message. Never panics, never recurses, allocates little.
pub fn look(frame: &str) -> Option<Message<'_>> {
    serde_json::from_str(frame).ok()
}

/// Whether a frame that cannot be read is meant to be an event.
pub(super) fn is_event(frame: &str) -> bool {
    let word = frame.trim_start().strip_prefix('[').map(str::trim_start);
    word.is_some_and(|word| word.starts_with(r#""EVENT""#))
}

/// Builds the event of an `EVENT` frame. It is not verified.
pub(super) fn event(frame: &str) -> Option<Event> {
    serde_json::from_str::<(IgnoredAny, IgnoredAny, Event)>(frame).ok().map(|(_, _, event)| event)
}

#[derive(Deserialize)]
struct RawGlance<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    kind: u16,
    created_at: u64,
}

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Message<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(MessageVisitor)
    }
}

struct MessageVisitor;

impl<'de> Visitor<'de> for MessageVisitor {
    type Value = Message<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a relay message")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        fn text<'de, A: SeqAccess<'de>>(seq: &mut A) -> Result<Cow<'de, str>, A::Error> {
            seq.next_element::<Text<'de>>()?.map(|t| t.0).ok_or_else(|| A::Error::custom("too short"))
        }
        // Some relays leave the reason out, some send null.
        fn talk<'de, A: SeqAccess<'de>>(seq: &mut A) -> Result<String, A::Error> {
            let said = seq.next_element::<Option<Text<'de>>>()?.flatten();
            Ok(said.map(|t| t.0.chars().take(MAX_TALK).collect()).unwrap_or_default())
        }
        let kind = text(&mut seq)?;
        let message = match &*kind {
            "EVENT" => {
                let subscription = text(&mut seq)?;
                let raw: RawGlance<'de> = seq.next_element()?.ok_or_else(|| A::Error::custom("no event"))?;
                let id = id(&raw.id).ok_or_else(|| A::Error::custom("no event id"))?;
                let glance = Glance { id, kind: raw.kind, created_at: raw.created_at };
                Message::Event { subscription, glance }
            }
            "EOSE" => Message::EndOfStored { subscription: text(&mut seq)? },
            "CLOSED" => Message::Closed { subscription: text(&mut seq)?, reason: talk(&mut seq)? },
            "OK" => {
                let event = id(&text(&mut seq)?).ok_or_else(|| A::Error::custom("no event id"))?;
                let accepted = seq.next_element::<bool>()?.ok_or_else(|| A::Error::custom("too short"))?;
                Message::Ok { event, accepted, reason: talk(&mut seq)? }
            }
            "AUTH" => Message::Auth { challenge: talk(&mut seq)? },
            "NOTICE" => Message::Notice { text: talk(&mut seq)? },
            _ => Message::Other,
        };
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(message)
    }
}

/// An event id from its hex; upper case is not an id.
fn id(hex_id: &str) -> Option<[u8; 32]> {
    if hex_id.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    let mut bytes = [0; 32];
    hex::decode_to_slice(hex_id, &mut bytes).ok().map(|()| bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "00000000000000000000000000000000000000000000000000000000000000aa";

    #[test]
    fn each_message_is_read() {
        let frame = format!(
            r#"["EVENT","s",{{"content":"\u00e9","id":"{ID}","tags":[["a"]],"kind":5000,"created_at":7}}]"#
        );
        let Some(Message::Event { subscription, glance }) = look(&frame) else { panic!("not an event") };
        assert_eq!((&*subscription, glance.kind, glance.created_at, glance.id[31]), ("s", 5000, 7, 0xaa));
        assert_eq!(look(r#"["EOSE","s"]"#), Some(Message::EndOfStored { subscription: "s".into() }));
        let closed = Message::Closed { subscription: "s".into(), reason: "auth-required: x".into() };
        assert_eq!(look(r#"["CLOSED","s","auth-required: x"]"#), Some(closed));
        assert!(
            matches!(look(&format!(r#"["OK","{ID}",false,"blocked: x"]"#)), Some(Message::Ok { accepted: false, reason, .. }) if reason == "blocked: x")
        );
        assert!(matches!(look(&format!(r#"["OK","{ID}",true]"#)), Some(Message::Ok { accepted: true, .. })));
        assert!(matches!(
            look(&format!(r#"["OK","{ID}",true,null]"#)),
            Some(Message::Ok { accepted: true, .. })
        ));
        assert_eq!(look(r#"["AUTH","c"]"#), Some(Message::Auth { challenge: "c".into() }));
        assert_eq!(look(r#"["COUNT","s",{"count":1}]"#), Some(Message::Other));
    }

    #[test]
    fn nonsense_is_none_and_deep_nonsense_too() {
        let deep =
            format!(r#"["EVENT","s",{{"id":"{ID}","kind":1,"created_at":1,"tags":{}"#, "[".repeat(200_000));
        let closed = format!("{deep}{}}}]", "]".repeat(200_000));
        for frame in [
            "",
            "{",
            "[]",
            "[1]",
            "null",
            r#"["EVENT"]"#,
            r#"["EVENT","s",{}]"#,
            r#"["OK","zz",true]"#,
            &deep,
        ] {
            assert_eq!(look(frame), None, "{}", &frame[..frame.len().min(40)]);
        }
        assert!(event(&closed).is_none());
        let twice = format!(r#"["EVENT","s",{{"id":"{ID}","id":"{ID}","kind":1,"created_at":1}}]"#);
        assert_eq!(look(&twice), None);
        let large = format!(r#"["EVENT","s",{{"id":"{ID}","kind":70000,"created_at":1}}]"#);
        assert_eq!(look(&large), None);
    }

    #[test]
    fn long_talk_is_cut_at_a_character() {
        let frame = format!(r#"["NOTICE","{}"]"#, "é".repeat(5000));
        assert!(matches!(look(&frame), Some(Message::Notice { text }) if text.chars().count() == 1024));
    }
}
