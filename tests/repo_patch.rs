//! What a job changed comes out as a diff that real git takes and that our own check takes: for hand-made
//! changes and for random ones.

#[path = "support/skip.rs"]
mod skip;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use coinop::repo::{Error, Options, Patch, Pin, Repos, serve};
use coinop::sandbox::{Change, Content};
use proptest::prelude::*;
use skip::has_git;

/// A tree in memory: path → contents and kind.
type Files = BTreeMap<Vec<u8>, Content>;

fn file(text: impl AsRef<[u8]>) -> Content {
    Content::File { bytes: text.as_ref().to_vec(), executable: false }
}

struct House {
    dir: tempfile::TempDir,
    repos: Repos,
    runtime: tokio::runtime::Runtime,
}

impl House {
    fn new() -> House {
        let dir = tempfile::tempdir().unwrap();
        let options = Options { allow_file: true, ..Options::default() };
        let repos = Repos::open(&dir.path().join("cache"), options).unwrap();
        House { dir, repos, runtime: tokio::runtime::Runtime::new().unwrap() }
    }

    /// Makes a repository that holds `files`, by git2 object writes, and pins its commit.
    fn pin(&self, name: &str, files: &Files) -> Pin {
        let path = self.dir.path().join(name);
        serve::sample_repo(&path, &[]).unwrap();
        let repo = git2::Repository::open_bare(&path).unwrap();
        let mut index = git2::Index::new().unwrap();
        for (path, content) in files {
            let (mode, bytes): (u32, &[u8]) = match content {
                Content::File { bytes, executable: true } => (0o100_755, bytes),
                Content::File { bytes, executable: false } => (0o100_644, bytes),
                Content::Symlink { target } => (0o120_000, target),
                Content::Deleted => continue,
            };
            let id = repo.blob(bytes).unwrap();
            let never = git2::IndexTime::new(0, 0);
            let entry = git2::IndexEntry {
                ctime: never,
                mtime: never,
                dev: 0,
                ino: 0,
                mode,
                uid: 0,
                gid: 0,
                file_size: 0,
                id,
                flags: 0,
                flags_extended: 0,
                path: path.clone(),
            };
            index.add(&entry).unwrap();
        }
        let tree = repo.find_tree(index.write_tree_to(&repo).unwrap()).unwrap();
        let who = git2::Signature::new("a", "a@b", &git2::Time::new(0, 0)).unwrap();
        let commit = repo.commit(None, &who, &who, "m", &tree, &[]).unwrap();
        let url = format!("file://{}", path.display());
        self.runtime.block_on(self.repos.pin(&url, Some(&commit.to_string()))).unwrap()
    }

    fn patch(&self, pin: &Pin, changes: Vec<Change>) -> Patch {
        self.runtime.block_on(self.repos.patch(pin, changes)).unwrap()
    }

    fn applies(&self, pin: &Pin, diff: &[u8]) -> Result<(), Error> {
        self.runtime.block_on(self.repos.applies(&pin.url, &pin.commit, diff.to_vec()))
    }
}

fn have_git() -> bool {
    static FOUND: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *FOUND.get_or_init(|| has_git("a patch against git apply"))
}

/// Lays `files` out, applies `diff` with the real git, and reads the folder back.
fn by_real_git(files: &Files, diff: &[u8]) -> Result<Files, String> {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let work = dir.path().join("work");
    std::fs::create_dir(&work).unwrap();
    let at = |p: &[u8]| work.join(std::ffi::OsStr::from_bytes(p));
    for (path, content) in files {
        let to = at(path);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        match content {
            Content::File { bytes, executable } => {
                std::fs::write(&to, bytes).unwrap();
                let mode = if *executable { 0o755 } else { 0o644 };
                std::fs::set_permissions(&to, std::fs::Permissions::from_mode(mode)).unwrap();
            }
            Content::Symlink { target } => {
                std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(target), &to).unwrap();
            }
            Content::Deleted => {}
        }
    }
    let git = |args: &[&str]| {
        let mut command = Command::new("git");
        command.args(args).current_dir(&work).env("HOME", dir.path()).env("GIT_CONFIG_NOSYSTEM", "1");
        let out = command.output().unwrap();
        if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) }
    };
    git(&["init", "-q", "."])?;
    git(&["add", "-A", "-f", "."])?;
    let patch = dir.path().join("the.patch");
    std::fs::write(&patch, diff).unwrap();
    if !diff.is_empty() {
        git(&["apply", "--index", "--whitespace=nowarn", patch.to_str().unwrap()])?;
    }
    let mut after = Files::new();
    collect(&work, b"", &mut after);
    Ok(after)
}

