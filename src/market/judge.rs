//! The judgement over one decoded request: taken, and on which terms, or refused with a typed reason.
//! Pure: what depends on the node's state (its queue, its past) is judged in `job`.

use std::sync::Arc;

use nostr_sdk::prelude::PublicKey;

use super::job_type::{Limits, Need, Output};
use super::{Agreed, Catalog, Code, JobType, Metered, Refusal, Terms, Way};
use crate::config::RepoPattern;
use crate::net::without_user;
use crate::protocol::{Order, Request};
use crate::repo::Location;
use crate::sandbox::Policy;

/// What the operator lets in.
#[derive(Debug, Clone)]
pub struct Rules {
    pub provider: PublicKey,
    pub catalog: Catalog,
    /// Repositories that may be named; empty = all that the URL rules let through.
    pub allow_repos: Vec<RepoPattern>,
    /// Customers who may order; empty = everybody not denied.
    pub allow_customers: Vec<PublicKey>,
    pub deny_customers: Vec<PublicKey>,
    /// Oldest request taken, in seconds.
    pub max_age_s: u64,
    /// How far a request's clock may be ahead of ours, in seconds.
    pub max_ahead_s: u64,
    /// The most that any job may use, whatever its type allows.
    pub ceiling: Policy,
    pub terms: Terms,
    /// What runs the jobs.
    pub backend: String,
}

/// A request that is taken, and on which terms.
#[derive(Debug, Clone)]
pub struct Admission {
    pub job_type: Arc<JobType>,
    pub order: Order,
    pub policy: Policy,
    pub agreed: Agreed,
}

/// Judges one request at `now_s` (Unix seconds, our clock), and names its price. Whether the customer's bid covers it
/// is [`Admission::within_bid`]'s to say.
///
/// # Errors
/// The reason why not, the first that applies: whom it is for, when, from whom, what.
pub fn judge(rules: &Rules, request: &Request, now_s: u64) -> Result<Admission, Refusal> {
    let targeted = request.is_targeted(&rules.provider);
    if !targeted && !request.providers.is_empty() {
        return refuse(Code::NotForUs, "the request names other providers");
    }
    let Some(job_type) = rules.catalog.for_kind(request.kind) else {
        return refuse(Code::Unsupported, format!("kind {} is not served here", request.kind));
    };
    let order = Order::read(request).map_err(|e| Refusal::new(Code::InvalidInput, e.to_string()));
    let names_repo = order.as_ref().map_or(true, |o| o.repo.is_some());
    if is_shared(request.kind) && !targeted && !names_repo {
        return refuse(Code::Foreign, "others use this kind too, and the request names no repository");
    }
    judge_time(rules, request, now_s)?;
    judge_customer(rules, &request.customer)?;
    let order = order?;
    judge_order(rules, job_type, &order)?;
    let policy = policy(&job_type.manifest.limits, &rules.ceiling, &order)?;
    let skill = &job_type.manifest.name;
    let way = rules.terms.way(&request.customer, skill, &rules.backend);
    let price = rules.terms.price(Some(&request.customer), skill, &job_type.manifest.price).clone();
    let most_msat = if way == Way::Free { 0 } else { price.of(&metered(&policy, policy.wall_ms)) };
    let agreed = Agreed { way, price, most_msat, of_quota: false };
    Ok(Admission { job_type: Arc::clone(job_type), order, policy, agreed })
}

/// What is charged for a job that ran for `wall_ms`.
fn metered(policy: &Policy, wall_ms: u64) -> Metered {
    Metered { wall_ms, memory_bytes: policy.memory_bytes, ..Metered::default() }
}

impl Admission {
    /// The charge for a delivered job, never more than was agreed.
    pub fn charge_msat(&self, wall_ms: u64) -> u64 {
        self.agreed.price.of(&metered(&self.policy, wall_ms)).min(self.agreed.most_msat)
    }

    /// As one of the customer's free jobs.
    pub fn of_quota(self) -> Admission {
        Admission { agreed: Agreed { most_msat: 0, of_quota: true, ..self.agreed }, ..self }
    }

    /// The same, unless the request bids less than the job may cost.
    ///
    /// # Errors
    /// `over_bid`, with the price.
    pub fn within_bid(self, request: &Request) -> Result<Admission, Refusal> {
        let most_msat = self.agreed.most_msat;
        match request.bid_msat {
            Some(bid) if bid < most_msat => {
                let reason = format!("the job may cost {most_msat} msat, the bid is {bid}");
                Err(Refusal::quote(Code::OverBid, most_msat, reason))
            }
            _ => Ok(self),
        }
    }
}

/// Kinds of the public registry that we serve too: code, image and video work, content discovery.
pub fn is_shared(kind: u16) -> bool {
    matches!(kind, 5000 | 5100 | 5200 | 5300)
}

