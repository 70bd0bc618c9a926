//! A host that lacks something: the job is refused by name, and the doctor says how to mend it.

use std::process::{Command, Output};

use crate::common::{bench_with, helper};

/// Runs the program as root of a user namespace in which no further one can be made.
fn without_user_namespaces(args: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    Command::new("unshare")
        .args(["--user", "--map-root-user", "sh", "-c"])
        .args(["echo 0 > /proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\""])
        .arg(helper())
        .args(args)
        .env("HOME", dir.path())
        .env_remove("COINOP_TEST_HELPER")
        .output()
        .unwrap()
}

#[test]
fn without_user_namespaces_nothing_is_served_and_the_doctor_says_how_to_mend_it() {
    let test = "without_user_namespaces_nothing_is_served_and_the_doctor_says_how_to_mend_it";
    if bench_with(test, 0).is_none() {
        return;
    }
    let output = without_user_namespaces(&["doctor", "--offline", "--json"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(report["ok"], false);
    let rows: Vec<&serde_json::Value> =
        report["checks"].as_array().unwrap().iter().filter(|row| row["group"] == "sandbox").collect();
    let named = |name: &str| rows.iter().copied().filter(|row| row["name"] == name).collect::<Vec<_>>();
    let [need] = named("user_namespaces")[..] else { panic!("{said}") };
    assert!(need["ok"] == false && need["how"].as_str().unwrap().contains("make a user namespace"), "{need}");
    assert!(need["mend"].as_str().unwrap().contains("kernel.unprivileged_userns_clone=1"), "{need}");
    let refused = named("job type");
    assert_eq!(refused.len(), 4, "{said}");
    for row in refused {
        assert!(row["how"].as_str().unwrap().contains("cannot enforce user_namespaces"), "{row}");
    }
    assert_eq!(
        named("memory_bytes"),
        Vec::<&serde_json::Value>::new(),
        "no word of limits that are not there"
    );
}

#[test]
fn the_doctor_names_every_clause_of_the_policy() {
    if bench_with("the_doctor_names_every_clause_of_the_policy", 0).is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(helper())
        .args(["doctor", "--offline", "--json"])
        .env("HOME", dir.path())
        .env_remove("COINOP_TEST_HELPER")
        .output()
        .unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &report["ok"]), (Some(0), &true.into()), "{report}");
    let policy = serde_json::to_value(crate::common::policy()).unwrap();
    for clause in policy.as_object().unwrap().keys() {
        let rows = report["checks"].as_array().unwrap();
        let row = rows.iter().find(|row| row["group"] == "sandbox" && row["name"] == clause.as_str());
        assert!(row.is_some_and(|row| row["ok"] == true && row["how"] != ""), "no {clause} in {report}");
    }
}
