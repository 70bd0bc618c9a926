//! A missing OK is no refusal, and what a relay shows to a stranger is not all that it has.

use std::time::Duration;

use coinop::relay::Client;
use coinop::store::record::Answer;
use nostr_sdk::prelude::*;

use super::fake::{Fake, Rules, until};
use super::outbox::{answers, owing};
use super::*;

const LONG: Duration = Duration::from_secs(60);

/// Shows its stored events only to those whom it knows, and says EOSE to everybody.
async fn shy(greeting: bool) -> Fake {
    let greeting = if greeting { vec![r#"["AUTH","challenge-1"]"#.to_owned()] } else { vec![] };
    Fake::start(Rules { shy: true, greeting, ..Rules::default() }).await
}

#[tokio::test]
async fn a_relay_that_stores_and_passes_on_but_says_no_ok_has_taken_the_event() {
    let rules = Rules { answers: vec![None; 1000], keeps: true, ..Rules::default() };
    let relay = Fake::start(rules).await;
    let (node, event) = owing(&[relay.url()], LONG, options(&[&relay]));
    assert_eq!(answers(&node, &event, 1).await, [(relay.url(), Answer::Stored)]);
    assert!(relay.published().len() <= 3, "{} times", relay.published().len());
    assert_eq!(node.status(&relay).link.owed, 0);
}

#[tokio::test]
async fn a_relay_of_the_customers_that_says_no_ok_is_asked_whether_it_has_the_answer() {
    let (ours, theirs) = (Fake::start(Rules::default()).await, Fake::start(Rules::default()).await);
    theirs.rules(|rules| (rules.answers, rules.keeps) = (vec![None; 1000], true));
    let options = Options { allow_private: true, ..options(&[&ours]) };
    let options = Options { wire: Wire { linger: Duration::from_secs(5), ..options.wire }, ..options };
    let (node, event) = owing(&[theirs.url()], LONG, options);
    assert_eq!(answers(&node, &event, 1).await, [(theirs.url(), Answer::Stored)]);
}

#[tokio::test]
async fn a_customers_event_is_taken_by_a_relay_that_has_it_and_says_no_ok() {
    let rules = Rules { answers: vec![None; 1000], keeps: true, ..Rules::default() };
    let relay = Fake::start(rules).await;
    let wire = options(&[]).wire;
    let client = Client::connect(&[relay.url()], None, false, wire, LONG).await.unwrap();
    let published = client.publish(&request("x", 0), Duration::from_secs(10)).await;
    assert_eq!(published[0].answer, Answer::Stored);
}

#[tokio::test]
async fn history_that_a_relay_shows_only_after_auth_is_not_missed() {
    let relay = shy(true).await;
    let old = request("old", 3000);
    relay.store(&old);
    let mut node = Node::start(options(&[&relay]));
    assert_eq!(node.next_id().await, old.id);
    assert!(node.status(&relay).link.authenticated);
}

#[tokio::test]
async fn history_is_asked_for_again_when_auth_comes_late() {
    let relay = shy(false).await;
    let old = request("old", 3000);
    relay.store(&old);
    let mut node = Node::start(options(&[&relay]));
    let began = now();
    until("the empty history was believed", || node.cursor(&relay).is_some_and(|at| at >= began)).await;
    node.assert_nothing();
    relay.say(r#"["AUTH","challenge-1"]"#);
    assert_eq!(node.next_id().await, old.id);
}

#[tokio::test]
async fn a_relay_that_never_answers_auth_is_listened_to_as_a_stranger() {
    let rules = Rules { greeting: vec![r#"["AUTH","challenge-2"]"#.into()], ..Rules::default() };
    let relay = Fake::start(Rules { deaf_to_auth: true, ..rules }).await;
    let old = request("old", 3000);
    relay.store(&old);
    let mut node = Node::start(options(&[&relay]));
    assert_eq!(node.next_id().await, old.id);
    let began = now();
    until("the history is whole all the same", || node.cursor(&relay).is_some_and(|at| at >= began)).await;
}

#[tokio::test]
async fn a_query_is_whole_only_after_auth() {
    let relay = shy(true).await;
    let old = request("old", 3000);
    relay.store(&old);
    let filter = Filter::new().kind(Kind::Custom(REQUEST_KIND));
    let wire = options(&[]).wire;
    let client = Client::connect(&[relay.url()], Some(Keys::generate()), false, wire, LONG).await.unwrap();
    let stored = client.stored(vec![filter], Duration::from_secs(10)).await;
    assert_eq!((stored.events, stored.cut), (vec![old], vec![]));
}

#[tokio::test]
async fn a_query_goes_on_past_the_length_of_a_relays_page_up_to_what_was_asked_for() {
    let relay = Fake::start(Rules { page: 7, ..Rules::default() }).await;
    let all: Vec<_> = (0..40).map(|n| request(&format!("{n}"), 10 + 2 * n)).collect();
    all.iter().for_each(|event| relay.store(event));
    let client = Client::connect(&[relay.url()], None, false, options(&[]).wire, LONG).await.unwrap();
    let filter = |most| vec![Filter::new().kind(Kind::Custom(REQUEST_KIND)).limit(most)];
    let found = client.stored(filter(500), Duration::from_secs(10)).await;
    assert_eq!((found.events.len(), found.cut.len()), (40, 0));
    let found = client.stored(filter(10), Duration::from_secs(10)).await;
    assert_eq!(found.events, all[..10], "the newest");
}

#[tokio::test]
async fn a_relay_that_breaks_off_in_the_middle_of_a_query_is_named() {
    let (good, bad) = (Fake::start(Rules::default()).await, Fake::start(Rules::default()).await);
    let client =
        Client::connect(&[good.url(), bad.url()], None, false, options(&[]).wire, LONG).await.unwrap();
    until("both are there", || client.connected().len() == 2).await;
    let events: Vec<_> = (0..9).map(|n| request(&format!("{n}"), 10)).collect();
    events.iter().for_each(|event| bad.store(event));
    bad.rules(|rules| rules.hang_up_after = 4);
    good.store(&events[0]);
    let found = client.stored(vec![Filter::new().kind(Kind::Custom(REQUEST_KIND))], LONG).await;
    assert!(found.events.contains(&events[0]));
    assert_eq!(found.cut, [bad.url()], "its list may have more");
}

#[tokio::test]
async fn an_event_refused_before_auth_is_sent_again_after_it() {
    let rules =
        Rules { greeting: vec![r#"["AUTH","challenge-1"]"#.into()], restricted: true, ..Rules::default() };
    let relay = Fake::start(rules).await;
    let (node, event) = owing(&[relay.url()], LONG, options(&[&relay]));
    assert_eq!(answers(&node, &event, 1).await, [(relay.url(), Answer::Stored)]);
}

#[tokio::test]
async fn an_event_that_needs_auth_does_not_wait_where_auth_comes_to_nothing() {
    let relay = Fake::start(Rules { auth: true, deaf_to_auth: true, ..Rules::default() }).await;
    let (node, event) = owing(&[relay.url()], LONG, options(&[&relay]));
    let reason = "auth-required: who?".to_owned();
    assert_eq!(answers(&node, &event, 1).await, [(relay.url(), Answer::Rejected { reason })]);
}

#[tokio::test]
async fn announcements_for_a_relay_that_left_the_configuration_are_dropped_and_answers_are_not() {
    let (ours, left) = (Fake::start(Rules::default()).await, Fake::start(Rules::default()).await);
    let options = Options { allow_private: true, ..options(&[&ours]) };
    let (memory, announcement) = (Arc::new(InMemory::default()), signed(Kind::Custom(31990), "", 0, vec![]));
    let answer = signed(Kind::Custom(6930), "a result", 0, vec![]);
    for (event, job) in [(&announcement, None), (&answer, Some("a".repeat(64)))] {
        memory.queue(coinop::store::Outgoing {
            event: event.id.to_hex(),
            job,
            json: event.as_json(),
            relays_left: vec![left.url()],
            give_up_ms: u64::MAX,
        });
    }
    let node = Node::again(options, memory);
    assert_eq!(answers(&node, &answer, 1).await, [(left.url(), Answer::Stored)]);
    let dropped = answers(&node, &announcement, 1).await;
    assert!(
        matches!(&dropped[0].1, Answer::GaveUp { reason } if reason.contains("configuration")),
        "{dropped:?}"
    );
    assert_eq!(left.published(), [answer]);
}
