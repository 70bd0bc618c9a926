//! Where sats come from and go to: the trait [`Wallet`], one file a kind ([`lnbits`], [`nwc`]), and the look-ups that
//! follow many invoices at once. The wallet is the authority on outside money; this room asks it, caps and checks
//! what it answers, and says plainly what it could not find out. What a payment is for, and the books, are not known
//! here.
//!
//! All amounts are integer millisatoshis, all times Unix seconds.

mod bolt11;
mod http;
mod lenient;
mod lnbits;
mod lookups;
mod nwc;
mod paying;
mod secret;
mod setup;
mod socket;
#[cfg(test)]
mod testing;
mod types;

use std::fmt;

pub use crate::backoff::Schedule;
pub use bolt11::{Terms, read as read_bolt11};
pub use lnbits::Lnbits;
pub use lookups::{Found, Lookups, Options as LookupOptions, Unanswered};
pub use nwc::{Nwc, Uri};
pub use secret::Secret;
pub use setup::{Key, Kind, Limits, Setup, open};
pub use types::{
    Abilities, Cursor, Direction, Hint, Invoice, Lookup, Movement, NewHold, NewInvoice, Outgoing, Page, Pay,
    PayError, Payment, PaymentHash, Preimage, State, Unreadable,
};

/// More than all bitcoin there can be, msat. An amount over it is nonsense.
pub const MAX_MSAT: u64 = 21_000_000 * 100_000_000 * 1_000;

/// Which wallet this is, without its secrets: `lnbits at wallet.example.org`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub kind: Kind,
    /// The host (and port) that is asked; for NWC the relays.
    pub host: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.kind, self.host)
    }
}

/// A wallet over whatever protocol. Every call ends within [`Limits::call`], a payment with the looks before and after
/// it within [`Limits::pay`] and three times that, the repeatable ones within twice. Every answer is checked: types,
/// lengths, that it is about the payment asked for, that amounts are what was asked.
#[async_trait::async_trait]
pub trait Wallet: Send + Sync {
    fn identity(&self) -> Identity;

    /// What this wallet can do for us, as it says itself.
    async fn abilities(&self) -> Result<Abilities, Error>;

    /// Makes an invoice. The answer's `bolt11` was decoded: its payment hash, its amount (exactly what was asked) and
    /// its description hash agree, and it has not expired. The expiry is the wallet's: read it from the answer.
    ///
    /// # Errors
    /// [`Error::NotWholeSat`] where the wallet counts in sats and the amount does not: round up and ask again.
    async fn make_invoice(&self, new: &NewInvoice) -> Result<Invoice, Error>;

    /// What became of an invoice of ours. One that the wallet does not know is [`State::Unknown`], not an error: just
    /// after making, some wallets answer so. Nobody but the wallet says that an invoice is paid.
    async fn look_up(&self, payment_hash: &PaymentHash) -> Result<Lookup, Error>;

    /// Pays an invoice, at most once: a payment of this hash that the wallet knows already is returned, or told to be
    /// under way, and nothing is sent. After [`PayError::InDoubt`] ask [`Wallet::outgoing`], and do not pay by another
    /// wallet, until the invoice has expired.
    async fn pay(&self, order: &Pay) -> Result<Payment, PayError>;

    /// What became of a payment that we sent or tried to send.
    async fn outgoing(&self, payment_hash: &PaymentHash) -> Result<Outgoing, Error>;

    /// The balance. A custodial wallet can be below zero by its fees.
    async fn balance_msat(&self) -> Result<i64, Error>;

    /// One page of the wallet's own books, newest first, within the cursor's window of creation times. An entry that
    /// changes during the walk may come twice or be missed: before calling a payment missing, ask for it by its hash.
    /// `limit` is cut to what the wallet can answer within its cap of bytes. An entry that cannot be read is named in
    /// [`Page::unreadable`] and ends nothing.
    async fn history(&self, at: &Cursor, limit: u32) -> Result<Page, Error>;

    /// Hints that an invoice may have changed; `None` where the wallet sends none. They say where to look and prove
    /// nothing. A slow reader loses the oldest: then look at everything.
    fn hints(&self) -> Option<tokio::sync::broadcast::Receiver<Hint>> {
        None
    }

    /// An invoice to a hash of ours, which the payer locks and only our preimage settles.
    async fn make_hold_invoice(&self, new: &NewHold) -> Result<Invoice, Error> {
        Err(no_hold(self.identity(), &new.payment_hash))
    }

