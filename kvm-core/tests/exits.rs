// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The decoder against the kernel's own structure, and against bytes that no kernel would write.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(target_arch = "x86_64")]

use kvm_bindings as kvm;
use kvm_bindings::kvm_run;
use kvm_core::{DecodeError, EXIT_AREA_MIN, EXIT_AREA_START, Exit};
use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::GuestAddress;

const AREA: usize = 2 * 4096 - EXIT_AREA_START;
const UNION: usize = 32 - EXIT_AREA_START;

/// The exit area of two pages that begin with `run`.
fn area(run: &kvm_run) -> Vec<u8> {
    // SAFETY: a kvm_run, zeroed before its fields were set, is plain initialised bytes.
    let bytes: [u8; size_of::<kvm_run>()] = unsafe { std::mem::transmute_copy(run) };
    let mut area = bytes[EXIT_AREA_START..].to_vec();
    area.resize(AREA, 0);
    area
}

fn run(reason: u32) -> kvm_run {
    // SAFETY: all zeroes are a kvm_run.
    let mut run: kvm_run = unsafe { std::mem::zeroed() };
    run.exit_reason = reason;
    run
}

fn with_exit(reason: u32, set: impl FnOnce(&mut kvm_run)) -> Vec<u8> {
    let mut run = run(reason);
    set(&mut run);
    area(&run)
}

fn words<const N: usize>(first: [u64; N]) -> [u64; 16] {
    std::array::from_fn(|i| first.get(i).copied().unwrap_or(0))
}

#[test]
fn every_exit_of_the_kernels_structure_is_decoded() {
    let mut bytes = with_exit(kvm::KVM_EXIT_UNKNOWN, |run| {
        run.__bindgen_anon_1.hw.hardware_exit_reason = 0x1234;
    });
    assert_eq!(
        Exit::decode(&mut bytes),
        Ok(Exit::Unknown {
            hardware_reason: 0x1234
        })
    );

    let mut bytes = with_exit(kvm::KVM_EXIT_EXCEPTION, |run| {
        run.__bindgen_anon_1.ex.exception = 14;
        run.__bindgen_anon_1.ex.error_code = 2;
    });
    assert_eq!(
        Exit::decode(&mut bytes),
        Ok(Exit::Exception {
            vector: 14,
            error_code: 2
        })
    );

    let mut bytes = with_exit(kvm::KVM_EXIT_FAIL_ENTRY, |run| {
        run.__bindgen_anon_1
            .fail_entry
            .hardware_entry_failure_reason = 0x8000_0021;
        run.__bindgen_anon_1.fail_entry.cpu = 3;
    });
    assert_eq!(
        Exit::decode(&mut bytes),
        Ok(Exit::FailEntry {
            reason: 0x8000_0021,
            cpu: 3
        })
    );

    let mut bytes = with_exit(kvm::KVM_EXIT_DEBUG, |run| {
        run.__bindgen_anon_1.debug.arch = kvm::kvm_debug_exit_arch {
            exception: 1,
            pc: 0x10,
            dr6: 0x20,
            dr7: 0x30,
            ..Default::default()
        };
    });
    let debug = Exit::Debug {
        exception: 1,
        pc: 0x10,
        dr6: 0x20,
        dr7: 0x30,
    };
    assert_eq!(Exit::decode(&mut bytes), Ok(debug));

    let mut bytes = with_exit(kvm::KVM_EXIT_TPR_ACCESS, |run| {
        run.__bindgen_anon_1.tpr_access.rip = 0x99;
        run.__bindgen_anon_1.tpr_access.is_write = 1;
    });
    assert_eq!(
        Exit::decode(&mut bytes),
        Ok(Exit::TprAccess {
            rip: 0x99,
            is_write: true
        })
    );

    let mut bytes = with_exit(kvm::KVM_EXIT_IOAPIC_EOI, |run| {
        run.__bindgen_anon_1.eoi.vector = 0x31;
    });
    assert_eq!(
        Exit::decode(&mut bytes),
        Ok(Exit::IoapicEoi { vector: 0x31 })
    );

    let mut bytes = with_exit(kvm::KVM_EXIT_MEMORY_FAULT, |run| {
        run.__bindgen_anon_1.memory_fault.flags = 8;
        run.__bindgen_anon_1.memory_fault.gpa = 0x5000;
        run.__bindgen_anon_1.memory_fault.size = 0x1000;
    });
    let fault = Exit::MemoryFault {
        flags: 8,
        addr: GuestAddress(0x5000),
        size: 0x1000,
    };
    assert_eq!(Exit::decode(&mut bytes), Ok(fault));

    let mut bytes = with_exit(kvm::KVM_EXIT_NOTIFY, |run| {
        run.__bindgen_anon_1.notify.flags = 1;
    });
    assert_eq!(Exit::decode(&mut bytes), Ok(Exit::Notify { flags: 1 }));

    let plain = [
        (kvm::KVM_EXIT_HLT, Exit::Hlt),
        (kvm::KVM_EXIT_SHUTDOWN, Exit::Shutdown),
        (kvm::KVM_EXIT_IRQ_WINDOW_OPEN, Exit::IrqWindowOpen),
        (kvm::KVM_EXIT_INTR, Exit::Intr),
        (kvm::KVM_EXIT_SET_TPR, Exit::SetTpr),
        (kvm::KVM_EXIT_NMI, Exit::Nmi),
        (kvm::KVM_EXIT_DIRTY_RING_FULL, Exit::DirtyRingFull),
        (kvm::KVM_EXIT_AP_RESET_HOLD, Exit::ApResetHold),
        (kvm::KVM_EXIT_X86_BUS_LOCK, Exit::X86BusLock),
    ];
    for (reason, exit) in plain {
        assert_eq!(Exit::decode(&mut area(&run(reason))), Ok(exit));
    }
}

