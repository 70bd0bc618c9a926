//! One transaction in a wallet's answer. What decides about money is read strictly: hash, state, amount, direction. All
//! else is read as far as it can be: wallets send times as text or float, leave the type out, and what not.

use serde_json::Value;

use crate::wallet::{
    Direction, Error, MAX_MSAT, Movement, Outgoing, Payment, PaymentHash, Preimage, State, bolt11, brief,
    lenient,
};

/// A payment of either direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Transaction {
    pub payment_hash: PaymentHash,
    pub direction: Direction,
    progress: Progress,
    amount_msat: Option<u64>,
    fee_msat: Option<u64>,
    preimage: Option<Preimage>,
    created_at_s: u64,
    settled_at_s: Option<u64>,
    expires_at_s: Option<u64>,
    memo: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Pending,
    /// Locked, not taken.
    Accepted,
    Settled,
    Expired,
    Failed,
}

impl Transaction {
    /// An entry of a list.
    pub fn read(value: &Value) -> Result<Self, Error> {
        let hash = lenient::text(value, "payment_hash").unwrap_or_default().parse()?;
        Self::of(value, hash, None)
    }

    /// The answer to a question by this hash. Where it says none, it is about what was asked for; what it is by default
    /// is `ours`.
    pub fn about(value: &Value, asked: PaymentHash, ours: Option<Direction>) -> Result<Self, Error> {
        let told = lenient::text(value, "payment_hash").and_then(|hash| hash.parse::<PaymentHash>().ok());
        match told.filter(|told| *told != asked) {
            None => Self::of(value, asked, ours),
            Some(other) => Err(Error::Lie { what: "payment", asked: asked.to_hex(), got: other.to_hex() }),
        }
    }

    fn of(value: &Value, payment_hash: PaymentHash, ours: Option<Direction>) -> Result<Self, Error> {
        let nonsense = |why: String| Error::Nonsense(why);
        let text = |name: &str| lenient::text(value, name);
        let direction = match text("type").map(str::to_ascii_lowercase).as_deref() {
            Some("incoming") => Direction::In,
            Some("outgoing") => Direction::Out,
            other => match ours {
                Some(ours) => ours,
                None => return Err(nonsense(format!("a transaction of the type {:?}", other.map(brief)))),
            },
        };
        let settled_at_s = lenient::time(value, "settled_at");
        let progress = match (value.get("state"), text("state").map(str::to_ascii_lowercase).as_deref()) {
            // Older wallets say it by the time alone.
            (None | Some(Value::Null | Value::String(_)), None) => match value.get("settled_at") {
                _ if settled_at_s.is_some() => Progress::Settled,
                None | Some(Value::Null) => Progress::Pending,
                Some(at) if at.as_f64() == Some(0.0) || at == "" || at == "0" => Progress::Pending,
                Some(_) => return Err(nonsense("a transaction without a state, settled at no time".into())),
            },
            (_, Some("pending")) => Progress::Pending,
            (_, Some("accepted")) => Progress::Accepted,
            (_, Some("settled")) => Progress::Settled,
            (_, Some("expired")) => Progress::Expired,
            (_, Some("failed" | "cancelled" | "canceled")) => Progress::Failed,
            (_, Some(other)) => {
                return Err(nonsense(format!("a transaction in the state {:?}", brief(other))));
            }
            (Some(_), None) => return Err(nonsense("a transaction whose state is no word".into())),
        };
        let terms = text("invoice").and_then(|bolt11| bolt11::read(bolt11).ok());
        let terms = terms.filter(|terms| terms.payment_hash == payment_hash);
        let preimage = text("preimage").and_then(Preimage::from_hex);
        let amount_msat = amount(value, "amount")?.or(terms.as_ref().and_then(|terms| terms.amount_msat));
        Ok(Self {
            payment_hash,
            direction,
            progress,
            amount_msat,
            // Of what came in no more can have been kept than came.
            fee_msat: lenient::fee(value, "fees_paid")
                .filter(|_| value.get("fees_paid").is_some_and(Value::is_u64))
                .filter(|fee| direction == Direction::Out || amount_msat.is_none_or(|most| *fee <= most)),
            preimage: preimage.filter(|preimage| preimage.payment_hash() == payment_hash),
            created_at_s: lenient::time(value, "created_at")
                .or(terms.as_ref().map(|terms| terms.created_at_s))
                .unwrap_or_default(),
            settled_at_s,
            // The invoice's own is the one that payers go by.
            expires_at_s: terms.map(|terms| terms.expires_at_s).or(lenient::time(value, "expires_at")),
            memo: brief(text("description").unwrap_or_default()),
        })
    }

