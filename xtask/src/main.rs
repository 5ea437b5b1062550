//! Chores of the workspace: `cargo xtask <chore>`.

mod bench;
mod docs;
mod layers;
mod metadata;

use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

const USAGE: &str =
    "usage: cargo xtask check-deps    dependencies point downwards only, and no core depends on tokio\n";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some("check-deps"), None) => check_deps(),
        (Some("check-docs"), None) => check_docs(),
        (Some("bench"), None) => bench(),
        _ => {
            tell(&mut io::stderr(), USAGE);
            ExitCode::from(2)
        }
    }
}

fn check_deps() -> ExitCode {
    let graph = match metadata::load() {
        Ok(graph) => graph,
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            tell(&mut io::stderr(), &format!("check-deps: {error}{cause}\n"));
            return ExitCode::FAILURE;
        }
    };
    let problems = layers::check(&graph);
    for problem in &problems {
        tell(&mut io::stderr(), &format!("check-deps: {problem}\n"));
    }
    if problems.is_empty() {
        tell(
            &mut io::stdout(),
            &format!("check-deps: {} crates, every dependency points downwards\n", graph.members.len()),
        );
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn check_docs() -> ExitCode {
    // The workspace is the folder above this crate.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(Default::default, Path::to_path_buf);
    match docs::missing(&root) {
        Ok(missing) if missing.is_empty() => ExitCode::SUCCESS,
        Ok(missing) => {
            missing.iter().for_each(|problem| tell(&mut io::stderr(), &format!("check-docs: {problem}\n")));
            ExitCode::FAILURE
        }
        Err(error) => {
            tell(&mut io::stderr(), &format!("check-docs: cannot read the documents: {error}\n"));
            ExitCode::FAILURE
        }
    }
}

fn bench() -> ExitCode {
    match bench::run(&mut io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&mut io::stderr(), &format!("bench: {error}\n"));
            ExitCode::FAILURE
        }
    }
}

fn tell(to: &mut impl Write, text: &str) {
    // Whoever reads it may have gone; the exit status still tells.
    let _ = to.write_all(text.as_bytes());
}
