//! The rules of the books, in one place for the node that writes and for the check that reads: what a transfer of each
//! kind must look like, and which balances it may leave. Pure: the past is asked through [`Past`].

use super::Error;
use crate::store::OpenHold;
use crate::store::money::{Account, Transfer, Why};

/// What the rules ask about the past.
pub(super) trait Past {
    fn balance(&self, account: &Account) -> Result<i128, Error>;
    fn hold(&self, job: &str) -> Result<Option<OpenHold>, Error>;
    /// The transfer of this id, if it was made.
    fn transfer(&self, id: &str) -> Result<Option<Transfer>, Error>;
    /// Msat of this customer's credit that quotes for other jobs than this one count on.
    fn promised_msat(&self, _customer: &str, _job: &str) -> u64 {
        0
    }
    fn was_made(&self, id: &str) -> Result<bool, Error> {
        Ok(self.transfer(id)?.is_some())
    }
}

/// Whether this transfer may follow that past.
///
/// # Errors
/// The first rule that it breaks. An id that was used before is the caller's to look for.
pub(super) fn allow(past: &dyn Past, transfer: &Transfer) -> Result<(), Error> {
    if let Some(why) = transfer.malformed() {
        return Err(Error::Malformed { id: transfer.id.chars().take(200).collect(), why });
    }
    allow_kind(past, transfer)?;
    for (account, net) in transfer.nets() {
        let would_msat = past.balance(account)? + net;
        let promised_msat = match (&transfer.why, account) {
            (Why::Hold { job, .. }, Account::Credit(customer)) => past.promised_msat(customer, job).into(),
            _ => 0,
        };
        let fine = match account {
            Account::Credit(_) => credit_may_have(transfer, would_msat + promised_msat, net),
            // These hold what is owed, so they are never above zero.
            Account::Held(_) | Account::Refunding(_) => would_msat <= 0,
            // No more goes back than was locked.
            Account::Locked(_) => would_msat >= 0,
            _ => true,
        };
        if fine {
            continue;
        }
        if let Account::Credit(_) = account {
            let line = i128::from(line_msat(transfer));
            let available_msat = net - would_msat + line - promised_msat;
            let wanted_msat = u64::try_from(net).unwrap_or(u64::MAX);
            return Err(Error::Insufficient { available_msat, wanted_msat });
        }
        return Err(Error::Overdrawn { account: account.to_string(), would_msat });
    }
    Ok(())
}

/// What is asked of a new transfer and not of the log, because books of older versions have entries against it.
///
/// # Errors
/// The rule that it breaks.
pub(super) fn allow_new(past: &dyn Past, transfer: &Transfer) -> Result<(), Error> {
    let Why::WrittenOff { .. } = &transfer.why else { return Ok(()) };
    for (account, net) in transfer.nets() {
        let Account::Credit(customer) = account else { continue };
        // What open jobs hold, or a refund has set aside, comes back to credit when they fail.
        let mut owed_msat = 0;
        for part in [Account::Credit, Account::Held, Account::Refunding] {
            owed_msat += past.balance(&part(customer.clone()))?;
        }
        if owed_msat + net < 0 {
            return Err(Error::NotOwed { owed_msat: owed_msat.max(0), wanted_msat: -net });
        }
    }
    Ok(())
}

/// A customer's credit sinks below zero by a hold under a credit line only, and comes up from there by anything. A lock
/// that goes takes exactly what it has lent; all of it but the rounding to a whole sat was held by its job, so of what
/// the customer has spent meanwhile less than a sat was not its own.
fn credit_may_have(transfer: &Transfer, would_msat: i128, net: i128) -> bool {
    net <= 0 || matches!(transfer.why, Why::Unlocked { .. }) || would_msat <= i128::from(line_msat(transfer))
}

fn line_msat(transfer: &Transfer) -> u64 {
    match &transfer.why {
        Why::Hold { line_msat, .. } => *line_msat,
        _ => 0,
    }
}

