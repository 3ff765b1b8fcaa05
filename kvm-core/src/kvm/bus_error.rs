// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `SIGBUS` on a vCPU's thread: caught, kept for its run loop, or passed on.
//!
//! ```text
//!   SIGBUS ─► a vCPU's thread? ─no──────────────────────────────► a fault? ─no──► as before
//!                 │yes                                              ▲  │yes         ▲
//!                 ├─ in KVM_RUN, or nobody ran into it ─► kept      │  │            │no
//!                 └─ at an access of its own ─► inside a            │  └► does the consumer take it?
//!                        watched range? ──no────────────────────────┘               │yes
//!                          │yes                                                     └► made again
//!                          └► the lost page is replaced by zeros, kept
//! ```
//!
//! # Why this is sound
//!
//! - **What runs in the handler** is safe at any moment: loads and stores of atomics in statics and in
//!   thread-local memory that has neither initialiser nor destructor (so its access runs no code but
//!   the address's computation), and the system calls `mmap`, `sigaction` and `tgkill`, whose errno is
//!   put back. It takes no lock, allocates nothing and cannot panic.
//! - **Returning from it** is right in the two cases where it does. In `KVM_RUN` the thread is in the
//!   kernel, and the system call ends with `EINTR`; `IN_KVM_RUN` is set around that one call, and
//!   between its two stores there is nothing that touches guest memory, so a signal that finds it set
//!   is not about an instruction of this process. At an access of the process's own the instruction is
//!   repeated, and finds a page: one that was mapped by this handler. Elsewhere a return would repeat
//!   the fault for ever, so there it never just returns.
//! - **Replacing a page** changes only addresses that the consumer has declared guest memory
//!   ([`BusErrors::watch`]): memory that others write at any time, which Rust code reads only through
//!   raw pointers or volatile accesses. That its bytes change is nothing new there. What was lost is
//!   lost in any case; the zeros are not taken for data, because the run loop gets the error before the
//!   guest runs again.
//! - **The consumer's part** ([`BusErrors::otherwise`]) is one function, whose address is one atomic: it is
//!   there whole or not at all, and never goes, so that there is no moment at which it may not be called.
//!   That it is safe at any moment too is what who sets it promises.
//! - **Chaining**: what was there before is read before this handler is set, so that no signal finds one
//!   without the other. A default action is brought about by setting it and coming back: a faulting
//!   instruction faults again, and a signal that was sent is sent again.
//! - **A handler that puts the default action in its place** and comes back is every Rust program's: the
//!   standard library's, which looks for stack overflows. That would switch this handler off for all
//!   vCPUs, so it is set again behind the call; and what was put is what there is from then on: a fault
//!   that comes again, and the next `SIGBUS` that is no vCPU's, end the process, as they would have.
//!   A vCPU's `SIGBUS` in the moment between the two finds the default action too. Who sets a handler of
//!   its own there takes `SIGBUS` over.
//!
//! # Errors that nobody has run into
//!
//! The kernel tells of a poisoned page early (`BUS_MCEERR_AO`) where a process asked for it by
//! `prctl(PR_MCE_KILL)`, or the host's administrator for all by the sysctl `vm.memory_failure_early_kill`.
//! It tells the first thread that asked or that the sysctl speaks for: by the sysctl the main thread. That
//! is a vCPU's seldom, and what is no vCPU's is passed on: with nothing but the standard library's handler
//! the first such error of a process does nothing, and the second ends it. A monitor for such hosts says
//! `PR_MCE_KILL_LATE` on its main thread (those that it starts inherit it) and `PR_MCE_KILL_EARLY` on a
//! vCPU's, or sets a handler of its own before this one is installed.
//!
//! # One page, lost to many
//!
//! - Two threads that run into the same lost page may both find it lost, and both replace it: the second
//!   one's zeros take the place of the first one's, and of what was written to them meanwhile. Both
//!   threads' loops are told of the error, and nobody may take the page's bytes for data in any case.
//! - `si_addr_lsb` is told for a hardware error. A page that is lost by truncation comes as
//!   `BUS_ADRERR` without it, and a page of 4 KiB is what is replaced: inside a mapping of huge pages
//!   (hugetlbfs) the kernel maps none so small, the replacement fails, and the process ends as without
//!   this handler. Do not truncate a file of huge pages under a guest.
//!
//! A dynamically loaded library's thread-local memory may be allocated at its first access. A vCPU's
//! thread has had it before (it was attached); on others it would happen in the handler, of a process
//! that dies of the signal unless an earlier handler catches it.

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicU32, AtomicUsize, Ordering, compiler_fence,
};
use std::sync::{Mutex, OnceLock};

