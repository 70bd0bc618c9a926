//! What this host can enforce, clause by clause, found by trying one sandbox; and the refusals that follow. It
//! builds nothing that stays.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::super::{Check, Error, Identity, Network, Policy};
use super::cgroup::{Controller, Layout, Version};
use super::life::{Life, is_root_with_slots};
use super::wire::{self, Configure, FromInit, MESSAGE_BYTES, ToInit};
use super::{Inner, Strike, watch};

const BACKEND: &str = "local";
const NO_SOCKETS: &str = "this node counts memory without a cgroup: its jobs can open no sockets, not even on their own \
                          loopback, and map no anonymous shared memory; programs built with AddressSanitizer do not start";
const UNCOUNTED: &str = "this host has swap, and its kernel counts none by cgroup";

/// What was found out once, at the start.
#[derive(Debug, Clone, Default)]
pub struct Host {
    pub root: bool,
    pub cores: usize,
    pub memory_cgroup: bool,
    /// Whether its group counts swap, too.
    pub swap_cgroup: bool,
    /// Whether the host has any.
    pub swap: bool,
    pub pids_cgroup: bool,
    pub cpu_cgroup: bool,
    /// The kernel counts processes by user namespace (since 5.14).
    pub counts_by_namespace: bool,
    pub overlay: bool,
    pub landlock: bool,
    /// Why no sandbox can be built at all.
    pub broken: Option<String>,
}

