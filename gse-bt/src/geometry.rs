//! How content is cut: pieces of one length (the last may be shorter), and blocks within a piece as peers ask for them.

/// Bytes of a block as it is asked for by default.
pub const BLOCK: u32 = 16 * 1024;
/// The longest block that a peer may ask for.
pub const MAX_BLOCK: u32 = 128 * 1024;
/// The most pieces a swarm may have.
pub const MAX_PIECES: u32 = 1 << 20;

/// A part of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Block {
    /// Index of the piece.
    pub piece: u32,
    /// Offset within the piece.
    pub begin: u32,
    /// Bytes.
    pub len: u32,
}

/// Why something does not fit the content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// There can be no content like this.
    #[error(
        "{total} bytes in pieces of {piece_length} are not possible: a piece has at least a byte, and there are at most {MAX_PIECES}"
    )]
    Impossible {
        /// Bytes in all.
        total: u64,
        /// Bytes of a piece.
        piece_length: u32,
    },
    /// A piece beyond the last.
    #[error("piece {piece} of {pieces}")]
    NoSuchPiece {
        /// The index that was named.
        piece: u32,
        /// How many there are.
        pieces: u32,
    },
    /// A block that does not lie within its piece, is empty, or too long.
    #[error("a block of {len} bytes at {begin} of piece {piece}, which has {piece_len}; blocks have 1 to {MAX_BLOCK} bytes", len = .block.len, begin = .block.begin, piece = .block.piece)]
    BadBlock {
        /// What was named.
        block: Block,
        /// Bytes of that piece.
        piece_len: u32,
    },
}

/// Length of content and of its pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    total: u64,
    piece_length: u32,
    pieces: u32,
}

impl Geometry {
    /// `total` bytes in pieces of `piece_length`.
    pub fn new(total: u64, piece_length: u32) -> Result<Self, GeometryError> {
        let impossible = GeometryError::Impossible { total, piece_length };
        if piece_length == 0 {
            return Err(impossible);
        }
        let pieces = total.div_ceil(u64::from(piece_length));
        if pieces > u64::from(MAX_PIECES) {
            return Err(impossible);
        }
        Ok(Self {
            total,
            piece_length,
            pieces: pieces as u32,
        })
    }

    /// Bytes in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes of each piece but the last.
    #[must_use]
    pub fn piece_length(&self) -> u32 {
        self.piece_length
    }

    /// Number of pieces.
    #[must_use]
    pub fn pieces(&self) -> u32 {
        self.pieces
    }

    /// Where a piece begins in the content.
    #[must_use]
    pub fn offset(&self, piece: u32) -> u64 {
        u64::from(piece) * u64::from(self.piece_length)
    }

    /// Bytes of a piece; 0 beyond the last.
    #[must_use]
    pub fn piece_len(&self, piece: u32) -> u32 {
        let left = self.total.saturating_sub(self.offset(piece));
        left.min(u64::from(self.piece_length)) as u32
    }

    /// Whether there is such a piece.
    pub fn check_piece(&self, piece: u32) -> Result<(), GeometryError> {
        if piece < self.pieces {
            return Ok(());
        }
        Err(GeometryError::NoSuchPiece {
            piece,
            pieces: self.pieces,
        })
    }

    /// Whether a peer may ask for this block.
    pub fn check(&self, block: Block) -> Result<(), GeometryError> {
        self.check_piece(block.piece)?;
        let piece_len = self.piece_len(block.piece);
        let inside = block.begin.checked_add(block.len).is_some_and(|end| end <= piece_len);
        if !inside || block.len == 0 || block.len > MAX_BLOCK {
            return Err(GeometryError::BadBlock { block, piece_len });
        }
        Ok(())
    }

    /// The blocks of a piece, of [`BLOCK`] bytes but for the last.
    pub fn blocks(&self, piece: u32) -> impl Iterator<Item = Block> + use<> {
        let len = self.piece_len(piece);
        (0..len.div_ceil(BLOCK)).map(move |at| Block {
            piece,
            begin: at * BLOCK,
            len: BLOCK.min(len - at * BLOCK),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_piece_is_what_is_left() {
        let geometry = Geometry::new(100_000, 65_536).expect("possible");
        assert_eq!(geometry.pieces(), 2);
        assert_eq!(
            (geometry.piece_len(0), geometry.piece_len(1), geometry.piece_len(2)),
            (65_536, 34_464, 0)
        );
        let blocks: Vec<Block> = geometry.blocks(1).collect();
        assert_eq!(blocks.len(), 3);
        assert_eq!(blocks.iter().map(|block| block.len).sum::<u32>(), 34_464);
        assert!(blocks.iter().all(|block| geometry.check(*block).is_ok()));
        assert_eq!(Geometry::new(0, 65_536).expect("nothing at all").pieces(), 0);
        assert_eq!(Geometry::new(65_536, 65_536).expect("just one").pieces(), 1);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let geometry = Geometry::new(100_000, 65_536).expect("possible");
        let block = |piece, begin, len| geometry.check(Block { piece, begin, len });
        assert!(block(1, 34_463, 1).is_ok());
        for (piece, begin, len) in [
            (2, 0, 1),
            (u32::MAX, 0, 1),
            (1, 34_464, 1),
            (0, 0, 0),
            (0, u32::MAX, 2),
            (0, 0, MAX_BLOCK + 1),
        ] {
            assert!(block(piece, begin, len).is_err(), "{piece} {begin} {len}");
        }
        assert!(Geometry::new(1, 0).is_err());
        assert!(Geometry::new(u64::MAX, u32::MAX).is_err());
        assert!(Geometry::new(u64::from(MAX_PIECES) + 1, 1).is_err());
    }
}
