//! A wallet behind NIP-47 that has hold invoices, with real books over two purses, the provider's and the customer's:
//! what a payment locks has left the customer and not reached the provider until it is settled, and goes back when it is
//! cancelled or its lock runs out. It is ours because no wallet that can be run in a test has them. The relay that it
//! answers over is its own, and hands everything to everybody.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coinop::wallet::{Preimage, read_bolt11};
use futures_util::{SinkExt, StreamExt};
use nostr_sdk::nips::nip44;
use nostr_sdk::prelude::*;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio_tungstenite::accept_async;
use tokio_tungstenite::tungstenite::Message;

use crate::support::now_s;
use crate::testing::invoice_locking;

const METHODS: &str = "get_balance make_invoice lookup_invoice pay_invoice list_transactions make_hold_invoice \
    settle_hold_invoice cancel_hold_invoice notifications";

/// How the provider's side answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mood {
    #[default]
    Well,
    /// Nothing is answered.
    Away,
    /// Settling is refused, and nothing is done.
    WillNotSettle,
    /// Settling is done, and not answered.
    SettlesInSilence,
    /// The same, and nothing else is answered either once it has been asked to settle.
    SettlesAndIsAway,
    /// Cancelling is refused, and nothing is done.
    WillNotCancel,
    /// It makes plain invoices only, whatever it announces.
    MayNotHold,
}

/// Where one invoice is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    Open,
    /// Out of the customer's purse, not in the provider's.
    Locked(u64),
    Settled(u64),
    /// Cancelled, or its lock ran out.
    Failed,
}

struct Row {
    bolt11: String,
    msat: u64,
    expires_at_s: u64,
    hold: bool,
    /// Known to the wallet from the beginning for a plain one, from the settling on for a held one.
    preimage: Option<Preimage>,
    at: At,
}

#[derive(Default)]
struct Books {
    mood: Mood,
    provider_msat: u64,
    customer_msat: u64,
    rows: HashMap<String, Row>,
    /// For how many blocks payments stay locked, whatever is asked for.
    lock_blocks: Option<u64>,
    /// Methods that the provider has asked for.
    asked: Vec<String>,
    /// The provider's answers leave out what they may, or say it oddly, each in another way.
    odd: Option<usize>,
    /// Frames by request, so that one that comes again is not done again.
    answered: HashMap<EventId, Option<String>>,
}

/// One purse's connection.
#[derive(Clone)]
struct Side {
    wallet: Keys,
    client: Keys,
    is_provider: bool,
}

struct Shared {
    books: Mutex<Books>,
    sides: [Side; 2],
    live: broadcast::Sender<String>,
}

pub struct Vault {
    /// `nostr+walletconnect://…` of each purse.
    pub provider: String,
    pub customer: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

/// What the customer's purse has at first.
pub const FUNDS_MSAT: u64 = 1_000_000;

impl Vault {
    pub async fn open() -> Vault {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let relay = format!("ws://{}", listener.local_addr().expect("its address"));
        let side = |is_provider| Side { wallet: Keys::generate(), client: Keys::generate(), is_provider };
        let sides = [side(true), side(false)];
        let [provider, customer] = sides.each_ref().map(|side| {
            let (wallet, secret) =
                (side.wallet.public_key().to_hex(), side.client.secret_key().to_secret_hex());
            format!("nostr+walletconnect://{wallet}?relay={relay}&secret={secret}")
        });
        let books = Mutex::new(Books { customer_msat: FUNDS_MSAT, ..Books::default() });
        let shared = Arc::new(Shared { books, sides, live: broadcast::channel(1_024).0 });
        let task = tokio::spawn(listen(listener, Arc::clone(&shared)));
        Vault { provider, customer, shared, task }
    }

    pub fn is(&self, mood: Mood) {
        self.books().mood = mood;
    }

    /// From now on every optional field of the provider's answers varies.
    pub fn is_odd(&self) {
        self.books().odd = Some(0);
    }

