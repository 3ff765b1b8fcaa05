// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtio device on the MMIO bus (virtio 1.2, 4.2): registers, the handlers' threads, reset and rest.
//!
//! ```text
//!   vCPU thread ── register access ──► Registers ──► Effect
//!                                                      │ Activate: queues, doorbells, a thread for each handler
//!   KVM: ioeventfd ──────────────► DeviceQueue ──► Handler ──► DriverLink ──► irqfd
//!                                                      │ Reset, pause: each rests; the last one
//!                                                      ▼ retires the device and answers who waits
//! ```
//!
//! A reset waits for I/O that cannot be called back, and so does a queue's stop. The vCPU that wrote the register waits for it as for any deferred
//! access, so that the machine can be stopped meanwhile; no lock is held.
//!
//! # Locks
//! One, the device's registers and phase. It is held while the device is activated, and never while a thread is waited
//! for. The interrupt status needs none.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use io_bus::{Answer, At, Completion, Deferral, IoDevice, defer};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_STATUS,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, Permissions};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Activation, Assignment, Ram, VirtioDevice};
use super::fault::{Complaints, Fault};
use super::interrupt::DriverLink;
use super::queue::DeviceQueue;
use super::registers::{
    CONFIG, Effect, NEEDS_RESET, Offer, QueueSetup, Registers, TRANSPORT_FEATURES,
};
use super::worker::{Job, Rested, Worker};

/// What signals a queue's eventfd when the driver notifies: KVM's ioeventfds.
pub trait Doorbells: Send + Sync {
    /// Has the driver's notification of `queue` signal `event`, until what it gives is dropped.
    ///
    /// # Errors
    /// The host's. The device works all the same: the notification leaves the guest then.
    fn attach(&self, queue: u16, event: &EventFd) -> Result<Box<dyn Send>, io_bus::Error>;
}

/// No ioeventfds: each notification is an access of a vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDoorbells;

impl Doorbells for NoDoorbells {
    fn attach(&self, _: u16, _: &EventFd) -> Result<Box<dyn Send>, io_bus::Error> {
        Ok(Box::new(()))
    }
}

/// Where in a machine a device is.
pub struct Place {
    /// For people, unique in the machine: `disk0`. Its threads have it as their name.
    pub name: String,
    /// Guest memory.
    pub ram: Ram,
    /// The device's interrupt.
    pub driver: DriverLink,
    /// Notifications without exits.
    pub doorbells: Box<dyn Doorbells>,
}

/// A [`VirtioDevice`] with its registers. Clones are the same device.
pub struct MmioDevice<D: VirtioDevice>(Arc<Shared<D>>);

/// A device as plain data, at rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState<S> {
    /// What the driver has written.
    pub registers: Registers,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub generation: u32,
    /// The device had failed.
    pub needs_reset: bool,
    /// Where each queue is.
    pub positions: Vec<Position>,
    /// The device's own.
    pub device: S,
}

/// How far a queue has come, counted by the ring's free-running indices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The next available entry.
    pub next_avail: u16,
    /// The next used entry.
    pub next_used: u16,
}

struct Shared<D: VirtioDevice> {
    place: Place,
    complaints: Complaints,
    inner: Mutex<Inner<D>>,
    /// A phase has ended.
    rested: Condvar,
}

struct Inner<D: VirtioDevice> {
    device: D,
    registers: Registers,
    /// Of the queues, where the phase is not [`Phase::Serving`].
    positions: Vec<Position>,
    /// Of the queues, from the driver's first being ready to the device's end. A pause keeps them, for what the driver
    /// notifies of meanwhile; and so does a reset: if KVM refused to detach one, it would refuse the next one for that
    /// queue, and go on to signal an eventfd that nobody listens to any more.
    bells: Vec<Bell>,
    phase: Phase<D::Handler>,
}

struct Bell {
    event: EventFd,
    /// Kept for its drop, which detaches it.
    doorbell: Option<Box<dyn Send>>,
    /// The host was asked for it since the last reset.
    asked: bool,
}

enum Phase<H> {
    /// No thread runs: before the driver is ready, after a reset, or at rest.
    Idle,
    Serving(Serving<H>),
}

struct Serving<H> {
    workers: Vec<Worker>,
    /// Handlers that have rested, by their place in the activation.
    rested: Vec<Option<Rested<H>>>,
    /// It is to be reset then.
    reset: bool,
    /// A pause has told the handlers to rest.
    resting: bool,
    /// It is to go on then: that pause was given up.
    go_on: bool,
    /// The driver's writes that wait for the rest.
    waiting: Vec<Completion>,
}

