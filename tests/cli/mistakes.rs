//! What the program answers to the mistakes that new users made: each answer, word for word, with its exit code. It must say
//! what is wrong, with what, and what to do next.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use super::{Home, Said};

const RELAY: &str = "ws://127.0.0.1:1";
const CUSTOMER: &str = "b0635d6a9851d3aed0cd6c495b282167acf761729078d975fc341b22650b07b9";

/// The whole answer, with the home's path as `~`.
fn answer(home: &Home, said: &Said) -> String {
    let text = format!("exit code {}\n--- stdout\n{}--- stderr\n{}", said.code, said.data, said.talk);
    let path = home.path().display().to_string();
    text.replace(&path, "~")
}

macro_rules! answers {
    ($name:literal, $home:expr, $said:expr) => {{
        let (home, said) = (&$home, &$said);
        insta::with_settings!({ omit_expression => true, prepend_module_to_snapshot => false }, {
            insta::assert_snapshot!($name, answer(home, said));
        });
    }};
}

/// `connect` with a relay and these flags, which must end by itself.
fn connect(home: &Home, more: &[&str]) -> Said {
    home.run(&[&["connect", "--nip90"], more].concat())
}

fn connect_there(home: &Home, more: &[&str]) -> Said {
    connect(home, &[&["--relay", RELAY], more].concat())
}

fn file(home: &Home, name: &str, text: &str) {
    std::fs::write(home.path().join(name), text).unwrap();
}

/// Runs the program after a small disk was mounted at `disk`, in a mount namespace of its own; root only.
fn on_a_disk_of(test: &str, size: &str, home: &Home, args: &[&str]) -> Option<std::process::Command> {
    if !nix::unistd::geteuid().is_root() {
        // The rest of the suite runs as any user, so this is no part that could be installed.
        eprintln!("SKIPPED: {test}: only root may mount a small disk");
        return None;
    }
    std::fs::create_dir(home.path().join("disk")).unwrap();
    let mut command = std::process::Command::new("unshare");
    let script = format!("mount -t tmpfs -o size={size} none disk && exec \"$0\" \"$@\"");
    command.args(["--mount", "sh", "-c", &script, env!("CARGO_BIN_EXE_coinop")]).args(args);
    command.env_clear().env("HOME", home.path()).env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
    command.current_dir(home.path()).stdin(Stdio::null());
    Some(command)
}

fn said(mut command: std::process::Command) -> Said {
    let output = command.output().unwrap();
    Said {
        code: output.status.code().unwrap_or(-1),
        data: String::from_utf8(output.stdout).unwrap(),
        talk: String::from_utf8(output.stderr).unwrap(),
    }
}

#[test]
fn a_relay_with_the_wrong_scheme() {
    let home = Home::new();
    answers!("01_relay_scheme", home, connect(&home, &["--relay", "http://relay.example.com"]));
}

#[test]
fn a_relay_without_a_scheme() {
    let home = Home::new();
    answers!("02_relay_without_scheme", home, connect(&home, &["--relay", "relay.example.com"]));
    answers!("02_relay_with_port", home, connect(&home, &["--relay", "relay.example.com:7777"]));
}

#[test]
fn a_key_file_that_others_can_read() {
    let home = Home::new();
    home.run(&["keys", "new"]);
    std::fs::set_permissions(home.data_dir().join("key"), PermissionsExt::from_mode(0o644)).unwrap();
    answers!("05_key_mode", home, connect_there(&home, &[]));
}

#[test]
fn six_misspelt_keys_are_reported_at_once() {
    let home = Home::new();
    let text = "relay = []\nmax_job = 2\nskill = []\n[limits]\nwal_ms = 1000\nmemory_byte = 1\n[queue]\nmax_open_job = 2\n";
    file(&home, "six.toml", text);
    answers!("06_misspelt_keys", home, connect_there(&home, &["--config", "six.toml"]));
}

#[test]
fn a_file_that_is_not_toml() {
    let home = Home::new();
    file(&home, "syntax.toml", "relays = [\n  \"wss://a\" \"wss://b\"\n]\n");
    answers!("08_toml_syntax", home, connect_there(&home, &["--config", "syntax.toml"]));
}

