//! Patches of real jobs on the local sandbox: what is in them, what is left out and told.

use std::net::{Ipv4Addr, SocketAddr};

use super::support::buyer::Buyer;
use super::support::stage::Stage;
use coinop::protocol::draft::Draft;
use coinop::relay::local::LocalRelay;
use coinop::repo::serve;

/// An ordinary build-then-fix. Its outputs would be ten times what a patch may hold here.
const BUILD_AND_FIX: &str = "mkdir -p build/deep src/__pycache__ .venv/lib out && \
    head -c 500000 /dev/zero > build/big && echo x > build/deep/y && echo x > src/__pycache__/a.pyc && \
    echo '*' > .venv/.gitignore && head -c 500000 /dev/zero > .venv/lib/z && \
    echo '*.tmp' > out/.gitignore && echo o > out/a.tmp && \
    echo new > new.log && echo more >> kept.log && echo fixed >> src/main.c && ln -s /etc/passwd leak";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ordinary_build_then_fix_delivers_the_fix_and_counts_what_is_ignored() {
    let dir = tempfile::tempdir().expect("a folder");
    let folder = dir.path().join("project");
    let files = [
        (".gitignore", "build/\n__pycache__/\n*.log\n"),
        ("src/main.c", "int main;\n"),
        // Tracked although a rule names it.
        ("kept.log", "kept\n"),
    ];
    serve::sample_repo(&folder, &files).expect("a repository");
    let server = serve::start(&[folder], SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await.expect("a server");
    let relay = LocalRelay::start().await.expect("a relay");
    let stage = Stage::new(&[&relay.url()], &[("limits.changes_bytes", "100000")]);
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let node = stage.start().await;
    let draft = Draft { kind: 5932, ..buyer.order(Some(&server.url()), &[BUILD_AND_FIX]) };
    let request = buyer.post(&draft).await;
    let reply = buyer.result(&request).await.reply;
    let changed: Vec<&str> = reply
        .content
        .lines()
        .filter_map(|line| line.strip_prefix("diff --git a/")?.split(' ').next())
        .collect();
    assert_eq!(changed, ["kept.log", "leak", "out/.gitignore", "src/main.c"], "{}", reply.content);
    // build/big, build/deep/y, a.pyc, .venv/.gitignore, .venv/lib/z, out/a.tmp, new.log
    assert_eq!(reply.fact("ignored_files"), Some("7"), "{:?}", reply.facts);
    assert_eq!(reply.fact("warning"), Some("leak: a symlink to the absolute path /etc/passwd"));
    // Without rules the same is too much.
    let draft = Draft {
        kind: 5932,
        ..buyer.order(Some(&server.url()), &[&format!("{BUILD_AND_FIX} && echo > .gitignore")])
    };
    let request = buyer.post(&draft).await;
    let reason = buyer.error(&request, coinop::protocol::Code::ResourceLimit).await;
    assert!(reason.contains("what the job changed"), "{reason}");
    node.drain().await.expect("in order");
}
