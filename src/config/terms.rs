//! Who pays how: the operator's rules by customer, skill and backend, his prices over those of the job types, and his
//! wallet. Whether the money is there is the ledger's to say.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use nostr_sdk::prelude::PublicKey;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::price::{MOST_MSAT, Price, Way};
use crate::store::money::is_name;
use crate::units;

/// One rule: the way, and whom and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub way: Way,
    pub customer: Option<PublicKey>,
    pub skill: Option<String>,
    pub backend: Option<String>,
}

/// The operator's word on money: the table `[payment]`.
#[derive(Debug, Clone, Deserialize)]
pub struct Payment {
    #[serde(flatten)]
    pub terms: Terms,
    /// What sandboxes cost the node, by backend.
    #[serde(deserialize_with = "costs")]
    pub costs: BTreeMap<String, Rent>,
    /// Msat for one US dollar; 0: costs are not booked.
    pub msat_per_usd: u64,
    /// Who says so, for the books.
    pub rate_source: String,
    /// Bounds of what is spent, msat; 0: none.
    pub customer_day_msat: u64,
    pub customer_week_msat: u64,
    pub node_day_msat: u64,
    pub node_week_msat: u64,
    /// How long a quote and its invoice hold.
    pub quote_ms: u64,
    /// Whether jobs are paid by hold invoices where the wallet has them.
    pub hold_invoices: bool,
    pub wallet: WalletChoice,
    /// Where LNbits answers.
    #[serde(deserialize_with = "super::some_text")]
    pub wallet_url: Option<String>,
    /// The file with the wallet's secret: an LNbits admin key, or a `nostr+walletconnect://` address.
    #[serde(deserialize_with = "super::some_path")]
    pub wallet_key_file: Option<PathBuf>,
}

/// What a backend's capacity costs, in nano-dollars, and to whom.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rent {
    pub supplier: String,
    /// A second of the sandbox's life.
    pub per_second: u64,
    /// A second of processor time.
    pub per_cpu_second: u64,
    /// A GiB of granted memory for a second.
    pub per_gib_second: u64,
}

impl Rent {
    /// Nano-dollars for one sandbox; `None` where they hang on a processor time that was not counted.
    pub fn of(&self, wall_ms: u64, cpu_ms: Option<u64>, memory_bytes: u64) -> Option<u64> {
        let cpu_ms = cpu_ms.or((self.per_cpu_second == 0).then_some(0))?;
        let per = |figure: u64, amount: u128, unit: u128| u128::from(figure).saturating_mul(amount) / unit;
        let memory = u128::from(memory_bytes) * u128::from(wall_ms);
        let sum = per(self.per_second, wall_ms.into(), 1_000)
            .saturating_add(per(self.per_cpu_second, cpu_ms.into(), 1_000))
            .saturating_add(per(self.per_gib_second, memory, 1_000 << 30));
        Some(u64::try_from(sum).unwrap_or(u64::MAX))
    }
}

/// Nano-dollars as msat at a rate, rounded up: a cost is never told smaller than it is.
pub fn msat_of(nano_usd: u64, msat_per_usd: u64) -> u64 {
    let msat = (u128::from(nano_usd) * u128::from(msat_per_usd)).div_ceil(1_000_000_000);
    u64::try_from(msat).unwrap_or(u64::MAX).min(MOST_MSAT)
}

/// Where sats come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WalletChoice {
    /// From nowhere: credit is granted by the owner.
    None,
    Lnbits,
    Nwc,
}

/// Prices and ways to pay.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Terms {
    /// The first that fits holds; none: [`Way::Invoice`].
    #[serde(deserialize_with = "rules")]
    pub rules: Vec<Rule>,
    /// By skill, `*` for all others; over the job type's own.
    #[serde(deserialize_with = "prices")]
    pub prices: BTreeMap<String, Price>,
}

fn rules<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Rule>, D::Error> {
    let lines = Vec::<String>::deserialize(from)?;
    lines.iter().map(|line| line.parse().map_err(D::Error::custom)).collect()
}

fn prices<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, Price>, D::Error> {
    let lines = Vec::<String>::deserialize(from)?;
    lines.iter().map(|line| priced(line).map_err(D::Error::custom)).collect()
}

