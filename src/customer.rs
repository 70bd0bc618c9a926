//! The customer's ear: what an event means for one request of ours. Pure; sending, waiting and printing
//! are left to the caller.

pub mod check;
pub mod pay;

use nostr_sdk::prelude::{Event, Filter, Keys, Kind, PublicKey};

use crate::protocol::proof::{self, Finding, Verdict};
use crate::protocol::{FEEDBACK_KIND, Feedback, RESULT_OFFSET, Reply};

/// One request of ours, and whose answers count.
#[derive(Debug, Clone)]
pub struct Customer {
    request: Event,
    keys: Keys,
    /// `None`: anybody may answer.
    provider: Option<PublicKey>,
}

/// What an event turned out to be.
#[derive(Debug, Clone)]
pub enum Heard {
    /// Not for us, not by whom it should be, or not readable; in words.
    Ignored(String),
    Feedback {
        provider: PublicKey,
        feedback: Feedback,
    },
    /// A result with every check that can be made from the event; some may be bad.
    Result(Box<Answer>),
}

/// A result and what is known about it.
#[derive(Debug, Clone)]
pub struct Answer {
    pub event: Event,
    pub reply: Reply,
    pub findings: Vec<Finding>,
}

impl Answer {
    /// The checks that failed.
    pub fn faults(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.findings.iter().filter_map(|finding| match &finding.verdict {
            Verdict::Bad(why) => Some((finding.what, why.as_str())),
            _ => None,
        })
    }

    pub fn is_good(&self) -> bool {
        self.faults().next().is_none()
    }

    /// What the job's commands ended with, where the result is a report that says so.
    pub fn exit_code(&self) -> Option<i64> {
        let report: serde_json::Value = serde_json::from_str(&self.reply.content).ok()?;
        report.get("exit_code")?.as_i64()
    }
}

impl Customer {
    /// `keys` signed `request`; `provider` is the only one who may answer, where given.
    pub fn new(request: Event, keys: Keys, provider: Option<PublicKey>) -> Customer {
        Customer { request, keys, provider }
    }

    pub fn request(&self) -> &Event {
        &self.request
    }

    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// The only one who may answer, if there is one.
    pub fn provider(&self) -> Option<PublicKey> {
        self.provider
    }

    /// Subscribes to all that can be an answer.
    pub fn filter(&self) -> Filter {
        let kinds = [Kind::from(FEEDBACK_KIND), Kind::from(self.result_kind())];
        let filter = Filter::new().kinds(kinds).event(self.request.id);
        // What strangers say about it need not even come.
        match self.provider {
            Some(provider) => filter.author(provider),
            None => filter,
        }
    }

    fn result_kind(&self) -> u16 {
        self.request.kind.as_u16().saturating_add(RESULT_OFFSET)
    }

    /// Judges one event: signature, author, whether it answers our request, and what it says.
    pub fn hear(&self, event: &Event) -> Heard {
        let ignored = |why: &str| Heard::Ignored(why.to_string());
        if event.verify().is_err() {
            return ignored("an event whose signature does not hold");
        }
        if self.provider.is_some_and(|wanted| wanted != event.pubkey) {
            return ignored("an answer by somebody else than the provider asked for");
        }
        let kind = event.kind.as_u16();
        if kind == FEEDBACK_KIND {
            return match Feedback::decode(event, &self.keys) {
                Ok(received) if received.request_id != self.request.id => {
                    ignored("feedback on another request")
                }
                Ok(received) => Heard::Feedback { provider: received.provider, feedback: received.feedback },
                Err(error) => Heard::Ignored(format!("feedback that cannot be read: {error}")),
            };
        }
        if kind != self.result_kind() {
            return Heard::Ignored(format!("an event of kind {kind}"));
        }
        match Reply::decode(event, &self.keys) {
            Ok(reply) if reply.request_id != self.request.id => ignored("the result of another request"),
            Ok(reply) => {
                let findings = proof::check_with_keys(event, Some(&self.request), &self.keys);
                Heard::Result(Box::new(Answer { event: event.clone(), reply, findings }))
            }
            Err(error) => Heard::Ignored(format!("a result that cannot be read: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::draft::Draft;
    use crate::protocol::{Request, feedback};
    use nostr_sdk::prelude::{EventBuilder, Tag};

    const NOW: u64 = 1_790_000_000;

    fn request(customer: &Keys, provider: Option<PublicKey>) -> Event {
        let draft = Draft { kind: 5930, commands: vec!["true".into()], provider, ..Draft::default() };
        draft.unsigned(customer, NOW).unwrap().sign_with_keys(customer).unwrap()
    }

    fn result(request: &Event, provider: &Keys, content: &str) -> Event {
        EventBuilder::new(Kind::from(6930u16), content)
            .tags([Tag::event(request.id), Tag::public_key(request.pubkey)])
            .sign_with_keys(provider)
            .unwrap()
    }

    #[test]
    fn a_result_of_a_stranger_is_ignored_when_a_provider_was_asked_and_heard_when_not() {
        let (customer, provider, stranger) = (Keys::generate(), Keys::generate(), Keys::generate());
        let asked = request(&customer, Some(provider.public_key()));
        let picky = Customer::new(asked.clone(), customer.clone(), Some(provider.public_key()));
        let heard = picky.hear(&result(&asked, &stranger, "x"));
        assert!(matches!(heard, Heard::Ignored(why) if why.contains("somebody else")));
        assert!(matches!(picky.hear(&result(&asked, &provider, "x")), Heard::Result(_)));

        let open = request(&customer, None);
        let easy = Customer::new(open.clone(), customer, None);
        let Heard::Result(answer) = easy.hear(&result(&open, &stranger, r#"{"exit_code": 3}"#)) else {
            panic!("a result")
        };
        assert!(answer.is_good(), "other people's results carry no proof, which is no fault");
        assert_eq!(answer.exit_code(), Some(3));
    }

    #[test]
    fn answers_to_other_requests_and_forged_events_are_ignored_with_the_reason() {
        let (customer, provider) = (Keys::generate(), Keys::generate());
        let (mine, other) = (request(&customer, None), request(&customer, Some(provider.public_key())));
        let ear = Customer::new(mine.clone(), customer, None);
        let heard = ear.hear(&result(&other, &provider, "x"));
        assert!(matches!(heard, Heard::Ignored(why) if why.contains("another request")));
        let mut forged = result(&mine, &provider, "x");
        forged.content = "y".into();
        assert!(matches!(ear.hear(&forged), Heard::Ignored(why) if why.contains("signature")));
    }

    #[test]
    fn feedback_is_heard_with_its_author() {
        let (customer, provider) = (Keys::generate(), Keys::generate());
        let mine = request(&customer, None);
        let decoded = Request::decode(&mine, &provider).unwrap();
        let said = Feedback::new(crate::protocol::Status::Processing, "cloning");
        let event = feedback::unsigned(&decoded, &said, &provider, None, NOW).unwrap();
        let event = event.sign_with_keys(&provider).unwrap();
        match Customer::new(mine, customer, None).hear(&event) {
            Heard::Feedback { provider: by, feedback } => {
                assert_eq!(by, provider.public_key());
                assert_eq!(feedback, said);
            }
            other => panic!("feedback, not {other:?}"),
        }
    }
}
