//! Requests that are not taken: one signed reason for those who asked for us, silence for the rest.

use nostr_sdk::prelude::{Event, EventBuilder, JsonUtil, Keys, Kind, Tag};

use super::support::backend::Backstage;
use super::support::buyer::Buyer;
use super::support::scripted::Scripted;
use super::support::stage::{Stage, jobs};
use super::support::{now_s, until};
use coinop::protocol::draft::Draft;
use coinop::protocol::{Code, Feedback};
use coinop::relay::local::LocalRelay;

/// The codes of all that was said about a request, in order.
fn said(relay: &Scripted, buyer: &Buyer, request: &Event) -> Vec<(Option<Code>, String)> {
    let decode = |event: &Event| Feedback::decode(event, &buyer.keys).expect("feedback for us").feedback;
    let all = relay.given_about(request);
    all.iter().map(decode).map(|said| (said.code(), said.extra.unwrap_or_default())).collect()
}

/// A good request after all others, and its end: what was to be said about those has been said.
async fn served_after(relay: &Scripted, buyer: &Buyer) {
    let good = buyer.sign(&buyer.order(None, &["true"]));
    relay.push(&good.as_json());
    until("the result of the last request", async || {
        relay.given_about(&good).into_iter().find(|event| event.kind == Kind::from(6930u16))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_old_and_future_requests_are_told_so_once() {
    let relay = Scripted::start().await;
    let settings = [("admission.max_request_age_ms", "60000"), ("admission.max_future_skew_ms", "60000")];
    let stage = Stage::new(&[&relay.url], &settings);
    let node = stage.start_on(Backstage::new(&[])).await;
    let buyer = Buyer::of(stage.keys.public_key());
    let plain = buyer.order(None, &["true"]);
    let dead = Draft { expiration: Some(now_s() - 1), ..plain.clone() };
    let requests = [
        (buyer.sign_at(&plain, now_s() - 120), Code::TooOld, "older than 60 s"),
        (buyer.sign_at(&plain, now_s() + 120), Code::FromTheFuture, "60 s ahead"),
        (buyer.sign_at(&dead, now_s() - 5), Code::Expired, "expiration has passed"),
    ];
    for (request, ..) in requests.iter().chain(&requests) {
        relay.push(&request.as_json());
    }
    served_after(&relay, &buyer).await;
    for (request, code, words) in &requests {
        until("the refusal", async || relay.given_about(request).pop()).await;
        let said = said(&relay, &buyer, request);
        assert_eq!((said.len(), said[0].0), (1, Some(*code)), "{said:?}");
        assert!(said[0].1.contains(words), "{said:?}");
    }
    assert_eq!(jobs(node.store()).len(), 1, "the good one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_expired_before_it_came_is_refused() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[]);
    let node = stage.start_on(Backstage::new(&[])).await;
    let customer = Keys::generate();
    let draft = Draft {
        kind: 5930,
        commands: vec!["true".into()],
        provider: Some(stage.keys.public_key()),
        expiration: Some(now_s() - 1),
        ..Draft::default()
    };
    let unsigned = draft.unsigned(&customer, now_s() - 5).expect("a draft");
    let request = unsigned.sign_with_keys(&customer).expect("a signature");
    relay.push(&request.as_json());
    let answer = until("the refusal", async || relay.given_about(&request).pop()).await;
    let said = coinop::protocol::Feedback::decode(&answer, &customer).expect("feedback").feedback;
    assert_eq!(said.code(), Some(Code::Expired));
    assert!(jobs(node.store()).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_peoples_image_video_and_discovery_requests_are_left_alone_in_silence() {
    let relay = LocalRelay::start().await.expect("a relay");
    let stage = Stage::new(&[&relay.url()], &[]);
    let node = stage.start_on(Backstage::new(&[])).await;
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let mut foreign = Vec::new();
    for (kind, text) in [(5100, "a cat on a bicycle"), (5200, "https://example.org/film.mp4"), (5300, "")] {
        let event = EventBuilder::new(Kind::from(kind), "")
            .tag(Tag::parse(["i", text, "text"]).expect("a tag"))
            .sign_with_keys(&buyer.keys)
            .expect("a signature");
        buyer.send(&event).await;
        foreign.push(event);
    }
    let elsewhere = Draft { provider: Some(Keys::generate().public_key()), ..buyer.order(None, &["true"]) };
    foreign.push(buyer.post(&elsewhere).await);
    let unserved = Draft { kind: 5050, provider: None, ..buyer.order(None, &["true"]) };
    foreign.push(buyer.post(&unserved).await);
    // Untargeted, ours by kind, and wrong: others may still serve it.
    let wrong = Draft { provider: None, ..buyer.order(None, &[]) };
    foreign.push(buyer.post(&wrong).await);

    let ours = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.result(&ours).await;
    for event in &foreign {
        assert!(buyer.stored(event).await.is_empty(), "silence about kind {}", event.kind);
        let history = node.store().history(&event.id.to_hex()).expect("readable");
        assert!(history.is_empty(), "and nothing of it in our log");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_names_no_provider_is_served_when_it_is_ours_by_kind() {
    let relay = LocalRelay::start().await.expect("a relay");
    let stage = Stage::new(&[&relay.url()], &[]);
    let _node = stage.start_on(Backstage::new(&[])).await;
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let open = Draft { provider: None, ..buyer.order(None, &["true"]) };
    let request = buyer.post(&open).await;
    buyer.result(&request).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_are_rate_limited_and_silent_beyond() {
    let relay = LocalRelay::start().await.expect("a relay");
    let stage = Stage::new(&[&relay.url()], &[("admission.refusals_per_minute", "2")]);
    let node = stage.start_on(Backstage::new(&[])).await;
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let began = now_s() / 60;
    let mut refused = Vec::new();
    for _ in 0..6 {
        refused.push(buyer.post(&buyer.order(None, &[])).await);
    }
    let served = buyer.post(&buyer.order(None, &["true"])).await;
    buyer.result(&served).await;
    let mut answered = 0;
    for request in &refused {
        answered += buyer.ends(request).await.len();
    }
    let minutes = usize::try_from(now_s() / 60 - began + 1).expect("a few minutes");
    assert!((2..=2 * minutes).contains(&answered), "{answered} refusals in {minutes} minutes");
    let recorded =
        refused.iter().filter(|r| node.store().refusal(&r.id.to_hex()).expect("readable").is_some());
    assert_eq!(recorded.count(), answered, "what stays unsaid does not grow the log");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_request_is_not_answered_twice_even_after_a_restart() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[]);
    let node = stage.start_on(Backstage::new(&[])).await;
    let buyer = Buyer::of(stage.keys.public_key());
    let request = buyer.sign(&buyer.order(None, &[]));
    relay.push(&request.as_json());
    until("the refusal", async || relay.given_about(&request).pop()).await;
    node.drain().await.expect("an orderly end");
    let node = stage.start_on(Backstage::new(&[])).await;
    relay.push(&request.as_json());
    // It is read after the refused one, which therefore was judged again before it, if at all.
    served_after(&relay, &buyer).await;
    node.drain().await.expect("what is owed is delivered");
    let said = said(&relay, &buyer, &request);
    assert_eq!((said.len(), said[0].0), (1, Some(Code::InvalidInput)), "{said:?}");
}
