//! `coinop ledger {show,verify,seal,export,reconcile,correct,backup,restore}`: the books of this node, checked, signed,
//! copied and handed to other programs. All but `restore` work whether a node runs or not.

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::common::{Common, Overrides};
use super::exit::{Exit, Failure, OrExit, Outcome};
use super::output::{self, Table};
use super::span::Span;
use crate::clock;
use crate::config::Config;
use crate::desk::Order;
use crate::ledger::{self, Seal, export};
use crate::store::{self, Head, Store};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List every account with its balance
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check every entry: checksums, hash chain, ledger rules, signed heads
    Verify {
        /// Check that an earlier head is still in the log: a file with the output of `ledger seal --json`, or ENTRY:HASH
        #[arg(long, value_name = "FILE|ENTRY:HASH")]
        against: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Sign the head of the log now; with a copy elsewhere, later changes can be detected
    Seal {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Export the transfers for another program
    Export {
        #[arg(long, value_enum, default_value = "hledger")]
        format: Format,
        #[command(flatten)]
        span: Span,
        /// Write to this new file instead of stdout
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Compare the wallet's list of payments with the books and report every difference
    Reconcile {
        #[command(flatten)]
        span: Span,
        /// Book the corrections that are safe: known payments to their customers' credit, unknown ones to suspense
        #[arg(long)]
        book: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Undo a transfer by another one: a payment, a grant, a cost or a write-off
    Correct {
        /// Its id, from `credits history --json` or an export
        transfer: String,
        /// Reason, recorded in the ledger
        #[arg(long, default_value = "")]
        note: String,
    },
    /// Copy log and kept output into a new folder, and check the copy
    Backup {
        /// A folder that does not exist yet
        to: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Replace this node's log by a checked backup; the old log is kept
    Restore {
        /// A folder made by `ledger backup`
        from: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Hledger,
    Beancount,
    Csv,
    Jsonl,
}

impl From<Format> for export::Format {
    fn from(format: Format) -> export::Format {
        match format {
            Format::Hledger => export::Format::Hledger,
            Format::Beancount => export::Format::Beancount,
            Format::Csv => export::Format::Csv,
            Format::Jsonl => export::Format::Jsonl,
        }
    }
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let config = common.start_quietly(Overrides::default())?;
    match args.command {
        Command::Show { json } => show(&config, json),
        Command::Verify { against, json } => verify(&config, against.as_deref(), json),
        Command::Seal { json } => seal(&config, json),
        Command::Export { format, span, output } => export(&config, format, &span, output),
        Command::Reconcile { span, book, json } => reconcile(&config, &span, book, json),
        Command::Correct { transfer, note } => {
            output::json(&super::credits::ask(&config, &Order::Correct { transfer, note })?)?;
            Ok(Exit::Ok)
        }
        Command::Backup { to, json } => backup(&config, &to, json),
        Command::Restore { from, json } => restore(&config, &from, json),
    }
}

fn show(config: &Config, as_json: bool) -> Outcome {
    let store = Store::read_only(&config.data_dir)?;
    let balances = store.balances()?;
    let sealed = ledger::last_seal(&store).or_exit(Exit::Unverified)?;
    if as_json {
        let rows = balances.iter().map(|(account, msat)| {
            let Ok(msat) = i64::try_from(*msat) else {
                let why = format!("{account} has {msat} msat, more than can be counted");
                return Err(Failure::say(Exit::Unverified, why));
            };
            Ok(json!({ "account": account, "kind": account.kind(), "msat": msat }))
        });
        let rows = rows.collect::<Result<Vec<_>, _>>()?;
        output::json(&json!({ "head": store.head(), "accounts": rows, "last_seal": sealed }))?;
        return Ok(Exit::Ok);
    }
    let mut table = Table::new(&["account", "kind", ">debits less credits"]);
    for (account, msat) in &balances {
        let kind = serde_json::to_value(account.kind())?;
        let cells =
            [account.to_string(), kind.as_str().unwrap_or_default().to_owned(), output::signed_sats(*msat)];
        table.row(cells.map(Into::into).into());
    }
    table.print()?;
    output::talk(&format!(
        "{} open holds; head {} {}",
        store.holds()?.len(),
        store.head().seq,
        store.head().hash
    ));
    output::talk(&newest(sealed.as_ref()));
    Ok(Exit::Ok)
}

/// The newest signed head in a line.
fn newest(seal: Option<&Seal>) -> String {
    match seal {
        Some(Seal { head, at_s, .. }) => {
            let when = output::relative(at_s.saturating_mul(1_000), clock::now_ms());
            format!("signed {when}: head {} {}", head.seq, head.hash)
        }
        None => "never signed; run `coinop ledger seal`".into(),
    }
}

fn seal(config: &Config, as_json: bool) -> Outcome {
    let told = super::credits::ask(config, &Order::Seal)?;
    if as_json {
        output::json(&told)?;
        return Ok(Exit::Ok);
    }
    let seal: Seal = serde_json::from_value(told)?;
    let mut table = Table::pairs();
    for (name, value) in [
        ("entry", seal.head.seq.to_string()),
        ("hash", seal.head.hash),
        ("signed by", seal.by),
        ("event", seal.event.id.to_hex()),
    ] {
        table.row(vec![name.into(), value.into()]);
    }
    table.print()?;
    output::talk("Stored in the log; keep a copy elsewhere (--json prints the whole event)");
    Ok(Exit::Ok)
}

/// A head that was noted, and who signed it where it is signed.
fn noted(note: &str) -> Result<(Head, Option<String>), Failure> {
    let head = note.split_once(':').and_then(|(seq, hash)| {
        let is_hash = hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit());
        is_hash.then_some(Head { seq: seq.parse().ok()?, hash: hash.to_ascii_lowercase() })
    });
    if let Some(head) = head {
        return Ok((head, None));
    }
    let text = std::fs::read_to_string(note).map_err(|e| {
        Failure::say(Exit::Usage, format!("--against {note}: neither ENTRY:HASH nor a file: {e}"))
    })?;
    match Seal::from_note(&text) {
        Some(seal) => Ok((seal.head, Some(seal.by))),
        None => Err(Failure::say(Exit::Unverified, format!("{note} holds no signed head of a log"))),
    }
}

fn verify(config: &Config, against: Option<&str>, as_json: bool) -> Outcome {
    let noted = against.map(noted).transpose()?;
    let verified = ledger::verify_log(&config.data_dir).and_then(|verified| {
        if let Some((head, by)) = &noted {
            ledger::verify_against(&config.data_dir, &verified, head, by.as_deref())?;
        }
        Ok(verified)
    });
    match verified {
        Ok(verified) if as_json => output::json(&json!({ "ok": true, "verified": verified }))?,
        Ok(verified) => {
            output::data(&format!(
                "OK: {} entries, {} transfers; {} accounts, balances sum to {}; {} open holds; {} signed heads; head {}",
                output::thousands(verified.head.seq),
                output::thousands(verified.transfers),
                verified.accounts,
                verified.sum_msat,
                verified.open_holds,
                verified.seals,
                verified.head.hash
            ))?;
            output::talk(&newest(verified.last_seal.as_ref()));
            if let Some((head, _)) = &noted {
                output::talk(&format!("entry {} is the one that was noted", head.seq));
            }
        }
        Err(broken) => {
            if as_json {
                output::json(&json!({ "ok": false, "error": broken.to_string(), "entry": broken.entry() }))?;
            }
            let exit = match &broken {
                ledger::Broken::Store(store::Error::Missing { .. } | store::Error::Unreadable { .. }) => {
                    Exit::Store
                }
                _ => Exit::Unverified,
            };
            return Err(Failure::new(exit, broken));
        }
    }
    Ok(Exit::Ok)
}

fn export(config: &Config, format: Format, span: &Span, to: Option<PathBuf>) -> Outcome {
    let window = span.window()?;
    let written = match &to {
        Some(path) => {
            let file = std::fs::File::create_new(path)
                .map_err(|e| Failure::say(Exit::Failure, format!("{}: {e}", path.display())))?;
            let mut file = BufWriter::new(file);
            let written = export::export(&config.data_dir, &window, format.into(), &mut file);
            file.flush()?;
            written
        }
        None => {
            let mut stdout = BufWriter::new(std::io::stdout().lock());
            export::export(&config.data_dir, &window, format.into(), &mut stdout)
        }
    };
    match written {
        Ok(count) => output::talk(&format!("{} transfers", output::thousands(count))),
        Err(export::Error::Store(error)) => return Err(error.into()),
        Err(export::Error::Write(error)) => return Err(error.into()),
    }
    Ok(Exit::Ok)
}

fn reconcile(config: &Config, span: &Span, book: bool, as_json: bool) -> Outcome {
    let window = span.window()?;
    let order = Order::Reconcile { from_ms: window.from_ms, to_ms: window.to_ms, book };
    let told = super::credits::ask(config, &order)?;
    let clean = told["clean"] == true;
    let rest_msat = told["balance"]["rest_msat"].as_i64().unwrap_or_default();
    let unreadable = told["unreadable"].as_array().is_some_and(|odd| !odd.is_empty());
    if as_json {
        output::json(&told)?;
    } else {
        differences(&told).print()?;
        for line in summary(&told) {
            output::talk(&line);
        }
    }
    // What came before the window explains a rest; over all time nothing does.
    let off = told["whole"] == true && rest_msat != 0;
    match (clean, off) {
        (true, false) => Ok(Exit::Ok),
        (true, true) => {
            let words = "the balances differ by more than the payments explain";
            Err(Failure::say(Exit::Unverified, words))
        }
        (false, _) if unreadable => {
            let words = "the wallet's answer could not be read as a whole: not everything was compared";
            Err(Failure::say(Exit::Unverified, words))
        }
        (false, _) => {
            let words = "wallet and books differ; --book books the corrections that are safe, the rest is for you to decide";
            Err(Failure::say(Exit::Unverified, words))
        }
    }
}

fn differences(told: &Value) -> Table {
    let mut table = Table::new(&["payment", "way", "what", ">wallet", ">fee", "done"]);
    for row in told["differences"].as_array().into_iter().flatten() {
        let text = |key: &str| row[key].as_str().unwrap_or_default();
        let msat = |key: &str| output::sats(row[key].as_u64().unwrap_or_default());
        let cells = [
            output::short(text("payment_hash")),
            text("way").to_owned(),
            text("what").replace('_', " "),
            msat("wallet_msat"),
            msat("fee_msat"),
            text("done").to_owned(),
        ];
        table.row(cells.map(Into::into).into());
    }
    table
}

fn summary(told: &Value) -> Vec<String> {
    let count = |key: &str| output::thousands(told[key].as_u64().unwrap_or_default());
    let msat = |key: &str| match told["balance"][key].as_i64() {
        Some(msat) => output::signed_sats(msat.into()),
        None => "an unknown amount".to_owned(),
    };
    let wallet = output::tame(told["wallet"].as_str().unwrap_or_default(), 100);
    let mut lines = vec![
        format!(
            "{wallet}: {} entries, {} agree with the books, {} moved nothing, {} booked now",
            count("read"),
            count("matched"),
            count("unmoved"),
            count("booked")
        ),
        format!(
            "the wallet has {}, the books say {}; the differences explain {}, and {} stay unexplained",
            msat("wallet_msat"),
            msat("books_msat"),
            msat("explained_msat"),
            msat("rest_msat")
        ),
    ];
    for odd in told["unreadable"].as_array().into_iter().flatten().take(20) {
        let hash = odd["payment_hash"].as_str().map_or("without a hash".to_owned(), output::short);
        let why = output::tame(odd["why"].as_str().unwrap_or_default(), 200);
        lines.push(format!("unreadable, and not compared: a payment {hash}: {why}"));
    }
    if told["restored"] == true {
        lines.push(
            "this ledger was restored from a backup: refunds wait until `coinop ledger reconcile --book` over all time has booked every payment that left the wallet"
                .into(),
        );
    }
    if told["left_out"] != 0 {
        lines.push(format!("{} more differences are not listed: narrow the period", count("left_out")));
    }
    lines
}

fn backup(config: &Config, to: &std::path::Path, as_json: bool) -> Outcome {
    let head = Store::backup_of(&config.data_dir, to)?;
    copied(&format!("copied to {}", to.display()), &head, as_json)
}

fn restore(config: &Config, from: &std::path::Path, as_json: bool) -> Outcome {
    ledger::verify_log(from).or_exit(Exit::Unverified)?;
    let (head, aside) = Store::restore(&config.data_dir, from)?;
    if let Some(aside) = aside {
        output::talk(&format!("Kept the old log in {}", aside.display()));
    }
    output::talk(
        "refunds wait until `coinop ledger reconcile --book` has compared the restored ledger with the wallet",
    );
    copied("restored", &head, as_json)
}

fn copied(what: &str, head: &store::Head, as_json: bool) -> Outcome {
    if as_json {
        output::json(&json!({ "head": head }))?;
    } else {
        output::talk(&format!("{what}; head {} {}", head.seq, head.hash));
    }
    Ok(Exit::Ok)
}
