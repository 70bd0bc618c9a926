//! What a job's container is like: nothing of the host, no network, no power but to become the job's user, every limit
//! of the policy. Making one is the engine's.

use std::collections::HashMap;

use bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, HostConfigCgroupnsModeEnum, HostConfigLogConfig,
    ResourcesUlimits,
};
use coinop_shim::wire::{Mount, Room, runtime_folder};

use super::super::Policy;
use super::engine::{Engine, Image};
use super::shim;

/// Memory of the shim itself, bytes: its two processes and the streams on their way.
pub const SHIM_MEMORY: u64 = 4 << 20;
/// Open files of the shim: its commands' pipes, and two for each folder down a deep tree. It gives each command its own
/// limit.
const SHIM_FILES: u64 = 4096;
/// As the kernel rounds the size of a tmpfs.
const PAGE: u64 = 4096;
/// Tasks of the container's user, where the engine must be told some number; the cgroup's limit is the one that holds.
const TASKS: u64 = 32_768;
/// The shim's own two processes.
const SHIM_TASKS: i64 = 2;
/// Connections that nobody has accepted, for each listening socket: no cgroup counts them.
const BACKLOG: &str = "128";
/// As many processes as the kernel can number; it takes no larger limit.
const MOST_PIDS: i64 = 4 << 20;
/// More than any host has, and no more than a tmpfs takes.
const MOST_BYTES: u64 = 1 << 60;
const MOST_INODES: u64 = 1 << 50;

/// The memory of a whole container: the job's, the shim's, and a base's in its workspace; without what its internet sockets
/// may hold, where that is counted apart.
pub fn memory_bytes(policy: &Policy, base: Size, ways: Ways) -> u64 {
    let all = policy.memory_bytes.saturating_add(SHIM_MEMORY).saturating_add(base.bytes);
    all.saturating_sub(socket_bytes(policy, ways).unwrap_or(0)).min(MOST_BYTES)
}

/// What its internet sockets may hold; none where the limit on memory is one for all.
pub fn socket_bytes(policy: &Policy, ways: Ways) -> Option<u64> {
    ways.sockets_apart.then(|| policy.socket_bytes())
}

/// How this engine is asked, where engines differ.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ways {
    /// It makes no file system with a limit on inodes: the shim does, in its first moment.
    pub shim_mounts: bool,
    /// Its own resource limits are more than it can give: it is told others.
    pub own_rlimits: bool,
    /// Nothing starts under a limit on processes; only tried, to know why.
    pub no_pids: bool,
    /// Its kernel counts the buffers of internet sockets apart from all other memory, as cgroup v1 does.
    pub sockets_apart: bool,
}

