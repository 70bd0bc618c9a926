//! Signing what the node says about a job, as records that owe it to relays. Nothing is sent here: what is
//! signed is written first, and the outbox sends what is written.

use nostr_sdk::prelude::{Event, JsonUtil, UnsignedEvent};

use super::content::{self, Content, Ran, longest};
use super::till::is_test_network;
use super::{Failure, Rooms};
use crate::clock;
use crate::ledger;
use crate::market::Code;
use crate::protocol::{self, Feedback, Proof, Request, Status, feedback, result};
use crate::store::record::{Invoice, Record, Summary, Verdict};

/// The `processing` feedback, owed. It does not wait for the look-up of the customer's read relays, which begins
/// here at the latest, so that the answer finds it done.
pub fn processing(rooms: &Rooms, request: &Request, relay: &str, extra: &str) -> Result<Record, Failure> {
    let feedback = Feedback::new(Status::Processing, extra);
    let event = sign_feedback(rooms, request, relay, &feedback)?;
    Ok(queued(rooms, request, relay, &event, &read_relays(rooms, request)))
}

/// What is to be paid before the request becomes a job, owed.
pub fn quote(
    rooms: &Rooms,
    request: &Request,
    relay: &str,
    invoice: &Invoice,
    most_msat: u64,
) -> Result<Record, Failure> {
    let (pay_msat, until) = (invoice.amount_msat, clock::utc(invoice.expires_ms));
    let then = match invoice.hold {
        None => "what is not used is your credit here",
        Some(_) => {
            "it is taken when the job is delivered and given back when it is not; what is not used is your credit here"
        }
    };
    let network = if is_test_network(&invoice.bolt11) { "; the invoice is for a test network" } else { "" };
    let caveats = caveats(rooms);
    let words = format!(
        "the job may cost {most_msat} msat; pay {pay_msat} msat until {until}, and {then}{network}{caveats}"
    );
    let feedback = Feedback::payment_required(pay_msat, Some(invoice.bolt11.clone()), &words);
    let event = sign_feedback(rooms, request, relay, &feedback)?;
    Ok(queued(rooms, request, relay, &event, &[]))
}

/// What jobs find missing on this host, as the end of a quote's sentence: before anything is paid.
fn caveats(rooms: &Rooms) -> String {
    rooms.backend.caveats().iter().map(|caveat| format!("; note: {caveat}")).collect()
}

/// The signed refusal of a request that is not taken, owed.
pub fn refusal(
    rooms: &Rooms,
    request: &Request,
    relay: &str,
    refusal: &Failure,
) -> Result<Vec<Record>, Failure> {
    let event = sign_error(rooms, request, relay, refusal, String::new())?;
    let refused = Record::Refused {
        request: request.id.to_hex(),
        customer: request.customer.to_hex(),
        code: refusal.code.to_string(),
        answered: true,
    };
    // For a stranger's sake nobody is asked where it reads.
    Ok(vec![refused, queued(rooms, request, relay, &event, &[])])
}

/// What a customer has here, owed to it alone. That it was told is on record, so that it is told once.
pub fn account(
    rooms: &Rooms,
    request: &Request,
    relay: &str,
    purse: &ledger::Purse,
) -> Result<Vec<Record>, Failure> {
    let number = |msat: i128| {
        let why = || Failure::new(Code::Internal, format!("{msat} msat are more than can be counted"));
        i64::try_from(msat).map_err(|_| why())
    };
    let told = serde_json::json!({
        "available_msat": number(purse.available_msat)?,
        "held_msat": number(purse.held_msat)?,
        "refunding_msat": number(purse.refunding_msat)?,
        "at_s": rooms.now_ms() / 1000,
    });
    let feedback = Feedback { content: told.to_string(), ..Feedback::new(Status::Success, "balance") };
    let event = sign_feedback(rooms, request, relay, &feedback)?;
    let answered = Record::Refused {
        request: request.id.to_hex(),
        customer: request.customer.to_hex(),
        code: "balance_told".into(),
        answered: true,
    };
    Ok(vec![answered, queued(rooms, request, relay, &event, &[])])
}

