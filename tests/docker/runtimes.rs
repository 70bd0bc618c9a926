//! Another runtime of the engine: gVisor's `runsc`, where the engine has one (`.ci/engine` gives it, if it is installed).
//! Debian's of 2022 runs a command and keeps some limits; what it does not keep the backend refuses by name.

use std::io::Write;
use std::process::{Command, Output};

use coinop::sandbox::docker::{Docker, Options};
use coinop::sandbox::{Backend, Error, Spec};

use crate::common::{IMAGE, OK, containers, name, policy, sh, soon, until};
use crate::engine;

const RUNTIME: &str = "runsc";

/// The engine's address, if it has that runtime; else the test says that it skips, also where parts are required.
fn engine_with_runsc(test: &str) -> Option<String> {
    let host = engine::host(test)?;
    let told = engine::get(&host, "/info").unwrap();
    let info: serde_json::Value = serde_json::from_str(told.split_once("\r\n\r\n").unwrap().1).unwrap();
    if info["Runtimes"].get(RUNTIME).is_some() {
        return Some(host);
    }
    std::io::stderr()
        .write_all(format!("SKIPPED {test}: the engine has no runtime {RUNTIME}\n").as_bytes())
        .unwrap();
    None
}

fn plainly(host: &str, options: &[&str], script: &str) -> Output {
    let mut docker = Command::new("docker");
    docker.args(["--host", host, "run", "--rm", "--network=none", "--runtime", RUNTIME]).args(options);
    docker.args([IMAGE, "timeout", "20", "sh", "-c", script]).output().unwrap()
}

#[test]
fn under_runsc_a_command_runs_and_memory_and_the_size_of_a_place_hold() {
    let test = "under_runsc_a_command_runs_and_memory_and_the_size_of_a_place_hold";
    let Some(host) = engine_with_runsc(test) else { return };
    let said = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
    let ran = plainly(&host, &[], "dmesg | head -1");
    assert!(ran.status.success() && said(&ran).contains("Starting gVisor"), "{ran:?}");
    let hog = "dd if=/dev/zero of=/dev/null bs=300M count=1; echo survived";
    let ran = plainly(&host, &["--memory=128m", "--memory-swap=128m"], hog);
    assert!(!said(&ran).contains("survived") && ran.status.code() == Some(137), "{ran:?}");
    let fill = "dd if=/dev/zero of=/w/f bs=64k count=100 2>/dev/null; stat -c %s /w/f";
    let ran = plainly(&host, &["--tmpfs=/w:size=1m"], fill);
    assert_eq!(said(&ran), "1048576\n", "{ran:?}");
}

/// A newer one may keep all; it is taken then.
#[tokio::test]
async fn under_runsc_a_job_is_kept_to_every_limit_or_refused_by_the_clause() {
    let test = "under_runsc_a_job_is_kept_to_every_limit_or_refused_by_the_clause";
    let Some(host) = engine_with_runsc(test) else { return };
    let node = name("runsc");
    let options =
        Options { host: Some(host.clone()), runtime: Some(RUNTIME.to_owned()), ..Options::new(IMAGE, &node) };
    let backend = soon("a backend", Docker::connect(options)).await.unwrap();
    match backend.admit(&policy()) {
        Ok(()) => {
            let spec = Spec { id: "t".to_owned(), base: None, policy: policy() };
            let sandbox = backend.create(spec).await.unwrap();
            assert_eq!(sh(&*sandbox, "echo on").await, ("on\n".to_owned(), OK));
            sandbox.destroy().await.unwrap();
        }
        Err(Error::Unenforceable { clause, why, .. }) => {
            assert!(
                clause == "pids" && why.contains("with the runtime runsc no container starts"),
                "{clause}: {why}"
            );
            let row = backend.checks().into_iter().find(|check| check.name == clause).unwrap();
            assert!(!row.ok && row.mend.is_some(), "{row:?}");
        }
        Err(other) => panic!("{other}"),
    }
    until("a refusal leaves nothing", || containers(&host, &node).is_empty()).await;
}
