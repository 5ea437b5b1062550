//! Just enough ELF: is this a program for the guest, is it static, can it be booted directly?

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const EM_X86_64: u16 = 62;
/// Type of the note (owner `Xen`) that holds the 32-bit entry point of a direct boot.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PAGE: usize = 4096;
/// Larger notes are not looked into.
const MAX_NOTES: usize = 64 << 10;

/// A 64-bit little-endian x86 ELF file.
pub(crate) struct Elf<'a> {
    bytes: &'a [u8],
}

struct Segment<'a> {
    kind: u32,
    content: &'a [u8],
}

impl<'a> Elf<'a> {
    /// `None` if the bytes are something else. The bytes may be the beginning of a file.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let elf = Self { bytes };
        let ok = bytes.starts_with(b"\x7fELF\x02\x01") && elf.u16(18)? == EM_X86_64 && elf.u16(54)? == 56;
        ok.then_some(elf)
    }

    /// Whether the program needs a dynamic loader.
    pub(crate) fn is_dynamic(&self) -> bool {
        self.segments().any(|s| s.kind == PT_INTERP)
    }

    /// Whether this is a kernel with a PVH entry point.
    pub(crate) fn has_pvh_entry(&self) -> bool {
        self.segments().filter(|s| s.kind == PT_NOTE).any(|s| holds_pvh_note(s.content))
    }

    /// The same program without what is in no segment, and without the zeros at the end of segments, which a loader adds
    /// by itself. `None` if the file is damaged.
    pub(crate) fn packed(&self) -> Option<Vec<u8>> {
        let table = usize::try_from(self.u64(32)?).ok()?;
        let count = usize::from(self.u16(56)?);
        let headers = self.bytes.get(table..table.checked_add(count * PROGRAM_HEADER)?)?;
        let mut packed = self.bytes.get(..HEADER)?.to_vec();
        packed[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
        // No table of sections: its place, the size of an entry, their number, and which one has the names.
        packed[40..48].fill(0);
        packed[58..64].fill(0);
        packed.extend_from_slice(headers);
        for header in (0..count).map(|i| i * PROGRAM_HEADER) {
            let (from, to) = (table + header, HEADER + header);
            let number = |offset: usize| usize::try_from(self.u64(from + offset)?).ok();
            let (offset, size) = (number(8)?, number(32)?);
            let mut content = self.bytes.get(offset..offset.checked_add(size)?)?;
            if self.u32(from)? == PT_LOAD {
                let zeros = content.iter().rev().take_while(|byte| **byte == 0).count();
                content = &content[..size - zeros];
            }
            let place = packed.len().next_multiple_of(PAGE);
            packed.resize(place, 0);
            packed.extend_from_slice(content);
            packed[to + 8..to + 16].copy_from_slice(&(place as u64).to_le_bytes());
            packed[to + 32..to + 40].copy_from_slice(&(content.len() as u64).to_le_bytes());
        }
        Some(packed)
    }

    fn segments(&self) -> impl Iterator<Item = Segment<'a>> + '_ {
        let table = self.u64(32).and_then(|at| usize::try_from(at).ok());
        let count = self.u16(56).unwrap_or(0);
        (0..usize::from(count)).filter_map(move |i| {
            let at = table?.checked_add(i * 56)?;
            let offset = usize::try_from(self.u64(at.checked_add(8)?)?).ok()?;
            let size = usize::try_from(self.u64(at.checked_add(32)?)?).ok()?.min(MAX_NOTES);
            let content = self.bytes.get(offset..).map_or(&[][..], |rest| rest.get(..size).unwrap_or(rest));
            Some(Segment { kind: self.u32(at)?, content })
        })
    }

    fn array<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.bytes.get(at..at.checked_add(N)?)?.try_into().ok()
    }

    fn u16(&self, at: usize) -> Option<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: usize) -> Option<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> Option<u64> {
        self.array(at).map(u64::from_le_bytes)
    }
}

