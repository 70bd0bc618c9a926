//! The node's self-test of its sandbox, and that it can fail: a backend that gives a job more than its policy says is
//! told by the clause.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use coinop::market::job_type::Limits;
use coinop::node::Node;
use coinop::relay::local::LocalRelay;
use coinop::sandbox::local::{Local, Options};
use coinop::sandbox::{Backend, Check, Error, Identity, Policy, Sandbox, Spec, selftest};
use nostr_sdk::prelude::{Filter, Kind};
use sha2::{Digest, Sha256};
use support::buyer::Buyer;
use support::stage::Stage;

#[expect(dead_code, reason = "each test program uses a part of it")]
#[path = "support/mod.rs"]
mod support;

/// The local backend with one clause kept badly.
struct Lax {
    local: Local,
    spoil: fn(&mut Policy),
}

#[async_trait]
impl Backend for Lax {
    fn identity(&self) -> Identity {
        self.local.identity()
    }

    fn checks(&self) -> Vec<Check> {
        self.local.checks()
    }

    fn admit(&self, policy: &Policy) -> Result<(), Error> {
        self.local.admit(policy)
    }

    async fn create(&self, mut spec: Spec) -> Result<Box<dyn Sandbox>, Error> {
        (self.spoil)(&mut spec.policy);
        self.local.create(spec).await
    }

    async fn reap(&self) -> Result<usize, Error> {
        self.local.reap().await
    }
}

fn local(test: &str, dir: &Path) -> Option<Local> {
    let options =
        Options { helper: Some(env!("CARGO_BIN_EXE_coinop").into()), ..Options::new(dir.join("state")) };
    let local = Local::new(options).unwrap();
    let broken = local.checks().into_iter().find(|check| check.name == "user_namespaces" && !check.ok);
    match broken {
        None => Some(local),
        Some(check) => {
            support::skip::skip(test, &check.how);
            None
        }
    }
}

#[tokio::test]
async fn a_sandbox_that_holds_passes_with_the_same_report_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let test = "a_sandbox_that_holds_passes_with_the_same_report_each_time";
    let Some(local) = local(test, dir.path()) else { return };
    let first = selftest::run(&local, dir.path()).await.unwrap();
    assert!(first.holds(), "{first:#?}");
    let clauses = serde_json::to_value(Limits::default().policy()).unwrap();
    for clause in clauses.as_object().unwrap().keys().filter(|clause| *clause != "network") {
        assert!(first.checks.iter().any(|check| check.name == *clause), "{clause} was not tried");
    }
    let second = selftest::run(&local, dir.path()).await.unwrap();
    assert_eq!((first.hash(), first.hash().len()), (second.hash(), 64));
    let left = std::fs::read_dir(dir.path()).unwrap().flatten().map(|entry| entry.file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["state"], "its own folders are gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sandbox_that_does_not_hold_is_told_by_the_clause() {
    let dir = tempfile::tempdir().unwrap();
    let test = "a_sandbox_that_does_not_hold_is_told_by_the_clause";
    let Some(mut local) = local(test, dir.path()) else { return };
    // Not cpu_milli: on a busy host a job has no more than its share, whatever is allowed.
    type Spoil = fn(&mut Policy);
    let spoils: [(&str, Spoil); 9] = [
        ("idle_ms", |policy| policy.idle_ms *= 20),
        ("output_bytes_per_s", |policy| policy.output_bytes_per_s *= 3),
        ("pids", |policy| policy.pids *= 3),
        ("open_files", |policy| policy.open_files *= 3),
        ("disk_bytes", |policy| policy.disk_bytes *= 3),
        ("inodes", |policy| policy.inodes += 1),
        ("output_bytes", |policy| policy.output_bytes *= 3),
        ("memory_bytes", |policy| policy.memory_bytes *= 4),
        ("wall_ms", |policy| policy.wall_ms += if policy.wall_ms < 30_000 { 4_000 } else { 0 }),
    ];
    for (clause, spoil) in spoils {
        let lax = Lax { local, spoil };
        let report = selftest::run(&lax, dir.path()).await.unwrap();
        let failed: Vec<&Check> = report.checks.iter().filter(|check| !check.ok).collect();
        assert!(
            failed.iter().any(|check| check.name == clause && check.mend.is_some()),
            "{clause}: {report:#?}"
        );
        assert!(!report.holds());
        local = lax.local;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_sandbox_fails_does_not_start_and_announces_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let test = "a_node_whose_sandbox_fails_does_not_start_and_announces_nothing";
    let Some(local) = local(test, dir.path()) else { return };
    let relay = LocalRelay::start().await.unwrap();
    let stage = Stage::new(&[&relay.url()], &[]);
    let lax = Lax { local, spoil: |policy| policy.pids *= 3 };
    let started = Node::start_tested(stage.config.clone(), stage.keys.clone(), Arc::new(lax)).await;
    let why = started.err().unwrap().to_string();
    assert!(why.starts_with("the sandbox failed its self-test: pids: "), "{why}");
    assert!(why.ends_with("`coinop doctor --sandbox` says how to fix it"), "{why}");
    let kept = std::fs::read_to_string(stage.config.data_dir.join("selftest.json")).unwrap();
    assert!(kept.contains("instead of at most 16"), "the report tells it, too: {kept}");
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let announced = buyer.query(Filter::new().author(stage.keys.public_key())).await;
    assert!(announced.is_empty(), "{announced:?}");
    // One that holds starts, and its announcement names the report that is kept.
    let local = Local::new(Options {
        helper: Some(env!("CARGO_BIN_EXE_coinop").into()),
        ..Options::new(dir.path().join("other"))
    });
    let node = Node::start_tested(stage.config.clone(), stage.keys.clone(), Arc::new(local.unwrap()));
    let node = node.await.unwrap();
    let author = Filter::new().kind(Kind::Custom(31990)).author(stage.keys.public_key());
    let announced =
        support::until("the announcement", async || buyer.query(author.clone()).await.pop()).await;
    let kept = std::fs::read(stage.config.data_dir.join("selftest.json")).unwrap();
    let hash = hex::encode(Sha256::digest(kept));
    let tags: Vec<Vec<String>> = announced.tags.iter().map(|tag| tag.clone().to_vec()).collect();
    assert!(tags.contains(&vec!["sandbox".to_owned(), "local".to_owned(), hash]), "{tags:?}");
    node.drain().await.unwrap();
}
