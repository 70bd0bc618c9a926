//! What the configuration makes of the rooms: the backend, the job types, the wallet, the rules and bounds. It starts
//! nothing that runs by itself; that is `node`'s.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::Error;
use crate::config::{Config, Rule, SandboxChoice, WalletChoice, did_you_mean};
use crate::job;
use crate::ledger::Budgets;
use crate::market::{Catalog, Rules};
use crate::price::Way;
use crate::repo::{self, Repos};
use crate::sandbox::docker::{self, Docker};
use crate::sandbox::{self, Backend, Check, local::Local};
use crate::store;
use crate::wallet::{self, Wallet};

/// The backend that the configuration names. `helper` is the program that becomes the jail's first process;
/// `None`: this one.
///
/// # Errors
/// The sandbox's, when the host lacks what it cannot do without.
pub async fn backend(config: &Config, helper: Option<PathBuf>) -> Result<Arc<dyn Backend>, Error> {
    let warm = usize::try_from(config.warm_sandboxes).unwrap_or_default();
    if config.sandbox == SandboxChoice::Docker {
        return Ok(Arc::new(Docker::connect(docker_options(config, warm)).await?));
    }
    let options = sandbox::local::Options::new(config.data_dir.join("sandboxes"));
    Ok(Arc::new(Local::new(sandbox::local::Options { helper, warm, ..options })?))
}

/// The docker backend as configured. The engine knows this node by its data folder.
pub fn docker_options(config: &Config, warm: usize) -> docker::Options {
    let folder = Sha256::digest(config.data_dir.as_os_str().as_bytes());
    docker::Options {
        host: config.docker.host.clone(),
        image: config.docker.image.clone(),
        runtime: config.docker.runtime.clone(),
        first_uid: config.docker.first_uid,
        uids: config.docker.uids,
        node: hex::encode(folder).chars().take(8).collect(),
        warm,
    }
}

/// The job types that the configuration names, each with what it costs.
///
/// # Errors
/// A bad file, a name that is not there, or a job type whose price nobody has given.
pub fn catalog(config: &Config) -> Result<Catalog, Error> {
    let all = match &config.jobs_dir {
        Some(folder) => Catalog::with_folder(folder)?,
        None => Catalog::built_in()?,
    };
    let chosen = all.only(&config.skills)?;
    let faults = payment_faults(config, &all, &chosen);
    if faults.is_empty() { Ok(chosen) } else { Err(Error::Payment(faults)) }
}

/// What is wrong with `[payment]`, seen beside the job types that there are and those that are served: the key and why.
fn payment_faults(config: &Config, all: &Catalog, served: &Catalog) -> Vec<(&'static str, String)> {
    let terms = &config.payment.terms;
    let names: Vec<&str> = all.types().map(|t| t.manifest.name.as_str()).collect();
    let unknown = |key, name: &str| {
        let known = names.join(", ");
        let hint = did_you_mean(name, names.iter().copied());
        (key, format!("there is no job type {name:?}{hint} (known: {known})"))
    };
    let priced = terms.prices.keys().map(|of| of.skill.as_str()).filter(|name| *name != "*");
    let ruled = terms.rules.iter().filter_map(|rule| rule.skill.as_deref());
    let named = priced.map(|name| ("payment.prices", name)).chain(ruled.map(|name| ("payment.rules", name)));
    let mut faults: Vec<_> =
        named.filter(|(_, name)| !names.contains(name)).map(|(key, name)| unknown(key, name)).collect();
    if config.payment.charges() {
        let own = served.types().map(|t| (&t.manifest.name, &t.manifest.price));
        let unpriced = own.filter(|(name, own)| !terms.decides(name, own, backend_name(config)));
        faults.extend(unpriced.map(|(name, _)| {
            let why = format!(
                "{name} is served and has no price: add \"{name} base_msat=…\", or \"{name} free\" if it costs nothing"
            );
            ("payment.prices", why)
        }));
    }
    faults
}

/// The operator's own job types that are not among `skills`, and so not served.
///
/// # Errors
/// As [`catalog`].
pub fn unserved(config: &Config) -> Result<Vec<String>, Error> {
    let Some(folder) = &config.jobs_dir else { return Ok(Vec::new()) };
    let all = Catalog::with_folder(folder)?;
    let left_out = all.own().filter(|name| !config.skills.iter().any(|skill| skill == name));
    Ok(left_out.map(str::to_owned).collect())
}

