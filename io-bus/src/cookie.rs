// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rows that answered last, by address: a vCPU goes back and forth between a few devices, each
//! of which keeps its own place here.
//!
//! A hint and no more, see `Table::at_cookie`; so row numbers are cut to 16 bits, and places are
//! shared.

use crate::range::BusKind;

pub(crate) struct Cookies {
    mmio: [u16; 1024],
    pio: [u16; 256],
    ccw_notify: [u16; 16],
    fast_mmio: [u16; 64],
}

impl Cookies {
    pub(crate) const NONE: Self = Self {
        mmio: [0; 1024],
        pio: [0; 256],
        ccw_notify: [0; 16],
        fast_mmio: [0; 64],
    };

    /// Addresses that are one device's share a place: those of a page, of eight ports.
    #[inline]
    pub(crate) fn of(&mut self, bus: BusKind, address: u64) -> &mut u16 {
        match bus {
            BusKind::Mmio => place(&mut self.mmio, address >> 12),
            BusKind::Pio => place(&mut self.pio, address >> 3),
            BusKind::CcwNotify => place(&mut self.ccw_notify, address),
            BusKind::FastMmio => place(&mut self.fast_mmio, address >> 2),
        }
    }
}

#[inline]
fn place<const N: usize>(rows: &mut [u16; N], number: u64) -> &mut u16 {
    // Folded, so that strides of a power of two spread as well.
    &mut rows[(number ^ (number >> N.ilog2())) as usize % N]
}
