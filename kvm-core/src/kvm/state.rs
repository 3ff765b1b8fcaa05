// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The ioctls of whole state.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    self as kvm, CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_cpuid_entry2,
    kvm_device_attr, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_nested_state, kvm_one_reg,
    kvm_sregs2, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno::Error as Errno;

use super::machine_check::KVM_X86_SETUP_MCE;
use super::system::Kvm;
use super::vcpu::Vcpu;
use super::vm::{Error, Vm, VmSetup};
use crate::arch::x86_64::state::{
    AccessClock, AccessVcpu, ClockError, ClockRestore, ClockState, CpuidLeaf, DebugRegisters,
    Events, GeneralRegisters, Msr, OneRegister, Passage, RestoreError, Restored, SaveError,
    StateHost, SystemRegisters, VcpuState, VmState, Xcr,
};
use crate::capability::{Capabilities, CheckExtension};
use crate::identity::VcpuId;
use crate::run::VcpuView;

/// `_IOC(direction, KVMIO, number, size)`: the argument of an ioctl that kvm-ioctls has not.
const fn ioc(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}
const WRITE: u64 = 1;
const READ: u64 = 2;
const KVM_GET_SREGS2: u64 = ioc(READ, 0xcc, size_of::<kvm_sregs2>());
const KVM_SET_SREGS2: u64 = ioc(WRITE, 0xcd, size_of::<kvm_sregs2>());
const KVM_GET_XSAVE: u64 = ioc(READ, 0xa4, XSAVE_MIN);
const KVM_GET_XSAVE2: u64 = ioc(READ, 0xcf, XSAVE_MIN);
const KVM_SET_XSAVE: u64 = ioc(WRITE, 0xa5, XSAVE_MIN);
const KVM_GET_DEVICE_ATTR: u64 = ioc(WRITE, 0xe2, size_of::<kvm_device_attr>());
const KVM_SET_DEVICE_ATTR: u64 = ioc(WRITE, 0xe1, size_of::<kvm_device_attr>());
const KVM_GET_NESTED_STATE: u64 = ioc(READ | WRITE, 0xbe, size_of::<kvm_nested_state>());
const KVM_SET_NESTED_STATE: u64 = ioc(WRITE, 0xbf, size_of::<kvm_nested_state>());
const KVM_GET_REG_LIST: u64 = ioc(READ | WRITE, 0xb0, size_of::<u64>());
const KVM_GET_ONE_REG: u64 = ioc(WRITE, 0xab, size_of::<kvm_one_reg>());
const KVM_SET_ONE_REG: u64 = ioc(WRITE, 0xac, size_of::<kvm_one_reg>());

/// `struct kvm_xsave` without what newer hosts have behind it.
const XSAVE_MIN: usize = 4096;
/// Room for one register list: x86 has one register so far.
const REGISTERS_MAX: usize = 64;

fn last() -> Errno {
    Errno::from(io::Error::last_os_error())
}

/// An ioctl whose argument is a structure, or the first of several in one buffer.
///
/// # Safety
/// `argument` points to what `request` reads and writes, all of it.
unsafe fn ioctl<T>(fd: &impl AsRawFd, request: u64, argument: *mut T) -> Result<(), Errno> {
    // SAFETY: the caller's promise; the fd is open for as long as the borrow.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument) } {
        0.. => Ok(()),
        _ => Err(last()),
    }
}

impl Kvm {
    /// [`Vm::state_host`] of the VM that has this descriptor: for who asks on a thread of its own, while the VM is being made.
    ///
    /// # Errors
    /// As [`Vm::state_host`].
    pub fn state_host(&self, vm: &VmFd) -> Result<StateHost, Error> {
        self.listed_host(vm)?.complete(self)
    }