use vmm_sys_util::errno::Error as Errno;

use crate::memory_error::{BusError, BusErrorCode, During, HostAddress};
use crate::sync::lock;

const PAGE: usize = 4096;
/// Ranges that can be watched in a process.
const RANGES: usize = 128;
/// Errors that a thread keeps; what comes with more unseen is counted in none.
const KEPT: usize = 8;

const BUS_ADRERR: i32 = 2;
const BUS_MCEERR_AR: i32 = 4;
const BUS_MCEERR_AO: i32 = 5;

/// Why `SIGBUS` cannot be caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BusErrorsError {
    /// The handler could not be set.
    #[error("no handler can be set for SIGBUS: {errno}")]
    Handler {
        /// What `sigaction` said.
        errno: Errno,
    },
    /// There is no room for another range.
    #[error("{RANGES} ranges of memory are watched already; watch fewer, larger ones")]
    TooMany,
    /// A range must be of whole pages, one at least.
    #[error("{bytes} bytes at {address:#x} are not whole pages")]
    NotPages {
        /// Where.
        address: HostAddress,
        /// How many.
        bytes: usize,
    },
}

/// The process's `SIGBUS` handler. Its existence is the proof that it is installed.
///
/// Installed at the consumer's wish and for the rest of the process: what was there before is called for
/// all that is not a vCPU's. Threads attached from then on (by [`Runner::run`](crate::Runner::run))
/// hand theirs to [`ExitHandler::memory_error`](crate::ExitHandler::memory_error).
#[derive(Clone, Copy, Debug)]
pub struct BusErrors(());

/// What else is to be done with a fault at an address ([`BusErrors::otherwise`]). True: its cause is out of the
/// way, and the access is made again. False: the fault goes where it went before there was a handler.
pub type Otherwise = fn(HostAddress) -> bool;

/// Memory that may be replaced where it is lost; no more, when this is dropped.
#[derive(Debug)]
#[must_use = "the range is watched until this is dropped"]
pub struct Watched {
    slot: usize,
}

/// One watched range. `len` is 0 where there is none.
///
/// A writer (one at a time, under [`WRITER`]) stores `start`, then `len`, both with release; it ends with
/// `len` = 0. The handler reads `len` with acquire, `start`, and `len` again. If that is the same, the
/// two belong together, or to a range that took the place of one of the same length: then `start` is
/// the newer one's or the ended one's, and who touches the memory of a range that has ended while
/// another thread ends it has lost its page either way.
struct Range {
    start: AtomicUsize,
    len: AtomicUsize,
}

static WATCHED: [Range; RANGES] = [const {
    Range {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
    }
}; RANGES];
static WRITER: Mutex<()> = Mutex::new(());
/// What was there before. Set before the handler is.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();
/// `SIG_DFL` or `SIG_IGN`, once the handler that was there before has put that in its own place.
static BECAME: AtomicUsize = AtomicUsize::new(NOTHING_ELSE);
/// No action is this number: it is no address of a function.
const NOTHING_ELSE: libc::sighandler_t = usize::MAX;
/// An [`Otherwise`], or null.
static OTHERWISE: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// A thread's errors, written by its handler and read by itself: of one thread, so nothing but the
/// compiler could reorder them, and [`compiler_fence`] keeps it from that.
struct Kept {
    attached: AtomicBool,
    in_kvm_run: AtomicBool,
    /// Both run free. The handler moves `head`, the thread `tail`.
    head: AtomicU32,
    tail: AtomicU32,
    slots: [Slot; KEPT],
}

