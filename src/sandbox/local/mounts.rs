//! What a job sees as its file system. `build_root` makes, once a node, the read-only root that all sandboxes
//! copy; `furnish` adds one sandbox's own proc; `move_in` its writable places. No processes and no limits here.

use std::ffi::{CStr, CString};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use coinop_shim::sys;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, pivot_root};

use super::wire::Configure;

/// A step that failed, with its name for the operator.
pub type Step<T> = Result<T, (String, io::Error)>;

/// Names the step of an error.
pub trait Named<T> {
    fn step(self, name: &str) -> Step<T>;
}

impl<T, E: Into<io::Error>> Named<T> for Result<T, E> {
    fn step(self, name: &str) -> Step<T> {
        self.map_err(|why| (name.to_owned(), why.into()))
    }
}

/// Where the root is put together; every Linux has this folder, and no source lies in it.
const STAGE: &str = "/tmp";
/// Inside: where the sandbox's one tmpfs is mounted while it is furnished.
const ATTIC: &str = "/run";

const INERT: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
/// Folders of ours on the tmpfs, its top among them; and what an overlay makes there.
const OWN_INODES: u64 = 10;
const OVERLAY_INODES: u64 = 2;

/// More than any host has, and no more than a tmpfs takes as its size.
const MOST_BYTES: u64 = 1 << 60;
const MOST_INODES: u64 = 1 << 50;

/// Links or folders beside /usr, as this host has them.
const SYSTEM: [&str; 7] = ["bin", "sbin", "lib", "lib32", "lib64", "libx32", "libexec"];
/// /dev/tty is the terminal of whoever opens it: a job has none but those that it makes itself.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// The most pseudo-terminals of one sandbox: no cgroup counts what they hold (`watch`).
pub const PTYS: u64 = 16;
/// Parts of /etc that programs need and that hold no secret; those this host lacks are left out. Settings that may hold
/// somebody's password (npmrc, pip.conf, maven/settings.xml, …) are not among them.
const ETC: [&str; 43] = [
    "alternatives",
    "ssl/certs",
    "ssl/openssl.cnf",
    "ca-certificates",
    "pki/tls/certs",
    "pki/ca-trust/extracted",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "timezone",
    "mime.types",
    "magic",
    "magic.mime",
    // names of the network
    "services",
    "protocols",
    "networks",
    "rpc",
    "ethertypes",
    "gai.conf",
    "host.conf",
    // what the system is
    "os-release",
    "debian_version",
    "lsb-release",
    "shells",
    "terminfo",
    "inputrc",
    "bash.bashrc",
    "locale.alias",
    // settings that programs in /usr are linked to
    "fonts",
    "groff",
    "manpath.config",
    "man_db.conf",
    "chromium",
    "chromium.d",
    "maven/m2.conf",
    "maven/logging",
    "X11/rgb.txt",
    "perl",
    "gdb",
    "vim",
    "xml",
    "sgml",
];
/// Of the same kind, with a version in their names.
const ETC_FAMILIES: [&str; 3] = ["java-", "python3", "ImageMagick-"];
/// What the kernel tells of processors and memory nodes; /proc says as much of them.
const SYS: [&str; 2] = ["sys/devices/system/cpu", "sys/devices/system/node"];
/// Files of /proc that tell of the host, or that have let programs do harm.
const MASKED: [&CStr; 5] =
    [c"/proc/cmdline", c"/proc/keys", c"/proc/timer_list", c"/proc/kallsyms", c"/proc/sysrq-trigger"];

/// Inside, the job is this user and group.
pub const INSIDE_UID: u32 = 1000;

const PASSWD: &str = "root:x:0:0:root:/nonexistent:/usr/sbin/nologin\njob:x:1000:1000:job:/home/job:/bin/sh\n\
                      nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n";
const GROUP: &str = "root:x:0:\njob:x:1000:\nnogroup:x:65534:\n";
const HOSTS: &str = "127.0.0.1 localhost coinop\n::1 localhost\n";
const NSSWITCH: &str =
    "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\nnetworks: files\n";

