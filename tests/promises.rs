//! The documents that make promises name the tests that prove them: each of those tests exists. And every
//! decision has its own number.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The names of all tests in the Rust files below a folder.
fn tests_below(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            tests_below(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let mut marked = false;
            for line in text.lines().map(str::trim) {
                let name = line.trim_start_matches("async ").strip_prefix("fn ");
                match name.and_then(|n| n.split('(').next()) {
                    Some(name) if marked => drop(found.insert(name.into())),
                    // A case of the conformance suite, listed there or the compiler tells.
                    Some(name) if line.contains("(on: &Fixture)") => drop(found.insert(name.into())),
                    _ => {}
                }
                // Between the mark and the function only other attributes stand.
                let is_mark = line.starts_with("#[test]") || line.starts_with("#[tokio::test");
                marked = is_mark || (marked && line.starts_with("#["));
            }
        }
    }
}

/// The tests named in the last column of a document's table of promises.
fn named(document: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join(document)).unwrap();
    let (_, table) = text.split_once("| promise | test |").expect("a table of promises");
    let rows = table.lines().skip(2).take_while(|l| l.starts_with('|'));
    rows.flat_map(|row| {
        let column = row.trim_end_matches('|').rsplit('|').next().unwrap();
        let names: Vec<String> = column.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        assert!(!names.is_empty(), "{document}: a promise without a test: {row}");
        names
    })
    .collect()
}

#[test]
fn every_test_that_a_document_names_exists() {
    let mut all = BTreeSet::new();
    for folder in ["tests", "src"] {
        tests_below(&root().join(folder), &mut all);
    }
    for document in ["docs/store.md", "docs/repositories.md"] {
        let names = named(document);
        assert!(names.len() > 15, "{document} names {} tests", names.len());
        for name in names {
            assert!(all.contains(&name), "{document} names the test {name}, which does not exist");
        }
    }
}

#[test]
fn every_decision_has_a_number_of_its_own() {
    let mut numbers: BTreeMap<String, String> = BTreeMap::new();
    for entry in std::fs::read_dir(root().join("docs/decisions")).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let number = name.split('-').next().unwrap().to_owned();
        assert!(number.len() == 4 && number.bytes().all(|b| b.is_ascii_digit()), "{name}");
        if let Some(other) = numbers.insert(number, name.clone()) {
            panic!("{name} and {other} have one number");
        }
    }
}
