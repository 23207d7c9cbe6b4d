//! What one peer was asked for and how much of it has come: pieces as the swarm asks for them, blocks as the wire does.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::{Block, Geometry};

/// A piece that is coming in.
#[derive(Debug)]
struct Partial {
    piece: u32,
    parts: Vec<Option<Bytes>>,
    left: usize,
}

/// What became of a block.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It was the first of the piece.
    First,
    /// More of the piece is to come.
    Part,
    /// That was the last of the piece; these are its parts, in order.
    Whole(u32, Vec<Bytes>),
    /// Nobody waits for it (any more).
    Unwanted,
}

/// Pieces asked for from one peer.
#[derive(Debug)]
pub(crate) struct Assembly {
    geometry: Geometry,
    block: u32,
    /// Requests that may be under way.
    most: usize,
    pieces: Vec<Partial>,
    /// Not asked for yet.
    waiting: VecDeque<Block>,
    under_way: Vec<Block>,
}

impl Assembly {
    pub(crate) fn new(geometry: Geometry, block: u32, most: usize) -> Self {
        Self {
            geometry,
            block,
            most: most.max(1),
            pieces: Vec::new(),
            waiting: VecDeque::new(),
            under_way: Vec::new(),
        }
    }

    /// The peer says how many requests it takes.
    pub(crate) fn set_most(&mut self, most: usize) {
        self.most = most.max(1);
    }

    /// Whether the peer owes us anything.
    pub(crate) fn is_owed(&self) -> bool {
        !self.under_way.is_empty()
    }

    /// A piece is wanted.
    pub(crate) fn want(&mut self, piece: u32) {
        if self.pieces.iter().any(|partial| partial.piece == piece) {
            return;
        }
        let len = self.geometry.piece_len(piece);
        let blocks = len.div_ceil(self.block);
        self.pieces.push(Partial {
            piece,
            parts: vec![None; blocks as usize],
            left: blocks as usize,
        });
        let block = self.block;
        self.waiting.extend((0..blocks).map(|at| Block {
            piece,
            begin: at * block,
            len: block.min(len - at * block),
        }));
    }

    /// The next block to ask for, if the peer may be asked for more.
    pub(crate) fn next(&mut self) -> Option<Block> {
        if self.under_way.len() >= self.most {
            return None;
        }
        let block = self.waiting.pop_front()?;
        self.under_way.push(block);
        Some(block)
    }

    /// A piece is not wanted any more; what was asked for of it.
    pub(crate) fn forget(&mut self, piece: u32) -> Vec<Block> {
        self.pieces.retain(|partial| partial.piece != piece);
        self.waiting.retain(|block| block.piece != piece);
        let (of_it, rest) = self.under_way.drain(..).partition(|block| block.piece == piece);
        self.under_way = rest;
        of_it
    }

    /// The peer will not send anything it was asked for; the pieces that this ends.
    pub(crate) fn forget_all(&mut self) -> Vec<u32> {
        self.waiting.clear();
        self.under_way.clear();
        self.pieces.drain(..).map(|partial| partial.piece).collect()
    }

    /// The peer will not send this block; the piece that this ends, if it was wanted.
    pub(crate) fn refused(&mut self, block: Block) -> Option<u32> {
        self.under_way.iter().position(|other| *other == block)?;
        self.forget(block.piece);
        Some(block.piece)
    }

    /// A block has come.
    pub(crate) fn take(&mut self, piece: u32, begin: u32, data: Bytes) -> Taken {
        let is_it = |block: &Block| block.piece == piece && block.begin == begin && block.len as usize == data.len();
        let Some(at) = self.under_way.iter().position(is_it) else {
            return Taken::Unwanted;
        };
        self.under_way.swap_remove(at);
        let Some(index) = self.pieces.iter().position(|partial| partial.piece == piece) else {
            return Taken::Unwanted;
        };
        let partial = &mut self.pieces[index];
        let Some(slot) = partial.parts.get_mut((begin / self.block) as usize) else {
            return Taken::Unwanted;
        };
        if slot.replace(data).is_none() {
            partial.left -= 1;
        }
        if partial.left > 0 {
            let first = partial.left + 1 == partial.parts.len();
            return if first { Taken::First } else { Taken::Part };
        }
        let partial = self.pieces.swap_remove(index);
        Taken::Whole(piece, partial.parts.into_iter().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assembly(most: usize) -> Assembly {
        Assembly::new(Geometry::new(100_000, 65_536).unwrap(), 16_384, most)
    }

    fn data(block: Block) -> Bytes {
        Bytes::from(vec![block.begin as u8; block.len as usize])
    }

    #[test]
    fn blocks_in_any_order_make_a_piece_in_order() {
        let mut assembly = assembly(100);
        assembly.want(1);
        assembly.want(1);
        let mut blocks: Vec<Block> = std::iter::from_fn(|| assembly.next()).collect();
        assert_eq!(blocks.len(), 3);
        blocks.reverse();
        for (block, expect) in blocks.iter().zip([Taken::First, Taken::Part]) {
            assert_eq!(assembly.take(1, block.begin, data(*block)), expect);
            assert_eq!(
                assembly.take(1, block.begin, data(*block)),
                Taken::Unwanted,
                "counts once"
            );
        }
        let Taken::Whole(1, parts) = assembly.take(1, blocks[2].begin, data(blocks[2])) else {
            panic!("all came");
        };
        assert_eq!(
            parts.iter().map(Bytes::len).collect::<Vec<_>>(),
            [16_384, 16_384, 1_696]
        );
        assert!(!assembly.is_owed());
    }

    #[test]
    fn what_was_not_asked_for_is_not_wanted() {
        let mut assembly = assembly(2);
        assembly.want(0);
        assert!(assembly.next().is_some() && assembly.next().is_some() && assembly.next().is_none());
        let block = Bytes::from(vec![0; 16_384]);
        assert_eq!(assembly.take(0, 32_768, block.clone()), Taken::Unwanted);
        assert_eq!(assembly.take(0, 0, block.slice(1..)), Taken::Unwanted);
        assert_eq!(assembly.take(1, 0, block.clone()), Taken::Unwanted);
        assert_eq!(assembly.take(u32::MAX, u32::MAX, block.clone()), Taken::Unwanted);
        assert_eq!(assembly.take(0, 0, block), Taken::First);
        assert!(assembly.next().is_some(), "room for one more");
        assert_eq!(assembly.forget(0).len(), 2);
        assert!(assembly.next().is_none() && !assembly.is_owed());
    }

    #[test]
    fn a_refusal_ends_a_piece_once() {
        let mut assembly = assembly(100);
        assembly.want(0);
        let block = assembly.next().unwrap();
        assert_eq!(assembly.refused(Block { begin: 1, ..block }), None);
        assert_eq!(assembly.refused(block), Some(0));
        assert_eq!(assembly.refused(block), None);
        assembly.want(0);
        assembly.want(1);
        assert_eq!(assembly.forget_all(), [0, 1]);
    }
}
