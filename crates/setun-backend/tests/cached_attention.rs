//! Attention to a cache has the same bits on every machine, however many heads share a key and
//! whether their products are read from the cache as they are stored or not.

mod rig;

use half::bf16;
use rig::{Rig, content_bits, machines, randoms};
use setun_backend::{
    Among, AttnBuf, Backend, CACHE_BLOCK, CacheKind, CacheShape, CacheStore, CachedAttention,
    CachedSegment, Isa, Limits,
};

struct Case {
    kind: CacheKind,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    past: usize,
    q_len: usize,
    /// Of queries, keys and values: small ones have products below the normal numbers.
    sizes: [f32; 3],
    memory: Memory,
}

/// What is in the cache where no query looks.
#[derive(Clone, Copy, PartialEq)]
enum Memory {
    /// Zeros.
    New,
    /// No numbers, where nothing has been stored since.
    Used,
    /// As new; the values of the last token are no numbers, which it alone may see.
    Spoilt,
}

fn stored(stream: u64, len: usize, size: f32) -> Vec<bf16> {
    let values = randoms::<f32>(stream, len);
    values.iter().map(|x| bf16::from_f32(x * size)).collect()
}

fn attend(case: &Case, machine: (Isa, usize)) -> Vec<u32> {
    attend_to(case, Rows::Together(Among::Chain), machine)
}

/// How queries are handed over.
#[derive(Clone, Copy)]
enum Rows<'a> {
    Together(Among<'a>),
    /// Each as the last of a segment of its own.
    Alone,
}

fn attend_to(case: &Case, rows: Rows<'_>, (isa, threads): (Isa, usize)) -> Vec<u32> {
    let tokens = case.past + case.q_len;
    let num_blocks = tokens.div_ceil(CACHE_BLOCK);
    let row = case.num_kv_heads * case.head_dim;
    let mut rig = Rig::<f32>::new();
    let cache = rig.cache(CacheShape {
        kind: case.kind,
        num_blocks,
        num_kv_heads: case.num_kv_heads,
        head_dim: case.head_dim,
    });
    let len = case.q_len * case.num_heads * case.head_dim;
    let q = AttnBuf::Bf16(rig.put(&stored(1, len, case.sizes[0])));
    let k = AttnBuf::Bf16(rig.put(&stored(2, tokens * row, case.sizes[1])));
    let mut values = stored(3, tokens * row, case.sizes[2]);
    if case.memory == Memory::Spoilt {
        values[(tokens - 1) * row..].fill(bf16::INFINITY);
    }
    let v = AttnBuf::Bf16(rig.put(&values));
    let all = num_blocks * CACHE_BLOCK;
    let nothing = AttnBuf::Bf16(rig.put(&vec![bf16::NAN; all * row]));
    let out = rig.room::<f32>(len);
    let limits = Limits {
        width: 1,
        head_dim: case.head_dim,
        group_size: 32,
    };
    let mut host = rig.host(isa, threads, limits);
    // Last block first, as a cache that has been used for a while.
    let blocks: Vec<u32> = (0..num_blocks as u32).rev().collect();
    let segment = |q_start, q_len, among| CachedSegment {
        q_start,
        q_len,
        past: tokens - q_len,
        blocks: &blocks,
        among,
    };
    let segments: Vec<CachedSegment<'_>> = match rows {
        Rows::Together(among) => vec![segment(0, case.q_len, among)],
        Rows::Alone => (0..case.q_len)
            .map(|row| segment(row, 1, Among::Chain))
            .collect(),
    };
    if case.memory == Memory::Used {
        host.cache_store(CacheStore {
            k: nothing,
            v: nothing,
            slots: &(0..all as u32).collect::<Vec<_>>(),
            cache,
        });
    }
    let slots: Vec<u32> = (0..tokens).map(|p| segments[0].slot(p) as u32).collect();
    host.cache_store(CacheStore {
        k,
        v,
        slots: &slots,
        cache,
    });
    host.cached_attention(CachedAttention {
        q,
        out,
        cache,
        segments: &segments,
        num_heads: case.num_heads,
    });
    content_bits(&host, out)
}

#[test]
fn every_machine_gives_the_same_bits() {
    for kind in [CacheKind::Bf16, CacheKind::Int8] {
        same_bits_of_a_cache_of(kind);
    }
}

