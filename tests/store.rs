//! What the store promises while nothing goes wrong with the disk: durable order, reads after writes, group
//! commit, locks, and an index that is always the log's. Damage is in `store_damage.rs`, faults of the disk
//! and of the power in `store_faults`.

mod store_house;

use std::fs;
use std::sync::atomic::Ordering;
use std::time::Duration;

use coinop::store::record::{Answer, Record, Summary, Verdict};
use coinop::store::{Error, Holder, JobFilter, JobState, Options, Store};
use proptest::prelude::*;
use store_house::{House, accepted, id};

fn started(n: u64, attempt: u32) -> Record {
    Record::Started { job: id(n), attempt, backend: "local".into() }
}

fn pinned(n: u64, commit: &str) -> Record {
    Record::Pinned { job: id(n), commit: commit.into() }
}

fn closed(n: u64, verdict: Verdict, answer: u64) -> Record {
    let summary = Summary { wall_ms: 7, ..Summary::default() };
    Record::Closed { job: id(n), verdict, answer: id(answer), summary }
}

fn queued(event: u64, job: Option<u64>, relays: &[&str]) -> Record {
    Record::Queued {
        event: id(event),
        job: job.map(id),
        json: format!("{{\"event\":{event}}}"),
        relays: relays.iter().map(|r| (*r).into()).collect(),
        give_up_ms: 50_000,
    }
}

fn delivered(event: u64, relay: &str, answer: Answer) -> Record {
    Record::Delivered { event: id(event), relay: relay.into(), answer }
}

#[test]
fn a_job_is_read_back_at_every_step_of_its_life_and_after_a_restart() {
    let house = House::new();
    let store = house.open();
    assert_eq!(store.head().seq, 1, "the node's start is the first entry");
    store.append_blocking(vec![accepted(1)]).unwrap();
    let row = store.job(&id(1)).unwrap().unwrap();
    assert_eq!((row.state, row.attempt, row.accepted_ms), (JobState::Accepted, 0, 1_000));
    assert_eq!(row.request, "{\"request\":1}");
    assert!(store.knows(&id(1), &id(1000)).unwrap());
    house.clock.store(2_000, Ordering::SeqCst);
    store.append_blocking(vec![started(1, 1)]).unwrap();
    let row = store.job(&id(1)).unwrap().unwrap();
    assert_eq!((row.state, row.attempt, row.commit), (JobState::Running, 1, None));
    assert_eq!(row.backend.as_deref(), Some("local"));
    house.clock.store(2_500, Ordering::SeqCst);
    store.append_blocking(vec![pinned(1, "c0ffee")]).unwrap();
    let row = store.job(&id(1)).unwrap().unwrap();
    assert_eq!((row.state, row.updated_ms), (JobState::Running, 2_500));
    assert_eq!(row.commit.as_deref(), Some("c0ffee"));
    // A later attempt runs on the commit that is written down already.
    house.clock.store(2_600, Ordering::SeqCst);
    store.append_blocking(vec![started(1, 2)]).unwrap();
    let row = store.job(&id(1)).unwrap().unwrap();
    assert_eq!((row.attempt, row.commit.as_deref()), (2, Some("c0ffee")));
    assert_eq!(store.open_jobs().unwrap().len(), 1);
    house.clock.store(3_000, Ordering::SeqCst);
    let end = vec![closed(1, Verdict::Done, 50), queued(50, Some(1), &["ws://a", "ws://b"])];
    let seq = store.append_blocking(end).unwrap();
    assert_eq!(seq, 6);
    let check = |store: &Store| {
        let row = store.job(&id(1)).unwrap().unwrap();
        assert_eq!((row.state, row.attempt, row.updated_ms), (JobState::Done, 2, 3_000));
        assert_eq!(row.commit.as_deref(), Some("c0ffee"));
        assert_eq!(row.answer, Some(id(50)));
        assert_eq!(row.verdict, Some(Verdict::Done));
        assert_eq!(row.summary.unwrap().wall_ms, 7);
        assert!(store.open_jobs().unwrap().is_empty());
        assert_eq!(store.answer(&id(50)).unwrap().as_deref(), Some("{\"event\":50}"));
        let owed = store.owed().unwrap();
        assert_eq!(owed.len(), 1);
        assert_eq!(owed[0].relays_left, ["ws://a", "ws://b"]);
        assert_eq!(owed[0].job, Some(id(1)));
        let history = store.history(&id(1)).unwrap();
        let seqs: Vec<_> = history.iter().map(|e| (e.seq, e.at_ms)).collect();
        assert_eq!(seqs, [(2, 1_000), (3, 2_000), (4, 2_500), (5, 2_600), (6, 3_000), (6, 3_000)]);
        assert_eq!(history[1].record, started(1, 1));
        assert_eq!(history[2].record, pinned(1, "c0ffee"));
    };
    check(&store);
    store.close().unwrap();
    let store = house.open();
    assert!(!store.was_rebuilt(), "an index put away in order is used again");
    check(&store);
    check(&Store::read_only(&house.data()).unwrap());
}

