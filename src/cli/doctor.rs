//! `coinop doctor`: checks what this machine, the configuration and the sandbox can do, and says how to fix what they
//! cannot. It looks, and changes nothing: the sandbox is tried in a folder of its own.

mod tools;

use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::common::{Common, LOW_SPACE_BYTES, Overrides, block_on, free_space, log_at};
use super::exit::{Exit, Outcome};
use super::output::{self, Cell, Table, Tone};
use super::payment;
use crate::clock;
use crate::config::{Config, Loaded, SandboxChoice};
use crate::control::{self, Ask};
use crate::keys::{self, NodeKey};
use crate::node;
use crate::relay::{Client, Wire};
use crate::sandbox::docker::Docker;
use crate::sandbox::local::{self, Local};
use crate::sandbox::{Backend, Check, selftest};
use crate::store::{self, Store};

const RELAY_PATIENCE: Duration = Duration::from_secs(8);
const WALLET_PATIENCE: Duration = Duration::from_secs(15);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Do not contact the configured relays and the wallet
    #[arg(long)]
    pub offline: bool,
    /// Test every sandbox restriction, as `connect` does when it starts
    #[arg(long)]
    pub sandbox: bool,
    /// Run the usual toolchains of this host (git, Python, Node, Java, compilers, …) in the sandbox
    #[arg(long)]
    pub tools: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Checks of one area.
struct Group {
    name: &'static str,
    checks: Vec<Check>,
}

pub fn run(args: Args, common: &Common) -> Outcome {
    let mut groups = Vec::new();
    match common.loaded(Overrides::default()) {
        Ok(loaded) => {
            // What is wrong is shown as rows; warnings in the log would only repeat it.
            log_at("error");
            groups.push(configuration(&loaded));
            groups.push(data(&loaded.config));
            groups.push(jobs(&loaded.config));
            groups.extend(sandbox(&loaded.config, &args));
            let config = loaded.config;
            block_on(async {
                groups.push(payment(&config, args.offline).await);
                if !args.offline && !config.relays.is_empty() {
                    groups.push(relays(&config).await);
                }
                Ok(Exit::Ok)
            })?;
        }
        Err(failure) => {
            let how = failure.to_string();
            let mend = "correct it; `coinop config default` lists every key";
            groups.push(Group { name: "configuration", checks: vec![bad("file", how, mend)] });
        }
    }
    report(&groups, args.json)
}

fn good(name: &str, how: impl Into<String>) -> Check {
    Check { name: name.into(), ok: true, how: how.into(), mend: None }
}

fn bad(name: &str, how: impl Into<String>, mend: impl Into<String>) -> Check {
    Check { name: name.into(), ok: false, how: how.into(), mend: Some(mend.into()) }
}

fn configuration(loaded: &Loaded) -> Group {
    let file = match &loaded.file {
        Some(file) => good("file", file.display().to_string()),
        None => good("file", "none; using defaults"),
    };
    let config = &loaded.config;
    let relays = match config.relays.len() {
        0 => Check {
            mend: Some(
                "add them to `relays` in the configuration, or give --relay wss://… to connect".into(),
            ),
            ..good("relays", "no relays configured")
        },
        n => good("relays", format!("{n} configured")),
    };
    let lines = node::lines_for_strangers(config).into_iter().map(|cap_msat| Check {
        mend: Some(
            "add customer=KEY to the rule, or name those you serve in admission.allow_customers".into(),
        ),
        ..good("credit", format!("every stranger may owe {} (payment.rules)", output::sats(cap_msat)))
    });
    let checks = [file, relays, key(config)].into_iter().chain(lines).collect();
    Group { name: "configuration", checks }
}

