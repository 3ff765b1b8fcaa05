// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether an XSAVE area can be this host's: components, their places, its length. The standard form
//! puts each component where CPUID leaf 0xd says, and processors differ in that (PKRU follows AVX-512
//! on some, MPX on others), so bytes of another layout would be taken for other registers.

#![forbid(unsafe_code)]

use super::cpuid::find;
use super::error::Refusal;
use super::host::StateHost;
use super::{VcpuState, registers::CpuidLeaf};

const XSAVE_LEAF: u32 = 0xd;
/// The legacy area and the header (SDM volume 1, 13.4).
const XSTATE_BV: usize = 512;
const EXTENDED: usize = 576;
/// x87 and SSE: in the legacy area, and there whether the processor has XSAVE or not.
const LEGACY: u64 = 3;

/// The components whose state is not the initial one.
fn in_use(area: &[u8]) -> u64 {
    let bytes = area.get(XSTATE_BV..).and_then(<[u8]>::first_chunk::<8>);
    bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn place(leaves: &[CpuidLeaf], component: u32) -> Option<(u32, u32)> {
    let leaf = find(leaves, XSAVE_LEAF, component)?;
    (leaf.eax != 0).then_some((leaf.eax, leaf.ebx))
}

impl StateHost {
    pub(super) fn check_xsave(&self, state: &VcpuState) -> Result<(), Refusal> {
        let len = state.xsave.len();
        if len < EXTENDED {
            let needed = EXTENDED;
            return Err(Refusal::XsaveShort { len, needed });
        }
        let host = find(&self.cpuid, XSAVE_LEAF, 0)
            .map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax));
        let in_use = in_use(&state.xsave);
        let xcr0 = state.xcrs.iter().find(|xcr| xcr.index == 0);
        let enabled = xcr0.map_or(0, |xcr| xcr.value);
        let missing = (in_use | enabled) & !(host | LEGACY);
        if missing != 0 {
            return Err(Refusal::XsaveComponents { bits: missing });
        }
        for component in (2..63).filter(|bit| in_use >> bit & 1 != 0) {
            let Some(here) = place(&self.cpuid, component) else {
                continue;
            };
            let saved = place(&state.cpuid, component).unwrap_or(here);
            if saved != here {
                return Err(Refusal::XsaveLayout {
                    component,
                    state: saved,
                    host: here,
                });
            }
            let needed = here.0 as usize + here.1 as usize;
            if len < needed {
                return Err(Refusal::XsaveShort { len, needed });
            }
        }
        Ok(())
    }
}