    /// The first half of [`state_host`](Self::state_host), by a few ioctls: what KVM lists. [`ListedHost`] has the other.
    ///
    /// # Errors
    /// [`Error::SupportedCpuid`], [`Error::MsrList`].
    pub fn listed_host(&self, vm: &VmFd) -> Result<ListedHost, Error> {
        let capabilities = Capabilities::new(vm);
        let cpuid = self.supported_cpuid()?;
        let msrs = self.fd().get_msr_index_list();
        let msrs = msrs.map_err(|errno| Error::MsrList { errno })?;
        let number = |capability| usize::try_from(capabilities.raw(capability)).unwrap_or(0);
        let xsave2 = number(kvm::KVM_CAP_XSAVE2);
        let host = StateHost {
            cpuid: cpuid.as_slice().iter().map(|&leaf| leaf.into()).collect(),
            msrs: msrs.as_slice().to_vec(),
            xsave_bytes: xsave2.max(XSAVE_MIN),
            xsave2: xsave2 > 0,
            xcrs: capabilities.has(kvm::KVM_CAP_XCRS),
            sregs2: capabilities.has(kvm::KVM_CAP_SREGS2),
            one_reg: capabilities.has(kvm::KVM_CAP_ONE_REG),
            tsc_control: capabilities.has(kvm::KVM_CAP_TSC_CONTROL),
            tsc_deadline: capabilities.tsc_deadline_timer(),
            disable_exits: number(kvm::KVM_CAP_X86_DISABLE_EXITS) as u32,
            nested_bytes: number(kvm::KVM_CAP_NESTED_STATE),
        };
        Ok(ListedHost(host.with_unlisted_msrs()))
    }
}

/// What this host's KVM lists, and not what it gives its guests besides: no state is checked by it or restored. Where the processor has
/// hardware virtualization KVM gives what it lists; elsewhere a vCPU is given all of that, and asked what it has.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct ListedHost(StateHost);

impl ListedHost {
    /// All that this host saves and takes, by a vCPU that has not run: its CPUID is to be set or restored behind this, whatever it was
    /// before.
    ///
    /// # Errors
    /// [`Error::VcpuSetup`], for one of a vCPU that has run.
    pub fn complete_by(self, vcpu: &Vcpu) -> Result<StateHost, Error> {
        let ListedHost(mut host) = self;
        if !gives_what_it_lists() {
            let set = AccessVcpu::set_cpuid(vcpu.fd(), &host.cpuid);
            set.map_err(vcpu.failed("KVM_SET_CPUID2"))?;
            let given = AccessVcpu::cpuid(vcpu.fd());
            host.cpuid = given.map_err(vcpu.failed("KVM_GET_CPUID2"))?;
        }
        Ok(host)
    }

    /// The same where there is no vCPU yet, by one of a scratch VM: about a millisecond, where that is needed at all.
    ///
    /// # Errors
    /// What a VM and a vCPU may fail with.
    pub fn complete(self, kvm: &Kvm) -> Result<StateHost, Error> {
        if gives_what_it_lists() {
            return Ok(self.0);
        }
        let vcpu = kvm.create_vm()?.finish().create_vcpu(VcpuId(0))?;
        self.complete_by(&vcpu)
    }
}

impl VmSetup {
    /// [`Vm::state_host`] of the VM that is being made: for who refuses a state before anything else is made.
    ///
    /// # Errors
    /// As [`Vm::state_host`].
    pub fn state_host(&self, kvm: &Kvm) -> Result<StateHost, Error> {
        kvm.state_host(self.fd())
    }
}

impl Vm {
    /// What this host saves of this VM's vCPUs, and takes. The same for all of them and for the VM's
    /// whole life, but that `arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM)` comes before it.
    ///
    /// A few ioctls; on a host whose processor has no hardware virtualization a scratch VM as well (about
    /// a millisecond): such a KVM gives its guests more features than it lists.
    ///
    /// # Errors
    /// [`Error::SupportedCpuid`], [`Error::MsrList`], and what a scratch VM may fail with.
    pub fn state_host(&self, kvm: &Kvm) -> Result<StateHost, Error> {
        kvm.state_host(self.fd())
    }

