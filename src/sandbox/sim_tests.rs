//! What a script may promise to the tests that use it.

use super::*;

fn spec(id: &str) -> Spec {
    let policy = Policy {
        wall_ms: 60_000,
        idle_ms: 60_000,
        memory_bytes: 1 << 28,
        swap_bytes: 0,
        pids: 64,
        cpu_milli: 1000,
        disk_bytes: 1 << 26,
        inodes: 1000,
        open_files: 64,
        output_bytes: 64,
        output_bytes_per_s: 1 << 30,
        network: Network::None,
    };
    Spec { id: id.to_owned(), base: None, policy }
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(str::to_owned).collect()
}

async fn run(sandbox: &dyn Sandbox, line: &str) -> (Vec<u8>, Option<Exit>) {
    let command = Command { argv: words(line), ..Command::default() };
    collect(sandbox.exec(command).await.unwrap()).await
}

async fn collect(mut process: Process) -> (Vec<u8>, Option<Exit>) {
    let (mut output, mut exit) = (Vec::new(), None);
    while let Some(event) = process.events.recv().await {
        match event {
            Event::Stdout(bytes) | Event::Stderr(bytes) => output.extend(bytes),
            Event::Exit(how) => exit = Some(how),
        }
    }
    (output, exit)
}

fn scripted(rules: Vec<Rule>) -> Sim {
    Sim::new(Script { rules, ..Script::default() })
}

#[tokio::test]
async fn a_command_does_what_its_first_matching_rule_says() {
    let file = Content::File { bytes: b"x".to_vec(), executable: true };
    let change = Change { path: b"out/a".to_vec(), to: file };
    let sim = scripted(vec![
        Rule::new(
            ["make", "test"],
            vec![
                Step::Stdout(b"ok".to_vec()),
                Step::Change(change.clone()),
                Step::Exit(Exit::Code { code: 3 }),
            ],
        ),
        Rule::new(["make"], vec![]),
    ]);
    let sandbox = sim.create(spec("a")).await.unwrap();
    assert_eq!(run(&*sandbox, "make test all").await, (b"ok".to_vec(), Some(Exit::Code { code: 3 })));
    assert_eq!(run(&*sandbox, "make").await.1, Some(Exit::Code { code: 0 }));
    assert_eq!(run(&*sandbox, "ls").await.1, Some(Exit::NotStarted { errno: 2 }));
    assert_eq!(sandbox.changes(100).await.unwrap(), [change]);
    assert_eq!(sandbox.read_file("out/a", 1).await.unwrap(), b"x");
    assert!(matches!(sandbox.read_file("out/a", 0).await, Err(Error::TooLarge { cap_bytes: 0, .. })));
    assert_eq!(sim.commands().len(), 3);
    sandbox.destroy().await.unwrap();
    assert_eq!((sim.created(), sim.living()), (1, 0));
}

#[tokio::test]
async fn a_sandbox_that_dies_gives_no_exit_and_takes_no_more_commands() {
    let sim = scripted(vec![Rule::new([""; 0], vec![Step::Stdout(b"half".to_vec()), Step::Die])]);
    let sandbox = sim.create(spec("a")).await.unwrap();
    assert_eq!(run(&*sandbox, "x").await, (b"half".to_vec(), None));
    assert!(matches!(sandbox.exec(Command::default()).await, Err(Error::Gone(_))));
}

#[tokio::test]
async fn limits_end_a_command_by_their_name() {
    let sim = scripted(vec![
        Rule::new(["flood"], vec![Step::Stdout(vec![b'x'; 65])]),
        Rule::new(["hog"], vec![Step::Exceed(Limit::Memory)]),
        Rule::new(["sleep"], vec![Step::Wait(Duration::from_secs(3600))]),
    ]);
    let limit = |limit| Some(Exit::Limit { limit });
    let sandbox = sim.create(spec("a")).await.unwrap();
    assert_eq!(run(&*sandbox, "flood").await, (vec![b'x'; 64], limit(Limit::Output)));
    let sandbox = sim.create(spec("b")).await.unwrap();
    assert_eq!(run(&*sandbox, "hog").await.1, limit(Limit::Memory));
    let mut short = spec("c");
    short.policy.wall_ms = 20;
    let sandbox = sim.create(short).await.unwrap();
    assert_eq!(run(&*sandbox, "sleep").await.1, limit(Limit::Wall));
}

#[tokio::test]
async fn a_command_times_out_and_the_sandbox_lives_on() {
    let sim = scripted(vec![
        Rule::new(["sleep"], vec![Step::Wait(Duration::from_secs(3600))]),
        Rule::new(["cat"], vec![Step::Echo]),
    ]);
    let sandbox = sim.create(spec("a")).await.unwrap();
    let command =
        Command { argv: words("sleep"), timeout: Some(Duration::from_millis(10)), ..Command::default() };
    assert_eq!(collect(sandbox.exec(command).await.unwrap()).await.1, Some(Exit::Timeout));
    let command = Command { argv: words("cat"), stdin: true, ..Command::default() };
    let mut process = sandbox.exec(command).await.unwrap();
    let stdin = process.stdin.take().unwrap();
    stdin.send(b"hello".to_vec()).await.unwrap();
    drop(stdin);
    assert_eq!(collect(process).await, (b"hello".to_vec(), Some(Exit::Code { code: 0 })));
}

#[tokio::test]
async fn create_fails_as_scripted() {
    let sim = Sim::new(Script { create: Some(CreateFault::Host(1)), leftovers: 2, ..Script::default() });
    assert!(matches!(sim.create(spec("a")).await, Err(Error::Host { doing: "create", .. })));
    assert!(sim.create(spec("a")).await.is_ok());
    sim.rescript(|script| script.create = Some(CreateFault::Unenforceable("pids")));
    assert!(matches!(sim.create(spec("b")).await, Err(Error::Unenforceable { clause: "pids", .. })));
    assert_eq!((sim.reap().await.unwrap(), sim.reap().await.unwrap()), (2, 0));
}

#[tokio::test]
async fn a_dropped_sandbox_no_longer_lives() {
    let sim = scripted(vec![]);
    drop(sim.create(spec("a")).await.unwrap());
    assert_eq!(sim.living(), 0);
}
