//! Hold invoices in a job's life: the customer's wallet locks what the job may cost, we take it when the answer is ready
//! and before it is handed out, and give it back when there is none. What is locked stands in the books, what becomes of
//! it is the wallet's to say; asking for the invoice is the till's.

use std::time::Duration;

use futures_util::StreamExt;
use nostr_sdk::Keys;
use nostr_sdk::hashes::{Hash, HashEngine, Hmac, HmacEngine, sha256};
use tokio::time::{sleep, timeout};

use super::dispatcher::stopped;
use super::runner::wait_for_stop;
use super::ticket::{Stop, Stopped, Ticket};
use super::till::{LAST_LOOKS, Paid, Till, learn};
use super::{Engine, Failure, Rooms};
use crate::ledger::{self, Ledger, transfer};
use crate::market::Code;
use crate::store::money::Transfer;
use crate::store::record::{Invoice, Record};
use crate::store::{self, Store};
use crate::wallet::{self, Lookup, PaymentHash, Preimage, State, Wallet};

/// Pauses between tries to take what is locked: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How often blocks come on average, and how fast they are taken to come here: twice as fast.
const BLOCK_MS: u64 = 600_000;
const BLOCKS_HASTE: u64 = 2;
/// Wallets give a lock up some blocks before its end, lest its sender takes it back over the chain.
const BLOCKS_MARGIN: u64 = 18;
/// No payment is asked to be locked for longer, three days: wallets on the way refuse to.
const BLOCKS_MOST: u64 = 432;
/// A lock that was seen in time may still be on its way into the log when its quote runs out.
const ON_ITS_WAY_MS: u64 = 60_000;

/// Makes the preimages of a node's hold invoices, so that none is kept anywhere: whoever has the log and not the key
/// takes nothing. `Debug` does not show it.
pub struct HoldKey([u8; 32]);

// === impl HoldKey

impl HoldKey {
    pub fn of(keys: &Keys) -> HoldKey {
        HoldKey(mac(&keys.secret_key().to_secret_bytes(), &[b"coinop hold invoices, 1"]))
    }

    /// What settles the invoice for this job with this nonce.
    pub fn preimage(&self, job: &str, nonce: &str) -> Preimage {
        Preimage::from_bytes(mac(&self.0, &[job.as_bytes(), b":", nonce.as_bytes()]))
    }

    /// One that no other invoice has.
    pub(super) fn nonce() -> String {
        hex::encode(nostr_sdk::secp256k1::rand::random::<[u8; 16]>())
    }
}

impl std::fmt::Debug for HoldKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HoldKey")
    }
}

/// HMAC-SHA256.
fn mac(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let mut engine = HmacEngine::<sha256::Hash>::new(key);
    parts.iter().for_each(|part| engine.input(part));
    Hmac::<sha256::Hash>::from_engine(engine).to_byte_array()
}

/// How many blocks a payment must stay locked for a job that lasts so long; `None`: too many.
pub(super) fn blocks(lasts_ms: u64) -> Option<u64> {
    let blocks = lasts_ms.div_ceil(BLOCK_MS).saturating_mul(BLOCKS_HASTE).saturating_add(BLOCKS_MARGIN);
    Some(blocks).filter(|blocks| *blocks <= BLOCKS_MOST)
}

// === what is locked for a job

/// A lock that is neither taken nor given back in the books.
struct Lock {
    invoice: Invoice,
    locked: Transfer,
}

fn lock_of(store: &Store, job: &str) -> Result<Option<Lock>, store::Error> {
    let Some(hash) = store.quote(job)?.and_then(|quote| quote.payment_hash) else { return Ok(None) };
    let Some(locked) = open_lock(store, &hash)? else { return Ok(None) };
    Ok(store.invoice(&hash)?.map(|(invoice, _)| Lock { invoice, locked }))
}

