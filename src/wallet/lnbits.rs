//! A wallet on an LNbits server, 1.0 or newer, over `/api/v1`. LNbits counts invoices in sats and keeps its books in
//! msat. How its answers are read stands in `lnbits/rows.rs`; how bytes travel in `http.rs`.
//!
//! Invoices are looked up in the wallet's own list, not at `/payments/{hash}`: that one answers for anybody's payment
//! when the key is wrong, and with the outgoing half when the wallet has paid itself.

mod push;
mod rows;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio::task::AbortHandle;

pub(super) use self::push::address as push_address;
use self::rows::{Row, RowPage};
use super::http::{Answer, Http};
use super::paying::{self, Unpaid};
use super::{
    Abilities, Cursor, Direction, Error, Hint, Identity, Invoice, Kind, Limits, Lookup, NewInvoice, Outgoing,
    Page, Pay, PayError, Payment, PaymentHash, Secret, State, Wallet, bolt11, brief, lenient,
};
use crate::clock::Clock;

/// Entries of one page of history; a thousand fit the server, these fit the cap of bytes.
const MAX_PAGE: u32 = 100;
/// Entries of one payment hash that are looked at: the incoming and the outgoing half, and failed tries.
const MAX_ROWS: usize = 20;

/// One wallet of an LNbits server.
pub struct Lnbits {
    http: Arc<Http>,
    limits: Limits,
    clock: Clock,
    /// Begun when somebody first wants hints.
    push: OnceLock<Push>,
}

/// What listens to the server, until it is dropped.
struct Push {
    hints: broadcast::Sender<Hint>,
    task: AbortHandle,
}

impl Drop for Push {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl std::fmt::Debug for Lnbits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lnbits({})", self.http.host())
    }
}

impl Lnbits {
    /// `url` may have a path, where the server is mounted below one. The invoice key is enough to receive; to pay it
    /// must be the admin key.
    pub fn new(
        url: &str,
        key: Secret,
        allow_plain: bool,
        limits: Limits,
        clock: Clock,
    ) -> Result<Self, Error> {
        let http = Arc::new(Http::new(url, key, allow_plain, limits.clone())?);
        Ok(Self { http, limits, clock, push: OnceLock::new() })
    }

    fn now_s(&self) -> u64 {
        (self.clock)() / 1000
    }

    async fn get(&self, path: &str, query: &[(&str, String)]) -> Result<Value, Error> {
        judge(&self.http.get(path, query).await?)
    }

    async fn post(&self, path: &str, body: &Value, within: Duration) -> Result<Value, Error> {
        judge(&self.http.post(path, body, within).await?)
    }

    /// What the wallet has under this hash, in either direction.
    async fn rows(&self, payment_hash: &PaymentHash) -> Result<RowPage, Error> {
        let query = [
            ("payment_hash", payment_hash.to_hex()),
            ("recheck_pending", "true".into()),
            ("limit", MAX_ROWS.to_string()),
        ];
        let page = rows::page(&self.get("/api/v1/payments/paginated", &query).await?, MAX_ROWS)?;
        // A server that does not know the filter answers with everything.
        match page.rows.iter().find(|row| row.payment_hash != *payment_hash) {
            None => Ok(page),
            Some(other) => Err(Error::Lie {
                what: "payment",
                asked: payment_hash.to_hex(),
                got: other.payment_hash.to_hex(),
            }),
        }
    }

    /// What a payment may cost beside its amount, msat: the server's own limit.
    async fn fee_reserve(&self, bolt11: &str) -> Result<u64, Error> {
        let answer = self.get("/api/v1/payments/fee-reserve", &[("invoice", bolt11.to_owned())]).await?;
        answer
            .get("fee_reserve")
            .and_then(Value::as_u64)
            .ok_or_else(|| Error::Nonsense("no fee_reserve".into()))
    }

    async fn send(&self, order: &Pay, terms: &bolt11::Terms) -> Result<Outgoing, Error> {
        let body = json!({ "out": true, "bolt11": order.bolt11 });
        let row = Row::read(&self.post("/api/v1/payments", &body, self.limits.pay).await?)?;
        let asked = (terms.payment_hash, Direction::Out, order.amount_msat);
        if (row.payment_hash, row.direction, row.amount_msat) != asked {
            return Err(Error::Lie {
                what: "payment",
                asked: format!("{} of {} msat", asked.0, asked.2),
                got: format!("{} of {} msat", row.payment_hash, row.amount_msat),
            });
        }
        Ok(row.outgoing())
    }
}

