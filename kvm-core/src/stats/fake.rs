// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Statistics without KVM: a file in memory that a test changes, cuts and spoils.

use std::sync::Arc;

use kvm_bindings as kvm;
use vmm_sys_util::errno::Error as Errno;

use super::{GetStats, ReadStats};
use crate::sync::{Mutex, lock};

const HEADER: usize = size_of::<kvm::kvm_stats_header>();
const DESCRIPTOR: usize = size_of::<kvm::kvm_stats_desc>();
/// `KVM_STATS_NAME_SIZE`.
const NAME: usize = 48;

/// One statistic of a [`FakeStats`], as `struct kvm_stats_desc` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FakeStat {
    /// Its name; what is beyond 48 bytes is cut off.
    pub name: Vec<u8>,
    /// `KVM_STATS_TYPE_…`, `KVM_STATS_UNIT_…` and `KVM_STATS_BASE_…`.
    pub flags: u32,
    /// The exponent.
    pub exponent: i16,
    /// The width of a linear histogram's buckets.
    pub bucket_size: u32,
    /// Its numbers.
    pub values: Vec<u64>,
}

impl FakeStat {
    /// A cumulative count.
    #[must_use]
    pub fn counter(name: &str, value: u64) -> Self {
        Self {
            name: name.into(),
            flags: kvm::KVM_STATS_TYPE_CUMULATIVE,
            exponent: 0,
            bucket_size: 0,
            values: vec![value],
        }
    }
}

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    open: Option<i32>,
    /// Reads that succeed before one fails, and its errno.
    read: Option<(usize, i32)>,
    reads: usize,
}

/// A VM's or a vCPU's statistics, in a file laid out as KVM's is. Its clones are the same file.
#[derive(Clone, Debug)]
pub struct FakeStats(Arc<Mutex<State>>);

impl FakeStats {
    /// These statistics, of one with this id.
    pub fn new(id: &str, statistics: impl IntoIterator<Item = FakeStat>) -> Self {
        let statistics: Vec<_> = statistics.into_iter().collect();
        let descriptors = HEADER + NAME;
        let data = descriptors + statistics.len() * (DESCRIPTOR + NAME);
        let mut bytes = Vec::new();
        for word in [0, NAME, statistics.len(), HEADER, descriptors, data] {
            bytes.extend((word as u32).to_ne_bytes());
        }
        field(&mut bytes, id.as_bytes());
        let mut offset = 0;
        for one in &statistics {
            bytes.extend(one.flags.to_ne_bytes());
            bytes.extend(one.exponent.to_ne_bytes());
            bytes.extend((one.values.len() as u16).to_ne_bytes());
            bytes.extend((offset as u32).to_ne_bytes());
            bytes.extend(one.bucket_size.to_ne_bytes());
            field(&mut bytes, &one.name);
            offset += one.values.len() * size_of::<u64>();
        }
        let values = statistics.iter().flat_map(|one| &one.values);
        bytes.extend(values.flat_map(|value| value.to_ne_bytes()));
        Self::from_bytes(bytes)
    }

    /// A file of any bytes.
    #[must_use]
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(State {
            bytes,
            open: None,
            read: None,
            reads: 0,
        })))
    }

    /// Opening fails with this errno.
    #[must_use]
    pub fn open_fails(self, errno: i32) -> Self {
        lock(&self.0).open = Some(errno);
        self
    }

    /// After so many reads from now on that succeed, all fail with this errno.
    pub fn reads_fail_after(&self, reads: usize, errno: i32) {
        lock(&self.0).read = Some((reads, errno));
    }

    /// How often it was read.
    #[must_use]
    pub fn reads(&self) -> usize {
        lock(&self.0).reads
    }

    /// The file's bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.0).bytes.clone()
    }

    /// Makes the file so long.
    pub fn cut(&self, len: usize) {
        lock(&self.0).bytes.truncate(len);
    }

    /// Gives a statistic of a file made by [`FakeStats::new`] other numbers. An unknown name, and
    /// numbers that it has no room for, change nothing.
    pub fn set(&self, name: &str, values: &[u64]) {
        let mut state = lock(&self.0);
        let Ok(schema) = super::StatsSchema::read(&Bytes(&state.bytes)) else {
            return;
        };
        let Some(one) = schema
            .index_of(name)
            .and_then(|at| schema.statistics().get(at))
        else {
            return;
        };
        let start = schema.data_offset() as usize;
        let Some(data) = state.bytes.get_mut(start..) else {
            return;
        };
        if let Some(slots) = data.get_mut(one.range()) {
            for (slot, value) in slots.chunks_exact_mut(size_of::<u64>()).zip(values) {
                slot.copy_from_slice(&value.to_ne_bytes());
            }
        }
    }
}

impl GetStats for FakeStats {
    type File = Self;

    fn get_stats_fd(&self) -> Result<Self, Errno> {
        match lock(&self.0).open {
            Some(errno) => Err(Errno::new(errno)),
            None => Ok(self.clone()),
        }
    }
}

impl ReadStats for FakeStats {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let mut state = lock(&self.0);
        state.reads += 1;
        match &mut state.read {
            Some((0, errno)) => return Err(Errno::new(*errno)),
            Some((left, _)) => *left -= 1,
            None => {}
        }
        Bytes(&state.bytes).read_at(buf, offset)
    }
}

struct Bytes<'a>(&'a [u8]);

impl ReadStats for Bytes<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let from = usize::try_from(offset).ok();
        let rest = from.and_then(|at| self.0.get(at..)).unwrap_or(&[]);
        let len = rest.len().min(buf.len());
        for (slot, byte) in buf.iter_mut().zip(rest) {
            *slot = *byte;
        }
        Ok(len)
    }
}

/// A text in its field of fixed length.
fn field(bytes: &mut Vec<u8>, text: &[u8]) {
    let end = bytes.len() + NAME;
    bytes.extend(text.iter().take(NAME));
    bytes.resize(end, 0);
}
