//! LUKS 1, the format of an encrypted data disk: QEMU opens it, and so does `cryptsetup` on a computer without Clan.
//! <https://gitlab.com/cryptsetup/cryptsetup/-/wikis/LUKS-standard/on-disk-format.pdf>
//!
//! Only what this needs: AES-256 in XTS mode by sectors of 512 bytes, keys from a passphrase by PBKDF2 with SHA-256. Ciphers and
//! hashes are crates'; here is how LUKS puts them together.
//!
//! Why it is written here: `qemu-img` makes an empty encrypted disk, but puts no file system on it that leaves the rest a hole.
//! Its `convert` writes the whole size (2 GiB of file for 1 MiB of ext4), or, told that the target is zero, leaves out blocks of
//! zeros that the file system needs: where they should be is noise, and `e2fsck` finds damaged bitmaps. `cryptsetup` opens a disk
//! for programs as root only. And a passphrase is to be judged while a virtual machine has the disk open.

mod change;
mod xts;

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use clan_types::Passphrase;
use pbkdf2::pbkdf2_hmac;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

pub(crate) use change::change;
use xts::Xts;

pub(crate) const SECTOR: usize = 512;
const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
const HEADER: usize = 592;
const SLOTS_AT: usize = 208;
const SLOT: usize = 48;
const SLOTS: usize = 8;
const ENABLED: u32 = 0x00ac_71f3;
const DISABLED: u32 = 0x0000_dead;
/// AES-256, twice: one key for the data, one for the tweak.
const KEY: usize = 64;
const STRIPES: usize = 4000;
const MATERIAL: usize = KEY * STRIPES;
/// In sectors: slots begin at multiples of 4 KiB, and the data where `cryptsetup` has it begin.
const FIRST_SLOT: usize = 8;
const SLOT_SECTORS: usize = 504;
const PAYLOAD: usize = 4096;
/// Of headers by others, the data may begin later.
const LAST_PAYLOAD: u32 = (64 << 20) / 512;
/// A key of 512 random bits needs no slow hash.
const DIGEST_ITERATIONS: u32 = 1000;
const DIGEST: usize = 20;

/// How long a guess of the passphrase shall take this computer.
const GUESS: Duration = Duration::from_secs(1);
/// As few as OWASP recommends for PBKDF2 with SHA-256; also on a computer that is slow, or busy.
const LEAST_ITERATIONS: u32 = 600_000;
/// A header that asks for more than any computer does now is damaged.
const MOST_ITERATIONS: u32 = 200_000_000;
const SAMPLE: u32 = 20_000;

