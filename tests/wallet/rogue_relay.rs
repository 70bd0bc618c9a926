//! A relay and a wallet service in one, played by a test: it reads our requests as the wallet would, and sends back
//! whatever frames the test's script says, true or not.

use std::sync::{Arc, Mutex};

use futures_util::{SinkExt, StreamExt};
use nostr_sdk::nips::{nip04, nip44};
use nostr_sdk::prelude::*;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_tungstenite::accept_async;
use tokio_tungstenite::tungstenite::Message;

/// A request of ours as the wallet reads it.
pub struct Asked {
    pub event: Event,
    pub method: String,
    pub params: Value,
}

/// What is sent back: frames, in order; `None` cuts the connection.
type Script = Box<dyn FnMut(&Side, Asked) -> Vec<Option<String>> + Send>;

/// What the wallet's side knows.
#[derive(Clone)]
pub struct Side {
    pub wallet: Keys,
    pub client: PublicKey,
    /// As its info event says; without `nip44_v2` the old scheme.
    pub encryption: &'static str,
    pub methods: &'static str,
    /// The relay wants to know who asks before it lets a request through.
    pub wants_auth: bool,
}

impl Side {
    pub fn is_new(&self) -> bool {
        self.encryption.contains("nip44_v2")
    }

    pub fn encrypt(&self, from: &Keys, plain: &str) -> String {
        let secret = from.secret_key();
        match self.is_new() {
            true => nip44::encrypt(secret, &self.client, plain, nip44::Version::V2).expect("encrypted"),
            false => nip04::encrypt(secret, &self.client, plain).expect("encrypted"),
        }
    }

    fn read(&self, event: Event) -> Asked {
        let secret = self.wallet.secret_key();
        let plain = match self.is_new() {
            true => nip44::decrypt(secret, &event.pubkey, &event.content).expect("a readable request"),
            false => nip04::decrypt(secret, &event.pubkey, &event.content).expect("a readable request"),
        };
        let asked: Value = serde_json::from_str(&plain).expect("JSON");
        Asked { method: asked["method"].as_str().unwrap().into(), params: asked["params"].clone(), event }
    }

    /// An answer event; every part of it can be another's.
    pub fn event(&self, from: &Keys, request: &str, to: Option<PublicKey>, content: &str) -> Event {
        let mut tags = vec![Tag::parse(["e", request]).unwrap()];
        tags.extend(to.map(Tag::public_key));
        let built = EventBuilder::new(Kind::WalletConnectResponse, content).tags(tags);
        built.sign_with_keys(from).expect("signed")
    }

    /// The true answer with this plain text.
    pub fn plain(&self, asked: &Asked, plain: &str) -> Option<String> {
        let content = self.encrypt(&self.wallet, plain);
        frame(&self.event(&self.wallet, &asked.event.id.to_hex(), Some(self.client), &content))
    }

    /// The true answer with this result.
    pub fn result(&self, asked: &Asked, result: &Value) -> Option<String> {
        self.plain(
            asked,
            &json!({ "result_type": asked.method, "error": null, "result": result }).to_string(),
        )
    }

    /// The true answer with this error.
    pub fn error(&self, asked: &Asked, code: &str) -> Option<String> {
        let error = json!({ "code": code, "message": "so says the wallet" });
        self.plain(asked, &json!({ "result_type": asked.method, "error": error, "result": null }).to_string())
    }

    fn info(&self) -> Option<String> {
        let tags = [["encryption", self.encryption], ["notifications", "payment_received"]];
        let tags = tags.into_iter().map(|tag| Tag::parse(tag).unwrap());
        let built = EventBuilder::new(Kind::WalletConnectInfo, self.methods).tags(tags);
        frame(&built.sign_with_keys(&self.wallet).unwrap())
    }
}

/// An event as a relay hands it out.
pub fn frame(event: &Event) -> Option<String> {
    Some(format!(r#"["EVENT","x",{}]"#, event.as_json()))
}

pub struct Rogue {
    /// For `coinop::wallet`.
    pub uri: String,
    script: Arc<Mutex<Script>>,
    task: JoinHandle<()>,
}

pub const METHODS: &str = "get_balance make_invoice lookup_invoice pay_invoice list_transactions make_hold_invoice \
    settle_hold_invoice cancel_hold_invoice notifications";

impl Rogue {
    pub async fn start() -> Rogue {
        Rogue::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut Side)) -> Rogue {
        let (wallet, client) = (Keys::generate(), Keys::generate());
        let mut side = Side {
            wallet,
            client: client.public_key(),
            encryption: "nip44_v2 nip04",
            methods: METHODS,
            wants_auth: false,
        };
        change(&mut side);
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let relay = format!("ws://{}", listener.local_addr().unwrap());
        let script: Arc<Mutex<Script>> = Arc::new(Mutex::new(Box::new(|_, _| Vec::new())));
        let wallet = side.wallet.public_key().to_hex();
        let shared = Arc::clone(&script);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, side.clone(), Arc::clone(&shared)));
            }
        });
        let secret = client.secret_key().to_secret_hex();
        Rogue { uri: format!("nostr+walletconnect://{wallet}?relay={relay}&secret={secret}"), script, task }
    }

    /// From now on requests are answered so.
    pub fn play(&self, script: impl FnMut(&Side, Asked) -> Vec<Option<String>> + Send + 'static) {
        *self.script.lock().unwrap() = Box::new(script);
    }
}

impl Drop for Rogue {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(stream: TcpStream, side: Side, script: Arc<Mutex<Script>>) {
    let Ok(mut socket) = accept_async(stream).await else { return };
    let mut known = !side.wants_auth;
    if side.wants_auth && socket.send(Message::text(r#"["AUTH","prove it"]"#)).await.is_err() {
        return;
    }
    while let Some(Ok(message)) = socket.next().await {
        let Message::Text(text) = message else { continue };
        let said: Value = serde_json::from_str(&text).expect("we send JSON");
        let frames = match said[0].as_str() {
            Some("REQ") if said[1] == "wallet" && known => vec![side.info()],
            Some("REQ") if !known => {
                vec![Some(json!(["CLOSED", said[1], "auth-required: who are you"]).to_string())]
            }
            Some("AUTH") => {
                let event: Event = serde_json::from_value(said[1].clone()).expect("an event");
                known = event.verify().is_ok() && event.pubkey == side.client && event.content.is_empty();
                vec![Some(json!(["OK", event.id, known, ""]).to_string())]
            }
            Some("EVENT") => {
                let event: Event = serde_json::from_value(said[1].clone()).expect("an event");
                event.verify().expect("a signed request");
                let id = event.id;
                match known {
                    true => {
                        let mut frames = script.lock().unwrap()(&side, side.read(event));
                        frames.insert(0, Some(json!(["OK", id, true, ""]).to_string()));
                        frames
                    }
                    false => vec![Some(json!(["OK", id, false, "auth-required: who are you"]).to_string())],
                }
            }
            _ => Vec::new(),
        };
        for frame in frames {
            let Some(frame) = frame else { return };
            if socket.send(Message::text(frame)).await.is_err() {
                return;
            }
        }
    }
}
