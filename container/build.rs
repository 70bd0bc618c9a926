//! Builds the shim as a static program, to be carried inside the node: it goes into containers of any image, and so
//! needs nothing of theirs. One `cargo build` does it all.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    let var = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let out = PathBuf::from(var("OUT_DIR"));
    let target = var("TARGET");
    let shim = PathBuf::from(var("CARGO_MANIFEST_DIR")).join("container/shim");
    // The workspace's own file has the shim's profile, the lock what it is made of.
    for changed in ["container/build.rs", "Cargo.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={changed}");
    }
    println!("cargo:rerun-if-changed={}", shim.display());
    let mut build = Command::new(var("CARGO"));
    build
        // Everything it needs, the node needs, too: nothing is fetched here.
        .args([
            "build",
            "--offline",
            "--locked",
            "--profile",
            "shim",
            "--bin",
            "coinop-shim",
            "--target",
            &target,
        ])
        .arg("--manifest-path")
        .arg(shim.join("Cargo.toml"))
        // A folder of its own: the other build holds the lock of the usual one.
        .arg("--target-dir")
        .arg(out.join("shim"))
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    // Meant for the crate that is being looked at, not for a program that is carried.
    for name in
        ["RUSTC_WORKSPACE_WRAPPER", "RUSTC_WRAPPER", "CARGO_TARGET_DIR", "CARGO_BUILD_TARGET", "RUSTFLAGS"]
    {
        build.env_remove(name);
    }
    let built = build.output().unwrap_or_else(|why| panic!("the shim cannot be built: {why}"));
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "the shim cannot be built:\n{said}");
    let program = out.join("shim").join(&target).join("shim/coinop-shim");
    println!("cargo:rustc-env=SHIM_PROGRAM={}", program.display());
}