fn key(config: &Config) -> Check {
    let path = config.key_file.display();
    match keys::load(&config.key_file, &keys::password_from_env_or_terminal) {
        Ok(key) => good("key", format!("{} in {path}", key.npub())),
        Err(keys::Error::Missing(_)) => good("key", format!("none yet; made in {path} on first use")),
        Err(error @ keys::Error::LooseMode { .. }) => {
            bad("key", error.to_string(), format!("chmod 600 {path}"))
        }
        Err(error) => bad("key", error.to_string(), "see `coinop keys --help`"),
    }
}

fn data(config: &Config) -> Group {
    let dir = &config.data_dir;
    let mut checks = vec![folder(dir)];
    checks.extend(space(dir));
    match Store::read_only(dir) {
        Ok(store) => {
            let open = store.open_jobs().map_or(0, |jobs| jobs.len());
            checks.push(good(
                "log",
                format!("{} entries, {open} open jobs", output::thousands(store.head().seq)),
            ));
            checks.push(match store.clock_fault(clock::now_ms()) {
                None => good("clock", "agrees with the log"),
                Some(fault) => bad(
                    "clock",
                    fault.to_string(),
                    "set the clock, by NTP if you can, before the node starts",
                ),
            });
        }
        Err(store::Error::Missing { .. }) => checks.push(good("log", "none yet")),
        Err(error) => checks.push(bad("log", error.to_string(), "see docs/store.md")),
    }
    match store::Restored::read(dir) {
        Ok(None) => {}
        Ok(Some(_)) => checks.push(bad(
            "books",
            "restored from a backup; refunds wait for a comparison with the wallet",
            "run `coinop ledger reconcile --book`",
        )),
        Err(error) => checks.push(bad("books", error.to_string(), "see docs/ledger.md")),
    }
    match control::ask(dir, &Ask::Status) {
        Ok(status) => {
            let running = status.pointer("/jobs/running").and_then(serde_json::Value::as_u64).unwrap_or(0);
            checks.push(good("node", format!("running, {running} active jobs")));
            checks.extend(invoices(&status["wallet"]));
        }
        Err(control::Error::NotRunning(_)) => checks.push(good("node", "not running")),
        Err(error) => checks.push(bad("node", error.to_string(), "stop it and start it again")),
    }
    Group { name: "data", checks }
}

/// What a running node hears from its wallet.
fn invoices(wallet: &serde_json::Value) -> Vec<Check> {
    let mut checks = Vec::new();
    if wallet["test_network"] == true {
        checks.push(bad(
            "invoices",
            "the wallet makes invoices for a test network: what customers pay is not bitcoin",
            "set payment.wallet to a wallet for bitcoin, or take the prices away",
        ));
    }
    let unanswered = wallet["unanswered"].as_array().map_or(&[][..], Vec::as_slice);
    if let Some(one) = unanswered.first() {
        let error = one["error"].as_str().unwrap_or_default();
        let how = format!(
            "{} open invoices cannot be looked up; a payment would not be seen: {error}",
            unanswered.len()
        );
        checks.push(bad("invoices", how, "see that the wallet answers; `coinop credits list` names them"));
    }
    checks
}

/// The folder, or the nearest one above it that is there, must take a file of ours.
fn folder(dir: &Path) -> Check {
    use std::os::unix::fs::PermissionsExt;
    let there = dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let shown = dir.display();
    if nix::unistd::access(there, nix::unistd::AccessFlags::W_OK | nix::unistd::AccessFlags::X_OK).is_err() {
        let mend = "name another with --data-dir, or give it to this user";
        return bad("folder", format!("{} cannot be written to", there.display()), mend);
    }
    if there != dir {
        return good("folder", format!("{shown} is made on first use"));
    }
    let mode = std::fs::metadata(dir).map_or(0, |meta| meta.permissions().mode() & 0o777);
    if mode & 0o022 != 0 {
        return bad("folder", format!("{shown} can be written to by others"), format!("chmod 700 {shown}"));
    }
    good("folder", shown.to_string())
}

