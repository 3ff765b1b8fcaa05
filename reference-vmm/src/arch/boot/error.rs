// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a kernel cannot be started: each error names the file or the option, what was wrong with
//! which value, and what to do where that is not plain.

use std::fmt;
use std::io;

use vm_memory::GuestMemoryError;

/// Why a kernel cannot be planned or loaded.
///
/// `image` is always the kind of file with its path, as in "kernel image /boot/vmlinuz".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// A file cannot be opened.
    #[error("cannot open the {image}: {source}")]
    Open {
        /// The file.
        image: String,
        /// Why.
        source: io::Error,
    },
    /// A path names a directory, a pipe, a device: something without a length.
    #[error("the {image} is {what}; give a regular file")]
    NotAFile {
        /// The file.
        image: String,
        /// What it is.
        what: &'static str,
    },
    /// A file has no contents.
    #[error("the {image} is empty")]
    Empty {
        /// The file.
        image: String,
    },
    /// A file cannot be read.
    #[error("cannot read the {image}: {source}")]
    Read {
        /// The file.
        image: String,
        /// Why.
        source: io::Error,
    },
    /// A header speaks of bytes behind the end of the file.
    #[error("the {image} is truncated: its {what} ends at byte {end}, and the file has {len}")]
    Truncated {
        /// The file.
        image: String,
        /// What is not all there.
        what: &'static str,
        /// Where it would end, bytes from the start of the file.
        end: u64,
        /// The file's length in bytes.
        len: u64,
    },
    /// A file became shorter after it was opened.
    #[error("the {image} had {len} bytes when it was opened and has fewer now")]
    Shrunk {
        /// The file.
        image: String,
        /// Its length in bytes when it was opened.
        len: u64,
    },
    /// Not one of the formats that can be started.
    #[error("the {image} is not a kernel: it begins with {first}; {hint}")]
    NotAKernel {
        /// The file.
        image: String,
        /// Its first bytes.
        first: FirstBytes,
        /// What it may be, or what is expected.
        hint: &'static str,
    },
    /// A field of a header has a value that cannot be.
    #[error("the {image} has {value:#x} in its header's {field}: {problem}")]
    BadField {
        /// The file.
        image: String,
        /// The field, by its name in the format's specification.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Why it cannot be.
        problem: &'static str,
    },
    /// An ELF file that has no entry which this monitor knows.
    #[error(
        "the {image} is a 32-bit ELF file with neither a multiboot header in its first 8 KiB nor a \
         PVH note: there is no way to start it"
    )]
    NoEntry {
        /// The file.
        image: String,
    },
    /// A part of the kernel does not lie in the guest's RAM.
    #[error(
        "the {image} wants its {what} at {start:#x}..{end:#x}, and the guest's RAM below 4 GiB \
         ends at {ram_end:#x}: give the guest more memory, or link the image lower"
    )]
    OutsideRam {
        /// The file.
        image: String,
        /// The part.
        what: &'static str,
        /// First address.
        start: u128,
        /// Address behind the last one.
        end: u128,
        /// First address without RAM.
        ram_end: u64,
    },
    /// A part of the kernel lies where something else does.
    #[error(
        "the {image} wants its {what} at {start:#x}..{end:#x}, which overlaps {other} at \
         {other_start:#x}..{other_end:#x}"
    )]
    Overlap {
        /// The file.
        image: String,
        /// The part.
        what: &'static str,
        /// First address.
        start: u64,
        /// Address behind the last one.
        end: u64,
        /// What is there.
        other: &'static str,
        /// Its first address.
        other_start: u64,
        /// Address behind its last one.
        other_end: u64,
    },
    /// The kernel would start outside of what is loaded.
    #[error("the {image} starts at {entry:#x}, where none of its segments is")]
    EntryOutside {
        /// The file.
        image: String,
        /// The entry point.
        entry: u64,
    },
    /// There is no room for an initrd or module.
    #[error(
        "the {image} of {len} bytes does not fit: the guest's memory of {memory} bytes has no such \
         room beside the kernel below {limit:#x}; give the guest more memory"
    )]
    InitrdTooLarge {
        /// The file.
        image: String,
        /// Its length, bytes (several initrds: of all together).
        len: u64,
        /// The guest's memory, bytes.
        memory: u64,
        /// Where the kernel wants it to end at the latest.
        limit: u64,
    },
    /// More modules than the information structure has room for.
    #[error("{count} modules are too many: at most {max} fit into the multiboot information")]
    TooManyModules {
        /// Modules given.
        count: usize,
        /// Modules that fit.
        max: usize,
    },
    /// The modules' names do not fit behind the command line.
    #[error("the command line and the names of the modules take {len} bytes; {max} is the limit")]
    ModuleNames {
        /// Bytes that they take.
        len: usize,
        /// Bytes that there are.
        max: usize,
    },
    /// The command line is longer than the kernel reads.
    #[error("the command line of {len} bytes exceeds the kernel's limit of {limit}")]
    CmdlineTooLong {
        /// Its length, bytes without the NUL.
        len: u64,
        /// The longest one allowed.
        limit: u64,
    },
    /// The command line has a NUL inside, where the kernel would stop to read.
    #[error("the command line has a NUL at byte {position}; the kernel would not read on")]
    CmdlineNul {
        /// Bytes before it.
        position: usize,
    },
    /// The RAM is not laid out so that a kernel can start in it.
    #[error("the guest's RAM cannot hold a kernel: {problem} (the first range has {len} bytes)")]
    RamLayout {
        /// What is wrong.
        problem: &'static str,
        /// Length of the first range, bytes.
        len: u64,
    },
    /// A plan with initrds was loaded without them.
    #[error("the boot plan wants initrd {index}, and {given} were given")]
    MissingInitrd {
        /// Index of the one that is missing.
        index: usize,
        /// How many there are.
        given: usize,
    },
    /// Guest memory refused a write.
    #[error("cannot write {len} bytes to guest memory at {address:#x}: {source}")]
    Memory {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        len: u64,
        /// Why.
        source: GuestMemoryError,
    },
}

