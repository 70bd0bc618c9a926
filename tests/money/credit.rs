//! Credit in the owner's hands: granted, topped up by an invoice, paid out again.

use nostr_sdk::prelude::Event;
use serde_json::Value;

use crate::deal::{Deal, FREE, Over, json};
use crate::support::until;

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn credit_is_topped_up_by_an_invoice_and_refunded_to_one() {
    let test = "credit_is_topped_up_by_an_invoice_and_refunded_to_one";
    let Some(deal) = Deal::open(test, Over::Lnbits, &FREE).await else { return };
    let node = deal.home.start();
    until("the node to serve", async || node.status()).await;
    let key = deal.customer_hex();
    let invoice = deal.told(&["credits", "topup", &key, "100500", "--json"]).await;
    assert_eq!(invoice["amount_msat"], 101_000, "a whole number of sats");
    let bolt11 = invoice["bolt11"].as_str().expect("an invoice").to_owned();
    let (server, customer) = (deal.server.clone(), deal.customer.clone());
    tokio::task::spawn_blocking(move || server.pay(&customer, &bolt11)).await.expect("paid");
    let show = ["credits", "show", &key, "--json"];
    until("the payment to be booked", async || {
        let purse = deal.told(&show).await;
        (purse["available_msat"] == 101_000).then_some(())
    })
    .await;

    // Back again: the customer's own wallet makes an invoice.
    let (server, customer) = (deal.server.clone(), deal.customer.clone());
    let refund =
        tokio::task::spawn_blocking(move || server.invoice(&customer, 60)).await.expect("an invoice");
    let had = deal.server.balance_msat(&deal.customer);
    let purse = deal.told(&["credits", "refund", &key, &refund, "--json"]).await;
    assert_eq!((&purse["available_msat"], &purse["refunding_msat"]), (&41_000.into(), &0.into()));
    assert_eq!(deal.server.balance_msat(&deal.customer), had + 60_000);
    // The same invoice again pays nothing.
    let again = deal.told(&["credits", "refund", &key, &refund, "--json"]).await;
    assert_eq!((&again["available_msat"], &again["again"]), (&41_000.into(), &true.into()));
    let other = deal.owner(&["credits", "refund", &key, &refund, "--max-fee", "9000"]).await;
    let said = String::from_utf8_lossy(&other.stderr);
    assert!(!other.status.success() && said.contains("it was another one"), "{said}");
    // More than is there pays nothing, either.
    let (server, customer) = (deal.server.clone(), deal.customer.clone());
    let much = tokio::task::spawn_blocking(move || server.invoice(&customer, 42)).await.expect("an invoice");
    let refused = deal.owner(&["credits", "refund", &key, &much]).await;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("41000 msat of credit"), "{said}");
    assert_eq!(deal.server.balance_msat(&deal.customer), had + 60_000);
    let earned = deal.told(&["earnings", "--format", "json"]).await;
    assert_eq!(
        (&earned["total"]["refunds_msat"], &earned["total"]["profit_msat"]),
        (&60_000.into(), &0.into())
    );
    // The wallet agrees: one payment in, one out.
    let told = deal.told(&["ledger", "reconcile", "--json"]).await;
    assert_eq!((&told["clean"], &told["matched"]), (&true.into(), &2.into()), "{told}");
    // What its owner puts into it is foreign, until it is booked.
    deal.server.fund(&deal.provider, 5);
    let found = deal.owner(&["ledger", "reconcile"]).await;
    let (data, talk) = (String::from_utf8_lossy(&found.stdout), String::from_utf8_lossy(&found.stderr));
    assert!(found.status.code() == Some(6) && data.contains("foreign"), "{data}\n{talk}");
    assert!(talk.contains("2 agree with the books") && talk.contains("differences explain 5 sat"), "{talk}");
    let booked = deal.told(&["ledger", "reconcile", "--book", "--json"]).await;
    assert_eq!((&booked["clean"], &booked["booked"]), (&true.into(), &1.into()), "{booked}");
    assert_eq!(booked["balance"]["rest_msat"], 0, "{booked}");
    let again = deal.told(&["ledger", "reconcile", "--book", "--json"]).await;
    assert_eq!((&again["matched"], &again["booked"]), (&3.into(), &0.into()), "{again}");
    // A span that has nothing in it compares nothing.
    let none = ["ledger", "reconcile", "--to", "2020-01-01", "--tz", "UTC", "--json"];
    let none = deal.told(&none).await;
    assert_eq!((&none["read"], &none["clean"], &none["whole"]), (&0.into(), &true.into(), &false.into()));
    assert!(node.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_grant_is_given_once_whether_the_node_runs_or_not() {
    let test = "a_grant_is_given_once_whether_the_node_runs_or_not";
    let Some(deal) = Deal::open(test, Over::Lnbits, &FREE).await else { return };
    let key = deal.customer_hex();
    let grant = ["credits", "grant", &key, "5000", "--id", "welcome", "--note", "hello", "--json"];
    let first = deal.told(&grant).await;
    assert_eq!((&first["available_msat"], &first["again"]), (&5_000.into(), &false.into()));
    let node = deal.home.start();
    until("the node to serve", async || node.status()).await;
    let second = deal.told(&grant).await;
    assert_eq!((&second["available_msat"], &second["again"]), (&5_000.into(), &true.into()));
    let other = deal.owner(&["credits", "grant", &key, "6000", "--id", "welcome", "--note", "hello"]).await;
    let said = String::from_utf8_lossy(&other.stderr);
    assert!(!other.status.success() && said.contains("it was another one"), "{said}");
    // A slip is undone by a transfer that names it, once.
    let undone = deal.told(&["ledger", "correct", "grant:welcome", "--note", "a slip"]).await;
    assert_eq!(undone["transfer"]["id"], "correct:grant:welcome");
    assert_eq!(deal.told(&["ledger", "correct", "grant:welcome", "--note", "a slip"]).await, undone);
    assert_eq!(deal.told(&["credits", "show", &key, "--json"]).await["available_msat"], 0);
    let nothing = deal.owner(&["ledger", "correct", "grant:other"]).await;
    let said = String::from_utf8_lossy(&nothing.stderr);
    assert!(!nothing.status.success() && said.contains("there is no transfer"), "{said}");
    let list: Value = json(&deal.owner(&["credits", "list", "--json"]).await);
    assert_eq!((list.as_array().map(Vec::len), &list[0]["customer"]), (Some(1), &key.into()));
    assert!(node.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_head_is_signed_on_demand_whether_the_node_runs_or_not() {
    let test = "a_head_is_signed_on_demand_whether_the_node_runs_or_not";
    let Some(deal) = Deal::open(test, Over::Lnbits, &FREE).await else { return };
    let (key, node_key) = (deal.customer_hex(), deal.provider_hex());
    let granted = deal.told(&["credits", "grant", &key, "5000", "--id", "welcome", "--json"]).await;
    let unsigned = deal.owner(&["ledger", "show"]).await;
    let said = String::from_utf8_lossy(&unsigned.stderr);
    assert!(said.contains("never signed"), "{said}");
    assert_eq!(deal.told(&["ledger", "show", "--json"]).await["last_seal"], Value::Null);

    let first = deal.told(&["ledger", "seal", "--json"]).await;
    assert!(first["head"]["seq"].as_u64() >= granted["entry"].as_u64(), "{first}");
    let chain = |seal: &Value| {
        let seq = seal["head"]["seq"].as_u64().expect("a number");
        let hash = coinop::store::hash_of(&deal.home.data, seq).expect("readable");
        assert_eq!((hash.as_deref(), &seal["by"]), (seal["head"]["hash"].as_str(), &node_key.clone().into()));
        // The event stands for itself: this is what somebody else keeps.
        let event: Event = serde_json::from_value(seal["event"].clone()).expect("an event");
        event.verify().expect("signed");
        let content: Value = serde_json::from_str(&event.content).expect("JSON");
        assert_eq!((content, event.pubkey.to_hex()), (seal["head"].clone(), node_key.clone()));
        seq
    };
    let first_seq = chain(&first);

    let node = deal.home.start();
    until("the node to serve", async || node.status()).await;
    let second = deal.told(&["ledger", "seal", "--json"]).await;
    assert!(chain(&second) > first_seq, "{second}");
    for told in [deal.told(&["ledger", "show", "--json"]).await, {
        deal.told(&["ledger", "verify", "--json"]).await["verified"].clone()
    }] {
        assert_eq!(told["last_seal"], second, "{told}");
    }
    // For people, the hash stands in the table.
    let table = deal.owner(&["ledger", "seal"]).await;
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(table.contains("signed by") && table.contains(&node_key), "{table}");
    let verified = deal.owner(&["ledger", "verify"]).await;
    let (data, talk) = (String::from_utf8_lossy(&verified.stdout), String::from_utf8_lossy(&verified.stderr));
    assert!(data.contains("3 signed heads") && talk.contains(": head "), "{data}\n{talk}");
    assert!(node.stop().await.success());
}
