//! A customer: signs requests, sends them, and reads what the relays have stored about them. It judges events
//! with the library's own customer's ear.

use coinop::customer::{Answer, Customer, Heard};
use coinop::protocol::draft::Draft;
use coinop::protocol::{Code, Feedback, Status, request};
use coinop::relay::{Client, Wire};
use coinop::store::record::Answer as Word;
use nostr_sdk::prelude::{Event, Filter, Keys, Kind, PublicKey};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::{PATIENCE, now_s, until, until_within};

/// One customer at some relays, for one provider.
pub struct Buyer {
    pub keys: Keys,
    pub provider: PublicKey,
    client: Option<Client>,
    orders: AtomicU32,
}

/// How a job ended, as the customer sees it.
#[derive(Debug)]
pub enum End {
    Result(Box<Answer>),
    Error { code: Code, reason: String },
}

impl Buyer {
    pub async fn at(relays: &[String], provider: PublicKey) -> Buyer {
        let client = Client::connect(relays, None, true, quick_wire(), PATIENCE).await.expect("a relay");
        Buyer { client: Some(client), ..Buyer::of(provider) }
    }

    /// One who only signs; a scripted relay carries it.
    pub fn of(provider: PublicKey) -> Buyer {
        Buyer { keys: Keys::generate(), provider, client: None, orders: AtomicU32::new(0) }
    }

    fn client(&self) -> &Client {
        self.client.as_ref().expect("a buyer with relays")
    }

    /// A plain order of these commands. Each is told from the others by a number, for two equal ones signed in
    /// the same second would be one event, and so one job.
    pub fn order(&self, repo: Option<&str>, commands: &[&str]) -> Draft {
        Draft {
            kind: 5930,
            repo: repo.map(str::to_string),
            commands: commands.iter().map(|c| (*c).to_string()).collect(),
            provider: Some(self.provider),
            params: vec![("order".into(), self.orders.fetch_add(1, Ordering::Relaxed).to_string())],
            ..Draft::default()
        }
    }

    pub fn sign(&self, draft: &Draft) -> Event {
        self.sign_at(draft, now_s())
    }

    pub fn sign_at(&self, draft: &Draft, now_s: u64) -> Event {
        let unsigned = draft.unsigned(&self.keys, now_s).expect("a draft that can be written");
        unsigned.sign_with_keys(&self.keys).expect("a signature")
    }

    /// Gives an event to every relay; each must take it.
    pub async fn send(&self, event: &Event) {
        let said = self.client().publish(event, PATIENCE).await;
        assert!(said.iter().all(|p| p.answer == Word::Stored), "{said:?}");
    }

    /// Signs and sends.
    pub async fn post(&self, draft: &Draft) -> Event {
        let event = self.sign(draft);
        self.send(&event).await;
        event
    }

    /// Takes a request back.
    pub async fn cancel(&self, request: &Event) -> Event {
        let event = self.sign_cancel(request);
        self.send(&event).await;
        event
    }

    pub fn sign_cancel(&self, event: &Event) -> Event {
        let kind = event.kind.as_u16();
        let unsigned = request::cancel(&event.id, kind, "not needed any more", &self.keys, now_s());
        unsigned.sign_with_keys(&self.keys).expect("a signature")
    }

    /// Everything of the provider that the relays have stored about a request, each event once.
    pub async fn stored(&self, request: &Event) -> Vec<Event> {
        let filter = Filter::new().author(self.provider).event(request.id);
        self.client().query(vec![filter], PATIENCE).await
    }

    /// Everything that a filter finds.
    pub async fn query(&self, filter: Filter) -> Vec<Event> {
        self.client().query(vec![filter], PATIENCE).await
    }

    /// The feedbacks about a request, decoded.
    pub async fn feedbacks(&self, request: &Event) -> Vec<Feedback> {
        let events = self.stored(request).await;
        let feedback = |event: &Event| Feedback::decode(event, &self.keys).expect("feedback for us").feedback;
        events.iter().filter(|event| event.kind == Kind::from(7000u16)).map(feedback).collect()
    }

    /// The terminal answers about a request: results and errors.
    pub async fn ends(&self, request: &Event) -> Vec<End> {
        let customer = Customer::new(request.clone(), self.keys.clone(), Some(self.provider));
        let mut ends = Vec::new();
        for event in self.stored(request).await {
            match customer.hear(&event) {
                Heard::Result(answer) => ends.push(End::Result(answer)),
                Heard::Feedback { feedback, .. } if feedback.status == Status::Error => {
                    let code = feedback.code().expect("an error names a code of ours");
                    let reason = feedback.extra.clone().unwrap_or_default();
                    ends.push(End::Error { code, reason });
                }
                Heard::Feedback { .. } => {}
                Heard::Ignored(why) => panic!("an answer that cannot be read: {why}"),
            }
        }
        ends
    }

    /// Waits for the end of a job. There must be one, and no second one.
    pub async fn end(&self, request: &Event) -> End {
        self.end_within(request, PATIENCE).await
    }

    pub async fn end_within(&self, request: &Event, within: Duration) -> End {
        let what = format!("the end of {}", request.id);
        let mut ends = until_within(within, &what, async || {
            Some(self.ends(request).await).filter(|ends| !ends.is_empty())
        })
        .await;
        assert_eq!(ends.len(), 1, "one terminal answer: {ends:?}");
        ends.remove(0)
    }

    /// Waits for a genuine result.
    pub async fn result(&self, request: &Event) -> Answer {
        match self.end(request).await {
            End::Result(answer) => {
                assert!(answer.is_good(), "{:?}", answer.findings);
                *answer
            }
            End::Error { reason, .. } => panic!("an error instead of a result: {reason}"),
        }
    }

    /// Waits for an error with this code; gives its sentence.
    pub async fn error(&self, request: &Event, wanted: Code) -> String {
        match self.end(request).await {
            End::Error { code, reason } => {
                assert_eq!(code, wanted, "{reason}");
                reason
            }
            End::Result(answer) => panic!("a result instead of {wanted}: {}", answer.reply.content),
        }
    }

    /// Waits for a feedback of this kind.
    pub async fn feedback(&self, request: &Event, wanted: Status) -> Feedback {
        let what = format!("{} about {}", wanted.as_str(), request.id);
        until(&what, async || self.feedbacks(request).await.into_iter().find(|f| f.status == wanted)).await
    }

    /// Waits until the node has said that it took the job.
    pub async fn accepted(&self, request: &Event) {
        until(&format!("the acceptance of {}", request.id), async || {
            let said = self.feedbacks(request).await;
            said.iter().any(|f| f.status == Status::Processing).then_some(())
        })
        .await;
    }
}

/// What the commands of a report printed, one after the other.
pub fn printed(answer: &Answer) -> String {
    let report: serde_json::Value = serde_json::from_str(&answer.reply.content).expect("a report");
    let runs = report["command_results"].as_array().cloned().unwrap_or_default();
    runs.iter().map(|run| run["stdout"].as_str().unwrap_or_default().to_string()).collect()
}

/// Relays of a test come and go quickly.
pub fn quick_wire() -> Wire {
    let quick = Duration::from_millis(50);
    Wire { backoff_min: quick, backoff_max: 4 * quick, tick: quick, ..Wire::default() }
}
