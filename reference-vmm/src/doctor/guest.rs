// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest of the checks, and the VM around it.
//!
//! The guest is a few dozen integer instructions in flat 32-bit mode. It asks for an order, carries
//! it out and reports, all through ports:
//!
//! ```text
//!   in 0xd0 ×3: what, address, count        out 0xd4: the result, or the vector that came
//! ```
//!
//! so that the monitor's side of a check is `guest.ask(order)`, with a limit.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dirty_log::HostWrites;
use io_bus::{Dispatcher, IoBus};
use irq_routing::{Irqchip, IrqchipKind, Pit, Routing};
use kvm_core::arch::x86_64::{BootState, gdt};
use kvm_core::{
    CheckExtension, Exit, ExitHandler, Flow, GuestMode, Kvm, VcpuId, VcpuSet, VcpuView, Vm,
};
use kvm_ioctls::{VcpuFd, VmFd};
use memslots::{Backing, Memslots, PrivateRanges, Slot, SlotFlags};
use vm_device::bus::{MmioAddress, PioAddress};
use vm_memory::{Bytes, GuestAddress};

use super::checks::Trouble;

/// Size of the slot at 0 that every guest has: code, tables and stack.
pub const LOW_MEMORY: u64 = 1 << 20;
/// The vector whose arrival the guest reports.
pub const VECTOR: u8 = 0x50;
/// What the guest reports before it waits for an interrupt.
pub const READY: u32 = 0x5eed_0001;

const CODE: u64 = 0x1000;
const IDT: u64 = 0x2000;
const GDT: u64 = 0x3000;
/// The mailbox: orders are read from here…
const MAILBOX: u16 = 0xd0;
/// … and reports are written here.
const REPORTS: u16 = 0xd4;
/// Longer than any answer takes that comes at all.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Offset of the handler of [`VECTOR`] in the code.
const HANDLER: u64 = 0x100;

// One order a round: eax what, ebx address, ecx count. An interrupt's frame is never returned to
// (KVM's interpreter has no IRET outside real mode); the handler goes back to the top by itself.
std::arch::global_asm!(
    ".pushsection .rodata.doctor_guest, \"a\"",
    ".balign 256",
    "doctor_guest_start:",
    ".code32",
    "mov esp, 0x8000",
    "mov dword ptr [0xfee000f0], 0x1ff", // the local APIC on, spurious vector 0xff
    "20:",
    "in eax, 0xd0",
    "mov edx, eax",
    "in eax, 0xd0",
    "mov ebx, eax",
    "in eax, 0xd0",
    "mov ecx, eax",
    "cmp edx, 1",
    "je 21f",
    "cmp edx, 2",
    "je 22f",
    "cmp edx, 3",
    "je 23f",
    "cmp edx, 4",
    "je 24f",
    "cmp edx, 5",
    "je 25f",
    "cli", // no more orders
    "hlt",
    "21: mov edx, ebx", // count reads of a port
    "31: in eax, dx",
    "dec ecx",
    "jnz 31b",
    "jmp 29f",
    "22: mov eax, dword ptr [ebx]", // count reads of an address, a page apart
    "add ebx, 0x1000",
    "dec ecx",
    "jnz 22b",
    "jmp 29f",
    "23: mov eax, dword ptr [ebx]", // count reads of one address
    "dec ecx",
    "jnz 23b",
    "jmp 29f",
    "24: mov eax, ecx", // writes count, then count - 1… and at last 1 to one address
    "34: mov dword ptr [ebx], ecx",
    "dec ecx",
    "jnz 34b",
    "jmp 29f",
    "25: mov eax, 0x5eed0001", // waits for an interrupt
    "out 0xd4, eax",
    "sti",
    "35: jmp 35b",
    "29: out 0xd4, eax",
    "jmp 20b",
    ".balign 256, 0x90",             // HANDLER
    "mov dword ptr [0xfee000b0], 0", // end of interrupt
    "mov esp, 0x8000",
    "mov eax, 0x50",
    "out 0xd4, eax",
    "jmp 20b",
    ".code64",
    "doctor_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    static doctor_guest_start: u8;
    static doctor_guest_end: u8;
}

