//! What NIP-47 puts into an event: the info event, encryption in its two schemes, an answer's result or error, a
//! notification, and NIP-42's login. Pure functions; events come here verified.

use std::collections::HashSet;

use nostr_sdk::nips::nip44::Version;
use nostr_sdk::nips::{nip04, nip44};
use nostr_sdk::prelude::{Event, EventBuilder, Kind, Tag};
use serde_json::Value;
use url::Url;

use super::uri::Uri;
use crate::wallet::{Error, PaymentHash, bolt11, brief, lenient};

/// How contents are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    Nip44,
    /// Old wallets. It has no authentication of its own; the event's signature has.
    Nip04,
}

/// What the wallet says of itself in its info event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Info {
    pub created_at_s: u64,
    pub scheme: Scheme,
    methods: HashSet<String>,
    pub notifies: bool,
}

impl Info {
    pub fn read(event: &Event) -> Self {
        let words = |name: &str| -> HashSet<String> {
            let tags =
                event.tags.iter().map(Tag::as_slice).filter(|tag| tag.first().is_some_and(|key| key == name));
            // One string with spaces by the text, several strings from some wallets.
            tags.flat_map(|tag| tag.iter().skip(1))
                .flat_map(|words| words.split_whitespace())
                .map(str::to_owned)
                .collect()
        };
        // Without any of the tags a wallet knows the old scheme only.
        let is_new = words("encryption").contains("nip44_v2") || words("v").contains("1.0");
        let scheme = if is_new { Scheme::Nip44 } else { Scheme::Nip04 };
        let methods = event
            .content
            .split([' ', ',', '\n'])
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect();
        let notifies = words("notifications").contains("payment_received");
        Self { created_at_s: event.created_at.as_secs(), scheme, methods, notifies }
    }

    pub fn can(&self, method: &str) -> bool {
        self.methods.contains(method)
    }
}

/// Tells the wallet which scheme a request uses, in today's words and in yesterday's; the old one goes without.
pub(super) fn scheme_tags(scheme: Scheme) -> Vec<Tag> {
    match scheme {
        Scheme::Nip44 => {
            [["encryption", "nip44_v2"], ["v", "1.0"]].into_iter().flat_map(Tag::parse).collect()
        }
        Scheme::Nip04 => Vec::new(),
    }
}

pub(super) fn encrypt(uri: &Uri, scheme: Scheme, plain: &str) -> Result<String, Error> {
    let secret = uri.keys.secret_key();
    let failed = |why: String| Error::Setup(format!("cannot encrypt: {why}"));
    match scheme {
        Scheme::Nip44 => {
            nip44::encrypt(secret, &uri.wallet, plain, Version::V2).map_err(|e| failed(e.to_string()))
        }
        Scheme::Nip04 => nip04::encrypt(secret, &uri.wallet, plain).map_err(|e| failed(e.to_string())),
    }
}

pub(super) fn decrypt(uri: &Uri, scheme: Scheme, content: &str) -> Result<String, Error> {
    let secret = uri.keys.secret_key();
    let failed =
        |why: String| Error::Nonsense(format!("an answer that cannot be decrypted: {}", brief(&why)));
    match scheme {
        Scheme::Nip44 => nip44::decrypt(secret, &uri.wallet, content).map_err(|e| failed(e.to_string())),
        Scheme::Nip04 => nip04::decrypt(secret, &uri.wallet, content).map_err(|e| failed(e.to_string())),
    }
}

/// The `result` of an answer to `method`, or the error that it tells. The answer names our request and is signed by the
/// wallet, so an error counts whatever else is said, and a result counts unless it says that it is another method's.
pub(super) fn result(plain: &str, method: &'static str) -> Result<Value, Error> {
    let nonsense = |why: String| Error::Nonsense(why);
    let mut answer: Value = serde_json::from_str(plain)
        .map_err(|error| nonsense(format!("an answer that is no JSON: {error}")))?;
    if let Some(error) = answer.get("error").filter(|error| is_told(error)) {
        let words = |name: &str| brief(lenient::text(error, name).unwrap_or_default());
        let (code, message) = match error {
            Value::String(text) => (String::new(), brief(text)),
            _ => (words("code").to_ascii_uppercase(), words("message")),
        };
        return Err(match code.as_str() {
            "RATE_LIMITED" => Error::Busy { message, retry_after_s: None },
            "UNAUTHORIZED" | "RESTRICTED" => Error::Denied(format!("{code}: {message}")),
            "NOT_IMPLEMENTED" => {
                Error::Unsupported { wallet: "the wallet".into(), what: method, detail: message }
            }
            "NOT_FOUND" | "INSUFFICIENT_BALANCE" | "QUOTA_EXCEEDED" | "UNSUPPORTED_ENCRYPTION" => {
                Error::Said { code, message }
            }
            // PAYMENT_FAILED, too: it "may be due to a timeout", and then the payment can still arrive.
            _ => Error::Failed { code, message },
        });
    }
    if let Some(other) = lenient::text(&answer, "result_type").filter(|told| *told != method) {
        return Err(Error::Lie { what: "method", asked: method.into(), got: brief(other) });
    }
    match answer.get_mut("result").map(Value::take) {
        Some(result @ Value::Object(_)) => Ok(result),
        _ => Err(nonsense("an answer without result and error".into())),
    }
}