fn collect(folder: &Path, prefix: &[u8], into: &mut Files) {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::os::unix::fs::PermissionsExt;
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let name = entry.file_name();
        if prefix.is_empty() && name == ".git" {
            continue;
        }
        let path = if prefix.is_empty() {
            name.as_bytes().to_vec()
        } else {
            [prefix, b"/", name.as_bytes()].concat()
        };
        let meta = entry.path().symlink_metadata().unwrap();
        if meta.is_dir() {
            collect(&entry.path(), &path, into);
        } else if meta.is_symlink() {
            let target = std::fs::read_link(entry.path()).unwrap().into_os_string().into_vec();
            into.insert(path, Content::Symlink { target });
        } else {
            let bytes = std::fs::read(entry.path()).unwrap();
            into.insert(path, Content::File { bytes, executable: meta.permissions().mode() & 0o111 != 0 });
        }
    }
}

/// What `changes` make of `files`, by the contract's words.
fn expected(files: &Files, changes: &[Change]) -> Files {
    let mut after = files.clone();
    let under = |path: &[u8], top: &[u8]| {
        path == top || path.strip_prefix(top).is_some_and(|r| r.first() == Some(&b'/'))
    };
    for change in changes {
        after.retain(|path, _| !under(path, &change.path) && !under(&change.path, path));
        if change.to != Content::Deleted {
            after.insert(change.path.clone(), change.to.clone());
        }
    }
    after
}

fn files(list: &[(&str, Content)]) -> Files {
    list.iter().map(|(p, c)| (p.as_bytes().to_vec(), c.clone())).collect()
}

fn change(path: &str, to: Content) -> Change {
    Change { path: path.as_bytes().to_vec(), to }
}

#[test]
fn modes_symlinks_binary_files_and_missing_newlines_survive_the_way_through_git_apply() {
    let before = files(&[
        ("run.sh", file("#!/bin/sh\n")),
        ("bin", file([0u8, 1, 2, 3, 255].repeat(100))),
        ("no-newline", file("a\nb")),
        ("link", Content::Symlink { target: b"run.sh".to_vec() }),
        ("gone/deep/er", file("x\n")),
        ("becomes-folder", file("x\n")),
        ("folder/becomes-file", file("x\n")),
        ("empty", file("")),
    ]);
    let changes = vec![
        change("becomes-folder", Content::Deleted),
        change("becomes-folder/inner", file("y\n")),
        change("bin", file([0u8, 1, 2, 4, 255].repeat(120))),
        change("empty", Content::Deleted),
        change("folder", file("now a file\n")),
        change("gone", Content::Deleted),
        change("link", Content::Symlink { target: b"elsewhere".to_vec() }),
        change("new bin\t\"q\" é\n", file([0u8; 64])),
        change("new-empty", file("")),
        change("no-newline", file("a\nb\n")),
        change("run.sh", Content::File { bytes: b"#!/bin/sh\n".to_vec(), executable: true }),
        change("with blank", file("z\n")),
    ];
    let house = House::new();
    let pin = house.pin("r", &before);
    let patch = house.patch(&pin, changes.clone());
    assert_eq!(patch.skipped, []);
    house.applies(&pin, &patch.diff).unwrap();
    assert_eq!(house.patch(&pin, changes.clone()).diff, patch.diff, "the same changes give the same bytes");
    if have_git() {
        let after = by_real_git(&before, &patch.diff)
            .unwrap_or_else(|e| panic!("{e}\n{}", String::from_utf8_lossy(&patch.diff)));
        assert_eq!(after, expected(&before, &changes));
    }
}

#[test]
fn nothing_changed_is_an_empty_patch() {
    let before = files(&[("a", file("x\n"))]);
    let house = House::new();
    let pin = house.pin("r", &before);
    let patch = house.patch(&pin, vec![change("a", file("x\n"))]);
    assert_eq!(patch, Patch::default());
    house.applies(&pin, &patch.diff).unwrap();
}

#[test]
fn a_patch_for_another_state_is_said_not_to_apply() {
    let house = House::new();
    let pin = house.pin("r", &files(&[("a", file("1\n2\n3\n"))]));
    let other = house.pin("s", &files(&[("a", file("4\n5\n6\n"))]));
    let patch = house.patch(&pin, vec![change("a", file("1\n2\nx\n"))]);
    assert_eq!((patch.files_changed, patch.lines_added, patch.lines_removed), (1, 1, 1));
    assert!(matches!(house.applies(&other, &patch.diff), Err(Error::DoesNotApply { .. })));
    assert!(matches!(house.applies(&pin, b"not a diff"), Err(Error::DoesNotApply { .. })));
}

