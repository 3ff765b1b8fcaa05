// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pause and resume of a whole machine over the real KVM: paused means that nothing of the guest goes on, and nothing is
//! lost by it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use guests::virtio::{MEMORY, Op, REGISTERS, driver};
use guests::{image, monitor, tally};
use reference_vmm::config::Config;
use reference_vmm::devices::virtio::any::{AnyDevice, Devices, PlacedDevice};
use reference_vmm::devices::virtio::block::{DiskConfig, Io};
use reference_vmm::devices::virtio::device::{Activation, Assignment, Cx, Handler, VirtioDevice};
use reference_vmm::devices::virtio::fault::Fault;
use reference_vmm::devices::virtio::mmio::Place;
use reference_vmm::devices::virtio::registers::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
use reference_vmm::devices::virtio::rng::{Rng, RngState, Source};
use reference_vmm::end::{EndSignal, GuestEnd, StopCause};
use reference_vmm::main_loop::GuestSide;
use reference_vmm::memory::{GuestRam, Memory};
use reference_vmm::vm::{ControlError, Machine, RunState, Running};
use support::{WATCHDOG, file, long, need_kvm};
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// All of the guest's memory but the firmware's.
const SIZE: usize = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

// ---- A device whose I/O can be kept from ending, and by which the test has the guest's memory

#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn set(&self, shut: bool) {
        *self.0.0.lock().unwrap() = shut;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let shut = self.0.0.lock().unwrap();
        drop(self.0.1.wait_while(shut, |shut| *shut).unwrap());
    }
}

/// virtio-rng behind a gate.
struct Gated {
    rng: Rng,
    gate: Gate,
}

struct GatedSource(Source, Gate);

impl VirtioDevice for Gated {
    type Handler = GatedSource;
    type State = RngState;
    const DEVICE_ID: u32 = Rng::DEVICE_ID;
    const NAME: &'static str = "virtio-gated";

    fn features(&self) -> u64 {
        self.rng.features()
    }
    fn queue_sizes(&self) -> &[u16] {
        self.rng.queue_sizes()
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.rng.read_config(offset, data);
    }
    fn activate(&mut self, with: &Activation) -> Result<Vec<Assignment<GatedSource>>, Fault> {
        let assignments = self.rng.activate(with)?.into_iter();
        let gated = |Assignment { queues, handler }| Assignment {
            queues,
            handler: GatedSource(handler, self.gate.clone()),
        };
        Ok(assignments.map(gated).collect())
    }
    fn retire(&mut self, _: Vec<GatedSource>) {}
    fn state(&self) -> RngState {
        self.rng.state()
    }
}

impl Handler for GatedSource {
    fn notified(&mut self, cx: &mut Cx<'_>, queue: usize) -> Result<(), Fault> {
        self.0.notified(cx, queue)
    }
    fn rest(&mut self, _: &mut Cx<'_>) -> Result<(), Fault> {
        self.1.pass();
        Ok(())
    }
}

/// Has the machine's memory when it is in its place.
struct Spy(Gated, Arc<OnceLock<GuestRam>>);

impl AnyDevice for Spy {
    fn kind(&self) -> &'static str {
        Gated::NAME
    }
    fn put(self: Box<Self>, place: Place) -> Arc<dyn PlacedDevice> {
        let _ = self.1.set(place.ram.clone());
        Box::new(self.0).put(place)
    }
}

// ---- Machines

struct Guest {
    running: Arc<Running>,
    end: Arc<EndSignal>,
    ram: GuestRam,
    gate: Gate,
    deadline: Instant,
    _kernel: tempfile::TempPath,
}

impl Guest {
    fn start(kernel: &[u8], cpus: u32, irqchip: &str, console: impl AsFd) -> Guest {
        Self::with_disks(Vec::new(), kernel, cpus, irqchip, console)
    }

