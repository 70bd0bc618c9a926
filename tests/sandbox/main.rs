//! What is the local sandbox's own, beside the conformance suite: its helper, its watch over memory, its filter, and
//! every trace it could leave.
//! Run as root, the whole suite runs a second time as an ordinary user.

mod common;
mod files;
mod history;
mod host;
mod leftovers;
mod life;
mod limits;
mod memory;
#[path = "../support/running.rs"]
mod running;
#[expect(dead_code, reason = "no test here needs git")]
#[path = "../support/skip.rs"]
mod skip;
mod walls;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use skip::skip;

/// `nobody`, whom no host gives anything; and the hardest case: whoever has no name in a user namespace looks like it.
const NOBODY: u32 = 65_534;
/// Somebody with an account of their own.
const SOMEBODY: u32 = 54_321;

/// Runs a program as this user, who finds it and the helper in a folder that it can read, and owns only a TMPDIR.
fn run_as(uid: u32, program: &Path, args: &[&str]) -> Output {
    let home = tempfile::Builder::new().prefix("coinop-ordinary").tempdir_in("/var/tmp").unwrap();
    let open = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    open(home.path());
    let (copy, helper, tmp) =
        (home.path().join("program"), home.path().join("coinop"), home.path().join("tmp"));
    std::fs::copy(program, &copy).unwrap();
    std::fs::copy(common::helper(), &helper).unwrap();
    open(&copy);
    open(&helper);
    std::fs::create_dir(&tmp).unwrap();
    std::os::unix::fs::chown(&tmp, Some(uid), Some(uid)).unwrap();
    let mut command = Command::new(&copy);
    command.args(args).env("TMPDIR", &tmp).env("HOME", &tmp).current_dir("/").uid(uid).gid(uid);
    if program != common::helper() {
        command.env("COINOP_TEST_HELPER", &helper);
    }
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn the_whole_suite_holds_as_an_ordinary_user() {
    if !common::is_root() {
        return;
    }
    let output = run_as(NOBODY, &std::env::current_exe().unwrap(), &["--test-threads", "2"]);
    let said = text(&output.stdout);
    assert!(output.status.success(), "as uid {NOBODY}:\n{said}\n{}", text(&output.stderr));
    assert!(said.contains("test result: ok"), "{said}");
}

/// The node's own way: it makes its bases itself, so they belong to it and no file is copied.
#[test]
fn a_node_of_an_ordinary_user_serves_a_job_from_relay_to_relay() {
    if common::bench_with("a_node_of_an_ordinary_user_serves_a_job_from_relay_to_relay", 0).is_none() {
        return;
    }
    let outputs = if common::is_root() {
        vec![
            run_as(SOMEBODY, &common::helper(), &["demo", "--json"]),
            run_as(NOBODY, &common::helper(), &["demo", "--json"]),
        ]
    } else {
        let mut demo = Command::new(common::helper());
        vec![demo.args(["demo", "--json"]).env_remove("COINOP_TEST_HELPER").output().unwrap()]
    };
    outputs.iter().for_each(served);
}

/// What the node keeps to itself, it does not keep from the sandbox's own folders.
#[test]
fn a_node_that_hides_its_files_from_others_serves_a_job_all_the_same() {
    let test = "a_node_that_hides_its_files_from_others_serves_a_job_all_the_same";
    if common::bench_with(test, 0).is_none() {
        return;
    }
    for mask in ["077", "027"] {
        demo_in(&format!("umask {mask}"), &tempfile::tempdir().unwrap());
    }
}

/// An overlay takes no mapping of owners: the base is copied, from a folder that is closed to the job's user.
#[test]
fn a_data_folder_whose_file_system_maps_no_owners_serves_as_well() {
    let test = "a_data_folder_whose_file_system_maps_no_owners_serves_as_well";
    // Only root maps the owners of bases; the second run of the suite, as an ordinary user, lacks nothing here.
    if !common::is_root() || common::bench_with(test, 0).is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for name in ["lower", "upper", "work", "data"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    let at = dir.path().display();
    // In a mount namespace of the demo's own: nothing to take away afterwards.
    let mount = format!(
        "mount -t overlay overlay -o lowerdir={at}/lower,upperdir={at}/upper,workdir={at}/work {at}/data \
         && chmod 700 {at}/data"
    );
    let try_it = Command::new("unshare").args(["--mount", "sh", "-c", &mount]).output();
    if !try_it.is_ok_and(|output| output.status.success()) {
        return skip(test, "no overlay can be mounted here");
    }
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &format!("{mount} && exec \"$0\" demo --json")])
        .arg(common::helper())
        .env("TMPDIR", dir.path().join("data"))
        .env_remove("COINOP_TEST_HELPER")
        .output()
        .unwrap();
    served(&output);
}

