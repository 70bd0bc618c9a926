//! What is locked in a wallet: lent to credit, held by its job, and gone once, as a whole.

use super::*;
use crate::ledger::transfer::{locked, unlocked};

fn wallet_has(ledger: &Ledger) -> (i128, i128) {
    let balance = |account| ledger.balance(&account).unwrap();
    (balance(Account::Wallet("nwc".into())), balance(Account::Locked("nwc".into())))
}

fn lock() -> Transfer {
    locked("h", "nwc", "j", &alice(), 20_000)
}

fn gone() -> Transfer {
    unlocked(&lock()).unwrap()
}

/// Earned, and the rest of the hold.
fn captured(job: &str, msat: u64, rest_msat: u64) -> Transfer {
    let leg = |from, msat| Leg { from, to: Account::Held(alice()), msat };
    let legs = [leg(revenue(), msat), leg(Account::Credit(alice()), rest_msat)];
    let legs = legs.into_iter().filter(|leg| leg.msat > 0).collect();
    let why = Why::Capture { job: job.into() };
    Transfer { id: transfer::resolve_id(job), why, legs, about: Some(about()) }
}

async fn accepted(ledger: &Ledger) {
    let batch = [lock(), hold("j", &alice(), 19_500, 0, HOUR)].map(Record::Transfer);
    ledger.commit(batch.to_vec()).await.unwrap();
    let purse = Purse { available_msat: 500, held_msat: 19_500, refunding_msat: 0 };
    assert_eq!((ledger.purse(&alice()).unwrap(), wallet_has(ledger)), (purse, (0, 20_000)));
    assert_eq!(verify(ledger.store()).unwrap().open_holds, 1);
}

#[tokio::test]
async fn a_lock_is_held_then_paid_and_captured_in_one_batch() {
    let house = House::new();
    let ledger = house.open();
    accepted(&ledger).await;
    let batch =
        [gone(), paid("h", "nwc", Some(&alice()), 20_000), captured("j", 19_000, 500)].map(Record::Transfer);
    ledger.commit(batch.to_vec()).await.unwrap();
    assert!(matches!(ledger.commit(batch.to_vec()).await, Ok(Committed::Again(_))));
    assert_eq!(ledger.purse(&alice()).unwrap(), Purse { available_msat: 1_000, ..Purse::default() });
    assert_eq!((wallet_has(&ledger), ledger.balance(&revenue()).unwrap()), ((20_000, 0), -19_000));
    assert_eq!((sum(&ledger), verify(ledger.store()).unwrap().open_holds), (0, 0));
}

#[tokio::test]
async fn a_lock_that_is_given_back_leaves_nothing_but_the_rounding_that_was_spent() {
    let house = House::new();
    let ledger = house.open();
    accepted(&ledger).await;
    // What was not held goes into another job meanwhile.
    ledger.post(hold("other", &alice(), 500, 0, HOUR)).await.unwrap();
    ledger.post(captured("other", 500, 0)).await.unwrap();
    let batch = [void("j", &alice(), 19_500, "cancelled"), gone()].map(Record::Transfer);
    ledger.commit(batch.to_vec()).await.unwrap();
    assert_eq!(ledger.purse(&alice()).unwrap(), Purse { available_msat: -500, ..Purse::default() });
    assert_eq!((wallet_has(&ledger), sum(&ledger)), ((0, 0), 0));
    verify(ledger.store()).unwrap();
    // It was settled in the same moment: what came becomes credit.
    ledger.post(paid("h", "nwc", Some(&alice()), 20_000)).await.unwrap();
    assert_eq!((ledger.purse(&alice()).unwrap().available_msat, wallet_has(&ledger)), (19_500, (20_000, 0)));
}

#[tokio::test]
async fn the_same_sats_are_never_credit_twice_and_no_more_goes_than_was_locked() {
    let house = House::new();
    let ledger = house.open();
    assert!(matches!(ledger.post(gone()).await, Err(Error::NotTheLock { .. })), "nothing is locked");
    accepted(&ledger).await;
    let early = ledger.post(paid("h", "nwc", Some(&alice()), 20_000)).await;
    assert!(matches!(early, Err(Error::StillLocked { .. })), "{early:?}");
    let undone = ledger.post(transfer::correction(&lock(), "")).await;
    assert!(matches!(undone, Err(Error::NotACorrection { .. })), "{undone:?}");
    for change in [
        (|t| t.legs[0].msat = 19_999) as fn(&mut Transfer),
        |t| t.legs[0].to = Account::Credit("b2".repeat(32)),
        |t| t.legs[0].from = Account::Locked("lnbits".into()),
        |t| t.why = Why::Unlocked { job: "other".into(), payment_hash: "h".into() },
    ] {
        let mut other = gone();
        change(&mut other);
        let refused = ledger.post(other).await;
        assert!(matches!(refused, Err(Error::NotTheLock { .. })), "{refused:?}");
    }
    let batch = [void("j", &alice(), 19_500, ""), gone()].map(Record::Transfer);
    ledger.commit(batch.to_vec()).await.unwrap();
    ledger.post(paid("h", "nwc", Some(&alice()), 20_000)).await.unwrap();
    let second = transfer::locked("h", "nwc", "k", &alice(), 20_000);
    assert!(matches!(ledger.post(second).await, Err(Error::Conflict { .. })));
    ledger.post(paid("p", "nwc", Some(&alice()), 1_000)).await.unwrap();
    let late = transfer::locked("p", "nwc", "k", &alice(), 1_000);
    assert!(matches!(ledger.post(late).await, Err(Error::Malformed { .. })), "paid is not locked");
}

#[tokio::test]
async fn a_lock_whose_job_holds_nothing_is_named_by_the_check() {
    let house = House::new();
    let ledger = house.open();
    accepted(&ledger).await;
    ledger.post(void("j", &alice(), 19_500, "and the lock forgotten")).await.unwrap();
    let broken = verify(ledger.store()).unwrap_err();
    assert!(
        matches!(&broken, Broken::Lock { payment_hash, job } if payment_hash == "h" && job == "j"),
        "{broken}"
    );
    let log = verify_log(ledger.store().dir()).unwrap_err();
    assert!(matches!(log, Broken::Lock { .. }), "{log}");
}
