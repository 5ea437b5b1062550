//! Unpacks the kernel: from the boot image that distributions ship to the plain ELF file that starts without firmware.
//!
//! Layout of the boot image: the kernel's `Documentation/arch/x86/boot.rst`; fields `setup_sects` (0x1f1), `header` (0x202),
//! `payload_offset` and `payload_length` (0x248). The payload is the compressed kernel, then its length before compression.

use crate::{KernelError, elf::Elf};

const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD: usize = 0x248;
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// Largest block of the legacy LZ4 format, unpacked.
const LZ4_BLOCK: usize = 8 << 20;
/// Larger kernels are not unpacked.
const MAX_KERNEL: usize = 256 << 20;

/// The plain kernel of a boot image, without what a loader does not need of it: a third, mostly zeros.
pub(crate) fn extract(image: &[u8]) -> Result<Vec<u8>, KernelError> {
    let kernel = match Elf::parse(image) {
        Some(_) => image.to_vec(),
        None => unpack(payload(image).ok_or(KernelError::NotABootImage)?)?,
    };
    let elf = Elf::parse(&kernel).ok_or(KernelError::Damaged)?;
    if !elf.has_pvh_entry() {
        return Err(KernelError::NoPvhEntry);
    }
    elf.packed().ok_or(KernelError::Damaged)
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    if image.get(MAGIC..MAGIC + 4)? != b"HdrS" {
        return None;
    }
    let sectors = match image[SETUP_SECTORS] {
        0 => 4,
        n => usize::from(n),
    };
    let offset = word(image, PAYLOAD)?.checked_add((sectors + 1) * 512)?;
    image.get(offset..offset.checked_add(word(image, PAYLOAD + 4)?)?)
}

fn unpack(payload: &[u8]) -> Result<Vec<u8>, KernelError> {
    if let Some(name) = other_compression(payload) {
        return Err(KernelError::Compression(name));
    }
    let (packed, length) = payload.split_at_checked(payload.len().saturating_sub(4)).ok_or(KernelError::Damaged)?;
    let length = word(length, 0).filter(|l| *l <= MAX_KERNEL).ok_or(KernelError::Damaged)?;
    let mut rest = packed.strip_prefix(&LZ4_LEGACY).ok_or(KernelError::Compression("an unknown method"))?;
    let mut kernel = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    while !rest.is_empty() {
        let size = word(rest, 0).ok_or(KernelError::Damaged)?;
        let packed = size.checked_add(4).and_then(|end| rest.get(4..end)).ok_or(KernelError::Damaged)?;
        let n = lz4_flex::block::decompress_into(packed, &mut block).map_err(|_| KernelError::Damaged)?;
        kernel.extend_from_slice(&block[..n]);
        // INVARIANT: no more is kept than the image announces.
        if kernel.len() > length {
            return Err(KernelError::Damaged);
        }
        rest = &rest[4 + size..];
    }
    if kernel.len() == length { Ok(kernel) } else { Err(KernelError::Damaged) }
}

fn other_compression(payload: &[u8]) -> Option<&'static str> {
    const KNOWN: [(&[u8], &str); 6] = [
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh", "bzip2"),
        (b"\x5d\0\0", "lzma"),
        (b"\x89LZO", "lzo"),
    ];
    KNOWN.iter().find(|(magic, _)| payload.starts_with(magic)).map(|(_, name)| *name)
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::tests::{elf_with_segment, pvh_notes};
    use proptest::prelude::*;

    fn boot_image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[SETUP_SECTORS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD + 4..PAYLOAD + 8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    fn lz4_payload(kernel: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY.to_vec();
        for chunk in kernel.chunks(100) {
            let packed = lz4_flex::block::compress(chunk);
            payload.extend_from_slice(&(packed.len() as u32).to_le_bytes());
            payload.extend_from_slice(&packed);
        }
        payload.extend_from_slice(&(kernel.len() as u32).to_le_bytes());
        payload
    }

    fn kernel() -> Vec<u8> {
        elf_with_segment(4, &pvh_notes())
    }

    #[test]
    fn a_kernel_comes_out_as_it_was() {
        let plain = Elf::parse(&kernel()).unwrap().packed().unwrap();
        assert_eq!(extract(&boot_image(&lz4_payload(&kernel()))), Ok(plain.clone()));
        assert_eq!(extract(&kernel()), Ok(plain));
    }

    #[test]
    fn other_compressions_are_named() {
        assert_eq!(extract(&boot_image(b"\xfd7zXZ\0rest")), Err(KernelError::Compression("xz")));
        assert_eq!(extract(&boot_image(b"\x28\xb5\x2f\xfdrest")), Err(KernelError::Compression("zstd")));
        assert_eq!(extract(&boot_image(b"\x1f\x8brest")), Err(KernelError::Compression("gzip")));
    }

    #[test]
    fn a_kernel_that_cannot_start_directly_is_refused() {
        assert_eq!(extract(&elf_with_segment(4, &pvh_notes()[..24])), Err(KernelError::NoPvhEntry));
    }

    #[test]
    fn a_cut_image_is_damaged_wherever_it_is_cut() {
        let image = boot_image(&lz4_payload(&kernel()));
        for end in 0..image.len() {
            assert!(extract(&image[..end]).is_err(), "cut at {end}");
        }
    }

    proptest! {
        #[test]
        fn any_payload_is_survived(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut framed = LZ4_LEGACY.to_vec();
            framed.extend_from_slice(&payload);
            let _ = extract(&boot_image(&framed));
        }
    }
}
