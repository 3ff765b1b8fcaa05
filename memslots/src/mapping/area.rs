// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Address space: how a mapping whose numbers are in order comes to be, and how it goes.

use super::place::Place;
use super::sys::{MapRequest, System};
use super::{Backing, HugePageSize, HugePool, MapError, Mapping, check_aligned, hugetlb};
use crate::{Errno, MemoryKind, PAGE_SIZE};
use std::any::Any;
use std::ffi::c_void;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use vm_memory::{FileOffset, GuestAddress};

/// Address space that goes when this does.
pub(super) enum Area {
    Own {
        base: *mut c_void,
        length: usize,
        system: &'static dyn System,
    },
    /// Another's, which this keeps.
    Kept { _owner: Arc<dyn Any + Send + Sync> },
}

/// A mapping whose numbers are in order.
pub(super) struct Plan {
    size: u64,
    pub(super) page_size: u64,
    kind: MemoryKind,
    huge: Option<HugePageSize>,
    flags: i32,
    file: Option<(Arc<File>, u64)>,
    guarded: bool,
}

impl Plan {
    pub(super) fn new(
        backing: &Backing,
        kind: MemoryKind,
        huge: Option<HugePageSize>,
        mut flags: i32,
        file: Option<(Arc<File>, u64)>,
    ) -> Result<Self, MapError> {
        let (size, page_size) = (backing.size, huge.map_or(PAGE_SIZE, HugePageSize::bytes));
        check_aligned("size", size, page_size)?;
        backing.check_choices(kind)?;
        match huge {
            // Not reserved, but for huge pages: of those the touch of a missing one would be a SIGBUS.
            None => flags |= libc::MAP_NORESERVE,
            Some(page_size) => {
                if let Some(available) = hugetlb::missing(page_size) {
                    return Err(MapError::NoHugePageSize {
                        page_size,
                        available,
                    });
                }
                if flags & libc::MAP_ANONYMOUS != 0 {
                    flags |= libc::MAP_HUGETLB | page_size.flag() as i32;
                }
            }
        }
        Ok(Self {
            size,
            page_size,
            kind,
            huge,
            flags,
            file,
            guarded: backing.guarded,
        })
    }

    /// The same, of this file.
    pub(super) fn of(mut self, file: Arc<File>) -> Self {
        self.file = Some((file, 0));
        self
    }

    pub(super) fn map(
        self,
        system: &'static dyn System,
        guest: GuestAddress,
    ) -> Result<Mapping, MapError> {
        let place = Place::new(self.size, self.page_size, guest.0, self.guarded)?;
        // The slack of anonymous memory is never touched, costs nothing, and spares the calls that would cut it off. The
        // kernel places hugetlb mappings by itself.
        let with_slack = self.kind == MemoryKind::Anonymous;
        let (area, start) =
            if !self.guarded && (with_slack || self.huge.is_some() || place.is_exact()) {
                let length = if with_slack { place.length } else { place.size };
                // SAFETY: a new mapping, anywhere.
                let base = unsafe { self.call(system, None, length) }?;
                let shift = if with_slack {
                    place.shift(base as usize)
                } else {
                    0
                };
                let area = Area::Own {
                    base,
                    length,
                    system,
                };
                (area, base.wrapping_byte_add(shift))
            } else {
                self.map_into_reservation(system, &place)?
            };
        Ok(Mapping {
            _area: area,
            start: start.cast(),
            size: place.size,
            page_size: self.page_size,
            kind: self.kind,
            file: self
                .file
                .filter(|_| self.flags & libc::MAP_SHARED != 0)
                .map(|(file, offset)| FileOffset::from_arc(file, offset)),
            guest_memfd: None,
            pages: Arc::default(),
            system,
        })
    }

