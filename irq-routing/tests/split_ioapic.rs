// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the IOAPIC of a split irqchip promises in a VM: what it costs, who is told, and that a call
//! that fails has changed nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;

use irq_routing::fake::{Call, FakeHost};
use irq_routing::ioapic::{Redirection, SplitIoapic};
use irq_routing::{Arrival, Committed, Error, Gsi, IrqchipKind, LevelSource, Msi, Pit, Routing};

const SPLIT: IrqchipKind = IrqchipKind::Split { pins: 24 };
const KERNEL: IrqchipKind = IrqchipKind::Kernel { pit: Pit::Absent };
const MASKED: u32 = 0x1_0000;
const LEVEL: u32 = 0x8000;
const TAKEN: Arrival = Arrival::Delivered { to: 1 };

type Host = Arc<FakeHost>;

struct Rig {
    host: Host,
    routing: Routing<Host>,
    ioapic: SplitIoapic<Host>,
}

fn rig() -> Rig {
    let (host, irqchip) = FakeHost::with_irqchip(SPLIT);
    let host = Arc::new(host);
    let routing = Routing::new(Arc::clone(&host), &irqchip);
    let ioapic = SplitIoapic::new(&routing).unwrap();
    assert_eq!(host.take_calls(), [], "making the chip costs nothing");
    Rig {
        host,
        routing,
        ioapic,
    }
}

impl Rig {
    fn write(&self, pin: u32, low: u32) {
        self.ioapic.write(0x00, &(0x10 + 2 * pin).to_le_bytes());
        self.ioapic.write(0x10, &low.to_le_bytes());
    }

    fn entry(&self, pin: u32) -> Redirection {
        self.ioapic.redirection(Gsi(pin)).unwrap()
    }
}

fn msi(data: u32) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data,
        devid: None,
    }
}

