//! The few messages of a relay that matter to a wallet's link. It checks no signature; `link.rs` does.

use nostr_sdk::prelude::Event;
use serde_json::Value;

use crate::wallet::brief;

/// What a relay says, as far as it is of use.
pub(super) enum Said {
    /// Not verified.
    Event(Box<Event>),
    Ok {
        event: String,
        accepted: bool,
        reason: String,
    },
    Auth(String),
    Closed(String),
    Other,
}

/// Reads a message; whatever cannot be read is `Other`.
pub(super) fn read(text: &str) -> Said {
    let Ok(mut parts) = serde_json::from_str::<Vec<Value>>(text) else { return Said::Other };
    let words = |n: usize| parts.get(n).and_then(Value::as_str).map(str::to_owned).unwrap_or_default();
    match words(0).as_str() {
        "EVENT" => match parts.get_mut(2).and_then(|event| serde_json::from_value(event.take()).ok()) {
            Some(event) => Said::Event(Box::new(event)),
            None => Said::Other,
        },
        "OK" => Said::Ok {
            event: words(1),
            accepted: parts.get(2).and_then(Value::as_bool).unwrap_or(false),
            reason: brief(&words(3)),
        },
        "AUTH" => Said::Auth(words(1).chars().take(1_024).collect()),
        "CLOSED" => Said::Closed(brief(&words(2))),
        _ => Said::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_nothing_and_never_a_panic() {
        let deep = format!("[\"EVENT\",\"s\",{}", "[".repeat(100_000));
        for text in ["", "{}", "[]", "[1,2]", r#"["EVENT"]"#, r#"["EVENT","s",{"id":1}]"#, "[\"é", &deep] {
            assert!(matches!(read(text), Said::Other), "{text:.40}");
        }
        assert!(matches!(read(r#"["OK","ab"]"#), Said::Ok { accepted: false, .. }));
        assert!(
            matches!(read(r#"["CLOSED","s","auth-required: x"]"#), Said::Closed(why) if why.starts_with("auth"))
        );
    }
}