#[test]
fn a_configuration_file_that_is_missing() {
    let home = Home::new();
    answers!("09_config_missing", home, connect_there(&home, &["--config", "nowhere.toml"]));
}

#[test]
fn a_wallet_key_that_is_missing() {
    let home = Home::new();
    let wallet =
        ["payment.wallet=lnbits", "payment.wallet_url=http://127.0.0.1:1", "payment.wallet_key_file=no.key"];
    let sets: Vec<&str> = wallet.iter().flat_map(|set| ["--set", set]).collect();
    let said = home.run(&[&["credits", "list"], &sets[..]].concat());
    let said = Said { talk: without_new_key(&said.talk), ..said };
    answers!("10_wallet_key_missing", home, said);
}

#[test]
fn a_skill_that_does_not_exist() {
    let home = Home::new();
    let said = connect_there(&home, &["--skills", "compile"]);
    // The new key is printed with its name, which is another one every time.
    let said = Said { talk: without_new_key(&said.talk), ..said };
    answers!("11_unknown_skill", home, said);
}

fn without_new_key(text: &str) -> String {
    let kept = text.lines().filter(|line| !line.starts_with("Made a new key"));
    kept.map(|line| format!("{line}\n")).collect()
}

#[test]
fn docker_without_an_engine() {
    let home = Home::new();
    let host = format!("docker.host=unix://{}/none.sock", home.path().display());
    let said = connect_there(&home, &["--sandbox", "docker", "--set", &host]);
    let said = Said { talk: without_new_key(&said.talk), ..said };
    answers!("12_no_docker_engine", home, said);
}

#[test]
fn a_disk_without_space_for_the_node() {
    let home = Home::new();
    let args = ["connect", "--nip90", "--relay", RELAY, "--data-dir", "disk"];
    let Some(command) = on_a_disk_of("a_disk_without_space_for_the_node", "300k", &home, &args) else {
        return;
    };
    let said = said(command);
    assert_eq!(said.code, 10, "{said:?}");
    assert_eq!(
        said.talk.matches("No space left").count().max(said.talk.matches("disk is full").count()),
        1,
        "{said:?}"
    );
}

#[test]
fn a_disk_with_little_space() {
    let home = Home::new();
    let args = ["connect", "--nip90", "--relay", RELAY, "--data-dir", "disk", "--skills", "nothing"];
    let Some(command) = on_a_disk_of("a_disk_with_little_space", "40m", &home, &args) else { return };
    let said = said(command);
    let warning = said.talk.lines().find(|line| line.starts_with("warning: only "));
    let ends =
        format!("MiB free in {}/disk; a full disk stops the node from taking jobs", home.path().display());
    assert!(warning.is_some_and(|line| line.ends_with(&ends)), "{said:?}");
}

/// As a user who may read nothing of the one who runs the suite; root only.
fn as_nobody(home: &Home, args: &[&str]) -> Said {
    use std::os::unix::process::CommandExt;
    // A copy that this user may run, wherever the checkout is. Made by another process: a file that this one has open for
    // writing is busy in each child that another test begins at that moment.
    let program = home.path().join("coinop");
    let copied = std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_coinop")).arg(&program).status();
    assert!(copied.unwrap().success());
    std::fs::set_permissions(home.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = std::process::Command::new(program);
    command.args(args).env_clear().env("HOME", home.path()).env("PATH", "/usr/bin:/bin");
    command.current_dir(home.path()).uid(65_534).gid(65_534);
    said(command)
}

#[test]
fn another_users_data_folder() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("SKIPPED: another_users_data_folder: only root may become another user");
    }
    let home = Home::new();
    std::fs::create_dir(home.path().join("theirs")).unwrap();
    std::fs::set_permissions(home.path().join("theirs"), PermissionsExt::from_mode(0o700)).unwrap();
    answers!("15_other_users_data", home, as_nobody(&home, &["jobs", "list", "--data-dir", "theirs"]));
}

