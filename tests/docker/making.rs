//! How containers are made and unmade: any policy and image, nodes beside each other, makers that give up.

use std::time::Duration;

use coinop::sandbox::docker::{Docker, Importer, Options};
use coinop::sandbox::{Backend, Policy, Spec};

use crate::common::{IMAGE, OK, backend, containers, name, policy, sandbox, sandbox_with, sh, soon, until};
use crate::engine;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_maker_that_gives_up_leaves_nothing() {
    let host = engine!();
    let node = name("giveup");
    let backend = backend(&host, &node, IMAGE, 0).await.unwrap();
    for step in 0..24 {
        let spec = Spec { id: "t".to_owned(), base: None, policy: policy() };
        let made = tokio::time::timeout(Duration::from_millis(step * 12), backend.create(spec)).await;
        drop(made);
    }
    until("every container is gone", || containers(&host, &node).is_empty()).await;
}

#[tokio::test]
async fn the_least_of_each_clause_makes_a_sandbox() {
    let host = engine!();
    let backend = backend(&host, &name("least"), IMAGE, 0).await.unwrap();
    for least in [
        Policy { pids: 1, ..policy() },
        Policy { memory_bytes: 8 << 20, ..policy() },
        Policy { cpu_milli: 10, ..policy() },
        Policy { disk_bytes: 64 << 10, inodes: 1, open_files: 8, ..policy() },
    ] {
        let made = backend.create(Spec { id: "t".to_owned(), base: None, policy: least.clone() }).await;
        let sandbox = made.unwrap_or_else(|why| panic!("{least:?}: {why}"));
        assert_eq!(sh(&*sandbox, "echo on").await, ("on\n".to_owned(), OK), "{least:?}");
        sandbox.destroy().await.unwrap();
    }
}

#[tokio::test]
async fn the_inodes_are_shared_out_to_the_last() {
    let host = engine!();
    let backend = backend(&host, &name("inodes"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox_with(&backend, Policy { inodes: 20, ..policy() }, None).await;
    let (out, _) = sh(&*sandbox, "i=0; while touch n$i 2>/dev/null; do i=$((i+1)); done; echo $i").await;
    assert_eq!(out, "13\n");
    sandbox.destroy().await.unwrap();
}

/// A volume of an image would be a folder on the engine's disk, without a limit.
#[tokio::test]
async fn an_image_with_volumes_gives_no_place_to_write() {
    let host = engine!();
    let (node, image) = (name("volumes"), "coinop-test:volumes");
    let tar = tempfile::NamedTempFile::new().unwrap();
    let mut packed = tar::Builder::new(tar.reopen().unwrap());
    let busybox =
        ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|at| std::path::Path::new(at).exists());
    let Some(busybox) = busybox else {
        return crate::skip::skip("an_image_with_volumes_gives_no_place_to_write", "no busybox");
    };
    for name in ["bin/busybox", "bin/sh"] {
        packed.append_path_with_name(busybox, name).unwrap();
    }
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o777);
    header.set_entry_type(tar::EntryType::Directory);
    packed.append_data(&mut header, "data", std::io::empty()).unwrap();
    packed.finish().unwrap();
    let settings = vec!["VOLUME /data".to_owned(), "ENV PATH=/bin".to_owned(), "ENV SECRET=s".to_owned()];
    Importer::connect(Some(&host)).await.unwrap().import(image, tar.path(), settings).await.unwrap();
    let backend = backend(&host, &node, image, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    let id = containers(&host, &node)[0]["Id"].as_str().unwrap().to_owned();
    let told = engine::get(&host, &format!("/containers/{id}/json")).unwrap();
    let told: serde_json::Value = serde_json::from_str(told.split_once("\r\n\r\n").unwrap().1).unwrap();
    // The shim and its file of names.
    assert_eq!(told["Mounts"].as_array().unwrap().len(), 2, "{}", told["Mounts"]);
    assert_eq!(told["HostConfig"]["Init"], false);
    let (out, _) = sh(&*sandbox, "echo x > /data/x || echo closed; echo \"<$SECRET>\"").await;
    assert!(out.contains("closed\n<>\n") && out.contains("Read-only file system"), "{out}");
    sandbox.destroy().await.unwrap();
}

/// Every node has its shim, and a start beside a running one leaves that in peace.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_start_at_once_do_not_disturb_each_other() {
    let host = engine!();
    let node = name("atonce");
    let first = backend(&host, &node, IMAGE, 0).await.unwrap();
    let mut others = Vec::new();
    for n in 0..6 {
        let (host, node) = (host.clone(), if n < 3 { node.clone() } else { name(&format!("beside{n}")) });
        others.push(tokio::spawn(async move {
            backend(&host, &node, IMAGE, 0)
                .await
                .map(|made| made.admit(&policy()).map_err(|why| why.to_string()))
        }));
    }
    for _ in 0..4 {
        let sandbox = sandbox(&first).await;
        assert_eq!(sh(&*sandbox, "echo on").await, ("on\n".to_owned(), OK));
        sandbox.destroy().await.unwrap();
    }
    for other in others {
        assert_eq!(soon("a start", other).await.unwrap().unwrap(), Ok(()));
    }
}

