//! Decoding a job request (kind 5000–5999) leniently and safely. What the request *orders* (repository,
//! commands, limits) is read from it by `order.rs`; the customer's side builds one with [`Draft`].
//!
//! Lenient: misspelt and malformed tags seen on the wire are mended or passed over. Safe: everything is
//! counted and capped first, nothing is cut that would change its meaning, and nothing panics.

use nostr_sdk::prelude::{Event, EventId, Keys, PublicKey};

use super::code::Code;
use super::tags::{self, Row};
use super::{Scheme, encryption};

pub use super::cancel::{Cancel, cancel};
pub use super::draft::Draft;

/// Tags that are looked at; an event with more is refused.
pub const MAX_TAGS: usize = 2_048;
/// Bytes of all tag values and the content together; of the decrypted tags again.
pub const MAX_BYTES: usize = 512 * 1024;
pub const MAX_INPUTS: usize = 64;
pub const MAX_PARAMS: usize = 512;
/// A param's key, in bytes.
pub const MAX_KEY_BYTES: usize = 128;
/// Relays to answer on; further ones are passed over.
pub const MAX_RELAYS: usize = 16;
const MAX_RELAY_BYTES: usize = 512;
/// Wanted providers; further ones are passed over.
pub const MAX_PROVIDERS: usize = 64;

/// The tags that encryption moves into the ciphertext.
const MOVED: [&str; 5] = ["i", "param", "output", "relays", "bid"];

