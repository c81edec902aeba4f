//! `SETUN_ISA=amx` is on the tiles: products take just as many instructions there as whole tiles
//! have work for, and each tile that is loaded serves two of them. Where the processor has no
//! AMX, `setun-tiles` counts.
#![cfg(feature = "software-tiles")]

mod rig;

use rig::{Rig, numbers, randoms, scales, trits};
use setun_backend::{
    ActBuf, Attention, AttentionBackward, AttnBuf, Backend, Host, Isa, Limits, PackedBuf, Segment,
    TernaryBuf, WeightBuf, WeightData,
};
use setun_tiles::Counts;

/// What `run` takes, apart from configurations, and those.
fn counted(host: &mut Host<f32>, run: impl FnOnce(&mut Host<f32>)) -> (Counts, u64) {
    let before = setun_tiles::counts();
    run(host);
    let after = setun_tiles::counts();
    let counts = Counts {
        configurations: 0,
        dots_int8: after.dots_int8 - before.dots_int8,
        dots_bf16: after.dots_bf16 - before.dots_bf16,
        loads: after.loads - before.loads,
        stores: after.stores - before.stores,
    };
    (counts, after.configurations - before.configurations)
}

/// Rows, outputs and inputs: whole pairs of tiles everywhere. Groups of 128.
const SIZES: [usize; 3] = [64, 640, 256];
const GROUP: usize = 128;

/// Tiles of 16 x 16 outputs of a product.
fn tiles(rows: usize, columns: usize) -> u64 {
    (rows / 16 * (columns / 16)) as u64
}

#[test]
fn products_take_as_many_dots_as_there_are_tiles() {
    // The processor's own unit counts nothing, and the one in software needs AVX-512 beside it.
    let Some(isa) = Isa::from_name("amx").filter(|_| setun_tiles::install()) else {
        return;
    };
    let [rows, out, inp] = SIZES;
    let mut rig = Rig::<f32>::new();
    let x = ActBuf::Int8 {
        q: rig.put(
            &numbers(1, rows * inp, 100)
                .iter()
                .map(|&n| n as i8)
                .collect::<Vec<_>>(),
        ),
        scales: rig.put(&scales(2, rows * inp / GROUP)),
        group_size: GROUP,
    };
    let weight = |data| WeightBuf { out, inp, data };
    let ternary = weight(WeightData::Ternary(TernaryBuf {
        trits: rig.put(&trits(3, out * inp)),
        scales: rig.put(&scales(4, out * inp / GROUP)),
        group_size: GROUP,
    }));
    let packed = weight(WeightData::Packed(PackedBuf {
        bytes: rig.room(Host::<f32>::packed_len(out, inp, GROUP)),
        group_size: GROUP,
    }));
    let (y, dy) = (rig.room(rows * out), rig.random(5, rows * out));
    let (dx, dw) = (rig.room(rows * inp), rig.room(out * inp));
    let limits = Limits {
        width: inp,
        head_dim: 8,
        group_size: GROUP,
    };
    let mut host = rig.host(isa, 2, limits);

    // Two tiles of 64 bytes along a group. Sums go to memory after every group.
    let dots_int8 = tiles(rows, out) * (inp / 64) as u64;
    let of_int8 = Counts {
        dots_int8,
        loads: dots_int8,
        stores: tiles(rows, out) * (inp / GROUP) as u64,
        ..Counts::default()
    };
    let (of_ternary, _) = counted(&mut host, |host| host.linear(x, ternary, y));
    assert_eq!(of_ternary, of_int8);
    let (of_packed, configurations) = counted(&mut host, |host| host.linear(x, packed, y));
    assert_eq!(of_packed, of_int8);
    // A task configures the tiles once, and there are four for each thread.
    assert!(configurations <= 8, "{configurations}");

    // Tiles of 32 steps. Sums are loaded and stored once for each panel of 256 steps.
    let of_bf16 = |rows, columns, depth: usize| {
        let dots_bf16 = tiles(rows, columns) * (depth / 32) as u64;
        let sums = tiles(rows, columns) * depth.div_ceil(256) as u64;
        Counts {
            dots_bf16,
            loads: dots_bf16 + sums,
            stores: sums,
            ..Counts::default()
        }
    };
    let (back, _) = counted(&mut host, |host| {
        host.linear_dx(dy, ternary, dx, false, false)
    });
    assert_eq!(back, of_bf16(rows, inp, out));
    let (back, _) = counted(&mut host, |host| host.linear_dw(dy, x, out, inp, dw));
    assert_eq!(back, of_bf16(out, inp, rows));
    attention_is_on_tiles(isa);
}

/// One head of 128 whose 64 queries see 64 keys, the size of a tile of attention: two products
/// forward, five backward (on one thread, which has a whole head), each of 64 x 64 x 128.
fn attention_is_on_tiles(isa: Isa) {
    const ROWS: usize = 64;
    const HEAD: usize = 128;
    let mut rig = Rig::<f32>::new();
    let real = [1, 2, 3].map(|stream| rig.put(&randoms::<f32>(stream, ROWS * HEAD)));
    let stored = real.map(|x| AttnBuf::Bf16(rig.room(x.len())));
    let segments = [Segment {
        q_start: 0,
        q_len: ROWS,
        kv_start: 0,
        kv_len: ROWS,
    }];
    let forward = Attention {
        q: stored[0],
        k: stored[1],
        v: stored[2],
        out: rig.room(ROWS * HEAD),
        lse: rig.room(ROWS),
        segments: &segments,
        blocks: None,
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: HEAD,
    };
    let backward = AttentionBackward {
        forward,
        dout: rig.random(4, ROWS * HEAD),
        delta: rig.room(ROWS),
        dq: rig.room(ROWS * HEAD),
        dk: rig.room(ROWS * HEAD),
        dv: rig.room(ROWS * HEAD),
    };
    let limits = Limits {
        width: HEAD,
        head_dim: HEAD,
        group_size: GROUP,
    };
    let mut host = rig.host(isa, 1, limits);
    for (from, to) in real.into_iter().zip(stored) {
        host.round_attention(from, to);
    }
    let of_product = (ROWS / 16 * (ROWS / 16) * (HEAD / 32)) as u64;
    let dots = counted(&mut host, |host| host.attention(forward));
    assert_eq!(dots.0.dots_bf16, 2 * of_product);
    let dots = counted(&mut host, |host| host.attention_backward(backward));
    assert_eq!(dots.0.dots_bf16, 5 * of_product);
}
