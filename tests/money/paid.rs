//! Jobs that are paid by an invoice before they begin.

use std::time::Duration;

use coinop::ledger;
use coinop::store::record::Record;
use serde_json::Value;

use crate::deal::{Deal, Over, PRICE, json};
use crate::support::until;
use crate::zaps::forged_receipt;

pub const SET: [&str; 2] =
    ["--set", concat!("payment.prices=", "generic base_msat=20000 per_second_msat=100,* free")];

/// The whole deal: ordered, paid, delivered, booked; what was not used is the customer's credit.
async fn a_deal_is_made(test: &str, over: Over) {
    assert!(SET[1].ends_with(PRICE));
    let Some(deal) = Deal::open(test, over, &SET).await else { return };
    let node = deal.home.start();
    until("the node to serve", async || node.status()).await;
    let had = deal.server.balance_msat(&deal.customer);
    let out = json(&deal.order(&["--cmd", "sleep 0.2", "--time-secs", "30", "--max", "50000"]).await);
    assert_eq!((out["status"].as_str(), out["verified"].as_bool()), (Some("result"), Some(true)), "{out}");
    let price = out["proof"]["price_msat"].as_u64().expect("a price");
    let wall_ms = out["proof"]["wall_ms"].as_u64().expect("a time");
    assert_eq!(price, 20_000 + wall_ms / 10, "charged by the tenth of a second");
    // The hold is for the longest run that was asked for: 30 s, 23 sats; it is paid by an invoice over as much.
    assert_eq!(out["paid"]["amount_msat"], 23_000, "{out}");
    assert_eq!(deal.server.balance_msat(&deal.provider), 23_000);
    assert_eq!(deal.server.balance_msat(&deal.customer), had - 23_000);

    let key = deal.customer_hex();
    let purse = deal.told(&["credits", "show", &key, "--json"]).await;
    assert_eq!(
        (purse["available_msat"].as_u64(), purse["held_msat"].as_u64()),
        (Some(23_000 - price), Some(0))
    );
    let earned = deal.told(&["earnings", "--by", "skill", "--format", "json"]).await;
    assert_eq!(
        (&earned["rows"][0]["key"], &earned["rows"][0]["revenue_msat"]),
        (&Value::from("generic"), &price.into())
    );
    assert_eq!((&earned["total"]["profit_msat"], &earned["total"]["jobs"]), (&price.into(), &1.into()));
    let verified = deal.told(&["ledger", "verify", "--json"]).await;
    assert_eq!((verified["ok"].as_bool(), verified["verified"]["sum_msat"].as_i64()), (Some(true), Some(0)));
    assert_eq!(verified["verified"]["open_holds"], 0);

    // The next order is paid from what is left and an invoice over the rest.
    let again = json(&deal.order(&["--cmd", "true", "--time-secs", "30", "--max", "50000"]).await);
    let second = again["proof"]["price_msat"].as_u64().expect("a price");
    let missing = 23_000 - (23_000 - price);
    assert_eq!(again["paid"]["amount_msat"].as_u64(), Some(missing.div_ceil(1_000) * 1_000), "{again}");
    let purse = deal.told(&["credits", "show", &key, "--json"]).await;
    let paid = deal.server.balance_msat(&deal.provider);
    assert_eq!(purse["available_msat"].as_u64(), Some(paid - price - second));
    // The wallet says the same, asked by the node, and by the command alone when there is none.
    let agree = |told: Value| {
        assert_eq!((&told["clean"], &told["matched"]), (&true.into(), &2.into()), "{told}");
        assert_eq!(told["balance"]["rest_msat"], 0, "{told}");
    };
    agree(deal.told(&["ledger", "reconcile", "--json"]).await);
    assert!(node.stop().await.success());
    ledger::verify_log(&deal.home.data).expect("books that add up");
    let flags: Vec<&str> = deal.own.iter().map(String::as_str).collect();
    agree(deal.told(&[&["ledger", "reconcile", "--json"], &flags[..]].concat()).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_customer_orders_by_request_pay_over_lnbits_and_gets_what_it_paid_for() {
    let test = "a_customer_orders_by_request_pay_over_lnbits_and_gets_what_it_paid_for";
    a_deal_is_made(test, Over::Lnbits).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn the_same_over_nwc_with_albys_wallet_service() {
    a_deal_is_made("the_same_over_nwc_with_albys_wallet_service", Over::Nwc).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_price_over_the_maximum_is_not_paid_and_the_reason_is_said() {
    let test = "a_price_over_the_maximum_is_not_paid_and_the_reason_is_said";
    let Some(deal) = Deal::open(test, Over::Lnbits, &SET).await else { return };
    let node = deal.home.start();
    until("the node to serve", async || node.status()).await;
    let had = deal.server.balance_msat(&deal.customer);
    let order = ["--cmd", "true", "--time-secs", "30", "--max", "22999", "--timeout", "4"];
    let out = deal.order(&order).await;
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("not paid: it asks 23000 msat, and the most you pay is 22999"), "{said}");
    assert_eq!(out.status.code(), Some(4), "{said}");
    let out: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!((&out["status"], &out["paid"]), (&"payment-required".into(), &Value::Null));
    assert_eq!(deal.server.balance_msat(&deal.customer), had);
    assert!(node.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn an_invoice_that_is_paid_while_the_node_is_dead_begins_its_job_at_the_next_start() {
    let test = "an_invoice_that_is_paid_while_the_node_is_dead_begins_its_job_at_the_next_start";
    let Some(deal) = Deal::open(test, Over::Lnbits, &SET).await else { return };
    let buyer = crate::support::buyer::Buyer::at(&[deal.relay.url()], deal.home.keys.public_key()).await;
    let node = deal.home.start();
    until("the node to serve", async || node.status()).await;
    let request = buyer.post(&buyer.order(None, &["echo paid"])).await;
    let quote = buyer.feedback(&request, coinop::protocol::Status::PaymentRequired).await;
    node.kill().await;
    let msat = deal.pay(&quote).await;
    let node = deal.home.start();
    let answer = buyer.result(&request).await;
    assert!(crate::support::buyer::printed(&answer).contains("paid"));
    assert!(node.stop().await.success());
    // One invoice was made for the request, one payment booked, one job run.
    let history = deal.home.store().history(&request.id.to_hex()).expect("readable");
    let count = |f: fn(&Record) -> bool| history.iter().filter(|entry| f(&entry.record)).count();
    assert_eq!(count(|r| matches!(r, Record::Invoiced(_))), 1);
    assert_eq!(count(|r| matches!(r, Record::Accepted { .. })), 1);
    assert_eq!(count(|r| matches!(r, Record::Closed { .. })), 1);
    let wallet = coinop::store::money::Account::Wallet("lnbits".into());
    assert_eq!(deal.home.store().balance(&wallet).expect("readable"), i128::from(msat));
    ledger::verify_log(&deal.home.data).expect("books that add up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn what_is_paid_after_the_job_was_taken_back_is_credit() {
    let test = "what_is_paid_after_the_job_was_taken_back_is_credit";
    let Some(deal) = Deal::open(test, Over::Lnbits, &SET).await else { return };
    let buyer = crate::support::buyer::Buyer::at(&[deal.relay.url()], deal.home.keys.public_key()).await;
    let node = deal.home.start();
    until("the node to serve", async || node.status()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let quote = buyer.feedback(&request, coinop::protocol::Status::PaymentRequired).await;
    buyer.cancel(&request).await;
    let id = request.id.to_hex();
    until("the cancel to be recorded", async || {
        let found = deal.home.store().cancelled(&id).expect("readable");
        (!found.is_empty()).then_some(())
    })
    .await;
    let msat = deal.pay(&quote).await;
    let reason = buyer.error(&request, coinop::protocol::Code::Cancelled).await;
    assert!(reason.contains("in your credit"), "{reason}");
    let purse = deal.told(&["credits", "show", &buyer.keys.public_key().to_hex(), "--json"]).await;
    assert_eq!(purse["available_msat"].as_u64(), Some(msat));
    assert!(deal.home.job(&id).is_none(), "nothing ran");
    assert!(node.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_forged_zap_receipt_gets_nothing() {
    let set = [&SET[..], &["--log-level", "debug"]].concat();
    let Some(deal) = Deal::open("a_forged_zap_receipt_gets_nothing", Over::Lnbits, &set).await else {
        return;
    };
    let buyer = crate::support::buyer::Buyer::at(&[deal.relay.url()], deal.home.keys.public_key()).await;
    let node = deal.home.start();
    until("the node to serve", async || node.status()).await;
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let quote = buyer.feedback(&request, coinop::protocol::Status::PaymentRequired).await;
    let (msat, bolt11) = quote.amount.expect("an amount");
    let receipt = forged_receipt(&request, deal.home.keys.public_key(), msat, &bolt11.expect("an invoice"));
    buyer.send(&receipt).await;
    // It has come over the relay, and was taken for what it is.
    let words = format!("receipt={}", receipt.id);
    until("the node to read the receipt", async || node.log().contains(&words).then_some(())).await;
    let id = request.id.to_hex();
    crate::support::throughout(Duration::from_secs(3), "nothing is delivered", async || {
        deal.home.job(&id).is_none() && buyer.ends(&request).await.is_empty()
    })
    .await;
    assert_eq!(deal.server.balance_msat(&deal.provider), 0);
    assert!(node.stop().await.success());
    let balances = deal.home.store().balances().expect("readable");
    assert!(balances.is_empty(), "no account has moved: {balances:?}");
}
