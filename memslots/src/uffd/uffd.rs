// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Uffd`]: one userfaultfd, opened and negotiated; its messages.

use super::message::decode;
use super::ranges::Ranges;
use super::registration::Registration;
use super::sys::Kernel;
use super::{
    Call, Fault, Features, Message, Modes, OpenError, RawMessage, RegisterError, UffdHost, abi,
    trial,
};
use crate::{Errno, Hva, Mapping};
use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A userfaultfd that hears of KVM's faults. Clones are the same one; it is closed when they and all its
/// [`Registration`]s are gone.
#[derive(Clone)]
pub struct Uffd {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub host: Box<dyn UffdHost>,
    /// What the kernel has.
    pub available: Features,
    /// What was asked for of it.
    pub enabled: Features,
    /// Whether it is another process's.
    pub foreign: bool,
    /// Held while the kernel is asked to change them, so that both always agree.
    ranges: Mutex<Ranges>,
}

impl Inner {
    pub fn ranges(&self) -> MutexGuard<'_, Ranges> {
        // A holder that panicked had not begun to change them.
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An ioctl that names ranges of a registration, or none.
    ///
    /// # Safety
    /// As [`UffdHost::ioctl`].
    pub unsafe fn call(&self, call: Call, argument: &mut [u64]) -> Result<(), Errno> {
        // SAFETY: the caller's promise.
        unsafe { self.host.ioctl(call, argument) }
    }
}

impl Uffd {
    /// Opens one with the features `required`, and of `optional` those that the kernel has. A process without
    /// `CAP_SYS_PTRACE` gets one from `/dev/userfaultfd` if it may open that. Blocks for nothing.
    ///
    /// # Errors
    /// [`OpenError`], which says what to do about it.
    pub fn open(required: Features, optional: Features) -> Result<Self, OpenError> {
        let open = || Kernel::open().map(|kernel| Box::new(kernel) as Box<dyn UffdHost>);
        Self::on(open, required, optional)
    }

    /// Takes a descriptor that this process opened earlier, before it gave up the right to (and before any `UFFDIO_API`
    /// on it). A trial with one page and one thread tells whether it hears of faults inside the kernel.
    ///
    /// # Errors
    /// [`OpenError`]; [`OpenError::UserModeOnly`] of a descriptor that KVM's faults never reach.
    pub fn adopt(descriptor: OwnedFd, required: Features) -> Result<Self, OpenError> {
        let kernel = Kernel::adopt(descriptor)?;
        let enabled = required;
        let available = match ask(&kernel, enabled) {
            Ok(available) => available,
            Err(refusal) => {
                // A refusal leaves it as it was. Who has answered before refuses this too.
                let available = ask(&kernel, Features::NONE).map_err(|_| api_error(refusal))?;
                let missing = required.without(available);
                return Err(if missing.is_empty() {
                    api_error(refusal)
                } else {
                    OpenError::Missing { missing, available }
                });
            }
        };
        let uffd = Self::negotiated(Box::new(kernel), available, enabled);
        trial::hears_of_kernel_faults(&uffd)?;
        Ok(uffd)
    }

    /// Takes the descriptor of another process, which has opened, negotiated and registered it, and handed it off
    /// (`SCM_RIGHTS`): [`ForeignRange`](super::ForeignRange) is its memory. From now on the descriptor does not block, for that process either.
    ///
    /// What the kernel [has](Self::available) is asked of another descriptor. What that process has enabled cannot be asked;
    /// its events are expected, all of them.
    ///
    /// # Errors
    /// [`OpenError::NoUserfaultfd`] of another kind of descriptor; and [`OpenError`].
    pub fn receive(descriptor: OwnedFd) -> Result<Self, OpenError> {
        let name = Kernel::name(&descriptor).map_err(|error| OpenError::Call {
            call: "readlink of /proc/self/fd",
            errno: Errno(error.raw_os_error().unwrap_or(libc::EIO)),
        })?;
        if name != "anon_inode:[userfaultfd]" {
            return Err(OpenError::NoUserfaultfd { name });
        }
        let available = ask(&Kernel::open_to_ask()?, Features::NONE).map_err(api_error)?;
        Ok(Self::foreign(
            Box::new(Kernel::adopt(descriptor)?),
            available,
        ))
    }

