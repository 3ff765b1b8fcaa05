// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Published tables for VMMs: readers never lock, writers wait for the readers that are inside

mod domain;
mod published;
mod sync;

pub use domain::Grace;
pub use published::{Guard, Published, Reader, Snapshot};
