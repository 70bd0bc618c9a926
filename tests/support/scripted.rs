//! A relay that says exactly what a test tells it to: raw frames, forged or not, stored or live, without looking
//! at filters. It keeps what it is given and how it is asked.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::{SinkExt, StreamExt};
use nostr_sdk::prelude::{Event, JsonUtil};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio::task::{JoinHandle, JoinSet};
use tokio_tungstenite::tungstenite::Message;

/// What it says to an EVENT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Says {
    Ok,
    /// `OK false` with this reason.
    Refuses(String),
    /// Takes it and says nothing.
    Nothing,
}

pub struct Scripted {
    pub url: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    state: Mutex<State>,
    live: broadcast::Sender<String>,
}

struct State {
    /// Events as raw JSON, sent to every subscription.
    stored: Vec<String>,
    given: Vec<Event>,
    asked: Vec<Value>,
    says: Says,
}

impl Scripted {
    pub async fn start() -> Scripted {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let url = format!("ws://{}", listener.local_addr().expect("its address"));
        let state = State { stored: Vec::new(), given: Vec::new(), asked: Vec::new(), says: Says::Ok };
        let shared = Arc::new(Shared { state: Mutex::new(state), live: broadcast::channel(1024).0 });
        let task = tokio::spawn(listen(listener, Arc::clone(&shared)));
        Scripted { url, shared, task }
    }

    /// Stores an event, whatever it is, and sends it to every subscription that is open.
    pub fn push(&self, event: &str) {
        self.state().stored.push(event.to_string());
        // Nobody connected yet: it is sent with the stored ones.
        self.shared.live.send(event.to_string()).unwrap_or_default();
    }

    /// Everything that was published here, in order.
    pub fn given(&self) -> Vec<Event> {
        self.state().given.clone()
    }

    /// What was published here about a request.
    pub fn given_about(&self, request: &Event) -> Vec<Event> {
        let id = request.id.to_hex();
        let about = |event: &Event| event.tags.iter().any(|t| t.as_slice().get(1) == Some(&id));
        self.given().into_iter().filter(|event| about(event)).collect()
    }

    /// Every filter of every REQ so far.
    pub fn asked(&self) -> Vec<Value> {
        self.state().asked.clone()
    }

    pub fn says(&self, says: Says) {
        self.state().says = says;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    connections.spawn(serve(stream, Arc::clone(&shared)));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Until the client hangs up; a client that breaks off is no fault of the test.
async fn serve(stream: TcpStream, shared: Arc<Shared>) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let (mut out, mut inbox) = tokio_tungstenite::accept_async(stream).await.ok()?.split();
    let mut live = shared.live.subscribe();
    let mut open: BTreeSet<String> = BTreeSet::new();
    loop {
        tokio::select! {
            pushed = live.recv() => {
                let event = pushed.ok()?;
                for id in &open {
                    out.send(Message::text(frame(id, &event))).await.ok()?;
                }
            }
            message = inbox.next() => {
                let text = match message?.ok()? {
                    Message::Text(text) => text,
                    Message::Close(_) => return None,
                    _ => continue,
                };
                let message: Value = serde_json::from_str(&text).ok()?;
                let word = message.get(0)?.as_str()?.to_string();
                match word.as_str() {
                    "REQ" => {
                        let id = message.get(1)?.as_str()?.to_string();
                        let filters = message.as_array()?.iter().skip(2).cloned();
                        let stored = {
                            let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
                            state.asked.extend(filters);
                            state.stored.clone()
                        };
                        for event in stored {
                            out.send(Message::text(frame(&id, &event))).await.ok()?;
                        }
                        out.send(Message::text(json!(["EOSE", id]).to_string())).await.ok()?;
                        open.insert(id);
                    }
                    "CLOSE" => {
                        open.remove(message.get(1)?.as_str()?);
                    }
                    "EVENT" => {
                        let event = Event::from_json(message.get(1)?.to_string()).ok()?;
                        let says = {
                            let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
                            if matches!(state.says, Says::Ok | Says::Nothing) {
                                state.given.push(event.clone());
                            }
                            state.says.clone()
                        };
                        let answer = match says {
                            Says::Nothing => continue,
                            Says::Ok => json!(["OK", event.id.to_hex(), true, ""]),
                            Says::Refuses(reason) => json!(["OK", event.id.to_hex(), false, reason]),
                        };
                        out.send(Message::text(answer.to_string())).await.ok()?;
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Raw text, so that it may be deeper, longer and less of an event than a parser would let through.
fn frame(subscription: &str, event: &str) -> String {
    format!(r#"["EVENT",{},{event}]"#, json!(subscription))
}