fn holds_pvh_note(mut notes: &[u8]) -> bool {
    let word = |bytes: &[u8], at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    while let (Some(name), Some(content), Some(kind)) = (word(notes, 0), word(notes, 4), word(notes, 8)) {
        let (name, content) = (name as usize, content as usize);
        if name > MAX_NOTES || content > MAX_NOTES {
            return false;
        }
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && notes.get(12..12 + name).is_some_and(|n| n.starts_with(b"Xen\0")) {
            return true;
        }
        match notes.get(12 + name.next_multiple_of(4) + content.next_multiple_of(4)..) {
            Some(rest) => notes = rest,
            None => return false,
        }
    }
    false
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A file of nothing but headers and one segment.
    pub(crate) fn elf_with_segment(kind: u32, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 120];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&1u16.to_le_bytes());
        bytes[64..68].copy_from_slice(&kind.to_le_bytes());
        bytes[72..80].copy_from_slice(&120u64.to_le_bytes());
        bytes[96..104].copy_from_slice(&(content.len() as u64).to_le_bytes());
        bytes.extend_from_slice(content);
        bytes
    }

    pub(crate) fn pvh_notes() -> Vec<u8> {
        let mut notes = Vec::new();
        for (kind, content) in [(6u32, &b"linux\0"[..]), (XEN_ELFNOTE_PHYS32_ENTRY, &[0, 0, 0, 1, 0, 0, 0, 0])] {
            notes.extend_from_slice(&4u32.to_le_bytes());
            notes.extend_from_slice(&(content.len() as u32).to_le_bytes());
            notes.extend_from_slice(&kind.to_le_bytes());
            notes.extend_from_slice(b"Xen\0");
            notes.extend_from_slice(content);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        notes
    }

    #[test]
    fn a_program_with_a_loader_is_dynamic() {
        assert!(Elf::parse(&elf_with_segment(PT_INTERP, b"/lib64/ld.so\0")).unwrap().is_dynamic());
        assert!(!Elf::parse(&elf_with_segment(1, b"code")).unwrap().is_dynamic());
        assert!(Elf::parse(b"#!/bin/sh\n").is_none());
    }

    #[test]
    fn a_packed_kernel_keeps_its_entry_point() {
        let packed = Elf::parse(&elf_with_segment(PT_NOTE, &pvh_notes())).unwrap().packed().unwrap();
        assert!(Elf::parse(&packed).unwrap().has_pvh_entry());
    }

    #[test]
    fn the_entry_point_is_found_behind_other_notes() {
        assert!(Elf::parse(&elf_with_segment(PT_NOTE, &pvh_notes())).unwrap().has_pvh_entry());
        let other = &pvh_notes()[..24];
        assert!(!Elf::parse(&elf_with_segment(PT_NOTE, other)).unwrap().has_pvh_entry());
    }

    /// What a loader puts into memory: address, content with the zeros.
    fn loaded(bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let elf = Elf::parse(bytes).unwrap();
        let table = elf.u64(32).unwrap() as usize;
        let of = |at: usize| {
            let number = |offset: usize| elf.u64(at + offset).unwrap();
            let (offset, in_file, in_memory) = (number(8) as usize, number(32) as usize, number(40) as usize);
            let mut content = bytes[offset..offset + in_file].to_vec();
            content.resize(in_memory, 0);
            (number(24), content)
        };
        (0..usize::from(elf.u16(56).unwrap())).map(|i| of(table + i * PROGRAM_HEADER)).collect()
    }

    proptest! {
        #[test]
        fn a_packed_program_puts_the_same_into_memory(
            segments in proptest::collection::vec((proptest::collection::vec(0u8..3, 0..300), 0usize..9000), 1..5),
            gap in 0usize..5000,
        ) {
            let mut bytes = elf_with_segment(PT_LOAD, b"")[..HEADER].to_vec();
            bytes[56..58].copy_from_slice(&(segments.len() as u16).to_le_bytes());
            bytes[40..48].copy_from_slice(&77u64.to_le_bytes());
            let mut place = HEADER + segments.len() * PROGRAM_HEADER + gap;
            let mut contents = Vec::new();
            for (number, (content, zeros)) in segments.iter().enumerate() {
                let content = [content.as_slice(), &vec![0; *zeros]].concat();
                let header = [u64::from(PT_LOAD), place as u64, 0, number as u64, content.len() as u64, content.len() as u64 + 5, 0];
                bytes.extend(header.iter().flat_map(|field| field.to_le_bytes()));
                place += content.len();
                contents.push(content);
            }
            bytes.resize(bytes.len() + gap, 9);
            bytes.extend(contents.concat());
            let packed = Elf::parse(&bytes).unwrap().packed().unwrap();
            prop_assert_eq!(loaded(&packed), loaded(&bytes));
            let needed: usize = segments.iter().map(|(content, _)| content.len() + PAGE).sum();
            prop_assert!(packed.len() <= HEADER + segments.len() * PROGRAM_HEADER + needed, "zeros are left out");
        }

        #[test]
        fn any_bytes_behind_the_header_are_survived(tail in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..420) {
            let mut bytes = elf_with_segment(PT_NOTE, &tail);
            bytes.truncate(cut);
            if let Some(elf) = Elf::parse(&bytes) {
                let _ = (elf.is_dynamic(), elf.has_pvh_entry(), elf.packed());
            }
        }
    }
}
