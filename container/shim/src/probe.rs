//! A stranger's program in miniature: `shim probe …` tries, inside a sandbox, what the policy forbids, and says what came
//! of it. The node runs it at its start and judges; it only tries.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::UdpSocket;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::libc;
use serde::{Deserialize, Serialize};

use crate::sys;

/// What one wall did when it was run against.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub name: String,
    pub ok: bool,
    pub how: String,
}

/// Where a job may write.
const PLACES: [&str; 3] = ["/workspace", "/tmp", "/home/job"];
/// Where it may not.
const SYSTEM: [&str; 6] = ["/", "/etc", "/usr", "/bin", "/job", "/proc/sys/kernel"];
/// What a command's environment may hold without being told.
const ENVIRONMENT: [&str; 3] = ["HOME", "PATH", "TMPDIR"];
/// The code of a probe that was refused more memory; others are killed for it.
pub const NO_MEMORY: i32 = 3;
/// Bytes written at once.
const BLOCK: [u8; 4096] = [1; 4096];

/// Runs one probe by its name; false when there is none of that name.
///
/// # Errors
/// When nothing can be printed.
pub fn run(mut words: impl Iterator<Item = OsString>) -> io::Result<bool> {
    let name = words.next().unwrap_or_default();
    let word = words.next().unwrap_or_default();
    let number = word.to_str().and_then(|word| word.parse::<u64>().ok()).unwrap_or_default();
    let counted = match name.to_str() {
        Some("walls") => {
            let found = serde_json::to_string(&walls(Path::new(&word))).map_err(io::Error::other)?;
            println!("{found}");
            return Ok(true);
        }
        Some("tasks") => tasks(number),
        Some("files") => {
            (0..number).map_while(|_| File::open("/dev/null").ok()).collect::<Vec<_>>().len() as u64
        }
        Some("disk") => disk(number),
        Some("inodes") => inodes(number),
        Some("memory") => memory(number),
        Some("output") => return output(number).map(|()| true),
        Some("hold") => io::copy(&mut io::stdin().lock(), &mut io::sink())?,
        Some("sleep") => {
            std::thread::sleep(Duration::from_millis(number));
            0
        }
        Some("burn") => burn(Duration::from_millis(number)),
        _ => return Ok(false),
    };
    println!("{counted}");
    Ok(true)
}

