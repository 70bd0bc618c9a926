//! The flags that name a period: `--from`, `--to`, `--last`, `--tz`. It is `[from, to)`, and its days are the
//! zone's.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan, Zoned};

use super::exit::{Exit, Failure};
use crate::clock;
use crate::ledger::report::Window;

#[derive(Debug, Clone, clap::Args)]
pub struct Span {
    /// Start of the period, inclusive: 2026-11-01, 2026-11-01T12:00, or with an offset [default: the first entry]
    #[arg(long, value_name = "TIME")]
    pub from: Option<String>,
    /// End of the period, exclusive [default: none]
    #[arg(long, value_name = "TIME")]
    pub to: Option<String>,
    /// The last days, weeks or months, including today: 7d, 4w, 3mo (this month and the two before)
    #[arg(long, value_name = "TIME", conflicts_with_all = ["from", "to"])]
    pub last: Option<String>,
    /// Time zone of the days and of times without an offset: Europe/Berlin, UTC, … [default: this machine's]
    #[arg(long, value_name = "ZONE")]
    pub tz: Option<String>,
}

impl Span {
    pub fn window(&self) -> Result<Window, Failure> {
        self.window_at(clock::now_ms())
    }

    fn window_at(&self, now_ms: u64) -> Result<Window, Failure> {
        let bad = |words: String| Failure::say(Exit::Usage, words);
        let zone = match &self.tz {
            Some(name) => TimeZone::get(name).map_err(|e| bad(format!("--tz {name}: {e}")))?,
            None => this_machines()?,
        };
        let at = |flag: &str, text: &Option<String>, otherwise: u64| {
            match text {
            None => Ok(otherwise),
            Some(text) => moment(text, &zone).ok_or_else(|| {
                bad(format!("--{flag} {text}: not a time; expected 2026-11-28, 2026-11-28T14:00 or 2026-11-28T14:00:00Z"))
            }),
        }
        };
        let (from_ms, to_ms) = match &self.last {
            None => (at("from", &self.from, 0)?, at("to", &self.to, u64::MAX)?),
            Some(text) => {
                let words = || bad(format!("--last {text}: expected a number and d, w or mo, such as 7d"));
                (first_of_last(text, now_ms, &zone).ok_or_else(words)?, u64::MAX)
            }
        };
        if from_ms > to_ms {
            return Err(bad("--from is after --to".into()));
        }
        Ok(Window { from_ms, to_ms, zone })
    }
}

/// The zone that `TZ` names, or else `/etc/localtime`; a machine without either keeps UTC.
fn this_machines() -> Result<TimeZone, Failure> {
    const SET: &str = "/etc/localtime";
    TimeZone::try_system().or_else(|error| {
        let named = match std::env::var_os("TZ") {
            Some(name) => format!("TZ={}", name.to_string_lossy()),
            None if std::path::Path::new(SET).exists() => SET.to_owned(),
            None => return Ok(TimeZone::UTC),
        };
        let words =
            format!("{named} is not a time zone that this machine knows ({error}): set TZ, or give --tz");
        Err(Failure::say(Exit::Config, words))
    })
}

/// Unix milliseconds at which the last days, weeks or months begin, the present one with them.
fn first_of_last(text: &str, now_ms: u64, zone: &TimeZone) -> Option<u64> {
    let unit = text.find(|c: char| !c.is_ascii_digit())?;
    let (count, unit) = text.split_at(unit);
    let count = count.parse::<i64>().ok().filter(|count| (1..=10_000).contains(count))?;
    let today = Timestamp::from_millisecond(i64::try_from(now_ms).ok()?).ok()?.to_zoned(zone.clone()).date();
    let first = match unit {
        "d" => today.checked_sub((count - 1).days()).ok()?,
        "w" => today.checked_sub((count * 7 - 1).days()).ok()?,
        "mo" => today.first_of_month().checked_sub((count - 1).months()).ok()?,
        _ => return None,
    };
    u64::try_from(first.to_zoned(zone.clone()).ok()?.timestamp().as_millisecond()).ok()
}

/// Unix milliseconds. A date is its first moment in the zone.
fn moment(text: &str, zone: &TimeZone) -> Option<u64> {
    let at = match (text.parse::<Zoned>(), text.parse::<Timestamp>()) {
        (Ok(zoned), _) => zoned.timestamp(),
        (_, Ok(timestamp)) => timestamp,
        _ => text.parse::<DateTime>().ok()?.to_zoned(zone.clone()).ok()?.timestamp(),
    };
    u64::try_from(at.as_millisecond()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(from: &str, to: &str, tz: &str) -> Span {
        Span { from: Some(from.into()), to: Some(to.into()), last: None, tz: Some(tz.into()) }
    }

    #[test]
    fn the_last_days_and_months_begin_at_their_first_moment_in_the_zone() {
        // 2026-11-28 23:45:12 UTC: the 29th in Berlin.
        let now_ms = 1_795_909_512_000;
        let last = |last: &str, tz: &str| {
            let span = Span { from: None, to: None, last: Some(last.into()), tz: Some(tz.into()) };
            span.window_at(now_ms).map(|w| clock::utc(w.from_ms)).map_err(|e| e.error.to_string())
        };
        assert_eq!(last("1d", "UTC").unwrap(), "2026-11-28 00:00:00 UTC");
        assert_eq!(last("7d", "UTC").unwrap(), "2026-11-22 00:00:00 UTC");
        assert_eq!(last("1w", "UTC").unwrap(), "2026-11-22 00:00:00 UTC");
        assert_eq!(last("1d", "Europe/Berlin").unwrap(), "2026-11-28 23:00:00 UTC");
        assert_eq!(last("1mo", "UTC").unwrap(), "2026-11-01 00:00:00 UTC");
        assert_eq!(last("3mo", "Europe/Berlin").unwrap(), "2026-08-31 22:00:00 UTC");
        for bad in ["", "7", "d", "0d", "7x", "-7d", "99999999999999999999d"] {
            assert!(last(bad, "UTC").unwrap_err().contains("--last"), "{bad}");
        }
    }

    #[test]
    fn a_day_is_as_long_as_its_zone_makes_it() {
        let window = |from, to, tz| span(from, to, tz).window().map(|w| (w.from_ms, w.to_ms)).unwrap();
        let hours = |(from, to): (u64, u64)| (to - from) / 3_600_000;
        assert_eq!(window("2026-11-01", "2026-11-02", "UTC"), (1_793_491_200_000, 1_793_577_600_000));
        assert_eq!(hours(window("2026-03-29", "2026-03-30", "Europe/Berlin")), 23);
        assert_eq!(hours(window("2026-10-25", "2026-10-26", "Europe/Berlin")), 25);
        let exact = window("2026-11-01T12:30+05:45", "2026-11-01T08:00:00Z", "UTC");
        assert_eq!(exact, (1_793_515_500_000, 1_793_520_000_000));
    }

    #[test]
    fn what_is_no_span_is_refused_with_the_flag() {
        for (span, why) in [
            (span("yesterday", "2026-11-02", "UTC"), "--from"),
            (span("2026-11-01", "2026-13-02", "UTC"), "--to"),
            (span("2026-11-03", "2026-11-02", "UTC"), "after"),
            (span("2026-11-01", "2026-11-02", "Mars/Olympus"), "--tz"),
        ] {
            let refused = span.window().unwrap_err();
            assert!(refused.error.to_string().contains(why), "{}", refused.error);
        }
    }
}
