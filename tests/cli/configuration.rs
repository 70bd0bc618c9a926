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

#[test]
fn figures_with_their_unit_are_read_in_files_variables_and_flags_and_shown_with_it() {
    let home = Home::new();
    let file = "[limits]\nwall_ms = \"15m\"\nmemory_bytes = \"2GiB\"\n[payment]\nnode_day_msat = \"5sat\"\n";
    std::fs::write(home.path().join("units.toml"), file).unwrap();
    let args = ["config", "show", "--config", "units.toml", "--set", "limits.idle_ms=90s", "--json"];
    let mut command = home.coinop(&args);
    command.env("COINOP_DRAIN_TIMEOUT_MS", "2m");
    let said = Said::of(command).json();
    let value = |key: &str| said["settings"][key]["value"].as_u64();
    assert_eq!(value("limits.wall_ms"), Some(900_000));
    assert_eq!(value("limits.memory_bytes"), Some(2 << 30));
    assert_eq!(value("payment.node_day_msat"), Some(5_000));
    assert_eq!((value("limits.idle_ms"), value("drain_timeout_ms")), (Some(90_000), Some(120_000)));
    let table = home.run(&["config", "show", "--config", "units.toml"]).data;
    let row = |key: &str| table.lines().find(|line| line.starts_with(key)).unwrap().to_owned();
    assert!(row("limits.wall_ms ").contains(" 15m "), "{table}");
    assert!(row("limits.memory_bytes ").contains(" 2GiB "), "{table}");
    let bad = home.run(&["config", "show", "--set", "limits.wall_ms=15 bananas"]);
    assert!(bad.code == 3 && bad.talk.contains("90s, 15m"), "{bad:?}");
}

#[test]
fn a_table_keeps_to_the_columns_that_there_are_and_a_pipe_gets_whole_lines() {
    let home = Home::new();
    let mut command = home.coinop(&["config", "show"]);
    command.env("COLUMNS", "80");
    let narrow = Said::of(command);
    assert!(narrow.data.lines().all(|line| line.chars().count() <= 80), "{narrow:?}");
    let whole = home.run(&["config", "show"]);
    assert!(whole.data.lines().any(|line| line.chars().count() > 80), "{whole:?}");
}
