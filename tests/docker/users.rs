//! Whose a container is: a uid of its own on the whole engine, given back with it, and what the job sees of that.

use std::collections::BTreeSet;

use coinop::sandbox::docker::{Docker, Options};
use coinop::sandbox::{Backend, Error, Sandbox, Spec};

use crate::common::{IMAGE, OK, backend, containers, name, policy, sandbox, sh, soon};
use crate::skip::skip;

/// Ranges of these tests alone, one for each.
const FIRST: u32 = 1_877_100_000;

async fn with_uids(host: &str, node: &str, first: u32, uids: u32) -> Docker {
    let host = Some(host.to_owned());
    let options = Options { host, first_uid: Some(first), uids, ..Options::new(IMAGE, node) };
    Docker::connect(options).await.unwrap()
}

async fn made(backend: &Docker) -> Result<Box<dyn Sandbox>, Error> {
    soon("a sandbox", backend.create(Spec { id: "t".to_owned(), base: None, policy: policy() })).await
}

async fn ids(sandbox: &dyn Sandbox) -> (u32, u32) {
    let (out, exit) = sh(sandbox, "id -u; id -g").await;
    assert_eq!(exit, OK);
    let ids: Vec<u32> = out.lines().map(|line| line.parse().unwrap()).collect();
    (ids[0], ids[1])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_container_of_an_engine_has_a_uid_of_its_own_whichever_node_made_it() {
    let host = engine!();
    let (one, other) = (name("uidone"), name("uidother"));
    let nodes = [with_uids(&host, &one, FIRST, 6).await, with_uids(&host, &other, FIRST, 6).await];
    let mut all = Vec::new();
    for n in 0..6 {
        all.push(made(&nodes[n % 2]).await.unwrap());
    }
    let mut uids = BTreeSet::new();
    for sandbox in &all {
        let (uid, gid) = ids(&**sandbox).await;
        assert!((FIRST..FIRST + 6).contains(&uid) && gid == uid, "{uid}:{gid}");
        uids.insert(uid);
    }
    assert_eq!(uids.len(), 6, "{uids:?}");
    for node in &nodes {
        let why = made(node).await.err().unwrap();
        assert!(matches!(why, Error::Full { what: "uid", all: 6, .. }), "{why}");
    }
    // Whose name was taken is alive, and whoever asked for it has left nothing.
    assert_eq!((containers(&host, &one).len(), containers(&host, &other).len()), (3, 3));
    for sandbox in &all {
        assert_eq!(sh(&**sandbox, "echo on").await, ("on\n".to_owned(), OK));
    }
    // What one gives back the other may have.
    let (freed, _) = ids(&*all[0]).await;
    all.remove(0).destroy().await.unwrap();
    let next = made(&nodes[1]).await.unwrap();
    assert_eq!(ids(&*next).await.0, freed);
    for sandbox in all.into_iter().chain([next]) {
        sandbox.destroy().await.unwrap();
    }
}

#[tokio::test]
async fn a_uid_is_given_back_when_its_container_is_gone_and_not_before() {
    let host = engine!();
    let node = name("uidback");
    let backend = with_uids(&host, &node, FIRST + 100, 1).await;
    let first = made(&backend).await.unwrap();
    drop(first);
    // Until it is removed there is no uid for another.
    let mut refused = 0;
    let again = async {
        loop {
            match made(&backend).await {
                Ok(next) => break next,
                Err(Error::Full { all: 1, .. }) => refused += 1,
                Err(other) => panic!("{other}"),
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    let next = soon("the uid's next container", again).await;
    assert_eq!(containers(&host, &node).len(), 1, "the earlier one is gone");
    eprintln!("refused {refused} times before the earlier one was gone");
    next.destroy().await.unwrap();
}

#[tokio::test]
async fn the_workspace_the_home_and_tmp_belong_to_the_job_s_user_alone() {
    let host = engine!();
    let backend = backend(&host, &name("owner"), IMAGE, 0).await.unwrap();
    let sandbox = sandbox(&backend).await;
    let (uid, gid) = ids(&*sandbox).await;
    let (out, exit) =
        sh(&*sandbox, "stat -c '%n %u:%g %a' /workspace /home/job /tmp /dev/shm; stat -c '%u' /job").await;
    let of = |place: &str, mode: &str| format!("{place} {uid}:{gid} {mode}\n");
    let expected = [
        of("/workspace", "755"),
        of("/home/job", "755"),
        of("/tmp", "1777"),
        of("/dev/shm", "1777"),
        "0\n".to_owned(),
    ];
    assert_eq!((out, exit), (expected.concat(), OK));
    sandbox.destroy().await.unwrap();
}

/// What asks for the user's name finds one, and git takes the workspace for his own without being told to.
const NAMES: &str = r#"
set -eu
export GIT_CONFIG_NOSYSTEM=1
[ "$(id -un):$(id -gn):$(whoami):$HOME" = job:job:job:/home/job ]
[ "$(node -p 'const u = os.userInfo(); [u.username, u.homedir, u.uid == process.getuid()].join()')" = job,/home/job,true ]
[ "$(python3 -c 'import getpass, os; print(getpass.getuser(), os.path.expanduser("~job"))')" = 'job /home/job' ]
git init -q . && git status --short
git -c user.name=a -c user.email=a@b commit -q --allow-empty -m one
git clone -q . /tmp/copy && [ "$(git -C /tmp/copy log --format=%s)" = one ]
[ "$(cd && pwd)" = /home/job ] && touch ~/.x /tmp/x
ls -ld /workspace | grep -q ' job job '
echo named
"#;

#[tokio::test]
async fn in_the_agent_image_a_job_is_called_job_whatever_its_uid() {
    let test = "in_the_agent_image_a_job_is_called_job_whatever_its_uid";
    let host = engine!();
    let Ok(backend) = backend(&host, &name("named"), "coinop-test:agent", 0).await else {
        return skip(test, "there is no coinop-test:agent");
    };
    let mut uids = BTreeSet::new();
    for _ in 0..2 {
        let sandbox = sandbox(&backend).await;
        let (out, exit) =
            sh(&*sandbox, &format!("exec 2>&1; bash -xc '{}'", NAMES.replace('\'', r"'\''"))).await;
        assert!(exit == OK && out.ends_with("named\n"), "{exit:?}: {out}");
        uids.insert(ids(&*sandbox).await.0);
        sandbox.destroy().await.unwrap();
    }
    assert_eq!(uids.len(), 2, "{uids:?}");
}
