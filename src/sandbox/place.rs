//! Reads the paths of the trait's methods: which of a sandbox's folders is meant, and what below it.

use std::path::{Component, Path, PathBuf};

use super::{Command, Error};

/// Which of a sandbox's folders a path of the trait means, and the rest of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    Workspace(PathBuf),
    Job(PathBuf),
}

/// Reads a path of the trait: `/workspace/…`, `/job/…`, or relative to the workspace.
pub fn place(path: &str) -> Result<Place, Error> {
    let bad = || Error::BadPath(path.to_owned());
    let given = Path::new(path);
    let (make, rest): (fn(PathBuf) -> Place, &Path) = if let Ok(rest) = given.strip_prefix("/workspace") {
        (Place::Workspace, rest)
    } else if let Ok(rest) = given.strip_prefix("/job") {
        (Place::Job, rest)
    } else {
        (Place::Workspace, given)
    };
    let plain = rest.components().all(|part| matches!(part, Component::Normal(_)));
    if !plain || rest.as_os_str().is_empty() || path.contains('\0') || path.ends_with('/') {
        return Err(bad());
    }
    Ok(make(rest.to_owned()))
}

/// The folder that a command starts in, relative to the workspace, once what is asked of it can be asked at all.
///
/// # Errors
/// `BadPath` for a folder outside, `BadPolicy` for what is no name of a variable.
pub fn folder(command: &Command) -> Result<String, Error> {
    let cwd = command.cwd.strip_prefix("/workspace").unwrap_or(&command.cwd);
    let inside = cwd.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    let Some(cwd) = cwd.to_str().filter(|_| inside) else {
        return Err(Error::BadPath(command.cwd.display().to_string()));
    };
    if let Some(name) = command.env.keys().find(|name| name.is_empty() || name.contains('=')) {
        return Err(Error::BadPolicy(format!("{name:?} cannot name an environment variable")));
    }
    Ok(cwd.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_starts_inside_and_its_variables_have_names() {
        let at = |cwd: &str| folder(&Command { cwd: cwd.into(), ..Command::default() });
        for (cwd, below) in [("", ""), ("a/b", "a/b"), ("/workspace", ""), ("/workspace/a", "a"), (".", ".")]
        {
            assert_eq!(at(cwd).unwrap(), below);
        }
        for cwd in ["..", "a/../b", "/", "/etc", "/workspaces"] {
            assert!(matches!(at(cwd), Err(Error::BadPath(said)) if said == cwd), "{cwd}");
        }
        for name in ["", "a=b"] {
            let env = [(name.to_owned(), String::new())].into();
            let refused = folder(&Command { env, ..Command::default() });
            assert!(matches!(refused, Err(Error::BadPolicy(why)) if why.contains(name)), "{name}");
        }
    }

    #[test]
    fn a_path_is_relative_to_the_workspace_or_names_its_place() {
        assert_eq!(place("a/b").unwrap(), Place::Workspace("a/b".into()));
        assert_eq!(place("/workspace/a").unwrap(), Place::Workspace("a".into()));
        assert_eq!(place("/job/in.json").unwrap(), Place::Job("in.json".into()));
    }

    #[test]
    fn a_path_that_leaves_its_place_is_refused() {
        for path in [
            "",
            "/",
            "../a",
            "a/../../b",
            "/etc/passwd",
            "/workspace",
            "/workspace/../etc",
            "/jobs/a",
            "a\0b",
            "a/",
        ] {
            assert!(matches!(place(path), Err(Error::BadPath(said)) if said == path), "{path:?}");
        }
    }
}
