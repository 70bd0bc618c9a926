//! The owner's orders about money, killed at every write, sync and word to the wallet: a grant, a refund, an invoice that
//! tops credit up. They are given while the node stands still, the first two also to one that runs. Afterwards
//! the same order is given again: no refund was paid twice, no credit was lost or made, and the books add up. The wallets
//! are those of a real LNbits.

use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicU32, Ordering};

use coinop::ledger::{self, transfer};
use coinop::store::money::Account;
use coinop::store::{self, Head, Store};
use coinop::wallet::read_bolt11;
use serde_json::Value;

use super::deal::{Deal, FREE, Over};
use super::paid::at_every;
use super::support::process::Running;
use super::support::skip::skip;
use super::support::{PATIENCE, until};
use super::writes::{injecting, strace_works};

const GRANT_MSAT: u64 = 100_000;
const REFUND_SAT: u64 = 60;
const TOPUP_MSAT: u64 = 21_000;
/// Runs at once: the wallet server is one process, and answers each call more slowly the more there are.
const ABREAST: usize = 2;
/// What goes into each of the two wallets. All errands of a test share them: a wallet takes seconds to make.
const FUNDS_SAT: u64 = 50_000;
const SYNC: &str = "fdatasync";
const WORD: &str = "sendto,recvfrom";
/// The calls by which anything gets out of the program.
const CALLS: [&str; 5] =
    [SYNC, "pwrite64", "fsync", "rename,renameat,renameat2,unlink,unlinkat,ftruncate", WORD];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Grant,
    Refund,
    Topup,
}

/// The two wallets, and how many errands have used them.
struct Market {
    deal: Deal,
    errands: AtomicU32,
}

impl Market {
    /// `None`: a part is missing.
    async fn open(test: &str) -> Option<Market> {
        let deal = Deal::open(test, Over::Lnbits, &[]).await?;
        let (server, purses) = (deal.server.clone(), [deal.provider.clone(), deal.customer.clone()]);
        let funded = move || purses.iter().for_each(|purse| server.fund(purse, FUNDS_SAT));
        tokio::task::spawn_blocking(funded).await.expect("funds");
        Some(Market { deal, errands: AtomicU32::new(0) })
    }

    /// What the provider's wallet has, and the customer's.
    fn sats(&self) -> [i64; 2] {
        let sats = |purse| self.deal.server.balance_msat(purse).cast_signed() / 1_000;
        [sats(&self.deal.provider), sats(&self.deal.customer)]
    }

    /// After all errands: each has moved its sats once.
    fn check(&self, what: What, before: [i64; 2]) {
        let each = match what {
            What::Grant => 0,
            What::Refund => -REFUND_SAT.cast_signed(),
            What::Topup => TOPUP_MSAT.cast_signed() / 1_000,
        };
        let moved = each * i64::from(self.errands.load(Ordering::SeqCst));
        assert_eq!(self.sats(), [before[0] + moved, before[1] - moved], "{what:?}");
    }
}

/// One order, before which the customer has credit, unless it is the grant.
struct Errand {
    what: What,
    deal: Deal,
    /// The command, with the wallet for when it opens the books itself.
    args: Vec<String>,
    /// The customer's invoice to be paid.
    bolt11: String,
}

impl Errand {
    async fn new(market: &Market, what: What) -> Errand {
        market.errands.fetch_add(1, Ordering::SeqCst);
        let deal = market.deal.another(&[&["--set", "drain_timeout_ms=500"][..], &FREE].concat()).await;
        let bolt11 = match what {
            What::Refund => {
                let (server, customer) = (deal.server.clone(), deal.customer.clone());
                let made = tokio::task::spawn_blocking(move || server.invoice(&customer, REFUND_SAT));
                made.await.expect("an invoice")
            }
            What::Grant | What::Topup => String::new(),
        };
        let (key, grant, topup) = (deal.customer_hex(), GRANT_MSAT.to_string(), TOPUP_MSAT.to_string());
        let grant = ["credits", "grant", &key, &grant, "--id", "welcome", "--note", "hello", "--json"];
        let order = match what {
            What::Grant => grant.to_vec(),
            What::Refund => vec!["credits", "refund", &key, &bolt11, "--json"],
            What::Topup => vec!["credits", "topup", &key, &topup, "--json"],
        };
        let args = order.iter().map(|word| (*word).to_owned()).chain(deal.own.iter().cloned()).collect();
        if what != What::Grant {
            deal.told(&grant).await;
        }
        Errand { what, deal, args, bolt11 }
    }

