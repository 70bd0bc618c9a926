//! Which uids are this node's: a block of the range, claimed on the whole machine by a lock that ends with its holders. Two
//! root nodes on one host must not share what the kernel counts by user. One sandbox's uid is `life`'s.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc;

use super::super::Check;

/// The first uid of all blocks; far from people, services and subuids. Those of containers follow.
pub const FIRST_UID: u32 = 1_879_100_000;
/// As many sandboxes of one node as may live at once.
pub const SLOTS: u32 = 1024;
/// As many nodes as may run as root on one host.
pub const BLOCKS: u32 = 97;
/// Where the claims of a host lie: a folder of root's that is gone at the next boot.
pub const FOLDER: &str = "/run/coinop/uids";

/// A block, and the lock that keeps others from it; none where it could not be claimed.
#[derive(Debug)]
pub struct Claim {
    pub block: u32,
    pub lock: Result<Flock<File>, io::Error>,
}

impl Claim {
    /// Claims the first free block from `start` on.
    pub fn new(folder: &Path, start: u32) -> Claim {
        match claim(folder, start) {
            Ok((block, lock)) => Claim { block, lock: Ok(lock) },
            Err(why) => Claim { block: start % BLOCKS, lock: Err(why) },
        }
    }
}

impl Claim {
    /// What the doctor shows.
    pub fn check(&self) -> Check {
        let first = FIRST_UID + self.block * SLOTS;
        let how = match &self.lock {
            Ok(_) => format!("one for each sandbox, {SLOTS} from {first} on, claimed on this host"),
            Err(why) => {
                format!(
                    "one for each sandbox, {SLOTS} from {first} on; another root node may have the same: {why}"
                )
            }
        };
        let mend = self.lock.is_err().then(|| format!("let the node write in {FOLDER}"));
        Check { name: "uids".to_owned(), ok: true, how, mend }
    }
}

fn claim(folder: &Path, start: u32) -> io::Result<(u32, Flock<File>)> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let found = fs::symlink_metadata(folder)?;
    if !found.is_dir() || found.uid() != nix::unistd::geteuid().as_raw() || found.mode() & 0o022 != 0 {
        return Err(io::Error::other(format!("{} is not this user's alone", folder.display())));
    }
    for step in 0..BLOCKS {
        let block = (start % BLOCKS + step) % BLOCKS;
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(folder.join(block.to_string()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok((block, lock)),
            Err((_, Errno::EWOULDBLOCK)) => {}
            Err((_, errno)) => return Err(errno.into()),
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("all {BLOCKS} blocks of uids are claimed")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_nodes_of_a_host_never_have_the_same_block_and_a_block_is_free_when_its_node_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("uids");
        let first = Claim::new(&folder, 96);
        let second = Claim::new(&folder, 96);
        assert!(first.lock.is_ok() && second.lock.is_ok());
        assert_eq!((first.block, second.block), (96, 0));
        drop(first);
        assert_eq!(Claim::new(&folder, 96).block, 96);
    }

    #[test]
    fn when_all_blocks_are_claimed_the_next_node_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let all: Vec<Claim> = (0..BLOCKS).map(|n| Claim::new(dir.path(), n)).collect();
        let blocks: std::collections::BTreeSet<u32> = all.iter().map(|claim| claim.block).collect();
        assert_eq!(blocks.len(), BLOCKS as usize);
        let late = Claim::new(dir.path(), 5);
        assert!(late.lock.is_err_and(|why| why.to_string().contains("all 97")));
    }

    #[test]
    fn a_folder_that_others_may_write_in_is_no_place_for_claims() {
        let dir = tempfile::tempdir().unwrap();
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Claim::new(dir.path(), 0).lock.is_err());
    }
}
