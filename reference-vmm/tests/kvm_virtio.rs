// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio over the real KVM: a guest that drives `--rng` by interrupts, one that breaks the rules and heals the device,
//! one that masks its interrupt while it comes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use guests::virtio::{INTERRUPTS, MEMORY, Op, PIN, REGISTERS, SEEN, driver};
use reference_vmm::devices::virtio::registers::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET,
};
use support::tracer::{Kind, trace};
use support::{Vmm, WATCHDOG, file, need_kvm};
use virtio_bindings::virtio_mmio::*;

const READY: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
/// Entries of the queue.
const SIZE: u32 = 8;
const DESCRIPTORS: u32 = MEMORY;
const AVAILABLE: u32 = MEMORY + 0x1000;
const USED: u32 = MEMORY + 0x2000;
/// Buffers, of [`LEN`] bytes each.
const BUFFERS: u32 = MEMORY + 0x4000;
const LEN: u32 = 64;
const NEXT: u32 = 1;
const WRITE: u32 = 2;
const INDIRECT: u32 = 4;
/// Nobody's address, and one that is nobody's RAM.
const HOLE: u32 = 0xd000_0000;

/// A driver in the making.
#[derive(Default)]
struct Script {
    ops: Vec<Op>,
    /// Requests since the last start.
    requests: u32,
}

impl Script {
    fn op(&mut self, op: Op) -> &mut Self {
        self.ops.push(op);
        self
    }

    fn write(&mut self, address: u32, value: u32) -> &mut Self {
        self.op(Op::Write(address, value))
    }

    fn register(&mut self, register: u32, value: u32) -> &mut Self {
        self.write(REGISTERS + register, value)
    }

