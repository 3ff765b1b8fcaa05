// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as a saved state: what `tests/state_fuzzed.rs` and the fuzz target `state` do with them. And any
//! state, for property tests.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    dead_code,
    missing_docs
)]

use kvm_core::state::fake::{FakeClock, FakeState};
use kvm_core::state::{
    ClockRestore, CpuidLeaf, Msr, Passage, StateBytes, StateHost, VcpuState, VmState, Xcr,
};

/// A host that takes [`state`].
pub fn host() -> StateHost {
    StateHost {
        cpuid: cpuid(),
        msrs: vec![0x10, 0x277, 0xc000_0082, 0x6e0, 0x4b56_4d02],
        xsave_bytes: 4096,
        xsave2: true,
        xcrs: true,
        sregs2: true,
        one_reg: true,
        tsc_control: true,
        tsc_deadline: true,
        disable_exits: 0,
        nested_bytes: 8320,
    }
    .with_unlisted_msrs()
}

fn cpuid() -> Vec<CpuidLeaf> {
    let leaf = |function, index, [eax, ebx, ecx, edx]: [u32; 4]| CpuidLeaf {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    vec![
        leaf(0, 0, [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        leaf(1, 0, [0x306f2, 0x800, 0xf7fa_3203, 0x0f8b_fbff]),
        leaf(7, 0, [0, 0x001c_4fbb, 0, 0]),
        leaf(0xd, 0, [0x207, 576, 2696, 0]),
        leaf(0xd, 1, [0xf, 0, 0, 0]),
        leaf(0xd, 2, [256, 576, 0, 0]),
        leaf(0xd, 9, [8, 2688, 0, 0]),
        leaf(
            0x4000_0000,
            0,
            [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
        ),
        leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
        leaf(0x8000_0008, 0, [0x302e, 0, 0, 0]),
    ]
}

/// A state with something in every piece, which [`host`] takes.
pub fn state() -> VcpuState {
    let mut state = VcpuState {
        cpuid: cpuid(),
        mp_state: 3,
        xcrs: vec![Xcr { index: 0, value: 7 }],
        xsave: StateBytes(vec![0; 4096]),
        lapic: Some(StateBytes((0..1024).map(|i| (i * 7) as u8).collect())),
        tsc_khz: 2_100_000,
        tsc_offset: Some(77),
        mcg_cap: Some(1),
        nested: Some(StateBytes(vec![0; 128])),
        one_registers: vec![kvm_core::state::OneRegister {
            id: 0x2030_0003_0000_0000,
            value: 0x7ff0,
        }],
        ..Default::default()
    };
    state.registers.rip = 0xffff_ffff_8100_0000;
    state.system.cr3 = 0x1000;
    state.system.pdptrs = Some([1, 2, 3, 4]);
    state.debug.dr7 = 0x400;
    state.events.nmi.pending = 1;
    state.events.flags = 0xd;
    state.xsave.0[512] = 7;
    let banks = 0x400..0x404;
    let indices: Vec<u32> = host().msrs.into_iter().chain(banks).collect();
    let value = |index: &u32| u64::from(*index) << 8 | 1;
    state.msrs = indices
        .iter()
        .map(|index| Msr {
            index: *index,
            value: value(index),
        })
        .collect();
    state
}

/// A vCPU as KVM makes one for [`state`]: the same kind, and all of it 0.
pub fn fresh() -> FakeState {
    let like = state();
    let zero = |msr: &Msr| Msr {
        index: msr.index,
        value: 0,
    };
    FakeState::new(VcpuState {
        lapic: Some(StateBytes(vec![0; 1024])),
        tsc_khz: 2_000_000,
        tsc_offset: Some(0),
        mcg_cap: Some(0x20),
        xsave: StateBytes(vec![0; 4096]),
        nested: Some(StateBytes(vec![0; 128])),
        msrs: like.msrs.iter().map(zero).collect(),
        ..Default::default()
    })
}

/// Whatever the bytes are, they are a state or none; a state is checked, restored and written again
/// without a panic, and is the same when it is read again.
#[cfg(feature = "with-serde")]
pub fn run(input: &[u8]) {
    decode(input);
    decode(&edited(&serde_json::to_vec(&small()).unwrap(), input));
    decode(&edited(
        &serde_json::to_vec(&VmState::default()).unwrap(),
        input,
    ));
}

/// A state whose text is short.
#[cfg(feature = "with-serde")]
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
#[cfg(feature = "with-serde")]
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

#[cfg(feature = "with-serde")]
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
            Err(kvm_core::state::RestoreError::Refused(reason)) => {
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