/// Whether an `error` says anything: some wallets send an empty one with a good answer.
fn is_told(error: &Value) -> bool {
    match error {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

/// The payment that a notification is about.
pub(super) fn notified(uri: &Uri, event: &Event) -> Result<PaymentHash, Error> {
    let scheme = if event.kind.as_u16() == 23196 { Scheme::Nip04 } else { Scheme::Nip44 };
    let plain = decrypt(uri, scheme, &event.content)?;
    let told: Value = serde_json::from_str(&plain).map_err(|error| Error::Nonsense(error.to_string()))?;
    let about = told.get("notification").unwrap_or(&Value::Null);
    let hash = lenient::text(about, "payment_hash").and_then(|hash| hash.parse().ok());
    let of_invoice = || bolt11::read(lenient::text(about, "invoice")?).ok().map(|terms| terms.payment_hash);
    hash.or_else(of_invoice).ok_or_else(|| Error::Nonsense("a notification about no payment".into()))
}

/// NIP-42: who we are, to a relay that wants to know.
pub(super) fn auth(uri: &Uri, relay: &Url, challenge: &str) -> Result<Event, Error> {
    let tags = [Tag::parse(["relay", relay.as_str()]), Tag::parse(["challenge", challenge])];
    let tags: Vec<Tag> = tags.into_iter().flatten().collect();
    EventBuilder::new(Kind::Authentication, "")
        .tags(tags)
        .sign_with_keys(&uri.keys)
        .map_err(|error| Error::Setup(format!("cannot sign: {error}")))
}

#[cfg(test)]
mod tests {
    use nostr_sdk::prelude::Keys;

    use super::*;

    fn info(content: &str, tags: &[&[&str]]) -> Info {
        let tags = tags.iter().map(|tag| Tag::parse(tag.iter().copied()).unwrap());
        let event =
            EventBuilder::new(Kind::WalletConnectInfo, content).tags(tags).sign_with_keys(&Keys::generate());
        Info::read(&event.unwrap())
    }

    #[test]
    fn the_newer_scheme_is_taken_where_the_wallet_has_it() {
        for tags in [&[&["encryption", "nip04 nip44_v2"][..]][..], &[&["encryption", "nip44_v2", "nip04"]]] {
            assert_eq!(info("get_balance", tags).scheme, Scheme::Nip44);
        }
        assert_eq!(info("get_balance", &[&["encryption", "nip04"]]).scheme, Scheme::Nip04);
        assert_eq!(info("get_balance", &[]).scheme, Scheme::Nip04);
    }

    #[test]
    fn methods_and_notifications_are_read() {
        let info = info(
            "pay_invoice make_invoice\nget_balance",
            &[&["notifications", "payment_sent payment_received"]],
        );
        assert!(info.can("make_invoice") && info.can("get_balance") && info.notifies);
        assert!(!info.can("make") && !info.can("make_hold_invoice") && !info.can(""));
    }

    #[test]
    fn an_answer_is_a_result_or_a_typed_error() {
        let ok = r#"{"result_type":"get_balance","error":null,"result":{"balance":1}}"#;
        assert_eq!(result(ok, "get_balance").unwrap()["balance"], 1);
        assert!(matches!(result(ok, "pay_invoice"), Err(Error::Lie { what: "method", .. })));
        for kind in [r#""result_type":null,"#, r#""result_type":7,"#, r#""result_type":"","#, ""] {
            let bare = format!(r#"{{{kind}"error":{{}},"result":{{"balance":1}}}}"#);
            assert_eq!(result(&bare, "get_balance").unwrap()["balance"], 1, "{bare}");
            // Said before anything was sent, and never a doubt.
            for code in ["NOT_FOUND", "not_found", "INSUFFICIENT_BALANCE"] {
                let no = format!(r#"{{{kind}"error":{{"code":"{code}","message":7}}}}"#);
                assert!(matches!(result(&no, "pay_invoice"), Err(Error::Said { .. })), "{no}");
            }
        }
        let of_another = r#"{"result_type":"error","error":{"code":"RATE_LIMITED"}}"#;
        let busy = result(of_another, "pay_invoice").unwrap_err();
        assert!(matches!(busy, Error::Busy { .. }) && !busy.leaves_doubt(), "{busy:?}");
        for odd in [r#"{"error":"no"}"#, r#"{"error":1}"#, r#"{"error":["no"],"result":{}}"#] {
            assert!(matches!(result(odd, "pay_invoice"), Err(Error::Failed { .. })), "{odd}");
        }
        let error = |code: &str| {
            let text = format!(
                r#"{{"result_type":"pay_invoice","error":{{"code":"{code}","message":"m"}},"result":null}}"#
            );
            result(&text, "pay_invoice").unwrap_err()
        };
        assert!(matches!(error("INSUFFICIENT_BALANCE"), Error::Said { .. }));
        assert!(matches!(error("RESTRICTED"), Error::Denied(_)));
        assert!(matches!(error("NOT_IMPLEMENTED"), Error::Unsupported { .. }));
        for code in ["PAYMENT_FAILED", "INTERNAL", "OTHER", "", "SOMETHING_NEW"] {
            assert!(matches!(error(code), Error::Failed { .. }), "{code}");
        }
        for text in [
            "",
            "[]",
            "{}",
            r#"{"result_type":"pay_invoice"}"#,
            r#"{"result_type":"pay_invoice","result":7}"#,
        ] {
            assert!(
                matches!(result(text, "pay_invoice"), Err(Error::Nonsense(_) | Error::Lie { .. })),
                "{text}"
            );
        }
    }
}
