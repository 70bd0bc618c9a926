//! A real LNbits server on the loopback, with wallets in it that pay each other. Its funding source is its own
//! FakeWallet, so that no lightning node is needed; a wallet gets its first money by a line in the server's database.
//! The caller finds the program (`Part::Lnbits`); nothing else of the test program is needed here.
//!
//! Everything here blocks: call it from a test with more than one worker thread.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A running server. Dropped, it is killed.
pub struct Lnbits {
    pub url: String,
    program: PathBuf,
    dir: TempDir,
    port: u16,
    child: Mutex<Option<Child>>,
}

/// One wallet of it.
#[derive(Debug, Clone)]
pub struct Purse {
    pub id: String,
    /// Enough to receive.
    pub invoice_key: String,
    /// Pays, too.
    pub admin_key: String,
}

const READY: Duration = Duration::from_secs(120);
static SHARED: Mutex<Weak<Lnbits>> = Mutex::new(Weak::new());

impl Lnbits {
    /// The one that the tests of this process use together: it takes seconds to start. It ends with its last user.
    pub fn shared(program: &Path) -> Arc<Lnbits> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let started = Arc::new(Lnbits::start(program));
            *shared = Arc::downgrade(&started);
            started
        })
    }

    /// Starts one on a free port, with its own data.
    ///
    /// # Panics
    /// When it is not ready in time, with what it printed.
    pub fn start(program: &Path) -> Lnbits {
        let dir = tempfile::tempdir().expect("a folder for lnbits");
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a loopback port");
        let port = listener.local_addr().expect("its address").port();
        drop(listener);
        let url = format!("http://127.0.0.1:{port}");
        let server = Lnbits { url, program: program.to_owned(), dir, port, child: Mutex::new(None) };
        server.resume();
        server
    }

    /// Kills the server; its data stays.
    pub fn kill(&self) {
        if let Some(mut child) = self.child.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // The server is a child of the program.
            let group = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
            killpg(group, Signal::SIGKILL)
                .unwrap_or_else(|error| eprintln!("lnbits was not killed: {error}"));
            child.wait().map(drop).unwrap_or_else(|error| eprintln!("lnbits was not waited for: {error}"));
        }
    }

    /// Starts it again on the same port and data.
    pub fn resume(&self) {
        let data = self.dir.path();
        let log = File::options().create(true).append(true).open(self.log()).expect("a log file");
        let mut command = Command::new(&self.program);
        // It finds its own files only from where it is installed.
        command.current_dir(self.home()).args(["--host", "127.0.0.1", "--port", &self.port.to_string()]);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", data);
        command.env("LNBITS_BACKEND_WALLET_CLASS", "FakeWallet").env("LNBITS_DATA_FOLDER", data);
        command.env("LNBITS_EXTENSIONS_PATH", data).env("LNBITS_ADMIN_UI", "false");
        command.env("LNBITS_RATE_LIMIT_NO", "1000000");
        // It asks for prices and extensions on the internet; this lets it find a closed port of the loopback instead.
        for name in ["HTTP_PROXY", "HTTPS_PROXY"] {
            command.env(name, "http://127.0.0.1:9");
        }
        command.env("NO_PROXY", "127.0.0.1");
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stderr(log.try_clone().expect("the same file"))
            .stdout(log);
        let child = command.spawn().unwrap_or_else(|error| panic!("lnbits does not start: {error}"));
        *self.child.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
        let began = Instant::now();
        while self.call("GET", "/api/v1/health", "", None).is_none() {
            let ended = match self.child.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                Some(child) => child.try_wait().expect("our child").is_some(),
                None => true,
            };
            assert!(!ended && began.elapsed() < READY, "lnbits is not ready\n{}", self.tail());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A new wallet with nothing in it.
    pub fn wallet(&self, name: &str) -> Purse {
        let made = self.call("POST", "/api/v1/account", "", Some(json!({ "name": name })));
        let made = made.unwrap_or_else(|| panic!("lnbits makes no account\n{}", self.tail()));
        let text = |key: &str| made[key].as_str().unwrap_or_else(|| panic!("no {key} in {made}")).to_string();
        Purse { id: text("id"), invoice_key: text("inkey"), admin_key: text("adminkey") }
    }

    /// Puts money into a wallet: an invoice of its own is marked as paid in the database, as nobody outside can pay.
    pub fn fund(&self, purse: &Purse, sats: u64) {
        let body = json!({ "out": false, "unit": "sat", "amount": sats, "memo": "funds" });
        let made = self.call("POST", "/api/v1/payments", &purse.invoice_key, Some(body)).expect("an invoice");
        let hash = made["payment_hash"].as_str().expect("its hash");
        self.mark(hash, "success");
        let balance = self.balance_msat(purse);
        assert!(balance >= sats * 1_000, "the wallet has {balance} msat");
    }

    /// Sets the status of all that has this hash: what the lightning node behind a real server would find out.
    pub fn mark(&self, payment_hash: &str, status: &str) {
        let script = "import sqlite3, sys\n\
            c = sqlite3.connect(sys.argv[1], timeout=30)\n\
            n = c.execute('UPDATE apipayments SET status = ? WHERE payment_hash = ?', sys.argv[2:4]).rowcount\n\
            c.commit()\n\
            sys.exit(0 if n else 1)";
        let database = self.dir.path().join("database.sqlite3");
        let python = self.program.with_file_name("python");
        let mut command = Command::new(python);
        let ended = command.args(["-c", script]).arg(database).args([status, payment_hash]).status();
        assert!(ended.expect("python runs").success(), "no payment {payment_hash} in the database");
    }

    pub fn balance_msat(&self, purse: &Purse) -> u64 {
        let wallet = self.call("GET", "/api/v1/wallet", &purse.invoice_key, None).expect("a wallet");
        wallet["balance"].as_u64().expect("a balance")
    }

    /// Pays an invoice from a wallet, as a stranger's wallet would.
    pub fn pay(&self, purse: &Purse, bolt11: &str) {
        let body = json!({ "out": true, "bolt11": bolt11 });
        let paid = self.call("POST", "/api/v1/payments", &purse.admin_key, Some(body));
        assert!(paid.is_some_and(|paid| paid["status"] == "success"), "not paid\n{}", self.tail());
    }

    /// An invoice of this wallet.
    pub fn invoice(&self, purse: &Purse, sats: u64) -> String {
        let body = json!({ "out": false, "unit": "sat", "amount": sats, "memo": "to me" });
        let made = self.call("POST", "/api/v1/payments", &purse.invoice_key, Some(body)).expect("an invoice");
        made["bolt11"].as_str().expect("an invoice").to_owned()
    }

    /// What it printed last.
    pub fn tail(&self) -> String {
        let text = std::fs::read(self.log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("lnbits.log")
    }

    /// The folder that holds its package: `lib/python3.x/site-packages`.
    fn home(&self) -> PathBuf {
        let lib = self.program.ancestors().nth(2).expect("bin/lnbits in a folder").join("lib");
        let python =
            std::fs::read_dir(&lib).expect("its libraries").flatten().map(|entry| entry.path()).next();
        python.expect("a Python").join("site-packages")
    }

    /// `None` where there is no answer, or none with success.
    fn call(&self, method: &str, path: &str, key: &str, body: Option<Value>) -> Option<Value> {
        let config = ureq::Agent::config_builder().proxy(None).timeout_global(Some(Duration::from_secs(20)));
        let agent = config.max_idle_connections(0).build().new_agent();
        let url = format!("{}{path}", self.url);
        let answer = match body {
            None => agent.get(url).header("X-Api-Key", key).call(),
            Some(body) => {
                assert_eq!(method, "POST");
                let post = agent.post(url).header("X-Api-Key", key).content_type("application/json");
                post.send(body.to_string())
            }
        };
        serde_json::from_slice(&answer.ok()?.body_mut().read_to_vec().ok()?).ok()
    }
}

impl Drop for Lnbits {
    fn drop(&mut self) {
        self.kill();
    }
}