    /// Takes the money of a locked invoice ([`State::Held`]). May be repeated.
    async fn settle_hold(&self, preimage: &Preimage) -> Result<(), Error> {
        Err(no_hold(self.identity(), &preimage.payment_hash()))
    }

    /// Gives the money of a locked invoice back, or withdraws an open one. May be repeated.
    async fn cancel_hold(&self, payment_hash: &PaymentHash) -> Result<(), Error> {
        Err(no_hold(self.identity(), payment_hash))
    }
}

fn no_hold(wallet: Identity, payment_hash: &PaymentHash) -> Error {
    let detail = format!("asked for {}", payment_hash.short());
    Error::Unsupported { wallet: wallet.to_string(), what: "hold invoices", detail }
}

/// Why a wallet did not answer, or why its answer is not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The setup cannot be used as it is. Never repeats a secret.
    #[error("the wallet's setup: {0}")]
    Setup(String),
    /// Nothing was sent: no connection could be made.
    #[error("cannot reach the wallet: {0}")]
    Unreachable(String),
    /// No answer in time. What was asked may have been done.
    #[error("the wallet did not answer within {limit_ms} ms: {what}")]
    Slow { what: &'static str, limit_ms: u64 },
    /// The connection broke in the middle. What was asked may have been done.
    #[error("the answer was cut: {0}")]
    Cut(String),
    /// The key, or what it may do, is not accepted.
    #[error("the wallet does not let us in: {0}")]
    Denied(String),
    /// Too many questions: it was not looked at. Ask again after the pause, where one is told.
    #[error("the wallet is asked too often: {message}")]
    Busy { message: String, retry_after_s: Option<u64> },
    /// A clear no, in the wallet's words.
    #[error("the wallet says no ({code}): {message}")]
    Said { code: String, message: String },
    /// The wallet failed inside: HTTP 5xx or an internal error. What was asked may have been done.
    #[error("the wallet failed ({code}): {message}")]
    Failed { code: String, message: String },
    #[error("the wallet wants us to go to {to:?}; redirects are not followed")]
    Redirect { to: String },
    #[error("the answer is longer than {max_bytes} bytes")]
    TooLarge { max_bytes: u64 },
    /// Not what the protocol says it is.
    #[error("the answer makes no sense: {0}")]
    Nonsense(String),
    /// It makes sense, and contradicts what was asked.
    #[error("the wallet answers with another {what}: asked for {asked}, got {got}")]
    Lie { what: &'static str, asked: String, got: String },
    #[error("{amount_msat} msat is not a whole number of sats, and this wallet counts in sats")]
    NotWholeSat { amount_msat: u64 },
    #[error("an amount of {amount_msat} msat is out of bounds")]
    Amount { amount_msat: u64 },
    #[error("{wallet} cannot do {what} ({detail})")]
    Unsupported { wallet: String, what: &'static str, detail: String },
    /// The invoice is not one that we pay.
    #[error("the invoice: {0}")]
    Invoice(String),
    #[error("the wallet may take {reserve_msat} msat of fees, more than the {max_fee_msat} allowed")]
    FeeTooHigh { reserve_msat: u64, max_fee_msat: u64 },
    #[error("too many invoices are being followed ({max})")]
    Full { max: usize },
}

impl Error {
    /// Whether the wallet answered, and its answer cannot be used.
    pub fn is_unusable(&self) -> bool {
        matches!(
            self,
            Error::Nonsense(_) | Error::Lie { .. } | Error::TooLarge { .. } | Error::Redirect { .. }
        )
    }

    /// Whether what was asked may have been done all the same. Only where this is false may a payment be sent
    /// anew without a look.
    pub fn leaves_doubt(&self) -> bool {
        match self {
            Error::Setup(_)
            | Error::Unreachable(_)
            | Error::Denied(_)
            | Error::Busy { .. }
            | Error::NotWholeSat { .. }
            | Error::Amount { .. }
            | Error::Unsupported { .. }
            | Error::Invoice(_)
            | Error::FeeTooHigh { .. }
            | Error::Full { .. } => false,
            Error::Slow { .. }
            | Error::Cut(_)
            | Error::Said { .. }
            | Error::Failed { .. }
            | Error::Redirect { .. }
            | Error::TooLarge { .. }
            | Error::Nonsense(_)
            | Error::Lie { .. } => true,
        }
    }
}

/// A stranger's words, cut to a line that can be shown.
fn brief(words: &str) -> String {
    words.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect()
}
