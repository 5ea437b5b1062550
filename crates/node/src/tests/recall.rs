//! Where the others were, over a restart.

use super::*;
use crate::recall;

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_knows_nobody_but_from_before_finds_them_again() {
    let (founder, clan) = founded(1, tomorrow()).await;
    let second = joined(&founder, &clan, 4, key(5), "bob").await;
    founder
        .until("the other one's addresses", |v| v.beacons.get(&second.id()).is_some_and(|b| !b.quic.is_empty()))
        .await;
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(recall::load(dir.path()), [], "nobody yet");

    // What is known when the machine stops is kept.
    let cancel = CancellationToken::new();
    cancel.cancel();
    recall::keep(dir.path().to_owned(), Vec::new(), founder.core.clone(), cancel.clone()).await;
    let remembered = recall::load(dir.path());
    assert_eq!(remembered, [PeerAddr { machine: second.id(), addrs: second.addr().addrs }]);

    // The founder was told of nobody when it came into the clan. The other one does not know where it is now.
    let (entries, own) = (founder.core.entries().await, founder.key.clone());
    founder.stop().await;
    let again = Machine::start(own.clone(), &clan, &entries, endpoint(&own).await, Vec::new()).await;
    let after = recall::load(dir.path());
    recall::keep(dir.path().to_owned(), after.clone(), again.core.clone(), cancel).await;
    assert_eq!(recall::load(dir.path()), after, "a machine that is not there is not forgotten");
    again.stop().await;
    let again = Machine::start(own.clone(), &clan, &entries, endpoint(&own).await, after).await;
    again.until("the two are connected", |v| v.links.contains_key(&second.id())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_put_out_is_forgotten_and_a_damaged_file_is_put_aside() {
    let (founder, clan) = founded(1, tomorrow()).await;
    let second = joined(&founder, &clan, 4, key(5), "bob").await;
    let id = second.id();
    founder.until("the other one's addresses", |v| v.beacons.get(&id).is_some_and(|b| !b.quic.is_empty())).await;
    let cancel = CancellationToken::new();
    let dir = tempfile::tempdir().unwrap();
    let keeping = tokio::spawn(recall::keep(dir.path().to_owned(), Vec::new(), founder.core.clone(), cancel.clone()));
    let mut ledger = Ledger::open(clan);
    ledger.insert_all(founder.core.entries().await.iter().map(|entry| clan_ledger::Entry::decode(entry).unwrap()));
    let revoke = ledger.author(&key(1), Body::RevokeMachine { machine: id, last: None }, now()).unwrap();
    founder.core.insert(vec![revoke.encode()]).await.unwrap();
    founder.until("bob is out", |v| v.links.is_empty()).await;
    cancel.cancel();
    keeping.await.unwrap();
    assert_eq!(recall::load(dir.path()), []);

    std::fs::write(dir.path().join(recall::FILE), "{\"version\":1,\"peers\":7}").unwrap();
    assert_eq!(recall::load(dir.path()), []);
    let aside =
        std::fs::read_dir(dir.path()).unwrap().flatten().any(|e| e.file_name().to_string_lossy().contains(".corrupt-"));
    assert!(aside, "{:?}", std::fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect::<Vec<_>>());
}
