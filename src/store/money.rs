//! Money as it stands in the log: accounts, legs, transfers. Plain data, checked for form when it is read; whether a
//! transfer may be made is `ledger`'s to say.

use std::fmt;
use std::str::FromStr;

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::record::{EventId, PublicKey};

/// Whose budget the costs of jobs count against.
pub const NODE: &str = "node";

/// Longest id of a transfer, bytes.
pub const TRANSFER_ID_MAX_BYTES: usize = 160;
/// Most legs of one transfer.
pub const LEGS_MAX: usize = 64;
/// The most that one leg may move: all bitcoin there will ever be, in msat.
pub const LEG_MAX_MSAT: u64 = 2_100_000_000_000_000_000;

/// A place where money is. Written as text, its parts joined by colons: `credit:<key>`, `revenue:<skill>:<where>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Account {
    /// What a customer has paid ahead and may spend; ours to owe. Below zero it owes us, as far as its line goes.
    Credit(PublicKey),
    /// Part of a customer's credit that open jobs hold.
    Held(PublicKey),
    /// On its way back to a customer through the wallet; out of its credit, not out of our hands yet.
    Refunding(PublicKey),
    /// Earned with a skill, by what did the work: `local`, `docker`, …
    Revenue { skill: String, place: String },
    /// Spent on a model, by its name.
    ModelCost(String),
    /// Spent on sandboxes, by backend.
    ContainerCost(String),
    /// What we owe for capacity or models that are rented, by whom.
    Supplier(String),
    /// Sats that a wallet of ours holds, by its name.
    Wallet(String),
    /// What customers' payments lock for us in a wallet, by its name: neither taken nor given back yet.
    Locked(String),
    /// Routing and wallet fees.
    Fees,
    /// Credit that was given away.
    Grants,
    /// Debts that nobody will pay.
    WriteOff,
    /// Money in a wallet that no customer of ours can be named for.
    Suspense,
}

/// The five kinds of bookkeeping, as far as they are used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AccountKind {
    Asset,
    Liability,
    Income,
    Expense,
}

impl Account {
    pub fn kind(&self) -> AccountKind {
        match self {
            Account::Wallet(_) | Account::Locked(_) => AccountKind::Asset,
            Account::Credit(_)
            | Account::Held(_)
            | Account::Refunding(_)
            | Account::Supplier(_)
            | Account::Suspense => AccountKind::Liability,
            Account::Revenue { .. } => AccountKind::Income,
            Account::ModelCost(_)
            | Account::ContainerCost(_)
            | Account::Fees
            | Account::Grants
            | Account::WriteOff => AccountKind::Expense,
        }
    }

    /// Whether its name, read again, is this account.
    fn reads_back(&self) -> bool {
        match self {
            Account::Credit(key) | Account::Held(key) | Account::Refunding(key) => is_key(key),
            Account::Revenue { skill, place } => is_name(skill) && is_name(place),
            Account::ModelCost(name)
            | Account::ContainerCost(name)
            | Account::Supplier(name)
            | Account::Wallet(name)
            | Account::Locked(name) => is_name(name),
            Account::Fees | Account::Grants | Account::WriteOff | Account::Suspense => true,
        }
    }

    /// The customer whose money it is.
    pub fn customer(&self) -> Option<&str> {
        match self {
            Account::Credit(key) | Account::Held(key) | Account::Refunding(key) => Some(key),
            _ => None,
        }
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Account::Credit(key) => write!(f, "credit:{key}"),
            Account::Held(key) => write!(f, "held:{key}"),
            Account::Refunding(key) => write!(f, "refunding:{key}"),
            Account::Revenue { skill, place } => write!(f, "revenue:{skill}:{place}"),
            Account::ModelCost(name) => write!(f, "cost:model:{name}"),
            Account::ContainerCost(name) => write!(f, "cost:container:{name}"),
            Account::Supplier(name) => write!(f, "supplier:{name}"),
            Account::Wallet(name) => write!(f, "wallet:{name}"),
            Account::Locked(name) => write!(f, "locked:{name}"),
            Account::Fees => f.write_str("fees"),
            Account::Grants => f.write_str("grants"),
            Account::WriteOff => f.write_str("write-off"),
            Account::Suspense => f.write_str("suspense"),
        }
    }
}

/// A text that names no account.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the name of an account")]
pub struct NoAccount(String);

impl FromStr for Account {
    type Err = NoAccount;

