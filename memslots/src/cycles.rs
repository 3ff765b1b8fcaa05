// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Moves that wait for each other in a circle. A slot can move only to a place that is free, so one of each circle has
//! to be deleted first and made again last, which is one call more. Which ones, that they be as few as possible, is the
//! feedback vertex set of the graph "waits for".
//!
//! That is hard in general and easy here: slots that change places are plain circles, and whatever is more tangled is
//! small. The search is exact until it has looked at [`BUDGET`] edges, and takes what is good enough after that.

/// Edges that the exact search looks at, for each tangle, before it settles for a set that may not be the smallest.
const BUDGET: usize = 1 << 20;

/// Nodes whose removal leaves no circle in `waits_for`, as few as possible (see [`BUDGET`]); of equals those that
/// `rather` prefers.
pub(crate) fn break_circles(
    waits_for: &[Vec<usize>],
    rather: impl Fn(usize) -> bool,
) -> Vec<usize> {
    let mut broken = Vec::new();
    let mut number = vec![usize::MAX; waits_for.len()];
    for tangle in tangles(waits_for) {
        // The tangle alone, its nodes numbered anew, so that what a search costs depends on it and not on the rest.
        for (index, &node) in tangle.iter().enumerate() {
            if let Some(number) = number.get_mut(node) {
                *number = index;
            }
        }
        let inside = |node: &usize| {
            let to = waits_for.get(*node).into_iter().flatten();
            let numbers = to.filter_map(|to| number.get(*to).copied());
            numbers.filter(|index| *index != usize::MAX).collect()
        };
        let graph: Vec<Vec<usize>> = tangle.iter().map(inside).collect();
        let prefers = |index: usize| tangle.get(index).is_some_and(|node| rather(*node));
        let mut search = Search {
            waits_for: &graph,
            rather: &prefers,
            present: vec![true; tangle.len()],
            looked_at: 0,
        };
        let taken = search.smallest();
        broken.extend(taken.into_iter().filter_map(|index| tangle.get(index)));
        for &node in &tangle {
            if let Some(number) = number.get_mut(node) {
                *number = usize::MAX;
            }
        }
    }
    broken
}

/// An order in which each node comes after those that it waits for. `waits_for` has no circle but through `without`,
/// which are left out.
pub(crate) fn order(waits_for: &[Vec<usize>], without: &[usize]) -> Vec<usize> {
    let mut done = vec![false; waits_for.len()];
    for &node in without {
        if let Some(done) = done.get_mut(node) {
            *done = true;
        }
    }
    let mut order = Vec::with_capacity(waits_for.len());
    for node in 0..waits_for.len() {
        walk(waits_for, &mut done, node, |node| order.push(node));
    }
    order
}

/// Visits `from` and all that it reaches, each once and after those that it reaches itself (circles aside).
fn walk(edges: &[Vec<usize>], seen: &mut [bool], from: usize, mut leave: impl FnMut(usize)) {
    let mut enter = |node: usize| match seen.get_mut(node) {
        Some(seen) => !std::mem::replace(seen, true),
        None => false,
    };
    if !enter(from) {
        return;
    }
    let mut path = vec![(from, 0)];
    while let Some((node, next)) = path.last_mut() {
        match edges.get(*node).and_then(|edges| edges.get(*next)) {
            Some(&to) => {
                *next += 1;
                if enter(to) {
                    path.push((to, 0));
                }
            }
            None => {
                leave(*node);
                path.pop();
            }
        }
    }
}

/// The strongly connected components of more than one node (Kosaraju): each holds a circle, and no circle leaves one.
fn tangles(edges: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let finished = order(edges, &[]);
    let mut reversed = vec![Vec::new(); edges.len()];
    for (from, edges) in edges.iter().enumerate() {
        for &to in edges {
            if let Some(list) = reversed.get_mut(to) {
                list.push(from);
            }
        }
    }
    let mut seen = vec![false; edges.len()];
    let mut tangles = Vec::new();
    for &node in finished.iter().rev() {
        let mut tangle = Vec::new();
        walk(&reversed, &mut seen, node, |node| tangle.push(node));
        if tangle.len() > 1 {
            tangle.sort_unstable();
            tangles.push(tangle);
        }
    }
    tangles
}

struct Search<'a, F> {
    waits_for: &'a [Vec<usize>],
    rather: &'a F,
    /// Which nodes are not taken out.
    present: Vec<bool>,
    looked_at: usize,
}