#[test]
fn a_delivery_takes_its_relay_off_the_list_and_the_last_one_ends_the_debt() {
    let house = House::new();
    let store = house.open();
    store.append_blocking(vec![queued(1, None, &["a", "b"])]).unwrap();
    store.append_blocking(vec![delivered(1, "a", Answer::Stored)]).unwrap();
    assert_eq!(store.owed().unwrap()[0].relays_left, ["b"]);
    let blocked = Answer::Rejected { reason: "blocked: no".into() };
    store.append_blocking(vec![delivered(1, "b", blocked.clone())]).unwrap();
    assert!(store.owed().unwrap().is_empty());
    let answers = store.deliveries(&id(1)).unwrap();
    assert_eq!(answers, [("a".to_owned(), Answer::Stored), ("b".to_owned(), blocked)]);
    store.append_blocking(vec![queued(1, None, &["a", "c"])]).unwrap();
    let owed = store.owed().unwrap();
    assert_eq!(owed[0].relays_left, ["c"], "queued again for more relays, only the new one is owed");
}

#[test]
fn a_job_ends_once_and_is_accepted_once() {
    let house = House::new();
    let store = house.open();
    store.append_blocking(vec![accepted(1), closed(1, Verdict::Done, 50)]).unwrap();
    let failed = Verdict::Failed { code: "timeout".into(), reason: "late".into() };
    store.append_blocking(vec![closed(1, failed, 51), accepted(1), started(1, 2)]).unwrap();
    let row = store.job(&id(1)).unwrap().unwrap();
    assert_eq!((row.state, row.answer, row.attempt), (JobState::Done, Some(id(50)), 0));
    assert_eq!(store.jobs(&JobFilter::default()).unwrap().len(), 1);
}

#[test]
fn a_strangers_cancel_is_kept_but_neither_cancels_nor_hides_the_request() {
    let house = House::new();
    let store = house.open();
    let (customer, stranger) = (id(1000), id(666));
    store.append_blocking(vec![Record::Cancelled { request: id(1), by: stranger.clone() }]).unwrap();
    assert!(!store.knows(&id(1), &customer).unwrap());
    assert!(!store.is_cancelled(&id(1), &customer).unwrap());
    store.append_blocking(vec![Record::Cancelled { request: id(1), by: customer.clone() }]).unwrap();
    assert!(store.knows(&id(1), &customer).unwrap());
    assert!(store.is_cancelled(&id(1), &customer).unwrap());
    assert_eq!(store.cancelled(&id(1)).unwrap(), [stranger, customer]);
}