impl Terms {
    pub fn way(&self, customer: &PublicKey, skill: &str, backend: &str) -> Way {
        let fits = |rule: &&Rule| {
            rule.customer.is_none_or(|key| key == *customer)
                && rule.skill.as_deref().is_none_or(|name| name == skill)
                && rule.backend.as_deref().is_none_or(|name| name == backend)
        };
        self.rules.iter().find(fits).map_or(Way::Invoice, |rule| rule.way)
    }

    /// What a job of this type costs here.
    pub fn price<'a>(&'a self, skill: &str, own: &'a Price) -> &'a Price {
        self.prices.get(skill).or_else(|| self.prices.get("*")).unwrap_or(own)
    }
}

impl FromStr for Rule {
    type Err = String;

    /// `free`, `credit`, `invoice`, `after` or `line`, then `key=value`: customer, skill, backend, and cap_msat for the
    /// last two.
    fn from_str(text: &str) -> Result<Rule, String> {
        let bad = |why: &str| format!("{text:?} is no way to pay: {why}");
        let mut words = text.split_whitespace();
        let name = words.next().ok_or_else(|| bad("it says nothing"))?;
        let (mut customer, mut skill, mut backend, mut cap_msat) = (None, None, None, None);
        for word in words {
            let (key, value) = word.split_once('=').ok_or_else(|| bad("want key=value after the way"))?;
            let twice = match key {
                "customer" => {
                    let key =
                        PublicKey::parse(value).map_err(|_| bad("the customer is no npub or hex key"))?;
                    customer.replace(key).is_some()
                }
                "skill" => skill.replace(value.to_owned()).is_some(),
                "backend" => backend.replace(value.to_owned()).is_some(),
                "cap_msat" => {
                    let cap = units::msat(value).ok().filter(|cap| *cap <= MOST_MSAT);
                    cap_msat
                        .replace(cap.ok_or_else(|| bad("cap_msat is no number up to one bitcoin"))?)
                        .is_some()
                }
                _ => return Err(bad("the keys are customer, skill, backend and cap_msat")),
            };
            if twice {
                return Err(bad("a key stands there twice"));
            }
        }
        let way = match (name, cap_msat) {
            ("free", None) => Way::Free,
            ("credit", None) => Way::Credit,
            ("invoice", None) => Way::Invoice,
            ("line", Some(cap_msat)) => Way::Line { cap_msat },
            ("after", Some(cap_msat)) => Way::After { cap_msat },
            ("line" | "after", None) => return Err(bad("it needs cap_msat=…")),
            ("free" | "credit" | "invoice", Some(_)) => return Err(bad("cap_msat is for line and after")),
            _ => return Err(bad("the ways are free, credit, invoice, after and line")),
        };
        Ok(Rule { way, customer, skill, backend })
    }
}

fn costs<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, Rent>, D::Error> {
    let lines = Vec::<String>::deserialize(from)?;
    lines.iter().map(|line| rented(line).map_err(D::Error::custom)).collect()
}

/// `backend key=value …`: supplier, and nano-dollars per_second, per_cpu_second, per_gib_second.
///
/// # Errors
/// A sentence about what is wrong.
pub fn rented(text: &str) -> Result<(String, Rent), String> {
    let bad = |why: &str| format!("{text:?} is no cost: {why}");
    let mut words = text.split_whitespace();
    let backend =
        words.next().filter(|word| !word.contains('=')).ok_or_else(|| bad("want a backend first"))?;
    let mut rent = Rent { supplier: backend.to_owned(), ..Rent::default() };
    for word in words {
        let (key, value) = word.split_once('=').ok_or_else(|| bad("want key=value after the backend"))?;
        if key == "supplier" {
            rent.supplier =
                Some(value).filter(|name| is_name(name)).ok_or_else(|| bad("no supplier's name"))?.into();
            continue;
        }
        let value = number(value).ok_or_else(|| bad(&format!("{key} is no whole number")))?;
        *match key {
            "per_second" => &mut rent.per_second,
            "per_cpu_second" => &mut rent.per_cpu_second,
            "per_gib_second" => &mut rent.per_gib_second,
            _ => return Err(bad(&format!("{key} is not one of its keys"))),
        } = value;
    }
    Ok((backend.to_owned(), rent))
}

