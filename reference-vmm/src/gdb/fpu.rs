// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! x87 and SSE registers in an XSAVE area's legacy region (Intel SDM vol. 1, 10.5.1 and 13.4).
//!
//! KVM has them there. `KVM_GET_FPU` and `KVM_SET_FPU` are not for this: they pass over `XSTATE_BV`, which
//! says of each component whether it has its initial values instead of what is in memory. So the one gives
//! what was in memory long ago, and what the other sets the guest never sees, where the guest has not used
//! the component since.

use kvm_bindings::kvm_fpu;

/// Where `XSTATE_BV` is.
const XSTATE_BV: usize = 512;
/// Its bits of x87 and SSE.
const LEGACY: u8 = 0b11;

/// What an area has; nothing of one that ends before its header does.
pub(super) fn of_xsave(area: &[u8]) -> Option<kvm_fpu> {
    let (legacy, header) = area.split_at_checked(XSTATE_BV)?;
    header.first()?;
    let mut fpu = kvm_fpu {
        fcw: u16::from_le_bytes(at(legacy, 0)?),
        fsw: u16::from_le_bytes(at(legacy, 2)?),
        ftwx: *legacy.get(4)?,
        last_opcode: u16::from_le_bytes(at(legacy, 6)?),
        last_ip: u64::from_le_bytes(at(legacy, 8)?),
        last_dp: u64::from_le_bytes(at(legacy, 16)?),
        mxcsr: u32::from_le_bytes(at(legacy, 24)?),
        ..Default::default()
    };
    for (n, st) in fpu.fpr.iter_mut().enumerate() {
        *st = at(legacy, 32 + 16 * n)?;
    }
    for (n, xmm) in fpu.xmm.iter_mut().enumerate() {
        *xmm = at(legacy, 160 + 16 * n)?;
    }
    Some(fpu)
}

/// Sets them in an area, whose other components stay as they are. One that is too short stays whole.
pub(super) fn to_xsave(fpu: &kvm_fpu, area: &mut [u8]) {
    let Some((legacy, header)) = area.split_at_mut_checked(XSTATE_BV) else {
        return;
    };
    let Some(present) = header.first_mut() else {
        return;
    };
    *present |= LEGACY;
    let mut put = |at: usize, bytes: &[u8]| {
        let room = legacy.iter_mut().skip(at);
        room.zip(bytes).for_each(|(slot, byte)| *slot = *byte);
    };
    put(0, &fpu.fcw.to_le_bytes());
    put(2, &fpu.fsw.to_le_bytes());
    put(4, &[fpu.ftwx]);
    put(6, &fpu.last_opcode.to_le_bytes());
    put(8, &fpu.last_ip.to_le_bytes());
    put(16, &fpu.last_dp.to_le_bytes());
    put(24, &fpu.mxcsr.to_le_bytes());
    for (n, st) in fpu.fpr.iter().enumerate() {
        put(32 + 16 * n, st);
    }
    for (n, xmm) in fpu.xmm.iter().enumerate() {
        put(160 + 16 * n, xmm);
    }
}

fn at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_there_and_in_use_and_nothing_else_has_changed() {
        let before: Vec<u8> = (0..1024).map(|n| (n * 7) as u8).collect();
        let mut fpu = of_xsave(&before).unwrap();
        let mut area = before.clone();
        to_xsave(&fpu, &mut area);
        let mut expected = before.clone();
        expected[XSTATE_BV] |= LEGACY;
        assert_eq!(area, expected);

        (fpu.fcw, fpu.ftwx, fpu.mxcsr) = (0x27f, 0x81, 0x1fa0);
        fpu.fpr[7] = [0xaa; 16];
        fpu.xmm[15] = [0xbb; 16];
        to_xsave(&fpu, &mut area);
        assert_eq!(of_xsave(&area), Some(fpu));
        assert_eq!(area[144..160], [0xaa; 16]);
        assert_eq!(area[400..416], [0xbb; 16]);
        assert_eq!(area[416..512], before[416..512]);
        assert_eq!(area[513..], before[513..]);
    }

    #[test]
    fn an_area_without_a_header_has_none() {
        assert_eq!(of_xsave(&[0; XSTATE_BV]), None);
        let mut short = [0; XSTATE_BV];
        to_xsave(&kvm_fpu::default(), &mut short);
        assert_eq!(short, [0; XSTATE_BV]);
    }
}
