//! A relay that does what a test tells it to, honest or not, over real sockets on loopback.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use nostr_sdk::prelude::*;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio::task::{JoinHandle, JoinSet};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

/// How it behaves. The default is an honest relay without events.
#[derive(Clone, Default)]
pub struct Rules {
    /// Most stored events sent for one REQ; 0: all.
    pub page: usize,
    /// Frames sent as they are before the answer to each REQ; `SUB` in them becomes the subscription.
    pub raw: Vec<String>,
    /// Frames sent as they are before anything is asked.
    pub greeting: Vec<String>,
    /// Stored events are sent whatever was asked.
    pub unfiltered: bool,
    pub never_eose: bool,
    /// The connection is closed after this many messages to the client; 0: never.
    pub hang_up_after: usize,
    /// REQ and EVENT need AUTH first.
    pub auth: bool,
    /// Stored events are shown only after AUTH; EOSE is said to everybody.
    pub shy: bool,
    /// AUTH gets no answer.
    pub deaf_to_auth: bool,
    /// EVENT is refused as restricted before AUTH.
    pub restricted: bool,
    /// Published events are stored and passed on.
    pub keeps: bool,
    /// Answers to EVENTs, in order; then OK true. `None`: no answer at all.
    pub answers: Vec<Option<(bool, String)>>,
    /// The first so many REQs are refused with this reason.
    pub closed: (usize, String),
    /// Sent to a GET that is no upgrade.
    pub nip11: Option<String>,
    /// TCP is accepted, nothing is ever said.
    pub mute: bool,
    /// After the upgrade the beginning of a frame is sent, and no more.
    pub drip: bool,
}

pub struct Shared {
    pub rules: Mutex<Rules>,
    pub stored: Mutex<Vec<Event>>,
    /// Every filter of every REQ, in order.
    pub asked: Mutex<Vec<Value>>,
    /// Every EVENT sent to us, in order, with repetitions.
    pub published: Mutex<Vec<Event>>,
    pub connections: AtomicUsize,
    pub open: AtomicUsize,
    /// The subscriptions open on the connection that spoke last.
    pub subscribed: Mutex<Vec<String>>,
    live: broadcast::Sender<String>,
}

impl Shared {
    fn next_answer(&self) -> Option<(bool, String)> {
        let mut rules = self.rules.lock().unwrap();
        if rules.answers.is_empty() { Some((true, String::new())) } else { rules.answers.remove(0) }
    }
}

pub struct Fake {
    pub address: SocketAddr,
    pub shared: Arc<Shared>,
    task: Option<JoinHandle<()>>,
}

impl Fake {
    pub async fn start(rules: Rules) -> Self {
        let shared = Arc::new(Shared {
            rules: Mutex::new(rules),
            stored: Mutex::default(),
            asked: Mutex::default(),
            published: Mutex::default(),
            connections: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            subscribed: Mutex::default(),
            live: broadcast::channel(10_000).0,
        });
        let mut fake = Self { address: ([127, 0, 0, 1], 0).into(), shared, task: None };
        fake.up().await;
        fake
    }

    pub fn url(&self) -> String {
        format!("ws://{}", self.address)
    }

    /// Listens (again) at the same address.
    pub async fn up(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.address = listener.local_addr().unwrap();
        self.task = Some(tokio::spawn(listen(listener, Arc::clone(&self.shared))));
    }

