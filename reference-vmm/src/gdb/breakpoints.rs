// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! gdb's breakpoints, and what of a processor they take: a plan, made anew with each that comes or goes.
//!
//! A breakpoint in a debug register is better than an `int3` in memory: the guest cannot see it, it
//! needs no page to be mapped yet (a kernel's addresses are not, before its first instruction), and it
//! works on every KVM. So one that gdb calls a software breakpoint gets a debug register as long as
//! there is one left; watchpoints and hardware breakpoints, which can be nothing else, come first.

use gdbstub::target::ext::breakpoints::WatchKind;
use kvm_core::arch::x86_64::{Access, HARDWARE_SLOTS, HardwareBreakpoint, HardwareBreakpoints};

/// What gdb asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Break at an address, however.
    Soft(u64),
    /// Break at an address, by a debug register.
    Hard(u64),
    /// Stop behind accesses.
    Watch {
        /// Linear address of the first byte.
        address: u64,
        /// Bytes.
        len: u64,
        /// Of which kind. Reads alone are no condition of x86: writes stop as well, and gdb goes on by
        /// itself where a value has changed.
        kind: WatchKind,
    },
}

/// Not all can be had at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// The registers are all taken, and what is left cannot be an `int3`.
    #[error(
        "the processor has {HARDWARE_SLOTS} debug registers, which breakpoints and watchpoints have taken, and an int3 \
         does not do here; delete one of them"
    )]
    Full,
    /// Of no bytes, or past the end of the address space.
    #[error("a watchpoint of {len} bytes at {address:#x} watches nothing")]
    Nothing {
        /// Linear address.
        address: u64,
        /// Bytes.
        len: u64,
    },
}

/// How all of gdb's breakpoints are had.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// By debug registers.
    pub(crate) hardware: HardwareBreakpoints,
    /// By an `int3` at these linear addresses.
    pub(crate) patches: Vec<u64>,
}

/// gdb's breakpoints.
#[derive(Clone, Debug, Default)]
pub(crate) struct Breakpoints(Vec<Wanted>);

impl Breakpoints {
    /// Takes one more; one that is there already is no second one (gdb says some twice). `patchable`
    /// says whether an `int3` at an address would do.
    ///
    /// # Errors
    /// [`Refusal`]; nothing has changed.
    pub(crate) fn add(
        &mut self,
        wanted: Wanted,
        patchable: impl FnMut(u64) -> bool,
    ) -> Result<(), Refusal> {
        if self.0.contains(&wanted) {
            return Ok(());
        }
        self.0.push(wanted);
        self.plan(patchable).map(drop).inspect_err(|_| {
            self.0.pop();
        })
    }

    /// Gives one up; false if there was none.
    pub(crate) fn remove(&mut self, wanted: Wanted) -> bool {
        let found = self.0.iter().position(|there| *there == wanted);
        found.map(|at| self.0.remove(at)).is_some()
    }

    /// Gives all up.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// How they are had. What was accepted has a plan as long as `patchable` stays as it was.
    ///
    /// # Errors
    /// [`Refusal`].
    pub(crate) fn plan(&self, mut patchable: impl FnMut(u64) -> bool) -> Result<Plan, Refusal> {
        let mut hardware = HardwareBreakpoints::default();
        let mut soft = Vec::new();
        for wanted in &self.0 {
            match *wanted {
                Wanted::Soft(address) => soft.push(address),
                Wanted::Hard(address) => {
                    if !take(&mut hardware, HardwareBreakpoint::execute(address)) {
                        return Err(Refusal::Full);
                    }
                }
                Wanted::Watch { address, len, kind } => {
                    let mut pieces =
                        HardwareBreakpoint::cover(address, len, access(kind)).peekable();
                    if pieces.peek().is_none() {
                        return Err(Refusal::Nothing { address, len });
                    }
                    if !pieces.all(|piece| take(&mut hardware, piece)) {
                        return Err(Refusal::Full);
                    }
                }
            }
        }
        // Nobody is asked about an int3 while there are registers for all.
        let mut all = hardware;
        let break_at = HardwareBreakpoint::execute;
        if soft
            .iter()
            .all(|address| take(&mut all, break_at(*address)))
        {
            return Ok(Plan {
                hardware: all,
                patches: Vec::new(),
            });
        }
        // Those that can be nothing else have them, then the oldest.
        let (can, cannot): (Vec<_>, Vec<_>) = soft.into_iter().partition(|at| patchable(*at));
        if !cannot
            .into_iter()
            .all(|at| take(&mut hardware, break_at(at)))
        {
            return Err(Refusal::Full);
        }
        let mut patches = can;
        patches.retain(|at| !take(&mut hardware, break_at(*at)));
        Ok(Plan { hardware, patches })
    }

    /// Whose condition it was that a debug register met: for a breakpoint, that which gdb calls a
    /// software one if there is one.
    pub(crate) fn of(&self, hit: HardwareBreakpoint) -> Option<Wanted> {
        let is = |wanted: &&Wanted| match **wanted {
            Wanted::Soft(address) | Wanted::Hard(address) => {
                hit == HardwareBreakpoint::execute(address)
            }
            Wanted::Watch { address, len, kind } => {
                HardwareBreakpoint::cover(address, len, access(kind)).any(|piece| piece == hit)
            }
        };
        let mut found = self.0.iter().filter(is);
        let first = found.next()?;
        let soft = found.find(|wanted| matches!(wanted, Wanted::Soft(_)));
        Some(*soft.unwrap_or(first))
    }
}

