//! How much cache `setun generate` takes.

use super::beam_request;
use crate::args::{Drafting, GenerateArgs};
use setun_backend::{CACHE_BLOCK, CacheShape, Isa};
use setun_infer::{EngineError, EngineOptions, Request, exact_cache, spec_of};
use setun_io::OpenModel;
use setun_train::machine;

/// Most sequences that are decoded together.
const MAX_SEQUENCES: usize = 64;
/// The cache takes at most one in so many parts of the free memory, unless one request alone
/// needs more: the others wait.
const PARTS: usize = 4;
/// Blocks behind a text for its drafts.
const DRAFT_BLOCKS: usize = 2;

/// With room for the longest request, and for as many together as is worth it.
///
/// # Errors
/// What the model on disk computes cannot be said.
pub(super) fn engine_options(
    args: &GenerateArgs,
    model: &OpenModel,
    requests: &[Request],
    isa: Isa,
) -> Result<EngineOptions, EngineError> {
    let config = model.config();
    let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
    let wanted = longest.saturating_add(args.max_tokens);
    let context = wanted.clamp(1, config.max_position_embeddings.max(1));
    let shape = CacheShape {
        kind: match args.kv {
            Some(kind) => kind,
            None => exact_cache(spec_of(model, None)?.numerics),
        },
        num_blocks: 1,
        num_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    };
    let block_bytes = CACHE_BLOCK * shape.token_bytes() * config.num_hidden_layers;
    let free = machine::free_bytes().and_then(|bytes| usize::try_from(bytes).ok());
    let most = free.map(|bytes| bytes / PARTS / block_bytes.max(1));
    let needs = requests.iter().map(|request| match args.beams {
        0 => request.most_blocks(context),
        beams => beam_request(request).most_blocks(beams, context),
    });
    let blocks = match args.draft {
        Drafting::None => {
            let together = MAX_SEQUENCES / args.beams.max(1);
            cache_blocks(needs.collect(), together, most)
        }
        // One text after the other.
        Drafting::Ngram | Drafting::Model(_) => {
            cache_blocks(needs.collect(), 1, most).saturating_add(DRAFT_BLOCKS)
        }
    };
    Ok(EngineOptions {
        cache: args.kv,
        cache_tokens: Some(blocks.saturating_mul(CACHE_BLOCK)),
        ..EngineOptions::new(context, machine::threads(args.threads), isa)
    })
}

/// Blocks for `together` of the requests that need so many each, the largest ones, or for as
/// many as `most` blocks hold; always for one.
fn cache_blocks(mut needs: Vec<usize>, together: usize, most: Option<usize>) -> usize {
    needs.sort_unstable();
    let largest = needs.last().copied().unwrap_or(0).max(1);
    let wanted = needs.iter().rev().take(together);
    let wanted = wanted.fold(0, |sum: usize, &need| sum.saturating_add(need));
    wanted.min(most.unwrap_or(usize::MAX)).max(largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_holds_what_is_decoded_together_and_always_one_request() {
        let blocks = |together, most| cache_blocks(vec![2, 5, 3], together, most);
        assert_eq!([1, 2, 64].map(|n| blocks(n, None)), [5, 8, 10]);
        // A beam search of more than all sequences.
        assert_eq!(blocks(0, None), 5);
        assert_eq!([9, 6, 1].map(|most| blocks(64, Some(most))), [9, 6, 5]);
        assert_eq!(cache_blocks(vec![usize::MAX; 2], 2, None), usize::MAX);
    }
}
