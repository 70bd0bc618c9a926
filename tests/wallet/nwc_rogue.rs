//! A wallet over Nostr whose relay or service forges, replays, garbles, lies or is silent.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use coinop::clock;
use coinop::wallet::{
    Cursor, Error, Hint, Limits, NewHold, Outgoing, PayError, PaymentHash, Preimage, State,
};
use nostr_sdk::prelude::{EventBuilder, Keys, Kind, Tag};
use serde_json::{Value, json};

use crate::rogue_relay::{Asked, Rogue, Side, frame};
use crate::testing::{invoice, invoice_to};
use crate::{hasty, in_doubt, new_invoice, nwc_wallet, refused, until};

/// Enough for an answer on a busy machine, for tests in which there is one.
fn patient() -> Limits {
    Limits { call: Duration::from_secs(10), ..Limits::default() }
}

fn transaction(hash: &PaymentHash, direction: &str, state: &str) -> Value {
    json!({ "type": direction, "state": state, "payment_hash": hash, "amount": 21_000, "fees_paid": 3,
        "created_at": 1_790_000_000, "preimage": "07".repeat(32) })
}

#[tokio::test]
async fn what_is_not_the_wallets_answer_to_this_very_request_is_not_heard() {
    let rogue = Rogue::start().await;
    let wallet = nwc_wallet(&rogue.uri, patient());
    let old: Arc<std::sync::Mutex<Option<String>>> = Arc::default();
    let kept = Arc::clone(&old);
    rogue.play(move |side, asked| {
        let answer = side.result(&asked, &json!({ "balance": 111 }));
        kept.lock().unwrap().clone_from(&answer);
        vec![answer]
    });
    assert_eq!(wallet.balance_msat().await.unwrap(), 111);

    rogue.play(move |side, asked| {
        let id = asked.event.id.to_hex();
        let lie = side.encrypt(
            &side.wallet,
            &json!({ "result_type": asked.method, "result": { "balance": 666 } }).to_string(),
        );
        let stranger = Keys::generate();
        let forged = side.event(&stranger, &id, Some(side.client), &lie);
        let mut claims_to_be = serde_json::to_value(&forged).unwrap();
        claims_to_be["pubkey"] = side.wallet.public_key().to_hex().into();
        let mut tampered =
            serde_json::to_value(side.event(&side.wallet, &id, Some(side.client), "x")).unwrap();
        tampered["content"] = lie.clone().into();
        let misdirected = side.event(&side.wallet, &id, Some(stranger.public_key()), &lie);
        let other = side.event(&side.wallet, &"ab".repeat(32), Some(side.client), &lie);
        let event = |value: Value| Some(json!(["EVENT", "x", value]).to_string());
        vec![
            old.lock().unwrap().clone(),
            frame(&forged),
            event(claims_to_be),
            event(tampered),
            frame(&misdirected),
            frame(&other),
            Some("garbage".into()),
            Some(r#"["EVENT","x",{"kind":23195}]"#.into()),
            side.result(&asked, &json!({ "balance": 222 })),
            side.result(&asked, &json!({ "balance": 333 })),
        ]
    });
    assert_eq!(wallet.balance_msat().await.unwrap(), 222, "the first true answer, and only that");
    rogue.play(|side, asked| vec![side.result(&asked, &json!({ "balance": 444 }))]);
    assert_eq!(wallet.balance_msat().await.unwrap(), 444);
}

#[tokio::test]
async fn an_answer_that_makes_no_sense_is_told_as_such() {
    let rogue = Rogue::start().await;
    let wallet = nwc_wallet(&rogue.uri, patient());
    let content = async |content: &'static str| {
        rogue.play(move |side: &Side, asked: Asked| {
            vec![frame(&side.event(&side.wallet, &asked.event.id.to_hex(), None, content))]
        });
        wallet.balance_msat().await.unwrap_err()
    };
    for garbage in ["", "not encrypted", "AgAAAA==", "AAAA?iv=AAAA"] {
        let error = content(garbage).await;
        assert!(matches!(error, Error::Nonsense(_)), "{garbage}: {error:?}");
    }
    let plain = async |plain: &'static str| {
        rogue.play(move |side: &Side, asked: Asked| vec![side.plain(&asked, plain)]);
        wallet.balance_msat().await.unwrap_err()
    };
    for odd in [
        "no JSON",
        r#"{"result_type":"get_balance"}"#,
        r#"{"result_type":"get_balance","result":{"balance":-1}}"#,
    ] {
        let error = plain(odd).await;
        assert!(matches!(error, Error::Nonsense(_)), "{odd}: {error:?}");
    }
    let other = plain(r#"{"result_type":"pay_invoice","result":{"balance":1}}"#).await;
    assert!(matches!(other, Error::Lie { what: "method", .. }), "{other:?}");
}

