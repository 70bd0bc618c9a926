//! The one table that the suite ends in: every case, every backend, and how it went.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use crate::case::{Case, Verdict};
use crate::fixtures::Column;

type Key = (&'static str, &'static str);

/// What is known so far, by case and backend. A case that was begun and has no verdict has failed.
#[derive(Clone, Default)]
pub struct Table(Arc<Mutex<BTreeMap<Key, Option<Verdict>>>>);

impl Table {
    pub fn record(&self, case: &'static str, backend: &'static str, verdict: Option<Verdict>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert((case, backend), verdict);
    }

    /// Cases that were filtered out have no row.
    pub fn print(&self, groups: &[(&str, Vec<Case>)], columns: &[Column]) {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rows = groups.iter().flat_map(|(group, cases)| cases.iter().map(move |case| (*group, case.name)));
        let rows: Vec<_> = rows.filter(|(_, case)| kept.keys().any(|(of, _)| of == case)).collect();
        let first = rows.iter().map(|(_, case)| case.len()).max().unwrap_or(0) + 2;
        let cells = |case: &'static str| columns.iter().map(move |column| (case, column.name));
        let notes: BTreeSet<&str> = kept.values().filter_map(|how| note(how.as_ref())).collect();
        let notes: Vec<&str> = notes.into_iter().collect();
        let cell = |key: Key| kept.get(&key).map_or(String::new(), |how| shown(how.as_ref(), &notes));
        let widths: Vec<usize> = columns
            .iter()
            .map(|column| {
                let all = rows.iter().map(|(_, case)| cell((case, column.name)).chars().count());
                all.chain([column.name.len()]).max().unwrap_or(0)
            })
            .collect();
        let line = |head: &str, cells: Vec<String>| {
            let mut line = format!("{head:first$}");
            for (cell, width) in cells.into_iter().zip(&widths) {
                line.push_str(&format!("  {cell:width$}"));
            }
            println!("{}", line.trim_end());
        };
        println!();
        line("case", columns.iter().map(|column| column.name.to_owned()).collect());
        let mut last = "";
        for (group, case) in &rows {
            if *group != last {
                println!("{group}");
                last = group;
            }
            line(&format!("  {case}"), cells(case).map(cell).collect());
        }
        println!();
        for (n, note) in notes.iter().enumerate() {
            println!("[{}] {note}", n + 1);
        }
        println!("\n{} cases on {} backends", rows.len(), columns.len());
        for column in columns {
            let of = |kind: fn(&Option<Verdict>) -> bool| {
                kept.iter().filter(|((_, backend), how)| *backend == column.name && kind(how)).count()
            };
            println!(
                "  {:10} {:4} held, {} refused, {} skipped, {} failed",
                column.name,
                of(|how| matches!(how, Some(Verdict::Held))),
                of(|how| matches!(how, Some(Verdict::Refused { .. }))),
                of(|how| matches!(how, Some(Verdict::Skipped { .. }))),
                of(Option::is_none),
            );
        }
    }
}

/// Why it was refused or skipped; told once, below the table.
fn note(verdict: Option<&Verdict>) -> Option<&str> {
    match verdict? {
        Verdict::Held => None,
        Verdict::Refused { why, .. } | Verdict::Skipped { why } => Some(why),
    }
}

fn shown(verdict: Option<&Verdict>, notes: &[&str]) -> String {
    let at = note(verdict).and_then(|why| notes.iter().position(|note| *note == why));
    let at = at.map_or(0, |at| at + 1);
    match verdict {
        None => "✗".to_owned(),
        Some(Verdict::Held) => "✓".to_owned(),
        Some(Verdict::Refused { clause, .. }) => format!("refused: {clause} [{at}]"),
        Some(Verdict::Skipped { .. }) => format!("skipped [{at}]"),
    }
}