/// The signed refusal of a request that asks for us and cannot be read, owed.
pub fn unreadable(
    rooms: &Rooms,
    event: &Event,
    relay: &str,
    refusal: &Failure,
) -> Result<Vec<Record>, Failure> {
    let (code, now_s) = (refusal.code, rooms.now_ms() / 1000);
    let unsigned =
        feedback::refusal(event, code, &refusal.reason, &rooms.keys, hint(relay), now_s).map_err(internal)?;
    let answer = sign(rooms, unsigned)?;
    let refused = Record::Refused {
        request: event.id.to_hex(),
        customer: event.pubkey.to_hex(),
        code: code.to_string(),
        answered: true,
    };
    let queued = Record::Queued {
        event: answer.id.to_hex(),
        job: Some(event.id.to_hex()),
        json: answer.as_json(),
        relays: relays(relay, &rooms.options.relays, &[], 0),
        give_up_ms: rooms.now_ms().saturating_add(rooms.options.outbox_give_up_ms),
    };
    Ok(vec![refused, queued])
}

/// The terminal `error` feedback of an accepted job, in one batch with its end and the way back of its hold; with the
/// report of what it did, as much as fits, where its customer gets one.
pub fn failed(
    rooms: &Rooms,
    request: &Request,
    relay: &str,
    failure: &Failure,
    ran: Option<&Ran>,
    summary: Summary,
) -> Result<Vec<Record>, Failure> {
    let bare = || sign_error(rooms, request, relay, failure, String::new());
    let event = match ran {
        None => bare()?,
        Some(ran) => {
            let told = longest(feedback::MAX_BYTES, |stream_bytes| {
                let report = content::report(ran, Some(failure), stream_bytes)?;
                sign_error(rooms, request, relay, failure, report.text)
            });
            told.or_else(|_| bare())?
        }
    };
    let verdict = match failure.code {
        Code::Cancelled => Verdict::Cancelled,
        code => Verdict::Failed { code: code.to_string(), reason: failure.reason.clone() },
    };
    Ok(close(rooms, request, relay, &event, verdict, summary))
}

/// The one result of a job, in one batch with its end; `invoice` is what is still to be paid for it.
///
/// # Errors
/// `result_too_large` when the event would be larger than relays take.
pub fn done(
    rooms: &Rooms,
    request: &Request,
    relay: &str,
    content: &Content,
    proof: &Proof,
    summary: Summary,
    invoice: Option<&Invoice>,
) -> Result<Vec<Record>, Failure> {
    let now_s = rooms.now_ms() / 1000;
    let unsigned = result::unsigned(
        request,
        &content.text,
        proof,
        &content.tags,
        invoice.map(|invoice| (invoice.amount_msat, invoice.bolt11.clone())),
        &rooms.keys,
        hint(relay),
        now_s,
        rooms.options.max_event_bytes,
    )
    .map_err(unmade)?;
    let event = sign(rooms, unsigned)?;
    Ok(close(rooms, request, relay, &event, Verdict::Done, summary))
}

fn close(
    rooms: &Rooms,
    request: &Request,
    relay: &str,
    event: &Event,
    verdict: Verdict,
    summary: Summary,
) -> Vec<Record> {
    let closed = Record::Closed { job: request.id.to_hex(), verdict, answer: event.id.to_hex(), summary };
    vec![closed, queued(rooms, request, relay, event, &read_relays(rooms, request))]
}

fn queued(rooms: &Rooms, request: &Request, relay: &str, event: &Event, reads: &[String]) -> Record {
    let chosen: Vec<&String> = request.relays.iter().chain(reads).collect();
    Record::Queued {
        event: event.id.to_hex(),
        job: Some(request.id.to_hex()),
        json: event.as_json(),
        relays: relays(relay, &rooms.options.relays, &chosen, rooms.options.max_answer_relays),
        give_up_ms: rooms.now_ms().saturating_add(rooms.options.outbox_give_up_ms),
    }
}