#[test]
fn words_come_as_many_as_there_are_and_no_more_than_fit() {
    for ndata in 0..40 {
        let mut bytes = with_exit(kvm::KVM_EXIT_SYSTEM_EVENT, |run| {
            run.__bindgen_anon_1.system_event.type_ = kvm::KVM_SYSTEM_EVENT_RESET;
            run.__bindgen_anon_1.system_event.ndata = ndata;
            run.__bindgen_anon_1.system_event.__bindgen_anon_1.data =
                std::array::from_fn(|i| i as u64);
        });
        match Exit::decode(&mut bytes) {
            Ok(Exit::SystemEvent {
                kind: kvm::KVM_SYSTEM_EVENT_RESET,
                data,
            }) => {
                let expected: Vec<_> = (0..u64::from(ndata)).collect();
                assert_eq!(data.as_slice(), expected);
            }
            Err(DecodeError::Words {
                reason: kvm::KVM_EXIT_SYSTEM_EVENT,
                ndata: n,
            }) => {
                assert!(ndata > 16 && n == ndata);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_internal_error_tells_the_instruction_where_kvm_does() {
    let mut bytes = with_exit(kvm::KVM_EXIT_INTERNAL_ERROR, |run| {
        run.__bindgen_anon_1.internal.suberror = kvm::KVM_INTERNAL_ERROR_EMULATION;
        run.__bindgen_anon_1.internal.ndata = 4;
        // Flags; then a length of 2 and the bytes 0f 0b.
        run.__bindgen_anon_1.internal.data = words([1, 0x000b_0f02, 0]);
    });
    let Ok(Exit::InternalError(error)) = Exit::decode(&mut bytes) else {
        panic!()
    };
    assert_eq!(
        error.to_string(),
        "KVM internal error 1: an instruction that KVM cannot emulate, bytes at its address: 0f 0b"
    );
    let mut bytes = with_exit(kvm::KVM_EXIT_INTERNAL_ERROR, |run| {
        run.__bindgen_anon_1.internal.suberror = kvm::KVM_INTERNAL_ERROR_DELIVERY_EV;
        run.__bindgen_anon_1.internal.ndata = 2;
        run.__bindgen_anon_1.internal.data = words([0x11, 0x22]);
    });
    let Ok(Exit::InternalError(error)) = Exit::decode(&mut bytes) else {
        panic!()
    };
    let text = "KVM internal error 3: an exit while delivering an event 0x11 0x22";
    assert_eq!(error.to_string(), text);
}

#[test]
fn answers_land_where_kvm_reads_them() {
    let mut bytes = with_exit(kvm::KVM_EXIT_HYPERCALL, |run| {
        run.__bindgen_anon_1.hypercall.nr = 12;
        run.__bindgen_anon_1.hypercall.args = [1, 2, 3, 4, 5, 6];
    });
    let Ok(Exit::Hypercall {
        nr: 12,
        args: [1, 2, 3, 4, 5, 6],
        mut ret,
        ..
    }) = Exit::decode(&mut bytes)
    else {
        panic!()
    };
    ret.set(0x55);
    assert_eq!(ret.get(), 0x55);
    assert_eq!(bytes[UNION + 56..UNION + 64], 0x55_u64.to_ne_bytes());

    let mut bytes = with_exit(kvm::KVM_EXIT_X86_RDMSR, |run| {
        run.__bindgen_anon_1.msr.index = 0x10;
        run.__bindgen_anon_1.msr.reason = kvm::KVM_MSR_EXIT_REASON_FILTER;
    });
    let Ok(Exit::X86Rdmsr {
        index: 0x10,
        reason: 4,
        mut reply,
    }) = Exit::decode(&mut bytes)
    else {
        panic!()
    };
    reply.refuse();
    reply.accept(0x77);
    assert_eq!(
        (bytes[UNION], &bytes[UNION + 16..UNION + 24]),
        (0, &0x77_u64.to_ne_bytes()[..])
    );

    let mut bytes = with_exit(kvm::KVM_EXIT_X86_WRMSR, |run| {
        run.__bindgen_anon_1.msr.index = 0x20;
        run.__bindgen_anon_1.msr.data = 0x88;
    });
    let Ok(Exit::X86Wrmsr {
        index: 0x20,
        value: 0x88,
        mut reply,
        ..
    }) = Exit::decode(&mut bytes)
    else {
        panic!()
    };
    reply.refuse();
    assert_eq!(bytes[UNION], 1);

    let mut bytes = with_exit(kvm::KVM_EXIT_HYPERV, |_| {});
    let Ok(Exit::Other {
        reason: kvm::KVM_EXIT_HYPERV,
        payload,
    }) = Exit::decode(&mut bytes)
    else {
        panic!()
    };
    payload.fill(9);
    assert!(payload.len() == 256 && bytes[UNION..UNION + 256].iter().all(|b| *b == 9));
}

fn pio(direction: u8, size: u8, port: u16, count: u32, data_offset: u64) -> Vec<u8> {
    with_exit(kvm::KVM_EXIT_IO, |run| {
        run.__bindgen_anon_1.io.direction = direction;
        run.__bindgen_anon_1.io.size = size;
        run.__bindgen_anon_1.io.port = port;
        run.__bindgen_anon_1.io.count = count;
        run.__bindgen_anon_1.io.data_offset = data_offset;
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn port_io_is_whole_or_an_error(
        direction in 0_u8..3,
        size in 0_u8..9,
        port: u16,
        count in prop_oneof![0_u32..5, 1000_u32..5000, any::<u32>()],
        offset in prop_oneof![Just(4096_u64), 0_u64..9000, any::<u64>()],
    ) {
        let mut bytes = pio(direction, size, port, count, offset);
        let len = u64::from(size) * u64::from(count);
        let fits = offset.checked_add(len).is_some_and(|end| end <= 8192);
        let valid = direction < 2 && matches!(size, 1 | 2 | 4) && count > 0 && offset >= 288 && fits;
        match Exit::decode(&mut bytes) {
            Ok(Exit::PioIn { port: p, size: s, data }) => {
                prop_assert!(valid && direction == 0);
                prop_assert_eq!((p, s, data.len() as u64), (port, size, len));
                data.fill(0xa5);
                let at = offset as usize - EXIT_AREA_START;
                prop_assert!(bytes[at..at + len as usize].iter().all(|b| *b == 0xa5));
            }
            Ok(Exit::PioOut { port: p, size: s, data }) => {
                prop_assert!(valid && direction == 1);
                prop_assert_eq!((p, s, data.len() as u64), (port, size, len));
            }
            Err(DecodeError::Pio { .. }) => prop_assert!(!valid),
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn mmio_is_of_one_to_eight_bytes_or_an_error(
        addr: u64,
        data: [u8; 8],
        len in prop_oneof![0_u32..10, any::<u32>()],
        is_write: u8,
    ) {
        let mut bytes = with_exit(kvm::KVM_EXIT_MMIO, |run| {
            run.__bindgen_anon_1.mmio.phys_addr = addr;
            run.__bindgen_anon_1.mmio.data = data;
            run.__bindgen_anon_1.mmio.len = len;
            run.__bindgen_anon_1.mmio.is_write = is_write;
        });
        match Exit::decode(&mut bytes) {
            Ok(Exit::MmioWrite { addr: a, data: d }) => {
                prop_assert!(is_write != 0);
                prop_assert_eq!((a.0, d), (addr, &data[..len as usize]));
            }
            Ok(Exit::MmioRead { addr: a, data: d }) => {
                prop_assert!(is_write == 0);
                prop_assert_eq!((a.0, d.len()), (addr, len as usize));
                d.fill(0x5a);
                let end = UNION + 8 + len as usize;
                prop_assert!(bytes[UNION + 8..end].iter().all(|b| *b == 0x5a));
            }
            Err(DecodeError::Mmio { .. }) => prop_assert!(!(1..=8).contains(&len)),
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn any_bytes_of_any_length_decode_or_are_an_error(
        mut head in vec(any::<u8>(), 0..400),
        reason in 0_u32..45,
        tail in 0_usize..9000,
        set_reason: bool,
    ) {
        if set_reason && head.len() >= 4 {
            head[..4].copy_from_slice(&reason.to_ne_bytes());
        }
        head.resize(head.len() + tail, 0);
        let len = head.len();
        match Exit::decode(&mut head) {
            Err(DecodeError::TooShort { len: l }) => prop_assert!(l == len && len < EXIT_AREA_MIN),
            Ok(exit) => {
                prop_assert!(len >= EXIT_AREA_MIN);
                let _ = (exit.is_access(), format!("{exit:?}"));
            }
            Err(error) => drop(error.to_string()),
        }
    }
}
