//! The corpora that fuzzing has brought about, with the ordinary compiler: what was found once stays mended.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::{collections::BTreeSet, fs, path::Path};

use clan_hostile::TARGETS;

fn corpora() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus")
}

fn replay(name: &str) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).unwrap();
    let mut count = 0;
    for file in fs::read_dir(corpora().join(name)).unwrap() {
        target(&fs::read(file.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 0, "the corpus of {name} is empty");
}

macro_rules! replays {
    ($($name:ident),*) => {
        $(#[test] fn $name() { replay(stringify!($name)); })*

        #[test]
        fn every_target_has_a_program_a_corpus_and_a_test() {
            let targets: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
            let tests: BTreeSet<_> = [$(stringify!($name)),*].into_iter().map(str::to_owned).collect();
            let names = |dir: &Path| -> BTreeSet<String> {
                let files = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
                files.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
            };
            assert_eq!(targets, tests);
            assert_eq!(targets, names(&corpora()));
            assert_eq!(targets, names(&corpora().join("../fuzz_targets")));
        }
    };
}

replays!(entry, peer, join, control, mux, link, manifest, dns, probe, packet, multicast, words, helm, qmp);

/// `UPDATE=1` writes them where they are missing.
#[test]
fn fuzzing_begins_with_well_formed_input() {
    for (name, input) in clan_hostile::seeds() {
        let path = corpora().join(name).join(&blake3::hash(&input).to_hex().as_str()[..40]);
        if std::env::var_os("UPDATE").is_some() && !path.exists() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, &input).unwrap();
        }
        TARGETS.iter().find(|(known, _)| *known == name).unwrap().1(&input);
    }
}
