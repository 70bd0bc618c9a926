//! Files in and out of a container: whatever the names, however full it is, whoever gave up in the middle.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::Duration;

use coinop::sandbox::{Content, Error, Exit, Limit, Policy};

use crate::common::{Base, IMAGE, OK, backend, name, policy, sandbox, sandbox_with, sh, soon, until};

#[tokio::test]
async fn a_base_arrives_as_it_is_whatever_its_names_and_links() {
    let host = engine!();
    let backend = backend(&host, &name("odd"), IMAGE, 0).await.unwrap();
    let base = Base::new();
    let at = |name: &[u8]| base.0.path().join(OsStr::from_bytes(name));
    let long = "n".repeat(250);
    let deep = format!("{}/{}/{}", "d".repeat(120), "e".repeat(120), "f".repeat(120));
    std::fs::create_dir_all(at(deep.as_bytes())).unwrap();
    std::fs::create_dir_all(at(b".git/empty")).unwrap();
    for name in [
        &b"not utf-8 \xff\xfe"[..],
        b"line\nbreak",
        b"-rf",
        b" ",
        b"back\\slash",
        b"c:",
        b"...",
        long.as_bytes(),
    ] {
        std::fs::write(at(name), name).unwrap();
    }
    std::fs::write(at(format!("{deep}/file").as_bytes()), "deep").unwrap();
    std::fs::write(at(b"script"), "#!/bin/sh\necho ran\n").unwrap();
    std::fs::set_permissions(at(b"script"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let targets = ["a//b", "./script", "a/./b", "a/../script", "/", "//x//y/", "gone/", &"t/".repeat(400)];
    for (n, target) in targets.iter().enumerate() {
        symlink(target, at(format!("link{n}").as_bytes())).unwrap();
    }
    let sandbox = sandbox_with(&backend, policy(), Some(base)).await;
    let changes = sandbox.changes(1 << 20).await.unwrap();
    assert!(
        changes.is_empty(),
        "{:?}",
        changes.iter().map(|one| String::from_utf8_lossy(&one.path)).collect::<Vec<_>>()
    );
    for (n, target) in targets.iter().enumerate() {
        assert_eq!(sh(&*sandbox, &format!("readlink link{n}")).await.0, format!("{target}\n"));
    }
    assert_eq!(
        sh(&*sandbox, &format!("./script; cat {deep}/file; ls -d .git/empty")).await.0,
        "ran\ndeep.git/empty\n"
    );
    // And what a job makes is told as it is.
    let made = "ln -s a//./b/ made; printf x > \"$(printf 'x\\377')\"; rm -- -rf";
    assert_eq!(sh(&*sandbox, made).await.1, OK);
    let told: Vec<_> =
        sandbox.changes(1 << 20).await.unwrap().into_iter().map(|one| (one.path, one.to)).collect();
    let file = Content::File { bytes: b"x".to_vec(), executable: false };
    assert_eq!(
        told,
        [
            (b"-rf".to_vec(), Content::Deleted),
            (b"made".to_vec(), Content::Symlink { target: b"a//./b/".to_vec() }),
            (b"x\xff".to_vec(), file)
        ]
    );
    sandbox.destroy().await.unwrap();
}

#[tokio::test]
async fn work_on_files_that_is_given_up_does_not_hold_up_the_next() {
    let host = engine!();
    let backend = backend(&host, &name("given"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    assert_eq!(sh(&*sandbox, "head -c 9000000 /dev/zero > big; echo small > small").await.1, OK);
    let bytes = vec![1; 9 << 20];
    for step in 0..30 {
        let patience = Duration::from_micros(200 * step);
        let given_up = tokio::time::timeout(patience, sandbox.read_file("big", 10 << 20)).await;
        let changes = tokio::time::timeout(patience, sandbox.changes(20 << 20)).await;
        let written = tokio::time::timeout(patience, sandbox.write_file("other", &bytes)).await;
        drop((given_up, changes, written));
        let read = soon("the next read", sandbox.read_file("small", 10)).await;
        assert_eq!(read.unwrap(), b"small\n", "{step}");
    }
    soon("the next write", sandbox.write_file("more", b"more")).await.unwrap();
    sandbox.destroy().await.unwrap();
}

#[tokio::test]
async fn a_job_that_fills_its_memory_with_files_ends_nobody_but_itself() {
    let host = engine!();
    let backend = backend(&host, &name("full"), IMAGE, 0).await.unwrap();
    let policy = Policy { memory_bytes: 32 << 20, disk_bytes: 1 << 30, inodes: 100_000, ..policy() };
    for fill in [
        "dd if=/dev/zero of=big bs=1M",
        "dd if=/dev/zero of=/tmp/big bs=64k & dd if=/dev/zero of=big bs=64k; wait; exit 1",
        "i=0; while mkdir d$i && touch d$i/f; do i=$((i+1)); done; exit 1",
    ] {
        let sandbox = sandbox_with(&backend, policy.clone(), None).await;
        sandbox.write_file("kept", b"kept").await.unwrap();
        let (out, exit) = sh(&*sandbox, &format!("({fill}) 2>&1 | tail -n 3; exit 1")).await;
        eprintln!("{fill}: {out} {exit:?}");
        assert!(exit.is_some(), "the sandbox went with it");
        assert_eq!(sandbox.read_file("kept", 10).await.unwrap(), b"kept");
        let changes = soon("the changes", sandbox.changes(1 << 20)).await;
        assert!(!matches!(changes, Err(Error::Gone(_) | Error::Host { .. })), "{:?}", changes.err());
        sandbox.kill().await.unwrap();
        assert_eq!(sandbox.read_file("kept", 10).await.unwrap(), b"kept");
        sandbox.destroy().await.unwrap();
    }
}

#[tokio::test]
async fn a_base_beyond_the_limits_comes_on_top_of_them() {
    let host = engine!();
    let backend = backend(&host, &name("top"), IMAGE, 0).await.unwrap();
    let base = Base::new();
    for n in 0..300 {
        std::fs::create_dir_all(base.0.path().join(format!("d{}/e{n}", n % 7))).unwrap();
        std::fs::write(base.0.path().join(format!("d{}/e{n}/f", n % 7)), vec![1; 200_001]).unwrap();
    }
    let policy = Policy { memory_bytes: 24 << 20, disk_bytes: 1 << 20, inodes: 64, ..policy() };
    let sandbox = sandbox_with(&backend, policy, Some(base)).await;
    assert_eq!(soon("the changes", sandbox.changes(1 << 20)).await.unwrap(), []);
    let (out, exit) = sh(&*sandbox, "i=0; while touch n$i 2>/dev/null; do i=$((i+1)); done; echo $i; rm n*; \
        dd if=/dev/zero of=z bs=1k count=700 2>/dev/null && echo fits; dd if=/dev/zero of=y bs=1k count=100 2>/dev/null || echo full").await;
    assert_eq!((out.as_str(), exit), ("44\nfits\nfull\n", OK));
    sandbox.destroy().await.unwrap();
}

#[tokio::test]
async fn what_a_closed_or_full_place_says_is_told() {
    let host = engine!();
    let backend = backend(&host, &name("closed"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox_with(&backend, Policy { disk_bytes: 1 << 20, ..policy() }, None).await;
    let refused = soon("a write", sandbox.write_file("big", &vec![1; 4 << 20])).await;
    assert!(
        matches!(&refused, Err(Error::Host { source, .. }) if source.raw_os_error() == Some(28)),
        "{refused:?}"
    );
    assert_eq!(
        sh(&*sandbox, "rm big; mkdir d; echo x > d/f; chmod 0 d/f d; : > f; chmod 0444 f").await.1,
        OK
    );
    assert_eq!(sandbox.read_file("d/f", 10).await.unwrap(), b"x\n");
    assert!(matches!(sandbox.read_file("d/f", 1).await, Err(Error::TooLarge { cap_bytes: 1, .. })));
    assert!(matches!(sandbox.read_file("f/x", 1).await, Err(Error::NotFound(_))));
    assert!(matches!(sandbox.write_file("f/x", b"").await, Err(Error::BadPath(_))));
    sandbox.write_file("empty", b"").await.unwrap();
    assert_eq!(sandbox.read_file("empty", 0).await.unwrap(), b"");
    sandbox.destroy().await.unwrap();
}

/// Whether some process of this host has this text in its command line. The engine of these tests is on it.
fn is_running(text: &str) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    lines.into_iter().any(|line| String::from_utf8_lossy(&line).contains(text))
}

/// A process that the kernel killed for memory between two commands is no reason of the second one's end.
#[tokio::test]
async fn only_a_command_during_which_memory_ran_out_is_told_to_have_hit_the_limit() {
    let host = engine!();
    let backend = backend(&host, &name("blame"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox_with(&backend, Policy { memory_bytes: 32 << 20, ..policy() }, None).await;
    // Told from all others by its name, which the shell around it carries as well: where memory is that short, the
    // kernel may take the shell with it.
    let hog = format!("{:020}", std::process::id());
    let later = format!("(sleep 0.1; : > begun; tail -n {hog} /dev/zero) >/dev/null 2>&1 & exit 0");
    // Often: what a process had is not free yet in the moment of its death, and the next command comes just then.
    for _ in 0..10 {
        assert_eq!(sh(&*sandbox, &later).await.1, OK);
        until("the hog's end", || !is_running(&hog)).await;
        assert_eq!(sh(&*sandbox, "rm begun && exit 5").await.1, Some(Exit::Code { code: 5 }));
    }
    let (_, exit) = sh(&*sandbox, "tail /dev/zero").await;
    assert_eq!(exit, Some(Exit::Limit { limit: Limit::Memory }));
    sandbox.destroy().await.unwrap();
}
