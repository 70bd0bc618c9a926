//! The books in other hands: hledger balances the export, and its income is our report's; a damaged log is named and a
//! backup brings it back.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use coinop::ledger::report::{By, Window};
use coinop::ledger::transfer::{self, capture, cost, grant, hold, paid, void};
use coinop::ledger::{self, Broken, Ledger, export, report};
use coinop::store::money::{About, Account};
use coinop::store::{self, Holder, Options, Store};
use jiff::tz::TimeZone;
use tempfile::TempDir;

use crate::skip::skip;

const HOUR_MS: u64 = 3_600_000;
/// 2026-10-24T00:00Z: a day before clocks change in Europe.
const BEGIN_MS: u64 = 1_792_800_000_000;

/// A ledger of four days with something of everything, an hour between any two steps.
async fn books(dir: &TempDir) -> Ledger {
    let now = Arc::new(AtomicU64::new(BEGIN_MS));
    let clock = {
        let now = Arc::clone(&now);
        Arc::new(move || now.load(Ordering::SeqCst))
    };
    let locks = dir.path().join("locks");
    std::fs::create_dir_all(&locks).expect("a folder");
    let options = Options { key_locks: Some(locks), segment_bytes: 8_192, clock, ..Options::default() };
    let store =
        Store::open_with(&dir.path().join("data"), &Holder::new("a".repeat(64)), options).expect("a store");
    let ledger = Ledger::new(store);
    for n in 0..32_u64 {
        let customer = format!("{:064x}", 1 + n % 3);
        let job = format!("job{n}");
        let about = About {
            customer: customer.clone(),
            skill: if n % 2 == 0 { "code".into() } else { "generic".into() },
            repo: (n % 4 > 0).then(|| "https://git.example/a,\"b\"".to_owned()),
            backend: "local".into(),
            agent: "script".into(),
            unpaid_msat: 0,
        };
        let revenue = Account::Revenue { skill: about.skill.clone(), place: "local".into() };
        let step = || {
            now.fetch_add(HOUR_MS, Ordering::SeqCst);
        };
        ledger.post(paid(&format!("h{n}"), "lnbits", Some(&customer), 10_000)).await.expect("paid");
        ledger.post(hold(&job, &customer, 8_000, 0, 0)).await.expect("held");
        step();
        if n % 5 == 0 {
            ledger.post(void(&job, &customer, 8_000, "timeout")).await.expect("void");
        } else {
            ledger
                .post(capture(&job, 8_000, 3_000 + n, &[(revenue, 1)], about.clone()))
                .await
                .expect("captured");
            let spent = cost(&job, 0, Account::ContainerCost("docker".into()), "rent", 40 + n, None, about);
            ledger.post(spent).await.expect("booked");
        }
        step();
        if n == 7 {
            let gift = grant("g", &customer, 500, "a; note | with marks");
            ledger.post(gift.clone()).await.expect("given");
            ledger.post(transfer::correction(&gift, "")).await.expect("undone");
            ledger.post(transfer::refund_begun("r", &customer, 1_000, "lnbc", 9)).await.expect("begun");
            ledger.post(transfer::refund_paid("r", &customer, "lnbits", 1_000, 3)).await.expect("paid out");
        }
        step();
    }
    ledger
}

fn window(from_ms: u64, to_ms: u64, zone: &str) -> Window {
    Window { from_ms, to_ms, zone: TimeZone::get(zone).expect("a zone") }
}