    /// Saves what is the VM's and no vCPU's: its clock. All vCPUs are paused.
    ///
    /// # Errors
    /// [`ClockError`].
    pub fn state(&self) -> Result<VmState, ClockError> {
        VmState::save(self.fd().as_ref())
    }

    /// Restores it, after all vCPUs are made and before any is restored; [`Vcpu::restore`] wants the answer.
    /// Without vCPUs KVM does not tell the host's TSC, and theirs go by value ([`state`](crate::state)).
    ///
    /// # Errors
    /// [`ClockError`].
    pub fn restore(&self, state: &VmState, how: ClockRestore) -> Result<Passage, ClockError> {
        state.restore(self.fd().as_ref(), how)
    }
}

impl Vcpu {
    /// All that KVM knows of the vCPU: before it is enrolled, or after it has halted. While it is
    /// paused: [`Pause::with_vcpu`](crate::Pause::with_vcpu) and [`VcpuView::state`].
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn state(&self, host: &StateHost) -> Result<VcpuState, SaveError> {
        host.save(self.fd())
    }

    /// Lets the vCPU take a state on ([`StateHost::restore`]), before it is enrolled.
    ///
    /// # Errors
    /// [`RestoreError`]; only [`RestoreError::Refused`] has changed nothing.
    pub fn restore(
        &self,
        host: &StateHost,
        state: &VcpuState,
        passage: &Passage,
    ) -> Result<Restored, RestoreError> {
        host.restore(self.fd(), state, passage)
    }
}

impl VcpuView<'_, VcpuFd> {
    /// All that KVM knows of the vCPU. To be asked of a paused one; in an access exit it is the state
    /// before the access.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn state(&self, host: &StateHost) -> Result<VcpuState, SaveError> {
        host.save(self.fd())
    }

    /// Takes the vCPU back to an earlier state of its own, while it is paused ([`StateHost::restore`]).
    ///
    /// # Errors
    /// [`RestoreError`]; only [`RestoreError::Refused`] has changed nothing.
    pub fn restore(
        &self,
        host: &StateHost,
        state: &VcpuState,
        passage: &Passage,
    ) -> Result<Restored, RestoreError> {
        host.restore(self.fd(), state, passage)
    }
}

/// Whether the processor has VMX or SVM. Without them KVM's back end is PVM, which adds to a guest's CPUID what it cannot hide.
fn gives_what_it_lists() -> bool {
    use std::arch::x86_64::__cpuid;
    let svm = || __cpuid(0x8000_0000).eax > 0x8000_0000 && __cpuid(0x8000_0001).ecx & 1 << 2 != 0;
    __cpuid(1).ecx & 1 << 5 != 0 || svm()
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}

impl AccessClock for VmFd {
    fn clock(&self) -> Result<ClockState, Errno> {
        let clock = self.get_clock()?;
        let has = |flag| clock.flags & flag != 0;
        Ok(ClockState {
            nanoseconds: clock.clock,
            realtime: if has(kvm::KVM_CLOCK_REALTIME) {
                clock.realtime
            } else {
                now()
            },
            host_tsc: has(kvm::KVM_CLOCK_HOST_TSC).then_some(clock.host_tsc),
            tsc_stable: has(kvm::KVM_CLOCK_TSC_STABLE),
        })
    }

    fn set_clock(&self, nanoseconds: u64, since: Option<u64>) -> Result<(), Errno> {
        let mut clock = kvm_clock_data {
            clock: nanoseconds,
            ..Default::default()
        };
        if let Some(since) = since {
            let flags = u32::try_from(CheckExtension::check_extension(
                self,
                kvm::KVM_CAP_ADJUST_CLOCK,
            ));
            if flags.unwrap_or(0) & kvm::KVM_CLOCK_REALTIME != 0 {
                clock.flags = kvm::KVM_CLOCK_REALTIME;
                clock.realtime = since;
            } else {
                clock.clock = nanoseconds.saturating_add(now().saturating_sub(since));
            }
        }
        VmFd::set_clock(self, &clock)
    }
}