    /// The gated device is behind the disks.
    fn with_disks(
        disks: Vec<DiskConfig>,
        kernel: &[u8],
        cpus: u32,
        irqchip: &str,
        console: impl AsFd,
    ) -> Guest {
        need_kvm();
        let kernel = file(kernel);
        let config = Config {
            disks,
            memory: Memory::new(SIZE as u64),
            cpus: cpus.into(),
            cmdline: cpus.to_string(),
            debug_exit: Some(0xf4),
            irqchip: match irqchip {
                "split" => reference_vmm::config::Irqchip::Split,
                _ => reference_vmm::config::Irqchip::Kernel,
            },
            ..Config::new(kernel.to_path_buf())
        };
        let end = Arc::new(EndSignal::new().unwrap());
        let (gate, ram) = (Gate::default(), Arc::new(OnceLock::new()));
        let mut devices = Devices::open(&config, &console).unwrap();
        let gated = Gated {
            rng: Rng,
            gate: gate.clone(),
        };
        devices.add("gated", Spy(gated, ram.clone()));
        let machine = Machine::build_with(&config, devices, console, &end).unwrap();
        let running = Arc::new(machine.start().unwrap());
        Guest {
            running,
            end,
            ram: ram.get().unwrap().clone(),
            gate,
            deadline: Instant::now() + if long() { 20 * WATCHDOG } else { 2 * WATCHDOG },
            _kernel: kernel,
        }
    }

    fn word(&self, at: u64) -> u32 {
        self.ram.memory().read_obj(GuestAddress(at)).unwrap()
    }

    /// Pauses it; false if it has ended.
    fn pauses(&self) -> bool {
        match self.running.pause() {
            Ok(()) => true,
            Err(ControlError::Ended) => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// Waits until this is so.
    fn until(&self, what: &str, so: impl Fn(&Guest) -> bool) {
        while !so(self) {
            assert!(Instant::now() < self.deadline, "never {what}");
            std::thread::yield_now();
        }
    }

    /// All of memory.
    fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE];
        let memory = self.ram.memory();
        // Around the firmware, which no device may touch either.
        let read = |bytes: &mut [u8], at: usize| {
            memory.read_slice(bytes, GuestAddress(at as u64)).unwrap();
        };
        read(&mut bytes[..0xe_0000], 0);
        read(&mut bytes[0x10_0000..], 0x10_0000);
        bytes
    }

    fn counts(&self, cpus: u32) -> Vec<u32> {
        let at = |of| tally::COUNTS + tally::STRIDE * u64::from(of);
        (0..cpus).map(|of| self.word(at(of))).collect()
    }

    /// Ends it, and says how.
    fn end(&self) -> GuestEnd {
        self.until("an end", |guest| guest.end.is_told());
        self.running.stop();
        self.end.get().unwrap().clone()
    }
}

fn nowhere() -> OwnedFd {
    std::fs::File::create("/dev/null").unwrap().into()
}

/// Numbers that look random.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    /// Passes some time, from none to some 100 µs.
    fn dawdle(&mut self) {
        let _ = (0..self.roll(20_000)).fold(0_u64, |sum, next| std::hint::black_box(sum ^ next));
    }
}

const READY: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
const AVAILABLE: u32 = MEMORY + 0x1000;
const USED: u32 = MEMORY + 0x2000;
const BUFFERS: u32 = MEMORY + 0x4000;
/// Of a buffer, and entries of the queue.
const LEN: u32 = 256;
const ENTRIES: u32 = 8;

/// Sets up queue 0, with these descriptors: address, length, flags, next.
fn started(descriptors: &[(u32, u32, u32, u32)]) -> Vec<Op> {
    let status = |value| register(VIRTIO_MMIO_STATUS, value);
    let mut ops = vec![
        status(0),
        status(ACKNOWLEDGE | DRIVER),
        register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
        register(VIRTIO_MMIO_DRIVER_FEATURES, 1),
        status(ACKNOWLEDGE | DRIVER | FEATURES_OK),
        register(VIRTIO_MMIO_QUEUE_SEL, 0),
        register(VIRTIO_MMIO_QUEUE_NUM, ENTRIES),
        register(VIRTIO_MMIO_QUEUE_DESC_LOW, MEMORY),
        register(VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAILABLE),
        register(VIRTIO_MMIO_QUEUE_USED_LOW, USED),
        register(VIRTIO_MMIO_QUEUE_READY, 1),
        status(READY),
    ];
    for (entry, (address, len, flags, next)) in (0..).zip(descriptors) {
        let at = MEMORY + 16 * entry;
        ops.push(Op::Write(at, *address));
        ops.push(Op::Write(at + 8, *len));
        ops.push(Op::Write(at + 12, flags | next << 16));
    }
    ops
}

