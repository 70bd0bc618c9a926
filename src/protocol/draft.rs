//! Building a job request, the customer's side. It writes the 593x profile's params, which our own node
//! reads on every kind; it sends nothing.

use std::collections::BTreeMap;

use nostr_sdk::prelude::{Keys, PublicKey, UnsignedEvent};

use super::tags::{self, Row, row};
use super::{Error, Scheme, encryption, request};

/// A request in the making. Empty and `None` fields write no tag.
#[derive(Debug, Clone, Default)]
pub struct Draft {
    /// 5000–5999.
    pub kind: u16,
    pub repo: Option<String>,
    /// Branch, tag or commit.
    pub git_ref: Option<String>,
    pub commands: Vec<String>,
    /// Relative folder to run in.
    pub workdir: Option<String>,
    pub env: BTreeMap<String, String>,
    /// Paths to return as artifacts.
    pub artifacts: Vec<String>,
    /// The task in words.
    pub task: Option<String>,
    pub time_secs: Option<u64>,
    pub memory_mb: Option<u64>,
    pub disk_mb: Option<u64>,
    /// Thousandths of a core.
    pub cpu_milli: Option<u32>,
    /// Further params, key and value.
    pub params: Vec<(String, String)>,
    /// The most to be paid, millisatoshi.
    pub bid_msat: Option<u64>,
    /// Wanted form of the result, a MIME type.
    pub output: Option<String>,
    /// Where to answer.
    pub relays: Vec<String>,
    /// The provider asked for; others see the request, too, unless it is encrypted.
    pub provider: Option<PublicKey>,
    pub encrypt: Option<Scheme>,
    /// NIP-40, Unix seconds.
    pub expiration: Option<u64>,
}

impl Draft {
    /// The request, ready to be signed by `keys`.
    ///
    /// Fails when the kind is no request's, when encryption is wanted without a provider, and when the
    /// text does not fit the scheme.
    pub fn unsigned(&self, keys: &Keys, now_s: u64) -> Result<UnsignedEvent, Error> {
        if !request::is_request_kind(self.kind) {
            return Err(Error::WrongKind { kind: self.kind, wanted: "job request (5000–5999)" });
        }
        let mut order = self.order_rows();
        let mut rows = Vec::new();
        let mut content = String::new();
        match (self.encrypt, self.provider) {
            (Some(_), None) => return Err(Error::NeedsProvider),
            (Some(scheme), Some(provider)) => {
                let plain = serde_json::Value::from_iter(order).to_string();
                content = encryption::encrypt(scheme, keys, &provider, &plain)?;
            }
            (None, _) => rows.append(&mut order),
        }
        if let Some(provider) = self.provider {
            rows.push(row(&["p", &provider.to_hex()]));
        }
        if self.encrypt.is_some() {
            rows.push(row(&["encrypted"]));
        }
        if let Some(at) = self.expiration {
            rows.push(row(&["expiration", &at.to_string()]));
        }
        Ok(tags::unsigned(keys, self.kind, rows, content, now_s))
    }

    /// The tags that tell what is ordered, and move into the ciphertext of an encrypted request.
    fn order_rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        if let Some(repo) = &self.repo {
            rows.push(row(&["i", repo, "url", "", "repo"]));
        }
        if let Some(task) = &self.task {
            let marker = if self.kind == 5932 { "issue" } else { "prompt" };
            rows.push(row(&["i", task, "text", "", marker]));
        }
        let mut param = |key: &str, value: &str| rows.push(row(&["param", key, value]));
        if let Some(git_ref) = &self.git_ref {
            param("git_ref", git_ref);
        }
        for (n, command) in self.commands.iter().enumerate() {
            param(&format!("cmd_{n}"), command);
        }
        if let Some(workdir) = &self.workdir {
            param("workdir", workdir);
        }
        for (key, value) in &self.env {
            param(&format!("env_{key}"), value);
        }
        for (n, path) in self.artifacts.iter().enumerate() {
            param(&format!("artifact_{n}"), path);
        }
        let numbers = [
            ("max_time_secs", self.time_secs),
            ("max_memory_mb", self.memory_mb),
            ("max_disk_mb", self.disk_mb),
        ];
        for (key, number) in numbers {
            if let Some(number) = number {
                param(key, &number.to_string());
            }
        }
        if let Some(milli) = self.cpu_milli {
            param("max_cpu_cores", &format!("{}.{:03}", milli / 1000, milli % 1000));
        }
        for (key, value) in &self.params {
            param(key, value);
        }
        if let Some(output) = &self.output {
            rows.push(row(&["output", output]));
        }
        if let Some(bid) = self.bid_msat {
            rows.push(row(&["bid", &bid.to_string()]));
        }
        if !self.relays.is_empty() {
            let mut relays = row(&["relays"]);
            relays.extend(self.relays.iter().cloned());
            rows.push(relays);
        }
        rows
    }
}
