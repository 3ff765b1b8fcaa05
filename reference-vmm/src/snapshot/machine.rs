// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine as plain data: what the sections of the file `state` hold, into them and out of them.

#![forbid(unsafe_code)]

use irq_routing::IrqchipState;
use irq_routing::ioapic::IoapicState;
use kvm_core::arch::x86_64::state::{VcpuState, VmState};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::first::FirstPagesError;
use super::format::{self, Container, FormatError, Kind, SnapshotId};
use super::packed::PackedError;
use super::pages::{PageMap, PagesError};
use super::parent::ParentError;
use super::ranges::RangesError;
use crate::arch::layout;
use crate::config::{Config, Irqchip};
use crate::devices::acpi_power::PowerState;
use crate::devices::rtc::RtcState;
use crate::devices::serial::PortState;
use crate::devices::virtio::list::DeviceState;

/// What is the VM's and no vCPU's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSection {
    /// Its clock.
    pub vm: VmState,
    /// The interrupt controllers that are KVM's.
    pub irqchip: IrqchipState,
    /// The one that is the monitor's, with the split irqchip.
    pub ioapic: Option<IoapicState>,
}

/// A vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuSection {
    /// Its number, which is its APIC id.
    pub id: u32,
    /// All that KVM knows of it.
    pub state: VcpuState,
}

/// The devices. The keyboard controller, pvpanic and the debug-exit device know nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DevicesSection {
    /// COM1.
    pub com1: PortState,
    /// The real-time clock.
    pub rtc: RtcState,
    /// Power button, sleep registers and the event device.
    pub power: PowerState,
    /// virtio devices, in the order of their places.
    pub virtio: Vec<DeviceState>,
}

/// All of a machine but its memory.
#[derive(Clone, Debug)]
pub struct MachineState {
    /// What it is made of: JSON as `--config` reads it.
    pub config: Value,
    /// The VM.
    pub vm: VmSection,
    /// The vCPUs, in the order of their making.
    pub vcpus: Vec<VcpuSection>,
    /// The devices.
    pub devices: DevicesSection,
    /// Where its memory is in the file beside.
    pub memory: PageMap,
}