    /// Every connection breaks, and nobody listens any more.
    pub async fn down(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            assert!(task.await.unwrap_err().is_cancelled());
        }
    }

    pub fn rules(&self, change: impl FnOnce(&mut Rules)) {
        change(&mut self.shared.rules.lock().unwrap());
    }

    /// Stores an event, and sends it to every subscription that wants it.
    pub fn publish(&self, event: &Event) {
        self.store(event);
        self.say(&json!(["EVENT", "SUB", event]).to_string());
    }

    pub fn store(&self, event: &Event) {
        self.shared.stored.lock().unwrap().push(event.clone());
    }

    /// Says a frame to all live subscriptions, as it is.
    pub fn say(&self, frame: &str) {
        self.shared.live.send(frame.to_owned()).ok();
    }

    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    pub fn open(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// The filters asked under subscriptions whose ids begin so.
    pub fn asked(&self, id: &str) -> Vec<Value> {
        let asked = self.shared.asked.lock().unwrap();
        asked.iter().filter(|a| a[0].as_str().unwrap().starts_with(id)).map(|a| a[1].clone()).collect()
    }

    /// The subscriptions open on the connection that spoke last.
    pub fn subscribed(&self) -> Vec<String> {
        self.shared.subscribed.lock().unwrap().clone()
    }

    pub fn published(&self) -> Vec<Event> {
        self.shared.published.lock().unwrap().clone()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        connections.spawn(serve(stream, Arc::clone(&shared)));
    }
}

/// Counts a connection as open for as long as it lives.
struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn serve(mut stream: TcpStream, shared: Arc<Shared>) {
    let rules = shared.rules.lock().unwrap().clone();
    let mut head = [0; 2048];
    let read = stream.peek(&mut head).await.unwrap_or(0);
    let head = String::from_utf8_lossy(&head[..read]).to_lowercase();
    if rules.mute {
        return std::future::pending().await;
    }
    if !head.contains("sec-websocket-key") {
        let body = rules.nip11.unwrap_or_else(|| "{}".into());
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let mut sink = [0; 2048];
        // Was peeked at already; taken off the socket so that closing does not reset it.
        let _read = stream.read(&mut sink).await.ok();
        stream.write_all(answer.as_bytes()).await.ok();
        return;
    }
    let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else { return };
    shared.connections.fetch_add(1, Ordering::SeqCst);
    shared.open.fetch_add(1, Ordering::SeqCst);
    let _open = Open(Arc::clone(&shared));
    if rules.drip {
        // A text frame of 100 bytes, of which five come.
        socket.get_mut().write_all(&[0x81, 100, b'[', b'"', b'E', b'V', b'E']).await.ok();
        return std::future::pending().await;
    }
    let mut connection = Connection { socket, said: 0, subscriptions: Vec::new(), authed: false, shared };
    connection.run().await;
}

struct Connection {
    socket: WebSocketStream<TcpStream>,
    said: usize,
    subscriptions: Vec<(String, Vec<Filter>)>,
    authed: bool,
    shared: Arc<Shared>,
}

impl Connection {
    async fn run(&mut self) -> Option<()> {
        let mut live = self.shared.live.subscribe();
        let greeting = self.shared.rules.lock().unwrap().greeting.clone();
        for frame in greeting {
            self.say(frame).await?;
        }
        loop {
            tokio::select! {
                message = self.socket.next() => match message?.ok()? {
                    Message::Text(text) => {
                        self.on_message(&serde_json::from_str(&text).ok()?).await?;
                        let open = self.subscriptions.iter().map(|(id, _)| id.clone()).collect();
                        *self.shared.subscribed.lock().unwrap() = open;
                    }
                    Message::Close(_) => return None,
                    _ => {}
                },
                frame = live.recv() => {
                    let frame = frame.ok()?;
                    for (id, filters) in self.subscriptions.clone() {
                        let text = frame.replace("SUB", &id);
                        let event = serde_json::from_str::<Value>(&text).ok().map(|v| v[2].clone());
                        let event = event.and_then(|v| serde_json::from_value::<Event>(v).ok());
                        // What is no event is said to everybody.
                        if event.is_none_or(|e| !id.starts_with("fill") && wanted(&filters, &e)) {
                            self.say(text).await?;
                        }
                    }
                }
            }
        }
    }

    async fn say(&mut self, frame: String) -> Option<()> {
        self.socket.send(Message::text(frame)).await.ok()?;
        self.said += 1;
        let hang_up = self.shared.rules.lock().unwrap().hang_up_after;
        if hang_up > 0 && self.said >= hang_up { None } else { Some(()) }
    }

