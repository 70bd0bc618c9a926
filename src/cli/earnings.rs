//! `coinop earnings`: revenue, costs and profit of a period, from the entries of the log. Reads whether a node runs or
//! not.

use clap::ValueEnum;

use super::common::{Common, Overrides};
use super::exit::{Exit, Outcome};
use super::output::{self, Cell, Table, Tone};
use super::span::Span;
use crate::ledger::export::quoted;
use crate::ledger::report::{self, By, Report, Sums};
use crate::store;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub span: Span,
    /// How to group the rows
    #[arg(long, value_enum, default_value = "day")]
    pub by: Rows,
    /// Output format
    #[arg(long, value_enum, default_value = "table")]
    pub format: Format,
    /// Print JSON, as --format json
    #[arg(long, conflicts_with = "format")]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rows {
    Day,
    Month,
    Skill,
    Customer,
    Repo,
    Backend,
    Agent,
}

impl From<Rows> for By {
    fn from(rows: Rows) -> By {
        match rows {
            Rows::Day => By::Day,
            Rows::Month => By::Month,
            Rows::Skill => By::Skill,
            Rows::Customer => By::Customer,
            Rows::Repo => By::Repo,
            Rows::Backend => By::Backend,
            Rows::Agent => By::Agent,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
    Csv,
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let config = common.start_quietly(Overrides::default())?;
    let window = args.span.window()?;
    let report = match report::report(&config.data_dir, &window, args.by.into()) {
        Err(store::Error::Missing { .. }) => Report {
            from_ms: window.from_ms,
            to_ms: window.ends_ms(),
            zone: String::new(),
            by: args.by.into(),
            rows: Vec::new(),
            total: Sums::default(),
        },
        report => report?,
    };
    match if args.json { Format::Json } else { args.format } {
        Format::Table => table(&report)?,
        Format::Json => output::json(&report)?,
        Format::Csv => csv(&report)?,
    }
    Ok(Exit::Ok)
}

/// Each column of figures: its name for people, for programs, and where it stands.
type Column = (&'static str, &'static str, fn(&Sums) -> i128);
const COLUMNS: [Column; 9] = [
    (">revenue", "revenue_msat", |s| s.revenue_msat),
    (">models", "model_cost_msat", |s| s.model_cost_msat),
    (">containers", "container_cost_msat", |s| s.container_cost_msat),
    (">fees", "fees_msat", |s| s.fees_msat),
    (">grants", "grants_msat", |s| s.grants_msat),
    (">written off", "written_off_msat", |s| s.written_off_msat),
    (">profit", "profit_msat", |s| s.profit_msat),
    (">refunds", "refunds_msat", |s| s.refunds_msat),
    (">unpaid", "unpaid_msat", |s| s.unpaid_msat),
];

fn table(report: &Report) -> std::io::Result<()> {
    let names: Vec<&str> = ["", ">jobs"].into_iter().chain(COLUMNS.iter().map(|(name, ..)| *name)).collect();
    let mut table = Table::new(&names);
    let total = ("total", &report.total);
    for (key, sums) in report.rows.iter().map(|row| (row.key.as_str(), &row.sums)).chain([total]) {
        let key = if key.len() == 64 { output::short(key) } else { output::tame(key, 60) };
        let mut cells = vec![Cell::from(key), output::thousands(sums.jobs).into()];
        for (name, _, figure) in COLUMNS {
            let tone = if name == ">profit" && figure(sums) < 0 { Tone::Bad } else { Tone::Plain };
            cells.push(Cell::toned(output::signed_sats(figure(sums)), tone));
        }
        table.row(cells);
    }
    table.print()
}

fn csv(report: &Report) -> std::io::Result<()> {
    let by = serde_json::to_value(report.by).unwrap_or_default();
    let names: Vec<&str> = COLUMNS.iter().map(|(_, name, _)| *name).collect();
    output::data(&format!("{},jobs,{}", by.as_str().unwrap_or("key"), names.join(",")))?;
    for row in &report.rows {
        let figures: Vec<String> =
            COLUMNS.iter().map(|(_, _, figure)| figure(&row.sums).to_string()).collect();
        output::data(&format!("{},{},{}", quoted(&row.key), row.sums.jobs, figures.join(",")))?;
    }
    Ok(())
}
