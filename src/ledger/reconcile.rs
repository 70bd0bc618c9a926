//! The wallet's own list of payments held against the books, row by row: what agrees, and what each difference is.
//! Pure: the rows are handed in, what the books know of a payment hash is read by [`Known::read`], and nothing is
//! posted here. Walking the wallet and booking what is found are the desk's.

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use super::Error;
use super::transfer::{self, correction_id, paid_id};
use crate::store::money::{Account, Transfer, Why};
use crate::store::{InvoiceState, Store};

/// Most differences that are listed; the rest is counted.
pub const LISTED_MAX: usize = 500;

/// Which way the money went, as the wallet sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    In,
    Out,
}

/// How far the wallet says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The money has moved.
    Settled,
    /// It may still move.
    Pending,
    /// It has not moved and will not: expired, failed, cancelled.
    Dead,
}

/// One entry of the wallet's books.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// 64 hex digits.
    pub payment_hash: String,
    pub way: Way,
    pub stage: Stage,
    /// Without the fee.
    pub msat: u64,
    /// `None`: the wallet does not tell it.
    pub fee_msat: Option<u64>,
    /// Unix milliseconds.
    pub at_ms: u64,
    pub memo: String,
}

/// A refund as the books have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refund {
    pub begun: Transfer,
    /// `None`: it is on its way.
    pub end: Option<Why>,
}

/// All that the books know of one payment hash.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// Our invoice: its customer, and the request that it is for.
    pub invoice: Option<(String, Option<String>)>,
    /// What was booked as paid to it. 0: booked, and taken back by a correction.
    pub paid_msat: Option<u64>,
    pub refund: Option<Refund>,
    /// What earlier comparisons have booked to suspense, in and out.
    pub in_msat: Option<u64>,
    /// Without the fee.
    pub out_msat: Option<u64>,
    /// Fees that an earlier comparison has booked on top.
    pub fee_msat: u64,
}

/// What is wrong with one payment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum What {
    /// Paid to an invoice of ours, and not in the books. It is the customer's.
    Unbooked {
        customer: String,
        job: Option<String>,
    },
    /// The wallet has it and nobody here knows why.
    Foreign,
    /// The books say that the wallet has it, and the wallet does not know it.
    Missing {
        booked_msat: u64,
    },
    /// As [`What::Missing`], and the wallet could not be asked by the hash.
    Unasked {
        booked_msat: u64,
        why: String,
    },
    /// Both have it, over other amounts.
    AmountDiffers {
        booked_msat: u64,
    },
    FeeDiffers {
        booked_fee_msat: u64,
    },
    /// The wallet has paid a refund that the books have on its way.
    RefundPaid {
        customer: String,
    },
    /// The wallet is at it.
    RefundUnderWay {
        customer: String,
    },
    /// On its way in the books, not paid by the wallet; the node tries again by itself.
    RefundUnpaid {
        customer: String,
    },
    /// The books gave it back as failed, and the wallet has paid it all the same.
    RefundPaidTwice {
        customer: String,
    },
}

impl What {
    /// Its name in counts and tables.
    pub fn name(&self) -> &'static str {
        match self {
            What::Unbooked { .. } => "unbooked",
            What::Foreign => "foreign",
            What::Missing { .. } => "missing",
            What::Unasked { .. } => "unasked",
            What::AmountDiffers { .. } => "amount_differs",
            What::FeeDiffers { .. } => "fee_differs",
            What::RefundPaid { .. } => "refund_paid",
            What::RefundUnderWay { .. } => "refund_under_way",
            What::RefundUnpaid { .. } => "refund_unpaid",
            What::RefundPaidTwice { .. } => "refund_paid_twice",
        }
    }
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    pub payment_hash: String,
    pub way: Way,
    #[serde(flatten)]
    pub what: What,
    /// What the wallet says moved, without the fee; 0: nothing.
    pub wallet_msat: u64,
    pub fee_msat: u64,
    /// Unix milliseconds, by the side that has it.
    pub at_ms: u64,
    pub memo: String,
    /// How it was put right, or why not; empty when nothing was tried.
    pub done: String,
    pub booked: bool,
}

impl Difference {
    /// By how much this one puts the wallet's balance over the books' account, msat.
    pub fn explains_msat(&self) -> i128 {
        let (moved, fee) = (i128::from(self.wallet_msat), i128::from(self.fee_msat));
        let way = |msat: i128| if self.way == Way::In { msat } else { -msat };
        match &self.what {
            _ if self.booked => 0,
            What::Unbooked { .. } => moved - fee,
            What::Foreign | What::RefundPaidTwice { .. } => way(moved) - fee,
            What::RefundPaid { .. } | What::RefundUnderWay { .. } => -moved - fee,
            What::Missing { booked_msat } => way(-i128::from(*booked_msat)),
            What::AmountDiffers { booked_msat } => way(moved - i128::from(*booked_msat)),
            What::FeeDiffers { booked_fee_msat } => i128::from(*booked_fee_msat) - fee,
            // Whether the wallet has it is what is not known.
            What::Unasked { .. } | What::RefundUnpaid { .. } => 0,
        }
    }
}

