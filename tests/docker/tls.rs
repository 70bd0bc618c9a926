//! An engine behind TLS: spoken to with the right key, by whoever chose no TLS before, and otherwise told why not. TLS is
//! put before the engine's socket by a few lines of Python; the keys are made by openssl.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::common::IMAGE;
use crate::skip::skip;

/// Both ends with the certificate authority's word, and one client without.
const KEYS: &str = r#"
set -e
openssl req -x509 -newkey rsa:2048 -nodes -keyout ca-key.pem -out ca.pem -subj /CN=ca -days 2
printf "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n" > ext
for n in server client; do
  openssl req -newkey rsa:2048 -nodes -keyout $n-key.pem -out $n.csr -subj /CN=$n
  openssl x509 -req -in $n.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -out $n.pem -days 2 -extfile ext
done
mkdir known stranger
cp ca.pem known; cp client.pem known/cert.pem; cp client-key.pem known/key.pem
openssl req -x509 -newkey rsa:2048 -nodes -keyout stranger/key.pem -out stranger/cert.pem -subj /CN=x -days 2
cp ca.pem stranger
"#;

const PROXY: &str = r#"
import socket, ssl, sys, threading
how = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile="ca.pem")
how.load_cert_chain("server.pem", "server-key.pem")
how.verify_mode = ssl.CERT_REQUIRED
port = socket.create_server(("127.0.0.1", 0))
print(port.getsockname()[1], flush=True)
def pump(a, b):
    try:
        while d := a.recv(65536):
            b.sendall(d)
        b.shutdown(socket.SHUT_WR)
    except OSError:
        pass
def serve(c):
    try:
        c = how.wrap_socket(c, server_side=True)
    except OSError:
        return
    u = socket.socket(socket.AF_UNIX)
    u.connect(sys.argv[1])
    threading.Thread(target=pump, args=(c, u), daemon=True).start()
    pump(u, c)
while True:
    threading.Thread(target=serve, args=(port.accept()[0],), daemon=True).start()
"#;

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).unwrap();
    }
}

/// What the doctor says, with these keys and no others.
fn doctor(home: &Path, keys: &str, host: &str) -> String {
    let ran = Command::new(env!("CARGO_BIN_EXE_coinop"))
        .args(["doctor", "--offline", "--set", "sandbox=docker", "--set"])
        .args([&format!("docker.host={host}"), "--set", &format!("docker.image={IMAGE}"), "--data-dir"])
        .arg(home.join("data"))
        .env("HOME", home)
        .env("DOCKER_TLS_VERIFY", "1")
        .env("DOCKER_CERT_PATH", home.join(keys))
        .output()
        .unwrap();
    [ran.stdout, ran.stderr].iter().map(|out| String::from_utf8_lossy(out).into_owned()).collect()
}

#[test]
fn an_engine_behind_tls_is_served_with_the_right_key_and_refused_by_name_without() {
    let test = "an_engine_behind_tls_is_served_with_the_right_key_and_refused_by_name_without";
    let host = engine!();
    let home = tempfile::tempdir().unwrap();
    let made = Command::new("sh").args(["-c", KEYS]).current_dir(&home).stderr(Stdio::null()).status();
    if !made.is_ok_and(|made| made.success()) {
        return skip(test, "openssl makes no keys");
    }
    let socket = host.trim_start_matches("unix://");
    let proxy = Command::new("python3")
        .args(["-c", PROXY, socket])
        .current_dir(&home)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(proxy) = proxy else { return skip(test, "there is no python3") };
    let mut proxy = Ended(proxy);
    let mut port = String::new();
    BufReader::new(proxy.0.stdout.take().unwrap()).read_line(&mut port).unwrap();
    let host = format!("tcp://127.0.0.1:{}", port.trim());

    let said = doctor(home.path(), "known", &host);
    assert!(said.contains("a sandbox was started at the start of the node"), "{said}");
    let said = doctor(home.path(), "stranger", &host);
    assert!(said.contains("could not reach the engine") && said.contains("UnknownCA"), "{said}");
    let said = doctor(home.path(), "nowhere", &host);
    assert!(said.contains("could not read the engine's address") && said.contains("nowhere/"), "{said}");
}
