// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The container of the file `state`: a header, a table of sections, the sections. Bytes in, bytes out.
//!
//! All numbers are little-endian.
//!
//! ```text
//!    0   8  magic: 89 52 56 4d 53 0d 0a 1a  ("\x89RVMS\r\n\x1a")
//!    8   4  version of this container: 1
//!   12   4  number of sections, n: 1 to 64
//!   16  16  the snapshot's id, random; the file `memory` has the same
//!   32   8  length of the file, bytes
//!   40   4  checksum of the table
//!   44   4  checksum of bytes 0 to 43
//!   48 32n  the table, for each section:
//!             0   4  kind
//!             4   4  flags: bit 0, who does not know the kind may pass over it; the others are 0
//!             8   8  offset in the file
//!            16   8  length, bytes
//!            24   4  checksum of the section
//!            28   4  0
//!   …       the sections, in the table's order, without a gap
//! ```
//!
//! The magic has a byte above 0x7f, both line ends and an end of file of DOS in it, as PNG's: a transfer as text breaks it,
//! and is told. Checksums are CRC-32 (IEEE 802.3, as gzip's): they find what hardware, a transfer or a full disk did, and
//! are no protection against who wants to deceive. A snapshot is as trusted as the monitor's configuration.
//!
//! # What a reader promises
//! [`parse`] reads nothing beyond its bytes, allocates for the table alone, and does not panic, whatever the bytes are. It
//! takes one form of each file: no section twice, no gap, no overlap, nothing behind the last.

#![forbid(unsafe_code)]

use std::fmt;

/// What a file `state` begins with.
pub const MAGIC: [u8; 8] = *b"\x89RVMS\r\n\x1a";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// More sections there are not.
pub const MOST_SECTIONS: usize = 64;
/// A file `state` is no longer than this: 255 vCPUs are 20 MiB.
pub const MOST_BYTES: u64 = 1 << 30;

const HEADER: usize = 48;
const ENTRY: usize = 32;
/// The header and the longest table.
pub(super) const HEAD: usize = HEADER + ENTRY * MOST_SECTIONS;
/// Flag: who does not know the kind may pass over it.
const OPTIONAL: u32 = 1;

/// A snapshot's own number, made by chance.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SnapshotId(pub [u8; 16]);

impl SnapshotId {
    /// By what a page server's memory is known to be of this snapshot: its first 16 digits, as a number.
    pub fn image(self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a section is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Kind {
    /// What the machine is made of: JSON, as `--config` reads it.
    Config = 1,
    /// What is the VM's and no vCPU's: JSON.
    Vm = 2,
    /// The vCPUs: a JSON list.
    Vcpus = 3,
    /// The devices: JSON.
    Devices = 4,
    /// What is where in the file `memory`: binary, [`pages`](super::pages).
    Memory = 5,
    /// Of an incremental snapshot: the id of the one before it, and where that was: binary, [`parent`](super::parent).
    Parent = 6,
    /// Of an incremental snapshot: which pages it has, the others being its parent's: binary, [`ranges`](super::ranges).
    PageSources = 7,
    /// Where each piece is in a file `memory` that is compressed: binary, [`packed`](super::packed).
    Packed = 8,
    /// Pages of such a file that are the same as others: binary, [`packed`](super::packed).
    Duplicates = 9,
    /// Which disks are in the snapshot's directory: JSON, [`disks`](super::disks).
    Disks = 10,
    /// Pages that the machine touches first when it goes on: binary, [`first`](super::first). Who does not know it may pass over it.
    FirstPages = 11,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 11] = [
        Kind::Config,
        Kind::Vm,
        Kind::Vcpus,
        Kind::Devices,
        Kind::Memory,
        Kind::Parent,
        Kind::PageSources,
        Kind::Packed,
        Kind::Duplicates,
        Kind::Disks,
        Kind::FirstPages,
    ];

    fn flags(self) -> u32 {
        match self {
            Kind::FirstPages => OPTIONAL,
            _ => 0,
        }
    }

    fn of(number: u32) -> Option<Self> {
        Kind::ALL.into_iter().find(|kind| *kind as u32 == number)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Config => "config",
            Kind::Vm => "vm",
            Kind::Vcpus => "vcpus",
            Kind::Devices => "devices",
            Kind::Memory => "memory",
            Kind::Parent => "parent",
            Kind::PageSources => "page-sources",
            Kind::Packed => "packed",
            Kind::Duplicates => "duplicates",
            Kind::Disks => "disks",
            Kind::FirstPages => "first-pages",
        })
    }
}

