//! Making transfers: each kind with its legs and the id that follows from what it is about, so that asking twice is
//! one transfer. Whether it may be made is `rules`' to say.

use crate::store::money::{About, Account, Leg, Transfer, Usd, Why};

pub fn paid_id(payment_hash: &str) -> String {
    format!("paid:{payment_hash}")
}

pub fn locked_id(payment_hash: &str) -> String {
    format!("locked:{payment_hash}")
}

pub fn unlocked_id(payment_hash: &str) -> String {
    format!("unlocked:{payment_hash}")
}

pub fn hold_id(job: &str) -> String {
    format!("hold:{job}")
}

/// Capture and void share it: a hold is resolved once.
pub fn resolve_id(job: &str) -> String {
    format!("resolve:{job}")
}

pub fn correction_id(of: &str) -> String {
    format!("correct:{of}")
}

pub fn refund_id(payment_hash: &str) -> String {
    format!("refund:{payment_hash}")
}

/// Paid and failed share it: a refund ends one way only.
pub fn refunded_id(payment_hash: &str) -> String {
    format!("refunded:{payment_hash}")
}

pub fn reconciled_in_id(payment_hash: &str) -> String {
    format!("reconciled:in:{payment_hash}")
}

pub fn reconciled_out_id(payment_hash: &str) -> String {
    format!("reconciled:out:{payment_hash}")
}

pub fn reconciled_fee_id(payment_hash: &str) -> String {
    format!("reconciled:fee:{payment_hash}")
}

fn leg(from: Account, to: Account, msat: u64) -> Leg {
    Leg { from, to, msat }
}

/// What our wallet says was paid to an invoice of ours: into the customer's credit, or into suspense when no customer
/// is known.
pub fn paid(payment_hash: &str, wallet: &str, customer: Option<&str>, msat: u64) -> Transfer {
    let from = customer.map_or(Account::Suspense, |key| Account::Credit(key.to_owned()));
    Transfer {
        id: paid_id(payment_hash),
        why: Why::Paid { payment_hash: payment_hash.to_owned(), wallet: wallet.to_owned() },
        legs: vec![leg(from, Account::Wallet(wallet.to_owned()), msat)],
        about: None,
    }
}

/// What our wallet says is locked for a job: lent to the customer's credit, so that the job can be held.
pub fn locked(payment_hash: &str, wallet: &str, job: &str, customer: &str, msat: u64) -> Transfer {
    let locked = Account::Locked(wallet.to_owned());
    Transfer {
        id: locked_id(payment_hash),
        why: Why::Locked {
            job: job.to_owned(),
            payment_hash: payment_hash.to_owned(),
            wallet: wallet.to_owned(),
        },
        legs: vec![leg(Account::Credit(customer.to_owned()), locked, msat)],
        about: None,
    }
}

/// The way back, leg by leg; `None` when this is not the transfer of a lock.
pub fn unlocked(locked: &Transfer) -> Option<Transfer> {
    let Why::Locked { job, payment_hash, .. } = &locked.why else { return None };
    let legs = locked.legs.iter().map(|l| leg(l.to.clone(), l.from.clone(), l.msat)).collect();
    let why = Why::Unlocked { job: job.clone(), payment_hash: payment_hash.clone() };
    Some(Transfer { id: unlocked_id(payment_hash), why, legs, about: None })
}

/// `id` is the giver's, so that a command that is repeated gives once.
pub fn grant(id: &str, customer: &str, msat: u64, note: &str) -> Transfer {
    Transfer {
        id: format!("grant:{id}"),
        why: Why::Grant { note: note.to_owned() },
        legs: vec![leg(Account::Credit(customer.to_owned()), Account::Grants, msat)],
        about: None,
    }
}

pub fn hold(job: &str, customer: &str, msat: u64, line_msat: u64, expires_ms: u64) -> Transfer {
    Transfer {
        id: hold_id(job),
        why: Why::Hold { job: job.to_owned(), expires_ms, line_msat },
        legs: vec![leg(Account::Held(customer.to_owned()), Account::Credit(customer.to_owned()), msat)],
        about: None,
    }
}

