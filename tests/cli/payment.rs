//! What a node that asks for money refuses to start with, what it tells about its prices and wallet, and the README's own
//! example.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::Stdio;

use coinop::relay::local::LocalRelay;
use coinop::store::{Holder, Options, Store};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::{Home, Said};

/// A key that no other test holds.
fn holder() -> Holder {
    Holder::new(nostr_sdk::Keys::generate().public_key().to_hex())
}

fn connect(home: &Home, set: &[&str]) -> Said {
    let mut args = vec!["connect", "--nip90", "--relay", "ws://127.0.0.1:1"];
    set.iter().for_each(|set| args.extend(["--set", set]));
    home.run(&args)
}

#[test]
fn what_would_give_work_away_by_a_mistake_ends_with_3_before_anything_is_made() {
    for (set, why) in [
        (&["payment.prices=generic base_msat=1000"][..], "`payment.prices`: code is served and has no price"),
        (&["payment.prices=genric base_msat=1,* free"], "did you mean \"generic\"?"),
        (&["payment.prices=generic base_msat=1,generic base_msat=2"], "\"generic\" is given twice"),
        (&["payment.prices=* base_msat=1 base_msat=2"], "the key base_msat is given twice"),
        (&["payment.prices=* ceiling_msat=5"], "nothing in it costs anything"),
        (&["payment.rules=free skill=doc"], "did you mean \"docs\"?"),
        (&["payment.rules=free backend=dokcer"], "did you mean \"docker\"?"),
        (&["payment.costs=lcal per_second=1"], "did you mean \"local\"?"),
        (&["payment.costs=local per_second=1,local per_second=2"], "\"local\" is given twice"),
        (&["payment.wallet=lnbits", "payment.prices=* base_msat=1"], "payment.wallet_key_file is not set"),
        (
            &[
                "payment.wallet=lnbits",
                "payment.wallet_url=http://127.0.0.1:1",
                "payment.wallet_key_file=/nowhere/key",
                "payment.prices=* base_msat=1",
            ],
            "/nowhere/key",
        ),
    ] {
        let home = Home::new();
        let said = connect(&home, set);
        assert_eq!(said.code, 3, "{set:?}: {said:?}");
        assert!(said.talk.contains(why), "{set:?}: {said:?}");
    }
}

#[test]
fn config_check_and_doctor_find_the_same_mistakes() {
    let home = Home::new();
    let file = home.path().join("pay.toml");
    std::fs::write(&file, "skills = [\"generic\", \"code\"]\n[payment]\nprices = [\"genric base_msat=1\"]\n")
        .unwrap();
    let said = home.run(&["config", "check", "pay.toml"]);
    assert_eq!(said.code, 3, "{said:?}");
    assert!(said.talk.contains("pay.toml:3: `payment.prices`: there is no job type \"genric\""), "{said:?}");
    assert!(said.talk.contains("generic is served and has no price"), "{said:?}");
    let said = home.run(&["doctor", "--offline", "--config", "pay.toml", "--json"]);
    assert_eq!(said.code, 1, "{said:?}");
    let checks = said.json()["checks"].as_array().unwrap().clone();
    let bad = checks.iter().find(|row| row["group"] == "job types").unwrap();
    assert!(bad["ok"] == false && bad["how"].as_str().unwrap().contains("genric"), "{bad}");
}

#[test]
fn doctor_tells_a_wallet_whose_key_file_is_missing_or_open_and_one_that_does_not_answer() {
    use std::os::unix::fs::PermissionsExt;
    let home = Home::new();
    let key = home.path().join("wallet.key");
    let row = |name: &str| {
        let set = format!("payment.wallet_key_file={}", key.display());
        let said = home.run(&[
            "doctor",
            "--json",
            "--set",
            "payment.wallet=lnbits",
            "--set",
            "payment.wallet_url=http://127.0.0.1:1",
            "--set",
            "payment.prices=* base_msat=1",
            "--set",
            &set,
        ]);
        assert_eq!(said.code, 1, "{said:?}");
        let rows = said.json()["checks"].as_array().unwrap().clone();
        rows.iter().find(|row| row["name"] == name).cloned().unwrap_or_else(|| panic!("{name}: {rows:?}"))
    };
    assert!(row("wallet")["how"].as_str().unwrap().contains("No such file"));
    std::fs::write(&key, "5ecre7\n").unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(row("wallet")["how"].as_str().unwrap().contains("chmod 600"));
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let told = row("wallet");
    assert!(told["ok"] == false && told["how"].as_str().unwrap().contains("cannot reach"), "{told}");
    assert!(!told.to_string().contains("5ecre7"));
    assert_eq!(row("price of docs")["how"], "0.001 sat");
}

