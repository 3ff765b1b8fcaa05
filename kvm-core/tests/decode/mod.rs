// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as exits, for the fuzz target and the test that runs it: whatever is in `kvm_run`, the decoder
//! and the run loop keep their promises.

use kvm_bindings as kvm;
use kvm_core::fake::{FakeVcpu, Step};
use kvm_core::{
    EXIT_AREA_START, Exit, ExitHandler, Flow, HaltReason, Identity, MemoryError, Remedy, VcpuId,
    VcpuSet, VcpuView,
};
use vm_memory::GuestAddress;

/// Where the union of `kvm_run` begins, and how long it is.
const UNION: usize = 32;
const UNION_LEN: usize = 256;
const AREA: usize = 2 * 4096 - EXIT_AREA_START;

/// The input: an exit reason, an errno, the union's bytes; behind them the page of port data.
struct Input<'a> {
    reason: u32,
    errno: Option<i32>,
    union: &'a [u8],
    data: &'a [u8],
}

impl<'a> Input<'a> {
    fn parse(input: &'a [u8]) -> Option<Self> {
        let (&[reason, errno], rest) = input.split_first_chunk::<2>()?;
        let at = rest.len().min(UNION_LEN);
        let (union, data) = rest.split_at(at);
        Some(Self {
            reason: reason.into(),
            errno: [None, Some(14), Some(133), Some(i32::from(errno))]
                .get(usize::from(errno % 4))
                .copied()
                .flatten(),
            union,
            data,
        })
    }

    fn area(&self) -> Vec<u8> {
        let mut area = vec![0xee; AREA];
        area[..4].copy_from_slice(&self.reason.to_ne_bytes());
        let at = UNION - EXIT_AREA_START;
        area[at..at + self.union.len()].copy_from_slice(self.union);
        let page = 4096 - EXIT_AREA_START;
        let data = &self.data[..self.data.len().min(4096)];
        area[page..page + data.len()].copy_from_slice(data);
        area
    }

    fn step(&self) -> Step {
        Step::Exit {
            reason: self.reason,
            bytes: vec![(UNION, self.union.to_vec()), (4096, self.data.to_vec())],
            errno: self.errno,
        }
    }
}

/// Everything that is said of an exit is inside of what was given, and what is answered goes nowhere else.
pub fn run(input: &[u8]) {
    let Some(input) = Input::parse(input) else {
        return;
    };
    decode(&input);
    decode_short(&input);
    run_loop(&input);
}

fn decode(input: &Input<'_>) {
    let before = input.area();
    let mut area = before.clone();
    let span = area.as_ptr_range();
    // What may have been written: the answer's own bytes.
    let mut answered = 0..0;
    match Exit::decode(&mut area) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(exit) => {
            assert!(!format!("{exit:?}").is_empty());
            match exit {
                Exit::PioIn { size, data, .. } => {
                    assert!(matches!(size, 1 | 2 | 4) && !data.is_empty());
                    assert_eq!(data.len() % usize::from(size), 0);
                    assert!(span.contains(&data.as_ptr()));
                    let at = data.as_ptr().addr() - span.start.addr();
                    assert!(at >= UNION + UNION_LEN - EXIT_AREA_START);
                    data.fill(0x11);
                    answered = at..at + data.len();
                }
                Exit::PioOut { size, data, .. } => {
                    assert!(matches!(size, 1 | 2 | 4) && !data.is_empty());
                    assert_eq!(data.len() % usize::from(size), 0);
                }
                Exit::MmioRead { data, .. } => {
                    assert!((1..=8).contains(&data.len()));
                    let at = data.as_ptr().addr() - span.start.addr();
                    assert_eq!(at, UNION - EXIT_AREA_START + 8);
                    data.fill(0x11);
                    answered = at..at + data.len();
                }
                Exit::MmioWrite { data, .. } => assert!((1..=8).contains(&data.len())),
                Exit::Hypercall { mut ret, .. } => {
                    ret.set(0x1111_1111_1111_1111);
                    assert_eq!(ret.get(), 0x1111_1111_1111_1111);
                    let at = UNION - EXIT_AREA_START + 56;
                    answered = at..at + 8;
                }
                Exit::X86Rdmsr { mut reply, .. } | Exit::X86Wrmsr { mut reply, .. } => {
                    reply.refuse();
                    reply.accept(5);
                    let at = UNION - EXIT_AREA_START;
                    answered = at..at + 24;
                }
                Exit::InternalError(error) => {
                    assert!(error.data.as_slice().len() <= 16);
                    assert!(!error.to_string().is_empty());
                    if let Some((_, len)) = error.instruction() {
                        assert!(len <= 15);
                    }
                }
                Exit::SystemEvent { data, .. } => assert!(data.as_slice().len() <= 16),
                Exit::Other { payload, .. } => {
                    assert_eq!(payload.len(), UNION_LEN);
                    payload.fill(0x11);
                    let at = UNION - EXIT_AREA_START;
                    answered = at..at + UNION_LEN;
                }
                _ => {}
            }
        }
    }
    let untouched = |range: std::ops::Range<usize>| area.get(range.clone()) == before.get(range);
    assert!(untouched(0..answered.start) && untouched(answered.end..AREA));
}

