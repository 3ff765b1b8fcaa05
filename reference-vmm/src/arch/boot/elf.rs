// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! ELF executables of 32 and 64 bits for x86: program headers and notes (System V ABI, chapters 4
//! and 5), read with limits.

use std::io::{Read, Seek};

use vm_memory::GuestAddress;

use super::place::Placement;
use super::{BootError, FileCopy, Image, Source};

/// First bytes of every ELF file.
pub(super) const MAGIC: &[u8] = b"\x7fELF";

/// Program headers read at most. Linux has five; the limit bounds the work on a hostile file.
const MAX_PROGRAM_HEADERS: u64 = 128;
/// Bytes of notes read at most, all note segments together. Linux has about 500.
const MAX_NOTES: u64 = 64 << 10;

const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u64 = 2;
const TYPE_DYNAMIC: u64 = 3;
const MACHINE_386: u64 = 3;
const MACHINE_X86_64: u64 = 62;
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
/// Note "Xen": the 32-bit physical entry point of PVH (xen/include/public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// What a kernel's ELF file says.
#[derive(Debug)]
pub(super) struct ElfFile {
    pub(super) is_64: bool,
    /// As the header has it: physical with Linux, virtual with some others.
    pub(super) entry: u64,
    /// The entry of the PVH note.
    pub(super) pvh_entry: Option<u64>,
    /// There is a note by "Linux", as in every vmlinux since 4.19.
    pub(super) is_linux: bool,
    segments: Vec<Segment>,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    offset: u64,
    virtual_start: u64,
    physical_start: u64,
    file_len: u64,
    memory_len: u64,
}

/// Field offsets of a header, by the file's class: 32-bit, 64-bit.
struct Field(usize, usize);

mod ehdr {
    use super::Field;
    pub(super) const ENTRY: Field = Field(24, 24);
    pub(super) const PHOFF: Field = Field(28, 32);
    pub(super) const PHENTSIZE: Field = Field(42, 54);
    pub(super) const PHNUM: Field = Field(44, 56);
}

mod phdr {
    use super::Field;
    pub(super) const OFFSET: Field = Field(4, 8);
    pub(super) const VADDR: Field = Field(8, 16);
    pub(super) const PADDR: Field = Field(12, 24);
    pub(super) const FILESZ: Field = Field(16, 32);
    pub(super) const MEMSZ: Field = Field(20, 40);
    pub(super) const ALIGN: Field = Field(28, 48);
}

/// A header's bytes with the class that says how wide its fields are.
struct Header<'a> {
    bytes: &'a [u8],
    is_64: bool,
}

impl Header<'_> {
    fn number(&self, offset: usize, width: usize) -> u64 {
        let mut value = [0; 8];
        if let Some(bytes) = self.bytes.get(offset..offset + width) {
            value[..width].copy_from_slice(bytes);
        }
        u64::from_le_bytes(value)
    }

    /// A field as wide as an address.
    fn word(&self, field: &Field) -> u64 {
        if self.is_64 {
            self.number(field.1, 8)
        } else {
            self.number(field.0, 4)
        }
    }

    /// A field of two bytes.
    fn half(&self, field: &Field) -> u64 {
        self.number(if self.is_64 { field.1 } else { field.0 }, 2)
    }
}

impl ElfFile {
    /// Reads the headers of an image that begins with [`MAGIC`].
    pub(super) fn parse<F: Read + Seek>(kernel: &mut Image<F>) -> Result<Self, BootError> {
        let mut ident = [0; 20];
        kernel.read_at("ELF header", 0, &mut ident)?;
        let is_64 = match ident[4] {
            CLASS_32 => false,
            CLASS_64 => true,
            class => {
                return Err(kernel.bad_field("EI_CLASS", class.into(), "neither 32 nor 64 bits"));
            }
        };
        if ident[5] != LITTLE_ENDIAN {
            return Err(kernel.bad_field("EI_DATA", ident[5].into(), "x86 is little-endian"));
        }
        let ident = Header {
            bytes: &ident,
            is_64,
        };
        let file_type = ident.number(16, 2);
        if file_type != TYPE_EXECUTABLE && file_type != TYPE_DYNAMIC {
            let problem = "not an executable; is this an object file or a module?";
            return Err(kernel.bad_field("e_type", file_type, problem));
        }
        let machine = ident.number(18, 2);
        if machine != MACHINE_X86_64 && (is_64 || machine != MACHINE_386) {
            let problem = "built for another architecture; this machine is an x86-64";
            return Err(kernel.bad_field("e_machine", machine, problem));
        }

        let mut bytes = [0; 64];
        let len = if is_64 { 64 } else { 52 };
        kernel.read_at("ELF header", 0, &mut bytes[..len])?;
        let header = Header {
            bytes: &bytes[..len],
            is_64,
        };
        let entry = header.word(&ehdr::ENTRY);
        let (table, count) = (header.word(&ehdr::PHOFF), header.half(&ehdr::PHNUM));
        let (size, expected) = (header.half(&ehdr::PHENTSIZE), if is_64 { 56 } else { 32 });
        if count == 0 || count > MAX_PROGRAM_HEADERS {
            return Err(kernel.bad_field(
                "e_phnum",
                count,
                "1 to 128 program headers are expected",
            ));
        }
        if size != expected {
            return Err(kernel.bad_field("e_phentsize", size, "not the size of a program header"));
        }
        kernel.check_range("table of program headers", table, count * size)?;

        let mut elf = ElfFile {
            is_64,
            entry,
            pvh_entry: None,
            is_linux: false,
            segments: Vec::new(),
        };
        let mut notes_left = MAX_NOTES;
        for index in 0..count {
            let mut bytes = [0; 56];
            let bytes = &mut bytes[..if is_64 { 56 } else { 32 }];
            kernel.read_at("table of program headers", table + index * size, bytes)?;
            elf.program_header(kernel, &Header { bytes, is_64 }, &mut notes_left)?;
        }
        if elf.segments.is_empty() {
            return Err(kernel.bad_field("e_phnum", count, "none of them is a segment to load"));
        }
        Ok(elf)
    }

