//! The subscriptions of one connection: which REQ is to be sent, which ended, which is sent again when. Pure
//! bookkeeping for `session.rs`; what to subscribe to is decided above.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::verify::Wanted;
use crate::backoff::Backoff;

/// How long a subscription lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// Until unsubscribed: sent again on every new connection and after a CLOSED.
    Always,
    /// Until the connection ends; sent again after a CLOSED.
    Connection,
    /// Until the stored events have come, a CLOSED, or the end of the connection.
    Once,
}

/// What became of a subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    /// Waits for AUTH or its next try.
    Waits,
    /// Gone for good.
    Gone,
}

#[derive(Debug)]
struct One {
    wanted: Arc<Wanted>,
    life: Life,
    state: State,
    retry: Backoff,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unsent,
    Sent,
    /// Sent, and all that the relay shows to somebody it does not know has come: AUTH is under way.
    Told,
    /// Sent, and its stored events have come.
    Live,
    NeedsAuth,
    After(Instant),
}

impl State {
    fn is_open(self) -> bool {
        matches!(self, Self::Sent | Self::Told | Self::Live)
    }
}

#[derive(Debug, Default)]
pub(super) struct Subscriptions {
    all: BTreeMap<String, One>,
    /// Ids the relay should forget.
    to_close: Vec<String>,
}

impl Subscriptions {
    pub(super) fn subscribe(&mut self, id: String, wanted: Arc<Wanted>, life: Life) {
        let retry = Backoff::new(Duration::from_secs(2), Duration::from_secs(600));
        self.to_close.retain(|closing| *closing != id);
        self.all.insert(id, One { wanted, life, state: State::Unsent, retry });
    }

    pub(super) fn unsubscribe(&mut self, id: &str) {
        if self.all.remove(id).is_some_and(|one| one.state.is_open()) {
            self.to_close.push(id.to_owned());
        }
    }

    /// What was asked under this id, if it was asked.
    pub(super) fn wanted(&self, id: &str) -> Option<&Arc<Wanted>> {
        self.all.get(id).filter(|one| one.state.is_open()).map(|one| &one.wanted)
    }

    /// The messages that are due: CLOSE and REQ.
    pub(super) fn due(&mut self, now: Instant, authed: bool) -> Vec<String> {
        let mut messages: Vec<String> =
            self.to_close.drain(..).map(|id| serde_json::json!(["CLOSE", id]).to_string()).collect();
        for (id, one) in &mut self.all {
            let due = match one.state {
                State::Unsent => true,
                State::Sent | State::Told | State::Live => false,
                State::NeedsAuth => authed,
                State::After(at) => at <= now,
            };
            if due {
                one.state = State::Sent;
                messages.push(request(id, &one.wanted));
            }
        }
        messages
    }

    /// All stored events have come. `true`: it was asked for, and this is the first time that it is said. While the
    /// relay waits to be told who we are (`auth_pending`) what came is not the whole.
    pub(super) fn end_of_stored(&mut self, id: &str, auth_pending: bool) -> bool {
        let open = |one: &&mut One| matches!(one.state, State::Sent | State::Told);
        let Some(one) = self.all.get_mut(id).filter(open) else { return false };
        if auth_pending {
            one.state = State::Told;
            return false;
        }
        one.retry.reset();
        one.state = State::Live;
        if one.life == Life::Once {
            self.unsubscribe(id);
        }
        true
    }

    /// The relay ended it. `None`: it was not open.
    pub(super) fn closed(&mut self, id: &str, needs_auth: bool, now: Instant, jitter: f64) -> Option<Ended> {
        let one = self.all.get_mut(id).filter(|one| one.state.is_open())?;
        let pause = one.retry.next(jitter);
        if needs_auth {
            one.state = State::NeedsAuth;
            return Some(Ended::Waits);
        }
        if one.life == Life::Once {
            self.all.remove(id);
            return Some(Ended::Gone);
        }
        one.state = State::After(now + pause);
        Some(Ended::Waits)
    }

    /// The relay knows us now: what it was asked before is asked again, for it may show more.
    pub(super) fn authenticated(&mut self) {
        for one in self.all.values_mut().filter(|one| one.state.is_open()) {
            one.state = State::Unsent;
        }
    }

    /// AUTH came to nothing. What was told is the whole after all (the first list); what waited for AUTH is tried later,
    /// or gone (the second).
    pub(super) fn auth_failed(&mut self, now: Instant, jitter: f64) -> (Vec<String>, Vec<String>) {
        let in_state = |all: &BTreeMap<String, One>, state: State| -> Vec<String> {
            all.iter().filter(|(_, one)| one.state == state).map(|(id, _)| id.clone()).collect()
        };
        let (told, waiting) = (in_state(&self.all, State::Told), in_state(&self.all, State::NeedsAuth));
        let told = told.into_iter().filter(|id| self.end_of_stored(id, false)).collect();
        let mut gone = Vec::new();
        for id in waiting {
            let Some(one) = self.all.get_mut(&id) else { continue };
            if one.life == Life::Once {
                self.all.remove(&id);
                gone.push(id);
            } else {
                one.state = State::After(now + one.retry.next(jitter));
            }
        }
        (told, gone)
    }

