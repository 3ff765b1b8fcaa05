// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A table of what has a socket, by numbers that are not used again: what an epoll descriptor still says of a closed
//! socket is nobody's.

/// A place in a [`Table`], and whose it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Id {
    place: u32,
    /// How often the place was taken before.
    turn: u32,
}

impl Id {
    /// As one number, for epoll.
    pub fn to_u64(self) -> u64 {
        u64::from(self.turn) << 32 | u64::from(self.place)
    }

    /// The id of that number.
    pub fn from_u64(number: u64) -> Self {
        Id {
            place: number as u32,
            turn: (number >> 32) as u32,
        }
    }
}

/// Values by [`Id`].
#[derive(Debug)]
pub struct Table<T> {
    places: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Table<T> {
    /// Empty.
    pub fn new() -> Self {
        Table {
            places: Vec::new(),
            free: Vec::new(),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Adds a value.
    pub fn insert(&mut self, value: T) -> Id {
        if let Some(place) = self.free.pop()
            && let Some((turn, slot)) = self.places.get_mut(place as usize)
        {
            *slot = Some(value);
            return Id { place, turn: *turn };
        }
        let place = self.places.len() as u32;
        self.places.push((0, Some(value)));
        Id { place, turn: 0 }
    }

    /// The value, if it is there still.
    pub fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        match self.places.get_mut(id.place as usize) {
            Some((turn, value)) if *turn == id.turn => value.as_mut(),
            _ => None,
        }
    }

    /// Takes the value out.
    pub fn remove(&mut self, id: Id) -> Option<T> {
        match self.places.get_mut(id.place as usize) {
            Some((turn, value)) if *turn == id.turn && value.is_some() => {
                // After 2^32 turns of one place an id comes again: no epoll keeps an event so long.
                *turn = turn.wrapping_add(1);
                self.free.push(id.place);
                value.take()
            }
            _ => None,
        }
    }

    /// All of them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (Id, &mut T)> {
        let places = (0..).zip(&mut self.places);
        places.filter_map(|(place, (turn, value))| {
            value
                .as_mut()
                .map(|value| (Id { place, turn: *turn }, value))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn an_id_finds_its_value_until_it_is_removed_and_nothing_after(steps: Vec<(bool, u8)>) {
            let (mut table, mut model, mut gone) = (Table::new(), HashMap::new(), Vec::new());
            for (number, (add, pick)) in steps.into_iter().enumerate() {
                let ids: Vec<Id> = model.keys().copied().collect();
                match ids.get(usize::from(pick)) {
                    Some(id) if !add => {
                        prop_assert_eq!(table.remove(*id), model.remove(id));
                        gone.push(*id);
                    }
                    _ => {
                        let id = table.insert(number);
                        prop_assert_eq!(Id::from_u64(id.to_u64()), id);
                        prop_assert!(!gone.contains(&id));
                        model.insert(id, number);
                    }
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert_eq!(table.iter_mut().count(), model.len());
                for (id, value) in &mut model {
                    prop_assert_eq!(table.get_mut(*id), Some(value));
                }
                prop_assert!(gone.iter().all(|id| table.get_mut(*id).is_none()));
                prop_assert!(gone.iter().all(|id| table.remove(*id).is_none()));
            }
        }
    }
}
