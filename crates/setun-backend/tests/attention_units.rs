//! Attention of training in bf16, at widths that units for bf16 take: the same bits on every
//! instruction set, whether a thread has the keys of a whole head or of a tile.

mod rig;

use rig::{Rig, content_bits, randoms};
use setun_backend::{
    Attention, AttentionBackward, AttnBuf, Backend, DraftBlocks, Isa, Limits, Segment,
};

struct Case {
    name: &'static str,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    /// `(q_len, kv_len)` of each segment.
    segments: Vec<(usize, usize)>,
    /// Rows of a draft block, and the anchors.
    blocks: Option<(usize, Vec<u32>)>,
    /// Size of all values.
    scale: f32,
}

impl Case {
    fn segments(&self) -> Vec<Segment> {
        let (mut q_start, mut kv_start) = (0, 0);
        let each = self.segments.iter().map(|&(q_len, kv_len)| {
            let segment = Segment {
                q_start,
                q_len,
                kv_start,
                kv_len,
            };
            (q_start, kv_start) = (q_start + q_len, kv_start + kv_len);
            segment
        });
        each.collect()
    }

    /// Bits of `out`, `lse`, `dq`, `dk` and `dv`.
    fn run(&self, isa: Isa, threads: usize) -> [Vec<u32>; 5] {
        let (heads, width) = (self.num_heads, self.head_dim);
        let segments = self.segments();
        let rows = segments.iter().map(|s| s.q_len).sum::<usize>();
        let keys = segments.iter().map(|s| s.kv_len).sum::<usize>();
        let (query, key) = (rows * heads * width, keys * self.num_kv_heads * width);
        let mut rig = Rig::<f32>::new();
        let mut values = |stream, len| {
            let values = randoms::<f32>(stream, len);
            let scaled: Vec<f32> = values.into_iter().map(|x| x * self.scale).collect();
            rig.put(&scaled)
        };
        let real = [values(1, query), values(2, key), values(3, key)];
        let dout = values(4, query);
        let stored = real.map(|x| AttnBuf::Bf16(rig.room(x.len())));
        let forward = Attention {
            q: stored[0],
            k: stored[1],
            v: stored[2],
            out: rig.random(5, query),
            lse: rig.random(6, rows * heads),
            segments: &segments,
            blocks: self.blocks.as_ref().map(|(size, anchors)| DraftBlocks {
                size: *size,
                anchors,
            }),
            num_heads: heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: width,
        };
        let backward = AttentionBackward {
            forward,
            dout,
            delta: rig.room(rows * heads),
            dq: rig.random(7, query),
            dk: rig.random(8, key),
            dv: rig.random(9, key),
        };
        let limits = Limits {
            width: heads * width,
            head_dim: width,
            group_size: 32,
        };
        let mut host = rig.host(isa, threads, limits);
        for (from, to) in real.into_iter().zip(stored) {
            host.round_attention(from, to);
        }
        host.attention(forward);
        host.attention_backward(backward);
        let results = [
            forward.out,
            forward.lse,
            backward.dq,
            backward.dk,
            backward.dv,
        ];
        results.map(|buf| content_bits(&host, buf))
    }
}

fn cases() -> Vec<Case> {
    let own = |lens: &[usize]| lens.iter().map(|&n| (n, n)).collect();
    let case = |name, num_heads, num_kv_heads, head_dim, segments| Case {
        name,
        num_heads,
        num_kv_heads,
        head_dim,
        segments,
        blocks: None,
        scale: 1.0,
    };
    vec![
        case("own keys", 4, 2, 32, own(&[150, 1, 70])),
        case("whole tiles", 2, 2, 128, own(&[128])),
        case("few rows", 3, 1, 64, own(&[7, 33])),
        // More than tasks take together, of queries and of keys.
        case("many tiles and heads", 16, 8, 32, own(&[330])),
        case(
            "behind a context",
            2,
            1,
            96,
            vec![(70, 200), (3, 67), (1, 130)],
        ),
        Case {
            blocks: Some((4, vec![5, 64, 130, 0])),
            ..case("draft blocks", 2, 1, 64, vec![(12, 12 + 130), (4, 4)])
        },
        Case {
            scale: 1e-19,
            ..case("products that are denormal", 2, 1, 32, own(&[75]))
        },
    ]
}

#[test]
fn every_machine_gives_the_bits_of_the_reference() {
    for case in cases() {
        let expected = case.run(Isa::Reference, 1);
        for isa in Isa::available() {
            for threads in [1, 2, 9] {
                let got = case.run(isa, threads);
                let names = ["out", "lse", "dq", "dk", "dv"];
                for ((got, expected), name) in got.iter().zip(&expected).zip(names) {
                    let place = format!("{name} of {}, {isa:?}, {threads} threads", case.name);
                    assert!(got == expected, "{place}");
                }
            }
        }
    }
}
