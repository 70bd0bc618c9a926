//! The end of a job, written down: the result with its proof, or the error, and what the run used and printed for the
//! node's owner. How it came to that end is `runner`'s business, the signing `answer`'s.

use super::content::{self, Content, Ran};
use super::locks::Took;
use super::ticket::{End, Stopped, Ticket};
use super::{Failure, Rooms, after, answer, locks, settle};
use crate::market::Code;
use crate::protocol::{self, Proof, Request, proof};
use crate::sandbox::Usage;
use crate::store;
use crate::store::record::{Invoice, Record, Summary};

/// What a run that ended well leaves for the answer.
pub(super) struct Finished {
    /// `None`: the report of what ran, as long as fits its event.
    pub(super) content: Option<Content>,
    pub(super) commit: Option<String>,
    pub(super) ran: Ran,
}

/// Ends an accepted job without running it (further).
pub(super) async fn fail(rooms: &Rooms, ticket: &Ticket, failure: &Failure) -> Result<End, store::Error> {
    end(rooms, &ticket.request, &ticket.relay, failure).await
}

/// As [`fail`], for a job whose terms are not known any more.
pub(super) async fn end(
    rooms: &Rooms,
    request: &Request,
    relay: &str,
    failure: &Failure,
) -> Result<End, store::Error> {
    end_having_used(rooms, request, relay, failure, None, Summary::default()).await
}

/// As [`fail`], for a job that was run to its end.
pub(super) async fn fail_after(
    rooms: &Rooms,
    ticket: &Ticket,
    failure: &Failure,
    ran: Ran,
) -> Result<End, store::Error> {
    let used = used(ran.usage, keep_log(rooms, ran.work.log()).await?);
    // What a limit cut short is told as far as it came.
    let told = Some(&ran).filter(|_| matches!(failure.code, Code::Timeout | Code::ResourceLimit));
    end_having_used(rooms, &ticket.request, &ticket.relay, failure, told, used).await
}

async fn end_having_used(
    rooms: &Rooms,
    request: &Request,
    relay: &str,
    failure: &Failure,
    told: Option<&Ran>,
    used: Summary,
) -> Result<End, store::Error> {
    tracing::info!(job = %request.id, code = %failure.code, reason = %failure.reason, "job failed");
    match answer::failed(rooms, request, relay, failure, told, used.clone()) {
        Ok(mut records) => {
            let job = request.id.to_hex();
            records.extend(settle::failed(rooms, request, failure, &used)?);
            records.extend(locks::void(&rooms.store, &job)?);
            let end = settle::settle(rooms, &job, records).await?;
            rooms.till.iter().for_each(|till| till.look_over());
            Ok(end)
        }
        // Nothing to hand out and nothing charged; the log of the node is the only place left to say it.
        Err(error) => {
            tracing::error!(job = %request.id, %error, "the error could not be signed");
            Ok(End::LeftOpen)
        }
    }
}

/// Signs the one result, shorter if it must be, takes what is locked for it, and writes both down.
pub(super) async fn deliver(
    rooms: &Rooms,
    ticket: &Ticket,
    finished: Finished,
    stop: &mut Stopped,
) -> Result<End, store::Error> {
    let Finished { content, commit, ran } = finished;
    let used = used(ran.usage, keep_log(rooms, ran.work.log()).await?);
    let charge = settle::charge(rooms, ticket, &used)?;
    let invoice = after::invoice(rooms, ticket, charge.as_ref()).await?;
    let answer =
        |content: &Content| answer_with(rooms, ticket, content, commit.as_deref(), &used, invoice.as_ref());
    let answered = match &content {
        Some(content) => answer(content),
        // How much the event's own escapes and encryption add is known only when it is made.
        None => content::longest(rooms.options.max_event_bytes, |stream_bytes| {
            answer(&content::report(&ran, None, stream_bytes)?)
        }),
    };
    let failure = match answered {
        Ok(mut records) => match locks::take(rooms, ticket, stop).await? {
            Took::Later => return Ok(End::LeftOpen),
            Took::Failed(failure) => failure,
            took => {
                if let Took::Settled(taken) = took {
                    records.extend(taken);
                }
                records.extend(settle::delivered(rooms, ticket, charge.as_ref(), &used));
                records.extend(invoice.clone().map(Record::Invoiced));
                let end = settle::settle(rooms, &ticket.request.id.to_hex(), records).await?;
                if let (Some(invoice), Some(till)) = (&invoice, &rooms.till) {
                    till.follow(invoice);
                }
                tracing::info!(job = %ticket.request.id, wall_ms = used.wall_ms, "job done");
                return Ok(end);
            }
        },
        Err(failure) => failure,
    };
    end_having_used(rooms, &ticket.request, &ticket.relay, &failure, None, used).await
}

/// The result, signed, with what proves it.
fn answer_with(
    rooms: &Rooms,
    ticket: &Ticket,
    content: &Content,
    commit: Option<&str>,
    used: &Summary,
    invoice: Option<&Invoice>,
) -> Result<Vec<Record>, Failure> {
    let identity = rooms.backend.identity();
    let policy = proof::canonical(&serde_json::to_value(&ticket.admission.policy).unwrap_or_default());
    let output_sha256 = protocol::sha256_hex(content.text.as_bytes());
    let price_msat = ticket.admission.charge_msat(used.wall_ms);
    let proof = Proof {
        commit: commit.map(str::to_owned),
        backend: identity.backend,
        image: identity.image,
        policy_sha256: protocol::sha256_hex(policy.as_bytes()),
        policy: Some(policy),
        output_sha256: output_sha256.clone(),
        wall_ms: used.wall_ms,
        cpu_ms: used.cpu_ms,
        peak_memory_bytes: used.peak_memory_bytes,
        price_msat,
    };
    let summary = Summary { price_msat, output_sha256: Some(output_sha256), ..used.clone() };
    answer::done(rooms, &ticket.request, &ticket.relay, content, &proof, summary, invoice)
}

/// What a run used, without a price: only a result has one.
fn used(usage: Usage, log_blob: Option<String>) -> Summary {
    Summary {
        wall_ms: usage.wall_ms,
        cpu_ms: usage.whole_cpu_ms(),
        peak_memory_bytes: usage.peak_memory_bytes,
        log_blob,
        ..Summary::default()
    }
}

/// Short logs cost an fsync that nobody reads; they are kept all the same, because a customer may ask.
async fn keep_log(rooms: &Rooms, mut log: Vec<u8>) -> Result<Option<String>, store::Error> {
    // An operator may allow more output than a blob holds.
    log.truncate(usize::try_from(store::BLOB_MAX_BYTES).unwrap_or(usize::MAX));
    let store = rooms.store.clone();
    match tokio::task::spawn_blocking(move || store.put_blob(&log)).await {
        Ok(kept) => kept.map(Some),
        Err(error) => {
            tracing::error!(%error, "the run's log was not kept");
            Ok(None)
        }
    }
}
