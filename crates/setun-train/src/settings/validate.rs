//! Settings that cannot be run, each refused with what to do about it.

use super::{
    OptimizerKind, OptimizerState, Override, ScaleRounding, ScheduleKind, Settings, SettingsError,
    SplitOn, Ste, schema,
};
use setun_backend::kernels::project::MAX_GROUP;
use setun_io::MIN_GROUP_SIZE;
use setun_ternary::{Numerics, ScaleRule};

type Checked = Result<(), SettingsError>;

/// Most threads of a run.
const MAX_THREADS: usize = 1024;
/// Most tokens of a step: far above all that fits into memory, far below what would not fit
/// into the arithmetic of a memory plan.
const MAX_TOKENS: usize = 1 << 36;
/// Bytes and the end-of-text token: the smallest byte-level vocabulary.
const MIN_VOCAB_SIZE: usize = 257;

/// Checks everything that does not depend on the shape of the model.
pub(super) fn validate(settings: &Settings) -> Checked {
    validate_run(settings)?;
    validate_data(settings)?;
    validate_number_format(settings)?;
    validate_training(settings)?;
    validate_optimizer(settings)?;
    validate_adaptation(settings)?;
    validate_schedule(settings)?;
    validate_sampling(settings)
}

/// Checks the shape of the model and the lengths that it limits.
pub(super) fn validate_shape(settings: &Settings) -> Checked {
    let model = &settings.model;
    at_least_one("model.hidden_size", model.hidden_size)?;
    at_least_one("model.intermediate_size", model.intermediate_size)?;
    at_least_one("model.num_hidden_layers", model.num_hidden_layers)?;
    at_least_one("model.num_attention_heads", model.num_attention_heads)?;
    at_least_one("model.num_key_value_heads", model.num_key_value_heads)?;
    at_least_one("model.head_dim", model.head_dim)?;
    at_least_one(
        "model.max_position_embeddings",
        model.max_position_embeddings,
    )?;
    above_zero("model.rope_theta", model.rope_theta)?;
    above_zero("model.rms_norm_eps", model.rms_norm_eps)?;

    let (heads, kv_heads) = (model.num_attention_heads, model.num_key_value_heads);
    refuse_if(
        !heads.is_multiple_of(kv_heads),
        || format!("{heads} query heads cannot share {kv_heads} key and value heads evenly"),
        "make model.num_attention_heads a multiple of model.num_key_value_heads",
    )?;
    refuse_if(
        !model.head_dim.is_multiple_of(2),
        || {
            format!(
                "model.head_dim = {} is odd; rotary positions turn pairs",
                model.head_dim
            )
        },
        "make it even",
    )?;
    validate_lengths(settings)
}

/// Refuses overrides that would make a resumed run compute something else.
pub(super) fn validate_resumed(overrides: &[Override]) -> Checked {
    const SECTIONS: [&str; 5] = ["eval", "checkpoint", "sample", "export", "log"];
    const KEYS: [&str; 3] = ["run.threads", "train.recompute", "train.head_chunk"];
    let wrong = |key: &str| format!("--{key} would change what the resumed run computes");
    let remedy = "start a new run with --init RUN instead";
    allow_only(overrides, (&SECTIONS, &KEYS), wrong, remedy)
}

/// Refuses overrides of anything but these sections and keys.
pub(crate) fn allow_only(
    overrides: &[Override],
    (sections, keys): (&[&str], &[&str]),
    wrong: impl Fn(&str) -> String,
    remedy: &'static str,
) -> Checked {
    for Override { key, .. } in overrides {
        let Some(known) = schema::find(key) else {
            continue; // reported with the nearest key when it is applied
        };
        let allowed = sections.contains(&known.section) || keys.contains(&known.path);
        refuse_if(!allowed, || wrong(key), remedy)?;
    }
    Ok(())
}

fn validate_run(settings: &Settings) -> Checked {
    let threads = settings.run.threads;
    refuse_if(
        threads > MAX_THREADS,
        || format!("run.threads = {threads} is more than {MAX_THREADS}"),
        "use 0 for all cores",
    )?;
    let name = &settings.run.name;
    refuse_if(
        name.contains(['/', '\\']) || name == "." || name == "..",
        || format!("run.name = \"{name}\" is not a file name"),
        "choose a name without slashes, or set run.output to a path",
    )
}

