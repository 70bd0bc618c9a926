//! Our git client against git's own server, in both versions of the protocol. Skipped where git is missing.

#[path = "support/skip.rs"]
mod skip;

use std::path::{Path, PathBuf};
use std::process::Command;

use coinop::bench::checkout;
use coinop::repo::{Error, Options, Repos};
use coinop::sandbox::Tree;
use skip::has_git;

fn git(dir: &Path, args: &[&str]) -> String {
    let mut command = Command::new("git");
    command
        .arg("-C")
        .arg(dir)
        .args(args)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1");
    for who in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{who}_NAME"), "a").env(format!("GIT_{who}_EMAIL"), "a@b");
    }
    let out = command.output().unwrap();
    assert!(out.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().trim().to_string()
}

struct House {
    dir: tempfile::TempDir,
    work: PathBuf,
}

impl House {
    fn new() -> House {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("tree");
        std::fs::create_dir(&work).unwrap();
        git(&work, &["init", "-q", "-b", "main", "."]);
        House { dir, work }
    }

    /// Commits thirty files, three of them new in this round.
    fn commit(&self, round: usize) -> String {
        for n in 0..30 {
            let text = if n % 10 == round % 10 { format!("{round}") } else { "same\n".repeat(50) };
            let path = self.work.join(format!("d{}/f{n}", n % 3));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{n} {text}\n")).unwrap();
        }
        git(&self.work, &["add", "-A"]);
        git(&self.work, &["commit", "-q", "-m", "m"]);
        git(&self.work, &["rev-parse", "HEAD"])
    }
}