fn same_bits_of_a_cache_of(kind: CacheKind) {
    let tiny = 2.0f32.powi(-70);
    for (num_heads, num_kv_heads) in [(2, 2), (4, 2), (3, 1), (4, 1)] {
        for head_dim in [20, 48, 128] {
            for (past, q_len) in [(5, 1), (63, 1), (64, 1), (150, 1), (200, 2), (30, 70)] {
                for sizes in [[1.0; 3], [tiny, tiny, 1.0], [1.0, 1.0, tiny * tiny.sqrt()]] {
                    let case = Case {
                        kind,
                        num_heads,
                        num_kv_heads,
                        head_dim,
                        past,
                        q_len,
                        sizes,
                        memory: Memory::New,
                    };
                    let expected = attend(&case, (Isa::Reference, 1));
                    assert!(expected.iter().any(|&bits| bits << 1 != 0), "all zero");
                    for machine in machines() {
                        let name = format!(
                            "{kind:?}, {num_heads}/{num_kv_heads} heads of {head_dim}, {past} + \
                             {q_len} tokens, {sizes:?}, {machine:?}"
                        );
                        assert!(attend(&case, machine) == expected, "{name}");
                    }
                }
            }
        }
    }
}

/// As many rows as a draft or a prompt has, over the end of a tile or not, as a chain and as a tree that is
/// one; whatever lies in the slots that they do not see.
#[test]
fn rows_of_a_chain_see_their_own_past_alone() {
    for kind in [CacheKind::Bf16, CacheKind::Int8] {
        rows_see_their_own_past_in_a_cache_of(kind);
    }
}

fn rows_see_their_own_past_in_a_cache_of(kind: CacheKind) {
    for (past, q_len) in [
        (0, 1),
        (0, 9),
        (5, 3),
        (60, 4),
        (60, 9),
        (130, 17),
        (40, 40),
        (63, 65),
        (250, 140),
        (0, 300),
    ] {
        let case = |memory| Case {
            kind,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 32,
            past,
            q_len,
            sizes: [1.0; 3],
            memory,
        };
        let expected = attend(&case(Memory::New), (Isa::Reference, 1));
        let row = 4 * 32;
        let parents: Vec<u32> = (0..q_len as u32).map(|i| i.wrapping_sub(1)).collect();
        let tree = Rows::Together(Among::Tree(&parents));
        for machine in machines() {
            let name = format!("{kind:?}, {past} + {q_len} tokens, {machine:?}");
            let used = attend(&case(Memory::Used), machine);
            assert!(used == expected, "used, {name}");
            let tree = attend_to(&case(Memory::Used), tree, machine);
            assert!(tree == expected, "tree, {name}");
            let spoilt = attend(&case(Memory::Spoilt), machine);
            let others = (q_len - 1) * row;
            assert!(spoilt[..others] == expected[..others], "spoilt, {name}");
        }
    }
}

/// A block's rows see what they would see if each was the last of them.
#[test]
fn rows_of_a_block_see_each_other() {
    for (past, q_len) in [(0, 1), (0, 6), (60, 4), (60, 9), (130, 17), (250, 70)] {
        let case = Case {
            kind: CacheKind::Bf16,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 32,
            past,
            q_len,
            sizes: [1.0; 3],
            memory: Memory::Used,
        };
        let expected = attend_to(&case, Rows::Alone, (Isa::Reference, 1));
        for machine in machines() {
            let together = attend_to(&case, Rows::Together(Among::All), machine);
            assert!(together == expected, "{past} + {q_len} tokens, {machine:?}");
        }
    }
}

/// More query heads share a key head than a task takes.
#[test]
fn a_group_of_heads_may_be_wider_than_a_tile() {
    let case = |num_heads: usize, sizes: [f32; 3]| Case {
        kind: CacheKind::Bf16,
        num_heads,
        num_kv_heads: 2,
        head_dim: 256,
        past: 70,
        q_len: 2,
        sizes,
        memory: Memory::New,
    };
    for num_heads in [130, 256, 280] {
        // Queries of zero see all keys alike, so the heads of a group have one result.
        let out = attend(&case(num_heads, [0.0, 1.0, 1.0]), (Isa::Reference, 1));
        for row in out.chunks_exact(256 * num_heads) {
            let heads: Vec<&[u32]> = row.chunks_exact(256).collect();
            let (first, second) = heads.split_at(num_heads / 2);
            assert!(first.iter().all(|head| *head == first[0]));
            assert!(second.iter().all(|head| *head == second[0]));
            assert!(first[0] != second[0] && first[0].iter().any(|&bits| bits << 1 != 0));
        }
        let expected = attend(&case(num_heads, [1.0; 3]), (Isa::Reference, 1));
        for machine in machines() {
            assert!(
                attend(&case(num_heads, [1.0; 3]), machine) == expected,
                "{machine:?}"
            );
        }
    }
}

