//! The walls: what a job must not see, reach, or do.

use std::os::linux::net::SocketAddrExt;

use coinop::sandbox::Command;

use crate::common::{bench, python, python_bench, run, sh, words};

#[tokio::test]
async fn nothing_of_the_host_can_be_read() {
    let Some(bench) = bench!() else { return };
    let secret = bench.dir.path().join("secret");
    std::fs::write(&secret, "s").unwrap();
    let sandbox = bench.sandbox_over(|base| std::fs::write(base.join("a"), "a").unwrap()).await;
    let places = format!(
        "for p in /root /home/* /var /srv /mnt /media /opt /sys /boot /etc/shadow /etc/ssh /run/* /proc/1/root \
         /proc/1/cwd/ /proc/1/environ /proc/1/mem /proc/1/maps {} {}; do \
         [ \"$p\" = /home/job ] || ! ls -d $p/. $p 2>/dev/null && ! head -c 1 $p 2>/dev/null || echo SEEN $p; done",
        secret.display(),
        bench.dir.path().display()
    );
    let said = sh(&*sandbox, &places).await;
    for line in said.out.lines().filter(|line| line.starts_with("SEEN")) {
        // The entry itself is init's; that its inside stays closed is asked next.
        assert!(line.starts_with("SEEN /proc/1/"), "{}", said.out);
    }
    for closed in [
        "cat /proc/1/environ",
        "cat /proc/1/maps",
        "ls /proc/1/root/",
        "ls /proc/1/fd/",
        "head -c1 /proc/1/mem",
    ] {
        let ran = sh(&*sandbox, closed).await;
        assert!(ran.err.contains("ermission denied") && ran.out.is_empty(), "{closed}: {ran:?}");
    }
    let listed = sh(&*sandbox, "ls -A /").await.ok();
    let known = [
        "bin",
        "dev",
        "etc",
        "home",
        "job",
        "lib",
        "lib32",
        "lib64",
        "libexec",
        "libx32",
        "proc",
        "run",
        "sbin",
        "tmp",
        "usr",
        "void",
        "workspace",
    ];
    assert!(listed.lines().all(|name| known.contains(&name)), "{listed}");
}

#[tokio::test]
async fn no_path_of_the_host_shows_in_the_mounts_or_the_processes() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox_over(|_| {}).await;
    let shown =
        sh(&*sandbox, "cat /proc/self/mountinfo /proc/1/cmdline /proc/1/comm /proc/self/cgroup").await.ok();
    let dir = bench.dir.path().display().to_string();
    let helper = crate::common::helper();
    assert!(!shown.contains(&dir) && !shown.contains(helper.parent().unwrap().to_str().unwrap()), "{shown}");
    assert!(
        shown
            .lines()
            .filter(|line| line.contains("::") || line.contains(":memory:"))
            .all(|line| line.ends_with('/')),
        "{shown}"
    );
}

#[tokio::test]
async fn the_environment_is_only_what_was_given() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    let mut command = words(["env"]);
    command.env.insert("GIVEN".to_owned(), "1 = 2".to_owned());
    let out = run(&*sandbox, command).await.ok();
    let mut names: Vec<&str> = out.lines().map(|line| line.split('=').next().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["GIVEN", "HOME", "PATH", "TMPDIR"], "{out}");
    assert!(out.contains("GIVEN=1 = 2") && out.contains("HOME=/home/job"), "{out}");
}

#[tokio::test]
async fn a_job_is_nobody_special() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    assert_eq!(sh(&*sandbox, "id -u; id -g").await.ok(), "1000\n1000\n");
    let status = sh(&*sandbox, "cat /proc/self/status").await.ok();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(status.contains(&format!("{set}:\t0000000000000000")), "{status}");
    }
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
    assert!(sh(&*sandbox, "hostname").await.ok().trim() == "coinop");
}

#[tokio::test]
async fn only_the_job_s_own_places_can_be_written() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox_over(|_| {}).await;
    for place in ["/", "/usr", "/usr/bin", "/etc", "/dev", "/job", "/run", "/void", "/home", "/proc", "/bin"]
    {
        let ran = sh(&*sandbox, &format!("echo x > {place}/x")).await;
        assert!(!ran.err.is_empty(), "{place} was written");
    }
    for place in ["/workspace", "/tmp", "/home/job", "/dev/shm"] {
        sh(&*sandbox, &format!("echo x > {place}/x && mkdir -p {place}/d && mv {place}/x {place}/d/y"))
            .await
            .ok();
    }
}

#[tokio::test]
async fn there_is_no_network_but_its_own_loopback() {
    let Some(bench) = python_bench!() else { return };
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("coinop-test-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let abstract_socket = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
    let sandbox = bench.sandbox().await;
    let script = format!(
        "
import socket, errno
def no(family, address, *kind):
    s = socket.socket(family, *(kind or (socket.SOCK_STREAM,)))
    s.settimeout(2)
    try:
        s.connect(address)
        print('REACHED', address)
    except OSError as e:
        print(errno.errorcode.get(e.errno, e))
no(socket.AF_INET, ('127.0.0.1', {port}))
no(socket.AF_UNIX, '\\0{name}')
no(socket.AF_INET, ('192.0.2.1', 80))
no(socket.AF_INET, ('169.254.169.254', 80))
no(socket.AF_INET6, ('2001:db8::1', 80))
for family in (40, 17, 38, 15, 16):
    try:
        socket.socket(family, socket.SOCK_RAW, 12)
        print('MADE', family)
    except OSError as e:
        print(errno.errorcode[e.errno])
s = socket.socket()
s.bind(('127.0.0.1', 0)); s.listen()
socket.create_connection(s.getsockname())
print('own loopback')",
        port = tcp.local_addr().unwrap().port()
    );
    let ran = python(&*sandbox, &script).await;
    if bench.memory_is_watched() {
        // No sockets at all: `what_no_watch_can_count_is_refused`.
        assert!(ran.out.is_empty() && ran.err.contains("Address family not supported"), "{ran:?}");
        return;
    }
    let said = ran.ok();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..2], ["ECONNREFUSED", "ECONNREFUSED"], "{said}");
    assert_eq!(lines[2..5], ["ENETUNREACH"; 3], "{said}");
    assert_eq!(lines[5..10], ["EAFNOSUPPORT"; 5], "{said}");
    assert_eq!(lines[10], "own loopback", "{said}");
    drop(abstract_socket);
}

