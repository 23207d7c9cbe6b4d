//! What is known of every target of a task while it runs: how far its output has been read, what it printed, how it ended.
//!
//! Pure: rows go in, news come out. Asking the servers and printing are left to [`super`].

use std::collections::HashMap;

use gse_proto::http::{AgentTaskQuery, AtomicQuery, ScriptRow};

use crate::outcome::Outcome;

/// Most output kept in memory for the end, over all targets. What is beyond is only shown as it comes.
pub const MAX_KEPT: usize = 256 * 1024 * 1024;
/// Stands where kept output was cut.
const CUT: &str = "\n[the rest is not shown: this command keeps 256 MiB of output]\n";

/// One target.
#[derive(Debug)]
pub struct Target {
    /// What it is called: the agent's id as it was asked, and the container's if there is one.
    pub id: String,
    agent: String,
    container: String,
    /// Its output so far.
    pub output: String,
    /// Bytes of output that the servers need not send again.
    pub offset: i64,
    /// Its last row.
    pub row: ScriptRow,
    /// What that row means.
    pub outcome: Outcome,
    cut: bool,
}

/// All targets.
#[derive(Debug)]
pub struct Board {
    targets: Vec<Target>,
    by_id: HashMap<String, usize>,
    atomic_task_id: u32,
    kept: usize,
    max_kept: usize,
}

/// What a row has changed.
#[derive(Debug, PartialEq, Eq)]
pub struct News {
    /// Index of the target.
    pub target: usize,
    /// New output.
    pub piece: String,
    /// Whether the target has ended with this row.
    pub ended: bool,
}

impl Board {
    /// Nothing is known yet of what this atomic task does on these hosts. An id that is there twice counts once.
    #[must_use]
    pub fn new(atomic_task_id: u32, ids: impl IntoIterator<Item = String>) -> Self {
        Self::with_containers(atomic_task_id, ids.into_iter().map(|id| (id, String::new())))
    }

    /// The same for hosts and containers: agent ids, each with the id of a container or an empty one.
    #[must_use]
    pub fn with_containers(atomic_task_id: u32, targets: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut board = Self {
            targets: Vec::new(),
            by_id: HashMap::new(),
            atomic_task_id,
            kept: 0,
            max_kept: MAX_KEPT,
        };
        for (agent, container) in targets {
            let id = name(&agent, &container);
            if !board.by_id.contains_key(&id) {
                board.by_id.insert(id.clone(), board.targets.len());
                board.targets.push(Target {
                    id,
                    agent,
                    container,
                    output: String::new(),
                    offset: 0,
                    row: ScriptRow::default(),
                    outcome: Outcome::Running,
                    cut: false,
                });
            }
        }
        board
    }

    /// All targets, in the order they were asked.
    #[must_use]
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Indexes of the targets that have not ended.
    #[must_use]
    pub fn pending(&self) -> Vec<usize> {
        self.targets
            .iter()
            .enumerate()
            .filter(|(_, t)| !t.outcome.is_over())
            .map(|(at, _)| at)
            .collect()
    }

    /// What to ask the servers about these targets.
    #[must_use]
    pub fn query(&self, targets: &[usize]) -> Vec<AgentTaskQuery> {
        targets
            .iter()
            .filter_map(|at| self.targets.get(*at))
            .map(|target| AgentTaskQuery {
                bk_agent_id: target.agent.clone(),
                bk_container_id: target.container.clone(),
                atomic_tasks: vec![AtomicQuery {
                    atomic_task_id: self.atomic_task_id,
                    offset: target.offset,
                    limit: 0,
                }],
            })
            .collect()
    }

