//! The books for other programs: an hledger journal, a beancount file, CSV, JSON lines. Each writes entry by entry, so a
//! large ledger costs time and no memory but for the names of its accounts.

use std::collections::HashSet;
use std::io::{self, Write};
use std::path::Path;

use serde_json::json;

use super::report::{TRANSFER, Window, day};
use crate::escape;
use crate::store::money::{Account, AccountKind, Transfer};
use crate::store::record::Record;
use crate::store::{self, Entry, Posted};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Hledger,
    Beancount,
    Csv,
    Jsonl,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("the export could not be written: {0}")]
    Write(#[from] io::Error),
}

/// Writes the transfers of a span of time. Returns how many. Blocks.
///
/// # Errors
/// The store's and the writer's.
pub fn export(data_dir: &Path, window: &Window, format: Format, to: &mut dyn Write) -> Result<u64, Error> {
    match format {
        Format::Hledger => writeln!(to, "; amounts in millisatoshi\ncommodity 1000. msat\n")?,
        Format::Beancount => writeln!(to, "; amounts in millisatoshi\n1970-01-01 commodity MSAT\n")?,
        Format::Csv => writeln!(to, "entry,at_ms,day,transfer,what,from,to,msat,customer,job")?,
        Format::Jsonl => {}
    }
    let mut count = 0;
    let mut declared = HashSet::new();
    let mut visit = |entry: Entry| {
        let Record::Transfer(transfer) = entry.record else { return Ok::<_, Error>(()) };
        count += 1;
        let day = day(entry.at_ms, &window.zone);
        match format {
            Format::Hledger => hledger(to, entry.seq, &day, &transfer, &mut declared)?,
            Format::Beancount => beancount(to, entry.seq, &day, &transfer, &mut declared)?,
            Format::Csv => csv(to, entry.seq, entry.at_ms, &day, &transfer)?,
            Format::Jsonl => {
                let posted = Posted { seq: entry.seq, at_ms: entry.at_ms, transfer };
                writeln!(to, "{}", escape::json(&json!(posted).to_string()))?;
            }
        }
        Ok(())
    };
    store::between(data_dir, window.from_ms, window.to_ms, TRANSFER, &mut visit)?;
    to.flush()?;
    Ok(count)
}

fn hledger(
    to: &mut dyn Write,
    seq: u64,
    day: &str,
    transfer: &Transfer,
    declared: &mut HashSet<String>,
) -> io::Result<()> {
    for (account, _) in transfer.nets() {
        let name = name(account);
        if !declared.contains(&name) {
            writeln!(to, "account {name}")?;
            declared.insert(name);
        }
    }
    writeln!(to, "{day} * ({seq}) {}", words(&transfer.id))?;
    for (account, net) in transfer.nets() {
        // Two spaces part the account from its amount.
        writeln!(to, "    {}  {net} msat", name(account))?;
    }
    writeln!(to)
}

fn beancount(
    to: &mut dyn Write,
    seq: u64,
    day: &str,
    transfer: &Transfer,
    declared: &mut HashSet<String>,
) -> io::Result<()> {
    for (account, _) in transfer.nets() {
        let name = beancount_name(account);
        if !declared.contains(&name) {
            // Entries that were written under a wrong clock may have any day.
            writeln!(to, "1970-01-01 open {name} MSAT")?;
            declared.insert(name);
        }
    }
    let words = words(&transfer.id).replace(['"', '\\'], " ");
    writeln!(to, "{day} * \"{words}\"\n  entry: {seq}")?;
    for (account, net) in transfer.nets() {
        writeln!(to, "  {}  {net} MSAT", beancount_name(account))?;
    }
    writeln!(to)
}