#[test]
fn only_a_split_irqchip_with_enough_pins_has_one() {
    for kind in [KERNEL, IrqchipKind::None, IrqchipKind::Split { pins: 23 }] {
        let (host, irqchip) = FakeHost::with_irqchip(kind);
        let routing = Routing::new(&host, &irqchip);
        match SplitIoapic::new(&routing) {
            Err(Error::NotSplit(told)) => assert_eq!(told, kind),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_guests_whole_set_up_is_one_commit_at_the_first_level_interrupt() {
    let rig = rig();
    let gsis: Vec<_> = (0..24)
        .map(|pin| rig.routing.reserve(Gsi(pin)).unwrap())
        .collect();
    for pin in 0..24 {
        rig.write(pin, MASKED);
        rig.write(pin, (0x30 + pin) | LEVEL);
    }
    let lines: Vec<_> = gsis
        .iter()
        .map(|gsi| rig.ioapic.line(gsi).unwrap())
        .collect();
    assert_eq!(rig.host.take_calls(), []);
    for line in &lines {
        assert_eq!(line.set(true).unwrap(), TAKEN);
    }
    let calls = rig.host.take_calls();
    assert_eq!(calls[0], Call::SetGsiRouting(24));
    assert_eq!(calls[1], Call::SignalMsi(msi(0x8030)));
    assert_eq!(calls.len(), 25, "one message each: {calls:?}");
    assert!(rig.host.vm().table.map_gsi(Gsi(7)).eq([msi(0x8037).into()]));

    // Masked in its handler and unmasked after its EOI, as Linux does with threaded interrupts.
    lines[3].set(false).unwrap();
    rig.write(3, 0x33 | LEVEL | MASKED);
    rig.ioapic.eoi(0x33);
    rig.write(3, 0x33 | LEVEL);
    assert_eq!(lines[3].set(true).unwrap(), TAKEN);
    assert_eq!(rig.host.take_calls(), [Call::SignalMsi(msi(0x8033))]);
}

#[test]
fn an_edge_costs_one_message_and_no_commit() {
    let rig = rig();
    rig.write(4, 0x41);
    let gsi = rig.routing.reserve(Gsi(4)).unwrap();
    let line = rig.ioapic.line(&gsi).unwrap();
    assert_eq!(line.pulse().unwrap(), TAKEN);
    assert_eq!(rig.host.take_calls(), [Call::SignalMsi(msi(0x41))]);
    rig.write(4, 0x42);
    assert_eq!(line.pulse().unwrap(), TAKEN);
    assert_eq!(rig.host.take_calls(), [Call::SignalMsi(msi(0x42))]);
    // Through the trait that does not say which controller it is.
    let line: &dyn LevelSource = &line;
    line.set(true).unwrap();
    assert_eq!(line.set(true).unwrap(), Arrival::Coalesced);
    assert_eq!(rig.ioapic.coalesced(Gsi(4)), 1);
}

#[test]
fn a_masked_pin_keeps_its_route_until_its_eoi() {
    let rig = rig();
    rig.write(5, 0x51 | LEVEL);
    let gsi = rig.routing.reserve(Gsi(5)).unwrap();
    let line = rig.ioapic.line(&gsi).unwrap();
    line.set(true).unwrap();
    line.set(false).unwrap();
    rig.write(5, 0x51 | LEVEL | MASKED);
    assert_eq!(rig.routing.flush().unwrap(), Committed::Unchanged);
    assert_eq!(rig.host.vm().table.len(), 1);
    rig.ioapic.eoi(0x51);
    assert_eq!(
        rig.routing.flush().unwrap(),
        Committed::Written { entries: 0 }
    );
}

#[test]
fn a_pin_with_an_irqfd_is_routed_while_it_is_unmasked() {
    let rig = rig();
    let gsi = rig.routing.reserve(Gsi(4)).unwrap();
    let source = rig.routing.source(&gsi);
    source.enable().unwrap();
    assert_eq!(rig.host.take_calls(), [Call::AttachIrqfd(Gsi(4))]);
    rig.write(4, 0x41);
    assert_eq!(rig.host.take_calls(), [Call::SetGsiRouting(1)]);
    rig.write(4, 0x41 | 1 << 13);
    assert_eq!(rig.host.take_calls(), [], "polarity is in no message");
    rig.write(4, 0x41 | MASKED);
    assert_eq!(rig.host.take_calls(), [Call::SetGsiRouting(0)]);
    drop(source);
    assert_eq!(rig.host.take_calls(), [Call::DetachIrqfd(Gsi(4))]);
    rig.write(4, 0x41);
    assert_eq!(rig.host.take_calls(), [], "no irqfd, no commit");
    drop(gsi);

    // The next owner of the pin finds the guest's route, not an empty one.
    let gsi = rig.routing.reserve(Gsi(4)).unwrap();
    let irqfd = rig.routing.irqfd(&gsi).unwrap();
    let attach = [Call::SetGsiRouting(1), Call::AttachIrqfd(Gsi(4))];
    assert_eq!(rig.host.take_calls(), attach);
    // Detached, it waits for no commit either.
    let detached = irqfd.detach().unwrap();
    rig.host.take_calls();
    rig.write(4, 0x42);
    assert_eq!(rig.host.take_calls(), []);
    let _irqfd = detached.attach().unwrap();
    assert_eq!(rig.host.take_calls(), attach);
}

#[test]
fn a_refused_attach_leaves_the_pin_without_an_irqfd() {
    let rig = rig();
    let gsi = rig.routing.reserve(Gsi(4)).unwrap();
    rig.host.fail_after(0, libc::EBUSY);
    assert!(matches!(rig.routing.irqfd(&gsi), Err(Error::Attach { .. })));
    rig.host.take_calls();
    rig.write(4, 0x41);
    assert_eq!(rig.host.take_calls(), []);
}

#[test]
fn a_level_that_fails_to_arrive_changes_nothing_whichever_ioctl_fails() {
    for failing in 0..2 {
        let rig = rig();
        rig.write(5, 0x51 | LEVEL);
        let gsi = rig.routing.reserve(Gsi(5)).unwrap();
        let line = rig.ioapic.line(&gsi).unwrap();
        let before = (rig.ioapic.state(), rig.host.vm());
        rig.host.fail_after(failing, libc::ENOMEM);
        let error = line.set(true).unwrap_err();
        match failing {
            0 => {
                assert!(matches!(error, Error::SetRouting { .. }), "{error}");
                assert_eq!(rig.host.vm(), before.1);
            }
            _ => assert!(matches!(error, Error::SignalMsi { .. }), "{error}"),
        }
        assert_eq!(rig.ioapic.state(), before.0);
        assert!(rig.ioapic.take_error().is_none(), "the caller was told");
        assert_eq!(line.set(true).unwrap(), TAKEN);
        assert!(rig.entry(5).remote_irr());
        line.set(false).unwrap();
        assert_eq!(rig.ioapic.state().lines, 0, "one source, not two");
    }
}

#[test]
fn what_fails_on_the_guests_behalf_is_told_and_tried_again() {
    for failing in 0..2 {
        let rig = rig();
        let gsi = rig.routing.reserve(Gsi(5)).unwrap();
        let line = rig.ioapic.line(&gsi).unwrap();
        assert_eq!(line.set(true).unwrap(), Arrival::Masked);
        rig.host.fail_after(failing, libc::ENOMEM);
        rig.write(5, 0x51 | LEVEL);
        assert!(!rig.entry(5).remote_irr(), "no one has it");
        assert!(rig.ioapic.take_error().is_some());
        assert!(rig.ioapic.take_error().is_none());
        rig.ioapic.eoi(0x51);
        assert!(rig.entry(5).remote_irr(), "it was still pending");
        assert!(rig.ioapic.take_error().is_none());
    }
}

#[test]
fn a_message_that_no_apic_takes_stays_pending() {
    let rig = rig();
    let gsi = rig.routing.reserve(Gsi(5)).unwrap();
    let line = rig.ioapic.line(&gsi).unwrap();
    rig.write(5, 0x51 | LEVEL);
    rig.host.set_status(0);
    assert_eq!(line.set(true).unwrap(), Arrival::Masked);
    assert!(!rig.entry(5).remote_irr());
    rig.host.set_status(1);
    assert_eq!(line.set(true).unwrap(), TAKEN);
}

#[test]
fn a_line_is_high_while_any_source_is() {
    let rig = rig();
    rig.write(5, 0x51 | LEVEL);
    let gsi = rig.routing.reserve(Gsi(5)).unwrap();
    let [one, two] = [(), ()].map(|()| rig.ioapic.line(&gsi).unwrap());
    let high = || rig.ioapic.state().lines & 1 << 5 != 0;
    one.set(true).unwrap();
    two.set(true).unwrap();
    two.set(true).unwrap();
    one.set(false).unwrap();
    one.set(false).unwrap();
    assert!(high());
    two.set(false).unwrap();
    assert!(!high());
    two.set(true).unwrap();
    drop(two);
    assert!(!high());
    let other = self::rig();
    let foreign = other.ioapic.line(&gsi);
    assert!(matches!(foreign, Err(Error::ForeignGsi(Gsi(5)))));
    let none = rig.ioapic.line(&rig.routing.allocate().unwrap());
    assert!(matches!(none, Err(Error::NoPin(Gsi(24)))));
}

#[test]
fn notifiers_come_and_go_at_any_time_and_from_inside() {
    let rig = rig();
    let (five, six) = (Gsi(5), Gsi(6));
    rig.write(5, 0x51 | LEVEL);
    rig.write(6, 0x51 | LEVEL);
    let gsi = rig.routing.reserve(five).unwrap();
    let line = Arc::new(rig.ioapic.line(&gsi).unwrap());
    line.set(true).unwrap();
    assert!(!rig.ioapic.has_ack_notifier(five));

    // The first one lowers the line, registers a second and unregisters itself.
    let told = Arc::new(Mutex::new(Vec::new()));
    let own = Arc::new(Mutex::new(None));
    let second = Arc::new(Mutex::new(None));
    let call = {
        let (ioapic, told) = (rig.ioapic.clone(), Arc::clone(&told));
        let (own, second) = (Arc::clone(&own), Arc::clone(&second));
        move || {
            told.lock().unwrap().push("first");
            line.set(false).unwrap();
            let told = Arc::clone(&told);
            let again = move || told.lock().unwrap().push("second");
            *second.lock().unwrap() = Some(ioapic.register_ack_notifier(five, again).unwrap());
            drop(own.lock().unwrap().take());
        }
    };
    let first = rig.ioapic.register_ack_notifier(five, call).unwrap();
    assert_eq!(first.gsi(), five);
    *own.lock().unwrap() = Some(first);
    rig.host.take_calls();
    rig.ioapic.eoi(0x51);
    assert_eq!(*told.lock().unwrap(), ["first"]);
    assert_eq!(rig.host.take_calls(), [], "the line was lowered in time");
    rig.ioapic.eoi(0x51);
    assert_eq!(*told.lock().unwrap(), ["first", "second"]);
    assert!(rig.ioapic.has_ack_notifier(five) && !rig.ioapic.has_ack_notifier(six));
    drop(second.lock().unwrap().take());
    assert!(!rig.ioapic.has_ack_notifier(five));
    rig.ioapic.eoi(0x51);
    // The EOI register is the same; a vector that no level-triggered pin has is no one's.
    rig.ioapic.write(0x40, &0x51u32.to_le_bytes());
    rig.ioapic.eoi(0x77);
    assert_eq!(told.lock().unwrap().len(), 2);
    let none = rig.ioapic.register_ack_notifier(Gsi(24), || {});
    assert!(matches!(none, Err(Error::NoPin(Gsi(24)))));
}

#[test]
fn a_notifier_that_another_removed_is_not_called() {
    let rig = rig();
    rig.write(5, 0x51 | LEVEL);
    let second = Arc::new(Mutex::new(None));
    let remove = {
        let second = Arc::clone(&second);
        move || drop(second.lock().unwrap().take())
    };
    let _first = rig.ioapic.register_ack_notifier(Gsi(5), remove).unwrap();
    let never = rig
        .ioapic
        .register_ack_notifier(Gsi(5), || panic!("it is no more"));
    *second.lock().unwrap() = Some(never.unwrap());
    rig.ioapic.eoi(0x51);
    assert!(rig.ioapic.has_ack_notifier(Gsi(5)));
}

#[test]
fn mask_notifiers_are_told_of_changes_alone() {
    let rig = rig();
    let told = Arc::new(Mutex::new(Vec::new()));
    let call = {
        let told = Arc::clone(&told);
        move |masked| told.lock().unwrap().push(masked)
    };
    let notifier = rig.ioapic.register_mask_notifier(Gsi(2), call).unwrap();
    assert!(rig.ioapic.has_mask_notifier(Gsi(2)) && !rig.ioapic.has_mask_notifier(Gsi(3)));
    for low in [MASKED, 0x31, 0x32, 0x32 | MASKED, 0x33 | MASKED, 0x33] {
        rig.write(2, low);
        rig.write(3, low);
    }
    assert_eq!(*told.lock().unwrap(), [false, true, false]);
    drop(notifier);
    rig.write(2, MASKED);
    assert_eq!(told.lock().unwrap().len(), 3);
    assert!(!rig.ioapic.has_mask_notifier(Gsi(2)));
    assert!(rig.ioapic.register_mask_notifier(Gsi(24), |_| {}).is_err());
}

#[test]
fn an_unregistered_notifier_is_not_under_way_any_more() {
    let rig = rig();
    rig.write(5, 0x51 | LEVEL);
    let (entered, is_entered) = channel();
    let (go_on, may_go_on) = channel::<()>();
    let may_go_on = Mutex::new(may_go_on);
    let ended = Arc::new(AtomicUsize::new(0));
    let call = {
        let ended = Arc::clone(&ended);
        move || {
            entered.send(()).unwrap();
            may_go_on.lock().unwrap().recv().unwrap();
            ended.fetch_add(1, Ordering::SeqCst);
        }
    };
    let notifier = rig.ioapic.register_ack_notifier(Gsi(5), call).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| rig.ioapic.eoi(0x51));
        is_entered.recv().unwrap();
        let remover = scope.spawn(|| {
            drop(notifier);
            ended.load(Ordering::SeqCst)
        });
        // The remover waits, or has not begun: either way it is not done before the call is.
        while rig.ioapic.has_ack_notifier(Gsi(5)) {
            thread::yield_now();
        }
        let waits = !remover.is_finished();
        go_on.send(()).unwrap();
        assert_eq!(remover.join().unwrap(), 1);
        assert!(waits);
    });
}