impl<H> Serving<H> {
    /// Has the handlers rest: a write of the driver's is answered when they do.
    fn wait_for_rest(&mut self) -> Deferral {
        self.workers.iter().for_each(Worker::rest);
        let (completion, deferral) = defer();
        self.waiting.push(completion);
        deferral
    }
}

impl<D: VirtioDevice> MmioDevice<D> {
    /// A device after reset.
    pub fn new(device: D, place: Place) -> Self {
        let queues = device.queue_sizes().len();
        let (registers, positions) = (Registers::new(queues), vec![Position::default(); queues]);
        Self::in_place(device, place, registers, positions)
    }

    /// A device at rest, in this state; `device` has been made from `state.device`. [`resume`](Self::resume) sets it
    /// going.
    pub fn from_state(device: D, place: Place, state: &MmioState<D::State>) -> Self {
        let queues = device.queue_sizes().len();
        let MmioState {
            registers,
            interrupt_status,
            generation,
            needs_reset,
            positions,
            ..
        } = state;
        place
            .driver
            .restore(*interrupt_status, *needs_reset, *generation);
        let mut positions = positions.clone();
        positions.resize(queues, Position::default());
        let registers = registers.clone().with_queues(queues);
        Self::in_place(device, place, registers, positions)
    }

    fn in_place(device: D, place: Place, registers: Registers, positions: Vec<Position>) -> Self {
        MmioDevice(Arc::new(Shared {
            complaints: Complaints::of(&place.name, D::NAME),
            place,
            inner: Mutex::new(Inner {
                device,
                registers,
                positions,
                bells: Vec::new(),
                phase: Phase::Idle,
            }),
            rested: Condvar::new(),
        }))
    }