struct Slot {
    address: AtomicUsize,
    code: AtomicI32,
    lsb: AtomicU8,
    in_kvm_run: AtomicBool,
}

thread_local! {
    static KEPT_HERE: Kept = const {
        Kept {
            attached: AtomicBool::new(false),
            in_kvm_run: AtomicBool::new(false),
            head: AtomicU32::new(0),
            tail: AtomicU32::new(0),
            slots: [const {
                Slot {
                    address: AtomicUsize::new(0),
                    code: AtomicI32::new(0),
                    lsb: AtomicU8::new(0),
                    in_kvm_run: AtomicBool::new(false),
                }
            }; KEPT],
        }
    };
}

impl BusErrors {
    /// Installs the handler, if it is not yet.
    ///
    /// Do it when no other thread changes the action of `SIGBUS`: between the look at what is there and
    /// the change another's would be lost.
    ///
    /// # Errors
    /// [`BusErrorsError::Handler`]; the action is what it was.
    pub fn install() -> Result<Self, BusErrorsError> {
        let _alone = lock(&WRITER);
        if INSTALLED.load(Ordering::Relaxed) {
            return Ok(Self(()));
        }
        let failed = || BusErrorsError::Handler {
            errno: Errno::from(io::Error::last_os_error()),
        };
        let mut old = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: only asks; `old` is a sigaction to be written.
        if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), old.as_mut_ptr()) } != 0 {
            return Err(failed());
        }
        // SAFETY: all zeroes are a valid sigaction, and the call has filled it.
        let old = unsafe { old.assume_init() };
        PREVIOUS.get_or_init(|| old);
        if !set_own_action() {
            return Err(failed());
        }
        INSTALLED.store(true, Ordering::Relaxed);
        Ok(Self(()))
    }

    /// Declares that `bytes` from `address` are guest memory: of what a vCPU's thread itself touches and
    /// finds lost there, the page is replaced by one of zeros, and the error is told. For each thread that
    /// finds it lost: two at once may both replace it.
    ///
    /// # Safety
    /// The range is a mapping of guest memory for as long as the result lives: nobody holds a reference
    /// into it, and what is read from it is never taken to be what was written before.
    ///
    /// # Errors
    /// [`BusErrorsError::TooMany`], [`BusErrorsError::NotPages`].
    pub unsafe fn watch(
        self,
        address: HostAddress,
        bytes: usize,
    ) -> Result<Watched, BusErrorsError> {
        let whole = |value: usize| value.is_multiple_of(PAGE);
        if bytes == 0
            || !whole(address.0)
            || !whole(bytes)
            || address.0.checked_add(bytes).is_none()
        {
            return Err(BusErrorsError::NotPages { address, bytes });
        }
        let _alone = lock(&WRITER);
        let free = |range: &Range| range.len.load(Ordering::Relaxed) == 0;
        let slot = WATCHED
            .iter()
            .position(free)
            .ok_or(BusErrorsError::TooMany)?;
        if let Some(range) = WATCHED.get(slot) {
            // Both pair with the acquires in `watched`. Who sees this start sees that the range before it has
            // ended, and so never takes its length for this one's.
            range.start.store(address.0, Ordering::Release);
            range.len.store(bytes, Ordering::Release);
        }
        Ok(Watched { slot })
    }

    /// Has `handler` called for each fault that is not kept for a vCPU, before that goes where it went: a
    /// thread that is no vCPU's has run into a lost page, or a vCPU's has with an access of its own outside
    /// all watched ranges. Not for a signal that was sent, nor for an error that nobody has run into. In the
    /// process there is one; another takes its place.
    ///
    /// It is called in the signal's handler, on the thread that has run into the page, with `SIGBUS` blocked
    /// there. It may keep the thread for ever.
    ///
    /// # Safety
    /// `handler` does what may be done at any moment, in the midst of whatever else its thread does (see
    /// `signal-safety(7)`): no lock, no allocation, no panic; and it returns true only where the access can
    /// be made again and nothing relies on what was lost.
    pub unsafe fn otherwise(self, handler: Otherwise) {
        // Release: with it its thread sees what was made before it was set. Pairs with the acquire in `settled`.
        OTHERWISE.store(handler as *mut (), Ordering::Release);
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _alone = lock(&WRITER);
        if let Some(range) = WATCHED.get(self.slot) {
            range.len.store(0, Ordering::Release);
        }
    }
}

