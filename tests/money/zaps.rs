//! Zap receipts: anybody can make one. Over a relay, as an attacker sends them: the wallet is asked sooner, a bounded number
//! of times, and what is not paid stays unpaid.

use std::time::{Duration, Instant};

use coinop::store::InvoiceState;
use nostr_sdk::prelude::{Event, EventBuilder, JsonUtil, Keys, Kind, PublicKey, Tag};

use crate::faults::{Counter, booked_msat, hash_of, quoted};
use crate::support::backend::Backstage;
use crate::support::stage::job;
use crate::support::{throughout, until};

/// After so many look-ups the pauses between two are longer than [`SOON`], jitter and all.
const LOOKS: usize = 7;
/// Less than the pause after the seventh look-up, which is the longest while few invoices are open: 5 s.
const SOON: Duration = Duration::from_millis(4_500);

/// As the attack goes: a zap request and a receipt by one key of the attacker's, over the very invoice.
pub fn forged_receipt(request: &Event, provider: PublicKey, msat: u64, bolt11: &str) -> Event {
    let attacker = Keys::generate();
    let tags =
        |rows: &[[&str; 2]]| rows.iter().map(|row| Tag::parse(*row).expect("a tag")).collect::<Vec<_>>();
    let (id, provider, amount) = (request.id.to_hex(), provider.to_hex(), msat.to_string());
    let zap = EventBuilder::new(Kind::ZapRequest, "")
        .tags(tags(&[["e", &id], ["p", &provider], ["amount", &amount]]))
        .sign_with_keys(&attacker)
        .expect("signed");
    EventBuilder::new(Kind::ZapReceipt, "")
        .tags(tags(&[["e", &id], ["p", &provider], ["bolt11", bolt11], ["description", &zap.as_json()]]))
        .sign_with_keys(&attacker)
        .expect("signed")
}

/// Waits until the node asks seldom; how often it has asked.
async fn seldom(counter: &Counter, hash: &str) -> usize {
    let looks = || counter.bank.looks(hash).len();
    until("the pauses to be long", async || (looks() >= LOOKS).then_some(())).await;
    looks()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_zap_receipt_makes_the_node_look_sooner_and_no_more() {
    let counter = Counter::open().await;
    let (node, buyer) = (counter.stage.start_on(Backstage::new(&[])).await, counter.buyer().await);
    let (request, bolt11) = quoted(&buyer).await;
    let hash = hash_of(&bolt11);
    let provider = counter.stage.keys.public_key();
    let before = seldom(&counter, &hash).await;
    buyer.send(&forged_receipt(&request, provider, 20_000, &bolt11)).await;
    let looks = until("a look-up", async || {
        let looks = counter.bank.looks(&hash);
        (looks.len() > before).then_some(looks)
    })
    .await;
    let pause = looks[before] - looks[before - 1];
    assert!(pause < SOON, "the next look-up was not due before {SOON:?}, and came after {pause:?}");

    // A flood: junk, other people's invoices, and the one that is open.
    let began = Instant::now();
    let other = crate::testing::invoice(20_000, crate::support::now_s(), 600).bolt11;
    for nth in 0..60 {
        let named = [bolt11.as_str(), other.as_str(), "lnbc1", ""][nth % 4];
        buyer.send(&forged_receipt(&request, provider, 20_000, named)).await;
    }
    let span = Duration::from_secs(6);
    throughout(span, "nothing runs", async || job(node.store(), &request).is_none()).await;
    let asked = counter.bank.looks(&hash).len() - looks.len();
    // One in two seconds, and those that were due anyhow.
    let most = usize::try_from(began.elapsed().as_secs() / 2 + 3).expect("few");
    assert!((1..=most).contains(&asked), "{asked} look-ups in {:?}", began.elapsed());

    assert!(buyer.ends(&request).await.is_empty());
    let (_, state) = node.store().invoice(&hash).expect("readable").expect("an invoice");
    assert_eq!(state, InvoiceState::Open);
    assert!(node.store().balances().expect("readable").is_empty(), "no account has moved");
    // The very same receipt is as good as any when the wallet says that the money is there.
    counter.bank.paid(&bolt11, 20_000);
    buyer.send(&forged_receipt(&request, provider, 20_000, &bolt11)).await;
    buyer.result(&request).await;
    assert_eq!(booked_msat(&node), 20_000);
}
