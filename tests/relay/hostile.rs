//! Relays that lie or break: one verified event, or none.

use std::time::Duration;

use nostr_sdk::prelude::*;

use super::fake::{Fake, Rules, until};
use super::*;

#[tokio::test]
async fn a_forged_event_is_dropped_and_counted() {
    let relay = Fake::start(Rules::default()).await;
    relay.store(&forged());
    relay.store(&tampered(&request("never seen honest", 1)));
    let good = request("good", 1);
    relay.store(&good);
    let mut node = Node::start(options(&[&relay]));
    assert_eq!(node.take(1).await.into_keys().next(), Some(good.id));
    until("both are counted", || node.status(&relay).forged >= 2).await;
    node.assert_nothing();
}

#[tokio::test]
async fn a_tampered_event_under_a_known_id_is_never_seen_when_the_good_one_came_first() {
    let relay = Fake::start(Rules::default()).await;
    let mut node = Node::start(options(&[&relay]));
    until("it is live", || relay.asked("live").len() >= 3).await;
    let good = request("good", 1);
    relay.say(&frame(&good));
    let first = node.next().await;
    assert_eq!(first.event.content, "good");
    relay.say(&frame(&tampered(&good)));
    first.done();
    relay.say(&frame(&tampered(&good)));
    let after = request("after", 1);
    relay.say(&frame(&after));
    assert_eq!(node.next_id().await, after.id);
    assert!(node.status(&relay).duplicate >= 2);
    node.assert_nothing();
}

#[tokio::test]
async fn a_tampered_event_that_comes_first_does_not_hide_the_good_one() {
    let (liar, honest) = (Fake::start(Rules::default()).await, Fake::start(Rules::default()).await);
    let mut node = Node::start(options(&[&liar, &honest]));
    until("both are live", || liar.asked("live").len() >= 3 && honest.asked("live").len() >= 3).await;
    let good = request("good", 1);
    liar.say(&frame(&tampered(&good)));
    until("the lie is found out", || node.status(&liar).forged == 1).await;
    honest.say(&frame(&good));
    let inbound = node.next().await;
    assert_eq!((inbound.event.content.as_str(), inbound.relay.as_str()), ("good", honest.url().as_str()));
    inbound.event.verify().unwrap();
}

#[tokio::test]
async fn the_same_request_over_three_relays_is_one_event() {
    let relays = [
        Fake::start(Rules::default()).await,
        Fake::start(Rules::default()).await,
        Fake::start(Rules::default()).await,
    ];
    let events: Vec<_> = (0..50).map(|n| request(&format!("{n}"), 5)).collect();
    for relay in &relays {
        events.iter().for_each(|event| relay.store(event));
    }
    let mut node = Node::start(options(&relays.each_ref()));
    let seen = node.take(50).await;
    let all_told =
        |node: &Node| relays.iter().all(|r| node.status(r).duplicate + node.status(r).verified >= 50);
    until("all three have told", || all_told(&node)).await;
    assert!(seen.values().all(|times| *times == 1));
    node.assert_nothing();
}

#[tokio::test]
async fn a_replayed_history_is_old_news_after_a_break_and_after_a_restart() {
    let mut relay = Fake::start(Rules::default()).await;
    let events: Vec<_> = (0..20).map(|n| request(&format!("{n}"), n)).collect();
    events.iter().for_each(|event| relay.store(event));
    let mut node = Node::start(options(&[&relay]));
    node.take(20).await;
    relay.down().await;
    relay.up().await;
    until("it came back", || relay.connections() == 2 && node.status(&relay).duplicate >= 20).await;
    node.assert_nothing();
    for event in &events {
        node.memory.know(&event.id.to_hex());
    }
    node.handle.drain(Duration::from_secs(1)).await;
    let mut again = Node::again(options(&[&relay]), node.memory);
    until("it was replayed", || again.status(&relay).duplicate >= 20).await;
    again.assert_nothing();
}

