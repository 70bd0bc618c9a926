//! The customer's side, and both sides over the local relay.

use std::time::{Duration, Instant};

use coinop::relay::local::LocalRelay;
use coinop::relay::{Client, Error};
use coinop::store::record::Answer;
use nostr_sdk::prelude::*;

use super::fake::{Fake, Rules};
use super::*;

const SOON: Duration = Duration::from_secs(5);

async fn client(relays: &[String]) -> Client {
    Client::connect(relays, Some(Keys::generate()), false, Wire::default(), SOON).await.unwrap()
}

#[tokio::test]
async fn a_request_reaches_the_node_and_a_subscriber_over_the_local_relay() {
    let relay = LocalRelay::start().await.unwrap();
    let mut node = Node::start(Options { relays: vec![relay.url()], ..options(&[]) });
    let customer = client(&[relay.url()]).await;
    let mut watcher = customer.subscribe(vec![Filter::new().kind(Kind::Custom(REQUEST_KIND))]);
    assert_eq!(watcher.stored(SOON).await, 1);
    let event = request("hello", 0);
    let published = customer.publish(&event, SOON).await;
    assert_eq!((published[0].relay.as_str(), &published[0].answer), (relay.url().as_str(), &Answer::Stored));
    assert_eq!(node.next().await.event, event);
    assert_eq!(watcher.next().await.unwrap().event, event);
    let found = customer.query(vec![Filter::new().id(event.id)], SOON).await;
    assert_eq!(found, [event]);
}

#[tokio::test]
async fn a_customer_never_sees_a_forged_or_unasked_event() {
    let relay = Fake::start(Rules { unfiltered: true, ..Rules::default() }).await;
    let good = request("good", 1);
    relay.rules(|rules| rules.raw.extend([frame(&tampered(&good)), frame(&forged())]));
    relay.store(&good);
    relay.store(&signed(Kind::TextNote, "unasked", 1, vec![]));
    let found =
        client(&[relay.url()]).await.query(vec![Filter::new().kind(Kind::Custom(REQUEST_KIND))], SOON).await;
    assert_eq!(found, [good]);
}

#[tokio::test]
async fn each_relay_answers_for_itself() {
    let answers = vec![Some((false, "blocked: no".to_owned()))];
    let (good, bad) =
        (Fake::start(Rules::default()).await, Fake::start(Rules { answers, ..Rules::default() }).await);
    let silent = Fake::start(Rules { answers: vec![None; 100], ..Rules::default() }).await;
    let customer = client(&[good.url(), bad.url(), silent.url()]).await;
    let published = customer.publish(&request("x", 0), Duration::from_millis(1500)).await;
    assert_eq!(published[0].answer, Answer::Stored);
    assert_eq!(published[1].answer, Answer::Rejected { reason: "blocked: no".into() });
    assert!(matches!(published[2].answer, Answer::GaveUp { .. }), "{published:?}");
}

#[tokio::test]
async fn a_subscription_lives_through_a_break() {
    let mut relay = Fake::start(Rules::default()).await;
    let wire = options(&[]).wire;
    let customer = Client::connect(&[relay.url()], None, false, wire, SOON).await.unwrap();
    let mut watcher = customer.subscribe(vec![Filter::new().kind(Kind::Custom(REQUEST_KIND))]);
    let (first, second) = (request("first", 1), request("second", 1));
    relay.store(&first);
    assert_eq!(watcher.next().await.unwrap().event, first);
    relay.down().await;
    relay.store(&second);
    relay.up().await;
    assert_eq!(watcher.next().await.unwrap().event, second, "and the first not again");
}

#[tokio::test]
async fn without_any_relay_the_reason_is_told() {
    let mut relay = Fake::start(Rules::default()).await;
    relay.down().await;
    let error =
        Client::connect(&[relay.url()], None, false, Wire::default(), Duration::from_millis(500)).await;
    let Err(Error::NoRelay(why)) = error else { panic!("{error:?}") };
    assert!(why.contains(&relay.url()) && why.contains("refused"), "{why}");
}

#[tokio::test]
async fn a_round_trip_does_not_wait_for_nagle() {
    let relay = LocalRelay::start().await.unwrap();
    let customer = client(&[relay.url()]).await;
    let mut times = Vec::new();
    for n in 0..50 {
        let event = request(&format!("{n}"), 0);
        let began = Instant::now();
        assert_eq!(customer.publish(&event, SOON).await[0].answer, Answer::Stored);
        times.push(began.elapsed());
    }
    times.sort();
    assert!(times[25] < Duration::from_millis(20), "median {:?}", times[25]);
}
