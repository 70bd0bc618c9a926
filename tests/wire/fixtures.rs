//! Reads every event of `tests/fixtures/wire/` and compares what the protocol room makes of it with the
//! expectation in the same file; then feeds the decoders anything at all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use coinop::protocol::{Feedback, Order, Reply, request};
use nostr_sdk::prelude::*;
use proptest::prelude::*;
use serde_json::{Map, Value};

use super::*;

fn fixtures() -> BTreeMap<PathBuf, Value> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/wire");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|ext| ext == "json"));
    files.map(|path| (path.clone(), serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())).collect()
}

#[test]
fn every_fixture_reads_as_it_says() {
    let fixtures = fixtures();
    assert!(fixtures.len() >= 62, "only {} fixtures found", fixtures.len());
    let mut wrong = Vec::new();
    for (path, fixture) in fixtures {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let seen = see(&fixture["event"]);
        let expected = with_defaults(&fixture["expect"], &seen);
        if seen != expected {
            wrong.push(format!("{name}: {}\n  expected {expected}\n  seen     {seen}", fixture["about"]));
        }
    }
    assert!(wrong.is_empty(), "{} fixtures read differently:\n{}", wrong.len(), wrong.join("\n"));
}

/// `error_starts` stands for an error whose end is the crypto crate's own words.
fn with_defaults(expected: &Value, seen: &Value) -> Value {
    let mut expected = expected.as_object().unwrap().clone();
    if let Some(Value::String(start)) = expected.remove("error_starts") {
        let error = seen["error"].as_str().filter(|error| error.starts_with(&start));
        expected.insert("error".into(), error.unwrap_or(&start).into());
    }
    Value::Object(expected)
}

/// What our room reads from the event, with everything empty left out.
fn see(json: &Value) -> Value {
    let Ok(event) = Event::from_json(json.to_string()) else { return json!({"unparsable": true}) };
    let mut seen = match event.kind.as_u16() {
        5 => see_cancel(&event),
        7000 => see_feedback(&event),
        6000..=7999 => see_reply(&event),
        _ => see_request(&event),
    };
    if event.verify().is_err() {
        seen.insert("verifies".into(), false.into());
    }
    Value::Object(seen)
}

fn see_request(event: &Event) -> Map<String, Value> {
    let request = match Request::decode(event, &provider()) {
        Ok(request) => request,
        Err(error) => return object(json!({"error": error.to_string(), "code": error.code().as_str()})),
    };
    let inputs: Vec<Value> = request.inputs.iter().map(see_input).collect();
    let params: Vec<Vec<&str>> = request
        .params
        .iter()
        .map(|(key, values)| std::iter::once(key).chain(values).map(String::as_str).collect())
        .collect();
    let mut seen = object(json!({"request": slim(json!({
        "inputs": inputs, "params": params, "output": request.output, "bid_msat": request.bid_msat,
        "relays": request.relays, "targeted": request.is_targeted(&provider().public_key()),
        "expiration": request.expiration, "encryption": request.encryption.map(|scheme| scheme.to_string()),
    }))}));
    match Order::read(&request) {
        Ok(order) => {
            // On the shared kinds a request without a repository is other people's business.
            let shared = [5100, 5200, 5300].contains(&request.kind);
            if shared && !order.names_repo() {
                seen.insert("foreign".into(), true.into());
            }
            seen.insert("order".into(), see_order(&order));
        }
        Err(error) => drop(seen.insert("order_error".into(), error.to_string().into())),
    }
    if request.is_expired(NOW_S) {
        seen.insert("expired".into(), true.into());
    }
    seen
}

fn see_input(input: &request::Input) -> Value {
    let kind = match input.kind {
        request::InputKind::Url => "url",
        request::InputKind::Event => "event",
        request::InputKind::Job => "job",
        request::InputKind::Text => "text",
    };
    slim(json!({"kind": kind, "data": input.data, "marker": input.marker, "relay": input.relay}))
}

fn see_order(order: &Order) -> Value {
    slim(json!({
        "repo": order.repo, "git_ref": order.git_ref, "commands": order.commands, "workdir": order.workdir,
        "env": order.env, "artifacts": order.artifacts, "task": order.task, "time_secs": order.time_secs,
        "memory_mb": order.memory_mb, "disk_mb": order.disk_mb, "cpu_milli": order.cpu_milli,
        "network": order.network, "extra": order.extra,
    }))
}

fn see_cancel(event: &Event) -> Map<String, Value> {
    let cancel = request::Cancel::decode(event).unwrap();
    let by = if cancel.by == customer().public_key() { "customer" } else { "other" };
    let requests: Vec<String> = cancel.requests.iter().map(|id| id.to_hex()).collect();
    object(json!({"cancel": {"requests": requests, "by": by, "reason": cancel.reason}}))
}