/// Tries one sandbox over an empty base, and one without if that fails. Blocks.
pub fn look(inner: &Inner) -> Result<Host, Error> {
    let layout = &inner.layout;
    let mut host = Host {
        root: is_root_with_slots(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        memory_cgroup: layout.version(Controller::Memory).is_some(),
        swap_cgroup: layout.swap,
        swap: has_swap(),
        pids_cgroup: layout.version(Controller::Pids).is_some(),
        cpu_cgroup: layout.version(Controller::Cpu).is_some(),
        counts_by_namespace: kernel() >= (5, 14),
        ..Host::default()
    };
    let base = inner.options.state_dir.join("probe");
    std::fs::create_dir_all(&base).map_err(super::host_error("make its state folder"))?;
    match inner.nursery() {
        Err(Error::Host { doing: "start its helper", source }) => {
            return Err(Error::Host { doing: "start its helper", source });
        }
        Err(why) => {
            host.broken = Some(why.to_string());
            return Ok(host);
        }
        Ok(_) => {}
    }
    match try_one(inner, base.to_str()) {
        Ok(()) => host.overlay = true,
        Err(_) => host.broken = try_one(inner, None).err().map(|why| why.to_string()),
    }
    host.landlock = inner.landlock.load(Ordering::Relaxed);
    Ok(host)
}

fn try_one(inner: &Inner, base: Option<&str>) -> Result<(), Error> {
    let life: Arc<Life> = inner.new_life()?;
    let end = Strike(Some(life.clone()));
    let nursery = inner.nursery()?;
    let doors = life.group.doors().map_err(super::host_error("open its cgroup"))?;
    let (ours, theirs) = wire::pair().map_err(super::host_error("make a socket"))?;
    let configure = Configure {
        disk_bytes: 1 << 20,
        inodes: 64,
        pids: 8,
        open_files: 64,
        base: base.is_some(),
        probe: true,
        ..Configure::default()
    };
    wire::send(ours.as_fd(), &ToInit::Configure(configure), &[])
        .map_err(super::host_error("pass the policy"))?;
    let built = nursery.build(life, theirs, &doors, base).map_err(super::host_error("ask its helper"))?;
    match built.blocking_recv() {
        Ok(Ok(_)) => {}
        Ok(Err((step, why))) => return Err(super::broken(&step, why)),
        Err(_) => return Err(Error::Gone("its helper has ended".to_owned())),
    }
    let mut buffer = vec![0; MESSAGE_BYTES];
    let answer = wire::receive(ours.as_fd(), &mut buffer).map_err(super::host_error("hear from its init"))?;
    drop(end);
    match answer {
        Some((FromInit::Ready { .. }, _)) => Ok(()),
        Some((FromInit::Broken { step, errno }, _)) => {
            Err(super::broken(&step, io::Error::from_raw_os_error(errno)))
        }
        _ => Err(Error::Gone("its init ended at once".to_owned())),
    }
}

/// The list has a line of heads. Who does not see it says yes.
fn has_swap() -> bool {
    std::fs::read_to_string("/proc/swaps").map_or(true, |list| list.lines().count() > 1)
}

fn kernel() -> (u32, u32) {
    let release = release();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn release() -> String {
    nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default()
}

pub fn identity() -> Identity {
    let os = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        let value = os.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or("unknown").trim_matches('"').to_owned()
    };
    let image =
        format!("{} {}, linux {}, {}", field("ID"), field("VERSION_ID"), release(), std::env::consts::ARCH);
    Identity { backend: BACKEND.to_owned(), image }
}

impl Host {
    /// The cores a job keeps to, where no cgroup caps its share; `None` when nothing need be done.
    pub fn cores_for(&self, cpu_milli: u32, slot: u32) -> Option<Vec<usize>> {
        let whole = (cpu_milli / 1000) as usize;
        if self.cpu_cgroup || whole >= self.cores || self.cores == 0 {
            return None;
        }
        let first = slot as usize * whole;
        Some((first..first + whole.max(1)).map(|core| core % self.cores).collect())
    }

    /// What the watch that stands in for a memory cgroup keeps from jobs.
    pub fn caveats(&self) -> Vec<String> {
        if self.memory_cgroup || self.broken.is_some() {
            return Vec::new();
        }
        vec![NO_SOCKETS.to_owned()]
    }

    pub fn admit(&self, policy: &Policy) -> Result<(), Error> {
        let refuse =
            |clause: &'static str, why: String| Err(Error::Unenforceable { backend: BACKEND, clause, why });
        policy.usable()?;
        if let Some(why) = &self.broken {
            return refuse("user_namespaces", why.clone());
        }
        if policy.network == Network::Egress {
            return refuse("network", "there is no egress gateway yet".to_owned());
        }
        if self.memory_cgroup && !self.swap_cgroup && self.swap {
            return refuse("swap_bytes", UNCOUNTED.to_owned());
        }
        if !self.pids_cgroup && !self.counts_by_namespace {
            return refuse("pids", "no pids cgroup, and a kernel before 5.14".to_owned());
        }
        if !self.cpu_cgroup && policy.cpu_milli < 1000 && self.cores > 0 {
            let why = "without a cpu cgroup only whole cores can be given".to_owned();
            return refuse("cpu_milli", why);
        }
        Ok(())
    }

    fn swap_check(&self, by: Option<String>, delegate: &str) -> Check {
        let check = |ok: bool, how: &str, mend: Option<&str>| Check {
            name: "swap_bytes".to_owned(),
            ok,
            how: how.to_owned(),
            mend: mend.map(str::to_owned),
        };
        match by {
            None => check(true, "watched with the memory: swap of processes counts, too", Some(delegate)),
            Some(by) if self.swap_cgroup => check(true, &format!("{by}, with memory"), None),
            Some(_) if !self.swap => check(true, "this host has no swap", None),
            Some(_) => {
                let mend =
                    "boot with swapaccount=1, or do without swap (swapoff -a); then start the node again";
                check(false, UNCOUNTED, Some(mend))
            }
        }
    }

    pub fn checks(&self, layout: &Layout) -> Vec<Check> {
        let check = |name: &str, ok: bool, how: String, mend: Option<&str>| Check {
            name: name.to_owned(),
            ok,
            how,
            mend: mend.map(str::to_owned),
        };
        let by = |controller| match layout.version(controller) {
            Some(Version::V1) => Some("by the kernel, cgroup v1".to_owned()),
            Some(Version::V2) => Some("by the kernel, cgroup v2".to_owned()),
            None => None,
        };
        let delegate = "run the node as root, or in a systemd unit with Delegate=yes";
        let userns = "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, \
                      kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces), or run as root; \
                      in a container, one that may make namespaces (--privileged)";
        let mut all = Vec::new();
        all.push(match &self.broken {
            None => check("user_namespaces", true, "a sandbox was built at start".to_owned(), None),
            Some(why) => check("user_namespaces", false, why.clone(), Some(userns)),
        });
        if self.broken.is_some() {
            // There is nothing to say of the limits of a sandbox that cannot be.
            return all;
        }
        all.push(check("wall_ms", true, "a timer of the node kills the process namespace".to_owned(), None));
        all.push(check(
            "idle_ms",
            true,
            match by(Controller::Cpuacct) {
                Some(_) => {
                    "the node ends commands without output and processor time, as its cgroup counts it"
                }
                None => "the node ends commands without output and processor time, as /proc counts it",
            }
            .to_owned(),
            None,
        ));
        all.push(match by(Controller::Memory) {
            Some(how) => check("memory_bytes", true, how, None),
            None => check(
                "memory_bytes",
                true,
                format!(
                    "watched every {} ms (processes, files, page tables, pipes, pairs of sockets), and RLIMIT_DATA on \
                     each process; no other sockets, not even on the job's own loopback, and no shared memory but \
                     files; not counted: the kernel's own lists of file locks and memory maps",
                    watch::INTERVAL.as_millis()
                ),
                Some(delegate),
            ),
        });
        all.push(self.swap_check(by(Controller::Memory), delegate));
        all.push(match by(Controller::Pids) {
            Some(how) => check("pids", true, how, None),
            None if self.counts_by_namespace => {
                check("pids", true, "RLIMIT_NPROC, counted by user namespace".to_owned(), Some(delegate))
            }
            None => check(
                "pids",
                false,
                "no pids cgroup, and a kernel before 5.14 counts a user's processes all together".to_owned(),
                Some(delegate),
            ),
        });
        all.push(match by(Controller::Cpu) {
            Some(how) => check("cpu_milli", true, how, None),
            None => check(
                "cpu_milli",
                true,
                "kept to whole cores by affinity; less than one core is refused".to_owned(),
                Some(delegate),
            ),
        });
        for (name, how) in [
            ("disk_bytes", "size of the sandbox's one tmpfs: workspace, /tmp, home and /dev/shm"),
            ("inodes", "inodes of the sandbox's one tmpfs"),
            ("open_files", "RLIMIT_NOFILE on each process"),
            ("output_bytes", "counted by the node as it drains"),
            ("output_bytes_per_s", "the node drains no faster"),
            ("network", "an empty network namespace; no other family than unix, inet, netlink route"),
        ] {
            let how = if name == "network" && !self.memory_cgroup {
                "an empty network namespace; no sockets but pairs, as nothing here counts their memory"
            } else {
                how
            };
            all.push(check(name, true, how.to_owned(), None));
        }
        all.push(if self.overlay {
            check("overlay", true, "the workspace is an overlay over the cached base".to_owned(), None)
        } else {
            let how = "no unprivileged overlay here: each job's base is copied, which is slower".to_owned();
            check(
                "overlay",
                true,
                how,
                Some("a kernel from 6.6 on, and a data folder on ext4, xfs, btrfs or tmpfs"),
            )
        });
        all.push(if self.landlock {
            check("landlock", true, "a second wall behind the read-only mounts".to_owned(), None)
        } else {
            let how = "not in this kernel; the read-only mounts stand alone".to_owned();
            check("landlock", true, how, Some("boot with landlock in the lsm= list"))
        });
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        Policy {
            wall_ms: 1000,
            idle_ms: 1000,
            memory_bytes: 64 << 20,
            swap_bytes: 0,
            pids: 8,
            cpu_milli: 500,
            disk_bytes: 1 << 20,
            inodes: 100,
            open_files: 64,
            output_bytes: 1000,
            output_bytes_per_s: 1 << 30,
            network: Network::None,
        }
    }

    /// The clause that is refused.
    fn refused(host: &Host) -> Option<&'static str> {
        match host.admit(&policy()) {
            Ok(()) => None,
            Err(Error::Unenforceable { backend: "local", clause, why }) if !why.is_empty() => Some(clause),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn what_is_refused_is_named_as_the_doctor_names_it_and_can_be_mended() {
        let able = Host {
            cores: 2,
            memory_cgroup: true,
            pids_cgroup: true,
            cpu_cgroup: true,
            counts_by_namespace: true,
            overlay: true,
            ..Host::default()
        };
        assert_eq!(refused(&able), None);
        for (host, clause) in [
            (Host { broken: Some("no namespaces".to_owned()), ..able.clone() }, "user_namespaces"),
            (Host { pids_cgroup: false, counts_by_namespace: false, ..able.clone() }, "pids"),
            (Host { cpu_cgroup: false, ..able.clone() }, "cpu_milli"),
        ] {
            assert_eq!(refused(&host), Some(clause));
            let checks = host.checks(&Layout::default());
            let check = checks.iter().find(|check| check.name == clause).unwrap();
            assert!(check.mend.as_ref().is_some_and(|mend| mend.contains("root")), "{check:?}");
            // Less than a core is refused, a whole one is not: that check is a warning.
            assert_eq!(check.ok, clause == "cpu_milli", "{check:?}");
        }
    }

    #[test]
    fn swap_that_nobody_counts_is_refused_and_a_host_without_any_is_none_to_refuse() {
        let able = Host {
            memory_cgroup: true,
            swap_cgroup: true,
            pids_cgroup: true,
            cpu_cgroup: true,
            ..Host::default()
        };
        for (host, clause) in [
            (Host { swap: true, ..able.clone() }, None),
            (Host { swap: true, swap_cgroup: false, ..able.clone() }, Some("swap_bytes")),
            (Host { swap: false, swap_cgroup: false, ..able.clone() }, None),
            // What is watched is counted.
            (Host { swap: true, swap_cgroup: false, memory_cgroup: false, ..able.clone() }, None),
        ] {
            assert_eq!(refused(&host), clause);
            let by = host.memory_cgroup.then(|| "by the kernel".to_owned());
            let check = host.swap_check(by, "run the node as root");
            assert_eq!((check.ok, check.name.as_str()), (clause.is_none(), "swap_bytes"));
            assert!(
                check.ok || check.mend.as_ref().is_some_and(|mend| mend.contains("swapoff")),
                "{check:?}"
            );
        }
    }

    #[test]
    fn a_kernel_that_counts_no_processes_by_namespace_is_enough_with_a_pids_cgroup() {
        let host = Host { pids_cgroup: true, cpu_cgroup: true, cores: 2, ..Host::default() };
        assert_eq!(refused(&host), None);
    }
}
