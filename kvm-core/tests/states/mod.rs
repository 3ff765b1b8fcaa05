// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host, a state that it takes, and a vCPU to take it; and bytes as a state (`text.rs`).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    dead_code,
    missing_docs
)]

#[cfg(feature = "with-serde")]
pub mod text;

use kvm_core::state::fake::FakeState;
use kvm_core::state::{CpuidLeaf, Msr, OneRegister, StateBytes, StateHost, VcpuState, Xcr};

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
        // One bank, with an IA32_MC0_CTL2.
        mcg_cap: Some(0x401),
        nested: Some(StateBytes(vec![0; 128])),
        one_registers: vec![OneRegister {
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
    let banks = (0x400..0x404).chain(0x280..0x281);
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
