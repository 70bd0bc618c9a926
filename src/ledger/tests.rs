//! The rules of the books on a real store: what is let through, what is refused and why, and what is left of it after
//! a restart and a rebuild.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::transfer::{self, capture, grant, hold, paid, refund_begun, refund_failed, refund_paid, void};
use super::*;
use crate::store::money::{About, Leg, Why};
use crate::store::{Holder, Options};

mod locks;

const HOUR: u64 = 3_600_000;

struct House {
    dir: tempfile::TempDir,
}

impl House {
    fn new() -> House {
        House { dir: tempfile::tempdir().unwrap() }
    }

    /// With a clock that the test holds, and segments of so many bytes.
    fn open_at(&self, now: &Arc<AtomicU64>, segment_bytes: u64) -> Ledger {
        let now = Arc::clone(now);
        let clock = Arc::new(move || now.load(Ordering::Relaxed));
        self.open_with(Options { segment_bytes, clock, ..Options::default() })
    }

    fn open(&self) -> Ledger {
        self.open_with(Options::default())
    }

    fn open_with(&self, options: Options) -> Ledger {
        let locks = self.dir.path().join("locks");
        std::fs::create_dir_all(&locks).unwrap();
        let options = Options { key_locks: Some(locks), ..options };
        let store = Store::open_with(&self.dir.path().join("data"), &Holder::new("a".repeat(64)), options);
        Ledger::new(store.unwrap())
    }

    /// Ids and times of the transfers of a span.
    fn between(&self, from: u64, to: u64) -> Vec<(String, u64)> {
        let mut found = Vec::new();
        let mut visit = |entry: crate::store::Entry| {
            if let Record::Transfer(transfer) = entry.record {
                found.push((transfer.id, entry.at_ms));
            }
            Ok::<_, store::Error>(())
        };
        store::between(&self.dir.path().join("data"), from, to, "\"transfer\"", &mut visit).unwrap();
        found
    }
}

fn alice() -> String {
    "a1".repeat(32)
}

fn about() -> About {
    About { customer: alice(), skill: "code".into(), backend: "local".into(), ..About::default() }
}

fn revenue() -> Account {
    Account::Revenue { skill: "code".into(), place: "local".into() }
}

fn sum(ledger: &Ledger) -> i128 {
    ledger.store().balances().unwrap().iter().map(|(_, msat)| msat).sum()
}

#[tokio::test]
async fn a_job_is_held_captured_and_the_rest_returned() {
    let house = House::new();
    let ledger = house.open();
    ledger.post(paid("h1", "lnbits", Some(&alice()), 10_000)).await.unwrap();
    ledger.post(hold("j1", &alice(), 4_000, 0, 99)).await.unwrap();
    let purse = ledger.purse(&alice()).unwrap();
    assert_eq!((purse.available_msat, purse.held_msat), (6_000, 4_000));
    assert_eq!(ledger.hold("j1").unwrap().unwrap().expires_ms, 99);
    ledger.post(capture("j1", 4_000, 1_500, &[(revenue(), 1)], about())).await.unwrap();
    let purse = ledger.purse(&alice()).unwrap();
    assert_eq!((purse.available_msat, purse.held_msat), (8_500, 0));
    assert_eq!(ledger.balance(&revenue()).unwrap(), -1_500);
    assert_eq!(ledger.balance(&Account::Wallet("lnbits".into())).unwrap(), 10_000);
    assert_eq!((ledger.hold("j1").unwrap(), sum(&ledger)), (None, 0));
    assert_eq!(verify(ledger.store()).unwrap().transfers, 3);
}

#[tokio::test]
async fn asking_twice_is_one_transfer_and_another_body_under_its_id_is_an_error() {
    let house = House::new();
    let ledger = house.open();
    let first = ledger.post(grant("g", &alice(), 100, "hello")).await.unwrap();
    let Committed::New(seq) = first else { panic!("{first:?}") };
    assert_eq!(ledger.post(grant("g", &alice(), 100, "hello")).await.unwrap(), Committed::Again(seq));
    let conflict = ledger.post(grant("g", &alice(), 101, "hello")).await.unwrap_err();
    assert!(matches!(conflict, Error::Conflict { .. }), "{conflict}");
    assert_eq!(ledger.purse(&alice()).unwrap().available_msat, 100);
}