/// The wallet that the configuration names.
///
/// # Errors
/// A setup that cannot be used. Nothing is dialled here: a wallet may be away for a while.
pub fn open_wallet(config: &Config) -> Result<Option<Arc<dyn Wallet>>, Error> {
    let kind = match config.payment.wallet {
        WalletChoice::None => return Ok(None),
        WalletChoice::Lnbits => wallet::Kind::Lnbits,
        WalletChoice::Nwc => wallet::Kind::Nwc,
    };
    let Some(file) = config.payment.wallet_key_file.clone() else {
        let why = format!("payment.wallet is {kind}, but payment.wallet_key_file is not set");
        return Err(wallet::Error::Setup(why).into());
    };
    let setup = wallet::Setup::new(kind, config.payment.wallet_url.clone(), wallet::Key::File(file));
    Ok(Some(wallet::open(&setup)?))
}

/// The admission rules for this provider.
pub fn rules(config: &Config, provider: nostr_sdk::PublicKey, catalog: Catalog) -> Rules {
    let admission = &config.admission;
    Rules {
        provider,
        catalog,
        allow_repos: admission.allow_repos.clone(),
        allow_customers: admission.allow_customers.clone(),
        deny_customers: admission.deny_customers.clone(),
        max_age_s: admission.max_request_age_ms / 1000,
        max_ahead_s: admission.max_future_skew_ms / 1000,
        ceiling: config.limits.policy(),
        terms: config.payment.terms.clone(),
        backend: backend_name(config).into(),
    }
}

/// The credit lines that a stranger gets here, msat each: a new key costs nothing, and each has a whole line.
pub fn lines_for_strangers(config: &Config) -> Vec<u64> {
    if !config.admission.allow_customers.is_empty() {
        return Vec::new();
    }
    let rules: Vec<_> = config.payment.terms.rules.iter().filter(|rule| rule.customer.is_none()).collect();
    let covers = |wide: &Option<String>, narrow: &Option<String>| wide.is_none() || wide == narrow;
    let reached = |nth: usize, rule: &Rule| {
        let before = rules.iter().take(nth);
        !before.into_iter().any(|r| covers(&r.skill, &rule.skill) && covers(&r.backend, &rule.backend))
    };
    let line = |(nth, rule): (usize, &&Rule)| match rule.way {
        Way::Line { cap_msat } | Way::After { cap_msat } if cap_msat > 0 && reached(nth, rule) => {
            Some(cap_msat)
        }
        _ => None,
    };
    rules.iter().enumerate().filter_map(line).collect()
}

/// The repository room as the configuration bounds it.
///
/// # Errors
/// When its folder cannot be made or belongs to somebody else.
pub fn repos(config: &Config) -> Result<Repos, Error> {
    let options = repo::Options {
        allow_private: config.admission.allow_private_repos,
        allow_file: config.admission.allow_file_repos,
        ..config.repo.options()
    };
    Ok(Repos::open(&config.data_dir.join("repos"), options)?)
}

/// Splits the skills into those whose default policy this backend enforces here, and why the others cannot run.
pub fn runnable(
    catalog: &Catalog,
    ceiling: &sandbox::Policy,
    backend: &dyn Backend,
) -> (Vec<String>, Vec<String>) {
    let needs: Vec<Check> = backend.checks().into_iter().filter(|c| !c.ok && c.mend.is_some()).collect();
    let (mut can, mut cannot) = (Vec::new(), Vec::new());
    for job_type in catalog.types() {
        let policy = job_type.manifest.limits.policy().capped(ceiling);
        match backend.admit(&policy) {
            Ok(()) => can.push(job_type.manifest.name.clone()),
            Err(error) => cannot.push(format!("{}: {error}", job_type.manifest.name)),
        }
    }
    if can.is_empty() {
        cannot.extend(needs.into_iter().map(|c| format!("{}: {}", c.name, c.how)));
    }
    (can, cannot)
}

