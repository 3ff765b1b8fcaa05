// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An access that someone looks on at: counted, and told to the trace hook.
//!
//! The same search as everyone's but for the cookie's short cut, and out of line, so that the usual
//! path carries nothing of it.

use std::time::Instant;

use crate::cookie::Cookies;
use crate::dispatcher::{self, Bytes, Found, Outcome};
use crate::range::BusKind;
use crate::tables::{Observers, Tables};
use crate::trace::Access;

/// Offers an access to `buses`, one after the other, until one takes it.
#[cold]
pub(crate) fn search(
    tables: &Tables,
    observers: &Observers,
    cookies: &mut Cookies,
    buses: &[BusKind],
    address: u64,
    mut bytes: Bytes<'_>,
) -> Found {
    let hook = observers.hook.as_deref();
    let begun = hook
        .filter(|hook| hook.wants_duration())
        .map(|_| Instant::now());
    let (direction, len) = (bytes.direction(), bytes.len());

    let mut found = Found::Unclaimed;
    let mut asked = None;
    for bus in buses {
        asked = Some(*bus);
        let cookie = cookies.of(*bus, address);
        found = dispatcher::search_with(tables.bus(*bus), cookie, address, len, |entry, at| {
            let answer = bytes.ask(entry, at);
            if let Some(counters) = &entry.counters {
                counters.count(direction, len, &answer);
            }
            answer
        });
        if !matches!(found, Found::Unclaimed) {
            break;
        }
    }
    let Some(bus) = asked else { return found };

    let outcome = match found {
        Found::Answered => Outcome::Answered,
        Found::Unclaimed => Outcome::Unclaimed,
        Found::Deferred(_) => Outcome::Deferred,
    };
    if outcome == Outcome::Unclaimed
        && let Some(counters) = &observers.counters
    {
        counters[bus.index()].count_unclaimed(address);
    }
    if let Some(hook) = hook {
        hook.access(&Access {
            bus,
            address,
            direction,
            data: bytes.data(),
            outcome,
            duration: begun.map(|begun| begun.elapsed()),
        });
    }
    found
}