    fn args(&self) -> Vec<&str> {
        self.args.iter().map(String::as_str).collect()
    }

    /// What a life that broke off has left is whole; the place that the log had reached. `None`: there is no log yet.
    fn left(&self, point: &str) -> Option<Head> {
        let store = Store::read_only(&self.deal.home.data).ok()?;
        ledger::verify_log(&self.deal.home.data).unwrap_or_else(|broken| panic!("{point}: {broken}"));
        Some(store.head())
    }

    /// The answer to the order, given again. Just after a kill the wallet may still be at the payment.
    async fn answer(&self, point: &str) -> Value {
        until(&format!("{point}: the answer"), async || {
            let out = self.deal.owner(&self.args()).await;
            let said = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(out.status.success() || is_asked_again(&said), "{point}: {said}");
            serde_json::from_slice(&out.stdout).ok()
        })
        .await
    }

    /// After everything: done once, and given again it is answered as before.
    async fn check(&self, point: &str, befores: &[Head]) {
        let answers = [self.answer(point).await, self.answer(point).await];
        for before in befores {
            let hash = store::hash_of(&self.deal.home.data, before.seq).expect("readable");
            assert_eq!(hash.as_ref(), Some(&before.hash), "{point}: what was in the log still is");
        }
        let (mut wanted, mut wallet_msat) = (vec!["grant:welcome".to_owned()], 0);
        match self.what {
            What::Grant => check_answers(point, &answers, GRANT_MSAT),
            What::Refund => {
                check_answers(point, &answers, GRANT_MSAT - REFUND_SAT * 1_000);
                let hash = read_bolt11(&self.bolt11).expect("an invoice").payment_hash.to_hex();
                wanted.extend([transfer::refund_id(&hash), transfer::refunded_id(&hash)]);
                wallet_msat = -i128::from(REFUND_SAT * 1_000);
            }
            What::Topup => {
                wanted.push(transfer::paid_id(&self.topped_up(point, &answers).await));
                wallet_msat = TOPUP_MSAT.into();
            }
        }
        let store = self.deal.home.store();
        let posted = store.postings(&self.deal.customer_hex(), 100).expect("readable");
        let posted: Vec<String> = posted.into_iter().rev().map(|posted| posted.transfer.id).collect();
        assert_eq!(posted, wanted, "{point}");
        let wallet = store.balance(&Account::Wallet("lnbits".into())).expect("readable");
        assert_eq!(wallet, wallet_msat, "{point}");
        let verified = ledger::verify(&store).unwrap_or_else(|broken| panic!("{point}: {broken}"));
        assert_eq!(verified.sum_msat, 0, "{point}");
    }

    /// Each order makes an invoice of its own, and an invoice is no credit before it is paid. Paid, it is, once; its hash.
    async fn topped_up(&self, point: &str, answers: &[Value; 2]) -> String {
        let [first, second] =
            answers.each_ref().map(|answer| answer["bolt11"].as_str().expect("an invoice").to_owned());
        assert_ne!(first, second, "{point}");
        let customer = self.deal.customer_hex();
        let available =
            || -self.deal.home.store().balance(&Account::Credit(customer.clone())).expect("known");
        assert_eq!(available(), GRANT_MSAT.into(), "{point}");
        let (server, purse, bolt11) = (self.deal.server.clone(), self.deal.customer.clone(), first.clone());
        tokio::task::spawn_blocking(move || server.pay(&purse, &bolt11)).await.expect("paid");
        let node = self.deal.home.start();
        let paid = async || (available() != i128::from(GRANT_MSAT)).then_some(());
        until(&format!("{point}: the credit"), paid).await;
        assert!(node.stop().await.success(), "{point}");
        assert_eq!(available(), (GRANT_MSAT + TOPUP_MSAT).into(), "{point}");
        read_bolt11(&first).expect("an invoice").payment_hash.to_hex()
    }
}

/// Whether the owner is told to look again: the wallet is still at it, or slow.
fn is_asked_again(said: &str) -> bool {
    said.contains("perhaps paid") || said.contains("did not answer")
}

