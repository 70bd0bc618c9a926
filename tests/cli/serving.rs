//! `coinop connect` as a process, and the commands that look at it or steer it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use coinop::relay::local::LocalRelay;
use coinop::repo::serve;
use coinop::store::record::{Record, Summary, Verdict};
use coinop::store::{Holder, Store};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Home, Said};

/// A running node; killed when dropped.
struct Node(Child);

impl Node {
    /// Returns when it serves.
    fn start(home: &Home, args: &[&str]) -> Node {
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_coinop"))
            .args([&["connect", "--allow-private-repos"], args].concat())
            .env_clear()
            .env("HOME", home.path())
            .env("PATH", "/usr/bin:/bin")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut told = Vec::new();
        while !told.last().is_some_and(|line: &String| line.starts_with("Serving")) {
            match lines.next() {
                Some(line) => told.push(line.unwrap()),
                None => panic!("the node ended: {told:?}"),
            }
        }
        // The rest is read away, so that the node never waits for us.
        std::thread::spawn(move || lines.for_each(drop));
        Node(child)
    }

    fn end(mut self) -> i32 {
        kill(Pid::from_raw(self.0.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
        self.0.wait().unwrap().code().unwrap_or(-1)
    }
}

impl Node {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().try_into().unwrap()), signal).unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.0.try_wait().unwrap().is_none() {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }
}