fn code() -> &'static [u8] {
    // SAFETY: both labels are in one read-only section of this binary, the end after the start.
    unsafe {
        let start = &raw const doctor_guest_start;
        let end = &raw const doctor_guest_end;
        std::slice::from_raw_parts(start, end.offset_from(start) as usize)
    }
}

/// What the guest can be told to do.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    /// Read a port so many times; the last value is the answer.
    ReadPort(u16, u32),
    /// Read 32 bits of so many pages from an address on; the last value is the answer.
    ReadPages(u64, u32),
    /// Read 32 bits at one address so many times; the last value is the answer.
    Read(u64, u32),
    /// Write so many times to one address, counting down to 1; the count is the answer.
    Write(u64, u32),
    /// Say [`READY`], then wait for an interrupt and say its vector.
    WaitForInterrupt,
}

impl Order {
    fn words(self) -> [u32; 3] {
        // Guest addresses here are below 4 GiB.
        match self {
            Order::ReadPort(port, count) => [1, port.into(), count],
            Order::ReadPages(address, count) => [2, address as u32, count],
            Order::Read(address, count) => [3, address as u32, count],
            Order::Write(address, count) => [4, address as u32, count],
            Order::WaitForInterrupt => [5, 0, 0],
        }
    }
}

enum Said {
    Word(u32),
    /// The vCPU is out for good, with the reason.
    Halted(String),
}

/// Hands out orders and takes reports at the mailbox's ports, and passes everything else on to the
/// buses.
///
/// The mailbox is no device of the bus, because it waits: whoever takes a device off the bus waits
/// for all accesses that are under way, this one among them.
struct Handler {
    bus: Dispatcher,
    orders: Receiver<[u32; 3]>,
    /// Words of an order that the guest has not read yet, in reverse.
    unread: Vec<u32>,
    said: Sender<Said>,
}

impl Handler {
    /// The next word for the guest. Blocks until there is an order; zeros say that there will be
    /// none.
    fn word(&mut self) -> u32 {
        if self.unread.is_empty() {
            self.unread
                .extend(self.orders.recv().unwrap_or([0; 3]).into_iter().rev());
        }
        self.unread.pop().unwrap_or(0)
    }
}

impl ExitHandler<VcpuFd> for Handler {
    type Stop = String;

    fn exit(&mut self, _: &VcpuView<'_, VcpuFd>, exit: Exit<'_>) -> Flow<String> {
        // An access that nobody claims reads as all ones, which is what the checks look at.
        let _ = match exit {
            Exit::PioIn {
                port: MAILBOX,
                data,
                ..
            } => {
                let word = self.word().to_le_bytes();
                data.iter_mut()
                    .zip(word)
                    .for_each(|(byte, value)| *byte = value);
                return Flow::Continue;
            }
            Exit::PioOut {
                port: REPORTS,
                data,
                ..
            } => {
                let word = data.try_into().map_or(0, u32::from_le_bytes);
                // Nobody listens any more where the check is over.
                let _ = self.said.send(Said::Word(word));
                return Flow::Continue;
            }
            Exit::PioIn { port, size, data } => {
                self.bus
                    .pio_read_repeated(PioAddress(port), size.into(), data)
            }
            Exit::PioOut { port, size, data } => {
                self.bus
                    .pio_write_repeated(PioAddress(port), size.into(), data)
            }
            Exit::MmioRead { addr, data } => self.bus.mmio_read(MmioAddress(addr.0), data),
            Exit::MmioWrite { addr, data } => self.bus.mmio_write(MmioAddress(addr.0), data),
            other => return Flow::Stop(format!("{other:?}")),
        };
        Flow::Continue
    }
}

