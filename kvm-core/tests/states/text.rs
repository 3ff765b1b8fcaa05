// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as a saved state: what `tests/state_fuzzed.rs` and the fuzz target `state` do with them.

use kvm_core::state::fake::FakeClock;
use kvm_core::state::{ClockRestore, Passage, RestoreError, StateBytes, VcpuState, VmState};

use super::{fresh, host, state};

/// Whatever the bytes are, they are a state or none; a state is checked, restored and written again
/// without a panic, and is the same when it is read again.
pub fn run(input: &[u8]) {
    decode(input);
    decode(&edited(&serde_json::to_vec(&small()).unwrap(), input));
    decode(&edited(
        &serde_json::to_vec(&VmState::default()).unwrap(),
        input,
    ));
}

/// A state whose text is short.
fn small() -> VcpuState {
    let mut state = state();
    state.xsave.0.truncate(580);
    state.lapic = None;
    state.msrs.truncate(3);
    state.cpuid.truncate(4);
    state.nested = Some(StateBytes(vec![9; 12]));
    state
}

/// The text with edits: three bytes each, where and what.
fn edited(text: &[u8], edits: &[u8]) -> Vec<u8> {
    let mut text = text.to_vec();
    for edit in edits.chunks_exact(3) {
        let at = usize::from(edit[0]) << 8 | usize::from(edit[1]);
        let at = at % text.len();
        match edit[2] {
            // Digits mostly, so that it stays a text; and some bytes gone, or doubled.
            what @ 0..=199 => text[at] = b'0' + what % 10,
            200..=219 => drop(text.remove(at)),
            220..=239 => text.insert(at, text[at]),
            what => text[at] = what,
        }
    }
    text
}

fn decode(bytes: &[u8]) {
    if let Ok(state) = serde_json::from_slice::<VcpuState>(bytes) {
        let again = serde_json::to_vec(&state).unwrap();
        assert_eq!(serde_json::from_slice::<VcpuState>(&again).unwrap(), state);
        let host = host();
        let vcpu = fresh();
        let checked = host.check(&state);
        let before = vcpu.state();
        let passage = Passage {
            elapsed: u64::MAX,
            host_tsc: Some((state.tsc_khz.into(), 1)),
        };
        match host.restore(&vcpu, &state, &passage) {
            Ok(_) => assert_eq!(checked, Ok(())),
            Err(RestoreError::Refused(reason)) => {
                let _ = reason.to_string();
                assert_eq!(vcpu.state(), before);
            }
            Err(other) => drop(other.to_string()),
        }
    }
    if let Ok(state) = serde_json::from_slice::<VmState>(bytes) {
        for how in [ClockRestore::AsSaved, ClockRestore::Advanced] {
            let _ = state.restore(&FakeClock::default(), how);
        }
    }
}
