//! What the engine can do, held against the policy: one sandbox is tried, in as many ways as engines differ, and what was
//! seen there and what the engine says of itself become the checks and the refusals.

use coinop_shim::wire::{FromShim, Ready, ToShim};

use super::super::{Check, Error, Network, Policy};
use super::hardened::Size;
use super::{BACKEND, Inner};

/// Memory of the sandbox that is tried, bytes.
const LITTLE: u64 = 32 << 20;

/// The clause of the policy that the tried sandbox did not keep, or `container` when there was none.
#[derive(Debug, Clone)]
pub struct Unmet {
    pub clause: &'static str,
    pub why: String,
}

impl From<Error> for Unmet {
    fn from(error: Error) -> Unmet {
        match error {
            Error::Unenforceable { clause, why, .. } => Unmet { clause, why },
            other => {
                let why = other.to_string();
                // An engine's or the shim's word about this limit.
                Unmet { clause: if why.contains("nr_inodes") { "inodes" } else { "container" }, why }
            }
        }
    }
}

impl Inner {
    /// Tries one sandbox, and again in another way where the engine cannot do it in the first.
    pub async fn find_ways(&mut self) -> Result<Ready, Unmet> {
        loop {
            let why = match self.try_one(LITTLE).await {
                Ok(ready) => return Ok(ready),
                Err(why) => why,
            };
            let told = why.to_string();
            if told.contains("unknown mount option") && !self.ways.shim_mounts {
                // Podman's word for a limit that it does not know.
                self.ways.shim_mounts = true;
            } else if told.contains("rlimit") && !self.ways.own_rlimits {
                self.ways.own_rlimits = true;
            } else {
                return Err(self.without_pids(why).await);
            }
            tracing::debug!(%why, ways = ?self.ways, "another way");
        }
    }

    /// Whether it is the limit on processes that keeps a container from starting: gVisor's own threads count as the job's.
    async fn without_pids(&mut self, why: Error) -> Unmet {
        if !matches!(why, Error::Host { doing: "start its container", .. }) {
            return why.into();
        }
        self.ways.no_pids = true;
        // Its own memory counts as well.
        let tried = self.try_one(16 * LITTLE).await;
        self.ways.no_pids = false;
        match tried {
            Err(Error::Host { doing: "make its container" | "start its container", .. }) => why.into(),
            // It starts. What else is amiss does not matter any more.
            _ => {
                let runtime = self.engine.runtime.clone().unwrap_or_else(|| "of the engine".to_owned());
                let why = format!(
                    "with the runtime {runtime} no container starts under a limit on processes: {why}"
                );
                Unmet { clause: "pids", why }
            }
        }
    }

    async fn try_one(&self, memory_bytes: u64) -> Result<Ready, Error> {
        let policy = Policy {
            wall_ms: 1000,
            idle_ms: 1000,
            memory_bytes,
            swap_bytes: 0,
            pids: 8,
            cpu_milli: 1000,
            disk_bytes: 1 << 20,
            inodes: 64,
            open_files: 64,
            output_bytes: 1024,
            output_bytes_per_s: 1 << 30,
            network: Network::None,
        };
        let (mut started, ready) = self.start(&policy, Size::default()).await?;
        let counted = match started.line.ask(&ToShim::Usage).await {
            Ok(FromShim::Usage(used)) => used.cpu_us,
            _ => None,
        };
        let counted = match counted {
            None => self.engine.used(started.container.id()).await.ok().and_then(|used| used.cpu_us),
            counted => counted,
        };
        self.counts_cpu.get_or_init(|| counted.is_some());
        started.container.remove().await?;
        Ok(ready)
    }