fn own_type(at: &Path) {
    std::fs::create_dir_all(at).unwrap();
    let text = "name = \"audit\"\ntitle = \"Audit\"\nkinds = [5940]\nagent = \"script\"\noutput = \"text\"\n\
                [script]\ncommands = [\"true\"]\n";
    std::fs::write(at.join("job.toml"), text).unwrap();
}

#[test]
fn an_own_job_type_that_is_not_among_the_skills() {
    let home = Home::new();
    own_type(&home.path().join("jobs/audit"));
    // The node ends where it begins to need a sandbox; the warning comes before.
    let nowhere = format!("docker.host=unix://{}/none.sock", home.path().display());
    let said = connect_there(&home, &["--jobs-dir", "jobs", "--sandbox", "docker", "--set", &nowhere]);
    let warning = said.talk.lines().find(|line| line.starts_with("warning: not served"));
    assert_eq!(warning, Some("warning: not served: audit (in jobs_dir, but not in `skills`)"), "{said:?}");
    let doctor = home.run(&["doctor", "--offline", "--json", "--set", "jobs_dir=jobs"]).json();
    let row = doctor["checks"].as_array().unwrap().iter().find(|row| row["name"] == "audit").cloned();
    assert_eq!(row.unwrap()["how"], "in jobs_dir, but not in `skills`: not served");
}

#[test]
fn a_jobs_folder_one_level_too_deep() {
    let home = Home::new();
    own_type(&home.path().join("jobs/audit"));
    let said = connect_there(&home, &["--jobs-dir", "jobs/audit"]);
    let said = Said { talk: without_new_key(&said.talk), ..said };
    answers!("17_jobs_dir_too_deep", home, said);
}

#[test]
fn a_repository_pattern_in_the_form_of_ssh() {
    let home = Home::new();
    answers!("18_allow_repo", home, connect_there(&home, &["--allow-repo", "github.com:acme/tool"]));
}

#[test]
fn a_log_level_that_does_not_exist() {
    let home = Home::new();
    answers!("19_log_level", home, connect_there(&home, &["--log-level", "verbose"]));
}

#[test]
fn a_misspelt_variable() {
    let home = Home::new();
    let mut command = home.coinop(&["connect", "--relay", RELAY, "--nip90"]);
    command.env("COINOP_MAX_JOB", "3");
    answers!("20_misspelt_variable", home, Said::of(command));
}

#[test]
fn an_ordinary_users_doctor_says_what_is_weaker_and_not_only_to_be_root() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("SKIPPED: an_ordinary_users_doctor: only root may become another user");
    }
    let home = Home::new();
    let said = as_nobody(&home, &["doctor", "--offline", "--json"]);
    let checks = said.json()["checks"].clone();
    let fixes: Vec<&str> =
        checks.as_array().unwrap().iter().filter_map(|check| check["mend"].as_str()).collect();
    for fix in fixes {
        assert!(!fix.starts_with("run the node as root"), "what needs no root comes first: {fix}");
    }
}

#[test]
fn a_data_folder_that_is_a_file() {
    let home = Home::new();
    file(&home, "passwd", "");
    answers!("22_data_dir_is_a_file", home, connect_there(&home, &["--data-dir", "passwd"]));
}

#[test]
fn a_customer_who_is_no_key() {
    let home = Home::new();
    answers!("23_customer", home, home.run(&["credits", "grant", "bob", "5000"]));
}

#[test]
fn a_report_as_json() {
    let home = Home::new();
    let said = home.run(&["earnings", "--json", "--tz", "UTC"]);
    assert_eq!((said.code, said.json()["rows"].as_array().map(Vec::len)), (0, Some(0)), "{said:?}");
    let form = home.run(&["earnings", "--format", "json", "--tz", "UTC"]);
    assert_eq!(said.data, form.data);
}

#[test]
fn a_time_in_words() {
    let home = Home::new();
    answers!("26_time", home, home.run(&["earnings", "--from", "yesterday"]));
}