#[test]
fn a_restored_chip_goes_on_where_it_was() {
    let rig = rig();
    // Pin 5 is being handled, pin 6 waits masked, pin 7 was refused.
    for (pin, vector) in [(5, 0x51), (6, 0x52), (7, 0x53)] {
        rig.write(pin, vector | LEVEL);
    }
    rig.write(6, 0x52 | LEVEL | MASKED);
    let gsis = [5, 6, 7].map(|pin| rig.routing.reserve(Gsi(pin)).unwrap());
    let lines = [0, 1, 2].map(|at| rig.ioapic.line(&gsis[at]).unwrap());
    lines[0].set(true).unwrap();
    lines[1].set(true).unwrap();
    rig.host.set_status(-1);
    lines[2].set(true).unwrap();
    let state = rig.ioapic.state();

    let new = self::rig();
    new.ioapic.restore(&state).unwrap();
    assert_eq!(new.host.take_calls(), []);
    assert_eq!(new.ioapic.state(), state);
    let gsis = [5, 6, 7].map(|pin| new.routing.reserve(Gsi(pin)).unwrap());
    let lines = [0, 1, 2].map(|at| new.ioapic.line(&gsis[at]).unwrap());
    assert_eq!(
        new.host.take_calls(),
        [Call::SetGsiRouting(2)],
        "KVM must know of the EOI that is outstanding"
    );
    new.ioapic.redeliver().unwrap();
    assert_eq!(new.host.take_calls(), [Call::SignalMsi(msi(0x8053))]);
    // A device that is not high any more says so.
    lines[0].set(false).unwrap();
    new.ioapic.eoi(0x51);
    assert_eq!(new.host.take_calls(), []);
    lines[1].set(true).unwrap();
    new.write(6, 0x52 | LEVEL);
    let calls = new.host.take_calls();
    assert_eq!(calls.last(), Some(&Call::SignalMsi(msi(0x8052))));

    let mut bad = state;
    bad.id = 16;
    let before = new.ioapic.state();
    assert!(new.ioapic.restore(&bad).is_err());
    assert_eq!(new.ioapic.state(), before);
    new.ioapic.reset();
    assert_eq!(new.entry(6), Redirection::RESET);
}

