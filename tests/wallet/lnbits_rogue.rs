//! A server in LNbits' place that is down, slow, cut off, garbled or lying: each has its own error, and a payment is
//! called refused only where it surely was not made.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coinop::wallet::{Cursor, Error, Invoice, Outgoing, PaymentHash, State, Wallet, read_bolt11};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::testing::{invoice, invoice_to};
use crate::{hasty, in_doubt, lnbits_wallet, new_invoice, pay, refused};

/// What the server does with a request.
#[derive(Clone)]
enum Act {
    Json(u16, Value),
    /// These bytes, whatever they are, and the end of the connection.
    Raw(Vec<u8>),
    Silence,
}

/// Requests by method and path; the newest rule of a path counts.
#[derive(Default)]
struct Rules {
    acts: HashMap<String, Act>,
    /// Method, path with query, and body of each request.
    heard: Vec<String>,
}

struct Rogue {
    url: String,
    rules: Arc<Mutex<Rules>>,
    task: JoinHandle<()>,
}

const LIST: &str = "GET /api/v1/payments/paginated";
const RESERVE: &str = "GET /api/v1/payments/fee-reserve";
const MAKE_OR_PAY: &str = "POST /api/v1/payments";

impl Rogue {
    async fn start() -> Rogue {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let rules = Arc::new(Mutex::new(Rules::default()));
        let shared = Arc::clone(&rules);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&shared)));
            }
        });
        let rogue = Rogue { url, rules, task };
        rogue.on(LIST, Act::Json(200, json!({ "data": [], "total": 0 })));
        rogue.on(RESERVE, Act::Json(200, json!({ "fee_reserve": 1_000 })));
        rogue
    }

    fn on(&self, what: &str, act: Act) {
        self.rules.lock().unwrap().acts.insert(what.into(), act);
    }

    fn wallet(&self) -> Arc<dyn Wallet> {
        lnbits_wallet(&self.url, "5ecre7", hasty())
    }

    fn heard(&self, what: &str) -> usize {
        self.rules.lock().unwrap().heard.iter().filter(|line| line.starts_with(what)).count()
    }
}

impl Drop for Rogue {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: TcpStream, rules: Arc<Mutex<Rules>>) {
    let (mut request, mut piece) = (Vec::new(), [0; 4096]);
    let body_at = loop {
        let read = stream.read(&mut piece).await.unwrap_or(0);
        if read == 0 {
            return;
        }
        request.extend_from_slice(&piece[..read]);
        let Some(end) = request.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&request[..end]).to_ascii_lowercase();
        let length =
            head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
        if request.len() >= end + 4 + length.unwrap_or(0) {
            break end + 4;
        }
    };
    let line = String::from_utf8_lossy(&request).lines().next().unwrap_or_default().replace(" HTTP/1.1", "");
    let act = {
        let mut rules = rules.lock().unwrap();
        rules.heard.push(format!("{line} {}", String::from_utf8_lossy(&request[body_at..])));
        let path = line.split('?').next().unwrap_or_default();
        rules.acts.get(path).cloned()
    };
    let bytes = match act {
        None => http(404, &json!({ "detail": "not in this test" })),
        Some(Act::Json(status, value)) => http(status, &value),
        Some(Act::Raw(bytes)) => bytes,
        Some(Act::Silence) => return tokio::time::sleep(Duration::from_secs(30)).await,
    };
    // The other side may hang up before it has read all of it.
    let written = stream.write_all(&bytes).await;
    if written.is_ok() && stream.shutdown().await.is_err() {
        eprintln!("a rogue answer was not read to its end");
    }
}

fn http(status: u16, value: &Value) -> Vec<u8> {
    let body = value.to_string();
    let length = body.len();
    format!("HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")
        .into_bytes()
}

fn redirect(to: &str) -> Act {
    Act::Raw(format!("HTTP/1.1 307 X\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n").into_bytes())
}

/// A true answer's beginning.
fn cut() -> Act {
    Act::Raw(b"HTTP/1.1 201 X\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{\"payment_hash\":\"".to_vec())
}

fn huge() -> Act {
    let mut bytes = b"HTTP/1.1 200 X\r\nconnection: close\r\n\r\n[\"".to_vec();
    bytes.resize(3 << 20, b'x');
    Act::Raw(bytes)
}

fn row(invoice: &Invoice, amount: i64, status: &str) -> Value {
    json!({
        "payment_hash": invoice.payment_hash, "bolt11": invoice.bolt11, "amount": amount, "fee": 0, "status": status,
        "created_at": "2026-11-21T20:00:00+00:00", "memo": "", "preimage": "07".repeat(32),
    })
}

