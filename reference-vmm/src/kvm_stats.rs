// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What KVM itself counted of a machine: of the VM, and of each vCPU.
//!
//! The monitor sees the exits that come to it; KVM sees those that it serves alone as well, and page
//! faults, halts and what they cost. Most of it is 0 for most guests: what is 0 is left out.

use kvm_core::stats::{GetStats, ReadStats, Sample, StatsError, StatsReader, Value};
use serde::Serialize;

/// The open statistics of a machine. Each holds the VM, and a file descriptor.
#[derive(Debug)]
pub struct KvmReaders<F> {
    vm: StatsReader<F>,
    vcpus: Vec<StatsReader<F>>,
}

impl<F: ReadStats> KvmReaders<F> {
    /// Opens them, before a vCPU runs.
    ///
    /// # Errors
    /// [`StatsError`]: of a host without them, above all.
    pub fn open<V, C>(vm: &V, vcpus: &[C]) -> Result<Self, StatsError>
    where
        V: GetStats<File = F>,
        C: GetStats<File = F>,
    {
        Ok(KvmReaders {
            vm: StatsReader::open(vm)?,
            vcpus: vcpus
                .iter()
                .map(StatsReader::open)
                .collect::<Result<_, _>>()?,
        })
    }

    /// The numbers of now. Makes no vCPU wait.
    ///
    /// # Errors
    /// [`StatsError`].
    pub fn sample(&mut self) -> Result<KvmStats, StatsError> {
        Ok(KvmStats {
            vm: counted(self.vm.sample()?),
            vcpus: self
                .vcpus
                .iter_mut()
                .map(|vcpu| Ok(counted(vcpu.sample()?)))
                .collect::<Result<_, StatsError>>()?,
        })
    }
}

/// KVM's numbers of one moment, without those that are 0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct KvmStats {
    /// Of the VM.
    pub vm: Vec<KvmStat>,
    /// Of each vCPU, in the order of their numbers, as the guest counts its processors.
    pub vcpus: Vec<Vec<KvmStat>>,
}

/// One statistic. Its names are the kernel's, and differ from one to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct KvmStat {
    /// KVM's name for it.
    pub name: String,
    /// What its number, or its buckets' bounds, are in: `ns`, `KiB`; nothing where things are counted.
    pub unit: String,
    /// Its number; `None` of a histogram.
    pub value: Option<u64>,
    /// A histogram's buckets that are not empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub buckets: Vec<KvmBucket>,
}

/// A bucket of a histogram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct KvmBucket {
    /// The least value that is counted in it.
    pub from: u64,
    /// Values in it are less than this; `None` is without end.
    pub below: Option<u64>,
    /// How many there were.
    pub count: u64,
}

fn counted(sample: &Sample) -> Vec<KvmStat> {
    sample
        .iter()
        .filter(|value| !value.is_zero())
        .map(|value| KvmStat::from(&value))
        .collect()
}

impl From<&Value<'_>> for KvmStat {
    fn from(value: &Value<'_>) -> Self {
        let statistic = value.statistic();
        let buckets = value.buckets().filter(|bucket| bucket.count > 0);
        KvmStat {
            name: statistic.name().into(),
            unit: statistic.scale().to_string(),
            value: value.number(),
            buckets: buckets
                .map(|bucket| KvmBucket {
                    from: bucket.start,
                    below: bucket.end,
                    count: bucket.count,
                })
                .collect(),
        }
    }
}

impl KvmStats {
    /// The rows of a table of two columns for each the VM and the vCPUs, with a title of its own; none
    /// for one of which KVM counted nothing.
    pub fn tables(&self) -> impl Iterator<Item = Vec<Vec<String>>> {
        let vcpus = self.vcpus.iter().enumerate();
        let vcpus = vcpus.map(|(vcpu, stats)| (format!("KVM's counts of vcpu{vcpu}"), stats));
        std::iter::once(("KVM's counts of the VM".to_owned(), &self.vm))
            .chain(vcpus)
            .filter(|(_, stats)| !stats.is_empty())
            .map(|(title, stats)| {
                let title = vec![title, "number".to_owned()];
                let rows = stats.iter().flat_map(KvmStat::rows);
                std::iter::once(title).chain(rows).collect()
            })
    }
}

impl KvmStat {
    /// A row of a name and a number; for each bucket one.
    fn rows(&self) -> Vec<Vec<String>> {
        let row = |name: String, number: u64| vec![name, number.to_string()];
        let (name, unit) = (&self.name, self.unit.as_str());
        let one = self.value.map(|number| match unit {
            "" => row(format!("  {name}"), number),
            _ => row(format!("  {name}, {unit}"), number),
        });
        let space = if unit.is_empty() { "" } else { " " };
        let buckets = self.buckets.iter().map(|bucket| {
            let values = match bucket.below {
                Some(below) => format!("{}..{below}{space}{unit}", bucket.from),
                None => format!("{}{space}{unit} and more", bucket.from),
            };
            row(format!("  {name} {values}"), bucket.count)
        });
        one.into_iter().chain(buckets).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings as kvm;
    use kvm_core::fake::{FakeStat, FakeStats};

    fn waits(values: &[u64]) -> FakeStat {
        FakeStat {
            flags: kvm::KVM_STATS_TYPE_LOG_HIST | kvm::KVM_STATS_UNIT_SECONDS,
            exponent: -9,
            values: values.to_vec(),
            ..FakeStat::counter("waits", 0)
        }
    }

    #[test]
    fn what_kvm_counted_is_told_and_what_is_zero_is_not() {
        let vm = FakeStats::new("kvm-1", [FakeStat::counter("pages", 0)]);
        let vcpu = FakeStats::new(
            "kvm-1/vcpu-0",
            [
                FakeStat::counter("exits", 0),
                FakeStat::counter("halts", 0),
                waits(&[0, 0, 3, 5]),
            ],
        );
        let mut readers = KvmReaders::open(&vm, std::slice::from_ref(&vcpu)).unwrap();
        vcpu.set("exits", &[7]);
        let stats = readers.sample().unwrap();
        assert_eq!(stats.vm, []);
        let json = serde_json::to_value(&stats).unwrap();
        let expected = serde_json::json!({
            "vm": [],
            "vcpus": [[
                { "name": "exits", "unit": "", "value": 7 },
                { "name": "waits", "unit": "ns", "value": null, "buckets": [
                    { "from": 2, "below": 4, "count": 3 },
                    { "from": 4, "below": null, "count": 5 },
                ]},
            ]],
        });
        assert_eq!(json, expected);
        let tables: Vec<_> = stats.tables().collect();
        let expected = [
            ["KVM's counts of vcpu0", "number"],
            ["  exits", "7"],
            ["  waits 2..4 ns", "3"],
            ["  waits 4 ns and more", "5"],
        ];
        assert_eq!(
            tables,
            [expected.map(|row| row.map(str::to_owned).to_vec())]
        );
    }

    #[test]
    fn one_that_cannot_be_opened_or_read_is_an_error() {
        let good = FakeStats::new("kvm-1", [FakeStat::counter("pages", 1)]);
        let bad = good.clone();
        let none = FakeStats::new("kvm-1", []).open_fails(libc::ENOTTY);
        let error = KvmReaders::open(&good, &[none]).unwrap_err();
        assert_eq!(error, StatsError::Unsupported);
        let mut readers = KvmReaders::open(&good, &[bad]).unwrap();
        good.reads_fail_after(1, libc::EIO);
        assert!(matches!(readers.sample(), Err(StatsError::Read { .. })));
    }
}