/// Runs a demo after this shell command, with this folder for its temporary files; it must succeed.
fn demo_in(first: &str, dir: &tempfile::TempDir) {
    let output = Command::new("sh")
        .args(["-c", &format!("{first} && exec \"$0\" demo --json")])
        .arg(common::helper())
        .env("TMPDIR", dir.path())
        .env_remove("COINOP_TEST_HELPER")
        .output()
        .unwrap();
    served(&output);
}

fn served(output: &Output) {
    let (said, talk) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{said}\n{talk}");
    let report: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&report["status"], &report["verified"]), (&"success".into(), &true.into()), "{said}");
    assert_eq!(report["result"]["exit_code"], 0, "{said}");
}

/// The text of all Rust files in a folder.
fn sources(folder: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|kind| kind == "rs"));
    files.map(|path| std::fs::read_to_string(path).unwrap()).collect()
}

/// `docs/security.md` promises tests by name: each is a case of the conformance suite or a test here, or in the file
/// that it names.
#[test]
fn every_test_that_the_security_page_names_is_there() {
    let page = include_str!("../../docs/security.md");
    // An ordinary user's copy of this program may be where the sources cannot be read.
    if std::fs::read_dir(env!("CARGO_MANIFEST_DIR")).is_err() {
        return;
    }
    let (cases, tests) = (sources("tests/conformance"), sources("tests/sandbox"));
    let (hostile, docker) = (sources("tests/hostile"), sources("tests/docker"));
    let workloads = sources("tests/workloads");
    let beside = [
        ("hostile", hostile.as_str()),
        ("docker", docker.as_str()),
        ("workloads", workloads.as_str()),
        ("repo_git.rs", include_str!("../repo_git.rs")),
        ("repo_hostile.rs", include_str!("../repo_hostile.rs")),
        ("checks.rs", include_str!("../../src/sandbox/local/checks.rs")),
        ("hardened.rs", include_str!("../../src/sandbox/docker/hardened.rs")),
        ("place.rs", include_str!("../../src/sandbox/place.rs")),
        ("seccomp.rs", include_str!("../../container/shim/src/seccomp.rs")),
        ("selftest.rs", include_str!("../selftest.rs")),
    ];
    let is_name = |word: &&str| word.len() > 20 && word.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    let parts: Vec<&str> = page.split('`').collect();
    let mut named = 0;
    for at in (1..parts.len()).step_by(2).filter(|at| is_name(&parts[*at])) {
        let file = parts.get(at + 2).filter(|_| parts[at + 1] == " (").copied();
        let (test, case) = (format!("fn {}()", parts[at]), format!("async fn {}(on: &Fixture)", parts[at]));
        let found = match file {
            None => tests.contains(&test) || cases.contains(&case),
            Some(file) => {
                let beside =
                    beside.iter().find(|(name, _)| *name == file).unwrap_or_else(|| panic!("{file}")).1;
                // A case of the hostile suite takes what it is run on; a workload is a row.
                [test, format!("fn {}(ground", parts[at]), format!("{:?},", parts[at])]
                    .iter()
                    .any(|there| beside.contains(there))
            }
        };
        assert!(found, "no test is called {} ({file:?})", parts[at]);
        named += 1;
    }
    assert!(named > 80, "only {named} tests are named");
}
