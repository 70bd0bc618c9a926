//! `coinop request` and `coinop verify` against providers of this test's making, honest and not.

use std::sync::Arc;
use std::time::Duration;

use coinop::protocol::{Feedback, Proof, Request, Scheme, Status, feedback, result, sha256_hex};
use coinop::relay::local::LocalRelay;
use coinop::relay::{Client, Wire};
use nostr_sdk::prelude::{Event, Filter, JsonUtil, Keys, Kind, PublicKey, ToBech32};

use super::{Home, Said};

pub(super) const SOON: Duration = Duration::from_secs(10);

/// What a provider does with a request: events to publish, in order.
pub(super) type Answers = dyn Fn(&Request, &Keys) -> Vec<Event> + Send + Sync;

/// A relay and providers on it, until dropped.
pub(super) struct Market {
    pub(super) relay: LocalRelay,
    pub(super) runtime: tokio::runtime::Runtime,
}

impl Market {
    pub(super) fn new() -> Market {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let relay = runtime.block_on(LocalRelay::start()).unwrap();
        Market { relay, runtime }
    }

    /// Listens from before this returns.
    pub(super) fn provider(&self, keys: Keys, answers: Arc<Answers>) {
        let relays = [self.relay.url()];
        let (client, mut requests) = self.runtime.block_on(async {
            let client = Client::connect(&relays, None, true, Wire::default(), SOON).await.unwrap();
            let requests =
                client.subscribe(vec![Filter::new().kinds([Kind::from(5930u16), Kind::from(5000u16)])]);
            assert_eq!(requests.stored(SOON).await, 1);
            (client, requests)
        });
        self.runtime.spawn(async move {
            while let Some(received) = requests.next().await {
                let request = Request::decode(&received.event, &keys).unwrap();
                for event in answers(&request, &keys) {
                    client.publish(&event, SOON).await;
                }
            }
        });
    }

    pub(super) fn request(&self, home: &Home, args: &[&str]) -> Said {
        let url = self.relay.url();
        home.run(&[&["request", "--cmd", "true", "--relay", &url], args].concat())
    }
}

pub(super) fn says(request: &Request, keys: &Keys, said: &Feedback) -> Event {
    let event = feedback::unsigned(request, said, keys, None, request.created_at).unwrap();
    event.sign_with_keys(keys).unwrap()
}

pub(super) fn proof(content: &str) -> Proof {
    Proof {
        commit: None,
        backend: "sim".into(),
        image: "none".into(),
        policy: Some("{}".into()),
        policy_sha256: sha256_hex(b"{}"),
        output_sha256: sha256_hex(content.as_bytes()),
        wall_ms: 12,
        cpu_ms: Some(3),
        peak_memory_bytes: 4096,
        price_msat: 0,
    }
}

pub(super) fn ends(request: &Request, keys: &Keys, content: &str, proof: &Proof) -> Event {
    let event =
        result::unsigned(request, content, proof, &[], None, keys, None, request.created_at, 65_536).unwrap();
    event.sign_with_keys(keys).unwrap()
}

fn npub(key: PublicKey) -> String {
    key.to_bech32().unwrap()
}

fn honest(content: &'static str) -> Arc<Answers> {
    Arc::new(move |request, keys| {
        let working = says(request, keys, &Feedback::new(Status::Processing, "cloning"));
        vec![working, ends(request, keys, content, &proof(content))]
    })
}

