//! A data folder of its own for a test of the store: key locks apart, a clock that stands still until moved.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use coinop::store::record::Record;
use coinop::store::{Error, Holder, Options, Store};
use tempfile::TempDir;

pub fn id(n: u64) -> String {
    format!("{n:064x}")
}

/// Options whose key locks are the test's own and whose clock stands still until moved.
fn options(dir: &TempDir, clock: &Arc<AtomicU64>) -> Options {
    let clock = clock.clone();
    let locks = dir.path().join("locks");
    fs::create_dir_all(&locks).unwrap();
    Options {
        key_locks: Some(locks),
        clock: Arc::new(move || clock.load(Ordering::SeqCst)),
        ..Options::default()
    }
}

pub struct House {
    pub dir: TempDir,
    pub clock: Arc<AtomicU64>,
}

impl House {
    pub fn new() -> Self {
        House { dir: tempfile::tempdir().unwrap(), clock: Arc::new(AtomicU64::new(1_000)) }
    }
    pub fn options(&self) -> Options {
        options(&self.dir, &self.clock)
    }
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }
    pub fn open(&self) -> Store {
        self.try_open(self.options()).unwrap()
    }
    pub fn try_open(&self, options: Options) -> Result<Store, Error> {
        Store::open_with(&self.data(), &Holder::new(id(9)), options)
    }
    /// With segments so small that every few batches begin a new one.
    pub fn small_segments(&self) -> Options {
        Options { segment_bytes: 4096, ..self.options() }
    }
}

pub fn accepted(n: u64) -> Record {
    Record::Accepted {
        job: id(n),
        customer: id(1000),
        kind: 5930,
        skill: "generic".into(),
        request: format!("{{\"request\":{n}}}"),
        relay: "ws://a".into(),
        deadline_ms: 99_000,
        agreed: Default::default(),
    }
}
