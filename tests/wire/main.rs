//! The protocol room from outside. `fixtures` reads what others write and feeds the decoders anything at
//! all; `drafts`, `answers` and `proofs` write and read back what we write. Here: the people of the tests.

mod answers;
mod drafts;
mod fixtures;
mod proofs;

use coinop::protocol::request::Draft;
use coinop::protocol::{Proof, Request, Scheme, proof, result, sha256_hex};
use nostr_sdk::prelude::*;
use serde_json::json;

/// The day of the fixtures, Unix seconds.
const NOW_S: u64 = 1_795_219_200;
const REPO: &str = "https://git.example/acme/widget.git";
const HINT: Option<&str> = Some("wss://relay.example");
const MAX: usize = 64 * 1024;

fn keys(digit: &str) -> Keys {
    Keys::parse(&digit.repeat(64)).unwrap()
}

fn customer() -> Keys {
    keys("1")
}

fn provider() -> Keys {
    keys("2")
}

fn draft(encrypt: Option<Scheme>) -> Draft {
    Draft {
        kind: 5000,
        repo: Some(REPO.into()),
        git_ref: Some("main".into()),
        commands: vec!["cargo build".into(), "cargo test".into()],
        workdir: Some("core".into()),
        env: [("LANG".to_owned(), "C".to_owned())].into(),
        artifacts: vec!["out/a.txt".into(), "out/b.txt".into()],
        task: Some("Make it pass".into()),
        time_secs: Some(60),
        memory_mb: Some(512),
        disk_mb: Some(256),
        cpu_milli: Some(1_250),
        params: vec![("model".into(), "any".into())],
        bid_msat: Some(21_000),
        output: Some("application/json".into()),
        relays: vec!["wss://relay.example".into()],
        provider: Some(provider().public_key()),
        encrypt,
        expiration: Some(NOW_S + 600),
    }
}

fn sign(unsigned: UnsignedEvent, keys: &Keys) -> Event {
    unsigned.sign_with_keys(keys).unwrap()
}

fn request_event(encrypt: Option<Scheme>) -> Event {
    sign(draft(encrypt).unsigned(&customer(), NOW_S).unwrap(), &customer())
}

fn request(encrypt: Option<Scheme>) -> Request {
    Request::decode(&request_event(encrypt), &provider()).unwrap()
}

fn a_proof(content: &str) -> Proof {
    Proof {
        commit: Some("c0ffee".repeat(6) + "c0ff"),
        backend: "local".into(),
        image: "debian 12, linux 6.1, x86_64".into(),
        policy: Some(r#"{"wall_ms":1}"#.into()),
        policy_sha256: sha256_hex(br#"{"wall_ms":1}"#),
        output_sha256: sha256_hex(content.as_bytes()),
        wall_ms: 1_200,
        cpu_ms: Some(800),
        peak_memory_bytes: 1 << 20,
        price_msat: 20_000,
    }
}

fn facts() -> Vec<(String, String)> {
    vec![("files_changed".into(), "2".into())]
}

fn result_event(request: &Request, content: &str, proof: &Proof) -> Event {
    let unsigned =
        result::unsigned(request, content, proof, &facts(), None, &provider(), HINT, NOW_S + 5, MAX).unwrap();
    sign(unsigned, &provider())
}

fn names(event: &Event) -> Vec<&str> {
    event.tags.iter().map(|tag| tag.as_slice()[0].as_str()).collect()
}

const SCHEMES: [Option<Scheme>; 3] = [None, Some(Scheme::Nip44), Some(Scheme::Nip04)];