fn space(dir: &Path) -> Option<Check> {
    let free = free_space(dir)?;
    let how = format!("{} free", output::bytes(free));
    Some(if free < LOW_SPACE_BYTES {
        bad("space", how, "free some space: a full disk stops the node from taking jobs")
    } else {
        good("space", how)
    })
}

fn jobs(config: &Config) -> Group {
    let checks = match node::catalog(config) {
        Ok(catalog) => {
            let row = |t: &std::sync::Arc<crate::market::JobType>| {
                let kinds: Vec<String> = t.manifest.kinds.iter().map(u16::to_string).collect();
                good(&t.manifest.name, format!("kinds {}", kinds.join(", ")))
            };
            let unserved = node::unserved(config).unwrap_or_default().into_iter().map(|name| Check {
                mend: Some("add it to `skills` to serve it".into()),
                ..good(&name, "in jobs_dir, but not in `skills`: not served")
            });
            catalog.types().map(row).chain(unserved).collect()
        }
        Err(error) => {
            vec![bad("catalog", error.to_string(), "correct the file, or `skills` in the configuration")]
        }
    };
    Group { name: "job types", checks }
}

/// What the backend says of itself, and where it is asked for what it does and what runs in it.
fn sandbox(config: &Config, args: &Args) -> Vec<Group> {
    let group = |checks| vec![Group { name: "sandbox", checks }];
    // Not in the data directory: a node may be running there.
    let folder = match tempfile::Builder::new().prefix("coinop-doctor-").tempdir() {
        Ok(folder) => folder,
        Err(error) => {
            return group(vec![bad(
                "backend",
                format!("no temporary folder: {error}"),
                "make room in TMPDIR",
            )]);
        }
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            return group(vec![bad("backend", error.to_string(), "free some of this user's processes")]);
        }
    };
    let backend: Result<Box<dyn Backend>, _> = match config.sandbox {
        SandboxChoice::Docker => {
            let connected = runtime.block_on(Docker::connect(node::docker_options(config, 0)));
            connected.map(|backend| Box::new(backend) as Box<dyn Backend>).map_err(|error| {
                let mend =
                    "start the engine, name it in docker.host or DOCKER_HOST, and an image in docker.image";
                bad("backend", error.to_string(), mend)
            })
        }
        SandboxChoice::Auto | SandboxChoice::Local => {
            // Nor as the node does in one respect: a look moves nobody into another cgroup.
            let options = local::Options { delegate: false, ..local::Options::new(folder.path()) };
            let started = Local::new(options).map(|backend| Box::new(backend) as Box<dyn Backend>);
            started.map_err(|error| bad("backend", error.to_string(), "see docs/security.md"))
        }
    };
    let backend = match backend {
        Ok(backend) => backend,
        Err(check) => return group(vec![check]),
    };
    let mut groups = group(backend_checks(config, &*backend));
    if args.sandbox {
        let tried = runtime.block_on(selftest::run(&*backend, folder.path()));
        let checks = match tried {
            Ok(report) => report.checks,
            Err(error) => vec![bad("sandbox", error.to_string(), "see the rows of the sandbox above")],
        };
        groups.push(Group { name: "self-test", checks });
    }
    if args.tools {
        let checks = runtime.block_on(tools::run(&*backend, &config.limits.policy()));
        groups.push(Group { name: "tools", checks });
    }
    groups
}

fn backend_checks(config: &Config, backend: &dyn Backend) -> Vec<Check> {
    let identity = backend.identity();
    let mut checks = vec![good("backend", format!("{} ({})", identity.backend, identity.image))];
    checks.extend(backend.checks());
    if let Ok(catalog) = node::catalog(config) {
        let (_, cannot) = node::runnable(&catalog, &config.limits.policy(), backend);
        // The backend's own needs stand above already.
        let needs: Vec<String> = checks.iter().map(|check| format!("{}: ", check.name)).collect();
        checks.extend(
            cannot
                .into_iter()
                .filter(|why| !needs.iter().any(|need| why.starts_with(need)))
                .map(|why| bad("job type", why, "fix the check above, or remove the skill")),
        );
    }
    checks
}

