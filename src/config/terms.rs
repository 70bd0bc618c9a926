//! Who pays how: the operator's rules by customer, skill and backend, his prices over those of the job types, and his
//! wallet. Whether the money is there is the ledger's to say.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use nostr_sdk::prelude::PublicKey;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::settings::did_you_mean;
use crate::price::{MOST_MSAT, Price, Way};
use crate::store::money::is_name;
use crate::units;

/// Backends that rules and costs may name.
const BACKENDS: [&str; 2] = ["local", "docker"];
const PRICE_KEYS: [&str; 9] = [
    "customer",
    "base_msat",
    "per_second_msat",
    "per_1k_tokens_in_msat",
    "per_1k_tokens_out_msat",
    "per_gib_hour_msat",
    "minimum_msat",
    "ceiling_msat",
    "free_jobs_per_day",
];
const COST_KEYS: [&str; 4] = ["supplier", "per_second", "per_cpu_second", "per_gib_second"];
const RULE_KEYS: [&str; 4] = ["customer", "skill", "backend", "cap_msat"];

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

impl Payment {
    /// Whether this node asks for money at all, as far as this table says.
    pub fn charges(&self) -> bool {
        let pays = |rule: &Rule| rule.way != Way::Free;
        self.wallet != WalletChoice::None
            || !self.terms.prices.is_empty()
            || self.terms.rules.iter().any(pays)
    }
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
    /// Over the job type's own. One that is free says so.
    #[serde(deserialize_with = "prices")]
    pub prices: BTreeMap<PriceFor, Price>,
}

/// Which jobs a price is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PriceFor {
    /// `*`: all that have no price of their own.
    pub skill: String,
    /// `None`: all who have no price of their own.
    pub customer: Option<PublicKey>,
}

impl std::fmt::Display for PriceFor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.customer {
            None => write!(f, "{}", self.skill),
            Some(customer) => write!(f, "{} customer={}", self.skill, customer.to_hex()),
        }
    }
}

fn rules<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Rule>, D::Error> {
    let lines = Vec::<String>::deserialize(from)?;
    lines.iter().map(|line| line.parse().map_err(D::Error::custom)).collect()
}

fn prices<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<PriceFor, Price>, D::Error> {
    by_name(&Vec::<String>::deserialize(from)?, priced)
}

