// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control queue (virtio 1.2, 5.1.6.5): how many queue pairs the driver uses. What else there is was not offered,
//! and is answered with an error.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::GuestMemory;

use super::pair::Shared;
use super::tap::Tap;
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::fault::Fault;
use crate::devices::virtio::queue::DeviceQueue;

/// Answers the commands that there are. `multiqueue`: the driver may set the number of pairs.
///
/// # Errors
/// [`Fault`].
pub fn serve<M: GuestMemory, T: Tap>(
    memory: &M,
    queue: &mut DeviceQueue,
    shared: &Shared<T>,
    multiqueue: bool,
) -> Result<(), Fault> {
    while let Some(chain) = queue.pop(memory)? {
        if chain.writable.is_empty() {
            return Err(Fault::Driver(
                "a command for the control queue has no byte for its answer".into(),
            ));
        }
        let pairs = pairs_of(memory, &chain)?;
        let pairs = pairs.filter(|pairs| multiqueue && (1..=shared.pairs.len()).contains(pairs));
        let done = pairs.is_some_and(|pairs| match shared.set_pairs(pairs) {
            Ok(()) => true,
            Err(error) => {
                let name = &shared.name;
                log::warn!("{name}: its guest cannot have {pairs} queue pairs: {error}");
                false
            }
        });
        let answer = match done {
            true => VIRTIO_NET_OK,
            false => VIRTIO_NET_ERR,
        };
        chain.writer(memory).write_all(&[answer as u8])?;
        queue.add_used(memory, chain, 1)?;
    }
    Ok(())
}

/// The number of pairs, if the command is about that and whole.
fn pairs_of<M: GuestMemory>(memory: &M, chain: &Chain) -> Result<Option<usize>, Fault> {
    let mut command = [0; 4];
    let whole = chain.reader(memory).read_exact(&mut command)?;
    let [class, number, low, high] = command;
    let is_pairs = u32::from(class) == VIRTIO_NET_CTRL_MQ
        && u32::from(number) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    let pairs = u16::from_le_bytes([low, high]);
    Ok((whole && is_pairs).then_some(pairs.into()))
}