pub(super) fn engine_options(config: &Config) -> job::Options {
    let count = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
    // Its record must fit one batch of the log, with a copy of the request and some words.
    let max_event_bytes = usize::try_from(config.relay.max_event_bytes).unwrap_or(usize::MAX);
    let max_event_bytes = max_event_bytes.min(store::BATCH_MAX_BYTES / 2);
    job::Options {
        max_jobs: count(config.max_jobs),
        max_open: count(config.queue.max_open_jobs),
        max_open_per_customer: count(config.queue.max_open_jobs_per_customer),
        max_running_per_customer: count(config.queue.max_running_per_customer),
        max_wait_ms: config.queue.max_wait_ms,
        repo_ms: config.repo.fetch_timeout_ms,
        max_attempts: config.queue.max_attempts,
        // Whether it fits with its escapes and encryption is seen when the event is made.
        max_content_bytes: max_event_bytes,
        max_event_bytes,
        max_artifact_bytes: config.limits.artifact_bytes,
        max_changes_bytes: config.limits.changes_bytes,
        outbox_give_up_ms: config.relay.outbox_give_up_ms,
        max_answer_relays: count(config.relay.max_answer_relays),
        relays: config.relays.clone(),
        budgets: Budgets {
            customer_day_msat: config.payment.customer_day_msat,
            customer_week_msat: config.payment.customer_week_msat,
            node_day_msat: config.payment.node_day_msat,
            node_week_msat: config.payment.node_week_msat,
        },
        rent: rented(config),
        refusals_per_minute: config.admission.refusals_per_minute,
        quotes_per_minute: config.admission.quotes_per_minute,
        balances_per_minute: config.admission.balances_per_minute,
    }
}

/// What the configured backend costs, where there is a rate to book it at.
fn rented(config: &Config) -> Option<job::Rented> {
    let (payment, backend) = (&config.payment, backend_name(config));
    let rent = payment.costs.get(backend).filter(|_| payment.msat_per_usd > 0)?.clone();
    let (msat_per_usd, rate_source) = (payment.msat_per_usd, payment.rate_source.clone());
    Some(job::Rented { rent, msat_per_usd, rate_source })
}

fn backend_name(config: &Config) -> &'static str {
    match config.sandbox {
        SandboxChoice::Docker => "docker",
        SandboxChoice::Auto | SandboxChoice::Local => "local",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Override, Raw, Sources};

    fn loaded(settings: &[(&str, &str)]) -> Config {
        let flag = |(key, value): &(&str, &str)| Override {
            key: (*key).into(),
            value: Raw::Text((*value).into()),
            flag: format!("--set {key}"),
        };
        let flags = [("data_dir", "/nowhere")].iter().chain(settings).map(flag).collect();
        Config::load(&Sources { flags, ..Sources::default() }).unwrap().config
    }

    fn lines(settings: &[(&str, &str)]) -> Vec<u64> {
        lines_for_strangers(&loaded(settings))
    }

    #[test]
    fn a_job_type_that_nobody_has_priced_is_refused_where_money_is_asked_for() {
        let faults = |settings: &[(&str, &str)]| match catalog(&loaded(settings)) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        let generic = ("payment.prices", "generic base_msat=1");
        let said = faults(&[generic]);
        for name in ["code", "analysis", "docs"] {
            assert!(said.contains(&format!("{name} is served and has no price")), "{said}");
        }
        assert!(!said.contains("generic is served"), "{said}");
        assert_eq!(faults(&[generic, ("skills", "generic")]), "");
        assert_eq!(faults(&[("payment.prices", "generic base_msat=1,* free")]), "");
        assert!(faults(&[("payment.wallet", "lnbits")]).contains("generic is served and has no price"));
        assert!(faults(&[("payment.rules", "credit")]).contains("generic is served and has no price"));
        assert_eq!(faults(&[("payment.rules", "free")]), "");
        assert_eq!(faults(&[]), "", "a node that asks for no money needs no prices");
    }

    #[test]
    fn a_misspelt_job_type_in_prices_and_rules_is_refused_with_the_right_one() {
        for (key, value) in
            [("payment.prices", "genric base_msat=1,* free"), ("payment.rules", "free skill=genric")]
        {
            let said = catalog(&loaded(&[(key, value)])).unwrap_err().to_string();
            assert!(said.contains(key) && said.contains("did you mean \"generic\"?"), "{said}");
        }
    }

    #[test]
    fn a_credit_line_is_a_strangers_unless_a_rule_or_the_door_says_whose_it_is() {
        let key = nostr_sdk::Keys::generate().public_key().to_hex();
        let named = format!("line cap_msat=5 customer={key}");
        for (rules, strangers) in [
            ("line cap_msat=5", vec![5]),
            ("line cap_msat=5 skill=generic,line cap_msat=7 backend=local", vec![5, 7]),
            (named.as_str(), vec![]),
            ("invoice,line cap_msat=5", vec![]),
            ("credit skill=code,line cap_msat=5 skill=code", vec![]),
            ("credit skill=code,line cap_msat=5", vec![5]),
            ("line cap_msat=0", vec![]),
        ] {
            assert_eq!(lines(&[("payment.rules", rules)]), strangers, "{rules}");
        }
        let admitted = [("payment.rules", "line cap_msat=5"), ("admission.allow_customers", key.as_str())];
        assert!(lines(&admitted).is_empty(), "strangers are not served at all");
    }
}
