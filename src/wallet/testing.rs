//! Invoices for this room's unit tests, signed by a key of the tests'.

use std::time::Duration;

use lightning_invoice::{Currency, InvoiceBuilder};
use nostr_sdk::hashes::{Hash, sha256};
use nostr_sdk::{Keys, SECP256K1};

use super::{PaymentHash, Preimage};

/// The time in these tests, Unix seconds.
pub(super) const NOW_S: u64 = 1_790_000_000;

pub(super) struct Made {
    pub bolt11: String,
    pub hash: PaymentHash,
}

/// An invoice to the preimage of 7s.
pub(super) fn invoice(amount_msat: u64, created_at_s: u64, expiry_s: u64) -> Made {
    invoice_to(Preimage::from_bytes([7; 32]).payment_hash(), amount_msat, created_at_s, expiry_s)
}

pub(super) fn invoice_to(hash: PaymentHash, amount_msat: u64, created_at_s: u64, expiry_s: u64) -> Made {
    invoice_locking(hash, amount_msat, created_at_s, expiry_s, 18)
}

/// One for a test network, or not.
pub(super) fn invoice_on(
    test_network: bool,
    hash: PaymentHash,
    amount_msat: u64,
    created_at_s: u64,
    expiry_s: u64,
) -> Made {
    let currency = if test_network { Currency::BitcoinTestnet } else { Currency::Bitcoin };
    build(currency, hash, amount_msat, created_at_s, expiry_s, 18)
}

/// One to which a payment stays locked for so many blocks.
pub(super) fn invoice_locking(
    hash: PaymentHash,
    amount_msat: u64,
    created_at_s: u64,
    expiry_s: u64,
    lock_blocks: u64,
) -> Made {
    build(Currency::Bitcoin, hash, amount_msat, created_at_s, expiry_s, lock_blocks)
}

fn build(
    currency: Currency,
    hash: PaymentHash,
    amount_msat: u64,
    created_at_s: u64,
    expiry_s: u64,
    lock_blocks: u64,
) -> Made {
    let keys = Keys::generate();
    let secret = keys.secret_key();
    let built = InvoiceBuilder::new(currency)
        .description("a job".into())
        .payment_hash(sha256::Hash::from_byte_array(*hash.as_bytes()))
        .duration_since_epoch(Duration::from_secs(created_at_s))
        .min_final_cltv_expiry_delta(lock_blocks)
        .payment_secret(lightning_invoice::PaymentSecret([3; 32]))
        .amount_milli_satoshis(amount_msat)
        .expiry_time(Duration::from_secs(expiry_s))
        .build_signed(|message| SECP256K1.sign_ecdsa_recoverable(message, secret))
        .expect("an invoice");
    Made { bolt11: built.to_string(), hash }
}
