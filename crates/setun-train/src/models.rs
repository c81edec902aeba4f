//! The models that take part in a run: the one to train, the one it starts from, its
//! teacher.

use crate::TrainError;
use crate::prepare;
use crate::settings::Settings;
use setun_formats::{Qwen3Config, Tokenizer};
use setun_infer::spec_of;
use setun_io::OpenModel;
use setun_model::{ModelSpec, is_frozen};
use setun_ternary::Numerics;

/// Opens the model that training starts from and takes over its shape.
pub(crate) fn open_init(settings: &mut Settings) -> Result<Option<OpenModel>, TrainError> {
    let Some(path) = settings.model.init_from.clone() else {
        return Ok(None);
    };
    let mut model = OpenModel::open(&path)?;
    if settings.model.ternary {
        // A ternary model without a record of it must not be projected again.
        model.detect_ternary()?;
    }
    let source = path.display().to_string();
    settings.adopt_model(model.config(), &source)?;
    if let Some(ternary) = model.ternary() {
        settings.adopt("model.group_size", &ternary.group_size.to_string(), &source)?;
        settings.adopt("model.scale_rule", ternary.scale_rule.name(), &source)?;
        if !settings.is_given("model.numerics") {
            settings.adopt("model.numerics", ternary.numerics.name(), &source)?;
        }
    }
    Ok(Some(model))
}

/// Opens the model that training learns from, and notes which one it is.
pub(crate) fn open_teacher(settings: &mut Settings) -> Result<Option<OpenModel>, TrainError> {
    let distill = &mut settings.distill;
    if distill.weight == 0.0 {
        return Ok(None);
    }
    let path = distill.teacher.clone().or(settings.model.init_from.clone());
    let Some(path) = path else {
        return Ok(None);
    };
    let teacher = OpenModel::open(&path).map_err(|e| {
        TrainError::refused(format!(
            "the teacher cannot be opened: {e}; name another place with --distill.teacher"
        ))
    })?;
    distill.teacher = Some(path);
    Ok(Some(teacher))
}

/// Refuses a teacher to which the student's tokens mean something else.
pub(crate) fn check_teacher(teacher: &OpenModel, tokenizer: &Tokenizer) -> Result<(), TrainError> {
    // Mostly it is the same file, which need not be parsed again.
    let json = teacher.tokenizer_json()?;
    if json.is_none_or(|json| json == tokenizer.to_json().as_bytes()) {
        return Ok(());
    }
    let Some(own) = teacher.tokenizer()? else {
        return Ok(());
    };
    let Some(id) = own.first_difference(tokenizer) else {
        return Ok(());
    };
    Err(TrainError::refused(format!(
        "the teacher in {} has another tokenizer: token {id} is {:?} there and {:?} for the \
         student; use a teacher with the same tokenizer",
        teacher.directory().display(),
        own.decode(&[id]),
        tokenizer.decode(&[id]),
    )))
}

/// What the teacher computes: dense models in bf16, where products are fast.
pub(crate) fn teacher_spec(
    teacher: &OpenModel,
    student: &Qwen3Config,
) -> Result<ModelSpec, TrainError> {
    let found = teacher.config().vocab_size;
    if found != student.vocab_size {
        return Err(TrainError::refused(format!(
            "the teacher has a vocabulary of {found}, the student of {}: use a teacher with the \
             same tokenizer",
            student.vocab_size
        )));
    }
    let numerics = teacher.ternary().is_none().then_some(Numerics::Bf16);
    Ok(spec_of(teacher, numerics)?)
}

/// Refuses names in `train.freeze` that no parameter has, and freezing everything.
pub(crate) fn check_names(settings: &Settings, config: &Qwen3Config) -> Result<(), TrainError> {
    let freeze = &settings.train.freeze;
    let parameters = config.parameters();
    let unknown = freeze.iter().find(|&pattern| {
        let one = std::slice::from_ref(pattern);
        !parameters.iter().any(|p| is_frozen(&p.name, one))
    });
    if let Some(pattern) = unknown {
        return Err(TrainError::refused(format!(
            "train.freeze names {pattern:?}, which is no part of a parameter's name, such as \
             embed_tokens, layers.0 or self_attn.q_proj"
        )));
    }
    if parameters.iter().all(|p| is_frozen(&p.name, freeze)) {
        let problem = "train.freeze leaves nothing to train: name fewer parts";
        return Err(TrainError::refused(problem));
    }
    Ok(())
}

/// Refuses exports that cannot hold a model of this shape without loss.
pub(crate) fn check_exports(settings: &Settings, config: &Qwen3Config) -> Result<(), TrainError> {
    let ternary = settings.ternary_info();
    for format in &settings.export.formats {
        format.check(config, ternary.as_ref()).map_err(|e| {
            let name = format.name();
            TrainError::refused(format!("export.formats names {name}, but {e}"))
        })?;
    }
    Ok(())
}

/// The shape of the model: that of `init`, else what the settings ask for.
pub(crate) fn final_config(
    settings: &Settings,
    init: Option<&OpenModel>,
    tokenizer: &Tokenizer,
) -> Result<Qwen3Config, TrainError> {
    let vocab_size = tokenizer.vocab_size();
    let Some(model) = init else {
        return prepare::model_config(settings, vocab_size, tokenizer.end_of_text());
    };
    let config = model.config().clone();
    if vocab_size > config.vocab_size {
        return Err(TrainError::refused(format!(
            "the tokenizer has {vocab_size} entries, the model's embedding {} rows; use the \
             model's own tokenizer",
            config.vocab_size
        )));
    }
    Ok(config)
}
