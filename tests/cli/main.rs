//! The command line as a person meets it: exit codes, stdout for data, stderr for talk, nothing secret.
//! What the rooms behind it do is tested beside them.

mod bench;
mod configuration;
mod customer;
mod demo;
mod key_files;
mod mistakes;
mod ordering;
mod payment;
#[path = "../support/scripted.rs"]
#[expect(dead_code, reason = "a part of it is used here")]
mod scripted;
mod serving;
mod strangers;

use std::path::Path;

use assert_cmd::Command;
use tempfile::TempDir;

/// A home of its own and nothing else of this machine's environment.
pub(crate) struct Home(TempDir);

impl Home {
    pub(crate) fn new() -> Home {
        Home(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn data_dir(&self) -> std::path::PathBuf {
        self.path().join(".local/state/coinop")
    }

    pub(crate) fn coinop(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coinop"));
        command.env_clear().env("HOME", self.path()).env("PATH", "/usr/bin:/bin");
        command.current_dir(self.path()).args(args).timeout(std::time::Duration::from_secs(60));
        command
    }

    /// Exit code, stdout, stderr.
    pub(crate) fn run(&self, args: &[&str]) -> Said {
        Said::of(self.coinop(args))
    }
}

#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) data: String,
    pub(crate) talk: String,
}

impl Said {
    pub(crate) fn of(mut command: Command) -> Said {
        let output = command.output().unwrap();
        Said {
            code: output.status.code().unwrap_or(-1),
            data: String::from_utf8(output.stdout).unwrap(),
            talk: String::from_utf8(output.stderr).unwrap(),
        }
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.data).unwrap_or_else(|e| panic!("not JSON ({e}): {self:?}"))
    }
}

/// Whoever runs the tests ignores this signal (`nohup`, a job in the background of a script), and so do the programs
/// that they start.
pub(crate) fn is_ignored(signal: nix::sys::signal::Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim().to_owned();
    let ignored = u64::from_str_radix(&mask, 16).unwrap() >> (signal as u32 - 1) & 1 == 1;
    if ignored {
        eprintln!("SKIPPED {signal}: it is ignored here");
    }
    ignored
}

#[test]
fn help_names_every_command_and_every_exit_code() {
    let said = Home::new().run(&["--help"]);
    assert_eq!(said.code, 0);
    for command in [
        "init",
        "connect",
        "request",
        "scan",
        "status",
        "jobs",
        "logs",
        "balance",
        "ledger",
        "verify",
        "keys",
        "doctor",
        "demo",
        "config",
        "bench",
        "completions",
    ] {
        assert!(said.data.contains(&format!("  {command} ")), "{command} is missing:\n{}", said.data);
    }
    for (exit, what) in coinop::cli::exit::CODES {
        assert!(said.data.contains(&format!("{}  {what}", *exit as u8)), "{what}");
    }
}

#[test]
fn a_wrong_command_line_ends_with_2_and_names_what_is_near() {
    let home = Home::new();
    let said = home.run(&["conect", "--nip90"]);
    assert_eq!(said.code, 2);
    assert!(said.talk.contains("connect"), "{}", said.talk);
    assert!(said.data.is_empty());
    assert_eq!(home.run(&["connect"]).code, 3, "--nip90 is the default; what lacks is a relay");
    assert_eq!(
        home.run(&["request", "--encrypt", "--relay", "ws://127.0.0.1:1"]).code,
        2,
        "needs a provider"
    );
    assert_eq!(home.run(&["request", "--kind", "1"]).code, 2);
}

#[test]
fn completions_are_written_for_every_shell() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let said = home.run(&["completions", shell]);
        assert_eq!(said.code, 0);
        assert!(said.data.contains("coinop") && said.data.contains("connect"), "{shell}");
    }
    assert_eq!(home.run(&["completions", "tcsh"]).code, 2);
}

