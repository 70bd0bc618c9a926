//! How the index spells its keys and values: short and in order. The index holds places in the log and what
//! is needed to find them, never the texts themselves.

use sha2::{Digest, Sha256};

use super::Error;
use super::rows::JobState;

/// Place of one record in the log; ordered as the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// First seq of the segment.
    pub segment: u64,
    /// Byte in the segment at which the frame begins; a segment has at most 4 GiB.
    pub offset: u32,
    /// Which record of the batch.
    pub nth: u16,
}

/// What the index keeps of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StoredJob {
    pub state: JobState,
    pub accepted_ms: u64,
    pub updated_ms: u64,
    pub accepted: Place,
    /// The last attempt.
    pub started: Option<Place>,
    pub pinned: Option<Place>,
    pub closed: Option<Place>,
    /// The job's first records; later ones are in the history tree.
    pub history: Vec<Place>,
}

/// Records of a job that stand in its own row.
pub(super) const HISTORY_IN_ROW: usize = 32;

/// What the index keeps of an event of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StoredEvent {
    pub place: Place,
    pub give_up_ms: u64,
    pub job: Option<String>,
}

const HEX_ID: u8 = 0;
const OTHER: u8 = 1;

/// Appends the key of a name: 33 bytes for an id or key in hex, its length and bytes for anything else. No
/// key is the beginning of another.
fn push(key: &mut Vec<u8>, name: &str) {
    if let Some(id) = id(name) {
        key.push(HEX_ID);
        key.extend_from_slice(&id);
    } else {
        key.push(OTHER);
        // Names are parts of batches, which are far smaller than 4 GiB.
        key.extend_from_slice(&u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes());
        key.extend_from_slice(name.as_bytes());
    }
}

/// The 32 bytes of 64 lower-case hex digits. This is done several times a record, so it is done by a table.
fn id(name: &str) -> Option<[u8; 32]> {
    const NONE: u8 = 0xff;
    const DIGITS: [u8; 256] = {
        let mut digits = [NONE; 256];
        let mut n = 0;
        while n < 16 {
            digits[b"0123456789abcdef"[n] as usize] = n as u8;
            n += 1;
        }
        digits
    };
    let digits: &[u8; 64] = name.as_bytes().try_into().ok()?;
    let (mut id, mut all) = ([0; 32], 0);
    for (byte, pair) in id.iter_mut().zip(digits.as_chunks::<2>().0) {
        let [high, low] = pair.map(|digit| DIGITS.get(usize::from(digit)).copied().unwrap_or(NONE));
        *byte = (high << 4) | low;
        all |= high | low;
    }
    (all < 16).then_some(id)
}

pub(super) fn key(name: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(33);
    push(&mut key, name);
    key
}

pub(super) fn pair(first: &str, second: &str) -> Vec<u8> {
    let mut key = key(first);
    push(&mut key, second);
    key
}

/// Bytes of a place.
pub(super) const PLACE_BYTES: usize = 14;
/// Bytes of a short key.
pub(super) const SHORT_BYTES: usize = 16;

/// Half of a name's SHA-256: for trees with a row an entry of the books, where the name itself is never read back. Two
/// names that share it do not come about by chance, nor by less than 2^64 tries.
pub(super) fn short(name: &str) -> [u8; SHORT_BYTES] {
    let hash: [u8; 32] = Sha256::digest(name.as_bytes()).into();
    hash.first_chunk().copied().unwrap_or_default()
}

/// Keys of one state, oldest first.
pub(super) fn listed(state: JobState, accepted_ms: u64, place: Option<Place>) -> Vec<u8> {
    let mut key = vec![state as u8];
    key.extend_from_slice(&accepted_ms.to_be_bytes());
    if let Some(place) = place {
        place.write(&mut key);
    }
    key
}

/// One of the records of a job that do not stand in its row, or of the transfers of a customer.
pub(super) fn later(name: &str, place: Place) -> Vec<u8> {
    let mut key = Vec::with_capacity(SHORT_BYTES + 14);
    key.extend_from_slice(&short(name));
    place.write(&mut key);
    key
}