fn open_lock(store: &Store, payment_hash: &str) -> Result<Option<Transfer>, store::Error> {
    let Some(locked) = store.transfer(&transfer::locked_id(payment_hash))? else { return Ok(None) };
    let gone = store.transfer(&transfer::unlocked_id(payment_hash))?.is_some();
    Ok(Some(locked.transfer).filter(|_| !gone))
}

/// What goes into the books with the end of a job that is not delivered.
pub(super) fn void(store: &Store, job: &str) -> Result<Option<Record>, store::Error> {
    let lock = lock_of(store, job)?;
    Ok(lock.and_then(|lock| transfer::unlocked(&lock.locked)).map(Record::Transfer))
}

/// A payment that has come, and the end of its lock where the books have one.
pub(super) fn settled(store: &Store, paid: &Paid) -> Result<Vec<Record>, store::Error> {
    let lock = open_lock(store, &paid.invoice.payment_hash)?;
    let gone = lock.as_ref().and_then(transfer::unlocked);
    Ok(gone.into_iter().chain([paid.transfer()]).map(Record::Transfer).collect())
}

// === taking it

/// What came of taking the money for an answer that is ready.
pub(super) enum Took {
    /// Nothing is locked for this job: it is paid from credit.
    Nothing,
    /// It is ours; these go into one batch with the delivery.
    Settled(Vec<Record>),
    /// It is not, and the job ends so.
    Failed(Failure),
    /// The node stops; the next start goes on.
    Later,
}

/// Takes what is locked for this job, trying again until its deadline. Nothing is delivered before the wallet has said
/// yes.
pub(super) async fn take(rooms: &Rooms, ticket: &Ticket, stop: &mut Stopped) -> Result<Took, store::Error> {
    let job = ticket.request.id.to_hex();
    let Some(Lock { invoice, .. }) = lock_of(&rooms.store, &job)? else { return Ok(Took::Nothing) };
    let not = |why: String| {
        let reason = format!("what was locked for this job could not be taken: {why}");
        Ok(Took::Failed(Failure::new(Code::PaymentRequired, reason)))
    };
    let Some(till) = rooms.till.as_ref().filter(|till| till.name() == invoice.wallet) else {
        return not(format!("the node has no wallet {} any more", invoice.wallet));
    };
    let Some(preimage) = till.preimage(&invoice) else {
        return not("it was locked for another key of the node".into());
    };
    let mut last = "there was no time to ask the wallet".to_owned();
    let left = Duration::from_millis(ticket.deadline_ms.saturating_sub(rooms.now_ms()));
    let taken = tokio::select! {
        taken = timeout(left, taking(&**till.wallet(), &preimage, &mut last)) => taken,
        stop = wait_for_stop(stop) => return Ok(match stop {
            Stop::Drain => Took::Later,
            // Perhaps it was taken at this moment; then it becomes credit.
            stop => Took::Failed(stopped(stop)),
        }),
    };
    match taken {
        Ok(Ok(received_msat)) => {
            let received_msat = received_msat.unwrap_or(invoice.amount_msat);
            tracing::info!(%job, received_msat, "what was locked for the job is taken");
            let paid = Paid { invoice: invoice.into(), received_msat, locked: false };
            settled(&rooms.store, &paid).map(Took::Settled)
        }
        Ok(Err(gone)) => not(gone),
        Err(_) => not(last),
    }
}