/// The first bytes of a file, shown as hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstBytes {
    bytes: [u8; 8],
    len: usize,
}

impl FirstBytes {
    fn new(head: &[u8]) -> Self {
        let mut bytes = [0; 8];
        let mut len = 0;
        for (to, from) in bytes.iter_mut().zip(head) {
            *to = *from;
            len += 1;
        }
        FirstBytes { bytes, len }
    }
}

impl fmt::Display for FirstBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.bytes.iter().take(self.len).enumerate() {
            let gap = if i == 0 { "" } else { " " };
            write!(f, "{gap}{byte:02x}")?;
        }
        Ok(())
    }
}

/// The error for a file of no known format, with a guess at what it is.
pub(super) fn not_a_kernel(image: String, head: &[u8]) -> BootError {
    let known: &[(&[u8], &str)] = &[
        (b"\x1f\x8b", "that is gzip; unpack it first"),
        (b"\xfd7zXZ", "that is xz; unpack it first"),
        (b"\x28\xb5\x2f\xfd", "that is zstd; unpack it first"),
        (b"BZh", "that is bzip2; unpack it first"),
        (b"\x02\x21\x4c\x18", "that is lz4; unpack it first"),
        (b"\x04\x22\x4d\x18", "that is lz4; unpack it first"),
        (b"07070", "that is a cpio archive: an initrd?"),
        (
            b"MZ",
            "that is an EFI program, and there is no EFI here; take a bzImage or an ELF file",
        ),
        (b"#!", "that is a script"),
    ];
    let hint = known
        .iter()
        .find(|(magic, _)| head.starts_with(magic))
        .map_or(
            "a bzImage, an ELF file or a multiboot image is expected",
            |(_, hint)| hint,
        );
    BootError::NotAKernel {
        image,
        first: FirstBytes::new(head),
        hint,
    }
}
