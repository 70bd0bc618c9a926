//! What wallets and their callers speak of: hashes, invoices, payments, pages of history. Values only; nothing here
//! asks a wallet.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Error;

/// The SHA-256 of a payment's preimage: the one name that an invoice has in every wallet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PaymentHash([u8; 32]);

impl PaymentHash {
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }

    /// Enough of it to find the rest in a log.
    pub(super) fn short(&self) -> String {
        self.to_hex().chars().take(12).collect()
    }
}

impl FromStr for PaymentHash {
    type Err = Error;

    /// 64 hex digits, in either case.
    fn from_str(text: &str) -> Result<Self, Error> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes)
            .map_err(|_| Error::Nonsense("a payment hash is 64 hex digits".into()))?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for PaymentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex())
    }
}

impl fmt::Debug for PaymentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PaymentHash({self})")
    }
}

impl Serialize for PaymentHash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_hex())
    }
}

impl<'de> Deserialize<'de> for PaymentHash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The secret behind a payment hash: whoever has it can take a locked payment, and has proof of a finished one.
/// `Debug` does not show it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Preimage([u8; 32]);

impl Preimage {
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// 64 hex digits; `None` for anything else.
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).ok().map(|()| Self(bytes))
    }

    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }

    pub fn payment_hash(&self) -> PaymentHash {
        PaymentHash(Sha256::digest(self.0).into())
    }
}

impl fmt::Debug for Preimage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Preimage(of {})", self.payment_hash().short())
    }
}

/// An invoice to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewInvoice {
    /// 1 to [`super::MAX_MSAT`]; whole sats for a wallet that counts in them.
    pub amount_msat: u64,
    /// What the payer reads. Cut to 639 bytes, what BOLT11 can carry; left out when there is a description hash.
    pub memo: String,
    /// Seconds from now; 1 to a year.
    pub expiry_s: u32,
    /// The SHA-256 of a longer description that the payer has already, as zaps use it.
    pub description_hash: Option<[u8; 32]>,
}

/// A hold invoice to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewHold {
    /// Of a preimage that only we know.
    pub payment_hash: PaymentHash,
    /// For how many blocks a payment to it is to stay locked at least. A wish: read from the invoice what it came to.
    pub lock_blocks: u64,
    pub invoice: NewInvoice,
}

/// An invoice that a wallet made and that was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invoice {
    pub bolt11: String,
    pub payment_hash: PaymentHash,
    pub amount_msat: u64,
    /// As the invoice says, Unix seconds.
    pub created_at_s: u64,
    /// As the invoice says, Unix seconds; not always what was asked for.
    pub expires_at_s: u64,
}

/// What the wallet says of one invoice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lookup {
    pub payment_hash: PaymentHash,
    pub state: State,
}

/// The life of an invoice of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The wallet has no such invoice, or not yet.
    Unknown,
    Pending,
    /// A hold invoice whose payment is locked: settle or cancel it.
    Held {
        /// What is locked, as far as the wallet tells.
        amount_msat: Option<u64>,
    },
    /// The money is ours.
    Settled {
        /// What came in. `None`: the wallet says paid and no amount; that is good for the invoice's amount and no
        /// more.
        received_msat: Option<u64>,
        settled_at_s: Option<u64>,
        /// What the wallet kept of it.
        fee_msat: Option<u64>,
    },
    /// Not paid in time. A wallet that was away can still correct this.
    Expired,
    /// Cancelled, or refused by the wallet.
    Failed,
}

/// An invoice to be paid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pay {
    pub bolt11: String,
    /// What the caller means to pay. The invoice must say exactly this.
    pub amount_msat: u64,
    /// The most for the way there. Enforced before sending where the wallet tells its limit (LNbits); elsewhere
    /// (NWC) the wallet has its own, and [`Payment::fee_msat`] tells what it was.
    pub max_fee_msat: u64,
}