/// What each job type costs, and whether the wallet can be used.
async fn payment(config: &Config, offline: bool) -> Group {
    let mut checks = Vec::new();
    // A catalog that cannot be read is told above.
    if let Ok(catalog) = node::catalog(config) {
        let prices = payment::prices(config, &catalog);
        checks.extend(prices.into_iter().map(|(name, price)| good(&format!("price of {name}"), price)));
    }
    checks.extend(match node::open_wallet(config) {
        Ok(None) => vec![good("wallet", "none; credit is what you grant")],
        Err(error) => {
            let mend = "correct payment.wallet, wallet_url or wallet_key_file; see docs/wallets.md";
            vec![bad("wallet", error.to_string(), mend)]
        }
        Ok(Some(wallet)) => {
            let name = wallet.identity();
            let key = good("wallet key", "the key file is read, and only its owner may read it");
            let asked = tokio::time::timeout(WALLET_PATIENCE, payment::wallet_state(&*wallet));
            let mend = "start the wallet, or correct payment.wallet_url and the key; see docs/wallets.md";
            let state = match asked {
                _ if offline => good("wallet", format!("{name}, not asked (--offline)")),
                asked => match asked.await {
                    Ok(Ok(state)) => good("wallet", format!("{name}: {state}")),
                    Ok(Err(error)) => bad("wallet", format!("{name}: {error}"), mend),
                    Err(_) => bad("wallet", format!("{name}: no answer"), mend),
                },
            };
            vec![key, state]
        }
    });
    Group { name: "payment", checks }
}

async fn relays(config: &Config) -> Group {
    let mut checks = Vec::new();
    for relay in &config.relays {
        let keys = NodeKey::ephemeral().keys().clone();
        let one = std::slice::from_ref(relay);
        let met = Client::connect(one, Some(keys), true, Wire::default(), RELAY_PATIENCE).await;
        checks.push(match met {
            Ok(client) => {
                client.close().await;
                good(relay, "answers")
            }
            Err(error) => {
                bad(relay, error.to_string(), "check the address; the node goes on trying by itself")
            }
        });
    }
    Group { name: "relays", checks }
}

fn report(groups: &[Group], as_json: bool) -> Outcome {
    let all_good = groups.iter().flat_map(|group| &group.checks).all(|check| check.ok);
    let exit = if all_good { Exit::Ok } else { Exit::Failure };
    if as_json {
        let checks: Vec<_> = groups
            .iter()
            .flat_map(|group| group.checks.iter().map(move |check| (group.name, check)))
            .map(|(group, c)| json!({ "group": group, "name": c.name, "ok": c.ok, "how": c.how, "mend": c.mend }))
            .collect();
        output::json(&json!({ "ok": all_good, "checks": checks }))?;
        return Ok(exit);
    }
    let mut table = Table::new(&["", "area", "check", "detail"]);
    for group in groups {
        for check in &group.checks {
            let mark = if check.ok { Cell::toned("ok", Tone::Good) } else { Cell::toned("bad", Tone::Bad) };
            table.row(vec![
                mark,
                group.name.into(),
                output::tame(&check.name, 80).into(),
                output::tame(&check.how, 300).into(),
            ]);
            // One that is good enough may still be made better.
            if let Some(mend) = &check.mend {
                let mend = output::tame(mend, 300);
                table.row(vec![
                    "".into(),
                    "".into(),
                    "".into(),
                    Cell::toned(format!("fix: {mend}"), Tone::Unsure),
                ]);
            }
        }
    }
    table.print()?;
    // The answer to what was asked, so that it is in a file of the output, too.
    output::data(if all_good {
        "\nAll checks passed"
    } else {
        "\nFailed checks are enforced: jobs that need them are refused"
    })?;
    Ok(exit)
}
