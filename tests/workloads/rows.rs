//! The rows: a script each, what it must say, and on which backends it is refused, and why. docs/testing.md shows the
//! reasons, docs/security.md argues for them.

use crate::columns::Column;

/// What real work needs.
#[derive(Clone)]
pub struct Row {
    /// A sentence about what works.
    pub name: &'static str,
    /// The programs without which there is nothing to try.
    pub programs: &'static [&'static str],
    /// Beside README.md in the commit.
    pub files: &'static [(&'static str, &'static str)],
    /// Run by `sh -c` in the workspace; it must end with 0.
    pub script: &'static str,
    /// Part of its stdout.
    pub says: &'static str,
    /// What stderr may not hold.
    pub complaint: Option<&'static str>,
    pub refused: &'static [Refusal],
}

#[derive(Clone, Copy)]
pub enum Where {
    Everywhere,
    Docker,
    /// The local backend without a memory cgroup.
    Watched,
}

#[derive(Clone, Copy)]
pub struct Refusal {
    pub on: Where,
    /// How the refusal shows in the output.
    pub sign: &'static str,
    pub why: &'static str,
}

impl Refusal {
    pub fn applies(&self, column: &Column, watched: bool) -> bool {
        match self.on {
            Where::Everywhere => true,
            Where::Docker => column.name == "docker",
            Where::Watched => watched,
        }
    }
}

const NO_SOCKETS: &str = "without a memory cgroup a job gets no sockets: nothing counts what they hold";
const NO_SHADOW: &str =
    "without a memory cgroup RLIMIT_DATA stands in, which counts what a sanitizer only reserves";

