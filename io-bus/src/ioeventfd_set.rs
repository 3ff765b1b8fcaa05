// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The ioeventfds of one registration, which go where it goes.
//!
//! # A move without a window
//!
//! KVM and the published table are two places, and a guest may write at any moment. In which order
//! they change decides what a write at the old address, or at the new one, meets:
//!
//! | step | at the old address | at the new address |
//! | --- | --- | --- |
//! | before | signals | nobody's yet |
//! | 1. attach at the new address | signals | signals |
//! | 2. publish the table | signals | signals |
//! | 3. detach at the old address | nobody's any more | signals |
//!
//! No write is lost: at every step at least one of the two addresses signals, and each one from the
//! first moment it may to the last. None is doubled: a write is to one address, where KVM either
//! signals or leaves the guest. The other orders have holes: detach before attach, and a write at
//! either address leaves the guest; detach before publish, and one at the old address goes to the
//! device by a path that its driver does not use; publish before attach, and one at the new.
//!
//! A write that left the guest in an earlier step and is dispatched in a later one goes by the
//! table of that moment: to the device, which takes it for what the ioeventfd means
//! ([`IoDevice`](crate::IoDevice)'s contract), or, at the address that is nobody's, to nobody.
//!
//! **Ranges that overlap**: the new place of one ioeventfd may be the old place of another, and KVM
//! answers EEXIST to two that the same write would signal. Such a one is attached after step 3, when
//! its place is free. Between the two, a write there leaves the guest and finds the device in the
//! table, since the place is in the old range and in the new one.
//!
//! # An undo that fails
//!
//! A move that KVM refuses is undone step by step, and KVM may refuse that too. Then an ioeventfd is
//! left where it should not be (a stray), or is missing where it should be. Both are noted with the
//! ioeventfd and put right before the next move begins, which does not begin otherwise; strays are
//! also detached whenever their ioeventfd is, so that none outlives the registration.

use std::fmt;
use std::os::fd::AsRawFd;

use crate::Error;
use crate::ioeventfd::{IoEvent, IoEventAddress, IoEventFd, SetIoEventFd};
use crate::range::{BusKind, IoRange};

/// Names one ioeventfd of a registration; from
/// [`Registration::attach_ioeventfd`](crate::Registration::attach_ioeventfd).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IoEventId(u64);

/// An [`IoEventFd`] whose types are of no interest here.
trait Bound: Send + Sync {
    fn event(&self) -> IoEvent;
    fn set(&self, event: &IoEvent, attach: bool) -> Result<(), Error>;
    /// Notes where it is attached now.
    fn settle(&mut self, event: IoEvent);
    fn detach(&mut self) -> Result<(), Error>;
    fn is_attached(&self) -> bool;
    /// Notes an undo that KVM refused: it is attached there still, or (`None`) nowhere.
    fn not_undone(&mut self, stray: Option<IoEvent>);
    /// Detaches it wherever it should not be.
    fn detach_strays(&mut self) -> Result<(), Error>;
    /// Attaches it if it is missing.
    fn attach_lost(&mut self) -> Result<(), Error>;
}

impl<S: SetIoEventFd + Send + Sync, E: AsRawFd + Send + Sync> Bound for IoEventFd<S, E> {
    fn event(&self) -> IoEvent {
        IoEventFd::event(self)
    }

    fn set(&self, event: &IoEvent, attach: bool) -> Result<(), Error> {
        IoEventFd::set(self, event, attach)
    }

    fn settle(&mut self, event: IoEvent) {
        IoEventFd::settle(self, event);
    }

    fn detach(&mut self) -> Result<(), Error> {
        IoEventFd::detach(self)
    }

    fn is_attached(&self) -> bool {
        IoEventFd::is_attached(self)
    }

    fn not_undone(&mut self, stray: Option<IoEvent>) {
        match stray {
            Some(event) => self.strayed(event),
            None => self.lost(),
        }
    }

    fn detach_strays(&mut self) -> Result<(), Error> {
        IoEventFd::detach_strays(self)
    }

    fn attach_lost(&mut self) -> Result<(), Error> {
        IoEventFd::attach_lost(self)
    }
}

struct Member {
    id: IoEventId,
    /// From the range's base, in bytes.
    offset: u64,
    fd: Box<dyn Bound>,
}

/// See the top of this file.
#[derive(Default)]
pub(crate) struct IoEventFdSet {
    members: Vec<Member>,
    next_id: u64,
}

/// One ioeventfd's move.
struct Move<'a> {
    fd: &'a mut dyn Bound,
    old: IoEvent,
    new: IoEvent,
    /// Its new place is another's old one.
    late: bool,
}

/// What has been done, to be undone in reverse.
enum Done {
    Set {
        index: usize,
        event: IoEvent,
        attach: bool,
    },
    Published,
}

impl IoEventFdSet {
    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub(crate) fn events(&self) -> impl Iterator<Item = (IoEventId, IoEvent)> {
        self.members
            .iter()
            .filter(|member| member.fd.is_attached())
            .map(|member| (member.id, member.fd.event()))
    }

