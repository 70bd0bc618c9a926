//! What configuration promises: precedence, origin, and an error that names place, key and the nearest known one.

use super::*;

fn sources(dir: &Path) -> Sources {
    let home = dir.to_string_lossy().into_owned();
    Sources { file: None, env: vec![("HOME".into(), home)], flags: vec![], cwd: dir.to_path_buf() }
}

fn with_file(dir: &Path, text: &str) -> Sources {
    let path = dir.join("config.toml");
    std::fs::write(&path, text).unwrap();
    Sources { file: Some(path), ..sources(dir) }
}

fn flag(key: &str, text: &str) -> Override {
    Override { key: key.into(), value: layers::Raw::Text(text.into()), flag: format!("--set {key}") }
}

fn problems(sources: &Sources) -> Vec<String> {
    match Config::load(sources) {
        Err(Error::Bad(problems)) => problems.iter().map(Problem::to_string).collect(),
        other => panic!("expected problems, got {other:?}"),
    }
}

#[test]
fn the_embedded_defaults_hold_every_setting_and_load() {
    let dir = tempfile::tempdir().unwrap();
    let loaded = Config::load(&sources(dir.path())).unwrap();
    let keys: Vec<_> = loaded.rows.iter().map(|row| row.key).collect();
    let known: Vec<_> = settings::SETTINGS.iter().map(|setting| setting.key).collect();
    assert_eq!(keys, known, "a setting without a default");
    assert!(loaded.rows.iter().all(|row| row.origin == Origin::Default));
    assert_eq!(loaded.config.data_dir, dir.path().join(".local/state/coinop"));
    assert_eq!(loaded.config.key_file, dir.path().join(".local/state/coinop/key"));
    assert_eq!(loaded.config.jobs_dir, None);
    assert!(loaded.config.max_jobs >= 1);
    assert!(loaded.config.relays.is_empty(), "nobody is dialled unasked");
}

#[test]
fn each_layer_stands_over_the_one_before_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut from = with_file(
        dir.path(),
        "max_jobs = 3\n[limits]\npids = 64\nwall_ms = 5_000\n[queue]\nmax_open_jobs = 9\n",
    );
    from.env.push(("COINOP_LIMITS_PIDS".into(), "65".into()));
    from.env.push(("COINOP_QUEUE_MAX_OPEN_JOBS".into(), "10".into()));
    from.flags.push(flag("queue.max_open_jobs", "11"));
    let loaded = Config::load(&from).unwrap();
    let config = &loaded.config;
    assert_eq!(
        (config.max_jobs, config.limits.wall_ms, config.limits.pids, config.queue.max_open_jobs),
        (3, 5_000, 65, 11)
    );
    let origin = |key| loaded.rows.iter().find(|row| row.key == key).unwrap().origin.to_string();
    assert!(origin("limits.wall_ms").ends_with("config.toml:4"));
    assert_eq!(origin("limits.pids"), "environment variable COINOP_LIMITS_PIDS");
    assert_eq!(origin("queue.max_open_jobs"), "--set queue.max_open_jobs");
    assert_eq!(origin("repo.max_files"), "default");
}

#[test]
fn an_unknown_key_is_refused_with_file_line_and_the_nearest_known_one() {
    let dir = tempfile::tempdir().unwrap();
    let found = problems(&with_file(dir.path(), "max_job = 3\n\n[limit]\nwall_ms = 1\n[zzz]\nqqq = 1\n"));
    assert!(
        found[0].ends_with("config.toml:1: unknown key `max_job`; did you mean `max_jobs`?"),
        "{found:?}"
    );
    assert!(
        found.iter().any(
            |p| p.ends_with("config.toml:4: unknown key `limit.wall_ms`; did you mean `limits.wall_ms`?")
        )
    );
    assert!(
        found.iter().any(|p| p.ends_with("config.toml:6: unknown key `zzz.qqq`")),
        "no guess for nonsense"
    );
}

#[test]
fn an_unknown_variable_and_flag_are_refused_with_the_nearest_known_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut from = sources(dir.path());
    from.env.push(("COINOP_MAX_JOB".into(), "3".into()));
    from.env.push(("OTHER_MAX_JOB".into(), "3".into()));
    from.flags.push(flag("wall_ms", "3"));
    let found = problems(&from);
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!(found[0], "environment: unknown key `COINOP_MAX_JOB`; did you mean `COINOP_MAX_JOBS`?");
    assert_eq!(found[1], "--set wall_ms: unknown key `wall_ms`; did you mean `limits.wall_ms`?");
}

#[test]
fn every_problem_of_a_file_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let text = "max_jobs = \"many\"\nrelays = [\"http://x\"]\nsandbox = \"podman\"\n[limits]\npids = 1\n\
                cpu_milli = -4\n[admission]\nallow_customers = [\"npub1junk\"]\n";
    let found = problems(&with_file(dir.path(), text));
    let has = |line: usize, words: &str| {
        found.iter().any(|p| p.contains(&format!("config.toml:{line}: ")) && p.contains(words))
    };
    assert!(has(1, "`max_jobs` is a whole number, not a string"), "{found:?}");
    assert!(has(2, "it must start with ws:// or wss://"), "{found:?}");
    assert!(has(3, "`sandbox` must be \"auto\", \"local\" or \"docker\", not \"podman\""), "{found:?}");
    assert!(has(5, "`limits.pids` must be between 4 and 100000, not 1"), "{found:?}");
    assert!(has(6, "`limits.cpu_milli` is a whole number, not -4"), "{found:?}");
    assert!(has(8, "is not a public key"), "{found:?}");
}

