// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What two monitors say to each other is read as it was written, and any other bytes are refused.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;
use reference_vmm::migration::message::{
    Ending, GREETING, Greeting, HEAD, Head, Kind, MAGIC, MOST_CONNECTIONS, MOST_STATE, MOST_TEXT,
    Message, MessageError, MigrationId, Role, TAIL, VERSION,
};
use reference_vmm::migration::postcopy::{Faults, LastWord};

/// Reads what [`Message::encode`] made.
fn read(bytes: &[u8]) -> Result<Message, MessageError> {
    let head = Head::parse(bytes.first_chunk::<HEAD>().unwrap())?;
    let end = HEAD + head.len as usize;
    let payload = bytes.get(HEAD..end).unwrap_or_default().to_vec();
    let tail = bytes.get(end..).and_then(|rest| rest.first_chunk::<TAIL>());
    Message::parse(head, payload, tail.copied().unwrap_or_default())
}

fn message() -> impl Strategy<Value = Message> {
    let state = || prop::collection::vec(any::<u8>(), 0..300);
    let ending = prop_oneof![
        Just(Ending::Started),
        Just(Ending::Never),
        Just(Ending::Unknown)
    ];
    prop_oneof![
        (1..=MOST_CONNECTIONS, any::<[bool; 2]>(), state()).prop_map(
            |(connections, [compressed, postcopy], state)| Message::Offer {
                connections,
                compressed,
                postcopy,
                state
            }
        ),
        prop::collection::vec(any::<std::ops::Range<u64>>(), 1..20).prop_map(Message::Missing),
        (any::<[u64; 6]>(), ".{0,80}").prop_map(
            |([count, p50_ns, p99_ns, max_ns, missing, lost], why)| {
                let faults = Faults {
                    count,
                    p50_ns,
                    p99_ns,
                    max_ns,
                };
                Message::Enough(LastWord {
                    faults,
                    missing,
                    lost,
                    why,
                })
            }
        ),
        Just(Message::Wanted),
        (any::<[u8; 16]>(), any::<[u8; 32]>())
            .prop_map(|(chance, proof)| Message::Known { chance, proof }),
        any::<[u8; 32]>().prop_map(Message::Proof),
        (any::<u32>(), state()).prop_map(|(round, state)| Message::State { round, state }),
        any::<u32>().prop_map(Message::Taken),
        any::<u32>().prop_map(Message::Round),
        ".{0,80}".prop_map(Message::GivenUp),
        ending.prop_map(Message::Settled),
        "[ -~]{0,256}".prop_map(Message::Ready),
        Just(Message::Prepared),
        Just(Message::Go),
        Just(Message::Started),
        Just(Message::Done),
    ]
}

fn greeting() -> impl Strategy<Value = Greeting> {
    let role = prop_oneof![
        Just(Role::Control),
        (0..MOST_CONNECTIONS).prop_map(Role::Data),
        Just(Role::Settle),
        (0..=MOST_CONNECTIONS).prop_map(Role::Pages)
    ];
    let id = any::<[u8; 16]>().prop_map(MigrationId);
    (id, role).prop_map(|(id, role)| Greeting { id, role })
}

