// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes initramfs archives: cpio in the `newc` form that the kernel unpacks
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive under construction. Archives may follow each other in one initramfs.
pub(crate) struct Archive {
    bytes: Vec<u8>,
    next_inode: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

impl Archive {
    pub(crate) fn new() -> Self {
        Archive {
            bytes: Vec::new(),
            next_inode: 1,
        }
    }

    pub(crate) fn directory(&mut self, path: &str) -> &mut Self {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[])
    }

    pub(crate) fn file(&mut self, path: &str, permissions: u32, data: &[u8]) -> &mut Self {
        self.entry(path, REGULAR | permissions, (0, 0), data)
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    pub(crate) fn character_device(&mut self, path: &str, major: u32, minor: u32) -> &mut Self {
        self.entry(path, CHARACTER | 0o600, (major, minor), &[])
    }

    /// The whole archive, with its end mark.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.next_inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), data: &[u8]) -> &mut Self {
        let inode = self.next_inode;
        self.next_inode += 1;
        let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        // inode, mode, uid, gid, links, mtime, size, device (2), device node (2), name size, checksum
        let fields = [
            inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        self
    }

    /// Names and data each end on a multiple of four.
    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_aligned_and_the_header_is_as_the_kernel_reads_it() {
        let mut archive = Archive::new();
        archive.directory("dev").file("init", 0o755, b"#!/bin/sh\n");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        let second = 110 + 4 + 2; // the header, "dev\0", and two bytes up to a multiple of four
        assert_eq!(&bytes[second..second + 6], b"070701");
        let field = |start: usize, index: usize| {
            let at = start + 6 + 8 * index;
            u32::from_str_radix(
                std::str::from_utf8(&bytes[at..at + 8]).unwrap_or_default(),
                16,
            )
            .ok()
        };
        assert_eq!(field(0, 1), Some(0o040_755));
        assert_eq!(field(second, 1), Some(0o100_755));
        assert_eq!(field(second, 6), Some(10));
        assert_eq!(field(second, 11), Some(5));
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("TRAILER!!!"));
    }
}
