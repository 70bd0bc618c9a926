//! The local backend's own walls, and those that Python is needed to try. What every backend promises stands in
//! `tests/conformance/walls.rs`.

use std::os::linux::net::SocketAddrExt;

use coinop::sandbox::{Command, Event};
use nix::fcntl::{Flock, FlockArg};

use crate::common::{bench, python, python_bench, sh, words};

#[tokio::test]
async fn nothing_else_of_the_host_stands_in_the_root() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
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
        "sys",
        "tmp",
        "usr",
        "var",
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
async fn not_even_the_bounding_set_holds_a_capability() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox().await;
    let status = sh(&*sandbox, "cat /proc/self/status").await.ok();
    assert!(status.contains("CapBnd:\t0000000000000000"), "{status}");
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
for name, number in dict(kcmp=312, mount=165, umount2=166, pivot_root=155, chroot=161, setns=308, bpf=321,
        keyctl=250, add_key=248, userfaultfd=323, perf_event_open=298, process_vm_readv=310, kexec_load=246,
        open_by_handle_at=304, open_tree=428, move_mount=429, fsopen=430, mount_setattr=442, init_module=175,
        pidfd_getfd=438, reboot=169, settimeofday=164).items():
    call(name, number, 0, 0, 0, 0, 0)
call('personality', 135, 0x400000)
call('ptrace', 101, 0x4206, os.getppid(), 0, 0x40)
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
    assert_eq!((denied.len(), absent.len()), (27, 6), "{said}");
    for line in denied {
        assert!(line.ends_with(" 1"), "not EPERM: {line}");
    }
    for line in absent {
        assert!(line.ends_with(" 38"), "not ENOSYS: {line}");
    }
}

/// `/usr` is read by every job and by the host; a lock or a watch there must stay the job's own.
#[tokio::test]
async fn what_a_job_locks_and_watches_in_usr_is_not_the_host_s() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox().await;
    let script = "
import ctypes, fcntl, os, sys
held = open('/usr/bin/env', 'rb')
fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(os.O_NONBLOCK)
if watch >= 0:
    assert libc.inotify_add_watch(watch, b'/usr/bin', 0x20) >= 0
print('ready', flush=True)
sys.stdin.readline()
try:
    seen = os.read(watch, 65536) if watch >= 0 else b''
except BlockingIOError:
    seen = b''
print('saw' if b'env' in seen else 'blind', flush=True)";
    let command = Command { stdin: true, ..words(["python3", "-c", script]) };
    let mut process = sandbox.exec(command).await.unwrap();
    let mut said = String::new();
    while !said.contains("ready") {
        match process.events.recv().await.unwrap() {
            Event::Stdout(bytes) | Event::Stderr(bytes) => said.push_str(&String::from_utf8_lossy(&bytes)),
            Event::Exit(how) => panic!("{how:?}: {said}"),
        }
    }
    let file = std::fs::File::open("/usr/bin/env").unwrap();
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock);
    assert!(lock.is_ok(), "the host cannot lock its own program");
    process.stdin.take().unwrap().send(b"go\n".to_vec()).await.unwrap();
    while let Some(event) = process.events.recv().await {
        if let Event::Stdout(bytes) | Event::Stderr(bytes) = event {
            said.push_str(&String::from_utf8_lossy(&bytes));
        }
    }
    assert!(said.ends_with("blind\n"), "{said}");
}
