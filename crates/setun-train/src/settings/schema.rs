//! The one table of settings. Each entry gives a key its type, default and meaning;
//! the structs, the recipe reader, the flags, the help text and `settings.toml` all
//! follow from it. To add a setting, add a line here (and its checks to `validate`).

use std::path::{Path, PathBuf};

use setun_ternary::ScaleRule;
use toml::Value;

use super::Settings;
use super::value::{
    NumericsChoice, OptimizerKind, OptimizerState, ScaleRounding, ScheduleKind, SettingValue, Ste,
};
use crate::data::{DataFormat, SplitOn};
use setun_io::{ExportDtype, Format};

/// One setting: what a recipe calls it, what it means, how to reach it.
pub struct Key {
    /// Section of the recipe, as `train`.
    pub section: &'static str,
    /// Name within the section, as `lr`.
    pub name: &'static str,
    /// Both, as `train.lr`; with two dashes in front it is the flag.
    pub path: &'static str,
    /// Meaning in a sentence or two.
    pub doc: &'static str,
    /// Stands for the value in help texts.
    pub placeholder: &'static str,
    /// Whether it takes a list, so that a repeated flag adds to it.
    pub is_list: bool,
    /// Whether it is true or false, so that the bare flag means true.
    pub is_switch: bool,
    /// What a value must be, for error messages.
    pub expected: fn() -> String,
    /// The allowed names, when there is a closed list of them.
    pub choices: fn() -> Vec<&'static str>,
    /// The TOML value that the text of a flag stands for.
    pub(super) flag_to_toml: fn(&str) -> Value,
    /// Sets the field; false if the value does not fit. Paths are relative to the last argument.
    pub(super) read: fn(&mut Settings, &Value, &Path) -> bool,
    /// The field as TOML.
    pub(super) write: fn(&Settings) -> Value,
}