/// Why an encrypted disk does not open.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LuksError {
    #[error("the passphrase is wrong")]
    WrongPassphrase,
    #[error("it does not begin as an encrypted disk does: {0}")]
    Damaged(&'static str),
    #[error("all of its places for keys are taken")]
    Full,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// An encrypted disk that is open.
pub(crate) struct Luks {
    cipher: Xts,
}

/// Where things are, without a key.
pub(crate) struct Layout {
    bytes: [u8; HEADER],
    payload: u32,
}

impl Luks {
    /// A new disk's beginning, and what encrypts the rest. `iterations` is what a guess of the passphrase costs.
    pub(crate) fn create(passphrase: &Passphrase, iterations: u32) -> io::Result<(Vec<u8>, Self)> {
        let key: Zeroizing<[u8; KEY]> = Zeroizing::new(random()?);
        let (digest_salt, salt, uuid): ([u8; 32], [u8; 32], [u8; 16]) = (random()?, random()?, random()?);
        let mut bytes = vec![0; FIRST_SLOT * SECTOR];
        let mut put = |at: usize, what: &[u8]| bytes[at..at + what.len()].copy_from_slice(what);
        put(0, &MAGIC);
        put(6, &1u16.to_be_bytes());
        put(8, b"aes");
        put(40, b"xts-plain64");
        put(72, b"sha256");
        put(104, &sectors(PAYLOAD));
        put(108, &sectors(KEY));
        put(112, &digest(&key, &digest_salt, DIGEST_ITERATIONS));
        put(132, &digest_salt);
        put(164, &DIGEST_ITERATIONS.to_be_bytes());
        put(168, uuid_text(uuid).as_bytes());
        for slot in 0..SLOTS {
            let at = SLOTS_AT + slot * SLOT;
            put(at, &if slot == 0 { ENABLED } else { DISABLED }.to_be_bytes());
            put(at + 40, &sectors(FIRST_SLOT + slot * SLOT_SECTORS));
            put(at + 44, &sectors(STRIPES));
        }
        put(SLOTS_AT + 4, &iterations.to_be_bytes());
        put(SLOTS_AT + 8, &salt);
        let mut material = split(&key)?;
        stretched(passphrase, &salt, iterations).encrypt(0, &mut material);
        bytes.extend_from_slice(&material);
        Ok((bytes, Self { cipher: Xts::new(&key) }))
    }

    /// Encrypts whole sectors of the data, of which `at` is the first.
    pub(crate) fn encrypt(&self, at: u64, data: &mut [u8]) {
        self.cipher.encrypt(at, data);
    }

    /// Decrypts whole sectors of the data, of which `at` is the first.
    #[cfg(test)]
    pub(crate) fn decrypt(&self, at: u64, data: &mut [u8]) {
        self.cipher.decrypt(at, data);
    }
}

impl Layout {
    /// Reads it. Nothing of the passphrase is needed for that.
    pub(crate) fn read(disk: &File) -> Result<Self, LuksError> {
        let mut bytes = [0; HEADER];
        disk.read_exact_at(&mut bytes, 0).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => LuksError::Damaged("it is too short"),
            _ => error.into(),
        })?;
        let text = |at: usize, known: &[u8]| bytes[at..at + known.len()] == *known && bytes[at + known.len()] == 0;
        if bytes[..6] != MAGIC || bytes[6..8] != 1u16.to_be_bytes() {
            return Err(LuksError::Damaged("the mark of LUKS 1 is not there"));
        }
        if !text(8, b"aes") || !text(40, b"xts-plain64") || !text(72, b"sha256") {
            return Err(LuksError::Damaged("it is encrypted in another way"));
        }
        let layout = Self { payload: word(&bytes, 104), bytes };
        if word(&bytes, 108) != KEY as u32 || !(SLOT_SECTORS as u32..=LAST_PAYLOAD).contains(&layout.payload) {
            return Err(LuksError::Damaged("its sizes make no sense"));
        }
        Ok(layout)
    }

    /// Where the data begins, in bytes.
    pub(crate) fn payload(&self) -> u64 {
        u64::from(self.payload) * SECTOR as u64
    }

    /// Opens the disk.
    pub(crate) fn open(&self, disk: &File, passphrase: &Passphrase) -> Result<Luks, LuksError> {
        self.key(disk, passphrase).map(|(_, key)| Luks { cipher: Xts::new(&key) })
    }

    /// The key, and the slot that gives it for this passphrase.
    fn key(&self, disk: &File, passphrase: &Passphrase) -> Result<(usize, Key), LuksError> {
        for slot in (0..SLOTS).filter(|slot| word(self.slot(*slot), 0) == ENABLED) {
            if let Some(key) = self.key_in(slot, disk, passphrase)? {
                return Ok((slot, key));
            }
        }
        Err(LuksError::WrongPassphrase)
    }

    fn key_in(&self, slot: usize, disk: &File, passphrase: &Passphrase) -> Result<Option<Key>, LuksError> {
        let (place, header) = (self.material(slot), self.slot(slot));
        let iterations = word(header, 4);
        let Some(place) = place.filter(|_| (1..=MOST_ITERATIONS).contains(&iterations)) else {
            return Err(LuksError::Damaged("a place for a key makes no sense"));
        };
        let mut material = Zeroizing::new(vec![0; MATERIAL]);
        disk.read_exact_at(&mut material, place)?;
        stretched(passphrase, &header[8..40], iterations).decrypt(0, &mut material);
        let key = merge(&material);
        let digest_iterations = word(&self.bytes, 164);
        if !(1..=MOST_ITERATIONS).contains(&digest_iterations) {
            return Err(LuksError::Damaged("the check of its key makes no sense"));
        }
        let fits = digest(&key, &self.bytes[132..164], digest_iterations) == self.bytes[112..132];
        Ok(fits.then_some(key))
    }

    fn slot(&self, slot: usize) -> &[u8] {
        &self.bytes[SLOTS_AT + slot * SLOT..][..SLOT]
    }

    /// Where a slot's material is, in bytes, if that can be.
    fn material(&self, slot: usize) -> Option<u64> {
        let header = self.slot(slot);
        let at = u64::from(word(header, 40)) * SECTOR as u64;
        (word(header, 44) == STRIPES as u32 && at + MATERIAL as u64 <= self.payload()).then_some(at)
    }
}

type Key = Zeroizing<[u8; KEY]>;

/// So many iterations that a guess takes about [`GUESS`] here.
pub(crate) fn affordable() -> u32 {
    let mut out = [0; KEY];
    let began = Instant::now();
    pbkdf2_hmac::<Sha256>(b"a sample", b"of salt", SAMPLE, &mut out);
    let each = began.elapsed().as_nanos() / u128::from(SAMPLE);
    let count = GUESS.as_nanos() / each.max(1);
    u32::try_from(count).unwrap_or(u32::MAX).clamp(LEAST_ITERATIONS, MOST_ITERATIONS / 10)
}

fn stretched(passphrase: &Passphrase, salt: &[u8], iterations: u32) -> Xts {
    let mut key = Zeroizing::new([0; KEY]);
    pbkdf2_hmac::<Sha256>(passphrase.expose().as_bytes(), salt, iterations, key.as_mut_slice());
    Xts::new(&key)
}

fn digest(key: &[u8; KEY], salt: &[u8], iterations: u32) -> [u8; DIGEST] {
    let mut digest = [0; DIGEST];
    pbkdf2_hmac::<Sha256>(key, salt, iterations, &mut digest);
    digest
}

