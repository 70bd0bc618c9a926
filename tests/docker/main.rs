//! The docker backend's own promises, on a real engine: what images it takes, what it leaves behind, what it says
//! when there is no engine. What it shares with every backend is in `tests/conformance`.

#[macro_use]
mod common;
#[path = "../support/engine.rs"]
mod engine;
mod engines;
mod files;
mod kills;
mod making;
mod podman;
mod runtimes;
mod streams;
#[expect(dead_code, reason = "each test program uses a part of it")]
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod users;

use std::time::Duration;

use coinop::relay::local::LocalRelay;
use coinop::sandbox::{Backend, Command, Exit, Policy, Spec};
use common::{IMAGE, backend, containers, name, policy, run, sandbox, sandbox_with, until};
use sha2::{Digest, Sha256};
use support::buyer::{Buyer, printed};
use support::git::{README, Served};
use support::process::{Home, Nap};
use support::skip;

#[tokio::test]
async fn an_image_of_one_static_program_is_enough() {
    let host = engine!();
    let backend = backend(&host, &name("scratch"), "coinop-test:scratch", 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    assert_eq!(run(&*sandbox, &["/say"]).await, ("said\n".to_owned(), Some(Exit::Code { code: 0 })));
    assert_eq!(run(&*sandbox, &["/say", "7"]).await.1, Some(Exit::Code { code: 7 }));
    assert_eq!(run(&*sandbox, &["sh"]).await.1, Some(Exit::NotStarted { errno: 2 }));
    sandbox.write_file("a/b", b"c").await.unwrap();
    assert_eq!(sandbox.changes(100).await.unwrap().len(), 1);
    sandbox.destroy().await.unwrap();
}

#[tokio::test]
async fn an_image_is_named_by_its_digest_in_the_results() {
    let host = engine!();
    let backend = backend(&host, &name("digest"), IMAGE, 0).await.unwrap();
    let identity = backend.identity();
    assert_eq!(identity.backend, "docker");
    let (tag, digest) = identity.image.split_once("@sha256:").unwrap();
    assert_eq!((tag, digest.len()), (IMAGE, 64));
}

#[tokio::test]
async fn an_image_that_is_not_to_be_had_is_told_by_name() {
    let host = engine!();
    let missing = "127.0.0.1:1/nobody/nothing:none";
    let why = backend(&host, &name("missing"), missing, 0).await.err().unwrap().to_string();
    assert!(why.contains(missing) && why.contains("is not on the engine, and cannot be pulled"), "{why}");
}

#[tokio::test]
async fn an_engine_that_is_not_there_is_told() {
    let why = backend("unix:///nowhere/sock", "x", IMAGE, 0).await.err().unwrap().to_string();
    assert!(why.contains("/nowhere/sock"), "{why}");
    let why = backend("carrier-pigeon://x", "x", IMAGE, 0).await.err().unwrap().to_string();
    assert!(why.starts_with("the sandbox could not read the engine's address"), "{why}");
}

#[tokio::test]
async fn a_container_is_made_hardened() {
    let host = engine!();
    let node = name("hard");
    let backend = backend(&host, &node, IMAGE, 0).await.unwrap();
    let sandbox = sandbox_with(&backend, Policy { swap_bytes: 8 << 20, ..policy() }, None).await;
    let found = containers(&host, &node);
    assert_eq!(found.len(), 1, "{found:?}");
    let answer =
        engine::get(&host, &format!("/containers/{}/json", found[0]["Id"].as_str().unwrap())).unwrap();
    let told: serde_json::Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    let how = &told["HostConfig"];
    assert_eq!((&how["NetworkMode"], &told["Config"]["NetworkDisabled"]), (&"none".into(), &true.into()));
    assert_eq!(how["CapDrop"], serde_json::json!(["ALL"]));
    assert_eq!(how["CapAdd"].as_array().unwrap().len(), 2, "{how}");
    assert_eq!((&how["ReadonlyRootfs"], &how["Privileged"]), (&true.into(), &false.into()));
    assert_eq!(how["SecurityOpt"], serde_json::json!(["no-new-privileges"]));
    assert_eq!((&how["IpcMode"], &how["PidMode"]), (&"private".into(), &"".into()));
    assert!(how["Binds"].is_null() && how["Devices"].as_array().is_none_or(Vec::is_empty), "{how}");
    let (memory, swap) = (how["Memory"].as_u64().unwrap(), how["MemorySwap"].as_u64().unwrap());
    // With the shim's own 4 MiB, both together; under cgroup v1 a sixteenth of the job's is for its sockets.
    let apart = std::path::Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists();
    let sockets = if apart { 8 << 20 } else { 0 };
    assert_eq!((memory + sockets, swap + sockets), (132 << 20, 140 << 20));
    assert_eq!((how["PidsLimit"].as_u64(), how["NanoCpus"].as_u64()), (Some(34), Some(1_000_000_000)));
    assert_eq!((&how["LogConfig"]["Type"], &how["AutoRemove"]), (&"none".into(), &true.into()));
    // From the engine's disk come the shim and its file of names, and they are read-only.
    let mounts = told["Mounts"].as_array().unwrap();
    assert!(mounts.iter().all(|mount| mount["RW"] == false), "{mounts:?}");
    let mut places: Vec<&str> = mounts.iter().filter_map(|mount| mount["Destination"].as_str()).collect();
    places.sort_unstable();
    assert_eq!(places, ["/.coinop", "/etc/hosts"]);
    sandbox.destroy().await.unwrap();
}

#[tokio::test]
async fn its_only_interface_is_a_loopback_that_works() {
    let host = engine!();
    let backend = backend(&host, &name("loop"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    let (links, _) = run(&*sandbox, &["sh", "-c", "ls /sys/class/net; wc -l < /proc/net/route"]).await;
    // One line of the routes is their head.
    assert_eq!(links.split_whitespace().collect::<Vec<_>>(), ["lo", "1"]);
    let (state, _) = run(&*sandbox, &["ifconfig", "lo"]).await;
    assert!(state.contains("UP") && state.contains("127.0.0.1"), "{state}");
    sandbox.destroy().await.unwrap();
}

/// Docker 20.10 locks up when the endpoints of many containers begin and end at once; a sandbox has none.
#[tokio::test]
async fn many_that_begin_and_end_at_once_all_succeed() {
    let host = engine!();
    let backend = std::sync::Arc::new(backend(&host, &name("many"), IMAGE, 0).await.unwrap());
    let all: Vec<_> = (0..20)
        .map(|n| {
            let backend = backend.clone();
            tokio::spawn(async move {
                let spec = Spec { id: format!("many-{n}"), base: None, policy: policy() };
                let sandbox = backend.create(spec).await.unwrap();
                let said = run(&*sandbox, &["echo", "ready"]).await;
                sandbox.destroy().await.unwrap();
                said
            })
        })
        .collect();
    for one in all {
        assert_eq!(one.await.unwrap(), ("ready\n".to_owned(), Some(Exit::Code { code: 0 })));
    }
}

#[tokio::test]
async fn a_sandbox_from_the_pool_is_used_once_and_replaced() {
    let host = engine!();
    let node = name("pool");
    let backend = backend(&host, &node, IMAGE, 1).await.unwrap();
    backend.warm_up(&policy()).await.unwrap();
    let waiting = containers(&host, &node)[0]["Id"].clone();
    let first = sandbox(&backend).await;
    assert_eq!(run(&*first, &["sh", "-c", "echo mine > /tmp/left"]).await.1, Some(Exit::Code { code: 0 }));
    // The next one is being started meanwhile.
    until("a successor waits", || containers(&host, &node).iter().any(|one| one["Id"] != waiting)).await;
    first.destroy().await.unwrap();
    assert!(containers(&host, &node).iter().all(|one| one["Id"] != waiting), "a used one is gone");
    let second = sandbox(&backend).await;
    assert_eq!(run(&*second, &["ls", "/tmp"]).await, (String::new(), Some(Exit::Code { code: 0 })));
    second.destroy().await.unwrap();
    drop(backend);
    until("nothing waits for a node that is gone", || containers(&host, &node).is_empty()).await;
}

#[tokio::test]
async fn what_is_dropped_or_destroyed_leaves_nothing() {
    let host = engine!();
    let node = name("clean");
    let backend = backend(&host, &node, IMAGE, 0).await.unwrap();
    for round in 0..6 {
        let sandbox = sandbox(&backend).await;
        let long = Command { argv: ["sleep", "1000"].map(str::to_owned).to_vec(), ..Command::default() };
        let _running = sandbox.exec(long).await.unwrap();
        if round % 2 == 0 {
            sandbox.destroy().await.unwrap();
        } else {
            drop(sandbox);
        }
    }
    until("every container is gone", || containers(&host, &node).is_empty()).await;
}

#[tokio::test]
async fn a_start_removes_what_an_earlier_life_left_and_nothing_else() {
    let host = engine!();
    let (node, other) = (name("reap"), name("else"));
    let earlier = backend(&host, &node, IMAGE, 0).await.unwrap();
    let neighbour = backend(&host, &other, IMAGE, 0).await.unwrap();
    let theirs = sandbox(&neighbour).await;
    // Its line stays open: nothing but the reaper ends it.
    std::mem::forget(sandbox(&earlier).await);
    let now = backend(&host, &node, IMAGE, 0).await.unwrap();
    let ours = sandbox(&now).await;
    assert_eq!(now.reap().await.unwrap(), 1);
    assert_eq!(now.reap().await.unwrap(), 0);
    assert_eq!((containers(&host, &node).len(), containers(&host, &other).len()), (1, 1));
    assert_eq!(run(&*ours, &["true"]).await.1, Some(Exit::Code { code: 0 }));
    theirs.destroy().await.unwrap();
    ours.destroy().await.unwrap();
}

/// A node that is killed tells nobody: its shim sees its line close.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_serves_from_containers_and_a_killed_one_leaves_none() {
    let host = engine!();
    let relay = LocalRelay::start().await.unwrap();
    let served = Served::start().await;
    let (at, image) = (format!("docker.host={host}"), format!("docker.image={IMAGE}"));
    let home = Home::new(&[relay.url()], &["--sandbox", "docker", "--set", &at, "--set", &image]);
    let data = Sha256::digest(home.data.as_os_str().as_encoded_bytes());
    let node: String = hex::encode(data).chars().take(8).collect();
    let buyer = Buyer::at(&[relay.url()], home.keys.public_key()).await;

    let life = home.start();
    let nap = Nap::new();
    let request = buyer.post(&buyer.order(Some(&served.url), &[&nap.command(), "cat README.md"])).await;
    nap.begun().await;
    life.kill().await;
    nap.gone(Duration::from_secs(5)).await;
    until("its containers are gone", || containers(&host, &node).is_empty()).await;

    let life = home.start();
    nap.wake().await;
    let answer = buyer.result(&request).await;
    assert_eq!(printed(&answer), README);
    let proof = answer.reply.proof.as_ref().unwrap();
    assert_eq!(proof.commit.as_ref(), Some(&served.commit));
    assert!(proof.image.starts_with(&format!("{IMAGE}@sha256:")) && proof.backend == "docker", "{proof:?}");
    assert!(life.stop().await.success());
    until("a drained node leaves none", || containers(&host, &node).is_empty()).await;
}
