//! What is promised before anybody pays: quotes that count on the same credit or budget, and quotes, refusals and balances
//! when others ask for too many of them.

use coinop::ledger::transfer;
use coinop::protocol::draft::Draft;
use coinop::protocol::{Code, Status};
use nostr_sdk::prelude::{Event, Keys};
use serde_json::Value;

use crate::deal::{Deal, Over};
use crate::faults::{Counter, PRICE, booked_msat, purse, quoted};
use crate::paid::SET;
use crate::support::backend::{Backstage, Step};
use crate::support::buyer::Buyer;
use crate::support::stage::job;
use crate::support::{now_s, until};

/// A quote for less than the price: the customer's credit covers the rest. Request, msat and invoice.
async fn quoted_for(buyer: &Buyer) -> (Event, u64, String) {
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let told = buyer.feedback(&request, Status::PaymentRequired).await;
    let (msat, bolt11) = told.amount.expect("an amount");
    (request, msat, bolt11.expect("an invoice"))
}

/// Orders of keys that nobody knows, one each.
async fn orders_of_strangers(buyer: &Buyer, count: usize) {
    for _ in 0..count {
        let keys = Keys::generate();
        let unsigned = buyer.order(None, &["true"]).unsigned(&keys, now_s()).expect("a draft");
        let order = unsigned.sign_with_keys(&keys).expect("a signature");
        buyer.send(&order).await;
    }
}