fn list(rows: &[Value]) -> Act {
    Act::Json(200, json!({ "data": rows, "total": rows.len() }))
}

/// Somebody's invoice, good for an hour, to the preimage of 7s.
fn made(amount_msat: u64) -> Invoice {
    let bolt11 = invoice(amount_msat, coinop::clock::now_s(), 3_600).bolt11;
    let terms = read_bolt11(&bolt11).unwrap();
    Invoice {
        bolt11,
        payment_hash: terms.payment_hash,
        amount_msat,
        created_at_s: terms.created_at_s,
        expires_at_s: terms.expires_at_s,
    }
}

#[tokio::test]
async fn each_way_to_fail_has_its_own_error_at_each_question() {
    let rogue = Rogue::start().await;
    let (wallet, hash) = (rogue.wallet(), PaymentHash::from_bytes([7; 32]));
    type Check = fn(&Error) -> bool;
    let ways: [(&str, Act, Check); 10] = [
        ("silent", Act::Silence, |e| matches!(e, Error::Slow { limit_ms: 1_000, .. })),
        ("cut", cut(), |e| matches!(e, Error::Cut(_))),
        ("hanging up", Act::Raw(Vec::new()), |e| matches!(e, Error::Cut(_))),
        ("not HTTP", Act::Raw(b"hello\r\n\r\n".to_vec()), |e| matches!(e, Error::Cut(_))),
        ("redirecting", redirect("http://127.0.0.1:1/api/v1/wallet"), |e| {
            matches!(e, Error::Redirect { .. })
        }),
        ("huge", huge(), |e| matches!(e, Error::TooLarge { max_bytes: 1_048_576 })),
        ("a web page", Act::Raw(b"HTTP/1.1 200 X\r\nconnection: close\r\n\r\n<html>".to_vec()), |e| {
            matches!(e, Error::Nonsense(_))
        }),
        ("other JSON", Act::Json(200, json!([1, 2])), |e| matches!(e, Error::Nonsense(_))),
        ("failing", Act::Json(502, json!({ "detail": "bad gateway" })), |e| {
            matches!(e, Error::Failed { .. })
        }),
        (
            "busy",
            Act::Json(429, json!({ "detail": "slow down" })),
            |e| matches!(e, Error::Busy { message, .. } if message == "slow down"),
        ),
    ];
    for (way, act, is_right) in ways {
        for path in [LIST, MAKE_OR_PAY, "GET /api/v1/wallet"] {
            rogue.on(path, act.clone());
        }
        let began = Instant::now();
        let errors = [
            wallet.look_up(&hash).await.unwrap_err(),
            wallet.outgoing(&hash).await.unwrap_err(),
            wallet.make_invoice(&new_invoice(1_000)).await.unwrap_err(),
            wallet.balance_msat().await.unwrap_err(),
            wallet.history(&Cursor::window(0, 1), 10).await.unwrap_err(),
        ];
        for error in errors {
            assert!(is_right(&error), "{way}: {error:?}");
            assert!(!error.to_string().contains("5ecre7"), "{error}");
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{way} took {:?}", began.elapsed());
    }
    assert!(!format!("{:?} {}", wallet.identity(), wallet.identity()).contains("5ecre7"));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unreachable_and_so_nothing_was_paid() {
    let rogue = Rogue::start().await;
    let url = rogue.url.clone();
    rogue.task.abort();
    drop(rogue);
    let wallet = lnbits_wallet(&url, "5ecre7", hasty());
    assert!(matches!(wallet.look_up(&PaymentHash::from_bytes([7; 32])).await, Err(Error::Unreachable(_))));
    assert!(matches!(refused(wallet.pay(&pay(&made(5_000))).await), Error::Unreachable(_)));
}

#[tokio::test]
async fn an_invoice_that_is_not_the_one_asked_for_is_a_lie_with_its_name() {
    let rogue = Rogue::start().await;
    let wallet = rogue.wallet();
    let now_s = coinop::clock::now_s();
    let answer = |bolt11: &str, hash: &PaymentHash| {
        rogue.on(MAKE_OR_PAY, Act::Json(201, json!({ "bolt11": bolt11, "payment_hash": hash })));
    };
    let lie = async || match wallet.make_invoice(&new_invoice(21_000)).await {
        Err(Error::Lie { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    let right = invoice(21_000, now_s, 600);
    answer(&right.bolt11, &right.hash);
    assert_eq!(wallet.make_invoice(&new_invoice(21_000)).await.unwrap().payment_hash, right.hash);
    answer(&right.bolt11, &PaymentHash::from_bytes([1; 32]));
    assert_eq!(lie().await, "payment hash");
    for amount_msat in [1, 20_000, 21_001, 2_100_000] {
        let other = invoice(amount_msat, now_s, 600);
        answer(&other.bolt11, &other.hash);
        assert_eq!(lie().await, "amount");
    }
    let old = invoice(21_000, now_s - 7_200, 600);
    answer(&old.bolt11, &old.hash);
    assert_eq!(lie().await, "expiry");
    answer(&right.bolt11[..60], &right.hash);
    assert!(matches!(wallet.make_invoice(&new_invoice(21_000)).await, Err(Error::Invoice(_))));
}

#[tokio::test]
async fn another_payment_or_direction_never_settles_an_invoice() {
    let rogue = Rogue::start().await;
    let (wallet, invoice) = (rogue.wallet(), made(21_000));
    let state = async || wallet.look_up(&invoice.payment_hash).await.map(|lookup| lookup.state);
    rogue.on(LIST, list(&[row(&invoice, -21_000, "success")]));
    assert_eq!(state().await.unwrap(), State::Unknown, "that is money going out");
    let stranger = invoice_to(PaymentHash::from_bytes([1; 32]), 21_000, invoice.created_at_s, 600);
    let stranger = Invoice { bolt11: stranger.bolt11, payment_hash: stranger.hash, ..invoice.clone() };
    rogue.on(LIST, list(&[row(&stranger, 21_000, "success")]));
    assert!(matches!(state().await, Err(Error::Lie { what: "payment", .. })));
    for amount in [json!(21_000.5), json!("21000"), json!(null), json!(u64::MAX)] {
        let mut odd = row(&invoice, 21_000, "success");
        odd["amount"] = amount;
        rogue.on(LIST, list(&[odd]));
        assert!(matches!(state().await, Err(Error::Nonsense(_))));
    }
    // Less or more than the invoice says is told as it is.
    for received in [1_000, 50_000] {
        rogue.on(LIST, list(&[row(&invoice, received, "success")]));
        let Ok(State::Settled { received_msat, .. }) = state().await else { panic!("not settled") };
        assert_eq!(received_msat, Some(received.unsigned_abs()));
    }
    let rows: Vec<_> = (0..60).map(|_| row(&invoice, 21_000, "pending")).collect();
    rogue.on(LIST, list(&rows));
    assert!(matches!(state().await, Err(Error::Nonsense(_))), "more than was asked for");
}

#[tokio::test]
async fn a_payment_whose_answer_is_lost_is_in_doubt_until_the_books_say_what_became_of_it() {
    let rogue = Rogue::start().await;
    let (wallet, invoice) = (rogue.wallet(), made(21_000));
    let paid_elsewhere = json!({ "payment_hash": PaymentHash::from_bytes([1; 32]), "amount": -21_000, "fee": 0,
        "status": "success", "created_at": "2026-11-21T20:00:00+00:00" });
    let doubtful = [
        Act::Silence,
        cut(),
        Act::Raw(Vec::new()),
        huge(),
        redirect("http://127.0.0.1:1/"),
        Act::Json(500, json!({ "detail": "Unexpected error!" })),
        Act::Json(502, json!({})),
        Act::Json(520, json!({ "detail": "no route", "status": "pending" })),
        Act::Json(201, json!({ "status": "ok" })),
        Act::Json(201, paid_elsewhere),
        Act::Json(201, row(&invoice, -21_000, "pending")),
    ];
    for act in doubtful {
        rogue.on(MAKE_OR_PAY, act.clone());
        rogue.on(LIST, list(&[]));
        in_doubt(wallet.pay(&pay(&invoice)).await);
        // It is in the books as under way: nothing more is sent.
        let sent = rogue.heard(MAKE_OR_PAY);
        rogue.on(LIST, list(&[row(&invoice, -21_000, "pending")]));
        in_doubt(wallet.pay(&pay(&invoice)).await);
        assert_eq!(rogue.heard(MAKE_OR_PAY), sent);
        // It was made after all: told as paid, and still nothing more is sent.
        rogue.on(LIST, list(&[row(&invoice, -21_000, "failed"), row(&invoice, -21_000, "success")]));
        assert_eq!(wallet.pay(&pay(&invoice)).await.unwrap().amount_msat, 21_000);
        assert_eq!(rogue.heard(MAKE_OR_PAY), sent);
    }
}

#[tokio::test]
async fn a_payment_is_refused_only_where_it_surely_was_not_made() {
    let rogue = Rogue::start().await;
    let (wallet, invoice) = (rogue.wallet(), made(21_000));
    for (status, body) in [
        (400, json!({ "detail": "Bolt11 decoding failed." })),
        (403, json!({ "detail": "Invoice (or Admin) key required." })),
        (520, json!({ "detail": "Insufficient balance.", "status": "failed" })),
    ] {
        rogue.on(MAKE_OR_PAY, Act::Json(status, body));
        let why = refused(wallet.pay(&pay(&invoice)).await);
        assert!(matches!(why, Error::Said { .. } | Error::Denied(_)), "{why:?}");
    }
    // "failed", and paid all the same: the books count.
    let books = list(&[row(&invoice, -21_000, "success")]);
    assert!(matches!(wallet.outgoing(&invoice.payment_hash).await, Ok(Outgoing::Unknown)));
    rogue.on(LIST, books);
    assert!(wallet.pay(&pay(&invoice)).await.is_ok());

    // A wallet that is asked too often has not looked at it.
    rogue.on(LIST, list(&[]));
    rogue.on(MAKE_OR_PAY, Act::Json(429, json!({ "error": "Rate limit exceeded" })));
    assert!(matches!(refused(wallet.pay(&pay(&invoice)).await), Error::Busy { .. }));

    // Before anything is sent, no trouble leaves a doubt.
    rogue.on(LIST, list(&[]));
    let sent = rogue.heard(MAKE_OR_PAY);
    for (path, act) in [(RESERVE, Act::Silence), (RESERVE, Act::Json(200, json!({}))), (LIST, cut())] {
        rogue.on(path, act);
        refused(wallet.pay(&pay(&invoice)).await);
    }
    let expired = crate::testing::invoice(21_000, coinop::clock::now_s() - 9_000, 600).bolt11;
    let why = refused(wallet.pay(&coinop::wallet::Pay { bolt11: expired, ..pay(&invoice) }).await);
    assert!(matches!(&why, Error::Invoice(why) if why.contains("expired")), "{why}");
    assert_eq!(rogue.heard(MAKE_OR_PAY), sent);
}

#[tokio::test]
async fn a_list_is_read_whatever_one_row_or_its_total_says_and_the_odd_row_is_named() {
    let rogue = Rogue::start().await;
    let (wallet, invoice) = (rogue.wallet(), made(21_000));
    let mut odd = row(&invoice, 21_000, "success");
    odd["amount"] = json!("21000");
    let mut sides = row(&invoice, 21_000, "success");
    for (name, value) in
        [("created_at", json!(1.5)), ("fee", json!(-7)), ("memo", json!(null)), ("bolt11", json!(9))]
    {
        sides[name] = value;
    }
    for total in [json!(2), json!("2"), json!(null), json!(-1), json!([])] {
        rogue.on(LIST, Act::Json(200, json!({ "data": [odd, sides], "total": total })));
        let page = wallet.history(&Cursor::window(0, u64::MAX), 10).await.unwrap();
        let named: Vec<_> = page.unreadable.iter().map(|odd| odd.payment_hash).collect();
        assert_eq!(named, [Some(invoice.payment_hash)], "{total}");
        assert_eq!(
            (page.items[0].amount_msat, page.items[0].fee_msat, page.items.len()),
            (21_000, Some(7), 1)
        );
        // Where the total is told, the walk ends with it; elsewhere with an empty page.
        assert_eq!(page.next.is_none(), total == json!(2) || total == json!("2"), "{total}");
    }
    rogue.on(LIST, Act::Json(200, json!({ "data": [], "total": "many" })));
    assert_eq!(wallet.history(&Cursor::window(0, u64::MAX), 10).await.unwrap().next, None);
    // What is paid is told although another row under the hash cannot be read; what is not paid is not.
    rogue.on(LIST, list(&[odd.clone(), sides.clone()]));
    let state = wallet.look_up(&invoice.payment_hash).await.unwrap().state;
    assert!(matches!(state, State::Settled { received_msat: Some(21_000), .. }), "{state:?}");
    rogue.on(LIST, list(&[odd, row(&invoice, -21_000, "failed")]));
    assert!(matches!(wallet.outgoing(&invoice.payment_hash).await, Err(Error::Nonsense(_))));
}

#[tokio::test]
async fn slow_answers_are_waited_for_side_by_side() {
    let rogue = Rogue::start().await;
    rogue.on(LIST, Act::Silence);
    let wallet = rogue.wallet();
    let began = Instant::now();
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..16 {
        let wallet = Arc::clone(&wallet);
        calls.spawn(async move { wallet.look_up(&PaymentHash::from_bytes([n; 32])).await });
    }
    for answer in calls.join_all().await {
        assert!(matches!(answer, Err(Error::Slow { .. })));
    }
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "sixteen seconds one by one, {:?} here",
        began.elapsed()
    );
}
