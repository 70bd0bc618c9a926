//! What stays in memory after many sandboxes: they are made, run one command and end, one after the other, half of
//! them from the pool; the memory of this process and of its helpers is looked at in between, when nothing runs.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Options, lanes};
use crate::bench::memory::{rss_bytes, workers};
use crate::sandbox::{Backend, Command, Error, Event, Exit, Spec};

/// Looks at the memory, evenly spread; the first comes when a tenth is done, so that all is warm.
const LOOKS: usize = 10;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Look {
    pub sandboxes: usize,
    /// Resident, of this process.
    pub node_bytes: u64,
    /// Of this process and its helpers, shared pages once.
    pub with_helpers_bytes: u64,
    /// Open files of this process.
    pub open_files: usize,
}

#[derive(Debug, Clone, Serialize)]
pub struct Soak {
    pub sandboxes: usize,
    pub successes: usize,
    pub seconds: f64,
    pub looks: Vec<Look>,
    /// The last look less the first, of `node_bytes`.
    pub node_growth_bytes: i64,
    /// The same of `with_helpers_bytes`.
    pub growth_bytes: i64,
    pub open_files_growth: i64,
}

/// Makes and ends `options.soak` sandboxes.
pub async fn run(options: &Options) -> Result<Soak, Error> {
    let backend = lanes::local(options, "soak", 1)?;
    let begin = Instant::now();
    let (mut successes, mut looks) = (0, Vec::new());
    for n in 1..=options.soak {
        if n % 2 == 0 {
            backend.warm_up(&lanes::policy()).await?;
        }
        let spec = Spec { id: format!("soak-{n}"), base: None, policy: lanes::policy() };
        let sandbox = backend.create(spec).await?;
        let argv = vec!["/bin/true".to_owned()];
        let mut process = sandbox.exec(Command { argv, ..Command::default() }).await?;
        let mut exit = None;
        while let Some(event) = process.events.recv().await {
            if let Event::Exit(how) = event {
                exit = Some(how);
            }
        }
        sandbox.destroy().await?;
        successes += usize::from(exit == Some(Exit::Code { code: 0 }));
        if n * LOOKS / options.soak > looks.len() {
            // The pool as full as at any other look, and its work done.
            tokio::time::sleep(Duration::from_millis(100)).await;
            backend.warm_up(&lanes::policy()).await?;
            looks.push(look(n).map_err(|source| Error::Host { doing: "read its memory", source })?);
        }
    }
    let growth = |of: fn(&Look) -> u64| match (looks.first(), looks.last()) {
        (Some(first), Some(last)) => signed(of(last)) - signed(of(first)),
        _ => 0,
    };
    Ok(Soak {
        sandboxes: options.soak,
        successes,
        seconds: begin.elapsed().as_secs_f64(),
        node_growth_bytes: growth(|look| look.node_bytes),
        growth_bytes: growth(|look| look.with_helpers_bytes),
        open_files_growth: growth(|look| look.open_files as u64),
        looks,
    })
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn look(sandboxes: usize) -> std::io::Result<Look> {
    let pid = std::process::id();
    let (with_helpers_bytes, _) = workers(pid).map_err(std::io::Error::other)?;
    let node_bytes = rss_bytes(pid).map_err(std::io::Error::other)?;
    let open_files = std::fs::read_dir("/proc/self/fd")?.count();
    Ok(Look { sandboxes, node_bytes, with_helpers_bytes, open_files })
}
