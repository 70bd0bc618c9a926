//! A node inside the test's process, on a backend of the test's choice. Its relays are the test's.

use std::path::Path;
use std::sync::Arc;

use coinop::config::{Config, Override, Raw, Sources};
use coinop::control::{self, Ask};
use coinop::node::{self, Node};
use coinop::sandbox::Backend;
use coinop::store::{JobFilter, JobRow, Store};
use nostr_sdk::prelude::{Event, Keys};
use tempfile::TempDir;

/// A node's folder, key and settings; it may be started again after a drain.
pub struct Stage {
    pub keys: Keys,
    pub config: Config,
    _dir: TempDir,
}

impl Stage {
    /// `settings` are keys of the configuration over the defaults; repositories on the loopback are allowed.
    pub fn new(relays: &[&str], settings: &[(&str, &str)]) -> Stage {
        let dir = tempfile::tempdir().expect("a folder");
        let config = config(&dir.path().join("data"), relays, settings);
        Stage { keys: Keys::generate(), config, _dir: dir }
    }

    /// On the local sandbox, with the real program as its helper.
    pub async fn start(&self) -> Node {
        let helper = Some(env!("CARGO_BIN_EXE_coinop").into());
        Node::start(self.config.clone(), self.keys.clone(), helper).await.expect("a node")
    }

    pub async fn start_on(&self, backend: impl Backend + 'static) -> Node {
        self.try_start_on(backend).await.expect("a node")
    }

    pub async fn try_start_on(&self, backend: impl Backend + 'static) -> Result<Node, node::Error> {
        Node::start_on(self.config.clone(), self.keys.clone(), Arc::new(backend)).await
    }

    /// Asks the node over its control socket.
    pub async fn ask(&self, question: Ask) -> Result<serde_json::Value, control::Error> {
        let dir = self.config.data_dir.clone();
        tokio::task::spawn_blocking(move || control::ask(&dir, &question)).await.expect("no panic")
    }
}

/// A configuration of defaults and these settings.
pub fn config(data_dir: &Path, relays: &[&str], settings: &[(&str, &str)]) -> Config {
    let mut all: Vec<(String, String)> = vec![
        ("data_dir".into(), data_dir.display().to_string()),
        ("relays".into(), relays.join(",")),
        ("admission.allow_private_repos".into(), "true".into()),
        ("drain_timeout_ms".into(), "5000".into()),
    ];
    all.extend(settings.iter().map(|(key, value)| ((*key).to_string(), (*value).to_string())));
    let flag = |(key, value): (String, String)| {
        let flag = format!("--set {key}");
        Override { key, value: Raw::Text(value), flag }
    };
    let flags = all.into_iter().map(flag).collect();
    Config::load(&Sources { flags, ..Sources::default() }).expect("a good configuration").config
}

/// All jobs of a store.
pub fn jobs(store: &Store) -> Vec<JobRow> {
    store.jobs(&JobFilter::default()).expect("readable")
}

pub fn job(store: &Store, request: &Event) -> Option<JobRow> {
    store.job(&request.id.to_hex()).expect("readable")
}
