//! The free jobs of a day: whether this customer has one of this type left. What was accepted is counted by the store;
//! here what is on its way there counts, too, so that many requests at once do not pass the quota.

use std::collections::HashMap;

use crate::store::{self, DAY_MS, Store};

/// Free jobs that were begun on one day (UTC), by customer and skill.
#[derive(Debug, Default)]
pub(super) struct Quota {
    day: u64,
    begun: HashMap<(String, String), u64>,
}

impl Quota {
    /// Takes one of `most` for this day; false when none is left.
    pub(super) fn take(
        &mut self,
        store: &Store,
        customer: &str,
        skill: &str,
        most: u64,
        now_ms: u64,
    ) -> Result<bool, store::Error> {
        if most == 0 {
            return Ok(false);
        }
        let day = now_ms / DAY_MS;
        if day != self.day {
            *self = Quota { day, begun: HashMap::new() };
        }
        let key = (customer.to_owned(), skill.to_owned());
        let begun = match self.begun.get(&key) {
            Some(begun) => *begun,
            None => store.free_jobs(customer, skill, now_ms)?,
        };
        if begun < most {
            self.begun.insert(key, begun + 1);
        }
        Ok(begun < most)
    }

    /// The job that it was taken for was not written down.
    pub(super) fn give_back(&mut self, customer: &str, skill: &str) {
        if let Some(begun) = self.begun.get_mut(&(customer.to_owned(), skill.to_owned())) {
            *begun = begun.saturating_sub(1);
        }
    }
}
