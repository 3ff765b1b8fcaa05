// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-block, a disk (virtio 1.2, 5.2): a raw file or a block device of the host.
//!
//! ```text
//!   DiskConfig ── open ──► Image   locked, measured        config, image, lock, space
//!                            │
//!   chain ──► Request ──► Task ──► Job ──► Engine ──► host   request, task, engine
//!                           ▲                │  io_uring | threads              uring, threads
//!                           └── Completion ◄─┘
//!             handler: a thread for each queue
//! ```
//!
//! # What is promised
//! - **Durability.** `cache=writeback`: what was answered before a flush is durable when the flush is answered
//!   (`fdatasync`). A driver that knows no flush has each write durable when it is answered, and so has one that turns
//!   the cache off (`VIRTIO_BLK_F_CONFIG_WCE`, Linux's `cache_type`). `cache=unsafe`: nothing is. Neither promises
//!   anything of what a killed monitor has not answered; what it has answered is in the host's page cache and stays.
//! - **Errors.** A request that the host cannot do is answered with an error; the next one is served. That is so for a
//!   full file system, a broken disk, an image that has become shorter. One such error in ten seconds is logged.
//! - **Sizes.** The disk's size is the image's when it was opened. Bytes behind the last whole sector of 512 are not
//!   shown.
//! - **No copies.** The host reads and writes guest memory itself. It stays mapped as long as that lasts, and a reset or
//!   a pause waits for it: a host's disk that hangs has the guest's reset hang as well.
//! - **Bounds.** A queue has 128 requests under way at most; the others wait in the guest's memory.
//!
//! # Discards and zeros
//! A discard makes a hole where the host's file system has holes, and is not offered where it has none. Zeros are
//! written by the host's own means (a hole where the driver permits it, else a range), and byte by byte where it has
//! none; the driver sees no difference. A discard is advice, so one that the host refuses is no error.
//!
//! # What is not here
//! The page cache is always used (no `O_DIRECT`). The size of a running guest's disk does not change. No zones, no
//! secure erase, no lifetime, no image formats but raw.

mod config;
pub mod engine;
mod fingerprint;
mod handler;
mod image;
pub(super) mod lock;
mod request;
mod space;
mod task;
mod threads;
mod uring;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::engine::Engine;
use self::handler::Common;
use self::request::Disk;
use self::space::{QUEUE_SIZE, WRITEBACK};
use super::device::{Activation, Assignment, VirtioDevice};
use super::fault::Fault;

pub use self::config::{Cache, DiskConfig, DiskConfigError, Io, MAX_QUEUES, MAX_SERIAL};
pub use self::fingerprint::Fingerprint;
pub use self::handler::BlockHandler;
pub use self::image::{Image, OpenError, Topology};
pub use self::space::{Offer, SECTOR};
pub use self::threads::Threads;
pub use self::uring::Uring;

/// Threads of a disk that has no io_uring, for all of its queues together.
const THREADS: usize = 8;

/// A disk.
pub struct Block {
    image: Image,
    offer: Offer,
    cache: Cache,
    queue_sizes: Vec<u16>,
    writeback: Arc<AtomicBool>,
    engines: Engines,
}

/// What makes the engine of each queue's handler.
type Engines = Box<dyn Fn(&Image, usize) -> io::Result<Box<dyn Engine>> + Send>;

/// A disk as data. Nothing is under way: a handler that rests has finished what it had taken, and what it had not taken
/// is in the guest's memory. What is on the disk is not in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// What the driver knows of the disk.
    pub offer: Offer,
    /// The driver has the cache on; it counts while `VIRTIO_BLK_F_CONFIG_WCE` is negotiated.
    pub writeback: bool,
    /// By what the image is known again; none where the host did not say.
    #[serde(default)]
    pub image: Option<Fingerprint>,
}

impl DiskConfig {
    /// Opens and locks the image, and finds out how it can be read and written.
    ///
    /// # Errors
    /// [`OpenError`]; nothing has changed.
    pub fn open(&self) -> Result<Block, OpenError> {
        self.check()?;
        let image = Image::open(&self.path, self.readonly)?;
        Block::new(image, self)
    }

