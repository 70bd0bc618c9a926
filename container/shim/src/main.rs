//! Process 1 inside a container of any image. It speaks with the node over stdin and stdout (`wire`), starts and ends
//! the job's commands (`serve`) and keeps a worker for the job's files (`worker`). It ends when the node lets go, and
//! never before it has been told to. As `probe` it is the node's own test job.

#[path = "shim/places.rs"]
mod places;
#[path = "shim/running.rs"]
mod running;
#[path = "shim/serve.rs"]
mod serve;
#[path = "shim/streams.rs"]
mod streams;
#[path = "shim/usage.rs"]
mod usage;
#[path = "shim/worker.rs"]
mod worker;

use std::io::{self, Write};
use std::process::ExitCode;

use coinop_shim::probe;
use coinop_shim::wire::{self, FromShim};

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|word| word == "probe") {
        return match probe::run(words) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) | Err(_) => ExitCode::FAILURE,
        };
    }
    match serve::serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            let told = wire::encode(0, &FromShim::Broken(why.to_string()))
                .map_err(io::Error::other)
                .and_then(|frame| io::stdout().write_all(&frame).and_then(|()| io::stdout().flush()));
            // 2: the node has gone, or cannot be told.
            ExitCode::from(if told.is_ok() { 1 } else { 2 })
        }
    }
}
