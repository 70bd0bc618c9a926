//! What differs from the base: every kind of change as the trait tells it, and no other.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use coinop::sandbox::sim::Step;
use coinop::sandbox::{Change, Content, Sandbox};

use crate::case::cases;
use crate::fixtures::Fixture;
use crate::running::{Folder, sh};

cases!(
    everywhere: [
        an_untouched_workspace_has_no_changes,
        what_the_node_wrote_is_a_change,
        changes_are_sorted_by_their_path,
        git_at_the_top_is_left_out_and_no_other,
    ],
    programs: [
        a_workspace_without_a_base_is_all_change,
        what_is_left_out_is_counted_and_neither_read_nor_held_against_the_cap,
        added_edited_and_deleted_files_are_told,
        a_deleted_folder_is_told_once,
        a_file_made_executable_is_told_and_other_modes_are_not,
        links_are_told_by_their_target,
        a_renamed_file_is_gone_and_there,
        a_renamed_folder_is_gone_and_its_files_are_there,
        a_file_that_becomes_a_folder_is_told,
        a_folder_that_becomes_a_file_is_told,
        a_link_that_becomes_a_file_or_a_folder_is_told,
        a_folder_emptied_and_filled_again_tells_what_is_missing,
        what_came_back_as_it_was_is_no_change,
        empty_folders_are_no_change,
        pipes_are_no_change_but_what_they_replace_is_gone,
        two_names_of_one_file_are_two_files,
        names_that_are_no_text_are_told_as_they_are,
        the_base_on_the_host_stays_as_it_was,
        a_second_sandbox_over_the_same_base_sees_nothing_of_the_first,
        changes_are_exactly_what_the_job_did,
    ],
);

fn fill(base: &Path) {
    std::fs::create_dir_all(base.join("dir/deep")).unwrap();
    std::fs::create_dir_all(base.join(".git")).unwrap();
    for (path, text) in [
        ("keep", "keep\n"),
        ("edit", "one\n"),
        ("gone", "gone\n"),
        ("dir/a", "a\n"),
        ("dir/deep/b", "b\n"),
        ("script", "#!/bin/sh\n"),
        ("tool", "#!/bin/sh\n"),
        (".git/config", "[core]\n"),
    ] {
        std::fs::write(base.join(path), text).unwrap();
    }
    std::fs::set_permissions(base.join("tool"), std::fs::Permissions::from_mode(0o755)).unwrap();
    symlink("keep", base.join("link")).unwrap();
}

/// A change in few letters: `f:` a file, `x:` an executable one, `l:` a link, `-` gone.
fn told(changes: &[Change]) -> Vec<(String, String)> {
    let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let to = |change: &Change| match &change.to {
        Content::File { bytes, executable } => {
            format!("{}{}", if *executable { "x:" } else { "f:" }, shown(bytes).trim_end())
        }
        Content::Symlink { target } => format!("l:{}", shown(target)),
        Content::Deleted => "-".to_owned(),
    };
    changes.iter().map(|change| (shown(&change.path), to(change))).collect()
}

async fn expect(sandbox: &dyn Sandbox, expected: &[(&str, &str)]) {
    let expected: Vec<_> = expected.iter().map(|(path, to)| ((*path).to_owned(), (*to).to_owned())).collect();
    assert_eq!(told(&sandbox.changes(1 << 20).await.unwrap()), expected);
}

/// After this script in a sandbox over the base, exactly this has changed.
async fn after(on: &Fixture, script: &str, expected: &[(&str, &str)]) {
    let sandbox = on.over(on.base(fill)).await;
    sh(&*sandbox, script).await.ok();
    expect(&*sandbox, expected).await;
}

async fn an_untouched_workspace_has_no_changes(on: &Fixture) {
    let (empty, filled) = (on.sandbox().await, on.over(on.base(fill)).await);
    for sandbox in [empty, filled] {
        assert_eq!(sandbox.changes(0).await.unwrap(), []);
        sandbox.kill().await.unwrap();
        assert_eq!(sandbox.changes(0).await.unwrap(), []);
    }
}

async fn what_the_node_wrote_is_a_change(on: &Fixture) {
    let sandbox = on.over(on.base(fill)).await;
    sandbox.write_file("edit", b"two").await.unwrap();
    sandbox.write_file("new/file", b"n").await.unwrap();
    expect(&*sandbox, &[("edit", "f:two"), ("new/file", "f:n")]).await;
}

async fn changes_are_sorted_by_their_path(on: &Fixture) {
    let names = ["b/z", "b.a", "b-a", "a", "b0", "Z", "ä", "b/a/x"];
    let mut sorted = names;
    sorted.sort_by_key(|name| name.as_bytes());
    let sandbox = on.sandbox().await;
    for name in names {
        sandbox.write_file(name, b"").await.unwrap();
    }
    let found: Vec<_> =
        told(&sandbox.changes(1000).await.unwrap()).into_iter().map(|(path, _)| path).collect();
    assert_eq!(found, sorted);
}

