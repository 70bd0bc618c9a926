//! The tables of `bench tti`: the lanes of each mode, what streaming and many sandboxes cost, and each promise. The
//! figures come as the JSON that `--json` prints; nothing is measured here.

use serde_json::Value;

use super::super::output::{Cell, Table, Tone, data};

pub fn print(report: &Value) -> std::io::Result<()> {
    let mut lanes =
        Table::new(&["mode", "lane", ">min ms", ">p50", ">p95", ">p99", ">create", ">× plain", ">succeeded"]);
    for mode in list(report, "modes") {
        for lane in list(mode, "lanes") {
            let all = lane["starts"] == lane["successes"];
            lanes.row(vec![
                text(&mode["mode"]).into(),
                text(&lane["name"]).into(),
                number(&lane["min_ms"]).into(),
                number(&lane["p50_ms"]).into(),
                number(&lane["p95_ms"]).into(),
                number(&lane["p99_ms"]).into(),
                number(&lane["first_p50_ms"]).into(),
                number(&lane["ratio"]).into(),
                Cell::toned(
                    format!("{}/{}", lane["successes"], lane["starts"]),
                    if all { Tone::Good } else { Tone::Bad },
                ),
            ]);
        }
    }
    lanes.print()?;
    for mode in list(report, "modes") {
        for lane in list(mode, "lanes").iter().filter(|lane| lane["failure"].is_string()) {
            data(&format!("{} {}: {}", text(&mode["mode"]), text(&lane["name"]), text(&lane["failure"])))?;
        }
    }
    for skipped in list(report, "skipped") {
        data(&format!("without {}: {}", text(&skipped["name"]), text(&skipped["why"])))?;
    }
    if !list(report, "streaming").is_empty() {
        data("")?;
        let mut streaming = Table::new(&["a byte in and out", ">p50 ms", ">p99", ">adds"]);
        for one in list(report, "streaming") {
            streaming.row(vec![
                text(&one["name"]).into(),
                number(&one["p50_ms"]).into(),
                number(&one["p99_ms"]).into(),
                number(&one["adds_ms"]).into(),
            ]);
        }
        streaming.print()?;
    }
    if !list(&report["soak"], "looks").is_empty() {
        data("")?;
        let mut soak = Table::new(&[">sandboxes", ">node bytes", ">with helpers", ">open files"]);
        for look in list(&report["soak"], "looks") {
            let cells = ["sandboxes", "node_bytes", "with_helpers_bytes", "open_files"];
            soak.row(cells.map(|name| look[name].to_string().into()).to_vec());
        }
        soak.print()?;
    }
    data("")?;
    let mut goals = Table::new(&["promise", ">at most", ">measured", ""]);
    for goal in list(report, "goals") {
        let met = goal["met"] == true;
        goals.row(vec![
            text(&goal["name"]).into(),
            number(&goal["at_most"]).into(),
            number(&goal["measured"]).into(),
            if met { Cell::toned("met", Tone::Good) } else { Cell::toned("missed", Tone::Bad) },
        ]);
    }
    goals.print()
}

fn list<'a>(of: &'a Value, name: &str) -> &'a [Value] {
    of[name].as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Three digits that count, or a dash for none.
fn number(value: &Value) -> String {
    match value.as_f64() {
        None => "–".to_owned(),
        Some(number) if number.abs() >= 100.0 => format!("{number:.0}"),
        Some(number) if number.abs() >= 10.0 => format!("{number:.1}"),
        Some(number) if number.abs() >= 0.1 || number == 0.0 => format!("{number:.2}"),
        Some(number) => format!("{number:.4}"),
    }
}