#[test]
fn commands_that_people_try_exist() {
    let home = Home::new();
    let said = home.run(&["init"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.data.starts_with("npub1"), "{said:?}");
    let path = home.path().join(".config/coinop/config.toml");
    assert_eq!(home.run(&["config", "path"]).data, format!("{}\n", path.display()));
    // What it wrote is good, and `check` without a file means it.
    let checked = home.run(&["config", "check"]);
    assert_eq!((checked.code, checked.talk), (0, format!("{}: OK\n", path.display())));
    std::fs::write(&path, "max_jobs = 3\n").unwrap();
    let again = home.run(&["init"]);
    assert_eq!((again.code, &again.data), (0, &said.data), "the same key");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "max_jobs = 3\n", "nothing is overwritten");
    // An editor that spoils the file is told so.
    let editor = home.path().join("editor.sh");
    file(&home, "editor.sh", "#!/bin/sh\necho 'max_jbs = 1' > \"$2\"\n");
    std::fs::set_permissions(&editor, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = home.coinop(&["config", "edit"]);
    command.env("EDITOR", format!("{} --wait", editor.display()));
    answers!("27_config_edit", home, Said::of(command));
    std::fs::write(&path, "").unwrap();
    answers!("27_logs", home, home.run(&["logs", "ab12"]));
    answers!("27_serve", home, home.run(&["serve", "--nip90"]));
}

#[test]
fn config_check_without_any_file() {
    let home = Home::new();
    answers!("28_config_check", home, home.run(&["config", "check"]));
}

#[test]
fn a_restore_beside_a_running_node_ends_with_the_code_for_it() {
    let home = Home::new();
    assert_eq!(home.run(&["credits", "grant", CUSTOMER, "5000"]).code, 0);
    assert_eq!(home.run(&["ledger", "backup", "copy"]).code, 0);
    let holder = coinop::store::Holder::new("c".repeat(64));
    let _node = coinop::store::Store::open(&home.data_dir(), &holder).unwrap();
    let said = home.run(&["ledger", "restore", "copy"]);
    assert_eq!(said.code, 7, "{said:?}");
    assert!(said.talk.contains("is in use by"), "{said:?}");
}

#[test]
fn smaller_ones_say_what_to_do() {
    let home = Home::new();
    let key = ["balance", "--provider", CUSTOMER, "--relay", RELAY, "--key", "me.key"];
    answers!("key_missing", home, home.run(&key));
    file(&home, "wrong.json", "{ \"a\": 1 }");
    answers!("verify_wrong_file", home, home.run(&["verify", "wrong.json"]));
    let relays = ["--set", "relays=wss://a.example,wss://b.example,wss://a.example", "--json"];
    let shown = home.run(&[&["config", "show"], &relays[..]].concat()).json();
    assert_eq!(
        shown["settings"]["relays"]["value"].as_array().unwrap().len(),
        2,
        "given twice is given once"
    );
    let granted = home.run(&["credits", "grant", CUSTOMER, "5000"]);
    assert!(granted.data.contains("npub1"), "{granted:?}");
    assert!(!granted.data.contains(CUSTOMER), "as it was given to people, not in hex: {granted:?}");
    // Its answer is data, so that it is in the file.
    let doctor = home.run(&["doctor", "--offline"]);
    assert!(
        doctor.data.contains("All checks passed") || doctor.data.contains("Failed checks are enforced"),
        "{doctor:?}"
    );
    // A job may take 15 minutes where nothing else is configured: its customer waits longer than that.
    let help = home.run(&["request", "-h"]).data.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(help.contains("[default: 20m]"), "{help}");
    // The short help has no flags that every command has; the long one does.
    assert!(!home.run(&["jobs", "list", "-h"]).data.contains("--log-level"));
    assert!(home.run(&["jobs", "list", "--help"]).data.contains("--log-level"));
    let mut command = home.coinop(&["completions"]);
    command.env("SHELL", "/usr/bin/fish");
    let fish = Said::of(command);
    assert!(fish.data.contains("complete -c coinop"), "{fish:?}");
    assert_eq!(
        fish.talk,
        "To install it: coinop completions fish > ~/.config/fish/completions/coinop.fish\n"
    );
    assert_eq!(home.run(&["completions"]).code, 2, "no shell is known");
}
