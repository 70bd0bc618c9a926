//! Percentiles for the benches, by nearest rank. It measures nothing.

/// The median; NaN of nothing.
pub fn p50(times: &mut [f64]) -> f64 {
    rank(times, 0.50)
}

pub fn p99(times: &mut [f64]) -> f64 {
    rank(times, 0.99)
}

/// Sorts, and takes the smallest value that at least `share` of all do not exceed.
pub fn rank(times: &mut [f64], share: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    let place = (share * times.len() as f64).ceil() as usize;
    times.get(place.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let mut times: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!((p50(&mut times), p99(&mut times)), (50.0, 99.0));
        assert_eq!(p99(&mut [7.0]), 7.0);
        assert!(p50(&mut []).is_nan());
    }
}
