//! What a backend says before it makes anything: who it is, what it can keep, and which policies it does not take.

use coinop::sandbox::{Error, Exit, Network, Policy};

use crate::case::{Outcome, Unmet, cases};
use crate::fixtures::Fixture;
use crate::running::{policy, run, words};

cases!(
    everywhere: [
        the_identity_names_the_backend_and_what_stands_in_for_an_image,
        every_clause_is_checked_and_tells_how_it_is_kept,
        what_a_check_says_is_missing_can_be_mended,
        a_clause_whose_check_fails_is_refused_by_its_name,
        a_policy_of_nothing_is_refused_by_the_clause_that_is_nothing,
        what_is_refused_is_not_made,
        a_network_is_given_through_a_gateway_or_refused_by_name,
    ],
    programs: [
        an_output_of_no_bytes_is_a_policy_like_any_other,
        the_smallest_policy_that_is_taken_works,
        an_absurdly_large_limit_works_or_is_refused_by_name,
    ],
);

/// The policy's fields, as the checks and refusals name them.
fn clauses() -> Vec<String> {
    serde_json::to_value(policy()).unwrap().as_object().unwrap().keys().cloned().collect()
}

async fn the_identity_names_the_backend_and_what_stands_in_for_an_image(on: &Fixture) {
    let identity = on.backend.identity();
    assert!(!identity.backend.is_empty() && !identity.image.is_empty(), "{identity:?}");
    on.sandbox().await.destroy().await.unwrap();
    assert_eq!(on.backend.identity(), identity, "it is the same for every job");
}

async fn every_clause_is_checked_and_tells_how_it_is_kept(on: &Fixture) {
    let checks = on.backend.checks();
    for clause in clauses() {
        let found: Vec<_> = checks.iter().filter(|check| check.name == clause).collect();
        let [check] = found[..] else { panic!("{clause} is checked {} times", found.len()) };
        assert!(check.how.len() > 5, "{check:?}");
    }
}

async fn what_a_check_says_is_missing_can_be_mended(on: &Fixture) {
    for check in on.backend.checks().iter().filter(|check| !check.ok) {
        assert!(check.mend.as_ref().is_some_and(|mend| !mend.is_empty()), "{check:?}");
    }
}

async fn a_clause_whose_check_fails_is_refused_by_its_name(on: &Fixture) {
    let failing: Vec<_> = on.backend.checks().into_iter().filter(|check| !check.ok).collect();
    // A fixture that could start admits the usual policy: nothing that this asks for may be missing.
    assert!(on.backend.admit(&policy()).is_ok());
    for check in failing {
        assert!(!clauses().contains(&check.name), "{check:?}, and yet a policy with this clause is taken");
    }
}

async fn a_policy_of_nothing_is_refused_by_the_clause_that_is_nothing(on: &Fixture) {
    for (nothing, named) in [
        (Policy { wall_ms: 0, ..policy() }, "wall_ms"),
        (Policy { idle_ms: 0, ..policy() }, "idle_ms"),
        (Policy { idle_ms: 1, ..policy() }, "idle_ms"),
        (Policy { memory_bytes: 0, ..policy() }, "memory_bytes"),
        (Policy { memory_bytes: 1, ..policy() }, "memory_bytes"),
        (Policy { pids: 0, ..policy() }, "pids"),
        (Policy { cpu_milli: 0, ..policy() }, "cpu_milli"),
        (Policy { disk_bytes: 0, ..policy() }, "disk_bytes"),
        (Policy { disk_bytes: 1, ..policy() }, "disk_bytes"),
        (Policy { inodes: 0, ..policy() }, "inodes"),
        (Policy { open_files: 0, ..policy() }, "open_files"),
        (Policy { open_files: 1, ..policy() }, "open_files"),
        (Policy { output_bytes_per_s: 0, ..policy() }, "output_bytes_per_s"),
        (Policy { output_bytes_per_s: 1, ..policy() }, "output_bytes_per_s"),
    ] {
        match on.backend.admit(&nothing) {
            Err(Error::BadPolicy(why)) => assert!(why.contains(named), "{named}: {why}"),
            Err(Error::Unenforceable { clause, .. }) => assert_eq!(clause, named),
            other => panic!("{named}: {other:?}"),
        }
    }
}