#[tokio::test]
async fn an_invoice_that_is_not_the_one_asked_for_is_a_lie_with_its_name() {
    let rogue = Rogue::start().await;
    let wallet = nwc_wallet(&rogue.uri, patient());
    let now_s = clock::now_s();
    let answer = async |amount_msat: u64, created_at_s: u64, told: Option<PaymentHash>| {
        let made = invoice(amount_msat, created_at_s, 600);
        let told = told.unwrap_or(made.hash);
        let result =
            json!({ "type": "incoming", "invoice": made.bolt11, "payment_hash": told, "amount": 21_500 });
        rogue.play(move |side, asked| {
            assert_eq!((&asked.method[..], &asked.params["amount"]), ("make_invoice", &json!(21_500)));
            vec![side.result(&asked, &result)]
        });
        wallet.make_invoice(&new_invoice(21_500)).await
    };
    assert_eq!(answer(21_500, now_s, None).await.unwrap().amount_msat, 21_500, "msat, not only sats");
    for amount_msat in [21_000, 21_501, 1] {
        assert!(matches!(answer(amount_msat, now_s, None).await, Err(Error::Lie { what: "amount", .. })));
    }
    let other = Some(PaymentHash::from_bytes([1; 32]));
    assert!(matches!(answer(21_500, now_s, other).await, Err(Error::Lie { what: "payment hash", .. })));
    assert!(matches!(answer(21_500, now_s - 9_000, None).await, Err(Error::Lie { what: "expiry", .. })));
    rogue.play(|side, asked| {
        let other = PaymentHash::from_bytes([1; 32]);
        vec![side.result(&asked, &transaction(&other, "incoming", "settled"))]
    });
    let lookup = wallet.look_up(&PaymentHash::from_bytes([7; 32])).await;
    assert!(matches!(lookup, Err(Error::Lie { what: "payment", .. })), "{lookup:?}");
}

#[tokio::test]
async fn a_request_carries_its_own_end_so_that_a_late_wallet_leaves_it_alone() {
    let rogue = Rogue::start().await;
    let wallet = nwc_wallet(&rogue.uri, patient());
    rogue.play(|side, asked| {
        let expires_s = asked.event.tags.expiration().expect("an expiration").as_secs();
        let now_s = clock::now_s();
        assert!(expires_s > now_s && expires_s <= now_s + 11, "{expires_s} at {now_s}");
        assert!(asked.event.tags.public_keys().any(|key| *key == side.wallet.public_key()));
        vec![side.result(&asked, &json!({ "balance": 1 }))]
    });
    assert_eq!(wallet.balance_msat().await.unwrap(), 1);
}

