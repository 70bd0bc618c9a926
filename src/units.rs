//! Figures with their unit, as people write them: `5sat`, `15m`, `2GiB`. One reader for flags and configuration, and
//! the writer that it reads back. Money stays whole millisatoshi: what does not come out whole is refused.

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Millisatoshi.
    Msat,
    /// Milliseconds.
    Ms,
    Bytes,
}

/// Why a text is no figure. It repeats the text, cut.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{0:?} is not a number with a unit ({1})")]
    NoFigure(String, &'static str),
    #[error("{0:?} is not a whole number of {1}")]
    NotWhole(String, &'static str),
    #[error("{0:?} is too large")]
    TooLarge(String),
}

/// Longest text read, bytes.
const MAX_LEN: usize = 64;

impl Unit {
    /// By the end of a configuration key: `wall_ms`, `memory_bytes`, `customer_day_msat`.
    pub fn of_key(key: &str) -> Option<Unit> {
        let ends = |ends: &[&str]| ends.iter().any(|end| key.ends_with(end));
        match key {
            _ if ends(&["_ms"]) => Some(Unit::Ms),
            _ if ends(&["_bytes", "_bytes_per_s"]) => Some(Unit::Bytes),
            _ if ends(&["_msat"]) => Some(Unit::Msat),
            _ => None,
        }
    }

    /// Names that are read, and what they stand for; the first of equal ones is written. Largest last.
    fn names(self) -> &'static [(&'static str, u64)] {
        match self {
            Unit::Msat => &[("msat", 1), ("sat", 1_000), ("sats", 1_000), ("btc", 100_000_000_000)],
            Unit::Ms => &[
                ("ms", 1),
                ("s", 1_000),
                ("m", 60_000),
                ("min", 60_000),
                ("h", 3_600_000),
                ("d", 86_400_000),
            ],
            Unit::Bytes => &[
                ("b", 1),
                ("kb", 1_000),
                ("kib", 1 << 10),
                ("mb", 1_000_000),
                ("mib", 1 << 20),
                ("gb", 1_000_000_000),
                ("gib", 1 << 30),
                ("tb", 1_000_000_000_000),
                ("tib", 1 << 40),
            ],
        }
    }

    /// For messages: some figures that are read.
    pub fn examples(self) -> &'static str {
        match self {
            Unit::Msat => "5sat, 5000msat",
            Unit::Ms => "90s, 15m, 2h, 1d",
            Unit::Bytes => "512KiB, 100MB, 2GiB",
        }
    }

    /// Reads a figure; a bare number counts `bare` of the smallest unit.
    ///
    /// # Errors
    /// No figure, one that is not whole, or more than 64 bits hold.
    pub fn read(self, text: &str, bare: u64) -> Result<u64, Error> {
        let shown = || text.chars().take(MAX_LEN).collect::<String>();
        let none = || Error::NoFigure(shown(), self.examples());
        let trimmed = text.trim();
        if trimmed.len() > MAX_LEN {
            return Err(none());
        }
        let end =
            trimmed.find(|c: char| !c.is_ascii_digit() && c != '_' && c != '.').unwrap_or(trimmed.len());
        let (number, name) = trimmed.split_at(end);
        let name = name.trim().to_ascii_lowercase();
        let scale = match name.as_str() {
            "" => bare,
            name => self.names().iter().find(|(known, _)| *known == name).ok_or_else(none)?.1,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = |text: &str| text.replace('_', "");
        let (whole, fraction) = (digits(whole), digits(fraction));
        if whole.is_empty() || fraction.contains('.') || (number.contains('.') && fraction.is_empty()) {
            return Err(none());
        }
        let large = || Error::TooLarge(shown());
        let whole: u128 = whole.parse().map_err(|_| large())?;
        // A fraction longer than any scale has zeros cannot come out whole unless it ends in zeros.
        let fraction = fraction.trim_end_matches('0');
        let not_whole = || Error::NotWhole(shown(), self.smallest());
        let part = match u32::try_from(fraction.len()) {
            Ok(0) => 0,
            Ok(places @ 1..=15) => {
                let tens = 10_u128.pow(places);
                let scaled = fraction.parse::<u128>().map_err(|_| none())? * u128::from(scale);
                if scaled % tens != 0 {
                    return Err(not_whole());
                }
                scaled / tens
            }
            _ => return Err(not_whole()),
        };
        let sum = whole.checked_mul(u128::from(scale)).and_then(|whole| whole.checked_add(part));
        sum.and_then(|sum| u64::try_from(sum).ok()).ok_or_else(large)
    }

    fn smallest(self) -> &'static str {
        match self {
            Unit::Msat => "msat",
            Unit::Ms => "milliseconds",
            Unit::Bytes => "bytes",
        }
    }

    /// In the largest unit that needs no fraction, so that it can be read back: `15m`, `2GiB`, `5sat`.
    pub fn write(self, figure: u64) -> String {
        let written = |(name, _): &&(&str, u64)| match self {
            Unit::Bytes => *name == "b" || name.ends_with("ib"),
            Unit::Ms => *name != "min",
            Unit::Msat => matches!(*name, "msat" | "sat"),
        };
        let fits = |(_, scale): &&(&str, u64)| figure > 0 && figure.is_multiple_of(*scale);
        let (name, scale) = self.names().iter().filter(written).rfind(fits).copied().unwrap_or_else(|| {
            // Zero has no unit of its own.
            self.names().first().copied().unwrap_or(("", 1))
        });
        let name = match name {
            "b" => "B".to_owned(),
            name => match name.strip_suffix("ib") {
                Some(prefix) => format!("{}iB", prefix.to_ascii_uppercase()),
                None => name.to_owned(),
            },
        };
        format!("{}{name}", figure / scale)
    }
}

