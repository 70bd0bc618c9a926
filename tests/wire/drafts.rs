//! Requests as our customer's side writes them, the orders read from them, and taking them back.

use coinop::protocol::request::{self, Draft};
use coinop::protocol::{Error, Order, Request, Scheme, order};
use nostr_sdk::prelude::*;

use super::*;

#[test]
fn a_draft_reads_back_as_the_order_it_was_made_from() {
    for encrypt in SCHEMES {
        let request = request(encrypt);
        assert_eq!(request.encryption, encrypt);
        assert_eq!(request.bid_msat, Some(21_000));
        assert_eq!(request.relays, ["wss://relay.example"]);
        assert_eq!(request.output.as_deref(), Some("application/json"));
        assert!(request.is_targeted(&provider().public_key()));
        assert!(!request.is_expired(NOW_S + 599) && request.is_expired(NOW_S + 600));
        let wanted = draft(encrypt);
        let expected = Order {
            repo: wanted.repo,
            git_ref: wanted.git_ref,
            commands: wanted.commands,
            workdir: wanted.workdir,
            env: wanted.env,
            artifacts: wanted.artifacts,
            task: wanted.task,
            time_secs: wanted.time_secs,
            memory_mb: wanted.memory_mb,
            disk_mb: wanted.disk_mb,
            cpu_milli: wanted.cpu_milli,
            network: false,
            keep_background: false,
            unread: false,
            extra: wanted.params.into_iter().collect(),
        };
        assert_eq!(Order::read(&request).unwrap(), expected);
    }
}

#[test]
fn an_encrypted_request_shows_only_whom_it_asks_and_when_it_ends() {
    for scheme in [Scheme::Nip44, Scheme::Nip04] {
        let event = request_event(Some(scheme));
        assert_eq!(names(&event), ["p", "encrypted", "expiration"]);
        assert_eq!(Request::decode(&event, &keys("3")).unwrap_err(), request::Error::NotForUs);
        assert_eq!(Request::decode_plain(&event).unwrap_err(), request::Error::NotForUs);
        assert_eq!(Request::decode_own(&event, &customer()).unwrap().bid_msat, Some(21_000));
        assert_eq!(Request::decode_own(&event, &keys("3")).unwrap_err(), request::Error::NotForUs);
    }
}

#[test]
fn a_draft_that_cannot_be_a_request_says_why() {
    let nobody = Draft { provider: None, ..draft(Some(Scheme::Nip44)) };
    assert_eq!(nobody.unsigned(&customer(), NOW_S).unwrap_err(), Error::NeedsProvider);
    let note = Draft { kind: 1, ..draft(None) };
    assert!(matches!(note.unsigned(&customer(), NOW_S), Err(Error::WrongKind { kind: 1, .. })));
    let long = Draft { task: Some("x".repeat(70_000)), ..draft(Some(Scheme::Nip44)) };
    assert!(matches!(long.unsigned(&customer(), NOW_S), Err(Error::Encryption(_))));
}

#[test]
fn only_the_author_of_a_request_takes_it_back() {
    let asked = request_event(None);
    let cancel = |keys: &Keys| {
        let event = sign(request::cancel(&asked.id, 5000, "changed my mind", keys, NOW_S), keys);
        request::Cancel::decode(&event).unwrap()
    };
    assert!(cancel(&customer()).covers(&asked.id, &asked.pubkey));
    assert!(!cancel(&keys("3")).covers(&asked.id, &asked.pubkey));
    assert!(!cancel(&customer()).covers(&EventId::all_zeros(), &asked.pubkey));
    assert_eq!(cancel(&customer()).reason, "changed my mind");
    assert!(matches!(request::Cancel::decode(&asked), Err(Error::WrongKind { kind: 5000, .. })));
}

fn order_of(kind: u16, params: &[(&str, &str)]) -> Result<Order, order::Error> {
    let params = params.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let draft = Draft { kind, repo: Some(REPO.into()), params, ..Default::default() };
    let event = sign(draft.unsigned(&customer(), NOW_S).unwrap(), &customer());
    Order::read(&Request::decode(&event, &provider()).unwrap())
}

#[test]
fn of_two_styles_of_commands_one_counts_so_that_nothing_runs_twice() {
    let order = order_of(5930, &[("command", "make"), ("cmd_0", "make"), ("cmd", "make")]).unwrap();
    assert_eq!(order.commands, ["make"]);
}

#[test]
fn numbered_params_are_listed_in_the_order_of_their_numbers() {
    let order =
        order_of(5932, &[("include_10", "c"), ("include_2", "b"), ("include_0", "a"), ("include_nits", "x")]);
    assert_eq!(order.unwrap().listed("include"), ["a", "b", "c"]);
}

#[test]
fn a_command_too_long_or_too_many_are_refused_not_cut() {
    let long = "x".repeat(order::MAX_COMMAND_BYTES + 1);
    let refused = order_of(5930, &[("cmd_0", &long)]).unwrap_err();
    assert_eq!(refused, order::Error::TooLarge { what: "bytes in a command", cap: order::MAX_COMMAND_BYTES });
    let many: Vec<String> = (0..=order::MAX_COMMANDS).map(|n| format!("cmd_{n}")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|key| (key.as_str(), "true")).collect();
    let refused = order_of(5930, &many).unwrap_err();
    assert_eq!(refused, order::Error::TooLarge { what: "commands", cap: order::MAX_COMMANDS });
}