/// Why bytes are no `state` that can be read here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// There is nothing in it.
    #[error("it is empty")]
    Empty,
    /// It begins with something else.
    #[error("it begins with {}, which no snapshot does", hex(.0))]
    Magic(Vec<u8>),
    /// A version that this build does not know.
    #[error(
        "it has version {0} of the format, and this build reads version {VERSION}: restore it with a build of its own age"
    )]
    Version(u32),
    /// It ends before what it says it has.
    #[error(
        "it has {has} bytes and says that it has {says}: it is cut off, or something was added"
    )]
    Length {
        /// The bytes that there are.
        has: u64,
        /// What the header says.
        says: u64,
    },
    /// It is shorter than any.
    #[error("it has {0} bytes, which is not even a header")]
    Short(u64),
    /// It is longer than any.
    #[error("it has {0} bytes, and {MOST_BYTES} are the most that a state has")]
    Long(u64),
    /// A checksum is another one.
    #[error(
        "its {part} is damaged: the checksum is {found:#010x}, and {written:#010x} was written"
    )]
    Checksum {
        /// Of what.
        part: String,
        /// That of the bytes.
        found: u32,
        /// That in the file.
        written: u32,
    },
    /// The table is none.
    #[error("its table of sections is none: {0}")]
    Table(String),
    /// A section that this build does not know, and may not pass over.
    #[error(
        "it has a section of kind {0}, which this build does not know: restore it with a newer one"
    )]
    UnknownKind(u32),
    /// A section that has to be there is not.
    #[error("it has no section {0}")]
    Missing(Kind),
}

fn hex(bytes: &[u8]) -> String {
    let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}

/// A file `state`, taken apart; the sections are parts of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container<'a> {
    /// The snapshot's number.
    pub id: SnapshotId,
    sections: Vec<(Kind, &'a [u8])>,
}

impl<'a> Container<'a> {
    /// The section of this kind.
    ///
    /// # Errors
    /// [`FormatError::Missing`].
    pub fn section(&self, kind: Kind) -> Result<&'a [u8], FormatError> {
        let found = self.sections.iter().find(|(of, _)| *of == kind);
        found
            .map(|(_, bytes)| *bytes)
            .ok_or(FormatError::Missing(kind))
    }

    /// Whether there is one of this kind.
    pub fn has(&self, kind: Kind) -> bool {
        self.sections.iter().any(|(of, _)| *of == kind)
    }
}

/// CRC-32, as gzip has it.
pub fn checksum(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// [`checksum`], of bytes that come part by part.
pub type Checksum = crc32fast::Hasher;

/// The bytes of a file `state` with these sections, in this order.
pub fn encode(id: SnapshotId, sections: &[(Kind, Vec<u8>)]) -> Vec<u8> {
    let table_len = ENTRY * sections.len();
    let mut offset = (HEADER + table_len) as u64;
    let mut table = Vec::with_capacity(table_len);
    for (kind, bytes) in sections {
        table.extend((*kind as u32).to_le_bytes());
        table.extend(kind.flags().to_le_bytes());
        table.extend(offset.to_le_bytes());
        table.extend((bytes.len() as u64).to_le_bytes());
        table.extend(checksum(bytes).to_le_bytes());
        table.extend(0_u32.to_le_bytes());
        offset += bytes.len() as u64;
    }
    let mut file = Vec::with_capacity(offset as usize);
    file.extend(MAGIC);
    file.extend(VERSION.to_le_bytes());
    file.extend((sections.len() as u32).to_le_bytes());
    file.extend(id.0);
    file.extend(offset.to_le_bytes());
    file.extend(checksum(&table).to_le_bytes());
    file.extend(checksum(&file).to_le_bytes());
    file.extend(table);
    for (_, bytes) in sections {
        file.extend(bytes);
    }
    file
}

/// Takes the bytes of a file `state` apart.
///
/// # Errors
/// [`FormatError`], the first thing that is wrong.
pub fn parse(file: &[u8]) -> Result<Container<'_>, FormatError> {
    let has = file.len() as u64;
    let (header, table) = header_and_table(file, Some(has))?;
    let mut next = HEADER + table.len();
    let mut id = [0; 16];
    for (to, from) in id.iter_mut().zip(header.iter().skip(16)) {
        *to = *from;
    }
    let mut sections = Vec::with_capacity(table.len() / ENTRY);
    for entry in table.chunks_exact(ENTRY) {
        let (number, flags) = (u32_at(entry, 0), u32_at(entry, 4));
        let (offset, len) = (u64_at(entry, 8), u64_at(entry, 16));
        if flags & !OPTIONAL != 0 || u32_at(entry, 28) != 0 {
            let text =
                format!("section {number} has flags {flags:#x}, which nobody has given a meaning");
            return Err(FormatError::Table(text));
        }
        let end = offset.checked_add(len).filter(|end| *end <= has);
        let end = end.filter(|_| offset == next as u64);
        let Some(end) = end.and_then(|end| usize::try_from(end).ok()) else {
            let text = format!(
                "section {number} is said to have {len} bytes at {offset}, and is to begin at {next} and end in the file"
            );
            return Err(FormatError::Table(text));
        };
        let bytes = file.get(next..end).unwrap_or_default();
        next = end;
        let Some(kind) = Kind::of(number) else {
            match flags & OPTIONAL {
                0 => return Err(FormatError::UnknownKind(number)),
                _ => continue,
            }
        };
        verify(&format!("section {kind}"), bytes, u32_at(entry, 24))?;
        if sections.iter().any(|(of, _)| *of == kind) {
            let text = format!("the section {kind} is there twice");
            return Err(FormatError::Table(text));
        }
        sections.push((kind, bytes));
    }
    if next as u64 != has {
        let text = format!("the last section ends at {next}, and the file at {has}");
        return Err(FormatError::Table(text));
    }
    Ok(Container {
        id: SnapshotId(id),
        sections,
    })
}

