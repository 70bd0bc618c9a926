//! A small file system on a loop device or in memory, for one test: it can be filled, and the power of its disk can be
//! cut. It needs root; the caller says what it does without.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// A file system of its own that is gone with the test.
pub struct Disk {
    room: tempfile::TempDir,
    mounted: bool,
}

impl Disk {
    pub fn at(&self) -> PathBuf {
        self.room.path().join("mnt")
    }
    fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
        let out = Command::new(program).args(arguments).output().map_err(|e| format!("{program}: {e}"))?;
        let said = String::from_utf8_lossy(&out.stderr).trim().to_owned();
        if out.status.success() { Ok(()) } else { Err(format!("{program}: {said}")) }
    }
    /// Mounts are seen by this thread and what it starts, nobody else: a sandbox that another process of this
    /// host makes meanwhile would keep a copy of the mount, and with it the file system that was shut down
    /// would live on and be found again by the next mount.
    fn in_its_own_namespace() -> Result<Self, String> {
        use nix::sched::{CloneFlags, unshare};
        unshare(CloneFlags::CLONE_NEWNS).map_err(|e| format!("no mount namespace: {e}"))?;
        Self::run("mount", &["--make-rprivate", "/"])?;
        Ok(Self::new())
    }
    fn new() -> Self {
        let disk = Disk { room: tempfile::tempdir().unwrap(), mounted: false };
        fs::create_dir(disk.at()).unwrap();
        disk
    }
    pub fn ext4(bytes: u64) -> Result<Self, String> {
        let mut disk = Self::in_its_own_namespace()?;
        let image = disk.image();
        File::create(&image).unwrap().set_len(bytes).unwrap();
        Self::run("mkfs.ext4", &["-q", "-F", image.to_str().unwrap()])?;
        disk.mount()?;
        Ok(disk)
    }
    pub fn tmpfs(bytes: u64) -> Result<Self, String> {
        let mut disk = Self::in_its_own_namespace()?;
        let at = disk.at();
        Self::run(
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={bytes}"), "coinop-test", at.to_str().unwrap()],
        )?;
        disk.mounted = true;
        Ok(disk)
    }
    fn image(&self) -> PathBuf {
        self.room.path().join("img")
    }
    pub fn mount(&mut self) -> Result<(), String> {
        let (image, at) = (self.image(), self.at());
        Self::run("mount", &["-o", "loop", image.to_str().unwrap(), at.to_str().unwrap()])?;
        self.mounted = true;
        Ok(())
    }
    /// The disk keeps what it had been told to keep, and nothing reaches it any more.
    pub fn cut_power(&self) {
        const EXT4_IOC_SHUTDOWN: u64 = 0x8004_587D;
        const NO_LOG_FLUSH: u32 = 2;
        let root = File::open(self.at()).unwrap();
        // SAFETY: the call reads one u32 through the pointer, which lives until it returns; the descriptor
        // is open.
        let done = unsafe { nix::libc::ioctl(root.as_raw_fd(), EXT4_IOC_SHUTDOWN as _, &NO_LOG_FLUSH) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }
    pub fn unmount(&mut self) {
        let end = Instant::now() + Duration::from_secs(20);
        while let Err(e) = Self::run("umount", &[self.at().to_str().unwrap()]) {
            assert!(Instant::now() < end, "{e}");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.mounted = false;
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.mounted
            && let Err(e) = Self::run("umount", &["-l", self.at().to_str().unwrap()])
        {
            eprintln!("a test's file system stays mounted: {e}");
        }
    }
}
