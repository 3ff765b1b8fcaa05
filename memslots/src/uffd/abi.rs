// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel's numbers (linux/userfaultfd.h; ioctl_userfaultfd(2)). Every structure of these ioctls is a row of 64-bit
//! words, so that is how they are passed.

/// `UFFD_API`: the one version there is.
pub(super) const API: u64 = 0xaa;

/// An ioctl of a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Call {
    /// `UFFDIO_API`: `api, features, ioctls`.
    Api,
    /// `UFFDIO_REGISTER`: `start, len, mode, ioctls`.
    Register,
    /// `UFFDIO_UNREGISTER`: `start, len`.
    Unregister,
    /// `UFFDIO_WAKE`: `start, len`.
    Wake,
    /// `UFFDIO_COPY`: `dst, src, len, mode, copy`.
    Copy,
    /// `UFFDIO_ZEROPAGE`: `start, len, mode, zeropage`.
    ZeroPage,
    /// `UFFDIO_MOVE`: `dst, src, len, mode, move`.
    Move,
    /// `UFFDIO_WRITEPROTECT`: `start, len, mode`.
    WriteProtect,
    /// `UFFDIO_CONTINUE`: `start, len, mode, mapped`.
    Continue,
    /// `UFFDIO_POISON`: `start, len, mode, updated`.
    Poison,
}

impl Call {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Api,
        Self::Register,
        Self::Unregister,
        Self::Wake,
        Self::Copy,
        Self::ZeroPage,
        Self::Move,
        Self::WriteProtect,
        Self::Continue,
        Self::Poison,
    ];

    /// Its number among the userfaultfd's ioctls (`_UFFDIO_…`), which is also its bit in what a registration answers.
    pub const fn index(self) -> u32 {
        match self {
            Self::Register => 0x00,
            Self::Unregister => 0x01,
            Self::Wake => 0x02,
            Self::Copy => 0x03,
            Self::ZeroPage => 0x04,
            Self::Move => 0x05,
            Self::WriteProtect => 0x06,
            Self::Continue => 0x07,
            Self::Poison => 0x08,
            Self::Api => 0x3f,
        }
    }

    /// How many 64-bit words its argument has.
    pub const fn words(self) -> usize {
        match self {
            Self::Unregister | Self::Wake => 2,
            Self::Api | Self::WriteProtect => 3,
            Self::Register | Self::ZeroPage | Self::Continue | Self::Poison => 4,
            Self::Copy | Self::Move => 5,
        }
    }

    /// The request as `ioctl` takes it: direction, size, `0xaa`, number.
    pub const fn request(self) -> u64 {
        /// Of these two the header says that they should be `_IOW`, and are `_IOR`.
        const READ: u64 = 2;
        const READ_WRITE: u64 = 3;
        let direction = match self {
            Self::Unregister | Self::Wake => READ,
            _ => READ_WRITE,
        };
        direction << 30 | (self.words() as u64 * 8) << 16 | 0xaa << 8 | self.index() as u64
    }

    /// As a message names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Api => "UFFDIO_API",
            Self::Register => "UFFDIO_REGISTER",
            Self::Unregister => "UFFDIO_UNREGISTER",
            Self::Wake => "UFFDIO_WAKE",
            Self::Copy => "UFFDIO_COPY",
            Self::ZeroPage => "UFFDIO_ZEROPAGE",
            Self::Move => "UFFDIO_MOVE",
            Self::WriteProtect => "UFFDIO_WRITEPROTECT",
            Self::Continue => "UFFDIO_CONTINUE",
            Self::Poison => "UFFDIO_POISON",
        }
    }
}

/// `_IO(0xaa, 0)` on `/dev/userfaultfd`.
pub(super) const USERFAULTFD_IOC_NEW: u64 = 0xaa00;

/// Sleepers are not woken: of `COPY`, `ZEROPAGE`, `CONTINUE`, `POISON` and `MOVE`.
pub(super) const DONTWAKE: u64 = 1;
/// The page comes write-protected: of `COPY` and `CONTINUE`.
pub(super) const PROTECTED: u64 = 2;
/// Holes of the source are skipped: of `MOVE`.
pub(super) const ALLOW_HOLES: u64 = 2;
/// Protects: of `WRITEPROTECT`; without it, it takes the protection away.
pub(super) const PROTECT: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_headers() {
        // What a C compiler makes of the header's macros.
        let expected = [
            (Call::Api, 0xc018_aa3f),
            (Call::Register, 0xc020_aa00),
            (Call::Unregister, 0x8010_aa01),
            (Call::Wake, 0x8010_aa02),
            (Call::Copy, 0xc028_aa03),
            (Call::ZeroPage, 0xc020_aa04),
            (Call::Move, 0xc028_aa05),
            (Call::WriteProtect, 0xc018_aa06),
            (Call::Continue, 0xc020_aa07),
            (Call::Poison, 0xc020_aa08),
        ];
        assert_eq!(expected.len(), Call::ALL.len());
        for (call, request) in expected {
            assert_eq!(call.request(), request, "{}", call.name());
        }
    }
}