impl<F: Fn(usize) -> bool> Search<'_, F> {
    fn mark(&mut self, node: usize, present: bool) {
        if let Some(slot) = self.present.get_mut(node) {
            *slot = present;
        }
    }

    fn is_present(&self, node: usize) -> bool {
        self.present.get(node).copied().unwrap_or(false)
    }

    /// The smallest set that breaks the tangle's circles: one node if one will do, two if two will, and so on.
    fn smallest(&mut self) -> Vec<usize> {
        for size in 1..self.waits_for.len() {
            let mut taken = Vec::new();
            if self.breaks(size, &mut taken) {
                return taken;
            }
            if self.looked_at > BUDGET {
                break;
            }
        }
        self.good_enough()
    }

    /// Whether `more` nodes can be taken out so that no circle is left; they are in `taken` then. One node of any
    /// circle has to be among them, so the nodes of one are tried in turn.
    fn breaks(&mut self, more: usize, taken: &mut Vec<usize>) -> bool {
        let Some(mut circle) = self.circle() else {
            return true;
        };
        if more == 0 || self.looked_at > BUDGET {
            return false;
        }
        circle.sort_by_key(|node| (!(self.rather)(*node), *node));
        for node in circle {
            self.mark(node, false);
            taken.push(node);
            let broken = self.breaks(more - 1, taken);
            self.mark(node, true);
            if broken {
                return true;
            }
            taken.pop();
        }
        false
    }

    /// Takes the node with the most edges out of circle after circle.
    fn good_enough(&mut self) -> Vec<usize> {
        let mut taken = Vec::new();
        while let Some(circle) = self.circle() {
            let edges = |node: &usize| self.waits_for.get(*node).map_or(0, Vec::len);
            let Some(most) = circle.into_iter().max_by_key(edges) else {
                break;
            };
            self.mark(most, false);
            taken.push(most);
        }
        taken
    }

    /// A circle of the nodes that are left, or `None`.
    fn circle(&mut self) -> Option<Vec<usize>> {
        let mut done = vec![false; self.waits_for.len()];
        let mut on_path = vec![false; self.waits_for.len()];
        for from in 0..self.waits_for.len() {
            if !self.is_present(from) || done.get(from).copied().unwrap_or(true) {
                continue;
            }
            let mut path = vec![(from, 0)];
            set(&mut on_path, from, true);
            while let Some((node, next)) = path.last_mut() {
                let node = *node;
                match self.waits_for.get(node).and_then(|edges| edges.get(*next)) {
                    Some(&to) => {
                        *next += 1;
                        self.looked_at += 1;
                        if on_path.get(to).copied().unwrap_or(false) {
                            let nodes = path.iter().map(|(node, _)| *node);
                            return Some(nodes.skip_while(|node| *node != to).collect());
                        }
                        if self.is_present(to) && !done.get(to).copied().unwrap_or(true) {
                            set(&mut on_path, to, true);
                            path.push((to, 0));
                        }
                    }
                    None => {
                        set(&mut on_path, node, false);
                        set(&mut done, node, true);
                        path.pop();
                    }
                }
            }
        }
        None
    }
}

fn set(marks: &mut [bool], node: usize, value: bool) {
    if let Some(mark) = marks.get_mut(node) {
        *mark = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(waits_for: &[&[usize]]) -> Vec<usize> {
        let graph: Vec<_> = waits_for.iter().map(|edges| edges.to_vec()).collect();
        let mut broken = break_circles(&graph, |_| false);
        let order = order(&graph, &broken);
        let at = |node| order.iter().position(|other| *other == node);
        for (node, edges) in graph.iter().enumerate() {
            for to in edges.iter().filter(|to| !broken.contains(to)) {
                assert!(broken.contains(&node) || at(*to) < at(node));
            }
        }
        broken.sort_unstable();
        broken
    }

    #[test]
    fn a_chain_needs_nothing_and_each_circle_one() {
        assert!(broken(&[&[1], &[2], &[]]).is_empty());
        assert_eq!(broken(&[&[1], &[0]]).len(), 1);
        assert_eq!(broken(&[&[1], &[2], &[0], &[4], &[3], &[0, 3]]).len(), 2);
    }

    #[test]
    fn one_node_breaks_two_circles_that_share_it() {
        assert_eq!(broken(&[&[1], &[0, 2], &[1]]), [1]);
        assert_eq!(broken(&[&[1, 3], &[2], &[0], &[0]]), [0]);
    }

    #[test]
    fn a_circle_of_thousands_is_broken_once_and_where_one_would_rather() {
        let graph: Vec<_> = (0..30_000).map(|node| vec![(node + 1) % 30_000]).collect();
        let broken = break_circles(&graph, |node| node == 7);
        assert_eq!(broken, [7]);
        assert_eq!(order(&graph, &broken).len(), 29_999);
    }

    #[test]
    fn what_is_too_tangled_for_the_budget_is_broken_all_the_same() {
        let graph: Vec<Vec<usize>> = (0..60)
            .map(|node| (0..60).filter(|to| *to != node).collect())
            .collect();
        let broken = break_circles(&graph, |_| false);
        assert_eq!(order(&graph, &broken).len() + broken.len(), 60);
        assert_eq!(broken.len(), 59);
    }
}
