//! Filling a gap in a relay's history page by page: which page to ask next, and when it is whole. Pure; the asking
//! is `follow.rs`'s.
//!
//! Relays send the newest events first and cut a page at a length they do not always tell, so a page is never
//! taken for the last one because it is short: the next is asked until one brings nothing older.

use std::collections::VecDeque;

use nostr_sdk::prelude::{Filter, Timestamp};

/// Pages asked in one fill before it is called endless.
const MAX_PAGES: u32 = 5_000;

/// What one page brought.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) count: usize,
    /// Unix seconds of the oldest event in it, as claimed.
    pub(super) oldest: u64,
}

impl Page {
    pub(super) fn note(&mut self, created_at: u64) {
        self.oldest = if self.count == 0 { created_at } else { self.oldest.min(created_at) };
        self.count += 1;
    }
}

#[derive(Debug)]
pub(super) struct Fill {
    /// One after the other: a page of two filters at once has no one oldest event.
    filters: VecDeque<Filter>,
    since: u64,
    until: Option<u64>,
    limit: usize,
    largest: usize,
    pages: u32,
    /// Seconds so full that a part of them cannot be asked for.
    pub(super) crowded: u32,
}

impl Fill {
    /// Everything that matches one of the filters, from `since` (Unix seconds) on, `limit` a page.
    pub(super) fn new(filters: Vec<Filter>, since: u64, limit: usize) -> Self {
        let filters = filters.into();
        Self { filters, since, until: None, limit: limit.max(1), largest: 0, pages: 0, crowded: 0 }
    }

    /// The page to ask now; `None`: the gap is filled.
    pub(super) fn next(&self) -> Option<Filter> {
        let filter = self.filters.front()?.clone().since(Timestamp::from(self.since)).limit(self.limit);
        Some(match self.until {
            Some(until) => filter.until(Timestamp::from(until)),
            None => filter,
        })
    }

    /// The page is whole. `false`: this relay has no end.
    pub(super) fn page(&mut self, page: Page) -> bool {
        self.pages += 1;
        let largest = self.largest.max(page.count);
        let older = page.count > 0 && self.until.is_none_or(|until| page.oldest < until);
        // A page as long as any, all in one second: the rest of that second cannot be asked for.
        let stuck = page.count > 0 && !older && page.count >= largest;
        self.largest = largest;
        if older {
            self.until = Some(page.oldest);
        } else if stuck && page.oldest > self.since {
            self.crowded += u32::from(page.count > 1);
            self.until = Some(page.oldest - 1);
        } else {
            self.filters.pop_front();
            self.until = None;
            self.largest = 0;
        }
        self.pages < MAX_PAGES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nostr_sdk::prelude::Kind;

    /// A relay with events at these seconds, of two kinds, that cuts pages silently.
    fn ask(events: &[(u64, u16)], cut: usize, filter: &Filter) -> Vec<(u64, u16)> {
        let (since, until) =
            (filter.since.unwrap().as_secs(), filter.until.map_or(u64::MAX, |u| u.as_secs()));
        let kinds = filter.kinds.clone().unwrap();
        let mut found: Vec<_> = events
            .iter()
            .copied()
            .filter(|(at, kind)| (since..=until).contains(at) && kinds.contains(&Kind::Custom(*kind)))
            .collect();
        found.sort_by(|a, b| b.cmp(a));
        found.truncate(cut.min(filter.limit.unwrap()));
        found
    }

    fn run(events: &[(u64, u16)], cut: usize, since: u64) -> (Vec<(u64, u16)>, u32, u32) {
        let filters = [5000, 5].map(|kind| Filter::new().kind(Kind::Custom(kind))).to_vec();
        let mut fill = Fill::new(filters, since, 500);
        let mut got = Vec::new();
        while let Some(filter) = fill.next() {
            let mut page = Page::default();
            for event in ask(events, cut, &filter) {
                page.note(event.0);
                got.push(event);
            }
            assert!(fill.page(page), "endless");
        }
        got.sort();
        got.dedup();
        (got, fill.pages, fill.crowded)
    }

    #[test]
    fn a_long_gap_is_filled_whole_whatever_the_length_of_a_page() {
        let events: Vec<_> = (0..1000).map(|n| (10_000 + n / 2, if n % 3 == 0 { 5 } else { 5000 })).collect();
        for cut in [3, 10, 499, 5000] {
            assert_eq!(
                run(&events, cut, 0).0.len(),
                events.iter().collect::<std::collections::HashSet<_>>().len(),
                "{cut}"
            );
        }
    }

    #[test]
    fn a_quiet_relay_is_asked_once_a_filter() {
        assert_eq!(run(&[], 500, 0), (vec![], 2, 0));
    }

    #[test]
    fn a_second_fuller_than_a_page_is_passed_and_told() {
        let mut events: Vec<_> = (0..50).map(|_| (700, 5000)).collect();
        events.extend([(600, 5000), (800, 5000)]);
        let (got, _, crowded) = run(&events, 10, 0);
        assert_eq!(got, [(600, 5000), (700, 5000), (800, 5000)]);
        assert_eq!(crowded, 1);
    }

    #[test]
    fn a_relay_without_end_is_left() {
        let mut fill = Fill::new(vec![Filter::new()], 0, 500);
        let mut at = 1_000_000;
        let endless = (0..10_000).find(|_| {
            at -= 1;
            !fill.page(Page { count: 1, oldest: at })
        });
        assert!(endless.is_some());
    }
}
