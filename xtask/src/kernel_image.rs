// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Takes the ELF kernel out of a bzImage: an emulated machine starts seconds sooner when it need not decompress,
//! and a comparison of monitors is fairer.
//!
//! The boot protocol (Documentation/arch/x86/boot.rst) says where the payload is: `payload_offset` (0x248) and
//! `payload_length` (0x24c), counted from the protected-mode code, which follows `setup_sects` (0x1f1) + 1 sectors.
//! zstd unpacks xz and gzip too; busybox's xz was seen to refuse a Debian 6.1 kernel.
//! The payload's last four bytes are its unpacked length, but for gzip, which has that within.

use std::fs;
use std::path::Path;

use crate::assets::Zstd;
use crate::failure::{Context, Failure, Result};

/// Writes the ELF kernel inside `bz_image` to `elf`.
pub(crate) fn extract(bz_image: &Path, elf: &Path, zstd: &Zstd) -> Result<()> {
    let image = fs::read(bz_image).context(|| format!("{} cannot be read", bz_image.display()))?;
    let payload = payload(&image)
        .ok_or_else(|| Failure::new(format!("{} is no bzImage", bz_image.display())))?;
    let without_length = payload
        .get(..payload.len().saturating_sub(4))
        .unwrap_or_default();
    let unpacked = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0xfd, b'7', b'z', b'X', b'Z', ..] => {
            zstd.unpack(without_length)?
        }
        [0x1f, 0x8b, ..] => zstd.unpack(payload)?,
        [0x02, 0x21, 0x4c, 0x18, rest @ ..] => unpack_lz4(
            rest.get(..rest.len().saturating_sub(4)).unwrap_or_default(),
        )
        .ok_or_else(|| {
            Failure::new(format!(
                "the LZ4 payload of {} is broken",
                bz_image.display()
            ))
        })?,
        [0x7f, b'E', b'L', b'F', ..] => payload.to_vec(),
        other => {
            return Err(Failure::new(format!(
                "the payload of {} is packed in a way unknown here (it begins {:02x?})",
                bz_image.display(),
                &other[..other.len().min(6)]
            )));
        }
    };
    if !unpacked.starts_with(b"\x7fELF") {
        return Err(Failure::new(format!(
            "the payload of {} is no ELF file",
            bz_image.display()
        )));
    }
    fs::write(elf, unpacked).context(|| format!("{} cannot be written", elf.display()))
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?));
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = match *image.get(0x1f1)? {
        0 => 4,
        n => usize::from(n),
    };
    let start = (setup_sectors + 1) * 512 + usize::try_from(word(0x248)?).ok()?;
    image.get(start..start.checked_add(usize::try_from(word(0x24c)?).ok()?)?)
}

/// The `lz4 -l` form: blocks of at most 8 MiB, each after its packed length.
fn unpack_lz4(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        unpack_lz4_block(tail.get(..length)?, &mut out)?;
        rest = &tail[length..];
    }
    Some(out)
}

/// One block: tokens of (literal length, match length), literals, a two-byte distance back.
fn unpack_lz4_block(block: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let mut at = 0;
    let long = |at: &mut usize, nibble: u8| -> Option<usize> {
        let mut length = usize::from(nibble);
        if nibble == 15 {
            loop {
                let byte = *block.get(*at)?;
                *at += 1;
                length += usize::from(byte);
                if byte != 255 {
                    break;
                }
            }
        }
        Some(length)
    };
    while at < block.len() {
        let token = block[at];
        at += 1;
        let literals = long(&mut at, token >> 4)?;
        out.extend_from_slice(block.get(at..at + literals)?);
        at += literals;
        if at == block.len() {
            break; // the last sequence has literals alone
        }
        let back = usize::from(u16::from_le_bytes(block.get(at..at + 2)?.try_into().ok()?));
        at += 2;
        let length = long(&mut at, token & 15)? + 4;
        let from = out.len().checked_sub(back).filter(|_| back != 0)?;
        if back >= length {
            out.extend_from_within(from..from + length);
        } else {
            for i in from..from + length {
                out.push(out[i]); // the match runs into what it makes
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lz4_block_with_an_overlapping_match_unpacks() {
        // "ab", then eight bytes from two back, then "!" as the last literal.
        let block = [0x24, b'a', b'b', 2, 0, 0x10, b'!'];
        let mut packed = u32::try_from(block.len())
            .unwrap_or(0)
            .to_le_bytes()
            .to_vec();
        packed.extend_from_slice(&block);
        assert_eq!(unpack_lz4(&packed).as_deref(), Some(&b"ababababab!"[..]));
    }

    #[test]
    fn broken_lz4_is_refused_and_reads_nothing_outside() {
        for packed in [
            &[7, 0, 0, 0, 0x24][..],
            &[3, 0, 0, 0, 0x04, 9, 0][..],
            &[2, 0, 0, 0, 0xf0, 255][..],
        ] {
            assert_eq!(unpack_lz4(packed), None, "{packed:?}");
        }
    }

    #[test]
    fn what_is_no_kernel_has_no_payload() {
        assert!(payload(&[]).is_none());
        assert!(payload(&[0; 1024]).is_none());
        let mut image = vec![0; 1024];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(payload(&image).is_none());
    }
}
