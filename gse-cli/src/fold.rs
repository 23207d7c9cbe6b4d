//! Equal outputs under one heading, as cluster shells print them.

use std::collections::HashMap;

use crate::ids;

/// The line around a heading.
const RULE: &str = "---------------";

/// Targets with the same output.
#[derive(Debug, PartialEq, Eq)]
pub struct Group<'a> {
    /// Their ids, sorted.
    pub ids: Vec<&'a str>,
    /// What each of them printed.
    pub output: &'a str,
}

impl Group<'_> {
    /// The lines that stand over the output.
    #[must_use]
    pub fn heading(&self) -> String {
        let list = ids::fold(self.ids.iter().copied());
        match self.ids.len() {
            1 => format!("{RULE}\n{list}\n{RULE}\n"),
            count => format!("{RULE}\n{list} ({count})\n{RULE}\n"),
        }
    }
}

/// Groups `(id, output)` pairs by output, the largest group first. Targets that printed nothing are in no group.
#[must_use]
pub fn groups<'a>(outputs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<Group<'a>> {
    let mut by_output: HashMap<&str, Vec<&str>> = HashMap::new();
    for (id, output) in outputs {
        // A last line feed more or less is no difference to a reader.
        let output = output.strip_suffix('\n').unwrap_or(output);
        if !output.is_empty() {
            by_output.entry(output).or_default().push(id);
        }
    }
    let mut groups: Vec<Group<'_>> = by_output
        .into_iter()
        .map(|(output, mut ids)| {
            ids.sort_by(|a, b| ids::natural(a, b));
            Group { ids, output }
        })
        .collect();
    groups.sort_by(|a, b| {
        b.ids
            .len()
            .cmp(&a.ids.len())
            .then_with(|| ids::natural(a.ids[0], b.ids[0]))
    });
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_outputs_share_a_heading_and_the_largest_group_comes_first() {
        let outputs = [
            ("0:10.0.0.9", "b\n"),
            ("0:10.0.0.2", "a\n"),
            ("0:10.0.0.1", "a"),
            ("0:10.0.0.3", ""),
            ("0:10.0.0.4", "c"),
        ];
        let groups = groups(outputs);
        assert_eq!(groups.iter().map(|g| g.output).collect::<Vec<_>>(), ["a", "c", "b"]);
        assert_eq!(
            groups[0].heading(),
            "---------------\n0:10.0.0.[1-2] (2)\n---------------\n"
        );
        assert_eq!(groups[1].heading(), "---------------\n0:10.0.0.4\n---------------\n");
    }

    #[test]
    fn blanks_that_differ_are_different() {
        assert_eq!(groups([("a", "x"), ("b", "x ")]).len(), 2);
        assert_eq!(groups([("a", "\n"), ("b", "")]).len(), 0);
    }
}