    /// Opens the image for a disk that goes on from `state`, unless the image has moved on since. With `copy` another
    /// file may be the disk: the caller knows that it is what the image was. What the driver knows of the disk is the state's: serial
    /// number, queues, block sizes. The image has to have the size that the driver knows, and to be writable if the
    /// driver writes.
    ///
    /// # Errors
    /// [`OpenError`]; nothing has changed.
    pub fn open_from(&self, state: &BlockState, copy: bool) -> Result<Block, OpenError> {
        self.check()?;
        // Who refuses, and who goes on from the same snapshot later, finds the image as it was.
        let image = Image::open_untouched(&self.path, self.readonly, state.offer.zeroes_unmap)?;
        let now = image.fingerprint();
        let now = now.map_err(|source| OpenError::Ask {
            path: image.path().to_owned(),
            source,
        })?;
        if let Some(why) = state.differs(&now, copy) {
            let path = image.path().to_owned();
            return Err(OpenError::State { path, why });
        }
        Block::from_state(image, self, state)
    }

    /// Refuses what [`open_from`](Self::open_from) would refuse, as far as it can be known while another process has the
    /// disk and writes it: the image cannot be opened, or is another one, or of another size. Takes no lock, and leaves
    /// nothing open.
    ///
    /// # Errors
    /// As there.
    pub fn look_for(&self, state: &BlockState, copy: bool) -> Result<(), OpenError> {
        self.check()?;
        let (sectors, mut now) = Image::look(&self.path, self.readonly)?;
        if let Some(was) = &state.image {
            // These go on while it is written.
            (now.modified, now.changed) = (was.modified, was.changed);
        }
        let differs = state.differs(&now, copy);
        let wrong = differs.or_else(|| state.cannot_be(sectors, self.readonly));
        wrong.map_or(Ok(()), |why| {
            let path = self.path.clone();
            Err(OpenError::State { path, why })
        })
    }
}

impl BlockState {
    /// What says that the image that is `now` so is not this disk's. A `copy` may be another file.
    fn differs(&self, now: &Fingerprint, copy: bool) -> Option<String> {
        let was = self.image.as_ref();
        was.filter(|was| !copy || was.inode == now.inode)
            .and_then(|was| was.differs(now))
    }

    /// Why no image of this size, which can only be read or not, can be this disk's.
    fn cannot_be(&self, sectors: u64, readonly: bool) -> Option<String> {
        let Offer {
            sectors: was,
            queues,
            serial,
            ..
        } = &self.offer;
        if *was != sectors {
            return Some(format!("it has {sectors} sectors, the guest's disk {was}"));
        }
        if !self.offer.has(VIRTIO_BLK_F_RO) && readonly {
            return Some("it is readonly, and the guest's disk is not".into());
        }
        if !(1..=MAX_QUEUES).contains(queues) || serial.len() > MAX_SERIAL {
            return Some(format!(
                "no disk has {queues} queues and the serial number {serial:?}"
            ));
        }
        None
    }
}

impl Block {
    /// A disk of this image. The configuration's path is not looked at.
    ///
    /// # Errors
    /// [`OpenError::Uring`].
    pub fn new(image: Image, config: &DiskConfig) -> Result<Self, OpenError> {
        let engines = engines(&image, config.io)?;
        Ok(Block::with_engines(image, config, engines))
    }

    /// A disk of this image, going on from `state`.
    ///
    /// # Errors
    /// [`OpenError::State`]: not this disk's; [`OpenError::Uring`].
    pub fn from_state(
        image: Image,
        config: &DiskConfig,
        state: &BlockState,
    ) -> Result<Self, OpenError> {
        if let Some(why) = state.cannot_be(image.sectors(), image.is_readonly()) {
            let path = image.path().to_owned();
            return Err(OpenError::State { path, why });
        }
        let BlockState {
            offer, writeback, ..
        } = state;
        let mut disk = Block::new(image, config)?;
        disk.queue_sizes = vec![QUEUE_SIZE; offer.queues.into()];
        disk.writeback.store(*writeback, Ordering::Relaxed);
        disk.offer = offer.clone();
        Ok(disk)
    }

    /// A disk that is read and written by engines that `make` gives, for each queue one, at each start of its driver.
    /// For tests, which play a host that fails.
    pub fn with_engines(
        image: Image,
        config: &DiskConfig,
        make: impl Fn(&Image, usize) -> io::Result<Box<dyn Engine>> + Send + 'static,
    ) -> Self {
        let offer = Offer::new(&image, config);
        Block {
            queue_sizes: vec![QUEUE_SIZE; offer.queues.into()],
            image,
            offer,
            cache: config.cache,
            writeback: Arc::new(AtomicBool::new(true)),
            engines: Box::new(make),
        }
    }