#[test]
fn an_eoi_that_is_outstanding_is_committed_for_lines_that_were_there_before() {
    let rig = rig();
    rig.write(5, 0x51 | LEVEL);
    let gsi = rig.routing.reserve(Gsi(5)).unwrap();
    let line = rig.ioapic.line(&gsi).unwrap();
    line.set(true).unwrap();
    let state = rig.ioapic.state();

    let new = self::rig();
    let gsi = new.routing.reserve(Gsi(5)).unwrap();
    let _line = new.ioapic.line(&gsi).unwrap();
    new.ioapic.restore(&state).unwrap();
    assert_eq!(new.host.take_calls(), []);
    new.host.fail_after(0, libc::ENOMEM);
    let refused = new.ioapic.redeliver();
    assert!(matches!(refused, Err(Error::SetRouting { .. })));
    new.host.take_calls();
    new.ioapic.redeliver().unwrap();
    assert_eq!(new.host.take_calls(), [Call::SetGsiRouting(1)]);
}

#[test]
fn redelivering_tells_what_failed() {
    let rig = rig();
    rig.write(7, 0x53 | LEVEL);
    let gsi = rig.routing.reserve(Gsi(7)).unwrap();
    let line = rig.ioapic.line(&gsi).unwrap();
    rig.host.set_status(0);
    line.set(true).unwrap();
    rig.host.set_status(1);
    rig.host.fail_after(0, libc::ENOMEM);
    assert!(matches!(
        rig.ioapic.redeliver(),
        Err(Error::SignalMsi { .. })
    ));
    assert!(!rig.entry(7).remote_irr());
    rig.ioapic.redeliver().unwrap();
    assert!(rig.entry(7).remote_irr());
}

