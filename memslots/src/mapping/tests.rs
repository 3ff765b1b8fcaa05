// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Each system call refused in turn, and what the kernel says of what was made.

use super::numa::Binding;
use super::place::HUGE;
use super::prefault::{POPULATE_READ, POPULATE_WRITE};
use super::sys::MapRequest;
use super::*;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The kernel, but for the calls that it is told to refuse; it notes what is mapped.
#[derive(Default)]
struct Refusing {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    calls: Vec<&'static str>,
    refuse: BTreeMap<usize, Errno>,
    /// Bytes mapped and not unmapped.
    mapped: usize,
    /// What `madvise` was asked for.
    advice: Vec<i32>,
    /// So many times, another thread maps a page where a `munmap` has made room.
    squat: usize,
    /// Its pages.
    squatters: Vec<usize>,
    /// So often it was asked for its NUMA nodes.
    nodes_read: usize,
    /// A kernel before 4.17, to which the address of a `MAP_FIXED_NOREPLACE` is a wish.
    old: bool,
}

impl Refusing {
    fn leak() -> &'static Self {
        Box::leak(Box::default())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that fails while it holds the lock is to fail with its own words.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, name: &'static str) -> Result<(), Errno> {
        let mut state = self.lock();
        let call = state.calls.len();
        state.calls.push(name);
        state.refuse.remove(&call).map_or(Ok(()), Err)
    }
}

impl System for Refusing {
    unsafe fn mmap(&self, request: MapRequest<'_>) -> Result<*mut c_void, Errno> {
        self.call("mmap")?;
        // SAFETY: the caller's promise.
        let base = match unsafe { Kernel.mmap(request) } {
            Err(Errno(libc::EEXIST)) if self.lock().old => {
                let anywhere = MapRequest {
                    at: None,
                    ..request
                };
                // SAFETY: as above.
                unsafe { Kernel.mmap(anywhere) }
            }
            result => result,
        }?;
        self.lock().mapped += request.length;
        Ok(base)
    }

    unsafe fn munmap(&self, start: *mut c_void, length: usize) -> Result<(), Errno> {
        assert!(length > 0, "the kernel refuses that");
        self.call("munmap")?;
        // SAFETY: the caller's promise.
        unsafe { Kernel.munmap(start, length) }?;
        let mut state = self.lock();
        state.mapped -= length;
        if state.squat > 0 {
            state.squat -= 1;
            let page = MapRequest {
                at: Some(start),
                length: PAGE_SIZE as usize,
                protection: libc::PROT_READ | libc::PROT_WRITE,
                flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                file: None,
            };
            // SAFETY: a new mapping, where nobody is.
            let page = unsafe { Kernel.mmap(page) }?;
            state.squatters.push(page as usize);
        }
        Ok(())
    }

    unsafe fn madvise(&self, start: *mut c_void, length: usize, advice: i32) -> Result<(), Errno> {
        self.lock().advice.push(advice);
        self.call("madvise")?;
        // SAFETY: the caller's promise.
        unsafe { Kernel.madvise(start, length, advice) }
    }

    unsafe fn mbind(
        &self,
        start: *mut c_void,
        length: usize,
        binding: &Binding,
    ) -> Result<(), Errno> {
        self.call("mbind")?;
        // SAFETY: the caller's promise.
        unsafe { Kernel.mbind(start, length, binding) }
    }

    fn numa_nodes(&self) -> Option<String> {
        self.lock().nodes_read += 1;
        Kernel.numa_nodes()
    }

    fn memfd_create(&self, flags: u32) -> Result<File, Errno> {
        self.call("memfd_create")?;
        Kernel.memfd_create(flags)
    }

    fn set_len(&self, file: &File, length: u64) -> Result<(), Errno> {
        self.call("set_len")?;
        Kernel.set_len(file, length)
    }

    fn add_seals(&self, file: &File, seals: i32) -> Result<(), Errno> {
        self.call("add_seals")?;
        Kernel.add_seals(file, seals)
    }
}

