//! What running jobs have printed so far, for the node's owner: the newest part of each, in memory only. The whole log
//! is kept by `job` when a job has ended.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Kept of one job, bytes; up to twice as much while it grows.
const MOST: usize = 256 << 10;

/// The running jobs' output, by job.
#[derive(Debug, Default)]
pub struct Live(Mutex<HashMap<String, Vec<u8>>>);

/// One running job's side. Dropping it forgets what was printed.
#[derive(Debug)]
pub struct Feed<'a> {
    live: &'a Live,
    job: &'a str,
}

impl Live {
    /// From now on the job is running, and has printed nothing.
    pub fn begin<'a>(&'a self, job: &'a str) -> Feed<'a> {
        self.lock().insert(job.to_owned(), Vec::new());
        Feed { live: self, job }
    }

    /// What the job has printed, or its end. `None`: it is not running.
    pub fn read(&self, job: &str) -> Option<Vec<u8>> {
        let jobs = self.lock();
        let printed = jobs.get(job)?;
        printed.get(printed.len().saturating_sub(MOST)..).map(<[u8]>::to_vec)
    }

    /// It holds bytes for a reader; after a panic they are as good as before.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Feed<'_> {
    pub fn push(&self, bytes: &[u8]) {
        let mut jobs = self.live.lock();
        let Some(printed) = jobs.get_mut(self.job) else { return };
        printed.extend_from_slice(bytes);
        if printed.len() >= 2 * MOST {
            printed.drain(..printed.len() - MOST);
        }
    }
}

impl Drop for Feed<'_> {
    fn drop(&mut self) {
        self.live.lock().remove(self.job);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_output_of_a_running_job_is_there_until_it_ends() {
        let live = Live::default();
        assert_eq!(live.read("a"), None);
        let feed = live.begin("a");
        feed.push(b"$ make\n");
        assert_eq!(live.read("a").as_deref(), Some(&b"$ make\n"[..]));
        (0..5_000).for_each(|_| feed.push(&[b'x'; 1_000]));
        feed.push(b"end");
        let printed = live.read("a").unwrap();
        assert!(printed.len() == MOST && printed.ends_with(b"xend"));
        drop(feed);
        assert_eq!(live.read("a"), None);
    }
}