#[tokio::test]
async fn what_was_not_asked_for_is_dropped() {
    let relay = Fake::start(Rules { unfiltered: true, ..Rules::default() }).await;
    relay.store(&signed(Kind::TextNote, "a note", 1, vec![]));
    relay.store(&signed(Kind::Custom(6930), "a result", 1, vec![]));
    relay.store(&signed(Kind::Custom(5050), "another kind of request", 1, vec![]));
    relay.store(&request("older than asked", 100_000));
    let elsewhere = Tag::parse(["k", "1"]).unwrap();
    relay.store(&signed(Kind::EventDeletion, "somebody's note", 1, vec![elsewhere]));
    relay.rules(|rules| rules.raw.push(frame(&request("unknown subscription", 1)).replace("SUB", "other")));
    let good = request("good", 1);
    relay.store(&good);
    let mut node = Node::start(options(&[&relay]));
    assert_eq!(node.next_id().await, good.id);
    until("they came, too", || node.status(&relay).unwanted >= 5).await;
    node.assert_nothing();
}

#[tokio::test]
async fn garbage_depth_and_size_do_not_keep_the_good_event_away() {
    let id = "a".repeat(64);
    let deep = format!(
        r#"["EVENT","SUB",{{"id":"{id}","kind":5930,"created_at":1,"tags":{}{}}}]"#,
        "[".repeat(9000),
        "]".repeat(9000)
    );
    let huge = frame(&request(&"x".repeat(300 << 10), 1));
    let odd_tags = frame(&request("odd", 1)).replace(r#""tags":[]"#, r#""tags":[[],[1],null]"#);
    let raw = [
        "",
        "nonsense",
        "[]",
        "[[[[",
        r#"["EVENT"]"#,
        r#"["EVENT","SUB",null]"#,
        r#"["OK","x",1]"#,
        r#"["EOSE"]"#,
        "\u{0}",
        r#"["EOSE","never asked"]"#,
    ];
    let mut raw: Vec<String> = raw.map(str::to_owned).to_vec();
    raw.extend([deep, huge, odd_tags]);
    let relay = Fake::start(Rules { raw, ..Rules::default() }).await;
    let good = request("good", 1);
    relay.store(&good);
    let mut node = Node::start(options(&[&relay]));
    assert_eq!(node.next_id().await, good.id);
    let status = node.status(&relay);
    assert!(status.link.oversized >= 1);
    assert_eq!(relay.connections(), 1, "the connection lived through it");
}

#[tokio::test]
async fn a_frame_over_the_cap_cuts_the_connection_and_the_next_one_works() {
    let relay = Fake::start(Rules { greeting: vec!["x".repeat(600 << 10)], ..Rules::default() }).await;
    let mut options = options(&[&relay]);
    options.wire.max_frame_bytes = 512 << 10;
    let mut node = Node::start(options);
    until("it was cut", || node.status(&relay).link.trouble.is_some_and(|t| t.contains("nonsense"))).await;
    relay.rules(|rules| rules.greeting.clear());
    let good = request("good", 1);
    relay.store(&good);
    assert_eq!(node.next_id().await, good.id);
}

#[tokio::test]
async fn a_relay_of_nothing_but_garbage_is_hung_up_on() {
    let relay = Fake::start(Rules { greeting: vec!["?".into(); 100], ..Rules::default() }).await;
    let node = Node::start(options(&[&relay]));
    until("it was cut", || relay.connections() >= 2).await;
    assert!(node.status(&relay).link.trouble.is_some_and(|t| t.contains("nonsense")));
}

#[tokio::test]
async fn a_flood_of_forgeries_ends_the_connection() {
    let raw: Vec<_> = (0..300).map(|n| frame(&tampered(&request(&format!("{n}"), 1)))).collect();
    let relay = Fake::start(Rules { raw, ..Rules::default() }).await;
    let mut node = Node::start(options(&[&relay]));
    until("it was cut", || relay.connections() >= 2).await;
    let status = node.status(&relay);
    assert!(status.forged > 200);
    assert!(status.link.trouble.is_some_and(|t| t.contains("too many forged")));
    node.assert_nothing();
}

#[tokio::test]
async fn a_relay_that_never_speaks_or_stops_in_mid_frame_is_left_and_tried_again() {
    let mute = Fake::start(Rules { mute: true, ..Rules::default() }).await;
    let drip = Fake::start(Rules { drip: true, ..Rules::default() }).await;
    let good = Fake::start(Rules::default()).await;
    let event = request("good", 1);
    good.store(&event);
    let mut options = options(&[&mute, &drip, &good]);
    options.wire.connect_timeout = Duration::from_millis(200);
    options.wire.ping_every = Duration::from_millis(50);
    options.wire.idle_timeout = Duration::from_millis(200);
    let mut node = Node::start(options);
    assert_eq!(node.next_id().await, event.id, "the others do not hold it up");
    until("the mute one was tried again", || node.status(&mute).link.attempts >= 2).await;
    until("the dripping one was tried again", || drip.connections() >= 2).await;
    assert!(node.status(&mute).link.trouble.is_some_and(|t| t.contains("connecting took longer")));
    assert!(node.status(&drip).link.trouble.is_some_and(|t| t.contains("ping")));
    assert_eq!(good.connections(), 1, "a quiet relay that answers pings is no dead one");
}

#[tokio::test]
async fn a_relay_that_never_ends_its_stored_events_still_delivers_and_moves_no_cursor() {
    let relay = Fake::start(Rules { never_eose: true, ..Rules::default() }).await;
    let (stored, live) = (request("stored", 3), request("live", 1));
    relay.store(&stored);
    let mut node = Node::start(options(&[&relay]));
    node.take(1).await;
    relay.publish(&live);
    let inbound = node.next().await;
    inbound.done();
    assert_eq!(inbound.event.id, live.id);
    until("the page was given up and asked again", || relay.asked("fill").len() >= 2).await;
    assert_eq!(node.cursor(&relay), None);
    relay.rules(|rules| rules.never_eose = false);
    until("it moves once the history was told", || node.cursor(&relay).is_some()).await;
}

#[tokio::test]
async fn a_relay_that_hangs_up_after_each_message_is_tried_for_ever() {
    let relay = Fake::start(Rules { hang_up_after: 1, ..Rules::default() }).await;
    let events: Vec<_> = (0..3).map(|n| request(&format!("{n}"), n + 1)).collect();
    events.iter().for_each(|event| relay.store(event));
    let mut node = Node::start(options(&[&relay]));
    node.take(1).await;
    until("it was tried again and again", || relay.connections() >= 5).await;
    assert_eq!(node.cursor(&relay), None, "nothing is known to be whole");
    relay.rules(|rules| rules.hang_up_after = 0);
    node.take(2).await;
}

#[tokio::test]
async fn what_a_stranger_signed_and_no_parser_takes_does_not_cut_the_relay() {
    let odd = |n: u64| {
        let event = request(&format!("{n}"), 1).as_json();
        let odd = match n % 2 {
            0 => event.replacen(r#""tags":[]"#, r#""tags":[[]]"#, 1),
            _ => event.replacen(r#""created_at":"#, r#""created_at":0.5,"was":"#, 1),
        };
        format!(r#"["EVENT","SUB",{odd}]"#)
    };
    let relay = Fake::start(Rules { raw: (0..400).map(odd).collect(), ..Rules::default() }).await;
    let good = request("good", 1);
    relay.store(&good);
    let mut node = Node::start(options(&[&relay]));
    assert_eq!(node.next_id().await, good.id);
    until("all of it was read", || relay.asked("fill").len() >= 3).await;
    let (live, event) = (request("live", 0), relay.connections());
    relay.publish(&live);
    assert_eq!(node.next_id().await, live.id);
    assert_eq!((event, relay.connections()), (1, 1), "one connection all the time");
    assert!(node.status(&relay).link.unreadable > 100);
}

#[tokio::test]
async fn forgeries_of_an_earlier_connection_are_not_counted_again() {
    let raw: Vec<_> = (0..300).map(|n| frame(&tampered(&request(&format!("{n}"), 1)))).collect();
    let relay = Fake::start(Rules { raw, ..Rules::default() }).await;
    let mut node = Node::start(options(&[&relay]));
    until("it was cut", || relay.connections() >= 2).await;
    relay.rules(|rules| rules.raw.clear());
    let good = request("good", 1);
    relay.store(&good);
    assert_eq!(node.next_id().await, good.id);
    let connections = relay.connections();
    let live = request("live", 0);
    relay.publish(&live);
    assert_eq!(node.next_id().await, live.id);
    assert!(relay.connections() <= connections + 1, "it stays");
}
