// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who wants to know when a pin is acknowledged or masked (`kvm_irq_ack_notifier`,
//! `kvm_irq_mask_notifier`).
//!
//! A list is an immutable slice that registering replaces. Telling takes a copy of its pointer and
//! calls with no lock held, so a notifier may do anything: set lines, register, unregister itself
//! or others.

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::gsi::Gsi;

thread_local! {
    /// How many notifiers this thread is inside of.
    static INSIDE: Cell<usize> = const { Cell::new(0) };
}

/// The notifiers of one kind; clones are the same list. `T` is what they are told.
pub(super) struct Notifiers<T>(Arc<Mutex<List<T>>>);

/// Replaced, never changed.
type List<T> = Arc<[Arc<Registered<T>>]>;

struct Registered<T> {
    gsi: Gsi,
    call: Box<dyn Fn(T) + Send + Sync>,
    runs: Mutex<Runs>,
    /// Told when the last run of a removed one ends.
    idle: Condvar,
}

#[derive(Default)]
struct Runs {
    removed: bool,
    under_way: usize,
}

/// A registered notifier. Dropped, it is unregistered: when that returns, it is not called any more
/// and no call of it is under way (`kvm_unregister_irq_ack_notifier`). Inside a notifier, its own or
/// another, dropping does not wait for calls that are under way.
#[must_use = "a notifier that is dropped is unregistered"]
pub struct Notifier {
    gsi: Gsi,
    unregister: Box<dyn Fn() + Send + Sync>,
}

impl<T: Copy + 'static> Notifiers<T> {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Arc::from([]))))
    }

    pub(super) fn register(&self, gsi: Gsi, call: impl Fn(T) + Send + Sync + 'static) -> Notifier {
        let registered = Arc::new(Registered {
            gsi,
            call: Box::new(call),
            runs: Mutex::default(),
            idle: Condvar::new(),
        });
        let mut list = self.list();
        *list = list.iter().cloned().chain([registered.clone()]).collect();
        drop(list);
        let notifiers = Self(Arc::clone(&self.0));
        let unregister = move || notifiers.unregister(&registered);
        Notifier {
            gsi,
            unregister: Box::new(unregister),
        }
    }

    pub(super) fn has(&self, gsi: Gsi) -> bool {
        self.list().iter().any(|registered| registered.gsi == gsi)
    }

    /// Calls the notifiers of a GSI, in the order in which they were registered. To be called with
    /// no lock held.
    pub(super) fn tell(&self, gsi: Gsi, what: T) {
        let list = Arc::clone(&self.list());
        for registered in list.iter().filter(|registered| registered.gsi == gsi) {
            registered.run(what);
        }
    }

    fn unregister(&self, gone: &Arc<Registered<T>>) {
        let mut list = self.list();
        let kept = list.iter().filter(|kept| !Arc::ptr_eq(kept, gone));
        *list = kept.cloned().collect();
        drop(list);
        gone.remove();
    }

    fn list(&self) -> MutexGuard<'_, List<T>> {
        // Each change is one assignment, so a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Registered<T> {
    fn run(&self, what: T) {
        let mut runs = self.runs();
        if runs.removed {
            return;
        }
        runs.under_way += 1;
        drop(runs);
        let _run = Run::begin(self);
        (self.call)(what);
    }

    fn remove(&self) {
        let mut runs = self.runs();
        runs.removed = true;
        // Two notifiers that remove one another, on two threads, would wait for each other.
        while runs.under_way > 0 && INSIDE.get() == 0 {
            runs = self.idle.wait(runs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn runs(&self) -> MutexGuard<'_, Runs> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that is under way; its end is counted also where the call panics.
struct Run<'a, T>(&'a Registered<T>);

impl<'a, T> Run<'a, T> {
    fn begin(registered: &'a Registered<T>) -> Self {
        INSIDE.set(INSIDE.get() + 1);
        Self(registered)
    }
}

impl<T> Drop for Run<'_, T> {
    fn drop(&mut self) {
        INSIDE.set(INSIDE.get() - 1);
        let mut runs = self.0.runs();
        runs.under_way -= 1;
        if runs.under_way == 0 {
            self.0.idle.notify_all();
        }
    }
}

impl Notifier {
    /// The GSI whose pin it is told of.
    pub fn gsi(&self) -> Gsi {
        self.gsi
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        (self.unregister)();
    }
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notifier").field("gsi", &self.gsi).finish()
    }
}

impl<T: Copy + 'static> fmt::Debug for Notifiers<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.list().iter().map(|registered| registered.gsi))
            .finish()
    }
}
