// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Taking a snapshot of a machine.
//!
//! ```text
//!   asked first     a device that no restore could make? a debugger? the place, the configuration's paths
//!   paused          devices' disks synced, states read ─► memory written ─► the disks' clock has moved on
//!   (goes on)       files synced, renamed
//! ```
//!
//! The order of reading: devices (they rest), the interrupt controllers, the vCPUs, the VM's clock. What a controller still
//! sends then is in the vCPUs' local APICs as well at worst, never in neither.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use irq_routing::IrqchipStateError;
use kvm_core::arch::x86_64::state::{ClockError, SaveError, StateHost};
use kvm_core::{Kvm, Pause, VcpuId, VcpuView};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::config_form::{self, PathError};
use super::files::{Draft, DraftFile, HostFiles, MEMORY, STATE, SnapshotFiles, WriteError};
use super::format::SnapshotId;
use super::machine::{DevicesSection, MachineState, StateError, VcpuSection, VmSection};
use super::pages::{self, PIECE, PageMap, Piece};
use crate::devices::virtio::list::DeviceState;
use crate::devices::virtio::rng::random_id;
use crate::memory::SlotTable;
use crate::vm::control::PATIENCE;
use crate::vm::{ControlError, RunState, Running};

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// The directory that the snapshot is to be: one that is not there, that is empty, or an older snapshot, which it
    /// replaces.
    pub dir: PathBuf,
}

/// A snapshot that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotReport {
    /// Its number.
    pub id: SnapshotId,
    /// Guest memory, bytes.
    pub memory: u64,
    /// Bytes of it that were not zero, in whole pages: what the file holds.
    pub written: u64,
    /// How long the guest stood still for it; from the call on where it did already.
    pub paused: Duration,
    /// How long all of it took.
    pub took: Duration,
}