/// Spreads a key so that all of it is lost with any part ("anti-forensic splitter").
fn split(key: &[u8; KEY]) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut material = Zeroizing::new(vec![0; MATERIAL]);
    fill(&mut material[..MATERIAL - KEY])?;
    let mut sum = sum(&material[..MATERIAL - KEY]);
    xor(sum.as_mut_slice(), key);
    material[MATERIAL - KEY..].copy_from_slice(sum.as_slice());
    Ok(material)
}

fn merge(material: &[u8]) -> Zeroizing<[u8; KEY]> {
    let (random, last) = material.split_at(MATERIAL - KEY);
    let mut key = sum(random);
    xor(key.as_mut_slice(), last);
    key
}

fn sum(stripes: &[u8]) -> Zeroizing<[u8; KEY]> {
    let mut sum = Zeroizing::new([0; KEY]);
    for stripe in stripes.chunks_exact(KEY) {
        xor(sum.as_mut_slice(), stripe);
        for (number, block) in (0u32..).zip(sum.chunks_exact_mut(32)) {
            let hash = Sha256::new().chain_update(number.to_be_bytes()).chain_update(&*block).finalize();
            block.copy_from_slice(&hash);
        }
    }
    sum
}

fn xor(into: &mut [u8], other: &[u8]) {
    into.iter_mut().zip(other).for_each(|(a, b)| *a ^= b);
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// A number that is small, as the header has it.
const fn sectors(count: usize) -> [u8; 4] {
    (count as u32).to_be_bytes()
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    fill(&mut bytes)?;
    Ok(bytes)
}

fn fill(bytes: &mut [u8]) -> io::Result<()> {
    getrandom::fill(bytes).map_err(|error| io::Error::other(error.to_string()))
}

fn uuid_text(mut random: [u8; 16]) -> String {
    random[6] = random[6] & 0x0f | 0x40;
    random[8] = random[8] & 0x3f | 0x80;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    [&random[..4], &random[4..6], &random[6..8], &random[8..10], &random[10..]].map(hex).join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn phrase(text: &str) -> Passphrase {
        text.parse().unwrap()
    }

    /// A disk of one sector, with its data in the clear.
    fn disk(iterations: u32) -> (tempfile::NamedTempFile, [u8; SECTOR]) {
        let (begin, luks) = Luks::create(&phrase("correct horse"), iterations).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let (clear, mut data) = ([7; SECTOR], [7; SECTOR]);
        luks.encrypt(0, &mut data);
        assert_ne!(clear, data);
        file.as_file().write_all_at(&begin, 0).unwrap();
        file.as_file().write_all_at(&data, (PAYLOAD * SECTOR) as u64).unwrap();
        (file, clear)
    }

    #[test]
    fn a_disk_opens_by_its_passphrase_and_by_no_other() {
        let (file, clear) = disk(1000);
        let layout = Layout::read(file.as_file()).unwrap();
        assert_eq!(layout.payload(), 2 << 20);
        let mut data = [0; SECTOR];
        file.as_file().read_exact_at(&mut data, layout.payload()).unwrap();
        layout.open(file.as_file(), &phrase("correct horse")).unwrap().decrypt(0, &mut data);
        assert_eq!(data, clear);
        for wrong in ["correct horsf", "correct horse ", "Correct horse"] {
            let refused = layout.open(file.as_file(), &phrase(wrong)).err();
            assert!(matches!(refused, Some(LuksError::WrongPassphrase)), "{wrong}: {refused:?}");
        }
    }

    #[test]
    fn whatever_the_beginning_of_a_disk_says_it_is_read_or_refused() {
        let (file, _) = disk(1);
        let mut bytes = [0; HEADER];
        file.as_file().read_exact_at(&mut bytes, 0).unwrap();
        for at in 0..HEADER {
            let mut changed = bytes;
            changed[at] ^= 0x80;
            // What costs time only is not tried here.
            let slow = (164..168).contains(&at) || (SLOTS_AT + 4..SLOTS_AT + 8).contains(&at);
            file.as_file().write_all_at(&changed, 0).unwrap();
            if let Ok(layout) = Layout::read(file.as_file())
                && !slow
            {
                let _ = layout.open(file.as_file(), &phrase("correct horse"));
            }
        }
        file.as_file().set_len(100).unwrap();
        assert!(matches!(Layout::read(file.as_file()), Err(LuksError::Damaged(_))));
    }

    #[test]
    fn a_key_is_lost_with_any_part_of_what_it_was_split_into() {
        let key = [9; KEY];
        let mut material = split(&key).unwrap();
        assert_eq!(*merge(&material), key);
        material[KEY * 17] ^= 1;
        let wrong = merge(&material);
        // Of the half that the part is in; each half is spread for itself.
        assert!(wrong.iter().zip(&key).filter(|(a, b)| a != b).count() > KEY / 4);
    }

    #[test]
    fn a_guess_costs_no_less_than_is_recommended() {
        assert!(affordable() >= LEAST_ITERATIONS);
    }
}