fn same_tree(work: &Path, commit: &str, base: &dyn Tree) {
    for name in git(work, &["ls-tree", "-r", "--name-only", commit]).lines() {
        let want = git(work, &["show", &format!("{commit}:{name}")]);
        assert_eq!(std::fs::read_to_string(base.path().join(name)).unwrap().trim(), want, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_has_a_git_of_its_commit_alone() {
    if !has_git("a_base_has_a_git_of_its_commit_alone") {
        return;
    }
    let house = House::new();
    let options = Options { allow_file: true, ..Options::default() };
    let repos = Repos::open(&house.dir.path().join("cache"), options).unwrap();
    let url = format!("file://{}", house.work.display());
    let mut before: Option<String> = None;
    for round in 0..2 {
        let commit = house.commit(round);
        let pin = repos.pin(&url, Some(&commit)).await.unwrap();
        let base = repos.base(&pin).await.unwrap();
        // Away from the cache, whose bases git may not write in.
        let copy = house.dir.path().join(format!("copy{round}"));
        assert!(Command::new("cp").arg("-r").arg(base.path()).arg(&copy).status().unwrap().success());
        assert_eq!(git(&copy, &["rev-parse", "HEAD"]), commit);
        assert_eq!(git(&copy, &["status", "--porcelain"]), "");
        assert_eq!(git(&copy, &["rev-list", "HEAD"]), commit, "history ends there");
        assert_eq!(git(&copy, &["describe", "--always", "--dirty"]), commit[..7]);
        assert!(!git(&copy, &["fsck", "--full"]).contains("missing"));
        assert!(!copy.join(".git/hooks").exists());
        if let Some(before) = &before {
            // The mirror has it, and what another customer asked for is nobody else's.
            let there = git(&copy, &["cat-file", "--batch-all-objects", "--batch-check"]);
            assert!(there.contains(&commit) && !there.contains(before.as_str()), "{there}");
        }
        before = Some(commit);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_come_one_by_one_out_of_gits_own_server_in_both_protocols() {
    if !has_git("commits_come_one_by_one_out_of_gits_own_server_in_both_protocols") {
        return;
    }
    for v2 in [true, false] {
        let house = House::new();
        let commits: Vec<String> = (0..4).map(|n| house.commit(n)).collect();
        git(&house.work, &["tag", "-a", "-m", "t", "heavy", &commits[1]]);
        git(&house.work, &["tag", "light", &commits[2]]);
        // Tags of tags, as many as are followed.
        git(&house.work, &["tag", "-a", "-m", "t", "nested1", &commits[0]]);
        for n in 2..=8 {
            git(&house.work, &["tag", "-a", "-m", "t", &format!("nested{n}"), &format!("nested{}", n - 1)]);
        }
        let addr = checkout::serve(house.dir.path().to_path_buf(), v2).await.unwrap();
        let url = format!("http://{addr}/tree/.git");
        let options = Options { allow_private: true, ..Options::default() };
        let repos = Repos::open(&house.dir.path().join("cache"), options).unwrap();
        let names = [
            ("", &commits[3]),
            ("heavy", &commits[1]),
            ("light", &commits[2]),
            ("nested8", &commits[0]),
            ("main", &commits[3]),
            (commits[0].as_str(), &commits[0]),
            (&commits[0][..9], &commits[0]),
            (&commits[2][..9], &commits[2]),
        ];
        for (name, want) in names {
            let pin = repos.pin(&url, Some(name)).await.unwrap_or_else(|e| panic!("v2 {v2}, {name:?}: {e}"));
            assert_eq!(&pin.commit, want, "{name:?}");
            same_tree(&house.work, want, &*repos.base(&pin).await.unwrap());
        }
        // A new commit leans on what is here: the pack is thin.
        for round in 4..8 {
            let commit = house.commit(round);
            let pin = repos.pin(&url, None).await.unwrap();
            assert_eq!(pin.commit, commit);
            same_tree(&house.work, &commit, &*repos.base(&pin).await.unwrap());
        }
        for name in ["nowhere", &"1".repeat(40), "1111111"] {
            let error = repos.pin(&url, Some(name)).await.unwrap_err();
            assert!(matches!(error, Error::RefNotFound { .. }), "v2 {v2}, {name}: {error}");
        }
        // A commit that nothing leads to any more.
        git(&house.work, &["checkout", "-q", "--orphan", "lost"]);
        let lost = house.commit(9);
        git(&house.work, &["checkout", "-q", "main"]);
        git(&house.work, &["branch", "-D", "lost"]);
        let found = repos.pin(&url, Some(&lost)).await;
        assert!(found.is_ok() || matches!(found, Err(Error::RefNotFound { .. })), "{found:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_commit_comes_without_the_history_after_it_in_both_protocols() {
    if !has_git("an_old_commit_comes_without_the_history_after_it_in_both_protocols") {
        return;
    }
    let house = House::new();
    let mut commits = Vec::new();
    for n in 0..6u32 {
        // 256 KiB that hardly compress, others in each commit.
        let bytes: Vec<u8> = (0..65_536u32)
            .flat_map(|i| ((i * 6 + n) ^ 0x5bd1).wrapping_mul(0x9e37_79b9).to_be_bytes())
            .collect();
        std::fs::write(house.work.join("large"), bytes).unwrap();
        git(&house.work, &["add", "-A"]);
        git(&house.work, &["commit", "-q", "-m", "m"]);
        commits.push(git(&house.work, &["rev-parse", "HEAD"]));
    }
    git(&house.work, &["tag", "-a", "-m", "t", "heavy", &commits[2]]);
    for (v2, n) in [(true, 0), (false, 0), (false, 2)] {
        let addr = checkout::serve(house.dir.path().to_path_buf(), v2).await.unwrap();
        let cache = tempfile::tempdir().unwrap();
        let options = Options { allow_private: true, ..Options::default() };
        let repos = Repos::open(cache.path(), options).unwrap();
        repos.pin(&format!("http://{addr}/tree/.git"), Some(&commits[n])).await.unwrap();
        assert!(repos.cached_bytes() < 400 << 10, "v2 {v2}, commit {n}: {}", repos.cached_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_repository_has_no_head_and_a_missing_one_is_said_to_be_missing() {
    if !has_git("an_empty_repository_has_no_head_and_a_missing_one_is_said_to_be_missing") {
        return;
    }
    let house = House::new();
    let addr = checkout::serve(house.dir.path().to_path_buf(), true).await.unwrap();
    let options = Options { allow_private: true, ..Options::default() };
    let repos = Repos::open(&house.dir.path().join("cache"), options).unwrap();
    let error = repos.pin(&format!("http://{addr}/tree/.git"), None).await.unwrap_err();
    assert!(matches!(&error, Error::RefNotFound { git_ref } if git_ref == "HEAD"), "{error}");
    let error = repos.pin(&format!("http://{addr}/nothing.git"), None).await.unwrap_err();
    assert!(matches!(error, Error::NoSuchRepository), "{error}");
}
