//! Everything a node ever remembers, on one page: the records of the log. Plain data, no I/O and no
//! decisions; what a record does to the index stands in `index.rs`, what it means for a job in `job/`.

use serde::{Deserialize, Serialize};

use super::money::Transfer;
use crate::price::Agreed;

/// Lower-case hex of a 32-byte Nostr event id. A job is named by the id of its request.
pub type EventId = String;
/// Lower-case hex of a 32-byte x-only public key.
pub type PublicKey = String;

/// One fact. Records are appended in batches; a batch is durable as a whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// The node opened this log with this key. Written at each start.
    Opened { node: PublicKey, version: String },
    /// A request became a job. Before it, nothing is owed; after it, a terminal answer is.
    Accepted {
        job: EventId,
        customer: PublicKey,
        kind: u16,
        skill: String,
        /// The request event as received, so that a restart needs no relay.
        request: String,
        /// The relay that it came from.
        relay: String,
        /// Unix milliseconds by which a terminal answer is signed.
        deadline_ms: u64,
        /// Logs of the first builds have none.
        #[serde(default)]
        agreed: Agreed,
    },
    /// An attempt to run the job begins: written before anything is fetched for it.
    Started {
        job: EventId,
        /// From 1.
        attempt: u32,
        backend: String,
    },
    /// The commit that the job runs on, in this attempt and in later ones: written before the sandbox is made.
    Pinned { job: EventId, commit: String },
    /// The terminal answer is signed. Always in one batch with its `Queued`.
    Closed { job: EventId, verdict: Verdict, answer: EventId, summary: Summary },
    /// We will not take this request. Kept so that a replay is not judged, or answered, twice.
    Refused { request: EventId, customer: PublicKey, code: String, answered: bool },
    /// The customer took the request back (kind 5), which may come before the request itself; or the node's owner
    /// did, who goes by the node's own key.
    Cancelled { request: EventId, by: PublicKey },
    /// A signed event of ours owed to relays.
    Queued {
        event: EventId,
        job: Option<EventId>,
        /// The whole signed event as JSON; never signed again.
        json: String,
        relays: Vec<String>,
        /// Unix milliseconds after which no relay is tried any more.
        give_up_ms: u64,
    },
    /// A relay's last word about an event of ours.
    Delivered { event: EventId, relay: String, answer: Answer },
    /// All stored events of this relay up to this Unix second have been handled.
    Cursor { relay: String, until: u64 },
    /// Money moved in the books. Where it goes with a step of a job, both are in one batch.
    Transfer(Transfer),
    /// A request is to be paid before it becomes a job. Written before the customer is told the price.
    Quoted {
        job: EventId,
        customer: PublicKey,
        kind: u16,
        skill: String,
        /// The request event as received.
        request: String,
        relay: String,
        #[serde(default)]
        agreed: Agreed,
        /// The invoice that was told with it, `None` when none could be made.
        payment_hash: Option<String>,
        /// Unix milliseconds after which the price does not hold any more.
        expires_ms: u64,
    },
    /// An invoice of ours, written before anybody is told of it.
    Invoiced(Invoice),
    /// The invoice is not watched any more without having been paid.
    InvoiceClosed { payment_hash: String, reason: String },
    /// The node's signature over the head of this log: a Nostr event, which says seq and hash.
    Sealed { seq: u64, event: String },
}

/// What we asked a customer to pay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invoice {
    /// Lower-case hex.
    pub payment_hash: String,
    pub bolt11: String,
    pub customer: PublicKey,
    pub amount_msat: u64,
    /// Unix milliseconds.
    pub expires_ms: u64,
    /// Name of the wallet that made it.
    pub wallet: String,
    /// The request that it pays for; `None`: it tops up credit.
    pub job: Option<EventId>,
    /// Of a hold invoice: what the node's key makes its preimage of. No secret without that key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<String>,
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// A result (kind 6xxx) was signed. The job's own commands may still have failed.
    Done,
    /// An `error` feedback was signed; `code` is one of `market::Code`'s or `job::Failure`'s names.
    Failed { code: String, reason: String },
    /// The customer cancelled.
    Cancelled,
}

/// What was used and delivered, for reports and `jobs show`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub wall_ms: u64,
    /// `None` where it was not counted; a number in the logs of the first builds.
    #[serde(default)]
    pub cpu_ms: Option<u64>,
    pub peak_memory_bytes: u64,
    pub price_msat: u64,
    /// sha256 (hex) of the result's plain content, when there is one.
    pub output_sha256: Option<String>,
    /// sha256 (hex) of the blob that holds the full log of the run.
    pub log_blob: Option<String>,
}

/// A relay's answer to an EVENT, or why we stopped asking.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// `OK true`, or `OK false` with prefix `duplicate`.
    Stored,
    /// `OK false` that no retry can mend (`blocked`, `invalid`, `pow`, `restricted`, …).
    Rejected { reason: String },
    /// `give_up_ms` passed; the last trouble is the reason.
    GaveUp { reason: String },
}

#[cfg(test)]
mod tests {
    use super::Summary;

    #[test]
    fn a_summary_of_the_first_builds_keeps_its_processor_time_and_one_without_has_none() {
        let read = |cpu: &str| -> Summary {
            let text = format!(r#"{{"wall_ms":5,{cpu}"peak_memory_bytes":1,"price_msat":0}}"#);
            serde_json::from_str(&text).unwrap()
        };
        assert_eq!(read(r#""cpu_ms":7,"#).cpu_ms, Some(7));
        assert_eq!((read(r#""cpu_ms":null,"#).cpu_ms, read("").cpu_ms), (None, None));
    }
}
