//! Following one request to its end: feedback on stderr, the result on stdout, and the exit code.

mod paying;

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nostr_sdk::prelude::{JsonUtil, PublicKey};
use serde_json::json;

use self::paying::{Paying, end_of};
use super::exit::{Exit, Failure, Outcome};
use super::output::{self, Paint};
use super::signals::Signals;
use crate::customer::pay::{Payable, Purse};
use crate::customer::{Answer, Customer, Heard};
use crate::keys::npub;
use crate::protocol::cancel::cancel;
use crate::protocol::proof::Verdict;
use crate::protocol::{Feedback, Status};
use crate::relay::{Client, Published, Subscription};
use crate::store::record;
use crate::wallet::Wallet;

/// When a provider says no and nobody was asked by name: how long others have to say yes.
const OTHERS: Duration = Duration::from_secs(15);
const CANCEL_PATIENCE: Duration = Duration::from_secs(5);
/// Feedback kept; of a flood, each provider's older words go first, then newcomers are not heard.
const MAX_FEEDBACK: usize = 200;
/// Ignored events that are talked about; a flood of them stays quiet.
const MAX_IGNORED_TOLD: usize = 10;

/// What is followed, and until when.
pub struct Follow<'a> {
    pub client: &'a Client,
    pub customer: &'a Customer,
    pub started: Instant,
    pub deadline: Instant,
    /// Whether to take the request back on giving up.
    pub cancel: bool,
    /// Pays what the provider asks; `None`: nothing is paid.
    pub payer: Option<Payer>,
}

/// A wallet and what it may spend on this request.
pub struct Payer {
    pub wallet: Arc<dyn Wallet>,
    pub purse: Purse,
    pub max_fee_msat: u64,
}

/// How it ended.
#[derive(Debug)]
pub struct End {
    pub why: Why,
    pub answer: Option<Answer>,
    pub feedback: Vec<(PublicKey, Feedback)>,
    pub paid: Option<Paid>,
    pub elapsed_ms: u64,
}

/// What was paid for the request.
#[derive(Debug, Clone)]
pub struct Paid {
    payable: Payable,
    /// `None`: the wallet does not know yet.
    fee_msat: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    Result,
    /// No provider took the request.
    Refused,
    /// A provider took the request, and ended the job with an error.
    Failed,
    /// Time was up while a provider waited for money.
    Unpaid,
    Timeout,
    /// Ctrl-C, SIGTERM or SIGHUP.
    Interrupted,
    /// No relay said OK, and nobody answered.
    Untaken,
    /// The relays are gone.
    Lost,
}