/// Reads what the functions above have written.
pub(super) struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        match self.0.split_first_chunk::<N>() {
            Some((head, rest)) => {
                self.0 = rest;
                Ok(*head)
            }
            None => Err(Error::Index { why: "a row is cut short".into() }),
        }
    }

    fn u8(&mut self) -> Result<u8, Error> {
        Ok(u8::from_be_bytes(self.take()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_be_bytes(self.take()?))
    }

    pub(super) fn name(&mut self) -> Result<String, Error> {
        if self.u8()? == HEX_ID {
            return Ok(hex::encode(self.take::<32>()?));
        }
        let length = u32::from_be_bytes(self.take()?) as usize;
        match self.0.split_at_checked(length) {
            Some((name, rest)) => {
                self.0 = rest;
                Ok(String::from_utf8_lossy(name).into_owned())
            }
            None => Err(Error::Index { why: "a key is cut short".into() }),
        }
    }

    pub(super) fn place(&mut self) -> Result<Place, Error> {
        Ok(Place {
            segment: self.u64()?,
            offset: u32::from_be_bytes(self.take()?),
            nth: u16::from_be_bytes(self.take()?),
        })
    }

    /// Segments are named from 1, so 0 is nothing.
    fn place_or_nothing(&mut self) -> Result<Option<Place>, Error> {
        Ok(Some(self.place()?).filter(|p| p.segment > 0))
    }
}

impl Place {
    const NOTHING: Place = Place { segment: 0, offset: 0, nth: 0 };

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.segment.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        out.extend_from_slice(&self.nth.to_be_bytes());
    }
}

impl StoredJob {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![self.state as u8];
        out.extend_from_slice(&self.accepted_ms.to_be_bytes());
        out.extend_from_slice(&self.updated_ms.to_be_bytes());
        self.accepted.write(&mut out);
        self.started.unwrap_or(Place::NOTHING).write(&mut out);
        self.pinned.unwrap_or(Place::NOTHING).write(&mut out);
        self.closed.unwrap_or(Place::NOTHING).write(&mut out);
        self.history.iter().for_each(|p| p.write(&mut out));
        out
    }

    pub(super) fn read(bytes: &[u8]) -> Result<Self, Error> {
        let mut bytes = Bytes(bytes);
        let state = bytes.u8()?;
        let state = JobState::ALL.into_iter().find(|s| *s as u8 == state);
        let mut row = StoredJob {
            state: state.ok_or_else(|| Error::Index { why: "a job in no known state".into() })?,
            accepted_ms: bytes.u64()?,
            updated_ms: bytes.u64()?,
            accepted: bytes.place()?,
            started: bytes.place_or_nothing()?,
            pinned: bytes.place_or_nothing()?,
            closed: bytes.place_or_nothing()?,
            history: Vec::new(),
        };
        while !bytes.0.is_empty() {
            row.history.push(bytes.place()?);
        }
        Ok(row)
    }
}

impl StoredEvent {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(56);
        self.place.write(&mut out);
        out.extend_from_slice(&self.give_up_ms.to_be_bytes());
        if let Some(job) = &self.job {
            push(&mut out, job);
        }
        out
    }

    pub(super) fn read(bytes: &[u8]) -> Result<Self, Error> {
        let mut bytes = Bytes(bytes);
        Ok(StoredEvent {
            place: bytes.place()?,
            give_up_ms: bytes.u64()?,
            job: if bytes.0.is_empty() { None } else { Some(bytes.name()?) },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_any_kind_read_back_and_none_begins_another() {
        let hex = "ab".repeat(32);
        for name in [hex.as_str(), &hex.to_uppercase(), "", "ws://a", "\0", "ab"] {
            let key = key(name);
            assert_eq!(Bytes(&key).name().unwrap(), name);
            assert!(!super::key(&format!("{name}x")).starts_with(&key));
        }
        assert_eq!(key(&hex).len(), 33);
    }

    #[test]
    fn rows_read_back_as_written() {
        let place = |n| Place { segment: n, offset: 7, nth: 3 };
        let mut job = StoredJob {
            state: JobState::Running,
            accepted_ms: 5,
            updated_ms: 6,
            accepted: place(1),
            started: Some(place(2)),
            pinned: Some(place(3)),
            closed: None,
            history: vec![place(1), place(2)],
        };
        assert_eq!(StoredJob::read(&job.to_bytes()).unwrap(), job);
        job.history.clear();
        assert_eq!(StoredJob::read(&job.to_bytes()).unwrap(), job);
        for job in [None, Some("x".to_owned())] {
            let event = StoredEvent { place: place(4), give_up_ms: 9, job };
            assert_eq!(StoredEvent::read(&event.to_bytes()).unwrap(), event);
        }
    }
}
