//! The local sandbox against real attacks.
use coinop::sandbox::local::*;
use coinop::sandbox::*;
use std::sync::Arc;
#[derive(Debug)]
struct Dir(std::path::PathBuf);
impl Tree for Dir {
    fn path(&self) -> &std::path::Path {
        &self.0
    }
}
fn policy() -> Policy {
    Policy {
        wall_ms: 30000,
        memory_bytes: 256 << 20,
        pids: 64,
        cpu_milli: 2000,
        disk_bytes: 64 << 20,
        inodes: 10000,
        open_files: 256,
        output_bytes: 1 << 20,
        network: Network::None,
    }
}
async fn run(s: &dyn Sandbox, cmd: &str) -> (String, Option<Exit>) {
    let mut p = s
        .exec(Command { argv: vec!["sh".into(), "-c".into(), cmd.into()], ..Default::default() })
        .await
        .unwrap();
    let mut out = String::new();
    let mut exit = None;
    while let Some(e) = p.events.recv().await {
        match e {
            Event::Stdout(b) | Event::Stderr(b) => out.push_str(&String::from_utf8_lossy(&b)),
            Event::Exit(e) => exit = Some(e),
        }
    }
    (out, exit)
}
#[tokio::test]
async fn first() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    std::fs::create_dir(&base).unwrap();
    std::fs::write(base.join("a"), "one").unwrap();
    std::fs::write(base.join("b"), "two").unwrap();
    let l = Local::new(Options {
        helper: Some(
            std::env::var_os("COINOP_TEST_HELPER")
                .unwrap_or_else(|| env!("CARGO_BIN_EXE_coinop").into())
                .into(),
        ),
        state_dir: dir.path().join("st"),
        warm: 0,
    })
    .unwrap();
    for c in l.checks() {
        println!("{c:?}");
    }
    let s =
        l.create(Spec { id: "x".into(), base: Some(Arc::new(Dir(base))), policy: policy() }).await.unwrap();
    for c in [
        "id; ls -la / /dev /etc; cat /proc/mounts; ps aux; cat /proc/self/status | grep -E 'Cap|Secc|NoNew'; ls -la . /job /tmp ~; ulimit -a",
        "echo x >> a; rm b; mkdir d; echo hi > d/f; mkfifo p; ln -s /etc/passwd l; python3 -c 'print(1)'; nproc; ls -la; ip addr",
    ] {
        let (o, e) = run(&*s, c).await;
        println!("{o}\n=> {e:?}");
    }
    println!("{:?}", s.changes(1 << 20).await);
    println!("{:?}", s.read_file("d/f", 100).await);
    println!("{:?}", s.write_file("d/g/h", b"hello").await);
    println!("{:?}", s.write_file("/job/in", b"hello").await);
    let (o, e) = run(&*s, "cat d/g/h /job/in; ls -la d/g /job; echo no > /job/x").await;
    println!("{o}\n=> {e:?}");
    println!("{:?}", s.usage().await);
    println!("{:?}", s.destroy().await);
}
