//! Every difference between a wallet and the books has its own name, and what agrees has none.

use super::*;

const HASH: &str = "0101010101010101010101010101010101010101010101010101010101010101";

fn customer() -> String {
    "ab".repeat(32)
}

fn row(way: Way, stage: Stage, msat: u64, fee_msat: u64) -> Row {
    let (payment_hash, fee_msat) = (HASH.into(), Some(fee_msat));
    Row { payment_hash, way, stage, msat, fee_msat, at_ms: 1_000, memo: "a memo".into() }
}

fn what(row: &Row, known: &Known) -> What {
    match judge(row, known) {
        Judged::Differs(difference) => difference.what,
        other => panic!("a difference, not {other:?}"),
    }
}

fn ours() -> Known {
    Known { invoice: Some((customer(), Some("job".into()))), ..Known::default() }
}

fn refunded(end: Option<Why>) -> Known {
    let begun = transfer::refund_begun(HASH, &customer(), 5_000, "lnbc1", 10);
    Known { refund: Some(Refund { begun, end }), ..Known::default() }
}

fn paid_out(fee_msat: u64) -> Option<Why> {
    Some(Why::RefundPaid { payment_hash: HASH.into(), fee_msat })
}

fn failed() -> Option<Why> {
    Some(Why::RefundFailed { payment_hash: HASH.into(), reason: "no route".into() })
}

#[test]
fn what_came_in_is_matched_unbooked_foreign_missing_or_over_another_amount() {
    let settled = row(Way::In, Stage::Settled, 5_000, 0);
    let booked = |msat| Known { paid_msat: Some(msat), ..ours() };
    assert_eq!(judge(&settled, &booked(5_000)), Judged::Matched);
    let unbooked = What::Unbooked { customer: customer(), job: Some("job".into()) };
    assert_eq!(what(&settled, &ours()), unbooked);
    assert_eq!(what(&settled, &Known::default()), What::Foreign);
    assert_eq!(what(&settled, &booked(4_000)), What::AmountDiffers { booked_msat: 4_000 });
    assert_eq!(
        what(&row(Way::In, Stage::Dead, 5_000, 0), &booked(5_000)),
        What::Missing { booked_msat: 5_000 }
    );
    let fee = row(Way::In, Stage::Settled, 5_000, 7);
    assert_eq!(what(&fee, &booked(5_000)), What::FeeDiffers { booked_fee_msat: 0 });
    assert_eq!(judge(&fee, &Known { fee_msat: 7, ..booked(5_000) }), Judged::Matched);
    let untold = Row { fee_msat: None, ..fee };
    assert_eq!(
        judge(&untold, &Known { fee_msat: 9, ..booked(5_000) }),
        Judged::Matched,
        "it says nothing of a fee"
    );
    for stage in [Stage::Pending, Stage::Dead] {
        assert_eq!(judge(&row(Way::In, stage, 5_000, 0), &ours()), Judged::Unmoved);
        assert_eq!(judge(&row(Way::In, stage, 5_000, 0), &Known::default()), Judged::Unmoved);
    }
    // Booked to suspense before, or taken out of the books by the owner.
    assert_eq!(judge(&settled, &Known { in_msat: Some(5_000), ..Known::default() }), Judged::Matched);
    assert_eq!(what(&settled, &booked(0)), What::Foreign);
    // Paid, and nothing: nobody is owed anything.
    assert_eq!(judge(&row(Way::In, Stage::Settled, 0, 0), &ours()), Judged::Matched);
}

