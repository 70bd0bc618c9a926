//! Figures, not promises: run alone and in release,
//! `cargo test --release --test relay -- --ignored --nocapture speed`.

use std::time::{Duration, Instant};

use coinop::bench::intake;
use coinop::relay::Client;
use coinop::relay::local::LocalRelay;
use nostr_sdk::prelude::*;

use super::*;

const SOON: Duration = Duration::from_secs(5);

#[test]
#[ignore = "measures"]
fn intake_against_the_bare_cores() {
    let report = intake::run(&intake::Options::default()).unwrap();
    println!("{}", serde_json::to_string_pretty(&report).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures"]
async fn round_trip_over_the_local_relay() {
    let relay = LocalRelay::start().await.unwrap();
    let urls = [relay.url()];
    let connect = || Client::connect(&urls, None, false, Wire::default(), SOON);
    let (sender, receiver) = (connect().await.unwrap(), connect().await.unwrap());
    let mut watcher = receiver.subscribe(vec![Filter::new().kind(Kind::Custom(REQUEST_KIND))]);
    watcher.stored(SOON).await;
    let (mut stored, mut received) = (Vec::new(), Vec::new());
    for n in 0..1000 {
        let event = request(&format!("{n}"), 0);
        let began = Instant::now();
        let (published, arrived) =
            tokio::join!(async { (sender.publish(&event, SOON).await, began.elapsed()) }, async {
                (watcher.next().await, began.elapsed())
            });
        assert_eq!(published.0[0].answer, coinop::store::record::Answer::Stored);
        assert_eq!(arrived.0.unwrap().event.id, event.id);
        stored.push(published.1);
        received.push(arrived.1);
    }
    for (what, mut times) in [("published → OK", stored), ("published → verified at a subscriber", received)]
    {
        times.sort();
        println!("{what}: p50 {:?}, p99 {:?}", times[500], times[990]);
    }
}