/// A VM with one vCPU that runs the guest. Dropped, it is stopped and freed; if it does not stop, it
/// is left behind.
pub struct Guest {
    orders: Option<Sender<[u32; 3]>>,
    said: Receiver<Said>,
    set: VcpuSet,
    /// None once it has been left behind.
    parts: Option<Parts>,
}

/// What must not go while the vCPU runs. Dropped in this order.
struct Parts {
    thread: JoinHandle<()>,
    bus: IoBus,
    routing: Routing<Arc<VmFd>>,
    _low: Slot,
    slots: Memslots<HostWrites>,
    vm: Vm,
}

impl Guest {
    /// Builds the VM and lets the guest run to its first order.
    pub fn start(kvm_path: &Path) -> Result<Self, Trouble> {
        let kvm = Kvm::open_at(kvm_path)?;
        let setup = kvm.create_vm()?;
        let slots = Memslots::with_policy(setup.fd().clone(), PrivateRanges::x86());
        let low = slots.create(
            GuestAddress(0),
            Backing::anonymous(LOW_MEMORY),
            SlotFlags::NONE,
        )?;
        let memory = slots.snapshot();
        memory.write_slice(code(), GuestAddress(CODE))?;
        let gdt = gdt(false);
        memory.write_slice(&gdt, GuestAddress(GDT))?;

        setup.set_tss_address(crate::arch::layout::TSS_ADDR)?;
        // Local APICs in the kernel are all that the guest needs.
        let kind = if setup
            .capabilities()
            .has(kvm_bindings::KVM_CAP_SPLIT_IRQCHIP)
        {
            IrqchipKind::Split { pins: 0 }
        } else {
            IrqchipKind::Kernel { pit: Pit::Absent }
        };
        let irqchip = Irqchip::create(setup.fd(), kind)?;
        let routing = Routing::new(setup.fd().clone(), &irqchip);

        let vm = setup.finish();
        let vcpu = vm.create_vcpu(VcpuId(0))?;
        vcpu.set_cpuid(&kvm.supported_cpuid()?)?;
        let mut state = BootState::protected_mode(&vcpu.sregs()?, GuestAddress(CODE), 0, 0);
        (state.sregs.gdt.base, state.sregs.gdt.limit) = (GDT, gdt.len() as u16 - 1);
        (state.sregs.idt.base, state.sregs.idt.limit) = (IDT, 0x7ff);
        let gate = gate(CODE + HANDLER, state.sregs.cs.selector);
        memory.write_slice(&gate, GuestAddress(IDT + u64::from(VECTOR) * 8))?;
        drop(memory);
        vcpu.set_boot_state(&state)?;

        let (orders, ordered) = mpsc::channel();
        let (say, said) = mpsc::channel();
        let bus = IoBus::new();
        let set = VcpuSet::new(vm.identity().clone());
        let runner = set.enroll(vcpu)?;
        let handler = Handler {
            bus: bus.dispatcher(),
            orders: ordered,
            unread: Vec::with_capacity(3),
            said: say.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("doctor-vcpu".into())
            .spawn(move || {
                let Err(halt) = runner.run(handler);
                let _ = say.send(Said::Halted(halt.reason.to_string()));
            })?;
        let parts = Parts {
            thread,
            bus,
            routing,
            _low: low,
            slots,
            vm,
        };
        Ok(Self {
            orders: Some(orders),
            said,
            set,
            parts: Some(parts),
        })
    }

    /// Has the guest do something and waits for what it says.
    pub fn ask(&self, order: Order) -> Result<u32, Trouble> {
        self.order(order);
        self.answer()
    }

    /// Has the guest do something.
    pub fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // A vCPU that is gone takes none, and the answer says why.
            let _ = orders.send(order.words());
        }
    }

    /// The next word that the guest says.
    pub fn answer(&self) -> Result<u32, Trouble> {
        match self.said.recv_timeout(ANSWER_LIMIT) {
            Ok(Said::Word(word)) => Ok(word),
            Ok(Said::Halted(why)) => Err(Trouble::Failed(format!("its vCPU halted: {why}"))),
            Err(RecvTimeoutError::Timeout) => Err(Trouble::Failed(format!(
                "no answer from the guest in {ANSWER_LIMIT:?}"
            ))),
            Err(RecvTimeoutError::Disconnected) => {
                Err(Trouble::Failed("the guest's thread is gone".into()))
            }
        }
    }

    /// Waits until its vCPU is in the guest.
    pub fn is_running(&self) -> Result<(), Trouble> {
        let start = Instant::now();
        while self.set.mode(VcpuId(0))? != GuestMode::InGuestMode {
            if start.elapsed() > ANSWER_LIMIT {
                return Err(Trouble::Failed("the vCPU does not enter the guest".into()));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Its vCPU, under control.
    pub fn vcpus(&self) -> &VcpuSet {
        &self.set
    }

    /// Its buses.
    pub fn bus(&self) -> Result<&IoBus, Trouble> {
        self.parts().map(|parts| &parts.bus)
    }

    /// Its interrupts.
    pub fn routing(&self) -> Result<&Routing<Arc<VmFd>>, Trouble> {
        self.parts().map(|parts| &parts.routing)
    }

    /// Its memory.
    pub fn slots(&self) -> Result<&Memslots<HostWrites>, Trouble> {
        self.parts().map(|parts| &parts.slots)
    }

    /// The VM.
    pub fn fd(&self) -> Result<&Arc<VmFd>, Trouble> {
        self.parts().map(|parts| parts.vm.fd())
    }

    /// Refuses where the VM does not have a capability.
    pub fn needs(&self, name: &'static str, capability: u32) -> Result<(), Trouble> {
        if CheckExtension::check_extension(&**self.fd()?, capability) > 0 {
            Ok(())
        } else {
            Err(Trouble::Unavailable(format!(
                "this KVM has no KVM_CAP_{name}"
            )))
        }
    }

    fn parts(&self) -> Result<&Parts, Trouble> {
        self.parts
            .as_ref()
            .ok_or_else(|| Trouble::Failed("the guest is gone".into()))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The guest reads "no more orders" and halts; if it does not, the stop brings it out.
        self.orders = None;
        self.set.begin_stop();
        let Some(parts) = self.parts.take() else {
            return;
        };
        let mut said = self.said.recv_timeout(ANSWER_LIMIT);
        while let Ok(Said::Word(_)) = said {
            said = self.said.recv_timeout(ANSWER_LIMIT);
        }
        match said {
            Err(RecvTimeoutError::Timeout) => {
                // Its thread may be in the kernel for ever, with its memory in use.
                log::error!("a vCPU of the doctor does not stop; it is left behind");
                std::mem::forget(parts);
            }
            _ => {
                let Parts { thread, .. } = parts;
                if thread.join().is_err() {
                    log::error!("the thread of a vCPU of the doctor panicked");
                }
            }
        }
    }
}

/// A 32-bit interrupt gate: present, ring 0.
fn gate(handler: u64, code_selector: u16) -> [u8; 8] {
    let [a, b, c, d, ..] = handler.to_le_bytes();
    let [low, high] = code_selector.to_le_bytes();
    [a, b, low, high, 0, 0x8e, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handler_is_where_the_gate_says_and_all_of_it_fits() {
        // mov dword ptr [0xfee000b0], 0
        assert_eq!(
            code()[HANDLER as usize..][..6],
            [0xc7, 0x05, 0xb0, 0x00, 0xe0, 0xfe]
        );
        assert!(code().len() as u64 + CODE <= IDT);
        assert_eq!(
            gate(0x1234_5678, 0x10),
            [0x78, 0x56, 0x10, 0, 0, 0x8e, 0x34, 0x12]
        );
    }
}