fn allow_kind(past: &dyn Past, transfer: &Transfer) -> Result<(), Error> {
    let shape = |fits: bool, why: &'static str| {
        if fits { Ok(()) } else { Err(Error::Malformed { id: transfer.id.clone(), why }) }
    };
    let all = |from: fn(&Account) -> bool, to: fn(&Account) -> bool| {
        transfer.legs.iter().all(|leg| from(&leg.from) && to(&leg.to))
    };
    match &transfer.why {
        Why::Paid { payment_hash, wallet } => {
            shape(transfer.id == super::transfer::paid_id(payment_hash), "a payment's id names its hash")?;
            let named = transfer.legs.iter().all(|leg| leg.to == Account::Wallet(wallet.clone()));
            let fits = named && all(|from| matches!(from, Account::Credit(_) | Account::Suspense), |_| true);
            shape(fits, "a payment goes from credit to the wallet that has it")?;
            // Else the customer would have the same sats twice.
            let locked = past.was_made(&super::transfer::locked_id(payment_hash))?
                && !past.was_made(&super::transfer::unlocked_id(payment_hash))?;
            if locked { Err(Error::StillLocked { payment_hash: payment_hash.clone() }) } else { Ok(()) }
        }
        Why::Locked { payment_hash, wallet, .. } => {
            shape(transfer.id == super::transfer::locked_id(payment_hash), "a lock's id names its hash")?;
            let named = transfer.legs.iter().all(|leg| leg.to == Account::Locked(wallet.clone()));
            let fits =
                named && transfer.legs.len() == 1 && all(|from| matches!(from, Account::Credit(_)), |_| true);
            shape(fits, "a lock goes from credit to what is locked in the wallet that has it")?;
            let paid = past.was_made(&super::transfer::paid_id(payment_hash))?;
            shape(!paid, "what was paid is not locked any more")
        }
        Why::Unlocked { payment_hash, .. } => {
            let locked = past.transfer(&super::transfer::locked_id(payment_hash))?;
            let back = locked.as_ref().and_then(super::transfer::unlocked);
            if back.as_ref() == Some(transfer) {
                Ok(())
            } else {
                Err(Error::NotTheLock { payment_hash: payment_hash.clone() })
            }
        }
        Why::Grant { .. } => {
            let fits = all(|from| matches!(from, Account::Credit(_)), |to| *to == Account::Grants);
            shape(fits, "a grant goes from credit to grants")
        }
        Why::WrittenOff { .. } => {
            let fits = all(|from| matches!(from, Account::Credit(_)), |to| *to == Account::WriteOff);
            shape(fits, "a debt is written off from credit")
        }
        Why::Hold { job, .. } => {
            shape(transfer.id == super::transfer::hold_id(job), "a hold's id names its job")?;
            let [leg] = transfer.legs.as_slice() else { return shape(false, "a hold has one leg") };
            let fits = match (&leg.from, &leg.to) {
                (Account::Held(held), Account::Credit(credit)) => held == credit,
                _ => false,
            };
            shape(fits, "a hold goes from held to credit of one customer")
        }
        Why::Capture { job } => {
            shape(
                transfer.id == super::transfer::resolve_id(job),
                "a hold is resolved by an id that names its job",
            )?;
            let fits = all(
                |from| matches!(from, Account::Revenue { .. } | Account::Credit(_)),
                |to| matches!(to, Account::Held(_)),
            );
            shape(fits, "a capture goes from revenue, and the rest from credit, to held")?;
            resolves(past, transfer, job)
        }
        Why::Void { job, .. } => {
            shape(
                transfer.id == super::transfer::resolve_id(job),
                "a hold is resolved by an id that names its job",
            )?;
            let fits = all(|from| matches!(from, Account::Credit(_)), |to| matches!(to, Account::Held(_)));
            shape(fits, "a void goes from credit to held")?;
            resolves(past, transfer, job)
        }
        Why::Cost { .. } => {
            let fits = all(
                |from| matches!(from, Account::Supplier(_)),
                |to| matches!(to, Account::ModelCost(_) | Account::ContainerCost(_)),
            );
            shape(fits, "a cost goes from a supplier to costs")
        }
        Why::RefundBegun { .. } => {
            let fits =
                all(|from| matches!(from, Account::Refunding(_)), |to| matches!(to, Account::Credit(_)));
            shape(fits, "a refund begins from refunding to credit")
        }
        Why::RefundPaid { .. } => {
            let fits = all(
                |from| matches!(from, Account::Wallet(_)),
                |to| matches!(to, Account::Refunding(_) | Account::Fees),
            );
            shape(fits, "a refund is paid from the wallet to refunding, its fee to fees")
        }
        Why::RefundFailed { .. } => {
            let fits =
                all(|from| matches!(from, Account::Credit(_)), |to| matches!(to, Account::Refunding(_)));
            shape(fits, "a refund that failed goes back from credit to refunding")
        }
        Why::Correction { of, .. } => corrects(past, transfer, of),
        Why::Reconciled { .. } => {
            let side = |a: &Account| matches!(a, Account::Wallet(_) | Account::Suspense | Account::Fees);
            let fits = transfer.legs.iter().all(|leg| side(&leg.from) && side(&leg.to));
            shape(fits, "what is reconciled stays between wallet, suspense and fees")
        }
    }
}