#[test]
fn guests_with_32_bit_apic_ids_reach_them() {
    let (host, irqchip) = FakeHost::with_irqchip(SPLIT);
    let mut rules = *Routing::new(&host, &irqchip).rules();
    rules.x2apic_ids = true;
    let routing = Routing::with_rules(&host, rules);
    let ioapic = SplitIoapic::new(&routing).unwrap();
    ioapic.write(0x00, &[0x13]);
    ioapic.write(0x10, &0x0102_0000u32.to_le_bytes());
    ioapic.write(0x00, &[0x12]);
    ioapic.write(0x10, &0x8051u32.to_le_bytes());
    let gsi = routing.reserve(Gsi(1)).unwrap();
    assert_eq!(ioapic.line(&gsi).unwrap().set(true).unwrap(), TAKEN);
    let message = Msi {
        address: 0x0000_0100_fee0_1000,
        ..msi(0x8051)
    };
    assert_eq!(host.take_calls()[1], Call::SignalMsi(message));
}

#[test]
fn threads_lose_no_level_interrupt() {
    let rig = rig();
    rig.write(5, 0x51 | LEVEL);
    let gsi = rig.routing.reserve(Gsi(5)).unwrap();
    thread::scope(|scope| {
        for _ in 0..2 {
            let line = rig.ioapic.line(&gsi).unwrap();
            scope.spawn(move || {
                for _ in 0..500 {
                    line.set(true).unwrap();
                    line.set(false).unwrap();
                }
                line.set(true).unwrap();
                // Stays high: the pin must interrupt.
                std::mem::forget(line);
            });
        }
        scope.spawn(|| (0..500).for_each(|_| rig.ioapic.eoi(0x51)));
        scope.spawn(|| {
            for _ in 0..500 {
                rig.write(5, 0x51 | LEVEL | MASKED);
                rig.write(5, 0x51 | LEVEL);
            }
        });
    });
    assert!(rig.entry(5).remote_irr());
    assert!(rig.ioapic.take_error().is_none());
}

