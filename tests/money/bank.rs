//! An LNbits-like server whose answers are the test's: it can be away, silent, give an invoice twice, and say of a
//! payment what it likes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use coinop::wallet::Preimage;
use nostr_sdk::prelude::Keys;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::support::now_s;
use crate::testing::invoice_on;

/// How the server is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mood {
    #[default]
    Well,
    /// Every call fails.
    Away,
    /// No call is answered until the mood changes; then it fails.
    Silent,
}

#[derive(Default)]
struct Books {
    mood: Mood,
    /// Gives the last invoice again instead of a new one.
    repeats: bool,
    expiry_s: Option<u64>,
    made: usize,
    /// Calls that wait for the mood to change.
    waiting: usize,
    rows: Vec<Value>,
    /// Calls that are refused as too many, and those that were.
    busy: usize,
    refused: usize,
    test_network: bool,
    balance: Option<Value>,
    /// Hashes that were asked for, and when.
    looks: Vec<(String, Instant)>,
}

pub struct Bank {
    pub url: String,
    books: Arc<Mutex<Books>>,
    task: JoinHandle<()>,
}

type Shared = Arc<Mutex<Books>>;

fn locked(books: &Shared) -> MutexGuard<'_, Books> {
    books.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bank {
    pub async fn open() -> Bank {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("its address"));
        let books = Shared::default();
        let router = axum::Router::new().fallback(serve).with_state(Arc::clone(&books));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.expect("it serves") });
        Bank { url, books, task }
    }

    pub fn is(&self, mood: Mood) {
        locked(&self.books).mood = mood;
    }

    pub fn repeats(&self, repeats: bool) {
        locked(&self.books).repeats = repeats;
    }

    /// The next calls are too many.
    pub fn is_busy_for(&self, calls: usize) {
        locked(&self.books).busy = calls;
    }

    /// Calls that were too many.
    pub fn refused(&self) -> usize {
        locked(&self.books).refused
    }

    pub fn is_on_a_test_network(&self, is_test: bool) {
        locked(&self.books).test_network = is_test;
    }

    /// What it says of its balance.
    pub fn balance_is(&self, balance: Value) {
        locked(&self.books).balance = Some(balance);
    }

    /// How long the next invoices hold, whatever is asked for.
    pub fn invoices_hold_for(&self, expiry_s: u64) {
        locked(&self.books).expiry_s = Some(expiry_s);
    }

    /// Invoices made so far.
    pub fn made(&self) -> usize {
        locked(&self.books).made
    }

    /// Calls that are not answered yet.
    pub fn waiting(&self) -> usize {
        locked(&self.books).waiting
    }

    /// When it was asked for this hash, each time.
    pub fn looks(&self, hash: &str) -> Vec<Instant> {
        let books = locked(&self.books);
        books.looks.iter().filter(|(asked, _)| asked == hash).map(|(_, at)| *at).collect()
    }

    /// This invoice is paid, and `msat` have come.
    pub fn paid(&self, bolt11: &str, msat: u64) {
        let mut books = locked(&self.books);
        let row = books.rows.iter_mut().find(|row| row["bolt11"] == bolt11).expect("an invoice of ours");
        (row["status"], row["amount"]) = ("success".into(), msat.into());
    }

    /// What it says of this invoice's amount.
    pub fn amount_of(&self, bolt11: &str, amount: Value) {
        self.row_of(bolt11, |row| row["amount"] = amount);
    }

    /// What it says beside the matter about this invoice makes no sense.
    pub fn scribbles_on(&self, bolt11: &str) {
        let odd =
            [("fee", json!([])), ("created_at", json!(-1.5)), ("memo", json!(7)), ("preimage", json!({}))];
        self.row_of(bolt11, |row| odd.into_iter().for_each(|(name, value)| row[name] = value));
    }

    fn row_of(&self, bolt11: &str, change: impl FnOnce(&mut Value)) {
        let mut books = locked(&self.books);
        change(books.rows.iter_mut().find(|row| row["bolt11"] == bolt11).expect("an invoice of ours"));
    }

    /// A payment that the node knows nothing of; `msat` below zero has left.
    pub fn moves(&self, hash: &str, msat: i64, fee_msat: u64) {
        locked(&self.books).rows.push(row(hash, "", msat, fee_msat, "success"));
    }

    /// This invoice was not paid after all.
    pub fn takes_back(&self, bolt11: &str) {
        let mut books = locked(&self.books);
        let row = books.rows.iter_mut().find(|row| row["bolt11"] == bolt11).expect("an invoice of ours");
        row["status"] = "pending".into();
    }

    /// A try that failed, shown before all others.
    pub fn fails(&self, hash: &str, msat: i64) {
        locked(&self.books).rows.insert(0, row(hash, "", msat, 0, "failed"));
    }

    /// What it says of this invoice makes no sense.
    pub fn garbles(&self, hash: &str) {
        let mut row = row(hash, "", 0, 0, "pending");
        row["amount"] = "much".into();
        locked(&self.books).rows.push(row);
    }

    /// It never heard of this invoice.
    pub fn forgets(&self, bolt11: &str) {
        locked(&self.books).rows.retain(|row| row["bolt11"] != bolt11);
    }
}