fn c(path: impl AsRef<Path>) -> io::Result<CString> {
    CString::new(path.as_ref().as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Replaces this process's root with a read-only one made of the host's base system. The mount namespace must be
/// its own already. `zero`: whether jobs get a /dev/zero.
pub fn build_root(zero: bool) -> Step<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).step("make mounts private")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("root"), STAGE, Some("tmpfs"), flags, Some("mode=755,size=8m,nr_inodes=4k"))
        .step("mount a tmpfs")?;
    let stage = Path::new(STAGE);
    for folder in [
        "usr",
        "etc",
        "dev",
        "dev/shm",
        "dev/pts",
        "proc",
        "tmp",
        "home/job",
        "job",
        "run",
        "var/tmp",
        "void/user/1000",
        "workspace",
    ] {
        fs::create_dir_all(stage.join(folder)).step("make the root's folders")?;
    }
    symlink("/run", stage.join("var/run")).step("make the root's folders")?;
    let read_only = sys::RDONLY | sys::NOSUID | sys::NODEV;
    graft(Path::new("/usr"), &stage.join("usr"), read_only).step("bind /usr")?;
    for name in SYSTEM {
        let (from, to) = (Path::new("/").join(name), stage.join(name));
        match fs::symlink_metadata(&from) {
            Ok(found) if found.is_symlink() => {
                let target = fs::read_link(&from).step("read a link of the base system")?;
                symlink(target, to).step("link the base system")?;
            }
            Ok(found) if found.is_dir() => {
                fs::create_dir(&to).step("make the root's folders")?;
                graft(&from, &to, read_only).step("bind the base system")?;
            }
            _ => {}
        }
    }
    build_etc(&stage.join("etc"))?;
    for name in SYS {
        let (from, to) = (Path::new("/").join(name), stage.join(name));
        if from.is_dir() {
            fs::create_dir_all(&to).step("make the root's folders")?;
            graft(&from, &to, read_only | sys::NOEXEC).step("bind a part of /sys")?;
        }
    }
    for name in DEVICES.into_iter().filter(|name| zero || *name != "zero") {
        let (from, to) = (Path::new("/dev").join(name), stage.join("dev").join(name));
        if name == "tty" && !from.exists() {
            continue;
        }
        touch(&to).step("make /dev")?;
        graft(&from, &to, sys::NOSUID | sys::NOEXEC).step("bind a device")?;
    }
    let links = [
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
        ("ptmx", "pts/ptmx"),
    ];
    for (name, target) in links {
        symlink(target, stage.join("dev").join(name)).step("make /dev")?;
    }
    // The kernel lets a user namespace mount its own proc only where one is visible already.
    graft(Path::new("/proc"), &stage.join("proc"), 0).step("bind /proc")?;

    chdir(STAGE).step("enter the new root")?;
    pivot_root(".", ".").step("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).step("let go of the old root")?;
    chdir("/").step("enter the new root")?;
    let seal = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | flags;
    mount(none, "/", none, seal, none).step("make the root read-only")
}

fn build_etc(etc: &Path) -> Step<()> {
    for (name, text) in [
        ("passwd", PASSWD),
        ("group", GROUP),
        ("hosts", HOSTS),
        ("nsswitch.conf", NSSWITCH),
        ("resolv.conf", ""),
        ("hostname", "coinop\n"),
    ] {
        fs::write(etc.join(name), text).step("write /etc")?;
    }
    let of_a_family = |name: &String| ETC_FAMILIES.iter().any(|family| name.starts_with(family));
    let listed = fs::read_dir("/etc").into_iter().flatten().flatten();
    let families = listed.filter_map(|entry| entry.file_name().into_string().ok()).filter(of_a_family);
    for name in ETC.into_iter().map(str::to_owned).chain(families) {
        let (from, to) = (Path::new("/etc").join(&name), etc.join(&name));
        let Ok(found) = fs::metadata(&from) else { continue };
        // What this host closes to others, a node that runs as root closes to jobs.
        if found.mode() & 0o004 == 0 {
            continue;
        }
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).step("make /etc")?;
        }
        if found.is_dir() {
            fs::create_dir(&to).step("make /etc")?;
            let attributes = sys::RDONLY | sys::NOSUID | sys::NODEV | sys::NOEXEC;
            graft(&from, &to, attributes).step("bind a part of /etc")?;
        } else if found.is_file() && found.len() < 1024 * 1024 {
            // One that this user may not read is none that a job needs.
            if let Ok(bytes) = fs::read(&from) {
                fs::write(&to, bytes).step("write /etc")?;
            }
        }
    }
    Ok(())
}

fn graft(from: &Path, to: &Path, attributes: u64) -> io::Result<()> {
    let tree = sys::open_tree(&c(from)?, true)?;
    if attributes != 0 {
        sys::set_attributes(tree.as_fd(), attributes, None)?;
    }
    sys::move_mount(tree.as_fd(), &c(to)?)
}

fn touch(path: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).create_new(true).open(path).map(drop)
}

/// In a sandbox's own namespaces: its own /proc, of its own processes, and its own terminals.
pub fn furnish() -> Step<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>).step("mount /proc")?;
    for file in MASKED {
        match mount(Some(c"/dev/null"), file, None::<&str>, MsFlags::MS_BIND, None::<&str>) {
            // A kernel without the file has nothing to hide.
            Ok(()) | Err(nix::errno::Errno::ENOENT) => {}
            Err(errno) => return Err(("mask a file of /proc".to_owned(), errno.into())),
        }
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let terminals = format!("newinstance,ptmxmode=0666,mode=0600,max={PTYS}");
    mount(Some("devpts"), "/dev/pts", Some("devpts"), flags, Some(terminals.as_str())).step("mount /dev/pts")
}

