//! Customers who are trusted to pay after the delivery: the result brings the invoice, what is owed stays on their line,
//! and the line has an end.

use coinop::protocol::Status;
use coinop::wallet::read_bolt11;

use crate::bank::Mood;
use crate::deal::{Deal, Over, json};
use crate::faults::{Counter, PRICE, booked_msat, purse};
use crate::support::backend::Backstage;
use crate::support::until;

/// One job and a bit fit on it.
const RULE: &str = "after cap_msat=25500";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trusted_customer_gets_its_result_first_and_the_invoice_with_it() {
    let counter = Counter::under(RULE).await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let reply = buyer.result(&request).await.reply;
    let (amount_msat, bolt11) = (reply.amount_msat.expect("an amount"), reply.invoice.expect("an invoice"));
    assert_eq!((amount_msat, reply.proof.expect("a proof").price_msat), (PRICE, PRICE));
    assert_eq!(read_bolt11(&bolt11).expect("an invoice").amount_msat, Some(PRICE));
    assert_eq!((purse(&node, &buyer).available_msat, booked_msat(&node)), (-20_000, 0));

    // The line has 5,500 msat left: the next job is paid for before it begins, as far as the line does not reach.
    let second = buyer.post(&buyer.order(None, &["true"])).await;
    let told = buyer.feedback(&second, Status::PaymentRequired).await;
    let (msat, first_half) = told.amount.expect("an amount");
    assert_eq!(msat, 15_000, "14,500 are missing, and wallets count in sats");
    counter.bank.paid(&first_half.expect("an invoice"), msat);
    let reply = buyer.result(&second).await.reply;
    assert_eq!(reply.amount_msat, Some(5_000), "of 25,000 that are owed 20,000 were asked for before");
    let second_half = reply.invoice.expect("an invoice");

    // Both results are paid; the invoices live over a restart.
    node.drain().await.expect("an end");
    let node = counter.stage.start_on(Backstage::new(&[])).await;
    for (bolt11, msat) in [(&bolt11, PRICE), (&second_half, 5_000)] {
        counter.bank.paid(bolt11, msat);
        counter.look(bolt11).await;
    }
    let settled = async || (booked_msat(&node) == 40_000).then_some(());
    until("all to be paid", settled).await;
    assert_eq!(purse(&node, &buyer).available_msat, 0);
    let history = node.store().history(&request.id.to_hex()).expect("readable");
    let invoiced =
        |entry: &&coinop::store::Entry| matches!(&entry.record, coinop::store::record::Record::Invoiced(_));
    assert_eq!(history.iter().filter(invoiced).count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wallet_that_is_away_does_not_hold_the_result_up() {
    let counter = Counter::under(RULE).await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    counter.bank.is(Mood::Away);
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let reply = buyer.result(&request).await.reply;
    assert_eq!((reply.amount_msat, reply.invoice), (Some(PRICE), None));
    assert_eq!((purse(&node, &buyer).available_msat, booked_msat(&node)), (-20_000, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_credit_covers_is_not_asked_for_again() {
    let counter = Counter::under(RULE).await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let key = buyer.keys.public_key().to_hex();
    let gift = coinop::ledger::transfer::grant("test", &key, PRICE + 7_000, "");
    node.ledger().post(gift).await.expect("a grant");
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let reply = buyer.result(&request).await.reply;
    assert_eq!((reply.amount_msat, reply.invoice), (Some(PRICE), None));
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let reply = buyer.result(&request).await.reply;
    assert_eq!(reply.amount_msat, Some(PRICE - 7_000));
    assert!(reply.invoice.is_some());
    assert_eq!(counter.bank.made(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn request_pay_pays_what_the_result_asks_and_only_up_to_its_maximum() {
    let test = "request_pay_pays_what_the_result_asks_and_only_up_to_its_maximum";
    let settings =
        ["--set", "payment.prices=* base_msat=20000", "--set", "payment.rules=after cap_msat=50000"];
    let Some(deal) = Deal::open(test, Over::Lnbits, &settings).await else { return };
    let node = deal.home.start();
    until("the node to serve", async || node.status()).await;
    let had = deal.server.balance_msat(&deal.customer);
    let poor = json(&deal.order(&["--cmd", "true", "--max", "19999"]).await);
    assert_eq!((&poor["status"], &poor["paid"]), (&"result".into(), &serde_json::Value::Null));
    assert_eq!(deal.server.balance_msat(&deal.customer), had);
    let out = json(&deal.order(&["--cmd", "true", "--max", "20000"]).await);
    assert_eq!((&out["status"], &out["verified"]), (&"result".into(), &true.into()), "{out}");
    assert_eq!(out["paid"]["amount_msat"], PRICE, "{out}");
    assert_eq!(deal.server.balance_msat(&deal.customer), had - 20_000);
    let key = deal.customer_hex();
    let debt = async || {
        let purse = deal.told(&["credits", "show", &key, "--json"]).await;
        (purse["available_msat"] == -20_000).then_some(())
    };
    until("the payment to be booked, and the first job still owed", debt).await;
    assert!(node.stop().await.success());
    coinop::ledger::verify_log(&deal.home.data).expect("books that add up");
}