    /// More money for the customer.
    pub fn fund(&self, msat: u64) {
        self.books().customer_msat += msat;
    }

    /// What is locked in all invoices.
    pub fn locked_msat(&self) -> u64 {
        let books = self.books();
        books.rows.values().map(|row| if let At::Locked(msat) = row.at { msat } else { 0 }).sum()
    }

    /// Invoices that the provider has asked for.
    pub fn made(&self) -> usize {
        self.books().rows.len()
    }

    pub fn locks_for(&self, blocks: u64) {
        self.books().lock_blocks = Some(blocks);
    }

    /// The customer pays: a plain invoice at once, a hold invoice by a lock of `msat`.
    pub fn pays(&self, bolt11: &str, msat: u64) {
        let hash = hash_of(bolt11);
        let taken = self.books().pay(&hash, msat);
        taken.unwrap_or_else(|why| panic!("not paid: {why}"));
        self.shared.told(&hash);
    }

    /// The time of the lock is up.
    pub fn lock_runs_out(&self, bolt11: &str) {
        let mut books = self.books();
        assert!(matches!(books.at(&hash_of(bolt11)), Some(At::Locked(_))), "nothing is locked");
        books.give_back(&hash_of(bolt11)).expect("given back");
    }

    pub fn at(&self, bolt11: &str) -> At {
        self.books().at(&hash_of(bolt11)).expect("an invoice of ours")
    }

    pub fn is_hold(&self, bolt11: &str) -> bool {
        self.books().rows[&hash_of(bolt11)].hold
    }

    pub fn provider_msat(&self) -> u64 {
        self.books().provider_msat
    }

    pub fn customer_msat(&self) -> u64 {
        self.books().customer_msat
    }

    /// How often the provider has asked for this.
    pub fn asked(&self, method: &str) -> usize {
        self.books().asked.iter().filter(|asked| *asked == method).count()
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        locked(&self.shared.books)
    }
}

impl Drop for Vault {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn locked(books: &Mutex<Books>) -> MutexGuard<'_, Books> {
    books.lock().unwrap_or_else(PoisonError::into_inner)
}

fn hash_of(bolt11: &str) -> String {
    read_bolt11(bolt11).expect("an invoice").payment_hash.to_hex()
}

// === the books

impl Books {
    fn at(&self, hash: &str) -> Option<At> {
        self.rows.get(hash).map(|row| row.at)
    }

    fn make(&mut self, asked: &Value, hold: Option<&str>) -> Value {
        let preimage = Preimage::from_bytes(Keys::generate().secret_key().to_secret_bytes());
        let hash = hold.map_or(preimage.payment_hash(), |hash| hash.parse().expect("a hash"));
        let msat = asked["amount"].as_u64().expect("an amount");
        let expiry_s = asked["expiry"].as_u64().expect("an expiry");
        let lock_blocks = self.lock_blocks.or(asked["min_cltv_expiry_delta"].as_u64()).unwrap_or(18);
        let made = invoice_locking(hash, msat, now_s(), expiry_s, lock_blocks);
        let row = Row {
            bolt11: made.bolt11,
            msat,
            expires_at_s: now_s() + expiry_s,
            hold: hold.is_some(),
            preimage: hold.is_none().then_some(preimage),
            at: At::Open,
        };
        let known = self.rows.insert(hash.to_hex(), row);
        assert!(known.is_none(), "a hash is used once");
        self.shown(&hash.to_hex(), "incoming").expect("just made")
    }

    fn pay(&mut self, hash: &str, msat: u64) -> Result<(), &'static str> {
        let row = self.rows.get_mut(hash).ok_or("NOT_FOUND")?;
        if row.at != At::Open || row.expires_at_s <= now_s() {
            return Err("PAYMENT_FAILED");
        }
        self.customer_msat = self.customer_msat.checked_sub(msat).ok_or("INSUFFICIENT_BALANCE")?;
        if row.hold {
            row.at = At::Locked(msat);
        } else {
            row.at = At::Settled(msat);
            self.provider_msat += msat;
        }
        Ok(())
    }

