//! Encrypted requests: answered in their own scheme, with nothing of the order in a tag; told so when we cannot
//! read them; left alone when they are for another provider.

use nostr_sdk::prelude::{EventBuilder, JsonUtil, Keys, Kind, Tag};

use super::support::backend::Backstage;
use super::support::buyer::Buyer;
use super::support::git::Served;
use super::support::stage::{Stage, job, jobs};
use coinop::protocol::draft::Draft;
use coinop::protocol::{Code, Scheme};
use coinop::relay::local::LocalRelay;

async fn answered_in(scheme: Scheme) {
    let relay = LocalRelay::start().await.expect("a relay");
    let served = Served::start().await;
    let stage = Stage::new(&[&relay.url()], &[]);
    let node = stage.start_on(Backstage::new(&[])).await;
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let secret = Draft { encrypt: Some(scheme), ..buyer.order(Some(&served.url), &["cat secret-plan.txt"]) };
    let request = buyer.post(&secret).await;
    let answer = buyer.result(&request).await;
    assert_eq!(answer.reply.encryption, Some(scheme));

    // An error of an accepted job, too.
    let lost = Draft { git_ref: Some("secret-branch".into()), ..secret };
    let lost = buyer.post(&lost).await;
    assert!(buyer.error(&lost, Code::RefNotFound).await.contains("secret-branch"));

    let mut about = buyer.stored(&request).await;
    about.extend(buyer.stored(&lost).await);
    assert_eq!(about.len(), 4, "a feedback and an end each");
    for event in about {
        let json = event.as_json();
        for word in ["secret", served.url.as_str(), served.commit.as_str(), "ref_not_found"] {
            assert!(!json.contains(word), "{word} stands in the open: {json}");
        }
        let iv = event.content.contains("?iv=");
        assert_eq!(iv, scheme == Scheme::Nip04, "the scheme of the request: {json}");
    }
    assert!(job(node.store(), &request).is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nip44_request_is_answered_in_nip44_and_leaks_nothing() {
    answered_in(Scheme::Nip44).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nip04_request_is_answered_in_nip04_and_leaks_nothing() {
    answered_in(Scheme::Nip04).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_we_cannot_decrypt_is_refused_once_and_what_is_for_another_is_not_ours() {
    let relay = LocalRelay::start().await.expect("a relay");
    let stage = Stage::new(&[&relay.url()], &[]);
    let node = stage.start_on(Backstage::new(&[])).await;
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let other = Keys::generate();
    let garbled = EventBuilder::new(Kind::from(5930u16), "not a ciphertext")
        .tags([Tag::public_key(buyer.provider), Tag::parse(["encrypted"]).expect("a tag")])
        .sign_with_keys(&buyer.keys)
        .expect("a signature");
    buyer.send(&garbled).await;
    let reason = buyer.error(&garbled, Code::Undecryptable).await;
    assert!(reason.contains("cannot be decrypted"), "{reason}");

    let theirs = Draft {
        provider: Some(other.public_key()),
        encrypt: Some(Scheme::Nip44),
        ..buyer.order(None, &["true"])
    };
    let theirs = buyer.post(&theirs).await;
    // One after it is served, so that silence is no delay.
    let ours = buyer.post(&Draft { encrypt: Some(Scheme::Nip44), ..buyer.order(None, &["true"]) }).await;
    buyer.result(&ours).await;
    assert!(buyer.stored(&theirs).await.is_empty(), "silence");
    assert_eq!(jobs(node.store()).len(), 1, "only ours");
    assert_eq!(buyer.ends(&garbled).await.len(), 1);
}
