//! The script agent: commands in order through `sh -c`, until one fails. It collects what they print and
//! how they end; what becomes of it (report, patch, text) is `job`'s business.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::{CommandRun, Error, Feed, Output, Stream, Task, Work};
use crate::sandbox::{self, Command, Event, Exit, Sandbox};

/// Puts the inputs under `/job` and runs the commands. `work` tells what came of them, also of those before an error.
///
/// # Errors
/// `BadOrder` when the order cannot be expressed as commands; `Sandbox` when the sandbox failed, which is
/// never a success however much was printed before.
pub async fn run(sandbox: &dyn Sandbox, task: Task<'_>, work: &mut Work) -> Result<(), Error> {
    let cwd = working_folder(task.order.workdir.as_deref())?;
    let env = environment(&task.order.env)?;
    give_inputs(sandbox, task).await?;
    let own = &task.job_type.manifest.script.commands;
    let commands = if own.is_empty() { &task.order.commands } else { own };
    for command in commands {
        let run = Command {
            argv: vec!["sh".into(), "-c".into(), command.clone()],
            cwd: cwd.clone(),
            env: env.clone(),
            keep_background: task.order.keep_background,
            ..Command::default()
        };
        let started = Instant::now();
        task.feed.push(format!("$ {command}\n").as_bytes());
        let (mut output, mut heard) = (Output::default(), started);
        let exit = match run_one(sandbox, run, &mut output, &mut heard, Some(task.feed)).await {
            Ok(exit) => exit,
            // A limit of the whole sandbox may end it before a command has started, or between its end and its exit.
            Err(error) => Exit::Limit { limit: sandbox.limit().ok_or(error)? },
        };
        if let Exit::NotStarted { errno } = exit {
            output.push(Stream::Stderr, what_is_missing(sandbox, &cwd, &env, errno).await?.as_bytes());
        }
        work.commands.push(CommandRun {
            command: command.clone(),
            exit,
            duration: started.elapsed(),
            silent: heard.elapsed(),
            output,
        });
        if exit != (Exit::Code { code: 0 }) {
            break;
        }
    }
    Ok(())
}

/// `heard` becomes the moment at which it last printed something.
async fn run_one(
    sandbox: &dyn Sandbox,
    command: Command,
    output: &mut Output,
    heard: &mut Instant,
    feed: Option<&Feed<'_>>,
) -> Result<Exit, Error> {
    let mut process = sandbox.exec(command).await?;
    while let Some(event) = process.events.recv().await {
        if let (Event::Stdout(bytes) | Event::Stderr(bytes), Some(feed)) = (&event, feed) {
            feed.push(bytes);
        }
        match event {
            Event::Stdout(bytes) => output.push(Stream::Stdout, &bytes),
            Event::Stderr(bytes) => output.push(Stream::Stderr, &bytes),
            Event::Exit(exit) => return Ok(exit),
        }
        *heard = Instant::now();
    }
    Err(Error::Sandbox(sandbox::Error::Gone("the output ended without an exit".into())))
}

/// Why a command could not be started, for its stderr. One errno stands for the folder and for the shell: the shell is
/// tried again in a folder that is there.
async fn what_is_missing(
    sandbox: &dyn Sandbox,
    cwd: &Path,
    env: &BTreeMap<String, String>,
    errno: i32,
) -> Result<String, Error> {
    let reason = nix::errno::Errno::from_raw(errno).desc();
    let top = Path::new(".");
    let shell = Command {
        argv: vec!["sh".into(), "-c".into(), ":".into()],
        cwd: top.to_path_buf(),
        env: env.clone(),
        ..Command::default()
    };
    let starts = run_one(sandbox, shell, &mut Output::default(), &mut Instant::now(), None).await?;
    if cwd != top && starts == (Exit::Code { code: 0 }) {
        return Ok(format!("coinop: workdir {:?} cannot be entered: {reason}\n", cwd.display().to_string()));
    }
    let path = match env.get("PATH") {
        Some(path) => format!("in PATH={path:?}"),
        None => "in the usual PATH".to_owned(),
    };
    Ok(format!("coinop: no shell (sh) could be started {path}: {reason}\n"))
}

async fn give_inputs(sandbox: &dyn Sandbox, task: Task<'_>) -> Result<(), Error> {
    for (name, bytes) in &task.job_type.files {
        give(sandbox, &format!("/job/type/{name}"), bytes).await?;
    }
    if let Some(text) = &task.order.task {
        give(sandbox, "/job/task.txt", text.as_bytes()).await?;
    }
    if !task.order.extra.is_empty() {
        let params = serde_json::to_vec(&task.order.extra).map_err(|e| Error::BadOrder(e.to_string()))?;
        give(sandbox, "/job/params.json", &params).await?;
    }
    Ok(())
}

async fn give(sandbox: &dyn Sandbox, path: &str, bytes: &[u8]) -> Result<(), Error> {
    sandbox.write_file(path, bytes).await.map_err(|error| match error {
        // The sandbox's own disk, not the host's.
        sandbox::Error::Host { ref source, .. } if source.kind() == ErrorKind::StorageFull => {
            Error::NoRoom(path.to_owned())
        }
        error => error.into(),
    })
}