fn check_answers(point: &str, [first, second]: &[Value; 2], available_msat: u64) {
    for answer in [first, second] {
        let told = (&answer["available_msat"], &answer["refunding_msat"]);
        assert_eq!(told, (&available_msat.into(), &0.into()), "{point}");
    }
    assert_eq!((&second["again"], &second["entry"]), (&true.into(), &first["entry"]), "{point}");
}

/// The command itself opens the books and is killed at the N-th call; at a sync or a word to the wallet the same command
/// after it is killed likewise. `false`: the call never came, and the first command did all the work.
async fn standing(market: &Market, what: What, calls: &str, n: u32) -> bool {
    let errand = Errand::new(market, what).await;
    let point = format!("{what:?}, standing, {calls} {n}");
    let (mut killed, mut befores) = (Vec::new(), Vec::new());
    for _ in 0..if [SYNC, WORD].contains(&calls) { 2 } else { 1 } {
        let strace = injecting(calls, "signal=SIGKILL", &n.to_string());
        let out = errand.deal.owner_under(&strace, &errand.args()).await;
        let dead = out.status.signal() == Some(9);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(dead || out.status.success() || is_asked_again(&said), "{point}: {said}");
        killed.push(dead);
        befores.extend(errand.left(&point));
    }
    errand.check(&point, &befores).await;
    killed[0]
}

/// The order goes to a node that is killed at the N-th call of its life; the next life ends by itself what was begun.
async fn running(market: &Market, what: What, calls: &str, n: u32) -> bool {
    let errand = Errand::new(market, what).await;
    let point = format!("{what:?}, running, {calls} {n}");
    let mut node = errand.deal.home.start_under(&injecting(calls, "signal=SIGKILL", &n.to_string()));
    until("the node to serve or to end", async || is_up(&mut node)).await;
    // Whether it is answered does not matter here; where the node is gone, the command opens the books itself.
    errand.deal.owner(&errand.args()).await;
    if node.try_ended().is_none() {
        node.terminate();
    }
    let killed = !node.ended(PATIENCE).await.success();
    drop(node);
    let befores: Vec<Head> = errand.left(&point).into_iter().collect();

    let node = errand.deal.home.start();
    until(&format!("{point}: nothing on its way"), async || {
        let refunds = Store::read_only(&errand.deal.home.data).ok()?.refunds().expect("readable");
        refunds.is_empty().then_some(())
    })
    .await;
    assert!(node.stop().await.success(), "{point}");
    errand.check(&point, &befores).await;
    killed
}

fn is_up(node: &mut Running) -> Option<()> {
    (node.try_ended().is_some() || node.status().is_some()).then_some(())
}

async fn everywhere(
    test: &str,
    orders: &[What],
    calls: &[&'static str],
    met: impl AsyncFn(&Market, What, &str, u32) -> bool,
) {
    if let Err(why) = strace_works() {
        return skip(test, &why);
    }
    for &what in orders {
        let Some(market) = Market::open(test).await else { return };
        let before = market.sats();
        for calls in calls {
            let points = at_every(calls, 0..0, ABREAST, async |n| met(&market, what, calls, n).await).await;
            eprintln!("{what:?}, {calls}: killed at {points} calls");
        }
        market.check(what, before);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_grant_killed_at_every_write_is_given_once() {
    let test = "a_grant_killed_at_every_write_is_given_once";
    everywhere(test, &[What::Grant], &CALLS[..4], standing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_refund_killed_at_every_write_and_word_to_the_wallet_is_paid_once() {
    let test = "a_refund_killed_at_every_write_and_word_to_the_wallet_is_paid_once";
    everywhere(test, &[What::Refund], &CALLS, standing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_top_up_killed_at_every_sync_and_word_to_the_wallet_makes_no_credit() {
    let test = "a_top_up_killed_at_every_sync_and_word_to_the_wallet_makes_no_credit";
    everywhere(test, &[What::Topup], &[SYNC, WORD], standing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_node_killed_at_any_sync_of_a_grant_or_a_refund_has_carried_it_out_once() {
    let test = "a_node_killed_at_any_sync_of_a_grant_or_a_refund_has_carried_it_out_once";
    everywhere(test, &[What::Grant, What::Refund], &[SYNC], running).await;
}