/// Tokens of sequences that begin alike, and queries of each.
struct Family {
    kind: CacheKind,
    heads: (usize, usize),
    shared: usize,
    /// Tokens behind those, and how many of them are queries.
    own: Vec<(usize, usize)>,
    /// Whether the queries branch.
    are_trees: bool,
}

impl Family {
    const HEAD_DIM: usize = 32;

    /// Outputs of all sequences, computed in runs of `at_once` sequences.
    fn attend(&self, at_once: usize, (isa, threads): (Isa, usize)) -> Vec<u32> {
        let (num_heads, num_kv_heads) = self.heads;
        let row = num_kv_heads * Self::HEAD_DIM;
        let mut rig = Rig::<f32>::new();
        let mut fresh = 0u32..;
        let prefix: Vec<u32> = fresh.by_ref().take(self.shared / CACHE_BLOCK).collect();
        let tables: Vec<Vec<u32>> = self
            .own
            .iter()
            .map(|(len, _)| {
                let own = fresh.by_ref().take(len.div_ceil(CACHE_BLOCK));
                prefix.iter().copied().chain(own).collect()
            })
            .collect();
        let cache = rig.cache(CacheShape {
            kind: self.kind,
            num_blocks: fresh.start as usize,
            num_kv_heads,
            head_dim: Self::HEAD_DIM,
        });
        let slots = fresh.start as usize * CACHE_BLOCK;
        let [k, v] = [2, 3].map(|i| AttnBuf::Bf16(rig.put(&stored(i, slots * row, 1.0))));
        let rows: usize = self.own.iter().map(|own| own.1).sum();
        let len = rows * num_heads * Self::HEAD_DIM;
        let q = AttnBuf::Bf16(rig.put(&stored(1, len, 1.0)));
        let out = rig.room::<f32>(len);
        let limits = Limits {
            width: 1,
            head_dim: Self::HEAD_DIM,
            group_size: 32,
        };
        let mut host = rig.host(isa, threads, limits);
        host.cache_store(CacheStore {
            k,
            v,
            slots: &(0..slots as u32).collect::<Vec<_>>(),
            cache,
        });
        // Two guesses for the first place, and what follows the first of them.
        let parents = [u32::MAX, u32::MAX, 0, 2];
        let mut q_start = 0;
        let each = self.own.iter().zip(&tables).map(|(&(own, q_len), blocks)| {
            q_start += q_len;
            CachedSegment {
                q_start: q_start - q_len,
                q_len,
                past: self.shared + own - q_len,
                blocks,
                among: match self.are_trees {
                    true => Among::Tree(&parents[..q_len]),
                    false => Among::Chain,
                },
            }
        });
        for segments in each.collect::<Vec<_>>().chunks(at_once) {
            host.cached_attention(CachedAttention {
                q,
                out,
                cache,
                segments,
                num_heads,
            });
        }
        content_bits(&host, out)
    }
}

#[test]
fn sequences_that_begin_alike_do_not_notice_each_other() {
    for kind in [CacheKind::Bf16, CacheKind::F32, CacheKind::Int8] {
        for heads in [(2, 2), (8, 2)] {
            for shared in [64, 112, 256] {
                for (own, are_trees) in [
                    (vec![(1, 1); 4], false),
                    (vec![(1, 1), (90, 1), (17, 3), (64, 2)], false),
                    (vec![(4, 4), (70, 3), (130, 1)], true),
                    (vec![(30, 20), (5, 2)], false),
                ] {
                    let name = format!("{kind:?}, {heads:?} heads, {shared} and {own:?}");
                    let family = Family {
                        kind,
                        heads,
                        shared,
                        own,
                        are_trees,
                    };
                    let expected = family.attend(1, (Isa::Reference, 1));
                    for machine in machines() {
                        let together = family.attend(4, machine);
                        assert!(together == expected, "{name}, {machine:?}");
                    }
                }
            }
        }
    }
}