    fn from_str(text: &str) -> Result<Account, NoAccount> {
        let account = match text.split_once(':') {
            Some(("credit", key)) if is_key(key) => Account::Credit(key.into()),
            Some(("held", key)) if is_key(key) => Account::Held(key.into()),
            Some(("refunding", key)) if is_key(key) => Account::Refunding(key.into()),
            Some(("supplier", name)) if is_name(name) => Account::Supplier(name.into()),
            Some(("wallet", name)) if is_name(name) => Account::Wallet(name.into()),
            Some(("locked", name)) if is_name(name) => Account::Locked(name.into()),
            Some(("revenue", rest)) => match rest.split_once(':') {
                Some((skill, place)) if is_name(skill) && is_name(place) => {
                    Account::Revenue { skill: skill.into(), place: place.into() }
                }
                _ => return Err(NoAccount::new(text)),
            },
            Some(("cost", rest)) => match rest.split_once(':') {
                Some(("model", name)) if is_name(name) => Account::ModelCost(name.into()),
                Some(("container", name)) if is_name(name) => Account::ContainerCost(name.into()),
                _ => return Err(NoAccount::new(text)),
            },
            None if text == "fees" => Account::Fees,
            None if text == "grants" => Account::Grants,
            None if text == "write-off" => Account::WriteOff,
            None if text == "suspense" => Account::Suspense,
            _ => return Err(NoAccount::new(text)),
        };
        Ok(account)
    }
}

impl NoAccount {
    fn new(text: &str) -> NoAccount {
        NoAccount(text.chars().take(100).collect())
    }
}

impl Serialize for Account {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Account {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Account, D::Error> {
        struct Name;

        impl Visitor<'_> for Name {
            type Value = Account;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of an account")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Account, E> {
                text.parse().map_err(E::custom)
            }
        }

        from.deserialize_str(Name)
    }
}

fn is_key(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Names in accounts: 1 – 64 of `a-z A-Z 0-9 . _ / -`.
pub fn is_name(text: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'/' | b'-');
    (1..=64).contains(&text.len()) && text.bytes().all(fits)
}

/// Money that goes from one account to another. A transfer made of legs sums to zero because each leg does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leg {
    /// Credited.
    pub from: Account,
    /// Debited.
    pub to: Account,
    /// 1 ..= [`LEG_MAX_MSAT`].
    pub msat: u64,
}

/// One entry of the books. Nothing changes it; a correction is another transfer that names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// Given by who asks for it and derived from what it is about, so that asking again is no second transfer.
    pub id: String,
    pub why: Why,
    pub legs: Vec<Leg>,
    /// What it was for, for reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub about: Option<About>,
}

/// What a transfer does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Why {
    /// A payment that our wallet says has come.
    Paid { payment_hash: String, wallet: String },
    /// A payment for a job is locked in a wallet: ours to take once the job is delivered, and credit until then.
    Locked { job: EventId, payment_hash: String, wallet: String },
    /// The lock is gone, taken (then the payment stands beside it) or given back: what it lent to credit goes.
    Unlocked { job: EventId, payment_hash: String },
    /// The owner gives credit away.
    Grant { note: String },
    /// Part of a customer's credit is set aside for a job. `line_msat` is how far below zero the credit may go.
    Hold { job: EventId, expires_ms: u64, line_msat: u64 },
    /// The job was delivered: its price is earned, the rest of the hold goes back.
    Capture { job: EventId },
    /// The job was not delivered: the whole hold goes back.
    Void { job: EventId, reason: String },
    /// What a job cost us.
    Cost { job: EventId, usd: Option<Usd> },
    /// Credit on its way out, before the wallet is asked to pay.
    RefundBegun { payment_hash: String, bolt11: String, max_fee_msat: u64 },
    /// The wallet has paid it, with this fee.
    RefundPaid { payment_hash: String, fee_msat: u64 },
    /// The wallet will not pay it.
    RefundFailed { payment_hash: String, reason: String },
    /// A debt is given up.
    WrittenOff { note: String },
    /// Undoes another transfer, leg by leg.
    Correction { of: String, note: String },
    /// What the wallet moved without us, found by comparing.
    Reconciled { payment_hash: String, note: String },
}

/// An amount in dollars and the rate that made msat of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usd {
    /// Nano-dollars.
    pub nano: u64,
    /// Msat for one dollar.
    pub msat_per_usd: u64,
    /// Who says so.
    pub source: String,
}

