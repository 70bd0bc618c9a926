//! What a customer gets of commands that a limit ended, that left something running, or that arranged odd files: over the
//! whole node and the real sandbox.

use nostr_sdk::Event;
use nostr_sdk::prelude::JsonUtil;
use serde_json::Value;

use super::support::buyer::{Buyer, printed};
use super::support::stage::Stage;
use coinop::node::Node;
use coinop::protocol::draft::Draft;
use coinop::protocol::{Code, Scheme, Status};
use coinop::relay::local::LocalRelay;

async fn stage(settings: &[(&str, &str)]) -> (LocalRelay, Stage, Node, Buyer) {
    let relay = LocalRelay::start().await.expect("a relay");
    let stage = Stage::new(&[&relay.url()], settings);
    let buyer = Buyer::at(&[relay.url()], stage.keys.public_key()).await;
    let node = stage.start().await;
    (relay, stage, node, buyer)
}

/// What the error of a job says in its content.
async fn told(buyer: &Buyer, request: &Event, code: Code) -> Value {
    let reason = buyer.error(request, code).await;
    let said = buyer.feedbacks(request).await;
    let error = said.iter().find(|said| said.status == Status::Error).expect("an error");
    let report: Value = serde_json::from_str(&error.content).unwrap_or_else(|_| panic!("{error:?}"));
    assert_eq!(report["error"]["code"], code.as_str());
    assert_eq!(format!("{code}: {}", report["error"]["reason"].as_str().expect("a reason")), reason);
    report
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_a_limit_ended_brings_its_output_its_command_the_figure_and_the_limit() {
    let settings = [("limits.output_bytes", "100000"), ("limits.idle_ms", "1500")];
    let (_relay, _stage, _node, buyer) = stage(&settings).await;
    let spin = "echo begun; echo aside >&2; while :; do :; done";
    let hog = "echo begun; echo aside >&2; dd if=/dev/zero of=/dev/shm/a bs=1M count=200; sleep 600";
    // The flood begins when both streams have been read: else it may use the limit up before the other one is.
    let (idle, loud) = ("echo begun; echo aside >&2; sleep 600", "echo begun; echo aside >&2; sleep 1; yes");
    let orders = [
        (Draft { time_secs: Some(1), ..buyer.order(None, &["echo first", spin]) }, "wall_ms", 1000, spin),
        (buyer.order(None, &["echo first", idle]), "idle_ms", 1500, idle),
        (
            Draft { memory_mb: Some(48), ..buyer.order(None, &["echo first", hog]) },
            "memory_bytes",
            48 << 20,
            hog,
        ),
        (buyer.order(None, &["echo first", loud]), "output_bytes", 100_000, loud),
    ];
    for (draft, limit, allowed, command) in orders {
        let plain = buyer.post(&draft).await;
        let sealed = buyer.post(&Draft { encrypt: Some(Scheme::Nip44), ..draft }).await;
        let code = if limit.ends_with("_ms") { Code::Timeout } else { Code::ResourceLimit };
        for request in [&plain, &sealed] {
            let report = told(&buyer, request, code).await;
            let error = &report["error"];
            assert_eq!((&error["limit"], &error["allowed"]), (&limit.into(), &allowed.into()), "{error}");
            assert_eq!(error["command"], command, "{error}");
            // A peak of memory is only looked at now and then where no cgroup keeps it.
            let least = if limit == "memory_bytes" { 0 } else { allowed };
            assert!(error["used"].as_u64().is_none_or(|used| used >= least), "{error}");
            assert!(limit == "memory_bytes" || error["used"].is_u64(), "{error}");
            let runs = &report["command_results"];
            assert_eq!((&runs[0]["stdout"], &runs[0]["exit_code"]), (&"first\n".into(), &0.into()));
            assert!(runs[1]["stdout"].as_str().is_some_and(|out| out.starts_with("begun\n")), "{report}");
            assert!(runs[1]["stderr"].as_str().is_some_and(|err| err.starts_with("aside\n")), "{report}");
            assert!(report["exit_code"] != 0 && report["usage"]["peak_memory_bytes"].is_u64(), "{report}");
            for event in buyer.stored(request).await {
                assert!(event.as_json().len() <= 48 * 1024, "a feedback takes no more");
            }
        }
        let events = buyer.stored(&sealed).await;
        assert!(
            events.iter().all(|event| !event.as_json().contains("begun")),
            "it is for the customer alone"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_a_little_over_the_limit_of_an_event_is_shown_as_far_as_there_is_room() {
    let (_relay, _stage, _node, buyer) = stage(&[]).await;
    let loud = "head -c 70000 /dev/zero | tr '\\0' x";
    let plain = buyer.order(None, &[loud]);
    let sealed = Draft { encrypt: Some(Scheme::Nip44), ..buyer.order(None, &[loud]) };
    // Encryption pads and adds a third.
    for (draft, least) in [(plain, 55_000), (sealed, 30_000)] {
        let request = buyer.post(&draft).await;
        let report: Value =
            serde_json::from_str(&buyer.result(&request).await.reply.content).expect("a report");
        let shown = report["command_results"][0]["stdout"].as_str().map_or(0, str::len);
        assert!(shown >= least, "{shown} bytes of 70,000 are shown");
        assert_eq!((&report["stdout"], &report["stderr"]), (&"".into(), &"".into()), "each stream once");
        for event in buyer.stored(&request).await {
            assert!(event.as_json().len() <= 64 * 1024, "strfry takes no more");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_artifact_that_cannot_be_read_is_an_error_of_its_own_and_the_report_stays() {
    let (_relay, _stage, _node, buyer) = stage(&[]).await;
    let lay = "printf hello > small; mkdir folder shut; echo x > shut/file; mkfifo pipe; ln -s small link; \
               ln -s / out; truncate -s 1T holes; chmod 0 shut/file shut . && echo done";
    let long = "n".repeat(300);
    let deep = "d/".repeat(500) + "f";
    let readable = ["small", "./small", "shut/file"];
    let paths = [
        long.as_str(),
        &deep,
        "folder",
        "pipe",
        "link",
        "out/etc/passwd",
        "holes",
        "missing",
        "small/below",
        "..",
        "/",
        "/etc/passwd",
        "new\nline",
        "\u{fffd}",
        " ",
        "folder/",
    ];
    let artifacts: Vec<String> = readable.iter().chain(&paths).map(|path| (*path).to_owned()).collect();
    let request = buyer.post(&Draft { artifacts, ..buyer.order(None, &[lay]) }).await;
    let answer = buyer.result(&request).await;
    assert_eq!(printed(&answer), "done\n");
    let report: Value = serde_json::from_str(&answer.reply.content).expect("a report");
    let told = report["artifacts"].as_array().expect("a list");
    assert_eq!(told.len(), readable.len() + paths.len());
    for artifact in told {
        let path = artifact["path"].as_str().expect("a path");
        match path {
            "small" | "shut/file" => assert!(artifact["sha256"].is_string(), "{artifact}"),
            // Whether a leading dot is read as none is the sandbox's to say.
            "./small" => {}
            _ => assert!(artifact["error"].is_string() && artifact["sha256"].is_null(), "{artifact}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inputs_that_do_not_fit_the_disk_that_was_asked_for_are_the_customers_limit_and_not_our_fault() {
    let types = tempfile::tempdir().expect("a folder of job types");
    let folder = types.path().join("heavy");
    std::fs::create_dir(&folder).expect("a job type's folder");
    let manifest = "name = \"heavy\"\ntitle = \"Brings much\"\nkinds = [5941]\nagent = \"script\"\n\
                    output = \"text\"\n[script]\ncommands = [\"true\"]\n";
    std::fs::write(folder.join("job.toml"), manifest).expect("a job type");
    for name in ["a", "b"] {
        std::fs::write(folder.join(name), vec![b'x'; 900_000]).expect("a file of the type");
    }
    let dir = types.path().display().to_string();
    let (_relay, _stage, _node, buyer) = stage(&[("jobs_dir", &dir), ("skills", "heavy")]).await;
    let small = Draft { kind: 5941, disk_mb: Some(1), ..buyer.order(None, &[]) };
    let reason = buyer.error(&buyer.post(&small).await, Code::ResourceLimit).await;
    assert!(reason.contains("/job/type/b does not fit the job's disk limit"), "{reason}");
    buyer.result(&buyer.post(&Draft { disk_mb: Some(4), ..small }).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_command_leaves_goes_on_under_the_next_one_only_where_the_order_keeps_it() {
    let (_relay, _stage, _node, buyer) = stage(&[]).await;
    let commands = ["sleep 600 & echo $! > pid", "kill -0 $(cat pid) && echo runs || echo gone"];
    let plain = buyer.post(&buyer.order(None, &commands)).await;
    let mut keeps = buyer.order(None, &commands);
    keeps.params.push(("keep_background".to_owned(), "true".to_owned()));
    let keeps = buyer.post(&keeps).await;
    assert_eq!(printed(&buyer.result(&plain).await), "gone\n");
    assert_eq!(printed(&buyer.result(&keeps).await), "runs\n");
}

#[test]
fn a_review_of_files_with_odd_names_is_json_whatever_awk_makes_it() {
    let review = concat!(env!("CARGO_MANIFEST_DIR"), "/jobs/analysis/review.sh");
    let tree = tempfile::tempdir().expect("a folder");
    let names: [&[u8]; 8] = [
        b"a\\b.txt",
        b"q\"uote",
        b"new\nline",
        b"\xff\xfe",
        b"tab\t.x\\",
        b"ctl\x01\x7f",
        b"h.\\\"",
        b"\\\\",
    ];
    for name in names {
        let name = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name);
        std::fs::write(tree.path().join(name), b"TODO \\ \" \xff\n").expect("a file");
    }
    let said =
        std::process::Command::new("sh").arg(review).current_dir(tree.path()).output().expect("a shell");
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let report = String::from_utf8_lossy(&said.stdout).into_owned();
    let report: Value = serde_json::from_str(&report).unwrap_or_else(|error| panic!("{error}: {report}"));
    let issues = report["issues"].as_array().expect("a list");
    let told = |path: &str| issues.iter().any(|issue| issue["file_path"] == path);
    assert!(["a\\b.txt", "q\"uote", "tab\t.x\\", "h.\\\"", "\\\\"].into_iter().all(told), "{report}");
}
