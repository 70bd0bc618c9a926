//! Where other people's programs are found, and what a test does without one: on a desk it skips, loudly and
//! by name; where parts are required it fails. `.ci/parts` installs them; starting them is `relays`' and `clients`' work.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::skip::skip;

/// One installed program or folder of packages.
#[derive(Debug, Clone, Copy)]
pub enum Part {
    /// The relay in Rust.
    NostrRsRelay,
    /// The relay in Python.
    NostrRelay,
    /// The wallet server.
    Lnbits,
    /// The packages of NDK, nostr-tools and Alby's SDK, and the programs written with them.
    Clients,
    /// What runs them.
    Node,
}

impl Part {
    /// Its path, or why it is not there.
    fn find(self) -> Result<PathBuf, String> {
        match self {
            Part::NostrRsRelay => file(folder()?.join("nostr-rs-relay/bin/nostr-rs-relay")),
            Part::NostrRelay => file(folder()?.join("nostr-relay/bin/nostr-relay")),
            Part::Lnbits => file(folder()?.join("lnbits/bin/lnbits")),
            // Written by `.ci/parts` once the packages were installed and loaded.
            Part::Clients => {
                file(here().join("node_modules/.installed-from")).map(|_| here().join("clients"))
            }
            Part::Node => on_path("node"),
        }
    }
}

/// The paths of all these parts, in order. `None`: one is missing, the test has said so and ends here.
///
/// # Panics
/// Where parts are required.
pub fn locate<const N: usize>(test: &str, parts: [Part; N]) -> Option<[PathBuf; N]> {
    let found = parts.map(|part| part.find().map_err(|why| format!("{part:?}: {why}")));
    if let Some(why) = found.iter().find_map(|part| part.as_ref().err()) {
        skip(test, &format!("{why}; `.ci/parts` installs it (docs/testing.md)"));
        return None;
    }
    Some(found.map(|part| part.expect("looked at above")))
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e")
}

/// As `.ci/parts` has it: E2E_PARTS, or `coinop-parts` in the user's cache folder.
fn folder() -> Result<PathBuf, String> {
    let set = |name| std::env::var_os(name).filter(|value: &OsString| !value.is_empty()).map(PathBuf::from);
    set("E2E_PARTS")
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("coinop-parts")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/coinop-parts")))
        .ok_or_else(|| "neither E2E_PARTS nor HOME is set".into())
}

fn file(path: PathBuf) -> Result<PathBuf, String> {
    if path.is_file() { Ok(path) } else { Err(format!("{} is not there", path.display())) }
}

fn on_path(name: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| format!("{name} is not on the PATH"))
}