/// Tries until there is an end: what came, as far as the wallet tells, or why nothing will come.
async fn taking(wallet: &dyn Wallet, preimage: &Preimage, last: &mut String) -> Result<Option<u64>, String> {
    let hash = preimage.payment_hash();
    let mut pause = FIRST_PAUSE;
    loop {
        let said = wallet.settle_hold(preimage).await;
        let looked = wallet.look_up(&hash).await.map(|Lookup { state, .. }| state);
        match (said, looked) {
            (_, Ok(State::Settled { received_msat: Some(0), .. })) => {
                return Err("the wallet calls it paid and has received nothing".into());
            }
            (_, Ok(State::Settled { received_msat, .. })) => return Ok(received_msat),
            (_, Ok(State::Failed | State::Expired)) => return Err("the lock is gone".into()),
            // It said yes, and does not say anything else.
            (Ok(()), _) => return Ok(None),
            (Err(error), _) => {
                tracing::warn!(%hash, %error, "what is locked could not be taken yet");
                *last = error.to_string();
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

// === giving it back

/// Gives back what is locked for jobs that are over, and closes each invoice once the wallet says that it is done.
/// Whether something is left to be tried again.
///
/// # Errors
/// The store's and the books'.
pub(super) async fn give_back(
    till: &Till,
    ledger: &Ledger,
    now_ms: u64,
    engine: &Engine,
) -> Result<bool, ledger::Error> {
    let store = ledger.store();
    let mut over = Vec::new();
    for invoice in store.unpaid()? {
        if invoice.hold.is_some() && invoice.wallet == till.name() && is_over(store, &invoice, now_ms)? {
            over.extend(invoice.payment_hash.parse::<PaymentHash>());
        }
    }
    let mut ends = futures_util::stream::iter(over)
        .map(|hash| async move { (hash, withdraw(&**till.wallet(), &hash).await) })
        .buffer_unordered(LAST_LOOKS);
    let mut left = false;
    while let Some((hash, end)) = ends.next().await {
        match end {
            Ok(state @ State::Settled { .. }) => {
                // Taken in doubt, and its job has ended otherwise. Asked again until it is in the books.
                learn(ledger, hash, &state, engine).await;
                left = true;
            }
            Ok(State::Failed | State::Expired) => {
                let (payment_hash, reason) = (hash.to_hex(), "given back".to_owned());
                ledger.commit(vec![Record::InvoiceClosed { payment_hash, reason }]).await?;
                till.forget(hash).await;
                tracing::info!(%hash, "a hold invoice is given back");
            }
            Ok(State::Unknown | State::Pending | State::Held { .. }) => left = true,
            Err(error) => {
                tracing::warn!(%hash, %error, "what is locked could not be given back yet");
                left = true;
            }
        }
    }
    Ok(left)
}

/// Whether nothing will be delivered for this invoice any more.
fn is_over(store: &Store, invoice: &Invoice, now_ms: u64) -> Result<bool, store::Error> {
    let Some(job) = &invoice.job else { return Ok(true) };
    Ok(match store.job(job)? {
        Some(row) => !row.state.is_open(),
        None => store.refusal(job)?.is_some() || now_ms > invoice.expires_ms.saturating_add(ON_ITS_WAY_MS),
    })
}

async fn withdraw(wallet: &dyn Wallet, hash: &PaymentHash) -> Result<State, wallet::Error> {
    match wallet.look_up(hash).await?.state {
        State::Held { .. } | State::Pending => {
            wallet.cancel_hold(hash).await?;
            Ok(wallet.look_up(hash).await?.state)
        }
        state => Ok(state),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preimage_follows_from_key_job_and_nonce_and_changes_with_each() {
        let (keys, job) = (Keys::generate(), "ab".repeat(32));
        let key = HoldKey::of(&keys);
        let first = key.preimage(&job, "01");
        assert_eq!(HoldKey::of(&keys).preimage(&job, "01"), first, "also after a restart");
        let others = [
            key.preimage(&job, "02"),
            key.preimage(&"cd".repeat(32), "01"),
            HoldKey::of(&Keys::generate()).preimage(&job, "01"),
        ];
        assert!(others.iter().all(|other| *other != first && other.payment_hash() != first.payment_hash()));
        assert_ne!(HoldKey::nonce(), HoldKey::nonce());
        assert_eq!(format!("{key:?}"), "HoldKey");
    }

    #[test]
    fn a_lock_lasts_twice_the_jobs_time_and_some_blocks_and_not_for_ever() {
        let hour = 3_600_000;
        assert_eq!([0, 1, 600_000, hour].map(blocks), [Some(18), Some(20), Some(20), Some(30)]);
        assert_eq!((blocks(34 * hour), blocks(35 * hour), blocks(u64::MAX)), (Some(426), None, None));
    }
}
