// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A userfaultfd for tests, of this crate and of those who use it: it keeps pages by the kernel's rules, and notes every
//! call, and refuses the ones that it was told to refuse. It has no process behind it: a test says who faults
//! ([`FakeUffd::touch`]).

use super::message::encode;
use super::sys::poll;
use super::{Call, Fault, FaultKind, Features, Message, OpenError, RawMessage, UffdHost, abi};
use crate::{Errno, Hva, PAGE_SIZE};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A stand-in for a kernel. Clones are the same one.
///
/// ```
/// use memslots::uffd::fake::{FakeUffd, Touch};
/// use memslots::uffd::{Event, Features, Messages, Modes, Uffd, Wake};
/// use memslots::{Backing, Mapping};
/// use std::sync::Arc;
/// use vm_memory::GuestAddress;
///
/// let fake = FakeUffd::new(Features::from_bits(0x1ffff));
/// let uffd = Uffd::on(|| fake.open(), Features::POISON, Features::NONE)?;
/// let memory = Arc::new(Mapping::new(&Backing::anonymous(0x4000), GuestAddress(0))?);
/// let registration = uffd.register_all(&memory, Modes::MISSING)?;
/// let pager = registration.lend_fill()?;
///
/// assert_eq!(fake.touch(memory.host(), false), Touch::Sleeps);
/// let mut messages = Messages::with_capacity(8);
/// assert_eq!(uffd.read(&mut messages)?, 1);
/// pager.zero(0..0x1000, Wake::Now)?;
/// assert_eq!(fake.touch(memory.host(), false), Touch::Done);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct FakeUffd {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    available: Features,
    state: Mutex<State>,
    told: Condvar,
    /// Has a byte for as long as there are messages: for who waits for something else besides.
    bell: Option<(io::PipeReader, io::PipeWriter)>,
    meanwhile: Mutex<Vec<Meanwhile>>,
}

/// What someone else does in the moment of a call.
struct Meanwhile {
    call: Call,
    /// After the call has done its work, or before.
    after: bool,
    action: Box<dyn FnOnce() + Send>,
}

impl fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Meanwhile").field(&self.call).finish()
    }
}

#[derive(Debug, Default)]
struct State {
    calls: Vec<(Call, Vec<u64>)>,
    failures: BTreeMap<usize, Failure>,
    refusals: Vec<(Call, Errno)>,
    unreadable: Option<Errno>,
    /// Registered ranges, by start: end and the ioctl's modes.
    ranges: BTreeMap<u64, (u64, u64)>,
    pages: BTreeMap<u64, Page>,
    /// Pages of the page cache that no mapping has yet.
    cached: BTreeSet<u64>,
    messages: VecDeque<RawMessage>,
    /// Pages that someone sleeps on.
    asleep: BTreeSet<u64>,
    /// Pages that are not there, and are to come protected.
    marks: BTreeSet<u64>,
    /// Where one of the kernel's mappings ends and the next begins.
    splits: BTreeSet<u64>,
}

#[derive(Clone, Copy, Debug)]
enum Failure {
    Errno(Errno),
    /// This many bytes are done, then "again".
    Partly(u64),
}

/// A page that there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Page {
    protected: bool,
    poisoned: bool,
}

/// What came of touching a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// It is there, or memory that nobody registered.
    Done,
    /// Who touched it sleeps, and a message says so.
    Sleeps,
    /// It is poisoned.
    Poisoned,
}

impl FakeUffd {
    /// A kernel with these features, and no pages.
    pub fn new(available: Features) -> Self {
        Self {
            shared: Arc::new(Shared {
                available,
                state: Mutex::default(),
                told: Condvar::new(),
                bell: io::pipe().ok(),
                meanwhile: Mutex::default(),
            }),
        }
    }

    /// A descriptor, for [`Uffd::on`](super::Uffd::on).
    ///
    /// # Errors
    /// None.
    pub fn open(&self) -> Result<Box<dyn UffdHost>, OpenError> {
        Ok(Box::new(Descriptor {
            shared: Arc::clone(&self.shared),
            negotiated: AtomicBool::new(false),
        }))
    }

