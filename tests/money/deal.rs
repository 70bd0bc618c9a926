//! A provider and a customer with a wallet each, over LNbits or over NWC, and the program run as each of them would.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;

use coinop::protocol::Feedback;
use coinop::relay::local::LocalRelay;
use nostr_sdk::prelude::Keys;
use serde_json::Value;
use tempfile::TempDir;

use crate::lnbits::{Lnbits, Purse};
use crate::nwc::NwcService;
use crate::parts::{Part, locate};
use crate::support::process::Home;

/// What a job costs at these tests' node.
pub const PRICE: &str = "generic base_msat=20000 per_second_msat=100,* free";

/// How a wallet is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    Lnbits,
    Nwc,
}

pub struct Deal {
    pub server: Arc<Lnbits>,
    pub relay: LocalRelay,
    pub home: Home,
    pub provider: Purse,
    pub customer: Purse,
    pub customer_keys: Keys,
    /// Flags that name the provider's wallet.
    pub own: Vec<String>,
    /// Flags for the customer's commands.
    wallet: Vec<String>,
    dir: TempDir,
    _services: Vec<NwcService>,
}

/// For a node with a wallet that sells nothing: without prices it would not start.
pub const FREE: [&str; 2] = ["--set", "payment.prices=* free"];

impl Deal {
    /// `None`: a part is missing, and the test ends.
    pub async fn open(test: &str, over: Over, more: &[&str]) -> Option<Deal> {
        let [program] = locate(test, [Part::Lnbits])?;
        let server = Lnbits::shared(&program);
        let relay = LocalRelay::start().await.expect("a relay");
        let (provider, customer) = (server.wallet("provider"), server.wallet("customer"));
        server.fund(&customer, 1_000);
        let dir = tempfile::tempdir().expect("a folder");
        let mut services = Vec::new();
        let mut wallet = |name: &str, purse: &Purse| {
            let file = dir.path().join(name);
            let (kind, secret) = match over {
                Over::Lnbits => ("lnbits", purse.admin_key.clone()),
                Over::Nwc => {
                    let [node, scripts] = locate(test, [Part::Node, Part::Clients])?;
                    services.push(NwcService::start(&node, &scripts, &relay.url(), &server, purse));
                    ("nwc", services.last().expect("just pushed").uri.clone())
                }
            };
            write_secret(&file, &secret);
            let url = if over == Over::Lnbits { server.url.as_str() } else { "" };
            Some(flags(&[
                ("payment.wallet", kind),
                ("payment.wallet_url", url),
                ("payment.wallet_key_file", &file.display().to_string()),
            ]))
        };
        let (own, theirs) = (wallet("provider", &provider)?, wallet("customer", &customer)?);
        let mut all: Vec<&str> = own.iter().map(String::as_str).collect();
        all.extend(more);
        let home = Home::new(&[relay.url()], &all);
        let customer_keys = Keys::generate();
        coinop::keys::create(&dir.path().join("customer.key"), &customer_keys, None).expect("a key file");
        Some(Deal {
            server,
            relay,
            home,
            provider,
            customer,
            customer_keys,
            own,
            wallet: theirs,
            dir,
            _services: services,
        })
    }

    /// Another node and another customer with the same wallets, over LNbits; this deal must last as long.
    pub async fn another(&self, more: &[&str]) -> Deal {
        let relay = LocalRelay::start().await.expect("a relay");
        let all: Vec<&str> = self.own.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let home = Home::new(&[relay.url()], &all);
        Deal {
            server: Arc::clone(&self.server),
            relay,
            home,
            provider: self.provider.clone(),
            customer: self.customer.clone(),
            customer_keys: Keys::generate(),
            own: self.own.clone(),
            wallet: self.wallet.clone(),
            dir: tempfile::tempdir().expect("a folder"),
            _services: Vec::new(),
        }
    }

    /// Gives the provider another home, with another way to the relay.
    pub fn move_to(&mut self, relay: String, more: &[&str]) {
        let mut all: Vec<&str> = self.own.iter().map(String::as_str).collect();
        all.extend(more);
        self.home = Home::new(&[relay], &all);
    }

    /// Pays what a quote asks, as a stranger's wallet would; the msat.
    pub async fn pay(&self, quote: &Feedback) -> u64 {
        let (msat, bolt11) = quote.amount.clone().expect("an amount");
        let (server, customer, bolt11) =
            (self.server.clone(), self.customer.clone(), bolt11.expect("an invoice"));
        tokio::task::spawn_blocking(move || server.pay(&customer, &bolt11)).await.expect("paid");
        msat
    }

    pub fn customer_hex(&self) -> String {
        self.customer_keys.public_key().to_hex()
    }

    pub fn provider_hex(&self) -> String {
        self.home.keys.public_key().to_hex()
    }

    /// `coinop request --pay` with these flags more.
    pub async fn order(&self, more: &[&str]) -> Output {
        let key = self.dir.path().join("customer.key").display().to_string();
        let (provider, relay) = (self.provider_hex(), self.relay.url());
        let mut args = vec!["request", "--pay", "--json", "--key", &key, "--provider", &provider];
        args.extend(["--relay", &relay]);
        if !more.contains(&"--timeout") {
            args.extend(["--timeout", "60"]);
        }
        args.extend(self.wallet.iter().map(String::as_str));
        args.extend(more);
        run(self.dir.path().join("home"), &args).await
    }

    /// A command of the node's owner.
    pub async fn owner(&self, args: &[&str]) -> Output {
        self.owner_under(&[], args).await
    }

    /// A command of the node's owner, as an argument of another program, such as strace.
    pub async fn owner_under(&self, program: &[String], args: &[&str]) -> Output {
        let key = self.home_key();
        let data = self.home.data.display().to_string();
        let mut all = args.to_vec();
        let set = format!("key_file={key}");
        all.extend(["--data-dir", &data, "--set", &set]);
        run_under(program, self.dir.path().join("home"), &all).await
    }

    /// The JSON that an owner's command prints; it must succeed.
    pub async fn told(&self, args: &[&str]) -> Value {
        json(&self.owner(args).await)
    }

    fn home_key(&self) -> String {
        self.home.data.parent().expect("a folder").join("key").display().to_string()
    }
}

/// Runs the program with nothing of the tester's configuration.
pub async fn run(home: PathBuf, args: &[&str]) -> Output {
    run_under(&[], home, args).await
}

async fn run_under(program: &[String], home: PathBuf, args: &[&str]) -> Output {
    std::fs::create_dir_all(&home).expect("a home");
    let mut words = program.to_vec();
    words.push(env!("CARGO_BIN_EXE_coinop").into());
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        .args(args)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", home);
    tokio::task::spawn_blocking(move || command.output().expect("it runs")).await.expect("no panic")
}

/// What it printed, if it succeeded.
///
/// # Panics
/// With its stderr otherwise.
pub fn json(output: &Output) -> Value {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{said}", output.status);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn flags(settings: &[(&str, &str)]) -> Vec<String> {
    settings.iter().flat_map(|(key, value)| ["--set".to_owned(), format!("{key}={value}")]).collect()
}

pub fn write_secret(path: &std::path::Path, secret: &str) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).expect("a file");
    file.write_all(secret.as_bytes()).expect("written");
}