fn hledger(journal: &Path, args: &[&str]) -> String {
    let output = Command::new("hledger").arg("-f").arg(journal).args(args).output().expect("hledger runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

#[tokio::test]
async fn hledger_balances_the_export_and_its_income_is_our_report() {
    let test = "hledger_balances_the_export_and_its_income_is_our_report";
    if Command::new("hledger").arg("--version").output().is_err() {
        return skip(test, "hledger is not installed; `.ci/parts system` installs it");
    }
    let dir = tempfile::tempdir().expect("a folder");
    let ledger = books(&dir).await;
    let data = dir.path().join("data");
    for (from_ms, to_ms) in [(0, u64::MAX), (BEGIN_MS + 13 * HOUR_MS, BEGIN_MS + 60 * HOUR_MS)] {
        let window = window(from_ms, to_ms, "Europe/Berlin");
        let journal = dir.path().join(format!("{from_ms}.journal"));
        let mut file = std::fs::File::create(&journal).expect("a file");
        let count = export::export(&data, &window, export::Format::Hledger, &mut file).expect("an export");
        assert!(count > 20, "{count}");
        hledger(&journal, &["check", "--strict"]);
        let total = |query: &str| -> i128 {
            let csv = hledger(&journal, &["balance", query, "--depth", "1", "-O", "csv", "-N"]);
            let amounts = csv.lines().skip(1).filter_map(|line| {
                line.split(',').nth(1)?.trim_matches('"').split(' ').next()?.parse::<i128>().ok()
            });
            amounts.sum()
        };
        let (revenues, expenses) = (total("^revenues"), total("^expenses"));
        let ours = report::report(&data, &window, By::Skill).expect("a report").total;
        assert_eq!(-revenues, ours.revenue_msat);
        assert_eq!(-revenues - expenses, ours.profit_msat);
        assert!(ours.profit_msat > 0 && ours.container_cost_msat > 0 && ours.revenue_msat > 0);
    }
    let whole = report::report(&data, &window(0, u64::MAX, "UTC"), By::Day).expect("a report");
    assert_eq!((whole.total.fees_msat, whole.total.refunds_msat, whole.total.grants_msat), (3, 1_000, 0));
    ledger::verify(ledger.store()).expect("books that add up");
}

#[tokio::test]
async fn beancount_takes_the_export_without_a_complaint() {
    let test = "beancount_takes_the_export_without_a_complaint";
    if Command::new("bean-check").arg("--version").output().is_err() {
        return skip(test, "there is no bean-check: Debian's beancount has it");
    }
    let dir = tempfile::tempdir().expect("a folder");
    let _ledger = books(&dir).await;
    let path = dir.path().join("books.beancount");
    let mut file = std::fs::File::create(&path).expect("a file");
    let window = window(0, u64::MAX, "Europe/Berlin");
    export::export(&dir.path().join("data"), &window, export::Format::Beancount, &mut file)
        .expect("an export");
    let checked = Command::new("bean-check").arg(&path).output().expect("bean-check runs");
    let said = String::from_utf8_lossy(&checked.stderr);
    assert!(checked.status.success() && checked.stderr.is_empty(), "{said}");
}

#[tokio::test]
async fn a_report_counts_its_first_moment_and_not_its_last_and_its_days_are_the_zones() {
    let dir = tempfile::tempdir().expect("a folder");
    let _ledger = books(&dir).await;
    let data = dir.path().join("data");
    let report =
        |from, to, zone: &str, by| report::report(&data, &window(from, to, zone), by).expect("a report");
    let all = report(0, u64::MAX, "UTC", By::Day);
    // Whatever the borders are, the parts make the whole.
    for cut in
        [BEGIN_MS, BEGIN_MS + 1, BEGIN_MS + 4 * HOUR_MS, BEGIN_MS + 4 * HOUR_MS + 1, BEGIN_MS + 50 * HOUR_MS]
    {
        let (before, after) = (report(0, cut, "UTC", By::Day), report(cut, u64::MAX, "UTC", By::Day));
        assert_eq!(before.total.revenue_msat + after.total.revenue_msat, all.total.revenue_msat);
        assert_eq!(before.total.jobs + after.total.jobs, all.total.jobs);
    }
    // The second job (n = 1) is captured four hours in: the first moment counts, the last does not.
    let at = BEGIN_MS + 4 * HOUR_MS;
    assert_eq!(report(at, at + 1, "UTC", By::Day).total.jobs, 1);
    assert_eq!(report(at - HOUR_MS, at, "UTC", By::Day).total.jobs, 0);
    for by in [By::Day, By::Month, By::Skill, By::Customer, By::Repo, By::Backend, By::Agent] {
        for zone in ["UTC", "Europe/Berlin", "Asia/Kathmandu"] {
            let rows = report(0, u64::MAX, zone, by);
            let sum: i128 = rows.rows.iter().map(|row| row.sums.profit_msat).sum();
            assert_eq!((sum, &rows.total), (all.total.profit_msat, &all.total), "{by:?} {zone}");
        }
    }
    let days = |zone| {
        report(0, u64::MAX, zone, By::Day).rows.into_iter().map(|r| (r.key, r.sums.jobs)).collect::<Vec<_>>()
    };
    let (utc, berlin) = (days("UTC"), days("Europe/Berlin"));
    assert_eq!(
        utc.iter().map(|(day, _)| day.as_str()).collect::<Vec<_>>(),
        ["2026-10-24", "2026-10-25", "2026-10-26", "2026-10-27"]
    );
    assert_ne!(utc, berlin, "midnight is elsewhere");
    let keys: Vec<_> = report(0, u64::MAX, "UTC", By::Repo).rows.into_iter().map(|row| row.key).collect();
    assert_eq!(keys, ["-", "https://git.example/a,%22b%22"]);
}

#[tokio::test]
async fn a_flipped_byte_is_named_and_the_backup_brings_the_books_back() {
    let dir = tempfile::tempdir().expect("a folder");
    let ledger = books(&dir).await;
    let (data, backup) = (dir.path().join("data"), dir.path().join("backup"));
    let head = Store::backup_of(&data, &backup).expect("a backup beside the open store");
    assert_eq!(head, ledger.store().head());
    let balances = ledger.store().balances().expect("readable");
    ledger.store().close().expect("closed");
    drop(ledger);

    let log = std::fs::read_dir(data.join("log")).expect("a log");
    let mut segments: Vec<_> = log.map(|entry| entry.expect("an entry").path()).collect();
    segments.sort();
    let victim = &segments[1];
    let mut bytes = std::fs::read(victim).expect("a segment");
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    std::fs::write(victim, &bytes).expect("damaged");
    let broken = ledger::verify_log(&data).expect_err("it is damaged");
    let Broken::Store(store::Error::Corrupt(damage)) = &broken else { panic!("{broken}") };
    assert_eq!(&damage.segment, victim);
    assert_eq!(broken.entry(), Some(damage.seq));

    let (restored, aside) = Store::restore(&data, &backup).expect("restored");
    assert_eq!(restored, head);
    assert!(ledger::verify_log(&data).is_ok());
    let kept = aside.expect("the damaged log is kept");
    assert_eq!(std::fs::read(kept.join(victim.file_name().expect("a name"))).expect("readable"), bytes);
    let locks = dir.path().join("locks");
    let options = Options { key_locks: Some(locks), ..Options::default() };
    let store = Store::open_with(&data, &Holder::new("a".repeat(64)), options).expect("it opens again");
    assert_eq!(store.balances().expect("readable"), balances);
    // Not while somebody holds the folder.
    let held = Store::restore(&data, &backup).expect_err("held");
    assert!(matches!(held, store::Error::Held { .. }), "{held}");
}

#[tokio::test]
async fn csv_and_json_lines_carry_every_leg() {
    let dir = tempfile::tempdir().expect("a folder");
    let ledger = books(&dir).await;
    let all = window(0, u64::MAX, "UTC");
    let data = dir.path().join("data");
    let text = |format| {
        let mut out = Vec::new();
        let count = export::export(&data, &all, format, &mut out).expect("an export");
        (count, String::from_utf8(out).expect("text"))
    };
    let (count, lines) = text(export::Format::Jsonl);
    let transfers: Vec<store::Posted> =
        lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(count, transfers.len() as u64);
    let (_, csv) = text(export::Format::Csv);
    let legs: usize = transfers.iter().map(|posted| posted.transfer.legs.len()).sum();
    assert_eq!(csv.lines().count(), legs + 1);
    for posted in &transfers {
        let found = ledger.transfer(&posted.transfer.id).expect("readable").expect("posted");
        assert_eq!(&found, posted);
    }
}

/// The segment files, oldest first.
fn segments(data: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(data.join("log")).expect("a log");
    let mut files: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files
}

/// What each reader says of the log: nothing, or why it does not take it.
fn readers(dir: &TempDir, turn: usize) -> Vec<(&'static str, Option<String>)> {
    let data = dir.path().join("data");
    let window = || window(0, u64::MAX, "UTC");
    let said = |result: Result<(), String>| result.err();
    vec![
        ("verify", said(ledger::verify_log(&data).map(drop).map_err(|e| e.to_string()))),
        ("earnings", said(report::report(&data, &window(), By::Day).map(drop).map_err(|e| e.to_string()))),
        (
            "export",
            said(
                export::export(&data, &window(), export::Format::Jsonl, &mut std::io::sink())
                    .map(drop)
                    .map_err(|e| e.to_string()),
            ),
        ),
        ("show", said(Store::read_only(&data).map(drop).map_err(|e| e.to_string()))),
        (
            "backup",
            said(
                Store::backup_of(&data, &dir.path().join(format!("copy{turn}")))
                    .map(drop)
                    .map_err(|e| e.to_string()),
            ),
        ),
    ]
}

#[tokio::test]
async fn every_reader_refuses_a_log_that_is_shorter_than_it_was_or_lacks_a_segment() {
    let dir = tempfile::tempdir().expect("a folder");
    let ledger = books(&dir).await;
    let data = dir.path().join("data");
    ledger.store().close().expect("closed");
    drop(ledger);
    for (reader, refused) in readers(&dir, 0) {
        assert_eq!(refused, None, "{reader} reads a whole log");
    }
    let files = segments(&data);
    assert!(files.len() >= 4, "{files:?}");
    let last = files.last().expect("a last one").clone();
    let whole = std::fs::read(&last).expect("readable");
    let aside = dir.path().join("aside");
    // Cut in a record, cut behind one, and the last segment gone.
    let cut_to = |bytes: usize| std::fs::write(&last, &whole[..bytes]).expect("written");
    let mut turn = 0;
    let mut all_refuse = |what: &str, why: &str| {
        turn += 1;
        for (reader, refused) in readers(&dir, turn) {
            let refused = refused.unwrap_or_else(|| panic!("{reader} reads a log with {what}"));
            assert!(refused.contains(why), "{reader}, {what}: {refused}");
        }
    };
    cut_to(whole.len() - 40);
    all_refuse("its last record cut", "was durable");
    cut_to(64);
    all_refuse("an empty last segment", "was durable");
    std::fs::remove_file(&last).expect("removed");
    all_refuse("its last segment gone", "was durable");
    cut_to(whole.len());
    for (nth, why) in [(0, "first segment"), (2, "are missing")] {
        std::fs::rename(&files[nth], &aside).expect("moved");
        all_refuse("a segment gone", why);
        std::fs::rename(&aside, &files[nth]).expect("moved back");
    }
    // A start goes on from the same promise, also after a crash, when there is no index to go with it.
    let options = || Options { key_locks: Some(dir.path().join("locks")), ..Options::default() };
    let open = || Store::open_with(&data, &Holder::new("a".repeat(64)), options());
    std::fs::rename(data.join("index/CLEAN"), data.join("index/PROMISE")).expect("as while a node runs");
    cut_to(64);
    all_refuse("an empty last segment, and no index", "was durable");
    for _ in 0..2 {
        let refused = open().map(drop).expect_err("too short");
        assert!(matches!(refused, store::Error::Shortened { .. }), "{refused}");
    }
    cut_to(whole.len());
    open().expect("whole again").close().expect("closed");
    for (reader, refused) in readers(&dir, 99) {
        assert_eq!(refused, None, "{reader}");
    }
    // A backup keeps the promise.
    let copy = dir.path().join("copy99");
    let last = segments(&copy).pop().expect("a last one");
    let bytes = std::fs::read(&last).expect("readable");
    std::fs::write(&last, &bytes[..bytes.len() - 40]).expect("cut");
    let refused = Store::restore(&dir.path().join("new"), &copy).map(drop).expect_err("too short");
    assert!(matches!(refused, store::Error::Shortened { .. }), "{refused}");
}

#[tokio::test]
async fn a_check_against_a_noted_head_finds_what_was_cut_off_or_written_anew() {
    let dir = tempfile::tempdir().expect("a folder");
    let ledger = books(&dir).await;
    let keys = nostr_sdk::Keys::generate();
    let data = dir.path().join("data");
    let seal = ledger.seal(&keys, 1).await.expect("signed");
    ledger.post(grant("later", &"1".repeat(64), 1, "")).await.expect("given");
    ledger.store().close().expect("closed");
    // Signed by a key that never opened this log, so the whole check fails; the head itself is what it was.
    let head = seal.head.clone();
    let noted = ledger::Seal::from_note(&serde_json::to_string(&seal).expect("JSON")).expect("a seal");
    assert_eq!(noted, seal);
    let event = serde_json::to_string(&seal.event).expect("JSON");
    assert_eq!(ledger::Seal::from_note(&event), Some(noted));
    assert_eq!(ledger::Seal::from_note("{}"), None);
    let checked = ledger::Verified {
        head: store::Head { seq: head.seq + 2, hash: String::new() },
        transfers: 0,
        accounts: 0,
        open_holds: 0,
        seals: 0,
        last_seal: None,
        sum_msat: 0,
        nodes: vec!["a".repeat(64)],
    };
    let against = |head: &store::Head, by: Option<&str>| ledger::verify_against(&data, &checked, head, by);
    against(&head, None).expect("it is there");
    against(&head, Some(&"a".repeat(64))).expect("by a key of this log");
    let other = against(&head, Some(&keys.public_key().to_hex()));
    assert!(matches!(other, Err(Broken::OtherSigner { .. })), "{other:?}");
    let rewritten = against(&store::Head { hash: "0".repeat(64), ..head.clone() }, None);
    assert!(matches!(rewritten, Err(Broken::OtherHead { seq }) if seq == head.seq), "{rewritten:?}");
    let cut = against(&store::Head { seq: head.seq + 3, ..head }, None);
    assert!(matches!(cut, Err(Broken::Store(store::Error::Shortened { .. }))), "{cut:?}");
}
