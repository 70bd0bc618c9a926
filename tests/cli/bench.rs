//! `coinop bench tti` and `bench ledger`: what they report, small. How fast anything is has no part in it.

use super::{Home, Said};

fn lanes(report: &serde_json::Value, mode: &str) -> Vec<serde_json::Value> {
    let modes = report["tti"]["modes"].as_array().unwrap_or_else(|| panic!("no modes: {report}"));
    let found = modes.iter().find(|one| one["mode"] == mode).unwrap_or_else(|| panic!("no {mode}: {report}"));
    found["lanes"].as_array().unwrap().clone()
}

/// Nothing of an engine that this machine may have.
fn without_an_engine(home: &Home, args: &[&str]) -> Said {
    let nowhere = format!("docker.host=unix://{}/none", home.path().display());
    let all: Vec<&str> = ["bench", "tti"].iter().chain(args).copied().chain(["--set", &nowhere]).collect();
    Said::of(home.coinop(&all))
}

#[test]
fn tti_reports_every_mode_and_counts_every_start() {
    let home = Home::new();
    let said = without_an_engine(&home, &["--rounds", "8", "--json"]);
    assert_eq!(said.code, 0, "{said:?}");
    let report = said.json();
    for (mode, starts) in [("in_turn", 8), ("staggered", 8), ("at_once", 24)] {
        let lanes = lanes(&report, mode);
        assert!(lanes.iter().any(|lane| lane["name"] == "plain"), "{mode}: {report}");
        for lane in lanes {
            assert_eq!((&lane["starts"], &lane["successes"]), (&starts.into(), &starts.into()), "{lane}");
            let ms = |name: &str| lane[name].as_f64().unwrap();
            assert!(ms("min_ms") > 0.0 && ms("min_ms") <= ms("p50_ms") && ms("p95_ms") <= ms("p99_ms"));
        }
    }
    let skipped = report["tti"]["skipped"].as_array().unwrap();
    for lane in ["docker_warm", "docker_cold", "docker_run"] {
        let why = skipped.iter().find(|one| one["name"] == lane).map(|one| one["why"].as_str().unwrap());
        assert!(why.is_some_and(|why| why.contains("engine")), "{lane}: {report}");
    }
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0, "it cleans up");
}

#[test]
fn one_lane_in_one_mode_can_be_had_as_a_table() {
    let home = Home::new();
    let said = without_an_engine(&home, &["--rounds", "3", "--mode", "at_once", "--lane", "plain"]);
    assert_eq!(said.code, 0, "{said:?}");
    let row = said.data.lines().find(|line| line.starts_with("at_once  plain"));
    assert!(row.is_some_and(|row| row.ends_with("9/9")), "{}", said.data);
    assert!(!said.data.contains("in_turn") && !said.data.contains("bwrap"), "{}", said.data);
}

#[test]
fn the_soak_looks_at_the_memory_in_between() {
    let home = Home::new();
    let said = without_an_engine(
        &home,
        &["--rounds", "2", "--mode", "at_once", "--lane", "plain", "--soak", "20", "--json"],
    );
    let report = said.json();
    if report["tti"]["error"].is_string() {
        // This host makes no sandboxes: the refusal is told as it is.
        assert_eq!(said.code, 1, "{said:?}");
        return;
    }
    let soak = &report["tti"]["soak"];
    assert_eq!((&soak["sandboxes"], &soak["successes"]), (&20.into(), &20.into()), "{soak}");
    let looks = soak["looks"].as_array().unwrap();
    assert_eq!(looks.len(), 10);
    assert!(looks.iter().all(|look| look["node_bytes"].as_u64() > Some(0)), "{soak}");
}

#[test]
fn the_ledger_is_written_opened_both_ways_reported_and_checked() {
    let home = Home::new();
    let said = Said::of(home.coinop(&["bench", "ledger", "--entries", "3000", "--rounds", "1", "--json"]));
    let report = &said.json()["ledger"];
    if report["error"].is_string() {
        // This host makes no sandboxes, and a node that serves no job cannot be measured: that is told.
        assert_eq!(said.code, 1, "{said:?}");
        let why = report["error"].as_str().unwrap();
        assert!(why.contains("the node"), "{why}");
        return;
    }
    assert_eq!(said.code, 0, "{said:?}");
    // Books that come out otherwise than they were written are an error of the bench, so the figures stand for them.
    assert_eq!((&report["entries"], &report["commits"]["at_once"]), (&3_000.into(), &64.into()), "{report}");
    for figure in ["open_orderly", "open_power_cut", "report"] {
        let s = |name: &str| report[figure][name].as_f64().unwrap();
        assert!(s("best_s") > 0.0 && s("best_s") <= s("worst_s"), "{figure}: {report}");
        assert_eq!(report[figure]["met"], s("p50_s") <= s("goal_s"), "{figure}: {report}");
    }
    for node in ["node_orderly", "node_power_cut"] {
        assert!(report[node]["rss_bytes"].as_u64() > Some(1 << 20), "{node}: {report}");
    }
    let ratio = report["commits"]["ratio"].as_f64().unwrap();
    assert_eq!(report["commits"]["met"], ratio >= 10.0, "{report}");
    assert!(report["commits"]["commits_per_sync"].as_f64() > Some(1.0), "{report}");
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0, "it cleans up");
}
