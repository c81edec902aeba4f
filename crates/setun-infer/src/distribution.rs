//! The tokens that a sampler may still choose, with their weights.

/// Tokens in ascending order of ids, each with a weight of at least 0. Probabilities are
/// weights over their sum, so nothing is divided until it has to be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Distribution {
    weights: Vec<(u32, f64)>,
}

impl Distribution {
    /// From weights in ascending order of ids, no id twice.
    pub fn new(weights: Vec<(u32, f64)>) -> Self {
        debug_assert!(weights.is_sorted_by(|a, b| a.0 < b.0));
        Self { weights }
    }

    /// All weight on one token.
    pub fn point(token: u32) -> Self {
        Self::new(vec![(token, 1.0)])
    }

    /// Tokens with their weights, in ascending order of ids.
    pub fn weights(&self) -> &[(u32, f64)] {
        &self.weights
    }

    /// Sum of the weights, in the order of ids.
    pub fn total(&self) -> f64 {
        self.weights.iter().fold(0.0, |sum, (_, w)| sum + w)
    }

    /// The token at `uniform` in `[0, 1)` of the cumulative distribution; none if nothing
    /// has any weight. A weight of 0 is never chosen: it does not raise the sum.
    pub fn pick(&self, uniform: f64) -> Option<u32> {
        let target = uniform * self.total();
        let mut below = 0.0;
        let chosen = self.weights.iter().find(|(_, weight)| {
            below += weight;
            below > target
        });
        chosen.map(|&(token, _)| token)
    }

    /// The token with the largest weight, the lowest id among equals.
    pub fn best(&self) -> Option<u32> {
        let better = |best: (u32, f64), &next: &(u32, f64)| match next.1 > best.1 {
            true => next,
            false => best,
        };
        let first = *self.weights.first()?;
        Some(self.weights.iter().fold(first, better).0)
    }

    /// Probability of `token`; 0 where it has no weight.
    pub fn probability(&self, token: u32) -> f64 {
        let at = self.weights.binary_search_by_key(&token, |&(id, _)| id);
        at.map_or(0.0, |i| match self.weights[i].1 {
            0.0 => 0.0,
            weight => weight / self.total(),
        })
    }

    /// Without `token`: what is left when it is known not to be chosen.
    #[must_use]
    pub fn without(&self, token: u32) -> Self {
        let others = self.weights.iter().filter(|&&(id, _)| id != token);
        Self::new(others.copied().collect())
    }

    /// `max(0, p - q)` over the tokens of `self`, with probabilities `p` of `self` and `q`
    /// of `proposal`.
    #[must_use]
    pub fn residual(&self, proposal: &Self) -> Self {
        let (p_total, q_total) = (self.total(), proposal.total());
        let mut q = proposal.weights.iter().peekable();
        let left = self.weights.iter().map(|&(id, weight)| {
            while q.next_if(|&&(other, _)| other < id).is_some() {}
            let same = q.next_if(|&&(other, _)| other == id);
            let proposed = same.map_or(0.0, |&(_, w)| w / q_total);
            (id, (weight / p_total - proposed).max(0.0))
        });
        Self::new(left.filter(|&(_, weight)| weight > 0.0).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picks_by_the_cumulative_distribution() {
        let d = Distribution::new(vec![(2, 1.0), (5, 0.0), (9, 3.0)]);
        let picked = [0.0, 0.2499, 0.25, 0.999].map(|u| d.pick(u).unwrap());
        assert_eq!(picked, [2, 2, 9, 9]);
        assert_eq!((d.probability(9), d.probability(5)), (0.75, 0.0));
        assert_eq!((d.probability(1), d.best()), (0.0, Some(9)));
        assert_eq!(Distribution::default().pick(0.5), None);
        assert_eq!(Distribution::new(vec![(4, 1.0), (7, 1.0)]).best(), Some(4));
    }

    #[test]
    fn residuals_keep_what_the_proposal_lacks() {
        let p = Distribution::new(vec![(0, 2.0), (1, 1.0), (3, 1.0)]);
        let q = Distribution::new(vec![(0, 1.0), (1, 3.0), (2, 4.0)]);
        let left = Distribution::new(vec![(0, 0.375), (3, 0.25)]);
        assert_eq!(p.residual(&q), left);
        assert_eq!(p.residual(&Distribution::point(0)).weights()[0], (1, 0.25));
        assert_eq!(p.without(1).weights(), [(0, 2.0), (3, 1.0)]);
    }
}
