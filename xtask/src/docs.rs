//! Do the documents name files that exist?

use std::{fs, io, path::Path};

/// Places in code spans of the documents, such as `crates/vm/src/args.rs`, that do not exist below `root`.
pub(crate) fn missing(root: &Path) -> io::Result<Vec<String>> {
    let mut documents = vec![root.join("README.md"), root.join("CHANGELOG.md")];
    for entry in fs::read_dir(root.join("docs"))? {
        documents.push(entry?.path());
    }
    let mut missing = Vec::new();
    for document in documents.iter().filter(|path| path.extension().is_some_and(|e| e == "md")) {
        let text = fs::read_to_string(document)?;
        let gone = places(&text).into_iter().filter(|place| !root.join(place).exists());
        missing.extend(gone.map(|place| format!("{} names {place}, which does not exist", document.display())));
    }
    Ok(missing)
}

fn places(text: &str) -> Vec<&str> {
    let spans = text.split('`').skip(1).step_by(2);
    spans
        .filter(|span| {
            ["crates/", "xtask/", "docs/", "scripts/"].iter().any(|top| span.starts_with(top))
                && !span.contains(['*', '<', ' '])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_spans_that_look_like_places_count() {
        let text = "See `crates/vm/src/args.rs` and crates/none, `clan web`, `docs/x.md`; not `crates/*/src`.";
        assert_eq!(places(text), ["crates/vm/src/args.rs", "docs/x.md"]);
    }

    #[test]
    fn a_file_that_is_gone_is_named_with_its_document() {
        let root = std::env::temp_dir().join(format!("xtask-docs-{}", std::process::id()));
        fs::create_dir_all(root.join("docs")).unwrap();
        for (name, text) in [("README.md", "`docs/a.md`"), ("CHANGELOG.md", ""), ("docs/a.md", "`crates/gone.rs`")] {
            fs::write(root.join(name), text).unwrap();
        }
        let missing = missing(&root);
        fs::remove_dir_all(&root).unwrap();
        let missing = missing.unwrap();
        assert_eq!(missing.len(), 1);
        assert!(missing[0].ends_with("docs/a.md names crates/gone.rs, which does not exist"), "{missing:?}");
    }
}