    async fn on_message(&mut self, message: &Value) -> Option<()> {
        let rules = self.shared.rules.lock().unwrap().clone();
        let needs_auth = rules.auth && !self.authed;
        match message[0].as_str()? {
            "REQ" => {
                let id = message[1].as_str()?.to_owned();
                let filters = &message.as_array()?[2..];
                for filter in filters {
                    self.shared.asked.lock().unwrap().push(json!([id, filter]));
                }
                if needs_auth {
                    self.say(json!(["AUTH", "challenge-1"]).to_string()).await?;
                    return self.say(json!(["CLOSED", id, "auth-required: who are you?"]).to_string()).await;
                }
                if rules.closed.0 > 0 {
                    self.shared.rules.lock().unwrap().closed.0 -= 1;
                    return self.say(json!(["CLOSED", id, rules.closed.1]).to_string()).await;
                }
                self.on_request(id, filters, &rules).await
            }
            "CLOSE" => {
                let id = message[1].as_str()?;
                self.subscriptions.retain(|(open, _)| open != id);
                Some(())
            }
            "AUTH" => {
                let event: Event = serde_json::from_value(message[1].clone()).ok()?;
                let good = event.verify().is_ok()
                    && event.kind == Kind::Authentication
                    && event.as_json().contains("challenge-1");
                if rules.deaf_to_auth {
                    return Some(());
                }
                self.authed = good;
                self.say(json!(["OK", event.id, good, ""]).to_string()).await
            }
            "EVENT" => {
                let event: Event = serde_json::from_value(message[1].clone()).ok()?;
                self.shared.published.lock().unwrap().push(event.clone());
                if needs_auth {
                    self.say(json!(["AUTH", "challenge-1"]).to_string()).await?;
                    return self.say(json!(["OK", event.id, false, "auth-required: who?"]).to_string()).await;
                }
                if rules.restricted && !self.authed {
                    return self
                        .say(json!(["OK", event.id, false, "restricted: members only"]).to_string())
                        .await;
                }
                if rules.keeps {
                    self.shared.stored.lock().unwrap().push(event.clone());
                    self.shared.live.send(json!(["EVENT", "SUB", event]).to_string()).ok();
                }
                let answer = self.shared.next_answer();
                match answer {
                    Some((accepted, reason)) => {
                        self.say(json!(["OK", event.id, accepted, reason]).to_string()).await
                    }
                    None => Some(()),
                }
            }
            _ => Some(()),
        }
    }

    async fn on_request(&mut self, id: String, filters: &[Value], rules: &Rules) -> Option<()> {
        let filters: Vec<Filter> =
            filters.iter().map(|f| serde_json::from_value(f.clone()).unwrap()).collect();
        self.subscriptions.retain(|(open, _)| *open != id);
        self.subscriptions.push((id.clone(), filters.clone()));
        for frame in &rules.raw {
            self.say(frame.replace("SUB", &id)).await?;
        }
        let hidden = rules.shy && !self.authed;
        let stored = if hidden { vec![] } else { self.shared.stored.lock().unwrap().clone() };
        let mut found: Vec<Event> =
            stored.into_iter().filter(|e| rules.unfiltered || wanted(&filters, e)).collect();
        found.sort();
        if rules.page > 0 {
            found.truncate(rules.page);
        }
        for event in found {
            self.say(json!(["EVENT", id, event]).to_string()).await?;
        }
        if rules.never_eose { Some(()) } else { self.say(json!(["EOSE", id]).to_string()).await }
    }
}

fn wanted(filters: &[Filter], event: &Event) -> bool {
    filters.iter().any(|filter| filter.match_event(event, MatchEventOptions::new()))
}

/// Waits until it is so. Looks often, fails after ten seconds with what was waited for.
pub async fn until(what: &str, mut so: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("waited in vain until {what}");
}
