//! The money of a job's end: what is earned out of its hold, what goes back, and what the capacity cost. The transfers go
//! into one batch with the end itself; what a job costs its customer is `market`'s to say.

use super::ticket::{End, Ticket};
use super::{Failure, Rooms};
use crate::canonical::canonical_text;
use crate::config::terms::msat_of;
use crate::ledger::{self, transfer};
use crate::protocol::{Order, Request};
use crate::store::money::{About, Account, Transfer, Usd};
use crate::store::record::{Record, Summary};
use crate::store::{self, OpenHold};

/// Makes the end of a job and of its hold durable.
pub(super) async fn settle(rooms: &Rooms, job: &str, records: Vec<Record>) -> Result<End, store::Error> {
    match rooms.commit(records).await {
        Ok(_) => Ok(End::Answered),
        Err(ledger::Error::Store(error)) => Err(error),
        // A fault of ours. Nothing was written, so nothing is handed out and nothing charged.
        Err(error) => {
            tracing::error!(%job, %error, "the end of the job does not fit the books");
            Ok(End::LeftOpen)
        }
    }
}

/// What a delivered job costs its customer.
pub(super) struct Charge {
    hold: OpenHold,
    pub(super) msat: u64,
    /// What the customer then owes on its line, this job's part and older debts together.
    pub(super) owed_msat: u64,
}

/// `None`: nothing was held, so nothing is charged.
pub(super) fn charge(rooms: &Rooms, ticket: &Ticket, used: &Summary) -> Result<Option<Charge>, store::Error> {
    let Some(hold) = rooms.store.hold(&ticket.request.id.to_hex())? else { return Ok(None) };
    let msat = ticket.admission.charge_msat(used.wall_ms);
    let available = -rooms.store.balance(&Account::Credit(hold.customer.clone()))?;
    // Below zero after the rest of the hold has come back.
    let owed = -(available + i128::from(hold.msat) - i128::from(msat));
    Ok(Some(Charge { hold, msat, owed_msat: u64::try_from(owed).unwrap_or_default() }))
}

/// The transfers of a job that was delivered: its charge out of the hold, and its cost.
pub(super) fn delivered(
    rooms: &Rooms,
    ticket: &Ticket,
    charge: Option<&Charge>,
    used: &Summary,
) -> Vec<Record> {
    let about = about(rooms, &ticket.request, &ticket.admission.job_type.manifest.name);
    let mut transfers = Vec::new();
    if let Some(Charge { hold, msat, owed_msat }) = charge {
        let revenue = Account::Revenue { skill: about.skill.clone(), place: about.backend.clone() };
        let about = About { unpaid_msat: *owed_msat.min(msat), ..about.clone() };
        // All of a job runs in one place.
        let shares = [(revenue, used.wall_ms)];
        transfers.push(transfer::capture(&hold.job, hold.msat, *msat, &shares, about));
    }
    transfers.extend(cost(rooms, &ticket.request.id.to_hex(), about, used));
    transfers.into_iter().map(Record::Transfer).collect()
}

/// The transfers of a job that was not: the whole hold goes back, since partial work is not charged; what it cost us is
/// booked all the same.
pub(super) fn failed(
    rooms: &Rooms,
    request: &Request,
    failure: &Failure,
    used: &Summary,
) -> Result<Vec<Record>, store::Error> {
    let job = request.id.to_hex();
    let mut transfers = Vec::new();
    if let Some(hold) = rooms.store.hold(&job)? {
        transfers.push(transfer::void(&hold.job, &hold.customer, hold.msat, failure.code.as_str()));
    }
    let skill = rooms.store.job(&job)?.map(|row| row.skill).unwrap_or_default();
    transfers.extend(cost(rooms, &job, about(rooms, request, &skill), used));
    Ok(transfers.into_iter().map(Record::Transfer).collect())
}

fn about(rooms: &Rooms, request: &Request, skill: &str) -> About {
    let repo = Order::read(request).ok().and_then(|order| order.repo);
    About {
        customer: request.customer.to_hex(),
        skill: skill.to_owned(),
        repo: repo.map(|url| canonical_text(&url).chars().take(200).collect()),
        backend: rooms.backend.identity().backend,
        agent: "script".into(),
        unpaid_msat: 0,
    }
}

fn cost(rooms: &Rooms, job: &str, about: About, used: &Summary) -> Option<Transfer> {
    let rented = rooms.options.rent.as_ref()?;
    let Some(nano) = rented.rent.of(used.wall_ms, used.cpu_ms, used.peak_memory_bytes) else {
        tracing::warn!(%job, "no cost is booked: processor time has a price, and it was not counted");
        return None;
    };
    let msat = msat_of(nano, rented.msat_per_usd);
    let account = Account::ContainerCost(about.backend.clone());
    let usd = Usd { nano, msat_per_usd: rented.msat_per_usd, source: rented.rate_source.clone() };
    (msat > 0).then(|| transfer::cost(job, 0, account, &rented.rent.supplier, msat, Some(usd), about))
}
