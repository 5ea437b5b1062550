//! Clans whose ledger is larger than any message.

use clan_wire::peer::{ALPN_JOIN, EntryPage, JoinRequest, JoinResponse, MAX_MESSAGE, MAX_PAGE};

use super::*;

/// More than fit into a message, and more than one answer between machines carries.
const ENTRIES: usize = 24_000;

/// As [`founded`], after some years.
fn old_clan() -> Ledger {
    let (founder, machine) = (key(1), key(2));
    let (mut ledger, _) =
        Ledger::found(&founder, "family".parse().unwrap(), "ada".parse().unwrap(), [9; 32], now()).unwrap();
    let clan = ledger.clan();
    add(&mut ledger, &founder, enrol(&clan, &founder, &machine, "founder"));
    let invite = InviteId::from_bytes(key(3).verifying_key().to_bytes());
    add(
        &mut ledger,
        &founder,
        Body::Invite { invite, role: Role::Member, uses: 3, expires: tomorrow(), approval: false },
    );
    let machine = MachineId::from_bytes(machine.verifying_key().to_bytes());
    while ledger.len() < ENTRIES {
        let name = format!("founder-{}", ledger.len()).parse().unwrap();
        add(&mut ledger, &founder, Body::RenameMachine { machine, name });
    }
    assert!(encode(&ledger).iter().map(Vec::len).sum::<usize>() > MAX_MESSAGE);
    ledger
}

/// A machine that the link names, and that gives two pages and no more: the second is a new one, or the first again.
async fn breaks_off(ledger: &Ledger, machine: &SigningKey, repeats: bool) -> PeerAddr {
    let endpoint = endpoint(machine).await;
    let addr = PeerAddr {
        machine: MachineId::from_bytes(machine.verifying_key().to_bytes()),
        addrs: endpoint.bound_sockets(),
    };
    let all = encode(ledger);
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let connection = incoming.await.unwrap();
            assert_eq!(connection.alpn(), ALPN_JOIN);
            let (mut send, mut recv) = connection.accept_bi().await.unwrap();
            let _: JoinRequest = recv_message(&mut recv, MAX_MESSAGE).await.unwrap();
            send_message(&mut send, &JoinResponse::Admitted { peers: vec![] }, MAX_MESSAGE).await.unwrap();
            for part in [0, usize::from(!repeats)] {
                let entries = all[part * 1000..][..1000].to_vec();
                send_message(&mut send, &EntryPage { entries, more: true }, MAX_PAGE).await.unwrap();
            }
            send.finish().unwrap();
            connection.closed().await;
        }
    });
    addr
}

#[tokio::test]
async fn a_newcomer_gets_a_ledger_that_no_message_holds_and_then_what_is_new() {
    let ledger = old_clan();
    let clan = ledger.clan();
    let founder = Machine::start(key(2), &clan, &encode(&ledger), endpoint(&key(2)).await, vec![]).await;

    // Machines of the link that break off, or go on for ever, cost nothing.
    let peers = vec![breaks_off(&ledger, &key(30), false).await, breaks_off(&ledger, &key(31), true).await];
    let peers = [peers, vec![founder.addr()]].concat();
    let mine = newcomer(&clan, 4, &key(5), "bob");
    let (from, whole) = ask_one_of(peers, &key(5), mine).await;
    let whole = encode(&whole.unwrap().ledger);
    assert_eq!(whole.len(), ENTRIES + 3);
    let second = Machine::start(key(5), &clan, &whole, from, vec![founder.addr()]).await;
    second.until("connected", |v| v.links.len() == 1).await;

    // A machine that has lost everything asks until it has it again.
    let third = joined(&founder, &clan, 6, key(7), "eve").await;
    third.stop().await;
    let third = Machine::start(key(7), &clan, &[], endpoint(&key(7)).await, vec![founder.addr()]).await;
    third.until("everything is known", |v| v.entries as usize == ENTRIES + 6).await;
    assert_eq!(third.core.view().state, founder.core.view().state);

    let invite = InviteId::from_bytes(key(8).verifying_key().to_bytes());
    let body = Body::Invite { invite, role: Role::Member, uses: 1, expires: tomorrow(), approval: false };
    let mut ledger = Ledger::open(clan);
    ledger.insert_all(founder.core.entries().await.iter().map(|entry| clan_ledger::Entry::decode(entry).unwrap()));
    let entry = ledger.author(&key(1), body, now()).unwrap().encode();
    founder.core.insert(vec![entry]).await.unwrap();
    for machine in [&second, &third] {
        machine.until("what is new arrives", |v| v.state.invites.contains_key(&invite)).await;
    }
}
