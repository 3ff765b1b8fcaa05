// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file, its schema, and the latest sample.

use std::sync::Arc;

use super::schema::read_whole;
use super::{GetStats, ReadStats, Sample, StatsError, StatsPart, StatsSchema};

/// What an unknown ioctl of a VM is to KVM.
const ENOTTY: i32 = 25;
/// And one of a vCPU.
const EINVAL: i32 = 22;

/// The statistics of one VM or vCPU. It owns KVM's file, which it closes when it is dropped.
#[derive(Debug)]
pub struct StatsReader<F> {
    file: F,
    latest: Sample,
    /// Where the next sample goes, so that one that fails leaves the latest as it is.
    spare: Box<[u8]>,
}

impl<F: ReadStats> StatsReader<F> {
    /// Opens the statistics of a VM or a vCPU, reads what there are, and takes a first sample.
    ///
    /// # Errors
    /// [`StatsError`]; nothing is left open.
    pub fn open(of: &impl GetStats<File = F>) -> Result<Self, StatsError> {
        of.get_stats_fd()
            .map_err(|errno| match errno.errno() {
                // Neither is an answer of the ioctl itself.
                ENOTTY | EINVAL => StatsError::Unsupported,
                _ => StatsError::Open { errno },
            })
            .and_then(Self::new)
    }

    /// The same of a file that is open already (one that another process sent, for example).
    ///
    /// # Errors
    /// [`StatsError`]; the file is closed.
    pub fn new(file: F) -> Result<Self, StatsError> {
        let schema = StatsSchema::read(&file)?;
        let spare = vec![0; schema.data_len()].into_boxed_slice();
        let mut reader = Self {
            file,
            latest: Sample::zero(Arc::new(schema)),
            spare,
        };
        reader.sample()?;
        Ok(reader)
    }

    /// What statistics there are.
    #[must_use]
    pub const fn schema(&self) -> &Arc<StatsSchema> {
        self.latest.schema()
    }

    /// The file.
    #[must_use]
    pub const fn file(&self) -> &F {
        &self.file
    }

    /// The latest sample; after opening, the one of then.
    #[must_use]
    pub const fn latest(&self) -> &Sample {
        &self.latest
    }

    /// Takes a sample: one `pread`, no lock, no allocation.
    ///
    /// # Errors
    /// [`StatsError::Read`], [`StatsError::Truncated`]; the latest sample stays what it was.
    pub fn sample(&mut self) -> Result<&Sample, StatsError> {
        let offset = self.latest.schema().data_offset;
        read_whole(&self.file, StatsPart::Data, &mut self.spare, offset)?;
        self.latest.exchange(&mut self.spare);
        Ok(&self.latest)
    }
}