    /// As an invoice of ours.
    pub fn state(&self, now_s: u64) -> State {
        match self.progress {
            Progress::Settled => State::Settled {
                received_msat: self.amount_msat,
                settled_at_s: self.settled_at_s,
                fee_msat: self.fee_msat,
            },
            Progress::Accepted => State::Held { amount_msat: self.amount_msat },
            Progress::Expired => State::Expired,
            Progress::Failed => State::Failed,
            Progress::Pending if self.expires_at_s.is_some_and(|at| at <= now_s) => State::Expired,
            Progress::Pending => State::Pending,
        }
    }

    /// As a payment of ours.
    pub fn outgoing(&self) -> Outgoing {
        match (self.progress, self.amount_msat) {
            (Progress::Settled, Some(amount_msat)) => Outgoing::Paid(Payment {
                payment_hash: self.payment_hash,
                amount_msat,
                fee_msat: self.fee_msat.unwrap_or_default(),
                preimage: self.preimage,
            }),
            (Progress::Failed | Progress::Expired, _) => Outgoing::Failed,
            // Settled without any amount is not an end that books can be kept by.
            (Progress::Pending | Progress::Accepted | Progress::Settled, _) => Outgoing::Pending,
        }
    }

    /// As an entry of the wallet's books.
    pub fn movement(&self, now_s: u64) -> Result<Movement, Error> {
        if (self.progress, self.amount_msat) == (Progress::Settled, None) {
            return Err(Error::Nonsense("a settled transaction without an amount".into()));
        }
        let state = match (self.direction, self.outgoing()) {
            (Direction::Out, Outgoing::Pending | Outgoing::Unknown) => State::Pending,
            (Direction::Out, Outgoing::Failed) => State::Failed,
            _ => self.state(now_s),
        };
        Ok(Movement {
            direction: self.direction,
            payment_hash: self.payment_hash,
            amount_msat: self.amount_msat.unwrap_or_default(),
            fee_msat: self.fee_msat,
            state,
            created_at_s: self.created_at_s,
            settled_at_s: self.settled_at_s,
            memo: self.memo.clone(),
        })
    }
}

