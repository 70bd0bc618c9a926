//! The waiting room: bounded, and fair between customers whatever one of them sends. It orders ids; it
//! knows nothing of what a job is.

use std::collections::{HashMap, VecDeque};

/// Round robin over customers, first come first served within one.
#[derive(Debug, Default)]
pub struct Queue {
    turns: VecDeque<String>,
    waiting: HashMap<String, VecDeque<String>>,
    len: usize,
}

impl Queue {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn push(&mut self, customer: &str, job: String) {
        let jobs = self.waiting.entry(customer.to_string()).or_default();
        if jobs.is_empty() {
            self.turns.push_back(customer.to_string());
        }
        jobs.push_back(job);
        self.len += 1;
    }

    /// The next job of a customer who `may` run one more; its customer goes to the end of the line.
    pub fn pop(&mut self, may: impl Fn(&str) -> bool) -> Option<String> {
        let turn = self.turns.iter().position(|customer| may(customer))?;
        let customer = self.turns.remove(turn)?;
        let jobs = self.waiting.get_mut(&customer)?;
        let job = jobs.pop_front()?;
        self.len -= 1;
        if jobs.is_empty() {
            self.waiting.remove(&customer);
        } else {
            self.turns.push_back(customer);
        }
        Some(job)
    }

    /// Takes a waiting job out; false when it does not wait here.
    pub fn remove(&mut self, customer: &str, job: &str) -> bool {
        let Some(jobs) = self.waiting.get_mut(customer) else { return false };
        let Some(at) = jobs.iter().position(|j| j == job) else { return false };
        jobs.remove(at);
        self.len -= 1;
        if jobs.is_empty() {
            self.waiting.remove(customer);
            self.turns.retain(|c| c != customer);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_customer_with_many_jobs_does_not_keep_another_waiting() {
        let mut queue = Queue::default();
        for job in ["a1", "a2", "a3"] {
            queue.push("a", job.into());
        }
        queue.push("b", "b1".into());
        let order: Vec<_> = std::iter::from_fn(|| queue.pop(|_| true)).collect();
        assert_eq!(order, ["a1", "b1", "a2", "a3"]);
        assert!(queue.is_empty());
    }

    #[test]
    fn a_removed_job_is_gone_and_the_rest_keep_their_turns() {
        let mut queue = Queue::default();
        queue.push("a", "a1".into());
        queue.push("b", "b1".into());
        queue.push("a", "a2".into());
        assert!(queue.remove("a", "a1"));
        assert!(!queue.remove("a", "a1"));
        assert!(queue.remove("b", "b1"));
        assert_eq!(queue.len(), 1);
        assert_eq!(queue.pop(|_| true).as_deref(), Some("a2"));
        assert_eq!(queue.pop(|_| true), None);
    }

    #[test]
    fn a_customer_at_its_limit_is_passed_over_and_keeps_its_place() {
        let mut queue = Queue::default();
        queue.push("a", "a1".into());
        queue.push("b", "b1".into());
        assert_eq!(queue.pop(|c| c != "a").as_deref(), Some("b1"));
        assert_eq!(queue.pop(|c| c != "a"), None);
        assert_eq!(queue.pop(|_| true).as_deref(), Some("a1"));
    }
}