fn register(register: u32, value: u32) -> Op {
    Op::Write(REGISTERS + register, value)
}

/// The request of this number, counted from 1, is made, and slept for.
fn request(number: u32) -> [Op; 3] {
    [
        Op::Write16(AVAILABLE + 2, number as u16),
        register(VIRTIO_MMIO_QUEUE_NOTIFY, 0),
        // By the interrupt alone: one that is lost is a guest that sleeps for ever.
        Op::Sleep {
            address: USED,
            value: number << 16,
            mask: 0xffff_0000,
        },
    ]
}

/// A guest that asks for random bytes so many times, and sleeps for each interrupt.
fn asks(requests: u32) -> Vec<u8> {
    let buffers: Vec<_> = (0..ENTRIES)
        .map(|entry| (BUFFERS + LEN * entry, LEN, 2, 0))
        .collect();
    let mut ops = started(&buffers);
    for entry in 0..ENTRIES {
        ops.push(Op::Write16(AVAILABLE + 4 + 2 * entry, entry as u16));
    }
    ops.extend((1..=requests).flat_map(request));
    ops.push(Op::End(0));
    driver(&ops)
}

/// A guest that writes so many sectors, each with its number from 1 at its start, and sleeps for each interrupt.
fn writes(sectors: u32) -> Vec<u8> {
    const HEADER: u32 = BUFFERS;
    const STATUS: u32 = BUFFERS + 0x100;
    const DATA: u32 = BUFFERS + 0x200;
    // VIRTIO_BLK_T_OUT; all entries of the ring are descriptor 0.
    let mut ops = started(&[(HEADER, 16, 1, 1), (DATA, 512, 1, 2), (STATUS, 1, 2, 0)]);
    ops.push(Op::Write(HEADER, 1));
    for number in 1..=sectors {
        ops.push(Op::Write(HEADER + 8, number - 1));
        ops.push(Op::Write(DATA, number));
        ops.extend(request(number));
        // VIRTIO_BLK_S_OK.
        ops.push(Op::Poll {
            address: STATUS,
            value: 0,
            mask: 0xff,
        });
    }
    ops.push(Op::End(0));
    driver(&ops)
}

// ---- What a pause is

#[test]
fn no_vcpu_executes_while_its_machine_is_paused() {
    for cpus in [1, 4] {
        let guest = Guest::start(&image::elf64(tally::tally64()), cpus, "split", nowhere());
        guest.until("counting", |guest| !guest.counts(cpus).contains(&0));
        let mut dice = Dice(u64::from(cpus));
        for _ in 0..if long() { 5_000 } else { 200 } {
            let before = guest.counts(cpus);
            dice.dawdle();
            guest.running.pause().unwrap();
            assert_eq!(guest.running.state(), RunState::Paused);
            let counts = guest.counts(cpus);
            dice.dawdle();
            assert_eq!(guest.counts(cpus), counts, "{cpus} vCPUs");
            guest.running.resume().unwrap();
            assert_eq!(guest.running.state(), RunState::Running);
            let run = |guest: &Guest| guest.counts(cpus).iter().zip(&before).any(|(a, b)| a != b);
            guest.until("counting on", run);
        }
        // Each goes on where it was: its register and its memory agree.
        let before = guest.counts(cpus);
        let all = |guest: &Guest| guest.counts(cpus).iter().zip(&before).all(|(a, b)| a != b);
        guest.until("counting on, all of them", all);
        let stop = guest.ram.memory();
        stop.write_obj(1_u32, GuestAddress(tally::STOP)).unwrap();
        assert_eq!(guest.end(), GuestEnd::DebugExit(0), "{cpus} vCPUs");
    }
}

