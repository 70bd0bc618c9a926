//! The table that the suite ends in: every attack, with its defence off and on every backend.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::case::{Case, NOT_SHOWN, Outcome};

type Key = (&'static str, &'static str);

/// By case and column. A case that was begun and has no outcome has failed.
#[derive(Clone, Default)]
pub struct Table(Arc<Mutex<BTreeMap<Key, Option<Outcome>>>>);

impl Table {
    pub fn record(&self, case: &'static str, column: &'static str, outcome: Option<Outcome>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert((case, column), outcome);
    }

    pub fn print(&self, cases: &[Case], columns: &[&'static str]) {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let cell = |case: &Case, column| match kept.get(&(case.name, column)) {
            None => String::new(),
            Some(None) => "FAILED".to_owned(),
            Some(Some(Ok(note))) => format!("✓ {note}"),
            Some(Some(Err(why))) if why.starts_with(NOT_SHOWN) => why.clone(),
            Some(Some(Err(why))) => format!("skipped: {why}"),
        };
        let rows: Vec<&Case> =
            cases.iter().filter(|case| kept.keys().any(|(name, _)| *name == case.name)).collect();
        println!();
        for case in &rows {
            println!("{} ({})", case.name, case.class);
            for column in columns.iter().filter(|column| kept.contains_key(&(case.name, column))) {
                println!("    {column:12} {}", cell(case, column));
            }
        }
        println!("\n{} attacks", rows.len());
        for column in columns {
            let of = |kind: fn(&Option<Outcome>) -> bool| {
                kept.iter().filter(|((_, name), how)| name == column && kind(how)).count()
            };
            let word = if columns.first() == Some(column) { "succeeded" } else { "held" };
            println!(
                "    {column:12} {} {word}, {} not shown or skipped, {} failed",
                of(|how| matches!(how, Some(Ok(_)))),
                of(|how| matches!(how, Some(Err(_)))),
                of(Option::is_none),
            );
        }
    }
}
