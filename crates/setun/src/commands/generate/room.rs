//! How much cache `setun generate` takes, before and after it knows the prompts' tokens.

use super::beam_request;
use crate::args::{Drafting, GenerateArgs};
use setun_backend::{CACHE_BLOCK, CacheShape, Isa};
use setun_infer::{EngineError, EngineOptions, Request, exact_cache, spec_of};
use setun_io::OpenModel;
use setun_train::machine;
use std::error::Error;

/// Most sequences that are decoded together.
const MAX_SEQUENCES: usize = 64;
/// The cache takes at most one in so many parts of the free memory, unless one request alone
/// needs more: the others wait.
const PARTS: usize = 4;
/// Blocks behind a text for its drafts.
const DRAFT_BLOCKS: usize = 2;
/// Largest cache that is guessed: fresh memory takes time, too.
const GUESS_BYTES: usize = 32 << 20;

/// Options as if each byte of a prompt were a token, which is more than almost any text has.
/// With them the weights are read while the tokenizer is; [`holds`] says afterwards whether the
/// engine serves. None if the guess would take much memory, or could be too small: what beams
/// need does not always grow with the prompt.
///
/// # Errors
/// As [`engine_options`].
pub(super) fn guess(
    args: &GenerateArgs,
    model: &OpenModel,
    texts: &[String],
    isa: Isa,
) -> Result<Option<EngineOptions>, EngineError> {
    if args.beams > 0 {
        return Ok(None);
    }
    let bytes = |text: &str| Ok::<_, EngineError>(vec![0; text.len()]);
    let requests = super::requests(args, texts, model, bytes)?;
    let options = engine_options(args, model, &requests, isa)?;
    let blocks = cache_tokens(&options).div_ceil(CACHE_BLOCK);
    let block_bytes = block_bytes(args, model)?;
    let is_free = most_blocks(block_bytes).is_none_or(|most| blocks <= most);
    let is_small = blocks.saturating_mul(block_bytes) <= GUESS_BYTES;
    Ok((is_free && is_small).then_some(options))
}

/// Whether an engine with the options `guess` does what one with `needed` would.
pub(super) fn holds(guess: &EngineOptions, needed: &EngineOptions) -> bool {
    guess.context >= needed.context && cache_tokens(guess) >= cache_tokens(needed)
}

fn cache_tokens(options: &EngineOptions) -> usize {
    options.cache_tokens.unwrap_or(options.context)
}

/// Blocks that the cache takes unless one request needs more; None if the system does not say
/// what is free.
fn most_blocks(block_bytes: usize) -> Option<usize> {
    let free = usize::try_from(machine::free_bytes()?).ok()?;
    Some(free / PARTS / block_bytes.max(1))
}

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
    let most = most_blocks(block_bytes(args, model)?);
    let needs = requests.iter().map(|request| match args.beams {
        0 => request.most_blocks(context),
        beams => beam_request(request).most_blocks(beams, context),
    });
    let options = EngineOptions::new(context, machine::threads(args.threads), isa);
    let (blocks, max_rows) = match args.draft {
        Drafting::None => {
            let together = MAX_SEQUENCES / args.beams.max(1);
            let blocks = cache_blocks(needs.collect(), together, most);
            (blocks, options.max_rows.min(rows(args, requests)))
        }
        // One text after the other.
        Drafting::Ngram | Drafting::Model(_) => {
            let blocks = cache_blocks(needs.collect(), 1, most);
            (blocks.saturating_add(DRAFT_BLOCKS), options.max_rows)
        }
    };
    Ok(EngineOptions {
        cache: args.kv,
        cache_tokens: Some(blocks.saturating_mul(CACHE_BLOCK)),
        max_rows,
        ..options
    })
}

/// Refuses a cache that the memory has no room for: the system would end the program instead,
/// without a word.
///
/// # Errors
/// Both sizes, and the flags that make the cache smaller.
pub(super) fn check_room(
    args: &GenerateArgs,
    model: &OpenModel,
    options: &EngineOptions,
) -> Result<(), Box<dyn Error>> {
    let blocks = cache_tokens(options).div_ceil(CACHE_BLOCK);
    let needed = blocks.saturating_mul(block_bytes(args, model)?) as u64;
    match machine::free_bytes() {
        Some(free) if needed > free => {
            let [needed, free] = [needed, free].map(|bytes| bytes as f64 / f64::from(1 << 30));
            let problem = format!(
                "keys and values of such long texts take {needed:.1} GiB, and {free:.1} GiB of \
                 memory are free; lower --max-tokens or --beams, or set --kv int8"
            );
            Err(problem.into())
        }
        _ => Ok(()),
    }
}

/// Rows of the largest step: all prompts, or a token of each sequence. Memory for more would
/// be zeroed for nothing each time that a short text is wanted.
fn rows(args: &GenerateArgs, requests: &[Request]) -> usize {
    let sum = |tokens: usize, request: &Request| tokens.saturating_add(request.prompt.len());
    let of_prompts = requests.iter().fold(0, sum);
    of_prompts.max(requests.len().saturating_mul(args.beams.max(1)))
}

/// Bytes of a block of the cache, over all layers.
fn block_bytes(args: &GenerateArgs, model: &OpenModel) -> Result<usize, EngineError> {
    let config = model.config();
    let shape = CacheShape {
        kind: match args.kv {
            Some(kind) => kind,
            None => exact_cache(spec_of(model, None)?.numerics),
        },
        num_blocks: 1,
        num_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    };
    Ok(CACHE_BLOCK * shape.token_bytes() * config.num_hidden_layers)
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

    #[test]
    fn a_guess_serves_if_nothing_of_it_is_too_small() {
        let options = |context, tokens| EngineOptions {
            cache_tokens: Some(tokens),
            ..EngineOptions::new(context, 1, Isa::Reference)
        };
        let needed = options(20, 32);
        assert!(holds(&needed, &needed) && holds(&options(21, 48), &needed));
        assert!(!holds(&options(19, 48), &needed) && !holds(&options(21, 16), &needed));
    }
}
