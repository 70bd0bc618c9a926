//! The bytes of the log: how a batch of records becomes a frame, how frames are chained, and how a segment
//! file begins. Pure functions; which file, when, and what a bad frame means for the log is `log.rs`'s.
//!
//! Frame, little-endian: magic 4 | head crc 4 | body crc 4 | length 4 | back 4 | seq 8 | at_ms 8 | previous
//! hash 32 | body (JSON array of records). The hash of a frame is the SHA-256 of all its bytes.

use sha2::{Digest, Sha256};

use super::money::Transfer;
use super::record::Record;

/// Bytes of a frame before its body.
pub(super) const HEADER_BYTES: usize = 68;
/// Bytes of a segment file before its first frame.
pub(super) const SEGMENT_HEADER_BYTES: usize = 64;
/// Largest body of one frame, bytes.
pub const BATCH_MAX_BYTES: usize = 8 * 1024 * 1024;
/// Most records in one batch.
pub const BATCH_MAX_RECORDS: usize = 4096;

/// Not UTF-8, so it cannot stand inside a body.
pub(super) const MAGIC: [u8; 4] = [0x89, b'c', b'o', b'p'];
const SEGMENT_MAGIC: [u8; 8] = *b"coinlog1";

/// SHA-256 of a frame, or all zero before the first.
pub(super) type Hash = [u8; 32];

/// A frame's header, checked against its own checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub body_crc: u32,
    /// Bytes of the body, 1 ..= [`BATCH_MAX_BYTES`].
    pub length: u32,
    /// Bytes from the first frame of the group that was written and synced together to this one.
    pub back: u32,
    /// From 1, without gaps.
    pub seq: u64,
    /// Unix milliseconds; within a segment never smaller than the frame before.
    pub at_ms: u64,
    pub previous: Hash,
}

/// What stands at the head of a segment file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    /// Seq of its first frame, which is also its file name.
    pub first_seq: u64,
    /// Hash of the frame before that one.
    pub previous: Hash,
}

/// Appends one frame to `out` and returns its hash.
pub(super) fn encode(
    out: &mut Vec<u8>,
    seq: u64,
    at_ms: u64,
    back: u32,
    previous: &Hash,
    body: &[u8],
) -> Hash {
    let start = out.len();
    // The caller has capped the body; a longer one would be refused when read.
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut rest = Vec::with_capacity(HEADER_BYTES - 8);
    rest.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    rest.extend_from_slice(&length.to_le_bytes());
    rest.extend_from_slice(&back.to_le_bytes());
    rest.extend_from_slice(&seq.to_le_bytes());
    rest.extend_from_slice(&at_ms.to_le_bytes());
    rest.extend_from_slice(previous);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&crc32fast::hash(&rest).to_le_bytes());
    out.extend_from_slice(&rest);
    out.extend_from_slice(body);
    out.get(start..).map(hash).unwrap_or_default()
}

/// SHA-256 over the bytes of a whole frame.
pub(super) fn hash(frame: &[u8]) -> Hash {
    Sha256::digest(frame).into()
}

/// Reads a header; the error says in a few words what is wrong with it.
pub(super) fn header(bytes: &[u8]) -> Result<Header, &'static str> {
    let bytes: &[u8; HEADER_BYTES] =
        bytes.get(..HEADER_BYTES).and_then(|b| b.try_into().ok()).ok_or("header cut short")?;
    if bytes[..4] != MAGIC {
        return Err("no frame begins here");
    }
    if crc32fast::hash(&bytes[8..]) != u32_at(bytes, 4) {
        return Err("checksum of the frame's header does not match");
    }
    let header = Header {
        body_crc: u32_at(bytes, 8),
        length: u32_at(bytes, 12),
        back: u32_at(bytes, 16),
        seq: u64_at(bytes, 20),
        at_ms: u64_at(bytes, 28),
        previous: hash_at(bytes, 36),
    };
    if header.length == 0 || header.length as usize > BATCH_MAX_BYTES {
        return Err("length out of bounds");
    }
    Ok(header)
}

/// True when `body` is what `header` was written for.
pub(super) fn body_matches(header: &Header, body: &[u8]) -> bool {
    body.len() == header.length as usize && crc32fast::hash(body) == header.body_crc
}

