//! The wallet's list held against the books, with a node and without one: every difference is named, what can be put
//! right is, once, and then both agree.

use coinop::clock;
use coinop::control::Ask;
use coinop::desk::{Desk, Order};
use coinop::job::Till;
use coinop::ledger::{Ledger, transfer};
use coinop::node::{self, Node};
use coinop::protocol::Code;
use coinop::store::{Holder, Store};
use serde_json::Value;

use crate::bank::Mood;
use crate::faults::{Counter, GRACE_S, booked_msat, hash_of, purse, quoted};
use crate::support::backend::Backstage;
use crate::support::{now_s, until};

fn order(book: bool) -> Order {
    Order::Reconcile { from_ms: 0, to_ms: u64::MAX, book }
}

/// Asked of a node that runs.
async fn asked(counter: &Counter, book: bool) -> Value {
    let order = serde_json::to_value(order(book)).expect("JSON");
    counter.stage.ask(Ask::Desk(order)).await.expect("an answer")
}

/// Asked while the node stands still.
async fn standing(counter: &Counter, book: bool) -> Value {
    let (config, keys) = (&counter.stage.config, &counter.stage.keys);
    let store = Store::open(&config.data_dir, &Holder::new(keys.public_key().to_hex())).expect("the store");
    let wallet = node::open_wallet(config).expect("a setup").expect("a wallet");
    let (till, _found) = Till::open(wallet, config.payment.quote_ms, &store).expect("a till");
    let desk = Desk::new(Ledger::new(store.clone()), Some(till), keys.clone(), clock::system());
    let told = desk.serve(order(book)).await.expect("an answer");
    drop(desk);
    store.close().expect("closed");
    told
}

/// Names and signs of the differences, in order.
fn named(told: &Value) -> Vec<(String, bool)> {
    let rows = told["differences"].as_array().expect("a list").iter();
    let mut named: Vec<_> =
        rows.map(|row| (row["what"].as_str().expect("a name").to_owned(), row["booked"] == true)).collect();
    named.sort();
    named
}

fn rest(told: &Value) -> (bool, i64) {
    (told["clean"] == true, told["balance"]["rest_msat"].as_i64().expect("a number"))
}