#[tokio::test]
async fn a_hold_is_resolved_once_and_wholly() {
    let house = House::new();
    let ledger = house.open();
    ledger.post(grant("g", &alice(), 1_000, "")).await.unwrap();
    ledger.post(hold("j", &alice(), 1_000, 0, 0)).await.unwrap();
    let again = Transfer { id: "hold:j".into(), ..hold("j", &alice(), 1, 0, 0) };
    assert!(matches!(ledger.post(again).await, Err(Error::Conflict { .. })));
    let short = capture("j", 900, 5, &[(revenue(), 1)], about());
    assert!(matches!(ledger.post(short).await, Err(Error::NotTheHold { held_msat: 1_000, .. })));
    let bob = About { customer: "b2".repeat(32), ..about() };
    assert!(ledger.post(capture("j", 1_000, 5, &[(revenue(), 1)], bob)).await.is_err());
    ledger.post(void("j", &alice(), 1_000, "cancelled")).await.unwrap();
    let late = ledger.post(capture("j", 1_000, 5, &[(revenue(), 1)], about())).await;
    assert!(matches!(late, Err(Error::Conflict { .. })), "{late:?}");
    let never = ledger.post(void("k", &alice(), 1, "")).await;
    assert!(matches!(never, Err(Error::NoHold { resolved: false, .. })), "{never:?}");
    assert_eq!(ledger.purse(&alice()).unwrap().available_msat, 1_000);
}

