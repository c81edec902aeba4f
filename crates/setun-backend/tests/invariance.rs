//! The same bits whatever the instruction set, the number of threads, and what else is
//! computed in the same call.

mod every_op;
mod rig;

use every_op::{EveryOp, LIMITS, Seen};
use half::bf16;
use rig::{Rig, bits, content, content_bits, machines, numbers, randoms};
use setun_backend::{
    ActBuf, Attention, AttnBuf, Backend, Buf, Host, Isa, Limits, NormRope, ProjectError, Real,
    RmsNorm, Segment, TernaryBuf,
};
use setun_ternary::{ScaleError, ScaleRule, project_group};

/// Bytes of every result of every operation, with the operation's name.
fn fingerprint(isa: Isa, threads: usize) -> Vec<(String, Vec<u8>)> {
    let mut rig = Rig::new();
    let ops = EveryOp::new(&mut rig);
    let mut host = rig.host(isa, threads, LIMITS);
    let mut all = Vec::new();
    ops.run(&mut host, &mut |name, mode, results, host| {
        for &result in results {
            let bytes = match result {
                Seen::F32(x) => bytemuck::cast_slice(&content(host, x)).to_vec(),
                Seen::Bf16(x) => bytemuck::cast_slice(&content(host, x)).to_vec(),
                Seen::I8(x) => bytemuck::cast_slice(&content(host, x)).to_vec(),
                Seen::Number(x) => x.to_le_bytes().to_vec(),
            };
            all.push((format!("{name} {mode}"), bytes));
        }
    });
    all
}

#[test]
fn instruction_sets_and_threads_give_the_same_bits() {
    let expected = fingerprint(Isa::Reference, 1);
    assert!(
        expected
            .iter()
            .all(|(_, bytes)| bytes.iter().any(|&b| b != 0))
    );
    for isa in Isa::available() {
        for threads in [1, 2, 3] {
            let got = fingerprint(isa, threads);
            assert_eq!(got.len(), expected.len());
            for ((name, got), (_, expected)) in got.iter().zip(&expected) {
                assert!(got == expected, "{name} on {isa:?} with {threads} threads");
            }
        }
    }
}

/// What activations hold, as bytes.
fn act_bytes(host: &Host<f32>, x: ActBuf<f32>) -> Vec<u8> {
    match x {
        ActBuf::Real(x) => bytemuck::cast_slice(&content(host, x)).to_vec(),
        ActBuf::Bf16(x) => bytemuck::cast_slice(&content(host, x)).to_vec(),
        ActBuf::Int8 { q, scales, .. } => {
            let mut bytes: Vec<u8> = bytemuck::cast_slice(&content(host, q)).to_vec();
            bytes.extend_from_slice(bytemuck::cast_slice(&content(host, scales)));
            bytes
        }
    }
}

/// Runs an operation on so many rows from a first one.
type OnRows<'a> = &'a dyn Fn(&mut Host<f32>, usize, usize, ActBuf<f32>);

/// Activations `[rows, width]` in each mode, with `group_size`.
fn act_rooms(rig: &mut Rig<f32>, rows: usize, width: usize, group_size: usize) -> [ActBuf<f32>; 3] {
    [
        ActBuf::Real(rig.room(rows * width)),
        ActBuf::Bf16(rig.room(rows * width)),
        ActBuf::Int8 {
            q: rig.room(rows * width),
            scales: rig.room(rows * width.div_ceil(group_size)),
            group_size,
        },
    ]
}

#[test]
fn a_row_of_a_rounding_operation_does_not_depend_on_its_neighbours() {
    const ROWS: usize = 37;
    for (isa, threads) in machines() {
        for width in [1, 15, 16, 17, 70, 129] {
            let mut rig = Rig::new();
            let (x, up) = (rig.random(20, ROWS * width), rig.random(21, ROWS * width));
            let norm = RmsNorm {
                x,
                weight: rig.random(22, width),
                inv: rig.room(ROWS),
                width,
                eps: 1e-6,
            };
            let whole = act_rooms(&mut rig, ROWS, width, 32);
            let single = act_rooms(&mut rig, ROWS, width, 32);
            let limits = Limits {
                width,
                head_dim: 8,
                group_size: 32,
            };
            let mut host = rig.host(isa, threads, limits);
            for (whole, single) in whole.into_iter().zip(single) {
                let mut check = |name: &str, run: OnRows<'_>| {
                    run(&mut host, 0, ROWS, whole);
                    for r in 0..ROWS {
                        run(&mut host, r, 1, single.rows(r, 1, width));
                    }
                    let (whole, single) = (act_bytes(&host, whole), act_bytes(&host, single));
                    assert!(whole == single, "{name}, width {width}, {isa:?}, {threads}");
                };
                let part = |x: Buf<f32>, r: usize, n: usize| x.part(r * width, n * width);
                check("round_activation", &|host, r, n, y| {
                    host.round_activation(part(x, r, n), width, y);
                });
                check("rms_norm", &|host, r, n, y| {
                    let (x, inv) = (part(x, r, n), norm.inv.part(r, n));
                    host.rms_norm(RmsNorm { x, inv, ..norm }, y);
                });
                check("swiglu", &|host, r, n, y| {
                    host.swiglu(part(x, r, n), part(up, r, n), width, y);
                });
            }
        }
    }
}

