//! The system calls that a job may not make, as one BPF program. All others are allowed: the namespaces and the
//! missing capabilities are the wall, this takes away the ladders. It only builds and applies the program.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::sock_filter;
use serde::{Deserialize, Serialize};

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("the sandbox knows the system calls of x86_64 and aarch64 only");

/// From here on x86_64 counts its x32 calls, which would walk past a list of numbers.
const X32: u32 = 0x4000_0000;

const ALLOW: u32 = 0x7fff_0000;
const KILL: u32 = 0x8000_0000;
const ERRNO: u32 = 0x0005_0000;

const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQ: u16 = 0x15;
const JUMP_GE: u16 = 0x35;
const JUMP_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// The low half of an argument (both architectures are little-endian).
const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

const NEW_NAMESPACES: u32 = (libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP) as u32;

const PLAIN_PERSONALITY: u32 = 0;
/// `personality` with it changes nothing and tells what holds.
const ASK_PERSONALITY: u32 = u32::MAX;
/// As x86 kernels still take it.
const PTRACE_OLDSETOPTIONS: u32 = 21;
/// Options of a tracer: to stop what it traces at its exit, and to lift its filter (which the kernel refuses as well).
const NO_TRACING: u32 = (libc::PTRACE_O_TRACEEXIT | PTRACE_O_SUSPEND_SECCOMP) as u32;
const PTRACE_O_SUSPEND_SECCOMP: libc::c_int = 1 << 21;

/// What stands in for a limit where no cgroup keeps it, and so must not be walked around.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct StandIns {
    /// Memory is counted by `watch`: no memory where it does not look, then.
    pub memory: bool,
    /// The job is kept to some cores: it may not choose others.
    pub cores: bool,
    /// Nobody bounds the memory of internet sockets: there are none, then.
    #[serde(default)]
    pub sockets: bool,
}

/// Refuses the calls for the rest of this process's life and of all that it starts.
pub fn apply(stand_ins: StandIns) -> Result<(), seccompiler::Error> {
    seccompiler::apply_filter(&program(stand_ins))
}

/// A search tree over the call's number: the kernel walks the program once for each number that exists when it is
/// installed, and a plain list of this length makes that walk the slowest step of a warm start.
fn program(stand_ins: StandIns) -> Vec<sock_filter> {
    let mut calls: BTreeMap<libc::c_long, Vec<sock_filter>> = refused(stand_ins)
        .into_iter()
        .map(|(call, errno)| (call, vec![give(ERRNO | errno as u32)]))
        .collect();
    calls.extend(examined(stand_ins));
    let calls: Vec<_> = calls.into_iter().collect();
    let mut code = vec![
        load(ARCHITECTURE),
        jump(JUMP_EQ, ARCH, 1, 0),
        give(KILL),
        load(NUMBER),
        jump(JUMP_GE, X32, 0, 1),
        give(ERRNO | libc::ENOSYS as u32),
    ];
    code.extend(tree(&calls));
    code
}

fn tree(calls: &[(libc::c_long, Vec<sock_filter>)]) -> Vec<sock_filter> {
    let mut code = Vec::new();
    let (low, high) = calls.split_at(calls.len() / 2);
    if let (4.., Some((first, _))) = (calls.len(), high.first()) {
        let low = tree(low);
        code.push(jump(JUMP_GE, *first as u32, 0, 1));
        code.push(sock_filter { code: JUMP, jt: 0, jf: 0, k: low.len() as u32 });
        code.extend(low);
        code.extend(tree(high));
        return code;
    }
    for (call, body) in calls {
        let over = u8::try_from(body.len()).unwrap_or(u8::MAX);
        code.push(jump(JUMP_EQ, *call as u32, 0, over));
        code.extend(body.iter().cloned());
    }
    code.push(give(ALLOW));
    code
}

fn load(offset: u32) -> sock_filter {
    sock_filter { code: LOAD, jt: 0, jf: 0, k: offset }
}

fn jump(test: u16, against: u32, if_true: u8, if_false: u8) -> sock_filter {
    sock_filter { code: test, jt: if_true, jf: if_false, k: against }
}

fn give(verdict: u32) -> sock_filter {
    sock_filter { code: RETURN, jt: 0, jf: 0, k: verdict }
}

/// An answer of the filter instead of the kernel's.
fn no(errno: i32) -> sock_filter {
    give(ERRNO | errno as u32)
}