#[tokio::test]
async fn a_payment_without_an_answer_is_in_doubt_until_the_wallet_says_what_became_of_it() {
    let rogue = Rogue::start().await;
    let wallet = nwc_wallet(&rogue.uri, Limits { pay: Duration::from_secs(2), ..patient() });
    let made = invoice(21_000, clock::now_s(), 600);
    let order = coinop::wallet::Pay { bolt11: made.bolt11, amount_msat: 21_000, max_fee_msat: 1_000 };
    let hash = made.hash;
    let sent = Arc::new(AtomicUsize::new(0));
    type Answer = fn(&Side, &Asked) -> Vec<Option<String>>;
    // What the books say, and how the payment itself is answered.
    let play = |books: Option<Value>, answer: Answer| {
        let sent = Arc::clone(&sent);
        rogue.play(move |side, asked| match (&asked.method[..], &books) {
            ("lookup_invoice", None) => vec![side.error(&asked, "NOT_FOUND")],
            ("lookup_invoice", Some(found)) => vec![side.result(&asked, found)],
            _ => {
                sent.fetch_add(1, Ordering::SeqCst);
                answer(side, &asked)
            }
        });
    };
    let ways: [Answer; 6] = [
        |_, _| Vec::new(),
        |side, asked| vec![side.error(asked, "PAYMENT_FAILED")],
        |side, asked| vec![side.error(asked, "INTERNAL")],
        |side, asked| vec![side.result(asked, &json!({ "preimage": "00".repeat(32) }))],
        |side, asked| vec![side.plain(asked, "garbage")],
        |side, asked| vec![side.result(asked, &json!({}))],
    ];
    for answer in ways {
        play(None, answer);
        let before = sent.load(Ordering::SeqCst);
        match wallet.pay(&order).await {
            Err(PayError::InDoubt { payment_hash, expires_at_s, .. }) => {
                assert_eq!(payment_hash, hash);
                assert!(expires_at_s > clock::now_s());
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(sent.load(Ordering::SeqCst), before + 1, "sent once");
    }
    let before = sent.load(Ordering::SeqCst);
    play(Some(transaction(&hash, "outgoing", "pending")), |_, _| Vec::new());
    in_doubt(wallet.pay(&order).await);
    play(Some(transaction(&hash, "outgoing", "settled")), |_, _| Vec::new());
    let paid = wallet.pay(&order).await.unwrap();
    assert_eq!(
        (paid.amount_msat, paid.fee_msat, paid.preimage),
        (21_000, 3, Some(Preimage::from_bytes([7; 32])))
    );
    assert_eq!(sent.load(Ordering::SeqCst), before, "nothing more was sent");

    play(None, |side, asked| vec![side.error(asked, "QUOTA_EXCEEDED")]);
    assert!(
        matches!(refused(wallet.pay(&order).await), Error::Said { code, .. } if code == "QUOTA_EXCEEDED")
    );
    play(None, |side, asked| vec![side.error(asked, "RESTRICTED")]);
    assert!(matches!(refused(wallet.pay(&order).await), Error::Denied(_)));
    play(None, |side, asked| {
        vec![side.result(asked, &json!({ "preimage": "07".repeat(32), "fees_paid": 9 }))]
    });
    assert_eq!(wallet.pay(&order).await.unwrap().fee_msat, 9);
}

#[tokio::test]
async fn a_paid_invoice_is_seen_whatever_the_answer_leaves_out_or_says_oddly() {
    let rogue = Rogue::start().await;
    let wallet = nwc_wallet(&rogue.uri, patient());
    let hash = PaymentHash::from_bytes([7; 32]);
    let answers = [
        json!({ "type": "incoming", "state": "settled", "payment_hash": hash, "amount": 21_000, "created_at": "1795904000" }),
        json!({ "state": "SETTLED", "amount": 21_000, "created_at": 1_795_904_000.5, "expires_at": -1, "settled_at": [] }),
        json!({ "amount": 21_000, "settled_at": "1795904000", "fees_paid": "none", "description": 7, "payment_hash": "" }),
    ];
    for answer in answers {
        for envelope in
            [json!({ "result": answer }), json!({ "result_type": 7, "error": {}, "result": answer })]
        {
            rogue.play(move |side, asked| vec![side.plain(&asked, &envelope.to_string())]);
            let state = wallet.look_up(&hash).await.unwrap_or_else(|error| panic!("{answer}: {error}")).state;
            assert!(
                matches!(state, State::Settled { received_msat: Some(21_000), .. }),
                "{answer}: {state:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_no_without_a_result_type_is_a_no_and_before_anything_is_sent_no_doubt() {
    let rogue = Rogue::start().await;
    let wallet = nwc_wallet(&rogue.uri, patient());
    let made = invoice(21_000, clock::now_s(), 600);
    let order = coinop::wallet::Pay { bolt11: made.bolt11, amount_msat: 21_000, max_fee_msat: 1_000 };
    let sent = Arc::new(AtomicUsize::new(0));
    for (look, answer) in
        [("INTERNAL", ""), ("NOT_FOUND", "INSUFFICIENT_BALANCE"), ("NOT_FOUND", "RATE_LIMITED")]
    {
        let count = Arc::clone(&sent);
        rogue.play(move |side, asked| {
            let pays = asked.method == "pay_invoice";
            count.fetch_add(usize::from(pays), Ordering::SeqCst);
            let code = if pays { answer } else { look };
            vec![side.plain(&asked, &json!({ "error": { "code": code, "message": "no" } }).to_string())]
        });
        let why = refused(wallet.pay(&order).await);
        assert!(!matches!(why, Error::Lie { .. } | Error::Nonsense(_)), "{why:?}");
    }
    assert_eq!(sent.load(Ordering::SeqCst), 2, "with a wallet that does not answer nothing is tried");
}

#[tokio::test]
async fn a_relay_that_is_not_there_leaves_nothing_sent_and_one_that_cuts_is_connected_to_again() {
    let rogue = Rogue::start().await;
    let gone = Rogue::start().await;
    let uri = gone.uri.clone();
    drop(gone);
    let order = coinop::wallet::Pay {
        bolt11: invoice(21_000, clock::now_s(), 600).bolt11,
        amount_msat: 21_000,
        max_fee_msat: 0,
    };
    let wallet = nwc_wallet(&uri, hasty());
    let lost = wallet.balance_msat().await;
    assert!(matches!(&lost, Err(Error::Unreachable(why)) if why.contains("can be reached")), "{lost:?}");
    assert!(matches!(refused(wallet.pay(&order).await), Error::Unreachable(_)));

    // The first try is cut off; over the next connection the same request goes out again.
    let wallet = nwc_wallet(&rogue.uri, patient());
    let (mut seen, ids) = (0, Arc::new(std::sync::Mutex::new(Vec::new())));
    let kept = Arc::clone(&ids);
    rogue.play(move |side, asked| {
        kept.lock().unwrap().push(asked.event.id);
        seen += 1;
        if seen == 1 { vec![None] } else { vec![side.result(&asked, &json!({ "balance": 5 }))] }
    });
    let mut hints = wallet.hints().unwrap();
    assert_eq!(wallet.balance_msat().await.unwrap(), 5);
    let ids = ids.lock().unwrap().clone();
    assert!(ids.len() == 2 && ids[0] == ids[1], "one request, whichever way it goes: {ids:?}");
    until("the hint that something may have been missed", async || {
        matches!(hints.try_recv(), Ok(Hint::Anything)).then_some(())
    })
    .await;

    // A frame over the cap ends the connection, not the wallet.
    let mut seen = 0;
    rogue.play(move |side, asked| {
        seen += 1;
        let huge = Some(format!(r#"["NOTICE","{}"]"#, "x".repeat(2 << 20)));
        if seen == 1 { vec![huge] } else { vec![side.result(&asked, &json!({ "balance": 6 }))] }
    });
    assert_eq!(wallet.balance_msat().await.unwrap(), 6);
}

#[tokio::test]
async fn an_old_wallet_and_a_relay_that_wants_a_login_are_spoken_to_in_their_way() {
    let rogue = Rogue::with(|side| side.encryption = "nip04").await;
    rogue.play(|side, asked| {
        assert!(!asked.event.tags.iter().any(|tag| tag.as_slice()[0] == "encryption"));
        vec![side.result(&asked, &json!({ "balance": 4 }))]
    });
    assert_eq!(nwc_wallet(&rogue.uri, patient()).balance_msat().await.unwrap(), 4);

    let rogue = Rogue::with(|side| side.wants_auth = true).await;
    rogue.play(|side, asked| vec![side.result(&asked, &json!({ "balance": 42 }))]);
    assert_eq!(nwc_wallet(&rogue.uri, patient()).balance_msat().await.unwrap(), 42);

    let rogue = Rogue::with(|side| side.methods = "make_invoice lookup_invoice").await;
    let wallet = nwc_wallet(&rogue.uri, patient());
    assert!(matches!(wallet.balance_msat().await, Err(Error::Unsupported { what: "get_balance", .. })));
    let can = wallet.abilities().await.unwrap();
    assert!(can.receive && !can.pay && !can.hold && !can.history);
}

#[tokio::test]
async fn a_hint_is_the_wallets_own_or_none_and_settles_nothing() {
    let rogue = Rogue::start().await;
    let wallet = nwc_wallet(&rogue.uri, patient());
    let mut hints = wallet.hints().unwrap();
    let (theirs, forged) = (PaymentHash::from_bytes([1; 32]), PaymentHash::from_bytes([2; 32]));
    rogue.play(move |side, asked| {
        let told = |from: &Keys, hash: &PaymentHash| {
            let plain =
                json!({ "notification_type": "payment_received", "notification": { "payment_hash": hash } });
            let built = EventBuilder::new(Kind::Custom(23197), side.encrypt(from, &plain.to_string()));
            frame(&built.tag(Tag::public_key(side.client)).sign_with_keys(from).unwrap())
        };
        if asked.method == "lookup_invoice" {
            return vec![side.result(&asked, &transaction(&theirs, "incoming", "pending"))];
        }
        vec![
            told(&Keys::generate(), &forged),
            told(&side.wallet, &theirs),
            side.result(&asked, &json!({ "balance": 1 })),
        ]
    });
    wallet.balance_msat().await.unwrap();
    let mut heard = Vec::new();
    until("the wallet's hint", async || {
        heard.extend(std::iter::from_fn(|| hints.try_recv().ok()));
        heard.contains(&Hint::Changed(theirs)).then_some(())
    })
    .await;
    assert!(!heard.contains(&Hint::Changed(forged)), "{heard:?}");
    assert_eq!(wallet.look_up(&theirs).await.unwrap().state, State::Pending, "the wallet's books count");
}

#[tokio::test]
async fn a_hold_invoice_is_locked_then_taken_or_given_back() {
    let rogue = Rogue::start().await;
    let wallet = nwc_wallet(&rogue.uri, patient());
    let preimage = Preimage::from_bytes([7; 32]);
    let hash = preimage.payment_hash();
    let mut state = "pending";
    rogue.play(move |side, asked| {
        let made = invoice_to(hash, 21_000, clock::now_s(), 600);
        let answer = match &asked.method[..] {
            "make_hold_invoice" => {
                assert_eq!(asked.params["payment_hash"], hash.to_hex());
                assert_eq!(asked.params["min_cltv_expiry_delta"], 34);
                json!({ "type": "incoming", "invoice": made.bolt11, "payment_hash": hash })
            }
            "settle_hold_invoice" if state == "accepted" => {
                assert_eq!(asked.params["preimage"], "07".repeat(32));
                state = "settled";
                json!({})
            }
            "cancel_hold_invoice" if state != "settled" => {
                state = "failed";
                json!({})
            }
            "lookup_invoice" => {
                let told = transaction(&hash, "incoming", state);
                // Somebody pays as soon as we have looked.
                if state == "pending" {
                    state = "accepted";
                }
                told
            }
            _ => return vec![side.error(&asked, "OTHER")],
        };
        vec![side.result(&asked, &answer)]
    });
    let new = NewHold { payment_hash: hash, lock_blocks: 34, invoice: new_invoice(21_000) };
    assert_eq!(wallet.make_hold_invoice(&new).await.unwrap().payment_hash, hash);
    let states = async || wallet.look_up(&hash).await.unwrap().state;
    assert_eq!(states().await, State::Pending);
    assert_eq!(states().await, State::Held { amount_msat: Some(21_000) });
    wallet.settle_hold(&preimage).await.unwrap();
    wallet.settle_hold(&preimage).await.expect("it may be repeated");
    assert!(matches!(states().await, State::Settled { received_msat: Some(21_000), .. }));
    let late = wallet.cancel_hold(&hash).await;
    assert!(matches!(late, Err(Error::Failed { .. })), "what was taken is not given back: {late:?}");
    let other = NewHold { payment_hash: PaymentHash::from_bytes([9; 32]), ..new };
    rogue.play(move |side, asked| {
        let made = invoice_to(hash, 21_000, clock::now_s(), 600);
        vec![side.result(&asked, &json!({ "invoice": made.bolt11 }))]
    });
    let lie = wallet.make_hold_invoice(&other).await;
    assert!(matches!(lie, Err(Error::Lie { what: "payment hash", .. })), "{lie:?}");
}

#[tokio::test]
async fn a_long_history_is_read_in_pages_an_odd_row_is_named_and_a_page_that_is_too_long_is_refused() {
    let rogue = Rogue::start().await;
    let wallet = nwc_wallet(&rogue.uri, patient());
    rogue.play(|side, asked| {
        let (offset, limit) =
            (asked.params["offset"].as_u64().unwrap(), asked.params["limit"].as_u64().unwrap());
        // It gives five at most, whatever is asked for.
        let some: Vec<_> = (offset..12.min(offset + limit.min(5)))
            .map(|n| {
                transaction(&PaymentHash::from_bytes([u8::try_from(n).unwrap(); 32]), "incoming", "settled")
            })
            .collect();
        vec![side.result(&asked, &json!({ "transactions": some }))]
    });
    let (mut at, mut read) = (Some(Cursor::window(0, 2_000_000_000)), 0);
    while let Some(cursor) = at {
        let page = wallet.history(&cursor, 1_000).await.unwrap();
        read += page.items.len();
        at = page.next;
    }
    assert_eq!(read, 12);
    rogue.play(|side, asked| {
        let good = transaction(&PaymentHash::from_bytes([7; 32]), "incoming", "settled");
        let (mut bad, mut side_fields) = (good.clone(), good.clone());
        bad["state"] = json!("paid?");
        (side_fields["created_at"], side_fields["fees_paid"]) = (json!("1790000000"), json!({}));
        vec![side.result(&asked, &json!({ "transactions": [bad, side_fields, 7], "total_count": "x" }))]
    });
    let page = wallet.history(&Cursor::window(0, 1), 1_000).await.unwrap();
    let named: Vec<_> = page.unreadable.iter().map(|odd| odd.payment_hash).collect();
    assert_eq!(named, [Some(PaymentHash::from_bytes([7; 32])), None]);
    assert_eq!(
        (page.items.len(), page.items[0].created_at_s, page.items[0].fee_msat),
        (1, 1_790_000_000, None)
    );
    assert_eq!(page.next.map(|next| next.offset), Some(3), "it was read, although not all of it can be used");
    rogue.play(|side, asked| {
        let many = vec![transaction(&PaymentHash::from_bytes([7; 32]), "incoming", "settled"); 21];
        vec![side.result(&asked, &json!({ "transactions": many }))]
    });
    assert!(matches!(wallet.history(&Cursor::window(0, 1), 1_000).await, Err(Error::Nonsense(_))));
    rogue.play(|side, asked| vec![side.error(&asked, "NOT_FOUND")]);
    assert_eq!(wallet.outgoing(&PaymentHash::from_bytes([3; 32])).await.unwrap(), Outgoing::Unknown);
}
