//! The real binary, killed: in each state of a job, at every write, and on a disk that takes no more. After the
//! restart every accepted job ends once, with one result id, and nothing is left of the old life.

#[expect(dead_code, reason = "each test program uses a part of it")]
#[path = "../support/mod.rs"]
mod support;

#[path = "../money/deal.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod deal;
#[path = "../support/lnbits.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod lnbits;
#[path = "../support/nwc.rs"]
mod nwc;
#[path = "../e2e/parts.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod parts;

mod disk;
mod owner;
mod paid;
mod states;
mod writes;

use coinop::store::JobState;
use nostr_sdk::prelude::{Event, Kind};

use support::buyer::Buyer;
use support::process::Home;
use support::skip;

/// After everything: the job is done, one result was ever published, the log is whole, nobody is owed.
async fn check_done_once(home: &Home, buyer: &Buyer, request: &Event) {
    let store = home.store();
    store.verify().expect("the log verifies");
    let id = request.id.to_hex();
    let row = store.job(&id).expect("readable").expect("the job is known");
    assert_eq!(row.state, JobState::Done, "{row:?}");
    assert!(row.updated_ms <= row.deadline_ms, "answered within its deadline: {row:?}");
    assert!(store.open_jobs().expect("readable").is_empty());
    let results: Vec<Event> =
        buyer.stored(request).await.into_iter().filter(|e| e.kind == Kind::from(6930u16)).collect();
    assert_eq!(results.len(), 1, "one result id over all events of the relay");
    assert_eq!(row.answer.as_deref(), Some(results[0].id.to_hex().as_str()), "the one in the log");
}
