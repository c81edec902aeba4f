//! From sources to batches: documents, split, tokenizer, tokens, facts for the report.

use crate::TrainError;
use crate::checkpoint::DataIdentity;
use crate::data::{
    Baselines, Batches, ChatOptions, Corpus, DataFormat, DocumentOptions, EvalWindows, Overlap,
    Split, TokenSet, expand_sources, load_documents_with, tokens::FIXED_ORDER,
};
use crate::report::record::{Baseline, DataFacts, DuplicatePair, Duplicates};
use crate::run::Observer;
use crate::settings::Settings;
use setun_formats::{ChatLimits, ChatTemplate, Qwen3Config, RopeConfig, Tokenizer};
use setun_io::OpenModel;
use std::cell::RefCell;
use std::path::{Path, PathBuf};

/// Ending of token files.
const TOKEN_FILE: &str = "tokens";

/// Data ready for training.
pub struct Prepared {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Training batches.
    pub batches: Batches,
    /// Held-out windows.
    pub windows: EvalWindows,
    /// Facts for the report.
    pub facts: DataFacts,
    /// What resume checks.
    pub identity: DataIdentity,
}

/// Both sides of the split, as tokens.
struct Sides {
    tokenizer: Tokenizer,
    train: TokenSet,
    valid: TokenSet,
    facts: DataFacts,
}

/// Reads and prepares everything that `settings.data` names. Tokens that would take much
/// memory go into files without names in the folder `output`, or, since that is made when it is
/// sure that there will be a run, the nearest above it.
///
/// # Errors
/// Text, tokenizer or tokens that cannot be used.
pub fn prepare(
    settings: &Settings,
    init: Option<&OpenModel>,
    output: &Path,
    observer: &mut dyn Observer,
) -> Result<Prepared, TrainError> {
    let from_tokens = settings.data.train.iter().any(|path| is_token_file(path));
    let mut sides = match from_tokens {
        true => from_token_files(settings, init)?,
        false => from_text(settings, init, existing_folder(output), observer)?,
    };
    sides.facts.train_tokens = sides.train.num_tokens();
    sides.facts.valid_tokens = sides.valid.num_targets();
    sides.facts.valid_bytes = sides.valid.info().raw_bytes;
    sides.facts.train_documents = sides.train.document_starts().len() as u64;
    sides.facts.valid_documents = sides.valid.document_starts().len() as u64;
    sides.facts.vocab_size = sides.tokenizer.vocab_size();
    let identity = DataIdentity {
        tokenizer: blake3::hash(sides.tokenizer.to_json().as_bytes())
            .to_hex()
            .to_string(),
        train: sides.train.content_hash()?.to_hex().to_string(),
        valid: sides.valid.content_hash()?.to_hex().to_string(),
    };
    sides.facts.tokenizer_hash = identity.tokenizer.clone();
    let train = &settings.train;
    let seed = settings.run.seed;
    Ok(Prepared {
        tokenizer: sides.tokenizer,
        batches: Batches::new(sides.train, train.seq_len, train.batch_size, seed)?,
        windows: EvalWindows::new(sides.valid, train.seq_len, settings.eval.batch_size)?,
        facts: sides.facts,
        identity,
    })
}

/// `path`, or the nearest folder above it that exists.
fn existing_folder(path: &Path) -> &Path {
    let exists = |folder: &&Path| folder.is_dir();
    path.ancestors().find(exists).unwrap_or(Path::new("."))
}

/// Count models on the held-out tokens.
///
/// # Errors
/// Tokens that cannot be read.
pub fn baselines(prepared: &Prepared) -> Result<Vec<Baseline>, TrainError> {
    let measured = Baselines::measure(prepared.batches.tokens(), prepared.windows.tokens())?;
    let (tokens, bytes) = (prepared.facts.valid_tokens, prepared.facts.valid_bytes);
    let each = [
        ("unigram", measured.unigram),
        ("interpolated bigram", measured.bigram),
        ("interpolated trigram", measured.trigram),
    ];
    // A large corpus is not counted to its end, which the name must say.
    let all = prepared.batches.tokens().num_tokens();
    let of = match measured.num_train_tokens {
        counted if counted < all => format!(" of the first {counted} tokens"),
        _ => String::new(),
    };
    let baseline = |(name, loss): (&str, f64)| Baseline {
        name: format!("{name}{of}"),
        loss,
        bits_per_byte: loss * tokens as f64 / (std::f64::consts::LN_2 * bytes as f64),
        tokens,
    };
    Ok(each.into_iter().map(baseline).collect())
}