/// Calls whose arguments decide.
fn examined(stand_ins: StandIns) -> Vec<(libc::c_long, Vec<sock_filter>)> {
    // Only on itself: init has the job's uid, and must not be starved or starved of descriptors.
    let self_only = || vec![load(argument(0)), jump(JUMP_EQ, 0, 1, 0), no(libc::EPERM), give(ALLOW)];
    let family = |family: i32, on: u8| jump(JUMP_EQ, family as u32, on, 0);
    let mut calls = vec![
        (
            libc::SYS_clone,
            vec![load(argument(0)), jump(JUMP_ANY_BIT, NEW_NAMESPACES, 0, 1), no(libc::EPERM), give(ALLOW)],
        ),
        // A network namespace does not hold back VSOCK, and the rarer families are all attack surface. What waits in a
        // netlink socket is memory that no cgroup counts, megabytes for each.
        (
            libc::SYS_socket,
            match stand_ins.sockets {
                false => vec![
                    load(argument(0)),
                    family(libc::AF_UNIX, 3),
                    family(libc::AF_INET, 2),
                    family(libc::AF_INET6, 1),
                    no(libc::EAFNOSUPPORT),
                    give(ALLOW),
                ],
                true => {
                    vec![load(argument(0)), family(libc::AF_UNIX, 1), no(libc::EAFNOSUPPORT), give(ALLOW)]
                }
            },
        ),
        (
            libc::SYS_socketpair,
            vec![load(argument(0)), family(libc::AF_UNIX, 1), no(libc::EAFNOSUPPORT), give(ALLOW)],
        ),
        // Of other personalities each would change what a program may do; without random addresses one only has less.
        (
            libc::SYS_personality,
            vec![
                load(argument(0)),
                jump(JUMP_EQ, PLAIN_PERSONALITY, 3, 0),
                jump(JUMP_EQ, libc::ADDR_NO_RANDOMIZE as u32, 2, 0),
                jump(JUMP_EQ, ASK_PERSONALITY, 1, 0),
                no(libc::EPERM),
                give(ALLOW),
            ],
        ),
        // A job may trace its own. But two that trace each other and both stop as they exit wait for each other for ever,
        // and no kill ends them: nobody stops at an exit.
        (
            libc::SYS_ptrace,
            vec![
                load(argument(0)),
                jump(JUMP_EQ, libc::PTRACE_SEIZE, 3, 0),
                jump(JUMP_EQ, libc::PTRACE_SETOPTIONS, 2, 0),
                jump(JUMP_EQ, PTRACE_OLDSETOPTIONS, 1, 0),
                give(ALLOW),
                load(argument(3)),
                jump(JUMP_ANY_BIT, NO_TRACING, 0, 1),
                no(libc::EPERM),
                give(ALLOW),
            ],
        ),
        // Typing into a terminal from inside.
        (
            libc::SYS_ioctl,
            vec![
                load(argument(1)),
                jump(JUMP_EQ, libc::TIOCSTI as u32, 1, 0),
                jump(JUMP_EQ, libc::TIOCLINUX as u32, 0, 1),
                no(libc::EPERM),
                give(ALLOW),
            ],
        ),
        (
            libc::SYS_setpriority,
            vec![
                load(argument(0)),
                jump(JUMP_EQ, 0, 0, 2),
                load(argument(1)),
                jump(JUMP_EQ, 0, 1, 0),
                no(libc::EPERM),
                give(ALLOW),
            ],
        ),
    ];
    for call in
        [libc::SYS_prlimit64, libc::SYS_sched_setscheduler, libc::SYS_sched_setparam, libc::SYS_sched_setattr]
    {
        calls.push((call, self_only()));
    }
    if stand_ins.memory {
        // The later of two programs for a call holds.
        calls.extend(countable());
    }
    calls
}