#[test]
fn nothing_writes_to_the_memory_of_a_paused_machine_and_no_pause_loses_anything() {
    for (cpus, irqchip) in [(1, "split"), (4, "kernel")] {
        // An emulated machine is slow with four vCPUs.
        let requests = if long() { 50_000 } else { 600 };
        let guest = Guest::start(&asks(requests), cpus, irqchip, nowhere());
        let mut dice = Dice(0x5eed + u64::from(cpus));
        let (mut cycles, mut looks) = (0, 0);
        let mut last = 0;
        while !guest.end.is_told() {
            assert!(Instant::now() < guest.deadline, "{cycles} cycles");
            dice.dawdle();
            if !guest.pauses() {
                break;
            }
            // The whole of memory at some of the pauses, the rings at all.
            let index = guest.word(u64::from(USED));
            if cycles % 16 == 0 && looks < 40 {
                let before = guest.memory();
                dice.dawdle();
                assert!(guest.memory() == before, "cycle {cycles}, {cpus} vCPUs");
                looks += 1;
            }
            assert_eq!(guest.word(u64::from(USED)), index);
            guest.running.resume().unwrap();
            cycles += 1;
            // The guest gets on, or a pause would be all that there is.
            last = if index == last {
                guest.until("the next answer", |guest| {
                    guest.word(u64::from(USED)) != last || guest.end.is_told()
                });
                guest.word(u64::from(USED))
            } else {
                index
            };
        }
        assert_eq!(guest.end(), GuestEnd::DebugExit(0));
        let answered = guest.word(u64::from(USED)) >> 16;
        assert_eq!(answered, requests & 0xffff);
        assert!(cycles > requests / 10, "{cycles} pauses alone");
        eprintln!("{cpus} vCPUs: {cycles} pauses, {looks} looks at all of memory");
    }
}

#[test]
fn a_disk_that_is_written_while_its_machine_is_paused_again_and_again_has_every_sector() {
    for io in [Io::Auto, Io::Threads] {
        let sectors = if long() { 60_000 } else { 1_500 };
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(512 * u64::from(sectors)).unwrap();
        let config = DiskConfig {
            io,
            ..DiskConfig::new(disk.path())
        };
        let guest = Guest::with_disks(vec![config], &writes(sectors), 1, "split", nowhere());
        let mut dice = Dice(0xd15c);
        let mut cycles = 0;
        while !guest.end.is_told() {
            assert!(Instant::now() < guest.deadline, "{cycles} cycles");
            dice.dawdle();
            if !guest.pauses() {
                break;
            }
            // Nothing of it is under way: what the guest was told of is in the file.
            let told = guest.word(u64::from(USED)) >> 16;
            if let Some(last) = told.checked_sub(1) {
                let mut word = [0; 4];
                let at = 512 * u64::from(last);
                disk.as_file().read_exact_at(&mut word, at).unwrap();
                assert_eq!(u32::from_le_bytes(word), told, "cycle {cycles}");
            }
            guest.running.resume().unwrap();
            cycles += 1;
            if cycles % 4 == 0 {
                guest.until("the next sector", |guest| {
                    guest.word(u64::from(USED)) >> 16 != told || guest.end.is_told()
                });
            }
        }
        assert_eq!(guest.end(), GuestEnd::DebugExit(0));
        let image = std::fs::read(disk.path()).unwrap();
        for (sector, number) in image.chunks(512).zip(1_u32..) {
            assert_eq!(sector[..4], number.to_le_bytes());
        }
        assert!(cycles > sectors / 10, "{cycles} pauses alone");
        eprintln!("{io:?}: {cycles} pauses");
    }
}

#[test]
fn a_pause_of_a_paused_machine_and_a_resume_of_one_that_runs_are_as_wished() {
    let guest = Guest::start(&image::elf64(tally::tally64()), 1, "split", nowhere());
    guest.until("counting", |guest| guest.counts(1)[0] > 0);
    guest.running.resume().unwrap();
    guest.running.pause().unwrap();
    guest.running.pause().unwrap();
    assert!(guest.running.while_paused(|_| ()).is_some());
    guest.running.resume().unwrap();
    assert!(guest.running.while_paused(|_| ()).is_none());
    let before = guest.counts(1);
    guest.until("counting on", |guest| guest.counts(1) != before);
    // From many threads at once.
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..100 {
                    guest.running.pause().unwrap();
                    guest.running.resume().unwrap();
                }
                over.store(true, Ordering::Relaxed);
            });
        }
    });
    assert!(over.into_inner());
    let before = guest.counts(1);
    guest.until("counting on", |guest| guest.counts(1) != before);
}

