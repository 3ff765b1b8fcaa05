// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! I/O errors, told so that a broken disk under a busy guest does not fill the log.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// The time between two lines.
const PAUSE: Duration = Duration::from_secs(10);

/// Lets one error through now and then, and counts the others.
#[derive(Debug, Default)]
pub struct Complaints {
    last: Option<Instant>,
    left_out: u64,
}

impl Complaints {
    /// An error at this time: whether it is to be told, and how many before it were not.
    pub fn tell(&mut self, now: Instant) -> Option<u64> {
        if self
            .last
            .is_some_and(|last| now.saturating_duration_since(last) < PAUSE)
        {
            self.left_out += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_error_in_ten_seconds_is_told_and_the_others_are_counted() {
        let start = Instant::now();
        let mut complaints = Complaints::default();
        let mut tell = |seconds| complaints.tell(start + Duration::from_secs(seconds));
        assert_eq!(tell(0), Some(0));
        assert_eq!((tell(1), tell(9)), (None, None));
        assert_eq!(tell(10), Some(2));
        assert_eq!(tell(11), None);
        assert_eq!(tell(100), Some(1));
    }
}