    /// Another copy of a descriptor that has been negotiated, as another process has it, for
    /// [`Uffd::foreign`](super::Uffd::foreign).
    pub fn open_again(&self) -> Box<dyn UffdHost> {
        Box::new(Descriptor {
            shared: Arc::clone(&self.shared),
            negotiated: AtomicBool::new(true),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }

    /// The call that comes after `after` others from now fails with `errno`, and does nothing.
    pub fn fail(&self, after: usize, errno: Errno) {
        let mut state = self.lock();
        let call = state.calls.len() + after;
        state.failures.insert(call, Failure::Errno(errno));
    }

    /// The next call of this kind fails with `errno`, and does nothing.
    pub fn fail_next(&self, call: Call, errno: Errno) {
        self.lock().refusals.push((call, errno));
    }

    /// Messages cannot be read from now on.
    pub fn fail_reads(&self, errno: Errno) {
        self.lock().unreadable = Some(errno);
    }

    /// The call that comes after `after` others from now does `bytes` of what it is asked, and says "again".
    pub fn do_partly(&self, after: usize, bytes: u64) {
        let mut state = self.lock();
        let call = state.calls.len() + after;
        state.failures.insert(call, Failure::Partly(bytes));
    }

    /// Takes back what `fail`, `fail_next` and `do_partly` arranged and has not come to pass.
    pub fn fail_no_more(&self) {
        let mut state = self.lock();
        state.failures.clear();
        state.refusals.clear();
    }

    /// What `action` does happens while the next `call` is on its way, before it has done anything: another thread's
    /// doing, at the worst moment.
    pub fn before(&self, call: Call, action: impl FnOnce() + Send + 'static) {
        self.shared.note(call, false, Box::new(action));
    }

    /// As [`before`](Self::before), when it has done its work and not returned yet.
    pub fn after(&self, call: Call, action: impl FnOnce() + Send + 'static) {
        self.shared.note(call, true, Box::new(action));
    }

    /// The calls so far, refused ones included, with their arguments as they were asked.
    pub fn calls(&self) -> Vec<(Call, Vec<u64>)> {
        self.lock().calls.clone()
    }

    /// The registered ranges, and the ioctl's modes of each.
    pub fn ranges(&self) -> Vec<(Range<u64>, u64)> {
        let state = self.lock();
        let ranges = state.ranges.iter();
        ranges
            .map(|(start, (end, modes))| (*start..*end, *modes))
            .collect()
    }

    /// Someone touches an address: where that waits, there is a message of it.
    pub fn touch(&self, address: Hva, write: bool) -> Touch {
        let mut state = self.lock();
        let page = address.0 as u64 & !(PAGE_SIZE - 1);
        let modes = state.modes(page);
        let kind = match state.pages.get(&page).copied() {
            Some(Page { poisoned: true, .. }) => return Touch::Poisoned,
            Some(Page { protected, .. }) if protected && write => FaultKind::WriteProtect,
            Some(_) => return Touch::Done,
            None if state.cached.contains(&page) && modes & 4 != 0 => FaultKind::Minor,
            None if !state.cached.contains(&page) && modes & 1 != 0 => FaultKind::Missing,
            None => {
                state.pages.insert(page, Page::default());
                return Touch::Done;
            }
        };
        let fault = Fault {
            address: Hva(page as usize),
            kind,
            write,
            thread: 0,
        };
        state.asleep.insert(page);
        self.shared
            .queue(&mut state, encode(&Message::Fault(fault)));
        Touch::Sleeps
    }

    /// The page cache has this page from now on, and no mapping has.
    pub fn cache(&self, address: Hva) {
        let page = address.0 as u64 & !(PAGE_SIZE - 1);
        self.lock().cached.insert(page);
    }

    /// A mapping ends at this address and another begins, as `madvise` or `mlock` of a part makes it: what fills pages on
    /// both sides at once is refused.
    pub fn split(&self, address: Hva) {
        self.lock().splits.insert(address.0 as u64);
    }

    /// Queues a message as it is.
    pub fn tell(&self, message: RawMessage) {
        self.shared.queue(&mut self.lock(), message);
    }

    /// Whether there is a page, and if so whether it is protected.
    pub fn page(&self, address: Hva) -> Option<bool> {
        let page = address.0 as u64 & !(PAGE_SIZE - 1);
        self.lock().pages.get(&page).map(|page| page.protected)
    }

    /// The pages that someone sleeps on.
    pub fn asleep(&self) -> Vec<Hva> {
        let state = self.lock();
        state
            .asleep
            .iter()
            .map(|page| Hva(*page as usize))
            .collect()
    }
}

impl Shared {
    fn meanwhile(&self) -> MutexGuard<'_, Vec<Meanwhile>> {
        self.meanwhile
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, call: Call, after: bool, action: Box<dyn FnOnce() + Send>) {
        self.meanwhile().push(Meanwhile {
            call,
            after,
            action,
        });
    }

    fn run_meanwhile(&self, call: Call, after: bool) {
        let due = |noted: &Meanwhile| (noted.call, noted.after) == (call, after);
        let noted = {
            let mut meanwhile = self.meanwhile();
            meanwhile
                .iter()
                .position(due)
                .map(|place| meanwhile.remove(place))
        };
        if let Some(noted) = noted {
            (noted.action)();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self, state: &mut State, message: RawMessage) {
        if let (true, Some((_, writer))) = (state.messages.is_empty(), &self.bell) {
            // A pipe of its own with room for it.
            let _ = (&mut &*writer).write_all(&[0]);
        }
        state.messages.push_back(message);
        self.told.notify_all();
    }

    fn silence(&self, state: &State) {
        if let (true, Some((reader, _))) = (state.messages.is_empty(), &self.bell) {
            let _ = (&mut &*reader).read_exact(&mut [0]);
        }
    }
}

impl State {
    fn modes(&self, page: u64) -> u64 {
        let before = self.ranges.range(..=page).next_back();
        before.map_or(0, |(_, (end, modes))| if page < *end { *modes } else { 0 })
    }

    fn wake(&mut self, range: Range<u64>) {
        self.asleep.retain(|page| !range.contains(page));
    }

    /// One page of an operation.
    fn place(&mut self, call: Call, page: u64, mode: u64) -> Result<(), Errno> {
        let modes = self.modes(page);
        let protected = mode & abi::PROTECTED != 0;
        match call {
            _ if modes == 0 => Err(Errno(libc::ENOENT)),
            Call::WriteProtect if modes & 2 == 0 => Err(Errno(libc::ENOENT)),
            Call::WriteProtect => {
                let protect = mode & abi::PROTECT != 0;
                match self.pages.get_mut(&page) {
                    Some(there) => there.protected = protect && !there.poisoned,
                    None if protect => drop(self.marks.insert(page)),
                    None => drop(self.marks.remove(&page)),
                }
                Ok(())
            }
            _ if self.pages.contains_key(&page) => Err(Errno(libc::EEXIST)),
            Call::ZeroPage | Call::Poison if self.marks.contains(&page) => Err(Errno(libc::EEXIST)),
            Call::Copy | Call::Continue if protected && modes & 2 == 0 => Err(Errno(libc::EINVAL)),
            Call::Continue if !self.cached.contains(&page) => Err(Errno(libc::EFAULT)),
            Call::Copy | Call::Continue | Call::ZeroPage | Call::Move | Call::Poison => {
                let protected = protected && matches!(call, Call::Copy | Call::Continue);
                let poisoned = call == Call::Poison;
                self.marks.remove(&page);
                self.pages.insert(
                    page,
                    Page {
                        protected,
                        poisoned,
                    },
                );
                Ok(())
            }
            _ => Err(Errno(libc::EINVAL)),
        }
    }

    /// Does as many pages as it can, and says how many bytes, and why no more.
    fn operate(
        &mut self,
        call: Call,
        range: Range<u64>,
        mode: u64,
        limit: u64,
    ) -> (u64, Result<(), Errno>) {
        let fills = !matches!(call, Call::WriteProtect);
        if fills
            && self
                .splits
                .range(range.start + 1..range.end)
                .next()
                .is_some()
        {
            return (0, Err(Errno(libc::ENOENT)));
        }
        let mut done = 0;
        for page in range.clone().step_by(PAGE_SIZE as usize) {
            if done >= limit {
                return (done, Err(Errno(libc::EAGAIN)));
            }
            if let Err(errno) = self.place(call, page, mode) {
                // As the kernel: what was done counts, and why it stopped is asked for again.
                let errno = if done > 0 { Errno(libc::EAGAIN) } else { errno };
                return (done, Err(errno));
            }
            done += PAGE_SIZE;
        }
        (done, Ok(()))
    }
}

struct Descriptor {
    shared: Arc<Shared>,
    negotiated: AtomicBool,
}

impl Descriptor {
    fn api(&self, argument: &mut [u64]) -> Result<(), Errno> {
        let [version, features, ioctls] = argument else {
            return Err(Errno(libc::EINVAL));
        };
        let known = self
            .shared
            .available
            .contains(Features::from_bits(*features));
        if *version != abi::API || !known || self.negotiated.swap(known, Ordering::Relaxed) {
            argument.fill(0);
            return Err(Errno(libc::EINVAL));
        }
        *features = self.shared.available.bits();
        *ioctls =
            1 << Call::Register.index() | 1 << Call::Unregister.index() | 1 << Call::Api.index();
        Ok(())
    }
}

impl Descriptor {
    /// # Safety
    /// As [`UffdHost::ioctl`].
    unsafe fn answer(&self, call: Call, argument: &mut [u64]) -> Result<(), Errno> {
        let mut state = self.shared.lock();
        let number = state.calls.len();
        state.calls.push((call, argument.to_vec()));
        let refused = state.refusals.iter().position(|(of, _)| *of == call);
        let refused = refused.map(|at| Failure::Errno(state.refusals.remove(at).1));
        let failure = state.failures.remove(&number).or(refused);
        if let Some(Failure::Errno(errno)) = failure {
            if let (
                Call::Copy | Call::Move | Call::ZeroPage | Call::Continue | Call::Poison,
                Some(field),
            ) = (call, argument.last_mut())
            {
                *field = i64::from(-errno.0) as u64;
            }
            return Err(errno);
        }
        if call == Call::Api {
            return self.api(argument);
        }
        if !self.negotiated.load(Ordering::Relaxed) {
            return Err(Errno(libc::EINVAL));
        }
        let limit = match failure {
            Some(Failure::Partly(bytes)) => bytes,
            _ => u64::MAX,
        };
        let (start, source, size, mode) = match (call, &*argument) {
            (Call::Copy | Call::Move, &[start, source, size, mode, _]) => {
                (start, source, size, mode)
            }
            (Call::Unregister | Call::Wake, &[start, size]) => (start, 0, size, 0),
            (_, &[start, size, mode, ..]) => (start, 0, size, mode),
            _ => return Err(Errno(libc::EINVAL)),
        };
        let end = start
            .checked_add(size)
            .filter(|end| (start | end).is_multiple_of(PAGE_SIZE) && size > 0);
        let range = start..end.ok_or(Errno(libc::EINVAL))?;
        match call {
            Call::Register => {
                state.ranges.insert(range.start, (range.end, mode));
                Ok(())
            }
            Call::Unregister => {
                state.ranges.remove(&range.start);
                for (_, page) in state.pages.range_mut(range.clone()) {
                    page.protected = false;
                }
                state.marks.retain(|page| !range.contains(page));
                state.wake(range);
                Ok(())
            }
            Call::Wake => {
                state.wake(range);
                Ok(())
            }
            Call::WriteProtect => {
                let (_, result) = state.operate(call, range.clone(), mode, limit);
                if result.is_ok() && mode & 3 == 0 {
                    state.wake(range);
                }
                result
            }
            _ => {
                let (done, result) = state.operate(call, range.clone(), mode, limit);
                if call == Call::Copy && done > 0 {
                    // SAFETY: the caller promises both: readable there, guest memory here.
                    unsafe {
                        std::ptr::copy(source as *const u8, start as *mut u8, done as usize);
                    }
                }
                if mode & abi::DONTWAKE == 0 {
                    state.wake(start..start + done);
                }
                if let Some(field) = argument.last_mut() {
                    *field = match result {
                        Err(errno) if done == 0 => i64::from(-errno.0) as u64,
                        _ => done,
                    };
                }
                result
            }
        }
    }
}

impl UffdHost for Descriptor {
    unsafe fn ioctl(&self, call: Call, argument: &mut [u64]) -> Result<(), Errno> {
        self.shared.run_meanwhile(call, false);
        // SAFETY: the caller's promise.
        let answer = unsafe { self.answer(call, argument) };
        self.shared.run_meanwhile(call, true);
        answer
    }

    fn read(&self, messages: &mut [RawMessage]) -> Result<usize, Errno> {
        let mut state = self.shared.lock();
        if let Some(errno) = state.unreadable {
            return Err(errno);
        }
        let count = state.messages.len().min(messages.len());
        if count == 0 {
            return Err(Errno(libc::EAGAIN));
        }
        let told = state.messages.drain(..count);
        messages
            .iter_mut()
            .zip(told)
            .for_each(|(to, from)| *to = from);
        self.shared.silence(&state);
        Ok(count)
    }

    fn wait(&self, limit: Option<Duration>) -> Result<bool, Errno> {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut state = self.shared.lock();
        while state.messages.is_empty() {
            let Some(deadline) = deadline else {
                state = self
                    .shared
                    .told
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let waited = self.shared.told.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(true)
    }

    fn wait_or(&self, other: BorrowedFd<'_>, limit: Option<Duration>) -> Result<bool, Errno> {
        poll([self.descriptor(), other.as_raw_fd()], limit).map(|[ready, _]| ready)
    }

    /// The bell's: readable when there is a message, and for nothing else.
    fn descriptor(&self) -> RawFd {
        let bell = self.shared.bell.as_ref();
        bell.map_or(-1, |(reader, _)| reader.as_raw_fd())
    }

    unsafe fn claim(&self, _descriptor: u32) -> Option<OwnedFd> {
        None
    }

    fn present(&self, at: usize, pages: &mut [u8]) -> Result<(), Errno> {
        let state = self.shared.lock();
        for (page, present) in (at as u64..).step_by(PAGE_SIZE as usize).zip(pages) {
            *present = u8::from(state.pages.contains_key(&page));
        }
        Ok(())
    }
}