/// The header and the table of sections, checked, that `file` begins with, which is as long as the header has to say, where
/// that is to be looked at.
fn header_and_table(file: &[u8], len: Option<u64>) -> Result<(&[u8], &[u8]), FormatError> {
    let has = file.len() as u64;
    if has == 0 {
        return Err(FormatError::Empty);
    }
    let begins = file.get(..MAGIC.len()).unwrap_or(file);
    if begins != MAGIC {
        return Err(FormatError::Magic(begins.to_vec()));
    }
    if has > MOST_BYTES {
        return Err(FormatError::Long(has));
    }
    let short = FormatError::Short(has);
    let header = file.get(..HEADER).ok_or(short.clone())?;
    let word = |at| u32_at(header, at);
    // Before the checksum: a newer version may have another header.
    match word(8) {
        VERSION => {}
        version => return Err(FormatError::Version(version)),
    }
    let covered = header.get(..44).unwrap_or_default();
    verify("header", covered, word(44))?;
    let says = u64_at(header, 32);
    if let Some(has) = len.filter(|has| *has != says) {
        return Err(FormatError::Length { has, says });
    }
    let count = word(12) as usize;
    if !(1..=MOST_SECTIONS).contains(&count) {
        let text = format!("{count} sections, and there are 1 to {MOST_SECTIONS}");
        return Err(FormatError::Table(text));
    }
    let table = file.get(HEADER..HEADER + ENTRY * count).ok_or(short)?;
    verify("table of sections", table, word(40))?;
    Ok((header, table))
}

/// Where a section is.
pub(super) struct Place {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) checksum: u32,
}

/// Where the section of this kind is, by the first [`HEAD`] bytes of a file `state`. None: there is none, or the bytes are no
/// snapshot's. Neither what the header says of the file nor the section is checked.
pub(super) fn find(head: &[u8], kind: Kind) -> Option<Place> {
    let (_, table) = header_and_table(head, None).ok()?;
    let mut entries = table.chunks_exact(ENTRY);
    let entry = entries.find(|entry| u32_at(entry, 0) == kind as u32)?;
    Some(Place {
        offset: u64_at(entry, 8),
        len: u64_at(entry, 16),
        checksum: u32_at(entry, 24),
    })
}

fn verify(part: &str, bytes: &[u8], written: u32) -> Result<(), FormatError> {
    match checksum(bytes) {
        found if found == written => Ok(()),
        found => Err(FormatError::Checksum {
            part: part.to_owned(),
            found,
            written,
        }),
    }
}

/// The number at `at`; 0 where there is none.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
    u32::from_le_bytes(four.copied().unwrap_or_default())
}

/// The number at `at`; 0 where there is none.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let eight = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>());
    u64::from_le_bytes(eight.copied().unwrap_or_default())
}