/// Whether a request's times are ones that we take.
///
/// # Errors
/// The first of them that is not.
pub fn judge_time(rules: &Rules, request: &Request, now_s: u64) -> Result<(), Refusal> {
    if request.is_expired(now_s) {
        return refuse(Code::Expired, "the request's expiration has passed");
    }
    if request.created_at.saturating_add(rules.max_age_s) < now_s {
        return refuse(Code::TooOld, format!("the request is older than {} s", rules.max_age_s));
    }
    if request.created_at > now_s.saturating_add(rules.max_ahead_s) {
        let reason = format!("the request is dated over {} s ahead of our clock", rules.max_ahead_s);
        return refuse(Code::FromTheFuture, reason);
    }
    Ok(())
}

fn judge_customer(rules: &Rules, customer: &PublicKey) -> Result<(), Refusal> {
    let listed = rules.allow_customers.is_empty() || rules.allow_customers.contains(customer);
    if !listed || rules.deny_customers.contains(customer) {
        return refuse(Code::CustomerRefused, "this node does not work for this customer");
    }
    Ok(())
}

fn judge_order(rules: &Rules, job_type: &JobType, order: &Order) -> Result<(), Refusal> {
    if let Some(repo) = &order.repo {
        // Before anything is owed for it. Whether `file://` is allowed here is the room's own to say.
        if let Err(error) = Location::parse(repo, true) {
            return refuse(Code::RepoRefused, error.to_string());
        }
        if !rules.allow_repos.is_empty() && !rules.allow_repos.iter().any(|p| p.matches(repo)) {
            // This goes out in public: a password in the URL must not.
            let repo = without_user(repo);
            return refuse(Code::RepoRefused, format!("{repo} is not among the repositories allowed here"));
        }
    }
    fits(job_type, order)
}

/// Whether an order has what this job type needs, and nothing that it does not do. Of the node it knows nothing.
///
/// # Errors
/// What is missing or too much.
pub fn fits(job_type: &JobType, order: &Order) -> Result<(), Refusal> {
    let manifest = &job_type.manifest;
    if order.repo.is_none() && manifest.input.repo == Need::Required {
        return refuse(Code::InvalidInput, "no repository: give an `i` url with marker `repo`");
    }
    if manifest.input.task == Need::Required && order.task.is_none() {
        return refuse(Code::InvalidInput, "no task: give an `i` text");
    }
    if manifest.script.commands.is_empty() && order.commands.is_empty() {
        let reason = "no commands: add --cmd (param cmd_0, cmd_1, …)";
        return refuse(Code::InvalidInput, reason);
    }
    // What would be ordered and not done is refused: the customer would take the result for something else.
    if !manifest.script.commands.is_empty() && !order.commands.is_empty() {
        let reason = format!("{} runs its own commands: give no cmd", manifest.name);
        return refuse(Code::InvalidInput, reason);
    }
    if manifest.output != Output::Report && !order.artifacts.is_empty() {
        let reason = format!("the result of {} is no report, so it names no artifacts", manifest.name);
        return refuse(Code::InvalidInput, reason);
    }
    if order.network {
        return refuse(Code::Unsupported, "jobs have no network here");
    }
    // To run without it would be another job; and whose result may stand in for an input would have to be checked
    // first (R5).
    if order.unread {
        let reason =
            "an input is an event, another job's result, or a URL without a marker: none is fetched here";
        return refuse(Code::Unsupported, reason);
    }
    Ok(())
}

/// What the order asks for, else the type's default; more than the type's or the node's maximum is refused.
fn policy(limits: &Limits, ceiling: &Policy, order: &Order) -> Result<Policy, Refusal> {
    const MIB: u64 = 1024 * 1024;
    let mut policy = limits.policy().capped(ceiling);
    let most = limits.most().capped(ceiling);
    if let Some(secs) = order.time_secs {
        policy.wall_ms = grant("wall_ms", secs.saturating_mul(1000), most.wall_ms)?;
    }
    if let Some(mb) = order.memory_mb {
        policy.memory_bytes = grant("memory_bytes", mb.saturating_mul(MIB), most.memory_bytes)?;
    }
    if let Some(mb) = order.disk_mb {
        policy.disk_bytes = grant("disk_bytes", mb.saturating_mul(MIB), most.disk_bytes)?;
    }
    if let Some(milli) = order.cpu_milli {
        policy.cpu_milli = grant("cpu_milli", milli, most.cpu_milli)?;
    }
    Ok(policy)
}

