//! Which blocks of the cache belong to which sequence.
//!
//! Bookkeeping only: numbers of blocks and slots, no keys and values. A sequence has a
//! table of blocks; blocks are shared between forks and, once full, with later requests
//! that begin with the same tokens. A block is written by one owner only: whoever is about
//! to write into a shared one first gets a copy. Keys and values of a token depend on the
//! tokens before it and on nothing else (ARCHITECTURE.md, Numbers), so a shared block holds the
//! same bits that computing it again would give.

use setun_backend::CACHE_BLOCK;
use std::collections::BTreeMap;
use thiserror::Error;

/// A sequence in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sequence(u64);

/// Why blocks cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KvError {
    /// The sequence was freed.
    #[error("the sequence is not in the cache; it was freed, or comes from another engine")]
    Unknown,
    /// There is nothing to keep a path of.
    #[error("no tree is pending for the sequence; a step of another kind, or a draft, forgets it")]
    NoTree,
    /// More blocks are needed than are free.
    #[error(
        "the cache has {available} free blocks of {CACHE_BLOCK} tokens, but {needed} are \
         needed; free a sequence or make the cache larger"
    )]
    Full {
        /// Blocks that the step needs.
        needed: usize,
        /// Blocks that are free, or hold only reusable prefixes.
        available: usize,
    },
    /// A path that is not one of the pending tree.
    #[error("row {row} of the path is not a child of the one before it")]
    Path {
        /// The first row that does not fit.
        row: usize,
    },
}

/// What a sequence holds.
#[derive(Clone, Debug, Default)]
struct Table {
    /// Blocks of positions `0..`; some may lie behind the last token.
    blocks: Vec<u32>,
    tokens: Vec<u32>,
    /// The entries of the prefix index for its first full blocks.
    entries: Vec<u64>,
}

/// A full block that later requests may share.
#[derive(Clone, Debug)]
struct Entry {
    parent: u64,
    tokens: [u32; CACHE_BLOCK],
    block: u32,
    /// Never before that of an entry behind it.
    last_use: u64,
    /// Entries right behind it.
    children: usize,
}

/// The root of the prefix index.
const NO_ENTRY: u64 = 0;

/// Tables of all sequences, and the prefix index.
#[derive(Clone, Debug)]
pub struct KvTables {
    /// Free blocks, the next one last.
    free: Vec<u32>,
    /// Holders of each block: sequences, and one for the prefix index.
    holders: Vec<u32>,
    tables: BTreeMap<Sequence, Table>,
    entries: BTreeMap<u64, Entry>,
    /// Entry of each (parent, tokens).
    index: BTreeMap<(u64, [u32; CACHE_BLOCK]), u64>,
    next_sequence: u64,
    next_entry: u64,
    /// Counts uses of the index: which prefix goes first does not depend on time.
    uses: u64,
}

impl KvTables {
    /// Tables over `num_blocks` free blocks.
    pub fn new(num_blocks: usize) -> Self {
        Self {
            free: (0..num_blocks as u32).rev().collect(),
            holders: vec![0; num_blocks],
            tables: BTreeMap::new(),
            entries: BTreeMap::new(),
            index: BTreeMap::new(),
            next_sequence: 0,
            next_entry: NO_ENTRY + 1,
            uses: 0,
        }
    }

    /// A new, empty sequence.
    pub fn create(&mut self) -> Sequence {
        let sequence = Sequence(self.next_sequence);
        self.next_sequence += 1;
        self.tables.insert(sequence, Table::default());
        sequence
    }

    /// A new sequence that begins with as many tokens of `prompt` as the cache still has,
    /// never with all of them: the last one is left for its logits.
    pub fn create_with_prefix(&mut self, prompt: &[u32]) -> Sequence {
        let sequence = self.create();
        let mut table = Table::default();
        self.uses += 1;
        for id in self.matching(NO_ENTRY, prompt) {
            let entry = self.entries.get_mut(&id).expect("an indexed entry");
            entry.last_use = self.uses;
            self.holders[entry.block as usize] += 1;
            table.blocks.push(entry.block);
            table.tokens.extend_from_slice(&entry.tokens);
            table.entries.push(id);
        }
        self.tables.insert(sequence, table);
        sequence
    }