/// What reports sort by.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    pub customer: PublicKey,
    pub skill: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repo: Option<String>,
    pub backend: String,
    pub agent: String,
    /// Part of what was earned that the customer has not paid yet, msat.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unpaid_msat: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Transfer {
    /// Msat that this transfer adds to an account (debits less credits).
    pub fn net_msat(&self, account: &Account) -> i128 {
        let mut net = 0_i128;
        for leg in &self.legs {
            if leg.to == *account {
                net += i128::from(leg.msat);
            }
            if leg.from == *account {
                net -= i128::from(leg.msat);
            }
        }
        net
    }

    /// Every account that it touches, once each, with what it adds there.
    pub fn nets(&self) -> Vec<(&Account, i128)> {
        let mut nets: Vec<(&Account, i128)> = Vec::with_capacity(self.legs.len() + 1);
        let mut add = |account, msat| match nets.iter_mut().find(|(a, _)| *a == account) {
            Some((_, net)) => *net += msat,
            None => nets.push((account, msat)),
        };
        for leg in &self.legs {
            add(&leg.from, -i128::from(leg.msat));
            add(&leg.to, i128::from(leg.msat));
        }
        nets
    }

    /// The customer whose books it stands in.
    pub fn customer(&self) -> Option<&str> {
        let named = self.legs.iter().find_map(|leg| leg.from.customer().or(leg.to.customer()));
        named.or(self.about.as_ref().map(|about| about.customer.as_str()))
    }

    /// What counts against a budget: whose (a customer's key, or [`NODE`]) and how many msat. A customer spends what it
    /// is charged, the node what jobs cost it.
    pub fn spends(&self) -> Option<(&str, u64)> {
        let sum =
            |counts: fn(&Leg) -> bool| self.legs.iter().filter(|leg| counts(leg)).map(|leg| leg.msat).sum();
        match &self.why {
            Why::Capture { .. } => {
                let charged = sum(|leg| matches!(leg.from, Account::Revenue { .. }));
                Some((self.customer()?, charged))
            }
            Why::Cost { .. } => Some((NODE, sum(|_| true))),
            _ => None,
        }
    }

    /// What is wrong with its form, whatever the books say.
    pub fn malformed(&self) -> Option<&'static str> {
        let id_ok = (1..=TRANSFER_ID_MAX_BYTES).contains(&self.id.len()) && self.id.is_ascii();
        if !id_ok {
            return Some("its id is not 1 to 160 bytes of ASCII");
        }
        if self.legs.is_empty() || self.legs.len() > LEGS_MAX {
            return Some("it has no leg, or more than 64");
        }
        if self.legs.iter().any(|leg| leg.msat == 0 || leg.msat > LEG_MAX_MSAT) {
            return Some("a leg moves nothing, or more than there is");
        }
        if self.legs.iter().any(|leg| leg.from == leg.to) {
            return Some("a leg leads to where it comes from");
        }
        // What the log cannot read back must not be written.
        if !self.legs.iter().all(|leg| leg.from.reads_back() && leg.to.reads_back()) {
            return Some("an account's name has characters that accounts do not have");
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> String {
        "ab".repeat(32)
    }

    #[test]
    fn every_account_reads_back_from_its_name_and_nothing_else_does() {
        let all = [
            Account::Credit(key()),
            Account::Held(key()),
            Account::Refunding(key()),
            Account::Revenue { skill: "code".into(), place: "local".into() },
            Account::ModelCost("glm-4.6".into()),
            Account::ContainerCost("docker".into()),
            Account::Supplier("cloudflare".into()),
            Account::Wallet("lnbits".into()),
            Account::Locked("nwc".into()),
            Account::Fees,
            Account::Grants,
            Account::WriteOff,
            Account::Suspense,
        ];
        for account in all {
            assert!(account.reads_back());
            assert_eq!(account.to_string().parse(), Ok(account));
        }
        for misspelled in [
            Account::Credit("AB".repeat(32)),
            Account::Held(String::new()),
            Account::Revenue { skill: "a:b".into(), place: "local".into() },
            Account::Wallet("a b".into()),
            Account::Supplier("x".repeat(65)),
        ] {
            assert!(!misspelled.reads_back());
            assert_ne!(misspelled.to_string().parse(), Ok(misspelled));
        }
        for text in
            ["", "credit", "credit:", "credit:xy", "revenue:a", "revenue:a:b:c", "wallet:a b", "fees:x"]
        {
            assert!(text.parse::<Account>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_transfer_sums_to_zero_however_its_legs_are_drawn() {
        let legs = vec![
            Leg { from: Account::Held(key()), to: Account::Grants, msat: 7 },
            Leg { from: Account::Held(key()), to: Account::Credit(key()), msat: 5 },
            Leg { from: Account::Grants, to: Account::Fees, msat: LEG_MAX_MSAT },
        ];
        let transfer =
            Transfer { id: "x".into(), why: Why::Grant { note: String::new() }, legs, about: None };
        let nets = transfer.nets();
        assert_eq!(nets.iter().map(|(_, net)| net).sum::<i128>(), 0);
        assert!(nets.iter().all(|(account, net)| transfer.net_msat(account) == *net));
        assert_eq!(transfer.net_msat(&Account::Held(key())), -12);
        assert_eq!(transfer.malformed(), None);
    }
}