    fn settle(&mut self, preimage: Preimage) -> Result<(), &'static str> {
        let row = self.rows.get_mut(&preimage.payment_hash().to_hex()).ok_or("NOT_FOUND")?;
        let At::Locked(msat) = row.at else { return Err("OTHER") };
        (row.at, row.preimage) = (At::Settled(msat), Some(preimage));
        self.provider_msat += msat;
        Ok(())
    }

    fn give_back(&mut self, hash: &str) -> Result<(), &'static str> {
        let row = self.rows.get_mut(hash).ok_or("NOT_FOUND")?;
        match row.at {
            At::Settled(_) => return Err("OTHER"),
            At::Locked(msat) => self.customer_msat += msat,
            At::Open | At::Failed => {}
        }
        row.at = At::Failed;
        Ok(())
    }

    fn shown(&self, hash: &str, direction: &str) -> Option<Value> {
        let row = self.rows.get(hash)?;
        let (state, msat) = match row.at {
            At::Open if direction == "outgoing" => return None,
            At::Open if row.expires_at_s <= now_s() => ("expired", row.msat),
            At::Open => ("pending", row.msat),
            At::Locked(msat) if direction == "outgoing" => ("pending", msat),
            At::Locked(msat) => ("accepted", msat),
            At::Settled(msat) => ("settled", msat),
            At::Failed => ("failed", row.msat),
        };
        let preimage = row.preimage.filter(|_| state == "settled").map(|preimage| preimage.to_hex());
        Some(json!({
            "type": direction, "state": state, "invoice": row.bolt11, "payment_hash": hash, "amount": msat,
            "fees_paid": 0, "created_at": now_s(), "expires_at": row.expires_at_s, "preimage": preimage,
        }))
    }
}

// === the service

impl Shared {
    /// Tells the provider that something has changed.
    fn told(&self, hash: &str) {
        let side = &self.sides[0];
        let plain = json!({
            "notification_type": "hold_invoice_accepted", "notification": { "payment_hash": hash },
        });
        let built = EventBuilder::new(Kind::Custom(23_197), side.encrypt(&plain));
        let event = built.tag(Tag::public_key(side.client.public_key())).sign_with_keys(&side.wallet);
        self.say(frame(&event.expect("signed")));
    }

    /// To everybody who is connected, if anybody is.
    fn say(&self, frame: String) {
        self.live.send(frame).unwrap_or_default();
    }