    /// How many of `tokens`, which are to lie behind those of `sequence`, are known behind the same
    /// text: in whole blocks, and never the last one, which is left for its logits.
    ///
    /// # Errors
    /// [`KvError::Unknown`]
    pub fn known(&self, sequence: Sequence, tokens: &[u32]) -> Result<usize, KvError> {
        let table = self.table(sequence)?;
        if !table.tokens.len().is_multiple_of(CACHE_BLOCK) {
            return Ok(0);
        }
        let parent = table.entries.last().copied().unwrap_or(NO_ENTRY);
        Ok(CACHE_BLOCK * self.matching(parent, tokens).len())
    }

    /// Entries of the blocks of `tokens` behind `parent`, as far as there are any, but for that of
    /// the last token.
    fn matching(&self, mut parent: u64, tokens: &[u32]) -> Vec<u64> {
        let reusable = &tokens[..tokens.len().saturating_sub(1)];
        let mut found = Vec::new();
        for tokens in reusable.as_chunks::<CACHE_BLOCK>().0 {
            let Some(&id) = self.index.get(&(parent, *tokens)) else {
                break;
            };
            found.push(id);
            parent = id;
        }
        found
    }

    /// A copy of `sequence` that shares all its blocks.
    ///
    /// # Errors
    /// [`KvError::Unknown`]
    pub fn fork(&mut self, sequence: Sequence) -> Result<Sequence, KvError> {
        let mut table = self.table(sequence)?.clone();
        table
            .blocks
            .truncate(table.tokens.len().div_ceil(CACHE_BLOCK));
        for &block in &table.blocks {
            self.holders[block as usize] += 1;
        }
        let fork = self.create();
        self.tables.insert(fork, table);
        Ok(fork)
    }

    /// Gives the blocks of `sequence` back; full ones stay for later requests.
    ///
    /// # Errors
    /// [`KvError::Unknown`]
    pub fn free(&mut self, sequence: Sequence) -> Result<(), KvError> {
        let table = self.tables.remove(&sequence).ok_or(KvError::Unknown)?;
        table.blocks.iter().rev().for_each(|&b| self.release(b));
        Ok(())
    }

    /// Forgets the tokens behind the first `len`.
    ///
    /// # Errors
    /// [`KvError::Unknown`]
    pub fn truncate(&mut self, sequence: Sequence, len: usize) -> Result<(), KvError> {
        let table = self.tables.get_mut(&sequence).ok_or(KvError::Unknown)?;
        table.tokens.truncate(len);
        let len = table.tokens.len();
        table.entries.truncate(len / CACHE_BLOCK);
        let first = len.div_ceil(CACHE_BLOCK).min(table.blocks.len());
        let gone = table.blocks.split_off(first);
        gone.iter().rev().for_each(|&b| self.release(b));
        Ok(())
    }

    /// The tokens of `sequence`.
    ///
    /// # Errors
    /// [`KvError::Unknown`]
    pub fn tokens(&self, sequence: Sequence) -> Result<&[u32], KvError> {
        Ok(&self.table(sequence)?.tokens)
    }

    /// The blocks of `sequence`, in the order of positions.
    ///
    /// # Errors
    /// [`KvError::Unknown`]
    pub fn blocks(&self, sequence: Sequence) -> Result<&[u32], KvError> {
        Ok(&self.table(sequence)?.blocks)
    }

    /// Slot of position `p` of `sequence`.
    ///
    /// # Errors
    /// [`KvError::Unknown`]
    ///
    /// # Panics
    /// If position `p` was not reserved.
    pub fn slot(&self, sequence: Sequence, p: usize) -> Result<u32, KvError> {
        let block = self.table(sequence)?.blocks[p / CACHE_BLOCK];
        Ok(block * CACHE_BLOCK as u32 + (p % CACHE_BLOCK) as u32)
    }

