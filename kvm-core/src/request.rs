// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Request bits: small facts that a vCPU must act on before it runs guest code again
//! (`vcpu->requests`, `kvm_make_request`, `kvm_check_request`).

use crate::sync::{AtomicU64, Ordering};

/// One request, a bit of 64. The low eight are this crate's, the others a consumer's:
/// `Request::consumer(0)` to `Request::consumer(55)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request(u8);

impl Request {
    /// How many requests a consumer has to itself.
    pub const CONSUMERS: u8 = 56;

    /// Look at the control state: somebody pauses or stops the VM.
    pub(crate) const CONTROL: Self = Self(0);
    /// Go round once: leave the guest, do nothing, enter again (`KVM_REQ_KICK`).
    pub(crate) const KICK: Self = Self(1);
    /// Say that the guest was left (`KVM_REQUEST_WAIT`).
    pub(crate) const ACKNOWLEDGE: Self = Self(2);
    /// Raise an NMI (`KVM_REQ_NMI` is what the kernel makes of it).
    pub(crate) const NMI: Self = Self(3);
    /// Look at the ledger: somebody holds the vCPU out of the guest, or releases it.
    pub(crate) const HOLD: Self = Self(4);

    /// The consumer's request number `n`, or `None` beyond the 56 that there are.
    #[must_use]
    pub const fn consumer(n: u8) -> Option<Self> {
        if n < Self::CONSUMERS {
            Some(Self(n + 8))
        } else {
            None
        }
    }

    const fn bit(self) -> u64 {
        1 << self.0
    }
}

/// A set of [`Request`]s, as a vCPU took them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Requests(u64);

impl Requests {
    const OWN: u64 = 0xff;

    /// No request at all.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `request` is in the set.
    #[must_use]
    pub const fn contains(self, request: Request) -> bool {
        self.0 & request.bit() != 0
    }

    /// The set with `request` in it.
    #[must_use]
    pub const fn with(self, request: Request) -> Self {
        Self(self.0 | request.bit())
    }

    /// The requests in it, lowest bit first.
    pub fn iter(self) -> impl Iterator<Item = Request> {
        (0..64)
            .map(Request)
            .filter(move |request| self.contains(*request))
    }

    /// Those of the set that belong to the consumer.
    pub(crate) const fn consumers(self) -> Self {
        Self(self.0 & !Self::OWN)
    }
}

/// The pending requests of one vCPU.
#[derive(Debug)]
pub(crate) struct RequestCell(AtomicU64);

impl RequestCell {
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// `kvm_make_request`. Release pairs with the acquire of [`RequestCell::take`]: what the caller
    /// wrote before it asked is there for the vCPU that serves the request.
    pub(crate) fn make(&self, requests: Requests) {
        self.0.fetch_or(requests.0, Ordering::Release);
    }

    /// Whether anything is pending. Relaxed: the entry's fence orders it (see `kick.rs`).
    pub(crate) fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }

    /// `kvm_check_request`, for all bits at once. Acquire pairs with the release of
    /// [`RequestCell::make`].
    pub(crate) fn take(&self) -> Requests {
        Requests(self.0.swap(0, Ordering::Acquire))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_consumer_has_56_requests_and_none_of_ours() {
        for n in 0..=u8::MAX {
            match Request::consumer(n) {
                Some(request) => {
                    let set = Requests::default().with(request);
                    assert_eq!(set.consumers(), set);
                    assert_eq!(set.iter().collect::<Vec<_>>(), [request]);
                }
                None => assert!(n >= 56),
            }
        }
        let own = Requests::default()
            .with(Request::CONTROL)
            .with(Request::KICK)
            .with(Request::ACKNOWLEDGE)
            .with(Request::NMI)
            .with(Request::HOLD);
        assert!(own.consumers().is_empty());
    }

    #[test]
    fn what_is_taken_is_gone() {
        let cell = RequestCell::new();
        assert!(!cell.any());
        cell.make(Requests::default().with(Request::KICK));
        cell.make(Requests::default().with(Request::CONTROL));
        assert!(cell.any());
        let taken = cell.take();
        assert!(taken.contains(Request::KICK) && taken.contains(Request::CONTROL));
        assert!(!cell.any() && cell.take().is_empty());
    }
}