async fn what_is_refused_is_not_made(on: &Fixture) {
    for refused in [Policy { pids: 0, ..policy() }, Policy { disk_bytes: 0, ..policy() }] {
        let admitted = on.backend.admit(&refused).unwrap_err().to_string();
        let made = on.backend.create(on.spec(refused, None)).await.map(|_| "a sandbox");
        assert_eq!(made.unwrap_err().to_string(), admitted);
    }
}

async fn a_network_is_given_through_a_gateway_or_refused_by_name(on: &Fixture) -> Outcome {
    let egress = Policy { network: Network::Egress, ..policy() };
    on.about("network", egress).await?.destroy().await.unwrap();
    Ok(())
}

async fn an_output_of_no_bytes_is_a_policy_like_any_other(on: &Fixture) {
    let sandbox = on.sandbox_with(Policy { output_bytes: 0, ..policy() }).await;
    assert_eq!(run(&*sandbox, words(["true"])).await.exit, Some(Exit::Code { code: 0 }));
    run(&*sandbox, words(["echo"])).await.hit(coinop::sandbox::Limit::Output);
}

/// The smallest value of a clause that `admit` takes, by halving; then a sandbox with it runs `true`.
async fn the_smallest_policy_that_is_taken_works(on: &Fixture) {
    let with: [fn(u64) -> Policy; 4] = [
        |n| Policy { pids: n as u32, ..policy() },
        |n| Policy { cpu_milli: n as u32, ..policy() },
        |n| Policy { disk_bytes: n, ..policy() },
        |n| Policy { inodes: n, ..policy() },
    ];
    for policy in with {
        let (mut refused, mut taken) = (0u64, 1 << 24);
        while taken - refused > 1 {
            let middle = refused.midpoint(taken);
            if on.backend.admit(&policy(middle)).is_ok() { taken = middle } else { refused = middle }
        }
        let sandbox = on.sandbox_with(policy(taken)).await;
        let ran = run(&*sandbox, words(["true"])).await;
        assert_eq!(ran.exit, Some(Exit::Code { code: 0 }), "{:?}: {ran:?}", policy(taken));
    }
}

async fn an_absurdly_large_limit_works_or_is_refused_by_name(on: &Fixture) -> Outcome {
    let all = [
        ("wall_ms", Policy { wall_ms: u64::MAX, ..policy() }),
        ("idle_ms", Policy { wall_ms: u64::MAX, idle_ms: u64::MAX, ..policy() }),
        ("idle_ms", Policy { wall_ms: u64::MAX, idle_ms: u64::MAX - 1, ..policy() }),
        ("swap_bytes", Policy { swap_bytes: u64::MAX, ..policy() }),
        ("memory_bytes", Policy { memory_bytes: u64::MAX, ..policy() }),
        ("pids", Policy { pids: u32::MAX, ..policy() }),
        ("cpu_milli", Policy { cpu_milli: u32::MAX, ..policy() }),
        ("disk_bytes", Policy { disk_bytes: u64::MAX, ..policy() }),
        ("inodes", Policy { inodes: u64::MAX, ..policy() }),
        ("open_files", Policy { open_files: u32::MAX, ..policy() }),
        ("output_bytes", Policy { output_bytes: u64::MAX, ..policy() }),
        ("output_bytes_per_s", Policy { output_bytes_per_s: u64::MAX, ..policy() }),
    ];
    for (clause, policy) in all {
        if matches!(on.backend.admit(&policy), Err(Error::BadPolicy(why)) if why.contains(clause)) {
            continue;
        }
        match on.about(clause, policy).await {
            Err(Unmet::Refused { .. }) => {}
            Err(skipped) => return Err(skipped),
            Ok(sandbox) => {
                let ran = run(&*sandbox, words(["true"])).await;
                assert_eq!(ran.exit, Some(Exit::Code { code: 0 }), "{clause}: {ran:?}");
                sandbox.destroy().await.unwrap();
            }
        }
    }
    Ok(())
}
