//! Nothing is lost: breaks, restarts, lag, long histories, and the cursor that only passes what was handled.

use std::time::Duration;

use nostr_sdk::prelude::*;

use super::fake::{Fake, Rules, until};
use super::*;

#[tokio::test]
async fn all_relays_gone_and_back_leaves_no_gap() {
    let mut relays =
        [Fake::start(Rules::default()).await, Fake::start(Rules { page: 7, ..Rules::default() }).await];
    let mut node = Node::start(options(&relays.each_ref()));
    let first = request("first", 30);
    relays[0].publish(&first);
    node.take(1).await;
    for relay in &mut relays {
        relay.down().await;
    }
    until("both are lost", || relays.iter().all(|r| !node.status(r).link.connected)).await;
    // More than a page, on either side, and some on both.
    let missed: Vec<_> = (0..60).map(|n| request(&format!("{n}"), n % 25)).collect();
    missed[..40].iter().for_each(|event| relays[0].store(event));
    missed[20..].iter().for_each(|event| relays[1].store(event));
    for relay in &mut relays {
        relay.up().await;
    }
    let seen = node.take(60).await;
    assert!(missed.iter().all(|event| seen.get(&event.id) == Some(&1)));
    node.assert_nothing();
}

#[tokio::test]
async fn a_break_in_the_middle_of_a_fill_leaves_no_gap() {
    for round in 0..20 {
        let mut relay = Fake::start(Rules { page: 3, ..Rules::default() }).await;
        let mut node = Node::start(options(&[&relay]));
        until("pages are asked", || relay.asked("fill").len() > round % 3).await;
        relay.down().await;
        let missed: Vec<_> = (0..12).map(|n| request(&format!("{n}"), 5 + n)).collect();
        missed.iter().for_each(|event| relay.store(event));
        relay.up().await;
        node.take(12).await;
    }
}

#[tokio::test]
async fn a_long_history_comes_whole_over_short_pages_and_a_restart_asks_only_for_the_rest() {
    let relay = Fake::start(Rules { page: 10, ..Rules::default() }).await;
    let events: Vec<_> = (0..300).map(|n| request(&format!("{n}"), 1000 + n * 5)).collect();
    events.iter().for_each(|event| relay.store(event));
    let mut node = Node::start(options(&[&relay]));
    let began = now();
    node.take(300).await;
    until("the cursor has passed them", || node.cursor(&relay).is_some_and(|c| c >= began)).await;
    node.handle.drain(Duration::from_secs(1)).await;
    let asked = relay.asked("fill").len();
    let cursor = node.cursor(&relay).unwrap();
    let mut again = Node::again(options(&[&relay]), node.memory);
    until("it was asked", || relay.asked("fill").len() > asked).await;
    assert_eq!(relay.asked("fill")[asked]["since"], cursor - 600, "ten minutes of overlap");
    until("it was filled", || relay.asked("fill").len() >= asked + 3).await;
    again.assert_nothing();
}

#[tokio::test]
async fn the_first_contact_looks_back_and_never_starts_now() {
    let relay = Fake::start(Rules::default()).await;
    let _node = Node::start(Options { look_back_s: 5000, ..options(&[&relay]) });
    until("it was asked", || relay.asked("fill").len() >= 3).await;
    let since = |asked: Vec<serde_json::Value>| asked[0]["since"].as_u64().unwrap();
    assert!(since(relay.asked("fill")).abs_diff(now() - 5000) < 5);
    assert!(since(relay.asked("live")) <= now() - 600);
}

#[tokio::test]
async fn the_cursor_stays_before_an_event_that_is_not_done_on_every_relay_that_sent_it() {
    let relays = [Fake::start(Rules::default()).await, Fake::start(Rules::default()).await];
    let (old, new) = (request("old", 50), request("new", 10));
    for relay in &relays {
        relay.store(&old);
        relay.store(&new);
    }
    let mut node = Node::start(options(&relays.each_ref()));
    let (a, b) = (node.next().await, node.next().await);
    let (old_one, new_one) = if a.event.id == old.id { (a, b) } else { (b, a) };
    new_one.done();
    let before_old = old.created_at.as_secs() - 1;
    until("both are just before it", || relays.iter().all(|r| node.cursor(r) == Some(before_old))).await;
    old_one.done();
    until("both have passed it", || relays.iter().all(|r| node.cursor(r).unwrap() > before_old + 10)).await;
}

#[tokio::test]
async fn an_event_dropped_without_done_comes_again() {
    let relay = Fake::start(Rules::default()).await;
    relay.store(&request("once more", 5));
    let mut node = Node::start(options(&[&relay]));
    let first = node.next().await;
    let id = first.event.id;
    drop(first);
    let second = node.next().await;
    assert_eq!(second.event.id, id);
    second.done();
    until("the cursor passes", || node.cursor(&relay).is_some_and(|c| c > second.event.created_at.as_secs()))
        .await;
}

