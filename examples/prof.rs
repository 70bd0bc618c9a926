use coinop::sandbox::local::*;
use coinop::sandbox::*;
use std::sync::Arc;
use std::time::Instant;
#[derive(Debug)]
struct B(std::path::PathBuf);
impl Tree for B {
    fn path(&self) -> &std::path::Path {
        &self.0
    }
}
fn main() {
    let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    rt.block_on(async {
        let dir = std::path::PathBuf::from(std::env::args().nth(1).unwrap());
        std::fs::create_dir_all(dir.join("base")).unwrap();
        let l = Local::new(Options {
            helper: Some(std::env::args().nth(2).unwrap().into()),
            state_dir: dir.join("s"),
            warm: std::env::args().nth(3).unwrap().parse().unwrap(),
        })
        .unwrap();
        let withbase = std::env::args().nth(4).is_some();
        let mut a = vec![];
        let mut b = vec![];
        let mut c = vec![];
        let mut d = vec![];
        for i in 0..200 {
            l.warm_up().await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(3)).await;
            let p = Policy {
                wall_ms: 30000,
                memory_bytes: 256 << 20,
                pids: 64,
                cpu_milli: 2000,
                disk_bytes: 64 << 20,
                inodes: 10000,
                open_files: 256,
                output_bytes: 1 << 20,
                network: Network::None,
            };
            let t = Instant::now();
            let s = l
                .create(Spec {
                    id: format!("p{i}"),
                    base: if withbase { Some(Arc::new(B(dir.join("base")))) } else { None },
                    policy: p,
                })
                .await
                .unwrap();
            a.push(t.elapsed());
            for k in 0..2 {
                let t = Instant::now();
                let mut p = s
                    .exec(Command { argv: vec!["/bin/echo".into(), "x".into()], ..Default::default() })
                    .await
                    .unwrap();
                while let Some(_) = p.events.recv().await {}
                if k == 0 { b.push(t.elapsed()) } else { d.push(t.elapsed()) }
            }
            let t = Instant::now();
            s.destroy().await.unwrap();
            c.push(t.elapsed());
        }
        for (n, v) in [("create", &mut a), ("exec1", &mut b), ("exec2", &mut d), ("destroy", &mut c)] {
            v.sort();
            println!("{n} p50 {:?} p95 {:?} min {:?}", v[100], v[190], v[0]);
        }
    });
}
