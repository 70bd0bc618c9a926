//! What a command is given: its words, its environment, its folder, its descriptors. No shell, nothing inherited.

use std::collections::BTreeMap;

use coinop::sandbox::{Command, Error, Exit, Sandbox};

use crate::case::cases;
use crate::fixtures::Fixture;
use crate::running::{run, sh, words};

cases!(
    everywhere: [
        a_command_s_folder_outside_of_the_workspace_is_refused,
        a_name_that_cannot_name_a_variable_is_refused,
    ],
    programs: [
        no_shell_is_implied,
        words_arrive_byte_for_byte,
        a_name_is_looked_up_in_the_given_path,
        the_environment_is_only_what_was_given,
        values_arrive_byte_for_byte,
        what_the_order_gives_outweighs_the_defaults,
        the_defaults_are_of_use,
        a_command_begins_in_the_workspace,
        a_command_s_folder_may_be_any_of_the_workspace,
        a_command_s_folder_is_not_reached_through_a_link,
        a_command_s_folder_that_is_not_there_starts_nothing,
        a_command_starts_with_three_descriptors_and_no_terminal,
        a_pipe_into_a_program_that_stops_reading_ends_quietly,
        a_long_command_line_arrives_whole,
        a_command_line_beyond_all_bounds_is_refused_and_the_sandbox_goes_on,
    ],
);

async fn no_shell_is_implied(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("a-file", b"").await.unwrap();
    let command = words(["echo", "$HOME", "*", ";", "~", "`id`", "|", "&&", "$(id)"]);
    assert_eq!(run(&*sandbox, command).await.ok(), "$HOME * ; ~ `id` | && $(id)\n");
}

async fn words_arrive_byte_for_byte(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let given =
        ["a b", "", "line\nbreak", "\t", "'quoted\"", "\\", "--", "-n", "grüße €", "\u{1f980}", "=", ""];
    let mut command = words(["sh", "-c", "for a; do printf '<%s>' \"$a\"; done", "sh"]);
    command.argv.extend(given.map(str::to_owned));
    let expected: String = given.iter().map(|word| format!("<{word}>")).collect();
    assert_eq!(run(&*sandbox, command).await.ok(), expected);
}

fn with_env<const N: usize>(command: Command, env: [(&str, &str); N]) -> Command {
    let env = env.map(|(name, value)| (name.to_owned(), value.to_owned()));
    Command { env: BTreeMap::from(env), ..command }
}

async fn a_name_is_looked_up_in_the_given_path(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "mkdir bin; printf '#!/bin/sh\\necho mine\\n' > bin/own; chmod +x bin/own").await.ok();
    let command = with_env(words(["own"]), [("PATH", "/nowhere:/workspace/bin")]);
    assert_eq!(run(&*sandbox, command).await.ok(), "mine\n");
    assert_eq!(run(&*sandbox, words(["own"])).await.exit, Some(Exit::NotStarted { errno: 2 }));
}

/// The names and values that a command finds.
async fn environment(sandbox: &dyn Sandbox, command: Command) -> BTreeMap<String, String> {
    let said = run(sandbox, command).await.ok();
    said.lines().filter_map(|line| line.split_once('=')).map(|(n, v)| (n.into(), v.into())).collect()
}

async fn the_environment_is_only_what_was_given(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let found = environment(&*sandbox, with_env(words(["env"]), [("GIVEN", "1 = 2")])).await;
    assert_eq!(found.keys().collect::<Vec<_>>(), ["GIVEN", "HOME", "PATH", "TMPDIR"]);
    assert_eq!(found["GIVEN"], "1 = 2");
}

async fn values_arrive_byte_for_byte(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let value = "a b\n'\"\\$HOME=ü\u{1f980}\t";
    let command = with_env(
        words(["sh", "-c", "printf '<%s><%s>' \"$ODD\" \"${EMPTY-unset}\""]),
        [("ODD", value), ("EMPTY", "")],
    );
    assert_eq!(run(&*sandbox, command).await.ok(), format!("<{value}><>"));
}

async fn what_the_order_gives_outweighs_the_defaults(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let path = sh(&*sandbox, "echo $PATH").await.ok();
    let given = [("HOME", "/workspace"), ("TMPDIR", "/workspace"), ("PATH", &format!("{}:/x", path.trim()))];
    let found = environment(&*sandbox, with_env(words(["env"]), given)).await;
    assert_eq!((found["HOME"].as_str(), found["TMPDIR"].as_str()), ("/workspace", "/workspace"));
    assert!(found["PATH"].ends_with(":/x"), "{found:?}");
    assert_eq!(found.len(), 3, "{found:?}");
}

async fn the_defaults_are_of_use(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let script = "cd \"$HOME\" && echo h > h && cd \"$TMPDIR\" && echo t > t && command -v cat >/dev/null && \
                  cat \"$HOME/h\" \"$TMPDIR/t\"";
    assert_eq!(sh(&*sandbox, script).await.ok(), "h\nt\n");
}

fn at(cwd: &str) -> Command {
    Command { cwd: cwd.into(), ..words(["pwd"]) }
}

async fn a_command_begins_in_the_workspace(on: &Fixture) {
    let sandbox = on.sandbox().await;
    assert_eq!(run(&*sandbox, words(["pwd"])).await.ok(), "/workspace\n");
}

