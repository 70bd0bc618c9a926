//! What the operator is told about money: the prices in force and the state of the wallet, for the banner of `connect`
//! and for `doctor`. It asks the wallet and changes nothing.

use super::output;
use crate::config::Config;
use crate::market::{Catalog, Price};
use crate::wallet::{self, Wallet};

/// Each job type with its price in words.
pub fn prices(config: &Config, catalog: &Catalog) -> Vec<(String, String)> {
    let terms = &config.payment.terms;
    let row = |name: &str, own: &Price| (name.to_owned(), price(terms.price(None, name, own)));
    let all = catalog.types().map(|t| row(&t.manifest.name, &t.manifest.price));
    let own = terms.prices.iter().filter(|(of, _)| of.customer.is_some());
    all.chain(own.map(|(of, figures)| (of.to_string(), price(figures)))).collect()
}

/// The same on one line.
pub fn prices_line(config: &Config, catalog: &Catalog) -> String {
    let all = prices(config, catalog);
    if all.iter().all(|(_, price)| price == "free") {
        return "every job is free".into();
    }
    all.iter().map(|(name, price)| format!("{name} {price}")).collect::<Vec<_>>().join("; ")
}

fn price(price: &Price) -> String {
    if price.is_free() {
        return "free".into();
    }
    let figures = [
        (price.base_msat, ""),
        (price.per_second_msat, " per second"),
        (price.per_gib_hour_msat, " per GiB-hour"),
        (price.per_1k_tokens_in_msat, " per 1,000 tokens in"),
        (price.per_1k_tokens_out_msat, " per 1,000 tokens out"),
    ];
    let figures = figures.iter().filter(|(msat, _)| *msat > 0);
    let mut words = figures.map(|(msat, of)| output::sats(*msat) + of).collect::<Vec<_>>().join(" + ");
    for (msat, bound) in [(price.minimum_msat, "at least"), (price.ceiling_msat, "at most")] {
        if msat > 0 {
            let comma = if words.is_empty() { "" } else { ", " };
            words.push_str(&format!("{comma}{bound} {}", output::sats(msat)));
        }
    }
    if price.free_jobs_per_day > 0 {
        words.push_str(&format!(", {} free per customer and day", price.free_jobs_per_day));
    }
    words
}

/// What the wallet says of itself: that it answers, its balance, what it can do. One that cannot receive is an error.
///
/// # Errors
/// The wallet's.
pub async fn wallet_state(wallet: &dyn Wallet) -> Result<String, wallet::Error> {
    let can = wallet.abilities().await?;
    let balance_msat = wallet.balance_msat().await?;
    if !can.receive {
        let why = "this key does not let the node make invoices; give it one that may".to_owned();
        return Err(wallet::Error::Setup(why));
    }
    let yes_no = |can: bool, yes: &str, no: &str| if can { yes.to_owned() } else { no.to_owned() };
    Ok([
        format!("balance {}", output::signed_sats(balance_msat.into())),
        yes_no(can.pay, "can pay", "cannot pay refunds"),
        yes_no(can.history, "lists payments", "lists no payments (no `ledger reconcile`)"),
        yes_no(can.hold, "has hold invoices", "no hold invoices"),
    ]
    .join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_price_is_told_with_every_figure_that_counts() {
        let told = |line: &str| price(&crate::config::terms::priced(line).unwrap().1);
        assert_eq!(told("x free"), "free");
        assert_eq!(
            told("x base_msat=1_000 per_second_msat=100 ceiling_msat=50_000"),
            "1 sat + 0.100 sat per second, at most 50 sat"
        );
        assert_eq!(
            told("x minimum_msat=2_000 free_jobs_per_day=3"),
            "at least 2 sat, 3 free per customer and day"
        );
    }
}
