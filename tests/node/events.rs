//! Events that are not what they seem, come too often, or are not for a parser: one job or none.

use nostr_sdk::prelude::{EventBuilder, JsonUtil, Keys, Kind, Tag};
use serde_json::{Value, json};

use super::support::backend::Backstage;
use super::support::scripted::Scripted;
use super::support::stage::{Stage, job, jobs};
use super::support::{now_s, until};
use coinop::protocol::draft::Draft;
use coinop::sandbox::sim::{Script, Sim};
use coinop::store::JobState;
use nostr_sdk::prelude::Event;

/// An order of nothing much for this provider, signed by a new customer.
fn request(provider: &Keys, command: &str) -> Event {
    let customer = Keys::generate();
    let draft = Draft {
        kind: 5930,
        commands: vec![command.into()],
        provider: Some(provider.public_key()),
        ..Draft::default()
    };
    draft.unsigned(&customer, now_s()).expect("a draft").sign_with_keys(&customer).expect("a signature")
}

/// The event with something else in it, under its old id and signature.
fn tampered(event: &Event, command: &str) -> String {
    let mut value: Value = serde_json::from_str(&event.as_json()).expect("JSON");
    value["tags"][0] = json!(["param", "cmd_0", command]);
    value.to_string()
}

async fn done(node: &coinop::node::Node, request: &Event) {
    until("the job to be done", async || {
        job(node.store(), request).filter(|job| job.state == JobState::Done).map(drop)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_event_is_no_job_whoever_it_names_as_its_author() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[]);
    let node = stage.start_on(Backstage::new(&[])).await;
    let (good, other) = (request(&stage.keys, "echo good"), request(&stage.keys, "echo other"));
    let mut forged: Value = serde_json::from_str(&good.as_json()).expect("JSON");
    forged["sig"] = json!(other.sig.to_string());
    relay.push(&forged.to_string());
    let mut foreign: Value = serde_json::from_str(&good.as_json()).expect("JSON");
    foreign["pubkey"] = json!(other.pubkey.to_hex());
    relay.push(&foreign.to_string());
    relay.push(&other.as_json());
    done(&node, &other).await;
    let forged = || node.relays().status().iter().map(|relay| relay.forged).sum::<u64>();
    until("both to be told from good ones", async || (forged() >= 2).then_some(())).await;
    assert_eq!(jobs(node.store()).len(), 1);
    assert!(relay.given_about(&good).is_empty(), "a forged event is not answered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tampered_event_under_a_known_id_changes_nothing_whichever_comes_first() {
    for good_first in [true, false] {
        let relay = Scripted::start().await;
        let stage = Stage::new(&[&relay.url], &[]);
        let node = stage.start_on(Backstage::new(&[])).await;
        let good = request(&stage.keys, "echo good");
        let bad = tampered(&good, "echo bad");
        for event in if good_first { [good.as_json(), bad.clone()] } else { [bad.clone(), good.as_json()] } {
            relay.push(&event);
        }
        let after = request(&stage.keys, "echo after");
        relay.push(&bad);
        relay.push(&after.as_json());
        done(&node, &good).await;
        done(&node, &after).await;
        assert_eq!(jobs(node.store()).len(), 2);
        let kept = job(node.store(), &good).expect("the job").request;
        assert_eq!(Event::from_json(&kept).expect("an event"), good, "the one that was signed is the job");
        let log = node.store().history(&good.id.to_hex()).expect("readable");
        assert!(!format!("{log:?}").contains("echo bad"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_history_replayed_before_and_after_a_restart_is_one_job() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[]);
    let backend = Backstage::new(&[]);
    let node = stage.start_on(backend.clone()).await;
    let wanted = request(&stage.keys, "echo once");
    for _ in 0..50 {
        relay.push(&wanted.as_json());
    }
    done(&node, &wanted).await;
    node.drain().await.expect("an orderly end");

    let node = stage.start_on(backend.clone()).await;
    let after = request(&stage.keys, "echo after");
    relay.push(&wanted.as_json());
    relay.push(&after.as_json());
    done(&node, &after).await;
    assert_eq!(backend.made(), 2, "one sandbox a request");
    let results = relay.given_about(&wanted).into_iter().filter(|e| e.kind == Kind::from(6930u16)).count();
    assert_eq!(results, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_request_over_three_relays_is_one_job_with_one_result_on_each() {
    let relays = [Scripted::start().await, Scripted::start().await, Scripted::start().await];
    let urls: Vec<&str> = relays.iter().map(|relay| relay.url.as_str()).collect();
    let stage = Stage::new(&urls, &[]);
    let backend = Backstage::new(&[]);
    let node = stage.start_on(backend.clone()).await;
    let wanted = request(&stage.keys, "echo once");
    for relay in &relays {
        relay.push(&wanted.as_json());
    }
    done(&node, &wanted).await;
    let mut ids = Vec::new();
    for relay in &relays {
        let result = until("the result on each relay", async || {
            relay.given_about(&wanted).into_iter().find(|event| event.kind == Kind::from(6930u16))
        })
        .await;
        ids.push(result.id);
    }
    ids.dedup();
    assert_eq!((ids.len(), backend.made()), (1, 1));
    for relay in &relays {
        let about = relay.given_about(&wanted);
        assert_eq!(about.len(), 2, "a feedback and a result, each once: {about:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rubbish_of_every_size_and_depth_is_passed_over_and_the_next_request_is_served() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[]);
    let node = stage.start_on(Backstage::new(&[])).await;
    let good = request(&stage.keys, "echo good");
    let mut wrong_types: Value = serde_json::from_str(&good.as_json()).expect("JSON");
    wrong_types["tags"] = json!([[1, null, {}], "x", [[]]]);
    let deep = "[".repeat(100_000) + &"]".repeat(100_000);
    let huge =
        good.as_json().replace("\"content\":\"\"", &format!("\"content\":\"{}\"", "x".repeat(400_000)));
    for rubbish in [
        "null".to_string(),
        "{".to_string(),
        "\"\u{0}\"".to_string(),
        wrong_types.to_string(),
        good.as_json().replace(&good.id.to_hex(), "zz"),
        format!("{{\"id\":\"{}\",\"kind\":5930,\"tags\":{deep}}}", good.id),
        huge,
        "{}".to_string(),
    ] {
        relay.push(&rubbish);
    }
    relay.push(&good.as_json());
    done(&node, &good).await;
    assert_eq!(jobs(node.store()).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signed_request_with_too_many_tags_is_refused_with_the_reason() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[]);
    let node = stage.start_on(Backstage::new(&[])).await;
    let customer = Keys::generate();
    let tags = (0..2_100).map(|n| Tag::parse(["t", &n.to_string()]).expect("a tag"));
    let event = EventBuilder::new(Kind::from(5930u16), "")
        .tags(tags.chain([Tag::public_key(stage.keys.public_key())]))
        .sign_with_keys(&customer)
        .expect("a signature");
    relay.push(&event.as_json());
    let answer = until("the refusal", async || relay.given_about(&event).pop()).await;
    let said = coinop::protocol::Feedback::decode(&answer, &customer).expect("feedback").feedback;
    assert_eq!(said.code(), Some(coinop::protocol::Code::InvalidInput));
    assert!(said.extra.expect("a reason").contains("more than 2048 tags"));
    assert!(jobs(node.store()).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_kinds_announced_are_the_kinds_subscribed_and_the_kinds_that_run() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[("skills", "generic,docs")]);
    let caveat = "jobs can open no sockets here".to_owned();
    let sim = Sim::new(Script { caveats: vec![caveat.clone()], ..Script::default() });
    let node = stage.start_on(sim).await;
    let announced = until("the announcement", async || {
        relay.given().into_iter().find(|event| event.kind == Kind::from(31_990u16))
    })
    .await;
    let kinds = |event: &Event| -> Vec<u64> {
        let tags = event.tags.iter().filter(|tag| tag.as_slice()[0] == "k");
        let mut kinds: Vec<u64> = tags.map(|tag| tag.as_slice()[1].parse().expect("a kind")).collect();
        kinds.sort_unstable();
        kinds
    };
    let wanted = vec![5000, 5300, 5930];
    assert_eq!(kinds(&announced), wanted);
    let told: Value = serde_json::from_str(&announced.content).expect("JSON");
    assert_eq!(told["caveats"], json!([caveat]), "what a host keeps from jobs is announced");
    assert_eq!((&told["encryptionSupported"], &told["supportsEncryption"]), (&json!(true), &json!(true)));
    let status = stage.ask(coinop::control::Ask::Status).await.expect("an answer");
    assert_eq!(status["kinds"], json!(wanted));
    let mut asked: Vec<u64> = until("the subscription", async || {
        let asked = relay.asked();
        let kinds = asked.iter().filter_map(|filter| filter["kinds"].as_array()).flatten();
        let kinds: Vec<u64> = kinds.filter_map(Value::as_u64).filter(|kind| *kind != 5).collect();
        (!kinds.is_empty()).then_some(kinds)
    })
    .await;
    asked.sort_unstable();
    asked.dedup();
    // Questions about accounts are heard as well; they are no jobs, and not announced.
    let heard: Vec<u64> = wanted.into_iter().chain([u64::from(coinop::protocol::ACCOUNT_KIND)]).collect();
    // And the results of all these, by which a first start knows what is answered already.
    let (requests, results): (Vec<u64>, Vec<u64>) = asked.into_iter().partition(|kind| *kind < 6000);
    assert_eq!(requests, heard);
    assert!(results.iter().all(|kind| heard.contains(&(kind - 1000))), "{results:?}");
    node.drain().await.expect("an orderly end");
    let withdrawn = relay.given().into_iter().filter(|event| event.kind == Kind::from(5u16)).count();
    assert_eq!(withdrawn, 1, "the announcement is taken back at the end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_announcement_is_renewed_before_it_runs_out_and_not_after_it_was_taken_back() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[("announce.renew_ms", "1000")]);
    let node = stage.start_on(Backstage::new(&[])).await;
    let announced = |relay: &Scripted| -> Vec<u64> {
        let all = relay.given().into_iter().filter(|event| event.kind == Kind::from(31_990u16));
        all.map(|event| event.tags.expiration().expect("it runs out").as_secs()).collect()
    };
    let three = until("two renewals", async || Some(announced(&relay)).filter(|all| all.len() >= 3)).await;
    assert!(three.is_sorted_by(|a, b| a < b), "each holds longer than the one before: {three:?}");
    node.drain().await.expect("an orderly end");
    let last = relay.given().pop().expect("the withdrawal");
    assert_eq!(last.kind, Kind::from(5u16), "and nothing after it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stops_listening_still_delivers() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[]);
    let backend = Backstage::new(&[]);
    backend.hold(true);
    let node = stage.start_on(backend.clone()).await;
    let (open, late) = (request(&stage.keys, "echo open"), request(&stage.keys, "echo late"));
    relay.push(&open.as_json());
    until("the job to run", async || (backend.living() == 1).then_some(())).await;
    assert_eq!(stage.ask(coinop::control::Ask::Status).await.expect("an answer")["following"], true);
    node.relays().stop_following();
    assert_eq!(stage.ask(coinop::control::Ask::Status).await.expect("an answer")["following"], false);
    relay.push(&late.as_json());
    backend.hold(false);
    until("the result", async || {
        relay.given_about(&open).into_iter().find(|event| event.kind == Kind::from(6930u16))
    })
    .await;
    assert!(job(node.store(), &late).is_none(), "nothing is taken any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_has_a_result_already_is_passed_over_at_a_first_start() {
    let relay = Scripted::start().await;
    let stage = Stage::new(&[&relay.url], &[]);
    let other = Keys::generate();
    let open = |command: &str| {
        let (customer, draft) =
            (Keys::generate(), Draft { kind: 5930, commands: vec![command.into()], ..Draft::default() });
        draft.unsigned(&customer, now_s()).expect("a draft").sign_with_keys(&customer).expect("a signature")
    };
    let result = |to: &Event, by: &Keys| {
        let event = EventBuilder::new(Kind::from(6930u16), "done").tag(Tag::event(to.id));
        event.sign_with_keys(by).expect("a signature").as_json()
    };
    let (taken, free) = (open("echo taken"), open("echo free"));
    let (ours, done_before) = (request(&stage.keys, "echo ours"), request(&stage.keys, "echo before"));
    for event in [&taken, &free, &ours, &done_before] {
        relay.push(&event.as_json());
    }
    // A stranger's result frees nobody from what was asked of it by name.
    for event in [result(&taken, &other), result(&ours, &other), result(&done_before, &stage.keys)] {
        relay.push(&event);
    }
    let node = stage.start_on(Backstage::new(&[])).await;
    done(&node, &free).await;
    done(&node, &ours).await;
    assert_eq!(jobs(node.store()).len(), 2, "what has a result is not begun");
    node.drain().await.expect("an end");
    let node = stage.start_on(Backstage::new(&[])).await;
    let later = request(&stage.keys, "echo later");
    relay.push(&later.as_json());
    done(&node, &later).await;
    assert_eq!(jobs(node.store()).len(), 3, "nor at the next start");
}