const fn row(name: &'static str, programs: &'static [&'static str], script: &'static str) -> Row {
    Row { name, programs, files: &[], script, says: "", complaint: None, refused: &[] }
}

/// Programs say it in their own ways.
const SOCKETS: &[Refusal] = &[Refusal { on: Where::Watched, sign: "", why: NO_SOCKETS }];
const SHADOW: &[Refusal] = &[Refusal { on: Where::Watched, sign: "Sanitizer", why: NO_SHADOW }];

const LEAK: (&str, &str) = (
    "leak.c",
    "#include <stdlib.h>\nint main(int n, char **v) { volatile char *p = malloc(n * 10); p = 0; return p != 0; }\n",
);
const MAIN: (&str, &str) = ("main.c", "#include <stdio.h>\nint main(void) { puts(\"ran\"); return 0; }\n");
const JAVA: (&str, &str) =
    ("T.java", "class T { public static void main(String[] a) { System.out.println(6 * 7); } }\n");
const SERVER: (&str, &str) = (
    "server.py",
    "import http.server, threading, urllib.request\n\
     s = http.server.ThreadingHTTPServer(('localhost', 0), http.server.SimpleHTTPRequestHandler)\n\
     threading.Thread(target=s.serve_forever, daemon=True).start()\n\
     print(urllib.request.urlopen('http://localhost:%d/README.md' % s.server_port, timeout=20).read())\n\
     s.shutdown()\n",
);
const NODE_SERVER: (&str, &str) = (
    "server.js",
    "const http = require('http');\n\
     const s = http.createServer((q, a) => a.end('served')).listen(0, 'localhost', () =>\n\
       http.get({ port: s.address().port, host: 'localhost' }, a => a.on('data', d => {\n\
         console.log(String(d)); process.exit(0); })));\n\
     s.on('error', e => { console.error(e.message); process.exit(1); });\n",
);
const POOL: (&str, &str) = (
    "pool.py",
    "import multiprocessing as m\ndef f(x): return x * x\n\
     if __name__ == '__main__':\n    with m.Pool(2) as p: print(p.map(f, [1, 2, 3]))\n",
);

pub fn rows() -> Vec<Row> {
    vec![
        // terminals
        Row {
            says: "on a terminal",
            ..row(
                "script_runs_a_command_on_a_terminal",
                &["script"],
                "script -qec 'test -t 0 && test -t 1 && echo on a terminal' /dev/null",
            )
        },
        Row {
            says: "by its path",
            ..row(
                "a_command_opens_its_terminal_by_path",
                &["script"],
                "script -qec 'echo by its path >/dev/tty' /dev/null",
            )
        },
        Row {
            says: "to a terminal",
            ..row(
                "python_opens_a_pseudo_terminal",
                &["python3"],
                "python3 -c 'import pty; pty.spawn([\"sh\", \"-c\", \"test -t 1 && echo to a terminal\"])'",
            )
        },
        Row {
            says: "got hi",
            ..row(
                "expect_talks_with_a_program",
                &["expect"],
                "expect -c 'spawn sh -c \"read x; echo got \\$x\"; send \"hi\\r\"; expect \"got hi\"'",
            )
        },
        Row {
            says: "in tmux",
            refused: SOCKETS,
            ..row(
                "tmux_runs_a_window",
                &["tmux"],
                "export TERM=screen; tmux -L t new-session -d 'test -t 1 && echo in tmux >/tmp/said; sleep 5' || exit 1; for i in $(seq 100); do [ -s /tmp/said ] && break; sleep 0.05; done; cat /tmp/said; tmux -L t kill-server",
            )
        },
        // streams by path
        Row {
            says: "seen",
            ..row(
                "tee_writes_to_stderr_by_path",
                &["tee"],
                "echo seen | tee /dev/stderr 2>/tmp/err && echo seen | tee /dev/stderr",
            )
        },
        Row {
            says: "out",
            ..row(
                "a_script_writes_to_stdout_by_path",
                &[],
                "echo out >/dev/stdout; echo err >/dev/stderr; echo more >>/dev/stdout; echo in | cat /dev/stdin",
            )
        },
        Row {
            says: "opened",
            ..row(
                "python_opens_stdout_by_path",
                &["python3"],
                "python3 -c 'open(\"/dev/stdout\", \"w\").write(\"opened\")'",
            )
        },
        // places
        Row {
            says: "kept",
            ..row("var_tmp_takes_files", &["mktemp"], "f=$(mktemp -p /var/tmp) && echo kept >$f && cat $f")
        },
        Row {
            says: "700",
            ..row(
                "the_runtime_folder_is_the_job_s_alone",
                &["stat"],
                "d=/run/user/$(id -u) && echo x >$d/x && stat -c %a $d",
            )
        },
        // names and settings of /etc
        Row { says: "80/tcp", ..row("services_have_their_ports", &["getent"], "getent services http") },
        Row { says: "6", ..row("protocols_have_their_numbers", &["getent"], "getent protocols tcp") },
        Row { says: "localhost", ..row("localhost_has_an_address", &["getent"], "getent hosts localhost") },
        Row {
            files: &[JAVA],
            says: "42",
            complaint: Some("Error"),
            ..row(
                "java_compiles_and_runs",
                &["java", "javac"],
                "javac -d /tmp T.java && java -Xmx256m -cp /tmp T",
            )
        },
        Row {
            complaint: Some("Fontconfig error"),
            ..row("fontconfig_has_its_settings", &["fc-match"], "fc-match sans")
        },
        Row {
            says: "NAME",
            ..row(
                "man_shows_a_page",
                &["man", "groff"],
                "mkdir -p /tmp/m/man1 && printf '.TH X 1\\n.SH NAME\\nx\\n' >/tmp/m/man1/x.1 && MANPAGER=cat man -M /tmp/m x | cat",
            )
        },
        Row { complaint: Some("not found"), ..row("maven_starts", &["mvn"], "mvn -v") },
        Row {
            says: "hello",
            refused: SOCKETS,
            ..row(
                "chromium_renders_a_page",
                &["chromium"],
                "chromium --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --user-data-dir=/tmp/c --dump-dom 'data:text/html,<p>hello</p>'",
            )
        },
        // the machine
        Row { says: "CPU(s)", ..row("lscpu_tells_of_the_processors", &["lscpu"], "lscpu") },
        Row {
            says: "40000",
            refused: &[Refusal {
                on: Where::Docker,
                sign: "not permitted",
                why: "the engine's own filter refuses that personality",
            }],
            ..row(
                "setarch_turns_off_random_addresses",
                &["setarch"],
                "setarch $(uname -m) -R cat /proc/self/personality",
            )
        },
        // tracing
        Row {
            files: &[MAIN],
            says: "main () at main.c:2",
            ..row(
                "gdb_stops_at_a_function",
                &["gdb", "gcc"],
                "gcc -g -o /tmp/m main.c && gdb -nx -batch -ex 'break main' -ex run -ex bt /tmp/m",
            )
        },
        Row {
            refused: &[Refusal {
                on: Where::Everywhere,
                sign: "PTRACE_S",
                why: "strace stops what it traces at its exit, and two that do so to each other can never be killed",
            }],
            ..row(
                "strace_traces_a_command",
                &["strace"],
                "strace -o /tmp/trace true && grep -q exit_group /tmp/trace",
            )
        },
        Row {
            files: &[MAIN],
            says: "ran",
            refused: SHADOW,
            ..row(
                "a_program_with_address_sanitizer_runs",
                &["gcc"],
                "gcc -fsanitize=address -o /tmp/m main.c && /tmp/m",
            )
        },
        Row {
            files: &[LEAK],
            says: "detected memory leaks",
            refused: SHADOW,
            ..row(
                "leak_sanitizer_finds_a_leak",
                &["gcc"],
                "gcc -g -fsanitize=address -o /tmp/l leak.c && ! /tmp/l 2>&1",
            )
        },
        // git
        Row {
            says: "clean: ",
            ..row(
                "git_knows_its_commit",
                &["git"],
                "test -z \"$(git status --porcelain)\" && git log -1 --format='%h %s' | grep -q second && echo clean: $(git describe --always --dirty)",
            )
        },
        Row {
            says: "-dirty",
            ..row(
                "git_sees_what_the_job_changes",
                &["git"],
                "echo more >>README.md && git diff | grep -q '^+more' && git describe --always --dirty && git checkout -q README.md && test -z \"$(git status --porcelain)\"",
            )
        },
        Row {
            says: "1",
            ..row(
                "git_shows_one_commit_and_commits_another",
                &["git"],
                "git rev-list --count HEAD && git -c user.name=j -c user.email=j@example.com commit -q --allow-empty -m mine && test $(git rev-list --count HEAD) = 2",
            )
        },
        // servers on the loopback
        Row {
            files: &[SERVER],
            says: "sample",
            refused: SOCKETS,
            ..row("python_serves_on_localhost", &["python3"], "python3 server.py")
        },
        Row {
            files: &[NODE_SERVER],
            says: "served",
            refused: SOCKETS,
            ..row("node_serves_on_localhost", &["node"], "node server.js")
        },
        Row {
            files: &[POOL],
            says: "[1, 4, 9]",
            ..row("python_shares_work_among_processes", &["python3"], "python3 pool.py")
        },
    ]
}
