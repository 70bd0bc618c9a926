//! A real LNbits: two wallets in it, one that sells and one that buys.

use std::sync::Arc;

use coinop::clock;
use coinop::wallet::{
    Abilities, Cursor, Direction, Error, Hint, Limits, LookupOptions, Lookups, Outgoing, PaymentHash, State,
    Wallet,
};
use tokio::sync::mpsc;

use crate::lnbits::{Lnbits, Purse};
use crate::parts::{Part, locate};
use crate::{lnbits_wallet, new_invoice, pay, refused, until};

/// A server, a wallet that can only receive, and one with 1,000 sats that can pay.
struct Market {
    server: Arc<Lnbits>,
    seller: Arc<dyn Wallet>,
    seller_purse: Purse,
    buyer: Arc<dyn Wallet>,
    buyer_purse: Purse,
}

impl Market {
    fn open(test: &str) -> Option<Market> {
        let [program] = locate(test, [Part::Lnbits])?;
        let server = Lnbits::shared(&program);
        let (seller_purse, buyer_purse) = (server.wallet("seller"), server.wallet("buyer"));
        server.fund(&buyer_purse, 1_000);
        let seller = lnbits_wallet(&server.url, &seller_purse.invoice_key, Limits::default());
        let buyer = lnbits_wallet(&server.url, &buyer_purse.admin_key, Limits::default());
        Some(Market { server, seller, seller_purse, buyer, buyer_purse })
    }
}

