//! Alby's wallet service in front of a real LNbits, over the in-process relay: the whole of NIP-47 as it is used.

use std::sync::Arc;

use coinop::clock;
use coinop::relay::local::LocalRelay;
use coinop::wallet::{
    Abilities, Cursor, Direction, Error, Hint, Limits, Outgoing, PaymentHash, State, Wallet,
};

use crate::lnbits::{Lnbits, Purse};
use crate::nwc::NwcService;
use crate::parts::{Part, locate};
use crate::{in_doubt, new_invoice, nwc_wallet, pay, refused, until};

struct Market {
    server: Arc<Lnbits>,
    seller: Arc<dyn Wallet>,
    buyer: Arc<dyn Wallet>,
    buyer_purse: Purse,
    _services: [NwcService; 2],
    _relay: LocalRelay,
}

impl Market {
    async fn open(test: &str) -> Option<Market> {
        let [program, node, scripts] = locate(test, [Part::Lnbits, Part::Node, Part::Clients])?;
        let server = Lnbits::shared(&program);
        let relay = LocalRelay::start().await.expect("a relay");
        let (seller_purse, buyer_purse) = (server.wallet("seller"), server.wallet("buyer"));
        server.fund(&buyer_purse, 1_000);
        let serve = |purse: &Purse| NwcService::start(&node, &scripts, &relay.url(), &server, purse);
        let services = [serve(&seller_purse), serve(&buyer_purse)];
        let open = |service: &NwcService| nwc_wallet(&service.uri, Limits::default());
        let (seller, buyer) = (open(&services[0]), open(&services[1]));
        Some(Market { server, seller, buyer, buyer_purse, _services: services, _relay: relay })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn an_invoice_over_nwc_is_made_paid_over_nwc_and_seen_as_settled() {
    let Some(market) = Market::open("an_invoice_over_nwc_is_made_paid_over_nwc_and_seen_as_settled").await
    else {
        return;
    };
    let can = market.seller.abilities().await.unwrap();
    let wanted = Abilities { receive: true, pay: true, history: true, hints: true, ..Abilities::default() };
    assert_eq!(can, wanted);
    let invoice = market.seller.make_invoice(&new_invoice(21_000)).await.unwrap();
    assert_eq!(invoice.amount_msat, 21_000);
    assert_eq!(market.seller.look_up(&invoice.payment_hash).await.unwrap().state, State::Pending);
    let unheard_of = PaymentHash::from_bytes([9; 32]);
    assert_eq!(
        market.seller.look_up(&unheard_of).await.unwrap().state,
        State::Unknown,
        "NOT_FOUND is no error"
    );
    assert_eq!(market.buyer.outgoing(&invoice.payment_hash).await.unwrap(), Outgoing::Unknown);

    let payment = market.buyer.pay(&pay(&invoice)).await.unwrap();
    assert_eq!((payment.amount_msat, payment.fee_msat), (21_000, 0));
    assert_eq!(payment.preimage.expect("a proof").payment_hash(), invoice.payment_hash);
    assert_eq!(market.buyer.pay(&pay(&invoice)).await.unwrap(), payment, "a second try pays nothing");
    assert_eq!(market.buyer.outgoing(&invoice.payment_hash).await.unwrap(), Outgoing::Paid(payment));
    let state = market.seller.look_up(&invoice.payment_hash).await.unwrap().state;
    let State::Settled { received_msat: Some(21_000), settled_at_s: Some(_), .. } = state else {
        panic!("{state:?}")
    };
    assert_eq!(market.seller.balance_msat().await.unwrap(), 21_000);
    assert_eq!(market.buyer.balance_msat().await.unwrap(), 979_000);

    let mut at = Some(Cursor::window(0, clock::now_s() + 60));
    let mut walked = Vec::new();
    while let Some(cursor) = at {
        let page = market.buyer.history(&cursor, 1).await.unwrap();
        walked.extend(page.items);
        at = page.next;
    }
    let [newest, funds] = walked.as_slice() else { panic!("{walked:?}") };
    assert_eq!((newest.direction, newest.amount_msat), (Direction::Out, 21_000));
    assert_eq!((funds.direction, funds.amount_msat), (Direction::In, 1_000_000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_payment_that_comes_in_is_hinted_at_by_the_wallet() {
    let Some(market) = Market::open("a_payment_that_comes_in_is_hinted_at_by_the_wallet").await else {
        return;
    };
    let mut hints = market.seller.hints().expect("a wallet that tells");
    let invoice = market.seller.make_invoice(&new_invoice(3_000)).await.unwrap();
    market.server.pay(&market.buyer_purse, &invoice.bolt11);
    let hinted = Hint::Changed(invoice.payment_hash);
    until("the hint", async || matches!(hints.try_recv(), Ok(hint) if hint == hinted).then_some(())).await;
    let state = market.seller.look_up(&invoice.payment_hash).await.unwrap().state;
    assert!(matches!(state, State::Settled { .. }), "{state:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn what_the_wallet_will_not_do_is_told_and_nothing_moves() {
    let Some(market) = Market::open("what_the_wallet_will_not_do_is_told_and_nothing_moves").await else {
        return;
    };
    let dear = market.seller.make_invoice(&new_invoice(5_000_000)).await.unwrap();
    let why = refused(market.buyer.pay(&pay(&dear)).await);
    assert!(matches!(&why, Error::Said { code, .. } if code == "INSUFFICIENT_BALANCE"), "{why}");
    let fraction = market.seller.make_invoice(&new_invoice(1_500)).await;
    assert!(
        matches!(&fraction, Err(Error::Failed { message, .. }) if message.contains("whole sats")),
        "{fraction:?}"
    );
    let hold = market.seller.cancel_hold(&dear.payment_hash).await;
    assert!(matches!(hold, Err(Error::Unsupported { .. })), "{hold:?}");
    // Paid by somebody else: the wallet says PAYMENT_FAILED, which can be a time-out, and has nothing in its books.
    let taken = market.seller.make_invoice(&new_invoice(4_000)).await.unwrap();
    let third = market.server.wallet("third");
    market.server.fund(&third, 10);
    market.server.pay(&third, &taken.bolt11);
    let why = in_doubt(market.buyer.pay(&pay(&taken)).await);
    assert!(matches!(&why, Error::Failed { code, .. } if code == "PAYMENT_FAILED"), "{why}");
    assert_eq!(market.buyer.balance_msat().await.unwrap(), 1_000_000);
}
