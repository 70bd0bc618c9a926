//! `coinop verify`: every check that can be made on a result event, and by name those that cannot. The
//! checks themselves are `protocol::proof`'s and `repo`'s.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nostr_sdk::prelude::{Event, JsonUtil, Keys};
use serde_json::json;

use super::common::{Common, Overrides, block_on};
use super::exit::{Exit, Failure, OrExit, Outcome};
use super::output::{self, Cell, Table, Tone};
use crate::canonical::canonical_text;
use crate::config::Config;
use crate::keys;
use crate::protocol::proof::{self, Verdict};
use crate::protocol::{Order, Reply, Request, sha256_hex};
use crate::repo::{self, Repos};

const MAX_EVENT_BYTES: u64 = 16 << 20;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The result event as JSON; - for stdin
    pub event: PathBuf,
    /// Fetch this repository, and check that the commit exists and a patch applies to it
    #[arg(long, value_name = "URL")]
    pub repo: Option<String>,
    /// The request event as JSON, where the result does not carry it
    #[arg(long, value_name = "FILE")]
    pub request: Option<PathBuf>,
    /// The customer's or the provider's key file, to open an encrypted result
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Also fetch from loopback and private addresses
    #[arg(long)]
    pub allow_private_repos: bool,
    /// Also fetch from file:// URLs
    #[arg(long)]
    pub allow_file_repos: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// One thing looked at.
struct Row {
    what: &'static str,
    verdict: Verdict,
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let mut over = Overrides::default();
    over.on("admission.allow_private_repos", "--allow-private-repos", args.allow_private_repos);
    over.on("admission.allow_file_repos", "--allow-file-repos", args.allow_file_repos);
    let config = common.start_quietly(over)?;
    let event = read_event(&args.event)?;
    let request = args.request.as_deref().map(read_event).transpose()?;
    let key = match &args.key {
        Some(path) => Some(keys::load(path, &keys::password_from_env_or_terminal).or_exit(Exit::Config)?),
        None => None,
    };
    block_on(async move {
        let keys = key.as_ref().map(|key| key.keys());
        let rows = check(&args, &config, &event, request.as_ref(), keys).await?;
        report(&event, &rows, args.json)
    })
}

async fn check(
    args: &Args,
    config: &Config,
    event: &Event,
    request: Option<&Event>,
    keys: Option<&Keys>,
) -> Result<Vec<Row>, Failure> {
    let findings = match keys {
        Some(keys) => proof::check_with_keys(event, request, keys),
        None => proof::check(event, request),
    };
    let mut rows: Vec<Row> = findings.into_iter().map(|f| Row { what: f.what, verdict: f.verdict }).collect();
    let reply = open(event, keys);
    let ordered = request.cloned().or_else(|| echo(event)).and_then(|request| ordered(&request, keys));
    rows.extend(repository(args, config, reply.as_ref(), ordered.as_ref()).await?);
    Ok(rows)
}

/// The result in plain, as far as we can read it.
fn open(event: &Event, keys: Option<&Keys>) -> Option<Reply> {
    let by_us = keys.filter(|keys| keys.public_key() == event.pubkey);
    let reply = match (keys, by_us) {
        (Some(keys), Some(_)) => Reply::open(event, keys, event.tags.public_keys().next()?),
        (Some(keys), None) => Reply::decode(event, keys),
        // Nothing is decrypted with it: it only lets a plain result be read.
        (None, _) => Reply::decode(event, &Keys::generate()),
    };
    reply.ok()
}

/// The request that the result carries along, when it is genuine and the one that is answered.
fn echo(event: &Event) -> Option<Event> {
    let carried =
        event.tags.iter().find(|tag| tag.as_slice().first().is_some_and(|name| name == "request"))?;
    let request = Event::from_json(carried.as_slice().get(1)?).ok()?;
    let answered = event.tags.event_ids().any(|id| *id == request.id);
    (answered && request.verify().is_ok()).then_some(request)
}

/// What the customer named.
struct Ordered {
    repo: String,
    git_ref: Option<String>,
}

fn ordered(request: &Event, keys: Option<&Keys>) -> Option<Ordered> {
    let request = match keys {
        Some(keys) if keys.public_key() == request.pubkey => Request::decode_own(request, keys),
        Some(keys) => Request::decode(request, keys),
        None => Request::decode_plain(request),
    };
    let order = Order::read(&request.ok()?).ok()?;
    Some(Ordered { repo: order.repo?, git_ref: order.git_ref })
}

