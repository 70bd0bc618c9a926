//! The demo's stage: an in-process relay, a repository made on the spot and served over http, a node on the
//! local sandbox, and a customer who posts one real job. What is printed is the command line's business.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nostr_sdk::prelude::{Keys, ToBech32};
use serde::Serialize;

use crate::clock;
use crate::config::Config;
use crate::customer::{Answer, Customer, Heard};
use crate::node::Node;
use crate::protocol::draft::Draft;
use crate::protocol::proof::Verdict;
use crate::protocol::{Feedback, Status};
use crate::relay::{Client, Wire, local::LocalRelay};
use crate::repo::serve;
use crate::store::record::Record;

const PATIENCE: Duration = Duration::from_secs(60);

/// The repository that the demo makes: small, and with something to do.
const FILES: &[(&str, &str)] = &[
    ("README.md", "# Coins\n\nWhat the machines took, and the script that adds it up.\n"),
    ("data/coins.csv", "machine,coins\narcade,120\nlaundry,75\nkiosk,230\n"),
    (
        "bin/totals.sh*",
        "#!/bin/sh\n# Adds up the second column of a CSV file with a header.\n\
         awk -F, 'NR > 1 { sum += $2; n++ } END { printf \"%d machines took %d coins\\n\", n, sum }' \"$1\"\n",
    ),
    (
        "test.sh*",
        "#!/bin/sh\nset -e\ngot=$(sh bin/totals.sh data/coins.csv)\n\
         [ \"$got\" = '3 machines took 425 coins' ] && echo 'test passed'\n",
    ),
];

const COMMANDS: &[&str] = &["sh test.sh", "sh bin/totals.sh data/coins.csv | tee totals.txt"];

/// Everything that runs during the demo.
pub struct Stage {
    pub relay: LocalRelay,
    pub server: serve::Server,
    pub node: Node,
    pub provider: Keys,
    /// The commit at the head of the repository.
    pub commit: String,
}

/// What the customer sees, as it comes.
#[derive(Debug)]
pub enum Seen<'a> {
    Published,
    Feedback(&'a Feedback),
    Result(&'a Answer),
}

/// The demo's report. Times in milliseconds from the moment of posting.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub request_id: String,
    pub result_id: String,
    /// Of the result event.
    pub kind: u16,
    /// `success`, or `unverified` when a check of the result failed.
    pub status: &'static str,
    pub commit: String,
    pub output_sha256: String,
    pub verified: bool,
    pub elapsed_ms: u64,
    pub legs: Legs,
    pub feedbacks: Vec<String>,
    /// Each check and what came of it.
    pub checks: Vec<(String, String)>,
    pub sandbox: String,
    pub relay: String,
    pub repo: String,
    pub result: serde_json::Value,
}

/// When the request reached each stop, milliseconds after posting.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Legs {
    pub accepted_ms: u64,
    pub started_ms: u64,
    pub closed_ms: u64,
    pub result_received_ms: u64,
}

impl Stage {
    /// Starts relay, repository and node in `config.data_dir`; relay and repository rules are set here.
    ///
    /// # Errors
    /// What could not be started.
    pub async fn set(mut config: Config) -> anyhow::Result<Stage> {
        let relay = LocalRelay::start().await.context("cannot start the relay")?;
        let folder = config.data_dir.join("demo").join("coins");
        let commit = make_repository(&folder)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let server = serve::start(&[folder], address).await.context("cannot serve the repository")?;
        config.relays = vec![relay.url()];
        config.admission.allow_private_repos = true;
        config.admission.allow_private_relays = true;
        let provider = Keys::generate();
        let node = Node::start(config, provider.clone(), None).await?;
        Ok(Stage { relay, server, node, provider, commit })
    }

    /// The provider's public key for `--provider`.
    pub fn npub(&self) -> String {
        self.provider.public_key().to_bech32().unwrap_or_else(|_| self.provider.public_key().to_hex())
    }

