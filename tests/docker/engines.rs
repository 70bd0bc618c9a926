//! Engines that go: restarted, killed, frozen. These tests start engines of their own and end them.

use std::path::Path;
use std::process::Command as Program;

use coinop::sandbox::{Backend, Error, Exit, Limit, Policy, Spec};

use crate::common::{
    IMAGE, OK, backend, containers, name, policy, rest, sandbox, sandbox_with, sh, soon, start,
};
use crate::engine;
use crate::skip::skip;

/// An engine that a test may harm.
struct Own {
    folder: tempfile::TempDir,
    host: String,
}

impl Own {
    /// Starts one, or skips the test.
    fn start(test: &str) -> Option<Own> {
        // Where no engine may be used at all, none is started.
        engine::host(test)?;
        let folder = tempfile::tempdir().unwrap();
        match script(folder.path(), "start") {
            Ok(host) => Some(Own { folder, host }),
            Err(why) => {
                skip(test, &format!("no engine of its own can be started: {why}"));
                None
            }
        }
    }

    fn again(&self, verb: &str) {
        assert_eq!(script(self.folder.path(), verb).as_ref(), Ok(&self.host));
    }

    fn signal(&self, signal: &str) {
        let pid = std::fs::read_to_string(self.host.replace("unix://", "").replace("/sock", "/pid")).unwrap();
        let sent = Program::new("kill").args([&format!("-{signal}"), pid.trim()]).status().unwrap();
        assert!(sent.success());
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Err(why) = script(self.folder.path(), "remove") {
            eprintln!("an engine may be left: {why}");
        }
    }
}

/// Runs `.ci/engine`; the address that it tells.
fn script(folder: &Path, verb: &str) -> Result<String, String> {
    let ran = Program::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.ci/engine"))
        .arg(verb)
        .env("E2E_ENGINE", folder.join("engine"))
        .env("E2E_PARTS", folder.join("parts"))
        .output()
        .map_err(|why| why.to_string())?;
    let (told, said) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    if !ran.status.success() {
        return Err(said.into_owned());
    }
    Ok(told.trim().trim_start_matches("E2E_DOCKER_HOST=").to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_goes_in_the_middle_of_a_job_holds_up_nobody_and_serves_when_it_is_back() {
    let test = "an_engine_that_goes_in_the_middle_of_a_job_holds_up_nobody_and_serves_when_it_is_back";
    let Some(own) = Own::start(test) else { return };
    let node = name("own");
    let backend = backend(&own.host, &node, IMAGE, 1).await.unwrap();

    // Restarted as an operator would.
    let sandbox_1 = sandbox(&backend).await;
    let mut running = start(&*sandbox_1, "sleep 1000", None, false).await;
    own.again("restart");
    assert_eq!(rest(&mut running).await.1, None, "a sandbox that died is no end of a command");
    assert!(matches!(sandbox_1.read_file("x", 1).await, Err(Error::Gone(_))));
    soon("the usage", sandbox_1.usage()).await.unwrap();
    soon("the end of a sandbox that is gone", sandbox_1.destroy()).await.unwrap();
    let sandbox_2 = sandbox(&backend).await;
    assert_eq!(sh(&*sandbox_2, "echo on").await, ("on\n".to_owned(), OK));

    // Killed: nothing answers any more.
    let mut running = start(&*sandbox_2, "sleep 1000", None, false).await;
    own.signal("KILL");
    assert_eq!(rest(&mut running).await.1, None);
    let why = soon("a kill without an engine", sandbox_2.kill()).await.unwrap_err();
    assert!(matches!(why, Error::Host { doing: "kill its container", .. }), "{why}");
    drop(sandbox_2);
    let spec = Spec { id: "t".to_owned(), base: None, policy: policy() };
    let why = soon("a sandbox without an engine", backend.create(spec)).await.err().unwrap();
    assert!(matches!(why, Error::Host { .. }), "{why}");
    own.again("start");
    let sandbox_3 = sandbox(&backend).await;
    assert_eq!(sh(&*sandbox_3, "echo on").await, ("on\n".to_owned(), OK));
    soon("the end", sandbox_3.destroy()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_engine_does_not_stretch_a_job_s_time() {
    let Some(own) = Own::start("a_frozen_engine_does_not_stretch_a_job_s_time") else { return };
    let backend = backend(&own.host, &name("ice"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox_with(&backend, Policy { wall_ms: 3000, ..policy() }, None).await;
    let mut running = start(&*sandbox, "sleep 1000", None, false).await;
    own.signal("STOP");
    let (_, exit) = rest(&mut running).await;
    own.signal("CONT");
    assert_eq!(exit, Some(Exit::Limit { limit: Limit::Wall }));
    soon("the end", sandbox.destroy()).await.unwrap();
}

/// The engine kills and counts where the shim cannot.
#[tokio::test]
async fn what_was_used_is_known_after_a_shim_that_does_not_answer() {
    let host = engine!();
    let node = name("deafshim");
    let backend = backend(&host, &node, IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    sh(&*sandbox, "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done").await;
    let id = containers(&host, &node)[0]["Id"].as_str().unwrap().to_owned();
    let told = engine::get(&host, &format!("/containers/{id}/json")).unwrap();
    let told: serde_json::Value = serde_json::from_str(told.split_once("\r\n\r\n").unwrap().1).unwrap();
    let stopped = Program::new("kill").args(["-STOP", &told["State"]["Pid"].to_string()]).output().unwrap();
    if !stopped.status.success() {
        return skip(
            "what_was_used_is_known_after_a_shim_that_does_not_answer",
            "its processes are not ours to stop",
        );
    }
    soon("the kill", sandbox.kill()).await.unwrap();
    let used = soon("the end", sandbox.destroy()).await.unwrap();
    assert!(used.cpu_ms > 20 && used.peak_memory_bytes > 100_000, "{used:?}");
}
