//! kill -9 in each state of a job that was paid by an invoice: paid and not begun, run and not charged, charged and not
//! delivered. (Quoted and not paid: `paid`.) The state is read from the log after the kill, so a test that missed it
//! fails. Afterwards the payment is booked once, the job delivered once and charged once.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use coinop::ledger::{self, transfer};
use coinop::protocol::Status;
use coinop::store::JobState;
use coinop::store::money::Account;
use coinop::store::record::Record;
use futures_util::StreamExt;
use nostr_sdk::prelude::Event;

use crate::deal::{Deal, Over};
use crate::paid::SET;
use crate::support::buyer::{Buyer, printed};
use crate::support::gate::{Gate, Way};
use crate::support::process::{Nap, Running};
use crate::support::{PATIENCE, until};

/// Orders and pays by invoice; the request and what was paid for it.
async fn buy(deal: &Deal, buyer: &Buyer, commands: &[&str]) -> (Event, u64) {
    let request = buyer.post(&buyer.order(None, commands)).await;
    let quote = buyer.feedback(&request, Status::PaymentRequired).await;
    (request, deal.pay(&quote).await)
}

/// Each of these was paid once, run to one end, and charged once; what is left is credit.
async fn check_each_sold_once(deal: &Deal, buyer: &Buyer, sold: &[(Event, u64)]) {
    let store = deal.home.store();
    let (mut wanted, mut paid_msat, mut price_msat) = (Vec::new(), 0, 0);
    for (request, msat) in sold {
        assert_eq!(buyer.ends(request).await.len(), 1);
        let id = request.id.to_hex();
        let history = store.history(&id).expect("readable");
        let count = |f: fn(&Record) -> bool| history.iter().filter(|entry| f(&entry.record)).count();
        assert_eq!(count(|record| matches!(record, Record::Invoiced(_))), 1);
        assert_eq!(count(|record| matches!(record, Record::Accepted { .. })), 1);
        assert_eq!(count(|record| matches!(record, Record::Closed { .. })), 1);
        let hash = store.quote(&id).expect("readable").expect("a quote").payment_hash.expect("an invoice");
        wanted.extend([transfer::paid_id(&hash), transfer::hold_id(&id), transfer::resolve_id(&id)]);
        paid_msat += msat;
        let row = store.job(&id).expect("readable").expect("known");
        assert_eq!(row.state, JobState::Done);
        price_msat += row.summary.expect("a summary").price_msat;
    }
    let customer = buyer.keys.public_key().to_hex();
    let posted = store.postings(&customer, 100).expect("readable");
    let mut posted: Vec<String> = posted.into_iter().map(|p| p.transfer.id).collect();
    posted.sort();
    wanted.sort();
    assert_eq!(posted, wanted);
    let balance = |account| store.balance(&account).expect("readable");
    assert_eq!(balance(Account::Wallet("lnbits".into())), i128::from(paid_msat));
    assert_eq!(deal.server.balance_msat(&deal.provider), paid_msat);
    assert!(price_msat >= 20_000, "{price_msat}");
    assert_eq!(balance(Account::Credit(customer)), i128::from(price_msat) - i128::from(paid_msat));
    let verified = ledger::verify(&store).expect("books that add up");
    assert_eq!((verified.sum_msat, verified.open_holds), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_job_that_is_paid_and_not_begun_when_the_node_dies_is_run_and_booked_once() {
    let test = "a_job_that_is_paid_and_not_begun_when_the_node_dies_is_run_and_booked_once";
    let set = [&SET[..], &["--max-jobs", "1"]].concat();
    let Some(deal) = Deal::open(test, Over::Lnbits, &set).await else { return };
    let buyer = Buyer::at(&[deal.relay.url()], deal.home.keys.public_key()).await;
    let node = deal.home.start();
    let nap = Nap::new();
    let first = buy(&deal, &buyer, &[&nap.command(), "echo one"]).await;
    nap.begun().await;
    let second = buy(&deal, &buyer, &["echo two"]).await;
    buyer.accepted(&second.0).await;

    node.kill().await;
    nap.gone(Duration::from_secs(5)).await;
    let states = [&first, &second].map(|(job, _)| deal.home.job(&job.id.to_hex()).map(|j| j.state));
    assert_eq!(states, [Some(JobState::Running), Some(JobState::Accepted)]);
    assert_eq!(deal.home.store().holds().expect("readable").len(), 2);

    let node = deal.home.start();
    nap.wake().await;
    assert_eq!(printed(&buyer.result(&first.0).await), "one\n");
    assert_eq!(printed(&buyer.result(&second.0).await), "two\n");
    assert!(node.stop().await.success());
    check_each_sold_once(&deal, &buyer, &[first, second]).await;
}

/// Watches a process that runs already, and kills it at its next write into the log. `Err`: that cannot be done here.
async fn killed_at_the_next_write(pid: u32) -> Result<Child, String> {
    let trace = ["-e", "trace=pwrite64", "-e", "inject=pwrite64:signal=SIGKILL:when=1"];
    let mut strace = Command::new("strace");
    strace.args(["-qq", "-f", "-o", "/dev/null", "-p", &pid.to_string()]).args(trace);
    strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut strace = strace.spawn().map_err(|error| format!("strace: {error}"))?;
    let watched = |status: String| !status.contains("TracerPid:\t0\n");
    let began = Instant::now();
    loop {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it lives").flatten();
        let status = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("status")).ok();
        if threads.filter_map(status).all(watched) {
            return Ok(strace);
        }
        if let Some(status) = strace.try_wait().expect("our child") {
            return Err(format!("strace cannot watch a process that runs: {status}"));
        }
        assert!(began.elapsed() < PATIENCE, "strace takes its time");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until nothing has been written into the log for longer than a record may wait in memory.
async fn log_is_quiet(deal: &Deal) {
    let mut seen = (deal.home.store().head().seq, Instant::now());
    until("the log to be quiet", async || {
        let seq = deal.home.store().head().seq;
        if seq != seen.0 {
            seen = (seq, Instant::now());
        }
        (seen.1.elapsed() > Duration::from_millis(1_500)).then_some(())
    })
    .await;
}

/// What jobs have printed, as it is kept for the node's owner.
fn kept_logs(deal: &Deal) -> usize {
    let folders = std::fs::read_dir(deal.home.data.join("blobs")).into_iter().flatten().flatten();
    folders.map(|folder| std::fs::read_dir(folder.path()).into_iter().flatten().count()).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_job_that_has_run_and_is_not_charged_when_the_node_dies_is_charged_once() {
    let test = "a_job_that_has_run_and_is_not_charged_when_the_node_dies_is_charged_once";
    let Some(deal) = Deal::open(test, Over::Lnbits, &SET).await else { return };
    let buyer = Buyer::at(&[deal.relay.url()], deal.home.keys.public_key()).await;
    let mut node = deal.home.start();
    let nap = Nap::new();
    let sold = buy(&deal, &buyer, &[&nap.command(), "echo sold"]).await;
    nap.begun().await;
    log_is_quiet(&deal).await;
    let mut strace = match killed_at_the_next_write(node.pid()).await {
        Ok(strace) => strace,
        Err(why) => return crate::skip::skip(test, &why),
    };
    assert_eq!(kept_logs(&deal), 0);
    nap.wake().await;
    node.ended(PATIENCE).await;
    strace.wait().expect("our child");

    // What it printed is on the disk, its end is not in the log.
    assert_eq!(kept_logs(&deal), 1);
    let id = sold.0.id.to_hex();
    let row = deal.home.job(&id).expect("known");
    assert_eq!((row.state, row.answer), (JobState::Running, None));
    assert_eq!(deal.home.store().holds().expect("readable").len(), 1);
    assert!(buyer.ends(&sold.0).await.is_empty());

    let node = deal.home.start();
    nap.wake().await;
    assert_eq!(printed(&buyer.result(&sold.0).await), "sold\n");
    assert!(node.stop().await.success());
    assert_eq!(deal.home.job(&id).expect("known").attempt, 2);
    check_each_sold_once(&deal, &buyer, &[sold]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_job_that_is_charged_and_not_delivered_when_the_node_dies_is_delivered_and_not_charged_again() {
    let test =
        "a_job_that_is_charged_and_not_delivered_when_the_node_dies_is_delivered_and_not_charged_again";
    let Some(mut deal) = Deal::open(test, Over::Lnbits, &SET).await else { return };
    let gate = Gate::before(deal.relay.address()).await;
    deal.move_to(format!("ws://{}", gate.address()), &SET);
    let buyer = Buyer::at(&[deal.relay.url()], deal.home.keys.public_key()).await;
    let node = deal.home.start();
    let nap = Nap::new();
    let sold = buy(&deal, &buyer, &[&nap.command(), "echo sold"]).await;
    nap.begun().await;
    gate.set(Way::Shut);
    nap.wake().await;
    let id = sold.0.id.to_hex();
    let answer = until("the job to be closed", async || deal.home.job(&id).and_then(|job| job.answer)).await;

    node.kill().await;
    let store = deal.home.store();
    assert_eq!(store.deliveries(&answer).expect("readable"), [], "nobody has said OK");
    let charged = store.transfer(&transfer::resolve_id(&id)).expect("readable").expect("charged");
    assert!(store.holds().expect("readable").is_empty());
    assert!(buyer.ends(&sold.0).await.is_empty());

    gate.set(Way::Open);
    let node = deal.home.start();
    assert_eq!(printed(&buyer.result(&sold.0).await), "sold\n");
    assert!(node.stop().await.success());
    let now = deal.home.store().transfer(&transfer::resolve_id(&id)).expect("readable");
    assert_eq!(now, Some(charged));
    check_each_sold_once(&deal, &buyer, &[sold]).await;
}

/// Pays the quote when it comes, and waits for the delivery. `None`: the node died.
async fn deal_goes_on(
    deal: &Deal,
    buyer: &Buyer,
    request: &Event,
    node: &mut Running,
    paid: &mut Option<u64>,
) -> Option<()> {
    let id = request.id.to_hex();
    until("the delivery, or the node's end", async || {
        if node.try_ended().is_some() {
            return Some(None);
        }
        let quotes = || async { buyer.feedbacks(request).await.into_iter() };
        if paid.is_none()
            && let Some(quote) = quotes().await.find(|f| f.status == Status::PaymentRequired)
        {
            *paid = Some(deal.pay(&quote).await);
        }
        let answer = deal.home.job(&id)?.answer?;
        let words = deal.home.store().deliveries(&answer).ok()?;
        (!words.is_empty()).then_some(Some(()))
    })
    .await
}

/// One life that is killed at its N-th sync, and the one after it. `false`: the first life did all the work.
async fn killed_at_sync(deal: &Deal, n: u32) -> bool {
    let buyer = Buyer::at(&[deal.relay.url()], deal.home.keys.public_key()).await;
    let request = buyer.post(&buyer.order(None, &["echo sold"])).await;
    let mut paid = None;
    let inject = format!("inject=fdatasync:signal=SIGKILL:when={n}");
    let strace = ["strace", "-qq", "-f", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", &inject];
    let mut node = deal.home.start_under(&strace.map(str::to_owned));
    if deal_goes_on(deal, &buyer, &request, &mut node, &mut paid).await.is_some() {
        node.terminate();
    }
    let killed = !node.ended(PATIENCE).await.success();
    drop(node);
    // The customer does not know that the node is dead.
    if let Ok(store) = coinop::store::Store::read_only(&deal.home.data) {
        let told = buyer.stored(&request).await;
        let kept = |event: &Event| store.answer(&event.id.to_hex()).expect("readable").is_some();
        assert!(told.iter().all(kept), "sync {n}: told and not recorded: {told:?}");
    }

    let mut node = deal.home.start();
    let went_on = deal_goes_on(deal, &buyer, &request, &mut node, &mut paid).await;
    assert!(went_on.is_some(), "sync {n}: {}", node.log());
    assert_eq!(printed(&buyer.result(&request).await), "sold\n", "sync {n}");
    assert!(node.stop().await.success(), "sync {n}");
    let quotes = buyer.feedbacks(&request).await;
    let quotes = quotes.iter().filter(|f| f.status == Status::PaymentRequired).count();
    assert_eq!(quotes, 1, "sync {n}: asked once");
    check_each_sold_once(deal, &buyer, &[(request, paid.expect("paid"))]).await;
    killed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_node_killed_at_any_sync_of_a_paid_deal_asks_once_delivers_once_and_charges_once() {
    let test = "a_node_killed_at_any_sync_of_a_paid_deal_asks_once_delivers_once_and_charges_once";
    if let Err(error) = Command::new("strace").arg("-V").stdout(Stdio::null()).status() {
        return crate::skip::skip(test, &format!("strace: {error}"));
    }
    let last = AtomicU32::new(u32::MAX);
    // The first two are of the start, before any event is read; the free job is killed at them, too.
    futures_util::stream::iter(3..100)
        .for_each_concurrent(2, async |n| {
            if n > last.load(Ordering::SeqCst) {
                return;
            }
            let Some(deal) = Deal::open(test, Over::Lnbits, &SET).await else {
                last.fetch_min(0, Ordering::SeqCst);
                return;
            };
            if !killed_at_sync(&deal, n).await {
                last.fetch_min(n, Ordering::SeqCst);
            }
        })
        .await;
    let last = last.load(Ordering::SeqCst);
    assert!(last == 0 || (8..100).contains(&last), "{last} syncs");
    eprintln!("a deal by invoice: killed at {} syncs", last.saturating_sub(3));
}