#[async_trait::async_trait]
impl Wallet for Lnbits {
    fn identity(&self) -> Identity {
        Identity { kind: Kind::Lnbits, host: self.http.host().to_owned() }
    }

    async fn abilities(&self) -> Result<Abilities, Error> {
        // Only to the admin key the wallet's id is told.
        let wallet = self.get("/api/v1/wallet", &[]).await?;
        let pay = wallet.get("id").is_some_and(Value::is_string);
        Ok(Abilities { receive: true, pay, history: true, hold: false, hints: !pay, outgoing: true })
    }

    async fn make_invoice(&self, new: &NewInvoice) -> Result<Invoice, Error> {
        bolt11::askable(new)?;
        if !new.amount_msat.is_multiple_of(1_000) {
            return Err(Error::NotWholeSat { amount_msat: new.amount_msat });
        }
        let mut body = json!({
            "out": false,
            "unit": "sat",
            "amount": new.amount_msat / 1_000,
            "memo": bolt11::memo(&new.memo),
            "expiry": new.expiry_s,
        });
        if let (Some(hash), Some(fields)) = (new.description_hash, body.as_object_mut()) {
            fields.insert("description_hash".into(), hex::encode(hash).into());
        }
        let answer = self.post("/api/v1/payments", &body, self.limits.call).await?;
        let text = |name: &str| lenient::text(&answer, name);
        let bolt11 = text("bolt11")
            .or_else(|| text("payment_request"))
            .ok_or_else(|| Error::Nonsense("an invoice without bolt11".into()))?;
        bolt11::accept(bolt11, text("payment_hash"), new, None, self.now_s())
    }

    async fn look_up(&self, payment_hash: &PaymentHash) -> Result<Lookup, Error> {
        let page = self.rows(payment_hash).await?;
        let state = match page.rows.iter().find(|row| row.direction == Direction::In) {
            Some(row) => row.state(self.now_s()),
            None => page.all_read().map(|()| State::Unknown)?,
        };
        Ok(Lookup { payment_hash: *payment_hash, state })
    }

    async fn pay(&self, order: &Pay) -> Result<Payment, PayError> {
        // The look before it matters here: of a payment made inside the server, a second try is called "failed".
        paying::once(self, order, self.now_s(), |terms| async move {
            let reserve_msat = self.fee_reserve(&order.bolt11).await.map_err(Unpaid::Before)?;
            let max_fee_msat = order.max_fee_msat;
            if reserve_msat > max_fee_msat {
                return Err(Unpaid::Before(Error::FeeTooHigh { reserve_msat, max_fee_msat }));
            }
            self.send(order, &terms).await.map_err(Unpaid::After)
        })
        .await
    }

    async fn outgoing(&self, payment_hash: &PaymentHash) -> Result<Outgoing, Error> {
        let page = self.rows(payment_hash).await?;
        let out = page.rows.iter().filter(|row| row.direction == Direction::Out);
        let mut tries: Vec<_> = out.map(Row::outgoing).collect();
        if !tries.iter().any(|outgoing| matches!(outgoing, Outgoing::Paid(_))) {
            page.all_read()?;
        }
        // One that was paid or may be counts more than one that failed.
        tries.sort_by_key(|outgoing| match outgoing {
            Outgoing::Paid(_) => 0,
            Outgoing::Pending => 1,
            Outgoing::Failed => 2,
            Outgoing::Unknown => 3,
        });
        Ok(tries.into_iter().next().unwrap_or(Outgoing::Unknown))
    }

    async fn balance_msat(&self) -> Result<i64, Error> {
        let wallet = self.get("/api/v1/wallet", &[]).await?;
        let balance = wallet.get("balance").and_then(Value::as_i64);
        balance.ok_or_else(|| Error::Nonsense("a balance that is no whole number".into()))
    }