fn until(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_job_walks_from_request_to_result_and_every_command_sees_it() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let relay = runtime.block_on(LocalRelay::start()).unwrap();
    let sources = tempfile::tempdir().unwrap();
    let repo = sources.path().join("tool.git");
    let commit = serve::sample_repo(&repo, &[("README.md", "# tool\n")]).unwrap();
    let server = runtime.block_on(serve::start(&[repo], ([127, 0, 0, 1], 0).into())).unwrap();
    let (home, customer) = (Home::new(), Home::new());
    let (relay_url, repo_url) = (relay.url(), server.url());
    let node = Node::start(&home, &["--relay", &relay_url]);

    let second = home.run(&["connect", "--nip90", "--relay", &relay_url]);
    assert_eq!(second.code, 7, "{second:?}");
    assert!(second.talk.contains(&node.0.id().to_string()), "the holder is named: {second:?}");

    // A patch, made, checked and verified against the repository.
    let said = customer.run(&[
        "request",
        "--skill",
        "code",
        "--repo",
        &repo_url,
        "--cmd",
        "echo more >> README.md",
        "--relay",
        &relay_url,
        "--save",
        "result.json",
        "--json",
    ]);
    assert_eq!(said.code, 0, "{said:?}");
    let report = said.json();
    assert_eq!(report["proof"]["commit"], commit.as_str());
    let verified =
        customer.run(&["verify", "result.json", "--repo", &repo_url, "--allow-private-repos", "--json"]);
    assert_eq!(verified.code, 0, "{verified:?}");
    let findings = verified.json()["findings"].clone();
    for what in ["repository", "commit", "patch"] {
        let finding = findings.as_array().unwrap().iter().find(|f| f["what"] == what).unwrap();
        assert_eq!(finding["verdict"], "ok", "{finding}");
    }
    let private = customer.run(&["verify", "result.json", "--repo", &repo_url, "--json"]);
    let findings = private.json()["findings"].clone();
    let commit_row = findings.as_array().unwrap().iter().find(|f| f["what"] == "commit").unwrap().clone();
    assert_eq!(commit_row["verdict"], "unchecked", "a private address must be allowed: {commit_row}");

    // Foreign and ours, side by side.
    let image = customer.run(&[
        "request",
        "--kind",
        "5100",
        "--task",
        "a cat in space",
        "--relay",
        &relay_url,
        "--timeout",
        "1",
        "--no-cancel",
    ]);
    assert_eq!(image.code, 5, "{image:?}");
    let scan = home.run(&["scan", "--relay", &relay_url, "--json"]).json();
    let verdicts: Vec<_> =
        scan.as_array().unwrap().iter().map(|r| (&r["verdict"], &r["code"], &r["past"])).collect();
    assert!(verdicts.contains(&(&"accept".into(), &serde_json::Value::Null, &"job done".into())), "{scan}");
    assert!(verdicts.iter().any(|(verdict, code, _)| *verdict == "refuse" && *code == "foreign"), "{scan}");

    let jobs = home.run(&["jobs", "list", "--json"]).json();
    assert_eq!(jobs.as_array().unwrap().len(), 1, "{jobs}");
    assert_eq!((&jobs[0]["state"], &jobs[0]["skill"]), (&"done".into(), &"code".into()));
    let id = jobs[0]["job"].as_str().unwrap();
    let shown = home.run(&["jobs", "show", &id[..10], "--json"]).json();
    assert_eq!(shown["answer"]["id"], report["result_id"]);
    assert!(shown["history"].as_array().unwrap().len() >= 4, "{shown}");
    assert_eq!(home.run(&["jobs", "logs", id]).code, 0);

    // The owner stops a job; its customer hears so.
    let slow = std::thread::spawn(move || {
        customer.run(&[
            "request",
            "--repo",
            &repo_url,
            "--cmd",
            "echo begun; sleep 60",
            "--relay",
            &relay_url,
        ])
    });
    let open = || home.run(&["jobs", "list", "--state", "running", "--json"]).json();
    until("the slow job runs", || open().as_array().is_some_and(|jobs| jobs.len() == 1));
    let id = open()[0]["job"].as_str().unwrap().to_string();
    let mut unfinished = home.run(&["jobs", "logs", &id]);
    until("what the running job has printed is there", || {
        unfinished = home.run(&["jobs", "logs", &id]);
        unfinished.code == 0 && unfinished.data.contains("begun")
    });
    assert_eq!(unfinished.data, "$ echo begun; sleep 60\nbegun\n");
    assert!(unfinished.talk.contains("is still running"), "{unfinished:?}");
    let status = home.run(&["status", "--json"]);
    assert_eq!((status.code, &status.json()["jobs"]["running"]), (0, &1.into()), "{status:?}");
    let status = home.run(&["status"]);
    assert!(status.data.contains("1 of 1 relays connected"), "{status:?}");
    assert!(status.data.contains("1 running, 0 waiting"), "{status:?}");
    let stopped = home.run(&["jobs", "cancel", &id[..12], "--json"]);
    assert_eq!(stopped.code, 0, "{stopped:?}");
    let heard: Said = slow.join().unwrap();
    assert_eq!(heard.code, 4, "{heard:?}");
    assert!(heard.talk.contains("cancelled"), "{heard:?}");
    assert_eq!(home.run(&["jobs", "cancel", &id]).code, 1, "it has ended already");
    let shown = home.run(&["jobs", "show", &id]);
    assert!(shown.data.contains("cancelled by the node's owner"), "{shown:?}");

    let doctor = home.run(&["doctor", "--offline", "--json"]).json();
    let row = doctor["checks"].as_array().unwrap().iter().find(|c| c["name"] == "node").unwrap().clone();
    assert!(row["how"].as_str().unwrap().starts_with("running"), "{row}");
    assert_eq!(node.end(), 0, "SIGTERM is an orderly end");
    assert!(!home.data_dir().join("control.sock").exists());
}

