//! Whether a sandbox does anything: its clause `idle_ms`, the same for every backend. How processor time is counted, and how
//! a command is ended, is the backend's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::Policy;

/// Of the processor time that a sandbox may have, of one core at most, the part below which it is idle.
const PART: u64 = 100;
/// What a few looks and a sleeping shell take themselves.
const LEAST_US: u64 = 2000;
/// How often it is looked: each quarter of the limit, within these bounds.
const SOONEST: Duration = Duration::from_millis(125);
const LATEST: Duration = Duration::from_secs(5);

/// What has been heard of a sandbox's commands.
#[derive(Debug)]
pub struct Activity {
    began: Instant,
    /// When something was last heard, in microseconds since then.
    heard_us: AtomicU64,
    /// Outputs that wait for their reader: that is the node's silence, not theirs.
    waiting: AtomicUsize,
    running: watch::Sender<usize>,
    /// How often it was found idle.
    idle: watch::Sender<u64>,
}

/// A command that runs. It keeps the sandbox from being at rest, until it is dropped.
#[derive(Debug)]
pub struct Busy {
    activity: Arc<Activity>,
    idle: watch::Receiver<u64>,
}

/// Ends the watch when dropped.
#[derive(Debug)]
pub struct Guard(tokio::task::AbortHandle);

// === impl Activity ===

impl Activity {
    pub fn new() -> Arc<Activity> {
        Arc::new(Activity {
            began: Instant::now(),
            heard_us: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            running: watch::Sender::new(0),
            idle: watch::Sender::new(0),
        })
    }

    /// A command begins.
    pub fn begin(self: &Arc<Activity>) -> Busy {
        self.heard();
        let busy = Busy { activity: self.clone(), idle: self.idle.subscribe() };
        self.running.send_modify(|running| *running += 1);
        busy
    }

    /// Something was printed, or given to a command's stdin.
    pub fn heard(&self) {
        self.heard_us.fetch_max(micros(self.began.elapsed()), Ordering::Relaxed);
    }

    /// Waits for the reader of an output that has just come.
    pub async fn waits<T>(&self, reader: impl Future<Output = T>) -> T {
        let waiting = Waiting::new(self);
        let taken = reader.await;
        drop(waiting);
        taken
    }

    /// Ends commands while they run and the sandbox is idle. `cpu_us` counts the processor time of all its processes so
    /// far; none where it cannot be told now. Nothing is watched where the wall limit comes first.
    pub fn watch<F>(
        self: &Arc<Activity>,
        policy: &Policy,
        cpu_us: impl Fn() -> F + Send + 'static,
    ) -> Option<Guard>
    where
        F: Future<Output = Option<u64>> + Send,
    {
        if policy.idle_ms >= policy.wall_ms {
            return None;
        }
        let (activity, mut silence) = (self.clone(), Silence::new(policy));
        let every = (silence.limit / 4).clamp(SOONEST, LATEST);
        let mut running = self.running.subscribe();
        let watching = tokio::spawn(async move {
            while running.wait_for(|running| *running > 0).await.is_ok() {
                tokio::time::sleep(every).await;
                if activity.waiting.load(Ordering::Relaxed) > 0 {
                    activity.heard();
                }
                if *running.borrow() == 0 {
                    continue;
                }
                let cpu_us = cpu_us().await;
                let heard = Duration::from_micros(activity.heard_us.load(Ordering::Relaxed));
                if silence.look(activity.began.elapsed(), heard, cpu_us) {
                    activity.heard();
                    activity.idle.send_modify(|times| *times += 1);
                }
            }
        });
        Some(Guard(watching.abort_handle()))
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.abort();
    }
}

// === impl Busy ===

impl Busy {
    /// Waits until the sandbox is found idle; for ever when it is not.
    pub async fn is_idle(&mut self) {
        if self.idle.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.activity.heard();
        self.activity.running.send_modify(|running| *running -= 1);
    }
}

struct Waiting<'a>(&'a Activity);

impl Waiting<'_> {
    fn new(activity: &Activity) -> Waiting<'_> {
        activity.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(activity)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        self.0.heard();
    }
}

// === the rule ===

/// How long nothing was done. Times are since the sandbox began.
#[derive(Debug)]
struct Silence {
    limit: Duration,
    /// Processor time that counts as work, over the whole limit.
    least_us: u64,
    since: Duration,
    /// Processor time since then.
    used_us: u64,
    /// What was counted at the last look.
    counted_us: u64,
}

impl Silence {
    fn new(policy: &Policy) -> Silence {
        let share_us = policy.idle_ms.saturating_mul(u64::from(policy.cpu_milli.min(1000)));
        Silence {
            limit: Duration::from_millis(policy.idle_ms),
            least_us: (share_us / PART).max(LEAST_US),
            since: Duration::ZERO,
            used_us: 0,
            counted_us: 0,
        }
    }