fn threads(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap()
}

fn file(length: u64) -> Arc<File> {
    let path = std::env::temp_dir().join(format!(
        "memslots-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    file.set_len(length).unwrap();
    std::fs::remove_file(path).unwrap();
    Arc::new(file)
}

fn read(mapping: &Mapping, at: usize) -> u8 {
    assert!(at < mapping.size);
    // SAFETY: within the mapping.
    unsafe { mapping.start().add(at).read_volatile() }
}

fn write(mapping: &Mapping, at: usize, value: u8) {
    assert!(at < mapping.size);
    // SAFETY: within the mapping.
    unsafe { mapping.start().add(at).write_volatile(value) }
}

/// How many of its pages are in memory.
fn resident(mapping: &Mapping) -> usize {
    let mut pages = vec![0u8; mapping.size / PAGE_SIZE as usize];
    // SAFETY: the vector has a byte for each page.
    let result = unsafe { libc::mincore(mapping.start.cast(), mapping.size, pages.as_mut_ptr()) };
    assert_eq!(result, 0);
    pages.iter().filter(|page| **page & 1 != 0).count()
}

/// The line of a mapping in `/proc/self/maps` that has the address: its permissions, and its lines of smaps' `VmFlags`.
fn permissions(address: usize) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let hex = |text| usize::from_str_radix(text, 16).unwrap();
        (hex(start)..hex(end))
            .contains(&address)
            .then(|| words.next().map(str::to_owned))?
    })
}

/// `VmFlags` of the mapping that has the address (Documentation/filesystems/proc.rst).
fn vm_flags(address: usize) -> Vec<String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-')
            && let (Ok(start), Ok(end)) = (
                usize::from_str_radix(start, 16),
                usize::from_str_radix(end, 16),
            )
        {
            inside = (start..end).contains(&address);
        } else if inside && first == "VmFlags:" {
            return line.split_whitespace().skip(1).map(str::to_owned).collect();
        }
    }
    panic!("{address:#x} is not mapped")
}

#[test]
fn a_large_mapping_lies_in_the_host_as_in_the_guest() {
    for guest in [0, 0x1000, 0x10_0000, 0x1f_f000, 3 << 30] {
        for backing in [
            Backing::anonymous(4 << 20),
            Backing::memfd(4 << 20),
            Backing::anonymous(4 << 20).guarded(),
            Backing::file_private(file(4 << 20), 0, 4 << 20),
        ] {
            let mapping = Mapping::new(&backing, GuestAddress(guest)).unwrap();
            assert_eq!(mapping.host().0 as u64 % HUGE, guest % HUGE, "{backing:?}");
            write(&mapping, 0, 1);
            write(&mapping, (4 << 20) - 1, 1);
        }
    }
}

#[test]
fn an_impossible_size_is_an_error_and_no_mapping() {
    let huge = !0xfffu64;
    for backing in [
        Backing::anonymous(huge),
        Backing::memfd(huge),
        Backing::anonymous(1 << 62),
    ] {
        assert!(Mapping::new(&backing, GuestAddress(0)).is_err());
    }
    assert_eq!(
        Mapping::new(&Backing::anonymous(0), GuestAddress(0)).unwrap_err(),
        MapError::Empty
    );
}