fn grant<T: Ord + Default + std::fmt::Display>(clause: &str, asked: T, most: T) -> Result<T, Refusal> {
    if asked == T::default() {
        return refuse(Code::InvalidInput, format!("{clause}: 0 is not a limit one can work under"));
    }
    if asked > most {
        return refuse(
            Code::ResourceLimit,
            format!("{clause}: requested {asked}, this node allows at most {most}"),
        );
    }
    Ok(asked)
}

fn refuse<T>(code: Code, reason: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(code, reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::draft::Draft;
    use crate::sandbox::Network;
    use nostr_sdk::prelude::Keys;

    const NOW: u64 = 1_800_000_000;

    fn rules(provider: &Keys) -> Rules {
        Rules {
            provider: provider.public_key(),
            catalog: Catalog::built_in().unwrap(),
            allow_repos: Vec::new(),
            allow_customers: Vec::new(),
            deny_customers: Vec::new(),
            max_age_s: 3600,
            max_ahead_s: 300,
            ceiling: Policy {
                wall_ms: 600_000,
                idle_ms: 600_000,
                memory_bytes: 1 << 31,
                swap_bytes: 0,
                pids: 100,
                cpu_milli: 2000,
                disk_bytes: 1 << 31,
                inodes: 1000,
                open_files: 100,
                output_bytes: 1000,
                output_bytes_per_s: 1 << 30,
                network: Network::None,
            },
            terms: Terms::default(),
            backend: "local".into(),
        }
    }

    fn draft(kind: u16) -> Draft {
        Draft {
            kind,
            repo: Some("https://git.example/acme/tool".into()),
            commands: vec!["true".into()],
            ..Draft::default()
        }
    }

    fn judged_at(
        draft: &Draft,
        now_s: u64,
        change: impl FnOnce(&mut Rules, &Keys),
    ) -> Result<Admission, Refusal> {
        let (provider, customer) = (Keys::generate(), Keys::generate());
        let event = draft.unsigned(&customer, NOW).unwrap().sign_with_keys(&customer).unwrap();
        let request = Request::decode(&event, &provider).unwrap();
        let mut rules = rules(&provider);
        change(&mut rules, &customer);
        judge(&rules, &request, now_s)?.within_bid(&request)
    }

    fn judged(draft: &Draft) -> Result<Admission, Refusal> {
        judged_at(draft, NOW, |_, _| {})
    }

    #[track_caller]
    fn refused(judged: Result<Admission, Refusal>, code: Code) {
        assert_eq!(judged.expect_err("must be refused").code, code);
    }

    #[test]
    fn a_plain_order_is_taken_on_the_types_terms_under_the_nodes_ceiling() {
        let admission = judged(&draft(5930)).unwrap();
        assert_eq!(admission.job_type.manifest.name, "generic");
        assert_eq!((admission.policy.wall_ms, admission.policy.pids), (300_000, 100));
        assert_eq!(admission.policy.output_bytes, 1000);
    }

    #[test]
    fn asking_for_more_than_is_given_is_refused_and_not_cut() {
        refused(judged(&Draft { time_secs: Some(601), ..draft(5000) }), Code::ResourceLimit);
        refused(judged(&Draft { memory_mb: Some(u64::MAX), ..draft(5000) }), Code::ResourceLimit);
        refused(judged(&Draft { time_secs: Some(0), ..draft(5000) }), Code::InvalidInput);
        assert_eq!(judged(&Draft { time_secs: Some(10), ..draft(5000) }).unwrap().policy.wall_ms, 10_000);
    }

    #[test]
    fn requests_of_others_on_shared_kinds_are_foreign() {
        let image = Draft { task: Some("a cat".into()), ..Draft { kind: 5100, ..Draft::default() } };
        refused(judged(&image), Code::Foreign);
        refused(judged(&Draft { kind: 5932, ..image }), Code::InvalidInput);
    }

    #[test]
    fn time_is_judged_on_our_clock() {
        refused(judged_at(&draft(5000), NOW + 3601, |_, _| {}), Code::TooOld);
        refused(judged_at(&draft(5000), NOW - 301, |_, _| {}), Code::FromTheFuture);
        let short = Draft { expiration: Some(NOW + 5), ..draft(5000) };
        assert!(judged(&short).is_ok());
        refused(judged_at(&short, NOW + 6, |_, _| {}), Code::Expired);
    }

    #[test]
    fn customers_and_repositories_are_held_against_the_operators_lists() {
        refused(
            judged_at(&draft(5000), NOW, |r, c| r.deny_customers.push(c.public_key())),
            Code::CustomerRefused,
        );
        let other = Keys::generate().public_key();
        refused(judged_at(&draft(5000), NOW, |r, _| r.allow_customers.push(other)), Code::CustomerRefused);
        let only = |pattern: &str| {
            let pattern = RepoPattern::parse(pattern).unwrap();
            judged_at(&draft(5000), NOW, |r, _| r.allow_repos.push(pattern))
        };
        assert!(only("git.example/acme/*").is_ok());
        refused(only("git.example/other/*"), Code::RepoRefused);
    }

    #[test]
    fn a_url_that_can_never_be_cloned_is_refused_before_anything_is_owed_and_its_credentials_are_not_repeated()
     {
        for (url, why) in [
            ("https://user:hush@git.example/acme/tool", "credentials"),
            ("https://git.example/acme/tool?token=hush", "query"),
            ("ssh://git@git.example/acme/tool", "not spoken here"),
        ] {
            let refusal =
                judged(&Draft { repo: Some(url.into()), ..draft(5930) }).expect_err("must be refused");
            assert_eq!(refusal.code, Code::RepoRefused, "{url}");
            assert!(refusal.reason.contains(why) && !refusal.reason.contains("hush"), "{}", refusal.reason);
        }
    }

    #[test]
    fn what_is_missing_or_not_served_is_said() {
        refused(judged(&Draft { commands: Vec::new(), ..draft(5000) }), Code::InvalidInput);
        refused(judged(&Draft { repo: None, ..draft(5932) }), Code::InvalidInput);
        refused(judged(&draft(5050)), Code::Unsupported);
        let network = Draft { params: vec![("allow_network".into(), "true".into())], ..draft(5930) };
        refused(judged(&network), Code::Unsupported);
    }

    #[test]
    fn commands_and_artifacts_that_the_type_would_pass_over_are_refused() {
        let none = |kind| Draft { commands: Vec::new(), ..draft(kind) };
        let with_artifact = |draft: Draft| Draft { artifacts: vec!["out.txt".into()], ..draft };
        assert!(judged(&none(5933)).is_ok() && judged(&none(5300)).is_ok());
        assert!(judged(&with_artifact(draft(5930))).is_ok());
        for (draft, why) in [
            (draft(5933), "analysis runs its own commands"),
            (draft(5300), "docs runs its own commands"),
            (with_artifact(none(5933)), "the result of analysis is no report"),
            (with_artifact(none(5300)), "the result of docs is no report"),
            (with_artifact(draft(5932)), "the result of code is no report"),
        ] {
            let refusal = judged(&draft).expect_err("must be refused");
            assert_eq!(refusal.code, Code::InvalidInput);
            assert!(refusal.reason.contains(why), "{}", refusal.reason);
        }
    }

    #[test]
    fn an_input_that_would_not_be_read_refuses_the_job_instead_of_running_without_it() {
        let (provider, customer) = (Keys::generate(), Keys::generate());
        for input in [["i", "aa", "job"], ["i", "aa", "event"], ["i", "https://host.example/x", "url"]] {
            let tag = nostr_sdk::Tag::parse(input).unwrap();
            let mut unsigned = draft(5000).unsigned(&customer, NOW).unwrap();
            unsigned.tags.push(tag);
            unsigned.id = None;
            let event = unsigned.sign_with_keys(&customer).unwrap();
            let request = Request::decode(&event, &provider).unwrap();
            let refusal = judge(&rules(&provider), &request, NOW).expect_err("must be refused");
            assert_eq!(refusal.code, Code::Unsupported, "{input:?}: {}", refusal.reason);
        }
    }

    #[test]
    fn the_price_is_the_operators_and_a_bid_under_it_is_told_the_price() {
        let priced = |draft: &Draft, rule: &str| {
            let rule = rule.parse().unwrap();
            judged_at(draft, NOW, |r, _| {
                let (skill, price) =
                    crate::config::terms::priced("generic base_msat=500 per_second_msat=10").unwrap();
                r.terms.prices.insert(skill, price);
                r.terms.rules = vec![rule];
            })
        };
        let ten_seconds = Draft { time_secs: Some(10), ..draft(5000) };
        let admission = priced(&ten_seconds, "credit").unwrap();
        assert_eq!((admission.agreed.most_msat, admission.agreed.way), (600, Way::Credit));
        assert_eq!((admission.charge_msat(2_500), admission.charge_msat(99_000)), (525, 600));
        assert_eq!(priced(&ten_seconds, "free").unwrap().agreed.most_msat, 0);
        assert!(priced(&Draft { bid_msat: Some(600), ..ten_seconds.clone() }, "credit").is_ok());
        let over = priced(&Draft { bid_msat: Some(599), ..ten_seconds }, "credit").unwrap_err();
        assert_eq!((over.code, over.quote_msat), (Code::OverBid, Some(600)));
    }

    #[test]
    fn a_request_to_another_provider_is_left_alone() {
        let other = Keys::generate().public_key();
        refused(judged(&Draft { provider: Some(other), ..draft(5000) }), Code::NotForUs);
    }
}
