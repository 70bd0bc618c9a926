//! Payment after delivery: asks the wallet for what a trusted customer owes for one job, so that the result can carry
//! the invoice. A wallet that is not there does not hold the result up: the debt stays on the customer's line.

use std::time::Duration;

use super::settle::Charge;
use super::ticket::Ticket;
use super::{Rooms, till};
use crate::price::Way;
use crate::store;
use crate::store::record::Invoice;

/// The result waits no longer for its invoice.
const PATIENCE: Duration = Duration::from_secs(10);

/// The invoice over what the customer owes after this charge and was not asked for yet. It is to be recorded with the
/// result, and followed after that.
pub(super) async fn invoice(
    rooms: &Rooms,
    ticket: &Ticket,
    charge: Option<&Charge>,
) -> Result<Option<Invoice>, store::Error> {
    let (Way::After { .. }, Some(charge), Some(till)) = (ticket.admission.agreed.way, charge, &rooms.till)
    else {
        return Ok(None);
    };
    let (job, customer) = (ticket.request.id.to_hex(), ticket.request.customer.to_hex());
    let msat = charge.owed_msat.saturating_sub(asked_msat(rooms, &customer)?).min(charge.msat);
    if msat == 0 {
        return Ok(None);
    }
    let asked = till.invoice(&rooms.store, &customer, msat, Some(&job), rooms.now_ms());
    let why = match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(invoice)) => return Ok(Some(invoice)),
        Ok(Err(till::Error::Store(error))) => return Err(error),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", PATIENCE.as_secs()),
    };
    tracing::warn!(%job, msat, why, "the result goes out without an invoice; the customer owes it");
    Ok(None)
}

/// What this customer can still pay to invoices for jobs that were delivered.
fn asked_msat(rooms: &Rooms, customer: &str) -> Result<u64, store::Error> {
    let now_ms = rooms.now_ms();
    let mut asked_msat = 0_u64;
    for invoice in rooms.store.unpaid()? {
        // What is locked comes with the job that it is locked for, and pays no debt.
        if invoice.customer == customer
            && invoice.expires_ms > now_ms
            && invoice.hold.is_none()
            && let Some(job) = &invoice.job
            && rooms.store.job(job)?.is_some()
        {
            asked_msat = asked_msat.saturating_add(invoice.amount_msat);
        }
    }
    Ok(asked_msat)
}
