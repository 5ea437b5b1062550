//! Which crate may depend on which.
//!
//! ```text
//! edges        cli
//! services     manager  node
//! cores        replica  ledger  tunnel  pairing   adapters   os  relay  vm  build  transfer  store
//! vocabulary   wire  api           agent (a guest's first program) sees wire and types only
//!              types               lab, xtask are beside all this
//! ```

use std::{
    collections::{BTreeSet, VecDeque},
    fmt,
};

use crate::metadata::Graph;

/// Where a crate stands. Higher ones may depend on lower ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layer {
    /// Names, ids, keys: depends on no other crate of ours.
    Types,
    /// Bytes between programs.
    Wire,
    /// The HTTP contract: data types and a client.
    Contract,
    /// Decides, without I/O.
    Core,
    /// One facility of the system each.
    Adapter,
    /// A daemon.
    Service,
    /// The first program in a guest, with the least in it.
    Guest,
    /// What people run.
    Edge,
    /// Not in the product: anything but edges and services may be used.
    Beside,
}

/// INVARIANT: every crate of the workspace is in this table; a new one has to be given its place.
const LAYERS: &[(&str, Layer)] = &[
    ("clan-types", Layer::Types),
    ("clan-wire", Layer::Wire),
    ("clan-api", Layer::Contract),
    ("clan-ledger", Layer::Core),
    ("clan-replica", Layer::Core),
    ("clan-pairing", Layer::Core),
    ("clan-tunnel", Layer::Core),
    ("clan-os", Layer::Adapter),
    ("clan-relay", Layer::Adapter),
    ("clan-vm", Layer::Adapter),
    ("clan-build", Layer::Adapter),
    ("clan-transfer", Layer::Adapter),
    ("clan-store", Layer::Adapter),
    ("clan-agent", Layer::Guest),
    ("clan-node", Layer::Service),
    ("clan-manager", Layer::Service),
    ("clan-cli", Layer::Edge),
    ("clan-lab", Layer::Beside),
    ("clan-hostile", Layer::Beside),
    ("clan-cramped", Layer::Beside),
    ("clan-sim", Layer::Beside),
    ("xtask", Layer::Beside),
];

/// Dependencies against the rule, each with the reason that it was allowed for.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("clan-store", "clan-ledger", "the store keeps ledger entries, and checks on opening that they still chain"),
    ("clan-transfer", "clan-os", "its messages are framed on QUIC streams as on every other, which os does"),
    ("clan-replica", "clan-ledger", "replication is about ledgers; both are pure, and the ledger knows nothing of it"),
    (
        "clan-os",
        "clan-tunnel",
        "the packet transport in os drives the path choice, which is pure, from its receive loop",
    ),
];

/// What no core may depend on, however indirectly.
const IMPURE: &[&str] = &["tokio", "mio", "async-std", "smol", "iroh", "socket2"];

/// A dependency that should not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Problem {
    /// A crate has no place yet.
    Unplaced(String),
    /// The table names a crate that is not there.
    Gone(String),
    /// A dependency that does not point downwards.
    Upwards { from: String, to: String, why: &'static str },
    /// A core reaches what it must not, by this way.
    Impure { way: Vec<String> },
    /// An exception that nothing needs any more.
    Unneeded { from: String, to: String },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unplaced(name) => write!(f, "{name} has no layer: give it one in xtask/src/layers.rs"),
            Self::Gone(name) => write!(f, "{name} has a layer but does not exist: remove it from xtask/src/layers.rs"),
            Self::Upwards { from, to, why } => write!(f, "{from} must not depend on {to}: {why}"),
            Self::Impure { way } => {
                write!(f, "a core must not reach {}: {}", way.last().map_or("", String::as_str), way.join(" -> "))
            }
            Self::Unneeded { from, to } => {
                write!(f, "{from} no longer depends on {to}: remove the exception from xtask/src/layers.rs")
            }
        }
    }
}

/// Everything that is wrong with a graph; empty if nothing is.
pub(crate) fn check(graph: &Graph) -> Vec<Problem> {
    let mut problems = Vec::new();
    problems.extend(graph.members.iter().filter(|name| layer(name).is_none()).cloned().map(Problem::Unplaced));
    problems.extend(
        LAYERS
            .iter()
            .filter(|(name, _)| !graph.members.contains(*name))
            .map(|(name, _)| Problem::Gone((*name).to_owned())),
    );
    for from in &graph.members {
        let ours = graph.dependencies.get(from).into_iter().flatten().filter(|to| graph.members.contains(*to));
        for to in ours {
            let excepted = EXCEPTIONS.iter().any(|(f, t, _)| f == from && t == to);
            if let (Some(above), Some(below), false) = (layer(from), layer(to), excepted)
                && let Err(why) = may_use(above, below)
            {
                problems.push(Problem::Upwards { from: from.clone(), to: to.clone(), why });
            }
        }
        if layer(from) == Some(Layer::Core) {
            problems
                .extend(IMPURE.iter().filter_map(|target| way(graph, from, target)).map(|way| Problem::Impure { way }));
        }
    }
    let needed = |from: &str, to: &str| graph.dependencies.get(from).is_some_and(|all| all.contains(to));
    let unneeded = EXCEPTIONS.iter().filter(|(from, to, _)| !needed(from, to));
    problems.extend(unneeded.map(|(from, to, _)| Problem::Unneeded { from: (*from).to_owned(), to: (*to).to_owned() }));
    problems
}

