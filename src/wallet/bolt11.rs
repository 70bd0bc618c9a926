//! Reading an invoice as far as money is concerned: hash, amount, times, description hash, signature. Whether a
//! wallet made the one it was asked for is judged here, too; whether it gets paid is not.

use lightning_invoice::{
    Currency, DEFAULT_EXPIRY_TIME, DEFAULT_MIN_FINAL_CLTV_EXPIRY_DELTA, SignedRawBolt11Invoice,
};

use super::{Error, Invoice, MAX_MSAT, NewInvoice, PaymentHash};

/// Longest invoice read, bytes. Real ones have 200 to 1,500.
pub(super) const MAX_LEN: usize = 7_089;
/// An invoice is not good for longer than this, seconds.
const MAX_EXPIRY_S: u64 = 10 * 366 * 86_400;

/// What an invoice says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    pub payment_hash: PaymentHash,
    /// `None`: the payer chooses. We neither make nor pay such invoices.
    pub amount_msat: Option<u64>,
    /// Unix seconds.
    pub created_at_s: u64,
    /// Unix seconds.
    pub expires_at_s: u64,
    pub description_hash: Option<[u8; 32]>,
    /// A payment to it stays locked for so many blocks at least, unless it is taken or given back.
    pub lock_blocks: u64,
    /// For bitcoin itself; otherwise for one of its test networks.
    pub is_mainnet: bool,
}

/// Reads an invoice and checks its signature.
///
/// # Errors
/// [`Error::Invoice`], for whatever is not one.
pub fn read(bolt11: &str) -> Result<Terms, Error> {
    let bad = |why: &str| Error::Invoice(why.to_owned());
    if bolt11.len() > MAX_LEN {
        return Err(bad("it is too long"));
    }
    let signed: SignedRawBolt11Invoice = bolt11.parse().map_err(|error| {
        Error::Invoice(format!("it cannot be read: {error:?}").chars().take(200).collect())
    })?;
    if !signed.check_signature() {
        return Err(bad("its signature is wrong"));
    }
    let raw = signed.raw_invoice();
    let hash = raw.payment_hash().ok_or_else(|| bad("it has no payment hash"))?;
    let amount_msat = match raw.amount_pico_btc() {
        None => None,
        // A tenth of a millisatoshi cannot be paid.
        Some(pico) if !pico.is_multiple_of(10) => return Err(bad("its amount is not whole millisatoshis")),
        Some(pico) if pico / 10 > MAX_MSAT => return Err(bad("its amount is more than there is")),
        Some(pico) => Some(pico / 10),
    };
    let created_at_s = raw.data.timestamp.as_unix_timestamp();
    let lasts_s = raw.expiry_time().map_or(DEFAULT_EXPIRY_TIME, |time| time.as_seconds()).min(MAX_EXPIRY_S);
    Ok(Terms {
        payment_hash: PaymentHash::from_bytes(*hash.0.as_ref()),
        amount_msat,
        created_at_s,
        expires_at_s: created_at_s.saturating_add(lasts_s),
        description_hash: raw.description_hash().map(|hash| *hash.0.as_ref()),
        lock_blocks: raw
            .min_final_cltv_expiry_delta()
            .map_or(DEFAULT_MIN_FINAL_CLTV_EXPIRY_DELTA, |delta| delta.0),
        is_mainnet: raw.currency() == Currency::Bitcoin,
    })
}

/// Checks an invoice that a wallet made for us against what it was asked for, and what it says beside it.
pub(super) fn accept(
    bolt11: &str,
    told_hash: Option<&str>,
    asked: &NewInvoice,
    asked_hash: Option<PaymentHash>,
    now_s: u64,
) -> Result<Invoice, Error> {
    let lie = |what, asked: String, got: String| Error::Lie { what, asked, got };
    let terms = read(bolt11)?;
    // The invoice has its own, under its signature: one beside it that is no hash says nothing.
    if let Some(told) = told_hash.and_then(|told| told.parse::<PaymentHash>().ok())
        && told != terms.payment_hash
    {
        return Err(lie("payment hash", told.to_hex(), terms.payment_hash.to_hex()));
    }
    if let Some(asked) = asked_hash
        && asked != terms.payment_hash
    {
        return Err(lie("payment hash", asked.to_hex(), terms.payment_hash.to_hex()));
    }
    if terms.amount_msat != Some(asked.amount_msat) {
        let got = terms.amount_msat.map_or_else(|| "none".into(), |amount| format!("{amount} msat"));
        return Err(lie("amount", format!("{} msat", asked.amount_msat), got));
    }
    if let Some(wanted) = asked.description_hash
        && terms.description_hash != Some(wanted)
    {
        let got = terms.description_hash.map_or_else(|| "none".into(), hex::encode);
        return Err(lie("description hash", hex::encode(wanted), got));
    }
    if terms.expires_at_s <= now_s {
        return Err(lie("expiry", format!("after {now_s}"), terms.expires_at_s.to_string()));
    }
    Ok(Invoice {
        bolt11: bolt11.to_owned(),
        payment_hash: terms.payment_hash,
        amount_msat: asked.amount_msat,
        created_at_s: terms.created_at_s,
        expires_at_s: terms.expires_at_s,
    })
}