    fn program_header<F: Read + Seek>(
        &mut self,
        kernel: &mut Image<F>,
        header: &Header<'_>,
        notes_left: &mut u64,
    ) -> Result<(), BootError> {
        let segment = Segment {
            offset: header.word(&phdr::OFFSET),
            virtual_start: header.word(&phdr::VADDR),
            physical_start: header.word(&phdr::PADDR),
            file_len: header.word(&phdr::FILESZ),
            memory_len: header.word(&phdr::MEMSZ),
        };
        match header.number(0, 4) {
            PT_LOAD if segment.memory_len > 0 => {
                if segment.file_len > segment.memory_len {
                    return Err(kernel.bad_field(
                        "p_filesz",
                        segment.file_len,
                        "more than p_memsz",
                    ));
                }
                kernel.check_range("segment", segment.offset, segment.file_len)?;
                self.segments.push(segment);
            }
            PT_NOTE => {
                kernel.check_range("note segment", segment.offset, segment.file_len)?;
                let len = segment.file_len.min(*notes_left);
                *notes_left -= len;
                let mut notes = vec![0; len as usize];
                kernel.read_at("note segment", segment.offset, &mut notes)?;
                let align = if header.word(&phdr::ALIGN) == 8 { 8 } else { 4 };
                self.notes(&notes, align);
            }
            _ => {}
        }
        Ok(())
    }

    /// Looks for the notes that matter; one that is malformed ends the search.
    fn notes(&mut self, mut notes: &[u8], align: usize) {
        while let Some((note, rest)) = Note::split(notes, align) {
            match note.name {
                b"Linux\0" => self.is_linux = true,
                b"Xen\0" if note.kind == XEN_ELFNOTE_PHYS32_ENTRY => {
                    // Four bytes, or eight from a 64-bit linker script.
                    let word = Header {
                        bytes: note.contents,
                        is_64: true,
                    };
                    match note.contents.len() {
                        4 => self.pvh_entry = Some(word.number(0, 4)),
                        8 => self.pvh_entry = Some(word.number(0, 8)),
                        _ => {}
                    }
                }
                _ => {}
            }
            notes = rest;
        }
    }

    /// Takes the segments' memory, and says what is to be copied there.
    pub(super) fn claim<F: Read + Seek>(
        &self,
        kernel: &Image<F>,
        place: &mut Placement,
    ) -> Result<Vec<FileCopy>, BootError> {
        let mut copies = Vec::with_capacity(self.segments.len());
        for segment in &self.segments {
            let start = segment.physical_start;
            place.claim(|| kernel.describe(), "segment", start, segment.memory_len)?;
            if segment.file_len > 0 {
                copies.push(FileCopy {
                    source: Source::Kernel,
                    offset: segment.offset,
                    len: segment.file_len,
                    to: GuestAddress(start),
                });
            }
        }
        Ok(copies)
    }

    /// The physical address of an entry point that is either physical already or virtual.
    pub(super) fn physical<F>(&self, kernel: &Image<F>, entry: u64) -> Result<u64, BootError> {
        let within = |start: u64, segment: &Segment| {
            entry
                .checked_sub(start)
                .filter(|distance| *distance < segment.memory_len)
        };
        let physical = |segment: &Segment| within(segment.physical_start, segment).map(|_| entry);
        let translated = |segment: &Segment| {
            within(segment.virtual_start, segment)
                .and_then(|distance| segment.physical_start.checked_add(distance))
        };
        self.segments
            .iter()
            .find_map(physical)
            .or_else(|| self.segments.iter().find_map(translated))
            .ok_or_else(|| BootError::EntryOutside {
                image: kernel.describe(),
                entry,
            })
    }
}

struct Note<'a> {
    kind: u32,
    name: &'a [u8],
    contents: &'a [u8],
}

impl<'a> Note<'a> {
    /// The first note of a segment, and what is behind it.
    fn split(notes: &'a [u8], align: usize) -> Option<(Self, &'a [u8])> {
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(*notes.get(at..)?.first_chunk()?))
        };
        let (name_len, len, kind) = (word(0)? as usize, word(4)? as usize, word(8)?);
        let name_end = 12_usize.checked_add(name_len)?;
        let start = name_end.checked_next_multiple_of(align)?;
        let end = start.checked_add(len)?;
        let note = Note {
            kind,
            name: notes.get(12..name_end)?,
            contents: notes.get(start..end)?,
        };
        let rest = notes
            .get(end.checked_next_multiple_of(align)?..)
            .unwrap_or(&[]);
        Some((note, rest))
    }
}