/// `skill key=value …` with the keys of `[price]` in a `job.toml`.
///
/// # Errors
/// A sentence about what is wrong.
pub fn priced(text: &str) -> Result<(String, Price), String> {
    let bad = |why: &str| format!("{text:?} is no price: {why}");
    let mut words = text.split_whitespace();
    let skill =
        words.next().filter(|word| !word.contains('=')).ok_or_else(|| bad("want a skill, or *, first"))?;
    let mut price = Price::default();
    for word in words {
        let (key, value) = word.split_once('=').ok_or_else(|| bad("want key=value after the skill"))?;
        let value = match key.ends_with("_msat") {
            true => units::msat(value).map_err(|why| bad(&format!("{key}: {why}")))?,
            false => number(value).ok_or_else(|| bad(&format!("{key} is no whole number")))?,
        };
        *match key {
            "base_msat" => &mut price.base_msat,
            "per_second_msat" => &mut price.per_second_msat,
            "per_1k_tokens_in_msat" => &mut price.per_1k_tokens_in_msat,
            "per_1k_tokens_out_msat" => &mut price.per_1k_tokens_out_msat,
            "per_gib_hour_msat" => &mut price.per_gib_hour_msat,
            "minimum_msat" => &mut price.minimum_msat,
            "ceiling_msat" => &mut price.ceiling_msat,
            "free_jobs_per_day" => &mut price.free_jobs_per_day,
            _ => return Err(bad(&format!("{key} is not one of its keys"))),
        } = value;
    }
    match price.fault() {
        Some((key, why)) => Err(bad(&format!("{key}: {why}"))),
        None => Ok((skill.to_owned(), price)),
    }
}

fn number(text: &str) -> Option<u64> {
    text.replace('_', "").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nostr_sdk::Keys;

    #[test]
    fn the_first_rule_that_fits_holds_and_an_invoice_without_one() {
        let (alice, bob) = (Keys::generate().public_key(), Keys::generate().public_key());
        let rules = [
            format!("line customer={} cap_msat=5_000 skill=code", alice.to_hex()),
            format!("free customer={}", alice.to_hex()),
            "credit backend=docker".to_owned(),
        ];
        let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        let terms = Terms { rules, prices: BTreeMap::new() };
        assert_eq!(terms.way(&alice, "code", "local"), Way::Line { cap_msat: 5_000 });
        assert_eq!(terms.way(&alice, "docs", "local"), Way::Free);
        assert_eq!(terms.way(&bob, "docs", "docker"), Way::Credit);
        assert_eq!(terms.way(&bob, "docs", "local"), Way::Invoice);
    }

    #[test]
    fn a_cost_that_hangs_on_a_processor_time_that_was_not_counted_is_not_known() {
        let rent = Rent { per_second: 1_000, ..Rent::default() };
        assert_eq!(rent.of(2_000, None, 0), Some(2_000));
        let by_cpu = Rent { per_cpu_second: 1_000, ..rent };
        assert_eq!((by_cpu.of(2_000, Some(500), 0), by_cpu.of(2_000, None, 0)), (Some(2_500), None));
    }

    #[test]
    fn what_is_no_rule_says_what_it_lacks() {
        for (text, why) in [
            ("", "says nothing"),
            ("gratis", "the ways are"),
            ("line", "needs cap_msat"),
            ("free cap_msat=1", "is for line and after"),
            ("after", "needs cap_msat"),
            ("line cap_msat=-1", "no number"),
            ("free customer=x", "no npub"),
            ("free skill", "key=value"),
            ("free skill=a skill=b", "twice"),
            ("free colour=red", "the keys are"),
        ] {
            let refused = text.parse::<Rule>().unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }

    #[test]
    fn an_operators_price_stands_over_the_types_own() {
        let (skill, price) = priced("generic base_msat=1_000 per_second_msat=10 ceiling_msat=50000").unwrap();
        assert_eq!((skill.as_str(), price.base_msat, price.ceiling_msat), ("generic", 1_000, 50_000));
        let own = Price { base_msat: 1, ..Price::default() };
        let terms = Terms { rules: Vec::new(), prices: [(skill, price.clone())].into() };
        assert_eq!(terms.price("generic", &own), &price);
        assert_eq!(terms.price("code", &own), &own);
        for text in ["", "base_msat=1", "x y", "x base=1", "x base_msat=a", "x minimum_msat=2 ceiling_msat=1"]
        {
            assert!(priced(text).is_err(), "{text}");
        }
    }
}
