//! Strangers in masses.

use clan_wire::peer::ALPN_JOIN;

use super::*;

const FLOOD: usize = 300;
/// What one address gets of the strangers' places.
const STRANGERS: usize = 64;

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_of_the_clan_gets_in_where_strangers_have_taken_every_place() {
    let (founder, clan) = founded(1, tomorrow()).await;
    let second = joined(&founder, &clan, 4, key(5), "bob").await;
    founder.until("the two are connected", |v| v.links.len() == 1).await;
    let entries = second.core.entries().await;
    second.stop().await;
    founder.until("the second one is gone", |v| v.links.is_empty()).await;

    let stranger = endpoint(&key(40)).await;
    let addr = || net::endpoint_addr(&founder.addr(), &[]).unwrap();
    let (mut held, mut closed) = (Vec::new(), JoinSet::new());
    for _ in 0..FLOOD {
        // Some are turned away at once.
        if let Ok(connection) = stranger.connect(addr(), ALPN_JOIN).await {
            let over = connection.clone();
            closed.spawn(async move { over.closed().await });
            held.push(connection);
        }
    }
    assert!(held.len() > STRANGERS, "{} connections", held.len());
    for _ in STRANGERS..held.len() {
        timeout(LIMIT, closed.join_next()).await.expect("there is no place for more").unwrap().unwrap();
    }
    assert_eq!(held.iter().filter(|connection| connection.close_reason().is_none()).count(), STRANGERS);

    let back = Machine::start(key(5), &clan, &entries, endpoint(&key(5)).await, vec![founder.addr()]).await;
    back.until("the machine is connected again", |v| v.links.len() == 1).await;
    founder.until("so says the founder's", |v| v.links.len() == 1).await;
    assert_eq!(held.iter().filter(|connection| connection.close_reason().is_none()).count(), STRANGERS, "as they were");
}