async fn a_command_s_folder_may_be_any_of_the_workspace(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "mkdir -p 'a/b c'").await.ok();
    for (cwd, found) in [
        ("a", "/workspace/a\n"),
        ("a/b c", "/workspace/a/b c\n"),
        ("./a", "/workspace/a\n"),
        ("/workspace/a", "/workspace/a\n"),
        ("/workspace", "/workspace\n"),
    ] {
        assert_eq!(run(&*sandbox, at(cwd)).await.ok(), found, "{cwd}");
    }
}

async fn a_command_s_folder_outside_of_the_workspace_is_refused(on: &Fixture) {
    let sandbox = on.sandbox().await;
    for bad in ["..", "/", "/etc", "a/../..", "../workspace", "/workspace/..", "/workspaces", "/job", "/tmp"]
    {
        let started = sandbox.exec(at(bad)).await.map(|_| "a process");
        assert!(matches!(started, Err(Error::BadPath(_))), "{bad}: {started:?}");
    }
}

async fn a_command_s_folder_is_not_reached_through_a_link(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sh(&*sandbox, "ln -s /etc out; ln -s ../tmp up; mkdir a; ln -s / a/root").await.ok();
    for bad in ["out", "up", "a/root", "a/root/etc"] {
        match sandbox.exec(at(bad)).await {
            Err(Error::BadPath(_)) => {}
            Err(other) => panic!("{bad}: {other}"),
            Ok(process) => {
                let ran = crate::running::collect(process).await;
                let refused = matches!(ran.exit, Some(Exit::NotStarted { .. }));
                assert!(refused && ran.out.is_empty(), "{bad}: {ran:?}");
            }
        }
    }
}

async fn a_command_s_folder_that_is_not_there_starts_nothing(on: &Fixture) {
    let sandbox = on.sandbox().await;
    sandbox.write_file("plain", b"").await.unwrap();
    for (bad, errno) in [("nowhere", 2), ("plain", 20)] {
        assert_eq!(run(&*sandbox, at(bad)).await.exit, Some(Exit::NotStarted { errno }), "{bad}");
    }
}

async fn a_name_that_cannot_name_a_variable_is_refused(on: &Fixture) {
    let sandbox = on.sandbox().await;
    for name in ["", "A=B", "="] {
        let started = sandbox.exec(with_env(words(["env"]), [(name, "x")])).await.map(|_| "a process");
        assert!(matches!(started, Err(Error::BadPolicy(_))), "{name:?}: {started:?}");
    }
}

async fn a_command_starts_with_three_descriptors_and_no_terminal(on: &Fixture) {
    let sandbox = on.sandbox().await;
    // `ls` itself holds one more: the folder that it lists.
    let open = run(&*sandbox, words(["ls", "/proc/self/fd"])).await.ok();
    assert_eq!(open, "0\n1\n2\n3\n");
    let terminal = sh(&*sandbox, "true < /dev/tty && echo TERMINAL").await;
    assert!(!terminal.out.contains("TERMINAL") && !terminal.err.is_empty(), "{terminal:?}");
    // Of its own session, so that a signal to it meets nobody else; and no signal blocked or ignored.
    let alone =
        run(&*sandbox, words(["sh", "-c", "read -r stat < /proc/$$/stat; echo $$ ${stat##*)}"])).await.ok();
    let fields: Vec<&str> = alone.split_whitespace().collect();
    assert_eq!((fields[0], fields[0]), (fields[3], fields[4]), "group and session of {alone}");
    let status = run(&*sandbox, words(["cat", "/proc/self/status"])).await.ok();
    for mask in ["SigBlk:\t", "SigIgn:\t"] {
        let found = status.lines().find_map(|line| line.strip_prefix(mask)).unwrap();
        // The first 31; the others have no meaning of their own.
        assert_eq!(u64::from_str_radix(found, 16).unwrap() & 0x7fff_ffff, 0, "{mask}{found}");
    }
}

async fn a_pipe_into_a_program_that_stops_reading_ends_quietly(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let ran = sh(&*sandbox, "yes | head -n 1").await;
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("y\n", ""));
    assert_eq!(ran.exit, Some(Exit::Code { code: 0 }));
}

async fn a_long_command_line_arrives_whole(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let mut command = words(["sh", "-c", "for a; do printf '%s' \"$a\"; done | wc -c", "sh"]);
    command.argv.extend((0..8).map(|n| n.to_string().repeat(8000)));
    assert_eq!(run(&*sandbox, command).await.number(), 64_000);
}

/// More than any Linux takes (6 MiB in all, 128 KiB a word).
async fn a_command_line_beyond_all_bounds_is_refused_and_the_sandbox_goes_on(on: &Fixture) {
    let sandbox = on.sandbox().await;
    let many = vec!["x".repeat(100_000); 80];
    for long in [many, vec!["x".repeat(200_000)]] {
        let mut command = words(["true"]);
        command.argv.extend(long);
        match sandbox.exec(command).await {
            Err(Error::TooLarge { .. }) => {}
            Err(other) => panic!("{other}"),
            Ok(process) => {
                let exit = crate::running::collect(process).await.exit;
                assert_eq!(exit, Some(Exit::NotStarted { errno: 7 }));
            }
        }
        assert_eq!(sh(&*sandbox, "echo on").await.ok(), "on\n");
    }
}