/// An entry of the wallet's that could not be read, and was compared with nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unreadable {
    /// As far as it says one.
    pub payment_hash: Option<String>,
    pub why: String,
}

/// What came out, for programs as it is.
#[derive(Debug, Default, Serialize)]
pub struct Outcome {
    /// Entries of the wallet that were read, each once.
    pub read: u64,
    /// Entries on which wallet and books agree.
    pub matched: u64,
    /// Entries that moved nothing: open, expired or failed.
    pub unmoved: u64,
    /// Differences by name, listed or not.
    pub counts: BTreeMap<&'static str, u64>,
    /// Of them, put right now.
    pub booked: u64,
    pub differences: Vec<Difference>,
    /// Differences that are counted and not listed.
    pub left_out: u64,
    /// Entries that could not be read; listed as far as there is room.
    pub unreadable: Vec<Unreadable>,
    /// What the differences that stay explain of the balances' difference, msat.
    #[serde(skip)]
    pub explained_msat: i128,
}

impl Outcome {
    pub fn add(&mut self, difference: Difference) {
        *self.counts.entry(difference.what.name()).or_default() += 1;
        self.booked += u64::from(difference.booked);
        self.explained_msat = self.explained_msat.saturating_add(difference.explains_msat());
        if self.differences.len() < LISTED_MAX {
            self.differences.push(difference);
        } else {
            self.left_out += 1;
        }
    }

    pub fn add_unreadable(&mut self, one: Unreadable) {
        *self.counts.entry("unreadable").or_default() += 1;
        if self.unreadable.len() < LISTED_MAX {
            self.unreadable.push(one);
        }
    }

    /// Whether the books have every payment that the wallet says has left it, or may have.
    pub fn has_all_that_left(&self) -> bool {
        let left = |one: &Difference| one.way == Way::Out && one.wallet_msat > 0 && !one.booked;
        self.unreadable.is_empty() && self.left_out == 0 && !self.differences.iter().any(left)
    }

    /// Whether wallet and books agree on every payment now.
    pub fn is_clean(&self) -> bool {
        self.counts.values().sum::<u64>() == self.booked
    }
}

/// Which payments of the wallet have been judged; a walk may show one twice.
#[derive(Debug, Default)]
pub struct Seen(HashSet<(Way, String)>);

impl Seen {
    /// Whether it was not seen before.
    pub fn first(&mut self, way: Way, payment_hash: &str) -> bool {
        self.0.insert((way, payment_hash.to_owned()))
    }

    pub fn has(&self, way: Way, payment_hash: &str) -> bool {
        self.0.contains(&(way, payment_hash.to_owned()))
    }
}

/// What one row of the wallet is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judged {
    Matched,
    /// Nothing has moved, and the books do not say otherwise.
    Unmoved,
    Differs(Box<Difference>),
}

// === the comparison

/// Holds one entry of the wallet against what the books know of its hash.
pub fn judge(row: &Row, known: &Known) -> Judged {
    let what = match row.way {
        Way::In => judge_in(row, known),
        Way::Out => judge_out(row, known),
    };
    match what {
        Some(what) => Judged::Differs(Box::new(differs(row, what))),
        None if row.stage == Stage::Settled => Judged::Matched,
        None => Judged::Unmoved,
    }
}

fn judge_in(row: &Row, known: &Known) -> Option<What> {
    // What was booked, as a payment or to suspense.
    let booked_msat = known.paid_msat.filter(|msat| *msat > 0).or(known.in_msat);
    match (row.stage, booked_msat, &known.invoice) {
        (Stage::Settled, Some(booked_msat), _) if booked_msat != row.msat => {
            Some(What::AmountDiffers { booked_msat })
        }
        (Stage::Settled, Some(_), _) if row.fee_msat.is_some_and(|fee| fee != known.fee_msat) => {
            Some(What::FeeDiffers { booked_fee_msat: known.fee_msat })
        }
        (Stage::Settled, Some(_), _) => None,
        // A payment that was corrected away is nobody's until the owner says whose.
        (Stage::Settled, None, Some((customer, job))) if known.paid_msat.is_none() && row.msat > 0 => {
            Some(What::Unbooked { customer: customer.clone(), job: job.clone() })
        }
        (Stage::Settled, None, _) if row.msat == 0 => None,
        (Stage::Settled, None, _) => Some(What::Foreign),
        (Stage::Pending | Stage::Dead, Some(booked_msat), _) => Some(What::Missing { booked_msat }),
        (Stage::Pending | Stage::Dead, None, _) => None,
    }
}