#[tokio::test]
async fn a_slow_node_lags_and_still_gets_every_event_once() {
    let relay = Fake::start(Rules::default()).await;
    let stored: Vec<_> = (0..150).map(|n| request(&format!("{n}"), 20 + n % 40)).collect();
    stored.iter().for_each(|event| relay.store(event));
    let mut node = Node::start(Options { inbound_capacity: 8, ..options(&[&relay]) });
    until("it lags", || node.status(&relay).lagged > 0).await;
    for n in 0..150 {
        relay.publish(&request(&format!("live {n}"), 1));
    }
    // It may stand before all of them, when it was written between the last page and the first drop.
    let oldest = stored.iter().map(|event| event.created_at.as_secs()).min();
    assert!(node.cursor(&relay) < oldest, "no cursor over a gap");
    let seen = node.take(300).await;
    assert!(seen.values().all(|times| *times == 1));
    until("the cursor has caught up", || node.cursor(&relay).is_some_and(|c| c >= now() - 5)).await;
    node.assert_nothing();
}

#[tokio::test]
async fn a_timer_finds_what_the_live_subscription_missed() {
    let relay = Fake::start(Rules::default()).await;
    let mut node = Node::start(Options { refill_every: Duration::from_millis(100), ..options(&[&relay]) });
    until("it was filled", || relay.asked("fill").len() >= 3).await;
    let missed = request("stored without a word", 5);
    relay.store(&missed);
    assert_eq!(node.next_id().await, missed.id);
}

#[tokio::test]
async fn a_closed_subscription_is_asked_again() {
    let relay = Fake::start(Rules { closed: (3, "error: restarting".into()), ..Rules::default() }).await;
    let mut node = Node::start(options(&[&relay]));
    until("the live one was asked again", || relay.asked("live").len() >= 6).await;
    let live = request("live", 1);
    relay.publish(&live);
    assert_eq!(node.next_id().await, live.id);
    assert!(node.status(&relay).link.trouble.is_some_and(|t| t.contains("restarting")));
}

#[tokio::test]
async fn a_relay_that_wants_auth_gets_it_and_is_asked_again() {
    let relay = Fake::start(Rules { auth: true, ..Rules::default() }).await;
    let good = request("good", 1);
    relay.store(&good);
    let mut node = Node::start(options(&[&relay]));
    assert_eq!(node.next_id().await, good.id);
    assert!(node.status(&relay).link.authenticated);
}

#[tokio::test]
async fn a_relay_with_one_subscription_gets_one_at_a_time() {
    let nip11 = r#"{"limitation":{"max_subscriptions":1,"max_limit":20}}"#.into();
    let relay = Fake::start(Rules { nip11: Some(nip11), page: 20, ..Rules::default() }).await;
    let stored: Vec<_> = (0..50).map(|n| request(&format!("{n}"), 700 + n)).collect();
    stored.iter().for_each(|event| relay.store(event));
    let mut node = Node::start(options(&[&relay]));
    node.take(50).await;
    until("then it is live", || relay.asked("live").len() >= 3).await;
    let asked: Vec<_> = relay.shared.asked.lock().unwrap().iter().map(|a| a[0].clone()).collect();
    let first_live = asked.iter().position(|id| id == "live").unwrap();
    let before = |id: &serde_json::Value| id == "results" || id.as_str().unwrap().starts_with("fill");
    assert!(asked[..first_live].iter().all(before), "{asked:?}");
    assert_eq!(relay.asked("fill")[0]["limit"], 20);
    let live = request("live", 1);
    relay.publish(&live);
    assert_eq!(node.next_id().await, live.id);
}

#[tokio::test]
async fn cancels_come_by_kind_by_our_key_and_by_the_job_watched() {
    let relay = Fake::start(Rules::default()).await;
    let keys = Keys::generate();
    let mut node = Node::with_keys(options(&[&relay]), Arc::default(), keys.clone());
    until("it is live", || relay.asked("live").len() >= 3).await;
    let job = request("the job", 1);
    let by = |tags: Vec<Tag>| signed(Kind::EventDeletion, "stop", 1, tags);
    let by_kind = by(vec![Tag::event(request("other", 1).id), Tag::parse(["k", "5930"]).unwrap()]);
    let by_key = by(vec![Tag::event(request("other", 1).id), Tag::public_key(keys.public_key())]);
    let by_job = by(vec![Tag::event(job.id)]);
    relay.publish(&by_kind);
    assert_eq!(node.next_id().await, by_kind.id);
    relay.publish(&by_key);
    assert_eq!(node.next_id().await, by_key.id);
    // Stored before anybody watched: asked for without a `since`.
    relay.store(&by_job);
    node.handle.watch_cancels(vec![job.id]);
    assert_eq!(node.next_id().await, by_job.id);
    node.handle.watch_cancels(vec![]);
    until("it is not subscribed to any more", || relay.subscribed() == ["live"]).await;
}

#[tokio::test]
async fn a_live_request_with_an_old_date_is_heard_as_far_back_as_the_node_takes_them() {
    let relay = Fake::start(Rules::default()).await;
    let mut node = Node::start(Options { live_back_s: 7200, ..options(&[&relay]) });
    until("it is live", || relay.asked("fill").len() >= 3).await;
    let began = now();
    until("the history is whole", || node.cursor(&relay).is_some_and(|at| at >= began)).await;
    let late = request("late", 5000);
    relay.publish(&late);
    assert_eq!(node.next_id().await, late.id);
}