impl Follow<'_> {
    /// Waits for a result that holds, the last no, the deadline or a signal. `publishing` sends the request beside it:
    /// an answer that names the request proves that it was delivered, whatever its relays say.
    pub async fn run(
        &self,
        mut answers: Subscription,
        publishing: impl Future<Output = Vec<Published>>,
        mut signals: Signals,
    ) -> End {
        let mut feedback: Vec<(PublicKey, Feedback)> = Vec::new();
        let mut bad: Option<Answer> = None;
        let mut paid: Option<Paid> = None;
        let mut paying: Option<Paying> = None;
        let mut ignored = 0;
        let mut until = self.deadline;
        let mut publishing = pin!(publishing);
        let mut published = false;
        let why = loop {
            let received = tokio::select! {
                received = answers.next() => received,
                ended = end_of(&mut paying) => {
                    self.payment_ended(ended, &mut paying, &mut paid);
                    continue;
                }
                relays = &mut publishing, if !published => {
                    published = true;
                    let taken = relays.iter().any(|relay| relay.answer == record::Answer::Stored);
                    if !taken && feedback.is_empty() && bad.is_none() {
                        break Why::Untaken;
                    }
                    continue;
                }
                () = tokio::time::sleep_until(until.into()) => break self.out_of_time(&feedback),
                () = signals.next() => break Why::Interrupted,
            };
            let Some(received) = received else { break Why::Lost };
            match self.customer.hear(&received.event) {
                Heard::Ignored(why) => {
                    ignored += 1;
                    if ignored <= MAX_IGNORED_TOLD {
                        self.say(&format!("ignored {why}, by {}", short(&received.event.pubkey)));
                    }
                }
                Heard::Feedback { provider, feedback: said } => {
                    if feedback.len() >= MAX_FEEDBACK {
                        let Some(older) = feedback.iter().position(|(by, _)| *by == provider) else {
                            continue;
                        };
                        feedback.remove(older);
                    }
                    self.say(&line(&provider, &said));
                    if said.status == Status::PaymentRequired
                        && let Some(payer) = &self.payer
                    {
                        self.pay(payer, &provider, &said, paid.is_some(), &mut paying);
                    }
                    feedback.push((provider, said));
                    until = self.deadline.min(self.patience(&feedback));
                    if is_final(self.customer, &feedback) {
                        break why_none(&feedback);
                    }
                }
                Heard::Result(answer) if answer.is_good() || is_asked(self.customer, &answer) => {
                    self.say(&format!("result {} by {}", short_id(&answer), short(&answer.reply.provider)));
                    if answer.is_good() {
                        self.pay_for(&answer.reply, &mut paying, &mut paid).await;
                    }
                    self.end_payment(Why::Result, &mut paying, &mut paid).await;
                    return self.end(Why::Result, Some(*answer), feedback, paid);
                }
                Heard::Result(answer) => {
                    let faults: Vec<String> =
                        answer.faults().map(|(what, why)| format!("{what}: {why}")).collect();
                    self.say(&format!(
                        "an invalid result by {}: {}",
                        short(&answer.reply.provider),
                        faults.join("; ")
                    ));
                    bad = Some(*answer);
                }
            }
        };
        let gave_up = match why {
            Why::Timeout | Why::Interrupted | Why::Unpaid | Why::Untaken => true,
            // Somebody slower may still be at work on a request that anybody could take.
            Why::Refused | Why::Failed => self.customer.provider().is_none(),
            Why::Result | Why::Lost => false,
        };
        if self.cancel && gave_up {
            self.take_back().await;
        }
        self.end_payment(why, &mut paying, &mut paid).await;
        let why = if bad.is_some() { Why::Result } else { why };
        self.end(why, bad, feedback, paid)
    }

    fn end(
        &self,
        why: Why,
        answer: Option<Answer>,
        feedback: Vec<(PublicKey, Feedback)>,
        paid: Option<Paid>,
    ) -> End {
        let elapsed_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        End { why, answer, feedback, paid, elapsed_ms }
    }

    pub(super) fn say(&self, words: &str) {
        output::talk(&format!("{}  {words}", stamp(self.started)));
    }

    /// When all who spoke said no, others get a moment; else there is time until the deadline.
    fn patience(&self, feedback: &[(PublicKey, Feedback)]) -> Instant {
        if all_said_no(feedback) { Instant::now() + OTHERS } else { self.deadline }
    }

    fn out_of_time(&self, feedback: &[(PublicKey, Feedback)]) -> Why {
        if all_said_no(feedback) {
            return why_none(feedback);
        }
        let unpaid = feedback.last().is_some_and(|(_, said)| said.status == Status::PaymentRequired);
        if unpaid { Why::Unpaid } else { Why::Timeout }
    }

    async fn take_back(&self) {
        let (request, keys) = (self.customer.request(), self.customer.keys());
        let event =
            cancel(&request.id, request.kind.as_u16(), "no longer wanted", keys, crate::clock::now_s());
        match event.sign_with_keys(keys) {
            Ok(event) => {
                let told = self.client.publish(&event, CANCEL_PATIENCE).await;
                let stored = told.iter().filter(|p| p.answer == record::Answer::Stored).count();
                self.say(&format!(
                    "Cancelled the request (deletion sent to {stored} of {} relays)",
                    told.len()
                ));
            }
            Err(error) => self.say(&format!("could not cancel the request: {error}")),
        }
    }
}

/// The last word of each who spoke is an error.
fn all_said_no(feedback: &[(PublicKey, Feedback)]) -> bool {
    let last_of =
        |who: &PublicKey| feedback.iter().rev().find(|(by, _)| by == who).map(|(_, said)| said.status);
    !feedback.is_empty() && feedback.iter().all(|(who, _)| last_of(who) == Some(Status::Error))
}

/// Of providers that all said no: whether one had taken the job before.
fn why_none(feedback: &[(PublicKey, Feedback)]) -> Why {
    let took = |said: &Feedback| said.status == Status::Processing || failed_job(said).is_some();
    if feedback.iter().any(|(_, said)| took(said)) { Why::Failed } else { Why::Refused }
}