    /// What a request comes to; `None`: it is not answered.
    fn serve(&self, side: &Side, method: &str, params: &Value) -> Option<Result<Value, &'static str>> {
        let mut books = locked(&self.books);
        let mood = if side.is_provider { books.mood } else { Mood::Well };
        if side.is_provider {
            books.asked.push(method.into());
        }
        let hash = params["payment_hash"].as_str().unwrap_or_default();
        Some(match (method, mood) {
            (_, Mood::Away) => return None,
            ("lookup_invoice", Mood::SettlesAndIsAway)
                if books.asked.iter().any(|asked| asked == "settle_hold_invoice") =>
            {
                return None;
            }
            ("get_balance", _) if side.is_provider => Ok(json!({ "balance": books.provider_msat })),
            ("get_balance", _) => Ok(json!({ "balance": books.customer_msat })),
            ("make_hold_invoice", Mood::MayNotHold) => Err("RESTRICTED"),
            ("make_invoice", _) => Ok(books.make(params, None)),
            ("make_hold_invoice", _) => Ok(books.make(params, Some(hash))),
            ("lookup_invoice", _) => {
                let direction = if side.is_provider { "incoming" } else { "outgoing" };
                books.shown(hash, direction).ok_or("NOT_FOUND")
            }
            ("list_transactions", _) => {
                let from = usize::try_from(params["offset"].as_u64().unwrap_or(0)).expect("an offset");
                let mut hashes: Vec<&String> = books.rows.keys().collect();
                hashes.sort();
                let rows: Vec<_> =
                    hashes.iter().skip(from).take(20).filter_map(|h| books.shown(h, "incoming")).collect();
                Ok(json!({ "transactions": rows }))
            }
            ("settle_hold_invoice", Mood::WillNotSettle) | ("cancel_hold_invoice", Mood::WillNotCancel) => {
                Err("INTERNAL")
            }
            ("settle_hold_invoice", _) => {
                let preimage = params["preimage"].as_str().and_then(Preimage::from_hex);
                let settled = books.settle(preimage.expect("a preimage"));
                if matches!(mood, Mood::SettlesInSilence | Mood::SettlesAndIsAway) {
                    return None;
                }
                settled.map(|()| json!({}))
            }
            ("cancel_hold_invoice", _) => books.give_back(hash).map(|()| json!({})),
            other => panic!("not in this test: {other:?}"),
        })
    }

    /// Pays out of the customer's purse, and does not come back before there is an end.
    async fn paid(&self, hash: &str) -> Result<Value, &'static str> {
        {
            let mut books = locked(&self.books);
            let msat = books.rows.get(hash).ok_or("NOT_FOUND")?.msat;
            books.pay(hash, msat)?;
        }
        self.told(hash);
        loop {
            {
                let books = locked(&self.books);
                match books.rows.get(hash).ok_or("NOT_FOUND")? {
                    Row { at: At::Settled(_), preimage: Some(preimage), .. } => {
                        return Ok(json!({ "preimage": preimage.to_hex(), "fees_paid": 0 }));
                    }
                    Row { at: At::Locked(_), .. } => {}
                    _ => return Err("PAYMENT_FAILED"),
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// One request, once.
    async fn request(self: Arc<Self>, event: Event) {
        let to = event.tags.public_keys().next().copied();
        let Some(side) = self.sides.iter().find(|side| Some(side.wallet.public_key()) == to) else { return };
        let known = locked(&self.books).answered.insert(event.id, None);
        if let Some(again) = known {
            locked(&self.books).answered.insert(event.id, again.clone());
            again.into_iter().for_each(|frame| self.say(frame));
            return;
        }
        let plain =
            nip44::decrypt(side.wallet.secret_key(), &event.pubkey, &event.content).expect("readable");
        let asked: Value = serde_json::from_str(&plain).expect("JSON");
        let method = asked["method"].as_str().expect("a method");
        let answer = match method {
            "pay_invoice" => {
                let bolt11 = asked["params"]["invoice"].as_str().expect("an invoice");
                Some(self.paid(&hash_of(bolt11)).await)
            }
            _ => self.serve(side, method, &asked["params"]),
        };
        let Some(answer) = answer else { return };
        let mut plain = match answer {
            Ok(result) => json!({ "result_type": method, "error": null, "result": result }),
            Err(code) => {
                let error = json!({ "code": code, "message": "so says the vault" });
                json!({ "result_type": method, "error": error, "result": null })
            }
        };
        if let (true, Some(turn)) = (side.is_provider, &mut locked(&self.books).odd) {
            vary(&mut plain, method, turn);
        }
        let tags = [
            Tag::parse(["e", &event.id.to_hex()]).expect("a tag"),
            Tag::public_key(side.client.public_key()),
        ];
        let built = EventBuilder::new(Kind::WalletConnectResponse, side.encrypt(&plain)).tags(tags);
        let answer = frame(&built.sign_with_keys(&side.wallet).expect("signed"));
        locked(&self.books).answered.insert(event.id, Some(answer.clone()));
        self.say(answer);
    }
}

/// What a field that decides nothing may be; `None`: it is left out.
fn oddities() -> [Option<Value>; 10] {
    [
        None,
        Some(Value::Null),
        Some(json!("1795904000")),
        Some(json!(1_795_904_000.5)),
        Some(json!(-1)),
        Some(json!(0)),
        Some(json!("")),
        Some(json!("now")),
        Some(json!([true])),
        Some(json!({ "a": 1 })),
    ]
}

/// Makes one optional field of the envelope, and each of a transaction, something else at each turn.
fn vary(plain: &mut Value, method: &str, turn: &mut usize) {
    let sides =
        ["created_at", "expires_at", "settled_at", "fees_paid", "description", "preimage", "metadata"];
    let change = |value: &mut Value, names: &[&str], turn: &mut usize| {
        let Some(fields) = value.as_object_mut() else { return };
        for name in names {
            *turn += 1;
            let odd = oddities()[*turn % 10].clone();
            odd.map_or_else(|| fields.remove(*name), |odd| fields.insert((*name).to_owned(), odd));
        }
        // From one answer to the next each field takes another one.
        *turn += 1;
    };
    let is_told = !plain["error"].is_null();
    change(plain, if is_told { &["result_type", "result"] } else { &["total"] }, turn);
    let result = &mut plain["result"];
    match method {
        _ if is_told => {}
        // What was asked for by its hash is known.
        "lookup_invoice" => {
            change(result, &[&sides[..], &["type", "payment_hash", "invoice"]].concat(), turn);
        }
        "make_invoice" | "make_hold_invoice" => {
            change(result, &[&sides[..], &["type", "payment_hash", "state", "amount"]].concat(), turn);
        }
        "list_transactions" => {
            let rows = result["transactions"].as_array_mut().expect("a list");
            rows.iter_mut().for_each(|row| change(row, &sides, turn));
        }
        "settle_hold_invoice" | "cancel_hold_invoice" => change(result, &["result"], turn),
        _ => {}
    }
}

impl Side {
    fn encrypt(&self, plain: &Value) -> String {
        let (secret, to) = (self.wallet.secret_key(), self.client.public_key());
        nip44::encrypt(secret, &to, plain.to_string(), nip44::Version::V2).expect("encrypted")
    }

    fn info(&self) -> String {
        let tags = [["encryption", "nip44_v2"], ["notifications", "hold_invoice_accepted"]];
        let tags = tags.into_iter().map(|tag| Tag::parse(tag).expect("a tag"));
        let built = EventBuilder::new(Kind::WalletConnectInfo, METHODS).tags(tags);
        frame(&built.sign_with_keys(&self.wallet).expect("signed"))
    }
}

fn frame(event: &Event) -> String {
    format!(r#"["EVENT","x",{}]"#, event.as_json())
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(connection(stream, Arc::clone(&shared)));
    }
}

/// Until the other side hangs up.
async fn connection(stream: TcpStream, shared: Arc<Shared>) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let (mut out, mut inbox) = accept_async(stream).await.ok()?.split();
    let mut live = shared.live.subscribe();
    loop {
        let said = tokio::select! {
            frame = live.recv() => {
                out.send(Message::text(frame.ok()?)).await.ok()?;
                continue;
            }
            said = inbox.next() => said?.ok()?,
        };
        let Message::Text(text) = said else { continue };
        let said: Value = serde_json::from_str(&text).ok()?;
        match said[0].as_str()? {
            "REQ" if said[1] == "wallet" => {
                let wallet = said[2]["authors"][0].as_str()?;
                let side = shared.sides.iter().find(|side| side.wallet.public_key().to_hex() == wallet)?;
                out.send(Message::text(side.info())).await.ok()?;
            }
            "EVENT" => {
                let event: Event = serde_json::from_value(said[1].clone()).ok()?;
                event.verify().expect("a signed request");
                out.send(Message::text(json!(["OK", event.id, true, ""]).to_string())).await.ok()?;
                tokio::spawn(Arc::clone(&shared).request(event));
            }
            _ => {}
        }
    }
}