#[test]
fn without_a_node_jobs_are_read_from_the_log_and_cannot_be_cancelled() {
    let home = Home::new();
    let empty = home.run(&["jobs", "list", "--json"]);
    assert_eq!((empty.code, empty.data.trim()), (0, "[]"));
    assert!(!home.data_dir().exists(), "looking makes nothing");

    let (open, done, refused) = ("a".repeat(64), format!("ab{}", "0".repeat(62)), "f".repeat(64));
    let accepted = |job: &str| Record::Accepted {
        job: job.into(),
        customer: "b".repeat(64),
        kind: 5930,
        skill: "generic".into(),
        request: "{}".into(),
        relay: "ws://127.0.0.1:1".into(),
        deadline_ms: 4_000_000_000_000,
        agreed: Default::default(),
    };
    let store = Store::open(&home.data_dir(), &Holder::new("c".repeat(64))).unwrap();
    let log = store.put_blob(b"$ make\nall \x1b[31mgood\n").unwrap();
    let summary = Summary { wall_ms: 1_500, log_blob: Some(log), ..Summary::default() };
    let closed =
        Record::Closed { job: done.clone(), verdict: Verdict::Done, answer: "d".repeat(64), summary };
    let owed = Record::Queued {
        event: "d".repeat(64),
        job: Some(done.clone()),
        json: "{}".into(),
        relays: vec![],
        give_up_ms: 0,
    };
    let no = Record::Refused {
        request: refused.clone(),
        customer: "b".repeat(64),
        code: "foreign".into(),
        answered: false,
    };
    store.append_blocking(vec![accepted(&open), accepted(&done), no]).unwrap();
    store.append_blocking(vec![closed, owed]).unwrap();
    store.close().unwrap();

    let table = home.run(&["jobs", "list"]);
    assert_eq!(table.data.lines().count(), 3, "{table:?}");
    let only = home.run(&["jobs", "list", "--open", "--json"]).json();
    assert_eq!((only.as_array().unwrap().len(), &only[0]["job"]), (1, &open.clone().into()));
    let logs = home.run(&["jobs", "logs", "ab0"]);
    assert_eq!(logs.data, "$ make\nall \\u{1b}[31mgood\n", "also in a pipe");
    let logs = home.run(&["jobs", "logs", "ab0", "--raw"]);
    assert_eq!(logs.data, "$ make\nall \x1b[31mgood\n");

    for (id, code, words) in [
        ("a", 2, "more than one job begins with a"),
        ("xyz", 2, "not the beginning of a job's id"),
        ("0123", 1, "there is no job 0123"),
        (refused.as_str(), 1, "it was refused (foreign)"),
    ] {
        let said = home.run(&["jobs", "show", id]);
        assert!(said.code == code && said.talk.contains(words), "{id}: {said:?}");
    }
    let said = home.run(&["jobs", "cancel", "aaa"]);
    assert_eq!(said.code, 7, "{said:?}");
    assert!(said.talk.contains("no node runs on"), "{said:?}");
}

