//! R12 with a whole node: a customer who reads only where its NIP-65 list says gets its answer there, although
//! the request does not say so. Everything is on the loopback, and the sandbox is the real one.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use coinop::config::{Config, Sources};
use coinop::customer::{Answer, Customer, Heard};
use coinop::node::Node;
use coinop::protocol::draft::Draft;
use coinop::protocol::encryption::Scheme;
use coinop::relay::local::LocalRelay;
use coinop::relay::{Client, Published, Subscription, Wire};
use coinop::repo::serve;
use coinop::store::record;
use nostr_sdk::prelude::{Event, EventBuilder, Keys, Kind, Tag};

const PATIENCE: Duration = Duration::from_secs(60);

/// Our relay and the customer's, the node, and what it clones.
struct Scene {
    ours: LocalRelay,
    theirs: LocalRelay,
    node: Node,
    provider: Keys,
    customer: Keys,
    repository: serve::Server,
    _dir: tempfile::TempDir,
}

impl Scene {
    async fn set(allow_private_relays: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("coins");
        std::fs::create_dir_all(&folder).unwrap();
        serve::sample_repo(&folder, &[("README.md", "# Coins\n")]).unwrap();
        let repository = serve::start(&[folder], SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await.unwrap();
        let (ours, theirs) = (LocalRelay::start().await.unwrap(), LocalRelay::start().await.unwrap());
        let mut config = config(dir.path());
        config.relays = vec![ours.url()];
        config.admission.allow_private_repos = true;
        config.admission.allow_private_relays = allow_private_relays;
        let provider = Keys::generate();
        let helper = Some(env!("CARGO_BIN_EXE_coinop").into());
        let node = Node::start(config, provider.clone(), helper).await.unwrap();
        Self { ours, theirs, node, provider, customer: Keys::generate(), repository, _dir: dir }
    }

    /// The customer says on our relay where it reads, and asks there without a word about relays.
    async fn ask(&self, encrypt: Option<Scheme>) -> Customer {
        let client = connect(&self.ours).await;
        let rows = [
            vec!["r".into(), self.theirs.url(), "read".into()],
            vec!["r".into(), "ws://127.0.0.1:9".to_string(), "write".into()],
        ];
        let list = EventBuilder::new(Kind::RelayList, "")
            .tags(rows.map(|row| Tag::parse(row).unwrap()))
            .sign_with_keys(&self.customer)
            .unwrap();
        publish(&client, &list).await;
        let draft = Draft {
            kind: 5000,
            repo: Some(self.repository.url()),
            // Long enough for the look-up, which no job waits for.
            commands: vec!["sleep 2".into(), "cat README.md".into()],
            provider: Some(self.provider.public_key()),
            encrypt,
            ..Draft::default()
        };
        let now_s = coinop::clock::now_s();
        let request = draft.unsigned(&self.customer, now_s).unwrap();
        let request = request.sign_with_keys(&self.customer).unwrap();
        publish(&client, &request).await;
        Customer::new(request, self.customer.clone(), Some(self.provider.public_key()))
    }

    /// Every relay's last word about the answer, once all have one, by relay.
    async fn last_words(&self, answer: &Event) -> Vec<(String, record::Answer)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut words = self.node.store().deliveries(&answer.id.to_hex()).unwrap();
            let owed = self.node.store().owed().unwrap();
            if !words.is_empty() && owed.iter().all(|owed| owed.event != answer.id.to_hex()) {
                words.sort_by(|a, b| a.0.cmp(&b.0));
                return words;
            }
            assert!(Instant::now() < deadline, "{words:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn end(self) {
        self.node.drain().await.unwrap();
        self.repository.shutdown();
    }
}

fn config(dir: &Path) -> Config {
    let home = dir.join("home").to_string_lossy().into_owned();
    let data = dir.join("data").to_string_lossy().into_owned();
    let env = vec![("HOME".into(), home), ("COINOP_DATA_DIR".into(), data)];
    Config::load(&Sources { env, cwd: dir.to_path_buf(), ..Sources::default() }).unwrap().config
}

async fn connect(relay: &LocalRelay) -> Client {
    Client::connect(&[relay.url()], None, true, Wire::default(), PATIENCE).await.unwrap()
}

async fn publish(client: &Client, event: &Event) {
    let answers = client.publish(event, PATIENCE).await;
    let stored = |published: &Published| published.answer == record::Answer::Stored;
    assert!(answers.iter().all(stored), "{answers:?}");
}

async fn listen(client: &Client, customer: &Customer) -> Subscription {
    let answers = client.subscribe(vec![customer.filter()]);
    answers.stored(PATIENCE).await;
    answers
}

async fn result(answers: &mut Subscription, customer: &Customer) -> Box<Answer> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let received = tokio::time::timeout(left, answers.next()).await.expect("a result in time").unwrap();
        match customer.hear(&received.event) {
            Heard::Result(answer) => return answer,
            Heard::Feedback { feedback, .. } => assert_ne!(feedback.status.as_str(), "error", "{feedback:?}"),
            Heard::Ignored(why) => panic!("{why}"),
        }
    }
}

async fn is_answered_where_it_reads(encrypt: Option<Scheme>) {
    let scene = Scene::set(true).await;
    let reader = connect(&scene.theirs).await;
    let customer = scene.ask(encrypt).await;
    let mut answers = listen(&reader, &customer).await;
    let answer = result(&mut answers, &customer).await;
    assert!(answer.is_good(), "{:?}", answer.findings);
    assert_eq!(answer.exit_code(), Some(0));
    let mut expected =
        vec![(scene.ours.url(), record::Answer::Stored), (scene.theirs.url(), record::Answer::Stored)];
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(scene.last_words(&answer.event).await, expected, "not where it only writes");
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_customer_is_answered_on_the_relay_where_it_reads() {
    is_answered_where_it_reads(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_encrypted_job_is_answered_on_the_relay_where_its_customer_reads() {
    is_answered_where_it_reads(Some(Scheme::Nip44)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_customers_private_relay_is_not_dialled_unless_allowed() {
    let scene = Scene::set(false).await;
    let reader = connect(&scene.ours).await;
    let customer = scene.ask(None).await;
    let mut answers = listen(&reader, &customer).await;
    let answer = result(&mut answers, &customer).await;
    for (relay, word) in scene.last_words(&answer.event).await {
        match word {
            record::Answer::Stored => assert_eq!(relay, scene.ours.url()),
            record::Answer::Rejected { reason } => {
                assert_eq!(relay, scene.theirs.url());
                assert!(reason.contains("private address 127.0.0.1"), "{reason}");
            }
            other => panic!("{relay}: {other:?}"),
        }
    }
    let on_theirs = connect(&scene.theirs).await;
    assert!(on_theirs.query(vec![customer.filter()], PATIENCE).await.is_empty());
    scene.end().await;
}