/// As many processes beside this one as can be had, up to a number.
fn tasks(most: u64) -> u64 {
    let mut children = Vec::new();
    while (children.len() as u64) < most {
        // A child of its own program, which waits for its end.
        let child = std::process::Command::new("/proc/self/exe")
            .args(["probe", "hold"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn();
        match child {
            Ok(child) => children.push(child),
            Err(_) => break,
        }
    }
    for child in &mut children {
        // They end by themselves when this process does; a failure here changes nothing of the count.
        child.kill().unwrap_or_default();
    }
    children.len() as u64
}

/// Bytes that can be written to all places together.
fn disk(most: u64) -> u64 {
    let mut written = 0;
    for place in PLACES {
        let Ok(mut file) = File::create(Path::new(place).join("probe-disk")) else { continue };
        while written < most && file.write_all(&BLOCK).is_ok() {
            written += BLOCK.len() as u64;
        }
    }
    written
}

/// Files that can be made in all places together.
fn inodes(most: u64) -> u64 {
    let makes = |place: &str, n: u64| File::create(Path::new(place).join(format!("probe-{n}"))).is_ok();
    PLACES.iter().map(|place| (0..most).take_while(|n| makes(place, *n)).count() as u64).sum()
}

/// Bytes that were had and written to; ends with `NO_MEMORY` when they are refused.
fn memory(most: u64) -> u64 {
    let mut held: Vec<Vec<u8>> = Vec::new();
    const PIECE: usize = 1 << 20;
    while (held.len() * PIECE) < usize::try_from(most).unwrap_or(usize::MAX) {
        let mut piece = Vec::new();
        if piece.try_reserve_exact(PIECE).is_err() {
            std::process::exit(NO_MEMORY);
        }
        piece.resize(PIECE, 1);
        held.push(std::hint::black_box(piece));
    }
    (held.len() * PIECE) as u64
}

fn output(most: u64) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    for _ in 0..most / BLOCK.len() as u64 {
        stdout.write_all(&BLOCK)?;
    }
    Ok(())
}

/// Keeps two cores busy.
fn burn(time: Duration) -> u64 {
    let until = Instant::now() + time;
    let spin = move || while std::hint::black_box(Instant::now()) < until {};
    std::thread::scope(|scope| {
        scope.spawn(spin);
        spin();
    });
    0
}

/// Runs against every wall that gives an answer by itself. `host` is a path of the host.
fn walls(host: &Path) -> Vec<Finding> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().trim().to_owned()
    };
    let uid = nix::unistd::getuid();
    let powers = ["CapInh", "CapPrm", "CapEff", "CapAmb"].map(field);
    let system: Vec<&str> = SYSTEM.into_iter().filter(|folder| writes(folder)).collect();
    let places: Vec<&str> = PLACES.into_iter().filter(|folder| !writes(folder)).collect();
    let calls = allowed_calls();
    let strangers: Vec<String> = std::env::vars_os()
        .map(|(name, _)| name.to_string_lossy().into_owned())
        .filter(|name| !ENVIRONMENT.contains(&name.as_str()))
        .collect();
    let open: BTreeSet<String> = names("/proc/self/fd").into_iter().filter(|fd| more_than(fd, 2)).collect();
    let links: Vec<String> = names("/sys/class/net").into_iter().filter(|link| link != "lo").collect();
    let of_init = ["/proc/1/environ", "/proc/1/mem", "/proc/1/maps"];
    let of_init: Vec<&str> =
        of_init.into_iter().filter(|file| fs::read(file).is_ok_and(|b| !b.is_empty())).collect();
    let sent = UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.connect("192.0.2.1:9"));
    let finding = |name: &str, ok: bool, how: String| Finding { name: name.to_owned(), ok, how };
    vec![
        // Which one is different each time, and the report's hash is not.
        finding("user", !uid.is_root(), if uid.is_root() { "uid 0" } else { "not root" }.to_owned()),
        finding("capabilities", powers.iter().all(|set| is_zero(set)), format!("{powers:?}")),
        finding("no_new_privileges", field("NoNewPrivs") == "1", field("NoNewPrivs")),
        finding("system_calls", field("Seccomp") == "2" && calls.is_empty(), told("answered", &calls)),
        finding("read_only_system", system.is_empty(), told("written to", &system)),
        finding("writable_places", places.is_empty(), told("closed", &places)),
        finding("environment", strangers.is_empty(), told("holds", &strangers)),
        // The one more is the folder that is being listed.
        finding("descriptors", open.len() <= 1, told("open", &open.into_iter().collect::<Vec<_>>())),
        finding("interfaces", links.is_empty(), told("there", &links)),
        finding("route", sent.is_err(), told("found to", if sent.is_ok() { &["192.0.2.1"] } else { &[] })),
        finding("process_1", of_init.is_empty(), told("read", &of_init)),
        finding(
            "host_files",
            !host.exists(),
            told("seen", if host.exists() { &["the node's folder"] } else { &[] }),
        ),
    ]
}

fn told<T: AsRef<str>>(what: &str, which: &[T]) -> String {
    let which: Vec<&str> = which.iter().map(AsRef::as_ref).collect();
    if which.is_empty() { "holds".to_owned() } else { format!("{what}: {}", which.join(", ")) }
}

fn is_zero(set: &str) -> bool {
    !set.is_empty() && set.bytes().all(|digit| digit == b'0')
}

fn more_than(fd: &str, most: u32) -> bool {
    fd.parse::<u32>().is_ok_and(|fd| fd > most)
}

fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// What is made stays: the sandbox goes with it.
fn writes(folder: &str) -> bool {
    OpenOptions::new().write(true).create_new(true).open(Path::new(folder).join("probe-write")).is_ok()
}

/// Calls that the filter should have refused and did not.
fn allowed_calls() -> Vec<&'static str> {
    // With these arguments each would do nothing, or nothing that outlives this process.
    [
        ("kcmp", libc::SYS_kcmp, [0, 0, 0]),
        ("unshare", libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, [0, -1, 0]),
        ("bpf", libc::SYS_bpf, [0, 0, 0]),
        ("perf_event_open", libc::SYS_perf_event_open, [0, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0, 0, 0]),
        ("vsock", libc::SYS_socket, [libc::AF_VSOCK.into(), libc::SOCK_STREAM.into(), 0]),
    ]
    .into_iter()
    .filter(|(_, call, arguments)| !sys::is_refused(*call, *arguments))
    .map(|(name, ..)| name)
    .collect()
}