/// The buffer of an XSAVE ioctl: at least as long as what this host's KVM reads and writes.
///
/// KVM's own answer (`KVM_CAP_XSAVE2`) is a VM's, and an implementation for a vCPU's descriptor cannot
/// take a caller's word for it: KVM would write behind a shorter buffer. CPUID leaf 0xd bounds it:
/// ECX is the length of all components that the processor has, and KVM's area has some of these.
fn xsave_buffer() -> Vec<u32> {
    let highest = std::arch::x86_64::__cpuid(0).eax;
    let len = if highest >= 0xd {
        std::arch::x86_64::__cpuid_count(0xd, 0).ecx as usize
    } else {
        0
    };
    vec![0; len.max(XSAVE_MIN).div_ceil(4)]
}

fn to_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn tsc_offset_attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: kvm::KVM_VCPU_TSC_CTRL,
        attr: kvm::KVM_VCPU_TSC_OFFSET.into(),
        addr: value as u64,
        ..Default::default()
    }
}

impl AccessVcpu for VcpuFd {
    fn cpuid(&self) -> Result<Vec<CpuidLeaf>, Errno> {
        let cpuid = self.get_cpuid2(KVM_MAX_CPUID_ENTRIES)?;
        Ok(cpuid.as_slice().iter().map(|&leaf| leaf.into()).collect())
    }

    fn set_cpuid(&self, leaves: &[CpuidLeaf]) -> Result<(), Errno> {
        let leaves: Vec<kvm_cpuid_entry2> = leaves.iter().map(|&leaf| leaf.into()).collect();
        let cpuid = CpuId::from_entries(&leaves).map_err(|_| Errno::new(libc::E2BIG))?;
        self.set_cpuid2(&cpuid)
    }

    fn mp_state(&self) -> Result<u32, Errno> {
        self.get_mp_state().map(|state| state.mp_state)
    }

    fn set_mp_state(&self, mp_state: u32) -> Result<(), Errno> {
        VcpuFd::set_mp_state(self, kvm_mp_state { mp_state })
    }

    fn events(&self) -> Result<Events, Errno> {
        self.get_vcpu_events().map(Events::from)
    }

    fn set_events(&self, events: &Events) -> Result<(), Errno> {
        self.set_vcpu_events(&(*events).into())
    }

    fn registers(&self) -> Result<GeneralRegisters, Errno> {
        self.get_regs().map(GeneralRegisters::from)
    }

    fn set_registers(&self, registers: &GeneralRegisters) -> Result<(), Errno> {
        self.set_regs(&(*registers).into())
    }

    fn system(&self, sregs2: bool) -> Result<SystemRegisters, Errno> {
        if !sregs2 {
            return self.get_sregs().map(SystemRegisters::from);
        }
        let mut registers = kvm_sregs2::default();
        // SAFETY: KVM writes one such structure.
        unsafe { ioctl(self, KVM_GET_SREGS2, &mut registers) }?;
        Ok(SystemRegisters::from_sregs2(&registers))
    }

    fn set_system(&self, registers: &SystemRegisters, sregs2: bool) -> Result<(), Errno> {
        if !sregs2 {
            return self.set_sregs(&(*registers).into());
        }
        let mut registers = registers.to_sregs2();
        // SAFETY: KVM reads one such structure.
        unsafe { ioctl(self, KVM_SET_SREGS2, &mut registers) }
    }

    fn debug(&self) -> Result<DebugRegisters, Errno> {
        self.get_debug_regs().map(DebugRegisters::from)
    }

    fn set_debug(&self, registers: &DebugRegisters) -> Result<(), Errno> {
        self.set_debug_regs(&(*registers).into())
    }

