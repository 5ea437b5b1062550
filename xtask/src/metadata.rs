//! The dependency graph, from `cargo metadata`.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    process::Command,
};

use serde::Deserialize;

/// Crates and what they depend on, outside of tests and build scripts.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Graph {
    /// Crates of this workspace.
    pub(crate) members: BTreeSet<String>,
    /// Direct dependencies by crate name, with the features that are in force. Several versions of one crate are one.
    pub(crate) dependencies: BTreeMap<String, BTreeSet<String>>,
}

/// Why there is no graph.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MetadataError {
    #[error("cannot run cargo metadata")]
    Run(#[source] io::Error),
    #[error("cargo metadata failed: {0}")]
    Failed(String),
    #[error("cargo metadata prints something else than expected")]
    Parse(#[from] serde_json::Error),
}

/// Asks cargo.
pub(crate) fn load() -> Result<Graph, MetadataError> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["metadata", "--format-version=1", "--locked", "--filter-platform=x86_64-unknown-linux-gnu"];
    let output = Command::new(cargo).args(arguments).output().map_err(MetadataError::Run)?;
    if !output.status.success() {
        return Err(MetadataError::Failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(parse(&output.stdout)?)
}

fn parse(json: &[u8]) -> Result<Graph, serde_json::Error> {
    let metadata: Metadata = serde_json::from_slice(json)?;
    let names: BTreeMap<&str, &str> = metadata.packages.iter().map(|p| (p.id.as_str(), p.name.as_str())).collect();
    let name = |id: &str| names.get(id).copied().unwrap_or(id).to_owned();
    let mut graph =
        Graph { members: metadata.workspace_members.iter().map(|id| name(id)).collect(), ..Graph::default() };
    for node in &metadata.resolve.nodes {
        // A kind of `null` is a normal dependency; the others are "dev" and "build".
        let normal = node.deps.iter().filter(|dep| dep.dep_kinds.iter().any(|kind| kind.kind.is_none()));
        graph.dependencies.entry(name(&node.id)).or_default().extend(normal.map(|dep| name(&dep.pkg)));
    }
    Ok(graph)
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Deserialize)]
struct Kind {
    kind: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_of_tests_do_not_count() {
        let graph = parse(
            br#"{"packages": [{"id": "a 1", "name": "a"}, {"id": "b 1", "name": "b"}, {"id": "c 1", "name": "c"}],
                 "workspace_members": ["a 1"],
                 "resolve": {"nodes": [{"id": "a 1", "deps": [
                     {"pkg": "b 1", "dep_kinds": [{"kind": "dev"}, {"kind": null}]}, {"pkg": "c 1", "dep_kinds": [{"kind": "dev"}]}]}]}}"#,
        )
        .unwrap();
        assert_eq!(graph.members, BTreeSet::from(["a".to_owned()]));
        assert_eq!(graph.dependencies["a"], BTreeSet::from(["b".to_owned()]));
    }
}
