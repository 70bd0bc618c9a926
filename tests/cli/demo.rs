//! `coinop demo` is the first thing that a newcomer runs: it holds whatever this machine is configured to be.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Home, Said};

#[test]
fn demo_json_is_one_object_with_every_promised_field_and_nothing_is_said_beside_it() {
    let home = Home::new();
    let folder = home.path().join(".config/coinop");
    std::fs::create_dir_all(&folder).unwrap();
    let of_this_machine =
        "skills = [\"docs\"]\n[admission]\nallow_repos = [\"github.com/acme/*\"]\n[limits]\nwall_ms = 1000\n";
    std::fs::write(folder.join("config.toml"), of_this_machine).unwrap();
    let mut command = home.coinop(&["demo", "--json"]);
    command.env("COINOP_MAX_JOBS", "not a number");
    let said = Said::of(command);
    assert_eq!((said.code, said.talk.as_str()), (0, ""), "{said:?}");
    let report = said.json();
    for (field, length) in [("request_id", 64), ("result_id", 64), ("commit", 40), ("output_sha256", 64)] {
        let value = report[field].as_str().unwrap_or_default();
        assert!(value.len() == length && value.bytes().all(|b| b.is_ascii_hexdigit()), "{field}: {report}");
    }
    assert_eq!(report["kind"], 6000);
    assert_eq!(report["status"], "success");
    assert_eq!(report["verified"], true);
    assert!(report["elapsed_ms"].is_u64(), "{report}");
}

#[test]
fn a_demo_that_is_kept_serves_others_and_leaves_nothing_behind_at_sigterm() {
    let home = Home::new();
    let within = home.path().join("demos");
    let mut demo = Command::new(env!("CARGO_BIN_EXE_coinop"))
        .args(["demo", "--keep", "--data-dir"])
        .arg(&within)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let told = BufReader::new(demo.stderr.take().unwrap());
    let mut order = String::new();
    for line in told.lines().map_while(Result::ok) {
        if let Some(words) = line.trim().strip_prefix("coinop request ") {
            order = words.to_string();
        }
        // The last line of what can be tried.
        if line.contains("coinop jobs list") {
            break;
        }
    }
    assert_eq!(std::fs::read_dir(&within).unwrap().count(), 1);
    let words: Vec<&str> = order.split_whitespace().map(|word| word.trim_matches('\'')).collect();
    let words: Vec<&str> = words.into_iter().filter(|word| *word != "-l").collect();
    let said = Said::of(home.coinop(&[&["request"], words.as_slice()].concat()));
    assert!(said.code == 0 && said.data.contains("README.md"), "{said:?}");
    kill(Pid::from_raw(i32::try_from(demo.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert!(demo.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(&within).unwrap().count(), 0);
}