fn validate_data(settings: &Settings) -> Checked {
    let data = &settings.data;
    refuse_if(
        data.train.is_empty(),
        || "there is no training data".to_owned(),
        "add --data.train FILE (several separated by commas; folders and patterns work too), \
         or set train in the [data] section of the recipe",
    )?;
    let fraction = data.valid_fraction;
    refuse_if(
        !(fraction > 0.0 && fraction < 1.0),
        || format!("data.valid_fraction = {fraction} is not between 0 and 1"),
        "hold out a share such as 0.1, or name held-out files in data.valid",
    )?;
    refuse_if(
        data.text_field.is_empty(),
        || "data.text_field is empty".to_owned(),
        "name the field of a .jsonl line that holds the text, as \"text\"",
    )?;
    // Reading it from text compiles a pattern.
    let pattern = data.split_on.to_string().parse::<SplitOn>();
    pattern.map_err(|error| SettingsError::Impossible {
        problem: format!("data.split_on: {error}"),
        remedy: "mend the pattern".to_owned(),
    })?;
    let vocab_size = settings.tokenizer.vocab_size;
    refuse_if(
        settings.tokenizer.path.is_none() && vocab_size < MIN_VOCAB_SIZE,
        || {
            format!(
                "tokenizer.vocab_size = {vocab_size}: no room for the 256 bytes and <|endoftext|>"
            )
        },
        "make it at least 257",
    )
}

fn validate_number_format(settings: &Settings) -> Checked {
    let model = &settings.model;
    refuse_if(
        model.group_size < MIN_GROUP_SIZE,
        || {
            let size = model.group_size;
            format!(
                "model.group_size = {size} is too small: with so few weights to a scale nearly any are ternary"
            )
        },
        "make it at least 8; 128 is usual",
    )?;
    refuse_if(
        model.group_size > MAX_GROUP,
        || format!("model.group_size = {} is too large", model.group_size),
        "make it at most 1024; 128 is usual",
    )?;
    not_negative("model.init_std", model.init_std)?;
    refuse_if(
        !model.ternary && settings.numerics() == Numerics::Int8,
        || "model.numerics = \"int8\" needs ternary weights, but model.ternary = false".to_owned(),
        "set model.numerics to auto, bf16 or f32",
    )?;
    refuse_if(
        model.scale_rounding == ScaleRounding::F16 && model.scale_rule != ScaleRule::Mean,
        || {
            let rule = model.scale_rule.name();
            format!("model.scale_rounding = \"f16\" is measured with the rule mean, not {rule}")
        },
        "drop one of the two",
    )?;
    validate_scales_and_logits(settings)?;
    validate_experiment(settings)?;
    let formats = &settings.export.formats;
    let of_trits = formats.iter().find(|format| !format.holds_floats());
    refuse_if(
        !model.ternary && of_trits.is_some(),
        || {
            let name = of_trits.map_or("", |format| format.name());
            format!("a dense model (model.ternary = false) cannot be exported as {name}")
        },
        "set export.formats to hf or gguf-bf16",
    )
}

fn validate_scales_and_logits(settings: &Settings) -> Checked {
    let model = &settings.model;
    refuse_if(
        model.learned_scales && model.scale_rule != ScaleRule::Mean,
        || {
            let rule = model.scale_rule.name();
            format!("model.learned_scales is measured with the rule mean, not {rule}")
        },
        "drop one of the two",
    )?;
    refuse_if(
        model.learned_scales && !model.ternary,
        || "model.learned_scales needs a ternary model, but model.ternary = false".to_owned(),
        "drop one of the two",
    )?;
    not_negative("model.logit_softcap", model.logit_softcap)?;
    refuse_if(
        model.logit_softcap > 0.0 && settings.distill.weight > 0.0,
        || "model.logit_softcap and distill.weight are both above 0".to_owned(),
        "drop one of the two",
    )
}

/// What is no model that files know has no exports, and no samples, which are drawn from one.
fn validate_experiment(settings: &Settings) -> Checked {
    let Some(experiment) = settings.experiment() else {
        return Ok(());
    };
    refuse_if(
        !settings.export.formats.is_empty(),
        || format!("{experiment} is an experiment that no format can hold"),
        "set export.formats = []",
    )?;
    refuse_if(
        settings.sample.prompts > 0,
        || format!("{experiment} is an experiment whose model no engine runs"),
        "set sample.prompts = 0",
    )?;
    refuse_if(
        settings.model.init_from.is_some(),
        || format!("{experiment} is an experiment that starts from nothing"),
        "drop --init, or the experiment",
    )
}

