//! Training a tokenizer with the structure of Qwen2's.

use super::TokenizerError;
use super::{END_OF_TEXT, MAX_VOCAB_SIZE, MIN_VOCAB_SIZE, Pieces, QWEN_PATTERN, failed};
use std::sync::atomic::{AtomicU64, Ordering};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer};

/// Most bytes of text: the trainer counts pairs in i32.
const MAX_BYTES: u64 = i32::MAX as u64;

/// See [`super::Tokenizer::train`].
pub(super) fn train<T: AsRef<str>>(
    texts: impl Iterator<Item = T> + Send,
    vocab_size: usize,
) -> Result<Tokenizer, TokenizerError> {
    if !(MIN_VOCAB_SIZE..=MAX_VOCAB_SIZE).contains(&vocab_size) {
        return Err(TokenizerError::VocabSize { found: vocab_size });
    }
    let mut tokenizer = untrained()?;
    // The special token is added afterwards: that gives it the last id.
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size - 1)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let num_bytes = AtomicU64::new(0);
    let fits = |text: &T| {
        let len = text.as_ref().len() as u64;
        num_bytes.fetch_add(len, Ordering::Relaxed) + len <= MAX_BYTES
    };
    let pieces = texts.take_while(fits).flat_map(|text| {
        Pieces::new(text.as_ref(), true)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    });
    let mut trainer = TrainerWrapper::from(trainer);
    tokenizer.train(&mut trainer, pieces).map_err(failed)?;
    if num_bytes.into_inner() > MAX_BYTES {
        return Err(TokenizerError::CorpusTooLarge { max: MAX_BYTES });
    }
    let end_of_text = AddedToken::from(END_OF_TEXT, true);
    tokenizer
        .add_special_tokens([end_of_text])
        .map_err(failed)?;
    let largest = tokenizer.get_vocab_size(true);
    if largest < vocab_size {
        let found = vocab_size;
        return Err(TokenizerError::CorpusTooSmall { found, largest });
    }
    Ok(tokenizer)
}

/// Everything of Qwen2's tokenizer but the vocabulary.
fn untrained() -> Result<Tokenizer, TokenizerError> {
    let byte_level = ByteLevel::new(false, false, false);
    let pattern = SplitPattern::Regex(QWEN_PATTERN.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(failed)?;
    let pre_tokenizers = vec![
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(byte_level),
    ];
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer
        .with_normalizer(Some(NFC))
        .map_err(failed)?
        .with_pre_tokenizer(Some(Sequence::new(pre_tokenizers)))
        .with_post_processor(Some(byte_level))
        .with_decoder(Some(byte_level));
    Ok(tokenizer)
}