/// Whether all of it lies in one watched range. In the handler.
fn watched(start: usize, bytes: usize) -> bool {
    WATCHED.iter().any(|range| {
        let len = range.len.load(Ordering::Acquire);
        let first = range.start.load(Ordering::Acquire);
        len != 0
            && range.len.load(Ordering::Relaxed) == len
            && start >= first
            && start - first < len
            && len - (start - first) >= bytes
    })
}

/// Attached while it lives: until it is dropped on that thread, or another takes its place.
#[derive(Debug, Default)]
pub(super) struct Attachment {
    /// By the address of its [`Kept`]; 0 is none. Relaxed: only the vCPU's thread of the time uses it.
    thread: AtomicUsize,
}

impl Attachment {
    /// The calling thread's errors are kept from now on, if the handler is installed.
    pub(super) fn attach(&self) -> Result<(), Errno> {
        if !INSTALLED.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: `sigemptyset` initialises the set that the others use; the mask is this thread's own.
        // A blocked SIGBUS at an access would end the process.
        let error = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), libc::SIGBUS);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut())
        };
        if error != 0 {
            return Err(Errno::new(error));
        }
        KEPT_HERE.with(|kept| {
            kept.tail
                .store(kept.head.load(Ordering::Relaxed), Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
            kept.attached.store(true, Ordering::Relaxed);
            let here = std::ptr::from_ref(kept).addr();
            self.thread.store(here, Ordering::Relaxed);
        });
        Ok(())
    }

    pub(super) fn detach(&self) {
        let thread = self.thread.swap(0, Ordering::Relaxed);
        if thread == 0 {
            return;
        }
        KEPT_HERE.with(|kept| {
            if std::ptr::from_ref(kept).addr() == thread {
                kept.attached.store(false, Ordering::Relaxed);
            }
        });
    }

    /// The oldest error kept, on the attached thread.
    #[inline]
    pub(super) fn take(&self) -> Option<BusError> {
        if self.thread.load(Ordering::Relaxed) == 0 {
            return None;
        }
        KEPT_HERE.with(Kept::take)
    }

    /// Marks the thread as being in `KVM_RUN`, for as long as `run` takes.
    #[inline]
    pub(super) fn in_kvm_run<T>(&self, run: impl FnOnce() -> T) -> T {
        if self.thread.load(Ordering::Relaxed) == 0 {
            return run();
        }
        KEPT_HERE.with(|kept| {
            kept.in_kvm_run.store(true, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
            let result = run();
            compiler_fence(Ordering::SeqCst);
            kept.in_kvm_run.store(false, Ordering::Relaxed);
            result
        })
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.detach();
    }
}

impl Kept {
    fn take(&self) -> Option<BusError> {
        let tail = self.tail.load(Ordering::Relaxed);
        if self.head.load(Ordering::Relaxed) == tail {
            return None;
        }
        compiler_fence(Ordering::SeqCst);
        let slot = self.slots.get(tail as usize % KEPT)?;
        let error = BusError {
            address: HostAddress(slot.address.load(Ordering::Relaxed)),
            code: match slot.code.load(Ordering::Relaxed) {
                BUS_MCEERR_AR => BusErrorCode::ActionRequired,
                BUS_MCEERR_AO => BusErrorCode::ActionOptional,
                BUS_ADRERR => BusErrorCode::NoSuchAddress,
                other => BusErrorCode::Other(other),
            },
            bytes: extent(slot.lsb.load(Ordering::Relaxed)),
            during: match slot.in_kvm_run.load(Ordering::Relaxed) {
                true => During::KvmRun,
                false => During::Handler,
            },
        };
        compiler_fence(Ordering::SeqCst);
        // The slot is the handler's again.
        self.tail.store(tail.wrapping_add(1), Ordering::Relaxed);
        Some(error)
    }

