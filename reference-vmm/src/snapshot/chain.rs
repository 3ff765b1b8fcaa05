// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot and those that it builds on.
//!
//! ```text
//!   full ◄── incremental ◄── incremental     each has its parent's id, and the pages that it has itself
//!   base         later          newest       (what is in the guest at an address is in the last link that has it)
//! ```
//!
//! The newest link has all of the machine but memory; of the others memory alone counts. Every link is opened and checked
//! before anything is made of it, and an error names the link.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::format::SnapshotId;
use super::link::{self, Link};
use super::ranges::Ranges;
use super::restore::RestoreError;

/// Why a snapshot does not go on where another one ends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// Another snapshot is there.
    #[error(
        "that is the snapshot {found} now, and {wanted} is wanted: it was replaced, or is another chain's"
    )]
    Id {
        /// What is there.
        found: SnapshotId,
        /// What is wanted.
        wanted: SnapshotId,
    },
    /// It comes again in its own chain.
    #[error("the snapshot {0} builds on itself")]
    Cycle(SnapshotId),
    /// They do not count the same.
    #[error("it is the snapshot number {says} of its chain, where number {wanted} is wanted")]
    Depth {
        /// What it says.
        says: u32,
        /// What the one behind it wants.
        wanted: u32,
    },
    /// The guest's memory is another one.
    #[error("its guest has memory elsewhere: the two are not of one machine")]
    Layout,
    /// The one that is named behind another builds on none.
    #[error("it is a full snapshot, which builds on no other")]
    Full,
    /// What it builds on is named elsewhere.
    #[error("it builds on what is in {0}, which has to be named right before it")]
    Order(PathBuf),
}

/// A chain whose links are open.
#[derive(Debug)]
pub struct Chain {
    /// From the full one on; not empty.
    links: Vec<Link>,
    /// What is not in the first, in order of address, and in which it is.
    later: Vec<(Range<u64>, usize)>,
}

impl Chain {
    /// The snapshot in `dir` and all that it builds on. The bytes of its file `state` come with it.
    ///
    /// # Errors
    /// [`RestoreError`]; of a parent [`RestoreError::Parent`].
    pub fn open(dir: &Path) -> Result<(Self, Vec<u8>), RestoreError> {
        let (newest, state) = Link::open(dir)?;
        // The newest first.
        let mut links = vec![newest];
        while let Some(child) = links.last()
            && let Some(parent) = child.parent()
        {
            let places = parent.places(child.dir());
            let (wanted, fallback) = (parent.id, parent.path.clone());
            let is_there = |place: &&PathBuf| link::id_of(place).is_ok_and(|id| id == wanted);
            let place = places.iter().find(is_there).cloned().unwrap_or(fallback);
            let of = |source| RestoreError::Parent {
                child: child.dir().to_owned(),
                parent: place.clone(),
                source: Box::new(source),
            };
            let (link, _) = Link::open(&place).map_err(of)?;
            let wrong = continues(&link, child).err();
            let again = links.iter().any(|of| of.id() == link.id());
            let wrong = wrong.or(again.then(|| ChainError::Cycle(link.id())));
            if let Some(source) = wrong {
                return Err(RestoreError::Chain {
                    child: child.dir().to_owned(),
                    parent: place,
                    source,
                });
            }
            links.push(link);
        }
        links.reverse();
        Ok((Self::of(links), state))
    }