/// A hold is resolved once, and as a whole.
fn resolves(past: &dyn Past, transfer: &Transfer, job: &str) -> Result<(), Error> {
    let Some(hold) = past.hold(job)? else {
        let resolved = past.was_made(&super::transfer::resolve_id(job))?;
        return Err(Error::NoHold { job: job.to_owned(), resolved });
    };
    let resolved_msat = transfer.net_msat(&Account::Held(hold.customer.clone()));
    let own = |account: &Account| account.customer().is_none_or(|key| key == hold.customer);
    let others = transfer.legs.iter().any(|leg| !own(&leg.from) || !own(&leg.to));
    if others || resolved_msat != i128::from(hold.msat) {
        return Err(Error::NotTheHold { job: job.to_owned(), held_msat: hold.msat, resolved_msat });
    }
    Ok(())
}

fn corrects(past: &dyn Past, transfer: &Transfer, of: &str) -> Result<(), Error> {
    let not = || Error::NotACorrection { id: transfer.id.clone(), of: of.to_owned() };
    let first = past.transfer(of)?.ok_or_else(not)?;
    let named = transfer.id == super::transfer::correction_id(of);
    let fixed = !may_be_corrected(&first);
    let undone = first.nets().into_iter().all(|(account, net)| transfer.net_msat(account) == -net);
    let touches_more = transfer.nets().len() != first.nets().len();
    if !named || fixed || !undone || touches_more { Err(not()) } else { Ok(()) }
}

/// A hold's life ends by its own means, and what has left through the wallet is gone.
pub(super) fn may_be_corrected(transfer: &Transfer) -> bool {
    match transfer.why {
        Why::Hold { .. } | Why::Capture { .. } | Why::Void { .. } => false,
        Why::RefundBegun { .. } | Why::RefundPaid { .. } | Why::RefundFailed { .. } => false,
        Why::Locked { .. } | Why::Unlocked { .. } => false,
        Why::Paid { .. } | Why::Grant { .. } | Why::Cost { .. } => true,
        Why::WrittenOff { .. } | Why::Correction { .. } | Why::Reconciled { .. } => true,
    }
}

/// Whether a later transfer may ask for this one's body.
pub(super) fn may_be_asked_for(transfer: &Transfer) -> bool {
    may_be_corrected(transfer) || matches!(transfer.why, Why::Locked { .. })
}

/// What a transfer does to holds: the job, and its hold from now on.
pub(super) fn hold_after(transfer: &Transfer) -> Option<(&str, Option<OpenHold>)> {
    match &transfer.why {
        Why::Hold { job, expires_ms, .. } => {
            let customer = transfer.customer()?.to_owned();
            let held = -transfer.net_msat(&Account::Held(customer.clone()));
            let msat = u64::try_from(held).unwrap_or_default();
            Some((job, Some(OpenHold { job: job.clone(), customer, msat, expires_ms: *expires_ms })))
        }
        Why::Capture { job } | Why::Void { job, .. } => Some((job, None)),
        _ => None,
    }
}