/// The charge, at most the hold, is earned by `shares`: accounts, each with the weight of what was done there. The rest
/// of the hold goes back.
pub fn capture(
    job: &str,
    held_msat: u64,
    charge_msat: u64,
    shares: &[(Account, u64)],
    about: About,
) -> Transfer {
    let held = Account::Held(about.customer.clone());
    let charge_msat = if shares.is_empty() { 0 } else { charge_msat.min(held_msat) };
    let weights: Vec<u64> = shares.iter().map(|(_, weight)| *weight).collect();
    let mut legs = Vec::with_capacity(shares.len() + 1);
    for ((account, _), msat) in shares.iter().zip(split(charge_msat, &weights)) {
        if msat > 0 {
            legs.push(leg(account.clone(), held.clone(), msat));
        }
    }
    let left = held_msat - charge_msat;
    if left > 0 {
        legs.push(leg(Account::Credit(about.customer.clone()), held, left));
    }
    Transfer { id: resolve_id(job), why: Why::Capture { job: job.to_owned() }, legs, about: Some(about) }
}

pub fn void(job: &str, customer: &str, held_msat: u64, reason: &str) -> Transfer {
    Transfer {
        id: resolve_id(job),
        why: Why::Void { job: job.to_owned(), reason: reason.chars().take(200).collect() },
        legs: vec![leg(Account::Credit(customer.to_owned()), Account::Held(customer.to_owned()), held_msat)],
        about: None,
    }
}

/// What a job cost us, on one account of costs and owed to one supplier. `nth` tells the costs of a job apart.
pub fn cost(
    job: &str,
    nth: u32,
    cost: Account,
    supplier: &str,
    msat: u64,
    usd: Option<Usd>,
    about: About,
) -> Transfer {
    Transfer {
        id: format!("cost:{job}:{nth}"),
        why: Why::Cost { job: job.to_owned(), usd },
        legs: vec![leg(Account::Supplier(supplier.to_owned()), cost, msat)],
        about: Some(about),
    }
}

/// Sets credit aside before the wallet is asked to pay it out. The fee, at most `max_fee_msat`, is ours to bear.
pub fn refund_begun(
    payment_hash: &str,
    customer: &str,
    msat: u64,
    bolt11: &str,
    max_fee_msat: u64,
) -> Transfer {
    Transfer {
        id: refund_id(payment_hash),
        why: Why::RefundBegun {
            payment_hash: payment_hash.to_owned(),
            bolt11: bolt11.to_owned(),
            max_fee_msat,
        },
        legs: vec![leg(Account::Refunding(customer.to_owned()), Account::Credit(customer.to_owned()), msat)],
        about: None,
    }
}

/// The wallet has paid `msat` and `fee_msat` more, which is ours to bear.
pub fn refund_paid(payment_hash: &str, customer: &str, wallet: &str, msat: u64, fee_msat: u64) -> Transfer {
    let wallet = Account::Wallet(wallet.to_owned());
    let mut legs = vec![leg(wallet.clone(), Account::Refunding(customer.to_owned()), msat)];
    if fee_msat > 0 {
        legs.push(leg(wallet, Account::Fees, fee_msat));
    }
    Transfer {
        id: refunded_id(payment_hash),
        why: Why::RefundPaid { payment_hash: payment_hash.to_owned(), fee_msat },
        legs,
        about: None,
    }
}

pub fn refund_failed(payment_hash: &str, customer: &str, msat: u64, reason: &str) -> Transfer {
    Transfer {
        id: refunded_id(payment_hash),
        why: Why::RefundFailed {
            payment_hash: payment_hash.to_owned(),
            reason: reason.chars().take(200).collect(),
        },
        legs: vec![leg(Account::Credit(customer.to_owned()), Account::Refunding(customer.to_owned()), msat)],
        about: None,
    }
}

/// What came into the wallet and nobody here can name: into suspense, until the owner finds out.
pub fn reconciled_in(payment_hash: &str, wallet: &str, msat: u64, note: &str) -> Transfer {
    Transfer {
        id: reconciled_in_id(payment_hash),
        why: reconciled(payment_hash, note),
        legs: vec![leg(Account::Suspense, Account::Wallet(wallet.to_owned()), msat)],
        about: None,
    }
}

/// What left the wallet without us, and its fee.
pub fn reconciled_out(payment_hash: &str, wallet: &str, msat: u64, fee_msat: u64, note: &str) -> Transfer {
    let wallet = Account::Wallet(wallet.to_owned());
    let mut legs = vec![leg(wallet.clone(), Account::Suspense, msat)];
    if fee_msat > 0 {
        legs.push(leg(wallet, Account::Fees, fee_msat));
    }
    Transfer { id: reconciled_out_id(payment_hash), why: reconciled(payment_hash, note), legs, about: None }
}

