// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bare-metal test guests, integer-only, assembled into the test binaries

/// Assembles a guest into this binary's read-only data and makes a function that gives its bytes.
macro_rules! blob {
    ($(#[$doc:meta])* $name:ident, $($code:tt)+) => {
        core::arch::global_asm!(concat!(
            ".pushsection .rodata.guest_", stringify!($name), ", \"a\"\n",
            // Global, since an optimised build uses them from other units and crates.
            ".globl guest_", stringify!($name), "_start, guest_", stringify!($name), "_end\n",
            ".hidden guest_", stringify!($name), "_start, guest_", stringify!($name), "_end\n",
            "guest_", stringify!($name), "_start:\n",
            $($code)+,
            "\nguest_", stringify!($name), "_end:\n",
            ".code64\n.popsection\n",
        ));

        $(#[$doc])*
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("guest_", stringify!($name), "_start")]
                static START: u8;
                #[link_name = concat!("guest_", stringify!($name), "_end")]
                static END: u8;
            }
            // SAFETY: both labels are in one read-only section of this binary, the end after the
            // start.
            unsafe {
                let start = &raw const START;
                std::slice::from_raw_parts(start, (&raw const END).offset_from(start) as usize)
            }
        }
    };
}
pub(crate) use blob;

pub mod boot;
pub mod console;
pub mod cpu;
pub mod debug;
pub mod dirtier;
pub mod heeder;
pub mod image;
pub mod io;
pub mod irq;
pub mod keeper;
pub mod monitor;
mod page_sequence;
mod page_writer;
mod parts;
pub mod scribe;
pub mod sleeper;
pub mod state;
pub mod tally;
pub mod vcpu;
pub mod verifier;
pub mod virtio;

pub use page_sequence::{page_sequence, page_sequence_step};
pub use page_writer::{PAGE_WRITER_PORT, PAGE_WRITER_STOP, page_writer};