    /// Has all handlers rest, and waits for it, up to `patience`. False: some I/O would not end; the device rests when
    /// it has, unless it is [resumed](Self::resume).
    pub fn pause(&self, patience: Duration) -> bool {
        let begin = Instant::now();
        let mut inner = self.0.lock();
        loop {
            let Phase::Serving(serving) = &mut inner.phase else {
                return true;
            };
            (serving.resting, serving.go_on) = (true, false);
            serving.workers.iter().for_each(Worker::rest);
            let left = patience.saturating_sub(begin.elapsed());
            if left.is_zero() {
                return false;
            }
            let waited = self.0.rested.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Goes on after a [`pause`](Self::pause), or after [`from_state`](Self::from_state). After a pause that has not
    /// come to its end: when it has.
    pub fn resume(&self) {
        let mut inner = self.0.lock();
        match &mut inner.phase {
            Phase::Idle => self.0.go_on(&mut inner),
            // Its handlers may have been told to rest, which is not taken back.
            Phase::Serving(serving) => serving.go_on = serving.resting,
        }
    }

    /// The device as data; none while it is not at rest.
    pub fn state(&self) -> Option<MmioState<D::State>> {
        let inner = self.0.lock();
        let driver = &self.0.place.driver;
        matches!(inner.phase, Phase::Idle).then(|| MmioState {
            registers: inner.registers.clone(),
            interrupt_status: driver.status(),
            generation: driver.generation(),
            needs_reset: driver.is_reset_needed(),
            positions: inner.positions.clone(),
            device: inner.device.state(),
        })
    }

    /// Has the host keep what it has of the guest's ([`VirtioDevice::make_durable`]), if the device is at rest. Blocks for
    /// the host's I/O.
    ///
    /// # Errors
    /// The host's.
    pub fn make_durable(&self) -> std::io::Result<()> {
        let inner = self.0.lock();
        match inner.phase {
            Phase::Idle => inner.device.make_durable(),
            Phase::Serving(_) => Ok(()),
        }
    }

    /// [`VirtioDevice::let_go`], if the device is at rest.
    ///
    /// # Errors
    /// The host's, or `ResourceBusy`: it is not at rest. Nothing was let go.
    pub fn let_go(&self) -> std::io::Result<()> {
        let inner = self.0.lock();
        match inner.phase {
            Phase::Idle => inner.device.let_go(),
            Phase::Serving(_) => Err(std::io::ErrorKind::ResourceBusy.into()),
        }
    }

    /// [`VirtioDevice::take_back`].
    ///
    /// # Errors
    /// As there.
    pub fn take_back(&self) -> std::io::Result<()> {
        self.0.lock().device.take_back()
    }

    /// [`VirtioDevice::announce`], if the device is at rest.
    pub fn announce(&self) {
        let inner = self.0.lock();
        if let Phase::Idle = inner.phase {
            inner.device.announce();
        }
    }

    /// The process ends, and this is not dropped: what would outlast it is removed, if the device is at rest.
    pub fn leave(&self) {
        let mut inner = self.0.lock();
        if matches!(inner.phase, Phase::Idle) {
            inner.device.leave();
        }
    }

    /// Its name in the machine.
    pub fn name(&self) -> &str {
        &self.0.place.name
    }

    /// Its way to the driver, for who unmasks its interrupt.
    pub fn driver(&self) -> &DriverLink {
        &self.0.place.driver
    }
}

impl<D: VirtioDevice> Shared<D> {
    fn lock(&self) -> MutexGuard<'_, Inner<D>> {
        // A device that panicked is in some state all the same, and its driver may reset it.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// At rest, goes on if the driver is ready.
    fn go_on(self: &Arc<Self>, inner: &mut Inner<D>) {
        if inner.registers.is_active() {
            // A device that failed stays so until its reset.
            if !self.place.driver.is_reset_needed() {
                self.activate(inner);
            }
            // What was told before the pause may have been lost with the interrupt controller's state.
            self.place.driver.repeat();
        }
    }

    /// The driver is ready, or its device goes on.
    fn activate(self: &Arc<Self>, inner: &mut Inner<D>) {
        if let Err(fault) = self.try_activate(inner) {
            self.complaints.line(
                log::Level::Error,
                format_args!(
                    "cannot be started for its driver, which has to reset it: {}",
                    crate::end::Chain(&fault)
                ),
            );
            self.place.driver.needs_reset();
        }
    }

    fn try_activate(self: &Arc<Self>, inner: &mut Inner<D>) -> Result<(), Fault> {
        let host = |what| move |source| Fault::Host { what, source };
        let features = inner.registers.driver_features();
        // Checked when the driver settled them; a state from elsewhere has them from another device.
        let foreign = features & !offer(&inner.device).features;
        if foreign != 0 {
            let text =
                format!("features {foreign:#x} are settled, and this device has none of them");
            return Err(Fault::Driver(text));
        }
        let sizes = inner.device.queue_sizes().iter();
        let mut rings = Vec::with_capacity(sizes.len());
        let setups = inner.registers.queues().iter().zip(&inner.positions);
        for ((number, most), (setup, position)) in (0..).zip(sizes).zip(setups) {
            rings.push(self.queue(number, *most, setup, *position, features)?);
        }
        self.hang_bells(&mut inner.bells, rings.len())?;
        let mut queues = Vec::with_capacity(rings.len());
        for ((number, ring), bell) in (0..).zip(rings).zip(&inner.bells) {
            let notified = bell.event.try_clone();
            let notified = notified.map_err(host("duplicate an eventfd"))?;
            queues.push(Some(DeviceQueue::new(number, ring, notified)));
        }
        let activation = Activation::new(features, self.place.driver.clone());
        let assignments = inner.device.activate(&activation)?;
        self.start(inner, assignments, queues);
        Ok(())
    }

    /// An eventfd for each queue, which KVM signals; those that are there stay.
    fn hang_bells(&self, bells: &mut Vec<Bell>, queues: usize) -> Result<(), Fault> {
        while bells.len() < queues {
            let event = EventFd::new(EFD_NONBLOCK).map_err(|source| Fault::Host {
                what: "make an eventfd",
                source,
            })?;
            bells.push(Bell {
                event,
                doorbell: None,
                asked: false,
            });
        }
        for (number, bell) in (0..).zip(bells) {
            if bell.doorbell.is_some() || std::mem::replace(&mut bell.asked, true) {
                continue;
            }
            match self.place.doorbells.attach(number, &bell.event) {
                Ok(doorbell) => bell.doorbell = Some(doorbell),
                Err(error) => self.complaints.line(
                    log::Level::Warn,
                    format_args!(
                        "has notifications of queue {number} that cost an exit: {}",
                        crate::end::Chain(&error)
                    ),
                ),
            }
        }
        Ok(())
    }

    /// The ring that the driver has set up.
    fn queue(
        &self,
        number: u16,
        most: u16,
        setup: &QueueSetup,
        position: Position,
        features: u64,
    ) -> Result<Queue, Fault> {
        let failed = |source| Fault::Queue {
            queue: number,
            source,
        };
        let mut queue = Queue::new(most).map_err(failed)?;
        if !setup.ready {
            return Ok(queue);
        }
        queue.try_set_size(setup.size).map_err(failed)?;
        let [descriptors, available, used] =
            [setup.descriptors, setup.driver, setup.device].map(GuestAddress);
        let set = queue.try_set_desc_table_address(descriptors);
        set.map_err(failed)?;
        queue
            .try_set_avail_ring_address(available)
            .map_err(failed)?;
        queue.try_set_used_ring_address(used).map_err(failed)?;
        if setup.driver == 0 {
            let text = format!("queue {number}: an available ring at address 0 cannot be used");
            return Err(Fault::Driver(text));
        }
        let size = u64::from(setup.size);
        let memory = self.place.ram.memory();
        // Lengths as in 2.7, with the word for the event index. The driver writes two of them, the device one.
        for (ring, address, len, written) in [
            ("descriptor table", descriptors, 16 * size, false),
            ("available ring", available, 6 + 2 * size, false),
            ("used ring", used, 6 + 8 * size, true),
        ] {
            let access = match written {
                true => Permissions::Write,
                false => Permissions::Read,
            };
            if !memory.check_range(address, len as usize, access) {
                return Err(Fault::Ring {
                    queue: number,
                    ring,
                    address,
                    len,
                    written,
                });
            }
        }
        queue.set_event_idx(features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1);
        queue.set_next_avail(position.next_avail);
        queue.set_next_used(position.next_used);
        queue.set_ready(true);
        Ok(queue)
    }

    /// Starts the handlers' threads. One that cannot be started has the others rest.
    fn start(
        self: &Arc<Self>,
        inner: &mut Inner<D>,
        assignments: Vec<Assignment<D::Handler>>,
        mut queues: Vec<Option<DeviceQueue>>,
    ) {
        let mut serving = Serving {
            workers: Vec::with_capacity(assignments.len()),
            rested: Vec::new(),
            reset: false,
            resting: false,
            go_on: false,
            waiting: Vec::new(),
        };
        serving.rested.resize_with(assignments.len(), || None);
        let (single, mut failed) = (assignments.len() == 1, false);
        for (
            at,
            Assignment {
                queues: of,
                handler,
            },
        ) in assignments.into_iter().enumerate()
        {
            let shared = Arc::downgrade(self);
            let name = &self.place.name;
            let job = Job {
                name: if single {
                    name.clone()
                } else {
                    format!("{name}.{at}")
                },
                complaints: self.complaints.clone(),
                handler,
                queues: of
                    .iter()
                    .filter_map(|number| queues.get_mut(usize::from(*number))?.take())
                    .collect(),
                ram: self.place.ram.clone(),
                driver: self.place.driver.clone(),
                at_rest: Box::new(move |rested| {
                    // Gone: the device was dropped meanwhile.
                    if let Some(shared) = shared.upgrade() {
                        shared.at_rest(at, rested);
                    }
                }),
            };
            match Worker::start(job) {
                Ok(worker) => serving.workers.push(worker),
                Err((fault, rested)) => {
                    self.complaints.line(
                        log::Level::Error,
                        format_args!("needs a reset by its driver: {}", crate::end::Chain(&fault)),
                    );
                    serving.rested[at] = Some(rested);
                    failed = true;
                }
            }
        }
        if failed {
            serving.workers.iter().for_each(Worker::rest);
            self.place.driver.needs_reset();
        }
        inner.phase = Phase::Serving(serving);
        // Where no thread could be started nobody else ends the phase.
        self.end_phase(inner);
    }

    /// On a handler's thread, as its last act.
    fn at_rest(self: &Arc<Self>, at: usize, rested: Rested<D::Handler>) {
        let mut inner = self.lock();
        if let Phase::Serving(serving) = &mut inner.phase {
            serving.rested[at] = Some(rested);
        }
        self.end_phase(&mut inner);
    }

    /// If all have rested, the device is retired, and who waits for that is answered.
    fn end_phase(self: &Arc<Self>, inner: &mut Inner<D>) {
        let Phase::Serving(serving) = &inner.phase else {
            return;
        };
        if serving.rested.iter().any(Option::is_none) {
            return;
        }
        let Phase::Serving(serving) = std::mem::replace(&mut inner.phase, Phase::Idle) else {
            return;
        };
        let mut handlers = Vec::with_capacity(serving.rested.len());
        for rested in serving.rested.into_iter().flatten() {
            for queue in &rested.queues {
                let state = queue.state();
                if let Some(position) = inner.positions.get_mut(usize::from(queue.number())) {
                    *position = Position {
                        next_avail: state.next_avail,
                        next_used: state.next_used,
                    };
                }
            }
            handlers.push(rested.handler);
        }
        inner.device.retire(handlers);
        if serving.reset {
            self.reset(inner);
        }
        for waiting in serving.waiting {
            waiting.complete(&[]);
        }
        if serving.go_on {
            self.go_on(inner);
        }
        self.rested.notify_all();
    }

    /// No handler runs.
    fn reset(&self, inner: &mut Inner<D>) {
        inner.registers.reset();
        inner.positions.fill(Position::default());
        // A host that refused one may have it now.
        inner.bells.iter_mut().for_each(|bell| bell.asked = false);
        inner.device.reset();
        self.place.driver.clear();
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let driver = &self.place.driver;
        if offset >= CONFIG {
            self.lock().device.read_config(offset - CONFIG, data);
            return;
        }
        // Registers are read by aligned words (4.2.2.2).
        let Ok(word) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let value = match u32::try_from(offset).unwrap_or(0) {
            VIRTIO_MMIO_INTERRUPT_STATUS => driver.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => driver.generation(),
            VIRTIO_MMIO_STATUS => {
                let failed = if driver.is_reset_needed() {
                    NEEDS_RESET
                } else {
                    0
                };
                match self.lock().registers.status() {
                    // Not one that the driver has begun with.
                    0 => 0,
                    status => status | failed,
                }
            }
            _ => {
                let inner = self.lock();
                let read = inner.registers.read(&offer(&inner.device), offset);
                read.unwrap_or(0)
            }
        };
        *word = value.to_le_bytes();
    }

    fn write(self: &Arc<Self>, offset: u64, data: &[u8]) -> Answer {
        if offset >= CONFIG {
            self.lock().device.write_config(offset - CONFIG, data);
            return Answer::Accepted;
        }
        let Ok(word) = <[u8; 4]>::try_from(data) else {
            return Answer::Accepted;
        };
        let value = u32::from_le_bytes(word);
        if offset == u64::from(VIRTIO_MMIO_INTERRUPT_ACK) {
            self.place.driver.acknowledge(value);
            return Answer::Accepted;
        }
        let mut guard = self.lock();
        let inner = &mut *guard;
        let effect = inner.registers.write(&offer(&inner.device), offset, value);
        match effect {
            Effect::None | Effect::Acknowledge(_) => {}
            Effect::Activate => self.activate(inner),
            Effect::Notify(queue) => {
                if let Some(bell) = inner.bells.get(queue as usize) {
                    // EAGAIN: it is notified as it is.
                    let _ = bell.event.write(1);
                }
            }
            Effect::StopQueue(queue) => {
                self.complaints.line(
                    log::Level::Warn,
                    format_args!("has queue {queue} stopped alone: all of it rests until a reset"),
                );
                self.place.driver.needs_reset();
                if let Phase::Serving(serving) = &mut inner.phase {
                    // Afterwards the driver takes the ring's memory for its own (4.2.2.2).
                    return Answer::Deferred(serving.wait_for_rest());
                }
            }
            Effect::Reset => match &mut inner.phase {
                Phase::Idle => self.reset(inner),
                Phase::Serving(serving) => {
                    serving.reset = true;
                    return Answer::Deferred(serving.wait_for_rest());
                }
            },
        }
        Answer::Accepted
    }
}

fn offer<D: VirtioDevice>(device: &D) -> Offer<'_> {
    Offer {
        device_id: D::DEVICE_ID,
        features: device.features() | TRANSPORT_FEATURES,
        queue_sizes: device.queue_sizes(),
    }
}

impl<D: VirtioDevice> IoDevice for MmioDevice<D> {
    fn read(&self, at: At, data: &mut [u8]) -> Answer {
        self.0.read(at.offset, data);
        Answer::Accepted
    }

    fn write(&self, at: At, data: &[u8]) -> Answer {
        self.0.write(at.offset, data)
    }
}

impl<D: VirtioDevice> Clone for MmioDevice<D> {
    fn clone(&self) -> Self {
        MmioDevice(self.0.clone())
    }
}

impl<D: VirtioDevice> Drop for Shared<D> {
    fn drop(&mut self) {
        let inner = self.inner.get_mut();
        let inner = inner.unwrap_or_else(PoisonError::into_inner);
        if let Phase::Serving(serving) = std::mem::replace(&mut inner.phase, Phase::Idle) {
            serving.workers.iter().for_each(Worker::rest);
            serving.workers.into_iter().for_each(Worker::join_elsewhere);
        }
    }
}

impl<D: VirtioDevice> fmt::Debug for MmioDevice<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioDevice")
            .field("name", &self.0.place.name)
            .field("kind", &D::NAME)
            .finish_non_exhaustive()
    }
}