/// A decoded job request. Everything in it comes from a stranger, capped but not believed.
#[derive(Debug, Clone)]
pub struct Request {
    pub id: EventId,
    pub customer: PublicKey,
    pub kind: u16,
    /// Unix seconds, the customer's clock.
    pub created_at: u64,
    pub inputs: Vec<Input>,
    /// `param` tags in order; the first value of each is the key's value, more are kept.
    pub params: Vec<(String, Vec<String>)>,
    pub output: Option<String>,
    /// The customer's maximum, millisatoshi; the smallest of several.
    pub bid_msat: Option<u64>,
    /// Where to answer, as written; not yet checked.
    pub relays: Vec<String>,
    /// `p` tags: the providers asked for.
    pub providers: Vec<PublicKey>,
    /// NIP-40, Unix seconds.
    pub expiration: Option<u64>,
    /// Set when inputs and params came encrypted; the answer uses the same scheme.
    pub encryption: Option<Scheme>,
    /// The event itself, for the `request` echo and the proof.
    pub event: Event,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    pub data: String,
    pub kind: InputKind,
    pub relay: Option<String>,
    pub marker: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputKind {
    Url,
    Event,
    Job,
    Text,
}

/// Why an event is no request that we can read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("kind {kind} is no job request")]
    NotARequest { kind: u16 },
    /// Encrypted to another provider: none of our business.
    #[error("the request is encrypted to another provider")]
    NotForUs,
    #[error("the request cannot be decrypted: {why}")]
    Undecryptable { why: String },
    /// `cap` counts bytes or items, as `what` says.
    #[error("the request has more than {cap} {what}")]
    TooLarge { what: &'static str, cap: usize },
    /// The text leaves `value` out: it may be told in plain about a request that was encrypted.
    #[error("the request's {what} cannot be read")]
    Malformed { what: &'static str, value: String },
}

impl Error {
    /// The code to answer with, if the request is to be answered at all.
    pub fn code(&self) -> Code {
        match self {
            Self::Undecryptable { .. } => Code::Undecryptable,
            Self::NotARequest { .. } => Code::Unsupported,
            Self::NotForUs => Code::NotForUs,
            Self::TooLarge { .. } | Self::Malformed { .. } => Code::InvalidInput,
        }
    }
}

/// Whether a kind is in the range of job requests.
pub fn is_request_kind(kind: u16) -> bool {
    (5000..=5999).contains(&kind)
}

/// Whether an event asks for this provider, without decoding it: `p` tags are never encrypted.
pub fn asks_for(event: &Event, provider: &PublicKey) -> bool {
    asked(event).any(|key| key == *provider)
}

/// The keys of the `p` tags.
pub(super) fn asked(event: &Event) -> impl Iterator<Item = PublicKey> {
    let rows = tags::rows(event).filter(|row| tags::name(row) == "p").take(MAX_PROVIDERS);
    rows.filter_map(|row| tags::public_key(tags::value(row, 1)?))
}

impl Request {
    /// Reads a request that is plain, or encrypted to `keys`. The signature is the caller's to check.
    pub fn decode(event: &Event, keys: &Keys) -> Result<Self, Error> {
        Self::read(event, || {
            if asks_for(event, &keys.public_key()) {
                open(event, keys, &event.pubkey)
            } else {
                Err(Error::NotForUs)
            }
        })
    }

    /// Reads a request as anybody can: an encrypted one is [`Error::NotForUs`].
    pub fn decode_plain(event: &Event) -> Result<Self, Error> {
        Self::read(event, || Err(Error::NotForUs))
    }

    /// Reads the customer's own request: both sides of the encryption share one key.
    pub fn decode_own(event: &Event, keys: &Keys) -> Result<Self, Error> {
        Self::read(event, || {
            let provider = asked(event).next().filter(|_| event.pubkey == keys.public_key());
            open(event, keys, &provider.ok_or(Error::NotForUs)?)
        })
    }

    fn read(event: &Event, open: impl FnOnce() -> Result<Opened, Error>) -> Result<Self, Error> {
        let kind = event.kind.as_u16();
        if !is_request_kind(kind) {
            return Err(Error::NotARequest { kind });
        }
        let plain: Vec<&[String]> = tags::rows(event).take(MAX_TAGS + 1).collect();
        check_size(&plain, event.content.len())?;

        let (hidden, encryption) = if plain.iter().any(|row| tags::name(row) == "encrypted") {
            let (rows, scheme) = open()?;
            (rows, Some(scheme))
        } else {
            (Vec::new(), None)
        };
        let hidden: Vec<&[String]> = hidden.iter().map(Vec::as_slice).collect();
        check_size(&hidden, 0)?;

        let mut reader = Reader::default();
        for row in &hidden {
            reader.read(row)?;
        }
        // What the ciphertext says counts; its plain twin may be a decoy or a leftover.
        let is_hidden = |name: &str| hidden.iter().any(|row| tags::name(row) == name);
        let shadowed: Vec<&str> = MOVED.into_iter().filter(|name| is_hidden(name)).collect();
        for row in plain.iter().filter(|row| !shadowed.contains(&tags::name(row))) {
            reader.read(row)?;
        }

        Ok(Self {
            id: event.id,
            customer: event.pubkey,
            kind,
            created_at: event.created_at.as_secs(),
            bid_msat: reader.bid()?,
            inputs: reader.inputs,
            params: reader.params,
            output: reader.output,
            relays: reader.relays,
            providers: reader.providers,
            expiration: reader.expiration,
            encryption,
            event: event.clone(),
        })
    }

    /// Whether the request's NIP-40 time has come.
    pub fn is_expired(&self, now_s: u64) -> bool {
        self.expiration.is_some_and(|expiration| expiration <= now_s)
    }

    /// Whether the customer asked for this provider by name.
    pub fn is_targeted(&self, provider: &PublicKey) -> bool {
        self.providers.contains(provider)
    }

    /// The first value of the first param with this key.
    pub fn param(&self, key: &str) -> Option<&str> {
        let (_, values) = self.params.iter().find(|(name, _)| name == key)?;
        values.first().map(String::as_str)
    }

    /// Kind of the result that answers this request.
    pub fn result_kind(&self) -> u16 {
        self.kind + super::RESULT_OFFSET
    }
}

fn check_size(rows: &[&[String]], content: usize) -> Result<(), Error> {
    if rows.len() > MAX_TAGS {
        return Err(Error::TooLarge { what: "tags", cap: MAX_TAGS });
    }
    let bytes = rows.iter().flat_map(|row| row.iter()).map(String::len).sum::<usize>() + content;
    if bytes > MAX_BYTES {
        return Err(Error::TooLarge { what: "bytes", cap: MAX_BYTES });
    }
    Ok(())
}

/// The tags found in the ciphertext, and its scheme.
type Opened = (Vec<Row>, Scheme);

fn open(event: &Event, keys: &Keys, peer: &PublicKey) -> Result<Opened, Error> {
    let (json, scheme) = encryption::decrypt(keys, peer, &event.content)
        .map_err(|error| Error::Undecryptable { why: error.to_string() })?;
    let rows = tags::parse_rows(&json)
        .ok_or_else(|| Error::Undecryptable { why: "the plain text is no JSON array of tags".into() })?;
    Ok((rows, scheme))
}

#[derive(Default)]
struct Reader {
    inputs: Vec<Input>,
    params: Vec<(String, Vec<String>)>,
    output: Option<String>,
    bids: Vec<u64>,
    bad_bid: Option<String>,
    relays: Vec<String>,
    providers: Vec<PublicKey>,
    expiration: Option<u64>,
}

impl Reader {
    fn read(&mut self, row: &[String]) -> Result<(), Error> {
        match tags::name(row) {
            "i" => {
                self.inputs.extend(Input::read(row));
                if self.inputs.len() > MAX_INPUTS {
                    return Err(Error::TooLarge { what: "inputs", cap: MAX_INPUTS });
                }
            }
            "param" => self.param(row)?,
            "output" => {
                let mime = tags::value(row, 1).map(|mime| super::clip(mime, 256).to_owned());
                self.output = self.output.take().or(mime);
            }
            "bid" => match (tags::value(row, 1), tags::value(row, 1).and_then(tags::msat)) {
                (_, Some(msat)) => self.bids.push(msat),
                (Some(text), None) => self.bad_bid = Some(super::clip(text, 64).to_owned()),
                (None, None) => {}
            },
            "relays" => self.relays(row),
            "p" if self.providers.len() < MAX_PROVIDERS => {
                let key = tags::value(row, 1).and_then(tags::public_key);
                self.providers.extend(key.filter(|key| !self.providers.contains(key)));
            }
            "expiration" => {
                // Some write a time as a float.
                let whole = |text: &str| text.split_once('.').map_or(text, |(whole, _)| whole).to_owned();
                let at = tags::value(row, 1).and_then(|text| tags::digits(&whole(text)));
                self.expiration = [self.expiration, at].into_iter().flatten().min();
            }
            _ => {}
        }
        Ok(())
    }

    fn param(&mut self, row: &[String]) -> Result<(), Error> {
        let Some(key) = tags::value(row, 1) else { return Ok(()) };
        if key.len() > MAX_KEY_BYTES {
            return Err(Error::TooLarge { what: "bytes in the key of a param", cap: MAX_KEY_BYTES });
        }
        if self.params.len() == MAX_PARAMS {
            return Err(Error::TooLarge { what: "params", cap: MAX_PARAMS });
        }
        let values = row.iter().skip(2).cloned().collect();
        self.params.push((key.to_owned(), values));
        Ok(())
    }

    fn relays(&mut self, row: &[String]) {
        // From the name on: the URL may stand there.
        for url in row.iter().map(|text| text.trim()) {
            let fits = tags::is_relay_url(url) && url.len() <= MAX_RELAY_BYTES;
            if fits && self.relays.len() < MAX_RELAYS && !self.relays.iter().any(|known| known == url) {
                self.relays.push(url.to_owned());
            }
        }
    }

    /// Of several bids the smallest: the customer agreed to that in every reading. When none can be read,
    /// the customer named a limit that we do not know: no job.
    fn bid(&self) -> Result<Option<u64>, Error> {
        match (self.bids.iter().min(), &self.bad_bid) {
            (Some(msat), _) => Ok(Some(*msat)),
            (None, Some(text)) => Err(Error::Malformed { what: "bid", value: text.clone() }),
            (None, None) => Ok(None),
        }
    }
}

impl Input {
    /// `["i", data, type, relay?, marker?]`; the type is guessed when absent or unknown, and a marker is
    /// found in the relay's place, too.
    fn read(row: &[String]) -> Option<Self> {
        let data = row.get(1).filter(|data| !data.trim().is_empty())?.clone();
        let written = tags::value(row, 2).map(str::to_ascii_lowercase);
        let (kind, word) = match written.as_deref() {
            Some("url") => (InputKind::Url, None),
            Some("event") => (InputKind::Event, None),
            Some("job") => (InputKind::Job, None),
            Some("text") => (InputKind::Text, None),
            // Some customers write what the text is for (`prompt`) where its type belongs.
            word => (guess(&data), word.map(str::to_owned)),
        };
        // The first drafts of NIP-90 had marker and relay the other way round, and some leave the relay out.
        let relay =
            [3, 4].into_iter().filter_map(|n| tags::value(row, n)).find(|text| tags::is_relay_url(text));
        let mut words = [4, 3].into_iter().filter_map(|n| tags::value(row, n));
        let marker = words.find(|text| !tags::is_relay_url(text)).map(str::to_ascii_lowercase);
        let marker = marker.or(word).filter(|marker| marker.len() <= MAX_KEY_BYTES);
        Some(Self { data, kind, relay: relay.map(str::to_owned), marker })
    }
}

fn guess(data: &str) -> InputKind {
    let data = data.trim();
    let has_scheme = ["http://", "https://", "git://", "ssh://", "file://"]
        .iter()
        .any(|scheme| data.get(..scheme.len()).is_some_and(|head| head.eq_ignore_ascii_case(scheme)));
    if has_scheme && !data.contains(char::is_whitespace) { InputKind::Url } else { InputKind::Text }
}
