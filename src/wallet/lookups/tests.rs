//! The look-ups over a scripted wallet. When they ask is tested in `plan.rs`, with the clock held still.

use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;

use super::super::{
    Abilities, Cursor, Identity, Invoice, Kind, NewInvoice, Outgoing, Page, Pay, PayError, Payment,
};
use super::*;

/// Answers look-ups from a table; an absent hash never answers.
struct Scripted {
    states: Mutex<HashMap<PaymentHash, State>>,
    asked: Mutex<HashMap<PaymentHash, usize>>,
    side_by_side: Mutex<(usize, usize)>,
    takes: Duration,
    hints: broadcast::Sender<Hint>,
}

impl Scripted {
    fn new(takes: Duration) -> Arc<Self> {
        let hints = broadcast::channel(4).0;
        Arc::new(Self {
            states: Mutex::default(),
            asked: Mutex::default(),
            side_by_side: Mutex::default(),
            takes,
            hints,
        })
    }

    fn set(&self, n: u8, state: State) {
        self.states.lock().unwrap().insert(hash(n), state);
    }

    fn asked(&self, n: u8) -> usize {
        self.asked.lock().unwrap().get(&hash(n)).copied().unwrap_or_default()
    }
}

#[async_trait::async_trait]
impl Wallet for Scripted {
    fn identity(&self) -> Identity {
        Identity { kind: Kind::Nwc, host: "test".into() }
    }

    async fn abilities(&self) -> Result<Abilities, Error> {
        Ok(Abilities::default())
    }

    async fn make_invoice(&self, _: &NewInvoice) -> Result<Invoice, Error> {
        Err(Error::Full { max: 0 })
    }

    async fn look_up(&self, payment_hash: &PaymentHash) -> Result<Lookup, Error> {
        *self.asked.lock().unwrap().entry(*payment_hash).or_default() += 1;
        let state = self.states.lock().unwrap().get(payment_hash).cloned();
        let Some(state) = state else { std::future::pending().await };
        {
            let (now, most) = &mut *self.side_by_side.lock().unwrap();
            *now += 1;
            *most = (*most).max(*now);
        }
        tokio::time::sleep(self.takes).await;
        self.side_by_side.lock().unwrap().0 -= 1;
        Ok(Lookup { payment_hash: *payment_hash, state })
    }

    async fn pay(&self, _: &Pay) -> Result<Payment, PayError> {
        Err(PayError::Refused(Error::Full { max: 0 }))
    }

    async fn outgoing(&self, _: &PaymentHash) -> Result<Outgoing, Error> {
        Ok(Outgoing::Unknown)
    }

    async fn balance_msat(&self) -> Result<i64, Error> {
        Ok(0)
    }

    async fn history(&self, _: &Cursor, _: u32) -> Result<Page, Error> {
        Ok(Page { items: Vec::new(), unreadable: Vec::new(), next: None })
    }

    fn hints(&self) -> Option<broadcast::Receiver<Hint>> {
        Some(self.hints.subscribe())
    }
}

fn hash(n: u8) -> PaymentHash {
    PaymentHash::from_bytes([n; 32])
}

fn settled() -> State {
    State::Settled { received_msat: Some(1), settled_at_s: None, fee_msat: None }
}

/// As fast as a test wants it.
fn options() -> Options {
    let quick = Schedule::new(Duration::from_millis(10), Duration::from_millis(20));
    Options {
        schedule: quick,
        least_pause: Duration::from_millis(1),
        per_minute: 100_000,
        ..Options::default()
    }
}

/// The next change.
async fn next(found: &mut mpsc::Receiver<Found>) -> Found {
    timeout(Duration::from_secs(20), found.recv())
        .await
        .expect("a change in time")
        .expect("the look-ups go on")
}

fn start(wallet: &Arc<Scripted>, options: Options) -> (Lookups, mpsc::Receiver<Found>) {
    let (sender, found) = mpsc::channel(64);
    (Lookups::start(Arc::clone(wallet) as Arc<dyn Wallet>, options, sender), found)
}

#[tokio::test]
async fn one_that_never_answers_holds_nobody_up_and_only_so_many_are_asked_for_at_once() {
    let wallet = Scripted::new(Duration::from_millis(5));
    let (lookups, mut found) =
        start(&wallet, Options { at_once: 4, each: Duration::from_millis(300), ..options() });
    lookups.follow(hash(0), None).unwrap();
    for n in 1..=12 {
        wallet.set(n, settled());
        lookups.follow(hash(n), None).unwrap();
        lookups.follow(hash(n), None).unwrap();
    }
    let mut seen = BTreeSet::new();
    for _ in 0..12 {
        seen.insert(next(&mut found).await.payment_hash);
    }
    assert_eq!(seen.len(), 12, "each is told once");
    assert!(wallet.side_by_side.lock().unwrap().1 <= 4);
    // After its limit the silent one is asked for again.
    wallet.set(0, settled());
    assert_eq!(next(&mut found).await, Found { payment_hash: hash(0), state: settled() });
    assert_eq!((wallet.asked(0), wallet.asked(1)), (2, 1));
}

#[tokio::test]
async fn a_wallets_hint_leads_to_a_look_and_proves_nothing() {
    let wallet = Scripted::new(Duration::ZERO);
    let hour = Duration::from_secs(3_600);
    let (lookups, mut found) = start(&wallet, Options { schedule: Schedule::new(hour, hour), ..options() });
    wallet.set(1, State::Pending);
    wallet.set(2, State::Pending);
    lookups.follow(hash(1), None).unwrap();
    assert_eq!(next(&mut found).await.state, State::Pending);
    lookups.follow(hash(2), None).unwrap();
    assert_eq!(next(&mut found).await.state, State::Pending);

    wallet.hints.send(Hint::Changed(hash(2))).unwrap();
    wallet.set(1, settled());
    lookups.nudge(hash(1));
    assert_eq!(next(&mut found).await, Found { payment_hash: hash(1), state: settled() });
    wallet.set(2, settled());
    wallet.hints.send(Hint::Anything).unwrap();
    assert_eq!(
        next(&mut found).await.payment_hash,
        hash(2),
        "the hint of before was looked into and was nothing"
    );
}

#[tokio::test]
async fn an_invoice_that_cannot_be_looked_up_is_told_after_a_few_tries_and_no_longer_once_it_can() {
    let wallet = Scripted::new(Duration::ZERO);
    let (lookups, mut found) = start(&wallet, Options { each: Duration::from_millis(5), ..options() });
    lookups.follow(hash(1), None).unwrap();
    let told = async |wanted: usize| {
        let began = Instant::now();
        while lookups.unanswered().len() != wanted {
            assert!(began.elapsed() < Duration::from_secs(20), "{:?}", lookups.unanswered());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        lookups.unanswered()
    };
    let one = told(1).await.remove(0);
    assert!(one.failures >= TOLD_AFTER && one.error.contains("did not answer"), "{one:?}");
    wallet.set(1, State::Pending);
    assert_eq!(next(&mut found).await.state, State::Pending);
    told(0).await;
    for tried in 1..=TOLD_AFTER {
        lookups.failed(hash(2), &Error::Nonsense("a state of 7".into()));
        assert_eq!(lookups.unanswered().len(), usize::from(tried == TOLD_AFTER));
    }
    lookups.forget(hash(2)).await;
    assert!(lookups.unanswered().is_empty());
}
