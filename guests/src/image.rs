// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Kernel images around a guest's code: the smallest files that each boot protocol takes.

/// Where the images ask to be loaded: 1 MiB.
pub const LOAD_ADDR: u32 = 0x10_0000;

const EHDR: usize = 64;
const PHDR: usize = 56;

/// An ELF64 executable with `code` as its one segment, at [`LOAD_ADDR`], entered at its start.
pub fn elf64(code: &[u8]) -> Vec<u8> {
    elf64_with(code, None)
}

/// The same with a PVH note (`XEN_ELFNOTE_PHYS32_ENTRY`): `code` is 32-bit and is entered there.
pub fn elf64_pvh(code: &[u8]) -> Vec<u8> {
    elf64_with(code, Some(LOAD_ADDR))
}

fn elf64_with(code: &[u8], pvh_entry: Option<u32>) -> Vec<u8> {
    let mut note = Vec::new();
    if let Some(entry) = pvh_entry {
        // namesz, descsz, type 18, "Xen\0", the entry.
        for word in [4u32, 4, 18] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(entry.to_le_bytes());
    }
    let segments = if note.is_empty() { 1 } else { 2 };
    let note_at = EHDR + PHDR * segments;
    let code_at = (note_at + note.len()).next_multiple_of(4096);

    let mut image = Vec::with_capacity(code_at + code.len());
    image.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    image.extend(2u16.to_le_bytes()); // ET_EXEC
    image.extend(62u16.to_le_bytes()); // EM_X86_64
    image.extend(1u32.to_le_bytes());
    image.extend(u64::from(LOAD_ADDR).to_le_bytes());
    image.extend((EHDR as u64).to_le_bytes());
    image.extend(0u64.to_le_bytes());
    image.extend(0u32.to_le_bytes());
    for half in [EHDR as u16, PHDR as u16, segments as u16, 64, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    let mut segment = |kind: u32, offset: usize, addr: u32, len: usize| {
        image.extend(kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        for word in [
            offset as u64,
            u64::from(addr),
            u64::from(addr),
            len as u64,
            len as u64,
            4,
        ] {
            image.extend(word.to_le_bytes());
        }
    };
    segment(1, code_at, LOAD_ADDR, code.len());
    if !note.is_empty() {
        segment(4, note_at, 0, note.len());
    }
    image.extend(note);
    image.resize(code_at, 0);
    image.extend(code);
    image
}

/// A 32-bit ELF with a multiboot 1 header in front of `code`, which is 32-bit.
pub fn multiboot(code: &[u8]) -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    /// Page-aligned modules and a memory map.
    const FLAGS: u32 = 3;
    const EHDR32: u32 = 52;
    const PHDR32: u32 = 32;
    let code_at = 4096u32;
    let header = [MAGIC, FLAGS, 0u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS)];
    let len = 12 + code.len() as u32;

    let mut image = Vec::new();
    image.extend(b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0");
    image.extend(2u16.to_le_bytes());
    image.extend(3u16.to_le_bytes()); // EM_386
    for word in [1u32, LOAD_ADDR + 12, EHDR32, 0, 0] {
        image.extend(word.to_le_bytes());
    }
    for half in [EHDR32 as u16, PHDR32 as u16, 1, 40, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    for word in [1u32, code_at, LOAD_ADDR, LOAD_ADDR, len, len, 7, 4] {
        image.extend(word.to_le_bytes());
    }
    image.resize(code_at as usize, 0);
    for word in header {
        image.extend(word.to_le_bytes());
    }
    image.extend(code);
    image
}

/// A bzImage (boot protocol 2.15, relocatable) whose protected-mode part is 0x200 bytes of padding
/// and then `code`, which is 64-bit: the 64-bit entry is 0x200 behind the load address.
pub fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut payload = vec![0x90; 0x200];
    payload.extend(code);
    payload.resize(payload.len().next_multiple_of(16), 0);
    let mut image = vec![0u8; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &(payload.len() as u32 / 16).to_le_bytes()); // syssize
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x6a]); // jump over the header, whose length it tells
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]); // LOADED_HIGH
    put(0x214, &LOAD_ADDR.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x1000u32.to_le_bytes()); // kernel_alignment
    put(0x234, &[1]); // relocatable
    put(0x236, &1u16.to_le_bytes()); // XLF_KERNEL_64
    put(0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(0x258, &u64::from(LOAD_ADDR).to_le_bytes()); // pref_address
    put(
        0x260,
        &(payload.len() as u32).next_multiple_of(4096).to_le_bytes(),
    ); // init_size
    image.extend(payload);
    image
}
