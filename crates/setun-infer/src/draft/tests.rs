use super::*;
use setun_backend::philox::Philox;
use setun_backend::{Among, CachedSegment};

const R: u32 = ROOT;

fn tree(tokens: &[u32], parents: &[u32]) -> DraftTree {
    DraftTree::new(tokens.to_vec(), parents.to_vec()).unwrap()
}

fn random_parents(case: u64) -> Vec<u32> {
    let random = Philox::new(61, case);
    let nodes = random.block(1000)[0] as usize % MAX_NODES + 1;
    let parent = |n: usize| match random.block(n as u64)[0] as usize % (n + 1) {
        p if p == n => ROOT,
        p => p as u32,
    };
    (0..nodes).map(parent).collect()
}

#[test]
fn trees_are_checked() {
    let new = |tokens: &[u32], parents: &[u32]| DraftTree::new(tokens.into(), parents.into());
    assert!(new(&[1, 1, 1], &[R, 0, 1]).is_ok());
    let length = TreeError::Length {
        tokens: 2,
        parents: 1,
    };
    assert_eq!(new(&[1, 2], &[R]), Err(length));
    let order = |node, parent| Err(TreeError::Order { node, parent });
    assert_eq!(new(&[1, 2], &[R, 1]), order(1, 1));
    assert_eq!(new(&[1, 2], &[7, 0]), order(0, 7));
    let (first, second) = (1, 3);
    let repeated = Err(TreeError::Repeated { first, second });
    assert_eq!(new(&[1, 2, 3, 2], &[R, 0, 0, 0]), repeated);
    let many = vec![R; MAX_NODES + 1];
    assert_eq!(new(&many, &many), Err(TreeError::TooLarge(65)));
}

#[test]
fn trees_know_depths_ranks_and_paths() {
    let tree = tree(&[5, 6, 7, 8, 9], &[R, 0, R, 0, 3]);
    let depths: Vec<usize> = (0..5).map(|n| tree.depth(n)).collect();
    assert_eq!(depths, [1, 2, 1, 2, 3]);
    let ranks: Vec<usize> = (0..5).map(|n| tree.rank(n)).collect();
    assert_eq!(ranks, [0, 0, 1, 1, 0]);
    assert_eq!(tree.children(Some(0)).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(tree.children(None).collect::<Vec<_>>(), [0, 2]);
    assert_eq!(
        (tree.child(Some(0), 8), tree.child(None, 8)),
        (Some(3), None)
    );
    assert_eq!((tree.path(4), tree.max_depth()), (vec![5, 8, 9], 3));
    assert_eq!(DraftTree::default().max_depth(), 0);
}

#[test]
fn chains_merge_into_a_trie() {
    let merged = DraftTree::merge(&[&[1, 2, 3], &[1, 4], &[], &[2], &[1, 2, 5], &[1, 2, 3]]);
    assert_eq!(merged, tree(&[1, 2, 3, 4, 2, 5], &[R, 0, 1, 0, R, 1]));
    assert_eq!(DraftTree::default().grow(Some(0), 1), None);
    let long: Vec<u32> = (0..100).collect();
    let full = DraftTree::merge(&[&long, &[0, 7]]);
    assert_eq!((full.len(), full.max_depth()), (MAX_NODES, MAX_NODES));
}

#[test]
fn a_mask_is_past_ancestors_and_self() {
    let rows = |past, parents: &[u32]| {
        let mask = visibility_mask(past, parents);
        let size = past + parents.len();
        let line = |row: &[bool]| row.iter().map(|&v| if v { '1' } else { '0' }).collect();
        mask.chunks(size).map(line).collect::<Vec<String>>()
    };
    let expected = [
        "1000000", "1100000", // the past
        "1110000", "1111000", "1111100", "1100010", "1110001",
    ];
    assert_eq!(rows(2, &[R, 0, 1, R, 0]), expected);
    assert_eq!(rows(0, &[R, R]), ["10", "01"]);
    assert!(visibility_mask(0, &[]).is_empty());
}

/// The engine gathers, for each query, the past and then its path, one key for each
/// position. That is the row of the mask: the same keys, and no two at one position.
#[test]
fn the_engine_gathers_what_the_mask_shows() {
    for case in 0..200 {
        let parents = random_parents(case);
        let (nodes, past) = (parents.len(), case as usize % 40);
        let mask = visibility_mask(past, &parents);
        let segment = CachedSegment {
            q_start: 0,
            q_len: nodes,
            past,
            blocks: &[],
            among: Among::Tree(&parents),
        };
        for node in 0..nodes {
            let mut seen: Vec<usize> = (0..past).collect();
            let mut positions: Vec<usize> = (0..past).collect();
            let mut at = Some(node);
            while let Some(n) = at {
                seen.push(past + n);
                positions.push(past + segment.depth(n));
                at = segment.parent(n);
            }
            seen.sort_unstable();
            positions.sort_unstable();
            let row = &mask[(past + node) * (past + nodes)..][..past + nodes];
            let visible: Vec<usize> = (0..past + nodes).filter(|&j| row[j]).collect();
            assert_eq!(seen, visible, "case {case}, node {node}");
            assert_eq!(
                positions,
                (0..=past + segment.depth(node)).collect::<Vec<_>>()
            );
        }
    }
}

#[test]
fn a_cut_draft_is_a_tree_with_its_evidence() {
    let draft = Draft {
        tree: tree(&[5, 6, 7, 8, 9, 4], &[R, 0, R, 0, 3, 2]),
        evidence: vec![0, 1, 2, 3, 4, 5],
        proposals: (0..7).map(Distribution::point).collect(),
    };
    let all = Budget {
        nodes: 64,
        depth: 64,
        width: 64,
    };
    assert_eq!(draft.clone().cut(all), draft);
    let flat = draft.clone().cut(Budget { depth: 2, ..all });
    assert_eq!(flat.tree, tree(&[5, 6, 7, 8, 4], &[R, 0, R, 0, 2]));
    assert_eq!(flat.evidence, [0, 1, 2, 3, 5]);
    let drawn_from: Vec<u32> = flat
        .proposals
        .iter()
        .filter_map(Distribution::best)
        .collect();
    assert_eq!(drawn_from, [0, 1, 2, 3, 4, 6]);
    let narrow = draft.clone().cut(Budget { width: 1, ..all });
    assert_eq!(narrow.tree, tree(&[5, 6], &[R, 0]));
    let small = draft.clone().cut(Budget { nodes: 3, ..all });
    assert_eq!(small.tree, tree(&[5, 6, 7], &[R, 0, R]));
    assert!(draft.cut(Budget { nodes: 0, ..all }).tree.is_empty());
}
