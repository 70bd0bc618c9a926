//! What a test says when a part that it needs is not there: on a desk it skips, loudly and by name; where
//! `REQUIRE_PARTS` is set, as `.ci/run` does, it fails. Whether the part is there is the test's to find out.

use std::io::Write;

/// Says that this test does not run, past the test runner's capture, so that nobody takes it for one that ran.
///
/// # Panics
/// Where parts are required.
pub fn skip(test: &str, why: &str) {
    let told = format!("SKIPPED {test}: {why}\n");
    assert!(std::env::var_os("REQUIRE_PARTS").is_none(), "{told}");
    std::io::stderr().write_all(told.as_bytes()).expect("stderr can be written");
}

/// Whether git can be run; where not, this test is skipped.
pub fn has_git(test: &str) -> bool {
    let version = std::process::Command::new("git").arg("--version").output();
    let found = version.is_ok_and(|output| output.status.success());
    if !found {
        skip(test, "git is not installed");
    }
    found
}