/// Without a memory cgroup: only such pipes, sockets and mappings as `watch` can count from outside.
fn countable() -> Vec<(libc::c_long, Vec<sock_filter>)> {
    let both = |first: u32, is: i32, second: u32, too: i32, errno: i32| {
        vec![
            load(argument(first)),
            jump(JUMP_EQ, is as u32, 0, 3),
            load(argument(second)),
            jump(JUMP_EQ, too as u32, 0, 1),
            no(errno),
            give(ALLOW),
        ]
    };
    vec![
        // A connection that nobody has accepted keeps its bytes without a descriptor. Pairs are left.
        (libc::SYS_socket, vec![no(libc::EAFNOSUPPORT)]),
        (libc::SYS_setsockopt, both(1, libc::SOL_SOCKET, 2, libc::SO_SNDBUF, libc::EPERM)),
        (
            libc::SYS_fcntl,
            vec![
                load(argument(1)),
                jump(JUMP_EQ, libc::F_SETPIPE_SZ as u32, 0, 1),
                no(libc::EPERM),
                give(ALLOW),
            ],
        ),
        // Shared and of no file: pages that stay when no process shows them any more.
        (
            libc::SYS_mmap,
            vec![
                load(argument(3)),
                jump(JUMP_ANY_BIT, libc::MAP_ANONYMOUS as u32, 0, 2),
                jump(JUMP_ANY_BIT, libc::MAP_SHARED as u32, 0, 1),
                no(libc::ENOMEM),
                give(ALLOW),
            ],
        ),
        // No new namespace, and no thread with open files of its own.
        (
            libc::SYS_clone,
            vec![
                load(argument(0)),
                jump(JUMP_ANY_BIT, NEW_NAMESPACES, 2, 0),
                jump(JUMP_ANY_BIT, libc::CLONE_THREAD as u32, 0, 2),
                jump(JUMP_ANY_BIT, libc::CLONE_FILES as u32, 1, 0),
                no(libc::EPERM),
                give(ALLOW),
            ],
        ),
    ]
}

/// Memory that belongs to no process, pages held by a pipe for another, and descriptors on their way in a message.
const UNCOUNTED: &[libc::c_long] = &[
    libc::SYS_memfd_create,
    libc::SYS_shmget,
    libc::SYS_msgget,
    libc::SYS_semget,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_vmsplice,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_inotify_init1,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_inotify_init,
];

