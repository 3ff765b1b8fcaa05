// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One vCPU's page faults under way: the queue list, the done list, and what moves between them.
//!
//! The kernel keeps two lists a vCPU in `virt/kvm/async_pf.c`: everything not yet told to the guest
//! is on `queue`, what has arrived is on `done` too. The functions keep their names here, without
//! the work queue and the locks: this type is plain data, one owner at a time.

use std::collections::VecDeque;
use std::num::NonZeroU32;

use memslots::Gfn;

use crate::{Error, RequestEvent, RequestState};

/// How many pages a vCPU of KVM may wait for at once: `ASYNC_PF_PER_VCPU`.
pub const ASYNC_PF_PER_VCPU: usize = 64;

/// The token that means "all of them" to a guest: a wake-up for every waiting task.
pub const WAKE_ALL_TOKEN: u32 = u32::MAX;

const VCPU_BITS: u32 = 12;
const MAX_VCPU: u16 = (1 << VCPU_BITS) - 1;
const MAX_SERIAL: u32 = (1 << (32 - VCPU_BITS)) - 1;

/// Names one request, as the token names it that KVM gives a guest: a serial number above twelve
/// bits of vCPU number; never zero, which a guest reads as "no event", and never all ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(NonZeroU32);

impl Token {
    /// The vCPU that waits.
    pub const fn vcpu(self) -> u16 {
        (self.0.get() & MAX_VCPU as u32) as u16
    }

    /// The number as a guest sees it.
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// `serial` is from 1 to `MAX_SERIAL` - 1, which keeps both reserved values out.
    const fn new(serial: u32, vcpu: u16) -> Option<Self> {
        match NonZeroU32::new(serial << VCPU_BITS | vcpu as u32) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }
}

/// What a vCPU is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Completion {
    /// The page that this token waited for is here.
    Ready {
        /// The request.
        token: Token,
        /// Its page.
        gfn: Gfn,
    },
    /// The page that this token waited for will not come.
    Failed {
        /// The request.
        token: Token,
        /// Its page.
        gfn: Gfn,
    },
    /// Every waiter should look again; its token is [`WAKE_ALL_TOKEN`].
    WakeAll,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    token: Token,
    gfn: Gfn,
    state: RequestState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    Request(Token),
    WakeAll,
}

/// The pages that one vCPU waits for, and those that have arrived without its knowing.
///
/// ```
/// use async_pf::{Completion, VcpuQueue};
/// use memslots::Gfn;
///
/// let mut queue = VcpuQueue::new(0)?;
/// let token = queue.setup(Gfn(0x100))?;
/// assert_eq!(queue.check_completion(), None); // still under way
/// assert!(queue.arrived(token)?, "the first on the done list: kick the vCPU");
/// assert_eq!(queue.check_completion(), Some(Completion::Ready { token, gfn: Gfn(0x100) }));
/// # Ok::<(), async_pf::Error>(())
/// ```
#[derive(Debug)]
pub struct VcpuQueue {
    vcpu: u16,
    bound: usize,
    serial: u32,
    /// The queue list: everything that the vCPU has not been told, in no order.
    requests: Vec<Request>,
    /// The done list, in order of arrival.
    done: VecDeque<Done>,
}

impl VcpuQueue {
    /// An empty queue with KVM's bound, [`ASYNC_PF_PER_VCPU`].
    ///
    /// # Errors
    /// [`Error::VcpuTooLarge`] from vCPU 4096 on.
    pub fn new(vcpu: u16) -> Result<Self, Error> {
        Self::with_bound(vcpu, ASYNC_PF_PER_VCPU)
    }

    /// An empty queue that lets the vCPU wait for `bound` pages. Allocates for all of them; no
    /// later call allocates.
    ///
    /// # Errors
    /// [`Error::VcpuTooLarge`] from vCPU 4096 on; [`Error::Bound`] of more pages than tokens can name.
    pub fn with_bound(vcpu: u16, bound: usize) -> Result<Self, Error> {
        if vcpu > MAX_VCPU {
            return Err(Error::VcpuTooLarge {
                vcpu,
                max: MAX_VCPU,
            });
        }
        let max = MAX_SERIAL as usize - 1;
        if bound > max {
            return Err(Error::Bound { bound, max });
        }
        Ok(Self {
            vcpu,
            bound,
            serial: 0,
            requests: Vec::with_capacity(bound),
            done: VecDeque::with_capacity(bound + 1), // and one wake-all
        })
    }

    /// `kvm_setup_async_pf`: the vCPU begins to wait for `gfn`.
    ///
    /// # Errors
    /// [`Error::QueueFull`] at the bound; the kernel's `false`: serve the fault synchronously.
    pub fn setup(&mut self, gfn: Gfn) -> Result<Token, Error> {
        let (full, stuck) = (
            Error::QueueFull {
                vcpu: self.vcpu,
                bound: self.bound,
            },
            RequestState::Free.after(RequestEvent::Setup),
        );
        if self.requests.len() >= self.bound {
            return Err(full);
        }
        let (Some(token), Some(state)) = (self.next_token(), stuck) else {
            return Err(full);
        };
        self.requests.push(Request { token, gfn, state });
        Ok(token)
    }