/// Beancount's accounts have parts of letters, digits and dashes that begin with a capital letter or a digit.
fn beancount_name(account: &Account) -> String {
    let kind = match account.kind() {
        AccountKind::Asset => "Assets",
        AccountKind::Liability => "Liabilities",
        AccountKind::Income => "Income",
        AccountKind::Expense => "Expenses",
    };
    let account = account.to_string();
    let parts = account.split(':').map(|part| {
        let mut name = String::new();
        for c in part.chars() {
            match c {
                c if name.is_empty() && c.is_ascii_alphanumeric() => name.push(c.to_ascii_uppercase()),
                c if c.is_ascii_alphanumeric() || (c == '-' && !name.is_empty()) => name.push(c),
                c => name.push_str(&format!("X{:02X}", u32::from(c))),
            }
        }
        name
    });
    std::iter::once(kind.to_owned()).chain(parts).collect::<Vec<_>>().join(":")
}

/// As hledger sorts accounts: by the first word.
fn name(account: &Account) -> String {
    let kind = match account.kind() {
        AccountKind::Asset => "assets",
        AccountKind::Liability => "liabilities",
        AccountKind::Income => "revenues",
        AccountKind::Expense => "expenses",
    };
    format!("{kind}:{account}")
}

/// What hledger would read as a comment or a bar between payee and note.
fn words(text: &str) -> String {
    text.chars().map(|c| if escape::is_unsafe(c) || matches!(c, ';' | '|') { ' ' } else { c }).collect()
}

fn csv(to: &mut dyn Write, seq: u64, at_ms: u64, day: &str, transfer: &Transfer) -> io::Result<()> {
    let value = serde_json::to_value(&transfer.why).unwrap_or_default();
    let text = |key: &str| value.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
    for leg in &transfer.legs {
        let (from, into) = (leg.from.to_string(), leg.to.to_string());
        let customer = transfer.customer().unwrap_or_default();
        let fields = [&transfer.id, &text("what"), &from, &into];
        let quoted: Vec<String> = fields.iter().map(|field| quoted(field)).collect();
        let msat = leg.msat;
        writeln!(
            to,
            "{seq},{at_ms},{day},{},{msat},{customer},{}",
            quoted.join(","),
            quoted_job(&text("job"))
        )?;
    }
    Ok(())
}

fn quoted_job(job: &str) -> String {
    if job.is_empty() { String::new() } else { quoted(job) }
}

/// A field of CSV (RFC 4180). What a spreadsheet would take for a formula gets a quote in front; a lone `-`, which stands
/// for none, is no formula.
pub fn quoted(field: &str) -> String {
    let formula = field != "-" && field.starts_with(['=', '+', '-', '@', '\t', '\r']);
    let field = escape::line(field).replace('"', "\"\"");
    format!("\"{}{field}\"", if formula { "'" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::{beancount_name, quoted};
    use crate::store::money::Account;

    #[test]
    fn beancounts_accounts_have_the_letters_that_it_knows() {
        let key = "ab".repeat(32);
        let told = |account: Account| beancount_name(&account);
        assert_eq!(told(Account::Credit(key.clone())), format!("Liabilities:Credit:A{}", &key[1..]));
        assert_eq!(told(Account::ModelCost("glm-4.6".into())), "Expenses:Cost:Model:Glm-4X2E6");
        assert_eq!(told(Account::WriteOff), "Expenses:Write-off");
        let skill = Account::Revenue { skill: "_x".into(), place: "local".into() };
        assert_eq!(told(skill), "Income:Revenue:X5Fx:Local");
    }

    #[test]
    fn a_formula_is_disarmed_and_the_sign_for_none_stays_what_it_is() {
        assert_eq!(quoted("-"), "\"-\"");
        for formula in ["=1+1", "-1", "--", "+1", "@x"] {
            assert_eq!(quoted(formula), format!("\"'{formula}\""));
        }
        assert_eq!(quoted("\tx"), "\"'\\tx\"", "control characters are escaped as well");
        assert_eq!(quoted("a\"b"), "\"a\"\"b\"");
    }
}