    /// Blocks that are free, or hold only prefixes that nobody uses now.
    pub fn available(&self) -> usize {
        let idle = |e: &&Entry| self.holders[e.block as usize] == 1;
        self.free.len() + self.entries.values().filter(idle).count()
    }

    /// Makes the `n` positions behind the tokens of `sequence` writable. Slots to copy
    /// first, `(from, to)`, are added to `moves`.
    ///
    /// # Errors
    /// [`KvError::Full`], and nothing has changed; [`KvError::Unknown`].
    pub fn reserve(
        &mut self,
        sequence: Sequence,
        n: usize,
        moves: &mut Vec<(u32, u32)>,
    ) -> Result<(), KvError> {
        let table = self.table(sequence)?;
        let len = table.tokens.len();
        let (partial, lanes) = (len / CACHE_BLOCK, len % CACHE_BLOCK);
        let shared = lanes > 0 && self.holders[table.blocks[partial] as usize] > 1;
        let wanted = (len + n).div_ceil(CACHE_BLOCK);
        let new = wanted.saturating_sub(table.blocks.len());
        let needed = new + usize::from(shared);
        if needed > self.free.len() && needed > self.available() {
            let available = self.available();
            return Err(KvError::Full { needed, available });
        }
        if shared {
            let copy = self.take();
            let table = self.tables.get_mut(&sequence).ok_or(KvError::Unknown)?;
            let from = std::mem::replace(&mut table.blocks[partial], copy);
            let lanes = 0..lanes as u32;
            let slot = |block: u32, lane: u32| block * CACHE_BLOCK as u32 + lane;
            moves.extend(lanes.map(|lane| (slot(from, lane), slot(copy, lane))));
            self.release(from);
        }
        for _ in 0..new {
            let block = self.take();
            let table = self.tables.get_mut(&sequence).ok_or(KvError::Unknown)?;
            table.blocks.push(block);
        }
        Ok(())
    }

    /// As [`reserve`](Self::reserve) for several sequences, each with its number of positions:
    /// for all of them or for none.
    ///
    /// # Errors
    /// [`KvError::Full`], and every sequence has the tokens that it had and no room behind
    /// them; what `moves` names is to be copied then too. [`KvError::Unknown`].
    pub fn reserve_all(
        &mut self,
        wanted: impl Iterator<Item = (Sequence, usize)> + Clone,
        moves: &mut Vec<(u32, u32)>,
    ) -> Result<(), KvError> {
        for (sequence, n) in wanted.clone() {
            let Err(error) = self.reserve(sequence, n, moves) else {
                continue;
            };
            for (sequence, _) in wanted {
                let len = self.tokens(sequence)?.len();
                self.truncate(sequence, len)?;
            }
            return Err(error);
        }
        Ok(())
    }

    /// Counts `tokens`, whose keys and values now lie behind the others or are
    /// [known](Self::known), to `sequence`.
    ///
    /// # Errors
    /// [`KvError::Unknown`]
    ///
    /// # Panics
    /// If their positions were not reserved.
    pub fn advance(&mut self, sequence: Sequence, tokens: &[u32]) -> Result<(), KvError> {
        let mut table = self.tables.remove(&sequence).ok_or(KvError::Unknown)?;
        table.tokens.extend_from_slice(tokens);
        self.register(&mut table);
        self.tables.insert(sequence, table);
        Ok(())
    }

