//! Whatever a stranger writes, nothing of it steers the operator's or the customer's terminal, and nothing of it passes for
//! a line of ours: not in the node's log, not on stdout, not on stderr. What must be quoted is quoted with escapes.

#[path = "../relay/fake.rs"]
#[expect(dead_code, reason = "only a part of it is needed here")]
mod fake;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Instant;

use coinop::escape::is_unsafe;
use coinop::protocol::{Feedback, Proof, Status};
use coinop::relay::local::LocalRelay;
use coinop::relay::{Client, Wire};
use coinop::repo::serve;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nostr_sdk::prelude::{Event, EventBuilder, Filter, Keys, Kind, PublicKey, Tag};

use super::Home;
use super::customer::{Answers, Market, SOON, ends, proof, says};

/// A window title, a clipboard, a cleared screen in 7 and 8 bits, hidden text, a forged line, reversed text.
const NASTY: &str = "\x1b]0;owned\x07\x1b]52;c;b3duZWQ=\x07\x1b[2J\u{9b}2J\u{9d}0;x\u{9c}\x1b[8m\r\nFORGED INFO done\u{202e}\u{2066}\u{2028}\u{7f}\u{8}z";
/// How its beginning is quoted.
const QUOTED: &str = "\\u{1b}]0;owned";
const JSON_QUOTED: &str = "\\u001b]0;owned";

/// Where the text is not a person's own lines, no line of it may begin as the forged one does.
#[track_caller]
fn is_tame(what: &str, text: &str) {
    let mut text = text.replace("\r\n", "\n");
    // Our own colours and the log's.
    for style in ["0", "1", "2", "3", "31", "32", "33", "34", "35"] {
        text = text.replace(&format!("\x1b[{style}m"), "");
    }
    let found = text.char_indices().find(|(_, c)| !matches!(c, '\n' | '\t') && is_unsafe(*c));
    if let Some((at, c)) = found {
        let around: String = text[..at].chars().rev().take(200).collect();
        panic!("{what}: {c:?} after {:?}", around.chars().rev().collect::<String>());
    }
    let forged = text.lines().find(|line| line.starts_with("FORGED"));
    assert_eq!(forged, None, "{what}: {text}");
}

#[track_caller]
fn is_tame_and_quotes(what: &str, text: &str) {
    is_tame(what, text);
    assert!(text.contains(QUOTED) || text.contains(JSON_QUOTED), "{what} does not show the text: {text}");
}

/// Stdout and stderr of a command that runs on a terminal.
fn on_a_terminal(home: &Home, args: &[&str]) -> String {
    let pty = nix::pty::openpty(None, None).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_coinop"));
    command.env_clear().env("HOME", home.path()).env("PATH", "/usr/bin:/bin");
    command.current_dir(home.path()).args(args).stdin(Stdio::null());
    command.stdout(pty.slave.try_clone().unwrap()).stderr(pty.slave);
    let mut child = command.spawn().unwrap();
    // Holds the other ends of the terminal.
    drop(command);
    let mut shown = Vec::new();
    let mut terminal = std::fs::File::from(pty.master);
    let mut part = [0; 4096];
    // A terminal whose other end is closed is an error to read.
    while let Ok(n @ 1..) = terminal.read(&mut part) {
        shown.extend_from_slice(&part[..n]);
    }
    child.wait().unwrap();
    String::from_utf8(shown).unwrap()
}

/// Answers every connection with these bytes.
fn server(answer: Vec<u8>) -> String {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (mut asked, answer) = ([0; 4096], answer.clone());
            // A peer that hangs up early is no fault of the test.
            std::thread::spawn(move || stream.read(&mut asked).and_then(|_| stream.write_all(&answer)).ok());
        }
    });
    url
}

fn http(status: &str, kind: &str, body: &str) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nconnection: close\r\n");
    format!("{head}content-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn rude_relay() -> fake::Rules {
    let notice = serde_json::json!(["NOTICE", NASTY]).to_string();
    fake::Rules {
        greeting: vec![notice.clone(), serde_json::json!(["AUTH", NASTY]).to_string()],
        raw: vec![
            notice,
            serde_json::json!([NASTY, NASTY]).to_string(),
            serde_json::json!(["EVENT", "SUB", { "id": NASTY }]).to_string(),
            NASTY.to_owned(),
        ],
        answers: vec![Some((false, format!("blocked: {NASTY}"))); 200],
        closed: (2, format!("error: {NASTY}")),
        nip11: Some(serde_json::json!({ "name": NASTY, "limitation": { "max_limit": NASTY } }).to_string()),
        ..fake::Rules::default()
    }
}

fn signed(keys: &Keys, kind: u16, rows: &[Vec<String>]) -> Event {
    let tags = rows.iter().map(|row| Tag::parse(row).unwrap());
    EventBuilder::new(Kind::from(kind), NASTY).tags(tags).sign_with_keys(keys).unwrap()
}

