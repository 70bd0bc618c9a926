//! What a job costs: figures by job type, the arithmetic of estimate and charge, and the ways to pay. Pure, in whole
//! millisatoshi; fractions are the customer's. Who pays how is the operator's word, in `config`.

use serde::{Deserialize, Serialize};

/// The largest figure of a price: one bitcoin, in msat.
pub const MOST_MSAT: u64 = 100_000_000_000;
const GIB_HOUR: u128 = (1 << 30) * 3_600_000;

/// What a job of one type costs. All figures 0: nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Price {
    pub base_msat: u64,
    /// A second of the sandbox's life.
    pub per_second_msat: u64,
    /// 1,000 tokens read by a model.
    pub per_1k_tokens_in_msat: u64,
    /// 1,000 tokens written by a model.
    pub per_1k_tokens_out_msat: u64,
    /// A GiB of memory granted for an hour.
    pub per_gib_hour_msat: u64,
    /// The least that a delivered job costs.
    pub minimum_msat: u64,
    /// The most that a job may cost; 0 = no ceiling.
    pub ceiling_msat: u64,
    /// Jobs of a customer that cost nothing, each day (UTC).
    pub free_jobs_per_day: u64,
}

/// How a job is paid for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// Not at all.
    #[default]
    Free,
    /// From credit paid ahead; without enough of it there is no job.
    Credit,
    /// From credit; what is missing is asked for by an invoice before the job begins.
    Invoice,
    /// From credit, which may go this far below zero.
    Line { cap_msat: u64 },
    /// As a line; the result brings an invoice over what no credit covered, and so does a request beyond the line.
    After { cap_msat: u64 },
}

/// The terms on which a request is taken. They are written down with it: neither a restart nor another price list
/// changes them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    pub way: Way,
    pub price: Price,
    /// What the job costs at most; 0: nothing is asked.
    pub most_msat: u64,
    /// It is one of the customer's free jobs of its day.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub of_quota: bool,
}

/// What is charged for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Metered {
    pub wall_ms: u64,
    /// Memory granted, bytes.
    pub memory_bytes: u64,
    pub tokens_in: u64,
    pub tokens_out: u64,
}

impl Price {
    /// Whether jobs of this type cost anything at all.
    pub fn is_free(&self) -> bool {
        let Price { base_msat, per_second_msat, minimum_msat, per_gib_hour_msat, .. } = self;
        let tokens = [self.per_1k_tokens_in_msat, self.per_1k_tokens_out_msat];
        [*base_msat, *per_second_msat, *minimum_msat, *per_gib_hour_msat] == [0; 4] && tokens == [0; 2]
    }

    /// The charge for what was used, msat. The same figures over the most that may be used make the hold.
    pub fn of(&self, used: &Metered) -> u64 {
        if self.is_free() {
            return 0;
        }
        // What does not fit 128 bits is above any ceiling.
        let per = |figure: u64, amount: u128, unit: u128| u128::from(figure).saturating_mul(amount) / unit;
        let [wall_ms, memory, tokens_in, tokens_out] =
            [used.wall_ms, used.memory_bytes, used.tokens_in, used.tokens_out].map(u128::from);
        let sum = u128::from(self.base_msat)
            .saturating_add(per(self.per_second_msat, wall_ms, 1_000))
            .saturating_add(per(self.per_1k_tokens_in_msat, tokens_in, 1_000))
            .saturating_add(per(self.per_1k_tokens_out_msat, tokens_out, 1_000))
            .saturating_add(per(self.per_gib_hour_msat, memory.saturating_mul(wall_ms), GIB_HOUR));
        let ceiling = if self.ceiling_msat == 0 { MOST_MSAT } else { self.ceiling_msat };
        let sum = u64::try_from(sum).unwrap_or(u64::MAX);
        sum.max(self.minimum_msat).min(ceiling)
    }

    /// What is wrong with the figures: the key and why.
    pub fn fault(&self) -> Option<(&'static str, String)> {
        let figures = [
            ("base_msat", self.base_msat),
            ("per_second_msat", self.per_second_msat),
            ("per_1k_tokens_in_msat", self.per_1k_tokens_in_msat),
            ("per_1k_tokens_out_msat", self.per_1k_tokens_out_msat),
            ("per_gib_hour_msat", self.per_gib_hour_msat),
            ("minimum_msat", self.minimum_msat),
            ("ceiling_msat", self.ceiling_msat),
        ];
        if let Some((key, _)) = figures.iter().find(|(_, msat)| *msat > MOST_MSAT) {
            return Some((key, format!("above {MOST_MSAT} msat")));
        }
        let over = self.ceiling_msat > 0 && self.minimum_msat > self.ceiling_msat;
        over.then(|| ("minimum_msat", "above ceiling_msat".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_figure_is_charged_for_what_it_says() {
        let used = Metered { wall_ms: 90_500, memory_bytes: 2 << 30, tokens_in: 1_500, tokens_out: 500 };
        let price = |f: fn(&mut Price)| {
            let mut price = Price::default();
            f(&mut price);
            price.of(&used)
        };
        assert_eq!(price(|p| p.base_msat = 7), 7);
        assert_eq!(price(|p| p.per_second_msat = 10), 905);
        assert_eq!(price(|p| p.per_1k_tokens_in_msat = 9), 13, "13.5 is 13");
        assert_eq!(price(|p| p.per_1k_tokens_out_msat = 9), 4);
        assert_eq!(price(|p| p.per_gib_hour_msat = 3_600_000), 181_000);
        assert_eq!(price(|p| (p.base_msat, p.minimum_msat) = (7, 50)), 50);
        assert_eq!(price(|p| (p.per_second_msat, p.ceiling_msat) = (10, 900)), 900);
        assert_eq!(price(|p| p.ceiling_msat = 900), 0, "a ceiling alone is no price");
    }

    proptest! {
        #[test]
        fn less_use_never_costs_more_and_nothing_costs_more_than_its_ceiling(
            figures in proptest::array::uniform7(0..=MOST_MSAT),
            wall_ms in 0..=u64::MAX, memory_bytes in 0..=u64::MAX, tokens in 0..=u64::MAX, less in 0..100_u64,
        ) {
            let [base, second, t_in, t_out, gib, minimum, ceiling] = figures;
            let price = Price {
                base_msat: base, per_second_msat: second, per_1k_tokens_in_msat: t_in,
                per_1k_tokens_out_msat: t_out, per_gib_hour_msat: gib,
                minimum_msat: minimum.min(ceiling), ceiling_msat: ceiling, free_jobs_per_day: 0,
            };
            let most = Metered { wall_ms, memory_bytes, tokens_in: tokens, tokens_out: tokens };
            let part = |n: u64| u64::try_from(u128::from(n) * u128::from(less) / 100).unwrap();
            let used = Metered { wall_ms: part(wall_ms), memory_bytes, tokens_in: part(tokens), tokens_out: part(tokens) };
            prop_assert!(price.of(&used) <= price.of(&most));
            let ceiling = if ceiling == 0 { MOST_MSAT } else { ceiling };
            prop_assert!(price.of(&most) <= ceiling);
        }
    }
}
