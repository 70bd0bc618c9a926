//! One accepted job from its turn to its end: pin, base, sandbox, agent, content. The answer is `ending`'s to write
//! down; whose turn it is, is `engine`'s business.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::content::{self, Artifact, Ran};
use super::delivered;
use super::ending::{self, Finished};
use super::reached::Reached;
use super::ticket::{End, Stop, Stopped, Ticket};
use super::{Failure, Rooms, repo_failure};
use crate::agent::{self, Task, Work};
use crate::market::Code;
use crate::market::job_type::Output;
use crate::protocol;
use crate::repo::{Base, Pin};
use crate::sandbox::{self, Sandbox, Spec, Tree};
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
        let pin = match commit {
            Some(commit) => rooms.repos.pin_again(url, commit)?,
            None => {
                rooms.repos.pin_for(&ticket.request.customer.to_hex(), url, order.git_ref.as_deref()).await?
            }
        };
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
    let mut work = Work::default();
    let done = agent::script::run(&*sandbox, task, &mut work).await;
    let limit = match done {
        Ok(()) => work.limit().map(|(limit, _)| limit),
        Err(agent::Error::BadOrder(why)) => return Ok(Err(Failure::new(Code::InvalidInput, why).into())),
        Err(error @ agent::Error::NoRoom(_)) => {
            return Ok(Err(Failure::new(Code::ResourceLimit, error.to_string()).into()));
        }
        // It may end before the first command begins.
        Err(agent::Error::Sandbox(error)) => match sandbox.limit() {
            None => return or_again(error),
            limit => limit,
        },
    };
    let taken = match limit {
        None => take(rooms, ticket, &*sandbox, pinned).await,
        Some(_) => Ok(Taken::default()),
    };
    let usage = sandbox.destroy().await.map_err(Again)?;
    let of_base = pinned.iter().flat_map(|(_, base)| base.warnings()).map(ToString::to_string);
    let warnings: Vec<String> = rooms.backend.caveats().into_iter().chain(of_base).collect();
    let reached = limit.map(|limit| Reached::new(limit, &work, &ticket.admission.policy, &usage));
    let failure = reached.as_ref().map(Reached::failure);
    let mut ran = Ran { work, artifacts: Vec::new(), warnings, usage, reached };
    let taken = match (failure, taken) {
        (None, Ok(taken)) => taken,
        (Some(failure), _) => return Ok(Err(Trouble::from(failure).after(ran))),
        (None, Err(trouble)) => return Ok(Err(trouble.after(ran))),
    };
    ran.artifacts = taken.artifacts;
    let (work, warnings, cap) = (&ran.work, &ran.warnings, rooms.options.max_content_bytes);
    let content = match (ticket.admission.job_type.manifest.output, taken.patch) {
        (Output::Patch, Some((patch, ignored))) => {
            content::patch(work, patch, ignored, warnings, cap).map(Some)
        }
        (Output::Patch, None) => Err(Failure::new(Code::InvalidInput, "a patch needs a repository")),
        (Output::Report, _) => Ok(None),
        (Output::Json, _) => content::printed(work, true, warnings, cap).map(Some),
        (Output::Text, _) => content::printed(work, false, warnings, cap).map(Some),
    };
    let content = match content {
        Ok(content) => content,
        Err(failure) => return Ok(Err(Trouble::from(failure).after(ran))),
    };
    let commit = pinned.map(|(pin, _)| pin.commit.clone());
    Ok(Ok(Finished { content, commit, ran }))
}

/// What is taken out of the sandbox before it is destroyed.
#[derive(Default)]
struct Taken {
    /// With the number of ignored files that are not in it.
    patch: Option<(crate::repo::Patch, u64)>,
    artifacts: Vec<Artifact>,
}

async fn take(
    rooms: &Rooms,
    ticket: &Ticket,
    sandbox: &dyn Sandbox,
    pinned: Option<&(Pin, Arc<Base>)>,
) -> Result<Taken, Trouble> {
    // Nothing that is still running may change what is read now.
    sandbox.kill().await.map_err(|e| sandbox_failure(&e))?;
    let mut artifacts = Vec::new();
    for path in &ticket.admission.order.artifacts {
        artifacts.push(artifact(rooms, ticket, sandbox, path).await);
    }
    let patch = match pinned {
        Some((pin, base)) if ticket.admission.job_type.manifest.output == Output::Patch => {
            let cap = rooms.options.max_changes_bytes;
            let changes = delivered::changes(sandbox, base, cap).await?;
            let patch = rooms.repos.patch(pin, changes.delivered).await.map_err(|e| repo_failure(&e))?;
            Some((patch, changes.left_out))
        }
        _ => None,
    };
    Ok(Taken { patch, artifacts })
}

/// Whatever the job did to this path, and whatever fails about it, is told of this artifact alone.
async fn artifact(rooms: &Rooms, ticket: &Ticket, sandbox: &dyn Sandbox, path: &str) -> Artifact {
    let bytes = match sandbox.read_file(path, rooms.options.max_artifact_bytes).await {
        Ok(bytes) => bytes,
        Err(error) => {
            if matches!(error, sandbox::Error::Host { .. } | sandbox::Error::Gone(_)) {
                tracing::warn!(job = %ticket.request.id, %error, "an artifact could not be read");
            }
            return Artifact { path: path.into(), sha256: None, size: None, error: Some(error.to_string()) };
        }
    };
    // Only told of, never kept: nobody could fetch it, and a stranger would fill our disk.
    let size = Some(bytes.len() as u64);
    match tokio::task::spawn_blocking(move || protocol::sha256_hex(&bytes)).await {
        Ok(hash) => Artifact { path: path.into(), sha256: Some(hash), size, error: None },
        Err(error) => Artifact { path: path.into(), sha256: None, size, error: Some(error.to_string()) },
    }
}

fn or_again<T>(error: sandbox::Error) -> Result<Result<T, Trouble>, Again> {
    match error {
        sandbox::Error::Host { .. } | sandbox::Error::Full { .. } => Err(Again(error)),
        error => Ok(Err(sandbox_failure(&error).into())),
    }
}

pub(super) fn sandbox_failure(error: &sandbox::Error) -> Failure {
    use sandbox::Error as E;
    let code = match error {
        E::Unenforceable { .. } => Code::Unsupported,
        E::BadPath(_) | E::NotFound(_) | E::BadPolicy(_) => Code::InvalidInput,
        E::TooLarge { .. } | E::TooDeep { .. } => Code::ResourceLimit,
        E::Gone(_) | E::Host { .. } | E::Full { .. } => Code::Internal,
    };
    Failure::new(code, error.to_string())
}
