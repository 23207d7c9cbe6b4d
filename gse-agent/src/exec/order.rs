//! The order in which the atomic tasks of a dispatch run: each after those that it depends on, and otherwise as they were given.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

/// Why there is no such order.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum OrderError {
    /// A relation names an atomic task that the dispatch does not have.
    #[error("atomic task number {task} depends on number {after}, but there are only {count} (numbers begin at 0)")]
    NoSuchTask {
        /// The dependent.
        task: usize,
        /// What it names.
        after: u32,
        /// How many there are.
        count: usize,
    },
    /// The relations run in a circle.
    #[error("the atomic tasks depend on each other in a circle (number {task} is part of it or behind it)")]
    Circle {
        /// The first task that can never run.
        task: usize,
    },
}

/// Positions in the order of running. `after[i]` lists the positions that have to be over before `i`.
///
/// # Errors
/// When a position does not exist or the relations run in a circle.
pub(super) fn run_order(after: &[&[u32]]) -> Result<Vec<usize>, OrderError> {
    let count = after.len();
    let mut missing = vec![0usize; count];
    let mut dependents = vec![Vec::new(); count];
    for (task, names) in after.iter().enumerate() {
        for name in names.iter().collect::<BTreeSet<_>>() {
            let at = usize::try_from(*name).unwrap_or(usize::MAX);
            let list = dependents.get_mut(at).ok_or(OrderError::NoSuchTask {
                task,
                after: *name,
                count,
            })?;
            list.push(task);
            missing[task] += 1;
        }
    }
    let mut ready: BinaryHeap<Reverse<usize>> = (0..count).filter(|t| missing[*t] == 0).map(Reverse).collect();
    let mut order = Vec::with_capacity(count);
    while let Some(Reverse(task)) = ready.pop() {
        order.push(task);
        for dependent in &dependents[task] {
            missing[*dependent] -= 1;
            if missing[*dependent] == 0 {
                ready.push(Reverse(*dependent));
            }
        }
    }
    match (0..count).find(|t| missing[*t] > 0) {
        Some(task) => Err(OrderError::Circle { task }),
        None => Ok(order),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn stable_by_position() {
        assert_eq!(run_order(&[&[], &[], &[]]), Ok(vec![0, 1, 2]));
        assert_eq!(run_order(&[&[2], &[], &[1, 1]]), Ok(vec![1, 2, 0]));
        assert_eq!(run_order(&[&[], &[0], &[0, 1]]), Ok(vec![0, 1, 2]));
        assert_eq!(run_order(&[]), Ok(vec![]));
    }

    #[test]
    fn impossible_relations() {
        assert_eq!(run_order(&[&[], &[2], &[1]]), Err(OrderError::Circle { task: 1 }));
        assert_eq!(run_order(&[&[0]]), Err(OrderError::Circle { task: 0 }));
        assert_eq!(
            run_order(&[&[7]]),
            Err(OrderError::NoSuchTask {
                task: 0,
                after: 7,
                count: 1
            })
        );
    }

    proptest! {
        #[test]
        fn every_task_once_and_after_its_dependencies(edges in proptest::collection::vec((0u32..12, 0u32..12), 0..40)) {
            let mut after = vec![Vec::new(); 12];
            for (a, b) in edges {
                after[a.max(b) as usize].extend((a != b).then_some(a.min(b)));
            }
            let views: Vec<&[u32]> = after.iter().map(Vec::as_slice).collect();
            let order = run_order(&views).expect("edges go one way only");
            let place = |t: usize| order.iter().position(|o| *o == t).expect("every task is there");
            prop_assert_eq!(order.len(), 12);
            for (task, names) in after.iter().enumerate() {
                prop_assert!(names.iter().all(|n| place(*n as usize) < place(task)));
            }
        }
    }
}
