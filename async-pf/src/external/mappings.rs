// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Mappings`]: where guest memory is, as the hand-off's JSON says it.

use serde::{Deserialize, Serialize};

/// The most bytes of a message.
pub const MOST_BYTES: usize = 64 << 10;
/// The most mappings of a message.
pub const MOST_MAPPINGS: usize = 256;

/// One stretch of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its address in the monitor, bytes.
    pub base: u64,
    /// Its size, bytes.
    pub size: u64,
    /// Where its contents begin in the snapshot's file, bytes.
    pub offset: u64,
    /// The size of its pages, bytes: 4096 or 2 MiB.
    pub page_size: u64,
}

impl Mapping {
    /// Where in the file the page is that has the address, and its own address; `None` outside of the mapping.
    pub fn locate(&self, address: u64) -> Option<(u64, u64)> {
        let into = address
            .checked_sub(self.base)
            .filter(|into| *into < self.size)?;
        let page = into - into.checked_rem(self.page_size)?;
        Some((self.offset.checked_add(page)?, self.base + page))
    }
}

/// Why mappings are none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MappingsError {
    /// It is not the JSON of an array of mappings.
    #[error("the mappings are not an array as expected: {0}")]
    Json(#[source] serde_json::Error),
    /// None, or too many.
    #[error("{0} mappings: 1 to {MOST_MAPPINGS} can be")]
    Count(usize),
    /// A page size that cannot be.
    #[error("mapping {index} has pages of {page_size} bytes: 4096 and 2097152 can be")]
    PageSize {
        /// Which mapping.
        index: usize,
        /// Its page size, bytes.
        page_size: u64,
    },
    /// Both sizes are there, and are not the same.
    #[error(
        "mapping {index} says page_size {page_size} and page_size_kib {page_size_kib}, which mean the same bytes"
    )]
    TwoPageSizes {
        /// Which mapping.
        index: usize,
        /// The one.
        page_size: u64,
        /// The other.
        page_size_kib: u64,
    },
    /// It is empty, not of whole pages, or goes beyond the last address or file offset.
    #[error(
        "mapping {index} of {size:#x} bytes at {base:#x}, file offset {offset:#x}, is empty, not of whole pages, or too far up"
    )]
    Range {
        /// Which mapping.
        index: usize,
        /// Its address.
        base: u64,
        /// Its size, bytes.
        size: u64,
        /// Its file offset.
        offset: u64,
    },
    /// Two overlap.
    #[error("mappings {one} and {other} overlap in {place}")]
    Overlap {
        /// One.
        one: usize,
        /// The other.
        other: usize,
        /// Memory, or the file.
        place: &'static str,
    },
}

/// Mappings that have been looked at: 1 to [`MOST_MAPPINGS`], of whole pages, none overlapping another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mappings(Vec<Mapping>);

/// As it is sent.
#[derive(Serialize, Deserialize)]
struct Wire {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    #[serde(default)]
    page_size: Option<u64>,
    #[serde(default)]
    page_size_kib: Option<u64>,
}

impl Mappings {
    /// Looks at them.
    ///
    /// # Errors
    /// [`MappingsError`], with the number of the mapping in the order given.
    pub fn new(mappings: Vec<Mapping>) -> Result<Self, MappingsError> {
        if mappings.is_empty() || mappings.len() > MOST_MAPPINGS {
            return Err(MappingsError::Count(mappings.len()));
        }
        for (index, mapping) in mappings.iter().enumerate() {
            let Mapping {
                base,
                size,
                offset,
                page_size,
            } = *mapping;
            if page_size != 4096 && page_size != 2 << 20 {
                return Err(MappingsError::PageSize { index, page_size });
            }
            let aligned = (base | size).is_multiple_of(page_size);
            let ends = base.checked_add(size).is_some()
                && offset
                    .checked_add(size)
                    .is_some_and(|end| end <= i64::MAX as u64);
            if size == 0 || !aligned || !ends {
                return Err(MappingsError::Range {
                    index,
                    base,
                    size,
                    offset,
                });
            }
        }
        disjoint(&mappings, "memory", |mapping| mapping.base)?;
        disjoint(&mappings, "the file", |mapping| mapping.offset)?;
        Ok(Self(mappings))
    }

    /// From a message.
    ///
    /// # Errors
    /// [`MappingsError`]. Of a missing page size 4096 is taken: the first monitors did not say it.
    pub fn from_json(json: &[u8]) -> Result<Self, MappingsError> {
        let wire: Vec<Wire> = serde_json::from_slice(json).map_err(MappingsError::Json)?;
        let mut mappings = Vec::with_capacity(wire.len());
        for (index, wire) in wire.into_iter().enumerate() {
            if let (Some(page_size), Some(page_size_kib)) = (wire.page_size, wire.page_size_kib)
                && page_size != page_size_kib
            {
                return Err(MappingsError::TwoPageSizes {
                    index,
                    page_size,
                    page_size_kib,
                });
            }
            mappings.push(Mapping {
                base: wire.base_host_virt_addr,
                size: wire.size,
                offset: wire.offset,
                page_size: wire.page_size.or(wire.page_size_kib).unwrap_or(4096),
            });
        }
        Self::new(mappings)
    }

    /// As a message.
    ///
    /// # Errors
    /// [`MappingsError::Json`], which numbers alone do not give.
    pub fn to_json(&self) -> Result<Vec<u8>, MappingsError> {
        let wire = |mapping: &Mapping| Wire {
            base_host_virt_addr: mapping.base,
            size: mapping.size,
            offset: mapping.offset,
            page_size: Some(mapping.page_size),
            page_size_kib: Some(mapping.page_size),
        };
        let wire: Vec<Wire> = self.0.iter().map(wire).collect();
        serde_json::to_vec(&wire).map_err(MappingsError::Json)
    }

    /// They.
    pub fn as_slice(&self) -> &[Mapping] {
        &self.0
    }

    /// The mapping that has the address, and what [`Mapping::locate`] says of it.
    pub fn locate(&self, address: u64) -> Option<(&Mapping, u64, u64)> {
        let mut found = self.0.iter().filter_map(|mapping| {
            let (offset, page) = mapping.locate(address)?;
            Some((mapping, offset, page))
        });
        found.next()
    }
}

fn disjoint(
    mappings: &[Mapping],
    place: &'static str,
    start: impl Fn(&Mapping) -> u64,
) -> Result<(), MappingsError> {
    let mut sorted: Vec<(u64, u64, usize)> = (mappings.iter().enumerate())
        .map(|(index, mapping)| (start(mapping), mapping.size, index))
        .collect();
    sorted.sort_unstable();
    for pair in sorted.windows(2) {
        if let [(start, size, one), (next, _, other)] = *pair
            && next - start < size
        {
            return Err(MappingsError::Overlap { one, other, place });
        }
    }
    Ok(())
}
