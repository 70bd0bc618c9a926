//! A wallet that is away, slow, repeats itself or lies, and customers who pay late, twice, or for what they take back:
//! nothing is delivered unpaid, nothing that was paid is lost, and the books add up each time.

use std::time::Duration;

use coinop::control::Ask;
use coinop::desk::{self, Order};
use coinop::ledger::{self, Purse, transfer};
use coinop::node::Node;
use coinop::protocol::{Code, Feedback, Status};
use coinop::relay::local::LocalRelay;
use coinop::store::money::Account;
use coinop::store::record::{Invoice, Record};
use coinop::store::{Holder, InvoiceState, Store};
use coinop::wallet::read_bolt11;
use nostr_sdk::prelude::{Event, Keys};
use tempfile::TempDir;

use crate::bank::{Bank, Mood};
use crate::support::backend::{Backstage, Step};
use crate::support::buyer::Buyer;
use crate::support::stage::{Stage, job};
use crate::support::{now_s, throughout, until};

/// What a job costs here, msat.
pub const PRICE: u64 = 20_000;
/// What is seen within it after a quote has run out was paid in time.
pub const GRACE_S: u64 = coinop::job::till::GRACE_MS / 1_000;

/// A node's place beside a bank and a relay.
pub struct Counter {
    pub bank: Bank,
    pub relay: LocalRelay,
    pub stage: Stage,
    _keys: TempDir,
}

impl Counter {
    pub async fn open() -> Counter {
        Counter::under("invoice").await
    }

    /// With this rule for everybody.
    pub async fn under(rule: &str) -> Counter {
        let relay = LocalRelay::start().await.expect("a relay");
        let urls = [relay.url()];
        let (bank, stage, keys) = place(&urls, rule).await;
        Counter { bank, relay, stage, _keys: keys }
    }

    pub async fn buyer(&self) -> Buyer {
        Buyer::at(&[self.relay.url()], self.stage.keys.public_key()).await
    }

    /// Makes the node look at this invoice now.
    pub async fn look(&self, bolt11: &str) {
        let payment_hash = hash_of(bolt11);
        let order = serde_json::to_value(Order::Invoice { payment_hash }).expect("JSON");
        self.stage.ask(Ask::Desk(order)).await.expect("an answer");
    }
}

async fn place(relays: &[String], rule: &str) -> (Bank, Stage, TempDir) {
    let bank = Bank::open().await;
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("wallet");
    crate::deal::write_secret(&file, "5ecre7");
    let relays: Vec<&str> = relays.iter().map(String::as_str).collect();
    let file = file.display().to_string();
    let settings = [
        ("payment.wallet", "lnbits"),
        ("payment.wallet_url", bank.url.as_str()),
        ("payment.wallet_key_file", file.as_str()),
        ("payment.prices", "* base_msat=20000"),
        ("payment.rules", rule),
    ];
    let stage = Stage::new(&relays, &settings);
    (bank, stage, dir)
}

pub fn hash_of(bolt11: &str) -> String {
    read_bolt11(bolt11).expect("an invoice").payment_hash.to_hex()
}

/// A request that is quoted, and its invoice.
pub async fn quoted(buyer: &Buyer) -> (Event, String) {
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let told = buyer.feedback(&request, Status::PaymentRequired).await;
    let (msat, bolt11) = told.amount.expect("an amount");
    assert_eq!(msat, PRICE);
    (request, bolt11.expect("an invoice"))
}

pub fn purse(node: &Node, buyer: &Buyer) -> Purse {
    node.ledger().purse(&buyer.keys.public_key().to_hex()).expect("readable")
}

/// What the customer may spend, when nothing of it is held.
fn free_msat(node: &Node, buyer: &Buyer) -> i128 {
    let purse = purse(node, buyer);
    assert_eq!((purse.held_msat, purse.refunding_msat), (0, 0), "{purse:?}");
    purse.available_msat
}

/// What the books say that the wallet has; and they add up.
pub fn booked_msat(node: &Node) -> i128 {
    ledger::verify(node.store()).expect("books that add up");
    node.ledger().balance(&Account::Wallet("lnbits".into())).expect("readable")
}