/// A field in msat; `None` where it is absent or null.
pub(super) fn amount(value: &Value, name: &str) -> Result<Option<u64>, Error> {
    match value.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(number) => match number.as_u64().filter(|amount| *amount <= MAX_MSAT) {
            Some(amount) => Ok(Some(amount)),
            None => Err(Error::Nonsense(format!("its {name} is no amount"))),
        },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::lenient::oddities;
    use super::super::super::testing::{NOW_S, invoice};
    use super::*;

    fn read(change: Value) -> Result<Transaction, Error> {
        let made = invoice(21_500, NOW_S, 600);
        let mut value = json!({
            "type": "incoming", "payment_hash": made.hash, "invoice": made.bolt11, "amount": 21_500,
            "created_at": NOW_S, "description": "a job",
        });
        for (name, change) in change.as_object().unwrap() {
            value[name] = change.clone();
        }
        Transaction::read(&value)
    }

    #[test]
    fn an_invoice_goes_through_its_states_in_both_dialects() {
        let state = |change| read(change).unwrap().state(NOW_S);
        let settled = |at| State::Settled { received_msat: Some(21_500), settled_at_s: at, fee_msat: None };
        assert_eq!(state(json!({})), State::Pending);
        assert_eq!(state(json!({ "settled_at": 0, "state": null })), State::Pending);
        assert_eq!(state(json!({ "settled_at": NOW_S })), settled(Some(NOW_S)));
        assert_eq!(state(json!({ "state": "settled" })), settled(None));
        assert_eq!(
            state(json!({ "state": "pending", "settled_at": NOW_S })),
            State::Pending,
            "the newer field counts"
        );
        assert_eq!(state(json!({ "state": "accepted" })), State::Held { amount_msat: Some(21_500) });
        assert_eq!(state(json!({ "state": "failed" })), State::Failed);
        assert_eq!(read(json!({})).unwrap().state(NOW_S + 600), State::Expired);
        assert_eq!(state(json!({ "expires_at": NOW_S - 1, "invoice": null })), State::Expired);
        assert_eq!(state(json!({ "expires_at": NOW_S - 1 })), State::Pending, "payers go by the invoice");
        for (at, is_settled) in
            [(json!("1795904000"), true), (json!(1.5e9), true), (json!("0"), false), (json!(""), false)]
        {
            let seen = matches!(state(json!({ "settled_at": at })), State::Settled { .. });
            assert_eq!(seen, is_settled, "{at}");
        }
    }

    #[test]
    fn paid_without_an_amount_is_good_for_the_invoices_amount_or_for_none() {
        let settled = |change| match read(change).unwrap().state(NOW_S) {
            State::Settled { received_msat, .. } => received_msat,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            settled(json!({ "state": "settled", "amount": 30_000 })),
            Some(30_000),
            "more than was asked for"
        );
        assert_eq!(settled(json!({ "state": "settled", "amount": null })), Some(21_500));
        assert_eq!(settled(json!({ "state": "settled", "amount": null, "invoice": "" })), None);
        let other = invoice(99_000, NOW_S, 600);
        let other = json!({ "state": "settled", "amount": null, "invoice": other.bolt11, "payment_hash": "ab".repeat(32) });
        assert_eq!(settled(other), None, "another payment's invoice says nothing");
    }

    #[test]
    fn a_payment_of_ours_is_read() {
        let out =
            json!({ "type": "outgoing", "state": "settled", "fees_paid": 7, "preimage": "07".repeat(32) });
        let Outgoing::Paid(payment) = read(out).unwrap().outgoing() else { panic!("not paid") };
        assert_eq!((payment.amount_msat, payment.fee_msat), (21_500, 7));
        assert_eq!(payment.preimage, Some(Preimage::from_bytes([7; 32])));
        let of = |change| read(change).unwrap().outgoing();
        assert_eq!(of(json!({ "type": "outgoing", "state": "failed" })), Outgoing::Failed);
        assert_eq!(
            of(json!({ "type": "outgoing", "expires_at": NOW_S - 9 })),
            Outgoing::Pending,
            "an HTLC can hang"
        );
    }

    #[test]
    fn a_paid_invoice_is_seen_whatever_a_side_field_says() {
        let made = invoice(21_500, NOW_S, 600);
        let good = json!({
            "type": "incoming", "payment_hash": made.hash, "invoice": made.bolt11, "amount": 21_500, "state": "settled",
            "created_at": NOW_S, "expires_at": NOW_S + 600, "settled_at": NOW_S, "fees_paid": 0, "description": "",
        });
        let sides = [
            "created_at",
            "expires_at",
            "settled_at",
            "fees_paid",
            "description",
            "description_hash",
            "preimage",
            "invoice",
            "metadata",
            "type",
            "payment_hash",
        ];
        for side in sides {
            for odd in oddities() {
                let mut value = good.clone();
                value[side] = odd.clone();
                let read = Transaction::about(&value, made.hash, Some(Direction::In));
                let read = read.unwrap_or_else(|error| panic!("{side} = {odd}: {error}"));
                let State::Settled { received_msat, .. } = read.state(NOW_S) else {
                    panic!("{side} = {odd}")
                };
                assert_eq!((read.direction, received_msat), (Direction::In, Some(21_500)), "{side} = {odd}");
            }
        }
        let bare = json!({ "state": "settled", "amount": 21_500 });
        assert!(Transaction::about(&bare, made.hash, Some(Direction::In)).is_ok());
        let out = Transaction::about(&bare, made.hash, None);
        assert!(matches!(out, Err(Error::Nonsense(_))), "whose invoice it is decides, where it is not ours");
        let other = json!({ "state": "settled", "amount": 21_500, "payment_hash": "ab".repeat(32) });
        let other = Transaction::about(&other, made.hash, Some(Direction::In));
        assert!(matches!(other, Err(Error::Lie { what: "payment", .. })));
    }

    #[test]
    fn what_is_no_transaction_is_nonsense() {
        for change in [
            json!({ "amount": 1.5 }),
            json!({ "amount": "21500" }),
            json!({ "amount": -1 }),
            json!({ "amount": u64::MAX }),
            json!({ "settled_at": "now" }),
            json!({ "settled_at": -1 }),
            json!({ "state": 1 }),
            json!({ "type": "sideways" }),
            json!({ "state": "paid?" }),
            json!({ "payment_hash": "ab" }),
            json!({ "payment_hash": null }),
        ] {
            assert!(matches!(read(change.clone()), Err(Error::Nonsense(_))), "{change}");
        }
    }
}