fn read_relays(rooms: &Rooms, request: &Request) -> Vec<String> {
    (rooms.read_relays)(&request.customer)
}

/// Where R12 says: the relay that the request came from, ours, and at most `cap` more of those that the customer
/// has chosen. Whether an address may be dialled is judged by `relay`, after resolving it.
fn relays(from: &str, own: &[String], chosen: &[&String], cap: usize) -> Vec<String> {
    let mut all = Vec::new();
    add(&mut all, from);
    own.iter().for_each(|relay| add(&mut all, relay));
    let most = all.len().saturating_add(cap);
    for relay in chosen {
        if all.len() < most {
            add(&mut all, relay);
        }
    }
    all
}

fn add(all: &mut Vec<String>, relay: &str) {
    let relay = relay.trim_end_matches('/');
    let plain = relay.starts_with("ws://") || relay.starts_with("wss://");
    if plain && !all.iter().any(|known| known == relay) {
        all.push(relay.to_string());
    }
}

fn sign_error(
    rooms: &Rooms,
    request: &Request,
    relay: &str,
    failure: &Failure,
    content: String,
) -> Result<Event, Failure> {
    let reason = content::cut(failure.reason.as_bytes(), 900);
    let feedback = match failure.quote_msat {
        Some(msat) => {
            let words = format!("{}: {reason}{}", failure.code, caveats(rooms));
            Feedback::payment_required(msat, None, &words)
        }
        None => Feedback { content, ..Feedback::error(failure.code, &reason) },
    };
    sign_feedback(rooms, request, relay, &feedback)
}

fn sign_feedback(
    rooms: &Rooms,
    request: &Request,
    relay: &str,
    feedback: &Feedback,
) -> Result<Event, Failure> {
    let now_s = rooms.now_ms() / 1000;
    let unsigned = feedback::unsigned(request, feedback, &rooms.keys, hint(relay), now_s).map_err(unmade)?;
    sign(rooms, unsigned)
}

fn unmade(error: protocol::Error) -> Failure {
    use protocol::Error as E;
    use protocol::encryption::Error as Cipher;
    match error {
        E::TooLarge { .. } | E::Encryption(Cipher::TooLarge { .. }) => {
            Failure::new(Code::ResultTooLarge, error.to_string())
        }
        error => internal(error),
    }
}

fn sign(rooms: &Rooms, unsigned: UnsignedEvent) -> Result<Event, Failure> {
    unsigned.sign_with_keys(&rooms.keys).map_err(internal)
}

fn hint(relay: &str) -> Option<&str> {
    (!relay.is_empty()).then_some(relay)
}

fn internal(error: impl std::fmt::Display) -> Failure {
    Failure::new(Code::Internal, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(chosen: &[&str], cap: usize) -> Vec<String> {
        let chosen: Vec<String> = chosen.iter().map(|relay| relay.to_string()).collect();
        relays("wss://from/", &["wss://own".into()], &chosen.iter().collect::<Vec<_>>(), cap)
    }

    #[test]
    fn an_answer_goes_to_the_relay_of_the_request_ours_and_the_chosen_ones_once_each() {
        let all = to(&["wss://a/", "http://no", "wss://own", "wss://a", "wss://b"], 8);
        assert_eq!(all, ["wss://from", "wss://own", "wss://a", "wss://b"]);
    }

    #[test]
    fn a_customer_cannot_make_us_dial_more_than_the_cap() {
        let chosen: Vec<String> = (0..100).map(|i| format!("wss://r{i}")).collect();
        let chosen: Vec<&str> = chosen.iter().map(String::as_str).collect();
        assert_eq!(to(&chosen, 8).len(), 10);
        assert_eq!(to(&chosen, 0), ["wss://from", "wss://own"]);
        let known = to(&["wss://own", "wss://from", "wss://a", "wss://b"], 1);
        assert_eq!(known, ["wss://from", "wss://own", "wss://a"], "those we answer anyway do not count");
    }
}