/// Why there is no snapshot. The machine is what it was, running or paused, and an older snapshot of the name too.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// A device that no configuration makes: a restore could not make it again. Found before anything was done.
    #[error("{0} is a device of this program's own, which no restore could make again")]
    Device(String),
    /// A debugger is attached, whose breakpoints are in guest memory. Found before anything was done.
    #[error(
        "the guest is under a debugger, whose breakpoints would be in the snapshot: run it without --gdb"
    )]
    Debugger,
    /// Found before anything was done.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The machine cannot be paused, or does not stay so.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// It was resumed while the snapshot was taken.
    #[error("the guest was let go on by somebody else before the snapshot was taken")]
    Resumed,
    /// KVM cannot be asked what it can save.
    #[error("cannot ask KVM what it saves: {0}")]
    Kvm(String),
    /// The host did not keep what a device has with it.
    #[error("{device}: its host's side cannot be made durable: {source}")]
    Durable {
        /// Its name in the machine.
        device: String,
        /// The errno.
        source: io::Error,
    },
    /// A device does not say its state.
    #[error("{device} has no state: {why}")]
    DeviceState {
        /// Its name in the machine.
        device: String,
        /// Why.
        why: String,
    },
    /// The interrupt controllers' state cannot be read.
    #[error(transparent)]
    Irqchip(#[from] IrqchipStateError),
    /// A vCPU's state cannot be read.
    #[error("vCPU {id}: {source}")]
    Vcpu {
        /// Which.
        id: VcpuId,
        /// What of it.
        source: SaveError,
    },
    /// A vCPU cannot be asked: it has ended.
    #[error(transparent)]
    Vcpus(#[from] kvm_core::ControlError),
    /// The VM's clock cannot be read.
    #[error(transparent)]
    Clock(#[from] ClockError),
    /// Guest memory cannot be read.
    #[error("guest memory at {address:#x} cannot be read: {why}")]
    Memory {
        /// Guest physical address.
        address: u64,
        /// Why.
        why: String,
    },
    /// A state has no form in the file.
    #[error(transparent)]
    State(#[from] StateError),
    /// A random number cannot be had.
    #[error("the host gives no random number: {0}")]
    Random(io::Error),
    /// The files cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl Running {
    /// Writes a snapshot of the machine to `request.dir`. A machine that runs is paused for it and goes on when its memory
    /// is with the host, before that is on the disk; one that is paused stays so.
    ///
    /// Blocks until the snapshot is durable.
    ///
    /// # Errors
    /// [`SnapshotError`]; nothing is left behind.
    pub fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotReport, SnapshotError> {
        self.snapshot_with(request, &HostFiles)
    }

    /// [`snapshot`](Self::snapshot) by way of `files`.
    ///
    /// # Errors
    /// [`SnapshotError`]; nothing is left behind.
    pub fn snapshot_with(
        &self,
        request: &SnapshotRequest,
        files: &impl SnapshotFiles,
    ) -> Result<SnapshotReport, SnapshotError> {
        let begun = Instant::now();
        self.check_for_snapshot()?;
        let config = config_form::to_json(self.config())?;
        let host = self.state_host()?;
        let id = SnapshotId(random_id().map_err(SnapshotError::Random)?);
        let draft = Draft::begin(files, &request.dir)?;
        let standing = Instant::now();
        let ran = self.state() == RunState::Running;
        if ran {
            self.pause()?;
        }
        let captured = self.while_paused(|pause| {
            let mut state = self.capture(pause, config, host)?;
            let memory = draft.create(MEMORY, state.memory.file_len())?;
            draft.write(&memory, &pages::header(id), 0)?;
            let table = self.memory();
            // An end waits for this.
            let go_on = || match self.is_stopping() {
                true => Err(ControlError::Ended.into()),
                false => Ok(()),
            };
            let written = write_memory(&draft, &memory, &table, &mut state.memory, go_on)?;
            Ok::<_, SnapshotError>((state, memory, written))
        });
        wait_for_a_tick();
        let paused = standing.elapsed();
        if ran {
            // The end may have been told meanwhile, which is no concern of the snapshot.
            let _ = self.resume();
        }
        let (state, memory, written) = captured.ok_or(SnapshotError::Resumed)??;
        let bytes = state.encode(id)?;
        let file = draft.create(STATE, bytes.len() as u64)?;
        draft.write(&file, &bytes, 0)?;
        draft.sync(&memory)?;
        draft.sync(&file)?;
        draft.commit()?;
        Ok(SnapshotReport {
            id,
            memory: state.memory.regions.iter().map(|region| region.len).sum(),
            written,
            paused,
            took: begun.elapsed(),
        })
    }

    /// What KVM can save of the vCPUs.
    pub(crate) fn state_host(&self) -> Result<StateHost, SnapshotError> {
        let kvm = |error: &dyn std::error::Error| {
            SnapshotError::Kvm(crate::end::Chain(error).to_string())
        };
        let device = Kvm::open_at(&self.config().kvm).map_err(|error| kvm(&error))?;
        let host = self.vm().state_host(&device);
        host.map_err(|error| kvm(&error))
    }

    /// All of the machine but its memory, of which there are the places alone.
    pub(crate) fn capture(
        &self,
        pause: &Pause,
        config: serde_json::Value,
        host: StateHost,
    ) -> Result<MachineState, SnapshotError> {
        let (com1, rtc, power) = self.device_states();
        let mut virtio = Vec::new();
        for placed in self.virtio() {
            let device = placed.name().to_owned();
            let durable = placed.make_durable();
            if let Err(source) = durable {
                return Err(SnapshotError::Durable { device, source });
            }
            let none = |why: String| SnapshotError::DeviceState {
                device: device.clone(),
                why,
            };
            let state = placed
                .state()
                .ok_or_else(|| none("it does not rest".into()))?
                .map_err(|error| none(error.to_string()))?;
            virtio.push(DeviceState {
                name: device,
                state,
            });
        }
        let devices = DevicesSection {
            com1,
            rtc,
            power,
            virtio,
        };
        let irqchip = self.irqchip().state(self.vm().fd().as_ref())?;
        let ioapic = self.ioapic_state();
        let mut vcpus = Vec::new();
        // Right behind a start on a busy host a thread may not have come to its vCPU yet.
        pause.wait_started(PATIENCE);
        let save = move |vcpu: &VcpuView<'_, VcpuFd>| vcpu.state(&host);
        for (id, state) in pause.with_each(save)? {
            let state = state.map_err(|source| SnapshotError::Vcpu { id, source })?;
            vcpus.push(VcpuSection { id: id.0, state });
        }
        let vm = self.vm().state()?;
        let table = self.memory();
        let memory = PageMap::of(table.regions().map(|region| {
            let range = region.extent().guest_range();
            (range.start, range.end - range.start)
        }));
        Ok(MachineState {
            config,
            vm: VmSection {
                vm,
                irqchip,
                ioapic,
            },
            vcpus,
            devices,
            memory,
        })
    }
}

/// Writes guest memory piece by piece, and what is in each into `map`; how many bytes were not zero.
///
/// # Errors
/// [`SnapshotError::Memory`], [`SnapshotError::Write`].
fn write_memory<F: SnapshotFiles>(
    draft: &Draft<'_, F>,
    file: &DraftFile,
    memory: &SlotTable,
    map: &mut PageMap,
    go_on: impl Fn() -> Result<(), SnapshotError>,
) -> Result<u64, SnapshotError> {
    let mut buffer = vec![0; PIECE as usize];
    let mut written = 0;
    for region in map.regions.clone() {
        for at in (0..region.len).step_by(PIECE as usize) {
            go_on()?;
            let len = (region.len - at).min(u64::from(PIECE)) as usize;
            let piece = buffer.get_mut(..len).unwrap_or_default();
            let address = region.guest + at;
            // Whatever else has it mapped may write meanwhile: what is checked and written is this copy.
            let read = memory.read_slice(piece, GuestAddress(address));
            read.map_err(|error| SnapshotError::Memory {
                address,
                why: error.to_string(),
            })?;
            let runs = pages::runs(piece);
            let checksum = (!runs.is_empty()).then(|| super::format::checksum(piece));
            map.pieces.push(Piece { checksum });
            for (start, len) in runs {
                let run = piece.get(start..start + len).unwrap_or_default();
                draft.write(file, run, region.offset + at + start as u64)?;
                written += len as u64;
            }
        }
    }
    Ok(written)
}

/// Waits until the clock by which file systems tell the time of a write has moved on: a write to a disk that comes when
/// the guest goes on has another time then than the last one before, by which a restore tells that the disk has moved on.
/// That clock moves a hundred times a second at least.
fn wait_for_a_tick() {
    let begun = coarse_time();
    for _ in 0..100 {
        if coarse_time() != begun {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// `CLOCK_REALTIME_COARSE`.
fn coarse_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a timespec that lives through the call.
    match unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &raw mut time) } {
        0 => Duration::new(time.tv_sec as u64, time.tv_nsec as u32),
        // There is no such host; the finer clock moves on at once.
        _ => SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default(),
    }
}