/// Msat; a bare number counts msat.
///
/// # Errors
/// As [`Unit::read`].
pub fn msat(text: &str) -> Result<u64, Error> {
    Unit::Msat.read(text, 1)
}

/// Whole seconds; a bare number counts seconds.
///
/// # Errors
/// As [`Unit::read`].
pub fn seconds(text: &str) -> Result<u64, Error> {
    let ms = Unit::Ms.read(text, 1_000)?;
    if ms.is_multiple_of(1_000) { Ok(ms / 1_000) } else { Err(Error::NotWhole(text.to_owned(), "seconds")) }
}

/// Whole MiB; a bare number counts MiB.
///
/// # Errors
/// As [`Unit::read`].
pub fn mebibytes(text: &str) -> Result<u64, Error> {
    let bytes = Unit::Bytes.read(text, 1 << 20)?;
    if bytes.is_multiple_of(1 << 20) { Ok(bytes >> 20) } else { Err(Error::NotWhole(text.to_owned(), "MiB")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_with_their_unit_and_a_bare_number_keeps_its_meaning() {
        for (text, msat) in
            [("5sat", 5_000), ("5 sats", 5_000), ("5000", 5_000), ("1.5sat", 1_500), ("0.00000001btc", 1_000)]
        {
            assert_eq!(super::msat(text), Ok(msat), "{text}");
        }
        for (text, s) in [("15m", 900), ("900", 900), ("2h", 7_200), ("1d", 86_400), ("1.5min", 90)] {
            assert_eq!(seconds(text), Ok(s), "{text}");
        }
        for (text, mib) in [("512", 512), ("2GiB", 2_048), ("0.5 gib", 512), ("1048576B", 1)] {
            assert_eq!(mebibytes(text), Ok(mib), "{text}");
        }
        assert_eq!(Unit::Bytes.read("1_000", 1), Ok(1_000));
    }

    #[test]
    fn what_is_no_figure_or_not_whole_is_refused_with_the_reason() {
        for text in ["", "sat", "-5sat", "5 bananas", "1.2.3s", "1.", ".", "5e3", "٥sat", &"9".repeat(65)] {
            let why = msat(text).unwrap_err().to_string();
            assert!(why.contains("not a number with a unit (5sat"), "{text}: {why}");
        }
        assert!(msat("0.0001sat").unwrap_err().to_string().contains("whole number of msat"));
        assert!(seconds("1500ms").unwrap_err().to_string().contains("whole number of seconds"));
        assert!(mebibytes("1KiB").unwrap_err().to_string().contains("whole number of MiB"));
        assert!(msat("999999999999999999999btc").unwrap_err().to_string().contains("too large"));
        assert_eq!(
            Unit::Bytes.read("18446744073709551616", 1),
            Err(Error::TooLarge("18446744073709551616".into()))
        );
    }

    #[test]
    fn what_is_written_is_read_back() {
        for (unit, figure, text) in [
            (Unit::Ms, 900_000, "15m"),
            (Unit::Ms, 90_500, "90500ms"),
            (Unit::Ms, 86_400_000, "1d"),
            (Unit::Bytes, 2 << 30, "2GiB"),
            (Unit::Bytes, 1_000, "1000B"),
            (Unit::Msat, 5_000, "5sat"),
            (Unit::Msat, 1, "1msat"),
            (Unit::Msat, 0, "0msat"),
        ] {
            assert_eq!(unit.write(figure), text);
            assert_eq!(unit.read(text, 7), Ok(figure));
        }
    }
}