/// Requests with the text in one field after another; the first is a job that also prints it.
fn requests(keys: &Keys, provider: &PublicKey, repo: &str) -> Vec<Event> {
    let row = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<String>>();
    let p = row(&["p", &provider.to_hex()]);
    let (input, run) = (row(&["i", repo, "url", "", "repo"]), row(&["param", "cmd_0", "true"]));
    let prints = format!(
        ": '{NASTY}'; printf '%s' \"$X\"; printf '%s' \"$X\" >&2; printf '%s' \"$X\" > \"$X\"; exit 3"
    );
    let of = |kind: u16, rows: &[Vec<String>]| signed(keys, kind, &[std::slice::from_ref(&p), rows].concat());
    let with = |rows: &[&[&str]]| {
        let rows: Vec<_> = rows.iter().map(|words| row(words)).collect();
        of(5000, &[&[input.clone(), run.clone()], &rows[..]].concat())
    };
    let git_error = "# service=git-upload-pack\n";
    let error = format!("ERR {NASTY}\n");
    let advert = format!("{:04x}{git_error}0000{:04x}{error}", git_error.len() + 4, error.len() + 4);
    let advert = server(http("200 OK", "application/x-git-upload-pack-advertisement", &advert));
    let status = server(http(&format!("418 {}", NASTY.replace(['\r', '\n'], "")), "text/plain", NASTY));
    let moved = format!("HTTP/1.1 301 M\r\nlocation: http://h/{}\r\n\r\n", NASTY.replace(['\r', '\n'], ""));
    let moved = server(moved.into_bytes());
    let url = |url: &str| of(5000, &[row(&["i", url, "url", "", "repo"]), run.clone()]);
    vec![
        of(
            5000,
            &[
                input.clone(),
                row(&["param", "cmd_0", &prints]),
                row(&["param", "env_X", NASTY]),
                row(&["param", "artifact_0", NASTY]),
                row(&["relays", &format!("wss://{NASTY}"), NASTY]),
                row(&["output", NASTY]),
            ],
        ),
        with(&[&["param", "git_ref", NASTY]]),
        with(&[&["param", "workdir", NASTY]]),
        with(&[&["bid", NASTY]]),
        with(&[&["param", NASTY, NASTY], &["i", NASTY, NASTY, NASTY, NASTY]]),
        with(&[&["param", &format!("env_{NASTY}"), "x"]]),
        url(&format!("http://{NASTY}")),
        url(&format!("http://127.0.0.1/{NASTY}")),
        url(&format!("{advert}/a.git")),
        url(&format!("{status}/a.git")),
        url(&format!("{moved}/a.git")),
        of(5300, &[input.clone(), row(&["param", "task", NASTY])]),
        of(5200, &[row(&["i", NASTY, "text", "", "diff"]), row(&["param", "focus_0", NASTY])]),
        of(5000, &[row(&["encrypted"])]),
    ]
}

/// Whether the node's last word on a request is among these.
fn is_answered(events: &[Event], request: &Event) -> bool {
    events.iter().any(|event| {
        let is_last = event.kind.as_u16() != 7000
            || event.tags.iter().any(|tag| tag.as_slice().starts_with(&["status".into(), "error".into()]));
        is_last && event.tags.event_ids().any(|id| *id == request.id)
    })
}

