//! Adversaries that hold a sandbox without using it, and those that keep whoever reads them busy.

use std::io::Read;
use std::time::{Duration, Instant};

use coinop::sandbox::{Event, Exit, Limit, Policy};

use crate::case::{Outcome, cases};
use crate::ground::{Ground, attack, collect, policy};
use crate::host;
use crate::plain::{How, Plain};

cases! {
    a_sleeper_that_twitches_is_ended_for_doing_nothing: "idleness", sleeper_at_large;
    a_flood_that_is_read_keeps_the_node_no_busier_than_its_rate: "log flood", flood_at_large;
}

/// How long a sleeper may do nothing, and how long one at large is seen doing it.
const IDLE: Duration = Duration::from_secs(1);
const SEEN: Duration = Duration::from_secs(3);
const HELD_MIB: u64 = 32;

fn sleeper_at_large(plain: &Plain) -> Outcome {
    let mut loose = plain.start(How::default(), &["doze", &HELD_MIB.to_string()])?;
    loose.ready()?;
    let begun = Instant::now();
    host::until("a sleeper at large sleeps", || begun.elapsed() > SEEN);
    assert!(!loose.marked().is_empty());
    Ok(format!("{HELD_MIB} MiB held for {} s, and for ever", SEEN.as_secs()))
}

async fn a_sleeper_that_twitches_is_ended_for_doing_nothing(ground: &Ground) -> Outcome {
    let idle_ms = u64::try_from(IDLE.as_millis()).unwrap();
    let sandbox = ground.sandbox(Policy { idle_ms, ..policy() }).await;
    let mark = host::new_mark();
    let begun = Instant::now();
    let (said, exit) =
        collect(sandbox.exec(attack(&["doze", &HELD_MIB.to_string()], &mark)).await.unwrap()).await;
    let took = begun.elapsed();
    assert_eq!((said.as_str(), exit), ("ready\n", Some(Exit::Limit { limit: Limit::Idle })));
    assert!(took >= IDLE && took < SEEN + IDLE, "{took:?}");
    host::until("who does nothing is ended", || host::marked(&mark).is_empty());
    let used = sandbox.destroy().await.unwrap();
    assert!(used.peak_memory_bytes >= HELD_MIB << 20, "{used:?}");
    Ok(format!(
        "ended after {} with {} of processor time",
        host::ms(took),
        host::ms(Duration::from_millis(used.cpu_ms))
    ))
}

/// How long a flood is read.
const READ: Duration = Duration::from_secs(2);
const KIB_PER_S: u64 = 256;

fn flood_at_large(plain: &Plain) -> Outcome {
    let mut loose = plain.start(How { before: "exec 2>/dev/null;", ..How::default() }, &["flood"])?;
    let mut stdout = loose.output();
    let (begun, before) = (Instant::now(), own_cpu());
    let (mut all, mut block) = (0, vec![0; 16 << 10]);
    while begun.elapsed() < READ {
        all += stdout.read(&mut block).unwrap() as u64;
    }
    let used = own_cpu() - before;
    assert!(all > 100 * (KIB_PER_S << 10) * READ.as_secs(), "{all} bytes");
    Ok(format!(
        "{} MiB a second, {} of {} reading",
        (all >> 20) / READ.as_secs(),
        host::ms(used),
        host::ms(READ)
    ))
}

async fn a_flood_that_is_read_keeps_the_node_no_busier_than_its_rate(ground: &Ground) -> Outcome {
    let rate = KIB_PER_S << 10;
    let slow = Policy { output_bytes: u64::MAX >> 1, output_bytes_per_s: rate, ..policy() };
    let sandbox = ground.sandbox(slow).await;
    let mark = host::new_mark();
    let mut process = sandbox.exec(attack(&["flood"], &mark)).await.unwrap();
    let (begun, before, mut all) = (Instant::now(), own_cpu(), 0);
    while let Ok(event) =
        tokio::time::timeout(READ.saturating_sub(begun.elapsed()), process.events.recv()).await
    {
        match event {
            Some(Event::Stdout(bytes) | Event::Stderr(bytes)) => all += bytes.len() as u64,
            other => panic!("the flood ended: {other:?}"),
        }
    }
    let (took, used) = (begun.elapsed(), own_cpu() - before);
    // A second's worth at once, and then the rate.
    let most = rate + rate * u64::try_from(took.as_millis()).unwrap() / 1000;
    assert!(all >= rate && all <= most + rate / 4, "{all} bytes in {took:?}");
    // A fifth of one core, for all that this process does; reading without a bound takes a whole one.
    assert!(used < took / 5, "{used:?} in {took:?}");
    let started = Instant::now();
    sandbox.kill().await.unwrap();
    host::until("a slow flood is gone", || host::marked(&mark).is_empty());
    let gone = started.elapsed();
    sandbox.destroy().await.unwrap();
    Ok(format!(
        "{} KiB in {}, {} of it reading; gone {} after the kill",
        all >> 10,
        host::ms(took),
        host::ms(used),
        host::ms(gone)
    ))
}

/// Processor time of this process, which stands in for the node.
fn own_cpu() -> Duration {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;
    let used = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let time = used.user_time() + used.system_time();
    Duration::from_micros(u64::try_from(time.num_microseconds()).unwrap())
}
