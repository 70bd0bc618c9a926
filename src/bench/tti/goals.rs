//! The promises about speed beside what was measured. A promise whose sides were not both measured is left out.

use serde::Serialize;

use super::{Figures, Mode, Name, Report};

/// One promise: measured, and the most it may be.
#[derive(Debug, Clone, Serialize)]
pub struct Goal {
    /// `in_turn.warm/bwrap` is a ratio of p50s, `at_once.cold.p99/p50` one of a lane's own figures.
    pub name: String,
    pub at_most: f64,
    pub measured: f64,
    pub met: bool,
}

/// Ratios of p50s in turn: a lane, what it is held against, and the most that is promised.
const RATIOS: [(Name, Name, f64); 6] = [
    (Name::Cold, Name::Plain, 6.0),
    (Name::Warm, Name::Plain, 1.5),
    (Name::Cold, Name::Bwrap, 1.0),
    (Name::Warm, Name::Bwrap, 0.2),
    (Name::Cold, Name::DockerRun, 0.02),
    (Name::DockerWarm, Name::DockerRun, 0.2),
];
/// Of a lane's p99 to its p50.
const SPREAD: f64 = 3.0;
const STREAMING_MS: f64 = 1.0;
/// What the looks at a memory that does not grow may differ by, a sandbox.
const SOAK_BYTES: f64 = 16.0;

pub fn judge(report: &Report) -> Vec<Goal> {
    let mut goals = Vec::new();
    let mut goal = |name: String, at_most: f64, measured: f64| {
        goals.push(Goal { name, at_most, measured, met: measured <= at_most });
    };
    for mode in &report.modes {
        let mode_name = match mode.mode {
            Mode::InTurn => "in_turn",
            Mode::Staggered => "staggered",
            Mode::AtOnce => "at_once",
        };
        let find = |name: Name| mode.lanes.iter().find(|lane| lane.name == name);
        for (ours, other, at_most) in RATIOS.into_iter().filter(|_| mode.mode == Mode::InTurn) {
            if let (Some(a), Some(b)) = (find(ours), find(other)) {
                let name = format!("{mode_name}.{}/{}", ours.as_str(), other.as_str());
                goal(name, at_most, a.p50_ms / b.p50_ms);
            }
        }
        for lane in mode.lanes.iter().filter(|lane| lane.name.is_sandbox()) {
            let Figures { name, p50_ms, p99_ms, starts, successes, .. } = lane;
            let name = format!("{mode_name}.{}", name.as_str());
            goal(format!("{name}.p99/p50"), SPREAD, p99_ms / p50_ms);
            goal(format!("{name}.failed"), 0.0, (starts - successes) as f64);
        }
    }
    for stream in &report.streaming {
        if let Some(adds_ms) = stream.adds_ms {
            goal(format!("streaming.{}.adds_ms", stream.name.as_str()), STREAMING_MS, adds_ms);
        }
    }
    if let Some(soak) = &report.soak {
        let each = |bytes: i64| bytes as f64 / soak.sandboxes.max(1) as f64;
        goal("soak.growth_bytes_each".to_owned(), SOAK_BYTES, each(soak.growth_bytes));
        goal("soak.failed".to_owned(), 0.0, (soak.sandboxes - soak.successes) as f64);
    }
    goals
}