macro_rules! settings {
    ($(
        #[doc = $section_doc:literal]
        $section:ident: $Section:ident {
            $( $( #[doc = $doc:literal] )+ $key:ident: $type:ty = $default:expr, )+
        }
    )+) => {
        $(
            #[doc = concat!("`[", stringify!($section), "]`:", $section_doc)]
            #[derive(Clone, Debug, PartialEq)]
            pub struct $Section {
                $( $( #[doc = $doc] )+ pub $key: $type, )+
            }

            impl Default for $Section {
                fn default() -> Self {
                    Self { $( $key: $default, )+ }
                }
            }
        )+

        static SECTIONS: &[(&str, &str)] = &[
            $( (stringify!($section), $section_doc.trim_ascii()), )+
        ];

        static KEYS: &[Key] = &[$($(
            Key {
                section: stringify!($section),
                name: stringify!($key),
                path: concat!(stringify!($section), ".", stringify!($key)),
                doc: concat!($( $doc ),+).trim_ascii(),
                placeholder: <$type as SettingValue>::PLACEHOLDER,
                is_list: <$type as SettingValue>::IS_LIST,
                is_switch: <$type as SettingValue>::IS_SWITCH,
                expected: <$type as SettingValue>::expected,
                choices: <$type as SettingValue>::choices,
                flag_to_toml: <$type as SettingValue>::flag_to_toml,
                read: |settings, value, base| {
                    let read = <$type as SettingValue>::from_toml(value, base);
                    read.map(|value| settings.$section.$key = value).is_some()
                },
                write: |settings| settings.$section.$key.to_toml(),
            },
        )+)+];
    };
}

settings! {
    /// The run and its directory.
    run: RunSettings {
        /// Name of the run; when empty, the file name of the recipe without `.toml`.
        name: String = String::new(),
        /// Run directory; when empty, `runs/NAME` in the current directory.
        output: Option<PathBuf> = None,
        /// Seed of the initial weights, the split and the order of the data.
        seed: u64 = 1,
        /// Number of threads, 0 for all cores. Results do not depend on it.
        threads: usize = 0,
    }
    /// Text to learn from.
    data: DataSettings {
        /// Text files (.txt, .jsonl), token files (.tokens), folders or patterns
        /// such as `texts/*.txt`.
        train: Vec<PathBuf> = Vec::new(),
        /// The same for held-out text; when empty, part of the training documents.
        valid: Vec<PathBuf> = Vec::new(),
        /// Share of the documents that is held out when `valid` is empty.
        valid_fraction: f64 = 0.1,
        /// What separates documents within a text file; a pattern matches the start of
        /// a document's first line.
        split_on: SplitOn = SplitOn::BlankLines,
        /// What .jsonl lines hold; auto takes those with messages for conversations, of
        /// which only the assistant's turns are learned.
        format: DataFormat = DataFormat::Auto,
        /// Field of a .jsonl line that holds the text.
        text_field: String = "text".to_owned(),
        /// Documents with fewer characters are kept, but counted and reported.
        min_document_chars: usize = 16,
        /// Whether attention stops at document boundaries.
        document_mask: bool = false,
        /// Whether training documents that equal or nearly equal a held-out one are left
        /// out; they are reported either way.
        drop_near_duplicates: bool = false,
    }
    /// Text to tokens.
    tokenizer: TokenizerSettings {
        /// A tokenizer.json to use; when empty, one is trained on the training text.
        path: Option<PathBuf> = None,
        /// Entries of the trained tokenizer, special tokens included; unused with `path`.
        vocab_size: usize = 2048,
    }
    /// Shape and number format of the model; with --init the shape is that model's.
    model: ModelSettings {
        /// Width of the residual stream.
        hidden_size: usize = 256,
        /// Width inside the feed-forward block.
        intermediate_size: usize = 768,
        /// Number of layers.
        num_hidden_layers: usize = 4,
        /// Number of query heads.
        num_attention_heads: usize = 4,
        /// Number of key and value heads; divides the number of query heads.
        num_key_value_heads: usize = 2,
        /// Width of a head; even.
        head_dim: usize = 64,
        /// Whether the output head is the embedding matrix.
        tie_word_embeddings: bool = true,
        /// Longest sequence that the exported model states it can handle.
        max_position_embeddings: usize = 1024,
        /// Base of the rotary position frequencies.
        rope_theta: f64 = 1e6,
        /// Added to the mean square in RMSNorm.
        rms_norm_eps: f64 = 1e-6,
        /// Whether matrices are ternary; false trains the dense twin.
        ternary: bool = true,
        /// Number of weights along a row that share one scale.
        group_size: usize = 128,
        /// How the scale of a group follows from its weights.
        scale_rule: ScaleRule = ScaleRule::Mean,
        /// What scales are rounded to. f16 is an experiment without exports, with the rule
        /// mean only.
        scale_rounding: ScaleRounding = ScaleRounding::Bf16,
        /// Whether embedding and head are ternary too; false is an experiment without exports.
        ternary_embedding: bool = true,
        /// Whether the scale of each group has a learned factor; an experiment without exports,
        /// with the rule mean only.
        learned_scales: bool = false,
        /// Bound of the logits, softcap * tanh(logit / softcap); 0 for none. An experiment
        /// without exports.
        logit_softcap: f64 = 0.0,
        /// Arithmetic of the products; auto is int8 for ternary models, bf16 for dense ones.
        numerics: NumericsChoice = NumericsChoice::Auto,
        /// Standard deviation of the initial matrices; 0 for fan_in^-0.5.
        init_std: f64 = 0.0,
        /// Whether matrices that write to the residual stream start smaller,
        /// by (2 * num_hidden_layers)^-0.5.
        init_depth_scale: bool = true,
        /// Model to start from instead of random weights: a run, a checkpoint or an
        /// export (the same as --init).
        init_from: Option<PathBuf> = None,
    }
    /// Optimization.
    train: TrainSettings {
        /// Number of steps.
        steps: u64 = 400,
        /// Sequences in a step.
        batch_size: usize = 16,
        /// Sequences processed at a time, for less memory; 0 for all. Divides `batch_size`.
        micro_batch_size: usize = 0,
        /// Tokens in a sequence.
        seq_len: usize = 128,
        /// What updates the weights: adamw, or muon for the matrices of the layers.
        optimizer: OptimizerKind = OptimizerKind::Adamw,
        /// Peak learning rate (docs/recipe.md has what was measured).
        lr: f64 = 3e-3,
        /// With muon, peak learning rate of what AdamW updates beside it: embedding, head and
        /// norms; 0 for `lr`.
        adamw_lr: f64 = 0.0,
        /// Decay of Muon's momentum.
        muon_momentum: f64 = 0.95,
        /// Last learning rate as a share of the peak.
        min_lr_ratio: f64 = 0.1,
        /// Steps in which the learning rate rises to its peak.
        warmup_steps: u64 = 20,
        /// How the learning rate moves.
        schedule: ScheduleKind = ScheduleKind::TwoStage,
        /// Second peak of the two-stage schedule as a share of the first.
        second_peak_ratio: f64 = 0.6,
        /// Share of the steps after which the wsd schedule decays.
        decay_start: f64 = 0.8,
        /// Decoupled weight decay of matrices; two-stage drops it after two thirds.
        weight_decay: f64 = 0.1,
        /// Decay of AdamW's first moment.
        beta1: f64 = 0.9,
        /// Decay of AdamW's second moment.
        beta2: f64 = 0.95,
        /// Added to the root of AdamW's second moment.
        eps: f64 = 1e-8,
        /// How AdamW's moments are stored; bf16 takes half the memory and rounds by chance.
        optimizer_state: OptimizerState = OptimizerState::F32,
        /// Largest gradient norm, larger ones are scaled down to it; 0 for off.
        grad_clip: f64 = 1.0,
        /// Weight of the squared log-sum-exp of the logits in the loss that is learned, not in
        /// the one that is reported; 0 for none, 1e-4 is usual.
        z_loss: f64 = 0.0,
        /// Share of the values that a step leaves out of the embedding and of what attention and
        /// feed-forward blocks add to the residual stream; 0 for none.
        dropout: f64 = 0.0,
        /// Decay of a moving average of the weights, of which evaluations, checkpoints and
        /// exports then are the projection; 0 for none.
        ema_decay: f64 = 0.0,
        /// How the gradient passes the projection: clipped stops it where `|w| > 1.5 s`.
        ste: Ste = Ste::Identity,
        /// Whether activations are computed again in the backward pass, for less memory.
        recompute: bool = false,
        /// Standard deviations above the mean of the last 128 accepted steps from which on a
        /// loss or gradient norm is a spike, and its step is skipped; 0 for off. A gradient norm
        /// of at most `grad_clip` never is.
        spike_sigma: f64 = 6.0,
        /// If N of the last 2 N steps were skipped, the run returns to an earlier checkpoint
        /// and leaves out the data since then.
        max_bad_steps: usize = 10,
        /// Least number of steps from that checkpoint to where the trouble began.
        rewind_steps: u64 = 100,
        /// How often a run may go back before it stops instead.
        max_rewinds: u64 = 3,
        /// Rows of logits computed at a time; 0 for automatic.
        head_chunk: usize = 0,
        /// Parameters that stay as they are: parts of their names, such as `embed_tokens`,
        /// `layers.0` or `norm`.
        freeze: Vec<String> = Vec::new(),
        /// Steps in which the weights go over from the latents to their projection; 0 projects
        /// from the first step on. Evaluations always use the projection.
        blend_steps: u64 = 0,
        /// Whether the run ends when the held-out loss stops falling.
        early_stop: bool = false,
        /// Evaluations without a better loss that `early_stop` waits for.
        early_stop_patience: usize = 5,
    }
    /// Learning from another model's distribution.
    distill: DistillSettings {
        /// Share of the divergence from the teacher in the loss, beside the cross entropy;
        /// 0 for no teacher.
        weight: f64 = 0.0,
        /// Model to learn from, with the same tokenizer; when empty, the dense model that
        /// training starts from (--init).
        teacher: Option<PathBuf> = None,
        /// Softmax temperature of both sides of the divergence.
        temperature: f64 = 1.0,
    }
    /// A block drafter for speculative decoding (setun train --drafter-for RUN).
    drafter: DrafterSettings {
        /// Its layers.
        num_hidden_layers: usize = 1,
        /// Rows of a block: the last token of the text and the guesses behind it.
        block_size: usize = 6,
        /// Layers of the target whose hidden states it reads; 0 for three, or all of fewer.
        num_target_layers: usize = 0,
        /// Blocks in a window of `train.seq_len` tokens; 0 for one in eight tokens.
        anchors: usize = 0,
        /// Windows of the target's own text to learn from.
        windows: usize = 512,
        /// Windows of held-out text.
        valid_windows: usize = 16,
        /// Tokens of the corpus at the beginning of a window, which the target continues; 0
        /// for an eighth.
        prompt_tokens: usize = 0,
    }
    /// Held-out loss.
    eval: EvalSettings {
        /// Steps between evaluations; 0 for only those before the first and after the last step.
        every: u64 = 50,
        /// Sequences processed at a time; 0 for the micro-batch of training.
        batch_size: usize = 0,
    }
    /// Checkpoints to resume from.
    checkpoint: CheckpointSettings {
        /// Steps between checkpoints; 0 for only one at the end.
        every: u64 = 100,
        /// Newest checkpoints that are kept; the best one is kept besides, and the newest three
        /// that lie `train.rewind_steps` apart, to which a run in trouble goes back.
        keep: usize = 2,
        /// Checkpoints of every so many steps are kept for ever; 0 for none.
        keep_every: u64 = 0,
    }
    /// Sample texts in the report.
    sample: SampleSettings {
        /// Number of held-out documents whose beginning is continued; 0 for none.
        prompts: usize = 5,
        /// Tokens generated for each.
        max_tokens: usize = 80,
        /// Softmax temperature; 0 always takes the likeliest token.
        temperature: f64 = 0.8,
        /// Likeliest tokens to choose from; 0 for all.
        top_k: usize = 40,
        /// Total probability of the tokens to choose from.
        top_p: f64 = 0.95,
        /// Least probability, relative to the likeliest token.
        min_p: f64 = 0.0,
        /// Tokens of the document that make the prompt.
        prompt_tokens: usize = 12,
    }
    /// The finished model.
    export: ExportSettings {
        /// Formats written to RUN/export (see setun convert --help); empty for none.
        formats: Vec<Format> = vec![Format::HuggingFace(ExportDtype::Bf16), Format::Packed],
    }
    /// Progress.
    log: LogSettings {
        /// Steps between lines of metrics.jsonl.
        every: u64 = 1,
        /// Whether TensorBoard event files are written as well.
        tensorboard: bool = false,
    }
}

/// The sections with their meanings, in the order of recipes and help texts.
pub fn sections() -> &'static [(&'static str, &'static str)] {
    SECTIONS
}

/// Every setting, in the order of recipes and help texts.
pub fn keys() -> &'static [Key] {
    KEYS
}

/// The setting with this path, as `train.lr`. Kebab-case spellings are found as well.
pub fn find(path: &str) -> Option<&'static Key> {
    let path = path.replace('-', "_");
    KEYS.iter().find(|key| key.path == path)
}

/// Help text for all settings as flags, with meaning and default of each.
pub fn help() -> String {
    let defaults = Settings::default();
    let mut text = String::new();
    for (section, meaning) in SECTIONS {
        text.push_str(&format!("\n[{section}] {meaning}\n"));
        for key in KEYS.iter().filter(|key| key.section == *section) {
            text.push_str(&help_entry(key, &defaults));
        }
    }
    text
}

fn help_entry(key: &Key, defaults: &Settings) -> String {
    const COLUMN: usize = 38;
    const WIDTH: usize = 100;
    let mut meaning = key.doc.to_owned();
    let choices = (key.choices)();
    if !choices.is_empty() {
        meaning.push_str(&format!(" One of: {}.", choices.join(", ")));
    }
    let default = (key.write)(defaults).to_string();
    // Kept whole at line breaks, as the flags of other commands have it.
    let default = match default.as_str() {
        "\"\"" | "[]" => None,
        _ => Some(format!("[default: {default}]")),
    };

    let flag = format!("  --{} {}", key.path, key.placeholder);
    let mut line = format!("{flag:<COLUMN$}");
    if flag.len() >= COLUMN {
        line = format!("{flag}\n{:COLUMN$}", "");
    }
    let mut text = String::new();
    let mut column = COLUMN;
    for word in meaning.split_whitespace().chain(default.as_deref()) {
        if column > COLUMN && column + 1 + word.len() > WIDTH {
            text.push_str(line.trim_end());
            text.push('\n');
            line = format!("{:COLUMN$}", "");
            column = COLUMN;
        } else if column > COLUMN {
            line.push(' ');
            column += 1;
        }
        line.push_str(word);
        column += word.len();
    }
    text.push_str(&line);
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_by_both_spellings() {
        let snake = find("train.batch_size").map(|key| key.path);
        let kebab = find("train.batch-size").map(|key| key.path);
        assert_eq!(snake, Some("train.batch_size"));
        assert_eq!(kebab, snake);
        assert!(find("batch_size").is_none());
    }

    #[test]
    fn every_key_reads_back_what_it_writes() {
        let defaults = Settings::default();
        for key in keys() {
            let mut settings = Settings::default();
            let value = (key.write)(&defaults);
            assert!(
                (key.read)(&mut settings, &value, Path::new("")),
                "{}",
                key.path
            );
            assert_eq!((key.write)(&settings), value, "{}", key.path);
        }
    }

    #[test]
    fn help_names_every_key_within_100_columns() {
        let help = help();
        for key in keys() {
            assert!(help.contains(&format!("  --{} {}", key.path, key.placeholder)));
        }
        let longest = help.lines().map(|line| line.chars().count()).max();
        assert!(longest <= Some(100), "{longest:?}");
        assert!(
            help.contains(
                "  --train.steps N                     Number of steps. [default: 400]\n"
            )
        );
    }

    #[test]
    fn every_meaning_is_a_sentence() {
        for key in keys() {
            assert!(key.doc.ends_with('.'), "{}: {}", key.path, key.doc);
        }
    }
}