/// What a container is made of for one job, with these places.
pub fn body(
    engine: &Engine,
    image: &Image,
    policy: &Policy,
    base: Size,
    places: &[Place],
    ways: Ways,
) -> ContainerCreateBody {
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let words = |words: &[&str]| Some(words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
    let memory = memory_bytes(policy, base, ways);
    let ulimit = |name: &str, value: u64| ResourcesUlimits {
        name: Some(name.to_owned()),
        soft: Some(number(value)),
        hard: Some(number(value)),
    };
    let mut ulimits = vec![ulimit("core", 0)];
    // Left as the engine has it until a container has told how much that is: an engine refuses more.
    if let Some(most) = engine.most_files.get() {
        ulimits.push(ulimit("nofile", u64::from(policy.open_files).max(SHIM_FILES).min(*most)));
    } else if ways.own_rlimits {
        ulimits.push(ulimit("nofile", SHIM_FILES));
    }
    if ways.own_rlimits {
        ulimits.push(ulimit("nproc", TASKS));
    }
    // For the shim to become the job's user; the job has none.
    let mut powers = vec!["SETUID", "SETGID"];
    if ways.shim_mounts {
        // Given up before the first command.
        powers.push("SYS_ADMIN");
    }
    let host = HostConfig {
        network_mode: Some("none".to_owned()),
        cap_drop: words(&["ALL"]),
        cap_add: words(&powers),
        security_opt: words(&["no-new-privileges"]),
        readonly_rootfs: Some(true),
        tmpfs: Some(tmpfs(image, places, ways)),
        mounts: Some([shim::mount(engine, true)].into_iter().chain(shim::hosts_mount(engine)).collect()),
        memory: Some(number(memory)),
        // Memory and swap together.
        memory_swap: Some(number(memory.saturating_add(policy.swap_bytes))),
        sysctls: Some(HashMap::from([("net.core.somaxconn".to_owned(), BACKLOG.to_owned())])),
        nano_cpus: Some(number(policy.cpu_milli.into()) * 1_000_000),
        pids_limit: (!ways.no_pids).then(|| (i64::from(policy.pids) + SHIM_TASKS).min(MOST_PIDS)),
        ulimits: Some(ulimits),
        ipc_mode: Some("private".to_owned()),
        cgroupns_mode: Some(HostConfigCgroupnsModeEnum::PRIVATE),
        // What goes over the shim's streams is not the engine's to keep.
        log_config: Some(HostConfigLogConfig { typ: Some("none".to_owned()), config: None }),
        auto_remove: Some(true),
        // The shim is process 1 itself, also where the engine would put one of its own before it.
        init: Some(false),
        runtime: engine.runtime.clone(),
        ..HostConfig::default()
    };
    ContainerCreateBody {
        image: Some(image.id.clone()),
        entrypoint: Some(vec![shim::program()]),
        cmd: Some(Vec::new()),
        user: Some("0:0".to_owned()),
        hostname: Some("coinop".to_owned()),
        working_dir: Some("/".to_owned()),
        // What the shim takes for the wish to end, whatever the image says.
        stop_signal: Some("SIGTERM".to_owned()),
        // Podman would make a timer for one that is none.
        healthcheck: image
            .has_healthcheck
            .then(|| HealthConfig { test: words(&["NONE"]), ..HealthConfig::default() }),
        open_stdin: Some(true),
        stdin_once: Some(true),
        attach_stdin: Some(true),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        labels: Some(engine.labels()),
        // The runtime makes an empty network namespace by itself. Asked only for the network `none`, the engine makes an
        // endpoint in it, and many that begin and end at once have stopped Docker 20.10 for good.
        network_disabled: Some(true),
        host_config: Some(host),
        ..ContainerCreateBody::default()
    }
}

/// What a base takes in a workspace.
#[derive(Debug, Clone, Copy, Default)]
pub struct Size {
    pub bytes: u64,
    pub entries: u64,
}

/// A writable place, and what it may hold.
pub struct Place {
    pub mount: Mount,
    bytes: u64,
    inodes: u64,
}

/// The clause that a place is too large for, as its shim has measured it; the kernel counts in pages.
pub fn too_large(places: &[Place], rooms: &[Room]) -> Option<(&'static str, String)> {
    rooms.iter().find_map(|room| {
        let place = places.iter().find(|place| place.mount.path == room.path)?;
        let told = |clause, most: u64, found: u64| {
            let found = if found == 0 { "without a limit".to_owned() } else { format!("of {found}") };
            Some((clause, format!("{} should have at most {most} and was made {found}", room.path)))
        };
        if room.bytes == 0 || room.bytes > place.bytes.saturating_add(PAGE) {
            return told("disk_bytes", place.bytes, room.bytes);
        }
        if room.inodes == 0 || room.inodes > place.inodes {
            return told("inodes", place.inodes, room.inodes);
        }
        None
    })
}

/// The writable places with their shares: together no more than the policy's disk, and the base's own size.
pub fn places(policy: &Policy, base: Size, uid: u32) -> Vec<Place> {
    let of_64 = |whole: u64, share: u64| (whole / 64 * share + whole % 64 * share / 64).max(1);
    let place = |path: &str, share: u64, mode: &str, base: Size| {
        let bytes = of_64(policy.disk_bytes, share).saturating_add(base.bytes).min(MOST_BYTES);
        // The kernel counts the top folder as one.
        let inodes = of_64(policy.inodes, share).saturating_add(base.entries).saturating_add(1);
        let inodes = inodes.min(MOST_INODES);
        let options = format!("size={bytes},nr_inodes={inodes},mode={mode},uid={uid},gid={uid}");
        Place { mount: Mount { path: path.to_owned(), options, exec: true }, bytes, inodes }
    };
    let none = Size::default();
    // Written by the node only, and not counted as the job's.
    let options = "size=16m,nr_inodes=1k,mode=0755".to_owned();
    let mount = Mount { path: "/job".to_owned(), options, exec: false };
    let job = Place { mount, bytes: 16 << 20, inodes: 1 << 10 };
    vec![
        place("/workspace", 44, "0755", base),
        place("/tmp", 8, "1777", none),
        place("/var/tmp", 4, "1777", none),
        place("/home/job", 3, "0755", none),
        place(&runtime_folder(uid), 1, "0700", none),
        place("/dev/shm", 4, "1777", none),
        job,
    ]
}

/// What the engine mounts: the places, or where the shim makes them itself a folder for each to be mounted on.
fn tmpfs(image: &Image, places: &[Place], ways: Ways) -> HashMap<String, String> {
    // Podman would copy the image's own files there.
    let (closed, own) = if ways.shim_mounts {
        (
            "size=4k,mode=0755,ro,nosuid,nodev,noexec,notmpcopyup",
            "size=4k,mode=0755,nosuid,nodev,noexec,notmpcopyup",
        )
    } else {
        ("size=4k,nr_inodes=1,mode=0755,ro,nosuid,nodev,noexec", "")
    };
    let option = |place: &Mount| match ways.shim_mounts {
        true => own.to_owned(),
        false => format!("{},nosuid,nodev,{}", place.options, if place.exec { "exec" } else { "noexec" }),
    };
    // Where an image wants a volume it would get a folder on the engine's disk, to be written without a limit.
    let volumes = image.volumes.iter().map(|path| (path.clone(), closed.to_owned()));
    volumes.chain(places.iter().map(|place| (place.mount.path.clone(), option(&place.mount)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Network;

    #[test]
    fn a_place_that_a_runtime_made_larger_than_it_was_told_is_named_by_its_clause() {
        let policy = Policy {
            wall_ms: 1,
            idle_ms: 1,
            memory_bytes: 64 << 20,
            swap_bytes: 0,
            pids: 8,
            cpu_milli: 1000,
            disk_bytes: 1 << 20,
            inodes: 64,
            open_files: 64,
            output_bytes: 0,
            output_bytes_per_s: 1 << 20,
            network: Network::None,
        };
        let places = places(&policy, Size::default(), 5000);
        let room = |bytes, inodes| vec![Room { path: "/workspace".to_owned(), bytes, inodes }];
        let clause = |bytes, inodes| too_large(&places, &room(bytes, inodes)).map(|(clause, _)| clause);
        let (bytes, inodes) = ((1 << 20) / 64 * 44, 44 + 1);
        assert_eq!(clause(bytes, inodes), None);
        assert_eq!(clause(bytes + 1 + PAGE, inodes), Some("disk_bytes"));
        assert_eq!(clause(0, inodes), Some("disk_bytes"));
        assert_eq!(clause(bytes, inodes + 1), Some("inodes"));
        assert_eq!(clause(bytes, 0), Some("inodes"));
    }
}
