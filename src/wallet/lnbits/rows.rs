//! One payment in an LNbits answer, read strictly: whole numbers in bounds, a sign for the direction, a known status.
//! What is asked is `lnbits.rs`'s.

use serde_json::Value;

use crate::wallet::{
    Direction, Error, MAX_MSAT, Movement, Outgoing, Payment, PaymentHash, Preimage, State, bolt11, brief,
};

/// A payment of either direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub payment_hash: PaymentHash,
    pub direction: Direction,
    pub amount_msat: u64,
    pub fee_msat: u64,
    status: Status,
    preimage: Option<Preimage>,
    created_at_s: u64,
    /// Of the invoice, where it can be read.
    expires_at_s: Option<u64>,
    memo: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Pending,
    Success,
    Failed,
}

/// A list of them.
#[derive(Debug)]
pub(super) struct RowPage {
    pub rows: Vec<Row>,
    /// In all pages.
    pub total: u64,
}

/// Reads `{"data": […], "total": n}`.
pub(super) fn page(answer: &Value, limit: usize) -> Result<RowPage, Error> {
    let data = answer.get("data").and_then(Value::as_array).ok_or_else(|| nonsense("no list of payments"))?;
    if data.len() > limit {
        return Err(nonsense("more payments than asked for"));
    }
    let rows = data.iter().map(Row::read).collect::<Result<Vec<_>, _>>()?;
    let total = answer.get("total").and_then(Value::as_u64).ok_or_else(|| nonsense("no total"))?;
    Ok(RowPage { rows, total })
}

impl Row {
    pub fn read(value: &Value) -> Result<Self, Error> {
        let text = |name: &str| value.get(name).and_then(Value::as_str);
        let number = |name: &str| {
            let number = value.get(name).and_then(Value::as_i64).filter(|n| n.unsigned_abs() <= MAX_MSAT);
            number.ok_or_else(|| nonsense(&format!("a payment whose {name} is no amount")))
        };
        let payment_hash: PaymentHash = text("payment_hash").unwrap_or_default().parse()?;
        let amount = number("amount")?;
        let status = match text("status") {
            Some("pending") => Status::Pending,
            Some("success") => Status::Success,
            Some("failed") => Status::Failed,
            other => return Err(nonsense(&format!("a payment with the status {other:?}"))),
        };
        let created = text("created_at").or_else(|| text("time")).and_then(unix_s);
        let terms = text("bolt11").and_then(|bolt11| bolt11::read(bolt11).ok());
        let preimage = text("preimage").and_then(Preimage::from_hex);
        Ok(Self {
            payment_hash,
            direction: if amount < 0 { Direction::Out } else { Direction::In },
            amount_msat: amount.unsigned_abs(),
            fee_msat: number("fee")?.unsigned_abs(),
            status,
            preimage: preimage.filter(|preimage| preimage.payment_hash() == payment_hash),
            created_at_s: created.ok_or_else(|| nonsense("a payment without a time"))?,
            expires_at_s: terms
                .filter(|terms| terms.payment_hash == payment_hash)
                .map(|terms| terms.expires_at_s),
            memo: brief(text("memo").unwrap_or_default()),
        })
    }

    /// As an invoice of ours.
    pub fn state(&self, now_s: u64) -> State {
        let is_late = self.expires_at_s.is_some_and(|at| at <= now_s);
        match self.status {
            Status::Success => State::Settled {
                received_msat: Some(self.amount_msat),
                // LNbits keeps the time of the last change, whatever it was.
                settled_at_s: None,
                fee_msat: Some(self.fee_msat),
            },
            Status::Pending | Status::Failed if is_late => State::Expired,
            Status::Pending => State::Pending,
            Status::Failed => State::Failed,
        }
    }

    /// As a payment of ours.
    pub fn outgoing(&self) -> Outgoing {
        match self.status {
            Status::Success => Outgoing::Paid(Payment {
                payment_hash: self.payment_hash,
                amount_msat: self.amount_msat,
                fee_msat: self.fee_msat,
                preimage: self.preimage,
            }),
            Status::Pending => Outgoing::Pending,
            Status::Failed => Outgoing::Failed,
        }
    }

