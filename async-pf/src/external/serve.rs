// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`serve`]: a pager for a monitor in another process.

use std::sync::Arc;

use memslots::uffd::{ForeignRange, Modes, OpenError, RegisterError, Uffd};
use memslots::{Gfn, PAGE_SIZE};

use super::HandOff;
use crate::PageSource;
use crate::pager::{PagedSlot, Pager, PagerConfig, StartError};

/// Why a hand-off is not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The descriptor is no userfaultfd, or cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A mapping is no range of memory.
    #[error("mapping {index}: {source}")]
    Range {
        /// Which.
        index: usize,
        /// Why.
        source: RegisterError,
    },
    /// A mapping's contents begin within a page of the file.
    #[error("mapping {index} begins at offset {offset:#x} of the file, which is no page's start")]
    Offset {
        /// Which.
        index: usize,
        /// Where.
        offset: u64,
    },
    /// There is no pager.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// Serves the page faults of a monitor that has handed its userfaultfd off. The pager has a slot for each mapping, in their
/// order, and asks `source` for pages of the snapshot's file: page n is what begins at byte n × 4096 of it.
///
/// Nothing tells the pager that the monitor has ended: watch the stream that the hand-off came through, and drop the pager
/// then. Dropped before, it does as any pager that is dropped ([`GiveUp`](crate::pager::GiveUp)); who has a copy of the
/// descriptor may serve what faults later.
///
/// # Errors
/// [`ServeError`]; then the descriptor is closed.
pub fn serve(
    hand_off: HandOff,
    source: Arc<dyn PageSource>,
    config: PagerConfig,
) -> Result<Pager, ServeError> {
    let uffd = Uffd::receive(hand_off.userfaultfd)?;
    let mut slots = Vec::new();
    for (index, mapping) in hand_off.mappings.as_slice().iter().enumerate() {
        let offset = mapping.offset;
        if !offset.is_multiple_of(PAGE_SIZE) {
            return Err(ServeError::Offset { index, offset });
        }
        let range = mapping.base as usize..(mapping.base + mapping.size) as usize;
        let range = ForeignRange::new(&uffd, range, mapping.page_size, Modes::MISSING)
            .map_err(|source| ServeError::Range { index, source })?;
        let first = Gfn(offset / PAGE_SIZE);
        slots.push(PagedSlot::foreign(&range, first, Arc::clone(&source))?);
    }
    Ok(Pager::start(&uffd, slots, config)?)
}