/// The sandbox's places, as the node reaches them after the job has moved in.
pub struct Places {
    /// What the job changed (the overlay's upper layer), or all of the workspace.
    pub upper: OwnedFd,
    pub workspace: OwnedFd,
    /// `/job`, writable through this descriptor only.
    pub job: OwnedFd,
    pub proc: OwnedFd,
    /// Whether `upper` holds only what differs from the base.
    pub overlay: bool,
}

impl Places {
    /// Takes away from sight what the job must not find: the mount of the base, which has a path of the host, and the
    /// tmpfs that its places lie on. The node need not wait for it; the job's first command must.
    pub fn tidy(self) -> Step<()> {
        if self.overlay {
            umount2(c"/run/base", MntFlags::MNT_DETACH).step("let go of the base")?;
        }
        // Covered for good, as nobody here may unmount.
        let with_its_runtime_folder = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(c"/void"), ATTIC, None::<&str>, with_its_runtime_folder, None::<&str>)
            .step("hide the tmpfs")
    }
}

/// Mounts the sandbox's one tmpfs and its writable places, all but the workspace. Its size follows in `move_in`.
pub fn settle() -> Step<()> {
    let none = None::<&str>;
    let small = Some("mode=755,size=64k,nr_inodes=32");
    mount(Some("box"), ATTIC, Some("tmpfs"), INERT, small).step("mount the sandbox's tmpfs")?;
    for (folder, mode, to) in [
        (c"/run/tmp", 0o755, Some(c"/tmp")),
        (c"/run/var-tmp", 0o755, Some(c"/var/tmp")),
        (c"/run/home", 0o755, Some(c"/home/job")),
        (c"/run/shm", 0o755, Some(c"/dev/shm")),
        // The user's runtime folder, which programs want closed to others.
        (c"/run/user", 0o700, Some(c"/void/user/1000")),
        (c"/run/job", 0o755, Some(c"/job")),
        (c"/run/upper", 0o755, None),
        (c"/run/work", 0o755, None),
        (c"/run/base", 0o755, None),
    ] {
        nix::unistd::mkdir(folder, Mode::from_bits_truncate(mode)).step("make the sandbox's folders")?;
        if let Some(to) = to {
            mount(Some(folder), to, none, MsFlags::MS_BIND, none).step("bind a writable place")?;
        }
    }
    let seal = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | INERT;
    mount(none, c"/job", none, seal, none).step("make /job read-only")
}

/// Gives the tmpfs its size and mounts the workspace on it; over the base, if there is one.
pub fn move_in(how: &Configure, base: Option<OwnedFd>) -> Step<Places> {
    let none = None::<&str>;
    // Our own folders are not taken from the job's budget.
    let own = OWN_INODES + if base.is_some() { OVERLAY_INODES } else { 0 };
    let (bytes, inodes) = (how.disk_bytes.min(MOST_BYTES), how.inodes.saturating_add(own).min(MOST_INODES));
    let size = format!("size={bytes},nr_inodes={inodes}");
    mount(none, ATTIC, none, MsFlags::MS_REMOUNT | INERT, Some(size.as_str())).step("size the tmpfs")?;
    let upper = folder(c"/run/upper")?;
    let overlay = match base {
        Some(tree) => {
            if how.probe && !sys::takes_user_attributes(upper.as_fd()) {
                return Err(("overlay".to_owned(), io::Error::from_raw_os_error(nix::libc::EOPNOTSUPP)));
            }
            lay_over(tree.as_fd()).step("overlay")?;
            true
        }
        None => {
            mount(Some(c"/run/upper"), c"/workspace", none, MsFlags::MS_BIND, none)
                .step("bind the workspace")?;
            false
        }
    };
    Ok(Places {
        upper,
        workspace: folder(c"/workspace")?,
        job: folder(c"/run/job")?,
        proc: folder(c"/proc")?,
        overlay,
    })
}

/// The workspace, over a base that is mounted for it alone. Given as a descriptor, the base would need no mount; but
/// the kernel takes none that was opened in the nursery's user namespace, and says so after a millisecond.
fn lay_over(base: BorrowedFd<'_>) -> io::Result<()> {
    sys::move_mount(base, c"/run/base")?;
    let layers = c"lowerdir=/run/base,upperdir=/run/upper,workdir=/run/work,userxattr";
    Ok(mount(Some(c"workspace"), c"/workspace", Some(c"overlay"), INERT, Some(layers))?)
}

fn folder(path: &CStr) -> Step<OwnedFd> {
    open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).step("open a folder")
}
