//! What must be true in the end.

use std::collections::{BTreeMap, BTreeSet};

use clan_ledger::{AuthorId, Body, Entry};
use clan_replica::Replica;
use clan_types::{EntryId, Role, Timestamp};
use clan_wire::beacon;

use crate::{
    people::invite_id,
    world::{EPOCH, Node, World},
};

/// More than these lines say nothing new.
const LINES: usize = 12;

/// Whether everybody in good standing has the same ledger, is linked with all the others and knows their beacons. What
/// is not so, one line each.
pub fn agreement(world: &World) -> Vec<String> {
    let Some(witness) = world.witness() else { return vec!["nobody is left".into()] };
    let state = witness.state();
    let good: Vec<(usize, &Node)> = world
        .nodes
        .iter()
        .enumerate()
        .filter(|(_, node)| node.life > 0 && !node.hostile && state.machine_in_good_standing(&node.id).is_some())
        .collect();
    let now = Timestamp::from_millis(EPOCH + world.now);
    let mut wrong = Vec::new();
    for (number, node) in &good {
        if wrong.len() >= LINES {
            break;
        }
        let Some(replica) = node.running.as_ref().map(|running| &running.replica) else {
            wrong.push(format!("machine {number} does not run"));
            continue;
        };
        if replica.vector() != witness.vector() {
            wrong.push(format!("machine {number} has other entries: {}", difference(witness, replica)));
        } else if replica.state() != state {
            wrong.push(format!("machine {number} has the same entries and another state"));
        }
        if replica.is_learning() {
            wrong.push(format!("machine {number} still learns"));
        }
        let others = || good.iter().filter(|(other, _)| other != number);
        let missing: Vec<_> =
            others().filter(|(_, other)| !replica.links().contains_key(&other.id)).map(|(other, _)| *other).collect();
        if !missing.is_empty() {
            wrong.push(format!("machine {number} is not linked with {missing:?}"));
        }
        let stale: Vec<_> = others()
            .filter(|(_, other)| {
                replica
                    .beacons()
                    .get(&other.id)
                    .is_none_or(|known| now.since(known.made) >= beacon::LIFETIME || known.quic != [other.address])
            })
            .map(|(other, _)| *other)
            .collect();
        if !stale.is_empty() {
            wrong.push(format!("machine {number} has no fresh beacon of {stale:?}"));
        }
    }
    wrong
}

fn difference(one: &Replica, other: &Replica) -> String {
    let ids = |replica: &Replica| replica.ledger().entries().map(Entry::id).collect::<BTreeSet<_>>();
    let (one, other) = (ids(one), ids(other));
    format!("lacks {}, has {} more", one.difference(&other).count(), other.difference(&one).count())
}

/// Whether nothing acknowledged is lost, limits held, and nobody has what nobody gave them.
pub fn safety(world: &World) -> Vec<String> {
    let mut wrong = Vec::new();
    let Some(witness) = world.witness() else { return wrong };
    let (ledger, state) = (witness.ledger(), witness.state());
    let entries: BTreeMap<EntryId, &Entry> = ledger.entries().map(|entry| (entry.id(), entry)).collect();

    let honest = |author: &AuthorId| {
        world.people.all.iter().any(|person| !person.hostile && AuthorId::of(&person.key) == *author)
            || world.nodes.iter().any(|node| !node.hostile && AuthorId::of(&node.key) == *author)
    };
    for (entry, (author, node)) in &world.acknowledged {
        // Nobody talks with a machine that was put out: what it alone has stays there. And a liar's word is a liar's.
        let told_by = &world.nodes[*node];
        let talks = state.machine_in_good_standing(&told_by.id).is_some() && !told_by.hostile;
        // Of two entries that a liar signed for one place the ledger keeps one, whichever was told of first.
        let forked = state.equivocations.contains_key(author) && !honest(author);
        if talks && !forked && !entries.contains_key(entry) {
            wrong.push(format!("{entry:?}, acknowledged by machine {node}, is lost"));
        }
    }
    for author in state.equivocations.keys().filter(|author| honest(author)) {
        wrong.push(format!("{author:?} is honest, and signed two entries for one place"));
    }

    for (id, invite) in &state.invites {
        if invite.used > invite.uses {
            wrong.push(format!("{id:?} was used {} of {} times", invite.used, invite.uses));
        }
        let redeemed = entries.values().filter(|entry| match entry.body() {
            Body::Admission { invite, .. } => invite == id && state.people.contains_key(&entry.author().person()),
            _ => false,
        });
        if redeemed.count() > invite.uses as usize {
            wrong.push(format!("{id:?} let in more than {}", invite.uses));
        }
        let rightful = world.people.invitations.iter().any(|known| known.rightful && invite_id(&known.secret) == *id);
        if !rightful {
            wrong.push(format!("{id:?} counts, and nobody entitled has made it"));
        }
    }
    let founder = world.people.all[0].id();
    for (id, person) in &state.people {
        let given = entries.values().find_map(|entry| match entry.body() {
            Body::Admission { invite, .. } if entry.author().person() == *id => {
                let made = world.people.invitations.iter();
                made.filter(|known| known.rightful && invite_id(&known.secret) == *invite)
                    .map(|known| known.role)
                    .next()
            }
            _ => None,
        });
        let expected = if *id == founder { Some(Role::Owner) } else { given };
        if Some(person.role) != expected {
            wrong.push(format!("{} is {:?}, and was made {expected:?}", person.name, person.role));
        }
        let out = person.standing != clan_ledger::Standing::Good;
        if out && !world.people.put_out.contains(id.as_bytes()) {
            wrong.push(format!("{} is out, and nobody entitled has put them out", person.name));
        }
    }
    for (id, machine) in &state.machines {
        let out = machine.standing != clan_ledger::Standing::Good;
        if out && !world.people.put_out.contains(id.as_bytes()) {
            wrong.push(format!("machine {} is out, and nobody entitled has put it out", machine.name));
        }
        let enrolled = entries.values().any(|entry| {
            matches!(entry.body(), Body::Enrol { machine, .. } if machine == id)
                && entry.author().person() == machine.owner
        });
        if !enrolled {
            wrong.push(format!("machine {} is in, and its owner has not enrolled it", machine.name));
        }
    }
    wrong.truncate(LINES);
    wrong
}