/// `ref`: the commit is the one that was ordered; `repository`: the one that was ordered; `commit`: it is there;
/// `patch`: its hash, and that it applies.
async fn repository(
    args: &Args,
    config: &Config,
    reply: Option<&Reply>,
    ordered: Option<&Ordered>,
) -> Result<Vec<Row>, Failure> {
    let unchecked = |what, why: &str| Row { what, verdict: Verdict::Unchecked(why.into()) };
    let Some(reply) = reply else {
        return Ok(vec![unchecked(
            "commit",
            "the result cannot be read without its customer's or provider's key",
        )]);
    };
    let patch = is_patch(reply);
    let Some(commit) = reply.proof.as_ref().and_then(|proof| proof.commit.clone()) else {
        return Ok(vec![unchecked("commit", "the result names no commit")]);
    };
    let Some(url) = &args.repo else {
        let mut rows = vec![
            Row { what: "ref", verdict: ref_verdict(ordered, &commit, None) },
            unchecked("commit", "no repository was given (--repo URL)"),
        ];
        if patch {
            rows.push(unchecked("patch", "no repository was given (--repo URL)"));
        }
        return Ok(rows);
    };
    let mut rows = Vec::new();
    match ordered {
        Some(ordered) if canonical_text(&ordered.repo) != canonical_text(url) => rows.push(Row {
            what: "repository",
            verdict: Verdict::Bad(format!("the request names {}", output::tame(&ordered.repo, 200))),
        }),
        Some(_) => rows.push(Row { what: "repository", verdict: Verdict::Ok }),
        None => rows.push(unchecked(
            "repository",
            "without the request (--request FILE) it is not known which was ordered",
        )),
    }
    let folder = tempfile::Builder::new().prefix("coinop-verify-").tempdir()?;
    let options = repo::Options {
        allow_private: config.admission.allow_private_repos,
        allow_file: config.admission.allow_file_repos,
        ..config.repo.options()
    };
    let repos = Repos::open(folder.path(), options)?;
    let now = match ordered.map(|ordered| ordered.git_ref.as_deref()) {
        Some(git_ref) if git_ref.is_none_or(|name| !is_full_id(name)) => Some(repos.pin(url, git_ref).await),
        _ => None,
    };
    let now = now.as_ref().map(|pinned| pinned.as_ref().map(|pin| pin.commit.as_str()));
    rows.push(Row { what: "ref", verdict: ref_verdict(ordered, &commit, now) });
    rows.push(Row { what: "commit", verdict: verdict(repos.pin(url, Some(&commit)).await.map(|_| ())) });
    if patch {
        let applies = repos.applies(url, &commit, reply.content.clone().into_bytes()).await;
        rows.push(Row { what: "patch", verdict: verdict(applies) });
    }
    Ok(rows)
}

/// Whether `commit`, the proof's, is what was ordered. `now`: what the ref points to at this moment, if asked. Only a
/// commit id cannot move; a branch or tag elsewhere now says nothing about then.
fn ref_verdict(ordered: Option<&Ordered>, commit: &str, now: Option<Result<&str, &repo::Error>>) -> Verdict {
    let Some(ordered) = ordered else {
        let why = "without the request (--request FILE) it is not known which commit was ordered";
        return Verdict::Unchecked(why.into());
    };
    let name = ordered.git_ref.as_deref().unwrap_or("HEAD");
    if is_full_id(name) {
        return if name.eq_ignore_ascii_case(commit) {
            Verdict::Ok
        } else {
            Verdict::Bad(format!("the request names commit {name}, the result is of {commit}"))
        };
    }
    let shown = output::tame(name, 100);
    match now {
        Some(Ok(now)) if now == commit => Verdict::Ok,
        Some(Ok(now)) => {
            Verdict::Unchecked(format!("{shown} is at {now} now; the ref may have moved since the job ran"))
        }
        Some(Err(error)) => {
            Verdict::Unchecked(format!("{shown} may have moved since the job ran; now: {error}"))
        }
        None => Verdict::Unchecked(format!(
            "{shown} may have moved since the job ran; where it is now was not asked (--repo URL)"
        )),
    }
}