#[test]
fn a_customer_asks_its_balance_with_its_own_key_and_nobody_elses() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let relay = runtime.block_on(LocalRelay::start()).unwrap();
    let (home, customer, relay_url) = (Home::new(), Home::new(), relay.url());
    let node = Node::start(&home, &["--relay", &relay_url]);
    let provider = home.run(&["keys", "show", "--json"]).json()["npub"].as_str().unwrap().to_owned();
    let keys = nostr_sdk::Keys::generate();
    coinop::keys::create(&customer.path().join("me.key"), &keys, None).unwrap();
    coinop::keys::create(&customer.path().join("other.key"), &nostr_sdk::Keys::generate(), None).unwrap();
    let granted = home.run(&["credits", "grant", &keys.public_key().to_hex(), "1500"]);
    assert_eq!(granted.code, 0, "{granted:?}");
    let ask = |key: &str, more: &[&str]| {
        let flags = ["balance", "--provider", &provider, "--key", key, "--relay", &relay_url];
        customer.run(&[&flags[..], more].concat())
    };
    let said = ask("me.key", &["--json"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert_eq!((&said.json()["available_msat"], &said.json()["held_msat"]), (&1500.into(), &0.into()));
    let said = ask("me.key", &[]);
    assert!(said.data.contains("available") && said.data.contains("1.500 sat"), "{said:?}");
    assert_eq!(ask("other.key", &["--json"]).json()["available_msat"], 0);
    assert_eq!(node.end(), 0);
    let said = ask("me.key", &["--timeout", "1"]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.talk.contains("Timed out after 1 s"), "{said:?}");
}

/// `coinop connect` whose stderr is the test's.
fn connect(home: &Home, relay: &str) -> (Node, BufReader<std::process::ChildStderr>) {
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_coinop"))
        .args(["connect", "--relay", relay])
        .env_clear()
        .env("HOME", home.path())
        .env("PATH", "/usr/bin:/bin")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let said = BufReader::new(child.stderr.take().unwrap());
    (Node(child), said)
}

/// Reads on until a line has these words; all that was read. A silence of a minute fails.
fn read_until(said: &mut BufReader<std::process::ChildStderr>, words: &str) -> String {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let mut all = String::new();
    while !all.lines().last().is_some_and(|line| line.contains(words)) {
        if !said.buffer().contains(&b'\n') {
            let mut more = [PollFd::new(said.get_ref().as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut more, PollTimeout::try_from(60_000).unwrap()).unwrap();
            assert_eq!(ready, 1, "nothing more within a minute, and no {words:?}:\n{all}");
        }
        assert!(said.read_line(&mut all).unwrap() > 0, "it ended without {words:?}:\n{all}");
    }
    all
}

#[test]
fn a_node_that_reaches_no_relay_says_so_and_says_when_one_is_there_is_lost_and_is_back() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let relay = runtime.block_on(LocalRelay::start()).unwrap();
    let (address, url) = (relay.address(), relay.url());
    drop(relay);
    let home = Home::new();
    let none = home.run(&["status"]);
    assert!(none.code == 7 && none.talk.contains("no node runs"), "{none:?}");
    let (node, mut said) = connect(&home, &url);
    let mut told = read_until(&mut said, "no relay is connected");
    // The log has its own pace, and is read before the relay is there.
    if !told.contains("relay not reached") {
        told += &read_until(&mut said, "relay not reached");
    }
    assert!(told.contains("0 of 1 relays connected") && !told.contains("Serving"), "{told}");
    assert!(told.contains(&format!("{url}: not reached")), "{told}");
    let status = home.run(&["status"]);
    assert_eq!(status.code, 8, "{status:?}");
    assert!(status.data.contains("0 of 1 relays connected"), "{status:?}");
    assert!(status.data.contains("not connected"), "{status:?}");

    let relay = runtime.block_on(LocalRelay::start_at(address)).unwrap();
    let told = told + &read_until(&mut said, "Serving");
    assert!(told.contains("WARN") && told.contains("relay not reached"), "{told}");
    assert!(told.contains("INFO") && told.contains("relay connected again"), "{told}");
    until("the node's status tells", || home.run(&["status"]).code == 0);
    drop(relay);
    let told = read_until(&mut said, "relay lost");
    assert!(told.contains("WARN") && told.contains(&url), "{told}");
    let _relay = runtime.block_on(LocalRelay::start_at(address)).unwrap();
    read_until(&mut said, "relay connected again");
    std::thread::spawn(move || said.lines().for_each(drop));
    assert_eq!(node.end(), 0);
}

#[test]
fn a_node_whose_log_nobody_reads_any_more_still_ends_in_order() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let relay = runtime.block_on(LocalRelay::start()).unwrap();
    let home = Home::new();
    let (mut node, mut said) = connect(&home, &relay.url());
    read_until(&mut said, "Serving");
    // `connect 2>&1 | tee log`, ended by Ctrl-C: tee goes first.
    drop(said);
    drop(relay);
    node.signal(if super::is_ignored(Signal::SIGINT) { Signal::SIGTERM } else { Signal::SIGINT });
    assert_eq!(node.0.wait().unwrap().code(), Some(0));
}

#[test]
fn a_node_whose_terminal_closes_ends_in_order() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let relay = runtime.block_on(LocalRelay::start()).unwrap();
    let home = Home::new();
    if super::is_ignored(Signal::SIGHUP) {
        return;
    }
    let mut node = Node::start(&home, &["--relay", &relay.url()]);
    node.signal(Signal::SIGHUP);
    assert_eq!(node.0.wait().unwrap().code(), Some(0));
}