    /// Keeps the rows `path` of a tree whose rows were stored behind the tokens of
    /// `sequence`, with their `parents` and `tokens`; the others are forgotten. Slots to
    /// copy, `(from, to)` in this order, are added to `moves`.
    ///
    /// # Errors
    /// [`KvError::Path`] unless each row is a child of the one before it, the first one of
    /// the past; [`KvError::Unknown`].
    ///
    /// # Panics
    /// If there are fewer tokens than parents, or their positions were not reserved.
    pub fn commit(
        &mut self,
        sequence: Sequence,
        (tokens, parents): (&[u32], &[u32]),
        path: &[usize],
        moves: &mut Vec<(u32, u32)>,
    ) -> Result<(), KvError> {
        let past = self.tokens(sequence)?.len();
        let mut parent = setun_backend::ROOT;
        for &row in path {
            if parents.get(row) != Some(&parent) {
                return Err(KvError::Path { row });
            }
            parent = row as u32;
        }
        // Rows come after their parents, so no slot is written before it is read.
        for (i, &row) in path.iter().enumerate().filter(|(i, row)| i != *row) {
            let from = self.slot(sequence, past + row)?;
            moves.push((from, self.slot(sequence, past + i)?));
        }
        let kept: Vec<u32> = path.iter().map(|&row| tokens[row]).collect();
        self.advance(sequence, &kept)?;
        self.truncate(sequence, past + path.len())
    }

    /// Adds the full blocks of `table` to the prefix index. Where the index has the same
    /// tokens already, its block takes the place of the sequence's own.
    fn register(&mut self, table: &mut Table) {
        self.uses += 1;
        let full = table.tokens.as_chunks::<CACHE_BLOCK>().0;
        if full.len() > table.entries.len() {
            // What the new blocks lie behind is used too.
            for id in &table.entries {
                let entry = self.entries.get_mut(id).expect("an indexed entry");
                entry.last_use = self.uses;
            }
        }
        for (i, tokens) in full.iter().enumerate().skip(table.entries.len()) {
            let parent = table.entries.last().copied().unwrap_or(NO_ENTRY);
            let block = table.blocks[i];
            let id = match self.index.get(&(parent, *tokens)) {
                Some(&id) => {
                    let entry = self.entries.get_mut(&id).expect("an indexed entry");
                    entry.last_use = self.uses;
                    self.holders[entry.block as usize] += 1;
                    table.blocks[i] = entry.block;
                    self.release(block);
                    id
                }
                None => self.insert(parent, *tokens, block),
            };
            table.entries.push(id);
        }
    }

    fn insert(&mut self, parent: u64, tokens: [u32; CACHE_BLOCK], block: u32) -> u64 {
        let id = self.next_entry;
        self.next_entry += 1;
        self.holders[block as usize] += 1;
        self.index.insert((parent, tokens), id);
        if let Some(parent) = self.entries.get_mut(&parent) {
            parent.children += 1;
        }
        let entry = Entry {
            parent,
            tokens,
            block,
            last_use: self.uses,
            children: 0,
        };
        self.entries.insert(id, entry);
        id
    }

    /// A free block; the least recently used idle prefix gives way.
    ///
    /// # Panics
    /// Without one; [`available`](Self::available) is asked first.
    fn take(&mut self) -> u32 {
        if self.free.is_empty() {
            self.evict();
        }
        let block = self.free.pop().expect("a free block");
        self.holders[block as usize] = 1;
        block
    }

    /// Gives up the idle entry that was used longest ago, of those that nothing lies behind. A
    /// sequence that uses a block uses all before it, so there is one while any entry is idle.
    fn evict(&mut self) {
        let idle = self
            .entries
            .iter()
            .filter(|(_, e)| e.children == 0 && self.holders[e.block as usize] == 1);
        let oldest = idle.min_by_key(|(id, e)| (e.last_use, std::cmp::Reverse(**id)));
        let Some(id) = oldest.map(|(&id, _)| id) else {
            return;
        };
        if let Some(entry) = self.entries.remove(&id) {
            self.index.remove(&(entry.parent, entry.tokens));
            if let Some(parent) = self.entries.get_mut(&entry.parent) {
                parent.children -= 1;
            }
            self.release(entry.block);
        }
    }

    fn release(&mut self, block: u32) {
        let holders = &mut self.holders[block as usize];
        *holders -= 1;
        if *holders == 0 {
            self.free.push(block);
        }
    }

