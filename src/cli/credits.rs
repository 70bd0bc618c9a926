//! `coinop credits {list,owed,show,history,topup,grant,refund,write-off}`: what customers have with this node. A running
//! node is asked; without one the books are opened here. The rules are the ledger's, the order of things the desk's.

use std::time::Duration;

use clap::Subcommand;
use serde_json::Value;

use super::common::{Common, Overrides, block_on, node_key};
use super::exit::{Exit, Failure, OrExit, Outcome};
use super::output::{self, Cell, Table};
use crate::clock;
use crate::config::Config;
use crate::control::{self, Ask};
use crate::desk::{Desk, LIST_MOST, Order};
use crate::job::Till;
use crate::ledger::{Ledger, receivable};
use crate::node;
use crate::store::{Holder, Store};
use crate::units;

/// How long `topup --wait` looks for the payment.
const LOOK: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List customer balances
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List what customers owe, by age
    Owed {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one customer's balance
    Show {
        /// npub or hex
        customer: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List a customer's transfers, newest first
    History {
        /// npub or hex
        customer: String,
        /// At most this many
        #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=5_000))]
        limit: u32,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Create a top-up invoice and show its QR code
    Topup {
        /// npub or hex
        customer: String,
        /// How much: 5sat, or a number of millisatoshi; rounded up to a whole sat
        #[arg(value_name = "AMOUNT", value_parser = units::msat)]
        msat: u64,
        /// Wait until it is paid, at most this long: 90s, 15m, or a number of seconds
        #[arg(long, value_name = "TIME", value_parser = units::seconds)]
        wait: Option<u64>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Give a customer credit
    Grant {
        /// npub or hex
        customer: String,
        /// How much: 5sat, or a number of millisatoshi
        #[arg(value_name = "AMOUNT", value_parser = units::msat)]
        msat: u64,
        /// Reason, recorded in the ledger
        #[arg(long, default_value = "")]
        note: String,
        /// Idempotency key: repeating it has no effect
        #[arg(long, value_name = "NAME")]
        id: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Pay a customer's invoice out of its credit
    Refund {
        /// npub or hex
        customer: String,
        /// The customer's bolt11 invoice, with an amount
        bolt11: String,
        /// Maximum fee that the wallet may pay; the node bears it
        #[arg(long, value_name = "AMOUNT", default_value = "10sat", value_parser = units::msat)]
        max_fee: u64,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write off a customer's debt
    WriteOff {
        /// npub or hex
        customer: String,
        /// How much: 5sat, or a number of millisatoshi
        #[arg(value_name = "AMOUNT", value_parser = units::msat)]
        msat: u64,
        /// Reason, recorded in the ledger
        #[arg(long, default_value = "")]
        note: String,
        /// Idempotency key: repeating it has no effect
        #[arg(long, value_name = "NAME")]
        id: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl Command {
    fn customer(&self) -> Option<&str> {
        match self {
            Command::List { .. } | Command::Owed { .. } => None,
            Command::Show { customer, .. }
            | Command::History { customer, .. }
            | Command::Topup { customer, .. }
            | Command::Grant { customer, .. }
            | Command::Refund { customer, .. }
            | Command::WriteOff { customer, .. } => Some(customer),
        }
    }
}

pub fn run(args: Args, common: &Common) -> Outcome {
    if let Some(customer) = args.command.customer()
        && let Err(why) = super::request::provider(customer)
    {
        return Err(Failure::say(Exit::Usage, format!("{customer:?} is not a customer's key: {why}")));
    }
    let config = common.start_quietly(Overrides::default())?;
    match args.command {
        Command::List { json } => {
            let rows = Value::Array(list(&config)?);
            warn_unanswered(rows.as_array().map_or(&[][..], Vec::as_slice));
            shown(&rows, json, |rows| purses(rows.as_array().map_or(&[][..], Vec::as_slice)))
        }
        Command::Owed { json } => owed(&config, json),
        Command::Show { customer, json } => {
            let row = ask(&config, &Order::Show { customer })?;
            warn_unanswered(std::slice::from_ref(&row));
            shown(&row, json, |row| purses(std::slice::from_ref(row)))
        }
        Command::History { customer, limit, json } => {
            let limit = usize::try_from(limit).unwrap_or(usize::MAX);
            let rows = ask(&config, &Order::History { customer, limit })?;
            shown(&rows, json, history)
        }
        Command::Topup { customer, msat, wait, json } => topup(&config, customer, msat, wait, json),
        Command::Grant { customer, msat, note, id, json } => {
            let row = ask(&config, &Order::Grant { id: id.unwrap_or_else(name), customer, msat, note })?;
            shown(&row, json, |row| purses(std::slice::from_ref(row)))
        }
        Command::Refund { customer, bolt11, max_fee, json } => {
            let row = ask(&config, &Order::Refund { customer, bolt11, max_fee_msat: max_fee })?;
            if row["again"] == true {
                output::talk("this refund was ordered before; it is paid only once");
            }
            if row["fee_over_max"] == true {
                let fee = output::sats(row["fee_msat"].as_u64().unwrap_or_default());
                output::talk(&format!("warning: the wallet took a fee of {fee}, more than --max-fee"));
            }
            shown(&row, json, |row| purses(std::slice::from_ref(row)))
        }
        Command::WriteOff { customer, msat, note, id, json } => {
            let row = ask(&config, &Order::WriteOff { id: id.unwrap_or_else(name), customer, msat, note })?;
            shown(&row, json, |row| purses(std::slice::from_ref(row)))
        }
    }
}

/// A name for an order that has none.
fn name() -> String {
    nostr_sdk::Keys::generate().public_key().to_hex().chars().take(16).collect()
}

/// Every customer, page by page.
fn list(config: &Config) -> Result<Vec<Value>, Failure> {
    let mut rows: Vec<Value> = Vec::new();
    loop {
        let after = rows.last().and_then(|row| row["customer"].as_str()).map(str::to_owned);
        let page = ask(config, &Order::List { after })?;
        let page = page.as_array().map_or(&[][..], Vec::as_slice);
        rows.extend_from_slice(page);
        if page.len() < LIST_MOST {
            return Ok(rows);
        }
    }
}

/// Invoices of these customers that the wallet does not answer for.
fn warn_unanswered(rows: &[Value]) {
    for row in rows {
        for invoice in row["unanswered"].as_array().into_iter().flatten() {
            let text = |value: &Value| output::tame(value.as_str().unwrap_or_default(), 200);
            output::talk(&format!(
                "warning: {} look-ups of the invoice {} over {} of {} failed; a payment to it would not be seen: {}",
                invoice["failures"],
                output::short(&text(&invoice["payment_hash"])),
                output::sats(invoice["amount_msat"].as_u64().unwrap_or_default()),
                output::short(&text(&row["customer"])),
                text(&invoice["error"])
            ));
        }
    }
}

/// Asks the running node; without one, opens the books here.
pub(super) fn ask(config: &Config, order: &Order) -> Result<Value, Failure> {
    match control::ask(&config.data_dir, &Ask::Desk(serde_json::to_value(order)?)) {
        Err(control::Error::NotRunning(_)) => {}
        Err(error) => return Err(error).or_exit(Exit::Failure),
        Ok(answer) => return Ok(answer),
    }
    let key = node_key(config)?;
    let holder = Holder::new(key.keys().public_key().to_hex());
    let store = Store::open(&config.data_dir, &holder)?;
    let mut answer = None;
    block_on(async {
        let till = match node::open_wallet(config)? {
            Some(wallet) => Some(Till::open(wallet, config.payment.quote_ms, &store)?.0),
            None => None,
        };
        let desk = Desk::new(Ledger::new(store.clone()), till, key.keys().clone(), clock::system());
        answer = Some(desk.serve(order.clone()).await?);
        Ok(Exit::Ok)
    })?;
    store.close()?;
    answer.ok_or_else(|| Failure::say(Exit::Failure, "the desk did not answer"))
}

fn shown(value: &Value, as_json: bool, table: impl Fn(&Value) -> Table) -> Outcome {
    if as_json {
        output::json(value)?;
    } else {
        table(value).print()?;
    }
    Ok(Exit::Ok)
}

fn purses(rows: &[Value]) -> Table {
    let mut table = Table::new(&["customer", ">available", ">reserved", ">being refunded"]);
    for row in rows {
        let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let msat = |key: &str| Cell::from(output::signed_sats(row[key].as_i64().unwrap_or_default().into()));
        let cells = ["available_msat", "held_msat", "refunding_msat"].map(msat);
        table.row(std::iter::once(npub_of(&text("customer")).into()).chain(cells).collect());
    }
    table
}

/// As the customer's key was given; the books have it in hex.
fn npub_of(hex: &str) -> String {
    nostr_sdk::PublicKey::from_hex(hex).map_or_else(|_| hex.to_owned(), |key| crate::keys::npub(&key))
}

/// Read from the log, whether a node runs or not.
fn owed(config: &Config, as_json: bool) -> Outcome {
    let now_ms = clock::now_ms();
    let rows = receivable::receivables(&config.data_dir, now_ms)?;
    if as_json {
        output::json(&rows)?;
        return Ok(Exit::Ok);
    }
    let mut table =
        Table::new(&["customer", ">owed", ">up to 7 d", ">up to 30 d", ">up to 90 d", ">older", "since"]);
    for row in &rows {
        let mut cells = vec![Cell::from(row.customer.as_str()), output::sats(row.owed_msat).into()];
        cells.extend(row.by_age_msat.iter().map(|msat| Cell::from(output::sats(*msat))));
        cells.push(output::relative(row.since_ms, now_ms).into());
        table.row(cells);
    }
    table.print()?;
    let total = rows.iter().fold(0_u64, |sum, row| sum.saturating_add(row.owed_msat));
    output::talk(&format!("{} owed by {} customers", output::sats(total), rows.len()));
    Ok(Exit::Ok)
}

fn history(rows: &Value) -> Table {
    let mut table = Table::new(&[">entry", "what", "from", "to", ">amount"]);
    for posted in rows.as_array().into_iter().flatten() {
        let (entry, transfer) = (posted["seq"].to_string(), &posted["transfer"]);
        let what = transfer["why"]["what"].as_str().unwrap_or_default();
        for leg in transfer["legs"].as_array().into_iter().flatten() {
            let side = |key: &str| Cell::from(brief(leg[key].as_str().unwrap_or_default()));
            let msat = output::sats(leg["msat"].as_u64().unwrap_or_default());
            table.row(vec![entry.clone().into(), what.into(), side("from"), side("to"), msat.into()]);
        }
    }
    table
}

/// An account with a key in it, for a table.
fn brief(account: &str) -> String {
    account
        .split(':')
        .map(|part| if part.len() == 64 { output::short(part) } else { part.to_owned() })
        .fold(String::new(), |all, part| if all.is_empty() { part } else { format!("{all}:{part}") })
}

fn topup(config: &Config, customer: String, msat: u64, wait: Option<u64>, as_json: bool) -> Outcome {
    let invoice = ask(config, &Order::TopUp { customer, msat })?;
    let bolt11 = invoice["bolt11"].as_str().unwrap_or_default();
    if as_json {
        output::json(&invoice)?;
    } else {
        for line in qr(bolt11)? {
            output::data(&line)?;
        }
        output::data(bolt11)?;
        let amount = output::sats(invoice["amount_msat"].as_u64().unwrap_or_default());
        output::talk(&format!("{amount}; it becomes credit as soon as the wallet reports the payment"));
    }
    let Some(wait) = wait else { return Ok(Exit::Ok) };
    let payment_hash = invoice["payment_hash"].as_str().unwrap_or_default().to_owned();
    let until = std::time::Instant::now() + Duration::from_secs(wait);
    while std::time::Instant::now() < until {
        let found = ask(config, &Order::Invoice { payment_hash: payment_hash.clone() })?;
        if found["state"] == "paid" {
            output::talk("paid");
            return Ok(Exit::Ok);
        }
        std::thread::sleep(LOOK);
    }
    Err(Failure::say(Exit::Timeout, "not paid yet; it counts whenever it comes while the node runs"))
}

/// The invoice as blocks, two rows of modules a line, dark on light whatever the terminal is.
fn qr(bolt11: &str) -> Result<Vec<String>, Failure> {
    // Upper case is what the alphanumeric mode holds: a smaller code. Bech32 is the same in both.
    let text = format!("LIGHTNING:{}", bolt11.to_ascii_uppercase());
    let code = qrcode::QrCode::with_error_correction_level(text.as_bytes(), qrcode::EcLevel::L)?;
    let (width, dark) = (code.width(), code.to_colors());
    let quiet = 2;
    let at = |x: usize, y: usize| {
        let inside = (quiet..width + quiet).contains(&x) && (quiet..width + quiet).contains(&y);
        let module = inside.then(|| dark.get((y - quiet) * width + x - quiet)).flatten();
        module == Some(&qrcode::Color::Dark)
    };
    let side = width + 2 * quiet;
    let line = |y: usize| {
        let cell = |x: usize| match (at(x, y), at(x, y + 1)) {
            (false, false) => '█',
            (false, true) => '▀',
            (true, false) => '▄',
            (true, true) => ' ',
        };
        (0..side).map(cell).collect()
    };
    Ok((0..side).step_by(2).map(line).collect())
}