#[test]
fn numbers_that_do_not_fit_are_named_before_any_call() {
    let system = Refusing::leak();
    let refused = |backing: Backing| {
        Mapping::made_by(system, &backing, GuestAddress(0))
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        refused(Backing::anonymous(5000)),
        "the size 0x1388 is not a multiple of the page size 0x1000"
    );
    assert_eq!(
        refused(Backing::hugetlb(3 << 20, HugePageSize::MIB_2)),
        "the size 0x300000 is not a multiple of the page size 0x200000"
    );
    assert_eq!(
        refused(Backing::hugetlb_memfd(2 << 20, HugePageSize::GIB_1)),
        "the size 0x200000 is not a multiple of the page size 0x40000000"
    );
    assert_eq!(
        refused(Backing::file_shared(file(0x3000), 0x800, 0x1000)),
        "the offset 0x800 is not a multiple of the page size 0x1000"
    );
    assert_eq!(
        refused(Backing::file_private(file(0x2001), 0x1000, 0x3000)),
        "0x3000 bytes from offset 0x1000 of a file that has 0x2001"
    );
    assert!(refused(Backing::file_private(file(0x1000), !0xfff, 0x1000)).contains("of a file"));
    let size = HugePageSize::new(32 << 20).unwrap();
    let sizes: Vec<_> = HugePageSize::of_host()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        refused(Backing::hugetlb(32 << 20, size)),
        format!(
            "this host has huge pages of {}, and not of 32 MiB: \
             /sys/kernel/mm/hugepages/hugepages-32768kB is missing",
            sizes.join(", ")
        )
    );
    let whole = Mapping::new(&Backing::anonymous(0x4000), GuestAddress(0)).map(Arc::new);
    let part = |offset, size| Backing::part(whole.as_ref().unwrap(), offset, size);
    assert_eq!(
        refused(part(0x3000, 0x2000)),
        "0x2000 bytes from offset 0x3000 of a mapping that has 0x4000"
    );
    assert!(refused(part(!0xfff, 0x1000)).contains("of a mapping that has 0x4000"));
    assert_eq!(
        refused(part(0x800, 0x1000)),
        "the offset 0x800 is not a multiple of the page size 0x1000"
    );
    assert_eq!(
        refused(part(0, 0x1800)),
        "the size 0x1800 is not a multiple of the page size 0x1000"
    );
    assert!(refused(part(0, 0x1000).guarded()).contains("the mapping itself"));
    assert!(system.lock().calls.is_empty());
}