async fn git_at_the_top_is_left_out_and_no_other(on: &Fixture) {
    let script = "mkdir -p .git/hooks sub/.git; for f in .git/config .git/hooks/h sub/.git/config .gitignore; do \
                  echo h > $f; done";
    let wrote = |path: &str| {
        let to = Content::File { bytes: b"h\n".to_vec(), executable: false };
        Step::Change(Change { path: path.as_bytes().to_vec(), to })
    };
    on.plays(script, [".git/config", ".git/hooks/h", "sub/.git/config", ".gitignore"].map(wrote));
    after(on, script, &[(".gitignore", "f:h"), ("sub/.git/config", "f:h")]).await;
}

async fn a_workspace_without_a_base_is_all_change(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "mkdir d; echo x > d/f; ln -s /etc/passwd l").await.ok();
    expect(&*sandbox, &[("d/f", "f:x"), ("l", "l:/etc/passwd")]).await;
}

async fn added_edited_and_deleted_files_are_told(on: &Fixture) {
    let script = "echo two >> edit; rm gone; echo n > new; mkdir -p far/off; echo f > far/off/f; echo c > dir/c; \
                  rm dir/deep/b";
    let expected = [
        ("dir/c", "f:c"),
        ("dir/deep/b", "-"),
        ("edit", "f:one\ntwo"),
        ("far/off/f", "f:f"),
        ("gone", "-"),
        ("new", "f:n"),
    ];
    after(on, script, &expected).await;
}

async fn a_deleted_folder_is_told_once(on: &Fixture) {
    after(on, "rm -r dir", &[("dir", "-")]).await;
}

async fn a_file_made_executable_is_told_and_other_modes_are_not(on: &Fixture) {
    let script = "chmod 755 script; chmod 644 tool; chmod 600 keep; chmod 700 dir; echo x > n; chmod 711 n";
    after(on, script, &[("n", "x:x"), ("script", "x:#!/bin/sh"), ("tool", "f:#!/bin/sh")]).await;
}

async fn links_are_told_by_their_target(on: &Fixture) {
    let script = "ln -sf edit link; ln -s '../../etc/passwd' out; ln -s nowhere dangling; ln -s . self; rm keep; \
                  ln -s edit keep";
    let expected = [
        ("dangling", "l:nowhere"),
        ("keep", "l:edit"),
        ("link", "l:edit"),
        ("out", "l:../../etc/passwd"),
        ("self", "l:."),
    ];
    after(on, script, &expected).await;
}

async fn a_renamed_file_is_gone_and_there(on: &Fixture) {
    after(
        on,
        "mv edit moved; mv tool dir/tool",
        &[("dir/tool", "x:#!/bin/sh"), ("edit", "-"), ("moved", "f:one"), ("tool", "-")],
    )
    .await;
}

async fn a_renamed_folder_is_gone_and_its_files_are_there(on: &Fixture) {
    // Some file systems refuse to rename a folder of a lower layer; `mv` then copies.
    after(on, "mv dir other", &[("dir", "-"), ("other/a", "f:a"), ("other/deep/b", "f:b")]).await;
}

async fn a_file_that_becomes_a_folder_is_told(on: &Fixture) {
    after(on, "rm edit; mkdir edit; echo in > edit/in", &[("edit", "-"), ("edit/in", "f:in")]).await;
}

async fn a_folder_that_becomes_a_file_is_told(on: &Fixture) {
    after(on, "rm -r dir; echo plain > dir", &[("dir", "f:plain")]).await;
}

async fn a_link_that_becomes_a_file_or_a_folder_is_told(on: &Fixture) {
    after(on, "rm link; echo plain > link", &[("link", "f:plain")]).await;
    after(on, "rm link; mkdir link; echo in > link/in", &[("link", "-"), ("link/in", "f:in")]).await;
}

async fn a_folder_emptied_and_filled_again_tells_what_is_missing(on: &Fixture) {
    let script = "rm -r dir; mkdir dir; echo c > dir/c; printf 'a\\n' > dir/a";
    after(on, script, &[("dir/c", "f:c"), ("dir/deep", "-")]).await;
}

async fn what_came_back_as_it_was_is_no_change(on: &Fixture) {
    let script = "touch keep; cat edit > e; cat e > edit; rm e; mv gone g; mv g gone; rm link; ln -s keep link; \
                  rm script; printf '#!/bin/sh\\n' > script; chmod 755 script; chmod 644 script; \
                  rm -r dir; mkdir -p dir/deep; echo a > dir/a; echo b > dir/deep/b; echo n > new; rm new";
    after(on, script, &[]).await;
}

async fn empty_folders_are_no_change(on: &Fixture) {
    after(on, "mkdir -p empty/er; rm dir/deep/b", &[("dir/deep/b", "-")]).await;
}

async fn pipes_are_no_change_but_what_they_replace_is_gone(on: &Fixture) {
    after(on, "mkfifo pipe; rm gone; mkfifo gone; rm -r dir; mkfifo dir", &[("dir", "-"), ("gone", "-")])
        .await;
}