    /// Posts the job as a stranger would, and waits for its result.
    ///
    /// # Errors
    /// An error feedback, no result within a minute, or a relay that does not take the request.
    pub async fn order(&self, mut see: impl FnMut(u64, Seen<'_>)) -> anyhow::Result<Report> {
        let keys = Keys::generate();
        let client = Client::connect(&[self.relay.url()], None, true, Wire::default(), PATIENCE).await?;
        let draft = Draft {
            kind: 5000,
            repo: Some(self.server.url()),
            commands: COMMANDS.iter().map(|c| c.to_string()).collect(),
            artifacts: vec!["totals.txt".into()],
            provider: Some(self.provider.public_key()),
            relays: vec![self.relay.url()],
            ..Draft::default()
        };
        let request = draft.unsigned(&keys, clock::now_s())?.sign_with_keys(&keys)?;
        let customer = Customer::new(request.clone(), keys, Some(self.provider.public_key()));
        let mut answers = client.subscribe(vec![customer.filter()]);
        answers.stored(PATIENCE).await;

        let (started, started_ms) = (Instant::now(), clock::now_ms());
        let elapsed = || u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let published = client.publish(&request, PATIENCE).await;
        ensure!(!published.is_empty(), "the relay did not answer");
        see(elapsed(), Seen::Published);
        let mut feedbacks = Vec::new();
        let answer = loop {
            let received = tokio::time::timeout(PATIENCE, answers.next()).await;
            let received = received.context("no result within a minute")?.context("the relay went away")?;
            match customer.hear(&received.event) {
                Heard::Ignored(why) => bail!("an event that should not be there: {why}"),
                Heard::Feedback { feedback, .. } => {
                    see(elapsed(), Seen::Feedback(&feedback));
                    let extra = feedback.extra.clone().unwrap_or_default();
                    if feedback.status == Status::Error {
                        bail!("the node ended the job with an error: {extra}");
                    }
                    feedbacks.push(format!("{}: {extra}", feedback.status.as_str()));
                }
                Heard::Result(answer) => break answer,
            }
        };
        let elapsed_ms = elapsed();
        see(elapsed_ms, Seen::Result(&answer));
        client.close().await;
        let mut legs = self.legs(&request.id.to_hex(), started_ms)?;
        legs.result_received_ms = elapsed_ms;
        self.report(&answer, feedbacks, legs)
    }

    fn legs(&self, job: &str, started_ms: u64) -> anyhow::Result<Legs> {
        let mut legs = Legs::default();
        for entry in self.node.store().history(job)? {
            let at = entry.at_ms.saturating_sub(started_ms);
            match entry.record {
                Record::Accepted { .. } => legs.accepted_ms = at,
                Record::Started { .. } => legs.started_ms = at,
                Record::Closed { .. } => legs.closed_ms = at,
                _ => {}
            }
        }
        Ok(legs)
    }

    fn report(&self, answer: &Answer, feedbacks: Vec<String>, legs: Legs) -> anyhow::Result<Report> {
        let proof = answer.reply.proof.as_ref().context("the result carries no proof")?;
        let commit = proof.commit.clone().unwrap_or_default();
        // The repository is ours, so the claim about the commit can be checked, too.
        let commit_holds = commit == self.commit;
        let verified = answer.is_good() && commit_holds && answer.exit_code() == Some(0);
        let mut checks: Vec<(String, String)> =
            answer.findings.iter().map(|f| (f.what.to_string(), verdict(&f.verdict))).collect();
        let said = if commit_holds { "ok" } else { "bad: not the repository's head" };
        checks.push(("commit".into(), said.into()));
        Ok(Report {
            request_id: answer.reply.request_id.to_hex(),
            result_id: answer.reply.id.to_hex(),
            kind: answer.reply.kind,
            status: if verified { "success" } else { "unverified" },
            commit,
            output_sha256: proof.output_sha256.clone(),
            verified,
            elapsed_ms: legs.result_received_ms,
            legs,
            feedbacks,
            checks,
            sandbox: format!("{} ({})", proof.backend, proof.image),
            relay: self.relay.url(),
            repo: self.server.url(),
            result: serde_json::from_str(&answer.reply.content).unwrap_or_default(),
        })
    }
}

fn make_repository(folder: &Path) -> anyhow::Result<String> {
    std::fs::create_dir_all(folder)?;
    serve::sample_repo(folder, FILES).context("cannot make the repository")
}

fn verdict(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Ok => "ok".into(),
        Verdict::Bad(why) => format!("bad: {why}"),
        Verdict::Unchecked(why) => format!("not checked: {why}"),
    }
}
