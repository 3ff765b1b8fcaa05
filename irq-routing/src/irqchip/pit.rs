// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An 8254's state as plain data.

#![forbid(unsafe_code)]

/// What the in-kernel timer knows (`struct kvm_pit_state2`).
///
/// KVM loads all three counters when it takes a state on: a period begins anew then, and what was
/// left of a running one is not carried over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
pub struct PitState {
    /// Channel 0 interrupts (GSI 0), 1 was for memory refresh, 2 is the speaker's and what a guest
    /// calibrates its clock by.
    pub channels: [PitChannelState; 3],
    /// [`PitState::HPET_LEGACY`] and [`PitState::SPEAKER_DATA_ON`]. KVM keeps others and does not
    /// look at them.
    pub flags: u32,
}

impl PitState {
    /// The HPET has taken GSI 0 over, so that channel 0 does not interrupt
    /// (`KVM_PIT_FLAGS_HPET_LEGACY`).
    pub const HPET_LEGACY: u32 = 1;
    /// The speaker's data bit in port 0x61 (`KVM_PIT_FLAGS_SPEAKER_DATA_ON`).
    pub const SPEAKER_DATA_ON: u32 = 2;
}

/// One of the timer's channels (`struct kvm_pit_channel_state`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
pub struct PitChannelState {
    /// Ticks of 1.193182 MHz in a period, 1 to 0x10000. KVM takes 0 for 0x10000.
    pub count: u32,
    /// The count that a latch command froze.
    pub latched_count: u16,
    /// Which bytes of it are still to be read: 0 none, else the access mode of that time.
    pub count_latched: u8,
    /// Flag: the status is latched.
    pub status_latched: u8,
    /// The latched status.
    pub status: u8,
    /// Which byte the next read gives.
    pub read_state: u8,
    /// Which byte the next write is.
    pub write_state: u8,
    /// The low byte, while the high one is awaited.
    pub write_latch: u8,
    /// The access mode: 1 low byte, 2 high byte, 3 both.
    pub rw_mode: u8,
    /// The counting mode, 0 to 5; 0xff after reset.
    pub mode: u8,
    /// Flag: it counts in decimal, which KVM does not do.
    pub bcd: u8,
    /// Flag: the gate is open.
    pub gate: u8,
    /// When the count was loaded, in nanoseconds of the saving host's `CLOCK_MONOTONIC`; 0 of
    /// channel 0. Of no meaning to another host, and KVM puts its own in its place.
    pub count_load_time: i64,
}