async fn what_is_left_out_is_counted_and_neither_read_nor_held_against_the_cap(on: &Fixture) {
    let sandbox = on.over(on.base(fill)).await;
    // Of the base: `edit` is a file, `dir` a folder.
    let script = "mkdir -p out/deep; head -c 300000 /dev/zero > out/large; echo x > out/deep/y; ln -s x out/link; \
                  echo two >> edit; echo new > new; head -c 300000 /dev/zero > large.o; rm -r dir; echo f > dir";
    sh(&*sandbox, script).await.ok();
    let leave_out = |path: &[u8], is_folder: bool| match is_folder {
        true => path == b"out",
        false => path.starts_with(b"out/") || [b"large.o".as_slice(), b"edit", b"dir"].contains(&path),
    };
    let found = sandbox.changes_except(1000, std::sync::Arc::new(leave_out)).await.unwrap();
    // What the base has is not left out; a folder that became a file that is left out is gone.
    let expected = [("dir", "-"), ("edit", "f:one\ntwo"), ("new", "f:new")];
    assert_eq!(told(&found.delivered), expected.map(|(path, to)| (path.to_owned(), to.to_owned())));
    assert_eq!(found.left_out, 5);
    assert!(sandbox.changes(1000).await.is_err(), "all of it is more than that");
}

async fn two_names_of_one_file_are_two_files(on: &Fixture) {
    after(on, "echo x > one; ln one two", &[("one", "f:x"), ("two", "f:x")]).await;
}

async fn names_that_are_no_text_are_told_as_they_are(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let script = "for n in '\\377\\376' 'new\\nline' ' ' '-rf' '\\303\\274' '\\001'; do printf x > \"$(printf -- \"$n.\")\"; \
                  done";
    sh(&*sandbox, script).await.ok();
    let changes = sandbox.changes(1000).await.unwrap();
    let found: Vec<&[u8]> = changes.iter().map(|change| change.path.as_slice()).collect();
    assert_eq!(found, [b"\x01.".as_slice(), b" .", b"-rf.", b"new\nline.", "ü.".as_bytes(), b"\xff\xfe."]);
}

/// Every path below, with what it holds.
fn listed(folder: &Path, found: &mut Vec<(String, Vec<u8>)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let kind = path.symlink_metadata().unwrap();
        let content = match (kind.is_dir(), kind.is_symlink()) {
            (true, _) => b"folder".to_vec(),
            (_, true) => path.read_link().unwrap().to_str().unwrap().into(),
            _ => std::fs::read(&path).unwrap(),
        };
        found.push((format!("{} {:o}", path.display(), kind.permissions().mode()), content));
        if kind.is_dir() {
            listed(&path, found);
        }
    }
    found.sort();
}

const EVERYTHING: &str = "touch keep; echo two >> edit; rm gone; chmod +x script; ln -sf edit link; \
                          mkdir -p new/er; echo n > new/er/file; rm -r dir; mkdir dir; echo c > dir/c; \
                          echo hostile > .git/config; echo h > .git/hook";

async fn the_base_on_the_host_stays_as_it_was(on: &Fixture) {
    let base = on.base(fill);
    let (mut before, mut after) = (Vec::new(), Vec::new());
    listed(&base.0, &mut before);
    let sandbox = on.over(base.clone()).await;
    sandbox.write_file("keep", b"written by the node").await.unwrap();
    sh(&*sandbox, EVERYTHING).await.ok();
    assert!(sandbox.changes(1 << 20).await.unwrap().len() > 5);
    sandbox.destroy().await.unwrap();
    listed(&base.0, &mut after);
    assert_eq!(before, after);
}

async fn a_second_sandbox_over_the_same_base_sees_nothing_of_the_first(on: &Fixture) {
    let base: std::sync::Arc<Folder> = on.base(fill);
    let one = on.over(base.clone()).await;
    sh(&*one, EVERYTHING).await.ok();
    let two = on.over(base).await;
    assert_eq!(two.changes(0).await.unwrap(), []);
    assert_eq!(
        sh(&*two, "cat edit gone dir/a link .git/config; ls new .git/hook").await.out,
        "one\ngone\na\nkeep\n[core]\n"
    );
    assert!(one.changes(1 << 20).await.unwrap().len() > 5);
}

async fn changes_are_exactly_what_the_job_did(on: &Fixture) {
    let sandbox = on.over(on.base(fill)).await;
    let script = format!(
        "{EVERYTHING}; mkdir empty; mkfifo pipe; rm tool; mkdir tool; echo in > tool/in; \
         printf 'x' > \"$(printf 'odd\\nname')\""
    );
    sh(&*sandbox, &script).await.ok();
    let expected = [
        ("dir/a", "-"),
        ("dir/c", "f:c"),
        ("dir/deep", "-"),
        ("edit", "f:one\ntwo"),
        ("gone", "-"),
        ("link", "l:edit"),
        ("new/er/file", "f:n"),
        ("odd\nname", "f:x"),
        ("script", "x:#!/bin/sh"),
        ("tool", "-"),
        ("tool/in", "f:in"),
    ];
    expect(&*sandbox, &expected).await;
    sandbox.kill().await.unwrap();
    expect(&*sandbox, &expected).await;
}
