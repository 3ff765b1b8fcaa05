// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the pager tells this monitor of.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use async_pf::pager::{Lost, LostReason, PagerEvents};
use memslots::{Errno, PAGE_SIZE};

use super::OnLoss;
use crate::end::{Chain, EndSignal, GuestEnd};

/// How long who runs into memory that is lost waits for the reason, at most, which is told a moment behind that.
pub(super) const REASON: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(1);

/// Tells the guest's end if a page does not come and that is to be so. Blocks for nothing.
pub(super) struct Events {
    end: Arc<EndSignal>,
    on_loss: OnLoss,
    first: OnceLock<String>,
    /// The machine is over: what does not come is wanted by nobody.
    over: AtomicBool,
    /// What is waited for when a page is late, if that is known.
    waits_for: OnceLock<Box<WaitsFor>>,
}

/// Says what is waited for.
pub(super) type WaitsFor = dyn Fn() -> Option<String> + Send + Sync;

impl Events {
    pub(super) fn new(end: Arc<EndSignal>, on_loss: OnLoss) -> Self {
        Events {
            end,
            on_loss,
            first: OnceLock::new(),
            over: AtomicBool::new(false),
            waits_for: OnceLock::new(),
        }
    }

    /// What becomes of the guest.
    pub(super) fn on_loss(&self) -> OnLoss {
        self.on_loss
    }

    /// Asked when a page is late. Once.
    pub(super) fn ask(&self, waits_for: Box<WaitsFor>) {
        let _ = self.waits_for.set(waits_for);
    }

    /// The machine is over: of what does not come from now on nobody is told.
    pub(super) fn machine_is_over(&self) {
        // Relaxed: who misses it tells of an end behind another, of which the first counts.
        self.over.store(true, Ordering::Relaxed);
    }

    /// Why the first page did not come.
    pub(super) fn why(&self) -> String {
        self.first.get().cloned().unwrap_or_default()
    }

    /// The same, in any case in words. It is waited for: who comes upon the page as it is poisoned is before who tells of it.
    pub(super) fn reason(&self) -> String {
        let begun = Instant::now();
        loop {
            // Asked first: the reason stands before the end is told for it.
            let is_over = self.is_over();
            match self.why() {
                why if !why.is_empty() => return why,
                _ if is_over || begun.elapsed() >= REASON => {
                    return "memory of the guest's did not come".into();
                }
                _ => thread::sleep(LOOK),
            }
        }
    }

    /// Whether the end has been told, for want of memory or otherwise.
    pub(super) fn is_over(&self) -> bool {
        self.end.is_told()
    }

    /// Whether who heard of the first page that did not come has told the end for it, if that is to be so.
    pub(super) fn is_dealt_with(&self) -> bool {
        self.on_loss == OnLoss::Poison || self.end.is_told()
    }

    /// The end, once told.
    pub(super) fn last_word(&self) -> Option<GuestEnd> {
        self.end.last_word()
    }

    /// Why the machine is over.
    pub(super) fn ended(&self) -> String {
        match self.end.get() {
            Some(end) => end.to_string(),
            None => "its monitor has ended it".into(),
        }
    }

    /// A thread of this process waits at a page that did not come, and cannot go on, whatever is to become of the guest.
    pub(super) fn parked(&self) {
        let why = format!("a device needs what is lost: {}", self.reason());
        self.end.tell(GuestEnd::Failed(why));
    }

    /// Something that ends the guest, or costs it pages.
    pub(super) fn tell(&self, why: String) {
        // Before the end is told: who hears of it asks why.
        let is_first = self.first.set(why.clone()).is_ok();
        match (self.on_loss, is_first) {
            (OnLoss::Stop, _) => {
                let remedy = "with --on-loss poison a guest goes on without what is lost";
                self.end.tell(GuestEnd::Failed(format!("{why}; {remedy}")));
            }
            (OnLoss::Poison, true) => log::error!(
                "{why}; the guest goes on: where it touches what is lost, which may be more than this page (`ctl status` has \
                 the count), it has a machine check, or ends if KVM tells too little for one"
            ),
            // A piece of a file has many pages.
            (OnLoss::Poison, false) => log::debug!("{why}"),
        }
    }
}

impl PagerEvents for Events {
    fn lost(&self, lost: &Lost<'_>) {
        if self.over.load(Ordering::Relaxed) {
            return;
        }
        let at = lost.gfn.0.saturating_mul(PAGE_SIZE);
        let late = matches!(
            lost.reason,
            LostReason::Deadline(_) | LostReason::Failing { .. }
        );
        let waits_for = self.waits_for.get().filter(|_| late);
        let waits_for = waits_for.and_then(|ask| ask()).map(|of| format!("; {of}"));
        let why = Chain(lost.reason).to_string();
        // It stands before it already.
        let gfn = format!("gfn {:#x}: ", lost.gfn.0);
        let why = why.strip_prefix(&gfn).unwrap_or(&why);
        let why = why.replace(
            &format!("the peer cannot read {}", &gfn),
            "its page server cannot read it: ",
        );
        self.tell(format!(
            "the guest's memory at {at:#x} does not come: {why}{}",
            waits_for.unwrap_or_default()
        ));
    }

    fn failed(&self, errno: Errno) {
        // Nobody can be served any more, whatever is to become of single pages.
        let why = format!("the guest's page faults cannot be read any more: {errno}");
        // As above.
        let _ = self.first.set(why.clone());
        self.end.tell(GuestEnd::Failed(why));
    }
}

/// Whether this waits for no [`REASON`]. A host that was busy for so long is asked again.
#[cfg(test)]
pub(super) fn is_at_once(ask: impl Fn()) -> bool {
    (0..10).any(|_| {
        let begun = Instant::now();
        ask();
        begun.elapsed() < REASON
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behind_an_end_that_is_told_otherwise_nobody_waits_for_a_reason() {
        for on_loss in [OnLoss::Stop, OnLoss::Poison] {
            let end = Arc::new(EndSignal::new().unwrap());
            let events = Events::new(Arc::clone(&end), on_loss);
            end.tell(GuestEnd::PoweredOff);
            let unknown = "memory of the guest's did not come";
            assert!(is_at_once(|| assert_eq!(events.reason(), unknown)));
            // One that is there is given all the same.
            events.tell("the reason".into());
            assert_eq!(events.reason(), "the reason");
        }
    }
}