/// Options of the optimizers.
fn validate_optimizer(settings: &Settings) -> Checked {
    let train = &settings.train;
    let muon = train.optimizer == OptimizerKind::Muon;
    not_negative("train.adamw_lr", train.adamw_lr)?;
    let momentum = train.muon_momentum;
    within("train.muon_momentum", momentum, 0.0, 1.0, Upper::Excluded)?;
    refuse_if(
        !muon && train.adamw_lr > 0.0,
        || "train.adamw_lr is for train.optimizer = \"muon\"".to_owned(),
        "set train.lr, which is AdamW's without Muon",
    )?;
    refuse_if(
        muon && train.optimizer_state != OptimizerState::F32,
        || "train.optimizer = \"muon\" keeps its momentum in f32".to_owned(),
        "set train.optimizer_state = \"f32\"",
    )?;
    within("train.dropout", train.dropout, 0.0, 1.0, Upper::Excluded)?;
    within(
        "train.ema_decay",
        train.ema_decay,
        0.0,
        1.0,
        Upper::Excluded,
    )?;
    refuse_if(
        train.ema_decay > 0.0 && settings.model.learned_scales,
        || "an average of the weights (train.ema_decay) has no learned scales".to_owned(),
        "drop one of the two",
    )?;
    not_negative("train.z_loss", train.z_loss)?;
    refuse_if(
        train.z_loss > 0.0 && settings.distill.weight > 0.0,
        || "train.z_loss and distill.weight are both above 0".to_owned(),
        "drop one of the two: a teacher keeps logits in place",
    )?;
    refuse_if(
        train.ste == Ste::Clipped && !settings.model.ternary,
        || "train.ste = \"clipped\" needs a ternary model, but model.ternary = false".to_owned(),
        "drop one of the two",
    )
}

fn validate_training(settings: &Settings) -> Checked {
    let train = &settings.train;
    at_least_one("train.batch_size", train.batch_size)?;
    at_least_one("train.micro_batch_size", train.micro_batch_size)?;
    at_least_one("train.seq_len", train.seq_len)?;
    at_least_one("train.max_bad_steps", train.max_bad_steps)?;
    not_negative("train.spike_sigma", train.spike_sigma)?;
    at_least_one("train.early_stop_patience", train.early_stop_patience)?;
    at_least_one("eval.batch_size", settings.eval.batch_size)?;
    at_least_one("checkpoint.keep", settings.checkpoint.keep)?;
    refuse_if(
        settings.log.every == 0,
        || "log.every must be at least 1".to_owned(),
        "set log.every = 1 for every step",
    )?;
    let windows = train.batch_size.max(settings.eval.batch_size);
    refuse_if(
        windows.saturating_mul(train.seq_len) > MAX_TOKENS,
        || {
            format!(
                "{windows} sequences of {} tokens are too many",
                train.seq_len
            )
        },
        "lower train.batch_size, eval.batch_size or train.seq_len",
    )?;
    let (micro, batch) = (train.micro_batch_size, train.batch_size);
    refuse_if(
        !batch.is_multiple_of(micro),
        || format!("train.micro_batch_size = {micro} does not divide train.batch_size = {batch}"),
        "choose a divisor, or 0 for the whole batch",
    )?;
    within("train.beta1", train.beta1, 0.0, 1.0, Upper::Excluded)?;
    within("train.beta2", train.beta2, 0.0, 1.0, Upper::Excluded)?;
    above_zero("train.eps", train.eps)?;
    not_negative("train.weight_decay", train.weight_decay)?;
    not_negative("train.grad_clip", train.grad_clip)?;
    refuse_if(
        train.early_stop && settings.eval.every == 0,
        || "train.early_stop needs evaluations, but eval.every = 0".to_owned(),
        "set eval.every to a number of steps",
    )
}

/// Options for training that starts from a dense model.
fn validate_adaptation(settings: &Settings) -> Checked {
    let (train, distill) = (&settings.train, &settings.distill);
    within("distill.weight", distill.weight, 0.0, 1.0, Upper::Included)?;
    above_zero("distill.temperature", distill.temperature)?;
    refuse_if(
        distill.weight > 0.0 && distill.teacher.is_none() && settings.model.init_from.is_none(),
        || "distill.weight is above 0, but there is no teacher".to_owned(),
        "name a model in distill.teacher, or start from a dense one with --init",
    )?;
    refuse_if(
        distill.weight == 0.0 && distill.teacher.is_some(),
        || "there is a teacher, but distill.weight = 0".to_owned(),
        "set distill.weight to the teacher's share of the loss, such as 0.5",
    )?;
    refuse_if(
        train.blend_steps > 0 && !settings.model.ternary,
        || "train.blend_steps needs a ternary model, but model.ternary = false".to_owned(),
        "drop one of the two",
    )?;
    refuse_if(
        train.blend_steps > 0 && train.blend_steps >= train.steps,
        || {
            format!(
                "train.blend_steps = {} leaves none of train.steps = {} to the ternary weights",
                train.blend_steps, train.steps
            )
        },
        "lower train.blend_steps; a fifth of the steps is plenty",
    )?;
    refuse_if(
        train.freeze.iter().any(|name| name.is_empty()),
        || "train.freeze has an empty name".to_owned(),
        "name parts of parameters, such as embed_tokens or layers.0",
    )
}

