// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The queue and done lists against a naive model, over random sequences of calls.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use async_pf::{Completion, Error, Token, VcpuQueue, WAKE_ALL_TOKEN};
use memslots::Gfn;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Call {
    Setup(u64),
    Arrived(usize),
    GaveUp(usize),
    Check,
    Clear,
    WakeAll,
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let call = prop_oneof![
        6 => (0u64..50).prop_map(Call::Setup),
        4 => any::<usize>().prop_map(Call::Arrived),
        1 => any::<usize>().prop_map(Call::GaveUp),
        4 => Just(Call::Check),
        1 => Just(Call::Clear),
        1 => Just(Call::WakeAll),
    ];
    proptest::collection::vec(call, 0..300)
}

#[derive(Default)]
struct Model {
    waiting: Vec<(Token, Gfn)>,
    done: Vec<Completion>,
    /// Tokens that name nothing any more.
    stale: Vec<Token>,
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_lists_agree_with_a_model(calls in calls(), bound in 1usize..10, vcpu in 0u16..4096) {
        let mut queue = VcpuQueue::with_bound(vcpu, bound).unwrap();
        let mut model = Model::default();
        for call in calls {
            let requests = model.waiting.len()
                + model.done.iter().filter(|done| **done != Completion::WakeAll).count();
            match call {
                Call::Setup(gfn) => match queue.setup(Gfn(gfn)) {
                    Ok(token) => {
                        prop_assert!(requests < bound);
                        prop_assert_eq!(token.vcpu(), vcpu);
                        prop_assert_ne!(token.get(), WAKE_ALL_TOKEN);
                        prop_assert!(model.waiting.iter().all(|(other, _)| *other != token));
                        model.waiting.push((token, Gfn(gfn)));
                    }
                    Err(error) => {
                        prop_assert_eq!(error, Error::QueueFull { vcpu, bound });
                        prop_assert_eq!(requests, bound);
                    }
                },
                Call::Arrived(nth) | Call::GaveUp(nth) if model.waiting.is_empty() => {
                    // Nothing waits: every token that was ever given out is stale.
                    if let Some(token) = model.stale.get(nth % (model.stale.len() + 1)) {
                        prop_assert_eq!(
                            queue.arrived(*token), Err(Error::StaleToken { token: *token }));
                    }
                }
                Call::Arrived(nth) => {
                    let (token, gfn) = model.waiting.remove(nth % model.waiting.len());
                    prop_assert_eq!(queue.arrived(token), Ok(model.done.is_empty()));
                    prop_assert!(queue.arrived(token).is_err(), "arrived twice");
                    model.done.push(Completion::Ready { token, gfn });
                    model.stale.push(token);
                }
                Call::GaveUp(nth) => {
                    let (token, gfn) = model.waiting.remove(nth % model.waiting.len());
                    prop_assert_eq!(queue.gave_up(token), Ok(model.done.is_empty()));
                    model.done.push(Completion::Failed { token, gfn });
                    model.stale.push(token);
                }
                Call::Check => {
                    let expected = (!model.done.is_empty()).then(|| model.done.remove(0));
                    prop_assert_eq!(queue.check_completion(), expected);
                }
                Call::Clear => {
                    let mut cancelled = Vec::new();
                    queue.clear_completion(|token, gfn| cancelled.push((token, gfn)));
                    cancelled.sort();
                    model.waiting.sort();
                    prop_assert_eq!(&cancelled, &model.waiting);
                    model.stale.extend(model.waiting.drain(..).map(|(token, _)| token));
                    model.done.clear();
                }
                Call::WakeAll => {
                    prop_assert_eq!(queue.wake_all(), model.done.is_empty());
                    if model.done.is_empty() {
                        model.done.push(Completion::WakeAll);
                    }
                }
            }
            let told_later =
                model.done.iter().filter(|done| **done != Completion::WakeAll).count();
            prop_assert_eq!(queue.queued(), model.waiting.len() + told_later);
            prop_assert_eq!(queue.has_done(), !model.done.is_empty());
        }
    }
}

#[test]
fn kvms_bound_is_the_default_and_a_vcpu_beyond_a_token_is_refused() {
    let mut queue = VcpuQueue::new(4095).unwrap();
    for gfn in 0..64 {
        queue.setup(Gfn(gfn)).unwrap();
    }
    assert_eq!(
        queue.setup(Gfn(64)),
        Err(Error::QueueFull {
            vcpu: 4095,
            bound: 64
        })
    );
    assert!(matches!(
        VcpuQueue::new(4096),
        Err(Error::VcpuTooLarge {
            vcpu: 4096,
            max: 4095
        })
    ));
}

#[test]
fn an_arrival_after_a_reset_is_told_to_no_one() {
    let mut queue = VcpuQueue::new(0).unwrap();
    let token = queue.setup(Gfn(5)).unwrap();
    queue.clear_completion(|_, _| {});
    let again = queue.setup(Gfn(5)).unwrap();
    assert_eq!(queue.arrived(token), Err(Error::StaleToken { token }));
    assert_eq!(queue.check_completion(), None);
    assert!(queue.arrived(again).is_ok());
}

#[test]
fn a_bound_beyond_what_tokens_can_name_is_refused_with_its_number() {
    let refused = |bound| VcpuQueue::with_bound(0, bound).unwrap_err();
    let Error::Bound { bound, max } = refused(usize::MAX) else {
        panic!("another refusal");
    };
    assert_eq!(bound, usize::MAX);
    assert_eq!(
        refused(max + 1),
        Error::Bound {
            bound: max + 1,
            max
        }
    );
    assert!(VcpuQueue::with_bound(0, max).is_ok());
}