    /// The snapshot in `dir` alone, without memory, which is elsewhere. The bytes of its file `state` come with it.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn open_state(dir: &Path) -> Result<(Self, Vec<u8>), RestoreError> {
        let (newest, state) = Link::open_state(dir)?;
        Ok((Self::of(vec![newest]), state))
    }

    /// The chain of these directories, the full one first, each of which builds on the one before it. The bytes of the
    /// last one's file `state` come with it. One alone is [`open`](Self::open)'s.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn open_all(dirs: &[PathBuf]) -> Result<(Self, Vec<u8>), RestoreError> {
        if let [dir] = dirs {
            return Self::open(dir);
        }
        let mut links: Vec<Link> = Vec::new();
        let mut newest = Vec::new();
        for dir in dirs {
            let (link, state) = Link::open(dir)?;
            match (links.last(), link.parent()) {
                (Some(before), _) => {
                    continues(before, &link).map_err(|source| RestoreError::Chain {
                        child: dir.clone(),
                        parent: before.dir().to_owned(),
                        source: in_order(source, dirs),
                    })?;
                }
                (None, Some(parent)) => {
                    return Err(RestoreError::NotFull {
                        dir: dir.clone(),
                        id: parent.id,
                        parent: parent.path.clone(),
                    });
                }
                (None, None) => {}
            }
            links.push(link);
            newest = state;
        }
        Ok((Self::of(links), newest))
    }

    fn of(links: Vec<Link>) -> Self {
        let mut later = Vec::new();
        let mut covered = Ranges::default();
        for (number, link) in links.iter().enumerate().skip(1).rev() {
            let new = link.own().subtract(&covered);
            later.extend(new.iter().map(|range| (range, number)));
            covered = covered.union(link.own());
        }
        later.sort_unstable_by_key(|(range, _)| range.start);
        Chain { links, later }
    }

    /// Of no snapshot, for who needs one and reads nothing of it.
    #[cfg(test)]
    pub(crate) fn empty() -> Self {
        Self::of(Vec::new())
    }

    /// From the full one on.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// The full one, which all others build on.
    pub fn base(&self) -> Option<&Link> {
        self.links.first()
    }

    /// The one that the machine goes on from.
    pub fn newest(&self) -> Option<&Link> {
        self.links.last()
    }

    /// Whether what is read is checked as it is read.
    pub fn is_checked(&self) -> bool {
        self.links.iter().all(Link::is_checked)
    }

    /// From now on what is read is checked as it is read ([`Link::check_as_read`]), of every link.
    ///
    /// # Errors
    /// [`RestoreError::Read`].
    pub fn check_as_read(&mut self, verify: bool) -> Result<(), RestoreError> {
        self.links
            .iter_mut()
            .try_for_each(|link| link.check_as_read(verify))
    }

    /// The link that has what is in the guest at `at`, and where that ends which it has from there on.
    pub fn link_at(&self, at: u64) -> Option<(&Link, u64)> {
        let next = self.later.partition_point(|(of, _)| of.end <= at);
        match self.later.get(next) {
            Some((of, link)) if of.start <= at => Some((self.links.get(*link)?, of.end)),
            Some((of, _)) => Some((self.links.first()?, of.start)),
            None => Some((self.links.first()?, u64::MAX)),
        }
    }

    /// Which pages are not those of the first link, in order.
    pub fn later(&self) -> impl Iterator<Item = Range<u64>> {
        self.later.iter().map(|(range, _)| range.clone())
    }

    /// What of `range` is not the first link's, in order.
    pub fn later_within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.sources(range).map(|(range, _)| range)
    }

    /// What of `range` is not the first link's, in order, and in which it is.
    fn sources(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, usize)> {
        let first = self.later.partition_point(|(of, _)| of.end <= range.start);
        let later = self.later.get(first..).unwrap_or_default().iter();
        let end = range.end;
        later
            .take_while(move |(of, _)| of.start < end)
            .map(move |(of, link)| (of.start.max(range.start)..of.end.min(range.end), *link))
    }

    /// Compares the memory of every link with its checksums.
    ///
    /// # Errors
    /// [`RestoreError::Read`], [`RestoreError::MemoryDamaged`].
    pub fn verify(&self) -> Result<(), RestoreError> {
        self.links.iter().try_for_each(Link::verify)
    }

    /// Reads what the guest has at `range`, which is guest memory, into `out`, which is as long.
    ///
    /// # Errors
    /// [`RestoreError::Read`], [`RestoreError::MemoryDamaged`].
    pub fn read(&self, range: Range<u64>, out: &mut [u8]) -> Result<(), RestoreError> {
        let mut part = |range_of: Range<u64>, link: usize| {
            let (from, to) = (range_of.start - range.start, range_of.end - range.start);
            let out = out.get_mut(from as usize..to as usize);
            match (self.links.get(link), out) {
                (Some(link), Some(out)) => link.read(range_of, out),
                _ => Ok(()),
            }
        };
        let mut at = range.start;
        for (of, link) in self.sources(range.clone()) {
            if at < of.start {
                part(at..of.start, 0)?;
            }
            at = of.end;
            part(of, link)?;
        }
        match at < range.end {
            true => part(at..range.end, 0),
            false => Ok(()),
        }
    }
}

/// What is wrong with one of `dirs`: that another is missing, or that they are not in their order.
fn in_order(error: ChainError, dirs: &[PathBuf]) -> ChainError {
    let ChainError::Id { wanted, .. } = error else {
        return error;
    };
    let mut dirs = dirs.iter();
    let named = dirs.find(|dir| link::id_of(dir).is_ok_and(|id| id == wanted));
    named.map_or(error, |dir| ChainError::Order(dir.clone()))
}

/// Whether `child` builds on `parent`.
fn continues(parent: &Link, child: &Link) -> Result<(), ChainError> {
    let found = parent.id();
    let (wanted, before) = match child.parent() {
        Some(parent) => (parent.id, parent.depth - 1),
        None => return Err(ChainError::Full),
    };
    if found != wanted {
        return Err(ChainError::Id { found, wanted });
    }
    if parent.depth() != before {
        return Err(ChainError::Depth {
            says: parent.depth(),
            wanted: before,
        });
    }
    match parent.map().regions == child.map().regions {
        true => Ok(()),
        false => Err(ChainError::Layout),
    }
}
