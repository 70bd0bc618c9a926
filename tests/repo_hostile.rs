//! Repositories made byte by byte to do harm: each is refused with its reason, or stands there harmless.

use std::path::{Path, PathBuf};

use coinop::repo::{Base, Error, Limits, Options, Repos, WarningKind, serve};
use coinop::sandbox::Tree;
use git2::{ObjectType, Odb, Oid, Repository};

struct Forge {
    dir: tempfile::TempDir,
    path: PathBuf,
}

/// One raw tree entry.
struct E<'a>(&'a str, &'a [u8], Oid);

impl Forge {
    fn new() -> Forge {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evil.git");
        serve::sample_repo(&path, &[("x", "x")]).unwrap();
        Forge { dir, path }
    }

    fn odb(&self) -> Odb<'static> {
        let odb = Odb::new().unwrap();
        let objects = self.path.join("objects");
        odb.add_disk_alternate(objects.to_str().unwrap()).unwrap();
        odb
    }

    /// Writes a loose object as it is, without libgit2's checks.
    fn put(&self, kind: ObjectType, data: &[u8]) -> Oid {
        Repository::open_bare(&self.path).unwrap().odb().unwrap().write(kind, data).unwrap()
    }

    fn blob(&self, data: &[u8]) -> Oid {
        self.put(ObjectType::Blob, data)
    }

    fn tree(&self, entries: &[E<'_>]) -> Oid {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|E(mode, name, id)| [mode.as_bytes(), b" ", name, b"\0", id.as_bytes()].concat())
            .collect();
        self.put(ObjectType::Tree, &bytes)
    }

    /// Points `main` at a commit of this tree.
    fn commit(&self, tree: Oid) {
        let text = format!("tree {tree}\nauthor a <a@b> 0 +0000\ncommitter a <a@b> 0 +0000\n\nm\n");
        let id = self.put(ObjectType::Commit, text.as_bytes());
        std::fs::write(self.path.join("refs/heads/main"), format!("{id}\n")).unwrap();
    }

    /// Clones over http with our own server.
    async fn checkout_with(&self, limits: Limits) -> Result<std::sync::Arc<Base>, Error> {
        let server =
            serve::start(std::slice::from_ref(&self.path), "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let cache = self.dir.path().join("cache");
        let repos =
            Repos::open(&cache, Options { allow_private: true, limits, ..Options::default() }).unwrap();
        let result = async { repos.base(&repos.pin(&server.url(), None).await?).await }.await;
        assert_eq!(std::fs::read_dir(cache.join("tmp")).unwrap().count(), 0, "nothing half made stays");
        result
    }

    async fn checkout(&self) -> Result<std::sync::Arc<Base>, Error> {
        self.checkout_with(Limits::default()).await
    }

    async fn refused(&self, tree: Oid) -> String {
        self.commit(tree);
        match self.checkout().await {
            Err(Error::Refused { why }) => why,
            other => panic!("not refused: {other:?}"),
        }
    }
}

fn outside(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_lead_out_or_into_dot_git_are_refused() {
    for (name, why) in [
        (&b".git"[..], "takes for .git"),
        (b".GIT", "takes for .git"),
        (b".gIt ", "takes for .git"),
        (b".g\xe2\x80\x8cit", "takes for .git"),
        (b"git~1", "takes for .git"),
        (b".git::$INDEX_ALLOCATION", "takes for .git"),
        (b"a\\.git\\hooks", "takes for .git"),
        (b"..", "a way up"),
        (b".", "a way up"),
        (b"../../escaped", "with a slash"),
        (b"/tmp/escaped", "with a slash"),
        (b"", "an empty name"),
    ] {
        let forge = Forge::new();
        let blob = forge.blob(b"evil");
        for (mode, id) in [
            ("100644", blob),
            ("120000", blob),
            ("40000", forge.tree(&[E("100644", b"x", blob)])),
            ("160000", blob),
        ] {
            // A gitlink's id is never looked up.
            let tree = forge.tree(&[E(mode, name, id)]);
            let said = forge.refused(tree).await;
            assert!(said.contains(why), "{name:?} {mode}: {said}");
        }
        let deep = forge.tree(&[E("40000", b"d", forge.tree(&[E("100644", name, blob)]))]);
        assert!(forge.refused(deep).await.contains(why));
        assert_eq!(outside(forge.dir.path()), ["cache", "evil.git"], "nothing outside the cache");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_symlink_and_a_folder_of_one_name_do_not_write_through() {
    let forge = Forge::new();
    let target = forge.dir.path().join("victim");
    std::fs::create_dir(&target).unwrap();
    let link = forge.blob(target.to_str().unwrap().as_bytes());
    let inner = forge.tree(&[E("100644", b"planted", forge.blob(b"evil"))]);
    for entries in [
        [E("120000", b"a", link), E("40000", b"a", inner)],
        [E("40000", b"a", inner), E("120000", b"a", link)],
    ] {
        let why = forge.refused(forge.tree(&entries)).await;
        assert!(why.contains("two entries of one name"), "{why}");
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn symlinks_that_point_outside_stay_symlinks_and_are_not_followed() {
    let forge = Forge::new();
    let links =
        [("abs", "/etc/passwd"), ("up", "../../../../etc"), ("self", "self"), ("dangling", "nowhere")];
    let entries: Vec<E<'_>> =
        links.iter().map(|(n, t)| E("120000", n.as_bytes(), forge.blob(t.as_bytes()))).collect();
    forge.commit(forge.tree(&entries));
    let base = forge.checkout().await.unwrap();
    for (name, target) in links {
        assert_eq!(std::fs::read_link(base.path().join(name)).unwrap(), Path::new(target));
    }
    assert_eq!(base.bytes(), links.iter().map(|(_, t)| t.len() as u64).sum::<u64>());
    for target in [&b""[..], b"a\0b", &[b'a'; 5000]] {
        let why = forge.refused(forge.tree(&[E("120000", b"l", forge.blob(target))])).await;
        assert!(why.contains("an impossible symlink"), "{why}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_bomb_is_counted_and_not_built() {
    let forge = Forge::new();
    let blob = forge.blob(b"boom");
    let names: Vec<String> = (0..10).map(|n| format!("f{n}")).collect();
    let leaf: Vec<E<'_>> = names.iter().map(|n| E("100644", n.as_bytes(), blob)).collect();
    let mut tree = forge.tree(&leaf);
    // 10^10 files in 100 entries.
    for _ in 0..9 {
        let level: Vec<E<'_>> = names.iter().map(|n| E("40000", n.as_bytes(), tree)).collect();
        tree = forge.tree(&level);
    }
    forge.commit(tree);
    let error = forge.checkout().await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { what: "files and folders", cap: 200_000 }), "{error}");
    assert_eq!(std::fs::read_dir(forge.dir.path().join("cache/tmp")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_folders_deep_is_refused_and_overflows_nothing() {
    let forge = Forge::new();
    let mut tree = forge.tree(&[E("100644", b"f", forge.blob(b"x"))]);
    let repo = Repository::open_bare(&forge.path).unwrap();
    let odb = repo.odb().unwrap();
    // In memory first: loose objects by the hundred thousand would only be slow.
    let pack = odb.add_new_mempack_backend(1000).unwrap();
    let mut builder = repo.packbuilder().unwrap();
    for _ in 0..100_000 {
        let bytes = [b"40000 d\0".as_slice(), tree.as_bytes()].concat();
        tree = odb.write(ObjectType::Tree, &bytes).unwrap();
        builder.insert_object(tree, None).unwrap();
    }
    builder.write(&forge.path.join("objects/pack"), 0o444).unwrap();
    pack.reset().unwrap();
    forge.commit(tree);
    let error = forge.checkout().await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { what: "depth of folders", cap: 128 }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn submodules_are_empty_folders_and_their_names_run_nothing() {
    let forge = Forge::new();
    let modules = forge.blob(b"[submodule \"a\"]\n\tpath = a\r\n\turl = ext::sh -c 'touch /tmp/pwned'\n\tupdate = !touch /tmp/pwned\n");
    let nowhere = Oid::from_str(&"1".repeat(40)).unwrap();
    forge.commit(forge.tree(&[
        E("100644", b".gitmodules", modules),
        E("160000", b"a\r", nowhere),
        E("160000", b"sub", nowhere),
    ]));
    let base = forge.checkout().await.unwrap();
    assert!(base.path().join("sub").is_dir());
    assert_eq!(std::fs::read_dir(base.path().join("sub")).unwrap().count(), 0);
    let warned: Vec<_> = base
        .warnings()
        .iter()
        .filter(|w| w.kind == WarningKind::Submodule)
        .map(|w| w.path.as_str())
        .collect();
    assert_eq!(warned, ["a\\r", "sub"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_embedded_bare_repository_is_plain_files_and_a_warning() {
    let forge = Forge::new();
    let config = forge.blob(b"[core]\n\tfsmonitor = touch /tmp/pwned\n");
    let bare = forge.tree(&[
        E("100644", b"HEAD", forge.blob(b"ref: refs/heads/x\n")),
        E("100644", b"config", config),
        E("40000", b"objects", forge.tree(&[E("100644", b"keep", forge.blob(b""))])),
    ]);
    forge.commit(forge.tree(&[E("40000", b"inner.git", bare)]));
    let base = forge.checkout().await.unwrap();
    assert!(
        base.warnings().iter().any(|w| w.path == "inner.git/config" && w.what.contains("bare repository"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn attributes_filters_and_large_file_pointers_change_no_byte() {
    let forge = Forge::new();
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n";
    forge.commit(forge.tree(&[
        E(
            "100644",
            b".gitattributes",
            forge.blob(b"* filter=evil text eol=crlf ident export-subst\nbig filter=lfs\n"),
        ),
        E("100644", b"a", forge.blob(b"$Id$\nline\n")),
        E("100644", b"big", forge.blob(pointer)),
    ]));
    let base = forge.checkout().await.unwrap();
    assert_eq!(std::fs::read(base.path().join("a")).unwrap(), b"$Id$\nline\n");
    assert_eq!(std::fs::read(base.path().join("big")).unwrap(), pointer);
    assert!(base.warnings().iter().any(|w| w.kind == WarningKind::LfsPointer && w.path == "big"));
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_but_harmless_trees_stand_there_as_they_are() {
    let forge = Forge::new();
    let blob = forge.blob(b"x");
    let names: [&[u8]; 7] = [b"A", b"Icon\r", b"a", b"a b", b"new\nline", b"\xff\xfe", b"con"];
    let entries: Vec<E<'_>> = names.iter().map(|n| E("100664", n, blob)).collect();
    forge.commit(forge.tree(&entries));
    let base = forge.checkout().await.unwrap();
    assert_eq!(base.files(), 7);
    let set: std::collections::BTreeSet<Vec<u8>> = std::fs::read_dir(base.path())
        .unwrap()
        .flatten()
        .map(|e| std::os::unix::ffi::OsStringExt::into_vec(e.file_name()))
        .filter(|name| name != b".git")
        .collect();
    assert_eq!(set, names.iter().map(|n| n.to_vec()).collect());
    // Set-id bits and the like are no part of what is taken from a mode.
    use std::os::unix::fs::PermissionsExt;
    forge.commit(forge.tree(&[E("106755", b"suid", blob)]));
    let cache = forge.dir.path().join("cache");
    std::fs::remove_dir_all(&cache).unwrap();
    let base = forge.checkout().await.unwrap();
    assert_eq!(std::fs::metadata(base.path().join("suid")).unwrap().permissions().mode() & 0o7777, 0o755);
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_of_the_wrong_kind_or_missing_are_told_as_broken() {
    let forge = Forge::new();
    let blob = forge.blob(b"x");
    let tree = forge.tree(&[E("100644", b"x", blob)]);
    for entry in [
        E("100644", b"f", tree),
        E("40000", b"d", blob),
        E("100644", b"f", Oid::from_str(&"2".repeat(40)).unwrap()),
    ] {
        forge.commit(forge.tree(&[entry]));
        let error = forge.checkout().await.unwrap_err();
        assert!(matches!(error, Error::Broken { .. } | Error::Unreachable { .. }), "{error}");
    }
    // A branch that names a tree.
    std::fs::write(forge.path.join("refs/heads/main"), format!("{tree}\n")).unwrap();
    assert!(forge.checkout().await.is_err());
    assert!(forge.odb().exists(tree));
}