fn see_feedback(event: &Event) -> Map<String, Value> {
    let received = match Feedback::decode(event, &customer()) {
        Ok(received) => received,
        Err(error) => return object(json!({"error": error.to_string()})),
    };
    let feedback = &received.feedback;
    object(json!({"feedback": slim(json!({
        "request_id": received.request_id.to_hex(), "status": feedback.status.as_str(), "extra": feedback.extra,
        "amount": feedback.amount, "content": feedback.content, "code": feedback.code().map(|code| code.as_str()),
        "encryption": received.encryption.map(|scheme| scheme.to_string()),
    }))}))
}

fn see_reply(event: &Event) -> Map<String, Value> {
    let reply = match Reply::decode(event, &customer()) {
        Ok(reply) => reply,
        Err(error) => return object(json!({"error": error.to_string()})),
    };
    object(json!({"reply": slim(json!({
        "request_id": reply.request_id.to_hex(), "content": reply.content, "amount_msat": reply.amount_msat,
        "invoice": reply.invoice, "facts": reply.facts,
        "encryption": reply.encryption.map(|scheme| scheme.to_string()),
    }))}))
}

fn object(value: Value) -> Map<String, Value> {
    let Value::Object(map) = value else { panic!("not an object: {value}") };
    map
}

/// Without what is empty, false or null.
fn slim(value: Value) -> Value {
    let is_empty = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    Value::Object(object(value).into_iter().filter(|(_, value)| !is_empty(value)).collect())
}

// === anything at all ===

/// Words that the decoders look for, among them the dangerous ones, or any text.
fn word() -> impl Strategy<Value = String> {
    let known = [
        "i",
        "input",
        "param",
        "bid",
        "p",
        "e",
        "relays",
        "expiration",
        "encrypted",
        "output",
        "status",
        "amount",
        "proof",
        "request",
        "result",
        "url",
        "text",
        "repo",
        "cmd_0",
        "cmd_4294967295",
        "env_A",
        "artifact_7",
        "command",
        "git_ref",
        "max_cpu_cores",
        "100_000",
        "-1",
        "1e400",
        "NaN",
        "wss://relay.example",
        "https://a.example/b.git",
        "\0",
        "ß",
        "🦀",
        "",
    ];
    prop_oneof![3 => prop::sample::select(known.to_vec()).prop_map(str::to_owned), 1 => any::<String>()]
}

fn event() -> impl Strategy<Value = Event> {
    let kind = prop_oneof![
        5 => 5000_u16..=5999, 2 => 6000_u16..=6999, 2 => Just(7000_u16), 1 => Just(5_u16), 1 => any::<u16>(),
    ];
    let rows = prop::collection::vec(prop::collection::vec(word(), 1..6), 0..40);
    let content = prop_oneof![
        any::<String>(),
        "[A-Za-z0-9+/]{0,300}={0,2}",
        "[A-Za-z0-9+/]{0,60}\\?iv=[A-Za-z0-9+/=]{0,30}"
    ];
    (kind, rows, content, any::<bool>()).prop_map(|(kind, mut rows, content, targeted)| {
        if targeted {
            rows.push(vec!["p".into(), provider().public_key().to_hex()]);
        }
        let tags = rows.into_iter().map(|row| Tag::parse(row).unwrap());
        let unsigned = UnsignedEvent::new(
            customer().public_key(),
            Timestamp::from_secs(NOW_S),
            Kind::from(kind),
            tags,
            content,
        );
        unsigned.sign_with_keys(&customer()).unwrap()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_decoder_panics_whatever_the_event(event in event()) {
        let seen = see(&serde_json::to_value(&event).unwrap());
        prop_assert!(seen.is_object());
        coinop::protocol::proof::check(&event, Some(&event));
        coinop::protocol::proof::check_with_keys(&event, None, &provider());
    }

    #[test]
    fn no_decoder_panics_whatever_is_encrypted(plain in prop_oneof![any::<String>(), "[\\[\\]{}\",a-z0-9:]{1,400}"]) {
        prop_assume!(!plain.is_empty());
        let sealed = nip44::encrypt(customer().secret_key(), &provider().public_key(), &plain, nip44::Version::V2).unwrap();
        let tags = [Tag::public_key(provider().public_key()), Tag::parse(["encrypted"]).unwrap()];
        let event = UnsignedEvent::new(customer().public_key(), Timestamp::from_secs(NOW_S), Kind::from(5000), tags, sealed);
        let seen = see(&serde_json::to_value(event.sign_with_keys(&customer()).unwrap()).unwrap());
        prop_assert!(seen.get("request").is_some() || seen["code"] == "undecryptable" || seen["code"] == "invalid_input");
    }

    #[test]
    fn a_decoded_order_keeps_its_bounds(event in event()) {
        let order = Request::decode(&event, &provider()).ok().and_then(|request| Order::read(&request).ok());
        if let Some(order) = order {
            prop_assert!(order.commands.len() <= coinop::protocol::order::MAX_COMMANDS);
            prop_assert!(order.commands.iter().all(|command| !command.contains('\0') && !command.trim().is_empty()));
            prop_assert!(order.cpu_milli.is_none_or(|milli| milli >= 1));
        }
    }
}