/// Away from the end of a minute, so that what follows is within one.
async fn early_in_a_minute() {
    until("the next minute", async || (now_s() % 60 < 40).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_quotes_on_one_credit_are_not_both_promised_and_each_that_is_paid_has_its_job() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let gift = transfer::grant("test", &buyer.keys.public_key().to_hex(), 15_000, "");
    node.ledger().post(gift).await.expect("a grant");
    let (first, first_msat, first_invoice) = quoted_for(&buyer).await;
    assert_eq!(first_msat, 5_000);
    node.drain().await.expect("an end");
    // A restart forgets nothing of what the first quote counts on.
    let node = counter.stage.start_on(Backstage::new(&[])).await;
    let (second, second_msat, second_invoice) = quoted_for(&buyer).await;
    assert_eq!(second_msat, PRICE, "the credit is behind the first");
    counter.bank.paid(&second_invoice, second_msat);
    buyer.result(&second).await;
    counter.bank.paid(&first_invoice, first_msat);
    buyer.result(&first).await;
    assert_eq!((booked_msat(&node), purse(&node, &buyer).available_msat), (25_000, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_over_the_budget_is_refused_before_anybody_is_asked_to_pay() {
    let mut counter = Counter::open().await;
    counter.stage.config.payment.customer_day_msat = 2 * PRICE - 1;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let (first, bolt11) = quoted(&buyer).await;
    // The first quote has its part of the budget, paid or not.
    let second = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.error(&second, Code::OverBudget).await;
    assert_eq!(counter.bank.made(), 1);
    counter.bank.paid(&bolt11, PRICE);
    buyer.result(&first).await;
    assert_eq!((booked_msat(&node), purse(&node, &buyer).available_msat), (PRICE.into(), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_paid_for_is_not_turned_away_because_other_jobs_are_open() {
    let mut counter = Counter::open().await;
    counter.stage.config.queue.max_open_jobs_per_customer = 1;
    let backend = Backstage::new(&[Step::Hangs]);
    let (node, buyer) = (counter.stage.start_on(backend).await, counter.buyer().await);
    let (first, second) = (quoted(&buyer).await, quoted(&buyer).await);
    for (request, bolt11) in [&first, &second] {
        counter.bank.paid(bolt11, PRICE);
        until("the job is taken", async || job(node.store(), request)).await;
    }
    assert_eq!(booked_msat(&node), i128::from(2 * PRICE));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unpaid_orders_of_many_free_keys_or_of_one_leave_quotes_for_others() {
    let mut counter = Counter::open().await;
    counter.stage.config.admission.quotes_per_minute = 8;
    let node = counter.stage.start_on(Backstage::new(&[])).await;
    let (junk, honest, regular) = (counter.buyer().await, counter.buyer().await, counter.buyer().await);
    let gift = transfer::grant("test", &regular.keys.public_key().to_hex(), 1, "");
    node.ledger().post(gift).await.expect("a grant");
    early_in_a_minute().await;
    let minute = now_s() / 60;
    let mut unpaid = Vec::new();
    for _ in 0..13 {
        unpaid.push(junk.post(&junk.order(None, &["true"])).await);
    }
    // Four are quoted, eight wait, and the one that is read last is told that it is too much.
    let last = until("a word that it is too much", async || {
        for request in &unpaid {
            if !junk.ends(request).await.is_empty() {
                return Some(request.clone());
            }
        }
        None
    })
    .await;
    junk.error(&last, Code::RateLimited).await;
    assert_eq!(counter.bank.made(), 4);
    quoted(&honest).await;
    orders_of_strangers(&honest, 6).await;
    until("the minute's quotes are used up", async || (counter.bank.made() == 8).then_some(())).await;
    quoted_for(&regular).await;
    assert_eq!((now_s() / 60, counter.bank.made()), (minute, 9), "within one minute");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_of_one_key_leave_refusals_quotes_and_balances_to_others() {
    let mut counter = Counter::open().await;
    counter.stage.config.admission.refusals_per_minute = 4;
    let node = counter.stage.start_on(Backstage::new(&[])).await;
    let (junk, other) = (counter.buyer().await, counter.buyer().await);
    early_in_a_minute().await;
    for _ in 0..8 {
        junk.post(&junk.order(None, &[])).await;
    }
    let bad = other.post(&other.order(None, &[])).await;
    other.error(&bad, Code::InvalidInput).await;
    orders_of_strangers(&other, 1).await;
    quoted(&other).await;
    let question = Draft {
        kind: coinop::protocol::ACCOUNT_KIND,
        repo: None,
        commands: Vec::new(),
        params: vec![("query".into(), "balance".into())],
        encrypt: Some(coinop::protocol::Scheme::Nip44),
        ..other.order(None, &[])
    };
    let asked = other.post(&question).await;
    other.feedback(&asked, Status::Success).await;
    drop(node);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn the_banner_and_doctor_tell_prices_and_what_the_wallet_can_do() {
    let test = "the_banner_and_doctor_tell_prices_and_what_the_wallet_can_do";
    let Some(deal) = Deal::open(test, Over::Lnbits, &SET).await else { return };
    let own: Vec<&str> = deal.own.iter().map(String::as_str).collect();
    let said = deal.owner(&[&["doctor", "--offline", "--json"], &SET[..], &own[..]].concat()).await;
    let offline: Value = serde_json::from_slice(&said.stdout).expect("JSON");
    let row = |report: &Value, name: &str| {
        let rows = report["checks"].as_array().expect("rows").clone();
        rows.into_iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no {name}: {report}"))
    };
    assert_eq!(row(&offline, "price of generic")["how"], "20 sat + 0.100 sat per second");
    assert_eq!(row(&offline, "price of code")["how"], "free");
    assert_eq!(row(&offline, "wallet key")["ok"], true);
    let said = deal.owner(&[&["doctor", "--json"], &SET[..], &own[..]].concat()).await;
    let online: Value = serde_json::from_slice(&said.stdout).expect("JSON");
    let wallet = row(&online, "wallet");
    let how = wallet["how"].as_str().unwrap_or_default();
    assert!(wallet["ok"] == true && how.contains("balance 0 sat, can pay"), "{wallet}");
    let node = deal.home.start();
    until("the banner", async || node.log().to_lowercase().contains("serving").then_some(())).await;
    let log = node.log();
    assert!(
        log.contains("prices    analysis free; code free; docs free; generic 20 sat + 0.100 sat"),
        "{log}"
    );
    assert!(log.contains("balance 0 sat, can pay") || log.contains("no answer yet"), "{log}");
    assert!(node.stop().await.success());
}
