// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A file to boot from: a length that is known, and reads that are checked against it.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use vm_memory::{GuestMemoryBackend, GuestMemoryError, ReadVolatile, VolatileMemoryError};

use super::{BootError, FileCopy};

/// What a file is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// The kernel.
    Kernel,
    /// An initial RAM disk or a multiboot module.
    Initrd,
}

impl fmt::Display for ImageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ImageKind::Kernel => "kernel image",
            ImageKind::Initrd => "initrd",
        })
    }
}

/// An open file with its name and its length. Never empty.
#[derive(Debug)]
pub struct Image<F> {
    kind: ImageKind,
    name: String,
    file: F,
    len: u64,
    /// A kernel's first bytes, read once: they have the headers of every format, and each call of
    /// `read` that is not made is start-up time.
    head: Vec<u8>,
}

/// How much of a kernel is read at once: where a multiboot header must be.
pub(super) const HEAD: usize = 8192;

impl Image<File> {
    /// Opens the file at `path`, which must be a regular one.
    ///
    /// # Errors
    ///
    /// [`BootError::Open`], [`BootError::NotAFile`], [`BootError::Empty`], [`BootError::Read`].
    pub fn open(kind: ImageKind, path: &Path) -> Result<Self, BootError> {
        let name = path.display().to_string();
        let image = || format!("{kind} {name}");
        // Asked before the file is opened, because opening a pipe waits for its other end.
        let open_error = |source| BootError::Open {
            image: image(),
            source,
        };
        let file_type = fs::metadata(path).map_err(open_error)?.file_type();
        if !file_type.is_file() {
            let what = if file_type.is_dir() {
                "a directory"
            } else {
                "not a regular file"
            };
            return Err(BootError::NotAFile {
                image: image(),
                what,
            });
        }
        let file = File::open(path).map_err(open_error)?;
        Image::new(kind, name, file)
    }
}

impl<F> Image<F> {
    /// The file's length in bytes, as it was when the image was made.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The name that the image was made with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The kind with the name, for messages.
    pub(super) fn describe(&self) -> String {
        format!("{} {}", self.kind, self.name)
    }
}

impl<F: Read + Seek> Image<F> {
    /// An image of anything that can be read and sought; `name` is for messages.
    ///
    /// # Errors
    ///
    /// [`BootError::Empty`], [`BootError::Read`].
    pub fn new(kind: ImageKind, name: impl Into<String>, file: F) -> Result<Self, BootError> {
        let mut image = Image {
            kind,
            name: name.into(),
            file,
            len: 0,
            head: Vec::new(),
        };
        image.len = image
            .file
            .seek(SeekFrom::End(0))
            .map_err(|e| image.read_error(e))?;
        if image.len == 0 {
            return Err(BootError::Empty {
                image: image.describe(),
            });
        }
        if kind == ImageKind::Kernel {
            let mut head = vec![0; usize::try_from(image.len).map_or(HEAD, |len| len.min(HEAD))];
            image.read_at("first bytes", 0, &mut head)?;
            image.head = head;
        }
        Ok(image)
    }

    /// The first [`HEAD`] bytes of a kernel, fewer only where the file has no more.
    pub(super) fn head(&self) -> &[u8] {
        &self.head
    }

    /// Fills `buffer` with the bytes from `offset` on; `what` is what they are, for the error.
    pub(super) fn read_at(
        &mut self,
        what: &'static str,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), BootError> {
        self.check_range(what, offset, buffer.len() as u64)?;
        let known = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.head.get(offset..));
        if let Some(bytes) = known.and_then(|known| known.get(..buffer.len())) {
            buffer.copy_from_slice(bytes);
            return Ok(());
        }
        self.file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.file.read_exact(buffer))
            .map_err(|e| self.read_error(e))
    }

    /// Checks that the file has `len` bytes from `offset` on.
    pub(super) fn check_range(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<(), BootError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            end => Err(BootError::Truncated {
                image: self.describe(),
                what,
                end: end.unwrap_or(u64::MAX),
                len: self.len,
            }),
        }
    }
}

impl<F> Image<F> {
    fn read_error(&self, source: io::Error) -> BootError {
        BootError::Read {
            image: self.describe(),
            source,
        }
    }

    pub(super) fn bad_field(
        &self,
        field: &'static str,
        value: u64,
        problem: &'static str,
    ) -> BootError {
        BootError::BadField {
            image: self.describe(),
            field,
            value,
            problem,
        }
    }
}

impl<F: ReadVolatile + Seek> Image<F> {
    /// Copies a part of the file into guest memory.
    pub(super) fn copy_to<M: GuestMemoryBackend>(
        &mut self,
        memory: &M,
        copy: &FileCopy,
    ) -> Result<(), BootError> {
        let refused = |source| BootError::Memory {
            address: copy.to.0,
            len: copy.len,
            source,
        };
        let len = usize::try_from(copy.len)
            .map_err(|_| refused(GuestMemoryError::GuestAddressOverflow))?;
        self.file
            .seek(SeekFrom::Start(copy.offset))
            .map_err(|e| self.read_error(e))?;
        // Slice by slice, each read in full: `Bytes::read_exact_volatile_from` goes on to the next
        // region after a short read, and read(2) is short at 2 GiB.
        for slice in memory.get_slices(copy.to, len) {
            let mut slice = slice.map_err(refused)?;
            match self.file.read_exact_volatile(&mut slice) {
                Ok(()) => {}
                Err(VolatileMemoryError::IOError(e))
                    if e.kind() == io::ErrorKind::UnexpectedEof =>
                {
                    return Err(BootError::Shrunk {
                        image: self.describe(),
                        len: self.len,
                    });
                }
                Err(VolatileMemoryError::IOError(e)) => return Err(self.read_error(e)),
                Err(e) => return Err(refused(e.into())),
            }
        }
        Ok(())
    }
}
