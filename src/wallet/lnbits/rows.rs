//! One payment in an LNbits answer. What decides about money is read strictly: the hash, a whole amount in bounds whose
//! sign is the direction, a known status. All else is read as far as it can be. What is asked is `lnbits.rs`'s.

use serde_json::Value;

use crate::wallet::{
    Direction, Error, MAX_MSAT, Movement, Outgoing, Payment, PaymentHash, Preimage, State, Unreadable,
    bolt11, brief, lenient,
};

/// A payment of either direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub payment_hash: PaymentHash,
    pub direction: Direction,
    pub amount_msat: u64,
    fee_msat: Option<u64>,
    status: Status,
    preimage: Option<Preimage>,
    /// 0: not told.
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
    pub unreadable: Vec<Unreadable>,
    /// In all pages, where it is told.
    pub total: Option<u64>,
}

/// Reads `{"data": […], "total": n}`.
pub(super) fn page(answer: &Value, limit: usize) -> Result<RowPage, Error> {
    let data = answer.get("data").and_then(Value::as_array).ok_or_else(|| nonsense("no list of payments"))?;
    if data.len() > limit {
        return Err(nonsense("more payments than asked for"));
    }
    let mut page =
        RowPage { rows: Vec::new(), unreadable: Vec::new(), total: lenient::count(answer, "total") };
    for one in data {
        match Row::read(one) {
            Ok(row) => page.rows.push(row),
            Err(error) => page.unreadable.push(Unreadable {
                payment_hash: lenient::text(one, "payment_hash").and_then(|hash| hash.parse().ok()),
                why: error.to_string(),
            }),
        }
    }
    Ok(page)
}

impl RowPage {
    /// Whether nothing stands in a row that could not be read.
    pub fn all_read(&self) -> Result<(), Error> {
        self.unreadable.first().map_or(Ok(()), |odd| Err(Error::Nonsense(odd.why.clone())))
    }
}

impl Row {
    pub fn read(value: &Value) -> Result<Self, Error> {
        let text = |name: &str| lenient::text(value, name);
        let payment_hash: PaymentHash = text("payment_hash").unwrap_or_default().parse()?;
        let amount = value.get("amount").and_then(Value::as_i64).filter(|n| n.unsigned_abs() <= MAX_MSAT);
        let amount = amount.ok_or_else(|| nonsense("a payment whose amount is no amount"))?;
        let status = match text("status").map(str::to_ascii_lowercase).as_deref() {
            Some("pending") => Status::Pending,
            Some("success") => Status::Success,
            Some("failed") => Status::Failed,
            other => return Err(nonsense(&format!("a payment with the status {:?}", other.map(brief)))),
        };
        let created = lenient::time(value, "created_at").or_else(|| lenient::time(value, "time"));
        let terms = text("bolt11").and_then(|bolt11| bolt11::read(bolt11).ok());
        let preimage = text("preimage").and_then(Preimage::from_hex);
        Ok(Self {
            payment_hash,
            direction: if amount < 0 { Direction::Out } else { Direction::In },
            amount_msat: amount.unsigned_abs(),
            // Of what came in no more can have been kept than came.
            fee_msat: lenient::fee(value, "fee").filter(|fee| amount < 0 || *fee <= amount.unsigned_abs()),
            status,
            preimage: preimage.filter(|preimage| preimage.payment_hash() == payment_hash),
            created_at_s: created.unwrap_or_default(),
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
                fee_msat: self.fee_msat,
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
                fee_msat: self.fee_msat.unwrap_or_default(),
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::lenient::oddities;
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
    fn a_paid_invoice_is_seen_whatever_a_side_field_says() {
        let sides = [
            "fee",
            "bolt11",
            "created_at",
            "time",
            "preimage",
            "memo",
            "extra",
            "webhook",
            "expiry",
            "wallet_id",
        ];
        for side in sides {
            for odd in oddities() {
                let read = row(|v| {
                    v["status"] = "success".into();
                    v[side] = odd.clone();
                });
                let read = read.unwrap_or_else(|error| panic!("{side} = {odd}: {error}"));
                let State::Settled { received_msat, .. } = read.state(NOW_S) else {
                    panic!("{side} = {odd}")
                };
                assert_eq!((read.direction, received_msat), (Direction::In, Some(21_000)), "{side} = {odd}");
            }
        }
    }

    #[test]
    fn a_page_names_the_row_that_cannot_be_read_and_keeps_the_others_whatever_its_total_says() {
        let good = json!({ "payment_hash": "ab".repeat(32), "amount": 1, "status": "success" });
        for total in oddities() {
            let answer = json!({ "data": [good, { "payment_hash": "cd".repeat(32), "amount": "1" }, 7], "total": total });
            let page = page(&answer, 10).unwrap();
            let named: Vec<_> = page.unreadable.iter().map(|odd| odd.payment_hash.is_some()).collect();
            assert_eq!((page.rows.len(), named), (1, vec![true, false]), "{total}");
        }
    }

    #[test]
    fn what_is_no_payment_is_nonsense() {
        let cases: [(&str, Value); 7] = [
            ("amount", json!(1.5)),
            ("amount", json!("21000")),
            ("amount", json!(null)),
            ("amount", json!(u64::MAX)),
            ("status", json!("paid")),
            ("payment_hash", json!("ab")),
            ("payment_hash", json!(7)),
        ];
        for (name, value) in cases {
            let read = row(|v| v[name] = value.clone());
            assert!(matches!(read, Err(Error::Nonsense(_))), "{name} = {value}: {read:?}");
        }
        assert!(matches!(page(&json!([]), 10), Err(Error::Nonsense(_))));
        assert!(matches!(page(&json!({"data": [1, 2, 3], "total": 3}), 2), Err(Error::Nonsense(_))));
    }
}