    pub fn checks(&self) -> Vec<Check> {
        let (info, tried) = (&self.info, &self.tried);
        let check = |name: &str, ok: bool, how: String, mend: Option<&str>| Check {
            name: name.to_owned(),
            ok,
            how,
            mend: mend.filter(|_| !ok).map(str::to_owned),
        };
        let unmet = |name: &str| tried.as_ref().err().filter(|unmet| unmet.clause == name);
        let version = info.server_version.clone().unwrap_or_default();
        let kernel = info.kernel_version.clone().unwrap_or_default();
        let cgroup = info.cgroup_version.map(|version| version.to_string()).unwrap_or_default();
        let runtime = self.engine.runtime.as_ref().or(info.default_runtime.as_ref());
        let runtime = runtime.cloned().unwrap_or_default();
        let mut all =
            vec![check("engine", true, format!("{version}, kernel {kernel}, runtime {runtime}"), None)];
        all.push(match tried {
            Err(Unmet { clause: "container", why }) => {
                check("container", false, why.clone(), Some("see the engine's own log"))
            }
            Err(Unmet { clause, .. }) => {
                check("container", true, format!("one was tried, and refused for {clause}"), None)
            }
            Ok(_) => {
                let mounts =
                    if self.ways.shim_mounts { "; its shim mounted what the job writes in" } else { "" };
                check(
                    "container",
                    true,
                    format!("a sandbox was started at the start of the node{mounts}"),
                    None,
                )
            }
        });
        let mut clause = |name: &str, ok: bool, how: String, mend: &str| {
            all.push(match unmet(name) {
                None => check(name, ok, how, Some(mend)),
                Some(Unmet { why, .. }) => check(
                    name,
                    false,
                    why.clone(),
                    Some("choose another runtime or engine: see docs/security.md"),
                ),
            });
        };
        let mut by = |name: &str, has: Option<bool>, how: &str| {
            let ok = has == Some(true);
            let how = if ok { format!("{how}, cgroup v{cgroup}") } else { "the engine cannot".to_owned() };
            clause(name, ok, how, "give the engine this cgroup controller");
        };
        // What the shim found there, not what the engine says.
        let memory = match tried {
            Ok(ready) if !ready.sockets => {
                "by the kernel; no internet sockets, as nothing bounds their buffers here"
            }
            _ => "by the kernel",
        };
        by("memory_bytes", info.memory_limit, memory);
        by("pids", info.pids_limit, "by the kernel");
        by("cpu_milli", info.cpu_cfs_quota, "by the kernel");
        let swap =
            if info.swap_limit == Some(true) { "by the kernel, with memory" } else { "its host has none" };
        for (name, how, mend) in [
            (
                "idle_ms",
                "the node ends commands without output and processor time, as the container's cgroup counts it",
                "give the engine the cgroup controller for processors",
            ),
            (
                "swap_bytes",
                swap,
                "boot the engine's host with swapaccount=1, or do without swap there (swapoff -a)",
            ),
        ] {
            let lack = self.lacks(name);
            clause(name, lack.is_none(), lack.unwrap_or(how).to_owned(), mend);
        }
        for (name, how) in [
            ("wall_ms", "the shim kills the job, or the engine the container"),
            (
                "disk_bytes",
                "file systems in memory of this size together; a base comes on top, or in a waiting \
                            container out of it",
            ),
            ("inodes", "as disk_bytes"),
            ("open_files", "a limit of each process"),
            ("output_bytes", "counted by the node"),
            ("output_bytes_per_s", "the shim drains no faster"),
            ("network", "none but a loopback of its own"),
        ] {
            clause(name, true, how.to_owned(), "");
        }
        all.push(check("uids", true, format!("one for each container, {}", self.uids), None));
        if let Ok(ready) = tried {
            let how =
                if ready.landlock { "in force" } else { "kept from containers by the engine or the kernel" };
            all.push(check("landlock", true, how.to_owned(), None));
        }
        all
    }

    /// Why this clause cannot be kept here, where more than the engine's own words tells it.
    fn lacks(&self, clause: &str) -> Option<&'static str> {
        let has_swap = self.tried.as_ref().is_ok_and(|ready| ready.swap);
        lacks(clause, self.counts_cpu.get().copied(), has_swap, self.info.swap_limit)
    }

    pub fn admit(&self, policy: &Policy) -> Result<(), Error> {
        let refuse =
            |clause: &'static str, why: String| Err(Error::Unenforceable { backend: BACKEND, clause, why });
        policy.usable()?;
        if let Err(Unmet { clause, why }) = &self.tried {
            return refuse(clause, why.clone());
        }
        if policy.network == Network::Egress {
            return refuse("network", "there is no egress gateway yet".to_owned());
        }
        if let Some(most) = self.engine.most_files.get().filter(|most| u64::from(policy.open_files) > **most)
        {
            return refuse("open_files", format!("this engine lets a process open {most} at most"));
        }
        for clause in ["idle_ms", "swap_bytes"] {
            if let Some(why) = self.lacks(clause) {
                return refuse(clause, why.to_owned());
            }
        }
        for (clause, has) in [
            ("memory_bytes", self.info.memory_limit),
            ("pids", self.info.pids_limit),
            ("cpu_milli", self.info.cpu_cfs_quota),
        ] {
            if has != Some(true) {
                return refuse(clause, "this engine has no cgroup controller for it".to_owned());
            }
        }
        Ok(())
    }
}

fn lacks(
    clause: &str,
    counts_cpu: Option<bool>,
    has_swap: bool,
    limits_swap: Option<bool>,
) -> Option<&'static str> {
    match clause {
        "idle_ms" if counts_cpu == Some(false) => Some("no processor time is counted here"),
        "swap_bytes" if has_swap && limits_swap != Some(true) => {
            Some("its host has swap, and this engine cannot limit it")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::lacks;

    #[test]
    fn what_nobody_counts_cannot_be_kept() {
        for (clause, counts_cpu, has_swap, limits_swap, kept) in [
            ("idle_ms", Some(true), true, None, true),
            ("idle_ms", Some(false), false, Some(true), false),
            ("swap_bytes", Some(true), true, Some(true), true),
            ("swap_bytes", Some(true), true, Some(false), false),
            ("swap_bytes", Some(true), true, None, false),
            ("swap_bytes", Some(true), false, Some(false), true),
            ("pids", Some(false), true, None, true),
        ] {
            let lack = lacks(clause, counts_cpu, has_swap, limits_swap);
            assert_eq!(lack.is_none(), kept, "{clause}: {lack:?}");
        }
    }
}
