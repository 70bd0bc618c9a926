//! The NIP-89 handler announcement (kind 31990) and its withdrawal. It says what it is told; that the
//! announced kinds can run here now is checked by `node`.

use nostr_sdk::prelude::{EventId, Keys, UnsignedEvent};
use serde_json::{Map, Value};

use super::tags::{self, row};

pub const KIND: u16 = 31990;

/// What a node tells about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Announcement {
    /// The `d` tag: stable over restarts, so that a new announcement replaces the old one.
    pub name_tag: String,
    /// Request kinds that are subscribed to and can run now; one `k` each.
    pub kinds: Vec<u16>,
    /// One `t` each.
    pub skills: Vec<String>,
    /// Shown to people, as in a profile (kind 0).
    pub name: String,
    pub about: String,
    pub picture: Option<String>,
    pub website: Option<String>,
    /// What runs the jobs, and the sha256 of the report of its self-test.
    pub sandbox: Option<(String, String)>,
    /// What jobs find missing here that other hosts give them, in words.
    pub caveats: Vec<String>,
    /// NIP-40, Unix seconds: a node that dies stops being listed.
    pub expiration: Option<u64>,
}

/// The event, ready to be signed by `keys`.
pub fn unsigned(announcement: &Announcement, keys: &Keys, now_s: u64) -> UnsignedEvent {
    let mut rows = vec![row(&["d", &announcement.name_tag])];
    let mut kinds = announcement.kinds.clone();
    kinds.sort_unstable();
    kinds.dedup();
    rows.extend(kinds.iter().map(|kind| row(&["k", &kind.to_string()])));
    rows.extend(announcement.skills.iter().map(|skill| row(&["t", skill])));
    if let Some((backend, report)) = &announcement.sandbox {
        rows.push(row(&["sandbox", backend, report]));
    }
    if let Some(at) = announcement.expiration {
        rows.push(row(&["expiration", &at.to_string()]));
    }
    let mut content = Map::new();
    let texts = [
        ("name", Some(&announcement.name)),
        ("about", Some(&announcement.about)),
        ("picture", announcement.picture.as_ref()),
        ("website", announcement.website.as_ref()),
    ];
    for (key, text) in texts {
        if let Some(text) = text {
            content.insert(key.to_owned(), Value::from(text.as_str()));
        }
    }
    if !announcement.caveats.is_empty() {
        content.insert("caveats".to_owned(), Value::from(announcement.caveats.clone()));
    }
    // Clients look for one name or the other.
    for key in ["encryptionSupported", "supportsEncryption"] {
        content.insert(key.to_owned(), Value::Bool(true));
    }
    tags::unsigned(keys, KIND, rows, Value::Object(content).to_string(), now_s)
}

/// The two events that take an announcement back, in the order to send them: a replacement that serves no
/// kind (for relays that ignore deletions), then the deletion (kind 5) of every version.
///
/// `last` is the announcement in force, its id and `created_at`; without it only the address is deleted.
/// Both events are dated after it, because a relay keeps the newer one.
pub fn withdrawal(
    name_tag: &str,
    last: Option<(EventId, u64)>,
    keys: &Keys,
    now_s: u64,
) -> [UnsignedEvent; 2] {
    let at = last.map_or(now_s, |(_, created_at)| now_s.max(created_at.saturating_add(1)));
    let offline = Value::Object(Map::from_iter([("about".to_owned(), Value::from("offline"))])).to_string();
    let replacement = tags::unsigned(keys, KIND, vec![row(&["d", name_tag])], offline, at);

    let address = format!("{KIND}:{}:{name_tag}", keys.public_key().to_hex());
    let mut rows = vec![row(&["a", &address]), row(&["k", &KIND.to_string()])];
    rows.extend(last.map(|(id, _)| row(&["e", &id.to_hex()])));
    let deletion = tags::unsigned(keys, 5, rows, "offline".to_owned(), at);
    [replacement, deletion]
}
