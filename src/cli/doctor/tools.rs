//! `coinop doctor --tools`: runs the usual toolchains in the sandbox, each with a small task of its kind, and says which
//! break there and what helps. Which walls hold is the self-test's to find out.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{bad, good};
use crate::sandbox::{Backend, Check, Command, Error, Event, Exit, Limit, Policy, Spec};

/// No task takes as long on a machine that can serve.
const PATIENCE: Duration = Duration::from_secs(30);
/// All tasks together; those whose turn does not come are named.
const ALL_PATIENCE: Duration = Duration::from_secs(180);
/// As much of a tool's output as is looked at.
const LOOKED_AT: usize = 16 * 1024;

/// A program, and a task that needs what such programs need.
struct Tool {
    name: &'static str,
    task: &'static str,
}

const TOOLS: [Tool; 29] = [
    tool(
        "git",
        "git init -q r && cd r && git -c user.name=a -c user.email=a@example.com commit -q --allow-empty -m a && git log -1 --format=%s",
    ),
    tool(
        "python3",
        "python3 -c 'import ssl, sqlite3, subprocess, sys; subprocess.run([\"true\"], check=True); print(sys.version)'",
    ),
    tool("pip3", "pip3 --version"),
    tool("node", "node -e 'require(\"child_process\").execFileSync(\"true\"); console.log(process.version)'"),
    tool("npm", "npm --version"),
    tool("java", "java -Xmx128m -version"),
    tool(
        "javac",
        "printf 'class T { public static void main(String[] a) { System.out.println(1); } }' >T.java && javac T.java && java -Xmx128m T",
    ),
    tool("mvn", "mvn -v"),
    tool("gradle", "gradle --offline --version"),
    tool("gcc", "printf 'int main(void) { return 0; }' >m.c && gcc -o m m.c && ./m && gcc --version"),
    tool("g++", "printf '#include <string>\\nint main() { return 0; }' >m.cc && g++ -o m m.cc && ./m"),
    tool("clang", "printf 'int main(void) { return 0; }' >m.c && clang -o m m.c && ./m && clang --version"),
    tool("make", "printf 'all:\\n\\t@echo made\\n' >Makefile && make"),
    tool("cmake", "cmake --version"),
    tool(
        "go",
        "export GOCACHE=/tmp/go GOFLAGS=-mod=mod; printf 'package main\\nfunc main() { println(1) }\\n' >m.go && go run m.go && go version",
    ),
    tool("rustc", "printf 'fn main() {}' >m.rs && rustc -o m m.rs && ./m && rustc --version"),
    tool(
        "cargo",
        "cargo init -q --vcs none --name c c && cd c && cargo build -q --offline && cargo --version",
    ),
    tool("perl", "perl -MFile::Temp -MPOSIX -e 'print \"perl $^V\\n\"'"),
    tool("ruby", "ruby -e 'require \"json\"; puts RUBY_VERSION'"),
    tool("php", "php -r 'echo PHP_VERSION, \"\\n\";'"),
    tool("lua", "lua -e 'print(_VERSION)'"),
    tool("Rscript", "Rscript -e 'cat(1, fill = TRUE)'"),
    tool("gdb", "gdb -nx -batch -ex run -ex 'info program' --args true 2>&1 | grep -i 'exited normally'"),
    tool("script", "script -qec 'test -t 1 && echo on a terminal' /dev/null"),
    tool(
        "tmux",
        "export TERM=screen; tmux -L t new-session -d 'sleep 9' && tmux -L t ls && tmux -L t kill-server",
    ),
    tool("lscpu", "lscpu | head -n 1"),
    tool("fc-match", "fc-match sans"),
    tool(
        "chromium",
        "chromium --headless --no-sandbox --disable-gpu --user-data-dir=/tmp/c --dump-dom about:blank",
    ),
    tool("expect", "expect -c 'spawn echo said; expect said'"),
];

/// Tasks that need a program of another name.
const ABILITIES: [(&str, &str, &str); 2] = [
    (
        "a server on localhost",
        "python3",
        "python3 -c 'import socket; s = socket.create_server((\"localhost\", 0)); socket.create_connection(s.getsockname()); print(\"served\")'",
    ),
    (
        "AddressSanitizer",
        "gcc",
        "printf 'int main(void) { return 0; }' >m.c && gcc -fsanitize=address -o m m.c && ./m && echo ran",
    ),
];

const fn tool(name: &'static str, task: &'static str) -> Tool {
    Tool { name, task }
}

