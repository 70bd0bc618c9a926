//! A customer asks what it has here: by an encrypted request, answered to it alone, once, and never a job.

use nostr_sdk::prelude::{Event, JsonUtil, Keys};

use super::support::backend::Backstage;
use super::support::buyer::Buyer;
use super::support::stage::{Stage, jobs};
use super::support::until;
use coinop::ledger::transfer;
use coinop::protocol::draft::Draft;
use coinop::protocol::{ACCOUNT_KIND, Code, Feedback, Scheme, Status};
use coinop::relay::local::LocalRelay;

async fn stage(settings: &[(&str, &str)]) -> (LocalRelay, Stage, Buyer) {
    let relay = LocalRelay::start().await.expect("a relay");
    let stage = Stage::new(&[&relay.url()], settings);
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    (relay, stage, buyer)
}

fn question(buyer: &Buyer, query: &str, encrypt: Option<Scheme>) -> Draft {
    let params = vec![("query".to_owned(), query.to_owned())];
    Draft { kind: ACCOUNT_KIND, params, encrypt, ..buyer.order(None, &[]) }
}

async fn answer(buyer: &Buyer, asked: &Event) -> Feedback {
    until("an answer", async || buyer.feedbacks(asked).await.into_iter().next()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_customer_is_told_its_balance_by_itself_and_once() {
    let (_relay, stage, buyer) = stage(&[]).await;
    let node = stage.start_on(Backstage::new(&[])).await;
    let customer = buyer.keys.public_key().to_hex();
    let gift = transfer::grant("test", &customer, 7_654_321, "");
    node.ledger().post(gift).await.expect("a grant");
    let hold = transfer::hold(&"0a".repeat(32), &customer, 1_234, 0, u64::MAX);
    node.ledger().post(hold).await.expect("a hold");
    let asked = buyer.post(&question(&buyer, "balance", Some(Scheme::Nip44))).await;
    let told = answer(&buyer, &asked).await;
    assert_eq!(told.status, Status::Success);
    let purse: serde_json::Value = serde_json::from_str(&told.content).expect("JSON");
    let fields = ["available_msat", "held_msat", "refunding_msat"].map(|field| purse[field].as_i64());
    assert_eq!(fields, [Some(7_653_087), Some(1_234), Some(0)], "{purse}");

    // Nobody else reads the question or the answer, and nothing of them stands in a tag.
    let stored = buyer.stored(&asked).await;
    for event in stored.iter().chain([&asked]) {
        let json = event.as_json();
        for word in ["balance", "7653087", "available", "success"] {
            assert!(!json.contains(word), "{word} stands in the open: {json}");
        }
    }
    let stranger = Keys::generate();
    assert!(stored.iter().all(|event| Feedback::decode(event, &stranger).is_err()));

    // A node that starts again reads the question again, and one that it was not asked before.
    node.drain().await.expect("an end");
    let node = stage.start_on(Backstage::new(&[])).await;
    let other = buyer.post(&question(&buyer, "balance", Some(Scheme::Nip44))).await;
    answer(&buyer, &other).await;
    assert_eq!((buyer.stored(&asked).await.len(), buyer.stored(&other).await.len()), (1, 1));
    assert!(jobs(node.store()).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_in_the_open_or_about_something_else_gets_a_reason_and_no_number() {
    let (_relay, stage, buyer) = stage(&[]).await;
    let node = stage.start_on(Backstage::new(&[])).await;
    let gift = transfer::grant("test", &buyer.keys.public_key().to_hex(), 7_654_321, "");
    node.ledger().post(gift).await.expect("a grant");
    for (query, encrypt, code) in [
        ("balance", None, Code::Unsupported),
        ("balance", Some(Scheme::Nip04), Code::Unsupported),
        ("everything", Some(Scheme::Nip44), Code::InvalidInput),
    ] {
        let asked = buyer.post(&question(&buyer, query, encrypt)).await;
        let reason = buyer.error(&asked, code).await;
        assert!(!reason.contains("7654321"), "{reason}");
    }
    // One for another provider is none of our business.
    let elsewhere = Draft {
        provider: Some(Keys::generate().public_key()),
        ..question(&buyer, "balance", Some(Scheme::Nip44))
    };
    let elsewhere = buyer.post(&elsewhere).await;
    let after = buyer.post(&question(&buyer, "balance", Some(Scheme::Nip44))).await;
    assert_eq!(answer(&buyer, &after).await.status, Status::Success);
    assert!(buyer.stored(&elsewhere).await.is_empty());
    assert!(jobs(node.store()).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_is_said_in_a_minute_than_the_owner_allows() {
    let (_relay, stage, buyer) = stage(&[("admission.balances_per_minute", "0")]).await;
    let _node = stage.start_on(Backstage::new(&[])).await;
    let asked = buyer.post(&question(&buyer, "balance", Some(Scheme::Nip44))).await;
    // A job that comes after it proves that it was read.
    let job = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.result(&job).await;
    assert!(buyer.stored(&asked).await.is_empty());
}