    /// The page of `token` is here. Returns whether the done list was empty: then the vCPU has not
    /// been kicked for an earlier arrival, and must be.
    ///
    /// # Errors
    /// [`Error::StaleToken`] where nothing waits under the token: after
    /// [`clear_completion`](Self::clear_completion) that is an answer, not a fault.
    pub fn arrived(&mut self, token: Token) -> Result<bool, Error> {
        self.finish(token, RequestEvent::Arrived)
    }

    /// The page of `token` will not come; otherwise as [`arrived`](Self::arrived).
    ///
    /// # Errors
    /// [`Error::StaleToken`].
    pub fn gave_up(&mut self, token: Token) -> Result<bool, Error> {
        self.finish(token, RequestEvent::GaveUp)
    }

    /// `kvm_check_async_pf_completion`: the oldest thing that the vCPU has not been told, which
    /// counts as told from here on. Ask only when the vCPU (or its guest) can be told.
    pub fn check_completion(&mut self) -> Option<Completion> {
        loop {
            let token = match self.done.pop_front()? {
                Done::WakeAll => return Some(Completion::WakeAll),
                Done::Request(token) => token,
            };
            // A token on the done list is on the queue list: `clear_completion` empties both.
            let at = self
                .requests
                .iter()
                .position(|request| request.token == token);
            let Some(request) = at.map(|at| self.requests.swap_remove(at)) else {
                continue;
            };
            let (token, gfn) = (request.token, request.gfn);
            return Some(match request.state {
                RequestState::Failed => Completion::Failed { token, gfn },
                _ => Completion::Ready { token, gfn },
            });
        }
    }

    /// `kvm_clear_async_pf_completion_queue`: the vCPU stops caring (its reset, or the guest
    /// switched the notifications off). `cancelled` is called for each page that was still under
    /// way, so that its fetch can be given up where no one else waits.
    pub fn clear_completion(&mut self, mut cancelled: impl FnMut(Token, Gfn)) {
        self.done.clear();
        for request in self.requests.drain(..) {
            if request.state == RequestState::Waiting {
                cancelled(request.token, request.gfn);
            }
        }
    }

    /// `kvm_async_pf_wakeup_all`: tell the guest to look at every page again, for instance after a
    /// restore, where tokens of the saved guest name nothing here. Returns whether the vCPU must
    /// be kicked.
    ///
    /// As in the kernel nothing is added where the done list has something: what is there will
    /// bring the vCPU to look anyway.
    pub fn wake_all(&mut self) -> bool {
        if !self.done.is_empty() {
            return false;
        }
        self.done.push_back(Done::WakeAll);
        true
    }

    /// How many requests the vCPU has not been told about, arrived or not.
    pub fn queued(&self) -> usize {
        self.requests.len()
    }

    /// Whether there is something to tell.
    pub fn has_done(&self) -> bool {
        !self.done.is_empty()
    }

    /// The vCPU.
    pub const fn vcpu(&self) -> u16 {
        self.vcpu
    }

    fn finish(&mut self, token: Token, event: RequestEvent) -> Result<bool, Error> {
        let request = self
            .requests
            .iter_mut()
            .find(|request| request.token == token);
        let next = request.and_then(|request| Some((request.state.after(event)?, request)));
        let Some((state, request)) = next else {
            return Err(Error::StaleToken { token });
        };
        request.state = state;
        let first = self.done.is_empty();
        self.done.push_back(Done::Request(token));
        Ok(first)
    }

    /// The next serial number that no request holds. Serials come round after a million; a request
    /// that has waited through all of them keeps its own.
    fn next_token(&mut self) -> Option<Token> {
        for _ in 0..=self.requests.len() {
            self.serial = if self.serial >= MAX_SERIAL - 1 {
                1
            } else {
                self.serial + 1
            };
            let token = Token::new(self.serial, self.vcpu)?;
            if self.requests.iter().all(|request| request.token != token) {
                return Some(token);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_come_round_without_meeting_one_that_waits() {
        let mut queue = VcpuQueue::new(MAX_VCPU).unwrap();
        let patient = queue.setup(Gfn(1)).unwrap();
        queue.serial = MAX_SERIAL - 2;
        let last = queue.setup(Gfn(2)).unwrap();
        assert_ne!(last.get(), WAKE_ALL_TOKEN);
        let wrapped = queue.setup(Gfn(3)).unwrap();
        assert_ne!(wrapped, patient);
        assert_ne!(wrapped.get(), 0);
        assert_eq!((wrapped.vcpu(), wrapped.get() >> VCPU_BITS), (MAX_VCPU, 2));
    }
}
