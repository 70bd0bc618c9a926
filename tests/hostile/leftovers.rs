//! What must not be left on the host: not after a thousand hostile jobs, not after the node was killed under them. The
//! eyes that look for it are first shown something to see.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use sha2::{Digest, Sha256};

use crate::case::{Outcome, cases};
use crate::ground::{self, Ground, policy};
use crate::plain::{How, MOMENT, Plain, program};
use crate::siege::Siege;
use crate::{engine, host};

cases! {
    a_thousand_hostile_jobs_leave_nothing: "what is left", leftovers_are_seen;
    a_node_killed_under_hostile_jobs_leaves_nothing: "kill -9 of the node", without_its_parent;
}

/// Where it stands, this program is the node that is killed: its value is the kind of its backend.
pub const NODE: &str = "COINOP_HOSTILE_NODE";

/// As many as there is time for: a container takes half a second.
fn jobs(ground: &Ground) -> usize {
    if ground.engine.is_some() { 40 } else { 1000 }
}
const AT_ONCE: usize = 4;

// === eyes ===

type Traces = BTreeMap<&'static str, BTreeSet<String>>;

/// Where a node leaves its traces.
#[derive(Default)]
struct Places {
    state: PathBuf,
    /// The process whose children are sandboxes.
    nursery: Option<i32>,
    engine: Option<(String, String)>,
    engine_root: String,
    /// Every container that there ever was.
    ids: BTreeSet<String>,
}

impl Places {
    fn of(ground: &Ground) -> Places {
        let own = std::process::id().cast_signed();
        let nursery = |one: &host::Seen| one.parent == own && one.name.starts_with("coinop-nursery");
        let mut places = Places {
            state: ground.dir.path().join("state"),
            nursery: host::processes().into_iter().find(nursery).map(|one| one.pid),
            engine: ground.engine.clone(),
            ..Places::default()
        };
        if let Some((host, _)) = &places.engine {
            let info = body(&engine::get(host, "/info").unwrap());
            places.engine_root = info["DockerRootDir"].as_str().unwrap().to_owned();
        }
        places
    }

    fn containers(&mut self) -> BTreeSet<String> {
        let Some((host, node)) = &self.engine else { return BTreeSet::new() };
        let filter = format!("%7B%22label%22%3A%5B%22coinop.node%3D{node}%22%5D%7D");
        let found = body(&engine::get(host, &format!("/containers/json?all=1&filters={filter}")).unwrap());
        let ids = found.as_array().unwrap().iter().map(|one| one["Id"].as_str().unwrap().to_owned());
        let found: BTreeSet<String> = ids.collect();
        self.ids.extend(found.iter().cloned());
        found
    }

    fn look(&mut self) -> Traces {
        let name = &program().expect("made before").name;
        let all = host::processes();
        let ours = |one: &&host::Seen| &one.name == name || Some(one.parent) == self.nursery;
        let shown = |one: &host::Seen| format!("{} {}", one.pid, one.name);
        let processes = all.iter().filter(ours).map(shown).collect();
        Traces::from([
            ("process", processes),
            ("container", self.containers()),
            ("cgroup", self.cgroups()),
            ("mount", self.mounts()),
            ("namespace", self.namespaces()),
            ("file", self.files()),
        ])
    }

    fn prefix(&self) -> String {
        let state = self.state.canonicalize().unwrap_or_default();
        let hash = hex::encode(Sha256::digest(state.as_os_str().as_encoded_bytes()));
        format!("coinop-{}-", &hash[..8])
    }