#[test]
fn nothing_of_a_relays_a_customers_a_servers_or_a_jobs_text_reaches_the_operators_terminal_raw() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (relay, rude) = runtime
        .block_on(async { (LocalRelay::start().await.unwrap(), fake::Fake::start(rude_relay()).await) });
    let sources = tempfile::tempdir().unwrap();
    let repo = sources.path().join("tool.git");
    serve::sample_repo(&repo, &[("README.md", NASTY), ("b\x1b[2J.txt", "x")]).unwrap();
    let git = runtime.block_on(serve::start(&[repo], ([127, 0, 0, 1], 0).into())).unwrap();
    let home = Home::new();
    let made = home.run(&["keys", "new", "--json"]).json();
    let provider = PublicKey::parse(made["hex"].as_str().unwrap()).unwrap();
    let log = home.path().join("log");
    let file = std::fs::File::create(&log).unwrap();
    let mut node = Command::new(env!("CARGO_BIN_EXE_coinop"))
        .args(["connect", "--nip90", "--allow-private-repos", "--log-level", "trace"])
        .args(["--relay", &relay.url(), "--relay", &rude.url()])
        .env_clear()
        .env("HOME", home.path())
        .env("PATH", "/usr/bin:/bin")
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .unwrap();
    let customer = Keys::generate();
    let requests = requests(&customer, &provider, &git.url());
    let answered = runtime.block_on(async {
        let client = Client::connect(&[relay.url()], None, true, Wire::default(), SOON).await.unwrap();
        let until = Instant::now() + 4 * SOON;
        for request in &requests {
            client.publish(request, SOON).await;
        }
        loop {
            let events = client.query(vec![Filter::new().author(provider)], SOON).await;
            let open: Vec<_> = requests.iter().filter(|request| !is_answered(&events, request)).collect();
            if open.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(format!("{open:?}"));
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    });
    let list = home.run(&["jobs", "list", "--json"]);
    let mut seen = vec![("doctor", on_a_terminal(&home, &["doctor"]))];
    let job = requests[0].id.to_hex();
    let relays = ["--relay", &relay.url(), "--relay", &rude.url()];
    for args in [&["jobs", "list"][..], &["jobs", "show", &job], &[&["scan"], &relays[..]].concat()] {
        let said = home.run(args);
        seen.extend([(args[0], said.data), (args[0], said.talk), (args[0], on_a_terminal(&home, args))]);
    }
    kill(Pid::from_raw(node.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    node.wait().unwrap();
    let text = String::from_utf8(std::fs::read(&log).unwrap()).unwrap();
    assert_eq!(answered, Ok(()), "{text}");
    is_tame_and_quotes("the log", &text);
    for part in ["notice=", "reason=", "job failed", "a relay closed a subscription"] {
        assert!(text.contains(part), "{part} is not in the log: {text}");
    }
    for (what, text) in seen {
        is_tame(what, &text);
    }
    is_tame("jobs list --json", &list.data);
    let show = home.run(&["jobs", "show", &job, "--json"]);
    is_tame_and_quotes("jobs show --json", &show.data);
    // The job's own lines are lines here.
    let logs = home.run(&["jobs", "logs", &job]);
    let terminal = on_a_terminal(&home, &["jobs", "logs", &job]);
    for text in [&logs.data, &terminal] {
        is_tame_and_quotes("jobs logs", &text.replace("\nFORGED", "\n"));
    }
    is_tame_and_quotes("jobs logs --json", &home.run(&["jobs", "logs", &job, "--json"]).data);
    let raw = home.run(&["jobs", "logs", &job, "--raw"]);
    assert!(raw.data.contains(NASTY), "--raw is the job's output as it was: {raw:?}");
}

#[test]
fn nothing_of_a_providers_or_a_relays_text_reaches_the_customers_terminal_raw() {
    let (market, home, keys) = (Market::new(), Home::new(), Keys::generate());
    let rude = market.runtime.block_on(fake::Fake::start(rude_relay()));
    let answers: std::sync::Arc<Answers> = std::sync::Arc::new(|request, keys| {
        let mut partial = Feedback::new(Status::Partial, NASTY);
        partial.content = NASTY.into();
        let bill = Feedback::payment_required(1_000, Some(NASTY.into()), NASTY);
        let proof = Proof { backend: NASTY.into(), image: NASTY.into(), ..proof(NASTY) };
        vec![says(request, keys, &partial), says(request, keys, &bill), ends(request, keys, NASTY, &proof)]
    });
    market.provider(keys, answers);
    let relay = market.relay.url();
    let args =
        ["request", "--cmd", "true", "--relay", &relay, "--relay", &rude.url(), "--save", "result.json"];
    let terminal = on_a_terminal(&home, &args);
    let (messages, content) = terminal.rsplit_once("peak memory").unwrap();
    is_tame_and_quotes("messages", messages);
    is_tame_and_quotes("content", &content.replace("\nFORGED", "\n"));
    let piped = home.run(&args);
    is_tame_and_quotes("stderr", &piped.talk);
    assert_eq!(piped.data, format!("{NASTY}\n"), "another program gets the result as it is");
    is_tame_and_quotes("--json", &home.run(&[&args[..], &["--json"]].concat()).data);
    is_tame("verify", &on_a_terminal(&home, &["verify", "result.json"]));
    // Only the relay that refuses: the error quotes it.
    let refused = home.run(&["request", "--cmd", "true", "--relay", &rude.url()]);
    assert_eq!(refused.code, 8, "{refused:?}");
    is_tame_and_quotes("a relay's refusal", &refused.talk);
}

#[test]
fn nothing_of_a_wallets_text_reaches_the_operators_terminal_raw() {
    let home = Home::new();
    let body = serde_json::json!({ "detail": NASTY, "status": NASTY }).to_string();
    let wallet = server(http("418 X", "application/json", &body));
    std::fs::write(home.path().join("wallet.key"), "0123456789abcdef0123456789abcdef").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(home.path().join("wallet.key"), mode).unwrap();
    let args = [
        "credits".to_owned(),
        "topup".into(),
        Keys::generate().public_key().to_hex(),
        "1000".into(),
        "--log-level=trace".into(),
        "--set=payment.wallet=lnbits".into(),
        format!("--set=payment.wallet_url={wallet}"),
        "--set=payment.wallet_key_file=wallet.key".into(),
    ];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let said = home.run(&args);
    assert_ne!(said.code, 0, "{said:?}");
    let terminal = on_a_terminal(&home, &args);
    for text in [&said.data, &said.talk, &terminal] {
        is_tame("credits topup", text);
    }
    // The wallet's module has blanks for the older controls already.
    for text in [&said.talk, &terminal] {
        assert!(text.contains("FORGED INFO done\\u{202e}\\u{2066}"), "the wallet's words: {text}");
    }
}