/// Why bytes are no machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The container is none, or is damaged.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A section is not what its kind says.
    #[error("its section {kind} cannot be read: {source}")]
    Section {
        /// Which.
        kind: Kind,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// The section of the configuration is longer than one can be.
    #[error("its section config has {0} bytes, and {most} is the most", most = MOST_CONFIG)]
    LongConfig(usize),
    /// The section of memory is none.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// The section of the one before is none.
    #[error(transparent)]
    Parent(#[from] ParentError),
    /// The section of the pages that it has is none.
    #[error(transparent)]
    Ranges(#[from] RangesError),
    /// The section of the pages that are touched first is none.
    #[error(transparent)]
    FirstPages(#[from] FirstPagesError),
    /// A section of compressed memory is none.
    #[error(transparent)]
    Packed(#[from] PackedError),
    /// Two sections do not go together.
    #[error("its sections do not go together: {0}")]
    Mismatch(String),
}

impl MachineState {
    /// The bytes of a file `state`.
    ///
    /// # Errors
    /// [`StateError::Section`]: a value that JSON has no form for.
    pub fn encode(&self, id: SnapshotId) -> Result<Vec<u8>, StateError> {
        self.encode_with(id, Vec::new())
    }

    /// [`encode`](Self::encode), with sections behind its own.
    ///
    /// # Errors
    /// [`StateError::Section`]: a value that JSON has no form for.
    pub fn encode_with(
        &self,
        id: SnapshotId,
        more: Vec<(Kind, Vec<u8>)>,
    ) -> Result<Vec<u8>, StateError> {
        let config = to_json(Kind::Config, &self.config)?;
        check_config(&config)?;
        let mut sections = vec![
            (Kind::Config, config),
            (Kind::Vm, to_json(Kind::Vm, &self.vm)?),
            (Kind::Vcpus, to_json(Kind::Vcpus, &self.vcpus)?),
            (Kind::Devices, to_json(Kind::Devices, &self.devices)?),
            (Kind::Memory, self.memory.encode()),
        ];
        sections.extend(more);
        Ok(format::encode(id, &sections))
    }

    /// Reads a file `state`, and checks that its sections go together. Where its memory is, be it in other snapshots too,
    /// is a [`Link`](super::link::Link)'s to know.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn parse(file: &[u8]) -> Result<(SnapshotId, Self, Config), StateError> {
        let container = format::parse(file)?;
        // Of a peer's bytes: as a configuration first, which takes no more memory than its text. A JSON value of just
        // anything takes a hundred times as much.
        check_config(container.section(Kind::Config)?)?;
        let config: Config = from_json(&container, Kind::Config)?;
        let state = MachineState {
            config: from_json(&container, Kind::Config)?,
            vm: from_json(&container, Kind::Vm)?,
            vcpus: from_json(&container, Kind::Vcpus)?,
            devices: from_json(&container, Kind::Devices)?,
            memory: PageMap::parse(container.section(Kind::Memory)?)?,
        };
        state.check(&config)?;
        Ok((container.id, state, config))
    }

    /// Whether the memory that was saved is where that of a machine with this configuration is.
    ///
    /// # Errors
    /// The first difference.
    pub(crate) fn check_layout(&self, config: &Config) -> Result<(), String> {
        let ram = memslots::ram_layout(config.memory.size, layout::MMIO_HOLE);
        let ram = ram.map_err(|error| error.to_string())?;
        let slots = config.memory.slots(&ram, config.irqchip != Irqchip::None);
        let regions = &self.memory.regions;
        if slots.len() != regions.len() {
            let (has, wanted) = (regions.len(), slots.len());
            return Err(format!("{has} regions, and it has {wanted}"));
        }
        for (slot, region) in slots.iter().zip(regions) {
            let wanted = (slot.start.0, slot.backing.size());
            if wanted != (region.guest, region.len) {
                let ((at, len), has) = (wanted, region);
                return Err(format!(
                    "a region of {} bytes at {:#x}, and it has one of {len} at {at:#x}",
                    has.len, has.guest
                ));
            }
        }
        Ok(())
    }

    /// What can be checked without a host.
    fn check(&self, config: &Config) -> Result<(), StateError> {
        let wrong = |text: String| Err(StateError::Mismatch(text));
        if let Err(error) = config.validate() {
            return wrong(format!("the configuration cannot be: {error}"));
        }
        let topology = config.cpus.topology();
        let ids: Vec<u32> = topology
            .map(|topology| topology.apic_ids().map(|id| id.0).collect())
            .unwrap_or_default();
        let has: Vec<u32> = self.vcpus.iter().map(|vcpu| vcpu.id).collect();
        if has != ids {
            return wrong(format!("vCPUs {has:?} are there, and {ids:?} configured"));
        }
        let (irqchip, ioapic) = (&self.vm.irqchip, self.vm.ioapic.is_some());
        let fits = match config.irqchip {
            Irqchip::Kernel => matches!(irqchip, IrqchipState::Kernel(_)) && !ioapic,
            Irqchip::Split => *irqchip == IrqchipState::Split && ioapic,
            Irqchip::None => *irqchip == IrqchipState::None && !ioapic,
        };
        if !fits {
            let configured = config.irqchip;
            return wrong(format!(
                "its interrupt controllers are not those of the irqchip {configured:?}"
            ));
        }
        Ok(())
    }
}

/// The longest section of the configuration, bytes: as much as a file of it that is read.
const MOST_CONFIG: usize = 1 << 20;

fn check_config(text: &[u8]) -> Result<(), StateError> {
    match text.len() {
        len if len > MOST_CONFIG => Err(StateError::LongConfig(len)),
        _ => Ok(()),
    }
}

fn to_json<T: Serialize>(kind: Kind, value: &T) -> Result<Vec<u8>, StateError> {
    serde_json::to_vec(value).map_err(|source| StateError::Section { kind, source })
}

fn from_json<T: DeserializeOwned>(container: &Container<'_>, kind: Kind) -> Result<T, StateError> {
    let bytes = container.section(kind)?;
    serde_json::from_slice(bytes).map_err(|source| StateError::Section { kind, source })
}
