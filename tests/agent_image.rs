//! The agent image (`container/image/`): its two recipes make the same thing, and what comes out works for a job
//! as the sandbox runs it. How the node uses the image is the Docker backend's business.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};

#[path = "support/engine.rs"]
mod engine;
#[path = "support/skip.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod skip;

/// One of the recipe's files.
fn text(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("container/image").join(name);
    std::fs::read_to_string(path).unwrap()
}

/// The lines that are neither empty nor comments.
fn lines(text: &str) -> Vec<&str> {
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

fn told(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{out}{err}")
}

#[test]
fn both_recipes_of_the_agent_image_read_one_list_of_packages_and_one_last_step() {
    let (dockerfile, script, list) = (text("Dockerfile"), text("build.sh"), text("packages.txt"));
    for (name, recipe) in [("Dockerfile", &dockerfile), ("build.sh", &script)] {
        for shared in ["packages.txt", "setup.sh"] {
            let used = lines(recipe).iter().any(|line| line.contains(shared));
            assert!(used, "{name} does not use {shared}");
        }
    }
    let packages = lines(&list);
    let different: BTreeSet<&str> = packages.iter().copied().collect();
    assert_eq!(different.len(), packages.len(), "a package stands in the list twice");
    for part in ["git", "python3", "nodejs", "gcc", "make"] {
        assert!(different.contains(part), "{part} is missing");
    }
    // Nor does the Dockerfile install anything beside the list.
    let installs = dockerfile.lines().filter(|line| line.contains("apt-get install"));
    for line in installs {
        assert!(line.ends_with("xargs apt-get install -y --no-install-recommends \\"), "{line}");
    }
}

#[test]
fn the_script_gives_its_image_the_settings_of_the_dockerfile() {
    let dockerfile = text("Dockerfile");
    let after = dockerfile.rsplit_once("&& rm -rf /tmp/image\n").unwrap().1;
    let output = Command::new("bash")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("container/image/build.sh"))
        .arg("changes")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", told(&output));
    let changes = String::from_utf8_lossy(&output.stdout);
    assert_eq!(lines(&changes), lines(after));
    for setting in ["USER 1000:1000", "WORKDIR /workspace"] {
        assert!(changes.lines().any(|line| line == setting), "{setting} is missing: {changes}");
    }
}

/// What a job would do with each tool; the last lines look for what must not be there.
const USES: &str = r#"
set -eu
[ "$(id -u):$(id -g):$(pwd)" = 1000:1000:/workspace ]
if touch /usr/x 2>/dev/null; then echo "the root can be written"; exit 1; fi
printf 'int main(void) { return 0; }' >a.c
printf '#include <iostream>\nint main() { std::cout << "said\\n"; }' >b.cc
printf 'all: a b\na: a.c\n\tgcc -o a a.c\nb: b.cc\n\tg++ -o b b.cc\n' >Makefile
make -s && ./a && [ "$(./b)" = said ]
git init -q . && git add a.c && git -c user.name=a -c user.email=a@b commit -qm one
[ "$(git log --format=%s)" = one ]
python -m venv /tmp/venv && /tmp/venv/bin/pip --version >/dev/null
printf 'def test_it():\n    assert 1\n' >test_it.py && python3 -m pytest -q -p no:cacheprovider test_it.py
printf '{"name":"a","scripts":{"test":"node -e 0"}}' >package.json && npm test >/dev/null
[ "$(echo '{"a":1}' | jq .a)" = 1 ] && rg -q main a.c
for gone in /etc/apt/sources.list /etc/machine-id /usr/share/man/man1; do
  if [ -e "$gone" ]; then echo "$gone is there"; exit 1; fi
done
if [ -n "$(find / -xdev -type f -perm /6000 2>/dev/null)" ]; then echo "a program may become another user"; exit 1; fi
echo works
"#;

#[test]
fn the_agent_image_serves_an_ordinary_user_on_a_read_only_root_without_network() {
    const NAME: &str = "the_agent_image_serves_an_ordinary_user_on_a_read_only_root_without_network";
    let Some(host) = engine::host(NAME) else { return };
    let image = engine::get(&host, "/images/coinop-test:agent/json").unwrap();
    if !image.lines().next().is_some_and(|status| status.ends_with("200 OK")) {
        return skip::skip(NAME, "the engine has no coinop-test:agent (`.ci/parts agent-image` makes it)");
    }
    let output = Command::new("docker")
        .args(["--host", &host, "run", "--rm", "--network=none", "--read-only", "--cap-drop=ALL"])
        .args(["--security-opt=no-new-privileges", "--tmpfs=/tmp:exec,mode=1777"])
        .args(["--tmpfs=/workspace:exec,uid=1000,gid=1000", "--tmpfs=/home/job:uid=1000,gid=1000"])
        .args(["--stop-timeout=1", "coinop-test:agent", "timeout", "120", "bash", "-c", USES])
        .output()
        .unwrap();
    assert!(output.status.success() && told(&output).ends_with("works\n"), "{}", told(&output));
}