async fn gone(node: Node) {
    node.drain().await.expect("an end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_while_the_node_was_dead_is_its_customers_credit_and_once() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    counter.bank.invoices_hold_for(2);
    let (_, late) = quoted(&buyer).await;
    counter.bank.invoices_hold_for(600);
    let (waiting, good) = quoted(&buyer).await;
    gone(node).await;
    let ends_s = coinop::wallet::read_bolt11(&late).expect("an invoice").expires_at_s;
    until("the first quote to run out", async || (now_s() > ends_s + GRACE_S).then_some(())).await;
    counter.bank.paid(&late, 20_000);
    counter.bank.paid(&good, 20_000);
    let told = standing(&counter, false).await;
    assert_eq!(named(&told), [("unbooked".into(), false), ("unbooked".into(), false)]);
    assert_eq!((rest(&told), told["balance"]["explained_msat"].as_i64()), ((false, 0), Some(40_000)));
    // The one that a request still waits for is left to the node.
    let told = standing(&counter, true).await;
    assert_eq!(named(&told), [("unbooked".into(), false), ("unbooked".into(), true)]);
    let done: Vec<_> = told["differences"].as_array().expect("a list").iter().map(|d| &d["done"]).collect();
    assert!(done.iter().any(|done| done.as_str().is_some_and(|d| d.contains("next start"))), "{done:?}");
    let node = counter.stage.start_on(Backstage::new(&[])).await;
    buyer.result(&waiting).await;
    let told = asked(&counter, true).await;
    assert_eq!((named(&told), rest(&told)), (vec![], (true, 0)), "{told}");
    assert_eq!((booked_msat(&node), purse(&node, &buyer).available_msat), (40_000, 20_000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_node_takes_what_is_found_the_way_of_all_payments() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    counter.bank.invoices_hold_for(2);
    let (late, bolt11) = quoted(&buyer).await;
    let ends_s = coinop::wallet::read_bolt11(&bolt11).expect("an invoice").expires_at_s;
    until("the quote to run out", async || (now_s() > ends_s + GRACE_S).then_some(())).await;
    counter.bank.paid(&bolt11, 20_000);
    let told = asked(&counter, true).await;
    // The till may have been faster.
    assert_eq!(rest(&told), (true, 0), "{told}");
    buyer.error(&late, Code::Expired).await;
    assert_eq!((booked_msat(&node), purse(&node, &buyer).available_msat), (20_000, 20_000));
    assert_eq!(named(&asked(&counter, true).await), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_knows_goes_to_suspense_and_what_is_missing_stays_named() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    counter.bank.paid(&bolt11, 20_000);
    buyer.result(&request).await;
    let customer = buyer.keys.public_key().to_hex();
    let (strange, spent, refund) = ("01".repeat(32), "02".repeat(32), "03".repeat(32));
    counter.bank.moves(&strange, 5_000, 0);
    counter.bank.moves(&spent, -2_000, 30);
    // A refund that the wallet has paid and whose end the node never wrote down.
    let gift = transfer::grant("test", &customer, 1_000, "");
    node.ledger().post(gift).await.expect("a grant");
    let begun = transfer::refund_begun(&refund, &customer, 1_000, "lnbc1", 100);
    node.ledger().post(begun).await.expect("begun");
    counter.bank.moves(&refund, -1_000, 10);
    // A second try of the same, which failed because it was paid.
    counter.bank.fails(&refund, -1_000);

    let told = asked(&counter, false).await;
    let names = |booked: bool| ["foreign", "foreign", "refund_paid"].map(|name| (name.to_owned(), booked));
    assert_eq!((named(&told), rest(&told)), (names(false).to_vec(), (false, 0)), "{told}");
    let told = asked(&counter, true).await;
    assert_eq!((named(&told), rest(&told)), (names(true).to_vec(), (true, 0)), "{told}");
    assert_eq!(booked_msat(&node), 20_000 + 5_000 - 2_030 - 1_010);
    assert_eq!(purse(&node, &buyer).refunding_msat, 0);
    let told = asked(&counter, true).await;
    assert_eq!((named(&told), rest(&told)), (vec![], (true, 0)), "nothing is booked twice");

    counter.bank.is(Mood::Away);
    let order = serde_json::to_value(order(true)).expect("JSON");
    let why = counter.stage.ask(Ask::Desk(order)).await.expect_err("no wallet").to_string();
    assert!(why.contains("the bank is closed"), "{why}");
    counter.bank.is(Mood::Well);

    // The wallet takes a payment back that we have delivered for, and then does not even know it.
    counter.bank.takes_back(&bolt11);
    let told = asked(&counter, true).await;
    assert_eq!((named(&told), rest(&told)), (vec![("missing".into(), false)], (false, 0)), "{told}");
    counter.bank.forgets(&bolt11);
    let told = asked(&counter, true).await;
    assert_eq!((named(&told), rest(&told)), (vec![("missing".into(), false)], (false, 0)), "{told}");
    assert_eq!(told["differences"][0]["payment_hash"], hash_of(&bolt11));
    assert_eq!(booked_msat(&node), 21_960, "never booked away");
    gone(node).await;
    let told = standing(&counter, true).await;
    assert_eq!(named(&told), [("missing".into(), false)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_odd_row_is_named_unreadable_and_the_rest_is_compared() {
    let counter = Counter::open().await;
    let (_node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    counter.bank.paid(&bolt11, 20_000);
    buyer.result(&request).await;
    counter.bank.scribbles_on(&bolt11);
    let (odd, strange) = ("04".repeat(32), "05".repeat(32));
    counter.bank.moves(&strange, 5_000, 0);
    counter.bank.garbles(&odd);
    let told = asked(&counter, true).await;
    assert_eq!((&told["matched"], &told["booked"]), (&1.into(), &1.into()), "{told}");
    assert_eq!(
        (told["unreadable"][0]["payment_hash"].as_str(), &told["clean"]),
        (Some(odd.as_str()), &false.into())
    );
    assert_eq!(
        (named(&told), told["balance"]["rest_msat"].as_i64()),
        (vec![("foreign".into(), true)], Some(0))
    );
    // Nor does a balance that is no number keep the payments from being compared.
    counter.bank.balance_is(Value::from("much"));
    let told = asked(&counter, true).await;
    assert_eq!((&told["matched"], &told["balance"]["rest_msat"]), (&2.into(), &Value::Null), "{told}");
    assert_eq!(told["counts"]["unreadable"], 2, "{told}");
}
