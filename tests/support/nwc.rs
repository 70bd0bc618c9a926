//! A wallet behind NIP-47 as its maker would run it: Alby's `NWCWalletService` in Node, in front of a wallet of a real
//! LNbits, on a relay of the caller's. Its connection line goes into `coinop::wallet`. The program is
//! `tests/e2e/clients/nwc_wallet.mjs`; the caller finds Node and the scripts (`Part::Node`, `Part::Clients`).

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use nostr_sdk::prelude::Keys;

use super::lnbits::{Lnbits, Purse};

/// A running service. Dropped, it is killed.
pub struct NwcService {
    /// `nostr+walletconnect://…`, a secret in real life.
    pub uri: String,
    child: Child,
    /// Open as long as it runs.
    _stdout: BufReader<ChildStdout>,
}

impl NwcService {
    /// Starts it and waits until its info event is on the relay. It blocks.
    ///
    /// # Panics
    /// When it ends before that, with what it said on stderr.
    pub fn start(node: &Path, scripts: &Path, relay: &str, server: &Lnbits, purse: &Purse) -> NwcService {
        let (wallet, client) = (Keys::generate(), Keys::generate());
        let mut command = Command::new(node);
        command.arg(scripts.join("nwc_wallet.mjs")).args(["--relay", relay, "--lnbits", &server.url]);
        command.args(["--key", &purse.admin_key, "--secret", &wallet.secret_key().to_secret_hex()]);
        command.args(["--client", &client.public_key().to_hex()]);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("the wallet service does not start: {error}"));
        let mut said = String::new();
        let mut stdout = BufReader::new(child.stdout.take().expect("its output"));
        stdout.read_line(&mut said).expect("a line of it");
        assert_eq!(said.trim(), "ready", "the wallet service ended: {:?}", child.try_wait());
        let secret = client.secret_key().to_secret_hex();
        let uri =
            format!("nostr+walletconnect://{}?relay={relay}&secret={secret}", wallet.public_key().to_hex());
        NwcService { uri, child, _stdout: stdout }
    }
}

impl Drop for NwcService {
    fn drop(&mut self) {
        self.child.kill().unwrap_or_else(|error| eprintln!("the wallet service was not killed: {error}"));
        self.child.wait().map(drop).unwrap_or_else(|error| eprintln!("not waited for: {error}"));
    }
}
