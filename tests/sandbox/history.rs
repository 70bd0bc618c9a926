//! What a commit's job sees follows from the commit alone, whatever ran here before.

use std::path::Path;
use std::process::Command;

use coinop::repo::{Options, Repos, serve};
use coinop::sandbox::{Backend, Spec};

use crate::common::{Bench, bench, policy, sh};
use crate::skip::skip;

/// Prints all that a job can see of its tree, but for what differs with every copy (inode, time of the last change of
/// an inode) and the top, which is the sandbox's own. Then it leaves as much as it can.
const JOB: &str = "find . -mindepth 1 -printf '%P %y %m %n %s %T@ %A@ %u %g %l\\n' && \
                   find . -type f -exec md5sum {} + && ls -U . d && \
                   { for f in $(find . -type f -o -type d); do echo left >> $f; chmod 700 $f; touch $f; ln $f more$$; done; \
                     ln -s a left; rm -rf d; mkdir d; touch d/left; } >/dev/null 2>&1; true";

/// Files that come, go, change, change their mode or their kind, and come back.
fn history(repo: &Path) -> Vec<String> {
    let commits: [&[(&str, &str)]; 4] = [
        &[("a", "1"), ("d/same", "same"), ("d/x", "x"), ("mode", "m"), ("kind/in", "k"), ("key", KEY)],
        &[("a", "2"), ("d/same", "same"), ("mode*", "m"), ("kind", "k"), ("key", KEY), ("key2", KEY)],
        &[("d/same", "same"), ("d/e/deep", "x"), ("mode", "m"), ("kind/in", "k"), ("b", "1")],
        &[("a", "1"), ("d/same*", "same"), ("d/x", "x"), ("mode*", "m"), ("z", "1"), ("key2", KEY)],
    ];
    commits.iter().map(|files| serve::sample_repo(repo, files).unwrap()).collect()
}

const KEY: &str = "aws = AKIAABCDEFGHIJKLMNOP";

fn orders(of: usize) -> Vec<Vec<usize>> {
    if of == 0 {
        return vec![Vec::new()];
    }
    let longer = |order: Vec<usize>| (0..of).map(move |at| [&order[..at], &[of - 1], &order[at..]].concat());
    orders(of - 1).into_iter().flat_map(longer).collect()
}

async fn seen(bench: &Bench, repos: &Repos, url: &str, commit: &str) -> String {
    let pin = repos.pin(url, Some(commit)).await.unwrap();
    let base = repos.base(&pin).await.unwrap();
    let warnings = format!("{:?}", base.warnings());
    let spec = Spec { id: "t".to_owned(), base: Some(base), policy: policy() };
    let sandbox = bench.local.create(spec).await.unwrap();
    let out = sh(&*sandbox, JOB).await.ok();
    sandbox.destroy().await.unwrap();
    out + &warnings
}

#[tokio::test(flavor = "multi_thread")]
async fn each_commit_of_a_history_looks_the_same_in_every_order_and_alone_on_a_fresh_node() {
    let Some(bench) = bench!() else { return };
    // busybox and others print less.
    if !Command::new("find")
        .args(["/", "-maxdepth", "0", "-printf", "%A@"])
        .output()
        .is_ok_and(|o| o.status.success())
    {
        return skip(
            "each_commit_of_a_history_looks_the_same_in_every_order_and_alone_on_a_fresh_node",
            "no GNU find",
        );
    }
    let repo = bench.dir.path().join("history.git");
    let commits = history(&repo);
    let url = format!("file://{}", repo.display());
    let fresh = |name: String| {
        let options = Options { allow_file: true, ..Options::default() };
        Repos::open(&bench.dir.path().join(name), options).unwrap()
    };
    let mut alone = Vec::new();
    for commit in &commits {
        alone.push(seen(&bench, &fresh(format!("alone-{commit}")), &url, commit).await);
    }
    assert!(alone[0].contains("d/same f 644 1 4 946684800"), "{}", alone[0]);
    for order in orders(commits.len()) {
        let repos = fresh(format!("{order:?}"));
        // The first one again at the end: its base has been used.
        for n in order.iter().chain(&order[..1]) {
            assert_eq!(seen(&bench, &repos, &url, &commits[*n]).await, alone[*n], "commit {n} in {order:?}");
        }
    }
}
