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
    pub(super) fn lines(self) -> u32 {
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
    /// By line, one more than the order of the block in use that starts there, or 0. What words in the memory say of
    /// blocks is compared with it: a line is free, in use or in quarantine, whatever they say.
    owned: Vec<u8>,
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
            owned: vec![0; total as usize],
            total,
        };
        let mut line = reserved;
        while line < total {
            let room = (total - line).ilog2();
            let order = line.trailing_zeros().min(room) as u8;
            lines.add(Block { line, order });
            line += 1 << order;
        }
        lines
    }

    /// Whether a block is in use: exactly this one.
    pub(super) fn owns(&self, block: Block) -> bool {
        self.owned.get(block.line as usize) == Some(&(block.order + 1))
    }

    fn own(&mut self, block: Block) -> Block {
        self.free_lines -= block.lines();
        self.owned[block.line as usize] = block.order + 1;
        block
    }

    fn disown(&mut self, block: Block) -> Result<(), Error> {
        if !self.owns(block) {
            return Err(Error::Corrupt(block.line));
        }
        self.owned[block.line as usize] = 0;
        Ok(())
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
            return Ok(self.own(Block { line, order }));
        }
        let fits = (order..ORDERS).find_map(|larger| Some((larger, self.free[usize::from(larger)].pop_first()?)));
        let Some((larger, line)) = fits else {
            return Err(if self.quarantine.is_empty() { Error::Full } else { Error::Quarantined });
        };
        for half in order..larger {
            self.free[usize::from(half)].insert(line + (1 << half));
        }
        Ok(self.own(Block { line, order }))
    }

    /// Takes a given block, if all of it is free.
    pub(super) fn take_at(&mut self, block: Block) -> bool {
        if block.line.trailing_zeros() < block.order.into() {
            return false;
        }
        if block.line < self.reserved {
            let taken = block.order == ROOT_ORDER && self.roots.remove(&block.line);
            if taken {
                self.own(block);
            }
            return taken;
        }
        let holder = |order: u8| block.line >> order << order;
        let Some(mut order) =
            (block.order..ORDERS).find(|order| self.free[usize::from(*order)].contains(&holder(*order)))
        else {
            return false;
        };
        self.free[usize::from(order)].remove(&holder(order));
        while order > block.order {
            order -= 1;
            self.free[usize::from(order)].insert(holder(order) ^ 1 << order);
        }
        self.own(block);
        true
    }

    /// Gives a block back that no packet can have seen.
    pub(super) fn give(&mut self, block: Block) -> Result<(), Error> {
        self.disown(block)?;
        self.add(block);
        Ok(())
    }

    /// Adds a block to the free ones.
    fn add(&mut self, block: Block) {
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
        self.free[usize::from(order)].insert(line);
    }

    /// Gives a block back that packets may still read.
    pub(super) fn retire(&mut self, block: Block) -> Result<(), Error> {
        self.disown(block)?;
        self.quarantine.push(block);
        Ok(())
    }

    /// After a grace period: frees what was retired before it.
    pub(super) fn release(&mut self) {
        for block in std::mem::take(&mut self.quarantine) {
            self.add(block);
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
                lines.give(block).unwrap();
            }
            assert_eq!(lines, Lines::new(total, 0));
        }
    }

    #[test]
    fn quarantine_is_not_handed_out() {
        let mut lines = Lines::new(2, 0);
        let block = lines.take(1).unwrap();
        lines.retire(block).unwrap();
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
        lines.give(at(4096)).unwrap();
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
        lines.give(block).unwrap();
        assert_eq!(lines, Lines::new(100, 0));
    }

    #[test]
    fn only_what_is_in_use_comes_back_and_only_once() {
        let mut lines = Lines::new(2 * 4096 + 100, 1);
        let taken = [lines.take(2).unwrap(), lines.take(0).unwrap(), lines.take(ROOT_ORDER).unwrap()];
        let free = lines.free();
        for block in [
            Block { line: taken[0].line, order: 0 },
            Block { line: taken[0].line, order: 3 },
            Block { line: taken[0].line + 1, order: 0 },
            Block { line: 2 * 4096 + 99, order: 0 },
            Block { line: 2 * 4096 + 100, order: 0 },
            Block { line: u32::MAX, order: 0 },
            Block { line: 0, order: 0 },
        ] {
            assert_eq!(lines.give(block), Err(Error::Corrupt(block.line)));
            assert_eq!(lines.retire(block), Err(Error::Corrupt(block.line)));
        }
        assert_eq!((lines.free(), lines.in_quarantine()), (free, 0));
        for block in taken {
            lines.retire(block).unwrap();
            assert_eq!(lines.retire(block), Err(Error::Corrupt(block.line)));
            assert_eq!(lines.give(block), Err(Error::Corrupt(block.line)));
            assert!(!lines.take_at(block));
        }
        lines.release();
        assert_eq!(lines, Lines::new(2 * 4096 + 100, 1));
    }
}