    /// Whether it has lasted as long as the limit.
    fn look(&mut self, now: Duration, heard: Duration, cpu_us: Option<u64>) -> bool {
        // Without a count nobody can say that it did nothing.
        let Some(cpu_us) = cpu_us else { return false };
        if heard > self.since {
            (self.since, self.used_us) = (heard, 0);
        }
        self.used_us = match cpu_us.checked_sub(self.counted_us) {
            Some(used_us) => self.used_us.saturating_add(used_us),
            // Where no cgroup counts, who ends unnoticed takes his time with him: somebody has worked.
            None => self.least_us,
        };
        self.counted_us = cpu_us;
        if self.used_us >= self.least_us {
            (self.since, self.used_us) = (now, 0);
        }
        now.saturating_sub(self.since) >= self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Network;

    fn policy(idle_ms: u64, cpu_milli: u32) -> Policy {
        Policy {
            wall_ms: 3_600_000,
            idle_ms,
            memory_bytes: 64 << 20,
            swap_bytes: 0,
            pids: 8,
            cpu_milli,
            disk_bytes: 1 << 20,
            inodes: 100,
            open_files: 64,
            output_bytes: 1000,
            output_bytes_per_s: 1 << 20,
            network: Network::None,
        }
    }

    /// When a sandbox is idle that is looked at each second, prints at `heard` and uses so much in each second.
    fn idle_at(policy: &Policy, heard: &[u64], cpu_us: impl Fn(u64) -> u64) -> Option<u64> {
        let (mut silence, mut sum) = (Silence::new(policy), 0);
        (1..=3600).find(|second| {
            sum += cpu_us(*second);
            let last = heard.iter().rfind(|at| *at <= second).copied().unwrap_or(0);
            silence.look(Duration::from_secs(*second), Duration::from_secs(last), Some(sum))
        })
    }

    #[test]
    fn silence_counts_from_the_last_word() {
        let policy = policy(60_000, 1000);
        assert_eq!(idle_at(&policy, &[], |_| 0), Some(60));
        assert_eq!(idle_at(&policy, &[50, 100, 159, 220], |_| 0), Some(219), "59 s, and then 60");
    }

    #[test]
    fn a_hundredth_of_its_processor_is_work_and_less_is_not() {
        assert_eq!(idle_at(&policy(60_000, 2000), &[], |_| 10_500), None);
        assert_eq!(idle_at(&policy(60_000, 2000), &[], |_| 9_500), Some(60));
        // Who may have a tenth of a core works with less.
        assert_eq!(idle_at(&policy(60_000, 100), &[], |_| 1_100), None);
        assert_eq!(idle_at(&policy(60_000, 100), &[], |_| 900), Some(60));
        // A burst now and then is as good as the same time in little pieces.
        assert_eq!(idle_at(&policy(60_000, 1000), &[], |s| if s % 50 == 0 { 600_000 } else { 0 }), None);
        assert_eq!(idle_at(&policy(60_000, 1000), &[], |s| if s == 50 { 600_000 } else { 0 }), Some(110));
    }

    #[test]
    fn a_job_held_to_the_least_share_is_not_idle_when_it_uses_it() {
        let least = policy(500, 10);
        assert!(least.usable().is_ok());
        let mut silence = Silence::new(&least);
        for step in 1..100 {
            let now = Duration::from_millis(125 * step);
            assert!(!silence.look(now, Duration::ZERO, Some(1250 * step)));
        }
    }

    #[test]
    fn what_cannot_be_counted_now_is_not_held_against_it() {
        let at = Duration::from_secs;
        let mut silence = Silence::new(&policy(10_000, 1000));
        assert!(!silence.look(at(50), at(0), None));
        assert!(silence.look(at(51), at(0), Some(0)));
        // A tenth of a second is work within this limit. Less is none, unless some of it went with those who ended.
        let mut silence = Silence::new(&policy(10_000, 1000));
        assert!(!silence.look(at(5), at(0), Some(90_000)));
        assert!(!silence.look(at(9), at(0), Some(80_000)));
        assert!(!silence.look(at(18), at(0), Some(80_000)));
        assert!(silence.look(at(19), at(0), Some(80_000)));
    }

    #[tokio::test]
    async fn a_sandbox_at_rest_is_not_idle_and_an_unread_word_is_the_node_s_silence() {
        let activity = Activity::new();
        let _watch = activity.watch(&policy(500, 1000), async || Some(0)).unwrap();
        tokio::time::sleep(Duration::from_millis(800)).await;
        let mut busy = activity.begin();
        let begun = Instant::now();
        activity.waits(tokio::time::sleep(Duration::from_millis(800))).await;
        busy.is_idle().await;
        let after = begun.elapsed().as_millis();
        assert!(after >= 1300, "{after} ms: neither the rest before it nor the wait in it count");
    }

    #[test]
    fn where_the_wall_limit_comes_first_nothing_is_watched() {
        let policy = Policy { wall_ms: 1000, ..policy(1000, 1000) };
        assert!(Activity::new().watch(&policy, async || Some(0)).is_none());
    }
}