fn layer(name: &str) -> Option<Layer> {
    LAYERS.iter().find(|(known, _)| *known == name).map(|(_, layer)| *layer)
}

fn may_use(above: Layer, below: Layer) -> Result<(), &'static str> {
    use Layer::{Adapter, Beside, Contract, Core, Edge, Guest, Service, Types, Wire};
    match (above, below) {
        (Types, _) => Err("it is the foundation, and depends on no other crate of the workspace"),
        (_, Types) | (Guest, Wire) => Ok(()),
        (Guest, _) => Err("the guest's first program holds vocabulary and nothing else"),
        (_, Guest) => Err("the guest's first program is a file in an image, not a library"),
        (Wire | Contract, _) => Err("it is vocabulary: only types is below it"),
        (_, Beside) => Err("nothing in the product depends on what is beside it"),
        (Core, Wire)
        | (Adapter, Wire)
        | (Service, Wire | Contract | Core | Adapter)
        | (Edge, Wire | Contract | Service) => Ok(()),
        (Beside, Wire | Contract | Core | Adapter) => Ok(()),
        (Core | Adapter, Core | Adapter) => Err(
            "cores and adapters do not see each other: let a service join them, or add an exception with its reason",
        ),
        (Core | Adapter, Contract) => Err("the HTTP contract concerns services and edges only"),
        (Service, Service) => {
            Err("the manager and the controller are different programs in different trust: they share wire")
        }
        (Edge, Core | Adapter) => Err("edges reach them through the services"),
        (Edge, Edge) | (Core | Adapter | Service, Edge) => Err("edges are on top"),
        (Core | Adapter, Service) => Err("services are above"),
        (Beside, Service | Edge) => Err("what is beside the product runs its programs and does not link them"),
    }
}

/// The shortest way from a crate to another, if there is one.
fn way(graph: &Graph, from: &str, to: &str) -> Option<Vec<String>> {
    let mut ways = VecDeque::from([vec![from.to_owned()]]);
    let mut seen = BTreeSet::new();
    while let Some(way) = ways.pop_front() {
        let last = way.last()?;
        if last == to {
            return Some(way);
        }
        for next in graph.dependencies.get(last).into_iter().flatten() {
            if seen.insert(next.clone()) {
                ways.push_back(way.iter().cloned().chain([next.clone()]).collect());
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A graph in which all crates exist and all exceptions are needed, with these dependencies on top.
    fn graph(extra: &[(&str, &str)]) -> Graph {
        let mut graph =
            Graph { members: LAYERS.iter().map(|(name, _)| (*name).to_owned()).collect(), ..Graph::default() };
        let excepted = EXCEPTIONS.iter().map(|(from, to, _)| (*from, *to));
        for (from, to) in excepted.chain(extra.iter().copied()) {
            graph.dependencies.entry(from.to_owned()).or_default().insert(to.to_owned());
        }
        graph
    }

    #[test]
    fn dependencies_that_point_downwards_are_fine() {
        let fine = [
            ("clan-cli", "clan-manager"),
            ("clan-cli", "clan-api"),
            ("clan-manager", "clan-api"),
            ("clan-manager", "clan-vm"),
            ("clan-node", "clan-ledger"),
            ("clan-ledger", "clan-types"),
            ("clan-vm", "clan-wire"),
            ("clan-node", "tokio"),
            ("clan-os", "tokio"),
        ];
        assert_eq!(check(&graph(&fine)), []);
    }

    #[test]
    fn reversed_edges_are_found() {
        for (from, to) in [
            ("clan-types", "clan-wire"),
            ("clan-ledger", "clan-store"),
            ("clan-vm", "clan-build"),
            ("clan-ledger", "clan-tunnel"),
            ("clan-node", "clan-manager"),
            ("clan-api", "clan-manager"),
            ("clan-cli", "clan-vm"),
            ("clan-os", "clan-api"),
            ("clan-manager", "clan-lab"),
            ("clan-agent", "clan-os"),
            ("clan-build", "clan-agent"),
        ] {
            let problems = check(&graph(&[(from, to)]));
            assert!(
                matches!(problems.as_slice(), [Problem::Upwards { from: f, to: t, .. }] if f == from && t == to),
                "{from} -> {to}: {problems:?}"
            );
        }
    }

    #[test]
    fn a_runtime_under_a_core_is_found_however_deep_it_is() {
        let problems = check(&graph(&[("clan-tunnel", "middle"), ("middle", "lower"), ("lower", "tokio")]));
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].to_string(), "a core must not reach tokio: clan-tunnel -> middle -> lower -> tokio");
    }

    #[test]
    fn a_cycle_does_not_hang_the_search() {
        assert_eq!(check(&graph(&[("clan-tunnel", "a"), ("a", "b"), ("b", "a")])), []);
    }

    #[test]
    fn a_crate_without_a_place_is_found() {
        let mut graph = graph(&[]);
        graph.members.insert("clan-new".into());
        assert_eq!(check(&graph), [Problem::Unplaced("clan-new".into())]);
    }

    #[test]
    fn an_exception_that_nothing_needs_is_found() {
        let mut graph = graph(&[]);
        graph.dependencies.remove("clan-os");
        assert_eq!(check(&graph), [Problem::Unneeded { from: "clan-os".into(), to: "clan-tunnel".into() }]);
    }
}
