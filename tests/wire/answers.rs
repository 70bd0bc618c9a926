//! Feedback, results and announcements as the node writes them, and as its customer reads them.

use coinop::protocol::{Code, Error, Feedback, Reply, Status, announcement, feedback};
use nostr_sdk::prelude::*;

use super::*;

#[test]
fn every_state_of_feedback_arrives_in_every_scheme() {
    let states = [
        Feedback::payment_required(20_000, Some("lnbc200n1example".into()), "pay first"),
        Feedback::new(Status::Processing, "cloning"),
        Feedback::error(Code::RefNotFound, "no branch named nope"),
        Feedback::new(Status::Success, ""),
        Feedback { content: "line one\n".into(), ..Feedback::new(Status::Partial, "1 of 2") },
    ];
    for encrypt in SCHEMES {
        let request = request(encrypt);
        for sent in &states {
            let unsigned = feedback::unsigned(&request, sent, &provider(), HINT, NOW_S).unwrap();
            let event = sign(unsigned, &provider());
            let got = Feedback::decode(&event, &customer()).unwrap();
            assert_eq!((&got.feedback, got.request_id, got.encryption), (sent, request.id, encrypt));
            if encrypt.is_some() {
                assert_eq!(names(&event), ["e", "p", "encrypted"]);
                assert!(!event.content.contains("line one"));
            }
        }
    }
    assert_eq!(states[2].code(), Some(Code::RefNotFound));
}

