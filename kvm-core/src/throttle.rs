// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All vCPUs of a VM slowed down: each sleeps a part of its time, as QEMU's `cpu-throttle` has it.
//!
//! ```text
//!   the throttle's thread              a vCPU's thread
//!   ──────────────────────             ────────────────────────────────
//!   how long has it run? ◄── CPU time ─ KVM_RUN …
//!   10 ms: it owes a sleep ── ask ────► out of the guest, rests on its blocker
//!   look again in 10 ms                  nudged: pause, stop, kick, release
//!                                        over: KVM_RUN …
//! ```
//!
//! What counts is the CPU time of the vCPU's thread ([`Doorbell::cpu_time`](crate::Doorbell::cpu_time)), and not the
//! clock: a vCPU that sleeps in HLT inside KVM is neither woken nor charged, and one that the host gives half of a
//! processor sleeps its part of that half: beside others it is slowed by less than the number says. The thread looks each 10 ms (beyond 95 % more often: a slice and its sleep are
//! no longer than 200 ms), or when the first vCPU can have run for so long; while the throttle is 0 it sleeps.
//!
//! Lock order: the throttle's, then `members`, then a vCPU's ledger. Charging is done under the throttle's lock, so that
//! nothing is charged behind a release.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::control::Control;
use crate::hold::SLICE;
use crate::sync::thread::{Builder, JoinHandle};
use crate::sync::{Condvar, Mutex, lock, wait, wait_for};

/// vCPUs are looked at no more often.
const LEAST: Duration = Duration::from_millis(1);

/// Why a set is not slowed down; it is what it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ThrottleError {
    /// A vCPU cannot sleep all of its time.
    #[error("a throttle of {0} %: it is 0 to 99, the part of its time that a vCPU sleeps")]
    Percent(u8),
    /// There is one.
    #[error("the vCPUs are throttled already, by somebody else")]
    Throttled,
    /// It has a thread, and the system has none for it.
    #[error("no thread for the throttle: {0}")]
    Thread(#[source] io::Error),
}

struct Order {
    percent: u8,
    over: bool,
}

struct Shared {
    control: Arc<Control>,
    order: Mutex<Order>,
    changed: Condvar,
}

impl Shared {
    fn run(&self) {
        let mut order = lock(&self.order);
        while !order.over {
            order = match order.percent {
                0 => wait(&self.changed, order),
                percent => {
                    let next = self.control.charge_all(percent);
                    wait_for(&self.changed, order, next.clamp(LEAST, SLICE))
                }
            };
        }
    }
}

/// A throttle of all vCPUs of a set ([`VcpuSet::throttle`](crate::VcpuSet::throttle)). Dropped, it is lifted.
///
/// ```
/// # use kvm_core::fake::FakeVcpu;
/// # use kvm_core::{Identity, VcpuId, VcpuSet};
/// # let set = VcpuSet::new(Identity::vm("web-1"));
/// let throttle = set.throttle()?;
/// throttle.set(20)?; // Each vCPU sleeps 2.5 ms for each 10 ms that it has run.
/// throttle.set(30)?;
/// assert_eq!(throttle.percent(), 30);
/// drop(throttle); // All run as before.
/// # Ok::<(), kvm_core::ThrottleError>(())
/// ```
#[must_use = "the throttle ends when it is dropped"]
pub struct Throttle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    pub(crate) fn new(control: &Arc<Control>) -> Result<Self, ThrottleError> {
        if !control.begin_throttle() {
            return Err(ThrottleError::Throttled);
        }
        let order = Order {
            percent: 0,
            over: false,
        };
        let shared = Arc::new(Shared {
            control: control.clone(),
            order: Mutex::new(order),
            changed: Condvar::new(),
        });
        let of_thread = shared.clone();
        // What is dropped on an error ends it.
        let mut throttle = Self {
            shared,
            thread: None,
        };
        let thread = Builder::new().name("throttle".into());
        let thread = thread.spawn(move || of_thread.run());
        throttle.thread = Some(thread.map_err(ThrottleError::Thread)?);
        Ok(throttle)
    }

    /// Has each vCPU sleep `percent` of its time from now on; 0 is not at all. Less than before, and those that sleep for
    /// it are woken at once; who is [held](crate::VcpuSet::hold) besides stays so. Does not block.
    ///
    /// # Errors
    /// [`ThrottleError::Percent`]; what was in force still is.
    pub fn set(&self, percent: u8) -> Result<(), ThrottleError> {
        if percent > 99 {
            return Err(ThrottleError::Percent(percent));
        }
        let mut order = lock(&self.shared.order);
        let before = std::mem::replace(&mut order.percent, percent);
        if percent < before {
            self.shared.control.lift_all();
        }
        drop(order);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// What is in force, 0 to 99.
    #[must_use]
    pub fn percent(&self) -> u8 {
        lock(&self.shared.order).percent
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let mut order = lock(&self.shared.order);
        order.over = true;
        self.shared.control.lift_all();
        drop(order);
        self.shared.changed.notify_all();
        // It waits for nobody but this lock.
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a throttle's thread panicked");
        }
        self.shared.control.end_throttle();
    }
}

impl std::fmt::Debug for Throttle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Throttle of {} %", self.percent())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use crate::fake::FakeVcpu;
    use crate::hold::SLICE;
    use crate::{Identity, VcpuId, VcpuSet};

    #[test]
    fn the_throttle_looks_again_when_the_first_vcpu_can_have_run_for_a_slice() {
        let set = VcpuSet::new(Identity::vm("test"));
        let vcpus = [0, 1].map(|id| FakeVcpu::new(VcpuId(id), []));
        let states = vcpus.each_ref().map(FakeVcpu::state);
        let _runners = vcpus.map(|vcpu| set.enroll(vcpu).unwrap());
        // At 0 % its own thread looks at nothing.
        let throttle = set.throttle().unwrap();
        let look = || throttle.shared.control.charge_all(50);
        assert_eq!(look(), SLICE);
        states[0].has_run(SLICE * 4 / 10);
        states[1].has_run(SLICE * 7 / 10);
        assert_eq!(look(), SLICE * 3 / 10);
        states[1].has_run(SLICE);
        assert_eq!(look(), SLICE * 6 / 10);
    }
}
