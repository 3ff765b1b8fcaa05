// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How much may be under way in a connection (virtio 1.2, 5.10.6.3): each side says how much room it has
//! (`buf_alloc`) and how many bytes it has passed on since the beginning (`fwd_cnt`, which wraps); the other side
//! counts what it has sent, and never has more on the way than there is room for.

/// The room of a connection for what its guest sends, bytes: what is kept for a program on the host that does not
/// read. A connection of which nothing is kept has none of it allocated. Two of the largest packets that Linux sends.
pub const WINDOW: u32 = 128 << 10;

/// What the guest lets the device send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestCredit {
    buf_alloc: u32,
    fwd_cnt: u32,
    sent: u32,
}

impl GuestCredit {
    /// Takes what a packet of the guest's says.
    pub fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        self.fwd_cnt = fwd_cnt;
    }

    /// Bytes that may be sent now. A guest that says it has passed on more than it was sent gets nothing.
    pub fn room(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.fwd_cnt);
        self.buf_alloc.saturating_sub(under_way)
    }

    /// So many bytes, up to [`room`](Self::room), were sent.
    pub fn sent(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }
}

/// What the guest is let send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostCredit {
    fwd_cnt: u32,
    told: u32,
}

impl HostCredit {
    /// So many bytes of the guest's are kept no more: they went to the host, or nowhere.
    pub fn forward(&mut self, len: u32) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(len);
    }

    /// What a packet to the guest says: `buf_alloc` and `fwd_cnt`.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.fwd_cnt;
        (WINDOW, self.fwd_cnt)
    }

    /// Whether the guest is to be told by a packet of its own. As a guest that has used up its credit is told when all
    /// of it was passed on, if not before, none waits in vain.
    pub fn is_news(&self) -> bool {
        self.fwd_cnt.wrapping_sub(self.told) >= WINDOW / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_more_is_under_way_than_there_is_room_for(
            start: u32,
            steps in proptest::collection::vec((0..1_u32 << 20, 0..1_u32 << 20), 1..100),
        ) {
            // The guest's side, counted in 64 bits; the counters begin anywhere, to wrap.
            let mut credit = GuestCredit { buf_alloc: 0, fwd_cnt: start, sent: start };
            let (mut sent, mut passed) = (0_u64, 0_u64);
            for (wanted, alloc) in steps {
                credit.update(alloc, start.wrapping_add(passed as u32));
                prop_assert!(credit.room() <= alloc);
                let len = wanted.min(credit.room());
                credit.sent(len);
                sent += u64::from(len);
                prop_assert!(len == 0 || sent - passed <= u64::from(alloc));
                passed += (sent - passed) / 2;
            }
        }

        #[test]
        fn any_credit_of_a_guest_is_at_most_what_it_allocates(alloc: u32, fwd: u32, sent: u32) {
            let mut credit = GuestCredit::default();
            credit.sent(sent);
            credit.update(alloc, fwd);
            prop_assert!(credit.room() <= alloc);
            // More passed on than sent, unless it is as good as wrapped.
            let ahead = fwd.wrapping_sub(sent);
            if (1..=u32::MAX / 2).contains(&ahead) && alloc <= u32::MAX / 2 {
                prop_assert_eq!(credit.room(), 0);
            }
        }

        #[test]
        fn a_guest_that_waits_for_credit_is_told_when_all_was_passed_on(
            start: u32,
            parts in proptest::collection::vec(1..WINDOW, 1..50),
        ) {
            let mut credit = HostCredit { fwd_cnt: start, told: start };
            let mut left = WINDOW;
            for part in parts {
                let part = part.min(left);
                credit.forward(part);
                left -= part;
            }
            credit.forward(left);
            prop_assert!(credit.is_news());
            prop_assert_eq!(credit.tell(), (WINDOW, start.wrapping_add(WINDOW)));
            prop_assert!(!credit.is_news());
        }
    }
}