    async fn history(&self, at: &Cursor, limit: u32) -> Result<Page, Error> {
        let limit = limit.clamp(1, MAX_PAGE);
        let query = [
            ("sortby", "time".into()),
            ("direction", "desc".into()),
            ("time[ge]", at.from_s.to_string()),
            ("time[le]", at.until_s.to_string()),
            ("offset", at.offset.to_string()),
            ("limit", limit.to_string()),
        ];
        let answer = self.get("/api/v1/payments/paginated", &query).await?;
        let page = rows::page(&answer, usize::try_from(limit).unwrap_or(usize::MAX))?;
        let read = (page.rows.len() + page.unreadable.len()) as u64;
        let offset = at.offset.saturating_add(read);
        // Without a total only an empty page is the end.
        let more = read > 0 && page.total.is_none_or(|total| offset < total);
        let next = more.then(|| Cursor { offset, ..at.clone() });
        let now_s = self.now_s();
        let items = page.rows.iter().map(|row| row.movement(now_s)).collect();
        Ok(Page { items, unreadable: page.unreadable, next })
    }

    fn hints(&self) -> Option<broadcast::Receiver<Hint>> {
        self.push().map(|push| push.hints.subscribe())
    }
}

// === the push

impl Lnbits {
    /// `None` outside a runtime.
    fn push(&self) -> Option<&Push> {
        let runtime = tokio::runtime::Handle::try_current().ok()?;
        Some(self.push.get_or_init(|| {
            let hints = broadcast::channel(256).0;
            let listening = push::listen(Arc::clone(&self.http), self.limits.clone(), hints.clone());
            Push { hints, task: runtime.spawn(listening).abort_handle() }
        }))
    }
}

/// From an HTTP answer to JSON, or to what went wrong.
fn judge(answer: &Answer) -> Result<Value, Error> {
    let body = || {
        serde_json::from_slice::<Value>(&answer.body)
            .map_err(|error| Error::Nonsense(format!("HTTP {}, and no JSON: {error}", answer.status)))
    };
    let status = answer.status;
    if matches!(status, 200 | 201) {
        return body();
    }
    if (300..400).contains(&status) {
        return Err(Error::Redirect { to: answer.location.clone().unwrap_or_default() });
    }
    let said = body().unwrap_or_default();
    let message = match said.get("detail") {
        Some(Value::String(detail)) => brief(detail),
        Some(other) => brief(&other.to_string()),
        None => brief(&String::from_utf8_lossy(&answer.body)),
    };
    // 520 is LNbits's own, for payments and invoices; its second word says whether it is final.
    let is_final = status == 520 && said.get("status").and_then(Value::as_str) == Some("failed");
    let code = status.to_string();
    Err(match status {
        // 404: no wallet has this key, or no LNbits is at this address.
        401 | 403 | 404 => Error::Denied(message),
        // Its limit of calls is asked before anything else.
        429 => Error::Busy { message, retry_after_s: answer.retry_after_s },
        _ if is_final || (400..500).contains(&status) => Error::Said { code, message },
        _ => Error::Failed { code, message },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(status: u16, body: &str) -> Result<Value, Error> {
        let (location, body) = (Some("http://elsewhere".into()), body.as_bytes().to_vec());
        judge(&Answer { status, location, retry_after_s: Some(7), body })
    }

    #[test]
    fn each_status_has_its_own_meaning() {
        assert!(judged(201, "{}").is_ok());
        assert!(matches!(judged(200, "<html>"), Err(Error::Nonsense(_))));
        assert!(matches!(judged(302, ""), Err(Error::Redirect { to }) if to == "http://elsewhere"));
        let busy = judged(429, r#"{"detail":"slow down"}"#);
        assert!(
            matches!(busy, Err(error @ Error::Busy { retry_after_s: Some(7), .. }) if !error.leaves_doubt())
        );
        assert!(matches!(judged(403, r#"{"detail":"no"}"#), Err(Error::Denied(why)) if why == "no"));
        assert!(matches!(judged(400, r#"{"detail":["a"]}"#), Err(Error::Said { code, .. }) if code == "400"));
        let failed = judged(520, r#"{"detail":"Insufficient balance.","status":"failed"}"#);
        assert!(matches!(failed, Err(Error::Said { message, .. }) if message == "Insufficient balance."));
        for body in [r#"{"detail":"x","status":"pending"}"#, r#"{"detail":"x"}"#, "", "\u{0}junk"] {
            assert!(matches!(judged(520, body), Err(Error::Failed { .. })), "{body}");
        }
        assert!(
            matches!(judged(502, "Bad Gateway"), Err(Error::Failed { message, .. }) if message == "Bad Gateway")
        );
    }
}