/// Checks an invoice that we are to pay, before anything is sent.
pub(super) fn payable(bolt11: &str, amount_msat: u64, now_s: u64) -> Result<Terms, Error> {
    let terms = read(bolt11)?;
    let why = match terms.amount_msat {
        None => "it names no amount".into(),
        Some(0) => "it is for nothing".into(),
        Some(asks) if asks != amount_msat => format!("it asks for {asks} msat, not {amount_msat}"),
        Some(_) if terms.expires_at_s <= now_s => format!("it expired at {}", terms.expires_at_s),
        Some(_) => return Ok(terms),
    };
    Err(Error::Invoice(why))
}

/// Bounds of what may be asked of any wallet.
pub(super) fn askable(new: &NewInvoice) -> Result<(), Error> {
    if new.amount_msat == 0 || new.amount_msat > MAX_MSAT {
        return Err(Error::Amount { amount_msat: new.amount_msat });
    }
    if !(1..=366 * 86_400).contains(&new.expiry_s) {
        return Err(Error::Invoice(format!("an expiry of {} s is out of bounds", new.expiry_s)));
    }
    Ok(())
}

/// What BOLT11 can carry of a memo, cut at a character.
pub(super) fn memo(text: &str) -> &str {
    let mut end = text.len().min(639);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Made, NOW_S, invoice, invoice_on};
    use super::*;

    fn asked() -> NewInvoice {
        NewInvoice { amount_msat: 21_000, memo: "a job".into(), expiry_s: 600, description_hash: None }
    }

    #[test]
    fn an_invoice_is_read_as_it_was_made() {
        let Made { bolt11, hash } = invoice(21_000, NOW_S, 600);
        let terms = read(&bolt11).unwrap();
        assert_eq!((terms.payment_hash, terms.amount_msat), (hash, Some(21_000)));
        assert_eq!((terms.created_at_s, terms.expires_at_s), (NOW_S, NOW_S + 600));
        assert!(terms.is_mainnet);
        let elsewhere = invoice_on(true, hash, 21_000, NOW_S, 600);
        assert!(!read(&elsewhere.bolt11).unwrap().is_mainnet);
        let upper = read(&bolt11.to_uppercase()).unwrap();
        assert_eq!(upper, terms, "a QR code holds it in capitals");
    }

    #[test]
    fn what_is_no_invoice_is_refused() {
        let good = invoice(21_000, NOW_S, 600).bolt11;
        let mut broken = good.clone();
        let last = if broken.pop() == Some('q') { 'p' } else { 'q' };
        broken.push(last);
        for bad in ["", "lnbc", "hello", &broken, &format!("{good}{}", "q".repeat(8000)), &good.repeat(2)] {
            assert!(matches!(read(bad), Err(Error::Invoice(_))), "{bad}");
        }
    }

    #[test]
    fn a_wallet_that_made_another_invoice_than_asked_is_told_apart_by_what_differs() {
        let Made { bolt11, hash } = invoice(21_000, NOW_S, 600);
        let accepted = accept(&bolt11, Some(&hash.to_hex()), &asked(), Some(hash), NOW_S).unwrap();
        assert_eq!(
            (accepted.payment_hash, accepted.amount_msat, accepted.expires_at_s),
            (hash, 21_000, NOW_S + 600)
        );

        let other = PaymentHash::from_bytes([1; 32]);
        let of = |result: Result<Invoice, Error>| match result.unwrap_err() {
            Error::Lie { what, .. } => what,
            error => panic!("{error}"),
        };
        assert_eq!(of(accept(&bolt11, Some(&other.to_hex()), &asked(), None, NOW_S)), "payment hash");
        assert_eq!(of(accept(&bolt11, None, &asked(), Some(other), NOW_S)), "payment hash");
        for amount in [1_000, 20_999, 21_001, 21_000_000] {
            let bolt11 = invoice(amount, NOW_S, 600).bolt11;
            assert_eq!(of(accept(&bolt11, None, &asked(), None, NOW_S)), "amount");
        }
        let hashed = NewInvoice { description_hash: Some([9; 32]), ..asked() };
        assert_eq!(of(accept(&bolt11, None, &hashed, None, NOW_S)), "description hash");
        assert_eq!(of(accept(&bolt11, None, &asked(), None, NOW_S + 600)), "expiry");
    }

    #[test]
    fn only_an_invoice_for_the_meant_amount_is_paid_and_only_in_time() {
        let bolt11 = invoice(21_000, NOW_S, 600).bolt11;
        assert!(payable(&bolt11, 21_000, NOW_S).is_ok());
        for (amount, now, reason) in
            [(20_000, NOW_S, "asks for 21000 msat, not 20000"), (21_000, NOW_S + 601, "expired")]
        {
            let error = payable(&bolt11, amount, now).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn bounds_are_kept_and_a_memo_is_cut_at_a_character() {
        for amount_msat in [0, MAX_MSAT + 1, u64::MAX] {
            let result = askable(&NewInvoice { amount_msat, ..asked() });
            assert!(matches!(result, Err(Error::Amount { .. })), "{amount_msat}");
        }
        assert!(askable(&NewInvoice { expiry_s: 0, ..asked() }).is_err());
        assert_eq!(memo(&"é".repeat(400)).chars().count(), 319);
        assert_eq!(memo("short"), "short");
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "(lnbc|lntb|LNBC)?[0-9a-zA-Z]{0,300}") {
            proptest::prop_assert!(read(&text).is_err());
        }
    }
}