#[test]
fn int8_rounding_equals_its_definition() {
    const ROWS: usize = 300;
    const WIDTH: usize = 515;
    const GROUP: usize = 128;
    let mut values: Vec<f32> = randoms(25, ROWS * WIDTH);
    // Half of the rows are ties or next to one: halves times a, up to rounding.
    let tie = |i: usize| ((i * 37 % 254) as f32) - 126.5;
    for group in values
        .chunks_mut(WIDTH)
        .step_by(2)
        .flat_map(|row| row.chunks_mut(GROUP))
    {
        let a = group[0].abs() / 127.0;
        group[0] = a * 127.0;
        (1..group.len()).for_each(|i| group[i] = tie(i) * a);
    }
    // A group whose scale is below the normal range, and one of zeros.
    values[..GROUP].fill(1e-37);
    values[GROUP..2 * GROUP].fill(0.0);
    let (mut q, mut scales) = (Vec::new(), Vec::new());
    for x in values.chunks(WIDTH).flat_map(|row| row.chunks(GROUP)) {
        let a = x.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0;
        let a = if a < f32::MIN_POSITIVE { 0.0 } else { a };
        let round = |x: &f32| (x / a).round_ties_even().clamp(-127.0, 127.0) as i8;
        scales.push(a);
        q.extend(x.iter().map(|x| if a == 0.0 { 0 } else { round(x) }));
    }
    for (isa, threads) in machines() {
        let mut rig = Rig::new();
        let x = rig.put(&values);
        let (to_q, to_scales) = (rig.room(q.len()), rig.room(scales.len()));
        let limits = Limits {
            width: WIDTH,
            head_dim: 1,
            group_size: GROUP,
        };
        let y = ActBuf::Int8 {
            q: to_q,
            scales: to_scales,
            group_size: GROUP,
        };
        let mut host = rig.host(isa, threads, limits);
        host.round_activation(x, WIDTH, y);
        assert!(content(&host, to_q) == q, "{isa:?}, {threads} threads");
        assert_eq!(content_bits(&host, to_scales), bits(&scales));
    }
}

#[test]
fn a_row_of_norm_rope_does_not_depend_on_its_neighbours() {
    const ROWS: usize = 37;
    const POSITIONS: usize = 50;
    for (isa, threads) in machines() {
        for (heads, head_dim) in [(1, 2), (3, 10), (2, 34)] {
            let width = heads * head_dim;
            let mut rig = Rig::new();
            let op = NormRope {
                norm: RmsNorm {
                    x: rig.random(30, ROWS * width),
                    weight: rig.random(31, head_dim),
                    inv: rig.room(ROWS * heads),
                    width: head_dim,
                    eps: 1e-6,
                },
                heads,
                cos: rig.random(32, POSITIONS * head_dim / 2),
                sin: rig.random(33, POSITIONS * head_dim / 2),
                positions: rig.put(&numbers(34, ROWS, POSITIONS as u32)),
            };
            let (whole, single) = (rig.room(ROWS * width), rig.room(ROWS * width));
            let limits = Limits {
                width,
                head_dim,
                group_size: 32,
            };
            let mut host = rig.host(isa, threads, limits);
            host.norm_rope(op, AttnBuf::Real(whole));
            for r in 0..ROWS {
                let norm = RmsNorm {
                    x: op.norm.x.part(r * width, width),
                    inv: op.norm.inv.part(r * heads, heads),
                    ..op.norm
                };
                let positions = op.positions.part(r, 1);
                let y = AttnBuf::Real(single).rows(r, 1, width);
                host.norm_rope(
                    NormRope {
                        norm,
                        positions,
                        ..op
                    },
                    y,
                );
            }
            assert_eq!(content_bits(&host, whole), content_bits(&host, single));
        }
    }
}

