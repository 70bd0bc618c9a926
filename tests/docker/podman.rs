//! The same backend on Podman, which speaks the engine's API and differs in what it makes: the writable places are the
//! shim's to mount there. Podman is the one at `E2E_PODMAN_HOST`, which `.ci/podman start` starts; without it these
//! tests skip, by name.

use std::io::Write;
use std::time::Duration;

use coinop::sandbox::docker::Importer;
use coinop::sandbox::{Backend, Error, Exit, Limit, Policy};

use crate::common::{
    Base, IMAGE, OK, backend, containers, name, policy, rest, sandbox, sandbox_with, sh, soon, start, until,
};
use crate::engine;

/// Podman's address, or the test is skipped by its name.
macro_rules! podman {
    () => {
        match podman(std::thread::current().name().unwrap_or("a test")) {
            Some(host) => host,
            None => return,
        }
    };
}

/// No part that must be there: this test says that it skips, also where parts are required.
fn podman(test: &str) -> Option<String> {
    let host = std::env::var("E2E_PODMAN_HOST").ok().filter(|host| !host.is_empty());
    let why = match &host {
        None => "E2E_PODMAN_HOST names no Podman (`.ci/podman start` starts one)".to_owned(),
        Some(at) => match engine::get(at, "/_ping") {
            Ok(answer) if answer.ends_with("\r\n\r\nOK") => return host,
            other => format!("no Podman answers at {at}: {other:?}"),
        },
    };
    std::io::stderr().write_all(format!("SKIPPED {test}: {why}\n").as_bytes()).unwrap();
    None
}

#[tokio::test]
async fn on_podman_a_job_runs_over_its_base_and_its_changes_come_out() {
    let host = podman!();
    let node = name("pmbase");
    let backend = backend(&host, &node, IMAGE, 0).await.unwrap();
    backend.admit(&policy()).unwrap();
    assert!(backend.identity().image.contains("coinop-test"), "{}", backend.identity().image);
    let base = Base::new();
    std::fs::write(base.0.path().join("a"), "before\n").unwrap();
    let sandbox = sandbox_with(&backend, policy(), Some(base)).await;
    let (out, exit) =
        sh(&*sandbox, "cat a; echo after > a; id -un; ls -d /job; ls /sys/class/net; touch /x /job/x").await;
    assert!(
        out.starts_with("before\njob\n/job\nlo\n") && exit == Some(Exit::Code { code: 1 }),
        "{exit:?}: {out}"
    );
    assert_eq!(out.matches("Read-only file system").count(), 1, "{out}");
    sandbox.write_file("/job/given", b"given").await.unwrap();
    assert_eq!(sh(&*sandbox, "cat /job/given").await, ("given".to_owned(), OK));
    let changes = sandbox.changes(1 << 20).await.unwrap();
    assert_eq!(changes.iter().map(|one| one.path.as_slice()).collect::<Vec<_>>(), [b"a"]);
    sandbox.destroy().await.unwrap();
    until("every container is gone", || containers(&host, &node).is_empty()).await;
}

