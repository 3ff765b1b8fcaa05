// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Making memory present before it is used, by several threads: page faults of a guest cost microseconds each, and
//! here they are paid before it runs.

use super::MapError;
use super::sys::System;
use crate::{Errno, PAGE_SIZE};
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};

/// `MADV_POPULATE_READ` and `MADV_POPULATE_WRITE`, Linux 5.14.
pub(super) const POPULATE_READ: i32 = 22;
pub(super) const POPULATE_WRITE: i32 = 23;

/// What one thread takes at a time: small enough to share the work and to say how far it went, large enough that the
/// calls cost nothing beside it.
const CHUNK: usize = 16 << 20;

/// The memory to be made present, and by which touch.
#[derive(Clone, Copy)]
pub(super) struct Work {
    /// A multiple of the page size.
    pub start: usize,
    pub size: usize,
    pub page_size: usize,
    /// Whether pages are made writable: `false` leaves a private file's pages shared with the page cache.
    pub write: bool,
}

/// Makes all of it present.
///
/// # Safety
/// `work` is mapped memory, readable and (with `write`) writable, for the length of the call, and it is accessed by
/// volatile or atomic accesses only.
pub(super) unsafe fn populate(
    system: &dyn System,
    work: Work,
    threads: NonZeroUsize,
) -> Result<(), MapError> {
    let chunk = CHUNK.next_multiple_of(work.page_size);
    let chunks = work.size.div_ceil(chunk);
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let populated = AtomicU64::new(0);
    let failure: Mutex<Option<Errno>> = Mutex::new(None);
    let worker = || {
        while !stop.load(Ordering::Relaxed) {
            let offset = next.fetch_add(1, Ordering::Relaxed).saturating_mul(chunk);
            if offset >= work.size {
                return;
            }
            let part = Work {
                start: work.start + offset,
                size: chunk.min(work.size - offset),
                ..work
            };
            // SAFETY: a part of what the caller promised.
            match unsafe { populate_part(system, part) } {
                Ok(()) => {
                    populated.fetch_add(part.size as u64, Ordering::Relaxed);
                }
                Err(errno) => {
                    stop.store(true, Ordering::Relaxed);
                    let mut failure = failure
                        .lock()
                        .unwrap_or_else(|poisoned| poisoned.into_inner());
                    failure.get_or_insert(errno);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.get().min(chunks) {
            let spawned = std::thread::Builder::new()
                .name("prefault".into())
                .spawn_scoped(scope, worker);
            // Fewer threads do the same, later.
            if spawned.is_err() {
                break;
            }
        }
        worker();
    });
    let failure = failure
        .into_inner()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    match failure {
        None => Ok(()),
        Some(errno) => Err(MapError::Prefault {
            populated: populated.into_inner(),
            size: work.size as u64,
            errno,
        }),
    }
}

/// # Safety
/// As [`populate`].
unsafe fn populate_part(system: &dyn System, part: Work) -> Result<(), Errno> {
    let advice = if part.write {
        POPULATE_WRITE
    } else {
        POPULATE_READ
    };
    loop {
        // SAFETY: the caller's own mapping; populating takes no contents away.
        match unsafe { system.madvise(part.start as *mut _, part.size, advice) } {
            // A kernel before 5.14.
            Err(Errno(libc::EINVAL)) => {
                // SAFETY: as the caller promises.
                unsafe { touch(part) };
                return Ok(());
            }
            Err(Errno(libc::EINTR)) => {}
            result => return result,
        }
    }
}

/// Touches each page, as a guest would.
///
/// # Safety
/// As [`populate`].
unsafe fn touch(part: Work) {
    let step = part.page_size.max(PAGE_SIZE as usize);
    for address in (part.start..part.start + part.size).step_by(step) {
        // SAFETY: mapped as the caller promises; an atomic access of one byte goes with all that others do to it.
        let byte = unsafe { AtomicU8::from_ptr(address as *mut u8) };
        if part.write {
            // Writes what is there, whoever else writes at the same time.
            byte.fetch_or(0, Ordering::Relaxed);
        } else {
            byte.load(Ordering::Relaxed);
        }
    }
}