/// The records of a body whose checksum is known to be good.
pub(super) fn records(body: &[u8]) -> Result<Vec<Record>, serde_json::Error> {
    // A tag that may stand anywhere makes serde read a record twice. We write it first, and most of a ledger are
    // transfers alone in their batch; whatever else begins like one is read the long way.
    if body.starts_with(ALONE)
        && let Ok([transfer]) = serde_json::from_slice::<[Transfer; 1]>(body)
    {
        return Ok(vec![Record::Transfer(transfer)]);
    }
    serde_json::from_slice(body)
}

/// How a batch with a transfer at its head begins.
const ALONE: &[u8] = br#"[{"record":"transfer","#;

/// The bytes a new segment file begins with.
pub(super) fn segment_header(header: &SegmentHeader) -> [u8; SEGMENT_HEADER_BYTES] {
    let mut out = [0; SEGMENT_HEADER_BYTES];
    out[..8].copy_from_slice(&SEGMENT_MAGIC);
    out[8..16].copy_from_slice(&header.first_seq.to_le_bytes());
    out[16..48].copy_from_slice(&header.previous);
    let crc = crc32fast::hash(&out[..48]);
    out[48..52].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Why a segment's head does not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadHead {
    /// It carries the mark of a later format.
    Newer,
    /// In a few words.
    Damaged(&'static str),
}

/// Reads a segment's head. The rest of another format's head cannot be checked here.
pub(super) fn read_segment_header(bytes: &[u8]) -> Result<SegmentHeader, BadHead> {
    let bytes: &[u8; SEGMENT_HEADER_BYTES] = bytes
        .get(..SEGMENT_HEADER_BYTES)
        .and_then(|b| b.try_into().ok())
        .ok_or(BadHead::Damaged("segment header cut short"))?;
    if bytes[..7] != SEGMENT_MAGIC[..7] {
        return Err(BadHead::Damaged("not a segment of a coinop log"));
    }
    if bytes[7] != SEGMENT_MAGIC[7] {
        let newer = bytes[7].is_ascii_alphanumeric() && bytes[7] > SEGMENT_MAGIC[7];
        return Err(if newer { BadHead::Newer } else { BadHead::Damaged("no format of a coinop log") });
    }
    if crc32fast::hash(&bytes[..48]) != u32_at(bytes, 48) || bytes[52..] != [0; 12] {
        return Err(BadHead::Damaged("checksum of the segment's header does not match"));
    }
    Ok(SegmentHeader { first_seq: u64_at(bytes, 8), previous: hash_at(bytes, 16) })
}

/// Fixed-size reads; every caller passes a constant offset inside `N`.
fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn hash_at<const N: usize>(bytes: &[u8; N], at: usize) -> Hash {
    array_at(bytes, at)
}

fn array_at<const N: usize, const M: usize>(bytes: &[u8; N], at: usize) -> [u8; M] {
    let mut out = [0; M];
    out.copy_from_slice(&bytes[at..at + M]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_reads_back_as_written() {
        let mut out = Vec::new();
        let hash = encode(&mut out, 7, 99, 12, &[3; 32], b"[]");
        let header = header(&out).unwrap();
        assert_eq!((header.seq, header.at_ms, header.back, header.previous), (7, 99, 12, [3; 32]));
        assert!(body_matches(&header, &out[HEADER_BYTES..]));
        assert_eq!(hash, super::hash(&out));
    }

    #[test]
    fn every_flipped_bit_of_a_frame_is_noticed() {
        let mut good = Vec::new();
        let hash = encode(&mut good, 1, 2, 0, &[0; 32], b"[{\"record\":\"x\"}]");
        for at in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[at / 8] ^= 1 << (at % 8);
            let seen = header(&bad).is_ok_and(|h| body_matches(&h, &bad[HEADER_BYTES..]));
            assert!(!seen && super::hash(&bad) != hash, "bit {at} went unseen");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_segment_header_is_noticed() {
        let good = segment_header(&SegmentHeader { first_seq: 5, previous: [9; 32] });
        assert_eq!(read_segment_header(&good), Ok(SegmentHeader { first_seq: 5, previous: [9; 32] }));
        for at in 0..good.len() * 8 {
            let mut bad = good;
            bad[at / 8] ^= 1 << (at % 8);
            assert!(read_segment_header(&bad).is_err(), "bit {at} went unseen");
        }
        let mut newer = good;
        newer[7] = b'2';
        assert_eq!(read_segment_header(&newer), Err(BadHead::Newer));
    }
}
