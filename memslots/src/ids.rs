// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Slot ids: the lowest free one first, and none again before whoever relies on its meaning has let go.

use crate::{Error, SlotId};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Mutex, PoisonError};

/// Which ids below `limit` are free.
#[derive(Debug)]
struct Free {
    /// No id at or above this one was ever given out.
    next: u32,
    /// Given back, all below `next`.
    returned: BinaryHeap<Reverse<u32>>,
}

/// The ids of one VM's address space 0.
#[derive(Debug)]
pub(crate) struct Ids {
    limit: u32,
    free: Mutex<Free>,
}

/// An id in use. Goes back when dropped.
#[derive(Debug)]
pub(crate) struct IdClaim {
    id: SlotId,
    ids: Arc<Ids>,
}

impl Ids {
    /// Ids `0..limit`.
    pub(crate) fn new(limit: u32) -> Arc<Self> {
        Arc::new(Self {
            limit,
            free: Mutex::new(Free {
                next: 0,
                returned: BinaryHeap::new(),
            }),
        })
    }

    pub(crate) fn limit(&self) -> u32 {
        self.limit
    }

    /// Claims the lowest free id. `None`: all of them are in use.
    pub(crate) fn claim(self: &Arc<Self>) -> Option<Arc<IdClaim>> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let id = match free.returned.pop() {
            Some(Reverse(id)) => id,
            None if free.next < self.limit => {
                free.next += 1;
                free.next - 1
            }
            None => return None,
        };
        Some(Arc::new(IdClaim {
            id: SlotId(id),
            ids: Arc::clone(self),
        }))
    }

    /// Claims the `wanted` lowest free ids, or none.
    pub(crate) fn claim_many(self: &Arc<Self>, wanted: usize) -> Result<Vec<Arc<IdClaim>>, Error> {
        let (limit, available) = (self.limit, self.available());
        let too_many = || Error::NoFreeId {
            wanted,
            available,
            limit,
        };
        if wanted > available {
            return Err(too_many());
        }
        let claims = (0..wanted).map(|_| self.claim().ok_or_else(too_many));
        claims.collect()
    }

    /// How many ids are free.
    pub(crate) fn available(&self) -> usize {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        (self.limit - free.next) as usize + free.returned.len()
    }
}

impl IdClaim {
    pub(crate) fn id(&self) -> SlotId {
        self.id
    }
}

impl Drop for IdClaim {
    fn drop(&mut self) {
        let mut free = self.ids.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.returned.push(Reverse(self.id.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_id_comes_first_and_an_id_in_use_never_comes_again() {
        let ids = Ids::new(3);
        let a = ids.claim().unwrap();
        let b = ids.claim().unwrap();
        let c = ids.claim().unwrap();
        assert_eq!([a.id().0, b.id().0, c.id().0], [0, 1, 2]);
        assert!(ids.claim().is_none());
        let still_relied_upon = Arc::clone(&b);
        drop((b, a));
        assert_eq!(
            ids.claim().unwrap().id().0,
            0,
            "0 is free again (and goes back here)"
        );
        let a = ids.claim().unwrap();
        assert_eq!(
            (a.id().0, ids.available()),
            (0, 0),
            "1 is not: someone holds it"
        );
        drop(still_relied_upon);
        assert_eq!(ids.claim().unwrap().id().0, 1);
    }
}
