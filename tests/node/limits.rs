//! What a job may use, over the whole node and the real sandbox: each limit ends in its own typed answer, and a
//! command that fails is a result, not an error.

use nostr_sdk::prelude::JsonUtil;
use serde_json::Value;

use super::support::buyer::Buyer;
use super::support::stage::{Stage, job};
use coinop::customer::Answer;
use coinop::node::Node;
use coinop::protocol::draft::Draft;
use coinop::protocol::{Code, Scheme};
use coinop::relay::local::LocalRelay;
use coinop::store::JobState;
use coinop::store::record::Summary;

async fn stage(settings: &[(&str, &str)]) -> (LocalRelay, Stage, Node, Buyer) {
    let relay = LocalRelay::start().await.expect("a relay");
    let stage = Stage::new(&[&relay.url()], settings);
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let node = stage.start().await;
    (relay, stage, node, buyer)
}

fn report(answer: &Answer) -> Value {
    serde_json::from_str(&answer.reply.content).expect("a report")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_runs_too_long_or_takes_too_much_memory_or_prints_too_much_is_told_which() {
    let (_relay, _stage, node, buyer) = stage(&[("limits.output_bytes", "4096")]).await;
    let long = Draft { time_secs: Some(1), ..buyer.order(None, &["sleep 600"]) };
    // Files in memory count; one process alone could be told no by the kernel, which would be its own affair.
    let hog = "dd if=/dev/zero of=/dev/shm/a bs=1M count=200; sleep 600";
    let hungry = Draft { memory_mb: Some(48), ..buyer.order(None, &[hog]) };
    let loud = buyer.order(None, &["yes"]);
    let mut posted = Vec::new();
    for draft in [&long, &hungry, &loud] {
        posted.push(buyer.post(draft).await);
    }
    let wanted = [
        (Code::Timeout, "exceeded its time limit (1 s): "),
        (Code::ResourceLimit, "exceeded its memory limit (48 MiB)"),
        (Code::ResourceLimit, "exceeded its output limit (4 KiB): 4096 bytes printed"),
    ];
    for (request, (code, words)) in posted.iter().zip(wanted) {
        let reason = buyer.error(request, code).await;
        assert!(reason.contains(words), "{reason}");
        assert_eq!(job(node.store(), request).expect("the job").state, JobState::Failed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_does_nothing_is_told_so_and_one_that_prints_too_fast_is_only_slowed() {
    let settings = [("limits.idle_ms", "1000"), ("limits.output_bytes_per_s", "131072")];
    let (_relay, _stage, node, buyer) = stage(&settings).await;
    let idle = buyer.post(&buyer.order(None, &["echo begun; sleep 600"])).await;
    let loud = buyer.post(&buyer.order(None, &["head -c 400000 /dev/zero | tr '\\0' x"])).await;
    let reason = buyer.error(&idle, Code::Timeout).await;
    assert!(reason.contains("exceeded its idle limit (1 s): "), "{reason}");
    let (summary, log) = used(&node, &idle);
    assert!(log.contains("\nbegun\n[ended by the idle limit]"), "{log}");
    assert!(summary.wall_ms >= 1000, "{summary:?}");
    let report = report(&buyer.result(&loud).await);
    assert_eq!(report["command_results"][0]["stdout_bytes"], 400_000, "{report}");
    // A second's worth at once, what stood in the pipe at the end, and the rest at its rate.
    assert!(used(&node, &loud).0.wall_ms >= 1400);
}

/// The end of a job in the log: what it used, and what it printed.
fn used(node: &Node, request: &nostr_sdk::Event) -> (Summary, String) {
    let row = job(node.store(), request).expect("the job");
    let summary = row.summary.expect("it has ended");
    let blob = summary.log_blob.as_deref().expect("a log");
    let log = node.store().blob(blob, 4 << 20).expect("readable").expect("there");
    (summary, String::from_utf8_lossy(&log).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_failed_leaves_its_log_and_what_it_used() {
    let (_relay, _stage, node, buyer) = stage(&[("limits.output_bytes", "4096")]).await;
    let long = Draft { time_secs: Some(1), ..buyer.order(None, &["echo begun; sleep 600"]) };
    let loud = buyer.order(None, &["echo begun; yes"]);
    for (draft, code) in [(&long, Code::Timeout), (&loud, Code::ResourceLimit)] {
        let request = buyer.post(draft).await;
        buyer.error(&request, code).await;
        let (summary, log) = used(&node, &request);
        assert!(log.starts_with("$ echo begun") && log.contains("\nbegun\n"), "{log}");
        assert!(log.contains("[ended by the"), "{log}");
        assert!(summary.wall_ms > 0 && summary.output_sha256.is_none(), "{summary:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_that_doubles_in_the_event_is_cut_until_it_fits() {
    let (_relay, _stage, node, buyer) = stage(&[]).await;
    let slashes = "head -c 200000 /dev/zero | tr '\\0' '\\\\'";
    let plain = buyer.order(None, &[slashes]);
    let sealed = Draft { encrypt: Some(Scheme::Nip44), ..buyer.order(None, &[slashes]) };
    for draft in [plain, sealed] {
        let request = buyer.post(&draft).await;
        let report = report(&buyer.result(&request).await);
        assert_eq!(report["command_results"][0]["stdout_bytes"], 200_000);
        let shown = report["command_results"][0]["stdout"].as_str().map_or(0, str::len);
        assert!(shown > 10_000, "{shown} bytes shown");
        for event in buyer.stored(&request).await {
            assert!(event.as_json().len() <= 64 * 1024, "strfry takes no more");
        }
        assert!(used(&node, &request).1.len() > 200_000);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_and_disk_beyond_the_limit_fail_inside_the_job_and_stand_in_its_report() {
    let (_relay, _stage, _node, buyer) = stage(&[("limits.pids", "16")]).await;
    let forks = "for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 600 & done";
    let bomb = buyer.post(&buyer.order(None, &[forks])).await;
    let fill = "dd if=/dev/zero of=big bs=1M count=64";
    let full = buyer.post(&Draft { disk_mb: Some(8), ..buyer.order(None, &[fill]) }).await;
    for (request, words) in [(&bomb, "ork"), (&full, "No space left")] {
        let report = report(&buyer.result(request).await);
        assert_ne!(report["exit_code"], 0, "{report}");
        let stderr = &report["command_results"][0]["stderr"];
        assert!(stderr.as_str().is_some_and(|said| said.contains(words)), "{report}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_command_stops_the_rest_and_a_command_not_found_is_127_in_the_result() {
    let (_relay, _stage, node, buyer) = stage(&[]).await;
    let orders = [
        (vec!["echo one", "no-such-command-here", "echo never"], 127, "not found"),
        (vec!["echo one", "echo why >&2; exit 3", "echo never"], 3, "why"),
        (vec!["echo one", "kill -9 $$", "echo never"], 137, ""),
    ];
    for (commands, code, words) in orders {
        let request = buyer.post(&buyer.order(None, &commands)).await;
        let report = report(&buyer.result(&request).await);
        assert_eq!(report["exit_code"], code, "{report}");
        let codes: Vec<_> = report["command_results"].as_array().expect("a list").iter().collect();
        assert_eq!(codes.len(), 2, "what failed is the last: {report}");
        assert_eq!((&codes[0]["stdout"], &codes[1]["stdout"]), (&"one\n".into(), &"".into()), "{report}");
        assert!(codes[1]["stderr"].as_str().is_some_and(|said| said.contains(words)), "{report}");
        assert_eq!((&codes[0]["exit_code"], &codes[1]["exit_code"]), (&0.into(), &code.into()));
        assert_eq!(job(node.store(), &request).expect("the job").state, JobState::Done);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_above_the_nodes_limits_is_refused_and_nothing_runs() {
    let (_relay, _stage, node, buyer) = stage(&[("limits.wall_ms", "60000")]).await;
    let greedy = buyer.post(&Draft { time_secs: Some(61), ..buyer.order(None, &["true"]) }).await;
    let reason = buyer.error(&greedy, Code::ResourceLimit).await;
    assert!(reason.contains("requested 61000, this node allows at most 60000"), "{reason}");
    let network = vec![("allow_network".to_string(), "true".to_string())];
    let online = buyer.post(&Draft { params: network, ..buyer.order(None, &["true"]) }).await;
    let reason = buyer.error(&online, Code::Unsupported).await;
    assert!(reason.contains("no network"), "{reason}");
    assert!(job(node.store(), &greedy).is_none() && job(node.store(), &online).is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_that_no_event_could_hold_is_cut_in_the_report_and_whole_in_the_log() {
    let (_relay, _stage, node, buyer) = stage(&[]).await;
    let plain = buyer.order(None, &["seq 200000"]);
    let sealed = Draft { encrypt: Some(Scheme::Nip44), ..buyer.order(None, &["seq 200000"]) };
    for draft in [plain, sealed] {
        let request = buyer.post(&draft).await;
        let report = report(&buyer.result(&request).await);
        let run = &report["command_results"][0];
        assert_eq!(run["stdout_bytes"], 1_288_895, "{run}");
        assert!(run["stdout"].as_str().is_some_and(|shown| shown.contains("200000")), "the end is shown");
        for event in buyer.stored(&request).await {
            assert!(event.as_json().len() <= 64 * 1024, "strfry takes no more");
        }
        let row = job(node.store(), &request).expect("the job");
        let log = row.summary.and_then(|summary| summary.log_blob).expect("a log");
        let log = node.store().blob(&log, 4 << 20).expect("readable").expect("there");
        assert!(log.len() > 1_288_895);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_artifact_is_told_by_its_hash_and_kept_nowhere() {
    let (_relay, stage, _node, buyer) = stage(&[("limits.artifact_bytes", "4096")]).await;
    let commands = ["printf hello > small", "head -c 8192 /dev/zero > large"];
    let artifacts = ["small", "large", "missing"].map(str::to_string).to_vec();
    let request = buyer.post(&Draft { artifacts, ..buyer.order(None, &commands) }).await;
    let report = report(&buyer.result(&request).await);
    let told = &report["artifacts"];
    assert_eq!(
        told[0]["sha256"], "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        "{told}"
    );
    assert_eq!(told[0]["size"], 5);
    assert!(told[1]["error"].is_string() && told[2]["error"].is_string(), "{told}");
    let folders =
        std::fs::read_dir(stage.config.data_dir.join("blobs")).expect("the folder of blobs").flatten();
    let blobs = folders.flat_map(|folder| std::fs::read_dir(folder.path()).expect("readable")).count();
    assert_eq!(blobs, 1, "the log of the run and nothing else");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_fails_where_the_result_is_text_is_told_and_leaves_its_log() {
    let types = tempfile::tempdir().expect("a folder of job types");
    let folder = types.path().join("grumble");
    std::fs::create_dir(&folder).expect("a job type's folder");
    let manifest = "name = \"grumble\"\ntitle = \"Fails\"\nkinds = [5940]\nagent = \"script\"\noutput = \"text\"\n\
                    [script]\ncommands = [\"echo before\", \"echo why >&2; exit 3\", \"echo never\"]\n";
    std::fs::write(folder.join("job.toml"), manifest).expect("a job type");
    let dir = types.path().display().to_string();
    let (_relay, _stage, node, buyer) = stage(&[("jobs_dir", &dir), ("skills", "grumble")]).await;
    let request = buyer.post(&Draft { kind: 5940, ..buyer.order(None, &[]) }).await;
    let reason = buyer.error(&request, Code::CommandFailed).await;
    assert!(reason.contains("exit code 3: why"), "{reason}");
    assert_eq!(
        used(&node, &request).1,
        "$ echo before\nbefore\n[exit 0]\n$ echo why >&2; exit 3\nwhy\n[exit 3]\n"
    );
}
