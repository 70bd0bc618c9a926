//! One accepted job from its turn to its end: pin, base, sandbox, agent, content. The answer is `ending`'s to write
//! down; whose turn it is, is `engine`'s business.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::content::{self, Artifact};
use super::ending::{self, Finished, Ran, Report};
use super::ticket::{End, Stop, Stopped, Ticket};
use super::{Failure, Rooms, repo_failure};
use crate::agent::{self, Task, Work};
use crate::market::Code;
use crate::market::job_type::Output;
use crate::protocol;
use crate::repo::{Base, Pin};
use crate::sandbox::{self, Limit, Sandbox, Spec, Tree};
use crate::store;
use crate::store::record::Record;

/// Runs the job to its terminal answer, which is durable when this returns `Answered`.
///
/// # Errors
/// Only the store's: the job stays open and the node must not go on.
pub async fn run(rooms: &Rooms, ticket: &Ticket, mut stopped: Stopped) -> Result<End, store::Error> {
    let left = ticket.deadline_ms.saturating_sub(rooms.now_ms());
    if left == 0 {
        // The node was away for too long.
        return ending::fail(rooms, ticket, &ticket.too_late(ticket.deadline_ms, OUT_OF_TIME)).await;
    }
    let work = timeout(Duration::from_millis(left), attempts(rooms, ticket));
    let end = tokio::select! {
        biased;
        stop = wait_for_stop(&mut stopped) => match stop {
            Stop::Drain => return Ok(End::LeftOpen),
            Stop::Customer => Err(Failure::new(Code::Cancelled, "the customer cancelled").into()),
            Stop::Owner => Err(Failure::new(Code::Cancelled, "the node's owner cancelled").into()),
        },
        end = work => end.unwrap_or_else(|_| Err(ticket.too_late(ticket.deadline_ms, OUT_OF_TIME).into())),
    };
    match end {
        Ok(finished) => ending::deliver(rooms, ticket, finished, &mut stopped).await,
        Err(Trouble::Job(failure, None)) => ending::fail(rooms, ticket, &failure).await,
        Err(Trouble::Job(failure, Some(ran))) => ending::fail_after(rooms, ticket, &failure, *ran).await,
        Err(Trouble::Store(error)) => Err(error),
    }
}

const OUT_OF_TIME: &str = "no answer within the job's deadline";

pub(super) async fn wait_for_stop(stopped: &mut Stopped) -> Stop {
    loop {
        if let Some(stop) = *stopped.borrow_and_update() {
            return stop;
        }
        if stopped.changed().await.is_err() {
            // The engine is gone: the process is ending.
            return Stop::Drain;
        }
    }
}

/// What can go wrong on the way, kept apart because only one of them may be told to a customer.
enum Trouble {
    /// With what it has used and printed, when it came so far.
    Job(Failure, Option<Box<Ran>>),
    Store(store::Error),
}

impl Trouble {
    /// The same, of a job that was run to its end.
    fn after(self, ran: Ran) -> Trouble {
        match self {
            Trouble::Job(failure, _) => Trouble::Job(failure, Some(Box::new(ran))),
            Trouble::Store(_) => self,
        }
    }
}

impl From<store::Error> for Trouble {
    fn from(error: store::Error) -> Trouble {
        Trouble::Store(error)
    }
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Trouble {
        Trouble::Job(failure, None)
    }
}

