//! The same over the real store: what was handled and delivered is known after a restart.

use std::sync::Arc;
use std::time::Duration;

use coinop::clock;
use coinop::relay::{Memory, Service};
use coinop::store::record::{Answer, Record};
use coinop::store::{Holder, Store};
use nostr_sdk::prelude::*;

use super::fake::{Fake, Rules, until};
use super::*;

fn accepted(event: &Event, relay: &str) -> Record {
    Record::Accepted {
        job: event.id.to_hex(),
        customer: event.pubkey.to_hex(),
        kind: REQUEST_KIND,
        skill: "generic".into(),
        request: event.as_json(),
        relay: relay.into(),
        deadline_ms: u64::MAX,
        agreed: Default::default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cursor_known_requests_and_answers_survive_a_restart_on_the_store() {
    let relay = Fake::start(Rules::default()).await;
    let requests: Vec<_> = (0..5).map(|n| request(&format!("{n}"), 5)).collect();
    requests.iter().for_each(|event| relay.store(event));
    let (dir, keys) = (tempfile::tempdir().unwrap(), Keys::generate());
    let holder = Holder::new(keys.public_key().to_hex());
    let result = signed(Kind::Custom(6930), "a result", 0, vec![]);
    let began = now();
    {
        let store = Store::open(dir.path(), &holder).unwrap();
        let memory: Arc<dyn Memory> = Arc::new(store.clone());
        let (handle, mut events) =
            Service::start(options(&[&relay]), memory, keys.clone(), clock::system()).unwrap();
        for _ in 0..5 {
            let inbound = events.recv().await.unwrap();
            store.append(vec![accepted(&inbound.event, &inbound.relay)]).await.unwrap();
            inbound.done();
        }
        let queued = Record::Queued {
            event: result.id.to_hex(),
            job: None,
            json: result.as_json(),
            relays: vec![relay.url()],
            give_up_ms: u64::MAX,
        };
        store.append(vec![queued]).await.unwrap();
        handle.wake();
        until("the cursor is written", || store.cursor(&relay.url()).unwrap().is_some_and(|c| c >= began))
            .await;
        assert_eq!(handle.drain(Duration::from_secs(5)).await.undelivered, 0);
        drop(handle);
        store.close().unwrap();
    }
    let store = Store::open(dir.path(), &holder).unwrap();
    assert_eq!(store.deliveries(&result.id.to_hex()).unwrap(), [(relay.url(), Answer::Stored)]);
    assert!(store.owed().unwrap().is_empty());
    let memory: Arc<dyn Memory> = Arc::new(store.clone());
    let asked = relay.asked("fill").len();
    let (handle, mut events) = Service::start(options(&[&relay]), memory, keys, clock::system()).unwrap();
    let status = || handle.status().into_iter().find(|s| s.relay == relay.url()).unwrap();
    until("the history was replayed", || status().duplicate >= 10).await;
    assert!(events.try_recv().is_err(), "known requests come no more");
    let since = relay.asked("fill")[asked]["since"].as_u64().unwrap();
    assert!(since >= began - 600, "asked from the cursor on: {since}");
    assert_eq!(relay.published().len(), 1);
}