#[cfg(feature = "vm-device")]
#[test]
fn it_is_registered_at_its_place_without_glue() {
    use irq_routing::ioapic::{IOAPIC_BASE, IOAPIC_LEN};
    use vm_device::bus::{MmioAddress, MmioRange};
    use vm_device::device_manager::{IoManager, MmioManager};
    let rig = rig();
    let mut bus = IoManager::new();
    let range = MmioRange::new(MmioAddress(IOAPIC_BASE), IOAPIC_LEN).unwrap();
    bus.register_mmio(range, Arc::new(rig.ioapic.clone()))
        .unwrap();
    let at = |offset| MmioAddress(IOAPIC_BASE + offset);
    bus.mmio_write(at(0x00), &[1, 0, 0, 0]).unwrap();
    let mut data = [0; 4];
    bus.mmio_read(at(0x10), &mut data).unwrap();
    assert_eq!(u32::from_le_bytes(data), 0x0017_0020);
}

#[cfg(feature = "vm-superio")]
#[test]
fn a_line_is_a_trigger_of_vm_superio() {
    use vm_superio::Trigger;
    let rig = rig();
    rig.write(4, 0x41);
    let gsi = rig.routing.reserve(Gsi(4)).unwrap();
    let line = rig.ioapic.line(&gsi).unwrap();
    Trigger::trigger(&line).unwrap();
    assert_eq!(rig.host.take_calls(), [Call::SignalMsi(msi(0x41))]);
}

#[test]
fn sources_of_a_line_of_the_kernels_are_ored_too() {
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    let routing = Routing::new(&host, &irqchip);
    let gsi = routing.reserve(Gsi(10)).unwrap();
    let line = routing.line(&gsi).unwrap();
    line.set(true).unwrap();
    let shared = line.share().unwrap();
    assert_eq!(shared.gsi().gsi(), Gsi(10));
    host.take_calls();
    let [one, two] = [(), ()].map(|()| shared.source());
    one.set(true).unwrap();
    host.set_status(0);
    assert_eq!(two.set(true).unwrap(), Arrival::Coalesced);
    host.set_status(1);
    assert_eq!(one.set(false).unwrap(), TAKEN);
    let up = Call::SetIrqLine(Gsi(10), true);
    assert_eq!(host.take_calls(), [up, up], "the other holds it");
    // A level that KVM refuses is not the source's.
    host.fail_after(0, libc::EINVAL);
    assert!(two.line().gsi().gsi() == Gsi(10) && two.set(false).is_err());
    one.set(true).unwrap();
    one.set(false).unwrap();
    assert!(host.vm().lines[&Gsi(10)], "two is still high");
    drop(two);
    assert!(!host.vm().lines[&Gsi(10)]);
    drop((one, shared));

    // A line that cannot be lowered is given back, high.
    let line = routing.line(&gsi).unwrap();
    line.set(true).unwrap();
    host.fail_after(0, libc::EINVAL);
    let (line, error) = line.share().unwrap_err();
    assert!(matches!(error, Error::Line { .. }));
    assert!(host.vm().lines[&Gsi(10)]);
    drop(line);
    assert!(!host.vm().lines[&Gsi(10)]);
}
