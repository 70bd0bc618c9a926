//! Tags as rows of strings: the lenient readings that the decoders share and the building of tags for the
//! encoders. It knows no event kind.

use nostr_sdk::prelude::{Event, EventId, Keys, Kind, PublicKey, Tag, TagKind, Timestamp, UnsignedEvent};
use serde_json::Value;

use super::MAX_MSAT;

/// One tag: its name, then its values.
pub(super) type Row = Vec<String>;

pub(super) fn rows(event: &Event) -> impl Iterator<Item = &[String]> {
    event.tags.iter().map(|tag| tag.as_slice())
}

/// The tag's name as we understand it: trimmed, and with the misspellings seen on the wire mended.
pub(super) fn name(row: &[String]) -> &str {
    match row.first().map(|name| name.trim()).unwrap_or_default() {
        "input" => "i",
        "params" => "param",
        "relay" => "relays",
        // The sample corpus has relay URLs where the tag's name belongs.
        name if is_relay_url(name) => "relays",
        name => name,
    }
}

/// The `n`-th value (the name is number 0), trimmed; `None` when absent or empty.
pub(super) fn value(row: &[String], n: usize) -> Option<&str> {
    row.get(n).map(|text| text.trim()).filter(|text| !text.is_empty())
}

/// Looks like a relay's address. Whether we may connect there is not decided here.
pub(super) fn is_relay_url(text: &str) -> bool {
    let scheme = |s: &str| text.get(..s.len()).is_some_and(|head| head.eq_ignore_ascii_case(s));
    scheme("ws://") || scheme("wss://")
}

/// The first well-formed event id of the `e` tags.
pub(super) fn first_event_id<'a>(rows: impl Iterator<Item = &'a [String]>) -> Option<EventId> {
    rows.filter(|row| name(row) == "e").find_map(|row| EventId::from_hex(value(row, 1)?).ok())
}

/// A key as 64 hex digits or as npub.
pub(super) fn public_key(text: &str) -> Option<PublicKey> {
    if text.len() == 64 {
        PublicKey::from_hex(text).ok()
    } else if text.len() < 128 && text.starts_with("npub1") {
        PublicKey::parse(text).ok()
    } else {
        None
    }
}

/// A whole amount of money, clamped to all bitcoin there can be. Anything that [`whole`] does not take is
/// unreadable, and the caller says so: we are strict about money.
pub(super) fn msat(text: &str) -> Option<u64> {
    whole(text).map(|n| n.min(MAX_MSAT))
}

/// A whole, non-negative number as people and programs write it: `5000`, `100_000`, `+5`, `5000.0`.
pub(super) fn whole(text: &str) -> Option<u64> {
    let text = text.trim();
    let text = text.strip_prefix('+').unwrap_or(text);
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    if fraction.is_empty() || !fraction.bytes().all(|b| b == b'0') {
        return None;
    }
    digits(whole)
}

/// Decimal digits, underscores between them allowed; saturates at `u64::MAX`.
pub(super) fn digits(text: &str) -> Option<u64> {
    if !text.bytes().any(|b| b.is_ascii_digit()) {
        return None;
    }
    text.bytes().filter(|b| *b != b'_').try_fold(0_u64, |n, b| {
        let digit = b.is_ascii_digit().then(|| u64::from(b - b'0'))?;
        Some(n.saturating_mul(10).saturating_add(digit))
    })
}

/// Reads a JSON array of tags, as encryption moves them into `content`. Numbers and booleans become text;
/// what is no array of such values is left out. `None` when the text is no JSON array at all.
pub(super) fn parse_rows(json: &str) -> Option<Vec<Row>> {
    let Ok(Value::Array(items)) = serde_json::from_str::<Value>(json) else { return None };
    Some(items.into_iter().filter_map(row_of).collect())
}

fn row_of(item: Value) -> Option<Row> {
    let Value::Array(values) = item else { return None };
    let row: Row = values
        .into_iter()
        .map(|value| match value {
            Value::String(text) => Some(text),
            Value::Number(number) => Some(number.to_string()),
            Value::Bool(flag) => Some(flag.to_string()),
            _ => None,
        })
        .collect::<Option<_>>()?;
    (!row.is_empty()).then_some(row)
}

pub(super) fn row(values: &[&str]) -> Row {
    values.iter().map(|value| (*value).to_owned()).collect()
}

/// A row as a tag; an empty row becomes a nameless tag, which no encoder makes.
pub(super) fn tag(row: Row) -> Tag {
    let mut values = row.into_iter();
    let name = values.next().unwrap_or_default();
    Tag::custom(TagKind::from(name.as_str()), values)
}

pub(super) fn unsigned(keys: &Keys, kind: u16, rows: Vec<Row>, content: String, now_s: u64) -> UnsignedEvent {
    let tags = rows.into_iter().map(tag);
    UnsignedEvent::new(keys.public_key(), Timestamp::from_secs(now_s), Kind::from(kind), tags, content)
}

/// The length of the event as JSON once it has its id and signature, in bytes.
pub(super) fn signed_len(event: &UnsignedEvent) -> usize {
    const ID_AND_SIG: usize = r#""id":"","sig":"","#.len() + 64 + 128;
    let mut bare = event.clone();
    bare.id = None;
    // Serialising strings and numbers cannot fail; if it ever did, the event must not pass as small.
    serde_json::to_string(&bare).map_or(usize::MAX, |json| json.len() + ID_AND_SIG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_people_write_them_and_money_in_doubt_is_not() {
        for (text, read) in [("5000", 5000), ("100_000", 100_000), (" +5 ", 5), ("5000.0", 5000), ("0", 0)] {
            assert_eq!(msat(text), Some(read), "{text:?}");
        }
        for text in ["", "_", "-1", "1,000", "5.5", "5.", "1e3", "0x10", "five", "٥", "5 sats"] {
            assert_eq!(msat(text), None, "{text:?}");
        }
        assert_eq!(msat("99999999999999999999999999"), Some(MAX_MSAT));
        assert_eq!(digits("99999999999999999999999999"), Some(u64::MAX));
    }

    #[test]
    fn text_is_clipped_between_characters() {
        assert_eq!(super::super::clip("aß🦀", 2), "a");
        assert_eq!(super::super::clip("aß🦀", 3), "aß");
        assert_eq!(super::super::clip("aß🦀", 99), "aß🦀");
    }

    #[test]
    fn misspelt_names_are_mended() {
        let name_of = |text: &str| name(&[text.to_owned()]).to_owned();
        assert_eq!(name_of("input"), "i");
        assert_eq!(name_of(" bid "), "bid");
        assert_eq!(name_of("WSS://relay.example"), "relays");
        assert_eq!(name(&[]), "");
    }
}