#[tokio::test]
async fn nobody_spends_more_than_is_there_however_many_ask_at_once() {
    let house = House::new();
    let ledger = house.open();
    ledger.post(grant("g", &alice(), 1_000, "")).await.unwrap();
    let asks = (0..64).map(|n| {
        let ledger = ledger.clone();
        tokio::spawn(async move { ledger.post(hold(&format!("j{n}"), &alice(), 100, 0, 0)).await })
    });
    let (mut taken, mut refused) = (0, 0);
    for ask in asks.collect::<Vec<_>>() {
        match ask.await.unwrap() {
            Ok(_) => taken += 1,
            Err(Error::Insufficient { wanted_msat: 100, available_msat }) if available_msat < 100 => {
                refused += 1
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!((taken, refused), (10, 54));
    assert_eq!(ledger.purse(&alice()).unwrap().available_msat, 0);
    assert!(ledger.pending().is_small(), "what has arrived is not kept");
    verify(ledger.store()).unwrap();
}

#[tokio::test]
async fn what_is_too_large_for_the_log_leaves_the_books_as_they_were() {
    let house = House::new();
    let ledger = house.open();
    ledger.post(grant("g", &alice(), 1_000, "")).await.unwrap();
    let long = Record::Cursor { relay: "x".repeat(store::BATCH_MAX_BYTES), until: 1 };
    let batch = vec![Record::Transfer(hold("j", &alice(), 400, 0, 0)), long];
    let refused = ledger.commit(batch).await;
    assert!(matches!(refused, Err(Error::Store(store::Error::TooLarge { .. }))), "{refused:?}");
    assert_eq!(ledger.purse(&alice()).unwrap().available_msat, 1_000);
    assert_eq!(ledger.hold("j").unwrap(), None);
    ledger.post(hold("j", &alice(), 1_000, 0, 0)).await.unwrap();
}

#[tokio::test]
async fn more_balances_than_are_kept_in_mind_are_still_the_ones_in_the_books() {
    let house = House::new();
    let ledger = house.open();
    let customer = |n: u64| format!("{n:064x}");
    // One after the other twice, so that the first are forgotten and asked for again.
    for n in (0..5_000).chain(0..5_000) {
        let batch =
            (0..2).map(|k| grant(&format!("{n}.{k}.{}", ledger.store().head().seq), &customer(n), 10, ""));
        ledger.commit(batch.map(Record::Transfer).collect()).await.unwrap();
    }
    for n in [0, 1, 4_095, 4_096, 4_999] {
        assert_eq!(ledger.purse(&customer(n)).unwrap().available_msat, 40);
    }
    assert_eq!(ledger.store().balance(&Account::Grants).unwrap(), 200_000);
    verify(ledger.store()).unwrap();
}

#[tokio::test]
async fn the_same_transfer_asked_for_many_times_at_once_is_made_once() {
    let house = House::new();
    let ledger = house.open();
    let asks: Vec<_> = (0..32)
        .map(|_| {
            let ledger = ledger.clone();
            tokio::spawn(async move { ledger.post(paid("h", "w", Some(&alice()), 7)).await.unwrap() })
        })
        .collect();
    let mut new = 0;
    for ask in asks {
        new += usize::from(matches!(ask.await.unwrap(), Committed::New(_)));
    }
    assert_eq!(new, 1);
    assert_eq!(ledger.purse(&alice()).unwrap().available_msat, 7);
}

#[tokio::test]
async fn a_credit_line_is_as_long_as_it_is() {
    let house = House::new();
    let ledger = house.open();
    ledger.post(hold("j", &alice(), 300, 500, 0)).await.unwrap();
    let over = ledger.post(hold("k", &alice(), 201, 500, 0)).await;
    assert!(matches!(over, Err(Error::Insufficient { available_msat: 200, wanted_msat: 201 })), "{over:?}");
    ledger.post(capture("j", 300, 300, &[(revenue(), 1)], about())).await.unwrap();
    assert_eq!(ledger.purse(&alice()).unwrap().available_msat, -300);
    ledger.post(paid("h", "w", Some(&alice()), 100)).await.unwrap();
    ledger.post(transfer::written_off("x", &alice(), 200, "gone")).await.unwrap();
    assert_eq!(ledger.purse(&alice()).unwrap().available_msat, 0);
    verify(ledger.store()).unwrap();
}

#[tokio::test]
async fn no_more_is_written_off_than_is_owed_and_nothing_for_a_key_never_seen() {
    let house = House::new();
    let ledger = house.open();
    let written_off = |id: &str, msat| ledger.post(transfer::written_off(id, &alice(), msat, ""));
    let never_seen = written_off("a", 1).await;
    assert!(matches!(never_seen, Err(Error::NotOwed { owed_msat: 0, wanted_msat: 1 })), "{never_seen:?}");
    // An open job's hold is no debt: it comes back when the job fails.
    ledger.post(hold("j", &alice(), 300, 500, 0)).await.unwrap();
    assert!(matches!(written_off("b", 1).await, Err(Error::NotOwed { owed_msat: 0, .. })));
    ledger.post(capture("j", 300, 300, &[(revenue(), 1)], about())).await.unwrap();
    ledger.post(hold("k", &alice(), 100, 500, 0)).await.unwrap();
    let too_much = written_off("c", 301).await;
    assert!(matches!(too_much, Err(Error::NotOwed { owed_msat: 300, wanted_msat: 301 })), "{too_much:?}");
    written_off("d", 300).await.unwrap();
    assert!(matches!(written_off("d", 300).await, Ok(Committed::Again(_))), "repeated, it is the same one");
    ledger.post(transfer::void("k", &alice(), 100, "failed")).await.unwrap();
    assert_eq!(ledger.purse(&alice()).unwrap().available_msat, 0, "nobody has got credit by it");
    verify(ledger.store()).unwrap();
}

#[tokio::test]
async fn a_refund_leaves_credit_before_it_leaves_the_wallet_and_ends_one_way() {
    let house = House::new();
    let ledger = house.open();
    ledger.post(paid("h", "w", Some(&alice()), 1_000)).await.unwrap();
    assert!(matches!(
        ledger.post(refund_begun("out", &alice(), 1_001, "lnbc", 9)).await,
        Err(Error::Insufficient { .. })
    ));
    ledger.post(refund_begun("out", &alice(), 1_000, "lnbc", 9)).await.unwrap();
    let held = ledger.post(hold("j", &alice(), 1, 0, 0)).await;
    assert!(matches!(held, Err(Error::Insufficient { .. })), "{held:?}");
    ledger.post(refund_paid("out", &alice(), "w", 1_000, 3)).await.unwrap();
    let failed = ledger.post(refund_failed("out", &alice(), 1_000, "no route")).await;
    assert!(matches!(failed, Err(Error::Conflict { .. })), "{failed:?}");
    assert_eq!(ledger.balance(&Account::Fees).unwrap(), 3);
    assert_eq!(ledger.balance(&Account::Wallet("w".into())).unwrap(), -3);
    assert_eq!(sum(&ledger), 0);
}

#[tokio::test]
async fn a_correction_undoes_a_transfer_once_and_nothing_else() {
    let house = House::new();
    let ledger = house.open();
    let gift = grant("g", &alice(), 100, "too much");
    ledger.post(gift.clone()).await.unwrap();
    let undo = transfer::correction(&gift, "a slip");
    let mut half = undo.clone();
    half.legs[0].msat = 50;
    assert!(matches!(ledger.post(half).await, Err(Error::NotACorrection { .. })));
    ledger.post(undo.clone()).await.unwrap();
    assert!(matches!(ledger.post(undo).await, Ok(Committed::Again(_))));
    assert_eq!(ledger.purse(&alice()).unwrap().available_msat, 0);
    ledger.post(grant("g2", &alice(), 100, "")).await.unwrap();
    ledger.post(hold("j", &alice(), 100, 0, 0)).await.unwrap();
    let fixed = ledger.post(transfer::correction(&hold("j", &alice(), 100, 0, 0), "")).await;
    assert!(matches!(fixed, Err(Error::NotACorrection { .. })), "{fixed:?}");
}

#[tokio::test]
async fn legs_that_do_not_belong_to_their_kind_are_refused() {
    let house = House::new();
    let ledger = house.open();
    ledger.post(grant("g", &alice(), 1_000, "")).await.unwrap();
    let leg = |from, to| vec![Leg { from, to, msat: 10 }];
    let wallet = || Account::Wallet("w".into());
    let credit = || Account::Credit(alice());
    for (id, why, legs) in [
        ("paid:x", Why::Paid { payment_hash: "x".into(), wallet: "w".into() }, leg(wallet(), credit())),
        ("paid:y", Why::Paid { payment_hash: "x".into(), wallet: "w".into() }, leg(credit(), wallet())),
        ("grant:z", Why::Grant { note: String::new() }, leg(Account::Grants, credit())),
        ("hold:j", Why::Hold { job: "j".into(), expires_ms: 0, line_msat: 0 }, leg(revenue(), credit())),
        ("resolve:j", Why::Capture { job: "j".into() }, leg(wallet(), Account::Held(alice()))),
        ("r", Why::Reconciled { payment_hash: "x".into(), note: String::new() }, leg(credit(), wallet())),
        ("g", Why::Grant { note: String::new() }, leg(credit(), credit())),
        ("g", Why::Grant { note: String::new() }, Vec::new()),
    ] {
        let refused = ledger.post(Transfer { id: id.into(), why, legs, about: None }).await;
        assert!(matches!(refused, Err(Error::Malformed { .. })), "{id}: {refused:?}");
    }
    let nothing = grant("n", &alice(), 0, "");
    assert!(matches!(ledger.post(nothing).await, Err(Error::Malformed { .. })));
}

#[tokio::test]
async fn a_batch_is_made_wholly_or_not_at_all() {
    let house = House::new();
    let ledger = house.open();
    ledger.post(grant("g", &alice(), 100, "")).await.unwrap();
    let batch = |held| {
        vec![
            Record::Transfer(paid("h", "w", Some(&alice()), 50)),
            Record::Transfer(hold("j", &alice(), held, 0, 0)),
        ]
    };
    let over = ledger.commit(batch(151)).await;
    assert!(matches!(over, Err(Error::Insufficient { available_msat: 150, .. })), "{over:?}");
    assert!(ledger.transfer("paid:h").unwrap().is_none());
    assert!(matches!(ledger.commit(batch(150)).await, Ok(Committed::New(_))));
    assert!(matches!(ledger.commit(batch(150)).await, Ok(Committed::Again(_))));
    let half = ledger.commit(vec![
        Record::Transfer(paid("h", "w", Some(&alice()), 50)),
        Record::Transfer(grant("new", &alice(), 1, "")),
    ]);
    assert!(matches!(half.await, Err(Error::Conflict { .. })));
}

#[tokio::test]
async fn the_books_are_the_same_after_a_restart_and_after_a_rebuild() {
    let house = House::new();
    let ledger = house.open();
    for n in 0..50 {
        let hash = format!("h{n}");
        ledger.post(paid(&hash, "w", Some(&alice()), 1_000)).await.unwrap();
        ledger.post(hold(&format!("j{n}"), &alice(), 700, 0, 0)).await.unwrap();
        if n % 3 > 0 {
            let earned = [(revenue(), 300), (Account::Revenue { skill: "x".into(), place: "y".into() }, n)];
            ledger.post(capture(&format!("j{n}"), 700, 300 + n, &earned, about())).await.unwrap();
        }
    }
    let (balances, dump) = (ledger.store().balances().unwrap(), ledger.store().dump_index().unwrap());
    let verified = verify(ledger.store()).unwrap();
    assert_eq!((verified.transfers, verified.open_holds, verified.sum_msat), (133, 17, 0));
    ledger.store().close().unwrap();
    drop(ledger);
    let again = house.open();
    assert!(!again.store().was_rebuilt());
    assert_eq!(again.store().balances().unwrap(), balances);
    again.store().close().unwrap();
    drop(again);
    std::fs::remove_dir_all(house.dir.path().join("data/index")).unwrap();
    let rebuilt = house.open();
    assert!(rebuilt.store().was_rebuilt());
    assert_eq!(rebuilt.store().dump_index().unwrap(), dump);
    assert!(matches!(rebuilt.post(paid("h7", "w", Some(&alice()), 1_000)).await, Ok(Committed::Again(_))));
    let postings = rebuilt.store().postings(&alice(), 3).unwrap();
    assert_eq!(postings.len(), 3);
    assert!(postings[0].seq > postings[2].seq, "newest first");
}

#[tokio::test]
async fn a_signed_head_stands_for_everything_before_it() {
    let house = House::new();
    let ledger = house.open();
    let keys = nostr_sdk::Keys::generate();
    ledger.post(grant("g", &alice(), 1, "")).await.unwrap();
    let opened = Record::Opened { node: keys.public_key().to_hex(), version: "1".into() };
    ledger.commit(vec![opened]).await.unwrap();
    assert!(ledger.seal_due(1_800_000_000).unwrap());
    let head = ledger.store().head();
    let seal = ledger.seal(&keys, 1_800_000_000).await.unwrap();
    assert_eq!((&seal.head, seal.at_s), (&head, 1_800_000_000));
    assert_eq!(last_seal(ledger.store()).unwrap().as_ref(), Some(&seal));
    let verified = verify(ledger.store()).unwrap();
    assert_eq!((verified.seals, verified.last_seal), (1, Some(seal)));
    assert!(!ledger.seal_due(1_800_086_399).unwrap() && ledger.seal_due(1_800_086_400).unwrap());
    let stranger = nostr_sdk::Keys::generate();
    ledger.seal(&stranger, 1_800_000_001).await.unwrap();
    let broken = verify(ledger.store()).unwrap_err();
    assert!(matches!(broken, Broken::Seal { of, .. } if of == head.seq + 1), "{broken}");
}

#[tokio::test]
async fn an_entry_against_the_rules_is_named_by_the_check() {
    let house = House::new();
    let ledger = house.open();
    ledger.post(grant("g", &alice(), 100, "")).await.unwrap();
    // Past the ledger, straight into the log: what a fault of ours would leave.
    let bad = Record::Transfer(hold("j", &alice(), 101, 0, 0));
    let seq = ledger.store().append(vec![bad]).await.unwrap();
    ledger.store().append(vec![Record::Transfer(grant("h", &alice(), 1, ""))]).await.unwrap();
    let broken = verify(ledger.store()).unwrap_err();
    let Broken::Entry { seq: named, source: Error::Insufficient { .. } } = broken else { panic!("{broken}") };
    assert_eq!(named, seq);
}

#[tokio::test]
async fn records_between_two_moments_are_found_over_segments() {
    let (house, now) = (House::new(), Arc::new(AtomicU64::new(0)));
    let ledger = house.open_at(&now, 2_000);
    for n in 0..60_u64 {
        now.store(n * HOUR / 2, Ordering::Relaxed);
        ledger.post(grant(&format!("g{n}"), &alice(), n + 1, "")).await.unwrap();
        ledger.store().append(vec![Record::Cursor { relay: "ws://x".into(), until: n }]).await.unwrap();
    }
    let ids = |from: u64, to: u64| house.between(from, to).into_iter().map(|(id, _)| id).collect::<Vec<_>>();
    assert_eq!(ids(0, u64::MAX).len(), 60);
    assert_eq!(ids(10 * HOUR, 11 * HOUR), ["grant:g20", "grant:g21"]);
    assert_eq!(ids(10 * HOUR + 1, 11 * HOUR + 1), ["grant:g21", "grant:g22"]);
    assert_eq!(ids(29 * HOUR, 29 * HOUR), [""; 0]);
    assert_eq!(ids(40 * HOUR, u64::MAX), [""; 0]);
}

#[tokio::test]
async fn budgets_bound_what_a_customer_and_the_node_spend_in_a_day_and_a_week() {
    let house = House::new();
    let ledger = house.open();
    const DAY: u64 = 86_400_000;
    let now = crate::clock::system()();
    ledger.post(grant("g", &alice(), 100_000, "")).await.unwrap();
    let within = async |job: &str, msat, budgets: Budgets, at_ms| {
        let hold = vec![Record::Transfer(hold(job, &alice(), msat, 0, 0))];
        ledger.commit_within(hold, &budgets, at_ms).await
    };
    let day = |msat| Budgets { customer_day_msat: msat, ..Budgets::default() };
    let over = within("a", 1_001, day(1_000), now).await;
    assert!(matches!(over, Err(Error::OverBudget { days: 1, would_msat: 1_001, .. })), "{over:?}");
    within("a", 600, day(1_000), now).await.unwrap();
    let over = within("b", 401, day(1_000), now).await;
    assert!(matches!(over, Err(Error::OverBudget { .. })), "open holds count: {over:?}");
    ledger.post(capture("a", 600, 500, &[(revenue(), 1)], about())).await.unwrap();
    let over = within("b", 501, day(1_000), now).await;
    assert!(matches!(over, Err(Error::OverBudget { would_msat: 1_001, .. })), "charges count: {over:?}");
    within("b", 500, day(1_000), now).await.unwrap();
    // Tomorrow there is a new day, but not a new week.
    let week = |msat| Budgets { customer_week_msat: msat, ..day(1_000) };
    within("c", 400, day(1_000), now + DAY).await.unwrap();
    let over = within("d", 100, week(1_499), now + DAY).await;
    assert!(matches!(over, Err(Error::OverBudget { days: 7, .. })), "{over:?}");
    within("d", 100, week(1_500), now + DAY).await.unwrap();
    // The first day is a week ago: what is held now is all that counts.
    let week = Budgets { customer_week_msat: 1_400, ..Budgets::default() };
    within("e", 400, week, now + 7 * DAY).await.unwrap();

    let spent = transfer::cost("a", 0, Account::ContainerCost("docker".into()), "rent", 700, None, about());
    ledger.post(spent).await.unwrap();
    let node = |msat| Budgets { node_day_msat: msat, ..Budgets::default() };
    let over = within("f", 1, node(700), now).await;
    let Err(Error::OverBudget { whose, .. }) = over else { panic!("{over:?}") };
    assert_eq!(whose, "node");
    within("f", 1, node(701), now).await.unwrap();
    verify(ledger.store()).unwrap();
}

#[tokio::test]
async fn a_clock_that_was_wrong_for_a_while_dates_only_what_was_written_meanwhile() {
    let (house, now) = (House::new(), Arc::new(AtomicU64::new(0)));
    let day_ms = 24 * HOUR;
    let sell = async |ledger: &Ledger, n: u64| {
        let job = format!("j{n}");
        ledger.post(grant(&job, &alice(), 100, "")).await.unwrap();
        ledger.post(hold(&job, &alice(), 100, 0, 0)).await.unwrap();
        ledger.post(capture(&job, 100, 10 + n, &[(revenue(), 1)], about())).await.unwrap();
    };
    // Forward over four days, back by three in the middle of a life, by more than there is between two lives, and on.
    let lives: [&[u64]; 3] = [&[0, 1, 2, 3, 0, 1], &[0, 2], &[1, 4, 5]];
    let mut n = 0;
    for days in lives {
        let ledger = house.open_at(&now, 2_000);
        for day in days {
            let now_ms = 1_000 + day * day_ms + n;
            now.store(now_ms, Ordering::Relaxed);
            sell(&ledger, n).await;
            let posted = ledger.transfer(&format!("resolve:j{n}")).unwrap().unwrap();
            assert_eq!(posted.at_ms, now_ms);
            n += 1;
        }
        verify(ledger.store()).unwrap();
        ledger.store().close().unwrap();
    }

    let all = house.between(0, u64::MAX);
    assert_eq!(all.len() as u64, 3 * n);
    let report = |from_ms, to_ms, by| {
        let window = report::Window { from_ms, to_ms, zone: jiff::tz::TimeZone::UTC };
        report::report(&house.dir.path().join("data"), &window, by).unwrap()
    };
    let whole = report(0, u64::MAX, report::By::Day);
    let wanted: u64 = (0..n).map(|n| 10 + n).sum();
    assert_eq!((whole.total.jobs, whole.total.revenue_msat), (n, i128::from(wanted)));
    // Days put side by side, as separate reports and as rows of one, are the whole: nothing twice, nothing left out.
    let days: Vec<_> =
        (0..8).map(|day| report(day * day_ms, (day + 1) * day_ms, report::By::Skill).total).collect();
    assert_eq!(days.iter().map(|day| day.jobs).sum::<u64>(), n);
    assert_eq!(days.iter().map(|day| day.revenue_msat).sum::<i128>(), i128::from(wanted));
    let rows: Vec<u64> = whole.rows.iter().map(|row| row.sums.jobs).collect();
    assert_eq!(rows, days.iter().map(|day| day.jobs).filter(|jobs| *jobs > 0).collect::<Vec<_>>());
    assert_eq!(rows, [3, 3, 2, 1, 1, 1]);
    // Budgets count by the same days.
    let ledger = house.open_at(&now, 2_000);
    for (day, sums) in (0..8).zip(&days) {
        let spent = ledger.store().spent(&alice(), day * day_ms, 1).unwrap();
        assert_eq!(i128::from(spent), sums.revenue_msat, "day {day}");
    }
}

#[tokio::test]
async fn credit_behind_a_quote_is_reserved_for_it_until_it_is_paid_or_forgotten() {
    let house = House::new();
    let ledger = house.open();
    let none = Budgets::default();
    ledger.post(paid("h", "w", Some(&alice()), 1_000)).await.unwrap();
    let quote = |job: &str, most| ledger.promise((job, &alice()), (most, 0), &none, 0).unwrap();
    assert_eq!(quote("a", 1_500), 500, "all the credit is behind the first");
    assert_eq!(quote("a", 1_500), 500, "asked again, it is the same one");
    assert_eq!(quote("b", 1_200), 1_200, "and none of it behind the second");
    let beside = ledger.post(hold("c", &alice(), 1, 0, 0)).await;
    assert!(matches!(beside, Err(Error::Insufficient { available_msat: 0, .. })), "{beside:?}");
    // Each of them is paid, and each has its job.
    ledger.post(paid("pb", "w", Some(&alice()), 1_200)).await.unwrap();
    ledger.post(hold("b", &alice(), 1_200, 0, 0)).await.unwrap();
    ledger.post(paid("pa", "w", Some(&alice()), 500)).await.unwrap();
    ledger.post(hold("a", &alice(), 1_500, 0, 0)).await.unwrap();
    assert_eq!(ledger.purse(&alice()).unwrap().available_msat, 0);
    // One that is not paid lets go of what it counted on.
    ledger.post(paid("h2", "w", Some(&alice()), 700)).await.unwrap();
    assert_eq!(quote("d", 800), 100);
    assert!(ledger.post(hold("e", &alice(), 700, 0, 0)).await.is_err());
    ledger.forget("d");
    assert_eq!(quote("f", 700), 0, "covered, so nothing is set aside");
    ledger.post(hold("e", &alice(), 700, 0, 0)).await.unwrap();
    verify(ledger.store()).unwrap();
}

#[tokio::test]
async fn a_quote_takes_its_part_of_the_budget_before_it_is_paid() {
    let (house, now) = (House::new(), Arc::new(AtomicU64::new(0)));
    let ledger = house.open_at(&now, 1 << 20);
    let budgets = Budgets { customer_day_msat: 1_000, ..Budgets::default() };
    let quote = |job: &str, most| ledger.promise((job, &alice()), (most, 0), &budgets, 0);
    assert_eq!(quote("a", 600).unwrap(), 600);
    assert!(matches!(quote("b", 600), Err(Error::OverBudget { would_msat: 1_200, .. })));
    assert_eq!(quote("b", 400).unwrap(), 400);
    // What was quoted is not held against the budget a second time; what was not is.
    ledger.post(paid("h", "w", Some(&alice()), 1_100)).await.unwrap();
    let held = |job: &str, msat| {
        ledger.commit_within(vec![Record::Transfer(hold(job, &alice(), msat, 0, 0))], &budgets, 0)
    };
    held("a", 600).await.unwrap();
    assert!(matches!(held("c", 1).await, Err(Error::OverBudget { would_msat: 1_001, .. })));
    held("b", 400).await.unwrap();
    verify(ledger.store()).unwrap();
}

#[tokio::test]
async fn what_is_owed_is_told_by_age_and_the_oldest_debt_is_paid_first() {
    let (house, now) = (House::new(), Arc::new(AtomicU64::new(0)));
    let day_ms = 24 * HOUR;
    let ledger = house.open_at(&now, 2_000);
    let sell = async |day: u64, job: &str, msat: u64| {
        now.store(1_000 + day * day_ms, Ordering::Relaxed);
        ledger.post(hold(job, &alice(), msat + 50, 100_000, 0)).await.unwrap();
        ledger.post(capture(job, msat + 50, msat, &[(revenue(), 1)], about())).await.unwrap();
    };
    let owed =
        |day: u64| receivable::receivables(&house.dir.path().join("data"), 1_000 + day * day_ms).unwrap();
    ledger.post(paid("a", "w", Some(&alice()), 100)).await.unwrap();
    sell(0, "covered", 100).await;
    assert_eq!(owed(0), [], "paid ahead");
    sell(1, "first", 300).await;
    sell(90, "second", 200).await;
    ledger.post(hold("open", &alice(), 1_000, 100_000, 0)).await.unwrap();
    let [row] = &owed(95)[..] else { panic!("one customer") };
    assert_eq!((row.owed_msat, row.since_ms), (500, 1_000 + day_ms), "an open hold is no debt");
    assert_eq!(row.by_age_msat, [200, 0, 0, 300]);
    assert_eq!(owed(40)[0].by_age_msat[2], 300, "by its age at that time");
    ledger.post(paid("b", "w", Some(&alice()), 350)).await.unwrap();
    assert_eq!(owed(95)[0].by_age_msat, [150, 0, 0, 0]);
    ledger.post(transfer::written_off("x", &alice(), 150, "")).await.unwrap();
    assert_eq!(owed(95), []);
}

#[tokio::test]
async fn a_balance_that_no_number_holds_is_refused_with_its_name_and_nothing_is_written() {
    let house = House::new();
    let ledger = house.open();
    let most = crate::store::money::LEG_MAX_MSAT;
    let fit = i64::MAX as u64 / most;
    for n in 0..fit {
        ledger.post(grant(&n.to_string(), &alice(), most, "")).await.unwrap();
    }
    let head = ledger.store().head();
    let why = ledger.post(grant("more", &alice(), most, "")).await.unwrap_err();
    assert!(matches!(&why, Error::OutOfBounds { account, .. } if account.starts_with("credit:")), "{why}");
    assert_eq!(ledger.store().head(), head);
    assert_eq!(ledger.purse(&alice()).unwrap().available_msat, i128::from(most) * i128::from(fit));
}