fn settled(received_msat: u64) -> State {
    State::Settled { received_msat: Some(received_msat), settled_at_s: None, fee_msat: Some(0) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invoice_is_made_paid_by_another_wallet_and_seen_as_settled_on_both_sides() {
    let Some(market) =
        Market::open("an_invoice_is_made_paid_by_another_wallet_and_seen_as_settled_on_both_sides")
    else {
        return;
    };
    let before_s = clock::now_s();
    let invoice = market.seller.make_invoice(&new_invoice(21_000)).await.unwrap();
    assert_eq!(invoice.amount_msat, 21_000);
    let lasts_s = invoice.expires_at_s - invoice.created_at_s;
    assert_eq!(lasts_s, 600, "as it was asked for");
    assert_eq!(market.seller.look_up(&invoice.payment_hash).await.unwrap().state, State::Pending);
    assert_eq!(market.buyer.outgoing(&invoice.payment_hash).await.unwrap(), Outgoing::Unknown);

    let payment = market.buyer.pay(&pay(&invoice)).await.unwrap();
    assert_eq!(
        (payment.payment_hash, payment.amount_msat, payment.fee_msat),
        (invoice.payment_hash, 21_000, 0)
    );
    assert_eq!(payment.preimage.expect("a proof").payment_hash(), invoice.payment_hash);
    assert_eq!(market.seller.look_up(&invoice.payment_hash).await.unwrap().state, settled(21_000));
    assert_eq!(market.buyer.outgoing(&invoice.payment_hash).await.unwrap(), Outgoing::Paid(payment.clone()));
    assert_eq!(market.buyer.balance_msat().await.unwrap(), 979_000);
    assert_eq!(market.seller.balance_msat().await.unwrap(), 21_000);

    // Again: LNbits itself calls this one "failed".
    assert_eq!(market.buyer.pay(&pay(&invoice)).await.unwrap(), payment);
    assert_eq!(market.buyer.balance_msat().await.unwrap(), 979_000, "it was paid once");

    let window = Cursor::window(before_s - 60, clock::now_s() + 60);
    let sold = market.seller.history(&window, 10).await.unwrap();
    assert_eq!(sold.next, None);
    let [entry] = sold.items.as_slice() else { panic!("{sold:?}") };
    assert_eq!((entry.direction, entry.payment_hash), (Direction::In, invoice.payment_hash));
    assert_eq!((entry.amount_msat, &entry.state, entry.memo.as_str()), (21_000, &settled(21_000), "a job"));
    assert!(entry.created_at_s >= before_s && entry.created_at_s <= clock::now_s());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lnbits_will_not_do_is_refused_with_the_reason_and_nothing_moves() {
    let Some(market) = Market::open("what_lnbits_will_not_do_is_refused_with_the_reason_and_nothing_moves")
    else {
        return;
    };
    let fraction = market.seller.make_invoice(&new_invoice(21_500)).await;
    assert!(matches!(fraction, Err(Error::NotWholeSat { amount_msat: 21_500 })), "{fraction:?}");

    let dear = market.seller.make_invoice(&new_invoice(5_000_000)).await.unwrap();
    let why = refused(market.buyer.pay(&coinop::wallet::Pay { max_fee_msat: 100_000, ..pay(&dear) }).await);
    assert!(matches!(&why, Error::Said { message, .. } if message.contains("Insufficient balance")), "{why}");

    let invoice = market.seller.make_invoice(&new_invoice(21_000)).await.unwrap();
    let why = refused(market.buyer.pay(&coinop::wallet::Pay { amount_msat: 20_000, ..pay(&invoice) }).await);
    assert!(matches!(&why, Error::Invoice(why) if why.contains("asks for 21000 msat, not 20000")), "{why}");
    let why = refused(market.buyer.pay(&coinop::wallet::Pay { max_fee_msat: 1_999, ..pay(&invoice) }).await);
    assert!(matches!(why, Error::FeeTooHigh { reserve_msat: 2_000, max_fee_msat: 1_999 }), "{why}");
    let why = refused(market.seller.pay(&pay(&invoice)).await);
    assert!(matches!(why, Error::Denied(_)), "the invoice key does not pay: {why}");
    let stranger = lnbits_wallet(&market.server.url, "0123456789abcdef", Limits::default());
    assert!(matches!(stranger.look_up(&invoice.payment_hash).await, Err(Error::Denied(_))));
    let hold = market.seller.cancel_hold(&invoice.payment_hash).await;
    assert!(matches!(hold, Err(Error::Unsupported { .. })));
    assert_eq!(market.buyer.balance_msat().await.unwrap(), 1_000_000);

    let can = market.seller.abilities().await.unwrap();
    let wanted =
        Abilities { receive: true, history: true, hints: true, outgoing: true, ..Abilities::default() };
    assert_eq!(can, wanted);
    let can = market.buyer.abilities().await.unwrap();
    assert!(can.pay && !can.hints, "a key that may spend is not put into an address");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_servers_push_says_which_invoice_to_look_at() {
    let Some(market) = Market::open("the_servers_push_says_which_invoice_to_look_at") else { return };
    let mut hints = market.seller.hints().expect("a wallet that tells");
    until("the push to be connected", async || matches!(hints.try_recv(), Ok(Hint::Anything)).then_some(()))
        .await;
    let invoice = market.seller.make_invoice(&new_invoice(3_000)).await.unwrap();
    market.server.pay(&market.buyer_purse, &invoice.bolt11);
    let hinted = Hint::Changed(invoice.payment_hash);
    until("the hint", async || matches!(hints.try_recv(), Ok(hint) if hint == hinted).then_some(())).await;
    assert_eq!(market.seller.look_up(&invoice.payment_hash).await.unwrap().state, settled(3_000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_elses_payment_is_taken_for_ours_and_a_wallet_that_pays_itself_sees_both_halves() {
    let Some(market) =
        Market::open("nobody_elses_payment_is_taken_for_ours_and_a_wallet_that_pays_itself_sees_both_halves")
    else {
        return;
    };
    let unheard_of = PaymentHash::from_bytes([9; 32]);
    assert_eq!(market.seller.look_up(&unheard_of).await.unwrap().state, State::Unknown);
    let own = market.buyer.make_invoice(&new_invoice(7_000)).await.unwrap();
    assert_eq!(
        market.seller.look_up(&own.payment_hash).await.unwrap().state,
        State::Unknown,
        "another wallet's"
    );
    market.buyer.pay(&pay(&own)).await.unwrap();
    assert_eq!(market.buyer.look_up(&own.payment_hash).await.unwrap().state, settled(7_000));
    assert!(matches!(market.buyer.outgoing(&own.payment_hash).await.unwrap(), Outgoing::Paid(_)));
    assert_eq!(market.buyer.balance_msat().await.unwrap(), 1_000_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_history_is_walked_page_by_page_and_newer_entries_do_not_shift_it() {
    let Some(market) = Market::open("the_history_is_walked_page_by_page_and_newer_entries_do_not_shift_it")
    else {
        return;
    };
    let mut made = Vec::new();
    for n in 1..=7 {
        made.push(market.seller.make_invoice(&new_invoice(n * 1_000)).await.unwrap().payment_hash);
    }
    market.server.mark(&made[0].to_hex(), "failed");
    let until_s = clock::now_s();
    let (mut at, mut walked) = (Some(Cursor::window(0, until_s + 1)), Vec::new());
    while let Some(cursor) = at {
        let stored = serde_json::to_string(&cursor).unwrap();
        let page = market.seller.history(&serde_json::from_str(&stored).unwrap(), 3).await.unwrap();
        assert!(page.items.len() <= 3);
        walked.extend(page.items);
        at = page.next;
    }
    made.reverse();
    assert_eq!(walked.iter().map(|entry| entry.payment_hash).collect::<Vec<_>>(), made);
    assert_eq!(walked[6].state, State::Failed);
    assert!(walked[..6].iter().all(|entry| entry.state == State::Pending));
    let empty = market.seller.history(&Cursor::window(0, until_s - 3_600), 10).await.unwrap();
    assert_eq!((empty.items.len(), empty.next), (0, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_invoices_are_followed_at_once_and_each_payment_is_found() {
    let Some(market) = Market::open("many_invoices_are_followed_at_once_and_each_payment_is_found") else {
        return;
    };
    let (sender, mut found) = mpsc::channel(64);
    let lookups = Lookups::start(Arc::clone(&market.seller), LookupOptions::default(), sender);
    let mut invoices = Vec::new();
    for n in 1..=6 {
        let invoice = market.seller.make_invoice(&new_invoice(n * 1_000)).await.unwrap();
        lookups.follow(invoice.payment_hash, None).unwrap();
        invoices.push(invoice);
    }
    for invoice in &invoices[..5] {
        market.server.pay(&market.buyer_purse, &invoice.bolt11);
    }
    let mut paid = Vec::new();
    while paid.len() < 5 {
        let found = until("a payment to be found", async || found.try_recv().ok()).await;
        if let State::Settled { received_msat, .. } = found.state {
            paid.push((found.payment_hash, received_msat));
        }
    }
    for invoice in &invoices[..5] {
        assert!(paid.contains(&(invoice.payment_hash, Some(invoice.amount_msat))), "{paid:?}");
    }
    assert_eq!(market.server.balance_msat(&market.seller_purse), 15_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_is_unreachable_and_knows_the_payment_when_it_is_back() {
    let test = "a_server_that_is_killed_is_unreachable_and_knows_the_payment_when_it_is_back";
    let Some([program]) = locate(test, [Part::Lnbits]) else { return };
    // One of its own: others would miss it.
    let server = Lnbits::start(&program);
    let (seller_purse, buyer_purse) = (server.wallet("seller"), server.wallet("buyer"));
    server.fund(&buyer_purse, 100);
    let seller = lnbits_wallet(&server.url, &seller_purse.invoice_key, Limits::default());
    let buyer = lnbits_wallet(&server.url, &buyer_purse.admin_key, Limits::default());
    let (first, second) = (
        seller.make_invoice(&new_invoice(5_000)).await.unwrap(),
        seller.make_invoice(&new_invoice(6_000)).await.unwrap(),
    );
    server.pay(&buyer_purse, &first.bolt11);
    server.kill();
    // The first word after its end may still find the port half closed.
    let lost = seller.look_up(&first.payment_hash).await;
    assert!(matches!(lost, Err(Error::Unreachable(_) | Error::Cut(_))), "{lost:?}");
    assert!(matches!(seller.make_invoice(&new_invoice(1_000)).await, Err(Error::Unreachable(_))));
    assert!(matches!(refused(buyer.pay(&pay(&second)).await), Error::Unreachable(_)));
    server.resume();
    assert_eq!(seller.look_up(&first.payment_hash).await.unwrap().state, settled(5_000));
    assert_eq!(buyer.pay(&pay(&first)).await.unwrap().amount_msat, 5_000, "paid before, told again");
    assert_eq!(server.balance_msat(&buyer_purse), 95_000);
}