fn judge_out(row: &Row, known: &Known) -> Option<What> {
    let Some(refund) = &known.refund else {
        return match (row.stage, known.out_msat) {
            (Stage::Settled, None) => Some(What::Foreign),
            (Stage::Settled, Some(booked_msat)) if booked_msat != row.msat => {
                Some(What::AmountDiffers { booked_msat })
            }
            (Stage::Dead | Stage::Pending, Some(booked_msat)) => Some(What::Missing { booked_msat }),
            (Stage::Pending, None) => Some(What::Foreign),
            (Stage::Settled | Stage::Dead, _) => None,
        };
    };
    let customer = refund.begun.customer().unwrap_or_default().to_owned();
    let booked_msat = refund.msat();
    match (row.stage, &refund.end) {
        (Stage::Settled, _) if row.msat != booked_msat => Some(What::AmountDiffers { booked_msat }),
        (Stage::Settled, None) => Some(What::RefundPaid { customer }),
        (Stage::Settled, Some(Why::RefundPaid { fee_msat, .. }))
            if row.fee_msat.is_some_and(|fee| fee_msat.saturating_add(known.fee_msat) != fee) =>
        {
            Some(What::FeeDiffers { booked_fee_msat: fee_msat.saturating_add(known.fee_msat) })
        }
        (Stage::Settled, Some(Why::RefundPaid { .. })) => None,
        (Stage::Settled, Some(_)) if known.out_msat == Some(row.msat) => None,
        (Stage::Settled, Some(_)) => Some(What::RefundPaidTwice { customer }),
        (Stage::Pending, _) => Some(What::RefundUnderWay { customer }),
        (Stage::Dead, None) => Some(What::RefundUnpaid { customer }),
        (Stage::Dead, Some(Why::RefundPaid { .. })) => Some(What::Missing { booked_msat }),
        (Stage::Dead, Some(_)) => None,
    }
}

fn differs(row: &Row, what: What) -> Difference {
    let moved = row.stage != Stage::Dead && !(row.way == Way::In && row.stage == Stage::Pending);
    Difference {
        payment_hash: row.payment_hash.clone(),
        way: row.way,
        what,
        wallet_msat: if moved { row.msat } else { 0 },
        fee_msat: if moved { row.fee_msat.unwrap_or_default() } else { 0 },
        at_ms: row.at_ms,
        memo: row.memo.clone(),
        done: String::new(),
        booked: false,
    }
}

impl Refund {
    pub fn msat(&self) -> u64 {
        self.begun.legs.iter().map(|leg| leg.msat).sum()
    }
}

/// What a transfer says that a wallet has: the hash, the way, the amount without the fee. `None`: it is not about this
/// wallet.
pub fn claim(posted: &Transfer, account: &Account) -> Option<(String, Way, u64)> {
    let net = posted.net_msat(account);
    if net == 0 {
        return None;
    }
    let way = if net > 0 { Way::In } else { Way::Out };
    let fees = match &posted.why {
        Why::Reconciled { .. } | Why::RefundPaid { .. } => posted.net_msat(&Account::Fees),
        _ => 0,
    };
    // A fee alone is part of another claim.
    let msat = u64::try_from(net.abs() - fees.abs()).ok().filter(|msat| *msat > 0)?;
    match &posted.why {
        Why::Paid { payment_hash, .. }
        | Why::RefundPaid { payment_hash, .. }
        | Why::Reconciled { payment_hash, .. } => Some((payment_hash.clone(), way, msat)),
        _ => None,
    }
}

// === impl Known

impl Known {
    /// Reads what the store has about this hash.
    ///
    /// # Errors
    /// The store's.
    pub fn read(store: &Store, payment_hash: &str) -> Result<Known, Error> {
        let posted = |id: &str| Ok::<_, Error>(store.transfer(id)?.map(|posted| posted.transfer));
        let sum = |transfer: &Transfer| -> u64 { transfer.legs.iter().map(|leg| leg.msat).sum() };
        let paid = posted(&paid_id(payment_hash))?;
        let corrected = posted(&correction_id(&paid_id(payment_hash)))?.is_some();
        let invoice = match store.invoice(payment_hash)? {
            Some((invoice, InvoiceState::Open | InvoiceState::Closed | InvoiceState::Paid)) => {
                Some((invoice.customer, invoice.job))
            }
            None => None,
        };
        let refund = match posted(&transfer::refund_id(payment_hash))? {
            Some(begun) => {
                let end = posted(&transfer::refunded_id(payment_hash))?.map(|end| end.why);
                Some(Refund { begun, end })
            }
            None => None,
        };
        let out = |transfer: Transfer| {
            let side = |account: &Account| transfer.net_msat(account);
            u64::try_from(side(&Account::Suspense)).unwrap_or_default()
        };
        Ok(Known {
            invoice,
            paid_msat: paid.as_ref().map(|paid| if corrected { 0 } else { sum(paid) }),
            refund,
            in_msat: posted(&transfer::reconciled_in_id(payment_hash))?.as_ref().map(sum),
            out_msat: posted(&transfer::reconciled_out_id(payment_hash))?.map(out),
            fee_msat: posted(&transfer::reconciled_fee_id(payment_hash))?.as_ref().map_or(0, sum),
        })
    }
}

#[cfg(test)]
mod tests;