#[test]
fn broken_toml_is_told_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let found = problems(&with_file(dir.path(), "max_jobs = 1\nrelays = [\n"));
    assert!(found[0].contains("config.toml:"), "{found:?}");
    let found = problems(&with_file(dir.path(), "max_jobs = 1\nmax_jobs = 2\n"));
    assert!(found[0].contains("config.toml:2: duplicate key"), "{found:?}");
}

#[test]
fn a_secret_key_in_the_wrong_place_is_not_repeated() {
    use nostr_sdk::prelude::{Keys, ToBech32};
    let dir = tempfile::tempdir().unwrap();
    let nsec = Keys::generate().secret_key().to_bech32().unwrap();
    let found = problems(&with_file(dir.path(), &format!("[admission]\ndeny_customers = [\"{nsec}\"]\n")));
    assert!(found[0].contains("a secret key is not a public key") && !found[0].contains(&nsec), "{found:?}");
}

#[test]
fn paths_start_at_their_file_or_at_the_working_folder() {
    let dir = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let mut from = with_file(dir.path(), "jobs_dir = \"types\"\nkey_file = \"~/secret\"\n");
    from.cwd = other.path().to_path_buf();
    from.flags.push(flag("data_dir", "state"));
    let config = Config::load(&from).unwrap().config;
    assert_eq!(config.jobs_dir, Some(dir.path().join("types")));
    assert_eq!(config.key_file, dir.path().join("secret"));
    assert_eq!(config.data_dir, other.path().join("state"));
}

#[test]
fn without_any_home_the_error_says_what_to_give() {
    let dir = tempfile::tempdir().unwrap();
    let from = Sources { env: vec![], ..sources(dir.path()) };
    let error = Config::load(&from).unwrap_err();
    assert!(matches!(error, Error::NoHome) && error.to_string().contains("--data-dir"));
    let named = Sources { flags: vec![flag("data_dir", "/srv/coinop")], ..from };
    assert_eq!(Config::load(&named).unwrap().config.key_file, Path::new("/srv/coinop/key"));
}

#[test]
fn a_named_file_must_exist_and_the_users_own_need_not() {
    let dir = tempfile::tempdir().unwrap();
    let missing = Sources { file: Some("none.toml".into()), ..sources(dir.path()) };
    assert!(
        matches!(Config::load(&missing), Err(Error::Unreadable { path, .. }) if path.ends_with("none.toml"))
    );
    std::fs::create_dir_all(dir.path().join(".config/coinop")).unwrap();
    std::fs::write(dir.path().join(".config/coinop/config.toml"), "max_jobs = 7\n").unwrap();
    assert_eq!(Config::load(&sources(dir.path())).unwrap().config.max_jobs, 7);
}

#[test]
fn lists_come_from_the_environment_with_commas_and_customers_as_npub_or_hex() {
    use nostr_sdk::prelude::{Keys, ToBech32};
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Keys::generate().public_key(), Keys::generate().public_key());
    let mut from = sources(dir.path());
    from.env.push(("COINOP_RELAYS".into(), "ws://127.0.0.1:7000, wss://relay.example.org".into()));
    from.env.push((
        "COINOP_ADMISSION_ALLOW_CUSTOMERS".into(),
        format!("{},{}", a.to_bech32().unwrap(), b.to_hex()),
    ));
    let config = Config::load(&from).unwrap().config;
    assert_eq!(config.relays, ["ws://127.0.0.1:7000", "wss://relay.example.org"]);
    assert_eq!(config.admission.allow_customers, [a, b]);
}

#[test]
fn the_documentation_has_every_setting_with_its_default() {
    let docs = include_str!("../../docs/configuration.md");
    let mut table = String::new();
    let mut seen = 0;
    for line in DEFAULT_TOML.lines().filter(|line| !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[') {
            table = format!("{}.", name.trim_end_matches(']'));
        }
        if let Some((key, value)) = line.split_once(" = ") {
            let row = format!("| `{table}{key}` | `{value}` |");
            assert!(docs.contains(&row), "docs/configuration.md lacks {row}");
            seen += 1;
        }
    }
    assert_eq!(seen, settings::SETTINGS.len());
}

#[test]
fn every_example_is_good() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            Config::check(&path, &sources(dir.path())).unwrap();
            seen += 1;
        }
    }
    assert!(seen >= 4);
}

#[test]
fn the_uids_of_containers_are_left_to_the_node_or_begin_above_the_system_s() {
    let dir = tempfile::tempdir().unwrap();
    let with =
        |first: &'static str| Sources { flags: vec![flag("docker.first_uid", first)], ..sources(dir.path()) };
    assert_eq!(Config::load(&with("0")).unwrap().config.docker.first_uid, None);
    assert_eq!(Config::load(&with("70000")).unwrap().config.docker.first_uid, Some(70_000));
    let why = Config::load(&with("999")).unwrap_err().to_string();
    assert!(why.contains("docker.first_uid") && why.contains("below 1000"), "{why}");
}
