//! Which lines of a table are free: a buddy allocator, with a quarantine for those that packets may still read.

use std::collections::BTreeSet;

use super::{Error, ROOT_ORDER};

/// Blocks have `1 << order` lines and start at a multiple of that: a node never lies across a page, and its
/// first two lines are the pair that a processor likes to fetch at once.
const ORDERS: u8 = 31;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) line: u32,
    pub(super) order: u8,
}

impl Block {
    fn lines(self) -> u32 {
        1 << self.order
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Lines {
    /// By order, the first lines of free blocks. Sorted, so that a table stays at the front of its memory.
    free: Vec<BTreeSet<u32>>,
    /// Lines before this one are for roots only: nodes that come and go would leave no room as large as that.
    reserved: u32,
    /// First lines of the free roots there.
    roots: BTreeSet<u32>,
    free_lines: u32,
    quarantine: Vec<Block>,
    total: u32,
}

impl Lines {
    /// The first lines are kept for so many roots, as far as there are enough.
    pub(super) fn new(total: u32, roots: u32) -> Self {
        let roots = roots.min(total >> ROOT_ORDER);
        let reserved = roots << ROOT_ORDER;
        let mut lines = Self {
            free: vec![BTreeSet::new(); ORDERS.into()],
            reserved,
            roots: (0..roots).map(|root| root << ROOT_ORDER).collect(),
            free_lines: reserved,
            quarantine: Vec::new(),
            total,
        };
        let mut line = reserved;
        while line < total {
            let room = (total - line).ilog2();
            let order = line.trailing_zeros().min(room) as u8;
            lines.give(Block { line, order });
            line += 1 << order;
        }
        lines
    }

    pub(super) fn total(&self) -> u32 {
        self.total
    }

    /// Lines neither in use nor in quarantine.
    pub(super) fn free(&self) -> u32 {
        self.free_lines
    }

    pub(super) fn in_quarantine(&self) -> u32 {
        self.quarantine.iter().map(|block| block.lines()).sum()
    }

    pub(super) fn take(&mut self, order: u8) -> Result<Block, Error> {
        if order == ROOT_ORDER
            && let Some(line) = self.roots.pop_first()
        {
            self.free_lines -= 1 << order;
            return Ok(Block { line, order });
        }
        let fits = (order..ORDERS).find_map(|larger| Some((larger, self.free[usize::from(larger)].pop_first()?)));
        let Some((larger, line)) = fits else {
            return Err(if self.quarantine.is_empty() { Error::Full } else { Error::Quarantined });
        };
        for half in order..larger {
            self.free[usize::from(half)].insert(line + (1 << half));
        }
        self.free_lines -= 1 << order;
        Ok(Block { line, order })
    }

    /// Takes a given block, if all of it is free.
    pub(super) fn take_at(&mut self, block: Block) -> bool {
        if block.line < self.reserved {
            let taken = block.order == ROOT_ORDER && self.roots.remove(&block.line);
            self.free_lines -= if taken { block.lines() } else { 0 };
            return taken;
        }
        let holder = |order: u8| block.line >> order << order;
        let Some(mut order) = self.free_order(block) else {
            return false;
        };
        self.free[usize::from(order)].remove(&holder(order));
        while order > block.order {
            order -= 1;
            self.free[usize::from(order)].insert(holder(order) ^ 1 << order);
        }
        self.free_lines -= block.lines();
        true
    }

    /// Whether a node may be there.
    pub(super) fn is_free(&self, line: u32) -> bool {
        self.free_order(Block { line, order: 0 }).is_some()
    }

    /// The order of the free block that holds this one.
    fn free_order(&self, block: Block) -> Option<u8> {
        (block.order..ORDERS).find(|order| self.free[usize::from(*order)].contains(&(block.line >> order << order)))
    }

    /// Gives a block back that no packet can have seen.
    pub(super) fn give(&mut self, block: Block) {
        let Block { mut line, mut order } = block;
        self.free_lines += block.lines();
        if line < self.reserved {
            self.roots.insert(line);
            return;
        }
        while order + 1 < ORDERS && self.free[usize::from(order)].remove(&(line ^ 1 << order)) {
            line &= !(1 << order);
            order += 1;
        }
        let new = self.free[usize::from(order)].insert(line);
        debug_assert!(new, "line {line} was free already");
    }

    /// Gives a block back that packets may still read.
    pub(super) fn retire(&mut self, block: Block) {
        self.quarantine.push(block);
    }

    /// After a grace period: frees what was retired before it.
    pub(super) fn release(&mut self) {
        for block in std::mem::take(&mut self.quarantine) {
            self.give(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_disjoint_and_come_back_whole() {
        for total in [1, 2, 15, 16, 100, 4096, 5000] {
            let mut lines = Lines::new(total, 0);
            assert_eq!(lines.free(), total);
            let mut owned = vec![false; total as usize];
            let mut blocks = Vec::new();
            for order in [4, 0, 2, 1, 3, 0, 0].iter().cycle() {
                let Ok(block) = lines.take(*order) else { break };
                assert_eq!(block.line % block.lines(), 0);
                for line in block.line..block.line + block.lines() {
                    assert!(!std::mem::replace(&mut owned[line as usize], true));
                }
                blocks.push(block);
            }
            while let Ok(block) = lines.take(0) {
                blocks.push(block);
            }
            assert_eq!((lines.free(), lines.take(0)), (0, Err(Error::Full)));
            for block in blocks {
                lines.give(block);
            }
            assert_eq!(lines, Lines::new(total, 0));
        }
    }

    #[test]
    fn quarantine_is_not_handed_out() {
        let mut lines = Lines::new(2, 0);
        let block = lines.take(1).unwrap();
        lines.retire(block);
        assert_eq!((lines.take(0), lines.in_quarantine(), lines.free()), (Err(Error::Quarantined), 2, 0));
        lines.release();
        assert_eq!(lines, Lines::new(2, 0));
    }

    #[test]
    fn nodes_leave_room_for_roots() {
        let mut lines = Lines::new(3 * 4096 + 10, 2);
        while lines.take(0).is_ok() {}
        assert_eq!(lines.free(), 2 * 4096);
        let roots = [lines.take(ROOT_ORDER), lines.take(ROOT_ORDER), lines.take(ROOT_ORDER)];
        let at = |line| Block { line, order: ROOT_ORDER };
        assert_eq!(roots, [Ok(at(0)), Ok(at(4096)), Err(Error::Full)]);
        lines.give(at(4096));
        assert_eq!((lines.take(0), lines.free()), (Err(Error::Full), 4096));
        assert!(!lines.take_at(Block { line: 4096, order: 0 }) && lines.take_at(at(4096)) && !lines.take_at(at(4096)));
        // Where there is no room for as many, what there is goes to both.
        let mut lines = Lines::new(100, 2);
        assert!(lines.take(0).is_ok());
    }

    #[test]
    fn a_given_block_is_taken_once() {
        let mut lines = Lines::new(100, 0);
        let block = Block { line: 36, order: 2 };
        assert!(lines.take_at(block));
        assert_eq!(lines.free(), 96);
        for (line, order) in [(36, 0), (39, 0), (32, 4), (0, 6), (38, 1), (100, 0), (96, 3)] {
            assert!(!lines.take_at(Block { line, order }), "{line}");
        }
        lines.give(block);
        assert_eq!(lines, Lines::new(100, 0));
    }
}