/// The report of a job that was run and ended with an error, where that brings one.
fn failed_job(said: &Feedback) -> Option<serde_json::Value> {
    let report: serde_json::Value = serde_json::from_str(&said.content).ok()?;
    (said.status == Status::Error && report["error"].is_object()).then_some(report)
}

/// The last error, and who said it.
fn last_error(end: &End) -> Option<&(PublicKey, Feedback)> {
    end.feedback.iter().rev().find(|(_, said)| said.status == Status::Error)
}

/// The one provider asked said no: nobody else can say yes.
fn is_final(customer: &Customer, feedback: &[(PublicKey, Feedback)]) -> bool {
    customer.provider().is_some() && all_said_no(feedback)
}

/// The one provider asked answered badly: there is nobody to wait for.
fn is_asked(customer: &Customer, answer: &Answer) -> bool {
    customer.provider() == Some(answer.reply.provider)
}

fn line(provider: &PublicKey, said: &Feedback) -> String {
    let mut line = format!("{}: {}", short(provider), said.status.as_str());
    if let Some(extra) = &said.extra {
        line.push_str(&format!(" – {}", output::tame(extra, 300)));
    }
    if let Some((msat, invoice)) = &said.amount {
        line.push_str(&format!(", asks {}", output::sats(*msat)));
        if let Some(invoice) = invoice {
            line.push_str(&format!(", invoice {}", output::tame(invoice, 2_000)));
        }
    }
    // A report is data, and is printed at the end.
    if !said.content.is_empty() && failed_job(said).is_none() {
        line.push_str(&format!("\n{}", output::tame_lines(&said.content)));
    }
    line
}

fn short(key: &PublicKey) -> String {
    output::short(&npub(key))
}

fn short_id(answer: &Answer) -> String {
    output::short(&answer.event.id.to_hex())
}

/// Time since the start, for the margin.
pub fn stamp(started: Instant) -> String {
    let ms = started.elapsed().as_millis();
    format!("{:>4}.{:02} s", ms / 1000, ms % 1000 / 10)
}

/// Prints how it ended and says so to the shell.
pub fn report(customer: &Customer, end: &End, as_json: bool) -> Outcome {
    let exit = exit_of(end);
    if as_json {
        output::json(&to_json(customer, end))?;
        return Ok(exit);
    }
    if let Some(answer) = &end.answer {
        print(answer)?;
    }
    let error = last_error(end).map(|(_, said)| said);
    match end.why {
        Why::Result => Ok(exit),
        Why::Refused => Err(Failure::say(exit, format!("job refused: {}", reason(end)))),
        Why::Failed => {
            if let Some(said) = error.filter(|said| failed_job(said).is_some()) {
                print_content(&said.content)?;
            }
            Err(Failure::say(exit, format!("job failed: {}", reason(end))))
        }
        Why::Unpaid => Err(Failure::say(exit, "Timed out waiting for payment")),
        Why::Timeout => Err(Failure::say(
            exit,
            format!("Timed out after {} without a result", output::span(end.elapsed_ms)),
        )),
        Why::Interrupted => Err(Failure::say(exit, "interrupted")),
        Why::Untaken => Err(Failure::say(exit, "no relay took the request, and nobody answered it")),
        Why::Lost => Err(Failure::say(exit, "all relays are gone")),
    }
}

/// Why the last provider to refuse did so.
fn reason(end: &End) -> String {
    let why = last_error(end).and_then(|(_, said)| said.extra.as_deref()).filter(|why| !why.is_empty());
    output::tame(why.unwrap_or("no reason was given"), 1_000)
}

fn exit_of(end: &End) -> Exit {
    match (end.why, &end.answer) {
        (Why::Result, Some(answer)) if !answer.is_good() => Exit::Unverified,
        (Why::Result, Some(answer)) if answer.exit_code().is_some_and(|code| code != 0) => {
            Exit::CommandsFailed
        }
        (Why::Result, _) => Exit::Ok,
        (Why::Refused | Why::Failed | Why::Unpaid, _) => Exit::Refused,
        (Why::Timeout, _) => Exit::Timeout,
        (Why::Interrupted, _) => Exit::Failure,
        (Why::Lost | Why::Untaken, _) => Exit::Unreachable,
    }
}