#[test]
fn what_went_out_is_a_refund_in_one_of_its_states_or_foreign() {
    let settled = row(Way::Out, Stage::Settled, 5_000, 3);
    let (pending, dead) = (row(Way::Out, Stage::Pending, 5_000, 0), row(Way::Out, Stage::Dead, 5_000, 0));
    let customer = customer();
    assert_eq!(judge(&settled, &refunded(paid_out(3))), Judged::Matched);
    assert_eq!(what(&settled, &refunded(paid_out(2))), What::FeeDiffers { booked_fee_msat: 2 });
    assert_eq!(what(&settled, &refunded(None)), What::RefundPaid { customer: customer.clone() });
    assert_eq!(what(&settled, &refunded(failed())), What::RefundPaidTwice { customer: customer.clone() });
    let twice = Known { out_msat: Some(5_000), ..refunded(failed()) };
    assert_eq!(judge(&settled, &twice), Judged::Matched, "booked to suspense before");
    assert_eq!(what(&pending, &refunded(None)), What::RefundUnderWay { customer: customer.clone() });
    assert_eq!(what(&dead, &refunded(None)), What::RefundUnpaid { customer });
    assert_eq!(judge(&dead, &refunded(failed())), Judged::Unmoved);
    assert_eq!(what(&dead, &refunded(paid_out(0))), What::Missing { booked_msat: 5_000 });
    let less = row(Way::Out, Stage::Settled, 4_000, 3);
    assert_eq!(what(&less, &refunded(paid_out(3))), What::AmountDiffers { booked_msat: 5_000 });
    assert_eq!(what(&settled, &Known::default()), What::Foreign);
    assert_eq!(judge(&dead, &Known::default()), Judged::Unmoved);
    assert_eq!(judge(&settled, &Known { out_msat: Some(5_000), ..Known::default() }), Judged::Matched);
    // Both halves of a payment to ourselves have one hash: the one is not the other.
    assert_eq!(what(&settled, &Known { paid_msat: Some(5_000), ..ours() }), What::Foreign);
}

#[test]
fn differences_explain_by_how_much_the_wallet_is_over_the_books() {
    let explains = |row: &Row, known: &Known| match judge(row, known) {
        Judged::Differs(difference) => difference.explains_msat(),
        _ => 0,
    };
    let out = row(Way::Out, Stage::Settled, 5_000, 3);
    let cases = [
        (row(Way::In, Stage::Settled, 5_000, 0), ours(), 5_000),
        (row(Way::In, Stage::Settled, 5_000, 7), Known::default(), 4_993),
        (row(Way::In, Stage::Settled, 5_000, 0), Known { paid_msat: Some(6_000), ..ours() }, -1_000),
        (row(Way::In, Stage::Dead, 5_000, 0), Known { paid_msat: Some(5_000), ..ours() }, -5_000),
        (out.clone(), Known::default(), -5_003),
        (out.clone(), refunded(None), -5_003),
        (out.clone(), refunded(paid_out(1)), -2),
        (row(Way::Out, Stage::Dead, 5_000, 0), refunded(paid_out(0)), 5_000),
        (row(Way::Out, Stage::Dead, 5_000, 0), refunded(None), 0),
    ];
    for (row, known, wanted) in cases {
        assert_eq!(explains(&row, &known), wanted, "{row:?} {known:?}");
    }
}

#[test]
fn more_differences_than_are_listed_are_counted_and_what_is_booked_is_clean() {
    let mut outcome = Outcome::default();
    let settled = row(Way::In, Stage::Settled, 1_000, 0);
    for nth in 0..LISTED_MAX + 3 {
        let Judged::Differs(mut difference) = judge(&settled, &Known::default()) else { panic!("foreign") };
        difference.booked = nth % 2 == 0;
        outcome.add(*difference);
    }
    assert_eq!((outcome.differences.len(), outcome.left_out), (LISTED_MAX, 3));
    assert_eq!((outcome.counts["foreign"], outcome.booked), (503, 252));
    assert_eq!(outcome.explained_msat, 251_000);
    assert!(!outcome.is_clean());
    assert!(Outcome::default().is_clean());
}

#[test]
fn a_transfer_claims_what_its_wallet_moved_without_the_fee() {
    let wallet = Account::Wallet("lnbits".into());
    let hash = HASH.to_owned();
    let claims = [
        (transfer::paid(HASH, "lnbits", None, 5), Some((hash.clone(), Way::In, 5))),
        (transfer::refund_paid(HASH, &customer(), "lnbits", 5, 2), Some((hash.clone(), Way::Out, 5))),
        (transfer::reconciled_in(HASH, "lnbits", 5, ""), Some((hash.clone(), Way::In, 5))),
        (transfer::reconciled_out(HASH, "lnbits", 5, 2, ""), Some((hash, Way::Out, 5))),
        (transfer::reconciled_fee(HASH, "lnbits", 2), None),
        (transfer::paid(HASH, "nwc", None, 5), None),
        (transfer::grant("g", &customer(), 5, ""), None),
    ];
    for (transfer, wanted) in claims {
        assert_eq!(claim(&transfer, &wallet), wanted, "{}", transfer.id);
    }
}
