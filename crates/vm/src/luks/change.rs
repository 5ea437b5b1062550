//! Another passphrase for a disk that has one: its key is written down for the new passphrase, then no more for the old one.
//!
//! INVARIANT: wherever this is cut short, one of the two opens the disk. A slot counts when all of it is on disk, as one word of
//! four bytes says, which no power cut tears; the old one is touched only after the new one was found to be good.

use std::{fs::File, io};

use clan_types::Passphrase;

use super::{
    DISABLED, ENABLED, FIRST_SLOT, Layout, LuksError, MATERIAL, SECTOR, SLOT, SLOTS, SLOTS_AT, fill, random, split,
    stretched, word,
};

/// Does it, unless that was done before; a virtual machine may have the disk open. `iterations` is what a guess of the new
/// passphrase costs. `write` writes bytes at a place of the disk, and returns when they are there to stay.
pub(crate) fn change(
    disk: &File,
    old: &Passphrase,
    new: &Passphrase,
    iterations: u32,
    mut write: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> Result<(), LuksError> {
    let layout = Layout::read(disk)?;
    let present = match layout.key(disk, new) {
        Ok((slot, _)) => Some(slot),
        Err(LuksError::WrongPassphrase) => None,
        Err(error) => return Err(error),
    };
    let (leaves, key) = match (layout.key(disk, old), present) {
        (Ok((leaves, _)), Some(slot)) if leaves == slot => return Ok(()),
        (Ok(found), _) => found,
        // An earlier attempt came to its end.
        (Err(LuksError::WrongPassphrase), Some(_)) => return Ok(()),
        (Err(error), _) => return Err(error),
    };
    if present.is_none() {
        let usable = |slot: &usize| {
            word(layout.slot(*slot), 0) == DISABLED
                && layout.material(*slot).is_some_and(|at| at >= (FIRST_SLOT * SECTOR) as u64)
        };
        let slot = (0..SLOTS).find(usable).ok_or(LuksError::Full)?;
        let salt: [u8; 32] = random()?;
        let mut material = split(&key)?;
        stretched(new, &salt, iterations).encrypt(0, &mut material);
        write(layout.material(slot).ok_or(LuksError::Full)?, &material)?;
        let mut rest = iterations.to_be_bytes().to_vec();
        rest.extend_from_slice(&salt);
        write(header(slot) + 4, &rest)?;
        write(header(slot), &ENABLED.to_be_bytes())?;
        let written = Layout::read(disk)?;
        if written.key_in(slot, disk, new)?.is_none_or(|read| *read != *key) {
            return Err(LuksError::Damaged("it does not keep what is written to it"));
        }
    }
    let mut noise = vec![0; MATERIAL];
    fill(&mut noise)?;
    write(layout.material(leaves).ok_or(LuksError::Full)?, &noise)?;
    write(header(leaves), &DISABLED.to_be_bytes())?;
    Ok(())
}

/// Where the header of a slot is, in bytes.
const fn header(slot: usize) -> u64 {
    (SLOTS_AT + slot * SLOT) as u64
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::{super::tests::phrase, *};
    use crate::luks::Luks;

    const OLD: &str = "correct horse";
    const NEW: &str = "battery staple";
    const ITERATIONS: u32 = 10;

    fn disk() -> tempfile::NamedTempFile {
        let (begin, _) = Luks::create(&phrase(OLD), ITERATIONS).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&begin, 0).unwrap();
        file.as_file().set_len(4 << 20).unwrap();
        file
    }

    fn opens(file: &File, passphrase: &str) -> bool {
        match Layout::read(file).and_then(|layout| layout.open(file, &phrase(passphrase))) {
            Ok(_) => true,
            Err(LuksError::WrongPassphrase) => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// Changes it, until so many writes were done, of the last of which only so many bytes were.
    fn cut(file: &File, writes: usize, bytes: usize) -> Result<(), LuksError> {
        let mut done = 0;
        change(file, &phrase(OLD), &phrase(NEW), ITERATIONS, |at, what| {
            done += 1;
            if done <= writes {
                return file.write_all_at(what, at);
            }
            file.write_all_at(&what[..bytes.min(what.len())], at)?;
            Err(io::Error::other("the power failed"))
        })
    }

    #[test]
    fn the_new_passphrase_opens_a_disk_and_the_old_one_does_not() {
        let file = disk();
        let file = file.as_file();
        let before = Layout::read(file).unwrap().key(file, &phrase(OLD)).unwrap().1;
        cut(file, usize::MAX, 0).unwrap();
        assert!(opens(file, NEW) && !opens(file, OLD));
        assert_eq!(Layout::read(file).unwrap().key(file, &phrase(NEW)).unwrap().1, before, "the data stays as it is");
        cut(file, 0, 0).unwrap();
        let back = change(file, &phrase(NEW), &phrase(OLD), ITERATIONS, |at, what| file.write_all_at(what, at));
        back.unwrap();
        assert!(opens(file, OLD) && !opens(file, NEW), "and there is room again");
        let wrong = change(file, &phrase("neither of them"), &phrase(NEW), ITERATIONS, |_, _| panic!("it writes"));
        assert!(matches!(wrong, Err(LuksError::WrongPassphrase)));
        change(file, &phrase(OLD), &phrase(OLD), ITERATIONS, |_, _| panic!("it writes")).unwrap();
    }

    #[test]
    fn wherever_it_is_cut_short_one_of_the_two_opens_and_doing_it_again_ends_it() {
        for writes in 0..5 {
            // A word is there or not.
            for bytes in if writes == 2 || writes == 4 { vec![0, 4] } else { vec![0, 1, 17, 512, 4096, usize::MAX] } {
                let file = disk();
                let file = file.as_file();
                cut(file, writes, bytes).unwrap_err();
                let (old, new) = (opens(file, OLD), opens(file, NEW));
                assert!(old || new, "after {writes} writes and {bytes} bytes");
                assert!(writes != 0 || old && !new);
                let again = cut(file, usize::MAX, 0);
                assert!(again.is_ok() && opens(file, NEW) && !opens(file, OLD), "{again:?} after {writes}, {bytes}");
            }
        }
        let file = disk();
        cut(file.as_file(), 5, 0).unwrap();
    }

    #[test]
    fn a_disk_without_room_for_another_key_stays_as_it_is() {
        let file = disk();
        let file = file.as_file();
        for slot in 1..SLOTS {
            // Of somebody else, and not damaged.
            let mut other = vec![0, 0, 0, 1];
            other.extend_from_slice(&[7; 32]);
            file.write_all_at(&other, header(slot) + 4).unwrap();
            file.write_all_at(&ENABLED.to_be_bytes(), header(slot)).unwrap();
        }
        assert!(matches!(cut(file, 0, 0), Err(LuksError::Full)));
        assert!(opens(file, OLD));
    }
}