#[test]
fn doctor_reports_each_check_and_leaves_nothing_behind() {
    let home = Home::new();
    let said = home.run(&["doctor", "--offline", "--json"]);
    let report = said.json();
    assert_eq!(said.code == 0, report["ok"] == true, "{said:?}");
    let checks = report["checks"].as_array().unwrap();
    for group in ["configuration", "data", "job types", "sandbox"] {
        assert!(checks.iter().any(|check| check["group"] == group), "{group}: {said:?}");
    }
    for check in checks {
        assert!(check["how"].is_string());
        assert!(check["ok"] == true || check["mend"].is_string(), "bad without a mend: {check}");
    }
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0, "doctor only looks");
}

#[test]
fn doctor_tries_the_hosts_toolchains_in_the_sandbox_and_names_those_that_jobs_do_not_see() {
    use std::os::unix::fs::PermissionsExt;
    let installed =
        |name: &&str| ["/usr/bin", "/usr/local/bin"].iter().any(|dir| Path::new(dir).join(name).exists());
    let tried: Vec<&str> = ["git", "gcc", "perl", "make"].into_iter().filter(installed).collect();
    assert!(!tried.is_empty(), "this machine has no toolchain at all");
    let unseen = ["Rscript", "gradle", "php", "lua"].into_iter().find(|name| !installed(name)).unwrap();
    let (home, elsewhere) = (Home::new(), tempfile::tempdir().unwrap());
    let planted = elsewhere.path().join(unseen);
    std::fs::write(&planted, "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(&planted, std::fs::Permissions::from_mode(0o755)).unwrap();

    let mut command = home.coinop(&["doctor", "--offline", "--tools", "--json"]);
    command.env("PATH", format!("{}:/usr/local/bin:/usr/bin:/bin", elsewhere.path().display()));
    command.timeout(std::time::Duration::from_secs(240));
    let report = Said::of(command).json();
    let row = |name: &str| {
        let rows = report["checks"].as_array().unwrap();
        rows.iter().find(|row| row["group"] == "tools" && row["name"] == name).cloned()
    };
    for name in tried {
        let row = row(name).unwrap_or_else(|| panic!("{name} was not tried: {report}"));
        assert_eq!(row["ok"], true, "{row}");
    }
    let row = row(unseen).unwrap();
    assert_eq!(row["ok"], false, "{row}");
    assert!(row["how"].as_str().unwrap().contains("where jobs do not see it"), "{row}");
    assert!(row["mend"].as_str().unwrap().contains("below /usr"), "{row}");
}

#[test]
fn doctor_tells_of_a_credit_line_that_every_stranger_gets() {
    let home = Home::new();
    let row = |rule: &str| {
        let set = format!("payment.rules={rule}");
        let said = home.run(&["doctor", "--offline", "--set", &set, "--json"]).json();
        said["checks"].as_array().unwrap().iter().find(|row| row["name"] == "credit").cloned()
    };
    let told = row("line cap_msat=50_000").expect("a row");
    assert_eq!(
        (&told["ok"], &told["how"]),
        (&true.into(), &"every stranger may owe 50 sat (payment.rules)".into())
    );
    assert!(told["mend"].as_str().unwrap().contains("customer=KEY"), "{told}");
    assert_eq!(row("credit"), None);
}

#[test]
fn doctor_tells_a_bad_configuration_as_a_row() {
    let home = Home::new();
    let said = home.run(&["doctor", "--offline", "--set", "max_job=2", "--json"]);
    assert_eq!(said.code, 1);
    assert!(said.json()["checks"][0]["how"].as_str().unwrap().contains("did you mean `max_jobs`"));
}

#[test]
fn a_pipe_that_closes_early_is_a_quiet_end() {
    let home = Home::new();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_coinop"))
        .args(["config", "default"])
        .env_clear()
        .env("HOME", home.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn piped_output_has_no_colour() {
    let home = Home::new();
    for args in [&["config", "show"][..], &["doctor", "--offline"], &["--help"]] {
        let said = home.run(args);
        assert!(!said.data.contains('\x1b') && !said.talk.contains('\x1b'), "{args:?}");
    }
}
