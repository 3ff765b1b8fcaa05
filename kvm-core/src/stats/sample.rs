// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The numbers of one moment, and what changed between two.

use std::mem;
use std::sync::Arc;

use super::schema::NUMBER;
use super::{Scaled, Statistic, StatsError, StatsSchema};

/// All numbers of one moment, by index, by name, or one after the other.
///
/// `clone_from` of a sample of the same reader allocates nothing.
#[derive(Debug)]
pub struct Sample {
    schema: Arc<StatsSchema>,
    data: Box<[u8]>,
}

impl Clone for Sample {
    fn clone(&self) -> Self {
        Self {
            schema: self.schema.clone(),
            data: self.data.clone(),
        }
    }

    fn clone_from(&mut self, source: &Self) {
        if !Arc::ptr_eq(&self.schema, &source.schema) {
            self.schema = source.schema.clone();
        }
        self.data.clone_from(&source.data);
    }
}

impl Sample {
    pub(super) fn zero(schema: Arc<StatsSchema>) -> Self {
        let data = vec![0; schema.data_len()].into_boxed_slice();
        Self { schema, data }
    }

    /// `data` is as long as the schema says, and so is what comes back in it.
    pub(super) const fn exchange(&mut self, data: &mut Box<[u8]>) {
        mem::swap(&mut self.data, data);
    }

    /// What statistics there are.
    #[must_use]
    pub const fn schema(&self) -> &Arc<StatsSchema> {
        &self.schema
    }

    /// The statistic of this index ([`StatsSchema::index_of`]).
    #[inline]
    #[must_use]
    pub fn get(&self, index: usize) -> Option<Value<'_>> {
        let statistic = self.schema.statistics().get(index)?;
        Some(self.value(statistic))
    }

    /// The statistic of this name. It goes through the names; an index does not.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<Value<'_>> {
        self.get(self.schema.index_of(name)?)
    }

    /// All of them, in KVM's order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Value<'_>> {
        let all = self.schema.statistics().iter();
        all.map(|statistic| self.value(statistic))
    }

    /// What changed since an earlier sample of the same reader. One of another reader is taken too where
    /// it has the same statistics, as the vCPUs of a VM have.
    ///
    /// # Errors
    /// [`StatsError::OtherStatistics`].
    pub fn since<'a>(&'a self, earlier: &'a Self) -> Result<Changes<'a>, StatsError> {
        let same = Arc::ptr_eq(&self.schema, &earlier.schema)
            || self.schema.statistics() == earlier.schema.statistics();
        if !same {
            return Err(StatsError::OtherStatistics);
        }
        Ok(Changes {
            later: self,
            earlier,
        })
    }

    #[inline]
    fn value<'a>(&'a self, statistic: &'a Statistic) -> Value<'a> {
        Value {
            statistic,
            data: self.data.get(statistic.range()).unwrap_or(&[]),
        }
    }
}

/// A bucket of a histogram: how many values lay in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket<T> {
    /// Its values begin here, in the statistic's [`scale`](Statistic::scale).
    pub start: u64,
    /// They are below this; `None` is without end.
    pub end: Option<u64>,
    /// How many there were.
    pub count: T,
}

/// A statistic and its number, or its buckets, at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Value<'a> {
    statistic: &'a Statistic,
    data: &'a [u8],
}

impl<'a> Value<'a> {
    /// What it is of.
    #[must_use]
    pub const fn statistic(&self) -> &'a Statistic {
        self.statistic
    }

    /// Its number, in the statistic's [`scale`](Statistic::scale). `None` for a histogram, and for one
    /// of other than one number.
    #[inline]
    #[must_use]
    pub fn number(&self) -> Option<u64> {
        let bytes = self.data.try_into().ok()?;
        (!self.statistic.is_histogram()).then(|| u64::from_ne_bytes(bytes))
    }

    /// Its number with the scale: exact, and in whole units ([`Scaled::as_f64`]).
    #[must_use]
    pub fn scaled(&self) -> Option<Scaled> {
        Some(self.statistic.scale().of(self.number()?.into()))
    }

    /// Its numbers as they are, whatever its kind.
    #[inline]
    pub fn numbers(&self) -> impl ExactSizeIterator<Item = u64> + use<'a> {
        self.data.chunks_exact(NUMBER).map(number)
    }

    /// A histogram's buckets, from the lowest; nothing for other kinds. Left out are those that
    /// [`Statistic::bucket_range`] has no range for.
    pub fn buckets(&self) -> impl Iterator<Item = Bucket<u64>> + use<'a> {
        buckets(self.statistic, self.numbers())
    }

    /// Whether all its numbers are 0.
    #[inline]
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.data.iter().all(|byte| *byte == 0)
    }
}

/// What changed between two samples.
#[derive(Clone, Copy, Debug)]
pub struct Changes<'a> {
    later: &'a Sample,
    earlier: &'a Sample,
}

impl<'a> Changes<'a> {
    /// Of the statistic of this index.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<Change<'a>> {
        Some(Change {
            later: self.later.get(index)?,
            earlier: self.earlier.get(index)?,
        })
    }

    /// Of the statistic of this name.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<Change<'a>> {
        self.get(self.later.schema.index_of(name)?)
    }

    /// Of all, in KVM's order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Change<'a>> + use<'a> {
        let both = self.later.iter().zip(self.earlier.iter());
        both.map(|(later, earlier)| Change { later, earlier })
    }
}

/// What changed of one statistic: later less earlier, exactly, and so negative where it fell. A
/// cumulative one falls only where somebody cleared it through debugfs.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    later: Value<'a>,
    earlier: Value<'a>,
}

impl<'a> Change<'a> {
    /// What it is of.
    #[must_use]
    pub const fn statistic(&self) -> &'a Statistic {
        self.later.statistic
    }

    /// The difference, as [`Value::number`] is.
    #[inline]
    #[must_use]
    pub fn number(&self) -> Option<i128> {
        Some(i128::from(self.later.number()?) - i128::from(self.earlier.number()?))
    }

    /// The difference with its scale.
    #[must_use]
    pub fn scaled(&self) -> Option<Scaled> {
        Some(self.statistic().scale().of(self.number()?))
    }

    /// The differences of its numbers as they are, whatever its kind.
    #[inline]
    pub fn numbers(&self) -> impl ExactSizeIterator<Item = i128> + use<'a> {
        let both = self.later.numbers().zip(self.earlier.numbers());
        both.map(|(later, earlier)| i128::from(later) - i128::from(earlier))
    }

    /// A histogram's buckets with what came into each; nothing for other kinds.
    pub fn buckets(&self) -> impl Iterator<Item = Bucket<i128>> + use<'a> {
        buckets(self.statistic(), self.numbers())
    }

    /// Whether nothing changed.
    #[inline]
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.later.data == self.earlier.data
    }
}

fn buckets<T>(
    statistic: &Statistic,
    counts: impl Iterator<Item = T>,
) -> impl Iterator<Item = Bucket<T>> {
    counts.enumerate().filter_map(|(index, count)| {
        let (start, end) = statistic.bucket_range(index)?;
        Some(Bucket { start, end, count })
    })
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .first_chunk()
        .map_or(0, |number| u64::from_ne_bytes(*number))
}