    /// What the driver is offered.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Whether the driver's writes may be durable later than they are answered.
    fn is_writeback(&self, features: u64) -> bool {
        let has = |bit: u32| features >> bit & 1 == 1;
        match has(VIRTIO_BLK_F_FLUSH) {
            // It has no way to ask for it: 5.2.6.2, and 5.2.5.2 for the field.
            false => false,
            true => !has(VIRTIO_BLK_F_CONFIG_WCE) || self.writeback.load(Ordering::Relaxed),
        }
    }
}

/// What makes engines as `io` wants them. That io_uring works is tried now.
fn engines(image: &Image, io: Io) -> Result<Engines, OpenError> {
    let uring = match io {
        Io::Threads => false,
        Io::Auto | Io::Uring => match Uring::new(image) {
            Ok(_) => true,
            Err(error) if io == Io::Uring => return Err(OpenError::Uring(error)),
            Err(error) => {
                log::info!(
                    "{}: threads, for there is no io_uring here ({error})",
                    image.path().display()
                );
                false
            }
        },
    };
    Ok(Box::new(move |image, queues| {
        let most = (THREADS / queues.max(1)).max(1);
        let threads =
            |image| -> io::Result<Box<dyn Engine>> { Ok(Box::new(Threads::new(image, most)?)) };
        if !uring {
            return threads(image);
        }
        match Uring::new(image) {
            Ok(ring) => Ok(Box::new(ring)),
            Err(error) if io == Io::Uring => Err(error),
            // There was one at the start: memory, or descriptors.
            Err(error) => {
                log::warn!(
                    "{}: threads, for io_uring is refused now ({error})",
                    image.path().display()
                );
                threads(image)
            }
        }
    }))
}

impl VirtioDevice for Block {
    type Handler = BlockHandler;
    type State = BlockState;
    const DEVICE_ID: u32 = VIRTIO_ID_BLOCK;
    const NAME: &'static str = "virtio-block";

    fn features(&self) -> u64 {
        self.offer.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.offer.space(self.writeback.load(Ordering::Relaxed));
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = space.get(from..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(there) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (WRITEBACK, [on]) = (offset, data)
            && self.offer.has(VIRTIO_BLK_F_CONFIG_WCE)
        {
            // Relaxed: a request that the driver makes available after this write comes by the queue's notification or
            // its ring, which order it. What is under way may go either way.
            self.writeback.store(*on != 0, Ordering::Relaxed);
        }
    }

    fn activate(
        &mut self,
        activation: &Activation,
    ) -> Result<Vec<Assignment<BlockHandler>>, Fault> {
        let writeback = self.is_writeback(activation.features);
        self.writeback.store(writeback, Ordering::Relaxed);
        let mut serial = [0; MAX_SERIAL];
        for (to, from) in serial.iter_mut().zip(self.offer.serial.bytes()) {
            *to = from;
        }
        let common = Arc::new(Common {
            image: self.image.clone(),
            disk: Disk {
                sectors: self.offer.sectors,
                readonly: self.offer.has(VIRTIO_BLK_F_RO),
                features: activation.features,
            },
            serial,
            flushes: self.cache == Cache::Writeback && !self.image.is_readonly(),
            writeback: self.writeback.clone(),
        });
        let count = self.queue_sizes.len();
        (0..count as u16)
            .map(|queue| {
                let engine = (self.engines)(&self.image, count).map_err(|source| Fault::Host {
                    what: "begin to read and write the image",
                    source,
                })?;
                Ok(Assignment {
                    queues: vec![queue],
                    handler: BlockHandler::new(common.clone(), engine),
                })
            })
            .collect()
    }

    fn retire(&mut self, _: Vec<BlockHandler>) {}

    fn reset(&mut self) {
        self.writeback.store(true, Ordering::Relaxed);
    }

    fn state(&self) -> BlockState {
        BlockState {
            offer: self.offer.clone(),
            writeback: self.writeback.load(Ordering::Relaxed),
            image: self.image.fingerprint().ok(),
        }
    }

    fn make_durable(&self) -> io::Result<()> {
        match self.image.is_readonly() {
            true => Ok(()),
            false => self.image.sync(),
        }
    }

    fn let_go(&self) -> io::Result<()> {
        self.image.unlock()
    }

    fn take_back(&self) -> io::Result<()> {
        self.image.lock_again()
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block")
            .field("image", &self.image)
            .field("offer", &self.offer)
            .finish_non_exhaustive()
    }
}
