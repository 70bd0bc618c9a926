//! A real LNbits behind TLS with a certificate of an authority that nobody has heard of: it is refused by name, for every
//! call, and the key is not sent. TLS is put before the server by a few lines of Python; the keys are made by openssl.
//! That a trusted authority's word is taken is tested in `src/wallet/http.rs`.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use coinop::wallet::{Error, Limits};
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

use crate::lnbits::Lnbits;
use crate::parts::{Part, locate};
use crate::skip::skip;
use crate::{lnbits_wallet, new_invoice, pay, refused};

const KEYS: &str = r#"
set -e
openssl req -x509 -newkey rsa:2048 -nodes -keyout ca-key.pem -out ca.pem -subj /CN=ca -days 2
printf "subjectAltName=IP:127.0.0.1\n" > ext
openssl req -newkey rsa:2048 -nodes -keyout key.pem -out csr.pem -subj /CN=lnbits
openssl x509 -req -in csr.pem -CA ca.pem -CAkey ca-key.pem -CAcreateserial -out cert.pem -days 2 -extfile ext
"#;

/// Says its port, and of each connection whether there was a handshake and how many bytes were asked in it.
const FRONT: &str = r#"
import socket, ssl, sys, threading
how = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
how.load_cert_chain("cert.pem", "key.pem")
port = socket.create_server(("127.0.0.1", 0))
print(port.getsockname()[1], flush=True)
def pump(a, b, count):
    try:
        while d := a.recv(65536):
            count.append(len(d))
            b.sendall(d)
        b.shutdown(socket.SHUT_WR)
    except OSError:
        pass
def serve(c):
    asked = []
    try:
        c = how.wrap_socket(c, server_side=True)
        u = socket.create_connection((sys.argv[1], int(sys.argv[2])))
        threading.Thread(target=pump, args=(c, u, asked), daemon=True).start()
        pump(u, c, [])
        print("served", sum(asked), flush=True)
    except OSError as error:
        print("refused", sum(asked), str(error).replace("\n", " "), flush=True)
while True:
    threading.Thread(target=serve, args=(port.accept()[0],), daemon=True).start()
"#;

/// TLS before a server.
struct Front {
    port: u16,
    said: Receiver<String>,
    child: Child,
}

impl Front {
    fn before(url: &str, dir: &Path) -> Front {
        let (host, port) =
            url.trim_start_matches("http://").split_once(':').expect("an address with its port");
        let mut child = Command::new("python3")
            .args(["-c", FRONT, host, port])
            .current_dir(dir)
            .stdout(Stdio::piped())
            .spawn()
            .expect("python runs");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let (tell, said) = channel();
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
        let mut front = Front { port: 0, said, child };
        front.port = front.says().parse().expect("a port");
        front
    }

    fn says(&self) -> String {
        self.said.recv_timeout(Duration::from_secs(20)).expect("a word of the front")
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.child.kill().and_then(|()| self.child.wait()).expect("ended");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_whose_certificate_nobody_vouches_for_is_refused_and_gets_no_key() {
    let test = "a_server_whose_certificate_nobody_vouches_for_is_refused_and_gets_no_key";
    let Some([program]) = locate(test, [Part::Lnbits]) else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let made = Command::new("sh").args(["-c", KEYS]).current_dir(&dir).stderr(Stdio::null()).status();
    if !made.is_ok_and(|status| status.success()) {
        return skip(test, "openssl makes no keys");
    }
    let server = Lnbits::shared(&program);
    let (seller, buyer) = (server.wallet("seller"), server.wallet("buyer"));
    server.fund(&buyer, 100);
    let front = Front::before(&server.url, dir.path());
    let url = format!("https://127.0.0.1:{}", front.port);

    // Who trusts the authority is served: it is not the front that fails.
    let root = Certificate::from_pem(&std::fs::read(dir.path().join("ca.pem")).expect("made")).expect("PEM");
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .root_certs(RootCerts::Specific(Arc::new(vec![root])))
        .build();
    let agent = ureq::Agent::config_builder().proxy(None).tls_config(tls).max_idle_connections(0).build();
    let health = format!("{url}/api/v1/health");
    assert_eq!(agent.new_agent().get(&health).call().expect("healthy").status(), 200);
    assert!(front.says().starts_with("served"));

    let wallet = lnbits_wallet(&url, &buyer.admin_key, Limits::default());
    let invoice = lnbits_wallet(&server.url, &seller.invoice_key, Limits::default())
        .make_invoice(&new_invoice(21_000))
        .await
        .expect("an invoice");
    for error in [
        wallet.balance_msat().await.expect_err("not trusted"),
        wallet.make_invoice(&new_invoice(1_000)).await.expect_err("not trusted"),
        refused(wallet.pay(&pay(&invoice)).await),
    ] {
        let Error::Unreachable(said) = &error else { panic!("{error:?}") };
        assert!(said.contains("its certificate is not trusted"), "{said}");
        let said = front.says();
        assert!(said.starts_with("refused 0 "), "nothing was asked: {said}");
    }
    assert_eq!(server.balance_msat(&buyer), 100_000);
}