    /// Address space first, which nobody can touch, and the memory into it.
    ///
    /// The memory's place is given back before the memory is mapped there, and only if nobody is there by then: a
    /// `MAP_FIXED` takes away what is there before it knows whether it succeeds (the pool may lack the pages, a driver
    /// may refuse), and what another thread maps into the hole is not ours to unmap.
    fn map_into_reservation(
        &self,
        system: &'static dyn System,
        place: &Place,
    ) -> Result<(Area, *mut c_void), MapError> {
        /// Each time, another thread would have to map something right there, right then.
        const TRIES: usize = 64;
        let (length, size) = (place.length, self.size);
        let refused = |call| move |errno| MapError::Call { call, size, errno };
        for _ in 0..TRIES {
            let reserved = Area::reserve(system, length);
            let (mut area, base) = reserved.map_err(refused("mmap (of address space)"))?;
            let start = base.wrapping_byte_add(place.shift(base as usize));
            // SAFETY: `start` and the memory's size behind it lie in the reservation, which is ours and unused.
            unsafe { system.munmap(start, place.size) }
                .map_err(refused("munmap (of address space)"))?;
            // SAFETY: a new mapping, where nobody is.
            let mapped = unsafe { self.call(system, Some(start), place.size) };
            if mapped.as_ref() == Ok(&start) {
                if !self.guarded {
                    area.trim(start, place.size);
                }
                return Ok((area, start));
            }
            drop(area.around(start, place.size));
            match mapped {
                // A kernel before 4.17 takes the address for a wish, and somebody is there.
                Ok(base) => drop(Area::Own {
                    base,
                    length: place.size,
                    system,
                }),
                Err(MapError::Call {
                    errno: Errno(libc::EEXIST),
                    ..
                }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(refused("mmap (into address space)")(Errno(libc::EEXIST)))
    }

    /// # Safety
    /// As [`System::mmap`].
    unsafe fn call(
        &self,
        system: &'static dyn System,
        at: Option<*mut c_void>,
        length: usize,
    ) -> Result<*mut c_void, MapError> {
        let size = self.size;
        let file = match &self.file {
            None => None,
            Some((file, offset)) => {
                // The kernel counts file offsets in `i64`.
                let offset = i64::try_from(*offset).map_err(|_| MapError::TooLarge { size })?;
                Some((&**file, offset))
            }
        };
        let request = MapRequest {
            at,
            length,
            protection: libc::PROT_READ | libc::PROT_WRITE,
            flags: self.flags,
            file,
        };
        // SAFETY: the caller's promise.
        let refused = match unsafe { system.mmap(request) } {
            Ok(base) => return Ok(base),
            Err(errno) => errno,
        };
        match self.huge {
            Some(page_size) if refused == Errno(libc::ENOMEM) => {
                let wanted = size / page_size.bytes();
                // Read first: it is the more fleeting of the two.
                let pool = HugePool::of_host(page_size);
                let has_them = pool.is_some_and(|pool| pool.ready() >= wanted);
                if !has_them && has_room(system, length) {
                    return Err(MapError::NoHugePages {
                        page_size,
                        wanted,
                        pool,
                    });
                }
            }
            _ => {}
        }
        Err(MapError::Call {
            call: "mmap",
            size,
            errno: refused,
        })
    }
}

/// Whether this process may map so much at all: of what `ENOMEM` means, too much address space (`RLIMIT_AS`) and too
/// many mappings (`vm.max_map_count`) hold for memory without pages as well.
fn has_room(system: &'static dyn System, length: usize) -> bool {
    Area::reserve(system, length).is_ok()
}

impl Area {
    /// Address space that nobody can touch, and where it begins.
    fn reserve(system: &'static dyn System, length: usize) -> Result<(Self, *mut c_void), Errno> {
        let request = MapRequest {
            at: None,
            length,
            protection: libc::PROT_NONE,
            flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            file: None,
        };
        // SAFETY: a new mapping, anywhere.
        let base = unsafe { system.mmap(request) }?;
        let area = Self::Own {
            base,
            length,
            system,
        };
        Ok((area, base))
    }

    /// What is before and what is behind `size` bytes from `start`, each by itself. What is between is not ours.
    fn around(self, start: *mut c_void, size: usize) -> [Option<Self>; 2] {
        let whole = ManuallyDrop::new(self);
        let Self::Own {
            base,
            length,
            system,
        } = *whole
        else {
            return [None, None];
        };
        let before = start as usize - base as usize;
        let behind = length - before - size;
        let own = |base, length| {
            // Not `then_some`: one that is made is dropped, which unmaps.
            (length > 0).then(|| Self::Own {
                base,
                length,
                system,
            })
        };
        [
            own(base, before),
            own(start.wrapping_byte_add(size), behind),
        ]
    }

    /// Gives back what is around the memory. What the kernel does not take back stays ours, and untouchable.
    fn trim(&mut self, start: *mut c_void, size: usize) {
        let Self::Own {
            base,
            length,
            system,
        } = self
        else {
            return;
        };
        let end = start as usize + size;
        let (before, behind) = (
            start as usize - *base as usize,
            *base as usize + *length - end,
        );
        // SAFETY: a part of our reservation that holds no memory, used by nobody.
        if behind > 0 && unsafe { system.munmap(start.wrapping_byte_add(size), behind) }.is_ok() {
            *length -= behind;
        }
        // SAFETY: as above.
        if before > 0 && unsafe { system.munmap(*base, before) }.is_ok() {
            *base = start;
            *length -= before;
        }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        let Self::Own {
            base,
            length,
            system,
        } = self
        else {
            return;
        };
        // SAFETY: mapped by us with this length, unmapped by nobody else, and no slice of it is left: slices borrow
        // from the region that owns this, and parts of it own it too. No slot refers to it: `Memslots` deletes a slot
        // before it lets go of its region, and never lets go of one that could not be deleted. No userfaultfd has it:
        // a registration keeps its mapping.
        if let Err(errno) = unsafe { system.munmap(*base, *length) } {
            log::error!("munmap of {length:#x} bytes: {errno}");
        }
    }
}