    fn table(&self, sequence: Sequence) -> Result<&Table, KvError> {
        self.tables.get(&sequence).ok_or(KvError::Unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(kv: &mut KvTables, s: Sequence, tokens: &[u32]) -> Vec<(u32, u32)> {
        let mut moves = Vec::new();
        kv.reserve(s, tokens.len(), &mut moves).unwrap();
        kv.advance(s, tokens).unwrap();
        moves
    }

    fn tokens(n: u32) -> Vec<u32> {
        (0..n).map(|i| i * 7 % 5).collect()
    }

    #[test]
    fn a_fork_shares_blocks_until_one_side_writes() {
        let mut kv = KvTables::new(8);
        let a = kv.create();
        assert_eq!(append(&mut kv, a, &tokens(20)), []);
        let b = kv.fork(a).unwrap();
        assert_eq!(kv.blocks(a), kv.blocks(b));
        assert_eq!(kv.available(), 6);
        // The partial block has four tokens: they are copied for the one that writes.
        let moves = append(&mut kv, b, &[9]);
        assert_eq!(moves.len(), 4);
        assert_eq!(kv.available(), 5);
        assert_eq!(append(&mut kv, a, &[8]), [], "the other one is alone now");
        assert_eq!(kv.blocks(a).unwrap()[0], kv.blocks(b).unwrap()[0]);
        assert_ne!(kv.blocks(a).unwrap()[1], kv.blocks(b).unwrap()[1]);
        kv.free(a).unwrap();
        kv.free(b).unwrap();
        assert_eq!(kv.available(), 8);
        assert_eq!(kv.free(a), Err(KvError::Unknown));
    }

    #[test]
    fn a_prefix_is_found_again_and_leaves_the_last_token() {
        let mut kv = KvTables::new(8);
        let a = kv.create();
        append(&mut kv, a, &tokens(40));
        let shared = kv.blocks(a).unwrap()[..2].to_vec();
        kv.free(a).unwrap();
        let b = kv.create_with_prefix(&tokens(40));
        assert_eq!(kv.tokens(b).unwrap(), &tokens(32));
        assert_eq!(kv.blocks(b).unwrap(), shared);
        let c = kv.create_with_prefix(&tokens(32));
        assert_eq!(kv.tokens(c).unwrap().len(), 16);
        let other: Vec<u32> = tokens(40).iter().map(|t| t + 1).collect();
        let d = kv.create_with_prefix(&other);
        assert_eq!(kv.tokens(d).unwrap().len(), 0);
    }

    #[test]
    fn what_another_sequence_has_computed_meanwhile_is_known() {
        let mut kv = KvTables::new(16);
        let (first, second) = (kv.create(), kv.create());
        let text = tokens(50);
        for sequence in [first, second] {
            kv.reserve(sequence, 50, &mut Vec::new()).unwrap();
        }
        assert_eq!(kv.known(second, &text).unwrap(), 0);
        kv.advance(first, &text).unwrap();
        assert_eq!(kv.known(second, &text).unwrap(), 48);
        // The last token is left, and so is what differs.
        assert_eq!(kv.known(second, &text[..48]).unwrap(), 32);
        let other = [&text[..40], &[7; 10]].concat();
        assert_eq!(kv.known(second, &other).unwrap(), 32);
        let before = kv.available();
        kv.advance(second, &text[..32]).unwrap();
        assert_eq!(
            kv.blocks(first).unwrap()[..2],
            kv.blocks(second).unwrap()[..2]
        );
        assert_eq!(kv.available(), before + 2);
        assert_eq!(kv.known(second, &text[32..]).unwrap(), 16);
        // In the middle of a block nothing is.
        kv.advance(second, &text[32..34]).unwrap();
        assert_eq!(kv.known(second, &text[34..]).unwrap(), 0);
    }

    #[test]
    fn equal_blocks_become_one() {
        let mut kv = KvTables::new(8);
        let (a, b) = (kv.create(), kv.create());
        append(&mut kv, a, &tokens(20));
        append(&mut kv, b, &tokens(20));
        assert_eq!(kv.blocks(a).unwrap()[0], kv.blocks(b).unwrap()[0]);
        assert_eq!(kv.available(), 5);
    }

    #[test]
    fn idle_prefixes_give_way_last_blocks_first() {
        let mut kv = KvTables::new(3);
        let a = kv.create();
        append(&mut kv, a, &tokens(48));
        kv.free(a).unwrap();
        assert_eq!(kv.available(), 3);
        let b = kv.create();
        append(&mut kv, b, &[100; 20]);
        assert_eq!(kv.create_with_prefix(&tokens(48)), Sequence(2));
        assert_eq!(
            kv.tokens(Sequence(2)).unwrap().len(),
            16,
            "the first block is left"
        );
        let full = kv.reserve(b, 40, &mut Vec::new());
        let error = KvError::Full {
            needed: 2,
            available: 0,
        };
        assert_eq!(full, Err(error));
        assert_eq!(kv.tokens(b).unwrap().len(), 20);
    }

    #[test]
    fn the_prefix_that_was_used_longest_ago_gives_way_first() {
        let mut kv = KvTables::new(4);
        let (a, b) = (kv.create(), kv.create());
        append(&mut kv, a, &[1; 16]);
        append(&mut kv, b, &[2; 16]);
        append(&mut kv, a, &[3; 16]);
        kv.free(a).unwrap();
        kv.free(b).unwrap();
        // One block is free; the other one is that of `b`, the oldest that is no one's parent.
        let c = kv.create();
        append(&mut kv, c, &[4; 20]);
        let again = [[1; 16], [3; 16], [0; 16]].concat();
        let again = kv.create_with_prefix(&again);
        assert_eq!(kv.tokens(again).unwrap().len(), 32);
        let gone = kv.create_with_prefix(&[2; 20]);
        assert_eq!(kv.tokens(gone).unwrap().len(), 0);
    }

    #[test]
    fn room_for_several_is_had_for_all_or_for_none() {
        let mut kv = KvTables::new(4);
        let (a, b) = (kv.create(), kv.create());
        append(&mut kv, a, &tokens(10));
        let mut moves = Vec::new();
        let wanted = [(a, 20), (b, 40)];
        let full = kv.reserve_all(wanted.into_iter(), &mut moves);
        assert!(matches!(full, Err(KvError::Full { .. })), "{full:?}");
        assert_eq!(kv.available(), 3);
        assert_eq!([a, b].map(|s| kv.blocks(s).unwrap().len()), [1, 0]);
        let wanted = [(a, 20), (b, 32)];
        kv.reserve_all(wanted.into_iter(), &mut moves).unwrap();
        assert_eq!((kv.available(), moves), (0, Vec::new()));
    }

    #[test]
    fn truncation_gives_blocks_back_and_keeps_shared_ones_untouched() {
        let mut kv = KvTables::new(4);
        let a = kv.create();
        append(&mut kv, a, &tokens(50));
        kv.truncate(a, 10).unwrap();
        // The first block is in the prefix index too, so writing on needs a copy of it.
        assert_eq!(append(&mut kv, a, &[1]).len(), 10);
        kv.truncate(a, 99).unwrap();
        assert_eq!(kv.tokens(a).unwrap().len(), 11);
    }

    #[test]
    fn a_commit_keeps_one_path() {
        let mut kv = KvTables::new(4);
        let a = kv.create();
        append(&mut kv, a, &[1, 2, 3]);
        let root = setun_backend::ROOT;
        let (tokens, parents) = ([10, 11, 12, 13], [root, root, 1, 0]);
        let mut moves = Vec::new();
        kv.reserve(a, 4, &mut moves).unwrap();
        let wrong = kv.commit(a, (&tokens, &parents), &[1, 3], &mut moves);
        assert_eq!(wrong, Err(KvError::Path { row: 3 }));
        kv.commit(a, (&tokens, &parents), &[1, 2], &mut moves)
            .unwrap();
        assert_eq!(kv.tokens(a).unwrap(), [1, 2, 3, 11, 12]);
        let first = kv.slot(a, 3).unwrap();
        assert_eq!(moves, [(first + 1, first), (first + 2, first + 1)]);
    }
}
