// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where a vCPU is, seen from outside: the guest modes of `struct kvm_vcpu` and their one table.
//!
//! ```text
//!                 Enter                    Kick
//!   Outside ───────────────► InGuest ───────────────► Exiting
//!      ▲                        │                        │
//!      └──────── Leave ─────────┴───────── Leave ────────┘
//! ```
//!
//! Only the vCPU's own thread enters and leaves; anyone may kick. A kick that finds the vCPU
//! anywhere but in the guest is no transition, and so costs no signal: whoever is outside looks at
//! its requests before it goes in again, and whoever is exiting was signalled already.

use crate::sync::{AtomicU32, Ordering};

/// Where a vCPU is (`vcpu->mode` of `kvm_host.h`).
///
/// The fourth mode of the header, `READING_SHADOW_PAGE_TABLES`, has no twin: user space walks no
/// shadow page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum GuestMode {
    /// In user space, or not running at all (`OUTSIDE_GUEST_MODE`).
    OutsideGuestMode = 0,
    /// In `KVM_RUN`, or just about to call it (`IN_GUEST_MODE`).
    InGuestMode = 1,
    /// In `KVM_RUN` and kicked: it is on its way out (`EXITING_GUEST_MODE`).
    ExitingGuestMode = 2,
}

/// What moves a vCPU from one [`GuestMode`] to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModeEvent {
    /// The vCPU's thread is about to enter the guest.
    Enter,
    /// Someone wants the vCPU out of the guest.
    Kick,
    /// The vCPU's thread is back from `KVM_RUN`, for whatever reason.
    Leave,
}

impl GuestMode {
    /// Every mode, for tests and tables.
    pub const ALL: [Self; 3] = [
        Self::OutsideGuestMode,
        Self::InGuestMode,
        Self::ExitingGuestMode,
    ];

    /// The transition table: the mode after `event`, or `None` where the event changes nothing.
    #[must_use]
    pub const fn next(self, event: ModeEvent) -> Option<Self> {
        match (self, event) {
            (Self::OutsideGuestMode, ModeEvent::Enter) => Some(Self::InGuestMode),
            (Self::InGuestMode, ModeEvent::Kick) => Some(Self::ExitingGuestMode),
            (Self::InGuestMode | Self::ExitingGuestMode, ModeEvent::Leave) => {
                Some(Self::OutsideGuestMode)
            }
            (Self::OutsideGuestMode, ModeEvent::Kick | ModeEvent::Leave)
            | (Self::InGuestMode, ModeEvent::Enter)
            | (Self::ExitingGuestMode, ModeEvent::Enter | ModeEvent::Kick) => None,
        }
    }

    const fn from_bits(bits: u32) -> Self {
        match bits {
            1 => Self::InGuestMode,
            2 => Self::ExitingGuestMode,
            // The cell is written by this file alone.
            _ => Self::OutsideGuestMode,
        }
    }
}

/// The mode of one vCPU, shared by its thread and those that kick it.
#[derive(Debug)]
pub(crate) struct ModeCell(AtomicU32);

impl ModeCell {
    pub(crate) fn new() -> Self {
        Self(AtomicU32::new(GuestMode::OutsideGuestMode as u32))
    }

    pub(crate) fn load(&self) -> GuestMode {
        GuestMode::from_bits(self.0.load(Ordering::Relaxed))
    }

    /// The vCPU's thread goes in.
    ///
    /// Release pairs with the acquire half of [`ModeCell::kick`]'s compare-and-swap: a kicker that
    /// sees this entry also sees that `immediate_exit` was cleared for it, so its own store to that
    /// byte is the later of the two.
    pub(crate) fn enter(&self) {
        self.0
            .store(GuestMode::InGuestMode as u32, Ordering::Release);
    }

    /// The vCPU's thread is out.
    ///
    /// A swap, so that it is behind a kick of this very entry in the order of modifications: none who
    /// has seen a later entry can still read the `Exiting` of this one. (The language gives as much to
    /// a plain store, since a compare-and-swap is adjacent to what it read; loom does not model that,
    /// and a few nanoseconds beside a guest exit buy a protocol that it can prove.) Relaxed: what
    /// others conclude from "outside" they conclude from the fences of `kick.rs`.
    pub(crate) fn leave(&self) {
        self.0
            .swap(GuestMode::OutsideGuestMode as u32, Ordering::Relaxed);
    }

    /// `kvm_vcpu_exiting_guest_mode`: true for the one kicker that moved the vCPU from in-guest to
    /// exiting, and that therefore owes it a signal.
    pub(crate) fn kick(&self) -> bool {
        self.0
            .compare_exchange(
                GuestMode::InGuestMode as u32,
                GuestMode::ExitingGuestMode as u32,
                // Acquire pairs with the release of `enter` (see there); the success store needs no
                // release, the signal that follows orders itself through the kernel.
                Ordering::Acquire,
                Ordering::Relaxed,
            )
            .is_ok()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_cell_moves_as_the_table_says_from_every_mode() {
        for mode in GuestMode::ALL {
            let cell = ModeCell(AtomicU32::new(mode as u32));
            assert_eq!(
                cell.kick(),
                mode.next(ModeEvent::Kick).is_some(),
                "{mode:?}"
            );
            assert_eq!(cell.load(), mode.next(ModeEvent::Kick).unwrap_or(mode));
            cell.leave();
            assert_eq!(cell.load(), GuestMode::OutsideGuestMode);
            cell.enter();
            assert_eq!(
                Some(cell.load()),
                GuestMode::OutsideGuestMode.next(ModeEvent::Enter)
            );
        }
    }

    #[test]
    fn every_mode_leads_outside_and_only_one_mode_is_worth_a_signal() {
        for mode in GuestMode::ALL {
            let left = mode.next(ModeEvent::Leave).unwrap_or(mode);
            assert_eq!(left, GuestMode::OutsideGuestMode);
        }
        let signalled: Vec<_> = GuestMode::ALL
            .into_iter()
            .filter(|m| m.next(ModeEvent::Kick).is_some())
            .collect();
        assert_eq!(signalled, [GuestMode::InGuestMode]);
    }
}
