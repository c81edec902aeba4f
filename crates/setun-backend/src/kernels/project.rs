//! Projection of rows of latent weights.

use crate::ops::{ProjectError, ProjectStats};
use crate::real::Real;
use setun_ternary::{ScaleRule, groups_per_row, project_group};

/// Largest group that a projection handles.
pub const MAX_GROUP: usize = 1024;

/// Projects rows of `cols` latents; `trits` holds the projection before and after.
/// Rows in errors count from the first row of the slice.
pub fn project_rows<R: Real>(
    latents: &[R],
    cols: usize,
    group_size: usize,
    rule: ScaleRule,
    trits: &mut [i8],
    scales: &mut [f32],
) -> Result<ProjectStats, ProjectError> {
    assert!(
        group_size <= MAX_GROUP,
        "groups of {group_size} weights; at most {MAX_GROUP}"
    );
    let mut stats = ProjectStats::default();
    let (mut values, mut fresh) = ([0.0f32; MAX_GROUP], [0i8; MAX_GROUP]);
    let groups = groups_per_row(cols, group_size);
    let rows = latents
        .chunks(cols)
        .zip(trits.chunks_mut(cols))
        .zip(scales.chunks_mut(groups));
    for (row, ((latents, trits), scales)) in rows.enumerate() {
        let parts = latents
            .chunks(group_size)
            .zip(trits.chunks_mut(group_size))
            .zip(scales);
        for (group, ((latents, trits), scale)) in parts.enumerate() {
            let n = latents.len();
            for (value, latent) in values.iter_mut().zip(latents) {
                *value = latent.to_f32();
            }
            *scale = project_group(&values[..n], rule, &mut fresh[..n])
                .map_err(|why| ProjectError { row, group, why })?;
            let both = fresh[..n].iter().zip(&*trits);
            stats.flips += both.map(|(a, b)| u64::from(a != b)).sum::<u64>();
            stats.zeros += fresh[..n].iter().map(|&t| u64::from(t == 0)).sum::<u64>();
            trits.copy_from_slice(&fresh[..n]);
        }
    }
    Ok(stats)
}