impl Drop for Bank {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn row(hash: &str, bolt11: &str, msat: i64, fee_msat: u64, status: &str) -> Value {
    json!({
        "payment_hash": hash, "bolt11": bolt11, "amount": msat, "fee": fee_msat, "status": status,
        "created_at": "2026-11-21T20:00:00+00:00", "memo": "at the bank",
    })
}

async fn serve(State(books): State<Shared>, method: Method, uri: Uri, body: Bytes) -> (StatusCode, String) {
    if locked(&books).mood == Mood::Silent {
        locked(&books).waiting += 1;
        while locked(&books).mood == Mood::Silent {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        locked(&books).waiting -= 1;
        return failed();
    }
    let mut books = locked(&books);
    if books.mood == Mood::Away {
        return failed();
    }
    if books.busy > 0 {
        (books.busy, books.refused) = (books.busy - 1, books.refused + 1);
        return (StatusCode::TOO_MANY_REQUESTS, json!({ "error": "Rate limit exceeded" }).to_string());
    }
    let answer = match (method.as_str(), uri.path()) {
        ("POST", "/api/v1/payments") => books.make(&serde_json::from_slice(&body).expect("JSON")),
        ("GET", "/api/v1/payments/paginated") => books.list(uri.query().unwrap_or_default()),
        ("GET", "/api/v1/wallet") => books.wallet(),
        other => panic!("not in this test: {other:?}"),
    };
    (StatusCode::OK, answer.to_string())
}

fn failed() -> (StatusCode, String) {
    (StatusCode::BAD_GATEWAY, json!({ "detail": "the bank is closed" }).to_string())
}

impl Books {
    fn make(&mut self, asked: &Value) -> Value {
        self.made += 1;
        if let (true, Some(last)) = (self.repeats, self.rows.last()) {
            return last.clone();
        }
        let secret = Keys::generate().secret_key().to_secret_bytes();
        let hash = Preimage::from_bytes(secret).payment_hash();
        let msat = asked["amount"].as_u64().expect("sats") * 1_000;
        let expiry_s = self.expiry_s.or(asked["expiry"].as_u64()).expect("an expiry");
        let made = invoice_on(self.test_network, hash, msat, now_s(), expiry_s);
        let msat = i64::try_from(msat).expect("an amount");
        self.rows.push(row(&hash.to_hex(), &made.bolt11, msat, 0, "pending"));
        self.rows.last().cloned().expect("just pushed")
    }

    fn list(&mut self, query: &str) -> Value {
        let value = |name: &str| {
            let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
            pairs.filter(|(key, _)| *key == name).map(|(_, value)| value).next()
        };
        let number = |name: &str| value(name).and_then(|text| text.parse::<usize>().ok());
        let hash = value("payment_hash");
        self.looks.extend(hash.map(|hash| (hash.to_owned(), Instant::now())));
        let all = self.rows.iter().filter(|row| hash.is_none_or(|hash| row["payment_hash"] == hash));
        let all: Vec<&Value> = all.collect();
        let (skip, take) = (number("offset").unwrap_or(0), number("limit").unwrap_or(100));
        let data: Vec<_> = all.iter().skip(skip).take(take).collect();
        json!({ "data": data, "total": all.len() })
    }

    fn wallet(&self) -> Value {
        let moved = |row: &Value| row["amount"].as_i64().expect("msat") - row["fee"].as_i64().unwrap_or(0);
        let balance: i64 = self.rows.iter().filter(|row| row["status"] == "success").map(moved).sum();
        let balance = self.balance.clone().unwrap_or(balance.into());
        json!({ "id": "bank", "name": "bank", "balance": balance })
    }
}
