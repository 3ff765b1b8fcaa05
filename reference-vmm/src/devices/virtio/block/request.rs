// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a driver asks for (virtio 1.2, 5.2.6), read and checked: plain data in and out.

#![forbid(unsafe_code)]

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::space::{
    MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, MAX_ZERO_RANGES, MAX_ZERO_SECTORS, SECTOR,
};

/// Bytes of a request's header: type, reserved, sector.
pub const HEADER: usize = 16;
/// Bytes of a range of a discard or a write of zeros: sector, number of sectors, flags.
pub const RANGE: usize = 16;

/// A request's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Not done, or not all of it.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// No such request.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Its size in sectors.
    pub sectors: u64,
    /// The driver cannot write.
    pub readonly: bool,
    /// What the driver has accepted.
    pub features: u64,
}

/// A request whose data is where it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Reads all of the data from this byte on.
    Read(u64),
    /// Writes all of the data from this byte on.
    Write(u64),
    /// What was written before is to be durable.
    Flush,
    /// The serial number.
    Id,
    /// The data are so many ranges to discard.
    Discard(u32),
    /// The data are so many ranges to write zeros to.
    Zero(u32),
}

/// A range of the disk, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
    /// Its space need not be kept.
    pub unmap: bool,
}

impl Request {
    /// Reads a header. `input` bytes of data are for the device to read, and `output` for it to write, the status
    /// byte not among them.
    ///
    /// # Errors
    /// The status that answers it.
    pub fn new(
        header: &[u8; HEADER],
        input: u32,
        output: u32,
        disk: &Disk,
    ) -> Result<Self, Status> {
        let kind = u32_at(header, 0);
        let sector = u64_at(header, 8);
        let accepted = |bit: u32| disk.features >> bit & 1 == 1;
        let ranges = |most: u32| {
            let (whole, rest) = (input / RANGE as u32, input % RANGE as u32);
            match rest == 0 && (1..=most).contains(&whole) && !disk.readonly {
                true => Ok(whole),
                false => Err(Status::IoError),
            }
        };
        match kind {
            VIRTIO_BLK_T_IN => disk.place(sector, output.into()).map(Request::Read),
            // A disk that cannot be written says so as an error (5.2.6.2).
            VIRTIO_BLK_T_OUT if disk.readonly => Err(Status::IoError),
            VIRTIO_BLK_T_OUT => disk.place(sector, input.into()).map(Request::Write),
            VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Request::Id),
            VIRTIO_BLK_T_DISCARD if accepted(VIRTIO_BLK_F_DISCARD) => {
                ranges(MAX_DISCARD_RANGES).map(Request::Discard)
            }
            VIRTIO_BLK_T_WRITE_ZEROES if accepted(VIRTIO_BLK_F_WRITE_ZEROES) => {
                ranges(MAX_ZERO_RANGES).map(Request::Zero)
            }
            _ => Err(Status::Unsupported),
        }
    }
}

impl Disk {
    /// The byte at which so many bytes of data begin.
    fn place(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let end = sector.checked_add(len / SECTOR);
        match len.is_multiple_of(SECTOR) && end.is_some_and(|end| end <= self.sectors) {
            // The disk's size in bytes has 64 bits.
            true => Ok(sector.saturating_mul(SECTOR)),
            false => Err(Status::IoError),
        }
    }

    /// Reads a range, of a write of zeros or else of a discard.
    ///
    /// # Errors
    /// The status that answers the request (5.2.6.2).
    pub fn range(&self, bytes: &[u8; RANGE], zero: bool) -> Result<Range, Status> {
        let (sector, count, flags) = (u64_at(bytes, 0), u32_at(bytes, 8), u32_at(bytes, 12));
        let (known, most) = match zero {
            true => (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, MAX_ZERO_SECTORS),
            false => (0, MAX_DISCARD_SECTORS),
        };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if count > most {
            return Err(Status::IoError);
        }
        let len = u64::from(count) * SECTOR;
        Ok(Range {
            offset: self.place(sector, len)?,
            len,
            unmap: flags != 0,
        })
    }
}

fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: Disk = Disk {
        sectors: 100,
        readonly: false,
        features: 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
    };

    fn header(kind: u32, sector: u64) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    fn range(sector: u64, count: u32, flags: u32) -> [u8; RANGE] {
        let mut range = [0; RANGE];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&count.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        range
    }

    #[test]
    fn data_lies_on_the_disk_in_whole_sectors_or_is_refused() {
        let read = |sector, len| Request::new(&header(VIRTIO_BLK_T_IN, sector), 0, len, &DISK);
        assert_eq!(read(0, 0), Ok(Request::Read(0)));
        assert_eq!(read(99, 512), Ok(Request::Read(99 * 512)));
        assert_eq!(read(100, 0), Ok(Request::Read(100 * 512)));
        for (sector, len) in [
            (99, 1024),
            (100, 512),
            (u64::MAX, 512),
            (1 << 55, 0),
            (0, 511),
            (0, 1),
        ] {
            assert_eq!(read(sector, len), Err(Status::IoError), "{sector} {len}");
        }
    }

    #[test]
    fn what_is_unknown_or_not_negotiated_is_unsupported() {
        let plain = Disk {
            features: 0,
            ..DISK
        };
        let ask = |kind, disk: &Disk| Request::new(&header(kind, 0), 16, 0, disk);
        for kind in [2, 3, 5, 9, 10, 12, 14, 15, 24, 1 << 31, u32::MAX] {
            assert_eq!(ask(kind, &DISK), Err(Status::Unsupported), "{kind}");
        }
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(ask(kind, &plain), Err(Status::Unsupported));
            assert!(ask(kind, &DISK).is_ok());
        }
    }

    #[test]
    fn a_readonly_disk_refuses_every_kind_of_write() {
        let disk = Disk {
            readonly: true,
            ..DISK
        };
        for kind in [
            VIRTIO_BLK_T_OUT,
            VIRTIO_BLK_T_DISCARD,
            VIRTIO_BLK_T_WRITE_ZEROES,
        ] {
            let asked = Request::new(&header(kind, 0), 16, 0, &disk);
            assert_eq!(asked, Err(Status::IoError), "{kind}");
        }
    }

    #[test]
    fn ranges_are_as_many_and_as_long_as_was_said() {
        let most = MAX_DISCARD_RANGES * 16;
        let ask = |kind, len| Request::new(&header(kind, 0), len, 0, &DISK);
        assert_eq!(
            ask(VIRTIO_BLK_T_DISCARD, most),
            Ok(Request::Discard(MAX_DISCARD_RANGES))
        );
        for len in [0, 15, 17, most + 16] {
            assert_eq!(
                ask(VIRTIO_BLK_T_DISCARD, len),
                Err(Status::IoError),
                "{len}"
            );
        }
        let huge = Disk {
            sectors: u64::MAX / SECTOR,
            ..DISK
        };
        assert!(huge.range(&range(0, MAX_DISCARD_SECTORS, 0), false).is_ok());
        let long = range(0, MAX_DISCARD_SECTORS + 1, 0);
        assert_eq!(huge.range(&long, false), Err(Status::IoError));
        // Flags: a discard has none, a write of zeros only the one (5.2.6.2).
        assert_eq!(DISK.range(&range(0, 1, 1), false), Err(Status::Unsupported));
        assert_eq!(DISK.range(&range(0, 1, 2), true), Err(Status::Unsupported));
        assert!(DISK.range(&range(0, 1, 1), true).unwrap().unmap);
    }

    proptest! {
        #[test]
        fn no_request_leaves_the_disk(
            kind in prop_oneof![0..16u32, any::<u32>()], sector: u64, small in 0..128u64,
            input: u32, output: u32, sectors in 0..u64::MAX / SECTOR, bytes: [u8; 16],
        ) {
            let disk = Disk { sectors, ..DISK };
            for sector in [sector, small, sectors.saturating_sub(small)] {
                for len in [input, input & !511] {
                    let (at, len) = match Request::new(&header(kind, sector), len, len, &disk) {
                        Ok(Request::Read(at) | Request::Write(at)) => (at, len),
                        _ => continue,
                    };
                    prop_assert!(at + u64::from(len) <= sectors * SECTOR);
                }
            }
            let _ = output;
            for zero in [false, true] {
                if let Ok(range) = disk.range(&bytes, zero) {
                    prop_assert!(range.offset + range.len <= sectors * SECTOR);
                }
            }
        }
    }
}
