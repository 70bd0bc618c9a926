//! `coinop demo`: the report of one job, as text or JSON. Running it is `demo`'s business.

use tokio::signal::unix::{SignalKind, signal};

use super::common::{Common, block_on};
use super::exit::{Exit, Failure, Outcome};
use super::output::{self, Paint};
use crate::demo::{Report, Seen, Stage};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object instead of a report
    #[arg(long)]
    pub json: bool,
    /// Keep relay, repository and node running until Ctrl-C
    #[arg(long)]
    pub keep: bool,
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let folder = common.stage_folder("coinop-demo-")?;
    let config = common.stage(folder.path())?;
    let outcome = block_on(play(args, config));
    // Said, because it is large: a job's sandboxes are gone by now, the folder may not be.
    if let Err(error) = folder.close() {
        output::talk(&format!("could not remove the demo's folder: {error}"));
    }
    outcome
}

async fn play(args: Args, config: crate::config::Config) -> Outcome {
    // From here on a signal means an orderly end, so that the folder goes, too.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stopped = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let data_dir = config.data_dir.display().to_string();
    let stage = Stage::set(config).await?;
    let told = args.json;
    if !told {
        output::talk(&format!("relay       {}", stage.relay.url()));
        output::talk(&format!("repository  {} at {}", stage.server.url(), output::short(&stage.commit)));
        output::talk(&format!("provider    {}", stage.npub()));
        output::talk(&format!("sandbox     {}", stage.node.identity().image));
        output::talk("");
    }
    tokio::pin!(stopped);
    let order = stage.order(|at_ms, seen| {
        if !told {
            say(at_ms, &seen)
        }
    });
    let report = tokio::select! {
        report = order => report?,
        () = &mut stopped => return Err(Failure::say(Exit::Failure, "interrupted")),
    };
    if args.json {
        output::json(&report)?;
    } else {
        print(&report)?;
    }
    let exit = if report.verified { Exit::Ok } else { Exit::Unverified };
    if args.keep {
        say_what_to_try(&stage, &data_dir);
        stopped.await;
    }
    let Stage { node, server, relay, .. } = stage;
    node.drain().await?;
    server.shutdown();
    drop(relay);
    Ok(exit)
}

fn say(at_ms: u64, seen: &Seen<'_>) {
    let line = match seen {
        Seen::Published => "request published (kind 5000)".to_string(),
        Seen::Feedback(feedback) => {
            let extra = feedback.extra.as_deref().unwrap_or_default();
            format!("feedback: {} ({})", feedback.status.as_str(), output::tame(extra, 200))
        }
        Seen::Result(answer) => format!("result received (kind {})", answer.reply.kind),
    };
    output::talk(&format!("{at_ms:>6} ms  {line}"));
}

fn print(report: &Report) -> Result<(), Failure> {
    let paint = Paint::stdout();
    let empty = Vec::new();
    output::data("\nWhat the customer got:")?;
    for run in report.result["command_results"].as_array().unwrap_or(&empty) {
        output::data(&format!("  $ {}", run["command"].as_str().unwrap_or_default()))?;
        for line in output::tame_lines(run["stdout"].as_str().unwrap_or_default()).lines() {
            output::data(&format!("    {line}"))?;
        }
        output::data(
            &paint.faint(&format!("    exit code {}, {} ms", run["exit_code"], run["duration_ms"])),
        )?;
    }
    output::data("\nThe result's proof:")?;
    output::data(&format!("  commit         {}", report.commit))?;
    output::data(&format!("  output sha256  {}", report.output_sha256))?;
    output::data(&format!("  sandbox        {}", report.sandbox))?;
    for (what, verdict) in &report.checks {
        let verdict = match verdict.as_str() {
            "ok" => paint.good("ok"),
            bad if bad.starts_with("bad") => paint.bad(bad),
            unsure => paint.unsure(unsure),
        };
        output::data(&format!("  {what:<14} {verdict}"))?;
    }
    let legs = report.legs;
    output::data("\nWhere the time went (milliseconds after posting):")?;
    for (leg, ms) in [
        ("accepted and written down", legs.accepted_ms),
        ("attempt begun", legs.started_ms),
        ("result signed and written down", legs.closed_ms),
        ("result received", legs.result_received_ms),
    ] {
        output::data(&format!("  {leg:<32} {ms:>6}"))?;
    }
    let line = if report.verified { paint.good("verified") } else { paint.bad("NOT verified") };
    output::data(&format!(
        "\n{line}: request {} → result {}",
        output::short(&report.request_id),
        output::short(&report.result_id)
    ))?;
    Ok(())
}

fn say_what_to_try(stage: &Stage, data_dir: &str) {
    output::talk("");
    output::talk("Everything keeps running until Ctrl-C or SIGTERM. In another terminal:");
    output::talk(&format!(
        "  coinop request --skill generic --repo {} --cmd 'ls -l' --provider {} --relay {}",
        stage.server.url(),
        stage.npub(),
        stage.relay.url()
    ));
    output::talk(&format!("  coinop scan --relay {}", stage.relay.url()));
    output::talk(&format!("  coinop jobs list --data-dir {data_dir}"));
}