fn is_full_id(name: &str) -> bool {
    matches!(name.len(), 40 | 64) && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A result of the patch profile, or one that looks like a diff.
fn is_patch(reply: &Reply) -> bool {
    reply.fact("patch_sha256").is_some()
        || reply.fact("files_changed").is_some()
        || reply.content.starts_with("diff --git ")
}

/// What the repository says about itself is bad; what the network or this host says is no verdict.
fn verdict(result: Result<(), repo::Error>) -> Verdict {
    use repo::Error as E;
    match result {
        Ok(()) => Verdict::Ok,
        Err(error @ (E::DoesNotApply { .. } | E::RefNotFound { .. } | E::Broken { .. })) => {
            Verdict::Bad(error.to_string())
        }
        Err(error) => Verdict::Unchecked(error.to_string()),
    }
}

fn read_event(path: &Path) -> Result<Event, Failure> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(MAX_EVENT_BYTES).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(MAX_EVENT_BYTES).read_to_string(&mut text))
    };
    let shown = path.display();
    read.with_context(|| format!("cannot read {shown}")).or_exit(Exit::Usage)?;
    // The parser's own words name a column of text that nobody wrote by hand.
    Event::from_json(&text).map_err(|_| {
        let words = format!("{shown} is not a Nostr event; give the file that `coinop request --save` wrote");
        Failure::say(Exit::Usage, words)
    })
}

fn report(event: &Event, rows: &[Row], as_json: bool) -> Outcome {
    let bad = rows.iter().filter(|row| matches!(row.verdict, Verdict::Bad(_))).count();
    let unchecked = rows.iter().filter(|row| matches!(row.verdict, Verdict::Unchecked(_))).count();
    let exit = if bad > 0 { Exit::Unverified } else { Exit::Ok };
    if as_json {
        let findings: Vec<_> = rows
            .iter()
            .map(|row| {
                let (verdict, why) = words(&row.verdict);
                json!({ "what": row.what, "verdict": verdict, "why": why })
            })
            .collect();
        output::json(&json!({
            "event_id": event.id.to_hex(),
            "provider": keys::npub(&event.pubkey),
            "content_sha256": sha256_hex(event.content.as_bytes()),
            "verified": bad == 0,
            "bad": bad,
            "unchecked": unchecked,
            "findings": findings,
        }))?;
        return Ok(exit);
    }
    let mut table = Table::pairs();
    for row in rows {
        let (verdict, why) = words(&row.verdict);
        let tone = match row.verdict {
            Verdict::Ok => Tone::Good,
            Verdict::Bad(_) => Tone::Bad,
            Verdict::Unchecked(_) => Tone::Unsure,
        };
        let why = output::tame(why.unwrap_or_default(), 400);
        table.row(vec![Cell::toned(verdict, tone), row.what.into(), why.into()]);
    }
    table.print()?;
    let id = output::short(&event.id.to_hex());
    output::talk(&match (bad, unchecked) {
        (0, 0) => format!("{id}: all checks passed"),
        (0, _) => format!("{id}: no check failed; {unchecked} could not be made"),
        _ => format!("{id}: {bad} bad, {unchecked} could not be checked"),
    });
    Ok(exit)
}

fn words(verdict: &Verdict) -> (&'static str, Option<&str>) {
    match verdict {
        Verdict::Ok => ("ok", None),
        Verdict::Bad(why) => ("bad", Some(why)),
        Verdict::Unchecked(why) => ("unchecked", Some(why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "1111111111111111111111111111111111111111";
    const TWO: &str = "2222222222222222222222222222222222222222";

    fn judged(git_ref: Option<&str>, now: Option<Result<&str, &repo::Error>>) -> Verdict {
        let ordered = Ordered { repo: "https://git.example/a".into(), git_ref: git_ref.map(str::to_owned) };
        ref_verdict(Some(&ordered), ONE, now)
    }

    #[test]
    fn a_commit_that_was_ordered_and_not_run_is_bad_wherever_the_refs_are_now() {
        assert_eq!(judged(Some(ONE), None), Verdict::Ok);
        let bad = judged(Some(TWO), None);
        assert!(matches!(&bad, Verdict::Bad(why) if why.contains(ONE) && why.contains(TWO)), "{bad:?}");
        assert_eq!(judged(Some(TWO), Some(Ok(ONE))), bad);
    }

    #[test]
    fn a_ref_that_points_elsewhere_now_may_have_moved_and_is_not_bad() {
        let gone = repo::Error::RefNotFound { git_ref: "main".into() };
        for git_ref in [Some("main"), Some("1111111"), None] {
            assert_eq!(judged(git_ref, Some(Ok(ONE))), Verdict::Ok);
            for now in [None, Some(Ok(TWO)), Some(Err(&gone))] {
                let said = judged(git_ref, now);
                assert!(
                    matches!(&said, Verdict::Unchecked(why) if why.contains("may have moved")),
                    "{said:?}"
                );
            }
        }
        assert!(matches!(ref_verdict(None, ONE, None), Verdict::Unchecked(why) if why.contains("--request")));
    }
}