/// Calls refused whatever their arguments, with the errno that programs take as "not here".
fn refused(stand_ins: StandIns) -> BTreeMap<libc::c_long, i32> {
    const EPERM: &[libc::c_long] = &[
        // mounts and namespaces
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_fsopen,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_mount_setattr,
        libc::SYS_unshare,
        libc::SYS_setns,
        // other processes
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_process_madvise,
        libc::SYS_kcmp,
        libc::SYS_pidfd_getfd,
        // the kernel's own machinery
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_kexec_load,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_syslog,
        libc::SYS_acct,
        libc::SYS_quotactl,
        libc::SYS_nfsservctl,
        libc::SYS_fanotify_init,
        libc::SYS_vhangup,
        libc::SYS_open_by_handle_at,
        libc::SYS_name_to_handle_at,
        libc::SYS_lookup_dcookie,
        libc::SYS_migrate_pages,
        libc::SYS_move_pages,
        libc::SYS_mbind,
        libc::SYS_set_mempolicy,
        libc::SYS_ioprio_set,
        // the clock and the name
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_clock_adjtime,
        libc::SYS_adjtimex,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
    ];
    #[cfg(target_arch = "x86_64")]
    const HERE_ONLY: &[libc::c_long] = &[
        libc::SYS_iopl,
        libc::SYS_ioperm,
        libc::SYS_modify_ldt,
        libc::SYS_uselib,
        libc::SYS_ustat,
        libc::SYS_sysfs,
        libc::SYS__sysctl,
        libc::SYS_kexec_file_load,
    ];
    #[cfg(not(target_arch = "x86_64"))]
    const HERE_ONLY: &[libc::c_long] = &[];
    /// Answered as by a kernel without them, so that libraries fall back: clone3 hides its flags from a filter,
    /// io_uring makes calls that no filter sees, memfd_secret is memory that nobody can count, and the kernel has one
    /// number of io_setup's requests for the whole host.
    const ENOSYS: &[libc::c_long] = &[
        libc::SYS_clone3,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_memfd_secret,
        libc::SYS_io_setup,
    ];
    let mut calls: BTreeMap<libc::c_long, i32> = BTreeMap::new();
    calls.extend(EPERM.iter().chain(HERE_ONLY).map(|call| (*call, libc::EPERM)));
    calls.extend(ENOSYS.iter().map(|call| (*call, libc::ENOSYS)));
    if stand_ins.memory {
        calls.extend(UNCOUNTED.iter().map(|call| (*call, libc::ENOSYS)));
    }
    if stand_ins.cores {
        calls.insert(libc::SYS_sched_setaffinity, libc::EPERM);
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would answer to a call, by running the program.
    fn verdict(code: &[sock_filter], arch: u32, call: libc::c_long, arguments: [u32; 6]) -> u32 {
        let (mut at, mut value) = (0usize, 0u32);
        loop {
            let line = &code[at];
            at += 1;
            match line.code {
                LOAD => {
                    value = match line.k {
                        NUMBER => call as u32,
                        ARCHITECTURE => arch,
                        offset => arguments[(offset as usize - 16) / 8],
                    }
                }
                JUMP => at += line.k as usize,
                RETURN => return line.k,
                test => {
                    let holds = match test {
                        JUMP_EQ => value == line.k,
                        JUMP_GE => value >= line.k,
                        _ => value & line.k != 0,
                    };
                    at += usize::from(if holds { line.jt } else { line.jf });
                }
            }
        }
    }

    fn ask(call: libc::c_long, arguments: [u32; 6]) -> u32 {
        verdict(&program(StandIns::default()), ARCH, call, arguments)
    }

    #[test]
    fn each_listed_call_gets_its_errno_and_all_others_pass() {
        for stand_ins in [StandIns::default(), StandIns { memory: true, cores: true, sockets: true }] {
            let (code, refused) = (program(stand_ins), refused(stand_ins));
            let examined: Vec<_> = examined(stand_ins).into_iter().map(|(call, _)| call).collect();
            for call in (0..500).filter(|call| !examined.contains(call)) {
                let expected = refused.get(&call).map_or(ALLOW, |errno| ERRNO | *errno as u32);
                assert_eq!(verdict(&code, ARCH, call, [0; 6]), expected, "call {call}");
            }
        }
    }

    #[test]
    fn another_architecture_is_killed_and_x32_is_unknown() {
        assert_eq!(verdict(&program(StandIns::default()), ARCH ^ 1, 0, [0; 6]), KILL);
        assert_eq!(ask(i64::from(X32) + 165, [0; 6]), ERRNO | libc::ENOSYS as u32);
    }

    #[test]
    fn a_clone_passes_unless_it_asks_for_a_namespace() {
        assert_eq!(ask(libc::SYS_clone, [libc::SIGCHLD as u32, 0, 0, 0, 0, 0]), ALLOW);
        let flags = (libc::CLONE_NEWUSER | libc::SIGCHLD) as u32;
        assert_eq!(ask(libc::SYS_clone, [flags, 0, 0, 0, 0, 0]), ERRNO | libc::EPERM as u32);
    }

    #[test]
    fn a_job_traces_its_own_but_stops_nobody_at_an_exit() {
        let (traceme, attach) = (libc::PTRACE_TRACEME, libc::PTRACE_ATTACH);
        let (seize, options) = (libc::PTRACE_SEIZE, libc::PTRACE_SETOPTIONS);
        let (exit, forks) = (libc::PTRACE_O_TRACEEXIT as u32, libc::PTRACE_O_TRACEFORK as u32);
        let no = ERRNO | libc::EPERM as u32;
        for (request, data, verdict) in [
            (traceme, 0, ALLOW),
            (attach, 0, ALLOW),
            // Only these take options: elsewhere the same bits are data or a signal.
            (libc::PTRACE_POKEDATA, exit, ALLOW),
            (seize, 0, ALLOW),
            (seize, forks, ALLOW),
            (seize, forks | exit, no),
            (options, forks, ALLOW),
            (options, exit, no),
            (options, 1 << 21, no),
            (PTRACE_OLDSETOPTIONS, exit, no),
        ] {
            assert_eq!(ask(libc::SYS_ptrace, [request, 7, 0, data, 0, 0]), verdict, "{request:#x} {data:#x}");
        }
    }

    #[test]
    fn of_the_personalities_only_one_without_random_addresses_can_be_taken() {
        let no = ERRNO | libc::EPERM as u32;
        let fixed = libc::ADDR_NO_RANDOMIZE as u32;
        let (map_page_zero, read_implies_exec, linux_32) = (0x10_0000, 0x40_0000, 8);
        for (wanted, verdict) in [
            (0, ALLOW),
            (fixed, ALLOW),
            (u32::MAX, ALLOW),
            (read_implies_exec, no),
            (map_page_zero | fixed, no),
            (linux_32, no),
        ] {
            assert_eq!(ask(libc::SYS_personality, [wanted, 0, 0, 0, 0, 0]), verdict, "{wanted:#x}");
        }
    }

    #[test]
    fn without_a_memory_cgroup_only_what_can_be_counted_passes() {
        let code = program(StandIns { memory: true, ..StandIns::default() });
        let ask = |call, arguments| verdict(&code, ARCH, call, arguments);
        let no = |errno: i32| ERRNO | errno as u32;
        let thread = libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let (unix, stream) = (libc::AF_UNIX, libc::SOCK_STREAM);
        for (call, [one, two, three, four], verdict) in [
            (libc::SYS_socket, [unix, stream, 0, 0], no(libc::EAFNOSUPPORT)),
            (libc::SYS_socket, [libc::AF_INET, stream, 0, 0], no(libc::EAFNOSUPPORT)),
            (libc::SYS_socketpair, [unix, stream, 0, 0], ALLOW),
            (libc::SYS_socketpair, [libc::AF_TIPC, stream, 0, 0], no(libc::EAFNOSUPPORT)),
            (libc::SYS_setsockopt, [3, libc::SOL_SOCKET, libc::SO_SNDBUF, 0], no(libc::EPERM)),
            (libc::SYS_setsockopt, [3, libc::SOL_SOCKET, libc::SO_RCVTIMEO, 0], ALLOW),
            (libc::SYS_setsockopt, [3, libc::IPPROTO_TCP, libc::SO_SNDBUF, 0], ALLOW),
            (libc::SYS_fcntl, [3, libc::F_SETPIPE_SZ, 1 << 20, 0], no(libc::EPERM)),
            (libc::SYS_fcntl, [3, libc::F_GETFL, 0, 0], ALLOW),
            (libc::SYS_mmap, [0, 1 << 20, 3, shared], no(libc::ENOMEM)),
            (libc::SYS_mmap, [0, 1 << 20, 3, private], ALLOW),
            (libc::SYS_mmap, [0, 1 << 20, 3, libc::MAP_SHARED], ALLOW),
            (libc::SYS_clone, [thread | libc::CLONE_FILES, 0, 0, 0], ALLOW),
            (libc::SYS_clone, [thread, 0, 0, 0], no(libc::EPERM)),
            (libc::SYS_clone, [libc::SIGCHLD, 0, 0, 0], ALLOW),
            (libc::SYS_clone, [libc::CLONE_NEWUSER | libc::SIGCHLD, 0, 0, 0], no(libc::EPERM)),
        ] {
            let arguments = [one as u32, two as u32, three as u32, four as u32, 0, 0];
            assert_eq!(ask(call, arguments), verdict, "call {call} {arguments:?}");
        }
    }

    #[test]
    fn only_harmless_socket_families_pass() {
        let socket = |family: i32, protocol: i32| {
            ask(libc::SYS_socket, [family as u32, libc::SOCK_STREAM as u32, protocol as u32, 0, 0, 0])
        };
        for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6] {
            assert_eq!(socket(family, 0), ALLOW, "family {family}");
        }
        let no = ERRNO | libc::EAFNOSUPPORT as u32;
        for family in [libc::AF_VSOCK, libc::AF_ALG, libc::AF_PACKET, libc::AF_KEY, libc::AF_NETLINK] {
            assert_eq!(socket(family, 0), no, "family {family}");
        }
    }

    #[test]
    fn where_nobody_bounds_internet_sockets_there_are_none() {
        let code = program(StandIns { sockets: true, ..StandIns::default() });
        let socket = |family: i32| {
            verdict(&code, ARCH, libc::SYS_socket, [family as u32, libc::SOCK_STREAM as u32, 0, 0, 0, 0])
        };
        assert_eq!(socket(libc::AF_UNIX), ALLOW);
        for family in [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK] {
            assert_eq!(socket(family), ERRNO | libc::EAFNOSUPPORT as u32, "family {family}");
        }
    }

    #[test]
    fn limits_and_schedules_are_changed_on_oneself_only() {
        for call in [libc::SYS_prlimit64, libc::SYS_sched_setscheduler] {
            assert_eq!(ask(call, [0; 6]), ALLOW);
            assert_eq!(ask(call, [1, 0, 0, 0, 0, 0]), ERRNO | libc::EPERM as u32);
        }
        assert_eq!(ask(libc::SYS_setpriority, [0, 0, 5, 0, 0, 0]), ALLOW);
        assert_eq!(ask(libc::SYS_setpriority, [0, 1, 5, 0, 0, 0]), ERRNO | libc::EPERM as u32);
        assert_eq!(ask(libc::SYS_setpriority, [2, 0, 5, 0, 0, 0]), ERRNO | libc::EPERM as u32);
    }
}