#[test]
fn changes_that_a_patch_cannot_carry_are_left_out_by_name() {
    let house = House::new();
    let pin = house.pin("r", &files(&[("a", file("x\n"))]));
    let bad = ["sub/.git/config", ".GIT/hooks/x", "../out", "a//b", "/etc/passwd", "x/git~1/y", ""];
    let patch = house.patch(&pin, bad.iter().map(|p| change(p, file("evil\n"))).collect());
    assert!(patch.diff.is_empty());
    assert_eq!(patch.skipped.len(), bad.len());
    assert_eq!(patch.skipped[0].why, "a name that some system takes for .git");
}

#[test]
fn symlinks_of_a_patch_that_lead_out_of_the_repository_are_warned_of_by_name_and_no_others() {
    let link = |target: &str| Content::Symlink { target: target.as_bytes().to_vec() };
    let house = House::new();
    let before = files(&[
        ("d/e/file", file("x\n")),
        ("d/up", link("..")),
        ("old-out", link("/etc/passwd")),
        ("changed", link("d/e/file")),
    ]);
    let pin = house.pin("r", &before);
    let patch = house.patch(
        &pin,
        vec![
            change("absolute", link("/etc/passwd")),
            change("changed", link("../../outside")),
            change("d/above", link("../../x")),
            change("d/inside", link("../d/e/../e/file")),
            change("d/through", link("up/../x")),
            change("d/via", link("chain/x")),
            change("d/chain", link("e/../../d/up/..")),
            change("dangling", link("nowhere/at/all")),
            change("git", link("d/../.git/hooks/post-checkout")),
            change("ring", link("ring")),
            change("d/inside2", link("up/d/e/file")),
        ],
    );
    let told: Vec<String> = patch.links_out.iter().map(ToString::to_string).collect();
    let expected = [
        "absolute: a symlink to the absolute path /etc/passwd",
        "changed: a symlink out of the repository, to ../../outside",
        "d/above: a symlink out of the repository, to ../../x",
        "d/chain: a symlink out of the repository, to e/../../d/up/..",
        "d/through: a symlink out of the repository, to up/../x",
        "d/via: a symlink out of the repository, to chain/x",
        "git: a symlink into .git, to d/../.git/hooks/post-checkout",
    ];
    assert_eq!(told, expected);
    assert_eq!(patch.files_changed, 11, "they are delivered all the same");
}

#[test]
fn a_file_that_is_not_utf_8_is_a_binary_patch_and_the_others_stay_text() {
    let latin = |text: &[u8]| Content::File { bytes: text.to_vec(), executable: false };
    let before = files(&[
        ("latin", latin(b"caf\xe9\none\n")),
        ("plain", file("caf\u{e9}\none\n")),
        ("link", Content::Symlink { target: b"a".to_vec() }),
        ("odd", Content::Symlink { target: b"\xff".to_vec() }),
    ]);
    let changes = vec![
        change("latin", latin(b"caf\xe9\ntwo\n")),
        change("link", Content::Symlink { target: b"\xfe".to_vec() }),
        change("odd", Content::Deleted),
        change("plain", file("caf\u{e9}\ntwo\n")),
    ];
    let house = House::new();
    let pin = house.pin("r", &before);
    let patch = house.patch(&pin, changes.clone());
    let text = String::from_utf8(patch.diff.clone()).expect("an event carries text");
    assert!(text.contains("GIT binary patch") && text.contains("\n caf\u{e9}\n-one\n+two\n"), "{text}");
    house.applies(&pin, &patch.diff).unwrap();
    if have_git() {
        let after = by_real_git(&before, &patch.diff).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(after, expected(&before, &changes));
    }
}

#[test]
fn names_in_utf_8_are_not_quoted_unless_a_terminal_would_obey_them() {
    let house = House::new();
    let pin = house.pin("r", &files(&[("a", file("x\n"))]));
    let odd = ["c1\u{9b}31m", "bidi\u{202e}txt.exe", "bell\u{7}"];
    let changes =
        ["\u{e9}\u{4e2d} \u{1f600}"].iter().chain(&odd).map(|name| change(name, file("y\n"))).collect();
    let patch = house.patch(&pin, changes);
    let text = String::from_utf8(patch.diff.clone()).unwrap();
    let plain = "\u{e9}\u{4e2d} \u{1f600}";
    assert!(text.contains(&format!("diff --git a/{plain} b/{plain}\n")), "{text}");
    assert!(text.contains(&format!("+++ b/{plain}\t\n")), "{text}");
    assert!(!text.chars().any(|c| c != '\n' && c != '\t' && (c.is_control() || c == '\u{202e}')), "{text}");
    house.applies(&pin, &patch.diff).unwrap();
    if have_git() {
        let before = files(&[("a", file("x\n"))]);
        by_real_git(&before, &patch.diff).unwrap_or_else(|e| panic!("{e}\n{text}"));
    }
}

