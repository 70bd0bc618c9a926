//! Signing what the node says about a job, as records that owe it to relays. Nothing is sent here: what is
//! signed is written first, and the outbox sends what is written.

use nostr_sdk::prelude::{Event, JsonUtil, UnsignedEvent};

use super::content::Content;
use super::{Failure, Rooms};
use crate::market::Code;
use crate::protocol::{self, Feedback, Proof, Request, Status, feedback, result};
use crate::store::record::{Record, Summary, Verdict};

/// The `processing` feedback, owed.
pub fn processing(rooms: &Rooms, request: &Request, relay: &str, extra: &str) -> Result<Record, Failure> {
    let feedback = Feedback::new(Status::Processing, extra);
    let event = sign_feedback(rooms, request, relay, &feedback)?;
    Ok(queued(rooms, request, relay, &event))
}

/// The signed refusal of a request that is not taken, owed.
pub fn refusal(
    rooms: &Rooms,
    request: &Request,
    relay: &str,
    refusal: &Failure,
) -> Result<Vec<Record>, Failure> {
    let event = sign_error(rooms, request, relay, refusal)?;
    let refused = Record::Refused {
        request: request.id.to_hex(),
        customer: request.customer.to_hex(),
        code: refusal.code.to_string(),
        answered: true,
    };
    Ok(vec![refused, queued(rooms, request, relay, &event)])
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
        relays: relays(&[], 0, relay, &rooms.options.relays),
        give_up_ms: rooms.now_ms().saturating_add(rooms.options.outbox_give_up_ms),
    };
    Ok(vec![refused, queued])
}

/// The terminal `error` feedback of an accepted job, in one batch with its end.
pub fn failed(
    rooms: &Rooms,
    request: &Request,
    relay: &str,
    failure: &Failure,
    summary: Summary,
) -> Result<Vec<Record>, Failure> {
    let event = sign_error(rooms, request, relay, failure)?;
    let verdict = match failure.code {
        Code::Cancelled => Verdict::Cancelled,
        code => Verdict::Failed { code: code.to_string(), reason: failure.reason.clone() },
    };
    Ok(close(rooms, request, relay, &event, verdict, summary))
}

/// The one result of a job, in one batch with its end.
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
) -> Result<Vec<Record>, Failure> {
    let now_s = rooms.now_ms() / 1000;
    let unsigned = result::unsigned(
        request,
        &content.text,
        proof,
        &content.tags,
        &rooms.keys,
        hint(relay),
        now_s,
        rooms.options.max_event_bytes,
    )
    .map_err(|e| match e {
        protocol::Error::TooLarge { .. } => Failure::new(Code::ResultTooLarge, e.to_string()),
        e => internal(e),
    })?;
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
    vec![closed, queued(rooms, request, relay, event)]
}

fn queued(rooms: &Rooms, request: &Request, relay: &str, event: &Event) -> Record {
    Record::Queued {
        event: event.id.to_hex(),
        job: Some(request.id.to_hex()),
        json: event.as_json(),
        relays: relays(&request.relays, rooms.options.max_answer_relays, relay, &rooms.options.relays),
        give_up_ms: rooms.now_ms().saturating_add(rooms.options.outbox_give_up_ms),
    }
}

/// Where R12 says: the relay that the request came from, ours, and at most `cap` of those that the request
/// asks for. Whether an address may be dialled is judged by `relay`, after resolving it.
fn relays(asked: &[String], cap: usize, from: &str, own: &[String]) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    let from = (!from.is_empty()).then(|| from.to_string());
    for relay in from.iter().chain(own).chain(asked.iter().take(cap)) {
        let relay = relay.trim_end_matches('/').to_string();
        let plain = relay.starts_with("ws://") || relay.starts_with("wss://");
        if plain && !all.contains(&relay) {
            all.push(relay);
        }
    }
    all
}

fn sign_error(rooms: &Rooms, request: &Request, relay: &str, failure: &Failure) -> Result<Event, Failure> {
    let reason = super::content::cut(failure.reason.as_bytes(), 900);
    sign_feedback(rooms, request, relay, &Feedback::error(failure.code, &reason))
}

fn sign_feedback(
    rooms: &Rooms,
    request: &Request,
    relay: &str,
    feedback: &Feedback,
) -> Result<Event, Failure> {
    let now_s = rooms.now_ms() / 1000;
    let unsigned =
        feedback::unsigned(request, feedback, &rooms.keys, hint(relay), now_s).map_err(internal)?;
    sign(rooms, unsigned)
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

    #[test]
    fn an_answer_goes_to_the_relay_of_the_request_ours_and_the_ones_asked_for_once_each() {
        let asked = ["wss://a/".into(), "http://no".into(), "wss://own".into()];
        let all = relays(&asked, 8, "wss://from/", &["wss://own".into()]);
        assert_eq!(all, ["wss://from", "wss://own", "wss://a"]);
    }

    #[test]
    fn a_request_cannot_make_us_dial_more_than_the_cap() {
        let asked: Vec<String> = (0..100).map(|i| format!("wss://r{i}")).collect();
        assert_eq!(relays(&asked, 8, "wss://from", &[]).len(), 9);
    }
}