    fn xcrs(&self) -> Result<Vec<Xcr>, Errno> {
        let xcrs = self.get_xcrs()?;
        let count = xcrs.nr_xcrs as usize;
        let read = xcrs.xcrs.iter().take(count);
        Ok(read.map(|&xcr| xcr.into()).collect())
    }

    fn set_xcrs(&self, xcrs: &[Xcr]) -> Result<(), Errno> {
        let mut argument = kvm_xcrs {
            nr_xcrs: xcrs.len() as u32,
            ..Default::default()
        };
        if xcrs.len() > argument.xcrs.len() {
            return Err(Errno::new(libc::EINVAL));
        }
        for (to, from) in argument.xcrs.iter_mut().zip(xcrs) {
            *to = kvm_xcr::from(*from);
        }
        VcpuFd::set_xcrs(self, &argument)
    }

    fn xsave(&self, xsave2: bool) -> Result<Vec<u8>, Errno> {
        let mut area = xsave_buffer();
        let request = if xsave2 {
            KVM_GET_XSAVE2
        } else {
            KVM_GET_XSAVE
        };
        // SAFETY: the buffer is as long as the area of any KVM on this host; see `xsave_buffer`.
        unsafe { ioctl(self, request, area.as_mut_ptr()) }?;
        Ok(to_bytes(&area))
    }

