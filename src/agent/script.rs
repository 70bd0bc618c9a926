//! The script agent: commands in order through `sh -c`, until one fails. It collects what they print and
//! how they end; what becomes of it (report, patch, text) is `job`'s business.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::{CommandRun, Error, Feed, Output, Stream, Task, Work};
use crate::sandbox::{Command, Event, Exit, Sandbox};

/// Puts the inputs under `/job`, runs the commands, and says what came of them.
///
/// # Errors
/// `BadOrder` when the order cannot be expressed as commands; `Sandbox` when the sandbox failed, which is
/// never a success however much was printed before.
pub async fn run(sandbox: &dyn Sandbox, task: Task<'_>) -> Result<Work, Error> {
    let cwd = working_folder(task.order.workdir.as_deref())?;
    let env = environment(&task.order.env)?;
    give_inputs(sandbox, task).await?;
    let own = &task.job_type.manifest.script.commands;
    let commands = if own.is_empty() { &task.order.commands } else { own };
    let mut work = Work::default();
    for command in commands {
        let started = Instant::now();
        task.feed.push(format!("$ {command}\n").as_bytes());
        let (exit, mut output) = run_one(sandbox, command, &cwd, &env, Some(task.feed)).await?;
        if let Exit::NotStarted { errno } = exit {
            output.push(Stream::Stderr, what_is_missing(sandbox, &cwd, &env, errno).await?.as_bytes());
        }
        work.commands.push(CommandRun {
            command: command.clone(),
            exit,
            duration: started.elapsed(),
            output,
        });
        if exit != (Exit::Code { code: 0 }) {
            break;
        }
    }
    Ok(work)
}

async fn run_one(
    sandbox: &dyn Sandbox,
    command: &str,
    cwd: &Path,
    env: &BTreeMap<String, String>,
    feed: Option<&Feed<'_>>,
) -> Result<(Exit, Output), Error> {
    let command = Command {
        argv: vec!["sh".into(), "-c".into(), command.into()],
        cwd: cwd.to_path_buf(),
        env: env.clone(),
        timeout: None,
        stdin: false,
    };
    let mut process = sandbox.exec(command).await?;
    let mut output = Output::default();
    while let Some(event) = process.events.recv().await {
        if let (Event::Stdout(bytes) | Event::Stderr(bytes), Some(feed)) = (&event, feed) {
            feed.push(bytes);
        }
        match event {
            Event::Stdout(bytes) => output.push(Stream::Stdout, &bytes),
            Event::Stderr(bytes) => output.push(Stream::Stderr, &bytes),
            Event::Exit(exit) => return Ok((exit, output)),
        }
    }
    Err(Error::Sandbox(crate::sandbox::Error::Gone("the output ended without an exit".into())))
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
    if cwd != top && run_one(sandbox, ":", top, env, None).await?.0 == (Exit::Code { code: 0 }) {
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
        sandbox.write_file(&format!("/job/type/{name}"), bytes).await?;
    }
    if let Some(text) = &task.order.task {
        sandbox.write_file("/job/task.txt", text.as_bytes()).await?;
    }
    if !task.order.extra.is_empty() {
        let params = serde_json::to_vec(&task.order.extra).map_err(|e| Error::BadOrder(e.to_string()))?;
        sandbox.write_file("/job/params.json", &params).await?;
    }
    Ok(())
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

    #[test]
    fn a_working_folder_outside_the_workspace_is_refused() {
        for bad in ["..", "/etc", "a/../../b", "a\0b"] {
            assert!(matches!(working_folder(Some(bad)), Err(Error::BadOrder(_))), "{bad:?}");
        }
        assert_eq!(working_folder(Some("./a/b")).unwrap(), PathBuf::from("./a/b"));
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