    /// The connection ended.
    pub(super) fn disconnected(&mut self) {
        self.to_close.clear();
        self.all.retain(|_, one| one.life == Life::Always);
        for one in self.all.values_mut() {
            one.state = State::Unsent;
        }
    }
}

fn request(id: &str, wanted: &Wanted) -> String {
    let mut message = vec![serde_json::json!("REQ"), serde_json::json!(id)];
    message.extend(wanted.filters().iter().map(|filter| serde_json::json!(filter)));
    serde_json::Value::Array(message).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nostr_sdk::prelude::{Filter, Kind};

    fn wanted() -> Arc<Wanted> {
        Wanted::new(vec![Filter::new().kind(Kind::Custom(5000))])
    }

    #[test]
    fn a_request_is_sent_once_and_again_after_a_break() {
        let (mut subs, now) = (Subscriptions::default(), Instant::now());
        subs.subscribe("a".into(), wanted(), Life::Always);
        subs.subscribe("b".into(), wanted(), Life::Connection);
        assert_eq!(
            subs.due(now, false),
            [r#"["REQ","a",{"kinds":[5000]}]"#, r#"["REQ","b",{"kinds":[5000]}]"#]
        );
        assert!(subs.due(now, false).is_empty());
        subs.disconnected();
        assert_eq!(subs.due(now, false), [r#"["REQ","a",{"kinds":[5000]}]"#]);
    }

    #[test]
    fn what_was_not_asked_is_not_wanted() {
        let mut subs = Subscriptions::default();
        subs.subscribe("a".into(), wanted(), Life::Always);
        assert!(subs.wanted("a").is_none(), "not sent yet");
        assert!(!subs.end_of_stored("a", false));
        subs.due(Instant::now(), false);
        assert!(subs.wanted("a").is_some() && subs.wanted("b").is_none());
        subs.unsubscribe("a");
        assert_eq!(subs.due(Instant::now(), false), [r#"["CLOSE","a"]"#]);
    }

    #[test]
    fn a_single_use_ends_with_the_stored_events() {
        let (mut subs, now) = (Subscriptions::default(), Instant::now());
        subs.subscribe("page".into(), wanted(), Life::Once);
        subs.due(now, false);
        assert!(subs.end_of_stored("page", false));
        assert_eq!(subs.due(now, false), [r#"["CLOSE","page"]"#]);
        assert!(subs.all.is_empty());
        assert!(!subs.end_of_stored("page", false), "once");
    }

    #[test]
    fn a_closed_subscription_waits_for_auth_or_its_time() {
        let (mut subs, now) = (Subscriptions::default(), Instant::now());
        subs.subscribe("a".into(), wanted(), Life::Connection);
        subs.due(now, false);
        assert_eq!(subs.closed("a", true, now, 1.0), Some(Ended::Waits));
        assert!(subs.due(now, false).is_empty());
        assert_eq!(subs.due(now, true).len(), 1);
        assert_eq!(subs.closed("a", false, now, 1.0), Some(Ended::Waits));
        assert_eq!(subs.closed("a", false, now, 1.0), None, "it is closed already");
        assert!(subs.due(now + Duration::from_secs(3), true).is_empty(), "the second pause is longer");
        assert_eq!(subs.due(now + Duration::from_secs(4), true).len(), 1);
    }

    #[test]
    fn what_was_told_before_auth_is_not_the_whole_and_is_asked_again() {
        let (mut subs, now) = (Subscriptions::default(), Instant::now());
        for (id, life) in [("page", Life::Once), ("live", Life::Connection)] {
            subs.subscribe(id.into(), wanted(), life);
        }
        subs.due(now, false);
        assert!(!subs.end_of_stored("page", true) && !subs.end_of_stored("live", true));
        subs.authenticated();
        assert_eq!(subs.due(now, true).len(), 2, "both are asked again");
        assert!(subs.end_of_stored("page", false) && subs.end_of_stored("live", false));
    }

    #[test]
    fn when_auth_comes_to_nothing_what_was_told_is_all_there_is() {
        let (mut subs, now) = (Subscriptions::default(), Instant::now());
        for (id, life) in [("page", Life::Once), ("other", Life::Once), ("live", Life::Connection)] {
            subs.subscribe(id.into(), wanted(), life);
        }
        subs.due(now, false);
        assert!(!subs.end_of_stored("page", true));
        assert_eq!(subs.closed("other", true, now, 1.0), Some(Ended::Waits));
        assert_eq!(subs.closed("live", true, now, 1.0), Some(Ended::Waits));
        assert_eq!(subs.auth_failed(now, 1.0), (vec!["page".to_owned()], vec!["other".to_owned()]));
        assert!(subs.due(now, false).iter().all(|message| !message.starts_with("[\"REQ")), "not at once");
        assert_eq!(subs.due(now + Duration::from_secs(9), false).len(), 1, "the live one is tried again");
    }
}
