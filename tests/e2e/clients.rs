//! Other people's clients as programs: one order goes in as arguments, one line of JSON comes out for each
//! answer that the client could read with its own library. The programs are `clients/*.mjs`.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub enum Client {
    Ndk,
    NostrTools,
}

/// How the order is sent and the answers come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encrypt {
    Plain,
    Nip44,
}

/// What is ordered, from whom, over which relays.
pub struct Order<'a> {
    pub relays: &'a [&'a str],
    /// The provider's public key, hex.
    pub provider: &'a str,
    pub kind: u16,
    pub repo: &'a str,
    pub commands: &'a [&'a str],
    pub encrypt: Encrypt,
}

/// What a client read until it had its result.
#[derive(Debug)]
pub struct Heard {
    pub request_id: String,
    /// Feedback lines, in the order in which the client's library gave them.
    pub feedback: Vec<Value>,
    pub result: Value,
}

/// The client's own limit is the shorter one, so that it can say what it was waiting for.
const ANSWER_WITHIN_S: u64 = 90;
const END_WITHIN: Duration = Duration::from_secs(ANSWER_WITHIN_S + 15);

impl Client {
    /// Runs the client until it has read a result. An error tells what it printed.
    pub async fn order(self, node: &Path, scripts: &Path, order: &Order<'_>) -> Result<Heard, String> {
        let script = match self {
            Client::Ndk => "ndk.mjs",
            Client::NostrTools => "nostr_tools.mjs",
        };
        let encrypt = match order.encrypt {
            Encrypt::Plain => "none",
            Encrypt::Nip44 => "nip44",
        };
        let mut command = Command::new(node);
        command.arg(scripts.join(script)).args(["--provider", order.provider]);
        for relay in order.relays {
            command.args(["--relay", relay]);
        }
        command.args(["--kind", &order.kind.to_string(), "--repo", order.repo, "--encrypt", encrypt]);
        command.args(["--timeout-s", &ANSWER_WITHIN_S.to_string()]);
        for line in order.commands {
            command.args(["--cmd", line]);
        }
        let running = command.stdin(Stdio::null()).kill_on_drop(true).output();
        let output = tokio::time::timeout(END_WITHIN, running)
            .await
            .map_err(|_| format!("{self:?} did not end within {END_WITHIN:?}"))?
            .map_err(|error| format!("{self:?} does not start: {error}"))?;
        let said = String::from_utf8_lossy(&output.stdout);
        let talk = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            return Err(format!("{self:?} ended with {}\n{said}{talk}", output.status));
        }
        read(&said).map_err(|why| format!("{self:?}: {why}\n{said}{talk}"))
    }
}

fn read(said: &str) -> Result<Heard, String> {
    let (mut request_id, mut feedback, mut result) = (None, Vec::new(), None);
    for line in said.lines() {
        let line: Value = serde_json::from_str(line).map_err(|error| format!("{line}: {error}"))?;
        match line["type"].as_str() {
            Some("request") => request_id = line["id"].as_str().map(str::to_string),
            Some("feedback") => feedback.push(line),
            Some("result") if result.is_some() => return Err("it read two results".into()),
            Some("result") => result = Some(line),
            other => return Err(format!("a line of type {other:?}")),
        }
    }
    Ok(Heard {
        request_id: request_id.ok_or("it named no request")?,
        feedback,
        result: result.ok_or("it printed no result")?,
    })
}
