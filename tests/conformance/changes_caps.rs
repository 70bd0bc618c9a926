//! What changed, at its bounds: more than the cap, deeper than is walked, or larger than it looks.

use coinop::sandbox::{Error, Policy, Sandbox};

use crate::case::cases;
use crate::fixtures::Fixture;
use crate::running::{policy, sh};

cases!(
    everywhere: [more_change_than_the_cap_is_refused, changes_may_be_exactly_as_large_as_the_cap],
    programs: [
        a_file_of_holes_is_refused_and_not_loaded,
        many_small_changes_count_together,
        deletions_count_by_their_paths,
        folders_without_end_are_refused_by_their_depth,
        paths_without_end_are_refused_by_their_length,
        what_was_refused_can_be_mended_and_read,
    ],
);

async fn too_large(sandbox: &dyn Sandbox, cap: u64) {
    let refused = sandbox.changes(cap).await;
    assert!(matches!(refused, Err(Error::TooLarge { cap_bytes, .. }) if cap_bytes == cap), "{refused:?}");
}

async fn more_change_than_the_cap_is_refused(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("f", &[b'x'; 5000]).await.unwrap();
    for cap in [0, 1, 4999] {
        too_large(&*sandbox, cap).await;
    }
}

/// The cap is over contents and paths.
async fn changes_may_be_exactly_as_large_as_the_cap(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("name", &[b'x'; 100]).await.unwrap();
    assert_eq!(sandbox.changes(104).await.unwrap().len(), 1);
    too_large(&*sandbox, 103).await;
}

async fn a_file_of_holes_is_refused_and_not_loaded(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "dd if=/dev/zero of=hole bs=1 count=1 seek=60000000 2>/dev/null").await.ok();
    too_large(&*sandbox, 1000).await;
}

async fn many_small_changes_count_together(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "i=100; while [ $i -lt 300 ]; do echo 1234567 > $i; i=$((i+1)); done").await.ok();
    assert_eq!(sandbox.changes(200 * 11).await.unwrap().len(), 200);
    too_large(&*sandbox, 200 * 11 - 1).await;
}

async fn deletions_count_by_their_paths(on: &Fixture) {
    let base = on.base(|base| {
        for n in 0..50 {
            std::fs::write(base.join(format!("{n:0100}")), "x").unwrap();
        }
    });
    let sandbox = on.over(base).await;
    sh(&*sandbox, "rm 0*").await.ok();
    assert_eq!(sandbox.changes(5000).await.unwrap().len(), 50);
    too_large(&*sandbox, 4999).await;
}

fn dig(depth: u32) -> String {
    format!("i=0; while [ $i -lt {depth} ]; do mkdir d && cd d || exit 1; i=$((i+1)); done; echo x > f")
}

/// Where some tools can delete what is so deep: they open every folder on the way.
async fn roomy(on: &Fixture) -> Box<dyn Sandbox> {
    on.sandbox_with(Policy { open_files: 1024, ..policy() }).await
}

async fn folders_without_end_are_refused_by_their_depth(on: &Fixture) {
    let sandbox = roomy(on).await;
    sh(&*sandbox, &dig(200)).await.ok();
    assert_eq!(sandbox.changes(1 << 20).await.unwrap().len(), 1);
    sh(&*sandbox, &format!("rm -r d; {}", dig(201))).await.ok();
    let refused = sandbox.changes(1 << 20).await;
    assert!(
        matches!(&refused, Err(Error::TooDeep { cap: 200, path }) if path.starts_with("d/d/")),
        "{refused:?}"
    );
}

async fn paths_without_end_are_refused_by_their_length(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let script = "i=0; while [ $i -lt 40 ]; do d=$(printf %0120d $i); mkdir $d && cd -P $d || exit 1; i=$((i+1)); \
                  done; echo x > f";
    sh(&*sandbox, script).await.ok();
    let refused = sandbox.changes(1 << 20).await;
    assert!(matches!(&refused, Err(Error::TooLarge { what, .. }) if what.contains("path")), "{refused:?}");
}

async fn what_was_refused_can_be_mended_and_read(on: &Fixture) {
    let sandbox = roomy(on).await;
    sh(
        &*sandbox,
        &format!("{}; cd /workspace; dd if=/dev/zero of=big bs=65536 count=4 2>/dev/null", dig(220)),
    )
    .await
    .ok();
    assert!(sandbox.changes(1000).await.is_err());
    sh(&*sandbox, "rm -r d big; echo small > small").await.ok();
    assert_eq!(sandbox.changes(1000).await.unwrap().len(), 1);
}
