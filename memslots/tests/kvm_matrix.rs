// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table of what works on which memory is the kernel's: each cell that this host can show is asked for by the raw
//! calls. (Not asked: `Share`, `Numa` and `TransparentHugePages`, whose calls the kernel accepts where they do nothing.)
//! Hugetlb cells need free 2 MiB pages; a host's root lends some for the length of the test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/pool.rs"]
mod pool;

use kvm_bindings::{
    kvm_create_guest_memfd, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use memslots::uffd::{Call, Features};
use memslots::{
    Backing, HugePageSize, HugePool, Mapping, Mechanism, MemoryKind, SlotFlags, Support,
};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use vm_memory::GuestAddress;

const HUGE: u64 = 2 << 20;
const MISSING: u64 = 1;
const WRITE_PROTECT: u64 = 2;
const MINOR: u64 = 4;

/// Cells in which the table says no and the kernel yes; why, it says itself.
const STRICTER: [(MemoryKind, Mechanism); 3] = [
    (MemoryKind::ShmemPrivate, Mechanism::Minor),
    (MemoryKind::Hugetlb, Mechanism::Minor),
    (MemoryKind::HugetlbFilePrivate, Mechanism::Minor),
];

fn kvm() -> Kvm {
    Kvm::new().expect("the kvm tier needs /dev/kvm: run where it opens, or leave this tier out")
}

/// A bare userfaultfd.
struct Raw {
    fd: OwnedFd,
    available: Features,
}

impl Raw {
    fn new(features: Features) -> Result<Self, i32> {
        // SAFETY: the call takes flags alone and makes a descriptor.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        assert!(fd >= 0, "this test needs a userfaultfd: run it as root");
        // SAFETY: just made, and owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let mut raw = Self {
            fd,
            available: Features::NONE,
        };
        let mut api = [0xaa, features.bits(), 0];
        raw.call(Call::Api, &mut api)?;
        raw.available = Features::from_bits(api[1]);
        Ok(raw)
    }

    fn call(&self, call: Call, argument: &mut [u64]) -> Result<(), i32> {
        assert_eq!(argument.len(), call.words());
        // SAFETY: the argument is as long as the request says, and names this test's own memory.
        let result = unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                call.request() as _,
                argument.as_mut_ptr(),
            )
        };
        if result < 0 {
            Err(std::io::Error::last_os_error().raw_os_error().unwrap())
        } else {
            Ok(())
        }
    }

    fn register(&self, memory: &Mapping, modes: u64) -> Result<(), i32> {
        let mut argument = [memory.host().0 as u64, memory.size(), modes, 0];
        self.call(Call::Register, &mut argument)
    }
}

/// Whether the kernel does it. `None`: this test does not ask.
fn ask(memory: &Mapping, mechanism: Mechanism) -> Option<Result<(), i32>> {
    let (start, size) = (memory.host().0 as u64, memory.size());
    let plain = || Raw::new(Features::NONE).unwrap();
    let missing = |call: Call, argument: &mut [u64]| {
        let uffd = plain();
        uffd.register(memory, MISSING)?;
        uffd.call(call, argument)
    };
    Some(match mechanism {
        Mechanism::Missing => plain().register(memory, MISSING),
        Mechanism::Minor => plain().register(memory, MINOR),
        Mechanism::WriteProtect => plain().register(memory, WRITE_PROTECT),
        Mechanism::AsyncWriteProtect => {
            Raw::new(Features::WP_ASYNC).and_then(|uffd| uffd.register(memory, WRITE_PROTECT))
        }
        Mechanism::ZeroPage => missing(Call::ZeroPage, &mut [start, size, 0, 0]),
        Mechanism::Poison => missing(Call::Poison, &mut [start, size, 0, 0]),
        Mechanism::Move => {
            let page = memory.page_size();
            let source = Mapping::new(&Backing::anonymous(2 * page), GuestAddress(0)).unwrap();
            let source_start = (source.host().0 as u64).next_multiple_of(page);
            // SAFETY: within the mapping.
            unsafe { (source_start as *mut u8).write_volatile(1) };
            missing(Call::Move, &mut [start, source_start, 4096.max(page), 0, 0])
        }
        Mechanism::DirtyLog => slot(memory, SlotFlags::LOG_DIRTY_PAGES, None),
        Mechanism::ReadOnly => slot(memory, SlotFlags::READ_ONLY, None),
        Mechanism::Relocate => slot(memory, SlotFlags::NONE, Some(1 << 30)),
        Mechanism::Punch => punch(memory),
        Mechanism::Merge => advise(memory, libc::MADV_MERGEABLE)
            .map(|()| vm_flag(memory, "mg"))
            .and_then(|merges| if merges { Ok(()) } else { Err(0) }),
        _ => return None,
    })
}