/// A refusal for want of money that brings no invoice.
pub async fn bare_quote(buyer: &Buyer, request: &Event) -> Feedback {
    let what = format!("a quote without an invoice for {}", request.id);
    until(&what, async || {
        let said = buyer.feedbacks(request).await;
        said.into_iter().find(|f| f.status == Status::PaymentRequired && f.amount == Some((PRICE, None)))
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wallet_that_is_away_makes_no_invoice_and_nothing_is_left_open() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    counter.bank.is(Mood::Away);
    let request = buyer.post(&buyer.order(None, &["true"])).await;
    let told = bare_quote(&buyer, &request).await;
    assert!(told.extra.expect("words").contains("no invoice can be made at the moment"));
    assert!(job(node.store(), &request).is_none());
    assert!(node.store().unpaid().expect("readable").is_empty());
    assert!(node.store().balances().expect("readable").is_empty());
    // It comes back, and the customer asks again.
    counter.bank.is(Mood::Well);
    let (request, bolt11) = quoted(&buyer).await;
    counter.bank.paid(&bolt11, PRICE);
    buyer.result(&request).await;
    assert_eq!((booked_msat(&node), free_msat(&node, &buyer)), (PRICE.into(), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_wallet_keeps_nobody_waiting_who_needs_no_invoice() {
    let counter = Counter::open().await;
    let node = counter.stage.start_on(Backstage::new(&[])).await;
    let (buyer, rich) = (counter.buyer().await, counter.buyer().await);
    let gift = transfer::grant("test", &rich.keys.public_key().to_hex(), PRICE, "");
    node.ledger().post(gift).await.expect("a grant");
    counter.bank.is(Mood::Silent);
    let waits = buyer.post(&buyer.order(None, &["true"])).await;
    until("the wallet to be asked", async || (counter.bank.waiting() > 0).then_some(())).await;
    let request = rich.post(&rich.order(None, &["true"])).await;
    rich.result(&request).await;
    assert!(buyer.stored(&waits).await.is_empty(), "its invoice is still waited for");
    counter.bank.is(Mood::Away);
    bare_quote(&buyer, &waits).await;
    assert_eq!((booked_msat(&node), free_msat(&node, &rich)), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payment_is_found_as_soon_as_the_wallet_can_be_asked_again() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    counter.bank.is(Mood::Away);
    counter.bank.paid(&bolt11, PRICE);
    counter.look(&bolt11).await;
    let span = Duration::from_secs(1);
    throughout(span, "nothing runs", async || job(node.store(), &request).is_none()).await;
    counter.bank.is(Mood::Well);
    buyer.result(&request).await;
    assert_eq!((booked_msat(&node), free_msat(&node, &buyer)), (PRICE.into(), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invoice_that_was_given_to_one_customer_is_not_given_to_another() {
    let counter = Counter::open().await;
    let node = counter.stage.start_on(Backstage::new(&[])).await;
    let (first, second) = (counter.buyer().await, counter.buyer().await);
    let (request, bolt11) = quoted(&first).await;
    counter.bank.repeats(true);
    let other = second.post(&second.order(None, &["true"])).await;
    bare_quote(&second, &other).await;
    assert_eq!((counter.bank.made(), node.store().unpaid().expect("readable").len()), (2, 1));
    counter.bank.paid(&bolt11, PRICE);
    first.result(&request).await;
    assert!(job(node.store(), &other).is_none());
    assert_eq!((booked_msat(&node), free_msat(&node, &second)), (PRICE.into(), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn less_than_was_asked_is_credit_and_the_customer_is_told_and_nothing_at_all_is_nothing() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let (short, bolt11) = quoted(&buyer).await;
    counter.bank.paid(&bolt11, PRICE - 1);
    let told = bare_quote(&buyer, &short).await;
    let words = told.extra.expect("words");
    assert!(words.contains("with what you have paid, your credit here is 19999"), "{words}");
    assert!(job(node.store(), &short).is_none());
    assert_eq!((booked_msat(&node), free_msat(&node, &buyer)), (19_999, 19_999));

    let other = counter.buyer().await;
    let (nothing, bolt11) = quoted(&other).await;
    counter.bank.paid(&bolt11, 0);
    counter.look(&bolt11).await;
    let span = Duration::from_secs(1);
    throughout(span, "nothing runs", async || job(node.store(), &nothing).is_none()).await;
    assert_eq!((booked_msat(&node), free_msat(&node, &other)), (19_999, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_was_asked_pays_for_the_job_and_the_rest_is_credit() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    counter.bank.paid(&bolt11, PRICE + 7_000);
    buyer.result(&request).await;
    assert_eq!((booked_msat(&node), free_msat(&node, &buyer)), (27_000, 7_000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_invoices_of_one_customer_pay_for_two_jobs() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let (first, second) = (quoted(&buyer).await, quoted(&buyer).await);
    for (_, bolt11) in [&second, &first] {
        counter.bank.paid(bolt11, PRICE);
    }
    buyer.result(&first.0).await;
    buyer.result(&second.0).await;
    assert_eq!((booked_msat(&node), free_msat(&node, &buyer)), (40_000, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_paid_after_the_quote_ran_out_is_credit_and_the_customer_is_told() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    counter.bank.invoices_hold_for(3);
    let (request, bolt11) = quoted(&buyer).await;
    let ends_s = read_bolt11(&bolt11).expect("an invoice").expires_at_s;
    until("the quote to run out", async || (now_s() > ends_s + GRACE_S).then_some(())).await;
    counter.bank.paid(&bolt11, PRICE);
    counter.look(&bolt11).await;
    let reason = buyer.error(&request, Code::Expired).await;
    assert!(reason.contains("in your credit"), "{reason}");
    assert!(job(node.store(), &request).is_none());
    assert_eq!((booked_msat(&node), free_msat(&node, &buyer)), (PRICE.into(), PRICE.into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_paid_in_the_last_second_of_a_quote_is_paid() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    // Between two looks: without the one at its expiry it would be seen too late.
    counter.bank.invoices_hold_for(7);
    let (request, bolt11) = quoted(&buyer).await;
    let ends_ms = read_bolt11(&bolt11).expect("an invoice").expires_at_s * 1_000;
    until("the last second", async || (coinop::clock::now_ms() + 400 > ends_ms).then_some(())).await;
    counter.bank.paid(&bolt11, PRICE);
    buyer.result(&request).await;
    assert_eq!((booked_msat(&node), free_msat(&node, &buyer)), (PRICE.into(), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wallet_that_is_asked_too_often_is_left_alone_for_a_while_and_then_sells() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    // The invoice is wanted at that very moment, and comes all the same.
    counter.bank.is_busy_for(2);
    let (request, bolt11) = quoted(&buyer).await;
    assert!(counter.bank.refused() >= 2, "it was busy");
    counter.bank.is_busy_for(1);
    let refused = counter.bank.refused();
    until("a look-up that is refused", async || (counter.bank.refused() > refused).then_some(())).await;
    let span = Duration::from_secs(3);
    let looks = counter.bank.looks(&hash_of(&bolt11)).len();
    throughout(span, "it is left alone", async || counter.bank.looks(&hash_of(&bolt11)).len() == looks).await;
    counter.bank.paid(&bolt11, PRICE);
    buyer.result(&request).await;
    assert_eq!((booked_msat(&node), free_msat(&node, &buyer)), (PRICE.into(), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invoice_that_cannot_be_looked_up_is_told_to_the_owner_until_it_can() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    counter.bank.amount_of(&bolt11, "much".into());
    let wallet = async || counter.stage.ask(Ask::Status).await.expect("an answer")["wallet"].clone();
    let told = until("the owner to be told", async || {
        let told = wallet().await["unanswered"].as_array().expect("a list").clone();
        (!told.is_empty()).then_some(told)
    })
    .await;
    assert_eq!(told[0]["payment_hash"], hash_of(&bolt11), "{told:?}");
    let order = serde_json::to_value(Order::List { after: None }).expect("JSON");
    let list = counter.stage.ask(Ask::Desk(order)).await.expect("an answer");
    assert_eq!(list[0]["customer"], buyer.keys.public_key().to_hex(), "although it has nothing yet: {list}");
    assert_eq!(list[0]["unanswered"][0]["amount_msat"], PRICE, "{list}");
    // Side fields are another matter: the wallet finds its words again for what counts.
    counter.bank.paid(&bolt11, PRICE);
    counter.bank.scribbles_on(&bolt11);
    buyer.result(&request).await;
    assert_eq!(wallet().await["unanswered"], serde_json::json!([]));
    assert_eq!((booked_msat(&node), free_msat(&node, &buyer)), (PRICE.into(), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invoice_for_a_test_network_is_called_so_to_customer_and_owner() {
    let counter = Counter::open().await;
    let (_node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    for is_test in [false, true] {
        counter.bank.is_on_a_test_network(is_test);
        let request = buyer.post(&buyer.order(None, &["true"])).await;
        let words = buyer.feedback(&request, Status::PaymentRequired).await.extra.expect("words");
        assert_eq!(words.contains("for a test network"), is_test, "{words}");
        let status = counter.stage.ask(Ask::Status).await.expect("an answer");
        assert_eq!(status["wallet"]["test_network"], is_test, "{status}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_customers_than_fit_one_answer_are_listed_page_by_page() {
    let counter = Counter::open().await;
    let node = counter.stage.start_on(Backstage::new(&[])).await;
    let all: Vec<String> = (0..desk::LIST_MOST + 2).map(|n| format!("{n:064x}")).collect();
    for some in all.chunks(500) {
        let grants = some.iter().map(|who| Record::Transfer(transfer::grant(who, who, 1, ""))).collect();
        node.ledger().commit(grants).await.expect("granted");
    }
    let page = async |after: Option<String>| {
        let order = serde_json::to_value(Order::List { after }).expect("JSON");
        let rows = counter.stage.ask(Ask::Desk(order)).await.expect("an answer");
        let rows = rows.as_array().expect("a list").iter();
        rows.map(|row| row["customer"].as_str().expect("a key").to_owned()).collect::<Vec<_>>()
    };
    let mut listed = page(None).await;
    assert_eq!(listed.len(), desk::LIST_MOST);
    listed.extend(page(listed.last().cloned()).await);
    assert_eq!(listed, all);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_paid_while_the_node_was_dead_for_days_is_credit_and_what_was_not_is_closed() {
    let (counter, customer) = (Counter::open().await, Keys::generate().public_key().to_hex());
    let [paid, unpaid, garbled, elsewhere] = [(); 4].map(|()| Keys::generate().public_key().to_hex());
    let holder = Holder::new(counter.stage.keys.public_key().to_hex());
    let store = Store::open(&counter.stage.config.data_dir, &holder).expect("a store");
    let (now_ms, two_days_ms) = (now_s() * 1_000, 2 * 86_400_000);
    let invoiced = |payment_hash: &String| {
        Record::Invoiced(Invoice {
            payment_hash: payment_hash.clone(),
            bolt11: "lnbcrt1".into(),
            customer: customer.clone(),
            amount_msat: PRICE,
            expires_ms: now_ms - two_days_ms,
            wallet: if *payment_hash == elsewhere { "nwc".into() } else { "lnbits".into() },
            job: None,
            hold: None,
        })
    };
    store.append([&paid, &unpaid, &garbled, &elsewhere].map(invoiced).to_vec()).await.expect("recorded");
    assert_eq!(store.unexpired_invoices(now_ms - two_days_ms - 1).expect("readable"), 4);
    assert_eq!(store.unexpired_invoices(now_ms).expect("readable"), 0, "the dead take nobody's place");
    store.close().expect("closed");
    counter.bank.moves(&paid, i64::try_from(PRICE).expect("msat"), 0);
    counter.bank.garbles(&garbled);
    // While the wallet cannot be asked, nothing is closed.
    counter.bank.is(Mood::Silent);
    let node = counter.stage.start_on(Backstage::new(&[])).await;
    until("the wallet to be asked", async || (counter.bank.waiting() > 0).then_some(())).await;
    counter.bank.is(Mood::Away);
    until("the answers", async || (counter.bank.waiting() == 0).then_some(())).await;
    assert_eq!(node.store().unpaid().expect("readable").len(), 4);
    node.drain().await.expect("an end");
    counter.bank.is(Mood::Well);
    let node = counter.stage.start_on(Backstage::new(&[])).await;
    // One that makes no sense holds up no other, and what another wallet has made is not this one's to bury.
    let mut kept = [garbled, elsewhere];
    kept.sort();
    let gone = async || {
        let open = node.store().unpaid().expect("readable").into_iter();
        let mut open: Vec<String> = open.map(|invoice| invoice.payment_hash).collect();
        open.sort();
        (open == kept).then_some(())
    };
    until("the dead to be gone", gone).await;
    let state = |hash: &str| node.store().invoice(hash).expect("readable").expect("an invoice").1;
    assert_eq!((state(&paid), state(&unpaid)), (InvoiceState::Paid, InvoiceState::Closed));
    let purse = node.ledger().purse(&customer).expect("readable");
    assert_eq!((purse.available_msat, booked_msat(&node)), (PRICE.into(), PRICE.into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_taken_back_while_it_is_paid_costs_nothing() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[Step::Hangs])).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    counter.bank.paid(&bolt11, PRICE);
    counter.look(&bolt11).await;
    buyer.cancel(&request).await;
    buyer.error(&request, Code::Cancelled).await;
    assert_eq!((booked_msat(&node), free_msat(&node, &buyer)), (PRICE.into(), PRICE.into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_over_two_relays_and_a_restart_gets_one_invoice() {
    let relays = [LocalRelay::start().await.expect("a relay"), LocalRelay::start().await.expect("a relay")];
    let urls = relays.each_ref().map(LocalRelay::url);
    let (bank, stage, _keys) = place(&urls, "invoice").await;
    let node = stage.start_on(Backstage::new(&[])).await;
    let buyer = Buyer::at(&urls, stage.keys.public_key()).await;
    let (request, bolt11) = quoted(&buyer).await;
    node.drain().await.expect("an end");
    let node = stage.start_on(Backstage::new(&[])).await;
    // One that comes after it has been read when this one is quoted.
    let (_, later) = quoted(&buyer).await;
    assert_ne!(later, bolt11);
    assert_eq!(bank.made(), 2);
    bank.paid(&bolt11, PRICE);
    buyer.result(&request).await;
    assert_eq!((bank.made(), booked_msat(&node)), (2, PRICE.into()));
}
