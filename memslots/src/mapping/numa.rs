// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! NUMA policies of a mapping (`mbind(2)`), as data, and which nodes there are.

use super::MapError;
use std::collections::BTreeSet;

/// `MPOL_…` of linux/mempolicy.h.
const MPOL_PREFERRED: i32 = 1;
const MPOL_BIND: i32 = 2;
const MPOL_INTERLEAVE: i32 = 3;

/// From which of the host's NUMA nodes the memory comes, page by page, when it is touched first.
///
/// For a private file the policy holds for the copies that are written; what is only read lies where the page cache
/// has it. With hugetlb pages, [`Bind`](Self::Bind) is a promise only together with
/// [`prefault`](super::Backing::prefault): the pool's reservation knows no nodes, and a guest that touches a page for
/// which its node has none left gets a SIGBUS.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NumaPolicy {
    /// From these nodes and no others; a touch fails if they have none left.
    Bind(Vec<u32>),
    /// From this node if it has any, else from elsewhere.
    Preferred(u32),
    /// From these in turn.
    Interleave(Vec<u32>),
}

/// What `mbind` takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Binding {
    pub mode: i32,
    /// One bit a node.
    pub nodes: Vec<libc::c_ulong>,
    /// Whether the host lists nodes at all.
    pub host_has_nodes: bool,
}

impl NumaPolicy {
    fn nodes(&self) -> &[u32] {
        match self {
            Self::Bind(nodes) | Self::Interleave(nodes) => nodes,
            Self::Preferred(node) => std::slice::from_ref(node),
        }
    }

    /// The policy as the kernel takes it. `host` are the nodes with memory, as sysfs lists them; a host that lists none
    /// has one node, 0.
    pub(super) fn binding(&self, host: Option<&str>) -> Result<Binding, MapError> {
        let available = host.unwrap_or("0").trim();
        let there = parse(available);
        if self.nodes().is_empty() {
            return Err(MapError::NoNodes);
        }
        if let Some(&node) = self.nodes().iter().find(|node| !there.contains(node)) {
            return Err(MapError::NoSuchNode {
                node,
                available: available.to_owned(),
            });
        }
        let mut nodes = Vec::new();
        for &node in self.nodes() {
            let (word, bit) = (node / libc::c_ulong::BITS, node % libc::c_ulong::BITS);
            let word = word as usize;
            if nodes.len() <= word {
                nodes.resize(word + 1, 0);
            }
            if let Some(word) = nodes.get_mut(word) {
                *word |= 1 << bit;
            }
        }
        let mode = match self {
            Self::Bind(_) => MPOL_BIND,
            Self::Preferred(_) => MPOL_PREFERRED,
            Self::Interleave(_) => MPOL_INTERLEAVE,
        };
        Ok(Binding {
            mode,
            nodes,
            host_has_nodes: host.is_some(),
        })
    }
}

/// A list such as `0-1,3`. What is none of its forms is left out.
fn parse(list: &str) -> BTreeSet<u32> {
    /// `MAX_NUMNODES` is 1024 at most.
    const LIMIT: u32 = 1024;
    let mut nodes = BTreeSet::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
            nodes.extend((first..=last).take_while(|node| *node < LIMIT));
        }
    }
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_sysfs_writes_them() {
        let nodes = |list| parse(list).into_iter().collect::<Vec<_>>();
        assert_eq!(nodes("0\n"), [0]);
        assert_eq!(nodes("0-2,5"), [0, 1, 2, 5]);
        assert!(nodes("").is_empty());
        assert!(nodes("x,1-y,7-6").is_empty());
        assert_eq!(nodes("0-4294967295").len(), 1024);
    }

    #[test]
    fn a_policy_becomes_a_mode_and_a_mask() {
        let policy = NumaPolicy::Interleave(vec![0, 65]);
        let binding = policy.binding(Some("0-80")).unwrap();
        assert_eq!((binding.mode, binding.nodes), (MPOL_INTERLEAVE, vec![1, 2]));
        let binding = NumaPolicy::Preferred(3).binding(Some("3")).unwrap();
        assert_eq!((binding.mode, binding.nodes), (MPOL_PREFERRED, vec![8]));
        assert_eq!(
            NumaPolicy::Bind(vec![0]).binding(None).unwrap().mode,
            MPOL_BIND
        );
    }

    #[test]
    fn a_node_that_is_not_there_is_named_with_those_that_are() {
        let error = NumaPolicy::Bind(vec![0, 7])
            .binding(Some("0-1\n"))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "NUMA node 7 has no memory here; the nodes that have are 0-1"
        );
        assert!(NumaPolicy::Preferred(1).binding(None).is_err());
        assert_eq!(
            NumaPolicy::Bind(vec![]).binding(None),
            Err(MapError::NoNodes)
        );
    }
}
