//! Memory, wherever a job may keep it: in processes, files, pipes, sockets, or where nobody would look.

use coinop::sandbox::{Exit, Limit, Policy};

use crate::common::{bench, policy, python, python_bench, run, sh, words};
use crate::skip::skip;

#[tokio::test]
async fn shared_memory_counts() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { memory_bytes: 64 << 20, ..policy() }).await;
    let hog = "
import mmap, time
m = mmap.mmap(-1, 160 << 20)
for at in range(0, 160 << 20, 4096):
    m[at] = 1
time.sleep(60)";
    let ran = python(&*sandbox, hog).await;
    if bench.memory_is_watched() {
        assert!(ran.err.contains("Cannot allocate memory"), "{ran:?}");
    } else {
        ran.hit(Limit::Memory);
    }
}

#[tokio::test]
async fn memory_in_pipes_and_sockets_counts() {
    let Some(bench) = python_bench!() else { return };
    let fill = |make: &str| {
        format!(
            "
import os, socket, time
def pair():
    {make}
for _ in range(24):
    if os.fork() == 0:
        kept = []
        for _ in range(50):
            ends = pair()
            for end in ends[-1:] if len(ends) == 3 else ends:
                os.set_blocking(end, False)
                try:
                    while os.write(end, b'x' * 4096): pass
                except BlockingIOError: pass
            kept.append(ends)
        time.sleep(30)
        os._exit(0)
for _ in range(24):
    if os.wait()[1]: os._exit(1)"
        )
    };
    for make in [
        "ends = socket.socketpair(); return [end.detach() for end in ends]",
        "read, write = os.pipe(); return [read, read, write]",
    ] {
        let sandbox = bench.sandbox_with(Policy { memory_bytes: 48 << 20, ..policy() }).await;
        // 24 interpreters share most of what they hold; the buffers are up to 1 GB, or 75 MB.
        python(&*sandbox, &fill(make)).await.hit(Limit::Memory);
    }
}

#[tokio::test]
async fn pipes_and_sockets_in_moderation_are_no_reason_to_end_a_job() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { memory_bytes: 64 << 20, ..policy() }).await;
    let some = "
import asyncio, os, subprocess, time
async def main():
    child = await asyncio.create_subprocess_exec('cat', stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return (await child.communicate(b'through'))[0]
print(asyncio.run(main()))
kept = [os.pipe() for _ in range(40)]
for _ in range(8):
    if os.fork() == 0:
        time.sleep(0.5)
        os._exit(0)
for _ in range(8): os.wait()
print('done')";
    assert_eq!(python(&*sandbox, some).await.ok(), "b'through'\ndone\n");
}

#[tokio::test]
async fn node_finds_what_it_needs_for_its_children() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { memory_bytes: 512 << 20, ..policy() }).await;
    if sh(&*sandbox, "command -v node").await.exit != Some(Exit::Code { code: 0 }) {
        return skip("node_finds_what_it_needs_for_its_children", "no node inside the sandbox");
    }
    let script = "
const { execSync, exec, fork } = require('child_process');
if (process.send) { process.send('forked'); process.disconnect(); } else {
  console.log(execSync('echo sync').toString().trim());
  exec('cat', (_, out) => {
    console.log(out.trim());
    fork(__filename).on('message', said => console.log(said));
  }).stdin.end('piped');
}";
    sandbox.write_file("x.js", script.as_bytes()).await.unwrap();
    assert_eq!(run(&*sandbox, words(["node", "x.js"])).await.ok(), "sync\npiped\nforked\n");
}

#[tokio::test]
async fn git_works_inside() {
    let Some(bench) = bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { memory_bytes: 128 << 20, ..policy() }).await;
    if sh(&*sandbox, "command -v git").await.exit != Some(Exit::Code { code: 0 }) {
        return skip("git_works_inside", "no git inside the sandbox");
    }
    let script = "exec 2>&1; git init -q . && echo x > f && git add f && \
                  git -c user.name=a -c user.email=a@b commit -qm one && git gc -q && git log --format=%s | cat && \
                  git clone -q . /tmp/copy && cat /tmp/copy/f";
    assert_eq!(sh(&*sandbox, script).await.ok(), "one\nx\n");
}

#[tokio::test]
async fn a_process_whose_first_thread_has_ended_counts() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { memory_bytes: 64 << 20, ..policy() }).await;
    let hide = "
import ctypes, os, threading, time
def hog():
    time.sleep(0.2)
    kept = bytearray(os.urandom(1 << 20)) * 40
    time.sleep(30)
    os._exit(0)
for _ in range(6):
    if os.fork() == 0:
        threading.Thread(target=hog).start()
        ctypes.CDLL(None).syscall(60 if os.uname().machine == 'x86_64' else 93, 0)
for _ in range(6):
    if os.wait()[1]: os._exit(1)";
    python(&*sandbox, hide).await.hit(Limit::Memory);
}

#[tokio::test]
async fn what_no_watch_can_count_is_refused() {
    let Some(bench) = python_bench!() else { return };
    if !bench.memory_is_watched() {
        return; // The kernel counts it all.
    }
    let sandbox = bench.sandbox().await;
    let script = "
import ctypes, errno, fcntl, os, socket
def no(what, act):
    try:
        act()
        print(what, 'DONE')
    except OSError as e:
        print(what, errno.errorcode[e.errno])
r, w = os.pipe()
one, two = socket.socketpair()
no('loopback', lambda: socket.socket())
no('unix', lambda: socket.socket(socket.AF_UNIX))
no('send buffer', lambda: one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20))
no('pass a descriptor', lambda: socket.send_fds(one, [b'x'], [r]))
no('pipe size', lambda: fcntl.fcntl(w, 1031, 1 << 20))
no('zero', lambda: os.open('/dev/zero', os.O_RDWR))
no('null', lambda: os.open('/dev/null', os.O_RDWR))
no('read zero', lambda: os.open('/dev/zero', os.O_RDONLY))
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    if getattr(libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), name)
no('messages', lambda: call('msgget', 0, 0o1600))
no('semaphores', lambda: call('semget', 0, 100, 0o1600))
no('splice', lambda: call('vmsplice', w, None, 0, 0))";
    let said = python(&*sandbox, script).await.ok();
    let expected = "loopback EAFNOSUPPORT\nunix EAFNOSUPPORT\nsend buffer EPERM\npass a descriptor ENOSYS\n\
                    pipe size EPERM\nzero EACCES\nnull DONE\nread zero DONE\nmessages ENOSYS\n\
                    semaphores ENOSYS\nsplice ENOSYS\n";
    assert_eq!(said, expected);
}

#[tokio::test]
async fn memory_outside_of_processes_is_counted_or_refused() {
    let Some(bench) = python_bench!() else { return };
    let sandbox = bench.sandbox_with(Policy { memory_bytes: 64 << 20, ..policy() }).await;
    let hog = "
import os, sys
try:
    fds = [os.memfd_create('x') for _ in range(4)]
except OSError as e:
    sys.exit(38 if e.errno == 38 else 1)
for fd in fds:
    for _ in range(60):
        os.write(fd, b'x' * (1 << 20))
sys.exit(0)";
    let ran = python(&*sandbox, hog).await;
    if bench.memory_is_watched() {
        assert_eq!(ran.exit, Some(Exit::Code { code: 38 }), "{ran:?}");
    } else {
        ran.hit(Limit::Memory);
    }
}