fn a_name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => "[a-c]".prop_map(String::into_bytes),
        1 => "[ -~]{1,6}".prop_map(|s| s.replace('/', "_").into_bytes()),
        1 => Just(b"a b".to_vec()),
        1 => Just(b"tab\there".to_vec()),
        1 => Just(b"new\nline".to_vec()),
        1 => Just("\u{e9}\u{4e2d}".as_bytes().to_vec()),
        1 => Just(b"\xff\xfe".to_vec()),
        1 => Just(b"end ".to_vec()),
        1 => Just(b" start".to_vec()),
        1 => Just(b"cr\r".to_vec()),
        1 => Just(b"q\"q\\q".to_vec()),
    ]
}

fn a_path() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(a_name(), 1..4).prop_map(|parts| parts.join(&b'/'))
}

fn some_bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        6 => prop::collection::vec(prop_oneof!["[ab]{0,2}\n", "x\r\n", "--- a/x\n", "diff --git a/x b/x\n", "\t \n"], 0..12)
            .prop_map(|lines| lines.concat().into_bytes()),
        2 => "[ab\n]{0,9}".prop_map(String::into_bytes),
        1 => prop::collection::vec(any::<u8>(), 0..300),
        1 => prop::collection::vec(0u8..3, 2000..5000),
    ]
}

fn some_content() -> impl Strategy<Value = Content> {
    prop_oneof![
        6 => (some_bytes(), any::<bool>()).prop_map(|(bytes, executable)| Content::File { bytes, executable }),
        1 => "[a-z./]{1,12}".prop_map(|t| Content::Symlink { target: t.into_bytes() }),
    ]
}

/// A tree without a path that is both a file and a folder.
fn a_tree() -> impl Strategy<Value = Files> {
    prop::collection::vec((a_path(), some_content()), 0..10).prop_map(|list| {
        let changes: Vec<Change> = list.into_iter().map(|(path, to)| Change { path, to }).collect();
        expected(&Files::new(), &changes)
    })
}

/// What a sandbox would report between two trees: sorted, deletions before what takes their place.
fn between(before: &Files, after: &Files) -> Vec<Change> {
    let gone = before
        .keys()
        .filter(|p| !after.contains_key(*p))
        .map(|p| Change { path: p.clone(), to: Content::Deleted });
    let new = after
        .iter()
        .filter(|(p, c)| before.get(*p) != Some(c))
        .map(|(p, c)| Change { path: p.clone(), to: c.clone() });
    let mut all: Vec<Change> = gone.chain(new).collect();
    all.sort_by(|a, b| a.path.cmp(&b.path));
    all
}

/// The second tree: the first with some paths dropped, some edited, some added.
fn two_trees() -> impl Strategy<Value = (Files, Files)> {
    (a_tree(), a_tree(), any::<u64>(), some_bytes()).prop_map(|(before, other, bits, edit)| {
        let mut list: Vec<Change> = Vec::new();
        for (n, (path, content)) in before.iter().enumerate() {
            let to = match (bits >> (2 * n)) & 3 {
                0 => continue,
                1 => match content {
                    Content::File { bytes, executable } => {
                        let at = bytes.len() / 2;
                        Content::File {
                            bytes: [&bytes[..at], &edit, &bytes[at..]].concat(),
                            executable: !executable,
                        }
                    }
                    other => other.clone(),
                },
                _ => content.clone(),
            };
            list.push(Change { path: path.clone(), to });
        }
        list.extend(other.into_iter().map(|(path, to)| Change { path, to }));
        let after = expected(&Files::new(), &list);
        (before, after)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_change_goes_through_git_apply_and_comes_out_the_same((before, after) in two_trees()) {
        let house = House::new();
        // Names that libgit2's index, which lays out the trees here, does not take. One with a backslash that it
        // takes is among the generated ones.
        let odd = |n: &[u8]| {
            n == b"." || n == b".." || n.eq_ignore_ascii_case(b".git") || (n.contains(&b'\\') && n != b"q\"q\\q")
        };
        prop_assume!(!before.keys().chain(after.keys()).any(|p| p.split(|b| *b == b'/').any(odd)));
        let pin = house.pin("r", &before);
        let patch = house.patch(&pin, between(&before, &after));
        prop_assert_eq!(&patch.skipped, &vec![]);
        let shown = || String::from_utf8_lossy(&patch.diff).into_owned();
        house.applies(&pin, &patch.diff).map_err(|e| TestCaseError::fail(format!("{e}\n{}", shown())))?;
        if have_git() {
            let got = by_real_git(&before, &patch.diff).map_err(|e| TestCaseError::fail(format!("{e}\n{}", shown())))?;
            prop_assert_eq!(got, after, "{}", shown());
        }
    }
}
