// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the lockstep runs against: devices with tempers, and a kernel of plain lists that keeps
//! KVM's rules and can refuse any call.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use io_bus::{
    Answer, At, BusKind, Completion, IoDevice, IoEvent, IoRange, SetCoalescedZone, SetIoEventFd,
    defer,
};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

/// What a device does with an access, by its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Temper {
    /// Takes everything.
    Mild,
    /// Declines odd addresses.
    Picky,
    /// Defers every fourth address, declines the odd ones.
    Slow,
}

pub enum Mood {
    Accepts,
    Declines,
    Defers,
}

impl Temper {
    pub fn at(self, address: u64) -> Mood {
        match self {
            Temper::Mild => Mood::Accepts,
            Temper::Slow if address.is_multiple_of(4) => Mood::Defers,
            Temper::Picky | Temper::Slow if address % 2 == 1 => Mood::Declines,
            Temper::Picky | Temper::Slow => Mood::Accepts,
        }
    }
}

/// The names of the devices that were asked, in order.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<usize>>>);

impl Log {
    pub fn take(&self) -> Vec<usize> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }

    pub fn last_name(&self) -> u8 {
        *self.0.lock().unwrap().last().unwrap() as u8
    }
}

pub struct Device {
    pub name: usize,
    pub temper: Temper,
    pub log: Log,
    pub deferred: Arc<Mutex<VecDeque<Completion>>>,
}

impl Device {
    fn take(&self, at: At) -> Answer {
        self.log.0.lock().unwrap().push(self.name);
        match self.temper.at(at.address()) {
            Mood::Accepts => Answer::Accepted,
            Mood::Declines => Answer::Declined,
            Mood::Defers => {
                let (completion, deferral) = defer();
                self.deferred.lock().unwrap().push_back(completion);
                Answer::Deferred(deferral)
            }
        }
    }
}

impl IoDevice for Device {
    fn read(&self, at: At, data: &mut [u8]) -> Answer {
        assert!(data.iter().all(|byte| *byte == 0xff));
        // Also where it declines or defers: it has no say in the data then.
        data.fill(self.name as u8);
        self.take(at)
    }

    fn write(&self, at: At, _: &[u8]) -> Answer {
        self.take(at)
    }
}

/// A late answer is short by one byte where it can be: what is missing reads as ones.
pub fn complete(completion: Completion, name: u8) -> bool {
    completion.complete(&[name ^ 0x80; 3])
}

pub fn late_bytes(name: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xff; len];
    let given = len.min(3);
    bytes[..given].fill(name ^ 0x80);
    bytes
}

/// One eventfd for all: nobody reads it.
pub fn eventfd() -> Arc<EventFd> {
    static FD: OnceLock<Arc<EventFd>> = OnceLock::new();
    FD.get_or_init(|| Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()))
        .clone()
}

/// A small ring, so that full ones happen.
pub const RING_ENTRIES: usize = 4;

pub struct Kernel {
    pub ring: Arc<Box<[AtomicU32]>>,
    events: Mutex<Vec<IoEvent>>,
    zones: Mutex<Vec<(BusKind, IoRange)>>,
    /// How many calls succeed until one is refused; and whether one was.
    fuse: Mutex<(Option<usize>, bool)>,
}

impl Kernel {
    pub fn new() -> Self {
        let words = 2 + RING_ENTRIES * 6;
        Self {
            ring: Arc::new((0..words).map(|_| AtomicU32::new(0)).collect()),
            events: Mutex::default(),
            zones: Mutex::default(),
            fuse: Mutex::default(),
        }
    }

    pub fn events(&self) -> Vec<IoEvent> {
        self.events.lock().unwrap().clone()
    }

    pub fn zones(&self) -> Vec<(BusKind, IoRange)> {
        self.zones.lock().unwrap().clone()
    }

    /// Refuses one call after so many, unless one is refused before that by KVM's own rules: one
    /// refusal a step, so that the undo goes through. Gives whether one was refused since the last time.
    pub fn refuse_after(&self, calls: Option<usize>) -> bool {
        std::mem::replace(&mut *self.fuse.lock().unwrap(), (calls, false)).1
    }

    fn fuse(&self) -> Result<(), errno::Error> {
        let mut fuse = self.fuse.lock().unwrap();
        match fuse.0 {
            Some(0) => {
                *fuse = (None, true);
                Err(errno::Error::new(libc::ENOMEM))
            }
            Some(n) => {
                fuse.0 = Some(n - 1);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// KVM's own refusal, after which the fuse does not blow any more.
    fn refuse(&self, errno: i32) -> errno::Error {
        self.fuse.lock().unwrap().0 = None;
        errno::Error::new(errno)
    }

    /// A guest's write in a zone: kept, unless the ring is full.
    pub fn write(&self, bus: BusKind, address: u64, data: &[u8]) -> bool {
        let capacity = RING_ENTRIES as u32;
        let first = self.ring[0].load(Ordering::Acquire);
        let last = self.ring[1].load(Ordering::Relaxed);
        if (last + 1) % capacity == first {
            return false;
        }
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let half = |n: usize| u32::from_le_bytes(bytes[n..n + 4].try_into().unwrap());
        let entry = [
            address as u32,
            (address >> 32) as u32,
            data.len() as u32,
            u32::from(bus == BusKind::Pio),
            half(0),
            half(4),
        ];
        for (word, value) in self.ring[2 + last as usize * 6..].iter().zip(entry) {
            word.store(value, Ordering::Relaxed);
        }
        self.ring[1].store((last + 1) % capacity, Ordering::Release);
        true
    }
}

impl SetIoEventFd for Kernel {
    fn set_ioeventfd(&self, event: &IoEvent, _: RawFd, attach: bool) -> Result<(), errno::Error> {
        self.fuse()?;
        let mut events = self.events.lock().unwrap();
        if attach {
            if events.iter().any(|known| known.collides(event)) {
                return Err(self.refuse(libc::EEXIST));
            }
            events.push(*event);
        } else {
            let place = events.iter().position(|known| known == event);
            events.remove(place.ok_or_else(|| self.refuse(libc::ENOENT))?);
        }
        Ok(())
    }
}

impl SetCoalescedZone for Kernel {
    fn can_coalesce(&self, bus: BusKind) -> bool {
        matches!(bus, BusKind::Mmio | BusKind::Pio)
    }

    fn set_coalesced_zone(
        &self,
        bus: BusKind,
        address: u64,
        size: u32,
        register: bool,
    ) -> Result<(), errno::Error> {
        self.fuse()?;
        let range = IoRange::new(address, u64::from(size)).unwrap();
        let mut zones = self.zones.lock().unwrap();
        if register {
            zones.push((bus, range));
        } else {
            // As KVM does: every zone that holds the one that is named.
            zones.retain(|(on, zone)| *on != bus || !zone.holds(address, size as usize));
        }
        Ok(())
    }
}
