//! What a start makes of a log that is not as it was written: damage is named and refused, a half-written group
//! is cut off, a bad index is made again. And the bytes of the log are those of `docs/store.md`.

mod store_house;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use coinop::ledger::{Committed, Ledger, transfer};
use coinop::store::record::Record;
use coinop::store::{Error, Store};
use store_house::{House, accepted, id};

/// The segment files, oldest first.
fn log(house: &House) -> Vec<PathBuf> {
    let mut files: Vec<_> =
        fs::read_dir(house.data().join("log")).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    files
}

fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
}

#[test]
fn a_flipped_byte_is_named_by_segment_offset_and_seq_wherever_it_is() {
    let house = House::new();
    let store = house.try_open(house.small_segments()).unwrap();
    // Where each entry begins: a frame is 68 bytes and its JSON.
    let mut entries = vec![(log(&house)[0].clone(), 64)];
    for n in 0..25 {
        let before: Vec<_> = log(&house);
        store.append_blocking(vec![accepted(n)]).unwrap();
        let files = log(&house);
        let last = files.last().unwrap().clone();
        let (path, at) = entries.last().unwrap().clone();
        let opened = serde_json::to_vec(&vec![Record::Opened {
            node: id(9),
            version: env!("CARGO_PKG_VERSION").into(),
        }]);
        let previous = if n == 0 { opened.unwrap().len() as u64 + 68 } else { body_of(n - 1) };
        entries.push(if files.len() > before.len() { (last, 64) } else { (path, at + previous) });
    }
    store.close().unwrap();
    assert!(log(&house).len() >= 3, "the log has several segments");
    let last_segment = log(&house).last().unwrap().clone();
    for (nth, (path, at)) in entries.iter().enumerate() {
        for inside in [0, 5, 13, 25, 40, 68, 100] {
            flip(path, at + inside);
            let wanted = (path.clone(), *at, nth as u64 + 1);
            let look = Store::read_only(&house.data()).map(|_| ()).unwrap_err();
            match look {
                Error::Corrupt(d) => assert_eq!((d.segment, d.offset, d.seq), wanted, "byte {inside}"),
                e => panic!("entry {} byte {inside}: {e}", nth + 1),
            }
            // A start reads the last segment at least.
            if *path == last_segment {
                let e = house.try_open(house.small_segments()).map(|_| ()).unwrap_err();
                assert!(matches!(&e, Error::Corrupt(d) if d.seq == wanted.2), "{e}");
            }
            flip(path, at + inside);
        }
    }
    let store = house.try_open(house.small_segments()).unwrap();
    flip(&entries[3].0, entries[3].1 + 80);
    match store.verify().unwrap_err() {
        Error::Corrupt(d) => {
            assert_eq!((d.segment, d.offset, d.seq), (entries[3].0.clone(), entries[3].1, 4))
        }
        e => panic!("{e}"),
    }
}

fn body_of(n: u64) -> u64 {
    serde_json::to_vec(&vec![accepted(n)]).unwrap().len() as u64 + 68
}

#[test]
fn a_missing_or_foreign_segment_is_named() {
    let house = House::new();
    let store = house.try_open(house.small_segments()).unwrap();
    for n in 0..40 {
        store.append_blocking(vec![accepted(n)]).unwrap();
    }
    store.close().unwrap();
    let files = log(&house);
    let aside = house.dir.path().join("aside");
    for (nth, why) in [(0, "first segment"), (1, "are missing")] {
        fs::rename(&files[nth], &aside).unwrap();
        let e = Store::read_only(&house.data()).map(|_| ()).unwrap_err();
        assert!(matches!(&e, Error::Corrupt(d) if d.why.contains(why)), "{e}");
        fs::rename(&aside, &files[nth]).unwrap();
    }
    let last = files.last().unwrap();
    fs::rename(last, &aside).unwrap();
    let e = house.try_open(house.options()).map(|_| ()).unwrap_err();
    assert!(matches!(e, Error::Shortened { promised: 41, .. }), "{e}");
    let e = house.try_open(house.options()).map(|_| ()).unwrap_err();
    assert!(matches!(e, Error::Shortened { promised: 41, .. }), "it says so again at the next try: {e}");
}