fn print(answer: &Answer) -> Result<(), Failure> {
    let reply = &answer.reply;
    let paint = Paint::stderr();
    let mut told = Vec::new();
    if let Some(proof) = &reply.proof {
        told.extend(proof.commit.as_ref().map(|commit| format!("commit {commit}")));
        told.push(format!(
            "ran on {} ({})",
            output::tame(&proof.backend, 60),
            output::tame(&proof.image, 120)
        ));
        told.push(format!(
            "{} wall, {} CPU, peak memory {}",
            output::span(proof.wall_ms),
            proof.cpu_ms.map_or_else(|| "uncounted".to_owned(), output::span),
            output::bytes(proof.peak_memory_bytes)
        ));
    }
    if let Some(msat) = reply.amount_msat.filter(|msat| *msat > 0) {
        // Without an invoice it was paid from what the customer has there.
        told.push(match reply.invoice {
            Some(_) => format!("asks {}", output::sats(msat)),
            None => format!("charged {} from your credit", output::sats(msat)),
        });
    }
    if let Some(invoice) = &reply.invoice {
        told.push(format!("invoice {}", output::tame(invoice, 2_000)));
    }
    for line in told {
        output::talk(&format!("           {line}"));
    }
    for (what, why) in answer.faults() {
        output::talk(&format!("           {} {what}: {why}", paint.bad("bad")));
    }
    if reply.content.is_empty() {
        output::talk("           the result is empty: nothing was changed or printed");
        return Ok(());
    }
    print_content(&reply.content)
}

fn print_content(content: &str) -> Result<(), Failure> {
    use std::io::IsTerminal;
    if std::io::stdout().is_terminal() {
        let shown = readable(content).unwrap_or_else(|| content.to_owned());
        output::data(output::tame_lines(&shown).trim_end_matches('\n'))?;
    } else {
        output::raw(content.as_bytes())?;
        if !content.ends_with('\n') {
            output::raw(b"\n")?;
        }
    }
    Ok(())
}

/// A report of commands as a person reads it: each command, what it printed, how it ended. `None`: it is none.
fn readable(content: &str) -> Option<String> {
    let report: serde_json::Value = serde_json::from_str(content).ok()?;
    let runs = report.get("command_results")?.as_array()?;
    let mut text = String::new();
    let mut add = |part: &str| {
        text.push_str(part);
        if !part.is_empty() && !part.ends_with('\n') {
            text.push('\n');
        }
    };
    let is_one = runs.len() == 1;
    for run in runs {
        add(&format!("$ {}", run.get("command")?.as_str()?));
        for stream in ["stdout", "stderr"] {
            let printed = run.get(stream).and_then(serde_json::Value::as_str);
            // A report may bring what the only command printed once, for all commands.
            let whole = report.get(stream).and_then(serde_json::Value::as_str).filter(|_| is_one);
            add(printed.or(whole).unwrap_or_default());
        }
        let code = run.get("exit_code").and_then(serde_json::Value::as_i64);
        add(&code.map_or("[no exit code]".to_owned(), |code| format!("[exit {code}]")));
    }
    for artifact in report.get("artifacts").and_then(serde_json::Value::as_array).into_iter().flatten() {
        let of = |key: &str| artifact.get(key).and_then(serde_json::Value::as_str).unwrap_or_default();
        let size = artifact.get("size").and_then(serde_json::Value::as_u64).map(output::bytes);
        let what =
            size.map_or_else(|| of("error").to_owned(), |size| format!("{size}, sha256 {}", of("sha256")));
        add(&format!("artifact {}: {what}", of("path")));
    }
    for warning in report.get("warnings").and_then(serde_json::Value::as_array).into_iter().flatten() {
        add(&format!("warning: {}", warning.as_str().unwrap_or_default()));
    }
    Some(text)
}