    fn set_xsave(&self, area: &[u8]) -> Result<(), Errno> {
        let mut buffer = xsave_buffer();
        for (word, bytes) in buffer.iter_mut().zip(area.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        // SAFETY: as above.
        unsafe { ioctl(self, KVM_SET_XSAVE, buffer.as_mut_ptr()) }
    }

    fn lapic(&self) -> Result<Vec<u8>, Errno> {
        let page = self.get_lapic()?;
        Ok(page.regs.iter().map(|byte| *byte as u8).collect())
    }

    fn set_lapic(&self, page: &[u8]) -> Result<(), Errno> {
        let mut argument = kvm_lapic_state::default();
        if page.len() != argument.regs.len() {
            return Err(Errno::new(libc::EINVAL));
        }
        for (to, from) in argument.regs.iter_mut().zip(page) {
            *to = *from as _;
        }
        VcpuFd::set_lapic(self, &argument)
    }

    fn tsc_khz(&self) -> Result<u32, Errno> {
        // kvm-ioctls takes the call's -1 for the errno. No other call has been made since.
        self.get_tsc_khz().map_err(|_| last())
    }

    fn set_tsc_khz(&self, khz: u32) -> Result<(), Errno> {
        VcpuFd::set_tsc_khz(self, khz)
    }

    fn tsc_offset(&self) -> Result<u64, Errno> {
        let mut offset = 0_u64;
        let mut attribute = tsc_offset_attribute(&mut offset);
        // SAFETY: KVM reads the structure and writes the eight bytes that it points to.
        unsafe { ioctl(self, KVM_GET_DEVICE_ATTR, &mut attribute) }?;
        Ok(offset)
    }

    fn set_tsc_offset(&self, mut offset: u64) -> Result<(), Errno> {
        let mut attribute = tsc_offset_attribute(&mut offset);
        // SAFETY: KVM reads the structure and the eight bytes that it points to.
        unsafe { ioctl(self, KVM_SET_DEVICE_ATTR, &mut attribute) }
    }

    fn get_msrs(&self, msrs: &mut [Msr]) -> Result<usize, Errno> {
        let entries: Vec<kvm_msr_entry> = msrs.iter().map(|&msr| msr.into()).collect();
        let mut argument = Msrs::from_entries(&entries).map_err(|_| Errno::new(libc::E2BIG))?;
        let done = VcpuFd::get_msrs(self, &mut argument)?;
        for (to, from) in msrs.iter_mut().zip(argument.as_slice()).take(done) {
            to.value = from.data;
        }
        Ok(done)
    }

    fn put_msrs(&self, msrs: &[Msr]) -> Result<usize, Errno> {
        let entries: Vec<kvm_msr_entry> = msrs.iter().map(|&msr| msr.into()).collect();
        let argument = Msrs::from_entries(&entries).map_err(|_| Errno::new(libc::E2BIG))?;
        VcpuFd::set_msrs(self, &argument)
    }

    fn set_up_mce(&self, mut mcg_cap: u64) -> Result<(), Errno> {
        // SAFETY: KVM reads eight bytes.
        unsafe { ioctl(self, KVM_X86_SETUP_MCE, &mut mcg_cap) }
    }

    fn one_registers(&self) -> Result<Vec<OneRegister>, Errno> {
        // A count, and the room that it tells.
        let mut list = [0_u64; 1 + REGISTERS_MAX];
        list[0] = REGISTERS_MAX as u64;
        // SAFETY: KVM reads the count and writes as many numbers behind it at most.
        unsafe { ioctl(self, KVM_GET_REG_LIST, list.as_mut_ptr()) }?;
        let [count, ids @ ..] = &list;
        let count = usize::try_from(*count).unwrap_or(0);
        let read = |id: &u64| {
            // Any other size would be written over what is behind.
            if id & kvm::KVM_REG_SIZE_MASK != kvm::KVM_REG_SIZE_U64 {
                return Err(Errno::new(libc::EINVAL));
            }
            let mut value = 0_u64;
            let mut register = kvm_one_reg {
                id: *id,
                addr: &raw mut value as u64,
            };
            // SAFETY: KVM reads the structure, and writes eight bytes, as the number says.
            unsafe { ioctl(self, KVM_GET_ONE_REG, &mut register) }?;
            Ok(OneRegister { id: *id, value })
        };
        ids.iter().take(count).map(read).collect()
    }

    fn set_one_register(&self, register: &OneRegister) -> Result<(), Errno> {
        if register.id & kvm::KVM_REG_SIZE_MASK != kvm::KVM_REG_SIZE_U64 {
            return Err(Errno::new(libc::EINVAL));
        }
        let mut argument = kvm_one_reg {
            id: register.id,
            addr: &raw const register.value as u64,
        };
        // SAFETY: KVM reads the structure, and eight bytes, as the number says.
        unsafe { ioctl(self, KVM_SET_ONE_REG, &mut argument) }
    }

    fn nested(&self, max: usize) -> Result<Vec<u8>, Errno> {
        // Words, for the structure's alignment; the size is the second half of the first.
        let words = max.max(size_of::<kvm_nested_state>()).div_ceil(8);
        let mut state = vec![0_u64; words];
        state[0] = (8 * words as u64) << 32;
        // SAFETY: KVM reads the header and writes no more than the size in it.
        unsafe { ioctl(self, KVM_GET_NESTED_STATE, state.as_mut_ptr()) }?;
        let mut bytes: Vec<u8> = state.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate((state[0] >> 32) as usize);
        Ok(bytes)
    }

    fn set_nested(&self, state: &[u8]) -> Result<(), Errno> {
        let mut words: Vec<u64> = state
            .chunks(8)
            .map(|chunk| {
                let mut bytes = [0; 8];
                for (to, from) in bytes.iter_mut().zip(chunk) {
                    *to = *from;
                }
                u64::from_le_bytes(bytes)
            })
            .collect();
        let header = size_of::<kvm_nested_state>();
        if words.len() * 8 < header || (words[0] >> 32) as usize > state.len() {
            return Err(Errno::new(libc::EINVAL));
        }
        // SAFETY: KVM reads the header, which is there, and as much as the size in it says, which is
        // there as well.
        unsafe { ioctl(self, KVM_SET_NESTED_STATE, words.as_mut_ptr()) }
    }

    fn tell_clock_gap(&self) -> Result<(), Errno> {
        self.kvmclock_ctrl()
    }
}