/// A slot of a new VM, with these flags, moved to `to`.
fn slot(memory: &Mapping, flags: SlotFlags, to: Option<u64>) -> Result<(), i32> {
    let vm = kvm().create_vm().unwrap();
    let mut region = kvm_userspace_memory_region {
        slot: 0,
        flags: flags.bits(),
        guest_phys_addr: 0,
        memory_size: memory.size(),
        userspace_addr: memory.host().0 as u64,
    };
    // SAFETY: no vCPU runs, and the VM goes before the memory.
    unsafe { vm.set_user_memory_region(region) }.map_err(|error| error.errno())?;
    if let Some(to) = to {
        region.guest_phys_addr = to;
        // SAFETY: as above.
        unsafe { vm.set_user_memory_region(region) }.map_err(|error| error.errno())?;
    }
    Ok(())
}

fn advise(memory: &Mapping, advice: i32) -> Result<(), i32> {
    // SAFETY: this test's own memory, of whose contents it expects nothing.
    match unsafe { libc::madvise(memory.host().0 as *mut _, memory.size() as usize, advice) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap()),
    }
}

/// Fills it, gives it back, and looks for zeros.
fn punch(memory: &Mapping) -> Result<(), i32> {
    let byte = memory.host().0 as *mut u8;
    // SAFETY: within the mapping.
    unsafe { byte.write_volatile(0xaa) };
    advise(
        memory,
        if memory.file().is_some() {
            libc::MADV_REMOVE
        } else {
            libc::MADV_DONTNEED
        },
    )?;
    // SAFETY: as above.
    match unsafe { byte.read_volatile() } {
        0 => Ok(()),
        _ => Err(0),
    }
}

/// Whether `VmFlags` of the mapping has the flag (Documentation/filesystems/proc.rst).
fn vm_flag(memory: &Mapping, flag: &str) -> bool {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = memory.host().0;
    let mut inside = false;
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        let ends = first.split_once('-').and_then(|(start, end)| {
            Some((
                usize::from_str_radix(start, 16).ok()?,
                usize::from_str_radix(end, 16).ok()?,
            ))
        });
        match ends {
            Some((from, to)) => inside = (from..to).contains(&start),
            None if inside && first == "VmFlags:" => {
                return line.split_whitespace().any(|has| has == flag);
            }
            None => {}
        }
    }
    panic!("{start:#x} is not mapped")
}

/// Asks all cells of one kind, each of new memory.
fn compare(kind: MemoryKind, backing: impl Fn() -> Backing) {
    let available = Raw::new(Features::NONE).unwrap().available;
    for mechanism in Mechanism::ALL {
        let memory = Mapping::new(&backing().guarded(), GuestAddress(0)).unwrap();
        assert_eq!(memory.kind(), kind);
        let Some(kernel) = ask(&memory, mechanism) else {
            continue;
        };
        let table = match kind.support(mechanism) {
            Support::Yes => true,
            Support::Feature(bit) => available.contains(Features::from_bits(bit)),
            Support::No(_) => false,
            other => panic!("{mechanism} on {kind}: {other:?}"),
        };
        if STRICTER.contains(&(kind, mechanism)) {
            assert!(
                !table && kernel.is_ok(),
                "{mechanism} on {kind} is not stricter: {kernel:?}"
            );
        } else {
            assert_eq!(
                table,
                kernel.is_ok(),
                "{mechanism} on {kind}: the kernel says {kernel:?}"
            );
        }
    }
}

