//! `coinop status`: what the running node is doing, asked over its control socket. Exit code 7 when none runs, 8 when
//! it reaches no relay.

use serde_json::Value;

use super::common::{Common, Overrides};
use super::exit::{Exit, OrExit, Outcome};
use super::output::{self, Cell, Table, Tone};
use crate::clock;
use crate::control::{self, Ask};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let config = common.start_quietly(Overrides::default())?;
    let status = match control::ask(&config.data_dir, &Ask::Status) {
        Err(error @ control::Error::NotRunning(_)) => return Err(error).or_exit(Exit::Held),
        status => status?,
    };
    let relays = status["relays"].as_array().map_or(&[][..], Vec::as_slice);
    let ours: Vec<&Value> = relays.iter().filter(|relay| relay["ours"] == true).collect();
    let connected = ours.iter().filter(|relay| relay["connected"] == true).count();
    let exit = if connected == 0 { Exit::Unreachable } else { Exit::Ok };
    if args.json {
        output::json(&status)?;
        return Ok(exit);
    }
    let text = |value: &Value| output::tame(value.as_str().unwrap_or_default(), 200);
    let count = |value: &Value| value.as_u64().unwrap_or_default();
    let names = status["skills"].as_array().map(|all| all.iter().map(text).collect::<Vec<_>>().join(", "));
    let mut table = Table::pairs();
    let mut pair = |name: &str, value: String| table.row(vec![name.into(), value.into()]);
    pair("version", text(&status["version"]));
    pair("provider", text(&status["provider"]));
    pair("skills", names.unwrap_or_default());
    pair("sandbox", text(&status["sandbox"]["backend"]));
    let jobs = &status["jobs"];
    let taken = match (jobs["stopped"].as_str(), jobs["draining"] == true) {
        (Some(why), _) => format!("; no job is taken any more: {}", output::tame(why, 200)),
        (None, true) => "; it is ending, no job is taken any more".to_owned(),
        (None, false) => String::new(),
    };
    pair("jobs", format!("{} running, {} waiting{taken}", count(&jobs["running"]), count(&jobs["waiting"])));
    pair("relays", format!("{connected} of {} relays connected", ours.len()));
    table.print()?;
    output::data("")?;
    let now = clock::now_ms();
    let mut table = Table::new(&["relay", "state", "since", ">owed", ">received", "trouble"]);
    for relay in relays {
        let up = relay["connected"] == true;
        let state = match (up, relay["ours"] == true) {
            (true, _) => Cell::toned("connected", Tone::Good),
            (false, true) => Cell::toned("not connected", Tone::Bad),
            (false, false) => Cell::toned("answered on", Tone::Faint),
        };
        let since = match count(&relay["since_ms"]) {
            0 => "never".to_owned(),
            at => output::relative(at, now),
        };
        table.row(vec![
            text(&relay["relay"]).into(),
            state,
            since.into(),
            count(&relay["owed"]).to_string().into(),
            count(&relay["received"]).to_string().into(),
            if up { String::new() } else { text(&relay["trouble"]) }.into(),
        ]);
    }
    table.print()?;
    Ok(exit)
}