proptest! {
    #[test]
    fn a_message_is_read_as_it_was_written(message in message()) {
        prop_assert_eq!(read(&message.encode().unwrap()), Ok(message));
    }

    #[test]
    fn a_greeting_is_read_as_it_was_written(greeting in greeting()) {
        prop_assert_eq!(Greeting::parse(&greeting.encode()), Ok(greeting));
    }

    #[test]
    fn a_bit_that_turns_over_on_its_way_is_found(message in message(), bit in any::<prop::sample::Index>()) {
        let mut bytes = message.encode().unwrap();
        let bit = bit.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(read(&bytes).is_err());
    }

    #[test]
    fn a_bit_of_a_greeting_that_turns_over_is_found(greeting in greeting(), bit in 0..GREETING * 8) {
        let mut bytes = greeting.encode();
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Greeting::parse(&bytes).is_err());
    }

    #[test]
    fn any_bytes_are_read_or_refused(
        bytes in prop::collection::vec(any::<u8>(), HEAD..200),
        greeting in any::<[u8; GREETING - 8]>(),
        kind in prop::sample::select(Kind::ALL.to_vec()),
        len in 0_u32..64,
    ) {
        let _ = read(&bytes);
        let mut whole = [0; GREETING];
        whole[..8].copy_from_slice(&MAGIC);
        whole[8..].copy_from_slice(&greeting);
        let _ = Greeting::parse(&whole);
        // One that says what it is, and has anything in it.
        let mut head = [0; HEAD];
        head[..2].copy_from_slice(&(kind as u16).to_le_bytes());
        head[4..].copy_from_slice(&len.to_le_bytes());
        if let Ok(head) = Head::parse(&head) {
            let payload: Vec<u8> = bytes.iter().copied().cycle().take(len as usize).collect();
            let mut all = [0; HEAD].to_vec();
            all[..2].copy_from_slice(&(kind as u16).to_le_bytes());
            all[4..].copy_from_slice(&len.to_le_bytes());
            all.extend(&payload);
            let sum = reference_vmm::snapshot::format::checksum(&all);
            if let Ok(message) = Message::parse(head, payload, sum.to_le_bytes()) {
                prop_assert_eq!(message.kind(), kind);
            }
        }
    }
}

#[test]
fn a_length_that_a_kind_cannot_have_is_refused_before_anything_is_allocated() {
    for kind in Kind::ALL {
        let mut head = [0; HEAD];
        head[..2].copy_from_slice(&(kind as u16).to_le_bytes());
        head[4..].copy_from_slice(&u32::MAX.to_le_bytes());
        let refused = Head::parse(&head).unwrap_err();
        assert_eq!(
            refused,
            MessageError::Length {
                kind,
                len: u32::MAX
            }
        );
    }
    assert_eq!(Head::parse(&[0xff; HEAD]), Err(MessageError::Kind(0xffff)));
    assert_eq!(Head::parse(b"HTTP/1.1"), Err(MessageError::Http));
}

#[test]
fn another_version_is_told_as_such_wherever_it_has_its_checksum() {
    let id = MigrationId([1; 16]);
    let mut bytes = Greeting {
        id,
        role: Role::Control,
    }
    .encode();
    bytes[8] += 1;
    let next = VERSION + 1;
    assert_eq!(Greeting::parse(&bytes), Err(MessageError::Version(next)));
}

#[test]
fn a_reason_that_is_too_long_is_cut_between_two_characters() {
    let long = Message::GivenUp("€".repeat(2000));
    let Ok(Message::GivenUp(cut)) = read(&long.encode().unwrap()) else {
        panic!();
    };
    assert_eq!(cut, "€".repeat(MOST_TEXT as usize / 3));
}

#[test]
fn a_state_that_no_machine_has_is_not_waited_for() {
    // 255 vCPUs are 20 MiB, and anyone who may connect can offer.
    const { assert!(MOST_STATE >= 24 << 20 && MOST_STATE <= 32 << 20) }
    for (kind, before) in [(Kind::Offer, 8), (Kind::State, 4)] {
        let head = |len: u32| {
            let mut head = [0; HEAD];
            let of = match kind {
                Kind::Offer => Message::Offer {
                    connections: 1,
                    compressed: false,
                    postcopy: false,
                    state: Vec::new(),
                },
                _ => Message::State {
                    round: 0,
                    state: Vec::new(),
                },
            };
            head.copy_from_slice(&of.encode().unwrap()[..HEAD]);
            head[HEAD - 4..].copy_from_slice(&len.to_le_bytes());
            Head::parse(&head)
        };
        let most = before + MOST_STATE;
        assert_eq!(head(most).unwrap().len, most);
        let error = head(most + 1).unwrap_err().to_string();
        assert!(error.contains(&(most + 1).to_string()), "{error}");
    }
}