/// Lines by the name that each begins with; a name that comes twice is refused.
fn by_name<N: Ord + std::fmt::Display, T, E: serde::de::Error>(
    lines: &[String],
    read: fn(&str) -> Result<(N, T), String>,
) -> Result<BTreeMap<N, T>, E> {
    let mut all = BTreeMap::new();
    for line in lines {
        let (name, value) = read(line).map_err(E::custom)?;
        if all.contains_key(&name) {
            return Err(E::custom(format!("\"{name}\" is given twice")));
        }
        all.insert(name, value);
    }
    Ok(all)
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

    /// Whether somebody has said what this job type costs on this backend, or that it is free.
    pub fn decides(&self, skill: &str, own: &Price, backend: &str) -> bool {
        let free = |rule: &Rule| {
            let fits = |wanted: &Option<String>, name: &str| wanted.as_deref().is_none_or(|w| w == name);
            let all = rule.customer.is_none() && fits(&rule.skill, skill) && fits(&rule.backend, backend);
            all && rule.way == Way::Free
        };
        let given = [skill, "*"].into_iter().any(|name| self.given(name, None).is_some());
        given || !own.is_free() || self.rules.iter().any(free)
    }

    /// What a job of this type costs this customer here; `None`: whoever has no price of its own.
    pub fn price<'a>(&'a self, customer: Option<&PublicKey>, skill: &str, own: &'a Price) -> &'a Price {
        let of =
            |customer: Option<&PublicKey>| self.given(skill, customer).or_else(|| self.given("*", customer));
        customer.and_then(|customer| of(Some(customer))).or_else(|| of(None)).unwrap_or(own)
    }

    fn given(&self, skill: &str, customer: Option<&PublicKey>) -> Option<&Price> {
        self.prices.get(&PriceFor { skill: skill.to_owned(), customer: customer.copied() })
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
                "backend" => backend.replace(known_backend(value).map_err(|why| bad(&why))?).is_some(),
                "cap_msat" => {
                    let cap = units::msat(value).ok().filter(|cap| *cap <= MOST_MSAT);
                    cap_msat
                        .replace(cap.ok_or_else(|| bad("cap_msat is no number up to one bitcoin"))?)
                        .is_some()
                }
                _ => return Err(bad(&unknown_key(key, &RULE_KEYS))),
            };
            if twice {
                return Err(bad(&given_twice(key)));
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

fn known_backend(name: &str) -> Result<String, String> {
    if BACKENDS.contains(&name) {
        return Ok(name.to_owned());
    }
    Err(format!("unknown backend {name:?}{}", did_you_mean(name, BACKENDS)))
}

fn unknown_key(key: &str, known: &[&str]) -> String {
    let hint = did_you_mean(key, known.iter().copied());
    format!("unknown key {key}{hint} (the keys are {})", known.join(", "))
}

fn given_twice(key: &str) -> String {
    format!("the key {key} is given twice")
}

fn costs<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, Rent>, D::Error> {
    by_name(&Vec::<String>::deserialize(from)?, rented)
}

/// The words after a line's name, as keys with their values; none comes twice.
fn pairs<'a>(
    words: impl Iterator<Item = &'a str>,
    known: &[&str],
) -> Result<BTreeMap<&'a str, &'a str>, String> {
    let mut pairs = BTreeMap::new();
    for word in words {
        let (key, value) = word.split_once('=').ok_or_else(|| format!("want key=value, not {word:?}"))?;
        if !known.contains(&key) {
            return Err(unknown_key(key, known));
        }
        if pairs.insert(key, value).is_some() {
            return Err(given_twice(key));
        }
    }
    Ok(pairs)
}

/// The figure under a key, 0 where it is not given.
fn figure(pairs: &BTreeMap<&str, &str>, key: &str) -> Result<u64, String> {
    let Some(value) = pairs.get(key) else { return Ok(0) };
    match key.ends_with("_msat") {
        true => units::msat(value).map_err(|why| format!("{key}: {why}")),
        false => number(value).ok_or_else(|| format!("{key} is no whole number")),
    }
}

/// `backend key=value …`: supplier, and nano-dollars per_second, per_cpu_second, per_gib_second.
///
/// # Errors
/// A sentence about what is wrong.
pub fn rented(text: &str) -> Result<(String, Rent), String> {
    let bad = |why: String| format!("{text:?} is not a valid cost: {why}");
    let mut words = text.split_whitespace();
    let backend = words.next().filter(|word| !word.contains('='));
    let backend = known_backend(backend.ok_or_else(|| bad("name a backend first".into()))?).map_err(bad)?;
    let read = || {
        let pairs = pairs(words, &COST_KEYS)?;
        let supplier = pairs.get("supplier").map_or(backend.as_str(), |name| *name).to_owned();
        if !is_name(&supplier) {
            return Err(format!("{supplier:?} is no supplier's name"));
        }
        Ok(Rent {
            supplier,
            per_second: figure(&pairs, "per_second")?,
            per_cpu_second: figure(&pairs, "per_cpu_second")?,
            per_gib_second: figure(&pairs, "per_gib_second")?,
        })
    };
    let rent = read().map_err(bad)?;
    Ok((backend, rent))
}

/// `skill key=value …` with the keys of `[price]` in a `job.toml`, or `skill free`; with `customer=` for one alone.
///
/// # Errors
/// A sentence about what is wrong.
pub fn priced(text: &str) -> Result<(PriceFor, Price), String> {
    let bad = |why: String| format!("{text:?} is not a valid price: {why}");
    let mut words = text.split_whitespace().peekable();
    let skill = words.next().filter(|word| !word.contains('='));
    let skill = skill.ok_or_else(|| bad("name a job type, or *, first".into()))?.to_owned();
    let free = words.next_if_eq(&"free").is_some();
    let pairs = pairs(words, &PRICE_KEYS).map_err(bad)?;
    let customer = pairs.get("customer").map(|key| PublicKey::parse(key)).transpose();
    let customer = customer.map_err(|_| bad("the customer is no npub or hex key".into()))?;
    let of = PriceFor { skill, customer };
    if free {
        return match pairs.keys().find(|key| **key != "customer") {
            None => Ok((of, Price::default())),
            Some(more) => Err(bad(format!("{more} after `free`"))),
        };
    }
    let read = || {
        Ok(Price {
            base_msat: figure(&pairs, "base_msat")?,
            per_second_msat: figure(&pairs, "per_second_msat")?,
            per_1k_tokens_in_msat: figure(&pairs, "per_1k_tokens_in_msat")?,
            per_1k_tokens_out_msat: figure(&pairs, "per_1k_tokens_out_msat")?,
            per_gib_hour_msat: figure(&pairs, "per_gib_hour_msat")?,
            minimum_msat: figure(&pairs, "minimum_msat")?,
            ceiling_msat: figure(&pairs, "ceiling_msat")?,
            free_jobs_per_day: figure(&pairs, "free_jobs_per_day")?,
        })
    };
    let price = read().map_err(bad)?;
    if let Some((key, why)) = price.fault() {
        return Err(bad(format!("{key}: {why}")));
    }
    if price.is_free() {
        return Err(bad(format!("nothing in it costs anything; what is free is \"{} free\"", of.skill)));
    }
    Ok((of, price))
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
            ("free skill=a skill=b", "skill is given twice"),
            ("free colour=red", "the keys are"),
            ("free backend=dokcer", "did you mean \"docker\"?"),
        ] {
            let refused = text.parse::<Rule>().unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }

    #[test]
    fn an_operators_price_stands_over_the_types_own() {
        let (of, price) = priced("generic base_msat=1_000 per_second_msat=10 ceiling_msat=50000").unwrap();
        assert_eq!((of.skill.as_str(), price.base_msat, price.ceiling_msat), ("generic", 1_000, 50_000));
        let own = Price { base_msat: 1, ..Price::default() };
        let terms = Terms { rules: Vec::new(), prices: [(of, price.clone())].into() };
        assert_eq!(terms.price(None, "generic", &own), &price);
        assert_eq!(terms.price(None, "code", &own), &own);
    }

    #[test]
    fn a_customers_own_price_stands_over_the_price_for_all() {
        let [alice, bob] = [(); 2].map(|()| Keys::generate().public_key());
        let lines = [
            "generic base_msat=10".to_owned(),
            "* base_msat=20".to_owned(),
            format!("generic base_msat=1 customer={}", alice.to_hex()),
            format!("* free customer={}", bob.to_hex()),
        ];
        let prices = lines.iter().map(|line| priced(line).unwrap()).collect();
        let (terms, own) = (Terms { rules: Vec::new(), prices }, Price::default());
        let of = |customer: Option<&PublicKey>, skill| terms.price(customer, skill, &own).base_msat;
        assert_eq!((of(Some(&alice), "generic"), of(Some(&alice), "code")), (1, 20));
        assert_eq!((of(Some(&bob), "generic"), of(Some(&bob), "code")), (0, 0));
        assert_eq!((of(None, "generic"), of(None, "docs")), (10, 20));
        // What one customer alone gets free is no price for all.
        let one = Terms { rules: Vec::new(), prices: [priced(&lines[3]).unwrap()].into() };
        assert!(!one.decides("code", &own, "local"));
        assert!(priced("generic base_msat=1 customer=npub1x").unwrap_err().contains("no npub"));
    }

    #[test]
    fn what_is_no_price_and_no_cost_says_what_is_wrong_with_it() {
        for (text, why) in [
            ("", "name a job type"),
            ("base_msat=1", "name a job type"),
            ("x y", "want key=value"),
            ("x base_sat=1", "did you mean \"base_msat\"?"),
            ("x base_msat=a", "not a number with a unit"),
            ("x free_jobs_per_day=a", "no whole number"),
            ("x minimum_msat=2 ceiling_msat=1", "above ceiling_msat"),
            ("x base_msat=1 base_msat=2", "base_msat is given twice"),
            ("x", "\"x free\""),
            ("x base_msat=0", "\"x free\""),
            ("x ceiling_msat=5", "\"x free\""),
            ("x free base_msat=1", "after `free`"),
        ] {
            let refused = priced(text).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
        let x = PriceFor { skill: "x".into(), customer: None };
        assert_eq!(priced("x free"), Ok((x, Price::default())));
        for (text, why) in [
            ("", "name a backend"),
            ("locla per_second=1", "did you mean \"local\"?"),
            ("docker per_second=1 per_second=2", "per_second is given twice"),
            ("docker supplier=a supplier=b", "supplier is given twice"),
            ("docker per_secund=1", "did you mean \"per_second\"?"),
        ] {
            let refused = rented(text).unwrap_err();
            assert!(refused.contains(why), "{text}: {refused}");
        }
    }

    #[test]
    fn a_job_type_is_decided_by_a_price_or_by_the_word_free_and_by_nothing_else() {
        let terms = |prices: &[&str], rules: &[&str]| Terms {
            rules: rules.iter().map(|rule| rule.parse().unwrap()).collect(),
            prices: prices.iter().map(|line| priced(line).unwrap()).collect(),
        };
        let nothing = Price::default();
        let key = Keys::generate().public_key().to_hex();
        let to_one = format!("free customer={key}");
        assert!(!terms(&["generic base_msat=1"], &[&to_one, "credit"]).decides("code", &nothing, "local"));
        assert!(!terms(&[], &["free skill=code backend=docker"]).decides("code", &nothing, "local"));
        assert!(terms(&["code base_msat=1"], &[]).decides("code", &nothing, "local"));
        assert!(terms(&["code free"], &[]).decides("code", &nothing, "local"));
        assert!(terms(&["* free"], &[]).decides("code", &nothing, "local"));
        assert!(terms(&[], &["free skill=code"]).decides("code", &nothing, "local"));
        assert!(terms(&[], &[]).decides("code", &Price { base_msat: 1, ..Price::default() }, "local"));
    }
}
