// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory of a guest that came before it: post-copy.
//!
//! What came in pre-copy's rounds is there. Of the rest some may be there as well, as it was, and is taken away: behind the
//! registration, from which on the kernel makes no page of its own accord (khugepaged would fill a hole with zeros). And
//! before the pager, which would take what is given back for zeros.

#![forbid(unsafe_code)]

use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::time::{Duration, Instant};

use async_pf::pager::{GiveUp, PagedSlot, Pager, PagerConfig, Stats};
use async_pf::{Fetched, Lane, PageSource};
use memslots::uffd::{Features, Modes, Registration, Uffd};
use memslots::{Gfn, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use super::bus::Parked;
use super::events::Events;
use super::memory::{AHEAD, From, LazyMemory, Shared, State};
use super::{LazyError, LazyRequest, LazyState, OnLoss};
use crate::end::EndSignal;
use crate::memory::{Memslots, SlotTable};
use crate::migration::postcopy::Faults;
use crate::migration::postcopy::ask::Later;
use crate::units;

/// What is brought with a page that somebody touches: what lies behind it is often wanted next, and a round trip costs more.
pub(super) const NEAR: u64 = 64 << 10;

/// Told that nothing more will be asked for.
pub(super) type Enough = crate::migration::postcopy::ask::Enough;
/// For how long the source has been waited for, if it is.
pub(super) type Waits = dyn Fn() -> Option<Duration> + Send + Sync;

pub(super) fn faults(stats: &Stats) -> Faults {
    let nanos = |of: Duration| u64::try_from(of.as_nanos()).unwrap_or(u64::MAX);
    let latency = &stats.latency;
    Faults {
        count: latency.count(),
        p50_ns: nanos(latency.percentile(50.0)),
        p99_ns: nanos(latency.percentile(99.0)),
        max_ns: nanos(latency.max()),
    }
}

/// A userfaultfd, and all memory of a machine with it that can be written.
fn register(table: &SlotTable) -> Result<(Uffd, Vec<Registration>), LazyError> {
    // No events: who takes memory away here waits for nobody.
    let uffd = Uffd::open(Features::NONE, Features::NONE)?;
    if !uffd.available().contains(Features::POISON) {
        return Err(LazyError::NoPoison);
    }
    let writable = table.regions().filter(|region| !region.is_read_only());
    let registered = writable.map(|region| uffd.register_all(region.mapping(), Modes::MISSING));
    let registrations = registered.collect::<Result<_, _>>()?;
    Ok((uffd, registrations))
}

/// Whether memory could come later into `memslots`, which nobody uses yet: tries it.
///
/// # Errors
/// [`LazyError`]: the host refuses, with the remedy.
pub(crate) fn check(memslots: &Memslots) -> Result<(), LazyError> {
    let table = memslots.snapshot();
    let (_uffd, _registrations) = register(&table)?;
    let writable = table.regions().filter(|region| !region.is_read_only());
    let pages = writable.map(|region| {
        let start = region.extent().start();
        start..GuestAddress(start.0 + region.page_size())
    });
    memslots.ram().punch(&pages.collect::<Vec<_>>())?;
    Ok(())
}

impl LazyMemory {
    /// Has what `later` says of the memory of `memslots` come from there. A page that does not come is told to `end`. When
    /// this returns faults are served, and what is missing reads as nothing else.
    ///
    /// # Errors
    /// [`LazyError`]; the memory is of no use then.
    pub(crate) fn arrive(
        request: &LazyRequest,
        later: Later,
        memslots: &Memslots,
        end: &Arc<EndSignal>,
    ) -> Result<Self, LazyError> {
        let Later {
            missing,
            source,
            waits,
            enough,
        } = later;
        let begun = Instant::now();
        let table = memslots.snapshot();
        let (uffd, registrations) = register(&table)?;
        let (mut slots, mut gone, mut hosts) = (Vec::new(), Vec::new(), Vec::new());
        let mut pages = 0;
        for region in table.regions() {
            let range = region.extent().guest_range();
            let runs = missing.within(&range, region.page_size());
            if region.is_read_only() {
                for run in runs {
                    fetch(&*source, &table, run.start, run.end)?;
                }
                continue;
            }
            let guest = runs
                .iter()
                .map(|run| GuestAddress(run.start)..GuestAddress(run.end));
            gone.extend(guest);
            let page = |at: u64| Gfn(at / PAGE_SIZE);
            let runs = runs
                .into_iter()
                .map(move |run| page(run.start)..page(run.end));
            slots.push((page(range.start), runs));
            let mapping = region.mapping();
            pages += mapping.size() / mapping.page_size();
            hosts.push(mapping.host_range());
        }
        memslots.ram().punch(&gone)?;
        let events = Arc::new(Events::new(Arc::clone(end), request.on_loss));
        let parked = Parked::new(hosts, Arc::clone(&events));
        let (away, on_loss) = (Arc::clone(&waits), request.on_loss);
        events.ask(Box::new(move || {
            away().map(|since| is_gone(since, on_loss))
        }));
        let config = PagerConfig {
            // One is at what nobody waits for, a piece at a time, and one at least is there for who waits.
            workers: request.workers.max(2),
            deadline: request.deadline,
            // Until the deadline it is the connection that is waited for.
            retries: Some(u32::MAX),
            give_up: GiveUp::Poison,
            ahead: AHEAD,
            least_window: NEAR,
            events: Arc::clone(&events) as _,
            ..PagerConfig::default()
        };
        let paged = registrations.iter().zip(slots).map(|(of, (first, runs))| {
            let slot = PagedSlot::new(of, first, Arc::clone(&source));
            slot.map(|slot| slot.only(runs))
        });
        let paged = paged.collect::<Result<Vec<_>, _>>()?;
        let pager = Pager::start(&uffd, paged, config)?;
        let shared = Arc::new(Shared {
            at_once: 0,
            pager: RwLock::new(Some(pager)),
            state: Mutex::new(State {
                recorded: true,
                enough: Some(enough),
                ..State::new(LazyState::Bringing, registrations)
            }),
            changed: Condvar::new(),
            events,
            from: From::Migration(waits, request.deadline),
            server: None,
            pages,
            begun,
        });
        LazyMemory::with_thread(shared, request.on_loss, parked, |of| {
            of.bring(None, None, &[]);
        })
    }
}

/// What it means that the source, which was heard of so long ago, does not bring a page.
fn is_gone(since: Duration, on_loss: OnLoss) -> String {
    let then = match on_loss {
        OnLoss::Stop => "is stopped",
        OnLoss::Poison => "goes on without that",
    };
    format!(
        "the migration's source, which alone has what is missing, is gone or out of reach, for {} by now. The guest ran here \
         before its memory was here (post-copy), runs nowhere else, and {then}",
        units::time(since)
    )
}

/// What it means that the source is away, and until when it is waited for.
pub(super) fn is_away(deadline: Duration, on_loss: OnLoss) -> String {
    let then = match on_loss {
        OnLoss::Stop => "the guest is stopped then",
        OnLoss::Poison => "what it touches then is lost, and it goes on without that",
    };
    format!(
        "the connection to the migration's source, which has what is missing of the guest's memory, is broken: the source makes a \
         new one by itself if it lives, and where the guest touches what is missing it is waited for up to {} (--page-deadline): \
         {then}. If this monitor is to be reached elsewhere now: ctl migrate-recover",
        units::time(deadline)
    )
}

/// Brings these pages at once, into memory that has no pager.
fn fetch(
    source: &dyn PageSource,
    table: &SlotTable,
    start: u64,
    end: u64,
) -> Result<(), LazyError> {
    let mut at = start;
    while at < end {
        let len = (end - at).min(AHEAD);
        let mut bytes = vec![0; len as usize];
        if source.fetch_for(Lane::Fault, Gfn(at / PAGE_SIZE), &mut bytes)? == Fetched::Zero {
            bytes.fill(0);
        }
        table.write_slice(&bytes, GuestAddress(at))?;
        at += len;
    }
    Ok(())
}
