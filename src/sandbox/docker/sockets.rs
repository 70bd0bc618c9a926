//! The limit on the buffers of a container's internet sockets under cgroup v1, which counts them apart. No engine sets it (runc
//! takes no notice of `KernelMemoryTCP`): the node does, where it is root on the engine's host. Whether it holds is the
//! shim's to see.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

use super::super::Error;
use super::engine::Engine;

const GROUPS: &str = "/sys/fs/cgroup/memory";
const LIMIT: &str = "memory.kmem.tcp.limit_in_bytes";

/// Limits the sockets that a started container will make.
///
/// # Errors
/// When the engine does not answer, is on another host, or this user may not.
pub async fn bound(engine: &Engine, container: &str, bytes: u64) -> Result<(), Error> {
    let host = |source| Error::Host { doing: "limit its container's sockets", source };
    let pid = engine.pid(container).await?.ok_or_else(|| host(io::ErrorKind::NotFound.into()))?;
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(host)?;
    let group = memory_group(&groups, container).ok_or_else(|| host(io::ErrorKind::NotFound.into()))?;
    let mut limit = OpenOptions::new().write(true).open(group.join(LIMIT)).map_err(host)?;
    limit.write_all(bytes.to_string().as_bytes()).map_err(host)
}

/// The folder of a process's memory group, if it is this container's: on another host the number is another's.
fn memory_group(groups: &str, container: &str) -> Option<PathBuf> {
    let path = groups.lines().find_map(|line| {
        let (_, line) = line.split_once(':')?;
        let (controllers, path) = line.split_once(':')?;
        controllers.split(',').any(|one| one == "memory").then_some(path)
    })?;
    let below = Path::new(path.trim_start_matches('/'));
    let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    (plain && container.len() >= 32 && path.contains(container)).then(|| Path::new(GROUPS).join(below))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_group_that_bears_the_container_s_name_is_written_to() {
        let id = "64b68504fe391365cd8d9d42adc3fd11921d7745697f4b88104fa7110d500ec9";
        let group = |path: &str| memory_group(&format!("5:cpu,cpuacct:/x\n4:memory:{path}\n0::/\n"), id);
        let docker = format!("/docker/{id}");
        assert_eq!(group(&docker), Some(PathBuf::from(format!("/sys/fs/cgroup/memory/docker/{id}"))));
        assert!(group(&format!("/system.slice/docker-{id}.scope")).is_some());
        for other in ["/", "/docker/other", &format!("/../{id}"), &format!("/a/../../{id}")] {
            assert_eq!(group(other), None, "{other}");
        }
        assert_eq!(memory_group("0::/docker/x\n", id), None);
        assert_eq!(memory_group("4:memory:/docker/x\n", "x"), None);
    }
}
