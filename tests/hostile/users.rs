//! What the kernel counts by user and not by sandbox, and the clock that all share: a job must not use up what the
//! host's own processes and the neighbours need.

use coinop::sandbox::Policy;

use crate::case::{NOT_SHOWN, Outcome, cases};
use crate::ground::{Ground, policy, run};
use crate::plain::{How, Plain};
use crate::siege::Siege;

cases! {
    a_hoarder_of_watches_leaves_the_host_and_the_neighbours_theirs: "quotas of a user", watches_at_large;
    a_hoarder_of_signals_leaves_the_host_and_the_neighbours_theirs: "quotas of a user", signals_at_large;
    a_job_watches_no_more_files_than_its_part: "quotas of a user", watched_files_at_large;
    the_host_s_number_of_requests_ahead_is_not_used_up: "quotas of the host", aio_at_large;
    the_clock_is_not_the_job_s_to_set: "clock", clock_at_large;
}

/// Takes of something all it can, and sees what another process of the same user gets.
fn nothing_left(plain: &Plain, how: How<'_>, hoard: &[&str], want: &[&str]) -> Outcome {
    let mut loose = plain.start(how, hoard)?;
    let took = loose.ready()?;
    let mut other = plain.start(how, want)?;
    let left = other.ready()?;
    assert_eq!(left, ["0"], "after {took:?}");
    Ok(format!("nothing left for another process of its user, after {}", took[0]))
}

fn watches_at_large(plain: &Plain) -> Outcome {
    let how = How { limits: &["--nofile=4096"], ..How::default() };
    nothing_left(plain, how, &["inotify", "1", "4096"], &["inotify", "1", "1"])
}

fn signals_at_large(plain: &Plain) -> Outcome {
    if !nix::unistd::geteuid().is_root() {
        return Err(format!(
            "{NOT_SHOWN}without root each plain process counts in a user namespace of its own"
        ));
    }
    let how = How { limits: &["--sigpending=2000"], ..How::default() };
    nothing_left(plain, how, &["signals", "5000"], &["signals", "1"])
}

/// The node's own user, and a neighbour, still get one while a job has all that it can get.
async fn others_get_one(ground: &Ground, policy: Policy, hoard: &[&str], want: &[&str]) -> Outcome {
    let siege = Siege::lay(ground, policy, hoard).await;
    let plain = Plain::new();
    let mut host = plain.start(How { root: true, ..How::default() }, want)?;
    assert_eq!(host.ready()?, ["1"], "the host's own, after {}", siege.said);
    let neighbour = Siege::lay(ground, crate::ground::policy(), want).await;
    let (got, took) = (neighbour.number(), siege.number());
    neighbour.kill().await;
    siege.kill().await;
    if took == 0 {
        assert_eq!(got, 0, "what one job cannot have, another cannot");
        return Ok("none for any job; the host got its own".to_owned());
    }
    assert_eq!(got, 1, "a neighbour's, after {took}");
    Ok(format!("{took} in one process; the host and a neighbour got theirs"))
}

async fn a_hoarder_of_watches_leaves_the_host_and_the_neighbours_theirs(ground: &Ground) -> Outcome {
    let policy = Policy { open_files: 1024, ..policy() };
    others_get_one(ground, policy, &["inotify", "1", "4096"], &["inotify", "1", "1"]).await
}

async fn a_hoarder_of_signals_leaves_the_host_and_the_neighbours_theirs(ground: &Ground) -> Outcome {
    others_get_one(ground, policy(), &["signals", "1000000"], &["signals", "1"]).await
}

/// What the host gives a user, and the part of it that a sandbox may have.
fn watches_of_a_user() -> u64 {
    let most = std::fs::read_to_string("/proc/sys/fs/inotify/max_user_watches").unwrap();
    most.trim().parse().unwrap()
}

fn watched_files_at_large(plain: &Plain) -> Outcome {
    let wanted = watches_of_a_user() / 16 + 100;
    if wanted > 20_000 {
        return Err(format!("{NOT_SHOWN}a user of this host has too many watches to use up"));
    }
    let mut loose = plain.start(How::default(), &["watches", &wanted.to_string(), "."])?;
    let took = loose.ready()?;
    assert_eq!(took, [wanted.to_string()]);
    Ok(format!("{wanted}, as many as it wanted"))
}

async fn a_job_watches_no_more_files_than_its_part(ground: &Ground) -> Outcome {
    let part = watches_of_a_user() / 16;
    let wanted = part + 100;
    if wanted > 20_000 {
        return Err(format!("{NOT_SHOWN}a user of this host has too many watches to use up"));
    }
    let policy = Policy { inodes: 2 * wanted, memory_bytes: 256 << 20, ..policy() };
    let siege = Siege::lay(ground, policy, &["watches", &wanted.to_string(), "/workspace"]).await;
    let took = siege.number();
    siege.kill().await;
    if ground.engine.is_some() {
        return Ok(format!("{took}; its uid is its container's alone"));
    }
    assert!(took <= part, "{took} of a user's {}", watches_of_a_user());
    Ok(format!("{took} of a user's {}", watches_of_a_user()))
}

fn aio_at_large(plain: &Plain) -> Outcome {
    let said = plain.run(How::default(), &["aio"])?;
    if said.contains("ENOSYS") {
        return Err(format!("{NOT_SHOWN}this host's kernel has none"));
    }
    assert_eq!(said, "REACHED aio\n");
    Ok("128 of the host's were had".to_owned())
}

async fn the_host_s_number_of_requests_ahead_is_not_used_up(ground: &Ground) -> Outcome {
    Ok(crate::ways_out::reaches_nothing(ground, &["aio"], 1).await)
}

// === the clock ===

/// As root of this host the kernel looks at the new tick, and only then refuses it for what it is.
fn clock_at_large(plain: &Plain) -> Outcome {
    if !nix::unistd::geteuid().is_root() {
        return Err(format!("{NOT_SHOWN}only root could set the clock at all"));
    }
    let said = plain.run(How { root: true, ..How::default() }, &["tick"])?;
    assert_eq!(said, "no tick EINVAL\n");
    Ok("the kernel looks at a new tick; a possible one is not tried, the clock is everyone's".to_owned())
}

/// How far the clock of the day is from the one that nobody can set, in milliseconds.
fn offset_ms() -> i128 {
    let day = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
    let uptime: f64 = uptime.split_whitespace().next().unwrap().parse().unwrap();
    day.as_millis() as i128 - (uptime * 1000.0) as i128
}

async fn the_clock_is_not_the_job_s_to_set(ground: &Ground) -> Outcome {
    let sandbox = ground.sandbox(policy()).await;
    let before = offset_ms();
    let (said, _) = run(&*sandbox, &["set-clock"]).await;
    let moved = (offset_ms() - before).abs();
    sandbox.destroy().await.unwrap();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..2], ["no clock_settime EPERM", "no settimeofday EPERM"], "{said}");
    assert!(lines[2].starts_with("no rtc "), "{said}");
    assert_eq!(lines[3..], ["no tick EPERM"], "{said}");
    assert!(moved < 1000, "the host's clock moved by {moved} ms");
    Ok("EPERM, and the host's clock stands".to_owned())
}
