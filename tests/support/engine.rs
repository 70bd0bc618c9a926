//! The Docker Engine that tests may use: the one at `E2E_DOCKER_HOST`, which `.ci/engine start` starts and
//! `.ci/run` sets. It is never the engine of the machine. This file only asks whether it answers.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::skip::skip;

/// Longest wait for a byte of the engine's answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The engine's address (`unix:///…`), or this test is skipped.
///
/// # Panics
/// Where parts are required and no engine answers.
pub fn host(test: &str) -> Option<String> {
    found().map_err(|why| skip(test, &why)).ok()
}

/// The engine's address, or why there is none to test on.
pub fn found() -> Result<String, String> {
    let Some(host) = std::env::var("E2E_DOCKER_HOST").ok().filter(|host| !host.is_empty()) else {
        return Err("E2E_DOCKER_HOST names no Docker Engine (`.ci/engine start` starts one)".to_owned());
    };
    match get(&host, "/_ping") {
        Ok(answer) if answer.ends_with("\r\n\r\nOK") => Ok(host),
        Ok(answer) => Err(format!("what listens at {host} is no Docker Engine: {answer:?}")),
        Err(error) => Err(format!("no Docker Engine answers at {host}: {error}")),
    }
}

/// The whole answer to a plain GET, head and body, over the engine's Unix socket.
pub fn get(host: &str, path: &str) -> std::io::Result<String> {
    let socket = host.strip_prefix("unix://").ok_or_else(|| std::io::Error::other("not a Unix socket"))?;
    let mut engine = UnixStream::connect(socket)?;
    engine.set_read_timeout(Some(PATIENCE))?;
    engine.set_write_timeout(Some(PATIENCE))?;
    // HTTP/1.0: the answer ends where the connection does.
    engine.write_all(format!("GET {path} HTTP/1.0\r\nHost: engine\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    // Enough for any answer that a test looks at.
    engine.take(1 << 20).read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
