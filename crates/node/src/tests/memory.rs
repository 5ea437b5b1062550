//! What a manager remembers and asks, over its channel.

use clan_os::channel::{Channel, recv_page, send_pages};
use clan_wire::control::{self, ControlResponse};

use super::*;
use crate::memory;

#[tokio::test]
async fn a_manager_is_given_what_is_new_and_gives_back_what_the_machine_lost() {
    let (founder, clan) = founded(5, tomorrow()).await;
    let old = encode(&{
        let mut ledger = Ledger::open(clan);
        let known = founder.core.entries().await;
        ledger.insert_all(known.iter().map(|entry| clan_ledger::Entry::decode(entry).unwrap()));
        ledger
    });
    let (_newcomer, outcome) = ask(&founder, &key(5), newcomer(&clan, 4, &key(5), "bob")).await;
    let whole = outcome.unwrap();
    let restored = Machine::start(key(2), &clan, &old, endpoint(&key(12)).await, vec![]).await;

    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let cancel = CancellationToken::new();
    let (manager, driver) = Channel::host(ours, "test", cancel.clone());
    let (_guest, mut incoming, guest_driver) = Channel::guest(theirs, "test", cancel.clone());
    tokio::spawn(driver);
    tokio::spawn(guest_driver);
    let (stream, asked) = tokio::join!(manager.open(), incoming.accept());
    let (mut stream, asked) = (stream.unwrap(), asked.unwrap());
    let serving = tokio::spawn({
        let core = founder.core.clone();
        let mut have = Ledger::open(clan);
        have.insert_all(old.iter().map(|entry| clan_ledger::Entry::decode(entry).unwrap()));
        async move { memory::give(asked, &core, have.vector()).await }
    });
    let answer = recv_message::<ControlResponse, _>(&mut stream, control::MAX_MESSAGE).await.unwrap();
    assert_eq!(answer, ControlResponse::Entries(founder.core.view().vector.to_vec()));
    let new = recv_page(&mut stream).await.unwrap();
    assert_eq!((new.entries.len(), new.more), (whole.len() - old.len(), false), "not what was known");
    drop(stream);
    serving.await.unwrap();

    let (stream, asked) = tokio::join!(manager.open(), incoming.accept());
    let (mut stream, mut asked) = (stream.unwrap(), asked.unwrap());
    let serving = tokio::spawn({
        let core = restored.core.clone();
        async move { memory::take(&mut asked, &core, true).await }
    });
    send_pages(&mut stream, &new.entries).await.unwrap();
    assert_eq!(serving.await.unwrap(), ControlResponse::Remembered { sure: false }, "bob may know more");
    assert_eq!(restored.core.view().state, founder.core.view().state);
    cancel.cancel();
}
