//! The books against power cuts: 64 tills sell at once, each acknowledged transfer is told outside the disk, and the
//! power goes at a moment of chance. Afterwards every transfer that was told is there, once, and the books add up.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::Path;

use coinop::ledger::{self, Committed, Error, Ledger, transfer};
use coinop::store::money::{About, Account, Transfer};
use coinop::store::record::Record;
use coinop::store::{Holder, Options, Store};

use super::disk::Disk;
use super::skip::skip;
use super::{accepted, at, child, closing, id, now_ns, order, say};

/// Tasks that write at the same time, each with a customer of its own.
const TILLS: u64 = 64;
/// Msat that a sale gives its customer first.
const GRANTED: u64 = 10_000;
/// Msat that it holds of them.
const HELD: u64 = 4_000;

fn open(dir: &Path) -> Store {
    // A group of 64 does not fill a segment, and a round fills several.
    let locks = Some(std::env::temp_dir());
    let options = Options { segment_bytes: 256 * 1024, key_locks: locks, ..Options::default() };
    let key: String = dir.to_string_lossy().chars().filter(char::is_ascii_alphanumeric).collect();
    Store::open_with(dir, &Holder::new(format!("books{key}")), options).unwrap()
}

/// The three batches of the sale `n`, and the transfer in each.
fn sale(n: u64) -> [(Transfer, Vec<Record>); 3] {
    let (job, customer) = (id(n), id(1 + n % TILLS));
    let about = About { customer: customer.clone(), skill: "code".into(), ..About::default() };
    let revenue = Account::Revenue { skill: "code".into(), place: "local".into() };
    let grant = transfer::grant(&n.to_string(), &customer, GRANTED, "");
    let hold = transfer::hold(&job, &customer, HELD, 0, u64::MAX);
    let capture = transfer::capture(&job, HELD, price(n), &[(revenue, 1)], about);
    let taken = vec![accepted(n), Record::Transfer(hold.clone())];
    let mut ended = closing(n);
    ended.push(Record::Transfer(capture.clone()));
    [(grant.clone(), vec![Record::Transfer(grant)]), (hold, taken), (capture, ended)]
}

/// Never nothing, and often the whole hold.
fn price(n: u64) -> u64 {
    1 + n % HELD
}

/// The writer: sells until the disk goes away, and tells each transfer once it is durable, with the time.
pub fn tills(dir: &Path, start: u64) {
    let books = Ledger::new(open(dir));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        let lanes = (0..TILLS).map(|lane| {
            let books = books.clone();
            tokio::spawn(async move {
                for n in (start + lane..).step_by(TILLS as usize) {
                    for (transfer, batch) in sale(n) {
                        // Asked for twice at the same time: one of the two makes it.
                        let (one, two) = tokio::join!(books.commit(batch.clone()), books.commit(batch));
                        match (one, two) {
                            (Ok(Committed::New(_)), Ok(Committed::Again(_))) => {
                                say(format!("AT {} {}", now_ns(), transfer.id));
                            }
                            (Err(Error::Store(_)), _) | (_, Err(Error::Store(_))) => return,
                            other => return say(format!("WRONG {} {other:?}", transfer.id)),
                        }
                    }
                }
            })
        });
        for lane in lanes.collect::<Vec<_>>() {
            lane.await.unwrap();
        }
    });
}

/// Opens what the cut left behind and holds it against what was told before it.
fn judge(dir: &Path, told: &BTreeMap<String, u64>) {
    let store = open(dir);
    for (id, n) in told {
        let posted = store.transfer(id).unwrap().unwrap_or_else(|| panic!("lost {id}"));
        assert!(sale(*n).iter().any(|(transfer, _)| *transfer == posted.transfer), "{posted:?}");
    }
    // The rules are asked again of every entry, an id that comes twice breaks one, and the index says the same.
    let verified = ledger::verify(&store).unwrap();
    assert_eq!((verified.sum_msat, verified.head.seq), (0, store.head().seq));
    assert_eq!(ledger::verify_log(dir).unwrap(), verified);
    for hold in store.holds().unwrap() {
        let row = store.job(&hold.job).unwrap().expect("a hold comes with its job");
        assert!(row.state.is_open(), "ended and not captured: {row:?}");
    }

    // What was told is not made a second time when it is asked for again, and what was not may still be.
    let books = Ledger::new(store.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let sales: BTreeSet<u64> = told.values().rev().take(200).copied().collect();
    let before = verified.transfers;
    let mut made = 0;
    for n in &sales {
        for (transfer, batch) in sale(*n) {
            match runtime.block_on(books.commit(batch)).unwrap() {
                Committed::New(_) => {
                    assert!(!told.contains_key(&transfer.id), "made twice: {}", transfer.id);
                    made += 1;
                }
                Committed::Again(seq) => assert_eq!(store.transfer(&transfer.id).unwrap().unwrap().seq, seq),
            }
        }
        assert_eq!(store.hold(&id(*n)).unwrap(), None);
    }
    let verified = ledger::verify(&store).unwrap();
    assert_eq!((verified.transfers, verified.sum_msat), (before + made, 0));
    store.close().unwrap();
}

#[test]
fn a_power_cut_loses_no_transfer_that_was_acknowledged_and_makes_none_twice() {
    const NAME: &str = "a_power_cut_loses_no_transfer_that_was_acknowledged_and_makes_none_twice";
    let (mut rounds, mut transfers, mut late) = (0, 0, 0);
    // On each disk the first cut meets fresh books, the others aged ones.
    for _ in 0..2 {
        let mut disk = match Disk::ext4(96 << 20) {
            Ok(disk) => disk,
            Err(why) => return skip(NAME, &why),
        };
        let dir = disk.at().join("data");
        let mut told = BTreeMap::new();
        for round in 0..4_u64 {
            let mut child = child(&[], &order("tills", round * 1_000_000, &dir));
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let mut heard = Vec::new();
            let wanted = 1 + (now_ns() / 1_000) as usize % 2_500;
            while heard.len() < wanted {
                let line = lines.next().expect("the writer goes on").unwrap();
                assert!(!line.starts_with("@WRONG"), "{line}");
                heard.extend(at(&line));
            }
            let cut_ns = now_ns();
            disk.cut_power();
            // What the writer heard from a disk without power, nobody was told: see `main`.
            for line in lines.map(Result::unwrap) {
                assert!(!line.starts_with("@WRONG"), "{line}");
                heard.extend(at(&line));
            }
            child.wait().unwrap();
            let before = heard.len();
            heard.retain(|(ns, _)| *ns < cut_ns);
            late += before - heard.len();
            told.extend(heard.into_iter().map(|(_, id)| {
                let n = nth(&id);
                (id, n)
            }));
            disk.unmount();
            disk.mount().unwrap();
            judge(&dir, &told);
            rounds += 1;
        }
        transfers += told.len();
        disk.unmount();
    }
    eprintln!("{rounds} cuts, {transfers} transfers acknowledged before one; {late} during one do not count");
    assert_eq!(rounds, 8);
}

/// The sale that a transfer is of.
fn nth(transfer: &str) -> u64 {
    match transfer.split_once(':').unwrap() {
        ("grant", n) => n.parse().unwrap(),
        (_, job) => u64::from_str_radix(job, 16).unwrap(),
    }
}