    /// In the handler. Full, the newest is dropped: the oldest are enough to stop a guest by.
    fn keep(&self, address: usize, code: i32, lsb: u8, in_kvm_run: bool) {
        let head = self.head.load(Ordering::Relaxed);
        let kept = head.wrapping_sub(self.tail.load(Ordering::Relaxed)) as usize;
        if let Some(slot) = self.slots.get(head as usize % KEPT).filter(|_| kept < KEPT) {
            slot.address.store(address, Ordering::Relaxed);
            slot.code.store(code, Ordering::Relaxed);
            slot.lsb.store(lsb, Ordering::Relaxed);
            slot.in_kvm_run.store(in_kvm_run, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
            self.head.store(head.wrapping_add(1), Ordering::Relaxed);
        }
    }
}

/// `si_addr_lsb` in bytes; a page where it says less, or more than any page has.
const fn extent(lsb: u8) -> usize {
    if lsb > 12 && lsb <= 30 {
        1 << lsb
    } else {
        PAGE
    }
}

/// Only the kernel's: `si_code`s that a sender gives itself are 0 or less.
extern "C" fn on_bus_error(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the location is this thread's own, at any moment.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: with SA_SIGINFO the kernel hands over a siginfo that lives until this returns.
    let info_of = unsafe { info.as_ref() };
    let done =
        info_of.is_some_and(|info| KEPT_HERE.with(|kept| caught(kept, info)) || settled(info));
    if !done {
        // SAFETY: as the kernel called us.
        unsafe { pass_on(signal, info, context) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Whether the signal is kept for this thread, and what made it is out of the way.
fn caught(kept: &Kept, info: &libc::siginfo_t) -> bool {
    let code = info.si_code;
    if !kept.attached.load(Ordering::Relaxed) || code <= 0 {
        return false;
    }
    // SAFETY: these codes of a SIGBUS have an address.
    let address = unsafe { info.si_addr() }.addr();
    let lsb = match code {
        BUS_MCEERR_AR | BUS_MCEERR_AO => addr_lsb(info),
        _ => 0,
    };
    let in_kvm_run = kept.in_kvm_run.load(Ordering::Relaxed);
    let harmless = in_kvm_run || code == BUS_MCEERR_AO;
    if !harmless && !replace(address, extent(lsb)) {
        return false;
    }
    kept.keep(address, code, lsb, in_kvm_run);
    true
}

/// Whether the consumer has taken the cause of a fault out of the way.
fn settled(info: &libc::siginfo_t) -> bool {
    // Acquire: pairs with the release in `BusErrors::otherwise`.
    let handler = OTHERWISE.load(Ordering::Acquire);
    // Not one that was sent or is told early, nor x86's stack fault (`SI_KERNEL`), which has no address.
    let is_access = matches!(
        info.si_code,
        libc::BUS_ADRALN | libc::BUS_ADRERR | BUS_MCEERR_AR
    );
    if handler.is_null() || !is_access {
        return false;
    }
    // SAFETY: nothing but an `Otherwise` is stored there.
    let handler = unsafe { std::mem::transmute::<*mut (), Otherwise>(handler) };
    // SAFETY: these codes of a SIGBUS have an address.
    handler(HostAddress(unsafe { info.si_addr() }.addr()))
}

/// `si_addr_lsb`, which libc's `siginfo_t` does not show: a 16-bit number behind the address.
fn addr_lsb(info: &libc::siginfo_t) -> u8 {
    const OFFSET: usize = 16 + size_of::<usize>();
    const { assert!(OFFSET + 2 <= size_of::<libc::siginfo_t>()) };
    // SAFETY: inside the siginfo (asserted), which the kernel fills whole.
    let lsb = unsafe {
        std::ptr::from_ref(info)
            .cast::<u8>()
            .add(OFFSET)
            .cast::<u16>()
            .read_unaligned()
    };
    u8::try_from(lsb).unwrap_or(0)
}

/// Puts zeros where the lost memory was, if it is watched.
fn replace(address: usize, bytes: usize) -> bool {
    let start = address & !(bytes - 1);
    if !watched(start, bytes) {
        return false;
    }
    // SAFETY: the range is guest memory by the promise of `BusErrors::watch`, and lost.
    let page = unsafe {
        libc::mmap(
            std::ptr::with_exposed_provenance_mut(start),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    page != libc::MAP_FAILED
}

/// Sets this module's action for `SIGBUS`. In the handler too.
fn set_own_action() -> bool {
    // SAFETY: all zeroes are a valid sigaction: no flags, an empty mask.
    let mut new: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    new.sa_sigaction = on_bus_error as *const () as libc::sighandler_t;
    // RESTART: system calls of other threads are none of its business. KVM_RUN ends all the same.
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: `on_bus_error` has SA_SIGINFO's signature, and is safe at any moment (see above).
    unsafe { libc::sigaction(libc::SIGBUS, &new, std::ptr::null_mut()) == 0 }
}

/// Behind a chained call: the place is this handler's again, and the chain ends with what it was given to.
fn come_back() {
    let mut now = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: only asks; all zeroes are a valid sigaction.
    let now = unsafe {
        libc::sigaction(libc::SIGBUS, std::ptr::null(), now.as_mut_ptr());
        now.assume_init()
    };
    if now.sa_sigaction == libc::SIG_DFL || now.sa_sigaction == libc::SIG_IGN {
        // Before the action is set, so that the fault that comes again finds it.
        BECAME.store(now.sa_sigaction, Ordering::SeqCst);
        set_own_action();
    }
}

/// Does what would have been done without this handler.
///
/// # Safety
/// The arguments are those of a signal handler that is running.
unsafe fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // Set before the handler was.
    let Some(previous) = PREVIOUS.get() else {
        return;
    };
    let handler = match BECAME.load(Ordering::SeqCst) {
        NOTHING_ELSE => previous.sa_sigaction,
        became => became,
    };
    // Neither has a cause that would bring it back: a signal that somebody sent, and an error that nobody
    // has run into.
    let is_sent = |info: &libc::siginfo_t| info.si_code <= 0 || info.si_code == BUS_MCEERR_AO;
    // SAFETY: `info` is valid.
    let sent = unsafe { info.as_ref() }.is_none_or(is_sent);
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        if handler == libc::SIG_IGN && sent {
            return;
        }
        // The kernel too takes the default for a fault that is ignored.
        // SAFETY: sets the default action; then the fault's cause is still there, or the signal is sent
        // again to this thread, where it waits until this handler returns.
        unsafe {
            let default: libc::sigaction = MaybeUninit::zeroed().assume_init();
            libc::sigaction(signal, &default, std::ptr::null_mut());
            if sent {
                libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal);
            }
        }
    } else if previous.sa_flags & libc::SA_SIGINFO != 0 {
        type Action = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
        // SAFETY: who set it with SA_SIGINFO gave a function of this signature.
        let action = unsafe { std::mem::transmute::<usize, Action>(handler) };
        action(signal, info, context);
        come_back();
    } else {
        type Action = extern "C" fn(libc::c_int);
        // SAFETY: who set it without SA_SIGINFO gave a function of this one.
        let action = unsafe { std::mem::transmute::<usize, Action>(handler) };
        action(signal);
        come_back();
    }
}

#[cfg(test)]
mod tests;