/// The shape that `settings` ask for, with the vocabulary of the tokenizer.
///
/// # Errors
/// A shape that is no model.
pub fn model_config(
    settings: &Settings,
    vocab_size: usize,
    end_of_text: Option<u32>,
) -> Result<Qwen3Config, TrainError> {
    let m = &settings.model;
    let config = Qwen3Config {
        vocab_size,
        hidden_size: m.hidden_size,
        intermediate_size: m.intermediate_size,
        num_hidden_layers: m.num_hidden_layers,
        num_attention_heads: m.num_attention_heads,
        num_key_value_heads: m.num_key_value_heads,
        head_dim: m.head_dim,
        max_position_embeddings: m.max_position_embeddings,
        rms_norm_eps: m.rms_norm_eps,
        tie_word_embeddings: m.tie_word_embeddings,
        rope: RopeConfig {
            rope_theta: m.rope_theta,
            yarn: None,
        },
        bos_token_id: None,
        eos_token_ids: end_of_text.into_iter().collect(),
    };
    config.validate()?;
    Ok(config)
}

fn is_token_file(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == TOKEN_FILE)
}

/// A tokenizer that already exists: the one that is named, else that of the model which
/// training starts from.
fn given_tokenizer(
    settings: &Settings,
    init: Option<&OpenModel>,
) -> Result<Option<Tokenizer>, TrainError> {
    let Some(path) = &settings.tokenizer.path else {
        return Ok(init.map(OpenModel::tokenizer).transpose()?.flatten());
    };
    let bytes = std::fs::read(path)
        .map_err(|e| TrainError::refused(format!("cannot read {}: {e}", path.display())))?;
    let tokenizer = Tokenizer::from_bytes(&bytes)
        .map_err(|e| TrainError::refused(format!("{}: {e}", path.display())))?;
    Ok(Some(tokenizer))
}

fn from_token_files(settings: &Settings, init: Option<&OpenModel>) -> Result<Sides, TrainError> {
    let one = |key: &str, paths: &[PathBuf]| match paths {
        [path] if is_token_file(path) => Ok(path.clone()),
        _ => Err(TrainError::refused(format!(
            "{key} must name exactly one .tokens file where data.train does; tokenize the \
             other sources too, or give text on both sides"
        ))),
    };
    let train = TokenSet::open(&one("data.train", &settings.data.train)?)?;
    let valid = TokenSet::open(&one("data.valid", &settings.data.valid)?)?;
    let tokenizer = given_tokenizer(settings, init)?.ok_or_else(|| {
        TrainError::refused("token files need their tokenizer: give tokenizer.path")
    })?;
    train.check_tokenizer(&tokenizer)?;
    valid.check_tokenizer(&tokenizer)?;
    let facts = DataFacts {
        train_hash: train.content_hash()?.to_hex().to_string(),
        valid_hash: valid.content_hash()?.to_hex().to_string(),
        sources: sources(settings),
        ..DataFacts::default()
    };
    Ok(Sides {
        tokenizer,
        train,
        valid,
        facts,
    })
}

fn sources(settings: &Settings) -> Vec<String> {
    let all = settings.data.train.iter().chain(&settings.data.valid);
    all.map(|path| path.display().to_string()).collect()
}

fn from_text(
    settings: &Settings,
    init: Option<&OpenModel>,
    spill: &Path,
    observer: &mut dyn Observer,
) -> Result<Sides, TrainError> {
    let given = given_tokenizer(settings, init)?;
    let chat = chat_options(settings.data.format, init, given.as_ref())?;
    let (corpus, split, facts) = split_corpus(settings, &chat)?;
    let tokenizer = match given {
        Some(tokenizer) => tokenizer,
        None => {
            observer.message("training the tokenizer on the training documents");
            corpus.train_tokenizer(&split.train, settings.tokenizer.vocab_size)?
        }
    };
    let observer = RefCell::new(observer);
    let encode = |side: &[usize], what: &str, seed: u64| {
        let progress = |done: u64, total: u64| {
            observer.borrow_mut().progress(what, done, total, "");
        };
        TokenSet::encode(&corpus, side, &tokenizer, seed, Some(spill), &progress)
    };
    let train = encode(&split.train, "tokenizing training text", settings.run.seed)?;
    let valid = encode(&split.valid, "tokenizing held-out text", FIXED_ORDER)?;
    Ok(Sides {
        tokenizer,
        train,
        valid,
        facts,
    })
}