/// A row for each tool that the host has (for containers: the image), and for what they are used for.
pub async fn run(backend: &dyn Backend, policy: &Policy) -> Vec<Check> {
    let names: Vec<&str> = TOOLS.iter().map(|tool| tool.name).collect();
    let look = format!("for t in {}; do command -v $t >/dev/null && echo $t; done; true", names.join(" "));
    let inside: BTreeSet<String> = match in_sandbox(backend, policy, &look).await {
        Ok(ran) if ran.exit == Some(Exit::Code { code: 0 }) => ran.out.lines().map(str::to_owned).collect(),
        Ok(ran) => return vec![bad("sh", ran.last_words(), "see the rows of the sandbox above")],
        Err(error) => return vec![bad("sh", error.to_string(), "see the rows of the sandbox above")],
    };
    let on_host = backend.identity().backend == "local";
    let until = Instant::now() + ALL_PATIENCE;
    let mut checks = Vec::new();
    for Tool { name, task } in TOOLS {
        if inside.contains(name) {
            checks.push(one(backend, policy, until, name, task).await);
        } else if let Some(path) = on_path(name).filter(|_| on_host) {
            checks.push(bad(
                name,
                format!("installed as {}, where jobs do not see it", path.display()),
                "install it below /usr (as in /usr/local), or serve from a container image that has it",
            ));
        }
    }
    for (name, needs, task) in ABILITIES {
        if inside.contains(needs) {
            checks.push(one(backend, policy, until, name, task).await);
        }
    }
    if checks.is_empty() {
        checks.push(good("tools", "none of the usual ones is there"));
    }
    checks
}

async fn one(backend: &dyn Backend, policy: &Policy, until: Instant, name: &str, task: &str) -> Check {
    if Instant::now() >= until {
        return bad(
            name,
            format!("not tried: the tools before it took {} s", ALL_PATIENCE.as_secs()),
            "raise limits.pids, limits.cpu_milli and limits.memory_bytes",
        );
    }
    match in_sandbox(backend, policy, task).await {
        Ok(ran) if ran.exit == Some(Exit::Code { code: 0 }) => good(name, ran.first_words()),
        Ok(ran) => bad(name, ran.last_words(), fix(&ran, backend)),
        Err(error) => bad(name, error.to_string(), "see the rows of the sandbox above"),
    }
}

/// What the operator can do about it.
fn fix(ran: &Ran, backend: &dyn Backend) -> String {
    let said = format!("{}\n{}", ran.out, ran.err);
    let says = |sign: &str| said.contains(sign);
    let caveats = backend.caveats();
    match ran.exit {
        Some(Exit::Limit { limit: Limit::Memory }) => "raise limits.memory_bytes".to_owned(),
        Some(Exit::Limit { .. } | Exit::Timeout) => "raise limits.wall_ms and limits.cpu_milli".to_owned(),
        _ if says("No space left") => "raise limits.disk_bytes and limits.inodes".to_owned(),
        _ if says("Too many open files") => "raise limits.open_files".to_owned(),
        _ if says("Resource temporarily unavailable") => "raise limits.pids".to_owned(),
        _ if !caveats.is_empty() && (says("Address family not supported") || says("Sanitizer")) => {
            format!("run the node as root, or in a systemd unit with Delegate=yes; {}", caveats.join("; "))
        }
        _ if says("/etc/") => {
            "it wants a part of /etc that jobs do not see; docs/security.md lists those that they do; or \
                               serve from a container image"
                .to_owned()
        }
        _ => "try it with `coinop request --cmd`; docs/security.md says what jobs do not get".to_owned(),
    }
}

/// The program as this process finds it.
fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    nix::unistd::access(file, nix::unistd::AccessFlags::X_OK).is_ok() && file.is_file()
}

/// What a task printed, and how it ended.
struct Ran {
    out: String,
    err: String,
    exit: Option<Exit>,
}

impl Ran {
    fn first_words(&self) -> String {
        let mut lines = self.out.lines().chain(self.err.lines());
        lines.find(|line| !line.trim().is_empty()).unwrap_or("works").trim().to_owned()
    }

    fn last_words(&self) -> String {
        let mut lines = self.out.lines().chain(self.err.lines()).filter(|line| !line.trim().is_empty());
        let how = match self.exit {
            Some(Exit::Code { code }) => format!("exit code {code}"),
            Some(Exit::Signal { signal }) => format!("signal {signal}"),
            Some(Exit::Limit { limit }) => format!("ended by its {limit:?} limit").to_lowercase(),
            Some(Exit::Timeout) => format!("not done in {} s", PATIENCE.as_secs()),
            Some(Exit::NotStarted { errno }) => nix::errno::Errno::from_raw(errno).desc().to_owned(),
            None => "its sandbox ended".to_owned(),
        };
        match lines.next_back() {
            Some(line) => format!("{how}: {}", line.trim()),
            None => how,
        }
    }
}

/// Runs a script in a sandbox of its own.
async fn in_sandbox(backend: &dyn Backend, policy: &Policy, script: &str) -> Result<Ran, Error> {
    let spec = Spec { id: format!("doctor-{}", std::process::id()), base: None, policy: policy.clone() };
    let sandbox = backend.create(spec).await?;
    let command = Command {
        argv: vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()],
        timeout: Some(PATIENCE),
        ..Command::default()
    };
    let mut process = sandbox.exec(command).await?;
    let (mut out, mut err, mut exit) = (Vec::new(), Vec::new(), None);
    while let Some(event) = process.events.recv().await {
        let (to, bytes) = match event {
            Event::Stdout(bytes) => (&mut out, bytes),
            Event::Stderr(bytes) => (&mut err, bytes),
            Event::Exit(how) => {
                exit = Some(how);
                continue;
            }
        };
        to.extend(bytes);
        // The end of it says more than its beginning.
        to.drain(..to.len().saturating_sub(LOOKED_AT));
    }
    sandbox.destroy().await?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Ran { out: text(out), err: text(err), exit })
}