    /// Resets the device, and sets it up up to `FEATURES_OK`.
    fn negotiate(&mut self) -> &mut Self {
        self.requests = 0;
        self.register(VIRTIO_MMIO_STATUS, 0);
        self.poll(REGISTERS + VIRTIO_MMIO_STATUS, 0, u32::MAX);
        // The rings are as new.
        for ring in [AVAILABLE, USED] {
            for at in (0..96).step_by(4) {
                self.write(ring + at, 0);
            }
        }
        self.register(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        self.register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.register(VIRTIO_MMIO_DRIVER_FEATURES, 1);
        self.register(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let status = REGISTERS + VIRTIO_MMIO_STATUS;
        self.poll(status, ACKNOWLEDGE | DRIVER | FEATURES_OK, u32::MAX)
    }

    fn queue(&mut self, size: u32, descriptors: u32, available: u32, used: u32) -> &mut Self {
        self.register(VIRTIO_MMIO_QUEUE_SEL, 0);
        self.register(VIRTIO_MMIO_QUEUE_NUM, size);
        self.register(VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors);
        self.register(VIRTIO_MMIO_QUEUE_AVAIL_LOW, available);
        self.register(VIRTIO_MMIO_QUEUE_USED_LOW, used);
        self.register(VIRTIO_MMIO_QUEUE_READY, 1);
        self.register(VIRTIO_MMIO_STATUS, READY)
    }

    fn start(&mut self) -> &mut Self {
        self.negotiate().queue(SIZE, DESCRIPTORS, AVAILABLE, USED)
    }

    /// Writes a descriptor; `flags` are [`WRITE`], [`NEXT`], [`INDIRECT`].
    fn descriptor(
        &mut self,
        number: u32,
        address: u32,
        len: u32,
        flags: u32,
        next: u32,
    ) -> &mut Self {
        let at = DESCRIPTORS + 16 * number;
        self.write(at, address).write(at + 4, 0).write(at + 8, len);
        self.write(at + 12, flags | next << 16)
    }

    fn available(&mut self, head: u32) -> &mut Self {
        let entry = AVAILABLE + 4 + 2 * (self.requests % SIZE);
        self.op(Op::Write16(entry, head as u16));
        self.requests += 1;
        self.op(Op::Write16(AVAILABLE + 2, self.requests as u16))
    }

    fn notify(&mut self) -> &mut Self {
        self.register(VIRTIO_MMIO_QUEUE_NOTIFY, 0)
    }

    /// Asks for [`LEN`] random bytes.
    fn request(&mut self) -> &mut Self {
        let number = self.requests % SIZE;
        self.descriptor(number, BUFFERS + LEN * number, LEN, WRITE, 0);
        self.available(number).notify()
    }

    fn poll(&mut self, address: u32, value: u32, mask: u32) -> &mut Self {
        self.op(Op::Poll {
            address,
            value,
            mask,
        })
    }

    fn sleep(&mut self, address: u32, value: u32, mask: u32) -> &mut Self {
        self.op(Op::Sleep {
            address,
            value,
            mask,
        })
    }

    /// Awake until all requests are answered.
    fn poll_used(&mut self) -> &mut Self {
        let index = self.requests << 16;
        self.poll(USED, index, 0xffff_0000)
    }

    /// The guest's kernel.
    fn kernel(&mut self) -> tempfile::TempPath {
        self.op(Op::End(0));
        file(&driver(&self.ops))
    }
}

#[test]
fn a_guest_gets_random_bytes_by_interrupt_and_notifies_without_an_exit() {
    need_kvm();
    const REQUESTS: u32 = 20;
    for irqchip in ["split", "kernel"] {
        let mut script = Script::default();
        script.start();
        for request in 1..=REQUESTS {
            script.request();
            // One interrupt a request, for it is waited for.
            script.sleep(INTERRUPTS, request, u32::MAX).poll_used();
        }
        script
            .op(Op::Show(SEEN))
            .op(Op::Show(REGISTERS + VIRTIO_MMIO_STATUS));
        for word in 0..LEN / 4 {
            script.op(Op::Show(BUFFERS + 4 * word));
        }
        let kernel = script.kernel();
        let words = [
            "run",
            "--debug-exit",
            "--rng",
            "--irqchip",
            irqchip,
            "--kernel",
        ];
        let mut args = words.map(str::to_owned).to_vec();
        args.push(kernel.display().to_string());
        let trace = trace(&args, None, &[], WATCHDOG);
        assert_eq!(trace.status.code(), Some(1), "{irqchip}: {trace}");
        assert_eq!(trace.stderr, "", "{irqchip}");
        let stdout = String::from_utf8(trace.stdout.clone()).unwrap();
        let lines: Vec<_> = stdout.lines().collect();
        assert_eq!(lines[..2], ["00000001", "0000000f"], "{irqchip}");
        assert_eq!(lines.len(), 2 + LEN as usize / 4);
        assert!(
            lines[2..].iter().any(|word| *word != "00000000"),
            "{lines:?}"
        );
        // The notifications went to the ioeventfd, which came when the driver was ready: not before the guest ran.
        let doorbells = trace.positions("KVM_IOEVENTFD");
        let runs = trace.positions("KVM_RUN");
        assert_eq!(doorbells.len(), 1, "{irqchip}: {trace}");
        assert!(runs[0] < doorbells[0]);
        // Nor does the interrupt cost a call each: an irqfd, from the first one on.
        let irqfds = trace.positions("KVM_IRQFD");
        assert_eq!(irqfds.len(), 1, "{irqchip}: {trace}");
        assert!(doorbells[0] < irqfds[0]);
        assert!(
            trace.positions("KVM_SIGNAL_MSI").is_empty(),
            "{irqchip}: {trace}"
        );
        // What its thread waits for is its own.
        let of_device = trace.calls.iter().filter(|call| call.thread == "rng");
        let waits = |call: &&support::tracer::Call| {
            matches!(
                call.kind,
                Kind::Elsewhere(libc::SYS_epoll_wait | libc::SYS_epoll_pwait)
            )
        };
        assert!(of_device.filter(waits).count() <= 3 * REQUESTS as usize);
    }
}

/// What a driver does wrong between the start and the notification.
type Wrong = fn(&mut Script);

const WRONGS: &[(&str, Wrong)] = &[
    ("a loop", |script| {
        script
            .descriptor(0, BUFFERS, 4, NEXT, 1)
            .descriptor(1, BUFFERS, 4, NEXT, 0)
            .available(0);
    }),
    ("a buffer in the device's own registers", |script| {
        script.descriptor(0, REGISTERS, 4, WRITE, 0).available(0);
    }),
    ("a buffer where nothing is", |script| {
        script.descriptor(0, HOLE, 4, WRITE, 0).available(0);
    }),
    ("a buffer in the firmware's read-only memory", |script| {
        script.descriptor(0, 0xf_0000, 4, WRITE, 0).available(0);
    }),
    ("a head beyond the table", |script| {
        script.available(SIZE);
    }),
    ("an index that runs ahead", |script| {
        script.op(Op::Write16(AVAILABLE + 2, 1000));
    }),
    ("an indirect table of nothing", |script| {
        script.descriptor(0, BUFFERS, 0, INDIRECT, 0).available(0);
    }),
    ("an indirect table where nothing is", |script| {
        script.descriptor(0, HOLE, 16, INDIRECT, 0).available(0);
    }),
    ("a buffer to read behind one to write", |script| {
        script
            .descriptor(0, BUFFERS, 4, WRITE | NEXT, 1)
            .descriptor(1, BUFFERS, 4, 0, 0)
            .available(0);
    }),
    ("a queue that is stopped while it is served", |script| {
        script.register(VIRTIO_MMIO_QUEUE_READY, 0);
    }),
];

/// Rings that are told wrong.
const RINGS: &[(u32, u32, u32, u32)] = &[
    (0, DESCRIPTORS, AVAILABLE, USED),
    (3, DESCRIPTORS, AVAILABLE, USED),
    (0x1_0008, DESCRIPTORS, AVAILABLE, USED),
    (SIZE, HOLE, AVAILABLE, USED),
    (SIZE, DESCRIPTORS, REGISTERS, USED),
    (SIZE, DESCRIPTORS, AVAILABLE, HOLE),
    (SIZE, DESCRIPTORS, AVAILABLE, 0xf_0000),
    (SIZE, DESCRIPTORS + 8, AVAILABLE, USED),
    (SIZE, u32::MAX - 15, AVAILABLE, USED),
];

#[test]
fn a_guest_that_breaks_the_rules_sees_that_its_device_needs_a_reset_and_has_it_back_by_one() {
    for irqchip in ["split", "kernel"] {
        let mut script = Script::default();
        let needs_reset = |script: &mut Script| {
            let status = REGISTERS + VIRTIO_MMIO_STATUS;
            // By the interrupt that tells it, then by the register.
            script.sleep(SEEN, 2, 2);
            script.poll(status, NEEDS_RESET, NEEDS_RESET);
        };
        let works = |script: &mut Script| {
            script
                .start()
                .write(SEEN, 0)
                .request()
                .sleep(SEEN, 1, 1)
                .poll_used();
            script.op(Op::Say(b'.'));
        };
        for (_, wrong) in WRONGS {
            script.start().write(SEEN, 0);
            wrong(&mut script);
            script.notify();
            needs_reset(&mut script);
            // Whatever it is told now, until the reset.
            script.notify().notify();
            works(&mut script);
        }
        for (size, descriptors, available, used) in RINGS {
            script
                .negotiate()
                .write(SEEN, 0)
                .queue(*size, *descriptors, *available, *used)
                .notify();
            needs_reset(&mut script);
            works(&mut script);
        }
        let kernel = script.kernel();
        let ended = Vmm::run(&kernel)
            .words("--debug-exit --rng --irqchip")
            .arg(irqchip)
            .output();
        let dots = ".".repeat(WRONGS.len() + RINGS.len());
        assert_eq!(
            String::from_utf8_lossy(&ended.stdout),
            dots,
            "{irqchip}: {}",
            ended.stderr
        );
        assert_eq!(ended.status.code(), Some(1), "{irqchip}");
        // Each is told in a line, until it has been enough.
        let lines: Vec<_> = ended.stderr.lines().collect();
        assert_eq!(lines.len(), 16, "{}", ended.stderr);
        assert!(
            lines.iter().all(|line| line.contains("rng (virtio-rng)")),
            "{lines:?}"
        );
        assert!(lines[15].contains("no more is said"), "{}", lines[15]);
    }
}

#[test]
fn an_interrupt_that_comes_while_its_pin_is_masked_is_not_lost_with_the_split_irqchip() {
    let mut script = Script::default();
    script.start();
    let redirection = 0x10 + 2 * PIN;
    for _ in 0..200 {
        script.op(Op::Ioapic(redirection, 0x1_0024)).write(SEEN, 0);
        script.request().poll_used();
        script.op(Op::Ioapic(redirection, 0x24));
        script.sleep(SEEN, 1, 1);
    }
    // And while it is masked and unmasked, without looking.
    for _ in 0..200 {
        script.write(SEEN, 0).request();
        for _ in 0..3 {
            script
                .op(Op::Ioapic(redirection, 0x1_0024))
                .op(Op::Ioapic(redirection, 0x24));
        }
        script.sleep(SEEN, 1, 1).poll_used();
    }
    let kernel = script.kernel();
    let ended = Vmm::run(&kernel)
        .words("--debug-exit --rng --irqchip split")
        .output();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    assert_eq!(ended.stderr, "");
}

#[test]
fn no_socket_is_left_behind_by_a_machine_that_has_ended() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    Vmm::boot(guests::boot::byte_and_reset64())
        .arg("--console")
        .arg(format!("unix={}", path("console")))
        .arg("--port")
        .arg(format!("name=a,unix={}", path("port")))
        .arg("--vsock")
        .arg(format!("cid=3,uds={}", path("vsock")))
        .output()
        .expect_status(0);
    let left: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