// ---- What refuses one

#[test]
fn a_device_whose_io_does_not_end_refuses_the_pause_and_the_guest_and_the_device_run_on() {
    let guest = Guest::start(&asks(300), 1, "split", nowhere());
    guest.until("an answer", |guest| guest.word(u64::from(USED)) != 0);
    guest.gate.set(true);
    let refused = guest.running.pause_within(Duration::from_millis(20));
    let refused = refused.unwrap_err();
    assert!(refused.to_string().starts_with("gated: "), "{refused}");
    assert_eq!(guest.running.state(), RunState::Running);
    // Its vCPU runs, and waits for the device, which goes on when it can.
    guest.gate.set(false);
    assert_eq!(guest.end(), GuestEnd::DebugExit(0));
}

#[test]
fn a_vcpu_that_waits_for_the_consoles_reader_refuses_the_pause_and_speaks_on() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    // Full but for a little.
    // SAFETY: the descriptor is open.
    let size = unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&writer), libc::F_GETPIPE_SZ) };
    let filled = size as usize - 4096;
    (&writer).write_all(&vec![b'-'; filled]).unwrap();
    let kernel = image::elf64(monitor::chorus64());
    let guest = Guest::start(&kernel, 2, "split", &writer);
    drop(writer);
    // As long as it has room the pause is granted.
    let refused = loop {
        match guest.running.pause_within(Duration::from_millis(50)) {
            Ok(()) => guest.running.resume().unwrap(),
            Err(refused) => break refused,
        }
        assert!(Instant::now() < guest.deadline);
    };
    assert!(matches!(refused, ControlError::Vcpu(_)), "{refused}");
    let mut said = vec![0; filled + 2 * monitor::CHORUS_BYTES];
    reader.read_exact(&mut said).unwrap();
    assert_eq!(guest.end(), GuestEnd::DebugExit(0));
    assert!(!said[filled..].contains(&b'-'));
}

// ---- Around a pause

#[test]
fn the_end_of_a_paused_machine_is_taken_at_once_and_is_for_good() {
    let guest = Guest::start(&asks(60_000), 2, "split", nowhere());
    guest.until("an answer", |guest| guest.word(u64::from(USED)) != 0);
    guest.running.pause().unwrap();
    guest.end.tell(GuestEnd::Stopped(StopCause::Console));
    guest.running.stop();
    assert_eq!(guest.running.state(), RunState::Running);
    assert_eq!(guest.running.pause(), Err(ControlError::Ended));
    assert_eq!(guest.running.resume(), Err(ControlError::Ended));
}

#[test]
fn an_end_that_comes_while_somebody_pauses_is_taken_and_the_pause_is_refused() {
    for at in 0..20 {
        let guest = Guest::start(&asks(60_000), 2, "split", nowhere());
        let pauser = guest.running.clone();
        let pauser = std::thread::spawn(move || {
            loop {
                match pauser.pause_within(PATIENCE).and_then(|()| pauser.resume()) {
                    Ok(()) => {}
                    Err(error) => return error,
                }
            }
        });
        let mut dice = Dice(1 + at);
        (0..5).for_each(|_| dice.dawdle());
        guest.end.tell(GuestEnd::Stopped(StopCause::Console));
        guest.running.stop();
        assert_eq!(pauser.join().unwrap(), ControlError::Ended);
    }
}

#[test]
fn a_paused_guests_input_waits_and_comes_when_it_goes_on() {
    let guest = Guest::start(&image::elf64(tally::tally64()), 1, "split", nowhere());
    let drained = |guest: &Guest| {
        let fd = guest.running.drained();
        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 }
    };
    assert_eq!(guest.running.input(b"a"), 1);
    guest.running.clear_drained();
    guest.running.pause().unwrap();
    assert!(guest.running.is_paused());
    assert_eq!(guest.running.input(b"b"), 0);
    assert!(!drained(&guest));
    guest.running.resume().unwrap();
    assert!(drained(&guest));
    assert_eq!(guest.running.input(b"b"), 1);
    // Who asks for a pause of one that runs has kept its input out for a moment.
    guest.running.clear_drained();
    assert_eq!(guest.running.while_paused(|_| ()), None);
    assert!(drained(&guest));
}