fn working_folder(workdir: Option<&str>) -> Result<PathBuf, Error> {
    let path = PathBuf::from(workdir.unwrap_or("."));
    let inside = path.components().all(|c| {
        use std::path::Component;
        matches!(c, Component::Normal(_) | Component::CurDir)
    });
    if inside && !path.as_os_str().as_encoded_bytes().contains(&0) {
        Ok(path)
    } else {
        Err(Error::BadOrder(format!("workdir {} leaves the workspace", path.display())))
    }
}

fn environment(asked: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>, Error> {
    for (key, value) in asked {
        let plain = key.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !plain || value.contains('\0') {
            return Err(Error::BadOrder(format!("env_{key} is not a usable environment variable")));
        }
    }
    Ok(asked.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::Live;
    use crate::market::Catalog;
    use crate::protocol::Order;
    use crate::sandbox::sim::{Rule, Script, Sim, Step};
    use crate::sandbox::{Backend, Limit, Policy, Spec};

    #[tokio::test]
    async fn a_sandbox_that_a_limit_ended_between_commands_tells_the_limit_and_the_work_before() {
        let said = vec![Step::Stdout(b"out".to_vec()), Step::Exceed(Limit::Wall)];
        let rules = vec![Rule::new(["sh", "-c", "last"], said), Rule::new(["sh"], Vec::new())];
        let sim = Sim::new(Script { rules, ..Script::default() });
        let catalog = Catalog::built_in().unwrap();
        let job_type = catalog.for_kind(5000).unwrap();
        let policy = Policy { wall_ms: 1, ..job_type.manifest.limits.policy() };
        let order = |commands: &[&str]| Order {
            commands: commands.iter().map(|command| (*command).to_owned()).collect(),
            ..Order::default()
        };
        // Over before it began.
        let sandbox = sim.create(Spec { id: "a".into(), base: None, policy: policy.clone() }).await.unwrap();
        while sandbox.limit().is_none() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        let (mut work, never, live) = (Work::default(), order(&["never"]), Live::default());
        let feed = live.begin("job");
        run(&*sandbox, Task { job_type, order: &never, feed: &feed }, &mut work).await.unwrap();
        assert_eq!(
            work.limit().map(|(limit, run)| (limit, run.command.as_str())),
            Some((Limit::Wall, "never"))
        );
        // In the middle.
        let policy = Policy { wall_ms: 60_000, ..policy };
        let sandbox = sim.create(Spec { id: "b".into(), base: None, policy }).await.unwrap();
        let (mut work, two) = (Work::default(), order(&["first", "last", "never"]));
        run(&*sandbox, Task { job_type, order: &two, feed: &feed }, &mut work).await.unwrap();
        let (limit, last) = work.limit().unwrap();
        assert_eq!((limit, last.command.as_str(), work.commands.len()), (Limit::Wall, "last", 2));
        assert_eq!(last.printed(Stream::Stdout), b"out");
    }

    #[test]
    fn a_working_folder_outside_the_workspace_is_refused() {
        for bad in ["..", "/etc", "a/../../b", "a\0b"] {
            assert!(matches!(working_folder(Some(bad)), Err(Error::BadOrder(_))), "{bad:?}");
        }
        assert_eq!(working_folder(Some("./a/b")).unwrap(), PathBuf::from("./a/b"));
    }

    #[tokio::test]
    async fn a_missing_workdir_and_a_missing_shell_are_told_apart() {
        let sim = Sim::new(Script::default());
        let shell = Rule::new(["sh", "-c", ":"], vec![Step::Exit(Exit::Code { code: 0 })]);
        let env = BTreeMap::from([("PATH".to_string(), "/none".to_string())]);
        for (rules, folder, said) in [
            (vec![shell], "gone", "coinop: workdir \"gone\" cannot be entered: No such file or directory\n"),
            (
                vec![],
                "gone",
                "coinop: no shell (sh) could be started in PATH=\"/none\": No such file or directory\n",
            ),
            (
                vec![],
                ".",
                "coinop: no shell (sh) could be started in PATH=\"/none\": No such file or directory\n",
            ),
        ] {
            sim.rescript(|script| script.rules = rules);
            let policy = Catalog::built_in().unwrap().for_kind(5000).unwrap().manifest.limits.policy();
            let sandbox = sim.create(Spec { id: "a".to_owned(), base: None, policy }).await.unwrap();
            assert_eq!(what_is_missing(&*sandbox, Path::new(folder), &env, 2).await.unwrap(), said);
        }
    }

    #[test]
    fn an_environment_name_that_a_shell_could_not_set_is_refused() {
        let env = |k: &str| environment(&BTreeMap::from([(k.to_string(), "v".to_string())]));
        assert!(env("A_1").is_ok());
        for bad in ["", "1A", "A=B", "A B"] {
            assert!(matches!(env(bad), Err(Error::BadOrder(_))), "{bad:?}");
        }
    }
}