#[test]
fn a_log_of_a_newer_format_is_not_called_damaged() {
    let house = House::new();
    let store = house.open();
    store.append_blocking(vec![accepted(0)]).unwrap();
    store.close().unwrap();
    let first = log(&house)[0].clone();
    fs::OpenOptions::new().write(true).open(&first).unwrap().write_all_at(b"2", 7).unwrap();
    for e in [
        Store::read_only(&house.data()).map(|_| ()).unwrap_err(),
        house.try_open(house.options()).map(|_| ()).unwrap_err(),
    ] {
        assert!(matches!(e, Error::Unreadable { .. }), "{e}");
        assert!(e.to_string().contains("install that version") && !e.to_string().contains("backup"), "{e}");
    }
}

#[test]
fn an_index_that_does_not_open_is_made_again() {
    let house = House::new();
    let store = house.open();
    for n in 0..50 {
        store.append_blocking(vec![accepted(n)]).unwrap();
    }
    let live = store.dump_index().unwrap();
    store.close().unwrap();
    let generation = fs::read_dir(house.data().join("index"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.is_dir())
        .unwrap();
    let db = generation.join("db");
    let size = fs::metadata(&db).unwrap().len() as usize;
    fs::write(&db, vec![0xA5; size]).unwrap();
    let store = house.open();
    assert!(store.was_rebuilt());
    assert_eq!(store.dump_index().unwrap(), live);
    store.close().unwrap();
    fs::remove_dir_all(house.data().join("index")).unwrap();
    let store = house.open();
    assert!(store.was_rebuilt());
    assert_eq!(store.dump_index().unwrap(), live);
}

#[tokio::test]
async fn a_bad_list_of_the_transfers_that_were_made_makes_none_of_them_new() {
    let house = House::new();
    let gifts: Vec<_> = (0..4).map(|n| transfer::grant(&n.to_string(), &id(n), 1_000, "")).collect();
    let store = house.open();
    for gift in &gifts {
        Ledger::new(store.clone()).post(gift.clone()).await.unwrap();
    }
    store.close().unwrap();
    let list = || {
        let names = fs::read_dir(house.data().join("index")).unwrap().map(|e| e.unwrap().path());
        let lists: Vec<_> = names.filter(|p| p.extension().is_some_and(|end| end == "seen")).collect();
        assert_eq!(lists.len(), 1, "{lists:?}");
        lists[0].clone()
    };
    let bytes = fs::metadata(list()).unwrap().len();
    assert!(bytes > 12, "it has something");
    let mut bad = 0;
    for at in (0..bytes).step_by(7).map(Some).chain([None]) {
        let store = house.open();
        assert!(!store.was_rebuilt(), "it is used when it is as it was written");
        store.close().unwrap();
        match at {
            Some(at) => flip(&list(), at),
            None => fs::remove_file(list()).unwrap(),
        }
        let store = house.open();
        assert!(store.was_rebuilt(), "byte {at:?}");
        bad += 1;
        for gift in &gifts {
            let again = Ledger::new(store.clone()).post(gift.clone()).await.unwrap();
            assert!(matches!(again, Committed::Again(_)), "{again:?}");
        }
        store.close().unwrap();
    }
    assert!(bad > 10, "{bad}");
}

/// The log as a node that died has left it: no marker that vouches for its end.
fn as_after_a_crash(house: &House) {
    fs::remove_dir_all(house.data().join("index")).unwrap();
}

/// One group of six batches behind two groups of one, as bytes, with where each frame begins.
fn a_group_at_the_end(house: &House) -> (Vec<u8>, Vec<usize>) {
    let store = house.open();
    store.append_blocking(vec![accepted(1)]).unwrap();
    let before = store.stats().syncs;
    for n in 2..7 {
        store.append_lazily(vec![accepted(n)]).unwrap();
    }
    store.append_blocking(vec![accepted(7)]).unwrap();
    assert_eq!(store.stats().syncs - before, 1, "one group");
    store.close().unwrap();
    let bytes = fs::read(&log(house)[0]).unwrap();
    let mut at = vec![64];
    while let Some(length) = bytes.get(at[at.len() - 1] + 12..at[at.len() - 1] + 16) {
        let length = u32::from_le_bytes(length.try_into().unwrap()) as usize;
        at.push(at[at.len() - 1] + 68 + length);
    }
    assert_eq!((at.len(), at[8]), (9, bytes.len()), "eight frames");
    (bytes, at)
}

/// Opens the log with these bytes: the seq of the last frame that was kept.
fn kept(house: &House, bytes: &[u8]) -> Result<u64, Error> {
    as_after_a_crash(house);
    fs::write(&log(house)[0], bytes).unwrap();
    let store = house.try_open(house.options())?;
    let seq = store.head().seq - 1;
    for n in 1..=7 {
        assert_eq!(store.job(&id(n)).unwrap().is_some(), n < seq, "job {n} of {seq} frames");
    }
    assert_eq!(store.verify().unwrap(), store.head());
    store.close().unwrap();
    Ok(seq)
}

#[test]
fn a_half_written_group_at_the_end_is_cut_off_and_all_before_it_stays() {
    let house = House::new();
    let (bytes, at) = a_group_at_the_end(&house);
    let whole = |cut: usize| at.iter().filter(|begin| **begin <= cut).count() as u64 - 1;
    for cut in
        (at[2]..bytes.len()).step_by(41).chain(at[2..8].iter().flat_map(|a| [*a, a + 1, a + 67, a + 68]))
    {
        assert_eq!(kept(&house, &bytes[..cut]).unwrap(), whole(cut), "the file ends at byte {cut}");
        let mut reserved = bytes[..cut].to_vec();
        reserved.resize(bytes.len() + 5000, 0);
        assert_eq!(kept(&house, &reserved).unwrap(), whole(cut), "zeros from byte {cut} on");
    }
    // A sector in the middle that never arrived takes everything after it with it: it is all one group.
    for sector in (at[2].div_ceil(512)..bytes.len() / 512).map(|s| s * 512) {
        let mut hole = bytes.clone();
        hole[sector..sector + 512].fill(0);
        let hit = at.iter().filter(|begin| **begin <= sector).count() as u64 - 1;
        let found = kept(&house, &hole).unwrap();
        assert!(found >= 2 && found <= hit, "sector at {sector}: {found} frames kept, {hit} begin before it");
    }
}

#[test]
fn a_bad_frame_before_a_later_group_is_damage_and_is_not_cut_off() {
    let house = House::new();
    let (bytes, at) = a_group_at_the_end(&house);
    // Frame 2 was a group of its own: with the group after it there, it had been acknowledged.
    for (from, to) in [(at[1], at[2]), (at[1], at[1] + 68), (at[1] + 68, at[2])] {
        let mut hole = bytes.clone();
        hole[from..to].fill(0);
        match kept(&house, &hole).unwrap_err() {
            Error::Corrupt(damage) => assert_eq!((damage.offset, damage.seq), (at[1] as u64, 2)),
            e => panic!("{e}"),
        }
        assert_eq!(fs::read(&log(&house)[0]).unwrap(), hole, "nothing was cut");
    }
}

#[test]
fn the_bytes_on_disk_are_those_of_the_document() {
    use sha2::{Digest, Sha256};
    let house = House::new();
    let (bytes, at) = a_group_at_the_end(&house);
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!(&bytes[..8], b"coinlog1");
    assert_eq!((u64_at(8), &bytes[16..48], u32_at(48)), (1, &[0; 32][..], crc32fast::hash(&bytes[..48])));
    assert_eq!(bytes[52..64], [0; 12]);
    assert_eq!(log(&house)[0].file_name().unwrap(), "00000000000000000001.log");
    let mut previous = vec![0; 32];
    for (nth, frame) in at.windows(2).enumerate() {
        let (from, to) = (frame[0], frame[1]);
        assert_eq!(bytes[from..from + 4], [0x89, 0x63, 0x6f, 0x70]);
        assert_eq!(u32_at(from + 4), crc32fast::hash(&bytes[from + 8..from + 68]));
        assert_eq!(u32_at(from + 8), crc32fast::hash(&bytes[from + 68..to]));
        let group = if nth < 2 { from } else { at[2] };
        assert_eq!(u32_at(from + 16) as usize, from - group);
        assert_eq!((u64_at(from + 20), u64_at(from + 28)), (nth as u64 + 1, 1_000));
        assert_eq!(bytes[from + 36..from + 68], previous);
        let records: Vec<Record> = serde_json::from_slice(&bytes[from + 68..to]).unwrap();
        assert_eq!(records.len(), 1);
        previous = Sha256::digest(&bytes[from..to]).to_vec();
    }
    let look = Store::read_only(&house.data()).unwrap();
    assert_eq!(look.head().hash, hex::encode(previous));
}
