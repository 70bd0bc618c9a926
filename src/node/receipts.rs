//! What a zap receipt is good for: it names an invoice, and when that is an open one of ours the till looks sooner
//! whether it was paid. Nothing else of it is read, believed or kept, so it does not matter who made it. Whether money
//! has come is the wallet's to say.

use std::sync::Arc;
use std::time::Duration;

use nostr_sdk::prelude::Event;
use tokio::sync::mpsc;

use crate::job::Till;
use crate::store::{InvoiceState, Store};
use crate::wallet::read_bolt11;

/// Receipts that may wait; what comes beyond is dropped unread.
pub(super) const WAITING: usize = 16;
/// Pause after a receipt that makes the node ask the wallet: no more than thirty times a minute, whoever sends them.
const AFTER_A_LOOK: Duration = Duration::from_secs(2);
/// Pause after any other one.
const AFTER_NONE: Duration = Duration::from_millis(100);

/// Reads receipts until there are no more.
pub(super) async fn watch(mut receipts: mpsc::Receiver<Event>, till: Arc<Till>, store: Store) {
    while let Some(receipt) = receipts.recv().await {
        let pause = match open_invoice(&receipt, &store) {
            Some(hash) => {
                tracing::debug!(%hash, receipt = %receipt.id, "a zap receipt names an open invoice: the wallet is asked");
                till.nudge(&hash);
                AFTER_A_LOOK
            }
            None => AFTER_NONE,
        };
        tokio::time::sleep(pause).await;
    }
}

/// The payment hash of the invoice that a receipt names, if it is ours and open.
fn open_invoice(receipt: &Event, store: &Store) -> Option<String> {
    let named = receipt.tags.iter().find_map(|tag| match tag.as_slice() {
        [name, bolt11, ..] if name == "bolt11" => Some(bolt11),
        _ => None,
    })?;
    let hash = read_bolt11(named).ok()?.payment_hash.to_hex();
    match store.invoice(&hash) {
        Ok(Some((_, InvoiceState::Open))) => Some(hash),
        Ok(_) => None,
        Err(error) => {
            tracing::debug!(%hash, %error, "a zap receipt was not followed");
            None
        }
    }
}