#[test]
fn encrypted_feedback_is_a_json_array_of_tags_as_ndk_reads_it() {
    let request = request(Some(Scheme::Nip44));
    let sent = Feedback::new(Status::Processing, "cloning");
    let event = sign(feedback::unsigned(&request, &sent, &provider(), None, NOW_S).unwrap(), &provider());
    let plain = nip44::decrypt(customer().secret_key(), &provider().public_key(), &event.content).unwrap();
    assert_eq!(plain, r#"[["status","processing","cloning"]]"#);
}

#[test]
fn a_long_reason_is_cut_between_characters_and_a_long_partial_is_refused() {
    let request = request(None);
    let long = Feedback::error(Code::Internal, &"ß".repeat(2_000));
    let event = sign(feedback::unsigned(&request, &long, &provider(), None, NOW_S).unwrap(), &provider());
    let extra = Feedback::decode(&event, &customer()).unwrap().feedback.extra.unwrap();
    assert!(extra.len() <= feedback::MAX_EXTRA_BYTES && extra.ends_with('ß'), "{} bytes", extra.len());
    let partial = Feedback { content: "x".repeat(feedback::MAX_BYTES), ..Feedback::new(Status::Partial, "") };
    let refused = feedback::unsigned(&request, &partial, &provider(), None, NOW_S);
    assert!(matches!(refused, Err(Error::TooLarge { what: "feedback", cap_bytes: feedback::MAX_BYTES, .. })));
}

#[test]
fn a_refusal_of_what_cannot_be_decoded_names_the_event_and_the_code() {
    let event = request_event(None);
    let unsigned =
        feedback::refusal(&event, Code::Undecryptable, "not for this key", &provider(), HINT, NOW_S).unwrap();
    let got = Feedback::decode(&sign(unsigned, &provider()), &customer()).unwrap();
    assert_eq!((got.request_id, got.feedback.code()), (event.id, Some(Code::Undecryptable)));
}

#[test]
fn every_code_is_found_by_its_name_and_no_other() {
    for code in Code::ALL {
        assert_eq!(Code::named(code.as_str()), Some(code));
    }
    assert_eq!(Code::named("boom"), None);
}

#[test]
fn a_plain_result_carries_e_first_then_all_that_proves_it_and_the_short_echoes() {
    let request = request(None);
    let event = result_event(&request, "{}", &a_proof("{}"));
    assert_eq!(event.kind.as_u16(), 6000);
    let head = ["e", "p", "amount", "result"];
    let tail = ["i", "i", "request"];
    let expected: Vec<&str> = head.into_iter().chain(["proof"; 10]).chain(tail).collect();
    assert_eq!(names(&event), expected);
    assert_eq!(event.tags.first().unwrap().as_slice(), ["e", &request.id.to_hex(), "wss://relay.example"]);

    let reply = Reply::decode(&event, &customer()).unwrap();
    assert_eq!(reply.request_id, request.id);
    assert_eq!(reply.proof, Some(a_proof("{}")));
    assert_eq!(reply.amount_msat, Some(20_000));
    assert_eq!(reply.fact("files_changed"), Some("2"));
}

#[test]
fn an_encrypted_result_leaks_nothing_and_opens_for_both_sides() {
    for scheme in [Scheme::Nip44, Scheme::Nip04] {
        let request = request(Some(scheme));
        for content in ["the answer", ""] {
            let event = result_event(&request, content, &a_proof(content));
            assert_eq!(names(&event), ["e", "p", "encrypted", "proof"]);
            let json = event.as_json();
            for word in ["answer", "c0ffee", "local", "20000", "git.example"] {
                assert!(!json.contains(word), "{word} shows in {json}");
            }
            let reply = Reply::decode(&event, &customer()).unwrap();
            assert_eq!((reply.content.as_str(), reply.encryption), (content, Some(scheme)));
            assert_eq!(reply.proof, Some(a_proof(content)));
            assert_eq!((reply.amount_msat, reply.fact("files_changed")), (Some(20_000), Some("2")));
            let own = Reply::open(&event, &provider(), &customer().public_key()).unwrap();
            assert_eq!(own, reply);
            assert!(matches!(Reply::decode(&event, &keys("3")), Err(Error::Encryption(_))));
        }
    }
}

#[test]
fn a_free_result_asks_for_no_amount() {
    let event = result_event(&request(None), "x", &Proof { price_msat: 0, ..a_proof("x") });
    assert!(!names(&event).contains(&"amount"));
    assert_eq!(Reply::decode(&event, &customer()).unwrap().amount_msat, None);
}

#[test]
fn what_is_still_owed_stands_in_the_amount_with_its_invoice() {
    for scheme in [None, Some(Scheme::Nip44)] {
        let (request, proof) = (request(scheme), a_proof("x"));
        let owed = Some((21_000, "lnbc1owed".to_owned()));
        let event =
            result::unsigned(&request, "x", &proof, &[], owed, &provider(), HINT, NOW_S, MAX).unwrap();
        let reply = Reply::decode(&sign(event, &provider()), &customer()).unwrap();
        assert_eq!((reply.amount_msat, reply.invoice.as_deref()), (Some(21_000), Some("lnbc1owed")));
        assert_eq!(reply.proof.map(|proof| proof.price_msat), Some(20_000));
    }
}

#[test]
fn echoes_give_way_to_the_size_limit_and_then_the_result_is_too_large() {
    let request = request(None);
    let make =
        |max| result::unsigned(&request, "{}", &a_proof("{}"), &facts(), None, &provider(), HINT, NOW_S, max);
    let whole = sign(make(MAX).unwrap(), &provider());
    let bytes = whole.as_json().len();
    // The limit is exact: it counts the very bytes that go out.
    assert_eq!(names(&sign(make(bytes).unwrap(), &provider())), names(&whole));
    let less = sign(make(bytes - 1).unwrap(), &provider());
    assert!(!names(&less).contains(&"request") && names(&less).contains(&"i"));
    let bare = 2_000;
    match make(1_000).unwrap_err() {
        Error::TooLarge { what: "result", bytes, cap_bytes: 1_000 } => {
            assert!((1_000..bare).contains(&bytes))
        }
        other => panic!("{other}"),
    }
}

#[test]
fn long_inputs_are_not_echoed_and_a_long_request_neither() {
    let long = Draft { task: Some("ß".repeat(3_000)), ..draft(None) };
    let event = sign(long.unsigned(&customer(), NOW_S).unwrap(), &customer());
    let request = Request::decode(&event, &provider()).unwrap();
    let answer = result_event(&request, "x", &a_proof("x"));
    assert_eq!(names(&answer).iter().filter(|name| **name == "i").count(), 1, "only the repository");
    assert!(!names(&answer).contains(&"request"));
    for tag in answer.tags.iter().filter(|tag| tag.as_slice()[0].len() == 1) {
        assert!(tag.as_slice().iter().all(|value| value.len() <= 1_024));
    }
}

#[test]
fn what_the_cipher_cannot_hold_is_too_large_and_not_another_error() {
    let content = "x".repeat(65_409);
    let sent = result::unsigned(
        &request(Some(Scheme::Nip44)),
        &content,
        &a_proof(&content),
        &[],
        None,
        &provider(),
        HINT,
        NOW_S,
        1 << 20,
    );
    assert!(matches!(sent, Err(Error::TooLarge { what: "result", bytes: 65_409, cap_bytes: 65_408 })));
}

#[test]
fn an_announcement_names_each_kind_and_skill_once() {
    let told = announcement::Announcement {
        name_tag: "coinop".into(),
        kinds: vec![5930, 5000, 5930],
        skills: vec!["generic".into()],
        name: "A \"node\"".into(),
        about: "runs jobs".into(),
        expiration: Some(NOW_S + 86_400),
        ..Default::default()
    };
    let event = sign(announcement::unsigned(&told, &provider(), NOW_S), &provider());
    let rows: Vec<&[String]> = event.tags.iter().map(|tag| tag.as_slice()).collect();
    let expiration = (NOW_S + 86_400).to_string();
    let expected: [&[&str]; 5] =
        [&["d", "coinop"], &["k", "5000"], &["k", "5930"], &["t", "generic"], &["expiration", &expiration]];
    assert_eq!(rows, expected);
    let content: serde_json::Value = serde_json::from_str(&event.content).unwrap();
    assert_eq!(content["name"], "A \"node\"");
    assert_eq!(content["encryptionSupported"], true);
}

#[test]
fn a_withdrawal_replaces_first_then_deletes_and_is_newer_than_what_it_withdraws() {
    let told =
        announcement::Announcement { name_tag: "coinop".into(), kinds: vec![5000], ..Default::default() };
    let event = sign(announcement::unsigned(&told, &provider(), NOW_S), &provider());
    // Within the same second: a relay keeps the newer one, so the withdrawal is dated one second on.
    let [replacement, deletion] =
        announcement::withdrawal("coinop", Some((event.id, NOW_S)), &provider(), NOW_S);
    assert_eq!((replacement.kind.as_u16(), replacement.created_at.as_secs()), (31_990, NOW_S + 1));
    assert!(replacement.tags.iter().all(|tag| tag.as_slice()[0] != "k"));
    let rows: Vec<&[String]> = deletion.tags.iter().map(|tag| tag.as_slice()).collect();
    let address = format!("31990:{}:coinop", provider().public_key().to_hex());
    let id = event.id.to_hex();
    let expected: [&[&str]; 3] = [&["a", &address], &["k", "31990"], &["e", &id]];
    assert_eq!((deletion.kind.as_u16(), deletion.created_at.as_secs()), (5, NOW_S + 1));
    assert_eq!(rows, expected);
}
