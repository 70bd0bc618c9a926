//! Side fields of a wallet's answer, read as far as they can be: what is odd is left empty and never refuses the answer.
//! What decides about money (hash, state, amount, direction) is read strictly, by each wallet's own file.

use serde_json::Value;

use super::MAX_MSAT;

/// A text that is not empty.
pub(super) fn text<'a>(value: &'a Value, name: &str) -> Option<&'a str> {
    value.get(name).and_then(Value::as_str).map(str::trim).filter(|text| !text.is_empty())
}

/// Unix seconds after 0: a number, a number as text, or a date as LNbits writes it.
pub(super) fn time(value: &Value, name: &str) -> Option<u64> {
    let seconds = match value.get(name)? {
        Value::Number(number) => number.as_u64().or_else(|| floor(number.as_f64()?)),
        Value::String(text) => {
            let text = text.trim();
            text.parse().ok().or_else(|| floor(text.parse().ok()?)).or_else(|| unix_s(text))
        }
        _ => None,
    };
    seconds.filter(|at| *at != 0)
}

/// A fee in msat, whatever its sign; `None` where it is not told. It gets into books, so only a whole number is one.
pub(super) fn fee(value: &Value, name: &str) -> Option<u64> {
    let fee = value.get(name).and_then(Value::as_i64).map(i64::unsigned_abs);
    fee.filter(|fee| *fee <= MAX_MSAT)
}

/// A whole count; `None` where it is not told.
pub(super) fn count(value: &Value, name: &str) -> Option<u64> {
    match value.get(name)? {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// Whole seconds of a float that is one.
fn floor(number: f64) -> Option<u64> {
    // Up to 2^53 a float is exact.
    (number.is_finite() && (0.0..9.0e15).contains(&number)).then_some(number as u64)
}

/// Unix seconds of `2026-11-21T20:41:00.123456+00:00`. Without an offset it is UTC; other offsets are not read.
fn unix_s(text: &str) -> Option<u64> {
    let (date, time) = text.split_once(['T', ' '])?;
    let time = time.strip_suffix("+00:00").or_else(|| time.strip_suffix('Z')).unwrap_or(time);
    let time = time.split('.').next()?;
    let parts = |text: &str, sign: char| -> Option<[u64; 3]> {
        let mut parts = text.split(sign).map(|part| part.parse::<u64>().ok());
        let three = [parts.next()??, parts.next()??, parts.next()??];
        parts.next().is_none().then_some(three)
    };
    let ([year, month, day], [hour, minute, second]) = (parts(date, '-')?, parts(time, ':')?);
    let sane = (1970..=9999).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
    if !sane || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days since 1970, by counting years from March.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1;
    Some((days - 719_468) * 86_400 + hour * 3_600 + minute * 60 + second)
}

/// What wallets have been seen to send for a field, or might.
#[cfg(test)]
pub(super) fn oddities() -> Vec<Value> {
    use serde_json::json;
    vec![
        json!(null),
        json!("1795904000"),
        json!(1_795_904_000.5),
        json!(-1),
        json!(-1_795_904_000.0),
        json!(u64::MAX),
        json!(1e300),
        json!(0),
        json!(""),
        json!("now"),
        json!(true),
        json!([]),
        json!({ "a": 1 }),
        json!("x".repeat(5_000)),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn times_are_read_as_wallets_write_them_and_everything_else_is_no_time() {
        assert_eq!(unix_s("1970-01-01T00:00:00"), Some(0));
        assert_eq!(unix_s("2026-09-21T14:13:20.123456+00:00"), Some(1_790_000_000));
        assert_eq!(unix_s("2024-02-29 23:59:59Z"), Some(1_709_251_199));
        for bad in ["", "2026", "2026-13-01T00:00:00", "2026-01-01T00:00:00+02:00", "T", "1-1-1T1:1:1", "-T-"]
        {
            assert_eq!(unix_s(bad), None, "{bad}");
        }
        let read = |value: Value| time(&json!({ "at": value }), "at");
        for good in
            [json!(1_795_904_000), json!("1795904000"), json!(1_795_904_000.7), json!(" 1795904000.2 ")]
        {
            assert_eq!(read(good.clone()), Some(1_795_904_000), "{good}");
        }
        for bad in [json!(0), json!(-5), json!(-0.5), json!(1e300), json!("soon"), json!(true), json!([1])] {
            assert_eq!(read(bad.clone()), None, "{bad}");
        }
        assert_eq!(time(&json!({}), "at"), None);
    }

    #[test]
    fn a_fee_is_read_with_either_sign_and_an_odd_one_is_not_told() {
        let read = |value: Value| fee(&json!({ "fee": value }), "fee");
        for good in [json!(21), json!(-21)] {
            assert_eq!(read(good.clone()), Some(21), "{good}");
        }
        for bad in [json!(null), json!(u64::MAX), json!("21"), json!(21.9), json!({}), json!(1e300)] {
            assert_eq!(read(bad.clone()), None, "{bad}");
        }
        let odd = json!({ "memo": " a ", "total": "7", "none": "  " });
        assert_eq!(
            (text(&odd, "memo"), text(&odd, "none"), count(&odd, "total")),
            (Some("a"), None, Some(7))
        );
    }
}