#[tokio::test]
async fn destroyed_means_gone_from_the_engine_s_list() {
    let host = engine!();
    let node = name("gone");
    let backend = backend(&host, &node, IMAGE, 0).await.unwrap();
    for _ in 0..5 {
        let sandbox = sandbox(&backend).await;
        sh(&*sandbox, "sleep 1000 & exit 0").await;
        sandbox.kill().await.unwrap();
        sandbox.destroy().await.unwrap();
        assert_eq!(containers(&host, &node).len(), 0);
    }
}

#[tokio::test]
async fn an_engine_behind_tls_or_ssh_that_cannot_be_reached_is_told_not_a_panic() {
    for (host, says) in [
        ("https://127.0.0.1:1", ""),
        ("tcp://127.0.0.1:1", "reach the engine"),
        ("ssh://nobody@127.0.0.1:1", "~/.ssh/config"),
        ("ssh://nobody@127.0.0.1", ""),
    ] {
        let options = Options { host: Some(host.to_owned()), ..Options::new(IMAGE, "x") };
        let why = soon(host, Docker::connect(options)).await.err().unwrap().to_string();
        eprintln!("{host}: {why}");
        assert!(why.contains(says), "{why}");
    }
}

/// A node that was killed while it wrote its shim, and one that was another version before.
#[tokio::test]
async fn a_spoilt_shim_is_mended_and_an_older_one_goes() {
    let host = engine!();
    let node = name("spoilt");
    let engine = bollard::Docker::connect_with_host(&host).unwrap();
    let labels = std::collections::HashMap::from([("coinop.node".to_owned(), node.clone())]);
    let older = bollard::models::VolumeCreateRequest {
        name: Some(format!("coinop-shim-{node}-older")),
        labels: Some(labels),
        ..Default::default()
    };
    engine.create_volume(older).await.unwrap();
    let of_node = || async {
        let listed = engine
            .list_volumes(None::<bollard::query_parameters::ListVolumesOptions>)
            .await
            .unwrap()
            .volumes
            .unwrap();
        listed.into_iter().filter(|one| one.name.contains(&node)).collect::<Vec<_>>()
    };
    let first = backend(&host, &node, IMAGE, 0).await.unwrap();
    first.reap().await.unwrap();
    let left = of_node().await;
    assert_eq!(left.len(), 1, "{left:?}");
    let spoilt = std::fs::write(std::path::Path::new(&left[0].mountpoint).join("shim"), "half");
    if spoilt.is_err() {
        return crate::skip::skip(
            "a_spoilt_shim_is_mended_and_an_older_one_goes",
            "the engine's disk is not ours",
        );
    }
    let second = backend(&host, &node, IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&second).await;
    assert_eq!(sh(&*sandbox, "echo on").await, ("on\n".to_owned(), OK));
    sandbox.destroy().await.unwrap();
    engine
        .remove_volume(&left[0].name, None::<bollard::query_parameters::RemoveVolumeOptions>)
        .await
        .unwrap();
}