    /// As [`receive`](Self::receive), of another kernel: a fake (`uffd::fake`), whose descriptor has answered `UFFDIO_API`
    /// with these features.
    pub fn foreign(host: Box<dyn UffdHost>, available: Features) -> Self {
        let events = Features::EVENT_FORK
            | Features::EVENT_REMAP
            | Features::EVENT_REMOVE
            | Features::EVENT_UNMAP;
        Self {
            inner: Arc::new(Inner {
                host,
                // Both ends of a move are in the memory of the descriptor's process: there is nothing of ours to move.
                available: available.without(Features::MOVE),
                enabled: events,
                foreign: true,
                ranges: Mutex::default(),
            }),
        }
    }

    /// As [`open`](Self::open), of another kernel: a fake (`uffd::fake`). `open` is called once or three times, for
    /// what a descriptor can do is found by asking, and one that has answered that cannot be asked again.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn on(
        open: impl Fn() -> Result<Box<dyn UffdHost>, OpenError>,
        required: Features,
        optional: Features,
    ) -> Result<Self, OpenError> {
        let host = open()?;
        let enabled = required | optional;
        match ask(&*host, enabled) {
            Ok(available) => return Ok(Self::negotiated(host, available, enabled)),
            Err(Errno(libc::EINVAL)) => {}
            Err(errno) => return Err(api_error(errno)),
        }
        // It lacks something. Which is asked of a second one, that serves for nothing else.
        let available = ask(&*open()?, Features::NONE).map_err(api_error)?;
        let missing = required.without(available);
        if !missing.is_empty() {
            return Err(OpenError::Missing { missing, available });
        }
        let (host, enabled) = (open()?, required | optional.and(available));
        let available = ask(&*host, enabled).map_err(api_error)?;
        Ok(Self::negotiated(host, available, enabled))
    }

    fn negotiated(host: Box<dyn UffdHost>, available: Features, enabled: Features) -> Self {
        Self {
            inner: Arc::new(Inner {
                host,
                available,
                enabled,
                foreign: false,
                ranges: Mutex::default(),
            }),
        }
    }

    /// What the kernel has. Of memory's kinds ([`Features::MINOR_SHMEM`] and such), of poison and of move, that is
    /// enough.
    pub fn available(&self) -> Features {
        self.inner.available
    }

    /// What was asked for and is on: events, thread ids, exact addresses, asynchronous write-protection.
    pub fn enabled(&self) -> Features {
        self.inner.enabled
    }

    /// Registers a part of a mapping: `range`, in bytes from its start, whole pages of it. From now on the faults of
    /// `modes` wait for their [role](super). Takes about a microsecond, whatever the size.
    ///
    /// # Errors
    /// [`RegisterError`]; then nothing has changed.
    pub fn register(
        &self,
        mapping: &Arc<Mapping>,
        range: Range<u64>,
        modes: Modes,
    ) -> Result<Registration, RegisterError> {
        Registration::new(&self.inner, mapping, range, modes)
    }

    /// Registers all of a mapping.
    ///
    /// # Errors
    /// As [`register`](Self::register).
    pub fn register_all(
        &self,
        mapping: &Arc<Mapping>,
        modes: Modes,
    ) -> Result<Registration, RegisterError> {
        self.register(mapping, 0..mapping.size(), modes)
    }

    /// The registered range that has the address, and its modes. Waits for a registration that another thread is making
    /// or taking back (which takes a while if much of it is write-protected).
    pub fn locate(&self, address: Hva) -> Option<(Range<usize>, Modes)> {
        self.inner.ranges().find(address.0)
    }

    /// Reads the messages that there are, as many as fit, without waiting and without allocation, and says how many
    /// `into` holds. One that holds some already is left as it is: take those first, for the kernel tells nothing twice.
    ///
    /// # Errors
    /// The kernel's errno. That there is no message is no error.
    pub fn read(&self, into: &mut Messages) -> Result<usize, Errno> {
        if into.remaining() > 0 {
            return Ok(into.remaining());
        }
        (into.next, into.filled) = (0, 0);
        match self.inner.host.read(&mut into.raw) {
            Ok(count) => into.filled = count.min(into.raw.len()),
            Err(Errno(libc::EAGAIN)) => {}
            Err(errno) => return Err(errno),
        }
        for raw in into.raw.iter().take(into.filled) {
            if let Ok(Message::Fork { descriptor }) = decode(raw) {
                // SAFETY: this message has just been read, for the first time.
                let child = unsafe { self.inner.host.claim(descriptor) };
                into.forked.push_back(child);
            }
        }
        Ok(into.filled)
    }

    /// Waits until there is a message, for this long at most (`None` is for ever), and says whether there is one.
    ///
    /// # Errors
    /// The kernel's errno; `EINTR` at a signal.
    pub fn wait(&self, limit: Option<Duration>) -> Result<bool, Errno> {
        self.inner.host.wait(limit)
    }

    /// As [`wait`](Self::wait), and ends as soon as `other` can be read or has nobody who writes to it any more: the end of
    /// a pipe whose other end stops the thread. Says whether there is a message.
    ///
    /// # Errors
    /// The kernel's errno; `EINTR` at a signal.
    pub fn wait_or(&self, other: impl AsFd, limit: Option<Duration>) -> Result<bool, Errno> {
        self.inner.host.wait_or(other.as_fd(), limit)
    }
}

