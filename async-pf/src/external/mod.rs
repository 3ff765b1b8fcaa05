// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pagers in other processes: Firecracker's hand-off.
//!
//! A monitor connects to the Unix socket of a page-fault handler and sends one message: its userfaultfd (`SCM_RIGHTS`) and,
//! as JSON, where guest memory is in the monitor and in the snapshot's file. Nothing else is ever said:
//!
//! ```text
//!   monitor                                            handler
//!   Uffd, registered  ──── uffd + [mappings] ────▶     receive ──▶ HandOff { userfaultfd, mappings }
//!   send                                               serve ──▶ Pager: reads faults, places pages
//! ```
//!
//! ```json
//! [{"base_host_virt_addr":140037664768000,"size":134217728,"offset":0,"page_size":4096,"page_size_kib":4096}]
//! ```
//!
//! `page_size` is in bytes. `page_size_kib`, which came first, is too, whatever its name says; [`send`] writes both, so
//! that older handlers find theirs, and [`receive`] takes either. What else is in an object is passed over.
//!
//! [`serve`] is this crate's pager as such a handler: retries, deadlines, prefetch and poison as for memory of its own, and
//! pages that the monitor gives back (a balloon) are zeros from then on. `examples/page_fault_handler.rs` is the program.
//!
//! # What is lost under an external pager
//! One mapping has one userfaultfd. Who has handed it off reads no faults himself: a background snapshot, which needs
//! write-protect faults, is not to be had. If the handler dies, the guest's next fault waits for ever; who hands off should
//! watch the process.
//!
//! # Bounds
//! A message has at most [`MOST_BYTES`] and [`MOST_MAPPINGS`]; mappings that overlap, in memory or in the file, that are
//! empty, not of whole pages, or that leave an address space are refused with their numbers. Both sides have a deadline for
//! the whole, whatever the other one does.

mod hand_off;
mod mappings;
#[cfg(feature = "uffd")]
mod serve;

pub use hand_off::{HandOff, HandOffError, receive, send};
pub use mappings::{MOST_BYTES, MOST_MAPPINGS, Mapping, Mappings, MappingsError};
#[cfg(feature = "uffd")]
pub use serve::{ServeError, serve};