/// Cut anywhere: an error or an exit, and no panic.
fn decode_short(input: &Input<'_>) {
    let area = input.area();
    for len in [
        0,
        1,
        EXIT_AREA_START,
        UNION,
        UNION + UNION_LEN - EXIT_AREA_START,
        4096,
        4100,
    ] {
        let mut short = area.get(..len).unwrap_or(&area).to_vec();
        let _ = Exit::decode(&mut short).map(|exit| exit.is_access());
    }
}

/// Knows the low half of the address space as memory, and runs on through everything.
struct Handler {
    exits: usize,
    errors: usize,
}

impl ExitHandler<()> for Handler {
    type Stop = ();

    fn exit(&mut self, _: &VcpuView<'_, ()>, exit: Exit<'_>) -> Flow<()> {
        self.exits += 1;
        match exit {
            Exit::MmioRead { addr, .. } | Exit::MmioWrite { addr, .. } => {
                assert!(
                    addr.0 >= 1 << 63,
                    "memory at {:#x} came out as an access",
                    addr.0
                );
            }
            Exit::MemoryFault { .. } => panic!("a memory fault came out as an exit"),
            Exit::Shutdown
            | Exit::InternalError(_)
            | Exit::FailEntry { .. }
            | Exit::Unknown { .. } => {
                panic!("a fatal exit reached the handler")
            }
            _ => {}
        }
        Flow::Continue
    }

    fn is_memory(&mut self, address: GuestAddress, _: bool) -> bool {
        address.0 < 1 << 63
    }

    fn memory_error(&mut self, _: &VcpuView<'_, ()>, error: &MemoryError) -> Remedy<()> {
        assert!(!error.to_string().is_empty());
        self.errors += 1;
        Remedy::RunOn
    }
}

fn run_loop(input: &Input<'_>) {
    let script = [input.step(), Step::exit(kvm::KVM_EXIT_SHUTDOWN)];
    let runner = match VcpuSet::new(Identity::vm("fuzz")).enroll(FakeVcpu::new(VcpuId(0), script)) {
        Ok(runner) => runner,
        Err(error) => panic!("{error}"),
    };
    let Err(halt) = runner.run(Handler {
        exits: 0,
        errors: 0,
    });
    assert!(!halt.reason.to_string().is_empty());
    // One thing came of the one exit: the handler saw it, or it was an error, or it ended the vCPU, or
    // was nothing at all; and only the last two leave the count at none.
    assert!(halt.handler.exits + halt.handler.errors <= 1);
    match (halt.reason, input.errno) {
        (HaltReason::RunFailed(errno), Some(given)) => assert_eq!(errno.errno(), given),
        (HaltReason::RunFailed(_), None) => panic!("it did not fail"),
        (HaltReason::MemoryError(_) | HaltReason::Handler(()), _) => panic!("it was to run on"),
        _ => {}
    }
}
