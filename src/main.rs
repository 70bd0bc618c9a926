//! Arguments, exit codes, the final message on stderr; nothing else.

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::Parser;
use coinop::cli::{self, Cli, Failure, output};

fn main() -> ExitCode {
    // The jail's first process: nothing may run before it, no thread and no library.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "jail-init") {
        return coinop::sandbox::local::jail_main();
    }
    // A panic's message may quote text from outside, too.
    std::panic::set_hook(Box::new(|panic| {
        output::talk(&panic.to_string());
        let trace = std::backtrace::Backtrace::capture();
        if trace.status() == std::backtrace::BacktraceStatus::Captured {
            output::talk(&trace.to_string());
        }
    }));
    // Before anything that could dial wss: the TLS library wants one provider for the process.
    coinop::relay::install_crypto();
    // Clap ends with 2 on a bad command line, 0 on --help.
    let parsed = Cli::parse();
    match cli::run(parsed) {
        Ok(exit) => exit.into(),
        Err(failure) if is_closed_pipe(&failure) => ExitCode::SUCCESS,
        Err(failure) => {
            output::talk(&format!("{} {failure}", output::Paint::stderr().bad("error:")));
            failure.exit.into()
        }
    }
}

/// `coinop jobs list | head` is no failure.
fn is_closed_pipe(failure: &Failure) -> bool {
    let io = failure.error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}