/// Tries again when the host failed, as often as the options say; never when the job did.
async fn attempts(rooms: &Rooms, ticket: &Ticket) -> Result<Finished, Trouble> {
    let mut attempt = ticket.attempts;
    let mut commit = ticket.commit.clone();
    loop {
        attempt += 1;
        if attempt > rooms.options.max_attempts {
            let reason = format!("the work on this job broke off {} times", attempt - 1);
            return Err(Failure::new(Code::Interrupted, reason).into());
        }
        let started = Record::Started {
            job: ticket.request.id.to_hex(),
            attempt,
            backend: rooms.backend.identity().backend,
        };
        rooms.record(vec![started]).await?;
        let pinned = pin(rooms, ticket, commit.as_deref()).await?;
        if let Some((pin, _)) = pinned.as_ref().filter(|(pin, _)| commit.as_ref() != Some(&pin.commit)) {
            let (job, pinned) = (ticket.request.id.to_hex(), pin.commit.clone());
            commit = Some(pinned.clone());
            rooms.record(vec![Record::Pinned { job, commit: pinned }]).await?;
        }
        match once(rooms, ticket, attempt, pinned.as_ref()).await {
            Err(Again(error)) if attempt < rooms.options.max_attempts => {
                tracing::warn!(job = %ticket.request.id, attempt, %error, "the sandbox failed; trying again");
            }
            Err(Again(error)) => return Err(sandbox_failure(&error).into()),
            Ok(end) => return end,
        }
    }
}

/// The host's fault: the same job may be tried again.
struct Again(sandbox::Error);

/// The commit of an earlier attempt holds, wherever the branch has moved since.
async fn pin(
    rooms: &Rooms,
    ticket: &Ticket,
    commit: Option<&str>,
) -> Result<Option<(Pin, Arc<Base>)>, Failure> {
    let order = &ticket.admission.order;
    let Some(url) = &order.repo else { return Ok(None) };
    let fetch = async {
        let pin = rooms.repos.pin(url, commit.or(order.git_ref.as_deref())).await?;
        let base = rooms.repos.base(&pin).await?;
        Ok::<_, crate::repo::Error>((pin, base))
    };
    match timeout(Duration::from_millis(rooms.options.repo_ms), fetch).await {
        Ok(Ok(found)) => Ok(Some(found)),
        Ok(Err(error)) => Err(repo_failure(&error)),
        Err(_) => {
            let reason = format!("the repository was not there within {} ms", rooms.options.repo_ms);
            Err(Failure::new(Code::Timeout, reason))
        }
    }
}

async fn once(
    rooms: &Rooms,
    ticket: &Ticket,
    attempt: u32,
    pinned: Option<&(Pin, Arc<Base>)>,
) -> Result<Result<Finished, Trouble>, Again> {
    let id = ticket.request.id.to_hex();
    let short = id.get(..16).unwrap_or(&id);
    let spec = Spec {
        id: format!("{short}-{attempt}"),
        base: pinned.map(|(_, base)| Arc::clone(base) as Arc<dyn Tree>),
        policy: ticket.admission.policy.clone(),
    };
    let sandbox = match rooms.backend.create(spec).await {
        Ok(sandbox) => sandbox,
        Err(error) => return or_again(error),
    };
    let feed = rooms.live.begin(&id);
    let task = Task { job_type: &ticket.admission.job_type, order: &ticket.admission.order, feed: &feed };
    let work = match agent::script::run(&*sandbox, task).await {
        Ok(work) => work,
        Err(agent::Error::BadOrder(why)) => return Ok(Err(Failure::new(Code::InvalidInput, why).into())),
        Err(agent::Error::Sandbox(error)) => return or_again(error),
    };
    let taken = take(rooms, ticket, &*sandbox, &work, pinned.map(|(pin, _)| pin)).await;
    let usage = sandbox.destroy().await.map_err(Again)?;
    let ran = Ran { usage, log: work.log() };
    let taken = match taken {
        Ok(taken) => taken,
        Err(trouble) => return Ok(Err(trouble.after(ran))),
    };
    let warnings: Vec<String> =
        pinned.map(|(_, base)| base.warnings().iter().map(|w| w.to_string()).collect()).unwrap_or_default();
    let cap = rooms.options.max_content_bytes;
    let output = ticket.admission.job_type.manifest.output;
    let content = match (output, taken.patch) {
        (Output::Patch, Some(patch)) => content::patch(&work, patch, &warnings, cap),
        (Output::Patch, None) => Err(Failure::new(Code::InvalidInput, "a patch needs a repository")),
        (Output::Report, _) => content::report(&work, &taken.artifacts, usage, &warnings, cap),
        (Output::Json, _) => content::printed(&work, true, &warnings, cap),
        (Output::Text, _) => content::printed(&work, false, &warnings, cap),
    };
    let content = match content {
        Ok(content) => content,
        Err(failure) => return Ok(Err(Trouble::from(failure).after(ran))),
    };
    let commit = pinned.map(|(pin, _)| pin.commit.clone());
    let report = (output == Output::Report).then_some(Report { work, artifacts: taken.artifacts, warnings });
    Ok(Ok(Finished { content, commit, ran, report }))
}