#[test]
fn refusals_and_cursors_are_remembered() {
    let house = House::new();
    let store = house.open();
    let refused = Record::Refused { request: id(1), customer: id(2), code: "no_repo".into(), answered: true };
    let cursor = |until| Record::Cursor { relay: "ws://a".into(), until };
    store.append_blocking(vec![refused, cursor(5)]).unwrap();
    store.append_blocking(vec![cursor(7)]).unwrap();
    let refusal = store.refusal(&id(1)).unwrap().unwrap();
    assert_eq!((refusal.code.as_str(), refusal.answered), ("no_repo", true));
    assert!(store.knows(&id(1), &id(2)).unwrap());
    assert_eq!(store.cursor("ws://a").unwrap(), Some(7));
    assert_eq!(store.cursor("ws://b").unwrap(), None);
}

#[test]
fn jobs_are_listed_newest_first_by_state_and_page() {
    let house = House::new();
    let store = house.open();
    for n in 1..=9 {
        house.clock.store(1_000 + n, Ordering::SeqCst);
        store.append_blocking(vec![accepted(n)]).unwrap();
    }
    store.append_blocking(vec![started(3, 1), closed(5, Verdict::Done, 50)]).unwrap();
    let list = |filter: JobFilter| -> Vec<String> {
        store.jobs(&filter).unwrap().into_iter().map(|r| r.job).collect()
    };
    let ids = |ns: &[u64]| ns.iter().map(|n| id(*n)).collect::<Vec<_>>();
    assert_eq!(list(JobFilter::default()), ids(&[9, 8, 7, 6, 5, 4, 3, 2, 1]));
    assert_eq!(list(JobFilter { open_only: true, limit: 6, ..Default::default() }), ids(&[9, 8, 7, 6, 4, 3]));
    assert_eq!(list(JobFilter { state: Some(JobState::Done), ..Default::default() }), ids(&[5]));
    let page = JobFilter { before_ms: Some(1_004), limit: 2, ..Default::default() };
    assert_eq!(list(page), ids(&[3, 2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_at_the_same_time_share_their_syncs() {
    let house = House::new();
    let store = house.open();
    let before = store.stats();
    let mut tasks = Vec::new();
    for n in 0..64_u64 {
        let store = store.clone();
        tasks.push(tokio::spawn(async move {
            for round in 0..20 {
                let job = n * 100 + round;
                store.append(vec![accepted(job)]).await.unwrap();
                assert!(store.job(&id(job)).unwrap().is_some(), "a read after its append sees it");
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let after = store.stats();
    let (batches, syncs) = (after.batches - before.batches, after.syncs - before.syncs);
    assert_eq!(batches, 1280);
    assert!(syncs * 4 <= batches, "{syncs} syncs for {batches} batches");
    assert_eq!(store.verify().unwrap(), store.head());
}

#[test]
fn a_lazy_batch_rides_with_the_next_group_in_order() {
    let house = House::new();
    let store = house.open();
    let before = store.stats().syncs;
    for until in 1..=5 {
        store.append_lazily(vec![Record::Cursor { relay: "a".into(), until }]).unwrap();
    }
    let seq = store.append_blocking(vec![accepted(1)]).unwrap();
    assert_eq!(seq, 7, "the lazy ones went first");
    assert_eq!(store.stats().syncs - before, 1);
    assert_eq!(store.cursor("a").unwrap(), Some(5));
}

#[test]
fn a_lazy_batch_is_written_by_itself_within_about_a_second_and_at_a_close() {
    let house = House::new();
    let store = house.open();
    store.append_lazily(vec![accepted(1)]).unwrap();
    let began = std::time::Instant::now();
    while store.job(&id(1)).unwrap().is_none() {
        assert!(began.elapsed().as_secs() < 10, "never written");
        std::thread::yield_now();
    }
    store.append_lazily(vec![accepted(2)]).unwrap();
    store.close().unwrap();
    assert!(house.open().job(&id(2)).unwrap().is_some());
}

#[test]
fn a_batch_out_of_bounds_is_refused_and_leaves_nothing() {
    let house = House::new();
    let store = house.open();
    let head = store.head();
    assert!(matches!(store.append_blocking(vec![]), Err(Error::EmptyBatch)));
    let many = vec![accepted(1); coinop::store::BATCH_MAX_RECORDS + 1];
    assert!(matches!(store.append_blocking(many), Err(Error::TooLarge { what: "batch (records)", .. })));
    let json = "x".repeat(coinop::store::BATCH_MAX_BYTES);
    let large = Record::Queued { event: id(1), job: None, json, relays: vec![], give_up_ms: 0 };
    assert!(matches!(store.append_blocking(vec![large]), Err(Error::TooLarge { what: "batch (bytes)", .. })));
    assert_eq!(store.head(), head);
    store.append_blocking(vec![accepted(1)]).unwrap();
}

#[test]
fn a_second_store_on_the_same_folder_names_the_holder() {
    let house = House::new();
    let _store = house.open();
    let other = Store::open_with(&house.data(), &Holder::new(id(8)), house.options());
    match other.map(|_| ()).unwrap_err() {
        Error::Held { holder, .. } => {
            assert_eq!((holder.pid, holder.started_ms), (std::process::id(), 1_000));
            assert_eq!(holder.node, id(9));
            assert!(!holder.host.is_empty());
        }
        e => panic!("{e}"),
    }
}

#[test]
fn the_same_key_on_another_folder_names_the_holder_and_is_free_after_a_close() {
    let house = House::new();
    let store = house.open();
    let second = house.dir.path().join("second");
    let open = || Store::open_with(&second, &Holder::new(id(9)), house.options());
    match open().map(|_| ()).unwrap_err() {
        Error::KeyHeld { holder, key } => {
            assert_eq!(key, id(9));
            assert_eq!(holder.pid, std::process::id());
            assert_eq!(holder.dir, house.data());
        }
        e => panic!("{e}"),
    }
    store.close().unwrap();
    open().unwrap();
}

#[test]
fn a_closed_store_answers_with_closed() {
    let house = House::new();
    let store = house.open();
    store.close().unwrap();
    store.close().unwrap();
    assert!(matches!(store.append_blocking(vec![accepted(1)]), Err(Error::Closed)));
    assert!(matches!(store.append_lazily(vec![accepted(1)]), Err(Error::Closed)));
    assert!(matches!(store.job(&id(1)), Err(Error::Closed)));
}

#[test]
fn a_look_from_outside_reads_beside_the_running_node_and_cannot_write() {
    let house = House::new();
    let store = house.open();
    store.append_blocking(vec![accepted(1)]).unwrap();
    let look = Store::read_only(&house.data()).unwrap();
    assert_eq!(look.head(), store.head());
    assert_eq!(look.job(&id(1)).unwrap(), store.job(&id(1)).unwrap());
    assert!(matches!(look.append_blocking(vec![accepted(2)]), Err(Error::ReadOnly)));
    assert!(matches!(look.put_blob(b"x"), Err(Error::ReadOnly)));
    let nothing = house.dir.path().join("nothing");
    assert!(matches!(Store::read_only(&nothing).map(|_| ()), Err(Error::Missing { .. })));
    assert!(!nothing.exists(), "a look makes nothing");
}

#[test]
fn blobs_are_named_by_their_bytes_capped_and_checked() {
    let house = House::new();
    let store = house.open();
    let sha = store.put_blob(b"hello").unwrap();
    assert_eq!(sha, "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824");
    assert_eq!(store.put_blob(b"hello").unwrap(), sha);
    assert_eq!(store.blob(&sha, 5).unwrap().as_deref(), Some(&b"hello"[..]));
    assert!(matches!(store.blob(&sha, 4), Err(Error::TooLarge { what: "blob", .. })));
    assert!(matches!(store.blob("../../etc/passwd", 5), Err(Error::BadBlobName)));
    assert_eq!(store.blob(&id(1), 5).unwrap(), None);
    fs::write(house.data().join("blobs/2c").join(&sha), b"jello").unwrap();
    assert!(matches!(store.blob(&sha, 5), Err(Error::BlobDamaged { .. })));
    store.put_blob(b"hello").unwrap();
    assert!(store.blob(&sha, 5).unwrap().is_some(), "putting it again mends it");
}

#[test]
fn a_backup_of_a_running_store_opens_with_the_same_head_and_blobs() {
    let house = House::new();
    let store = house.try_open(house.small_segments()).unwrap();
    for n in 0..40 {
        store.append_blocking(vec![accepted(n)]).unwrap();
    }
    let sha = store.put_blob(b"log of a run").unwrap();
    let to = house.dir.path().join("copy");
    let head = store.backup(&to).unwrap();
    assert_eq!(head, store.head());
    store.append_blocking(vec![accepted(77)]).unwrap();
    assert!(matches!(store.backup(&to), Err(Error::Exists { .. })));
    let copy = Store::read_only(&to).unwrap();
    assert_eq!(copy.verify().unwrap(), head);
    assert!(copy.job(&id(39)).unwrap().is_some() && copy.job(&id(77)).unwrap().is_none());
    assert_eq!(copy.blob(&sha, 100).unwrap().as_deref(), Some(&b"log of a run"[..]));
    store.close().unwrap();
    let copy = Store::open_with(&to, &Holder::new(id(9)), house.options()).unwrap();
    assert_eq!(copy.head().seq, head.seq + 1);
}

fn text() -> impl Strategy<Value = String> {
    "[a-c\u{0}é\"\\\\]{0,3}"
}

fn record() -> impl Strategy<Value = Record> {
    let n = || (0..4_u64).prop_map(id);
    let relay = || prop_oneof![Just("ws://a".to_owned()), Just("ws://b".to_owned()), text()];
    let verdict = prop_oneof![
        Just(Verdict::Done),
        Just(Verdict::Cancelled),
        (text(), text()).prop_map(|(code, reason)| Verdict::Failed { code, reason }),
    ];
    let answer = prop_oneof![
        Just(Answer::Stored),
        text().prop_map(|reason| Answer::Rejected { reason }),
        text().prop_map(|reason| Answer::GaveUp { reason }),
    ];
    prop_oneof![
        (n(), n(), any::<u16>(), text(), relay(), any::<u64>()).prop_map(
            |(job, customer, kind, request, relay, deadline_ms)| Record::Accepted {
                job,
                customer,
                kind,
                skill: "code".into(),
                request,
                relay,
                deadline_ms,
                agreed: Default::default(),
            }
        ),
        (n(), any::<u32>()).prop_map(|(job, attempt)| Record::Started { job, attempt, backend: "x".into() }),
        (n(), text()).prop_map(|(job, commit)| Record::Pinned { job, commit }),
        (n(), verdict, n()).prop_map(|(job, verdict, answer)| Record::Closed {
            job,
            verdict,
            answer,
            summary: Summary::default()
        }),
        (n(), n(), text(), any::<bool>()).prop_map(|(request, customer, code, answered)| Record::Refused {
            request,
            customer,
            code,
            answered
        }),
        (n(), n()).prop_map(|(request, by)| Record::Cancelled { request, by }),
        (n(), proptest::option::of(n()), proptest::collection::vec(relay(), 0..3), any::<u64>()).prop_map(
            |(event, job, relays, give_up_ms)| Record::Queued {
                event,
                job,
                json: "{}".into(),
                relays,
                give_up_ms
            }
        ),
        (n(), relay(), answer).prop_map(|(event, relay, answer)| Record::Delivered { event, relay, answer }),
        (relay(), any::<u64>()).prop_map(|(relay, until)| Record::Cursor { relay, until }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_index_made_from_the_log_is_the_one_made_live(
        batches in proptest::collection::vec(proptest::collection::vec(record(), 1..5), 1..25),
        restart_at in 0..25_usize,
    ) {
        let house = House::new();
        let mut store = house.try_open(house.small_segments()).unwrap();
        for (nth, batch) in batches.iter().enumerate() {
            if nth == restart_at {
                store.close().unwrap();
                store = house.try_open(house.small_segments()).unwrap();
                prop_assert!(!store.was_rebuilt());
            }
            house.clock.fetch_add(3, Ordering::SeqCst);
            store.append_blocking(batch.clone()).unwrap();
        }
        let live = store.dump_index().unwrap();
        let owed = store.owed().unwrap();
        let jobs = store.jobs(&JobFilter::default()).unwrap();
        let look = Store::read_only(&house.data()).unwrap();
        prop_assert_eq!(&look.dump_index().unwrap(), &live);
        store.close().unwrap();
        fs::remove_dir_all(house.data().join("index")).unwrap();
        let store = house.try_open(house.small_segments()).unwrap();
        prop_assert!(store.was_rebuilt());
        prop_assert_eq!(&store.dump_index().unwrap(), &live);
        prop_assert_eq!(store.owed().unwrap(), owed);
        prop_assert_eq!(store.jobs(&JobFilter::default()).unwrap(), jobs);
    }
}

#[test]
fn the_oldest_blobs_go_when_a_new_one_needs_their_room() {
    let house = House::new();
    let options = || Options { blobs_bytes: 20 * 4096, ..house.options() };
    let store = house.try_open(options()).unwrap();
    let path = |sha: &str| house.data().join("blobs").join(&sha[..2]).join(sha);
    // A minute between each, so that their order does not hang on the file system's clock.
    let put = |store: &Store, n: u64| {
        let sha = store.put_blob(n.to_string().as_bytes()).unwrap();
        let at = std::time::UNIX_EPOCH + Duration::from_secs(60 * n);
        fs::File::options().write(true).open(path(&sha)).unwrap().set_modified(at).unwrap();
        sha
    };
    let mut all: Vec<String> = (0..20).map(|n| put(&store, n)).collect();
    assert!(all.iter().all(|sha| store.blob(sha, 9).unwrap().is_some()), "they just fit");
    // Put again, the first one is the newest.
    store.put_blob(b"0").unwrap();
    all.push(put(&store, 20));
    let here = |store: &Store| -> Vec<usize> {
        (0..all.len()).filter(|n| store.blob(&all[*n], 9).unwrap().is_some()).collect()
    };
    let kept: Vec<usize> = [0].into_iter().chain(4..=20).collect();
    assert_eq!(here(&store), kept, "the oldest went, and a tenth of the room with them");

    // What an earlier life left counts, too.
    store.close().unwrap();
    drop(store);
    let store = house.try_open(options()).unwrap();
    for n in 100..200 {
        store.put_blob(n.to_string().as_bytes()).unwrap();
        let blobs = fs::read_dir(house.data().join("blobs")).unwrap().flatten();
        let files = blobs.flat_map(|folder| fs::read_dir(folder.path()).unwrap()).count();
        assert!(files <= 20, "{files} blobs of a block each");
    }
    assert!(here(&store).iter().all(|n| *n == 0) && store.put_blob(&[0; 20 * 4096 + 1]).is_err());
}

#[test]
fn a_log_with_open_jobs_opens_for_no_other_key() {
    let house = House::new();
    let open_as = |key: u64| Store::open_with(&house.data(), &Holder::new(id(key)), house.options());
    let store = open_as(9).unwrap();
    store.append_blocking(vec![accepted(1)]).unwrap();
    store.close().unwrap();
    for rebuild in [false, true] {
        if rebuild {
            fs::remove_dir_all(house.data().join("index")).unwrap();
        }
        let refused = open_as(8).map(drop).unwrap_err();
        let Error::OtherKey { taken_by, key, open, .. } = &refused else { panic!("{refused}") };
        assert_eq!((taken_by, key, *open), (&id(9), &id(8), 1));
        assert!(refused.to_string().contains("start with that key"), "{refused}");
    }
    let store = open_as(9).unwrap();
    assert!(!store.was_rebuilt(), "a refusal leaves everything in order");
    store.append_blocking(vec![closed(1, Verdict::Done, 50), queued(50, Some(1), &["a"])]).unwrap();
    store.close().unwrap();
    open_as(8).unwrap().close().unwrap();
    open_as(9).unwrap();
}