    fn cgroups(&self) -> BTreeSet<String> {
        let prefix = self.prefix();
        let ours = |name: &str| name.starts_with(&prefix) || self.ids.iter().any(|id| name.contains(id));
        let (mut found, mut folders) = (BTreeSet::new(), vec![(PathBuf::from("/sys/fs/cgroup"), 0)]);
        while let Some((folder, depth)) = folders.pop() {
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                if ours(&entry.file_name().to_string_lossy()) {
                    found.insert(entry.path().display().to_string());
                } else if depth < 6 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push((entry.path(), depth + 1));
                }
            }
        }
        found
    }

    /// Mounts of sandboxes that the node, its helper or the engine still see.
    fn mounts(&self) -> BTreeSet<String> {
        let ours = |line: &&str| {
            let of_engine = !self.engine_root.is_empty() && line.contains(&format!("{}/", self.engine_root));
            line.contains("tmpfs box") || line.contains("overlay workspace") || of_engine
        };
        let seen_by =
            |who: &str| std::fs::read_to_string(format!("/proc/{who}/mountinfo")).unwrap_or_default();
        let nursery = self.nursery.map(|pid| seen_by(&pid.to_string())).unwrap_or_default();
        [seen_by("self"), nursery]
            .iter()
            .flat_map(|list| list.lines())
            .filter(ours)
            .map(str::to_owned)
            .collect()
    }

    /// Namespaces that the node or its helper hold open; one of a living process shows as the process.
    fn namespaces(&self) -> BTreeSet<String> {
        let own = std::process::id().cast_signed();
        let of = |pid: i32| std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let held = [Some(own), self.nursery].into_iter().flatten().flat_map(of);
        let links = held.filter_map(|fd| Some(std::fs::read_link(fd.path()).ok()?.display().to_string()));
        // The helper keeps one user namespace for each owner of bases and slot, for the next one there.
        let kind = |link: &String| {
            ["mnt:", "pid:", "net:", "ipc:", "uts:", "cgroup:"].iter().any(|k| link.starts_with(k))
        };
        links.filter(kind).collect()
    }

    fn files(&self) -> BTreeSet<String> {
        let containers = Path::new(&self.engine_root).join("containers");
        let list = |folder: &Path| {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|entry| entry.path().display().to_string()).collect::<Vec<_>>()
        };
        let ours = |path: &String| self.ids.iter().any(|id| path.contains(id));
        let mut all = list(&self.state);
        if !self.engine_root.is_empty() {
            all.extend(list(&containers).into_iter().filter(ours));
        }
        all.into_iter().collect()
    }

    /// Waits until nothing is there that was not there before.
    fn until_as(&mut self, before: &Traces) {
        let started = Instant::now();
        loop {
            let now = self.look();
            let more: Vec<_> = now
                .iter()
                .flat_map(|(kind, found)| found.difference(&before[kind]).map(move |one| (kind, one)))
                .collect();
            if more.is_empty() {
                return;
            }
            assert!(started.elapsed() < host::PATIENCE, "left behind: {more:#?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn body(answer: &str) -> serde_json::Value {
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1)
        .unwrap_or_else(|why| panic!("{why}: {answer}"))
}

/// Each kind of thing that could be left is put there, and seen.
fn leftovers_are_seen(plain: &Plain) -> Outcome {
    let state = plain.dir().join("state");
    std::fs::create_dir(&state).unwrap();
    let mut places = Places { state: state.clone(), ..Places::default() };
    let before = places.look();
    let mut loose = plain.start(How { stays: true, ..How::default() }, &["daemons", "1"])?;
    loose.ready()?;
    std::fs::write(state.join("left"), "").unwrap();
    let held = std::fs::File::open("/proc/self/ns/net").unwrap();
    let mut kinds = vec!["process", "file", "namespace"];
    let mut undo = Vec::new();
    if geteuid().is_root() {
        let point = plain.dir().join("point");
        std::fs::create_dir(&point).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "box"]).arg(&point).status().unwrap();
        assert!(mounted.success());
        undo.push(Undo::Mount(point));
        kinds.push("mount");
        let parents = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        let group = parents
            .map(|entry| entry.path().join(format!("{}left", places.prefix())))
            .chain([PathBuf::from(format!("/sys/fs/cgroup/{}left", places.prefix()))])
            .find(|path| {
                path.parent().is_some_and(|up| up.join("cgroup.procs").exists())
                    && std::fs::create_dir(path).is_ok()
            });
        if let Some(group) = group {
            undo.push(Undo::Folder(group));
            kinds.push("cgroup");
        }
    }
    let after = places.look();
    for kind in &kinds {
        assert!(after[kind].len() > before[kind].len(), "a {kind} that was left is not seen");
    }
    drop((held, undo));
    Ok(format!("a planted {} is seen", kinds.join(", ")))
}

/// What was planted, taken away again.
enum Undo {
    Mount(PathBuf),
    Folder(PathBuf),
}

impl Drop for Undo {
    fn drop(&mut self) {
        match self {
            Undo::Mount(point) => drop(Command::new("umount").arg(point).status()),
            Undo::Folder(folder) => std::fs::remove_dir(folder).unwrap_or_default(),
        }
    }
}

// === a thousand jobs ===

async fn a_thousand_hostile_jobs_leave_nothing(ground: &Ground) -> Outcome {
    let all = jobs(ground);
    let mut places = Places::of(ground);
    let mut before = None;
    let (mut done, mut open) = (0, 0);
    while done < all {
        if done >= AT_ONCE * 2 && before.is_none() {
            // What is made once for all is there by now.
            before = Some(places.look());
            open = host::open_files(std::process::id().cast_signed()).unwrap();
        }
        let round = (0..AT_ONCE).map(|n| one_job(ground, done + n));
        let sieges = join_all(round).await;
        places.containers();
        join_all(sieges.into_iter().enumerate().map(|(n, siege)| end(siege, n))).await;
        done += AT_ONCE;
    }
    let mut before = before.expect("more than two rounds");
    // What was there between two rounds may itself have been going.
    before.insert("process", BTreeSet::new());
    before.insert("container", BTreeSet::new());
    before.insert("cgroup", BTreeSet::new());
    places.until_as(&before);
    host::until("no more open files than before", || {
        host::open_files(std::process::id().cast_signed()).unwrap() <= open
    });
    assert_eq!(ground.backend.reap().await.unwrap(), 0);
    let before: usize = before.values().map(BTreeSet::len).sum();
    Ok(format!(
        "{done} jobs, no process, cgroup, mount, namespace, container or file more ({before} of the backend's own)"
    ))
}

