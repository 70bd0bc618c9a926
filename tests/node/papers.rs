//! What docs/faults.md promises is tested: every row names a test, and every test that it names is there.

use std::collections::BTreeSet;
use std::path::Path;

const FAULTS: &str = include_str!("../../docs/faults.md");

/// Names of all functions below `folder` that stand under a test's attribute.
fn tests_below(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            tests_below(&path, found);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            let text = std::fs::read_to_string(&path).expect("a source file");
            let mut under_test = false;
            for line in text.lines().map(str::trim) {
                under_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
                let Some((_, after)) = line.split_once("fn ") else { continue };
                // Or a case of the conformance suite, listed there or the compiler tells.
                if std::mem::take(&mut under_test) || line.contains("(on: &Fixture)") {
                    let name = after.chars().take_while(|c| c.is_alphanumeric() || *c == '_');
                    found.insert(name.collect());
                }
            }
        }
    }
}

#[test]
fn every_fault_names_a_test_and_every_test_named_exists() {
    let mut known = BTreeSet::new();
    for folder in ["src", "tests"] {
        tests_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &mut known);
    }
    let is_row = |line: &&str| line.starts_with("| ") && !line.ends_with("| test |");
    let rows: Vec<&str> = FAULTS.lines().filter(is_row).collect();
    assert!(rows.len() > 60, "only {} rows were found", rows.len());
    let mut wrong = Vec::new();
    for row in rows {
        let named = row.trim_end_matches(" |").rsplit(" | ").next().expect("a last cell");
        let names: Vec<&str> = named.split(", ").map(|name| name.trim_matches('`')).collect();
        wrong.extend(names.into_iter().filter(|name| !known.contains(*name)).map(|name| (name, row)));
    }
    assert!(wrong.is_empty(), "no such tests: {wrong:#?}");
}
