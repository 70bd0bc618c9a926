//! The local sandbox against a hostile job: every clause of the policy, every wall, every trace it could leave.
//! Run as root, the whole suite runs a second time as an ordinary user.

mod common;
mod files;
mod life;
mod limits;
mod walls;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;

/// `nobody`, whom no host gives anything.
const ORDINARY: u32 = 65_534;

#[test]
fn the_whole_suite_holds_as_an_ordinary_user() {
    if !common::is_root() {
        return;
    }
    let home = tempfile::Builder::new().prefix("coinop-ordinary").tempdir_in("/var/tmp").unwrap();
    let open = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    open(home.path());
    let (suite, helper, tmp) =
        (home.path().join("suite"), home.path().join("coinop"), home.path().join("tmp"));
    std::fs::copy(std::env::current_exe().unwrap(), &suite).unwrap();
    std::fs::copy(common::helper(), &helper).unwrap();
    open(&suite);
    open(&helper);
    std::fs::create_dir(&tmp).unwrap();
    std::os::unix::fs::chown(&tmp, Some(ORDINARY), Some(ORDINARY)).unwrap();
    let output = std::process::Command::new(&suite)
        .args(["--test-threads", "2"])
        .env("COINOP_TEST_HELPER", &helper)
        .env("TMPDIR", &tmp)
        .current_dir("/")
        .uid(ORDINARY)
        .gid(ORDINARY)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "as uid {ORDINARY}:\n{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(said.contains("test result: ok"), "{said}");
}
