//! Repositories that are refused, missing, unreachable or made to do harm: the customer reads the typed code and
//! the reason in a signed error. What the repository room itself does stands in `tests/repo*.rs`.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use git2::{ObjectType, Repository, RepositoryInitOptions};

use super::support::backend::Backstage;
use super::support::buyer::Buyer;
use super::support::gate::Way;
use super::support::git::Served;
use super::support::stage::{Stage, job};
use super::support::until;
use coinop::node::Node;
use coinop::protocol::Code;
use coinop::protocol::draft::Draft;
use coinop::relay::local::LocalRelay;
use coinop::repo::serve;

struct Shop {
    _relay: LocalRelay,
    stage: Stage,
    backend: Backstage,
    node: Node,
    buyer: Buyer,
}

async fn shop(settings: &[(&str, &str)]) -> Shop {
    let relay = LocalRelay::start().await.expect("a relay");
    let stage = Stage::new(&[&relay.url()], settings);
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let backend = Backstage::new(&[]);
    let node = stage.start_on(backend.clone()).await;
    Shop { _relay: relay, stage, backend, node, buyer }
}

impl Shop {
    /// The job on this repository ends with this code and these words, and never gets a sandbox.
    async fn refuses(&self, url: &str, git_ref: Option<&str>, code: Code, words: &str) {
        let git_ref = git_ref.map(str::to_string);
        let draft = Draft { git_ref, ..self.buyer.order(Some(url), &["true"]) };
        let request = self.buyer.post(&draft).await;
        let reason = self.buyer.error(&request, code).await;
        assert!(reason.contains(words), "{url}: {reason}");
        assert_eq!(self.backend.made(), 0, "{url}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_outside_the_operators_patterns_is_refused_before_there_is_a_job() {
    let served = Served::start().await;
    let (gate, url) = served.behind_a_gate().await;
    let shop = shop(&[("admission.allow_repos", "git.example.org/acme/*")]).await;
    let request = shop.buyer.post(&shop.buyer.order(Some(&url), &["true"])).await;
    let reason = shop.buyer.error(&request, Code::RepoRefused).await;
    assert!(reason.contains("not among the repositories allowed here"), "{reason}");
    assert!(job(shop.node.store(), &request).is_none());
    assert_eq!(gate.came(), 0, "nobody knocked there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn private_addresses_files_of_this_host_and_other_transports_are_refused_and_not_dialled() {
    let served = Served::start().await;
    let (gate, url) = served.behind_a_gate().await;
    let shop = shop(&[("admission.allow_private_repos", "false")]).await;
    let file = format!("file://{}", served.folder.display());
    for (url, words) in [
        (url.as_str(), "not a public address"),
        ("http://169.254.169.254/latest/meta-data", "not a public address"),
        (file.as_str(), "file:// is not allowed"),
        ("ssh://git@example.org/acme/tool", "not spoken here"),
        ("ext::sh -c true", "blanks"),
        ("https://user:password@example.org/tool.git", "carries credentials"),
    ] {
        shop.refuses(url, None, Code::RepoRefused, words).await;
    }
    assert_eq!(gate.came(), 0, "nobody knocked there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_ref_and_an_empty_repository_are_told_by_name() {
    let served = Served::start().await;
    let shop = shop(&[]).await;
    shop.refuses(&served.url, Some("no-such-branch"), Code::RefNotFound, "no-such-branch").await;
    let absent = "12".repeat(20);
    shop.refuses(&served.url, Some(&absent), Code::RefNotFound, &absent).await;
    shop.refuses(&served.url, Some("a..b"), Code::RepoRefused, "not a name git allows").await;

    let dir = tempfile::tempdir().expect("a folder");
    let folder = dir.path().join("empty");
    let mut options = RepositoryInitOptions::new();
    Repository::init_opts(&folder, options.bare(true).external_template(false)).expect("a repository");
    let server = serve::start(&[folder], SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await.expect("a server");
    shop.refuses(&server.url(), None, Code::RefNotFound, "HEAD").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_that_cannot_begin_is_unreachable_and_one_that_does_not_end_times_out() {
    let served = Served::start().await;
    let (gate, url) = served.behind_a_gate().await;
    let shop = shop(&[("repo.fetch_timeout_ms", "1000")]).await;
    // Bound once and let go: nobody listens there.
    let nobody =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port").local_addr().expect("its address");
    shop.refuses(&format!("http://{nobody}/coins"), None, Code::RepoUnreachable, "cannot be reached").await;
    let missing = format!("{url}-elsewhere");
    shop.refuses(&missing, None, Code::RepoUnreachable, "no such repository").await;
    gate.set(Way::Shut);
    shop.refuses(&url, None, Code::RepoUnreachable, "cannot be reached").await;
    gate.set(Way::Stall);
    shop.refuses(&url, None, Code::Timeout, "1000 ms").await;
    gate.set(Way::Open);
    let request = shop.buyer.post(&shop.buyer.order(Some(&url), &["true"])).await;
    shop.buyer.result(&request).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_ends_in_the_middle_of_a_clone_lets_go_of_its_folders() {
    let served = Served::start().await;
    let (gate, url) = served.behind_a_gate().await;
    gate.set(Way::Stall);
    let Shop { _relay, stage, backend, node, buyer } = shop(&[("drain_timeout_ms", "0")]).await;
    let request = buyer.post(&buyer.order(Some(&url), &["true"])).await;
    until("the clone to begin", async || (gate.came() > 0).then_some(())).await;
    tokio::time::timeout(Duration::from_secs(20), node.drain()).await.expect("soon").expect("in order");
    gate.set(Way::Open);
    let node = stage.start_on(backend).await;
    buyer.result(&request).await;
    assert_eq!(job(node.store(), &request).expect("the job").attempt, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_that_is_too_large_or_made_to_do_harm_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().expect("a folder");
    let (large, evil) = (dir.path().join("large"), dir.path().join("evil"));
    serve::sample_repo(&large, &[("a", "1"), ("b", "2"), ("c", "3")]).expect("a repository");
    serve::sample_repo(&evil, &[("a", "1")]).expect("a repository");
    forge(&evil, b"../../escaped");
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let server = serve::start(&[large, evil.clone()], any).await.expect("a git server");
    let shop = shop(&[("repo.max_files", "2")]).await;
    shop.refuses(&format!("{}large", server.root()), None, Code::ResourceLimit, "too large").await;
    let url = format!("{}evil", server.root());
    shop.refuses(&url, None, Code::RepoRefused, "with a slash").await;
    forge(&evil, b".GIT");
    shop.refuses(&url, None, Code::RepoRefused, "takes for .git").await;
}

/// Points `main` at a tree with one file of this name, written past libgit2's checks.
fn forge(repo: &std::path::Path, name: &[u8]) {
    let repo = Repository::open_bare(repo).expect("a repository");
    let odb = repo.odb().expect("its objects");
    let blob = odb.write(ObjectType::Blob, b"evil").expect("a blob");
    let tree = [b"100644 ", name, b"\0", blob.as_bytes()].concat();
    let tree = odb.write(ObjectType::Tree, &tree).expect("a tree");
    let text = format!("tree {tree}\nauthor a <a@b> 0 +0000\ncommitter a <a@b> 0 +0000\n\nm\n");
    let commit = odb.write(ObjectType::Commit, text.as_bytes()).expect("a commit");
    repo.reference("refs/heads/main", commit, true, "").expect("a branch");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn likely_secrets_in_the_tree_are_warned_of_in_the_result_and_not_shown() {
    let dir = tempfile::tempdir().expect("a folder");
    let folder = dir.path().join("careless");
    let key = "-----BEGIN OPENSSH PRIVATE KEY-----\nnot-a-real-one\n";
    serve::sample_repo(&folder, &[(".env", "TOKEN=hush"), ("deploy/key.txt", key)]).expect("a repository");
    let server = serve::start(&[folder], SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await.expect("a server");
    let shop = shop(&[]).await;
    let request = shop.buyer.post(&shop.buyer.order(Some(&server.url()), &["true"])).await;
    let content = shop.buyer.result(&request).await.reply.content;
    let report: serde_json::Value = serde_json::from_str(&content).expect("a report");
    let warnings: Vec<_> =
        report["warnings"].as_array().expect("warnings").iter().filter_map(|w| w.as_str()).collect();
    for path in [".env: ", "deploy/key.txt: "] {
        assert!(warnings.iter().any(|warning| warning.starts_with(path)), "{warnings:?}");
    }
    assert!(!content.contains("hush") && !content.contains("not-a-real-one"));
}