/// `UFFDIO_API`: answers what the kernel has. A refusal leaves the descriptor as it was, an answer fixes its features.
fn ask(host: &dyn UffdHost, features: Features) -> Result<Features, Errno> {
    let mut argument = [abi::API, features.bits(), 0];
    // SAFETY: the call names no memory.
    unsafe { host.ioctl(Call::Api, &mut argument) }?;
    let [_, available, _] = argument;
    Ok(Features::from_bits(available))
}

fn api_error(errno: Errno) -> OpenError {
    OpenError::Call {
        call: Call::Api.name(),
        errno,
    }
}

/// For epoll and event-manager. It is non-blocking, and readable when there is a message.
impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.host.descriptor()
    }
}

impl fmt::Debug for Uffd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uffd")
            .field("enabled", &self.inner.enabled)
            .field("ranges", &*self.inner.ranges())
            .finish_non_exhaustive()
    }
}

/// What the kernel told, with what belongs to it.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A thread waits for a page.
    Fault(Fault),
    /// The process has forked. The child's registered memory is told of by this descriptor: dropped, the child's faults
    /// are the kernel's again. `None` of a host that has none to give.
    Fork(Option<OwnedFd>),
    /// As [`Message::Remap`].
    Remap {
        /// Where it was.
        from: Hva,
        /// Where it is.
        to: Hva,
        /// How much, in bytes.
        size: u64,
    },
    /// Pages are given back: they are missing from now on.
    Remove(Range<usize>),
    /// Memory is unmapped.
    Unmap(Range<usize>),
    /// A message that this crate does not know, of this kind.
    Unknown(u8),
}

/// A batch of messages, to be read into again and again. As an iterator it gives them, each once.
pub struct Messages {
    raw: Box<[RawMessage]>,
    filled: usize,
    next: usize,
    /// The children's descriptors of the messages not given yet.
    forked: VecDeque<Option<OwnedFd>>,
}

impl Messages {
    /// Room for `count` messages a read, at least one; 32 bytes each.
    pub fn with_capacity(count: usize) -> Self {
        Self {
            raw: vec![[0; 32]; count.max(1)].into_boxed_slice(),
            filled: 0,
            next: 0,
            forked: VecDeque::new(),
        }
    }

    /// How many are left.
    pub fn remaining(&self) -> usize {
        self.filled - self.next
    }
}

impl Iterator for Messages {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        if self.remaining() == 0 {
            return None;
        }
        let raw = self.raw.get(self.next)?;
        self.next += 1;
        Some(match decode(raw) {
            Ok(Message::Fault(fault)) => Event::Fault(fault),
            Ok(Message::Fork { .. }) => Event::Fork(self.forked.pop_front().flatten()),
            Ok(Message::Remap { from, to, size }) => Event::Remap { from, to, size },
            Ok(Message::Remove(range)) => Event::Remove(range),
            Ok(Message::Unmap(range)) => Event::Unmap(range),
            Err(unknown) => Event::Unknown(unknown.kind),
        })
    }
}

impl fmt::Debug for Messages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Messages")
            .field("remaining", &self.remaining())
            .field("capacity", &self.raw.len())
            .finish_non_exhaustive()
    }
}