/// How conversations become text for `model`: with its chat template, or the built-in one.
///
/// # Errors
/// A template that cannot be read or used.
pub fn chat_options(
    format: DataFormat,
    model: Option<&OpenModel>,
    tokenizer: Option<&Tokenizer>,
) -> Result<ChatOptions, TrainError> {
    let own = model.map(OpenModel::chat_template).transpose()?.flatten();
    let template = match (own, model) {
        (Some(source), Some(model)) => {
            let template = ChatTemplate::from_text(&source, ChatLimits::default());
            template
                .map_err(|e| TrainError::refused(format!("{}: {e}", model.directory().display())))?
        }
        _ => ChatTemplate::ChatMl,
    };
    Ok(ChatOptions::new(format, template, tokenizer))
}

/// Documents, split before anything else, with what was found about them.
fn split_corpus(
    settings: &Settings,
    chat: &ChatOptions,
) -> Result<(Corpus, Split, DataFacts), TrainError> {
    let data = &settings.data;
    let options = DocumentOptions {
        split_on: data.split_on.clone(),
        text_field: data.text_field.clone(),
        min_document_chars: data.min_document_chars,
    };
    // Paths are absolute since the settings were loaded.
    let base = Path::new("");
    let named = |paths: &[PathBuf]| -> Vec<String> {
        paths
            .iter()
            .map(|p| p.to_string_lossy().into_owned())
            .collect()
    };
    let (train, valid) = (named(&data.train), named(&data.valid));
    let all: Vec<String> = train.iter().chain(&valid).cloned().collect();
    let corpus = load_documents_with(&all, base, &options, chat)?;
    let mut split = match valid.is_empty() {
        true => Split::by_fraction(&corpus, data.valid_fraction, settings.run.seed)?,
        false => Split::by_files(&corpus, &expand_sources(&valid, base)?)?,
    };
    let overlap = Overlap::find(&corpus, &split)?;
    let duplicates = duplicate_facts(&corpus, &split, &overlap, data.drop_near_duplicates)?;
    // A short text shares no gram: only its exact copies are known.
    let shared = [overlap.train_to_drop(), &split.exact_duplicates[..]].concat();
    if data.drop_near_duplicates && !shared.is_empty() {
        split = split.without_train(&corpus, &shared)?;
    }
    let facts = DataFacts {
        train_hash: split.train_hash.clone(),
        valid_hash: split.valid_hash.clone(),
        short_documents: corpus.short_documents.map_or(0, |s| s.count as u64),
        duplicates: Some(duplicates),
        sources: sources(settings),
        ..DataFacts::default()
    };
    Ok((corpus, split, facts))
}

/// What is on both sides of `split`; where `dropped`, it is about to be left out of training.
fn duplicate_facts(
    corpus: &Corpus,
    split: &Split,
    overlap: &Overlap,
    dropped: bool,
) -> Result<Duplicates, TrainError> {
    const EXAMPLES: usize = 5;
    let shares = split.valid.iter().zip(&overlap.valid_shares);
    let touched = shares.filter(|(_, share)| share.is_some_and(|share| share > 0.0));
    let touched = touched.map(|(&document, _)| document);
    let touched: Vec<usize> = touched.take(EXAMPLES).collect();
    let nearest = overlap.nearest(corpus, &touched)?;
    let examples = touched.iter().zip(nearest).filter_map(|(&valid, nearest)| {
        let (train, similarity) = nearest?;
        Some(DuplicatePair {
            valid: corpus.place(valid),
            train: corpus.place(train),
            similarity,
        })
    });
    let exact = &split.exact_duplicates;
    let near = overlap.train_documents.iter();
    let near = near.filter(|document| exact.binary_search(document).is_err());
    let (num_exact, num_near) = (exact.len() as u64, near.count() as u64);
    // Every document with a shared gram is left out, so that no gram is shared any more.
    let (exact_dropped, dropped, across_split) = match dropped {
        true => (num_exact, num_near, 0),
        false => (0, 0, overlap.num_valid_touched() as u64),
    };
    Ok(Duplicates {
        exact: num_exact,
        exact_dropped: Some(exact_dropped),
        dropped,
        across_split,
        examples: examples.collect(),
    })
}
