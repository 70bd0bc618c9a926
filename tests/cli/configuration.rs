//! `coinop config`, and how a bad configuration ends any command.

use super::{Home, Said};

#[test]
fn show_says_where_each_value_came_from() {
    let home = Home::new();
    let file = home.path().join("node.toml");
    std::fs::write(&file, "max_jobs = 3\n[limits]\npids = 64\n").unwrap();
    let mut command =
        home.coinop(&["config", "show", "--json", "--config", "node.toml", "--set", "limits.wall_ms=5_000"]);
    command.env("COINOP_LIMITS_PIDS", "65");
    let said = Said::of(command);
    assert_eq!(said.code, 0, "{said:?}");
    let settings = said.json()["settings"].clone();
    let row =
        |key: &str| (settings[key]["value"].clone(), settings[key]["from"].as_str().unwrap().to_string());
    assert_eq!(row("max_jobs"), (3.into(), format!("{}:1", file.display())));
    assert_eq!(row("limits.pids"), (65.into(), "environment variable COINOP_LIMITS_PIDS".into()));
    assert_eq!(row("limits.wall_ms"), (5_000.into(), "--set limits.wall_ms".into()));
    assert_eq!(row("announce.name"), ("Coinop".into(), "default".into()));
    let table = home.run(&["config", "show"]);
    assert!(table.data.lines().any(|line| line.starts_with("limits.wall_ms ") && line.ends_with("default")));
}

#[test]
fn a_time_zone_that_is_none_is_refused_wherever_days_are_counted() {
    let home = Home::new();
    let with = |zone: &str, args: &[&str]| {
        let mut command = home.coinop(args);
        command.env("TZ", zone);
        Said::of(command)
    };
    for args in [&["earnings"][..], &["ledger", "export", "--format", "csv"], &["ledger", "reconcile"]] {
        for zone in ["bogus/zone", ":bogus/zone", "/no/such/file", "Europe/Berlin2"] {
            let said = with(zone, args);
            assert_eq!(said.code, 3, "{zone} {said:?}");
            assert!(said.talk.contains(&format!("TZ={zone} is not a time zone")), "{said:?}");
            assert!(said.data.is_empty(), "{said:?}");
        }
        for zone in ["", "UTC", ":Europe/Berlin", "CET-1CEST,M3.5.0,M10.5.0/3"] {
            assert!(!with(zone, args).talk.contains("time zone"), "{zone}");
        }
    }
}

#[test]
fn check_names_every_problem_with_its_line_and_ends_with_3() {
    let home = Home::new();
    std::fs::write(home.path().join("bad.toml"), "relay = []\n[limits]\nwall_ms = 1\n").unwrap();
    let said = home.run(&["config", "check", "bad.toml"]);
    assert_eq!(said.code, 3);
    assert!(said.talk.contains("bad.toml:1: unknown key `relay`; did you mean `relays`?"), "{}", said.talk);
    assert!(said.talk.contains("bad.toml:3: `limits.wall_ms` must be between"), "{}", said.talk);
    let report = home.run(&["config", "check", "bad.toml", "--json"]);
    assert_eq!((report.code, report.json()["problems"].as_array().unwrap().len()), (3, 2));
    std::fs::write(home.path().join("good.toml"), home.run(&["config", "default"]).data).unwrap();
    assert_eq!(home.run(&["config", "check", "good.toml"]).code, 0, "the printed default is a good file");
}

#[test]
fn any_command_refuses_an_unknown_variable_and_names_the_nearest() {
    let home = Home::new();
    for args in [&["jobs", "list"][..], &["connect", "--nip90"], &["scan"], &["config", "show"]] {
        let mut command = home.coinop(args);
        command.env("COINOP_MAX_JOB", "3");
        let said = Said::of(command);
        assert_eq!(said.code, 3, "{args:?}: {said:?}");
        assert!(said.talk.contains("`COINOP_MAX_JOB`; did you mean `COINOP_MAX_JOBS`?"), "{said:?}");
        assert!(said.data.is_empty());
    }
}

#[test]
fn an_unknown_sandbox_is_refused_by_name_and_a_node_without_relays_says_what_to_give() {
    let home = Home::new();
    let said = home.run(&["connect", "--nip90", "--relay", "ws://127.0.0.1:1", "--sandbox", "podman"]);
    assert_eq!(said.code, 3);
    assert!(said.talk.contains("--sandbox: `sandbox` must be \"auto\", \"local\" or \"docker\""), "{said:?}");
    let said = home.run(&["connect", "--nip90"]);
    assert_eq!(said.code, 3);
    assert!(said.talk.contains("--relay wss://"), "{said:?}");
    assert!(!home.data_dir().exists(), "nothing is made before the configuration is good");
}

#[test]
fn a_skill_that_is_not_there_is_a_configuration_error() {
    let home = Home::new();
    let said = home.run(&["connect", "--nip90", "--relay", "ws://127.0.0.1:1", "--skills", "generic,poetry"]);
    assert_eq!(said.code, 3, "{said:?}");
    assert!(said.talk.contains("poetry") && said.talk.contains("generic"), "{said:?}");
}