/// A file of a file system with a page cache, full of what is not zero.
fn disk_file() -> File {
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("kvm_matrix-{}", std::process::id()));
    std::fs::write(&path, vec![0x55; 0x4000]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

fn is_on_overlay(file: &File) -> bool {
    const OVERLAYFS: i64 = 0x794c_7630;
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: fstatfs fills the buffer, which is read only if it succeeded.
    unsafe {
        libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) == 0
            && stat.assume_init().f_type == OVERLAYFS
    }
}

fn filled_memfd() -> File {
    use std::os::unix::fs::FileExt;
    // SAFETY: the name is a C string, the flags are documented ones.
    let fd = unsafe { libc::memfd_create(c"matrix".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: just made, and owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.write_all_at(&[0x55; 0x4000], 0).unwrap();
    file
}

/// One page, whose bytes are put there through a shared mapping: a hugetlbfs has no `write`.
fn filled_hugetlb_memfd() -> File {
    let flags = libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    // SAFETY: the name is a C string, the flags are documented ones.
    let fd = unsafe { libc::memfd_create(c"matrix".as_ptr(), flags) };
    assert!(fd >= 0);
    // SAFETY: just made, and owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(HUGE).unwrap();
    let shared = Backing::file_shared(file.try_clone().unwrap(), 0, HUGE);
    let shared = Mapping::new(&shared, GuestAddress(0)).unwrap();
    // SAFETY: within the mapping.
    unsafe { (shared.host().0 as *mut u8).write_volatile(0x55) };
    file
}

#[test]
fn anonymous_memory_and_memfds_have_what_the_table_says() {
    compare(MemoryKind::Anonymous, || Backing::anonymous(0x4000));
    compare(MemoryKind::Shmem, || Backing::memfd(0x4000));
}

#[test]
fn a_privately_mapped_memfd_has_what_the_table_says() {
    compare(MemoryKind::ShmemPrivate, || {
        Backing::file_private(filled_memfd(), 0, 0x4000)
    });
}

#[test]
fn files_have_what_the_table_says() {
    let kind = Mapping::new(
        &Backing::file_private(disk_file(), 0, 0x4000),
        GuestAddress(0),
    )
    .unwrap()
    .kind();
    if kind == MemoryKind::ShmemPrivate {
        eprintln!(
            "NOT TRIED: the target directory is on a tmpfs: no file with a page cache to ask of"
        );
        return;
    }
    if is_on_overlay(&disk_file()) {
        // A new file is in the upper layer, whose memory management is the mapping's: in the lab that is a tmpfs, and
        // nobody tells. This program's own file is in the lower one.
        eprintln!(
            "NOT TRIED: the target directory is on an overlay: no shared file with a page cache to ask of"
        );
        let program = || File::open(std::env::current_exe().unwrap()).unwrap();
        return compare(MemoryKind::FilePrivate, || {
            Backing::file_private(program(), 0, 0x4000)
        });
    }
    compare(MemoryKind::FilePrivate, || {
        Backing::file_private(disk_file(), 0, 0x4000)
    });
    compare(MemoryKind::FileShared, || {
        Backing::file_shared(disk_file(), 0, 0x4000)
    });
}

#[test]
fn hugetlb_pages_have_what_the_table_says() {
    let _pool = pool::Overcommit::raise(4);
    let page = HugePageSize::MIB_2;
    if HugePool::of_host(page).is_none_or(|pool| pool.available() < 4) {
        eprintln!(
            "NOT TRIED: this host has no pool of 2 MiB pages, and lends none: nothing to ask of"
        );
        return;
    }
    compare(MemoryKind::Hugetlb, || Backing::hugetlb(HUGE, page));
    compare(MemoryKind::HugetlbShared, || {
        Backing::hugetlb_memfd(HUGE, page)
    });
    compare(MemoryKind::HugetlbFilePrivate, || {
        Backing::file_private(filled_hugetlb_memfd(), 0, HUGE)
    });
}

/// A VM that has guest_memfd slots: a plain one where the host has them there, else a software-protected one.
fn vm_with_guest_memfd() -> Option<VmFd> {
    /// `KVM_X86_SW_PROTECTED_VM`.
    const SOFTWARE_PROTECTED: u64 = 1;
    let kvm = kvm();
    [0, SOFTWARE_PROTECTED]
        .into_iter()
        .filter_map(|kind| kvm.create_vm_with_type(kind).ok())
        .find(|vm| {
            vm.check_extension_int(Cap::GuestMemfd) > 0
                && guest_memfd_slot(vm, SlotFlags::NONE, 0).is_ok()
        })
}

/// Makes slot 0, of a guest_memfd and 64 KiB, with further flags, and puts it to `to`.
fn guest_memfd_slot(vm: &VmFd, flags: SlotFlags, to: u64) -> Result<(), i32> {
    const SIZE: u64 = 0x1_0000;
    let memfd = vm
        .create_guest_memfd(kvm_create_guest_memfd {
            size: SIZE,
            ..Default::default()
        })
        .map_err(|error| error.errno())?;
    // SAFETY: just made, and owned by nobody else.
    let memfd = unsafe { OwnedFd::from_raw_fd(memfd) };
    let shared = Mapping::new(&Backing::anonymous(SIZE), GuestAddress(0)).unwrap();
    let set = |start, flags: SlotFlags, size| {
        let region = kvm_userspace_memory_region2 {
            slot: 0,
            flags: (flags | SlotFlags::GUEST_MEMFD).bits(),
            guest_phys_addr: start,
            memory_size: size,
            userspace_addr: shared.host().0 as u64,
            guest_memfd: memfd.as_raw_fd() as u32,
            ..Default::default()
        };
        // SAFETY: no vCPU runs, and the slot goes before the memory.
        unsafe { vm.set_user_memory_region2(region) }.map_err(|error| error.errno())
    };
    set(0, flags, SIZE)?;
    let moved = if to == 0 {
        Ok(())
    } else {
        set(to, flags, SIZE)
    };
    set(0, SlotFlags::NONE, 0).unwrap();
    moved
}

#[test]
fn a_guest_memfd_has_what_the_table_says() {
    let Some(vm) = vm_with_guest_memfd() else {
        eprintln!("NOT TRIED: this host makes no VM with guest_memfd slots: nothing to ask of");
        return;
    };
    let kind = MemoryKind::GuestMemfd;
    let cells = [
        (Mechanism::DirtyLog, SlotFlags::LOG_DIRTY_PAGES, 0),
        (Mechanism::ReadOnly, SlotFlags::READ_ONLY, 0),
        (Mechanism::Relocate, SlotFlags::NONE, 1 << 30),
    ];
    for (mechanism, flags, to) in cells {
        let kernel = guest_memfd_slot(&vm, flags, to);
        assert_eq!(kernel, Err(libc::EINVAL), "{mechanism} on {kind}");
        assert!(kind.check(mechanism).is_err());
    }
    // Its pages can be given back: by their file.
    let memfd = vm
        .create_guest_memfd(kvm_create_guest_memfd {
            size: 0x1_0000,
            ..Default::default()
        })
        .unwrap();
    // SAFETY: just made, and owned by nobody else.
    let memfd = unsafe { OwnedFd::from_raw_fd(memfd) };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: a call on a descriptor of this test's own.
    let punched = unsafe { libc::fallocate(memfd.as_raw_fd(), mode, 0, 0x1000) };
    assert_eq!(punched == 0, kind.check(Mechanism::Punch).is_ok());
    // userfaultfd needs a mapping, and there is none to be had of private memory.
    // SAFETY: a new mapping disturbs no other.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            0x1000,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            memfd.as_raw_fd(),
            0,
        )
    };
    assert_eq!(mapped, libc::MAP_FAILED);
    for mechanism in [
        Mechanism::Missing,
        Mechanism::Minor,
        Mechanism::WriteProtect,
    ] {
        assert!(kind.check(mechanism).is_err());
    }
}