#[test]
fn each_call_refused_leaves_nothing_mapped() {
    let all = |backing: Backing| {
        backing
            .numa(NumaPolicy::Preferred(0))
            .huge_pages(HugePages::Advise)
            .without_core_dump()
            .without_fork()
            .prefault(threads(1))
    };
    let backings = [
        Backing::anonymous(0x3000),
        all(Backing::anonymous(4 << 20)),
        all(Backing::anonymous(4 << 20)).guarded(),
        all(Backing::memfd(4 << 20)),
        all(Backing::memfd(4 << 20)).guarded(),
        Backing::file_private(file(4 << 20), 0, 4 << 20).prefault(threads(1)),
    ];
    for backing in backings {
        let whole = Refusing::leak();
        drop(Mapping::made_by(whole, &backing, GuestAddress(0x5000)).unwrap());
        let calls = whole.lock().calls.len();
        let mappings = |calls: &[&str]| calls.iter().filter(|&&call| call == "mmap").count();
        let reserves = mappings(&whole.lock().calls) == 2;
        assert_eq!(whole.lock().mapped, 0);
        for failing in 0..calls {
            for errno in [libc::ENOMEM, libc::EINVAL, libc::EPERM, libc::EFAULT] {
                let system = Refusing::leak();
                system.lock().refuse.insert(failing, Errno(errno));
                let made = Mapping::made_by(system, &backing, GuestAddress(0x5000));
                // Where the kernel puts a reservation decides what there is to cut off: another run's calls may be fewer.
                let (name, before, advice) = {
                    let state = system.lock();
                    let Some(&name) = state.calls.get(failing) else {
                        continue;
                    };
                    let before = mappings(&state.calls[..failing]);
                    (name, before, state.advice.last().copied())
                };
                // To make room for the memory is a part of mapping it.
                let room = name == "munmap" && reserves && before == 1;
                let given_back = name == "munmap" && !room;
                let populates =
                    name == "madvise" && matches!(advice, Some(POPULATE_READ | POPULATE_WRITE));
                // A kernel that lacks a flag is no failure; nor is address space that could not be given back.
                let forgiven =
                    given_back || errno == libc::EINVAL && (name == "memfd_create" || populates);
                assert_eq!(
                    made.is_ok(),
                    forgiven,
                    "{backing:?}: {name}, errno {errno}: {made:?}"
                );
                drop(made);
                if !given_back {
                    assert_eq!(
                        system.lock().mapped,
                        0,
                        "{backing:?}: {name}, errno {errno}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_pool_is_blamed_only_where_there_is_room_for_the_pages() {
    let page = HugePageSize::MIB_2;
    if HugePool::of_host(page).is_none() {
        return eprintln!("NOT TRIED: this host has no pages of 2 MiB");
    }
    // More than any pool has.
    let size = 16 << 40;
    for backing in [
        Backing::hugetlb(size, page),
        Backing::hugetlb_memfd(size, page),
        Backing::hugetlb(size, page).guarded(),
    ] {
        let system = Refusing::leak();
        let error = Mapping::made_by(system, &backing, GuestAddress(0)).unwrap_err();
        assert!(
            matches!(error, MapError::NoHugePages { wanted, .. } if wanted == size >> 21),
            "{error}"
        );
        assert_eq!(system.lock().mapped, 0);
        // What was tried last is whether anything of that size can be mapped.
        let probe = system.lock().calls.iter().rposition(|call| *call == "mmap");
        let probe = probe.unwrap();
        // Under RLIMIT_AS or vm.max_map_count both are refused.
        let system = Refusing::leak();
        system.lock().refuse.insert(probe, Errno(libc::ENOMEM));
        let error = Mapping::made_by(system, &backing, GuestAddress(0)).unwrap_err();
        let expected = MapError::Call {
            call: "mmap",
            size,
            errno: Errno(libc::ENOMEM),
        };
        assert_eq!(error, expected);
        assert_eq!(system.lock().mapped, 0);
    }
}

/// What another thread has mapped meanwhile is still there, and its own.
fn squatters_are_left_alone(system: &Refusing) {
    let squatters = std::mem::take(&mut system.lock().squatters);
    assert!(!squatters.is_empty());
    for page in squatters {
        assert!(permissions(page).is_some_and(|found| found.starts_with("rw-")));
        // SAFETY: mapped by the test, and used by nobody.
        unsafe { Kernel.munmap(page as *mut c_void, PAGE_SIZE as usize) }.unwrap();
    }
}

#[test]
fn a_place_that_another_thread_takes_meanwhile_stays_its_own() {
    for backing in [
        Backing::memfd(4 << 20),
        Backing::memfd(0x3000).guarded(),
        Backing::anonymous(4 << 20).guarded(),
    ] {
        for old in [false, true] {
            let system = Refusing::leak();
            (system.lock().squat, system.lock().old) = (2, old);
            let mapping = Mapping::made_by(system, &backing, GuestAddress(0x5000)).unwrap();
            write(&mapping, 0, 1);
            write(&mapping, mapping.size - 1, 1);
            drop(mapping);
            assert_eq!(system.lock().mapped, 0);
            assert_eq!(system.lock().squatters.len(), 2);
            squatters_are_left_alone(system);
        }
    }
}

#[test]
fn a_refused_mapping_unmaps_nothing_that_came_into_its_place() {
    let backing = Backing::memfd(4 << 20).guarded();
    let whole = Refusing::leak();
    drop(Mapping::made_by(whole, &backing, GuestAddress(0x5000)).unwrap());
    let calls = whole.lock().calls.clone();
    let into_place = calls.iter().rposition(|name| *name == "mmap").unwrap();
    for errno in [libc::ENOMEM, libc::ENODEV] {
        let system = Refusing::leak();
        system.lock().squat = 1;
        system.lock().refuse.insert(into_place, Errno(errno));
        Mapping::made_by(system, &backing, GuestAddress(0x5000)).unwrap_err();
        assert_eq!(system.lock().mapped, 0);
        squatters_are_left_alone(system);
    }
}

#[test]
fn a_memfd_can_be_had_back_and_cannot_shrink() {
    let mapping = Mapping::new(&Backing::memfd(0x3000), GuestAddress(0)).unwrap();
    assert_eq!(
        (mapping.kind(), mapping.page_size()),
        (MemoryKind::Shmem, PAGE_SIZE)
    );
    let file = mapping.file().unwrap().file();
    assert_eq!(file.metadata().unwrap().len(), 0x3000);
    assert!(file.set_len(0).is_err());
    assert!(file.set_len(1 << 20).is_err());
    // SAFETY: an fcntl on an open descriptor with an integer argument.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
    assert_eq!(sealed, -1, "nor can whoever has it seal it further");
    let mut writer = file.try_clone().unwrap();
    writer.write_all(&[7; 3]).unwrap();
    assert_eq!(read(&mapping, 2), 7);
}

#[test]
fn a_private_file_is_copied_on_write_and_a_shared_one_is_not() {
    let file = file(0x4000);
    file.write_all_at(&[5; 0x1000], 0x2000).unwrap();
    let private = Mapping::new(
        &Backing::file_private(Arc::clone(&file), 0x2000, 0x1000),
        GuestAddress(0),
    )
    .unwrap();
    let shared = Mapping::new(
        &Backing::file_shared(Arc::clone(&file), 0x1000, 0x2000),
        GuestAddress(0),
    )
    .unwrap();
    assert_eq!((read(&private, 0), read(&shared, 0x1000)), (5, 5));
    write(&private, 0, 6);
    assert_eq!((read(&private, 0), read(&shared, 0x1000)), (6, 5));
    write(&shared, 0x1001, 9);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0x2001).unwrap();
    assert_eq!(byte, [9]);
    assert!(
        private.file().is_none(),
        "its file does not show what it holds"
    );
    assert_eq!(shared.file().unwrap().start(), 0x1000);
}

#[test]
fn a_file_open_for_reading_is_mapped_private_only() {
    let path = std::env::temp_dir().join(format!("memslots-rom-{}", std::process::id()));
    std::fs::write(&path, [3; 0x1000]).unwrap();
    let file = Arc::new(File::open(&path).unwrap());
    std::fs::remove_file(path).unwrap();
    let shared = Mapping::new(
        &Backing::file_shared(Arc::clone(&file), 0, 0x1000),
        GuestAddress(0),
    );
    let (offset, size) = (0, 0x1000);
    assert_eq!(shared.unwrap_err(), MapError::NotWritable { offset, size });
    let private = Mapping::new(&Backing::file_private(file, 0, 0x1000), GuestAddress(0)).unwrap();
    write(&private, 1, 4);
    assert_eq!((read(&private, 0), read(&private, 1)), (3, 4));
}

#[test]
fn the_pages_on_both_sides_of_a_guarded_mapping_cannot_be_touched() {
    for backing in [
        Backing::anonymous(0x2000),
        Backing::anonymous(4 << 20),
        Backing::memfd(0x2000),
        Backing::memfd(4 << 20),
    ] {
        let mapping = Mapping::new(&backing.guarded(), GuestAddress(0x3000)).unwrap();
        let Range { start, end } = mapping.host_range();
        assert_eq!(permissions(start - 1).as_deref(), Some("---p"));
        assert_eq!(permissions(end).as_deref(), Some("---p"));
        assert!(permissions(start).unwrap().starts_with("rw-"));
        assert!(permissions(end - 1).unwrap().starts_with("rw-"));
    }
}

#[test]
fn prefault_makes_all_of_it_present_with_any_number_of_threads() {
    for count in [1, 3, 64] {
        for backing in [
            Backing::anonymous(40 << 20).huge_pages(HugePages::Never),
            Backing::memfd(3 << 20),
            Backing::file_private(file(1 << 20), 0, 1 << 20),
        ] {
            let mapping = Mapping::new(&backing.prefault(threads(count)), GuestAddress(0)).unwrap();
            assert_eq!(resident(&mapping), mapping.size / PAGE_SIZE as usize);
        }
    }
    let mapping = Mapping::new(
        &Backing::anonymous(8 << 20).huge_pages(HugePages::Never),
        GuestAddress(0),
    )
    .unwrap();
    assert_eq!(resident(&mapping), 0);
    mapping.prefault(0x1000..0x5000, threads(2)).unwrap();
    assert_eq!(resident(&mapping), 4);
    mapping.prefault(0x1000..0x1000, threads(2)).unwrap();
    assert!(mapping.prefault(1..0x1000, threads(1)).is_err());
    assert!(mapping.prefault(0..9 << 20, threads(1)).is_err());
    for (start, end) in [(!0xfff, 0), (0x2000, 0x1000)] {
        let backwards = mapping.prefault(Range { start, end }, threads(1));
        assert!(backwards.is_err(), "{start:#x} to {end:#x}");
    }
}

#[test]
fn a_private_file_is_read_in_beforehand_and_not_copied() {
    /// linux/mman.h.
    const POPULATE: [i32; 2] = [POPULATE_READ, POPULATE_WRITE];
    let asked = |backing: Backing| {
        let system = Refusing::leak();
        let mapping = Mapping::made_by(system, &backing.prefault(threads(1)), GuestAddress(0));
        (mapping.unwrap(), system.lock().advice.clone())
    };
    let file = file(0x2000);
    let (mapping, advice) = asked(Backing::file_private(Arc::clone(&file), 0, 0x2000));
    assert_eq!(advice, [POPULATE[0]]);
    file.write_all_at(&[8], 0x1000).unwrap();
    assert_eq!(read(&mapping, 0x1000), 8, "still the page cache's page");
    for backing in [
        Backing::anonymous(0x2000),
        Backing::memfd(0x2000),
        Backing::file_shared(file, 0, 0x2000),
    ] {
        assert_eq!(asked(backing).1, [POPULATE[1]]);
    }
}

#[test]
fn what_is_reserved_beside_a_mapping_is_given_back() {
    for (backing, beside) in [
        (Backing::memfd(4 << 20), 0),
        (Backing::file_shared(file(4 << 20), 0, 4 << 20), 0),
        (Backing::memfd(0x1000), 0),
        (Backing::memfd(0x1000).guarded(), 0x2000),
        (Backing::anonymous(0x1000), 0),
    ] {
        let system = Refusing::leak();
        let mapping = Mapping::made_by(system, &backing, GuestAddress(0x5000)).unwrap();
        assert_eq!(system.lock().mapped, mapping.size + beside, "{backing:?}");
        drop(mapping);
        assert_eq!(system.lock().mapped, 0);
    }
}

#[test]
fn a_kernel_without_populate_is_touched_and_contents_stay() {
    let system = Refusing::leak();
    let mapping = Mapping::made_by(system, &Backing::anonymous(0x8000), GuestAddress(0)).unwrap();
    write(&mapping, 0x3000, 7);
    let next = system.lock().calls.len();
    system.lock().refuse.insert(next, Errno(libc::EINVAL));
    mapping.prefault(0..0x8000, threads(1)).unwrap();
    assert_eq!(
        (
            resident(&mapping),
            read(&mapping, 0x3000),
            read(&mapping, 0x4000)
        ),
        (8, 7, 0)
    );
}

#[test]
fn a_prefault_that_fails_says_how_far_it_came() {
    let system = Refusing::leak();
    let mapping = Mapping::made_by(
        system,
        &Backing::anonymous(48 << 20).huge_pages(HugePages::Never),
        GuestAddress(0),
    )
    .unwrap();
    for errno in [libc::ENOMEM, libc::EHWPOISON] {
        let next = system.lock().calls.len();
        system.lock().refuse.insert(next + 2, Errno(errno));
        let error = mapping.prefault(0..48 << 20, threads(1)).unwrap_err();
        assert_eq!(
            error,
            MapError::Prefault {
                populated: 32 << 20,
                size: 48 << 20,
                errno: Errno(errno)
            }
        );
    }
}

#[test]
fn advice_and_policy_reach_the_kernel() {
    let backing = Backing::anonymous(4 << 20)
        .huge_pages(HugePages::Never)
        .without_core_dump()
        .without_fork()
        .guarded();
    let mapping = Mapping::new(&backing, GuestAddress(0)).unwrap();
    let flags = vm_flags(mapping.host().0);
    for flag in ["nh", "dd", "dc"] {
        assert!(flags.iter().any(|has| has == flag), "{flag} in {flags:?}");
    }
    let plain = Mapping::new(&Backing::anonymous(4 << 20).guarded(), GuestAddress(0)).unwrap();
    let flags = vm_flags(plain.host().0);
    for flag in ["nh", "hg", "dd", "dc", "mg"] {
        assert!(!flags.iter().any(|has| has == flag), "{flag} in {flags:?}");
    }
}

#[test]
fn a_numa_policy_is_what_the_kernel_has_and_a_node_that_is_not_there_is_named() {
    for policy in [
        NumaPolicy::Bind(vec![0]),
        NumaPolicy::Preferred(0),
        NumaPolicy::Interleave(vec![0]),
    ] {
        let backing = Backing::anonymous(1 << 20).guarded().numa(policy.clone());
        let system = Refusing::leak();
        let mapping = Mapping::made_by(system, &backing, GuestAddress(0)).unwrap();
        assert_eq!(
            system.lock().nodes_read,
            1,
            "what is checked is what is bound"
        );
        if Kernel.numa_nodes().is_none() {
            continue;
        }
        let (mut mode, mut nodes) = (0i32, [0 as libc::c_ulong; 16]);
        /// By address (linux/mempolicy.h).
        const MPOL_F_ADDR: libc::c_ulong = 2;
        // SAFETY: the mask has the 1024 bits that the call is told.
        let result = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut mode,
                nodes.as_mut_ptr(),
                1024,
                mapping.host().0,
                MPOL_F_ADDR,
            )
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        let binding = policy.binding(Some("0")).unwrap();
        assert_eq!((mode, nodes[0]), (binding.mode, 1), "{policy:?}");
    }
    let missing = Backing::anonymous(1 << 20).numa(NumaPolicy::Bind(vec![1000]));
    let error = Mapping::new(&missing, GuestAddress(0)).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("NUMA node 1000 has no memory here"),
        "{error}"
    );
}

#[test]
fn choices_that_do_not_go_with_the_memory_name_the_pair() {
    let system = Refusing::leak();
    let error = |backing: Backing| {
        Mapping::made_by(system, &backing, GuestAddress(0))
            .unwrap_err()
            .to_string()
    };
    let merged = error(Backing::memfd(0x1000).mergeable());
    assert!(
        merged.starts_with("merging of equal pages on shared memory"),
        "{merged}"
    );
    let huge = error(Backing::file_private(file(0x1000), 0, 0x1000).huge_pages(HugePages::Advise));
    assert!(
        huge.starts_with("transparent huge pages on a privately mapped file"),
        "{huge}"
    );
    error(Backing::memfd(0x1000).numa(NumaPolicy::Bind(vec![])));
    error(Backing::anonymous(0x1000).numa(NumaPolicy::Bind(vec![1000])));
    assert!(
        system.lock().calls.is_empty(),
        "known before the first call"
    );
}

#[test]
fn parts_are_the_mappings_own_bytes_and_keep_it() {
    for backing in [Backing::anonymous(0x4000), Backing::memfd(0x4000)] {
        let system = Refusing::leak();
        let whole = Arc::new(Mapping::made_by(system, &backing, GuestAddress(0)).unwrap());
        let calls = system.lock().calls.len();
        let of = |mapping: &Arc<Mapping>, offset, size| {
            let backing = Backing::part(mapping, offset, size);
            assert_eq!(backing, Backing::part(mapping, offset, size));
            assert_ne!(backing, Backing::part(mapping, 0x3000, size));
            assert_eq!(backing.page_size(), mapping.page_size());
            Arc::new(Mapping::made_by(system, &backing, GuestAddress(0)).unwrap())
        };
        let part = of(&whole, 0x1000, 0x2000);
        let inner = of(&part, 0x1000, 0x1000);
        assert_eq!(system.lock().calls.len(), calls, "nothing is mapped for it");
        assert_eq!(part.host().0, whole.host().0 + 0x1000);
        assert_eq!(
            (inner.host().0, inner.size()),
            (whole.host().0 + 0x2000, 0x1000)
        );
        assert_eq!((inner.kind(), inner.page_size()), (whole.kind(), PAGE_SIZE));
        let at = |mapping: &Mapping| mapping.file().map(FileOffset::start);
        assert_eq!(at(&inner), at(&whole).map(|start| start + 0x2000));
        write(&inner, 5, 9);
        assert_eq!((read(&whole, 0x2005), read(&part, 0x1005)), (9, 9));
        drop((whole, part));
        assert_eq!((read(&inner, 5), system.lock().mapped), (9, 0x4000));
        drop(inner);
        assert_eq!(system.lock().mapped, 0);
    }
}

#[test]
fn what_is_chosen_of_a_part_is_asked_for_of_its_bytes() {
    let whole = Arc::new(Mapping::new(&Backing::memfd(0x4000), GuestAddress(0)).unwrap());
    let backing = Backing::part(&whole, 0x1000, 0x2000);
    let part = Mapping::new(&backing.prefault(threads(1)), GuestAddress(0)).unwrap();
    assert_eq!((resident(&part), resident(&whole)), (2, 2));
    let refused = Mapping::new(
        &Backing::part(&whole, 0, 0x1000).mergeable(),
        GuestAddress(0),
    );
    assert!(
        matches!(refused, Err(MapError::Unsupported(_))),
        "{refused:?}"
    );
}

#[test]
fn of_a_part_that_is_refused_the_mapping_keeps_its_contents_and_what_was_chosen_before() {
    let system = Refusing::leak();
    let whole = Mapping::made_by(system, &Backing::anonymous(0x4000), GuestAddress(0)).unwrap();
    let whole = Arc::new(whole);
    write(&whole, 0x1000, 7);
    let calls = system.lock().calls.len();
    system.lock().refuse.insert(calls + 1, Errno(libc::ENOMEM));
    let part = Backing::part(&whole, 0x1000, 0x1000);
    let backing = part.without_core_dump().without_fork();
    let refused = Mapping::made_by(system, &backing, GuestAddress(0)).unwrap_err();
    assert!(refused.to_string().contains("DONTFORK"), "{refused}");
    assert_eq!((read(&whole, 0x1000), system.lock().mapped), (7, 0x4000));
    let flags = |at: usize| vm_flags(whole.host().0 + at);
    let has = |at, flag: &str| flags(at).iter().any(|word| word == flag);
    assert!(has(0x1000, "dd") && !has(0x1000, "dc"));
    assert!(!has(0, "dd") && !has(0x2000, "dd"));
}

#[test]
fn an_external_mapping_is_used_as_it_is_and_its_owner_dropped_last() {
    let owner = Arc::new(Mapping::new(&Backing::anonymous(0x2000), GuestAddress(0)).unwrap());
    let (start, weak) = (owner.host(), Arc::downgrade(&owner));
    // SAFETY: the owner is the mapping itself, and guest memory.
    let backing = unsafe { Backing::external(start, 0x2000, owner) };
    assert_eq!(backing, backing.clone());
    let mapping = Mapping::new(&backing, GuestAddress(0)).unwrap();
    drop(backing);
    write(&mapping, 0x1fff, 1);
    assert_eq!(
        (mapping.host(), mapping.kind()),
        (start, MemoryKind::External)
    );
    assert!(weak.upgrade().is_some());
    drop(mapping);
    assert!(weak.upgrade().is_none());
    // SAFETY: refused, and so used by nobody.
    let unaligned = unsafe { Backing::external(Hva(0x1001), 0x1000, Arc::new(())) };
    assert!(Mapping::new(&unaligned, GuestAddress(0)).is_err());
}