#[test]
fn doctor_tells_a_clock_that_does_not_go_with_the_log() {
    let home = Home::new();
    let year_ms = 365 * 86_400_000;
    let clock = |at_ms: u64| -> coinop::clock::Clock { std::sync::Arc::new(move || at_ms) };
    let wrote_at = |at_ms: u64| {
        let options = Options { clock: clock(at_ms), ..Options::default() };
        let store = Store::open_with(&home.data_dir(), &holder(), options).unwrap();
        store.close().unwrap();
        let said = home.run(&["doctor", "--offline", "--json"]).json();
        said["checks"].as_array().unwrap().iter().find(|row| row["name"] == "clock").cloned().unwrap()
    };
    let now_ms = coinop::clock::now_ms();
    let row = wrote_at(now_ms + year_ms);
    assert!(row["ok"] == false && row["how"].as_str().unwrap().contains("UTC"), "{row}");
    assert_eq!(wrote_at(now_ms)["ok"], true, "the entries after it have the true time");
}

#[test]
fn a_log_is_checked_against_a_seal_that_was_noted() {
    let home = Home::new();
    let seal = home.run(&["ledger", "seal", "--json"]);
    assert_eq!(seal.code, 0, "{seal:?}");
    let note = home.path().join("seal.json");
    std::fs::write(&note, &seal.data).unwrap();
    let verify = |against: &str| home.run(&["ledger", "verify", "--against", against]);
    let said = verify("seal.json");
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.talk.contains("is the one that was noted"), "{said:?}");
    let head = seal.json()["head"].clone();
    let (seq, hash) = (head["seq"].as_u64().unwrap(), head["hash"].as_str().unwrap());
    assert_eq!(verify(&format!("{seq}:{hash}")).code, 0);
    assert_eq!(verify(&format!("{seq}:{}", "0".repeat(64))).code, 6);
    let cut = verify(&format!("{}:{hash}", seq + 1_000));
    assert_eq!(cut.code, 6, "{cut:?}");
    assert!(cut.talk.contains("was durable"), "{cut:?}");
    assert_eq!(verify("nothing.json").code, 2);
    std::fs::write(&note, "{}").unwrap();
    assert_eq!(verify("seal.json").code, 6);
}

#[test]
fn a_restore_beside_a_running_node_ends_with_7() {
    let home = Home::new();
    assert_eq!(home.run(&["ledger", "seal"]).code, 0);
    let backup = home.path().join("copy").display().to_string();
    assert_eq!(home.run(&["ledger", "backup", &backup]).code, 0);
    let held = Store::open(&home.data_dir(), &holder()).unwrap();
    let said = home.run(&["ledger", "restore", &backup]);
    assert_eq!(said.code, 7, "{said:?}");
    held.close().unwrap();
}

#[test]
fn the_readmes_payment_example_serves_on_a_fresh_home() {
    let readme = include_str!("../../README.md");
    let block = readme.split("## Being paid").nth(1).unwrap().split("```").nth(1).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let relay = runtime.block_on(LocalRelay::start()).unwrap();
    // A port on which nothing answers.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for placeholder in ["wss://relay.example.org", "127.0.0.1:5000"] {
        assert!(block.contains(placeholder), "{block}");
    }
    let script = block
        .replace("wss://relay.example.org", &relay.url())
        .replace("127.0.0.1:5000", &format!("127.0.0.1:{port}"));
    let home = Home::new();
    let bin = std::path::Path::new(env!("CARGO_BIN_EXE_coinop")).parent().unwrap().display().to_string();
    let mut child = std::process::Command::new("bash")
        .args(["-c", &script])
        .env_clear()
        .env("HOME", home.path())
        .env("PATH", format!("{bin}:/usr/bin:/bin"))
        .env("LNBITS_ADMIN_KEY", "5ecre7")
        .current_dir(home.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let mut told = Vec::new();
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        told.push(line.unwrap());
        if told.last().is_some_and(|line| line.starts_with("serving") || line.starts_with("Serving")) {
            break;
        }
    }
    let served = told.join("\n");
    assert!(
        served.contains("prices    analysis free; code 1 sat + 0.100 sat per second, at most 50 sat; docs free; generic 1 sat"),
        "{served}"
    );
    assert!(served.contains("wallet    lnbits at 127.0.0.1"), "{served}");
    assert!(!served.contains("5ecre7"), "{served}");
    killpg(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    let key = std::fs::metadata(home.path().join(".config/coinop/lnbits.key")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::mode(&key) & 0o777, 0o600);
}
