//! AES-256 in XTS mode (IEEE 1619), by sectors of 512 bytes whose number is the tweak ("plain64").

use aes::{
    Aes256, Block,
    cipher::{BlockDecrypt, BlockEncrypt, KeyInit, generic_array::GenericArray},
};

use super::SECTOR;

const BLOCK: usize = 16;
const BLOCKS: usize = SECTOR / BLOCK;

/// A cipher for whole sectors.
pub(super) struct Xts {
    data: Aes256,
    tweak: Aes256,
}

impl Xts {
    /// The first half of the key is for the data, the second for the tweak.
    pub(super) fn new(key: &[u8; 64]) -> Self {
        let [data, tweak] = [&key[..32], &key[32..]].map(|half| Aes256::new(GenericArray::from_slice(half)));
        Self { data, tweak }
    }

    /// Encrypts sectors, of which `first` is the number of the first. Of an incomplete one at the end nothing is done.
    pub(super) fn encrypt(&self, first: u64, data: &mut [u8]) {
        self.each(first, data, |blocks| self.data.encrypt_blocks(blocks));
    }

    /// The reverse of [`Self::encrypt`].
    pub(super) fn decrypt(&self, first: u64, data: &mut [u8]) {
        self.each(first, data, |blocks| self.data.decrypt_blocks(blocks));
    }

    fn each(&self, first: u64, data: &mut [u8], apply: impl Fn(&mut [Block])) {
        for (number, sector) in (first..).zip(data.chunks_exact_mut(SECTOR)) {
            let tweaks = self.tweaks(number);
            let mut blocks = [Block::default(); BLOCKS];
            for ((block, bytes), tweak) in blocks.iter_mut().zip(sector.chunks_exact(BLOCK)).zip(&tweaks) {
                block.copy_from_slice(bytes);
                xor(block, tweak);
            }
            apply(&mut blocks);
            for ((block, bytes), tweak) in blocks.iter_mut().zip(sector.chunks_exact_mut(BLOCK)).zip(&tweaks) {
                xor(block, tweak);
                bytes.copy_from_slice(block);
            }
        }
    }

    fn tweaks(&self, sector: u64) -> [u128; BLOCKS] {
        let mut first = Block::from(u128::from(sector).to_le_bytes());
        self.tweak.encrypt_block(&mut first);
        let mut tweak = u128::from_le_bytes(first.into());
        let mut all = [0; BLOCKS];
        for place in &mut all {
            *place = tweak;
            // Times x in GF(2^128).
            tweak = (tweak << 1) ^ (0x87 * (tweak >> 127));
        }
        all
    }
}

fn xor(block: &mut Block, tweak: &u128) {
    block.iter_mut().zip(tweak.to_le_bytes()).for_each(|(a, b)| *a ^= b);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// IEEE 1619-2007, vector 10: 256-bit keys, data unit 0xff.
    #[test]
    fn it_is_as_the_standard_has_it() {
        let key: [u8; 64] = [
            0x27, 0x18, 0x28, 0x18, 0x28, 0x45, 0x90, 0x45, 0x23, 0x53, 0x60, 0x28, 0x74, 0x71, 0x35, 0x26, 0x62, 0x49,
            0x77, 0x57, 0x24, 0x70, 0x93, 0x69, 0x99, 0x59, 0x57, 0x49, 0x66, 0x96, 0x76, 0x27, 0x31, 0x41, 0x59, 0x26,
            0x53, 0x58, 0x97, 0x93, 0x23, 0x84, 0x62, 0x64, 0x33, 0x83, 0x27, 0x95, 0x02, 0x88, 0x41, 0x97, 0x16, 0x93,
            0x99, 0x37, 0x51, 0x05, 0x82, 0x09, 0x74, 0x94, 0x45, 0x92,
        ];
        let mut data: [u8; SECTOR] = std::array::from_fn(|n| n as u8);
        let clear = data;
        let cipher = Xts::new(&key);
        cipher.encrypt(0xff, &mut data);
        let first = [0x1c, 0x3b, 0x3a, 0x10, 0x2f, 0x77, 0x03, 0x86, 0xe4, 0x83, 0x6c, 0x99, 0xe3, 0x70, 0xcf, 0x9b];
        assert_eq!(data[..16], first);
        cipher.decrypt(0xff, &mut data);
        assert_eq!(data, clear);
    }
}