#[test]
fn a_prompt_in_chunks_equals_the_whole_prompt() {
    const LEN: usize = 150;
    const HEADS: usize = 4;
    const KV_HEADS: usize = 2;
    const DIM: usize = 18;
    let (query, key) = (LEN * HEADS * DIM, LEN * KV_HEADS * DIM);
    for (isa, threads) in machines() {
        for half in [false, true] {
            let mut rig = Rig::new();
            let [q, k, v] = [(40, query), (41, key), (42, key)].map(|(stream, len)| {
                let values = randoms::<f32>(stream, len);
                if half {
                    let values: Vec<bf16> = values.iter().map(|x| Real::to_bf16(*x)).collect();
                    AttnBuf::Bf16(rig.put(&values))
                } else {
                    AttnBuf::Real(rig.put(&values))
                }
            });
            let (whole, out) = (rig.room(query), rig.room(query));
            let (whole_lse, lse) = (rig.room(LEN * HEADS), rig.room(LEN * HEADS));
            let limits = Limits {
                width: 64,
                head_dim: DIM,
                group_size: 32,
            };
            let mut host = rig.host(isa, threads, limits);
            let mut run = |segments: &[Segment], out, lse| {
                host.attention(Attention {
                    q,
                    k,
                    v,
                    out,
                    lse,
                    segments,
                    blocks: None,
                    num_heads: HEADS,
                    num_kv_heads: KV_HEADS,
                    head_dim: DIM,
                });
                [content_bits(&host, out), content_bits(&host, lse)]
            };
            let expected = run(&[Segment::own(0, LEN)], whole, whole_lse);
            for chunk in [1, 7, 63, 64, 65, 149] {
                let chunks: Vec<Segment> = (0..LEN)
                    .step_by(chunk)
                    .map(|start| {
                        let end = LEN.min(start + chunk);
                        Segment {
                            q_start: start,
                            q_len: end - start,
                            kv_start: 0,
                            kv_len: end,
                        }
                    })
                    .collect();
                let got = run(&chunks, out, lse);
                assert!(
                    got == expected,
                    "chunks of {chunk}, {isa:?}, {threads} threads"
                );
            }
        }
    }
}

#[test]
fn the_sum_of_squares_does_not_depend_on_threads() {
    // More than one batch of chunks, and a last chunk that is short.
    for len in [1, 4095, 4097, 1_100_003] {
        let values: Vec<f32> = randoms(50, len);
        let exact: f64 = values.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let mut first = None;
        for isa in Isa::available() {
            for threads in [1, 2, 3] {
                let mut rig = Rig::new();
                let x = rig.put(&values);
                let limits = Limits {
                    width: 1,
                    head_dim: 1,
                    group_size: 1,
                };
                let sum = rig.host(isa, threads, limits).sum_squares(x);
                assert!((sum - exact).abs() <= 1e-12 * exact);
                let first = *first.get_or_insert(sum.to_bits());
                assert_eq!(
                    first,
                    sum.to_bits(),
                    "{len} values, {isa:?}, {threads} threads"
                );
            }
        }
    }
}

/// A backend with latents `[rows, cols]` and room for their projection.
fn projection(
    latents: &[f32],
    cols: usize,
    group_size: usize,
    (isa, threads): (Isa, usize),
) -> (Host<f32>, Buf<f32>, TernaryBuf) {
    let rows = latents.len() / cols;
    let mut rig = Rig::new();
    let latent = rig.put(latents);
    let to = TernaryBuf {
        trits: rig.room(rows * cols),
        scales: rig.room(rows * cols.div_ceil(group_size)),
        group_size,
    };
    let limits = Limits {
        width: cols,
        head_dim: 1,
        group_size,
    };
    (rig.host(isa, threads, limits), latent, to)
}

#[test]
fn projection_equals_the_number_format() {
    const ROWS: usize = 37;
    for machine in machines() {
        for (cols, group_size) in [(1, 16), (33, 16), (70, 32), (129, 128), (301, 300)] {
            for rule in ScaleRule::ALL {
                let latents: Vec<f32> = randoms(60, ROWS * cols);
                let (mut host, latent, to) = projection(&latents, cols, group_size, machine);
                let (mut t, mut s) = (vec![0i8; ROWS * cols], Vec::new());
                let rows = latents.chunks(cols).zip(t.chunks_mut(cols));
                for (w, t) in rows {
                    for (w, t) in w.chunks(group_size).zip(t.chunks_mut(group_size)) {
                        s.push(project_group(w, rule, t).expect("finite latents"));
                    }
                }
                let zeros = t.iter().filter(|&&t| t == 0).count() as u64;
                let stats = host
                    .project(latent, cols, rule, to)
                    .expect("finite latents");
                assert_eq!(content(&host, to.trits), t);
                assert_eq!(bits(&content(&host, to.scales)), bits(&s));
                // All trits were zero before.
                let flips = t.len() as u64 - zeros;
                assert_eq!((stats.zeros, stats.flips), (zeros, flips));
                let again = host
                    .project(latent, cols, rule, to)
                    .expect("finite latents");
                assert_eq!((again.zeros, again.flips), (zeros, 0));
            }
        }
    }
}

#[test]
fn projection_names_the_first_bad_group() {
    const COLS: usize = 70;
    let mut latents: Vec<f32> = randoms(61, 100 * COLS);
    latents[90 * COLS] = f32::NAN;
    latents[53 * COLS + 40] = f32::INFINITY;
    latents[53 * COLS + 69] = f32::NAN;
    for machine in machines() {
        let (mut host, latent, to) = projection(&latents, COLS, 32, machine);
        let expected = ProjectError {
            row: 53,
            group: 1,
            why: ScaleError::NotFinite,
        };
        let result = host.project(latent, COLS, ScaleRule::Mean, to);
        assert_eq!(result, Err(expected), "{machine:?}");
    }
}
