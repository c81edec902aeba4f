//! `setun bench attention`: forward and backward over one causal sequence.

use super::machine::Limits as Peaks;
use super::{Bench, Figure, Unit, uniform};
use setun_backend::{
    Attention, AttentionBackward, AttnBuf, Backend, Category, Limits, Plan, Segment,
};

/// Every length with every width.
pub(super) fn run(bench: &Bench, seq: &[usize], head_dim: &[usize], heads: usize) -> Vec<Figure> {
    let peaks = Peaks::measure(bench);
    let mut figures = Vec::new();
    for &seq in seq {
        for &head_dim in head_dim {
            figures.extend(measure(bench, seq, heads, head_dim, &peaks));
        }
    }
    figures
}

fn measure(bench: &Bench, seq: usize, heads: usize, head_dim: usize, peaks: &Peaks) -> [Figure; 2] {
    let n = seq * heads * head_dim;
    let mut plan = Plan::new();
    let mut real = |n| plan.alloc::<f32>(Category::Activations, "values", n);
    let (out, lse, dout, delta) = (real(n), real(seq * heads), real(n), real(seq * heads));
    let [dq, dk, dv] = [(); 3].map(|()| real(n));
    let [q, k, v] = [(); 3].map(|()| AttnBuf::Bf16(plan.alloc(Category::Activations, "values", n)));
    let limits = Limits {
        width: heads * head_dim,
        head_dim,
        group_size: 128,
    };
    let mut host = bench.host(&mut plan, limits);
    let bytes = plan.total_bytes() as f64;
    for (stream, to) in [q, k, v].into_iter().enumerate() {
        host.write(dout, &uniform(stream as u32, n));
        host.round_attention(dout, to);
    }
    host.write(dout, &uniform(3, n));
    let segments = [Segment::own(0, seq)];
    let forward = Attention {
        q,
        k,
        v,
        out,
        lse,
        segments: &segments,
        blocks: None,
        num_heads: heads,
        num_kv_heads: heads,
        head_dim,
    };
    let backward = AttentionBackward {
        forward,
        dout,
        delta,
        dq,
        dk,
        dv,
    };
    let product = (seq * (seq + 1) / 2) as f64 * (heads * head_dim) as f64;
    let figure = |kind, products, seconds| Figure {
        name: format!("attention {kind}, seq {seq}, {heads} x {head_dim}"),
        seconds,
        work: products * product,
        unit: Unit::MultiplyAdds,
        limit: Some(peaks.bf16),
        facts: vec![("MiB", bytes / f64::from(1 << 20))],
    };
    let forward_time = bench.median(|| host.attention(forward));
    let backward_time = bench.median(|| host.attention_backward(backward));
    // Backward: the scores once more, dp, dq, dk and dv.
    [
        figure("forward", 2.0, forward_time),
        figure("backward", 5.0, backward_time),
    ]
}