fn to_json(customer: &Customer, end: &End) -> serde_json::Value {
    let feedback: Vec<_> = end
        .feedback
        .iter()
        .map(|(by, said)| {
            let (msat, invoice) = said.amount.clone().unzip();
            json!({
                "provider": npub(by), "status": said.status.as_str(), "extra": said.extra,
                "amount_msat": msat, "invoice": invoice.flatten(), "content": said.content,
            })
        })
        .collect();
    let status = match end.why {
        Why::Result => "result",
        Why::Refused => "refused",
        Why::Failed => "failed",
        Why::Unpaid => "payment-required",
        Why::Timeout => "timeout",
        Why::Interrupted => "interrupted",
        Why::Lost => "relays-gone",
        Why::Untaken => "not-taken",
    };
    let mut object = json!({
        "request_id": customer.request().id.to_hex(),
        "customer": npub(&customer.request().pubkey),
        "status": status,
        "elapsed_ms": end.elapsed_ms,
        "feedback": feedback,
        "paid": end.paid.as_ref().map(|paid| json!({
            "payment_hash": paid.payable.payment_hash, "amount_msat": paid.payable.amount_msat,
            "fee_msat": paid.fee_msat,
        })),
    });
    if let (Why::Refused | Why::Failed, Some((provider, said)), Some(fields)) =
        (end.why, last_error(end), object.as_object_mut())
    {
        let report = failed_job(said);
        let code = said.code().map(|code| code.as_str());
        // What a report says of the error: code and reason, and of a limit its name, figures and command.
        let error = report.as_ref().map(|report| report["error"].clone());
        fields.insert("provider".into(), npub(provider).into());
        fields.insert("error".into(), error.unwrap_or_else(|| json!({ "code": code, "reason": said.extra })));
        fields.insert("report".into(), report.into());
    }
    let (Some(answer), Some(fields)) = (&end.answer, object.as_object_mut()) else { return object };
    let reply = &answer.reply;
    let add = json!({
        "result_id": reply.id.to_hex(),
        "provider": npub(&reply.provider),
        "kind": reply.kind,
        "verified": answer.is_good(),
        "content": reply.content,
        "facts": reply.facts,
        "amount_msat": reply.amount_msat,
        "invoice": reply.invoice,
        "encrypted": reply.encryption.is_some(),
        "proof": reply.proof.as_ref().map(proof),
        "findings": answer.findings.iter().map(finding).collect::<Vec<_>>(),
        "event": serde_json::from_str::<serde_json::Value>(&answer.event.as_json()).ok(),
    });
    if let serde_json::Value::Object(add) = add {
        fields.extend(add);
    }
    object
}

fn proof(proof: &crate::protocol::Proof) -> serde_json::Value {
    json!({
        "commit": proof.commit, "backend": proof.backend, "image": proof.image,
        "policy": proof.policy, "policy_sha256": proof.policy_sha256, "output_sha256": proof.output_sha256,
        "wall_ms": proof.wall_ms, "cpu_ms": proof.cpu_ms,
        "peak_memory_bytes": proof.peak_memory_bytes, "price_msat": proof.price_msat,
    })
}

/// One check for JSON: `{"what", "verdict": ok | bad | unchecked, "why"?}`.
pub fn finding(finding: &crate::protocol::proof::Finding) -> serde_json::Value {
    let (verdict, why) = match &finding.verdict {
        Verdict::Ok => ("ok", None),
        Verdict::Bad(why) => ("bad", Some(why)),
        Verdict::Unchecked(why) => ("unchecked", Some(why)),
    };
    json!({ "what": finding.what, "verdict": verdict, "why": why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_as_commands_with_their_output_and_end() {
        let report = r#"{"exit_code":3,"stdout":"hi\nno\n","stderr":"","command_results":[
            {"command":"echo hi","exit_code":0,"stdout":"hi\n","stderr":""},
            {"command":"false","exit_code":3,"stdout":"no","stderr":"oops"}],
            "artifacts":[{"path":"a.txt","sha256":"ab","size":2048},{"path":"b","error":"not there"}],
            "warnings":["a link leads out"]}"#;
        let wanted = "$ echo hi\nhi\n[exit 0]\n$ false\nno\noops\n[exit 3]\n\
            artifact a.txt: 2.0 KiB, sha256 ab\nartifact b: not there\nwarning: a link leads out\n";
        assert_eq!(readable(report).as_deref(), Some(wanted));
        for other in ["a patch", "{}", r#"{"command_results":7}"#, r#"{"command_results":[{}]}"#] {
            assert_eq!(readable(other), None, "{other}");
        }
    }
}
