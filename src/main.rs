//! Arguments, tracing, exit codes; nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "jail-init") {
        return coinop::sandbox::local::jail_main();
    }
    ExitCode::SUCCESS
}