async fn one_job(ground: &Ground, n: usize) -> Siege {
    const ATTACKS: [&[&str]; 6] = [
        &["daemons", "2"],
        &["stops", "2"],
        &["zombies", "5"],
        &["stubborn", "2"],
        &["inodes", "50", ".", "/tmp"],
        &["descriptors-hoard", "1", "50"],
    ];
    Siege::lay(ground, policy(), ATTACKS[n % ATTACKS.len()]).await
}

/// As jobs end: killed and destroyed, destroyed, or let go.
async fn end(siege: Siege, n: usize) {
    match n % 3 {
        0 => drop(siege.kill().await),
        1 => drop(siege.sandbox.destroy().await.unwrap()),
        _ => drop(siege),
    }
}

// === a killed node ===

/// Jobs of a node whose parent, the node, is gone, and that nobody told.
fn without_its_parent(plain: &Plain) -> Outcome {
    let before = "sh -c '\"$@\" & wait' sh";
    let mut loose = plain.start(How { before, stays: true, ..How::default() }, &["stubborn", "1"])?;
    loose.ready()?;
    let job = loose.marked()[0];
    let all = host::processes();
    let parent = |pid: i32| all.iter().find(|one| one.pid == pid).map(|one| one.parent).unwrap();
    let node = parent(job);
    kill(Pid::from_raw(node), Signal::SIGKILL).unwrap();
    host::until("its parent is gone", || !host::exists(node));
    std::thread::sleep(MOMENT);
    assert_eq!(loose.marked(), [job]);
    Ok("a plain child outlives its killed parent".to_owned())
}

/// The node that is killed. It says the marks of its jobs.
pub fn node(kind: &str) -> ExitCode {
    let column =
        ground::columns().into_iter().find(|column| column.name == kind).expect("a column of this name");
    let ground = column.new_ground().expect("its parent has one");
    ground.runtime.block_on(async {
        let mut sieges = Vec::new();
        for words in [&["bomb"][..], &["daemons", "4"], &["stops", "4"]] {
            sieges.push(Siege::lay(&ground, policy(), words).await);
        }
        let marks: Vec<&str> = sieges.iter().map(|siege| siege.mark.as_str()).collect();
        let node = ground.engine.as_ref().map_or("-", |(_, node)| node.as_str());
        println!("\nNODE {} {node} {}", ground.dir.path().join("state").display(), marks.join(","));
        tokio::time::sleep(Duration::from_secs(600)).await;
    });
    ExitCode::SUCCESS
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may be gone already, as it should.
        self.0.kill().unwrap_or_default();
        self.0.wait().map(drop).unwrap_or_default();
    }
}

async fn a_node_killed_under_hostile_jobs_leaves_nothing(ground: &Ground) -> Outcome {
    // Its folder outlives it: nobody is there to remove it, so it lies in ours.
    let mut node = Command::new(std::env::current_exe().unwrap());
    node.env(NODE, ground.name).env("TMPDIR", ground.dir.path()).env_remove(ground::ALONE);
    let mut node = Killed(node.stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(node.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let line = lines.find(|line| line.starts_with("NODE ")).expect("a node with its jobs");
    let words: Vec<&str> = line.split(' ').collect();
    let marks: Vec<&str> = words[3].split(',').collect();
    let engine = ground.engine.as_ref().map(|(host, _)| (host.clone(), words[2].to_owned()));
    let mut places = Places { state: PathBuf::from(words[1]), engine, ..Places::of(ground) };
    places.nursery = host::processes()
        .into_iter()
        .find(|one| one.parent == node.0.id().cast_signed() && one.name.starts_with("coinop-nursery"))
        .map(|one| one.pid);
    assert!(ground.engine.is_none() || places.containers().len() == 3);
    let jobs: BTreeSet<i32> = marks.iter().flat_map(|mark| host::family(mark)).collect();
    assert!(jobs.len() > 20, "{jobs:?}");

    let started = Instant::now();
    node.0.kill().unwrap();
    node.0.wait().unwrap();
    host::until("its jobs are gone", || {
        !jobs.iter().any(|pid| host::exists(*pid)) && marks.iter().all(|mark| host::marked(mark).is_empty())
    });
    let gone = started.elapsed();
    let nothing = ["process", "container", "cgroup", "mount", "namespace", "file"];
    let mut nothing: Traces = nothing.map(|kind| (kind, BTreeSet::new())).into();
    // The folder that nodes try an overlay on is the node's own.
    nothing.insert("file", [places.state.join("probe").display().to_string()].into());
    nothing.insert("mount", Places::of(ground).mounts());
    nothing.insert("namespace", Places::of(ground).namespaces());
    // A zombie is for whoever has become its parent to reap.
    let helper = places.nursery.take();
    host::until("its helper is gone", || {
        !host::processes().iter().any(|one| Some(one.pid) == helper && one.state != 'Z')
    });
    places.until_as(&nothing);
    Ok(format!(
        "{} processes gone {} after, the rest {}",
        jobs.len(),
        host::ms(gone),
        host::ms(started.elapsed())
    ))
}
