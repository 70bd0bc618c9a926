//! The binary among other people's programs: requests made by NDK and by nostr-tools, over nostr-rs-relay and
//! over Python's nostr-relay, plain and NIP-44, are answered, and read by those clients. What a job does
//! inside is tested elsewhere; how the parts are installed stands in docs/testing.md.

mod clients;
mod node;
#[expect(dead_code, reason = "it knows the parts of other test programs, too")]
mod parts;
mod process;
mod relays;
mod repository;
#[expect(dead_code, reason = "each test program uses a part of it")]
#[path = "../support/skip.rs"]
mod skip;

use clients::{Client, Encrypt, Heard, Order};
use node::Node;
use parts::Part;
use repository::Served;
use serde_json::Value;

/// One cell of the matrix: its own relay, node, repository and customer.
async fn answered(test: &str, client: Client, relay: relays::Kind, encrypt: Encrypt) {
    let Some([program, node, scripts]) = parts::locate(test, [relay.part(), Part::Node, Part::Clients])
    else {
        return;
    };
    let relay = relay.start(&program).await;
    let repository = Served::start().await;
    let provider = Node::connect(&[&relay.url]);
    let order = Order {
        relays: &[&relay.url],
        provider: &provider.public_key,
        kind: 5000,
        repo: &repository.url,
        commands: &["cat README.md", "sh src/count.sh"],
        encrypt,
    };
    let heard = client.order(&node, &scripts, &order).await;
    let heard = heard.unwrap_or_else(|why| panic!("{why}\n{}\n{}", provider.tail(), relay.tail()));
    check(&heard, &repository, encrypt);
    let tail = provider.tail();
    let ended = provider.stop().await;
    assert!(ended.success(), "SIGTERM ended the node with {ended}\n{tail}");
}

fn check(heard: &Heard, repository: &Served, encrypt: Encrypt) {
    let result = &heard.result;
    assert_eq!(result["kind"], 6000);
    assert_eq!(result["request_id"].as_str(), Some(heard.request_id.as_str()));
    let hidden = encrypt == Encrypt::Nip44;
    assert_eq!(result["encrypted"], hidden, "answered in the scheme of the request");

    let content: Value =
        serde_json::from_str(result["content"].as_str().unwrap_or_default()).expect("a JSON result");
    assert_eq!(content["exit_code"], 0, "{content}");
    let outputs = &content["command_results"];
    assert_eq!(outputs[0]["stdout"], repository::README, "{content}");
    let counted = outputs[1]["stdout"].as_str().map(str::trim);
    assert_eq!(counted, Some(repository::README.len().to_string().as_str()), "{content}");

    let statuses: Vec<_> = heard.feedback.iter().filter_map(|line| line["status"].as_str()).collect();
    assert!(statuses.contains(&"processing"), "the client's library read {statuses:?}");
    assert!(!statuses.contains(&"error"), "{:?}", heard.feedback);
    assert!(heard.feedback.iter().all(|line| line["encrypted"] == hidden), "{:?}", heard.feedback);

    let tags = result["wire_tags"].to_string();
    if hidden {
        for secret in [repository.url.as_str(), "README.md", "count.sh"] {
            assert!(!tags.contains(secret), "the tags of an encrypted job's result show {secret}: {tags}");
        }
    } else {
        assert!(tags.contains(&repository.commit), "the result names the commit it ran on: {tags}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_over_both_relays_is_one_job_with_one_result() {
    let name = "one_request_over_both_relays_is_one_job_with_one_result";
    let kinds = [relays::Kind::NostrRsRelay, relays::Kind::PyNostrRelay];
    let wanted = [kinds[0].part(), kinds[1].part(), Part::Node, Part::Clients];
    let Some([first, second, node, scripts]) = parts::locate(name, wanted) else { return };
    let (first, second) = (kinds[0].start(&first).await, kinds[1].start(&second).await);
    let repository = Served::start().await;
    let urls = [first.url.as_str(), second.url.as_str()];
    let provider = Node::connect(&urls);
    let order = Order {
        relays: &urls,
        provider: &provider.public_key,
        kind: 5000,
        repo: &repository.url,
        commands: &["cat README.md", "sh src/count.sh"],
        encrypt: Encrypt::Plain,
    };
    let heard = Client::NostrTools.order(&node, &scripts, &order).await;
    // A second result, under another id, is an error of `order`.
    let heard = heard.unwrap_or_else(|why| panic!("{why}\n{}", provider.tail()));
    check(&heard, &repository, Encrypt::Plain);
    let started = heard.feedback.iter().filter(|line| line["status"] == "processing").count();
    assert_eq!(started, 1, "{:?}", heard.feedback);
}

macro_rules! cells {
    ($($name:ident: $client:ident, $relay:ident, $encrypt:ident;)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            answered(stringify!($name), Client::$client, relays::Kind::$relay, Encrypt::$encrypt).await;
        }
    )*};
}

cells! {
    ndk_is_answered_in_plain_over_nostr_rs_relay: Ndk, NostrRsRelay, Plain;
    ndk_is_answered_in_nip44_over_nostr_rs_relay: Ndk, NostrRsRelay, Nip44;
    ndk_is_answered_in_plain_over_pythons_nostr_relay: Ndk, PyNostrRelay, Plain;
    ndk_is_answered_in_nip44_over_pythons_nostr_relay: Ndk, PyNostrRelay, Nip44;
    nostr_tools_is_answered_in_plain_over_nostr_rs_relay: NostrTools, NostrRsRelay, Plain;
    nostr_tools_is_answered_in_nip44_over_nostr_rs_relay: NostrTools, NostrRsRelay, Nip44;
    nostr_tools_is_answered_in_plain_over_pythons_nostr_relay: NostrTools, PyNostrRelay, Plain;
    nostr_tools_is_answered_in_nip44_over_pythons_nostr_relay: NostrTools, PyNostrRelay, Nip44;
}
