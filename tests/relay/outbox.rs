//! What is owed is sent until a relay says a last word, and the word is kept.

use std::time::Duration;

use coinop::store::Outgoing;
use coinop::store::record::Answer;
use nostr_sdk::prelude::*;

use super::fake::{Fake, Rules, until};
use super::*;

/// A node of ours with an event owed to these relays.
pub(super) fn owing(relays: &[String], give_up_in: Duration, options: Options) -> (Node, Event) {
    let event = signed(Kind::Custom(6930), "a result", 0, vec![]);
    let node = Node::start(options);
    owe(&node, &event, relays, give_up_in);
    (node, event)
}

fn owe(node: &Node, event: &Event, relays: &[String], give_up_in: Duration) {
    let give_up_ms = coinop::clock::now_ms() + give_up_in.as_millis() as u64;
    node.memory.queue(Outgoing {
        event: event.id.to_hex(),
        job: Some("a".repeat(64)),
        json: event.as_json(),
        relays_left: relays.to_vec(),
        give_up_ms,
    });
    node.handle.wake();
}

const LONG: Duration = Duration::from_secs(60);

pub(super) async fn answers(node: &Node, event: &Event, count: usize) -> Vec<(String, Answer)> {
    let id = event.id.to_hex();
    until("the relays have answered", || node.memory.deliveries(&id).len() >= count).await;
    let mut all = node.memory.deliveries(&id);
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

#[tokio::test]
async fn every_kind_of_refusal_ends_as_it_should() {
    for (reason, stored) in [
        ("duplicate: have it", true),
        ("blocked: not you", false),
        ("invalid: bad tag", false),
        ("pow: 28 bits needed", false),
        ("restricted: members only", false),
        ("mute: nobody listens", false),
    ] {
        let relay =
            Fake::start(Rules { answers: vec![Some((false, reason.into()))], ..Rules::default() }).await;
        let (node, event) = owing(&[relay.url()], LONG, options(&[&relay]));
        let expected = if stored { Answer::Stored } else { Answer::Rejected { reason: reason.into() } };
        assert_eq!(answers(&node, &event, 1).await, [(relay.url(), expected)]);
        assert_eq!(relay.published().len(), 1, "{reason}: sent once");
    }
}

#[tokio::test]
async fn trouble_silence_and_rate_limits_are_tried_again_until_stored() {
    for answer in [
        Some((false, "error: disk full".into())),
        Some((false, "rate-limited: slow".into())),
        Some((false, "odd".into())),
        None,
    ] {
        let relay =
            Fake::start(Rules { answers: vec![answer.clone(), answer.clone()], ..Rules::default() }).await;
        let (node, event) = owing(&[relay.url()], LONG, options(&[&relay]));
        assert_eq!(answers(&node, &event, 1).await, [(relay.url(), Answer::Stored)]);
        assert_eq!(relay.published().len(), 3, "{answer:?}");
        assert!(relay.published().iter().all(|sent| *sent == event), "never signed again");
    }
}

#[tokio::test]
async fn a_relay_that_wants_auth_first_gets_it_and_then_the_event() {
    let relay = Fake::start(Rules { auth: true, ..Rules::default() }).await;
    let (node, event) = owing(&[relay.url()], LONG, options(&[&relay]));
    assert_eq!(answers(&node, &event, 1).await, [(relay.url(), Answer::Stored)]);
}

#[tokio::test]
async fn what_is_not_taken_in_time_is_given_up_with_the_last_trouble() {
    let answers_ = vec![Some((false, "error: disk full".to_owned())); 1000];
    let relay = Fake::start(Rules { answers: answers_, ..Rules::default() }).await;
    let (node, event) = owing(&[relay.url()], Duration::from_millis(300), options(&[&relay]));
    let expected = Answer::GaveUp { reason: "error: disk full".into() };
    assert_eq!(answers(&node, &event, 1).await, [(relay.url(), expected)]);
}

#[tokio::test]
async fn a_relay_that_is_away_gets_it_when_it_is_back() {
    let mut relay = Fake::start(Rules::default()).await;
    relay.down().await;
    let (node, event) = owing(&[relay.url()], LONG, options(&[&relay]));
    until("it was tried", || node.status(&relay).link.attempts >= 3).await;
    assert!(node.memory.deliveries(&event.id.to_hex()).is_empty());
    relay.up().await;
    assert_eq!(answers(&node, &event, 1).await, [(relay.url(), Answer::Stored)]);
}

#[tokio::test]
async fn what_an_earlier_run_owed_is_sent_by_the_next() {
    let mut relay = Fake::start(Rules::default()).await;
    relay.down().await;
    let (node, event) = owing(&[relay.url()], LONG, options(&[&relay]));
    assert_eq!(node.handle.drain(Duration::from_millis(100)).await.undelivered, 1);
    relay.up().await;
    let again = Node::again(options(&[&relay]), node.memory);
    assert_eq!(answers(&again, &event, 1).await, [(relay.url(), Answer::Stored)]);
    assert_eq!(again.handle.drain(LONG).await.undelivered, 0);
}

#[tokio::test]
async fn a_relay_named_by_the_customer_is_answered_and_hung_up_on_when_idle() {
    let (ours, theirs) = (Fake::start(Rules::default()).await, Fake::start(Rules::default()).await);
    let options = Options { allow_private: true, ..options(&[&ours]) };
    let named = [ours.url(), theirs.url(), format!("{}/", theirs.url())];
    let (node, event) = owing(&named, LONG, options);
    let all = answers(&node, &event, 3).await;
    assert!(all.iter().all(|(_, answer)| *answer == Answer::Stored), "{all:?}");
    assert_eq!(theirs.published().len(), 1, "two spellings are one relay");
    assert!(theirs.asked("live").is_empty(), "only answered, never listened to");
    until("it was hung up on", || theirs.open() == 0).await;
    until("it is forgotten", || node.handle.status().len() == 1).await;
    let more = signed(Kind::Custom(6930), "another", 0, vec![]);
    owe(&node, &more, &[theirs.url()], LONG);
    assert_eq!(answers(&node, &more, 1).await.len(), 1);
    assert_eq!(theirs.connections(), 2);
}

#[tokio::test]
async fn private_addresses_and_what_is_no_relay_are_refused_with_the_reason() {
    let (ours, inside) = (Fake::start(Rules::default()).await, Fake::start(Rules::default()).await);
    let port = inside.address.port();
    let named = [
        inside.url(),
        format!("ws://localhost:{port}"),
        format!("ws://2130706433:{port}"),
        format!("ws://[::ffff:127.0.0.1]:{port}"),
        format!("ws://[::1]:{port}"),
        "ws://169.254.169.254".into(),
        "http://example.org".into(),
        "wss://u:p@example.org".into(),
    ];
    let (node, event) = owing(&named, LONG, options(&[&ours]));
    for (relay, answer) in answers(&node, &event, named.len()).await {
        let Answer::Rejected { reason } = answer else { panic!("{relay}: {answer:?}") };
        let expected = match &relay[..] {
            "http://example.org" => "only ws",
            "wss://u:p@example.org" => "user name",
            _ => "private address",
        };
        assert!(reason.contains(expected), "{relay}: {reason}");
    }
    assert_eq!(inside.connections(), 0, "nobody knocked");
}

#[tokio::test]
async fn a_result_larger_than_the_relay_takes_is_not_sent_to_it() {
    let nip11 = Some(r#"{"limitation":{"max_message_length":2000}}"#.into());
    let relay = Fake::start(Rules { nip11, ..Rules::default() }).await;
    let node = Node::start(options(&[&relay]));
    until("its limits are known", || node.status(&relay).link.limits.max_message_length == Some(2000)).await;
    let large = signed(Kind::Custom(6930), &"x".repeat(3000), 0, vec![]);
    owe(&node, &large, &[relay.url()], LONG);
    let all = answers(&node, &large, 1).await;
    assert!(
        matches!(&all[0].1, Answer::Rejected { reason } if reason.contains("max_message_length of 2000"))
    );
    assert!(relay.published().is_empty());
}

#[tokio::test]
async fn a_thousand_events_are_each_delivered_once_to_each_of_three_relays() {
    let relays = [
        Fake::start(Rules::default()).await,
        Fake::start(Rules::default()).await,
        Fake::start(Rules::default()).await,
    ];
    let node = Node::start(options(&relays.each_ref()));
    let urls: Vec<_> = relays.iter().map(Fake::url).collect();
    for n in 0..1000 {
        let event = signed(Kind::Custom(6930), &format!("{n}"), 0, vec![]);
        owe(&node, &event, &urls, LONG);
    }
    assert_eq!(node.handle.drain(LONG).await.undelivered, 0);
    for relay in &relays {
        assert_eq!(relay.published().len(), 1000);
    }
}

#[tokio::test]
async fn relays_that_never_say_ok_do_not_keep_the_turn_of_one_that_does() {
    let ours = Fake::start(Rules::default()).await;
    let node = Node::start(Options { allow_private: true, ..options(&[&ours]) });
    let mut deaf = Vec::new();
    for _ in 0..32 {
        deaf.push(Fake::start(Rules { answers: vec![None; 1000], ..Rules::default() }).await);
    }
    let names: Vec<String> = deaf.iter().map(Fake::url).collect();
    let unheard = signed(Kind::Custom(6930), "for the deaf", 0, vec![]);
    owe(&node, &unheard, &names, LONG);
    until("every turn to be taken", || deaf.iter().all(|relay| !relay.published().is_empty())).await;
    let theirs = Fake::start(Rules::default()).await;
    let event = signed(Kind::Custom(6930), "for another", 0, vec![]);
    owe(&node, &event, &[theirs.url()], LONG);
    assert_eq!(answers(&node, &event, 1).await, [(theirs.url(), Answer::Stored)]);
    assert!(node.memory.deliveries(&unheard.id.to_hex()).is_empty(), "they are still owed it");
}

#[tokio::test]
async fn of_many_addresses_on_one_host_four_are_answered_at() {
    let (ours, theirs) = (Fake::start(Rules::default()).await, Fake::start(Rules::default()).await);
    let paths: Vec<String> = (0..9).map(|n| format!("{}/{n}", theirs.url())).collect();
    let (node, event) = owing(&paths, LONG, Options { allow_private: true, ..options(&[&ours]) });
    let all = answers(&node, &event, 9).await;
    let crowded = Answer::GaveUp { reason: "too many relays of one host to answer at".into() };
    assert_eq!(all.iter().filter(|(_, answer)| *answer == Answer::Stored).count(), 4);
    assert_eq!(all.iter().filter(|(_, answer)| *answer == crowded).count(), 5);
}

#[tokio::test]
async fn what_nobody_takes_is_not_read_again_and_again() {
    let relay = Fake::start(Rules::default()).await;
    let gone = "ws://127.0.0.1:1".to_string();
    let memory: Arc<InMemory> = Arc::default();
    let answer = signed(Kind::Custom(6930), "a result", 0, vec![]);
    for n in 0..600 {
        memory.queue(Outgoing {
            event: format!("{n:064x}"),
            job: None,
            json: answer.as_json(),
            relays_left: vec![gone.clone()],
            give_up_ms: u64::MAX,
        });
    }
    let mut options = options(&[&relay]);
    options.relays.push(gone);
    let node = Node::again(options, memory);
    until("its session has its fill", || node.memory.events_read() >= 256).await;
    // Each time one is stored elsewhere, everything owed was looked through once more.
    for _ in 0..3 {
        let event = signed(Kind::Custom(6930), "another", 0, vec![]);
        owe(&node, &event, &[relay.url()], LONG);
        answers(&node, &event, 1).await;
    }
    assert_eq!(node.memory.events_read(), 256 + 3);
}
