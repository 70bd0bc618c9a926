//! The checks of a result that need only the events: each lie by its name, and what stays unchecked.

use coinop::protocol::Reply;
use coinop::protocol::proof::{Finding, Verdict};
use nostr_sdk::prelude::*;

use super::*;

fn bad(findings: &[Finding]) -> Vec<&str> {
    let is_bad = |finding: &&Finding| matches!(finding.verdict, Verdict::Bad(_));
    findings.iter().filter(is_bad).map(|finding| finding.what).collect()
}

fn unchecked(findings: &[Finding]) -> Vec<&str> {
    let is_unchecked = |finding: &&Finding| matches!(finding.verdict, Verdict::Unchecked(_));
    findings.iter().filter(is_unchecked).map(|finding| finding.what).collect()
}

#[test]
fn an_honest_result_checks_and_says_what_it_cannot_show() {
    let request = request(None);
    let event = result_event(&request, "{}", &a_proof("{}"));
    for findings in [proof::check(&event, Some(&request.event)), proof::check(&event, None)] {
        assert_eq!(bad(&findings), [""; 0]);
        assert_eq!(unchecked(&findings), ["claims"], "the echo stands in for the request");
        assert_eq!(findings.len(), 10);
    }
}

#[test]
fn an_encrypted_result_checks_with_either_key_and_is_left_unchecked_without() {
    for scheme in [Scheme::Nip44, Scheme::Nip04] {
        let request = request(Some(scheme));
        let event = result_event(&request, "{}", &a_proof("{}"));
        let closed = proof::check(&event, Some(&request.event));
        assert_eq!(bad(&closed), [""; 0]);
        assert_eq!(unchecked(&closed), ["proof", "policy", "output", "price", "claims"]);
        for keys in [customer(), provider()] {
            let opened = proof::check_with_keys(&event, Some(&request.event), &keys);
            assert_eq!((bad(&opened), unchecked(&opened)), (vec![], vec!["claims"]));
        }
    }
}

#[test]
fn a_processor_time_that_was_not_counted_is_no_tag_and_reads_back_as_not_known() {
    for scheme in [None, Some(Scheme::Nip44)] {
        let request = request(scheme);
        let event = result_event(&request, "{}", &Proof { cpu_ms: None, ..a_proof("{}") });
        assert!(!event.as_json().contains("cpu_ms"));
        let findings = proof::check_with_keys(&event, Some(&request.event), &customer());
        assert_eq!(bad(&findings), [""; 0]);
        let read = Reply::decode(&event, &customer()).unwrap().proof.expect("a proof");
        assert_eq!((read.cpu_ms, read.wall_ms), (None, a_proof("{}").wall_ms));
    }
}

#[test]
fn each_lie_is_found_by_its_name() {
    let request = request(None);
    let asked = Some(&request.event);
    let honest = result_event(&request, "{}", &a_proof("{}"));

    let mut tampered = honest.clone();
    tampered.content = "{\"exit_code\":0}".into();
    assert_eq!(bad(&proof::check(&tampered, asked)), ["signature", "output"]);

    let mut forged = honest.clone();
    forged.sig = result_event(&request, "other", &a_proof("other")).sig;
    assert_eq!(bad(&proof::check(&forged, asked)), ["signature"]);

    let wrong_hash = result_event(&request, "{}", &a_proof("something else"));
    assert_eq!(bad(&proof::check(&wrong_hash, asked)), ["output"]);

    let dear = result_event(&request, "{}", &Proof { price_msat: 21_001, ..a_proof("{}") });
    assert_eq!(bad(&proof::check(&dear, asked)), ["price"]);

    for (owed_msat, found) in [(20_000, vec![]), (1_000, vec![]), (20_001, vec!["price"])] {
        let owed = Some((owed_msat, "lnbc1owed".to_owned()));
        let event =
            result::unsigned(&request, "{}", &a_proof("{}"), &[], owed, &provider(), HINT, NOW_S, MAX)
                .unwrap();
        assert_eq!(bad(&proof::check(&sign(event, &provider()), asked)), found, "{owed_msat}");
    }

    let impostor =
        result::unsigned(&request, "{}", &a_proof("{}"), &[], None, &keys("3"), HINT, NOW_S, MAX).unwrap();
    assert_eq!(bad(&proof::check(&sign(impostor, &keys("3")), asked)), ["provider"]);

    let other = sign(draft(None).unsigned(&keys("3"), NOW_S).unwrap(), &keys("3"));
    assert_eq!(bad(&proof::check(&honest, Some(&other))), ["request", "customer"]);

    // An echo of another request than the one that the e tag names.
    let mut rows: Vec<Tag> =
        honest.tags.iter().filter(|tag| tag.as_slice()[0] != "request").cloned().collect();
    rows.push(Tag::parse(["request", &other.as_json()]).unwrap());
    let unsigned = UnsignedEvent::new(honest.pubkey, honest.created_at, honest.kind, rows, &honest.content);
    assert_eq!(bad(&proof::check(&sign(unsigned, &provider()), None)), ["request", "customer"]);

    let mut patched = request.event.clone();
    patched.kind = Kind::from(5100);
    assert_eq!(bad(&proof::check(&honest, Some(&patched))), ["kind", "request"]);
}

#[test]
fn malformed_proofs_are_told_from_missing_ones() {
    let request = request(None);
    let honest = result_event(&request, "{}", &a_proof("{}"));
    let with = |change: &dyn Fn(Vec<String>) -> Option<Vec<String>>| {
        let rows = honest.tags.iter().filter_map(|tag| change(tag.as_slice().to_vec()));
        let tags: Vec<Tag> = rows.map(|row| Tag::parse(row).unwrap()).collect();
        let unsigned = UnsignedEvent::new(
            provider().public_key(),
            honest.created_at,
            honest.kind,
            tags,
            &honest.content,
        );
        proof::check(&sign(unsigned, &provider()), Some(&request.event))
    };
    let verdict = |findings: &[Finding]| findings.iter().find(|f| f.what == "proof").unwrap().verdict.clone();
    let replace = |key: &'static str, value: &'static str| {
        move |mut row: Vec<String>| {
            if row[0] == "proof" && row[1] == key {
                row[2] = value.into();
            }
            Some(row)
        }
    };

    assert_eq!(
        verdict(&with(&|row| (row[0] != "proof").then_some(row))),
        Verdict::Unchecked("the result carries no proof".into())
    );
    assert_eq!(
        verdict(&with(&|row| (row.get(1).map(String::as_str) != Some("backend")).then_some(row))),
        Verdict::Bad("the proof lacks backend".into())
    );
    assert_eq!(
        verdict(&with(&replace("commit", "main"))),
        Verdict::Bad("the proof's commit is malformed: \"main\"".into())
    );
    assert_eq!(
        verdict(&with(&replace("wall_ms", "+5"))),
        Verdict::Bad("the proof's wall_ms is malformed: \"+5\"".into())
    );
    assert_eq!(bad(&with(&replace("policy_sha256", "ABCD"))), ["proof"]);
    assert_eq!(bad(&with(&replace("policy", "{}"))), ["policy"]);
}

#[test]
fn the_policy_as_it_is_hashed_does_not_depend_on_the_order_of_keys() {
    let one = proof::canonical(&json!({"b": {"y": [1, {"q": 1, "p": "ü"}], "x": null}, "a": 1.5}));
    let text = r#"{"a":1.5,"b":{"x":null,"y":[1,{"p":"ü","q":1}]}}"#;
    assert_eq!(one, text);
}