#[tokio::test]
#[cfg_attr(not(target_arch = "x86_64"), ignore = "the numbers of this test are those of x86_64")]
async fn dangerous_system_calls_are_refused_with_a_plain_errno() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox().await;
    let script = "
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in args])
    print(name, ctypes.get_errno() if result < 0 else 'DONE')
for name, number in dict(ptrace=101, mount=165, umount2=166, pivot_root=155, chroot=161, setns=308, bpf=321,
        keyctl=250, add_key=248, userfaultfd=323, perf_event_open=298, process_vm_readv=310, kexec_load=246,
        open_by_handle_at=304, open_tree=428, move_mount=429, fsopen=430, mount_setattr=442, init_module=175,
        pidfd_getfd=438, reboot=169, settimeofday=164, personality=135).items():
    call(name, number, 0, 0, 0, 0, 0)
call('unshare', 272, 0x10000000)
call('clone_newuser', 56, 0x10000000 | 17, 0, 0, 0, 0)
call('prlimit_init', 302, 1, 7, 0, 0)
for name, number in dict(io_uring_setup=425, io_uring_enter=426, io_uring_register=427, clone3=435, memfd_secret=447).items():
    call(name, number, 0, 0, 0, 0)
call('x32_getpid', 0x40000000 + 39)";
    let said = python(&*sandbox, script).await.ok();
    let (denied, absent): (Vec<&str>, Vec<&str>) = said.lines().partition(|line| {
        !line.starts_with("io_uring")
            && !line.starts_with("clone3")
            && !line.starts_with("memfd_secret")
            && !line.starts_with("x32")
    });
    assert_eq!((denied.len(), absent.len()), (26, 6), "{said}");
    for line in denied {
        assert!(line.ends_with(" 1"), "not EPERM: {line}");
    }
    for line in absent {
        assert!(line.ends_with(" 38"), "not ENOSYS: {line}");
    }
}

#[tokio::test]
async fn only_its_own_processes_are_visible_and_init_cannot_be_harmed() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    let listed = sh(&*sandbox, "cd /proc; echo [0-9]*").await.ok();
    assert!(listed.split_whitespace().count() <= 4, "{listed}");
    sh(&*sandbox, "kill -9 1; kill -STOP 1; kill -TERM 1; kill -SEGV 1; kill -CHLD 1; kill -9 -1; true")
        .await;
    assert_eq!(sh(&*sandbox, "echo alive").await.ok(), "alive\n");
}

#[tokio::test]
async fn a_command_starts_with_three_descriptors_and_no_terminal() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox().await;
    let script = "
import os
print(sorted(int(fd) for fd in os.listdir('/proc/self/fd'))[:-1])
print(os.readlink('/proc/self/fd/0'), os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid())
try:
    os.open('/dev/tty', os.O_RDWR)
    print('TTY')
except OSError:
    print('none')
import signal
print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.pthread_sigmask(signal.SIG_BLOCK, []))";
    let said = python(&*sandbox, script).await.ok();
    assert_eq!(said, "[0, 1, 2]\n/dev/null True True\nnone\nTrue set()\n");
    // A pipe into a program that stops reading ends quietly, as in any shell.
    assert_eq!(sh(&*sandbox, "yes | head -n 1").await.ok(), "y\n");
}

#[tokio::test]
async fn a_set_uid_program_gives_nothing() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    let ran =
        sh(&*sandbox, "cp /usr/bin/id ./id && chmod 6755 ./id && ./id -u && su -c id root </dev/null").await;
    assert_eq!(ran.out, "1000\n", "{ran:?}");
}

#[tokio::test]
async fn two_sandboxes_do_not_see_each_other() {
    let Some(bench) = bench!() else { return };
    let (one, two) = (bench.sandbox().await, bench.sandbox().await);
    sh(&*one, "echo secret > /tmp/x; echo secret > /dev/shm/x; echo secret > ~/x; sleep 300 & true")
        .await
        .ok();
    let seen = sh(&*two, "ls /tmp /dev/shm ~; cat /proc/[0-9]*/comm | grep -c sleep").await;
    assert!(!seen.out.contains('x') && seen.out.trim().ends_with('0'), "{seen:?}");
}

#[tokio::test]
async fn a_command_s_folder_must_lie_in_the_workspace() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    sh(&*sandbox, "mkdir -p a/b; ln -s /etc out").await.ok();
    let at = |cwd: &str| Command { cwd: cwd.into(), ..words(["pwd"]) };
    assert_eq!(run(&*sandbox, at("a/b")).await.ok(), "/workspace/a/b\n");
    for bad in ["..", "/etc", "a/../.."] {
        assert!(sandbox.exec(at(bad)).await.is_err(), "{bad}");
    }
    let through_link = run(&*sandbox, at("out")).await.exit;
    assert!(
        matches!(through_link, Some(coinop::sandbox::Exit::NotStarted { errno: 18 })),
        "{through_link:?}"
    );
}
