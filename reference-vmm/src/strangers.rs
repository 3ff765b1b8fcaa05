// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is said of those who connect and are not who is waited for: they may be many, and each is a line.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So many are told of within [`SPAN`]; the others are counted.
const MOST: u32 = 16;
const SPAN: Duration = Duration::from_secs(60);

static STRANGERS: Strangers = Strangers(Mutex::new(None));

/// Tells of one of them, at the level of warnings, unless there were many in the last minute: then at that of debugging, and how many
/// there were is told with the first one of the next minute. Those of the whole process are counted together.
pub(crate) fn warn(what: fmt::Arguments<'_>) {
    match STRANGERS.count(Instant::now()) {
        Said::Plainly => log::warn!("{what}"),
        Said::WithOthers(others) => log::warn!("{what} ({others} more were not told of)"),
        Said::AsLast => log::warn!("{what} (more of these are not told of for a minute)"),
        Said::Quietly => log::debug!("{what}"),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Said {
    Plainly,
    WithOthers(u32),
    AsLast,
    Quietly,
}

/// Since when, and how many there were.
struct Strangers(Mutex<Option<(Instant, u32)>>);

impl Strangers {
    fn count(&self, now: Instant) -> Said {
        let mut counted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *counted {
            Some((since, count)) if now.saturating_duration_since(*since) < SPAN => {
                *count = count.saturating_add(1);
                match *count {
                    0..MOST => Said::Plainly,
                    MOST => Said::AsLast,
                    _ => Said::Quietly,
                }
            }
            before => match before.replace((now, 1)) {
                Some((_, count)) if count > MOST => Said::WithOthers(count - MOST),
                _ => Said::Plainly,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_is_a_number() {
        let strangers = Strangers(Mutex::new(None));
        let begun = Instant::now();
        let said: Vec<_> = (0..1000).map(|_| strangers.count(begun)).collect();
        let of = |what: Said| said.iter().filter(|said| **said == what).count();
        assert_eq!(of(Said::Plainly), MOST as usize - 1);
        assert_eq!(of(Said::AsLast), 1);
        assert_eq!(of(Said::Quietly), 1000 - MOST as usize);
        assert_eq!(strangers.count(begun + SPAN), Said::WithOthers(1000 - MOST));
        assert_eq!(strangers.count(begun + SPAN), Said::Plainly);
        // After a quiet minute there is nothing to add.
        assert_eq!(strangers.count(begun + 3 * SPAN), Said::Plainly);
    }
}