    pub fn movement(&self, now_s: u64) -> Movement {
        let state = match (self.direction, self.status) {
            (Direction::Out, Status::Pending) => State::Pending,
            (Direction::Out, Status::Failed) => State::Failed,
            _ => self.state(now_s),
        };
        Movement {
            direction: self.direction,
            payment_hash: self.payment_hash,
            amount_msat: self.amount_msat,
            fee_msat: self.fee_msat,
            state,
            created_at_s: self.created_at_s,
            settled_at_s: None,
            memo: self.memo.clone(),
        }
    }
}

fn nonsense(why: &str) -> Error {
    Error::Nonsense(why.to_owned())
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::testing::{NOW_S, invoice};
    use super::*;

    fn row(change: impl FnOnce(&mut Value)) -> Result<Row, Error> {
        let made = invoice(21_000, NOW_S, 600);
        let mut value = json!({
            "payment_hash": made.hash, "amount": 21_000, "fee": 0, "status": "pending", "bolt11": made.bolt11,
            "created_at": "2026-09-21T14:13:20+00:00", "preimage": "07".repeat(32), "memo": "a job",
        });
        change(&mut value);
        Row::read(&value)
    }

    #[test]
    fn an_invoice_goes_through_its_states() {
        let pending = row(|_| {}).unwrap();
        assert_eq!((pending.direction, pending.state(NOW_S)), (Direction::In, State::Pending));
        assert_eq!(pending.state(NOW_S + 600), State::Expired);
        let paid = row(|v| v["status"] = "success".into()).unwrap();
        let settled = State::Settled { received_msat: Some(21_000), settled_at_s: None, fee_msat: Some(0) };
        assert_eq!(paid.state(NOW_S + 9_999), settled, "what was paid does not expire");
        let failed = row(|v| v["status"] = "failed".into()).unwrap();
        assert_eq!((failed.state(NOW_S), failed.state(NOW_S + 601)), (State::Failed, State::Expired));
    }

    #[test]
    fn a_payment_shows_a_preimage_only_if_it_is_the_one() {
        let paid = |preimage: &str| {
            let read = row(|v| {
                v["amount"] = (-21_000).into();
                v["fee"] = (-21).into();
                v["status"] = "success".into();
                v["preimage"] = preimage.into();
            });
            match read.unwrap().outgoing() {
                Outgoing::Paid(payment) => payment,
                other => panic!("{other:?}"),
            }
        };
        let payment = paid(&"07".repeat(32));
        assert_eq!((payment.amount_msat, payment.fee_msat), (21_000, 21));
        assert_eq!(payment.preimage, Some(Preimage::from_bytes([7; 32])));
        for other in [&"00".repeat(32), "", "junk"] {
            assert_eq!(paid(other).preimage, None, "{other}");
        }
    }

    #[test]
    fn what_is_no_payment_is_nonsense() {
        let cases: [(&str, Value); 9] = [
            ("amount", json!(1.5)),
            ("amount", json!("21000")),
            ("amount", json!(null)),
            ("amount", json!(u64::MAX)),
            ("fee", json!([])),
            ("status", json!("paid")),
            ("payment_hash", json!("ab")),
            ("payment_hash", json!(7)),
            ("created_at", json!("yesterday")),
        ];
        for (name, value) in cases {
            let read = row(|v| v[name] = value.clone());
            assert!(matches!(read, Err(Error::Nonsense(_))), "{name} = {value}: {read:?}");
        }
        assert!(matches!(page(&json!([]), 10), Err(Error::Nonsense(_))));
        assert!(matches!(page(&json!({"data": [1, 2, 3], "total": 3}), 2), Err(Error::Nonsense(_))));
    }

    #[test]
    fn times_are_read_as_lnbits_writes_them() {
        assert_eq!(unix_s("1970-01-01T00:00:00"), Some(0));
        assert_eq!(unix_s("2026-09-21T14:13:20.123456+00:00"), Some(1_790_000_000));
        assert_eq!(unix_s("2024-02-29 23:59:59Z"), Some(1_709_251_199));
        for bad in ["", "2026", "2026-13-01T00:00:00", "2026-01-01T00:00:00+02:00", "T", "1-1-1T1:1:1", "-T-"]
        {
            assert_eq!(unix_s(bad), None, "{bad}");
        }
    }
}