fn validate_schedule(settings: &Settings) -> Checked {
    let train = &settings.train;
    refuse_if(
        train.steps == 0,
        || "train.steps must be at least 1".to_owned(),
        "give a larger value",
    )?;
    above_zero("train.lr", train.lr)?;
    within(
        "train.min_lr_ratio",
        train.min_lr_ratio,
        0.0,
        1.0,
        Upper::Included,
    )?;
    within(
        "train.second_peak_ratio",
        train.second_peak_ratio,
        0.0,
        1.0,
        Upper::Included,
    )?;
    within(
        "train.decay_start",
        train.decay_start,
        0.0,
        1.0,
        Upper::Excluded,
    )?;
    // Warm-up must be over before the schedule's next corner.
    let (limit, what) = match train.schedule {
        ScheduleKind::TwoStage => (train.steps as f64 * 0.5, "half of train.steps"),
        ScheduleKind::Wsd => (
            train.steps as f64 * train.decay_start,
            "train.decay_start of train.steps",
        ),
        _ => (train.steps as f64, "train.steps"),
    };
    let (warmup, steps) = (train.warmup_steps, train.steps);
    refuse_if(
        warmup as f64 > limit,
        || format!("train.warmup_steps = {warmup} is more than {what} = {steps} allows"),
        "lower train.warmup_steps, or train for more steps",
    )?;
    refuse_if(
        train.schedule == ScheduleKind::TwoStage && train.second_peak_ratio < train.min_lr_ratio,
        || {
            format!(
                "train.second_peak_ratio = {} is below train.min_lr_ratio = {}: \
                 the second half would rise",
                train.second_peak_ratio, train.min_lr_ratio
            )
        },
        "raise the one or lower the other",
    )
}

fn validate_sampling(settings: &Settings) -> Checked {
    let sample = &settings.sample;
    not_negative("sample.temperature", sample.temperature)?;
    within("sample.min_p", sample.min_p, 0.0, 1.0, Upper::Excluded)?;
    refuse_if(
        !(sample.top_p > 0.0 && sample.top_p <= 1.0),
        || {
            format!(
                "sample.top_p = {} is not above 0 and at most 1",
                sample.top_p
            )
        },
        "use 1 for all tokens",
    )?;
    if sample.prompts > 0 {
        at_least_one("sample.prompt_tokens", sample.prompt_tokens)?;
    }
    Ok(())
}

fn validate_lengths(settings: &Settings) -> Checked {
    let limit = settings.model.max_position_embeddings;
    let seq_len = settings.train.seq_len;
    refuse_if(
        seq_len > limit,
        || {
            format!(
                "train.seq_len = {seq_len} is more than model.max_position_embeddings = {limit}"
            )
        },
        "shorten the sequences, or (for a new model) raise model.max_position_embeddings",
    )?;
    let sample = &settings.sample;
    let sampled = sample.prompt_tokens.saturating_add(sample.max_tokens);
    refuse_if(
        sample.prompts > 0 && sampled > limit,
        || format!("samples of {sampled} tokens exceed model.max_position_embeddings = {limit}"),
        "lower sample.max_tokens, or set sample.prompts = 0",
    )
}

fn refuse_if(bad: bool, problem: impl FnOnce() -> String, remedy: &str) -> Checked {
    if !bad {
        return Ok(());
    }
    Err(SettingsError::Impossible {
        problem: problem(),
        remedy: remedy.to_owned(),
    })
}

fn at_least_one(key: &str, size: usize) -> Checked {
    refuse_if(
        size == 0,
        || format!("{key} must be at least 1"),
        "give a larger value",
    )
}

fn above_zero(key: &str, number: f64) -> Checked {
    refuse_if(
        number <= 0.0,
        || format!("{key} = {number} must be above 0"),
        "give a larger value",
    )
}

fn not_negative(key: &str, number: f64) -> Checked {
    refuse_if(
        number < 0.0,
        || format!("{key} = {number} is below 0"),
        "use 0 or more",
    )
}

#[derive(Clone, Copy, PartialEq)]
enum Upper {
    Included,
    Excluded,
}

fn within(key: &str, number: f64, low: f64, high: f64, upper: Upper) -> Checked {
    let too_high = number > high || (upper == Upper::Excluded && number == high);
    let than = if upper == Upper::Included {
        "at most"
    } else {
        "below"
    };
    refuse_if(
        number < low || too_high,
        || format!("{key} = {number} is out of range"),
        &format!("give a value of at least {low} and {than} {high}"),
    )
}