/// What is taken out of the sandbox before it is destroyed.
struct Taken {
    patch: Option<crate::repo::Patch>,
    artifacts: Vec<Artifact>,
}

async fn take(
    rooms: &Rooms,
    ticket: &Ticket,
    sandbox: &dyn Sandbox,
    work: &Work,
    pin: Option<&Pin>,
) -> Result<Taken, Trouble> {
    if let Some(limit) = work.limit() {
        return Err(limit_failure(limit).into());
    }
    // Nothing that is still running may change what is read now.
    sandbox.kill().await.map_err(|e| sandbox_failure(&e))?;
    let mut artifacts = Vec::new();
    for path in &ticket.admission.order.artifacts {
        artifacts.push(artifact(rooms, sandbox, path).await?);
    }
    let patch = match pin {
        Some(pin) if ticket.admission.job_type.manifest.output == Output::Patch => {
            let cap = rooms.options.max_changes_bytes;
            let changes = sandbox.changes(cap).await.map_err(|e| sandbox_failure(&e))?;
            Some(rooms.repos.patch(pin, changes).await.map_err(|e| repo_failure(&e))?)
        }
        _ => None,
    };
    Ok(Taken { patch, artifacts })
}

async fn artifact(rooms: &Rooms, sandbox: &dyn Sandbox, path: &str) -> Result<Artifact, Trouble> {
    let missing =
        |error: String| Artifact { path: path.into(), sha256: None, size: None, error: Some(error) };
    match sandbox.read_file(path, rooms.options.max_artifact_bytes).await {
        Ok(bytes) => {
            // Only told of, never kept: nobody could fetch it, and a stranger would fill our disk.
            let size = bytes.len() as u64;
            let hashed = tokio::task::spawn_blocking(move || protocol::sha256_hex(&bytes)).await;
            let sha256 = Some(hashed.map_err(internal)?);
            Ok(Artifact { path: path.into(), sha256, size: Some(size), error: None })
        }
        Err(error @ (sandbox::Error::NotFound(_) | sandbox::Error::BadPath(_))) => {
            Ok(missing(error.to_string()))
        }
        Err(error @ sandbox::Error::TooLarge { .. }) => Ok(missing(error.to_string())),
        Err(error) => Err(sandbox_failure(&error).into()),
    }
}

fn or_again<T>(error: sandbox::Error) -> Result<Result<T, Trouble>, Again> {
    match error {
        sandbox::Error::Host { .. } | sandbox::Error::Full { .. } => Err(Again(error)),
        error => Ok(Err(sandbox_failure(&error).into())),
    }
}

fn sandbox_failure(error: &sandbox::Error) -> Failure {
    use sandbox::Error as E;
    let code = match error {
        E::Unenforceable { .. } => Code::Unsupported,
        E::BadPath(_) | E::NotFound(_) | E::BadPolicy(_) => Code::InvalidInput,
        E::TooLarge { .. } | E::TooDeep { .. } => Code::ResourceLimit,
        E::Gone(_) | E::Host { .. } | E::Full { .. } => Code::Internal,
    };
    Failure::new(code, error.to_string())
}

fn limit_failure(limit: Limit) -> Failure {
    match limit {
        Limit::Wall => Failure::new(Code::Timeout, "the job's time was up"),
        Limit::Idle => Failure::new(Code::Timeout, "the job did nothing for longer than it may"),
        Limit::Memory => Failure::new(Code::ResourceLimit, "the job used more memory than it may"),
        Limit::Output => Failure::new(Code::ResourceLimit, "the job printed more than it may"),
    }
}

fn internal(error: impl std::fmt::Display) -> Failure {
    Failure::new(Code::Internal, error.to_string())
}