/// A fee that the wallet took and the books did not know.
pub fn reconciled_fee(payment_hash: &str, wallet: &str, fee_msat: u64) -> Transfer {
    Transfer {
        id: reconciled_fee_id(payment_hash),
        why: reconciled(payment_hash, "a fee"),
        legs: vec![leg(Account::Wallet(wallet.to_owned()), Account::Fees, fee_msat)],
        about: None,
    }
}

fn reconciled(payment_hash: &str, note: &str) -> Why {
    Why::Reconciled { payment_hash: payment_hash.to_owned(), note: note.chars().take(200).collect() }
}

pub fn written_off(id: &str, customer: &str, msat: u64, note: &str) -> Transfer {
    Transfer {
        id: format!("write-off:{id}"),
        why: Why::WrittenOff { note: note.to_owned() },
        legs: vec![leg(Account::Credit(customer.to_owned()), Account::WriteOff, msat)],
        about: None,
    }
}

/// Undoes a transfer, leg by leg.
pub fn correction(of: &Transfer, note: &str) -> Transfer {
    let legs = of.legs.iter().map(|l| leg(l.to.clone(), l.from.clone(), l.msat)).collect();
    Transfer {
        id: correction_id(&of.id),
        why: Why::Correction { of: of.id.clone(), note: note.to_owned() },
        legs,
        about: of.about.clone(),
    }
}

/// Parts of an amount by weight: whole msat, together exactly the amount, no part more than one msat from its share.
/// All to the first when there is no weight.
fn split(msat: u64, weights: &[u64]) -> Vec<u64> {
    let total: u128 = weights.iter().map(|w| u128::from(*w)).sum();
    if total == 0 {
        return weights.iter().enumerate().map(|(nth, _)| if nth == 0 { msat } else { 0 }).collect();
    }
    // What went to those before is the rounded share of their sum, so rounding never adds up.
    let (mut weight, mut given) = (0_u128, 0_u64);
    let part = |w: &u64| {
        weight += u128::from(*w);
        // Where that does not fit 128 bits, the first gets all.
        let upto = u128::from(msat)
            .checked_mul(weight)
            .map_or(msat, |all| u64::try_from(all / total).unwrap_or(msat));
        let part = upto - given;
        given = upto;
        part
    };
    weights.iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_split_gives_away_exactly_what_there_is(
            msat in 0..u64::MAX,
            weights in proptest::collection::vec(0..u64::from(u32::MAX), 1..8),
        ) {
            let parts = split(msat, &weights);
            prop_assert_eq!(parts.iter().map(|p| u128::from(*p)).sum::<u128>(), u128::from(msat));
            let total: u128 = weights.iter().map(|w| u128::from(*w)).sum();
            for (part, weight) in parts.iter().zip(&weights) {
                if total > 0 {
                    let share = (msat as f64) * (*weight as f64) / (total as f64);
                    prop_assert!((*part as f64 - share).abs() <= 1.0 + share * 1e-9);
                }
            }
        }

        #[test]
        fn a_capture_earns_the_charge_by_shares_and_resolves_the_whole_hold(
            held in 1..1_000_000_u64,
            charge in 0..1_200_000_u64,
            weights in proptest::collection::vec(0..u64::MAX, 1..5),
        ) {
            let customer = "ab".repeat(32);
            let about = About { customer: customer.clone(), ..About::default() };
            let account = |n: usize| Account::Revenue { skill: "s".into(), place: format!("place{n}") };
            let shares: Vec<_> = weights.iter().enumerate().map(|(n, weight)| (account(n), *weight)).collect();
            let capture = capture("j", held, charge, &shares, about);
            let earned: i128 = shares.iter().map(|(account, _)| -capture.net_msat(account)).sum();
            prop_assert_eq!(earned, i128::from(charge.min(held)));
            prop_assert_eq!(capture.net_msat(&Account::Held(customer.clone())), i128::from(held));
            prop_assert_eq!(capture.net_msat(&Account::Credit(customer)), earned - i128::from(held));
            prop_assert_eq!(capture.malformed(), None);
        }
    }
}
