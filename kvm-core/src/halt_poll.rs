// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long a halted vCPU is polled for before it sleeps: the kernel's adaptive rule
//! (`halt_poll_ns` and its `grow`, `grow_start` and `shrink`; Documentation/virt/kvm/halt-polling.rst).
//!
//! A wake-up from sleep costs the scheduler's latency, tens of microseconds; one that polling catches
//! costs less than one. A window that grows while wake-ups come soon, and shrinks when they do not,
//! buys the one and pays little for the other. Here it is data in and data out.

use std::time::Duration;

/// The rule's numbers. [`HaltPolling::KERNEL`] has the kernel's defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HaltPolling {
    /// The longest window. Zero: nothing is polled for.
    pub max: Duration,
    /// The first window, and the least.
    pub grow_start: Duration,
    /// A window that was too short is multiplied by this. 0: it never grows, so nothing is polled for.
    pub grow: u32,
    /// A window that was in vain is divided by this. 0: it ends at once.
    pub shrink: u32,
}

impl HaltPolling {
    /// x86's defaults: at most 200 µs, from 10 µs doubling, and shrinking to nothing at once.
    pub const KERNEL: Self = Self {
        max: Duration::from_micros(200),
        grow_start: Duration::from_micros(10),
        grow: 2,
        shrink: 0,
    };

    /// No polling.
    pub const OFF: Self = Self {
        max: Duration::ZERO,
        ..Self::KERNEL
    };

    /// The window of the next halt, after one with this `window` took `blocked` until its wake-up
    /// (`kvm_vcpu_halt`). Never more than [`HaltPolling::max`].
    #[must_use]
    pub fn next(&self, window: Duration, blocked: Duration) -> Duration {
        let window = window.min(self.max);
        if blocked <= window {
            // Polling caught it.
            window
        } else if !window.is_zero() && blocked > self.max {
            self.shrunk(window)
        } else if window < self.max && blocked < self.max {
            self.grown(window)
        } else {
            window
        }
    }

    fn grown(&self, window: Duration) -> Duration {
        if self.grow == 0 {
            return window;
        }
        let longer = window.saturating_mul(self.grow);
        longer.max(self.grow_start).min(self.max)
    }

    fn shrunk(&self, window: Duration) -> Duration {
        match window.checked_div(self.shrink) {
            Some(shorter) if shorter >= self.grow_start => shorter,
            _ => Duration::ZERO,
        }
    }
}

impl Default for HaltPolling {
    fn default() -> Self {
        Self::KERNEL
    }
}
