//! The books for other programs: an hledger journal, CSV, JSON lines. Each writes entry by entry, so a large ledger
//! costs time and no memory.

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
        Format::Csv => writeln!(to, "entry,at_ms,day,transfer,what,from,to,msat,customer,job")?,
        Format::Jsonl => {}
    }
    let mut count = 0;
    let mut visit = |entry: Entry| {
        let Record::Transfer(transfer) = entry.record else { return Ok::<_, Error>(()) };
        count += 1;
        let day = day(entry.at_ms, &window.zone);
        match format {
            Format::Hledger => hledger(to, entry.seq, &day, &transfer)?,
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

fn hledger(to: &mut dyn Write, seq: u64, day: &str, transfer: &Transfer) -> io::Result<()> {
    writeln!(to, "{day} * ({seq}) {}", words(&transfer.id))?;
    for (account, net) in transfer.nets() {
        // Two spaces part the account from its amount.
        writeln!(to, "    {}  {net} msat", name(account))?;
    }
    writeln!(to)
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

/// A field of CSV (RFC 4180). What a spreadsheet would take for a formula gets a quote in front.
pub fn quoted(field: &str) -> String {
    let formula = field.starts_with(['=', '+', '-', '@', '\t', '\r']);
    let field = escape::line(field).replace('"', "\"\"");
    format!("\"{}{field}\"", if formula { "'" } else { "" })
}
