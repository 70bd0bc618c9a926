//! What `coinop request` does before anything is sent, with relays that give no receipt, and when it is told to end.

use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use coinop::protocol::{Feedback, Request, Status, feedback};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nostr_sdk::prelude::{Event, EventBuilder, JsonUtil, Keys, Kind, Tag};

use super::Home;
use super::scripted::{Says, Scripted};

struct Place {
    /// What the relay runs on.
    _runtime: tokio::runtime::Runtime,
    relay: Scripted,
}

impl Place {
    fn new(says: Says) -> Place {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let relay = runtime.block_on(Scripted::start());
        relay.says(says);
        Place { _runtime: runtime, relay }
    }

    /// The first published event of this kind range, within 20 s.
    fn given(&self, what: impl Fn(&Event) -> bool) -> Event {
        let started = Instant::now();
        loop {
            if let Some(event) = self.relay.given().into_iter().find(|event| what(event)) {
                return event;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "nothing of the kind was published");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn is_request(event: &Event) -> bool {
    (5000..6000).contains(&event.kind.as_u16())
}

fn is_cancel(event: &Event) -> bool {
    event.kind == Kind::EventDeletion
}

/// A running `coinop request`; killed when dropped.
struct Ordering(Child);

impl Drop for Ordering {
    fn drop(&mut self) {
        if self.0.try_wait().unwrap().is_none() {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }
}

fn order(home: &Home, place: &Place, args: &[&str]) -> Ordering {
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_coinop"))
        .args([&["request", "--relay", &place.relay.url, "--cmd", "true"], args].concat())
        .env_clear()
        .env("HOME", home.path())
        .env("PATH", "/usr/bin:/bin")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Ordering(child)
}

fn result(request: &Event, by: &Keys, content: &str) -> Event {
    EventBuilder::new(Kind::from(request.kind.as_u16() + 1000), content)
        .tags([Tag::event(request.id), Tag::public_key(request.pubkey)])
        .sign_with_keys(by)
        .unwrap()
}

#[test]
fn an_order_that_nobody_could_carry_out_or_that_shows_a_password_is_not_sent() {
    let (home, place) = (Home::new(), Place::new(Says::Ok));
    let provider = Keys::generate().public_key().to_hex();
    let url = place.relay.url.clone();
    for (args, words) in [
        (&["--cmd", "make", "--repo", "https://me:hunter2@git.example/a"][..], "credentials"),
        (&["--cmd", "make", "--param", "repo=https://me:hunter2@git.example/a"], "credentials"),
        (&["--cmd", "make", "--repo", "git@git.example:a.git"], "http"),
        (&["--cmd", "make", "--repo", "https://git.example/a", "--ref", "a..b"], "--ref"),
        (&["--cmd", " "], "blank"),
        (&["--cmd", "make", "--bid", "2btc"], "bitcoin"),
        (&["--cmd", "make", "--bid", "5 bananas"], "5sat"),
        (&[], "no commands: add --cmd"),
        (
            &["--skill", "code", "--repo", "https://git.example/a", "--task", "fix it"],
            "no commands: add --cmd",
        ),
        (&["--skill", "docs", "--cmd", "make"], "--repo or --provider"),
        (
            &["--provider", &provider, "--encrypt", "--cmd", "x", "--repo", "https://a:hunter2@h.example/r"],
            "credentials",
        ),
    ] {
        let started = Instant::now();
        let said = home.run(&[&["request", "--relay", &url, "--timeout", "30"], args].concat());
        assert_eq!(said.code, 2, "{args:?}: {said:?}");
        assert!(said.talk.contains(words), "{args:?}: {said:?}");
        assert!(!said.talk.contains("hunter2"), "{said:?}");
        assert!(started.elapsed() < Duration::from_secs(15), "at once: {args:?}");
    }
    assert!(place.relay.given().is_empty(), "nothing was published");
    assert!(place.relay.asked().is_empty(), "nobody was dialled");
}

#[test]
fn a_secret_that_would_be_public_is_warned_of_by_name_and_not_when_it_is_encrypted() {
    let (home, place) = (Home::new(), Place::new(Says::Refuses("blocked: no".into())));
    let provider = Keys::generate().public_key().to_hex();
    let run = |more: &[&str]| {
        let args = ["request", "--relay", &place.relay.url, "--cmd", "true", "--env", "CI_TOKEN=hunter2"];
        home.run(&[&args[..], more].concat())
    };
    let said = run(&[]);
    assert!(said.talk.contains("warning: --env CI_TOKEN") && !said.talk.contains("hunter2"), "{said:?}");
    let said = run(&["--provider", &provider, "--encrypt"]);
    assert!(!said.talk.contains("warning"), "{said:?}");
}

#[test]
fn a_request_that_is_answered_was_delivered_although_its_relay_gave_no_receipt() {
    let (home, place) = (Home::new(), Place::new(Says::Nothing));
    let provider = Keys::generate();
    let ordering = order(&home, &place, &["--timeout", "30"]);
    let request = place.given(is_request);
    let read = Request::decode(&request, &provider).unwrap();
    let said = Feedback::new(Status::Processing, "cloning");
    let working = feedback::unsigned(&read, &said, &provider, None, read.created_at).unwrap();
    place.relay.push(&working.sign_with_keys(&provider).unwrap().as_json());
    // Longer than a relay is waited for: the answer must outlast the missing receipt.
    let (done, wait) = mpsc::channel();
    let (relay, late) = (&place.relay, result(&request, &provider, "late").as_json());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if wait.recv_timeout(Duration::from_secs(17)).is_err() {
                relay.push(&late);
            }
        });
        let output = wait_for(ordering);
        done.send(()).unwrap_or_default();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "late\n");
    });
    assert!(!place.relay.given().iter().any(is_cancel), "it is not taken back");
}

fn wait_for(mut ordering: Ordering) -> std::process::Output {
    use std::io::Read;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    ordering.0.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
    ordering.0.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
    std::process::Output { status: ordering.0.wait().unwrap(), stdout, stderr }
}

#[test]
fn a_request_that_no_relay_took_and_nobody_answered_is_taken_back_and_ends_with_8() {
    let (home, place) = (Home::new(), Place::new(Says::Refuses("blocked: not you".into())));
    let args = ["request", "--relay", &place.relay.url, "--cmd", "true", "--json"];
    let said = home.run(&args);
    assert_eq!(said.code, 8, "{said:?}");
    assert_eq!(said.json()["status"], "not-taken");
    assert!(said.talk.contains("refused: blocked: not you"), "{said:?}");
    assert!(said.talk.contains("deletion sent to 0 of 1 relays"), "{said:?}");
}

#[test]
fn each_signal_that_ends_a_command_takes_the_order_back() {
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        if super::is_ignored(signal) {
            continue;
        }
        let (home, place) = (Home::new(), Place::new(Says::Ok));
        let ordering = order(&home, &place, &[]);
        let request = place.given(is_request);
        kill(Pid::from_raw(ordering.0.id().try_into().unwrap()), signal).unwrap();
        let cancel = place.given(is_cancel);
        assert!(cancel.tags.event_ids().any(|id| *id == request.id), "{signal}: {cancel:?}");
        let output = wait_for(ordering);
        assert_eq!(output.status.code(), Some(1), "{signal}: {output:?}");
    }
}