#[tokio::test]
async fn on_podman_the_limits_hold_inodes_among_them() {
    let host = podman!();
    let backend = backend(&host, &name("pmlimits"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox_with(&backend, Policy { inodes: 20, disk_bytes: 1 << 20, ..policy() }, None).await;
    let (out, _) =
        sh(&*sandbox, "i=0; while touch n$i 2>/dev/null; do i=$((i+1)); done; echo $i; rm n*").await;
    assert_eq!(out, "13\n");
    let (out, _) =
        sh(&*sandbox, "dd if=/dev/zero of=f bs=4096 count=10000 2>/dev/null; stat -c %s f; ulimit -n").await;
    assert_eq!(out, format!("{}\n128\n", (1 << 20) / 64 * 44));
    let fork = "i=0; while [ $i -lt 100 ]; do sleep 1000 & i=$((i+1)); done";
    let (out, _) = rest(&mut start(&*sandbox, fork, Some(Duration::from_secs(10)), false).await).await;
    assert!(String::from_utf8_lossy(&out).contains("fork"), "{}", String::from_utf8_lossy(&out));
    let hog = "dd if=/dev/zero of=/dev/null bs=200M count=1";
    let (_, exit) = sh(&*sandbox, hog).await;
    assert_eq!(exit, Some(Exit::Limit { limit: Limit::Memory }));
    sandbox.destroy().await.unwrap();
}

/// The shim mounts with a power that no job may ever have.
#[tokio::test]
async fn on_podman_neither_the_shim_nor_a_job_keeps_the_power_to_mount() {
    let host = podman!();
    let node = name("pmpower");
    let backend = backend(&host, &node, IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    let (out, exit) = sh(
        &*sandbox,
        "mount -t tmpfs x /tmp 2>&1; grep -E '^Cap(Inh|Prm|Eff|Amb)|^NoNew|^Seccomp:' /proc/self/status",
    )
    .await;
    assert!(out.starts_with("mount: ") && exit == OK, "{out}");
    assert_eq!(out.matches("\t0000000000000000\n").count(), 4, "{out}");
    assert!(out.contains("NoNewPrivs:\t1\nSeccomp:\t2\n"), "{out}");
    let found = containers(&host, &node);
    let id = found[0]["Id"].as_str().unwrap();
    let told = engine::get(&host, &format!("/containers/{id}/json")).unwrap();
    let told: serde_json::Value = serde_json::from_str(told.split_once("\r\n\r\n").unwrap().1).unwrap();
    let how = &told["HostConfig"];
    assert_eq!(
        (&how["NetworkMode"], &how["ReadonlyRootfs"], &how["Privileged"]),
        (&"none".into(), &true.into(), &false.into())
    );
    let shim = std::fs::read_to_string(format!("/proc/{}/status", told["State"]["Pid"])).unwrap();
    for set in ["CapInh:\t0000000000000000\n", "CapPrm:\t00000000000000c0\n", "CapEff:\t00000000000000c0\n"] {
        assert!(shim.contains(set), "{set:?} is not in\n{shim}");
    }
    sandbox.destroy().await.unwrap();
}

#[tokio::test]
async fn on_podman_a_sandbox_from_the_pool_is_ready_and_nothing_is_left() {
    let host = podman!();
    let node = name("pmpool");
    let first = backend(&host, &node, IMAGE, 1).await.unwrap();
    first.warm_up(&policy()).await.unwrap();
    assert_eq!(containers(&host, &node).len(), 1);
    let one = sandbox(&first).await;
    assert_eq!(sh(&*one, "echo on").await, ("on\n".to_owned(), OK));
    let mut long = start(&*one, "setsid sleep 1000 & sleep 1000", None, false).await;
    soon("the kill", one.kill()).await.unwrap();
    assert_eq!(rest(&mut long).await.1, None, "it ended with its sandbox");
    // A node that was killed leaves them to its next life.
    std::mem::forget(one);
    std::mem::forget(first);
    let next = backend(&host, &node, IMAGE, 0).await.unwrap();
    assert!(next.reap().await.unwrap() >= 1);
    until("every container is gone", || containers(&host, &node).is_empty()).await;
}

#[tokio::test]
async fn podman_is_not_given_an_image_with_settings_that_it_would_take_for_one() {
    let host = podman!();
    let tar = tempfile::NamedTempFile::new().unwrap();
    let settings = vec!["ENV A=b".to_owned(), "ENV C=d".to_owned()];
    let why =
        Importer::connect(Some(&host)).await.unwrap().import("x:y", tar.path(), settings).await.unwrap_err();
    assert!(matches!(why, Error::Host { doing: "import the image", .. }), "{why}");
    assert!(why.to_string().contains("`podman import --change"), "{why}");
}