#[test]
fn the_result_is_data_and_the_progress_is_talk() {
    let (market, home, keys) = (Market::new(), Home::new(), Keys::generate());
    market.provider(keys.clone(), honest(r#"{"exit_code":0,"stdout":"hi"}"#));
    let said = market.request(&home, &["--save", "result.json", "--save-request", "request.json"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!(said.data, "{\"exit_code\":0,\"stdout\":\"hi\"}\n");
    assert!(said.talk.contains("processing – cloning"), "{said:?}");

    let verified = home.run(&["verify", "result.json", "--request", "request.json", "--json"]);
    assert_eq!(verified.code, 0, "{verified:?}");
    assert_eq!(verified.json()["bad"], 0);
    let request =
        Event::from_json(std::fs::read_to_string(home.path().join("request.json")).unwrap()).unwrap();
    assert!(request.verify().is_ok());
    assert_eq!(request.kind.as_u16(), 5930, "without repository and provider a kind that others do not use");
    assert!(!home.data_dir().exists(), "an ephemeral key leaves nothing behind");
}

#[test]
fn an_empty_result_prints_nothing_and_says_so() {
    let (market, home) = (Market::new(), Home::new());
    market.provider(Keys::generate(), honest(""));
    let said = market.request(&home, &[]);
    assert_eq!((said.code, said.data.as_str()), (0, ""), "{said:?}");
    assert!(said.talk.contains("the result is empty"), "{said:?}");
}

#[test]
fn both_encryptions_come_back_readable_in_json() {
    let (market, home, keys) = (Market::new(), Home::new(), Keys::generate());
    market.provider(keys.clone(), honest("secret words"));
    let provider = npub(keys.public_key());
    for (flag, scheme) in [("--encrypt", Scheme::Nip44), ("--encrypt=nip04", Scheme::Nip04)] {
        let said = market.request(&home, &["--provider", &provider, flag, "--json"]);
        assert_eq!(said.code, 0, "{said:?}");
        let report = said.json();
        assert_eq!((&report["content"], &report["verified"]), (&"secret words".into(), &true.into()));
        assert_eq!(report["provider"], provider.as_str());
        let on_the_wire = report["event"]["content"].as_str().unwrap();
        assert_eq!(Scheme::of(on_the_wire), scheme);
    }
}

#[test]
fn a_report_of_failed_commands_ends_with_9() {
    let (market, home) = (Market::new(), Home::new());
    market.provider(Keys::generate(), honest(r#"{"exit_code":3}"#));
    let said = market.request(&home, &[]);
    assert_eq!((said.code, said.data.as_str()), (9, "{\"exit_code\":3}\n"));
}

#[test]
fn an_error_of_the_provider_asked_ends_with_4_and_says_why() {
    let (market, home, keys) = (Market::new(), Home::new(), Keys::generate());
    let refuses: Arc<Answers> = Arc::new(|request, keys| {
        vec![says(request, keys, &Feedback::new(Status::Error, "repo_refused: not\x1b[2J here"))]
    });
    market.provider(keys.clone(), refuses);
    let said = market.request(&home, &["--provider", &npub(keys.public_key())]);
    assert_eq!(said.code, 4, "{said:?}");
    assert!(said.talk.contains("error – repo_refused: not\\u{1b}[2J here"), "{said:?}");
    assert!(said.data.is_empty());
}

#[test]
fn a_job_that_a_limit_ended_has_failed_and_brings_its_report_while_a_refusal_is_told_as_one() {
    const REPORT: &str = r#"{"error":{"code":"timeout","reason":"why","limit":"wall_ms","allowed":1000,"used":1004,"command":"true"},"command_results":[{"stdout":"so far"}]}"#;
    let (market, home, keys) = (Market::new(), Home::new(), Keys::generate());
    let ends: Arc<Answers> = Arc::new(|request, keys| {
        let took = Feedback::new(Status::Processing, "");
        let failed = Feedback { content: REPORT.into(), ..Feedback::new(Status::Error, "timeout: why") };
        vec![says(request, keys, &took), says(request, keys, &failed)]
    });
    market.provider(keys.clone(), ends);
    let provider = npub(keys.public_key());
    let said = market.request(&home, &["--provider", &provider, "--json"]);
    let told = said.json();
    assert_eq!((said.code, &told["status"], &told["provider"]), (4, &"failed".into(), &provider.into()));
    let figures = ["limit", "allowed", "used", "command"].map(|key| told["error"][key].clone());
    assert_eq!(serde_json::json!(figures), serde_json::json!(["wall_ms", 1000, 1004, "true"]), "{told}");
    assert_eq!(told["report"]["command_results"][0]["stdout"], "so far");
    let plain = market.request(&home, &["--provider", &npub(keys.public_key())]);
    assert_eq!((plain.code, plain.data.trim_end()), (4, REPORT), "what there is, is data");
    assert!(plain.talk.contains("job failed: timeout: why"), "{plain:?}");

    let (market, keys) = (Market::new(), Keys::generate());
    let refuses: Arc<Answers> = Arc::new(|request, keys| {
        vec![says(request, keys, &Feedback::new(Status::Error, "resource_limit: too much asked for"))]
    });
    market.provider(keys.clone(), refuses);
    let told = market.request(&home, &["--provider", &npub(keys.public_key()), "--json"]).json();
    assert_eq!((&told["status"], &told["error"]["code"]), (&"refused".into(), &"resource_limit".into()));
    assert!(told["report"].is_null(), "{told}");
}

#[test]
fn one_provider_says_no_and_another_still_gets_its_chance() {
    let (market, home) = (Market::new(), Home::new());
    let refuses: Arc<Answers> = Arc::new(|request, keys| {
        vec![says(request, keys, &Feedback::new(Status::Error, "rate_limited: later"))]
    });
    market.provider(Keys::generate(), refuses);
    let slow: Arc<Answers> = Arc::new(|request, keys| {
        std::thread::sleep(Duration::from_millis(500));
        vec![ends(request, keys, "done", &proof("done"))]
    });
    market.provider(Keys::generate(), slow);
    let said = market.request(&home, &[]);
    assert_eq!((said.code, said.data.as_str()), (0, "done\n"), "{said:?}");
    assert!(said.talk.contains("rate_limited"));
}

#[test]
fn an_answer_by_somebody_else_than_the_provider_asked_is_not_even_fetched() {
    let (market, home) = (Market::new(), Home::new());
    let (asked, other) = (Keys::generate(), Keys::generate());
    market.provider(other, honest("planted"));
    let said = market.request(&home, &["--provider", &npub(asked.public_key()), "--timeout", "2"]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(!said.talk.contains("planted") && !said.data.contains("planted"));
}

#[test]
fn a_result_whose_hash_is_wrong_ends_with_6_here_and_in_verify() {
    let (market, home, keys) = (Market::new(), Home::new(), Keys::generate());
    let lies: Arc<Answers> = Arc::new(|request, keys| vec![ends(request, keys, "this", &proof("that"))]);
    market.provider(keys.clone(), lies);
    let said = market.request(&home, &["--provider", &npub(keys.public_key()), "--save", "result.json"]);
    assert_eq!(said.code, 6, "{said:?}");
    assert!(said.talk.contains("bad output"), "{said:?}");
    let verified = home.run(&["verify", "result.json"]);
    assert_eq!(verified.code, 6);
    assert!(verified.data.lines().any(|l| l.starts_with("bad") && l.contains("output")), "{verified:?}");
    assert!(verified.talk.contains("1 bad"), "{verified:?}");
}

#[test]
fn verify_names_what_it_could_not_check_and_refuses_what_is_no_event() {
    let (market, home) = (Market::new(), Home::new());
    market.provider(Keys::generate(), honest("x"));
    assert_eq!(market.request(&home, &["--save", "result.json"]).code, 0);
    let text = std::fs::read_to_string(home.path().join("result.json")).unwrap();
    let findings = home.run(&["verify", "result.json", "--json"]).json()["findings"].clone();
    let find = |what: &str| findings.as_array().unwrap().iter().find(|f| f["what"] == what).unwrap().clone();
    assert_eq!(find("commit")["verdict"], "unchecked");
    assert!(find("claims")["why"].as_str().unwrap().contains("the provider's word"));

    let tampered = text.replacen("\"content\":\"x\"", "\"content\":\"y\"", 1);
    assert_ne!(tampered, text);
    let mut command = home.coinop(&["verify", "-"]);
    command.write_stdin(tampered);
    let said = Said::of(command);
    assert_eq!(said.code, 6);
    assert!(said.data.contains("the id is not the hash of the event"), "{said:?}");

    std::fs::write(home.path().join("junk"), "{}").unwrap();
    assert_eq!(home.run(&["verify", "junk"]).code, 2);
    assert_eq!(home.run(&["verify", "missing"]).code, 2);
}

#[test]
fn verify_tells_a_result_of_another_commit_than_the_one_ordered() {
    let (market, home) = (Market::new(), Home::new());
    let (asked, other) = ("1".repeat(40), "2".repeat(40));
    let ran = other.clone();
    let lies: Arc<Answers> = Arc::new(move |request, keys| {
        let proof = Proof { commit: Some(ran.clone()), ..proof("x") };
        vec![ends(request, keys, "x", &proof)]
    });
    market.provider(Keys::generate(), lies);
    for (name, verdict, why) in [
        (asked.as_str(), "bad", format!("the request names commit {asked}, the result is of {other}")),
        (other.as_str(), "ok", String::new()),
        ("main", "unchecked", "main may have moved".to_owned()),
    ] {
        let repo = ["--repo", "https://git.example/a", "--ref", name];
        let said =
            market.request(&home, &[&repo[..], &["--save", "r.json", "--save-request", "q.json"]].concat());
        assert_eq!(said.code, 0, "{said:?}");
        let verified = home.run(&["verify", "r.json", "--request", "q.json", "--json"]);
        let findings = verified.json()["findings"].clone();
        let row = findings.as_array().unwrap().iter().find(|f| f["what"] == "ref").unwrap();
        assert_eq!(row["verdict"], verdict, "{row}");
        assert!(row["why"].as_str().unwrap_or_default().contains(&why), "{row}");
        assert_eq!(verified.code, if verdict == "bad" { 6 } else { 0 });
    }
}

#[test]
fn giving_up_takes_the_request_back_unless_told_not_to() {
    let (market, home) = (Market::new(), Home::new());
    let deletions = || {
        market.runtime.block_on(async {
            let client =
                Client::connect(&[market.relay.url()], None, true, Wire::default(), SOON).await.unwrap();
            client.query(vec![Filter::new().kind(Kind::from(5u16))], SOON).await.len()
        })
    };
    let said = market.request(&home, &["--timeout", "1", "--no-cancel"]);
    assert_eq!((said.code, deletions()), (5, 0), "{said:?}");
    let said = market.request(&home, &["--timeout", "1", "--json"]);
    assert_eq!((said.code, deletions()), (5, 1), "{said:?}");
    assert_eq!(said.json()["status"], "timeout");
}

#[test]
fn a_provider_that_wants_money_first_is_told_apart_from_silence() {
    let (market, home, keys) = (Market::new(), Home::new(), Keys::generate());
    let wants: Arc<Answers> = Arc::new(|request, keys| {
        let bill = Feedback::payment_required(21_000, Some("lnbc210n1x".into()), "pay first");
        vec![says(request, keys, &bill)]
    });
    market.provider(keys, wants);
    let said = market.request(&home, &["--timeout", "2"]);
    assert_eq!(said.code, 4, "{said:?}");
    assert!(said.talk.contains("payment-required") && said.talk.contains("21 sat"), "{said:?}");
    assert!(said.talk.contains("lnbc210n1x"));
}

#[test]
fn a_relay_that_is_not_there_ends_with_8_and_none_at_all_with_3() {
    let home = Home::new();
    let said = home.run(&["scan", "--relay", "ws://127.0.0.1:9"]);
    assert_eq!(said.code, 8, "{said:?}");
    let said = home.run(&["request", "--cmd", "true"]);
    assert_eq!(said.code, 3);
    assert!(said.talk.contains("--relay"), "{said:?}");
}