/// Has a debug register meet this condition; false if there is none left.
fn take(hardware: &mut HardwareBreakpoints, breakpoint: HardwareBreakpoint) -> bool {
    hardware.iter().any(|(_, there)| there == breakpoint) || hardware.insert(breakpoint).is_ok()
}

fn access(kind: WatchKind) -> Access {
    match kind {
        WatchKind::Write => Access::Write,
        WatchKind::Read | WatchKind::ReadWrite => Access::ReadWrite,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wanted() -> impl Strategy<Value = Wanted> {
        prop_oneof![
            4 => (0..12u64).prop_map(Wanted::Soft),
            2 => (0..12u64).prop_map(Wanted::Hard),
            2 => (0..64u64, 0..20u64, 0..3usize).prop_map(|(address, len, kind)| {
                let kind = [WatchKind::Write, WatchKind::Read, WatchKind::ReadWrite][kind];
                Wanted::Watch { address, len, kind }
            }),
        ]
    }

    /// Addresses whose pages are mapped, in the tests.
    fn even(address: u64) -> bool {
        address.is_multiple_of(2)
    }

    proptest! {
        #[test]
        fn what_was_accepted_is_had_and_what_was_refused_changes_nothing(
            steps in prop::collection::vec((wanted(), any::<bool>()), 0..30),
        ) {
            let mut breakpoints = Breakpoints::default();
            let mut model: Vec<Wanted> = Vec::new();
            for (wanted, add) in steps {
                let before = breakpoints.plan(even);
                if add {
                    let added = breakpoints.add(wanted, even);
                    match added {
                        Ok(()) if !model.contains(&wanted) => model.push(wanted),
                        Ok(()) => {}
                        Err(_) => prop_assert_eq!(breakpoints.plan(even), before),
                    }
                } else {
                    let there = model.iter().position(|w| *w == wanted);
                    prop_assert_eq!(breakpoints.remove(wanted), there.is_some());
                    there.map(|at| model.remove(at));
                }
                let plan = breakpoints.plan(even).unwrap();
                for wanted in &model {
                    match *wanted {
                        Wanted::Soft(address) | Wanted::Hard(address) => {
                            let hit = HardwareBreakpoint::execute(address);
                            let hardware = plan.hardware.iter().any(|(_, b)| b == hit);
                            let patch = plan.patches.contains(&address);
                            prop_assert!(hardware != patch, "{:?} {:?}", wanted, plan);
                            prop_assert!(!patch || even(address) && *wanted == Wanted::Soft(address));
                        }
                        Wanted::Watch { address, len, kind } => {
                            for byte in address..address + len {
                                let watched = plan.hardware.iter().any(|(_, b)| {
                                    b.access() == access(kind)
                                        && (b.address()..b.address() + b.len()).contains(&byte)
                                });
                                prop_assert!(watched);
                            }
                        }
                    }
                }
                // Nothing that nobody asked for, and what is met has an owner.
                for (_, breakpoint) in plan.hardware.iter() {
                    prop_assert!(breakpoints.of(breakpoint).is_some_and(|w| model.contains(&w)));
                }
                for address in &plan.patches {
                    prop_assert!(model.contains(&Wanted::Soft(*address)));
                }
                if plan.hardware.iter().count() < HARDWARE_SLOTS {
                    prop_assert!(plan.patches.is_empty());
                }
            }
        }
    }

    #[test]
    fn the_fifth_breakpoint_is_an_int3_or_refused() {
        let mut breakpoints = Breakpoints::default();
        for address in [1, 2, 3, 4] {
            let asked = |_| -> bool { panic!("there is a register") };
            breakpoints.add(Wanted::Soft(address), asked).unwrap();
        }
        // 2 can be moved, for 5 cannot.
        breakpoints.add(Wanted::Soft(5), even).unwrap();
        let plan = breakpoints.plan(even).unwrap();
        assert_eq!(plan.patches, [4]);
        let error = breakpoints.add(Wanted::Soft(7), |_| false).unwrap_err();
        assert!(error.to_string().contains("4 debug registers"), "{error}");
        // A watchpoint has precedence over what can be an int3.
        let watch = Wanted::Watch {
            address: 8,
            len: 8,
            kind: WatchKind::Write,
        };
        breakpoints.remove(Wanted::Soft(1));
        breakpoints.add(watch, even).unwrap();
        assert_eq!(breakpoints.plan(even).unwrap().patches, [4]);
    }

    #[test]
    fn a_watchpoint_that_watches_nothing_is_refused() {
        for (address, len) in [(0, 0), (u64::MAX, 2)] {
            let kind = WatchKind::Read;
            let watch = Wanted::Watch { address, len, kind };
            let error = Breakpoints::default().add(watch, even).unwrap_err();
            assert_eq!(error, Refusal::Nothing { address, len });
        }
    }
}
