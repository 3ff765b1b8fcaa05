// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How many pages a fault brings: more while faults follow each other, one where they do not.

/// How many runs of faults are followed at once: some vCPUs, and a device or two.
const STREAMS: usize = 8;

/// One run of faults.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The page after the last that it brought.
    next: u64,
    /// How many it brought; 0 in a place that nobody uses.
    size: u64,
    /// When it was last used, to find the oldest.
    used: u64,
}

/// The read-ahead of one slot, in pages.
#[derive(Debug)]
pub(super) struct Window {
    streams: [Stream; STREAMS],
    clock: u64,
    least: u64,
    max: u64,
}

impl Window {
    /// A window of `least` pages that grows to `max`, both at least one.
    pub fn new(least: u64, max: u64) -> Self {
        let max = max.max(1);
        Self {
            streams: [Stream::default(); STREAMS],
            clock: 0,
            least: least.clamp(1, max),
            max,
        }
    }

    /// How many pages the fault on `page` brings. Twice as many as the one before it, if it is the page after those;
    /// half as many, if some were passed over; the least, if it follows nothing.
    pub fn fault(&mut self, page: u64) -> u64 {
        self.clock += 1;
        let follows = |stream: &&mut Stream| {
            stream.size > 0 && page >= stream.next && page - stream.next <= stream.size
        };
        let clock = self.clock;
        if let Some(stream) = self.streams.iter_mut().find(follows) {
            stream.size = match page == stream.next {
                true => stream.size.saturating_mul(2).min(self.max),
                false => (stream.size / 2).max(self.least),
            };
            (stream.next, stream.used) = (page.saturating_add(stream.size), clock);
            return stream.size;
        }
        if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
            *oldest = Stream {
                next: page.saturating_add(self.least),
                size: self.least,
                used: clock,
            };
        }
        self.least
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_while_faults_follow_each_other_and_shrinks_where_they_do_not() {
        let mut window = Window::new(1, 16);
        let mut page = 100;
        let sizes: Vec<u64> = (0..6)
            .map(|_| {
                let size = window.fault(page);
                page += size;
                size
            })
            .collect();
        assert_eq!(sizes, [1, 2, 4, 8, 16, 16]);
        assert_eq!(window.fault(page + 3), 8, "three were passed over");
        assert_eq!(window.fault(5000), 1);
    }

    #[test]
    fn several_vcpus_are_followed_at_once_and_random_faults_bring_one_page_each() {
        let mut window = Window::new(1, 16);
        let mut pages = [0, 1 << 20, 2 << 20, 3 << 20];
        for expected in [1, 2, 4, 8, 16] {
            for page in &mut pages {
                let size = window.fault(*page);
                assert_eq!(size, expected);
                *page += size;
            }
        }
        let mut window = Window::new(1, 16);
        assert!((0..100).all(|step| window.fault(step * 7919 % 100_003) == 1));
    }

    #[test]
    fn the_last_page_of_the_address_space_does_not_overflow() {
        let mut window = Window::new(1, u64::MAX);
        for page in [u64::MAX - 1, u64::MAX, u64::MAX, 0] {
            assert!(window.fault(page) >= 1);
        }
    }

    #[test]
    fn it_is_never_less_than_the_least_and_no_more_than_the_most() {
        let mut window = Window::new(4, 16);
        assert_eq!(window.fault(100), 4);
        assert_eq!(window.fault(104), 8);
        assert_eq!(window.fault(5000), 4);
        // Some were passed over.
        assert_eq!([window.fault(5005), window.fault(5010)], [4, 4]);
        assert_eq!(Window::new(32, 16).fault(0), 16);
    }
}