    /// Takes a row in. Rows of targets that were not asked for or have ended change nothing.
    pub fn take(&mut self, mut row: ScriptRow) -> Option<News> {
        let at = *self.by_id.get(&name(&row.bk_agent_id, &row.bk_container_id))?;
        let target = self.targets.get_mut(at).filter(|target| !target.outcome.is_over())?;
        let piece = std::mem::take(&mut row.screen);
        target.offset += i64::try_from(piece.len()).unwrap_or(i64::MAX - target.offset);
        if !target.cut {
            if self.kept + piece.len() <= self.max_kept {
                target.output.push_str(&piece);
                self.kept += piece.len();
            } else {
                target.output.push_str(CUT);
                target.cut = true;
            }
        }
        target.outcome = Outcome::of(&row);
        target.row = row;
        let ended = target.outcome.is_over();
        (ended || !piece.is_empty()).then_some(News {
            target: at,
            piece,
            ended,
        })
    }

    /// How all targets stand.
    #[must_use]
    pub fn outcomes(&self) -> Vec<Outcome> {
        self.targets.iter().map(|target| target.outcome.clone()).collect()
    }
}

/// One name for a host or a container; a container of zeros is the host.
fn name(agent: &str, container: &str) -> String {
    if container.bytes().all(|b| b == b'0') {
        agent.to_owned()
    } else {
        format!("{agent}/{container}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str, screen: &str, status: i32) -> ScriptRow {
        let error_code = if status < 2 { 115 } else { 0 };
        ScriptRow {
            bk_agent_id: id.into(),
            screen: screen.into(),
            status,
            error_code,
            ..Default::default()
        }
    }

    #[test]
    fn output_is_asked_from_where_it_ended_in_bytes() {
        // contract: v2-http-task#20
        let mut board = Board::new(0, ["a".to_owned(), "b".to_owned(), "a".to_owned()]);
        assert_eq!(board.pending(), [0, 1]);
        let news = board.take(row("a", "hé", 1)).unwrap();
        assert_eq!(
            news,
            News {
                target: 0,
                piece: "hé".into(),
                ended: false
            }
        );
        assert_eq!(board.query(&[0])[0].atomic_tasks[0].offset, 3);
        assert_eq!(board.take(row("a", "", 1)), None);
        assert!(board.take(row("a", "!\n", 2)).unwrap().ended);
        assert_eq!(board.targets()[0].output, "hé!\n");
        assert_eq!(board.pending(), [1]);
    }

    #[test]
    fn rows_of_strangers_and_of_the_dead_change_nothing() {
        let mut board = Board::new(0, ["a".to_owned()]);
        assert_eq!(board.take(row("x", "?", 2)), None);
        assert!(board.take(row("a", "", 2)).unwrap().ended);
        assert_eq!(board.take(row("a", "late", 5)), None);
        assert_eq!(board.outcomes(), [Outcome::Succeeded]);
    }

    #[test]
    fn a_container_is_another_target_than_its_host() {
        // contract: v2-http-task#11, v2-http-task#24
        let targets = [("a", ""), ("a", "c1"), ("b", "000")].map(|(agent, container)| (agent.into(), container.into()));
        let mut board = Board::with_containers(3, targets);
        let query = board.query(&[1]);
        assert_eq!(
            (query[0].bk_agent_id.as_str(), query[0].bk_container_id.as_str()),
            ("a", "c1")
        );
        assert_eq!(query[0].atomic_tasks[0].atomic_task_id, 3);
        let mut row = row("a", "x", 2);
        row.bk_container_id = "c1".into();
        assert_eq!(board.take(row.clone()).map(|news| news.target), Some(1));
        row.bk_agent_id = "b".into();
        row.bk_container_id = String::new();
        assert_eq!(board.take(row).map(|news| news.target), Some(2));
        assert_eq!(board.pending(), [0]);
        assert_eq!(board.targets()[1].id, "a/c1");
    }

    #[test]
    fn what_is_kept_is_bounded_and_says_so() {
        let mut board = Board::new(0, ["a".to_owned(), "b".to_owned()]);
        board.max_kept = 4;
        board.take(row("a", "1234", 1));
        for _ in 0..3 {
            let news = board.take(row("b", "5678", 1)).unwrap();
            assert_eq!(news.piece, "5678", "shown all the same");
        }
        assert_eq!(board.targets()[1].output, CUT);
        assert_eq!(board.targets()[1].offset, 12);
    }
}
