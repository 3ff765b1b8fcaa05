// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! By what the two sides of a migration know each other again, on connections that are made when the guest may have gone.
//!
//! ```text
//!   source                                  destination
//!   Greeting(a number by chance, role) ───►
//!                                      ◄─── Known(another one, HMAC of both)     or Settled(unknown)
//!   Proof(HMAC of both)                ───►
//! ```
//!
//! The migration's number is the secret: it goes over the first connections alone, to where the guest was sent, and is not
//! said again; what names the migration elsewhere, in a log or where pages are asked for, is made of it by the same function
//! ([`image`]). So whoever listens in the destination's place now, or at an address that somebody named by mistake, is told
//! nothing by which he could be the destination, and is given no page; and nobody takes the source's place. Who passes on what
//! both say is found by TLS, which without it stays on one host.
//!
//! HMAC-SHA-256 (RFC 2104, FIPS 180-4) over the role, the side and both numbers: none can be said again, nor said back. What is
//! said to prove something and what names the migration begin with words of their own: none is the other.

#![forbid(unsafe_code)]

use std::io;

use ring::hmac;

use super::link::{LinkError, Watch, Wire, greet, receive, send};
use super::message::{Ending, Greeting, Message, MigrationId, PROOF, Role, Side};
use crate::devices::virtio::rng::random_id;

/// What one side says to prove that it knows the number.
struct Said {
    role: Role,
    /// The source's number by chance, and the destination's.
    chance: [[u8; 16]; 2],
}

impl Said {
    fn bytes(&self, side: Side) -> Vec<u8> {
        let side = match side {
            Side::Source => 1_u8,
            Side::Destination => 2,
        };
        let [here, there] = self.chance;
        let (role, number) = self.role.numbers();
        let mut bytes = b"reference-vmm migration\0".to_vec();
        bytes.push(side);
        bytes.extend(role.to_le_bytes());
        bytes.extend(number.to_le_bytes());
        bytes.extend(here);
        bytes.extend(there);
        bytes
    }

    fn proof(&self, id: MigrationId, side: Side) -> [u8; PROOF] {
        let tag = hmac::sign(&key(id), &self.bytes(side));
        tag.as_ref().try_into().unwrap_or([0; PROOF])
    }

    fn is_proven(&self, id: MigrationId, side: Side, proof: &[u8; PROOF]) -> bool {
        hmac::verify(&key(id), &self.bytes(side), proof).is_ok()
    }
}

fn key(id: MigrationId) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, &id.0)
}

/// The name of migration `id` in words and where pages are asked for, which is no secret and tells nothing of that.
pub(super) fn image(id: MigrationId) -> u64 {
    let tag = hmac::sign(&key(id), b"reference-vmm image\0");
    let first = tag.as_ref().first_chunk();
    u64::from_be_bytes(first.copied().unwrap_or_default())
}

/// Whether the two are one, in a time that tells nothing of how much of them is.
pub(super) fn is_same(id: MigrationId, other: MigrationId) -> bool {
    let text = b"reference-vmm number\0";
    let tag = hmac::sign(&key(other), text);
    hmac::verify(&key(id), text, tag.as_ref()).is_ok()
}

/// The source's side: greets, and learns whether who answers is the migration's destination, who then knows the same of this
/// side. False: it is another, and nothing has been said to it.
///
/// # Errors
/// [`LinkError`].
pub(super) fn introduce(
    wire: &mut impl Wire,
    id: MigrationId,
    role: Role,
    watch: &Watch<'_>,
) -> Result<bool, LinkError> {
    let here = random_id()?;
    let greeting = Greeting {
        id: MigrationId(here),
        role,
    };
    greet(wire, &greeting, watch)?;
    match receive(wire, Side::Destination, watch)? {
        Message::Known { chance, proof } => {
            let said = Said {
                role,
                chance: [here, chance],
            };
            let is = said.is_proven(id, Side::Destination, &proof);
            if is {
                let proof = said.proof(id, Side::Source);
                send(wire, &Message::Proof(proof), watch)?;
            }
            Ok(is)
        }
        Message::Settled(Ending::Unknown) => Ok(false),
        other => Err(LinkError::Unexpected {
            said: other.kind(),
            due: "Known",
        }),
    }
}

/// The destination's side, of migration `id`, behind a greeting with the number `here`: whether who has greeted is the
/// migration's source.
///
/// # Errors
/// [`LinkError`].
pub(super) fn recognise(
    wire: &mut impl Wire,
    id: MigrationId,
    Greeting {
        id: MigrationId(here),
        role,
    }: Greeting,
    watch: &Watch<'_>,
) -> Result<bool, LinkError> {
    let chance = random_id().map_err(io::Error::other)?;
    let said = Said {
        role,
        chance: [here, chance],
    };
    let proof = said.proof(id, Side::Destination);
    send(wire, &Message::Known { chance, proof }, watch)?;
    match receive(wire, Side::Source, watch)? {
        Message::Proof(proof) => Ok(said.is_proven(id, Side::Source, &proof)),
        other => Err(LinkError::Unexpected {
            said: other.kind(),
            due: "Proof",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migrations_name_tells_nothing_of_its_number() {
        let (id, other) = (MigrationId([0xab; 16]), MigrationId([2; 16]));
        assert_eq!(image(id), image(id));
        assert_ne!(image(id), image(other));
        assert!(is_same(id, id) && !is_same(id, other));
        // Logs have the first half of it.
        let words = id.to_string();
        assert_eq!(words, format!("{:08x}", image(id) >> 32));
        for bytes in [words, format!("{:016x}", image(id))] {
            assert!(!bytes.contains("abab"), "{bytes}");
        }
    }

    #[test]
    fn a_proof_is_of_one_migration_one_connection_one_role_and_one_side() {
        let said = |role, here, there| Said {
            role,
            chance: [[here; 16], [there; 16]],
        };
        let (id, other) = (MigrationId([1; 16]), MigrationId([2; 16]));
        let one = said(Role::Pages(0), 3, 4);
        let proof = one.proof(id, Side::Source);
        assert!(one.is_proven(id, Side::Source, &proof));
        assert!(!one.is_proven(other, Side::Source, &proof));
        assert!(!one.is_proven(id, Side::Destination, &proof));
        for not in [
            said(Role::Pages(1), 3, 4),
            said(Role::Settle, 3, 4),
            said(Role::Pages(0), 4, 3),
            said(Role::Pages(0), 3, 5),
        ] {
            assert!(!not.is_proven(id, Side::Source, &proof));
        }
        assert!(!one.is_proven(id, Side::Source, &[0; PROOF]));
    }
}