/// A payment that went out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payment {
    pub payment_hash: PaymentHash,
    /// What the payee got.
    pub amount_msat: u64,
    /// On top of the amount.
    pub fee_msat: u64,
    /// The proof. `None`: the wallet says paid and shows none, or one that is not of this hash.
    pub preimage: Option<Preimage>,
}

/// How a payment did not come to a known end.
#[derive(Debug, thiserror::Error)]
pub enum PayError {
    /// Surely not paid, and nothing is under way.
    #[error("not paid: {0}")]
    Refused(Error),
    /// It may have been paid. Ask [`super::Wallet::outgoing`] by this hash.
    #[error("perhaps paid ({payment_hash}): {why}")]
    InDoubt {
        payment_hash: PaymentHash,
        /// Nobody takes the money after this, Unix seconds: a payment that has failed by then is not made, nor is one
        /// that is unknown to a wallet which tells of every one ([`Abilities::outgoing`]).
        expires_at_s: u64,
        why: Error,
    },
}

/// What became of a payment of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outgoing {
    /// The wallet tells of no such payment. While the invoice is good, one that is under way may still turn up; and not
    /// every wallet tells of all: see [`Abilities::outgoing`].
    Unknown,
    Pending,
    Paid(Payment),
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    In,
    Out,
}

/// One entry of the wallet's own books.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Movement {
    pub direction: Direction,
    pub payment_hash: PaymentHash,
    /// Without the fee.
    pub amount_msat: u64,
    /// `None`: the wallet does not tell it.
    pub fee_msat: Option<u64>,
    /// Of an outgoing payment only `Pending`, `Settled` and `Failed`.
    pub state: State,
    /// 0: not told.
    pub created_at_s: u64,
    pub settled_at_s: Option<u64>,
    /// At most 200 characters.
    pub memo: String,
}

/// A place in a walk through the history: the window of creation times, and how far the walk is. Store it as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Inclusive, Unix seconds.
    pub from_s: u64,
    /// Inclusive, Unix seconds. Fixed for the walk, so that new entries do not shift its pages.
    pub until_s: u64,
    /// Entries that were read.
    pub offset: u64,
}

impl Cursor {
    /// The beginning of a walk.
    pub fn window(from_s: u64, until_s: u64) -> Self {
        Self { from_s, until_s, offset: 0 }
    }
}

/// A part of the history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub items: Vec<Movement>,
    pub unreadable: Vec<Unreadable>,
    /// Where to go on; `None` at the end.
    pub next: Option<Cursor>,
}

/// An entry of the wallet's books that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// As far as it says one.
    pub payment_hash: Option<PaymentHash>,
    pub why: String,
}

/// Something may have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// This invoice.
    Changed(PaymentHash),
    /// We were not listening for a while: any invoice.
    Anything,
}

/// What a wallet can do over the connection that we have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Abilities {
    pub receive: bool,
    pub pay: bool,
    pub history: bool,
    pub hold: bool,
    pub hints: bool,
    /// It surely tells of every payment that it has sent: [`Outgoing::Unknown`] is a no.
    pub outgoing: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_read_in_either_case_and_nothing_else_is_a_hash() {
        let hash: PaymentHash = "AB".repeat(32).parse().unwrap();
        assert_eq!(hash.to_hex(), "ab".repeat(32));
        for bad in ["", "ab", &"zz".repeat(32), &"ab".repeat(33)] {
            assert!(matches!(bad.parse::<PaymentHash>(), Err(Error::Nonsense(_))), "{bad}");
        }
        let json = serde_json::to_string(&hash).unwrap();
        assert_eq!(serde_json::from_str::<PaymentHash>(&json).unwrap(), hash);
    }

    #[test]
    fn a_preimage_is_not_shown_and_hashes_to_its_name() {
        let preimage = Preimage::from_bytes([7; 32]);
        assert!(!format!("{preimage:?}").contains("0707"));
        assert_eq!(Preimage::from_hex(&preimage.to_hex()), Some(preimage));
        let known = Preimage::from_bytes([0; 32]).payment_hash().to_hex();
        assert_eq!(known, "66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3902a591d0d5f2925");
    }
}
