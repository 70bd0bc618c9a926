//! Which keys may be in the database, in little memory: most ids that a node is asked for are new, and asking the database
//! for each costs a page. What is said not to be there is not; which keys are put in is the caller's to see to.

use std::sync::atomic::{AtomicU64, Ordering};

use super::shelf::Tree;

/// A Bloom filter in blocks (Putze, Sanders, Singler 2007): all bits of a key are in one line of the cache. Any number of
/// threads may ask while one adds.
pub(super) struct Seen {
    lines: Vec<Line>,
}

type Line = [AtomicU64; LINE_WORDS];
const LINE_WORDS: usize = 8;
/// Bits of a key.
const BITS: u32 = 7;

// === impl Seen

impl Seen {
    /// `lines` of 64 bytes, a power of two.
    pub(super) fn new(lines: usize) -> Self {
        // That of a rebuild has 16 MiB, and goes back to the system afterwards: the allocator does so with what is larger
        // than 32. What is not written to takes no memory.
        let mut all = Vec::with_capacity(lines * 2 + 1);
        all.resize_with(lines, Line::default);
        Seen { lines: all }
    }

    /// The line of a key, and its bits in it.
    fn place(&self, tree: Tree, key: &[u8]) -> Option<(&Line, [u64; LINE_WORDS])> {
        let hash = hash(tree, key);
        let mut bits = [0; LINE_WORDS];
        let mut spread = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for _ in 0..BITS {
            if let Some(word) = bits.get_mut((spread & 7) as usize) {
                *word |= 1 << ((spread >> 3) & 63);
            }
            spread >>= 9;
        }
        let line = self.lines.get((hash >> 32) as usize % self.lines.len().max(1))?;
        Some((line, bits))
    }

    pub(super) fn add(&self, tree: Tree, key: &[u8]) {
        let Some((line, bits)) = self.place(tree, key) else { return };
        for (word, bit) in line.iter().zip(bits) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    pub(super) fn may_have(&self, tree: Tree, key: &[u8]) -> bool {
        let Some((line, bits)) = self.place(tree, key) else { return true };
        line.iter().zip(bits).all(|(word, bit)| word.load(Ordering::Relaxed) & bit == bit)
    }

    /// The lines that have anything, each behind its number.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (nth, line) in (0_u32..).zip(&self.lines) {
            let words = line.each_ref().map(|word| word.load(Ordering::Relaxed));
            if words != [0; LINE_WORDS] {
                out.extend_from_slice(&nth.to_le_bytes());
                words.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
            }
        }
        out
    }

    /// `None`: not what a filter of so many lines has written.
    pub(super) fn read(bytes: &[u8], lines: usize) -> Option<Seen> {
        let seen = Seen::new(lines);
        let (found, rest) = bytes.as_chunks::<{ 4 + LINE_WORDS * 8 }>();
        for found in found {
            let (nth, words) = found.split_first_chunk()?;
            let line = seen.lines.get(u32::from_le_bytes(*nth) as usize)?;
            for (to, word) in line.iter().zip(words.as_chunks().0) {
                to.store(u64::from_le_bytes(*word), Ordering::Relaxed);
            }
        }
        rest.is_empty().then_some(seen)
    }
}

/// The same in every version of this program, for the filter outlives it. Who makes names that collide makes look-ups
/// slower, no more.
fn hash(tree: Tree, key: &[u8]) -> u64 {
    let mix = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    let (words, rest) = key.as_chunks();
    let mut last = [0; 8];
    last.iter_mut().zip(rest).for_each(|(to, byte)| *to = *byte);
    let words = words.iter().chain([&last]).map(|word| u64::from_le_bytes(*word));
    // The end of it is SplitMix64's.
    let hash = words.fold(mix(tree as u64, key.len() as u64), mix);
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> impl Iterator<Item = [u8; 4]> {
        (0..10_000_u32).map(u32::to_be_bytes)
    }

    #[test]
    fn what_was_added_may_be_there_and_almost_nothing_else() {
        let seen = Seen::new(1 << 12);
        keys().for_each(|key| seen.add(Tree::Jobs, &key));
        let read = Seen::read(&seen.to_bytes(), 1 << 12).unwrap();
        for seen in [&seen, &read] {
            assert!(keys().all(|key| seen.may_have(Tree::Jobs, &key)));
            let strays = keys().filter(|key| seen.may_have(Tree::Events, key)).count();
            assert!(strays < 20, "{strays}");
        }
        assert!(Seen::read(&seen.to_bytes(), 1 << 11).is_none(), "lines that are not there");
        assert!(Seen::read(&seen.to_bytes()[1..], 1 << 12).is_none(), "cut short");
        assert!(Seen::new(1 << 12).to_bytes().is_empty());
    }
}
