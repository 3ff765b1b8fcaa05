// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The image behind a disk: a raw file or a block device, opened, locked and measured. All that can be wrong with it is
//! found here, before the VM exists.
//!
//! # What the host can do
//! Whether a file can have holes is asked by a hole behind its end, which changes nothing (a file system that has
//! holes returns at once). Whether ranges can be zeroed cannot be asked so, for that would allocate; it is tried when
//! the guest wants it, and zeros are written where it is refused. Of a block device sysfs says both.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::fingerprint::Fingerprint;
use super::lock::{Locked, lock, unlock};
use super::space::SECTOR;

/// How long a lock is waited for that another VMM has.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
/// Between two looks at it.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// An image. Clones are the same open file, with the one lock.
#[derive(Clone)]
pub struct Image(Arc<Inner>);

struct Inner {
    file: File,
    path: PathBuf,
    readonly: bool,
    is_device: bool,
    sectors: u64,
    topology: Topology,
    discard: bool,
    /// Found out as they are used, by all queues.
    punch: AtomicBool,
    zero: AtomicBool,
}

/// Block sizes (virtio 1.2, 5.2.4: `blk_size`, `topology`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// The smallest unit that can be addressed, bytes. It is advice to the driver: any sector is served.
    pub logical: u32,
    /// Logical blocks of a physical one, the exponent.
    pub physical_exponent: u8,
    /// The first aligned logical block.
    pub alignment: u8,
    /// The smallest unit without a read before the write, logical blocks.
    pub min_io: u16,
    /// The best unit, logical blocks; 0: none is better.
    pub optimal_io: u32,
    /// What a discard should be a multiple of, sectors.
    pub discard_sectors: u32,
}