    /// Attaches one at `offset` into `range`.
    pub(crate) fn attach<S, E>(
        &mut self,
        bus: BusKind,
        range: IoRange,
        host: S,
        offset: u64,
        writes: crate::WriteMatch,
        fd: E,
    ) -> Result<IoEventId, Error>
    where
        S: SetIoEventFd + Send + Sync + 'static,
        E: AsRawFd + Send + Sync + 'static,
    {
        let len = writes.length().max(1) as usize;
        let outside = Error::OutsideRange { bus, range, offset };
        let Some(at) = range.base().checked_add(offset) else {
            return Err(outside);
        };
        if !range.holds(at, len) {
            return Err(outside);
        }
        let address = address_on(bus, at).ok_or(outside)?;
        let fd = Box::new(IoEventFd::attach(host, IoEvent { address, writes }, fd)?);
        let id = IoEventId(self.next_id);
        self.next_id += 1;
        self.members.push(Member { id, offset, fd });
        Ok(id)
    }

    /// Detaches one and forgets it.
    pub(crate) fn detach(&mut self, id: IoEventId) -> Result<(), Error> {
        let index = self.members.iter().position(|member| member.id == id);
        let Some((index, member)) =
            index.and_then(|index| Some((index, self.members.get_mut(index)?)))
        else {
            return Err(Error::NoSuchIoEvent);
        };
        member.fd.detach()?;
        drop(self.members.remove(index));
        Ok(())
    }

    /// Detaches all; what fails is logged by the handles' drop.
    pub(crate) fn clear(&mut self) {
        self.members.clear();
    }

    /// Moves all to `base`, around `publish`, which moves the range; `unpublish` moves it back.
    ///
    /// On an error everything is as it was before, or is noted to be put right.
    pub(crate) fn relocate<T>(
        &mut self,
        bus: BusKind,
        base: u64,
        publish: impl FnOnce() -> Result<T, Error>,
        unpublish: impl FnOnce(),
    ) -> Result<T, Error> {
        self.put_right()?;
        let mut moves = Vec::with_capacity(self.members.len());
        for member in &mut self.members {
            let old = member.fd.event();
            // Inside the range at its old place, so inside it at its new one, which fits the bus.
            let new = IoEvent {
                address: address_on(bus, base.wrapping_add(member.offset)).unwrap_or(old.address),
                writes: old.writes,
            };
            if new != old {
                let fd = &mut *member.fd;
                let late = false;
                moves.push(Move { fd, old, new, late });
            }
        }
        let old: Vec<IoEvent> = moves.iter().map(|one| one.old).collect();
        for one in &mut moves {
            one.late = old.iter().any(|other| other.collides(&one.new));
        }

        let mut done = Vec::with_capacity(2 * moves.len() + 1);
        match carry_out(&moves, publish, &mut done) {
            Ok(result) => {
                for one in moves {
                    one.fd.settle(one.new);
                }
                Ok(result)
            }
            Err(error) => {
                undo(&mut moves, &done, unpublish);
                Err(error)
            }
        }
    }
}

/// What an undo left is put right; see the top of this file.
impl IoEventFdSet {
    fn put_right(&mut self) -> Result<(), Error> {
        // All strays first: one may be in the place of another that is missing.
        for member in &mut self.members {
            member.fd.detach_strays()?;
        }
        for member in &mut self.members {
            member.fd.attach_lost()?;
        }
        Ok(())
    }
}

/// The three steps, and the late ones; notes what it has done.
fn carry_out<T>(
    moves: &[Move<'_>],
    publish: impl FnOnce() -> Result<T, Error>,
    done: &mut Vec<Done>,
) -> Result<T, Error> {
    let set = |index: usize, event: IoEvent, attach: bool, done: &mut Vec<Done>| {
        if let Some(one) = moves.get(index) {
            one.fd.set(&event, attach)?;
            done.push(Done::Set {
                index,
                event,
                attach,
            });
        }
        Ok::<_, Error>(())
    };
    let early = |one: &Move<'_>| !one.late;
    for (index, one) in moves.iter().enumerate().filter(|(_, one)| early(one)) {
        set(index, one.new, true, done)?;
    }
    let result = publish()?;
    done.push(Done::Published);
    for (index, one) in moves.iter().enumerate() {
        set(index, one.old, false, done)?;
    }
    for (index, one) in moves.iter().enumerate().filter(|(_, one)| one.late) {
        set(index, one.new, true, done)?;
    }
    Ok(result)
}

/// Undoes in reverse order. What KVM refuses now is logged, and noted for a later try.
fn undo(moves: &mut [Move<'_>], done: &[Done], unpublish: impl FnOnce()) {
    let mut unpublish = Some(unpublish);
    for step in done.iter().rev() {
        match step {
            Done::Published => {
                if let Some(unpublish) = unpublish.take() {
                    unpublish();
                }
            }
            Done::Set {
                index,
                event,
                attach,
            } => {
                if let Some(one) = moves.get_mut(*index)
                    && let Err(error) = one.fd.set(event, !attach)
                {
                    log::error!("{error}, after a move that had failed");
                    one.fd.not_undone(attach.then_some(*event));
                }
            }
        }
    }
}

/// The address for KVM, if it is one on this bus.
fn address_on(bus: BusKind, address: u64) -> Option<IoEventAddress> {
    use vm_device::bus::{MmioAddress, PioAddress};
    Some(match bus {
        BusKind::Mmio | BusKind::FastMmio => IoEventAddress::Mmio(MmioAddress(address)),
        BusKind::Pio => IoEventAddress::Pio(PioAddress(u16::try_from(address).ok()?)),
        BusKind::CcwNotify => IoEventAddress::CcwNotify(address),
    })
}

impl fmt::Debug for IoEventFdSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.events()).finish()
    }
}
