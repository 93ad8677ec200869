//! Taking over tables that an earlier process has built.

use std::sync::atomic::AtomicU32;

use super::{
    Block, Error, Prefix, ROOT_ORDER, ROOT_SLOTS, Root, Table,
    node::{self, Words, is_node},
};

impl<M: AsRef<[AtomicU32]>> Table<M> {
    /// Counts the lines of a table as used that is in the memory already. To be called on a new [`Table`], once for
    /// every root that programs may be reading.
    pub(crate) fn adopt<P: Prefix>(&mut self, root: Root<P>) -> Result<(), Error> {
        self.adopt_block(Block { line: root.line, order: ROOT_ORDER })?;
        for slot in 0..ROOT_SLOTS {
            self.adopt_word(self.words().load(Words::flat_at(root.line, slot)), P::STEPS)?;
        }
        Ok(())
    }

    /// `steps`: how many nodes the rest of an address can lead through.
    fn adopt_word(&mut self, word: u32, steps: usize) -> Result<(), Error> {
        if !is_node(word) {
            return Ok(());
        }
        let line = word & node::LINE_MASK;
        // Before anything is read: a line that is not in the memory is not free either.
        if steps == 0 || !self.lines.is_free(line) {
            return Err(Error::Corrupt(line));
        }
        let block = self.words().block(word);
        self.adopt_block(block)?;
        if node::is_path(word) {
            let path = self.words().path(word);
            return match steps.checked_sub(path.count) {
                Some(steps) if (1..=8).contains(&path.count) && !is_node(path.other) => {
                    self.adopt_word(path.next, steps)
                }
                _ => Err(Error::Corrupt(line)),
            };
        }
        let slots = self.words().expand(word);
        slots.into_iter().try_for_each(|word| self.adopt_word(word, steps - 1))
    }

    fn adopt_block(&mut self, block: Block) -> Result<(), Error> {
        let free = block.line.trailing_zeros() >= block.order.into() && self.lines.take_at(block);
        if free { Ok(()) } else { Err(Error::Corrupt(block.line)) }
    }
}