/// An image that cannot be a disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// It cannot be opened.
    #[error("cannot open {path} {how}{advice}: {source}")]
    Open {
        /// The image.
        path: PathBuf,
        /// To read, or to write.
        how: &'static str,
        /// The errno.
        source: io::Error,
        /// What helps.
        advice: &'static str,
    },
    /// It is of a kind that is no disk.
    #[error("{path} is {is}; a disk is a regular file or a block device")]
    NotADisk {
        /// The path.
        path: PathBuf,
        /// What is there.
        is: &'static str,
    },
    /// Somebody uses it.
    #[error("{path} is in use by another VMM, or by another --disk: {why}")]
    InUse {
        /// The image.
        path: PathBuf,
        /// Whether that one writes, or this one would.
        why: &'static str,
    },
    /// It has no sector.
    #[error("{path} has {len} bytes: a disk has at least one sector of 512")]
    Empty {
        /// The image.
        path: PathBuf,
        /// Its size, bytes.
        len: u64,
    },
    /// The host does not say what the image is like.
    #[error("cannot ask for the size of {path}: {source}")]
    Ask {
        /// The image.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// The host has no io_uring for this process.
    #[error("io=uring: this host permits no io_uring ({0}); io=auto does without")]
    Uring(io::Error),
    /// The configuration is none.
    #[error(transparent)]
    Config(#[from] super::config::DiskConfigError),
    /// A state is of another disk.
    #[error("{path} is not the disk of this state: {why}")]
    State {
        /// The image.
        path: PathBuf,
        /// What differs.
        why: String,
    },
}

impl OpenError {
    /// Whether the user asked for what cannot be; else the host refused.
    pub fn is_users_fault(&self) -> bool {
        let hosts = |error: &io::Error| {
            // None: a path that is none, with a NUL in it.
            let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
            [
                libc::EMFILE,
                libc::ENFILE,
                libc::ENOMEM,
                libc::EIO,
                libc::EINTR,
            ]
            .contains(&errno)
        };
        match self {
            OpenError::Open { source, .. } | OpenError::Uring(source) => !hosts(source),
            OpenError::Ask { .. } => false,
            _ => true,
        }
    }
}

impl Image {
    /// Opens an image and locks it: to write for this disk alone, `readonly` with any number of others. Bytes behind
    /// the last whole sector are not shown to the guest, which is logged.
    ///
    /// Blocks as long as the host's file system does, and half a second where another VMM has the image.
    ///
    /// # Errors
    /// [`OpenError`]; nothing has changed.
    pub fn open(path: &Path, readonly: bool) -> Result<Self, OpenError> {
        Self::open_asking(path, readonly, None)
    }

    /// [`open`](Self::open) without a try of what its file system can do, which sets the time of the image's last write:
    /// `punch` says whether holes can be made. Where that is wrong the first request finds it out.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_untouched(path: &Path, readonly: bool, punch: bool) -> Result<Self, OpenError> {
        Self::open_asking(path, readonly, Some(punch))
    }

    fn open_asking(path: &Path, readonly: bool, punch: Option<bool>) -> Result<Self, OpenError> {
        let named = || path.to_owned();
        let (file, metadata) = find(path, readonly)?;
        let ask = |source| OpenError::Ask {
            path: named(),
            source,
        };
        // io_uring would take the flag for a wish not to wait.
        clear_flags(&file).map_err(ask)?;
        match lock_patiently(&file, !readonly) {
            Locked::Yes => {}
            Locked::Conflict => {
                return Err(OpenError::InUse {
                    path: named(),
                    why: match readonly {
                        true => "it writes there (only disks that are all readonly share an image)",
                        false => "to write, a disk has its image alone",
                    },
                });
            }
            Locked::Impossible(error) => log::warn!(
                "{} cannot be locked ({error}): nothing keeps another VMM from writing there too",
                path.display()
            ),
        }
        let sectors = measure(path, readonly, &file, &metadata)?;
        let is_device = metadata.file_type().is_block_device();
        let host = match is_device {
            true => Host::of_device(&file, metadata.rdev()),
            false => Host::of_file(&file, &metadata, readonly, punch),
        };
        let behind = metadata.len() % SECTOR;
        if !is_device && behind != 0 {
            log::warn!(
                "{}: the last {behind} of its {} bytes are no whole sector, and the guest does not see them",
                path.display(),
                metadata.len()
            );
        }
        Ok(Image(Arc::new(Inner {
            file,
            path: named(),
            readonly,
            is_device,
            sectors,
            topology: host.topology,
            discard: host.discard,
            punch: AtomicBool::new(host.punch),
            zero: AtomicBool::new(host.zero),
        })))
    }

    /// What can be known of an image while another VMM has it: that it can be opened to be used so, its size in sectors of
    /// 512 bytes, and by what it is known again. It is not locked, and not open any more behind that.
    ///
    /// Blocks as long as the host's file system does.
    ///
    /// # Errors
    /// [`OpenError`], but for [`OpenError::InUse`].
    pub fn look(path: &Path, readonly: bool) -> Result<(u64, Fingerprint), OpenError> {
        let (file, metadata) = find(path, readonly)?;
        let sectors = measure(path, readonly, &file, &metadata)?;
        let fingerprint = Fingerprint::of(&file, readonly);
        let fingerprint = fingerprint.map_err(|source| OpenError::Ask {
            path: path.to_owned(),
            source,
        })?;
        Ok((sectors, fingerprint))
    }

    /// That there is something that can be an image, where it is not known yet how it will be used.
    ///
    /// # Errors
    /// [`OpenError::Open`]: there is nothing. [`OpenError::NotADisk`].
    pub fn is_there(path: &Path) -> Result<(), OpenError> {
        let metadata = fs::metadata(path).map_err(|source| refused(path, true, source))?;
        check_kind(path, &metadata)
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Whether it can only be read.
    pub fn is_readonly(&self) -> bool {
        self.0.readonly
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.0.is_device
    }

    /// Its size when it was opened, in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.0.sectors
    }

    /// By what it is known again.
    ///
    /// # Errors
    /// The errno of `fstat(2)`.
    pub fn fingerprint(&self) -> io::Result<Fingerprint> {
        Fingerprint::of(&self.0.file, self.0.readonly)
    }

    /// Has all that was written on the disk, and the times that it was written at. Blocks for it.
    ///
    /// # Errors
    /// The errno of `fsync(2)`.
    pub fn sync(&self) -> io::Result<()> {
        self.0.file.sync_all()
    }

    /// Gives up the lock, for another process that goes on with the disk.
    ///
    /// # Errors
    /// The errno of `fcntl(2)`.
    pub fn unlock(&self) -> io::Result<()> {
        unlock(&self.0.file)
    }

    /// Takes the lock that [`unlock`](Self::unlock) gave up. Waits for it as an opening does.
    ///
    /// # Errors
    /// `WouldBlock`: another process has the image.
    pub fn lock_again(&self) -> io::Result<()> {
        match lock_patiently(&self.0.file, !self.0.readonly) {
            Locked::Yes | Locked::Impossible(_) => Ok(()),
            Locked::Conflict => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Its block sizes.
    pub fn topology(&self) -> Topology {
        self.0.topology
    }

    /// Whether space that the guest discards goes back to the host.
    pub fn can_discard(&self) -> bool {
        self.0.discard
    }

    /// Whether, as far as is known, there can be holes: no space, and zeros when read.
    pub fn can_punch(&self) -> bool {
        // Relaxed: a hint, and who has an older one is refused by the host.
        self.0.punch.load(Ordering::Relaxed)
    }

    /// Whether, as far as is known, ranges can be zeroed without writing.
    pub fn can_zero(&self) -> bool {
        self.0.zero.load(Ordering::Relaxed)
    }

    /// The host has no holes after all.
    pub(super) fn cannot_punch(&self) {
        self.0.punch.store(false, Ordering::Relaxed);
    }

    /// The host cannot zero ranges after all.
    pub(super) fn cannot_zero(&self) {
        self.0.zero.store(false, Ordering::Relaxed);
    }
}

impl AsRawFd for Image {
    fn as_raw_fd(&self) -> RawFd {
        self.0.file.as_raw_fd()
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("path", &self.0.path)
            .field("readonly", &self.0.readonly)
            .field("sectors", &self.0.sectors)
            .finish_non_exhaustive()
    }
}

/// Opens what is at `path`, if it can be a disk.
fn find(path: &Path, readonly: bool) -> Result<(File, fs::Metadata), OpenError> {
    // A FIFO or a device would wait for its other side.
    let opened = OpenOptions::new()
        .read(true)
        .write(!readonly)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let file = opened.map_err(|source| refused(path, readonly, source))?;
    let metadata = file.metadata().map_err(|source| OpenError::Ask {
        path: path.to_owned(),
        source,
    })?;
    check_kind(path, &metadata)?;
    Ok((file, metadata))
}

/// Refuses what is no disk.
fn check_kind(path: &Path, metadata: &fs::Metadata) -> Result<(), OpenError> {
    let is = match metadata.file_type() {
        kind if kind.is_file() || kind.is_block_device() => return Ok(()),
        kind if kind.is_dir() => "a directory",
        kind if kind.is_char_device() => "a character device",
        kind if kind.is_fifo() => "a pipe",
        _ => "something else",
    };
    let path = path.to_owned();
    Err(OpenError::NotADisk { path, is })
}

/// Its size in whole sectors. What has none, or is a device that cannot be written and should be, is refused.
fn measure(
    path: &Path,
    readonly: bool,
    file: &File,
    metadata: &fs::Metadata,
) -> Result<u64, OpenError> {
    let is_device = metadata.file_type().is_block_device();
    let len = match is_device {
        true => device_size(file).map_err(|source| OpenError::Ask {
            path: path.to_owned(),
            source,
        })?,
        false => metadata.len(),
    };
    let sectors = len / SECTOR;
    if sectors == 0 {
        let path = path.to_owned();
        return Err(OpenError::Empty { path, len });
    }
    // Such a device can be opened to write all the same, and then each write fails.
    if is_device && !readonly && ask(file, BLKROGET).is_some_and(|is| is != 0) {
        let source = io::Error::from_raw_os_error(libc::EROFS);
        return Err(refused(path, readonly, source));
    }
    Ok(sectors)
}

fn refused(path: &Path, readonly: bool, source: io::Error) -> OpenError {
    let path = path.to_owned();
    let advice = match source.raw_os_error() {
        // ENXIO: a socket, or a FIFO that nobody reads.
        Some(libc::EISDIR) => {
            let is = "a directory";
            return OpenError::NotADisk { path, is };
        }
        Some(libc::ENXIO) => {
            let is = "a pipe, a socket or a device without a medium";
            return OpenError::NotADisk { path, is };
        }
        Some(libc::EACCES | libc::EPERM | libc::EROFS) if !readonly => {
            " (with readonly it need not be writable)"
        }
        _ => "",
    };
    OpenError::Open {
        path,
        how: if readonly { "to read" } else { "to write" },
        source,
        advice,
    }
}

/// Takes the lock. The one of a VMM that was killed goes a moment after it: what it had under way holds the file until
/// the kernel is done with it, and until then it may still be written.
fn lock_patiently(file: &File, write: bool) -> Locked {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        let locked = lock(file, write);
        if !matches!(locked, Locked::Conflict) || Instant::now() >= deadline {
            return locked;
        }
        std::thread::sleep(LOCK_PAUSE);
    }
}

/// What the host says of an image.
struct Host {
    topology: Topology,
    discard: bool,
    punch: bool,
    zero: bool,
}

impl Host {
    fn of_file(file: &File, metadata: &fs::Metadata, readonly: bool, punch: Option<bool>) -> Self {
        // The file system's block: less than one is read before it is written.
        let block = metadata.blksize().clamp(SECTOR, 64 << 10);
        let block = block.next_power_of_two() as u32;
        let punch = !readonly && punch.unwrap_or_else(|| can_punch(file, metadata.len()));
        Host {
            topology: topology([SECTOR as u32, block, block, 0], 0, u64::from(block)),
            discard: punch,
            punch,
            zero: !readonly,
        }
    }

    fn of_device(file: &File, number: u64) -> Self {
        let logical = ask(file, BLKSSZGET).filter(|size| size.is_power_of_two());
        let logical = logical.unwrap_or(SECTOR as u32).max(SECTOR as u32);
        let sizes = [
            logical,
            ask(file, BLKPBSZGET).unwrap_or(logical),
            ask(file, BLKIOMIN).unwrap_or(logical),
            ask(file, BLKIOOPT).unwrap_or(0),
        ];
        let queue = |name: &str| {
            let (major, minor) = (libc::major(number), libc::minor(number));
            // A partition's queue is its disk's.
            ["queue", "../queue"].into_iter().find_map(|folder| {
                let file = format!("/sys/dev/block/{major}:{minor}/{folder}/{name}");
                fs::read_to_string(file).ok()?.trim().parse::<u64>().ok()
            })
        };
        let zero = queue("write_zeroes_max_bytes").unwrap_or(0) > 0;
        Host {
            topology: topology(
                sizes,
                ask(file, BLKALIGNOFF).unwrap_or(0),
                queue("discard_granularity").unwrap_or(0),
            ),
            discard: queue("discard_max_bytes").unwrap_or(0) > 0,
            punch: zero,
            zero,
        }
    }
}

/// From logical, physical, least and best sizes, the alignment's offset and the granularity of discards, all in bytes.
fn topology(sizes: [u32; 4], offset: u32, discard: u64) -> Topology {
    let [logical, physical, least, best] = sizes;
    let blocks = |bytes: u32| bytes / logical;
    let exponent = blocks(physical).max(1).ilog2() as u8;
    Topology {
        logical,
        physical_exponent: exponent,
        // The kernel gives -1 where the parts of a device do not fit together.
        alignment: u8::try_from(blocks(offset)).unwrap_or(0),
        min_io: u16::try_from(blocks(least)).unwrap_or(0),
        optimal_io: blocks(best),
        discard_sectors: u32::try_from(discard / SECTOR)
            .unwrap_or(1)
            .max(logical / SECTOR as u32),
    }
}

/// Whether a file's file system has holes: one behind the end is none and changes nothing.
fn can_punch(file: &File, len: u64) -> bool {
    const PIECE: u64 = 4096;
    let Ok(at) = libc::off_t::try_from(len.next_multiple_of(PIECE)) else {
        return false;
    };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no memory is involved.
    let done = unsafe { libc::fallocate(file.as_raw_fd(), mode, at, PIECE as libc::off_t) };
    done == 0
}

fn clear_flags(file: &File) -> io::Result<()> {
    // SAFETY: no memory is involved. Of the flags that can be set so none but O_NONBLOCK is.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, 0) };
    match done {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

// linux/fs.h
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const BLKROGET: libc::Ioctl = 0x125e;
const BLKSSZGET: libc::Ioctl = 0x1268;
const BLKIOMIN: libc::Ioctl = 0x1278;
const BLKIOOPT: libc::Ioctl = 0x1279;
const BLKALIGNOFF: libc::Ioctl = 0x127a;
const BLKPBSZGET: libc::Ioctl = 0x127b;

fn device_size(file: &File) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: the ioctl writes one u64, which lives through the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(size),
    }
}

/// A block device's number, if it has it.
fn ask(file: &File, what: libc::Ioctl) -> Option<u32> {
    let mut value = 0u32;
    // SAFETY: each of these ioctls writes one int, which lives through the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), what, &raw mut value) } {
        -1 => None,
        _ => Some(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn file(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn an_image_is_measured_in_whole_sectors() {
        for (len, sectors) in [(512, 1), (1023, 1), (1 << 20, 2048)] {
            let file = file(len);
            let image = Image::open(file.path(), false).unwrap();
            assert_eq!(image.sectors(), sectors);
        }
        for len in [0, 511] {
            let error = Image::open(file(len).path(), false).unwrap_err();
            assert!(matches!(error, OpenError::Empty { .. }) && error.is_users_fault());
            assert!(
                error.to_string().contains(&format!("{len} bytes")),
                "{error}"
            );
        }
    }

    #[test]
    fn opening_changes_nothing_of_the_image() {
        let mut file = file(0);
        file.write_all(&[7; 5000]).unwrap();
        let before = file.as_file().metadata().unwrap();
        let image = Image::open(file.path(), false).unwrap();
        let after = file.as_file().metadata().unwrap();
        assert_eq!(
            (before.len(), before.blocks()),
            (after.len(), after.blocks())
        );
        assert_eq!(fs::read(image.path()).unwrap(), [7; 5000]);
    }

    #[test]
    fn what_is_no_disk_is_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        let name = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
        // SAFETY: a string with its end.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        for readonly in [true, false] {
            for (path, is) in [
                (folder.path(), "a directory"),
                (fifo.as_path(), "a pipe"),
                (Path::new("/dev/null"), "a character device"),
            ] {
                let error = Image::open(path, readonly).unwrap_err();
                assert!(error.to_string().contains(is), "{error}");
                assert!(error.is_users_fault());
            }
            let error = Image::open(&folder.path().join("none"), readonly).unwrap_err();
            assert!(
                error.is_users_fault() && error.to_string().contains("none"),
                "{error}"
            );
        }
    }

    #[test]
    fn an_image_is_one_writers_or_any_number_of_readers() {
        let file = file(4096);
        let open = |readonly| Image::open(file.path(), readonly);
        let writer = open(false).unwrap();
        for readonly in [true, false] {
            let error = open(readonly).unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, OpenError::InUse { .. }) && error.is_users_fault());
            assert!(text.contains("another VMM") && text.contains(file.path().to_str().unwrap()));
        }
        // A second descriptor of the same image leaves the lock where it is.
        drop(writer.clone());
        assert!(open(true).is_err());
        drop(writer);
        let readers = [open(true).unwrap(), open(true).unwrap()];
        assert!(open(false).is_err());
        drop(readers);
        open(false).unwrap();
    }

    #[test]
    fn an_image_that_cannot_be_is_the_users_fault_and_told_once() {
        let nul = Image::open(Path::new("a\0b"), false).unwrap_err();
        assert!(nul.is_users_fault());
        let refused = refused(
            Path::new("/x"),
            false,
            io::Error::from_raw_os_error(libc::EROFS),
        );
        let text = crate::end::Chain(&refused).to_string();
        assert_eq!(text.matches("os error 30").count(), 1, "{text}");
        assert!(text.contains("with readonly"), "{text}");
    }

    #[test]
    fn block_sizes_are_told_in_logical_blocks() {
        let told = topology([512, 4096, 4096, 1 << 20], 3584, 4096);
        let expected = Topology {
            logical: 512,
            physical_exponent: 3,
            alignment: 7,
            min_io: 8,
            optimal_io: 2048,
            discard_sectors: 8,
        };
        assert_eq!(told, expected);
        let odd = topology([4096, 0, u32::MAX, 0], u32::MAX, 0);
        assert_eq!((odd.physical_exponent, odd.alignment), (0, 0));
        assert_eq!(odd.discard_sectors, 8);
    }
}
