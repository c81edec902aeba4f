use super::*;

use setun_formats::config::RopeConfig;
use setun_io::Format;

fn flags(pairs: &[(&str, &str)]) -> Vec<Override> {
    pairs
        .iter()
        .map(|(key, value)| Override {
            key: (*key).to_owned(),
            value: (*value).to_owned(),
        })
        .collect()
}

/// Settings from flags alone, with training data given.
fn load(pairs: &[(&str, &str)]) -> Result<Settings, SettingsError> {
    let mut all = vec![("data.train", "a.txt")];
    all.extend_from_slice(pairs);
    Settings::load(None, &flags(&all))
}

fn refusal(pairs: &[(&str, &str)]) -> String {
    load(pairs)
        .expect_err("these settings cannot be run")
        .to_string()
}

/// What reading this recipe says.
fn recipe_refusal(text: &str) -> String {
    let read = Settings::default().apply_toml(text, Path::new("dir/r.toml"));
    read.expect_err("this recipe has a mistake").to_string()
}

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../recipes")
        .join(name)
}

#[test]
fn flags_alone_make_a_run() {
    let settings = load(&[("train.batch-size", "32"), ("train.micro_batch_size", "8")]).unwrap();
    assert_eq!(settings.train.batch_size, 32);
    assert_eq!(settings.eval.batch_size, 8);
    assert_eq!(settings.run.name, "run");
    assert!(settings.output().is_absolute() && settings.output().ends_with("runs/run"));
    assert!(settings.is_given("train.batch_size") && !settings.is_given("train.lr"));
    let taught = load(&[("distill.weight", "0.5"), ("distill.teacher", "dense")]).unwrap();
    let teacher = taught.distill.teacher.unwrap();
    assert!(teacher.is_absolute() && teacher.ends_with("dense"));
}

#[test]
fn a_recipe_and_its_flags() {
    let mut settings = Settings::default();
    let text = "[data]\ntrain = \"a/*.txt\"\n[train]\nlr = 1\nschedule = \"wsd\"\n";
    settings.apply_toml(text, Path::new("/dir/r.toml")).unwrap();
    settings
        .apply(&flags(&[
            ("train.schedule", "cosine"),
            ("data.valid", "v.txt"),
        ]))
        .unwrap();
    assert_eq!(settings.data.train, [PathBuf::from("/dir/a/*.txt")]);
    assert_eq!(settings.data.valid, [PathBuf::from("v.txt")]);
    assert_eq!(settings.train.lr, 1.0);
    assert_eq!(settings.train.schedule, ScheduleKind::Cosine);
}

#[test]
fn settings_round_trip_through_the_run_directory() {
    let run = std::env::temp_dir().join(format!("setun-settings-{}", std::process::id()));
    std::fs::create_dir_all(&run).unwrap();
    let settings = load(&[
        ("run.output", run.to_str().unwrap()),
        ("run.name", "a \"quoted\" name"),
        ("data.valid", "b.txt,c.txt"),
        ("data.split_on", r"regex:\n={3,}\n"),
        ("train.eps", "1e-12"),
        ("train.lr", "0.1"),
        ("model.scale_rule", "mean-nonzero"),
    ])
    .unwrap();
    std::fs::write(run.join(SETTINGS_FILE), settings.to_toml()).unwrap();
    let resumed = Settings::load_run(&run, &flags(&[("run.threads", "3")]));
    let refused = Settings::load_run(&run, &flags(&[("train.lr", "1")]));
    std::fs::remove_dir_all(&run).unwrap();

    let mut resumed = resumed.unwrap();
    assert_eq!(resumed.run.threads, 3);
    resumed.run.threads = 0;
    assert_eq!(resumed.to_toml(), settings.to_toml());
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("--train.lr would change"), "{refused}");
}

#[test]
fn shipped_recipes_load() {
    let quickstart = Settings::load(Some(&shipped("quickstart.toml")), &[]).unwrap();
    assert_eq!(quickstart.run.name, "quickstart");
    assert!(quickstart.data.train[0].is_file());
    assert_eq!(quickstart.numerics(), Numerics::Int8);
    Settings::load(Some(&shipped("tiny.toml")), &[]).unwrap();
}

#[test]
fn path_b_asks_for_data() {
    let recipe = shipped("path-b.toml");
    let missing = Settings::load(Some(&recipe), &[]).unwrap_err().to_string();
    assert!(missing.contains("--data.train FILE"), "{missing}");
    let settings = Settings::load(Some(&recipe), &flags(&[("data.train", "a,b")])).unwrap();
    assert_eq!(settings.data.train.len(), 2);
}

#[test]
fn unknown_names_are_refused_with_the_nearest() {
    let message = recipe_refusal("[train]\nlr = 1e-3\nbatchsize = 4\n");
    assert_eq!(
        message,
        "dir/r.toml:3: there is no key batchsize in [train]; did you mean train.batch_size?"
    );
    let message = recipe_refusal("[train]\nhidden_size = 4\n");
    assert!(
        message.contains("did you mean model.hidden_size?"),
        "{message}"
    );
    let message = recipe_refusal("\n[trian]\n");
    assert_eq!(
        message,
        "dir/r.toml:2: there is no section [trian]; did you mean [train]?"
    );
    let message = recipe_refusal("lr = 1\n");
    assert!(
        message.contains("lr belongs in the section [train]"),
        "{message}"
    );
    let message = recipe_refusal("train = 1\n");
    assert!(
        message.contains("train is a section, not a key"),
        "{message}"
    );
    // Only flags may be written in kebab-case.
    let message = recipe_refusal("[train]\nbatch-size = 1\n");
    assert!(
        message.contains("did you mean train.batch_size?"),
        "{message}"
    );
    let message = refusal(&[("optim.lr-peak", "1")]);
    assert!(
        message.starts_with("--optim.lr-peak: there is no key lr_peak in [optim]"),
        "{message}"
    );
}

#[test]
fn wrong_types_are_refused_with_line_and_expectation() {
    let message = recipe_refusal("[train]\n\nsteps = \"many\"\n");
    assert_eq!(
        message,
        "dir/r.toml:3: train.steps must be a whole number from 0 to 9223372036854775807, not \"many\" (string)"
    );
    let message = recipe_refusal("[data]\ntrain = [1]\n");
    assert!(message.contains("must be a list of paths"), "{message}");
    let message = refusal(&[("train.schedule", "cosin")]);
    assert!(message.starts_with("--train.schedule: train.schedule must be one of \"two-stage\""));
    let message = recipe_refusal("[train]\nsteps 3\n");
    assert!(message.starts_with("dir/r.toml is not valid TOML") && message.contains("line 2"));
}

#[test]
fn a_missing_recipe_is_named() {
    let message = Settings::load(Some(Path::new("absent.toml")), &[])
        .unwrap_err()
        .to_string();
    assert!(
        message.starts_with("cannot read absent.toml: "),
        "{message}"
    );
}

/// Flags that cannot be run together, and what the refusal says.
type Refused = (&'static [(&'static str, &'static str)], &'static str);

fn assert_refused(cases: &[Refused]) {
    for (pairs, expected) in cases {
        let message = refusal(pairs);
        assert!(message.contains(expected), "{pairs:?}: {message}");
        assert!(message.contains("; "), "no remedy: {message}");
    }
}

const ZERO: &str = "must be at least 1";

#[test]
fn impossible_data_is_refused() {
    assert_refused(&[
        (&[("data.train", "")], "there is no training data"),
        (&[("data.valid_fraction", "0")], "not between 0 and 1"),
        (&[("data.valid_fraction", "1")], "not between 0 and 1"),
        (&[("data.text_field", "")], "data.text_field is empty"),
        (&[("data.split_on", "regex:(")], "cannot split documents on"),
        (&[("data.split_on", "regex:")], "cannot split documents on"),
        (
            &[("tokenizer.vocab_size", "256")],
            "no room for the 256 bytes",
        ),
        (&[("run.name", "a/b")], "is not a file name"),
    ]);
}

#[test]
fn impossible_models_are_refused() {
    const DENSE: (&str, &str) = ("model.ternary", "false");
    assert_refused(&[
        (&[("model.hidden_size", "0")], ZERO),
        (&[("model.intermediate_size", "0")], ZERO),
        (&[("model.num_hidden_layers", "0")], ZERO),
        (&[("model.num_attention_heads", "0")], ZERO),
        (&[("model.num_key_value_heads", "0")], ZERO),
        (&[("model.head_dim", "0")], ZERO),
        (&[("model.head_dim", "33")], "is odd"),
        (&[("model.num_key_value_heads", "3")], "cannot share 3 key"),
        (&[("model.max_position_embeddings", "0")], ZERO),
        (
            &[("model.max_position_embeddings", "127")],
            "train.seq_len = 128",
        ),
        (&[("model.rope_theta", "0")], "must be above 0"),
        (&[("model.group_size", "7")], "make it at least 8"),
        (&[("model.init_std", "-1")], "is below 0"),
        (
            &[DENSE, ("model.numerics", "int8")],
            "needs ternary weights",
        ),
        (&[DENSE, ("export.formats", "packed")], "exported as packed"),
    ]);
}

#[test]
fn impossible_training_is_refused() {
    const COSINE: (&str, &str) = ("train.schedule", "cosine");
    const WSD: (&str, &str) = ("train.schedule", "wsd");
    const EARLY: (&str, &str) = ("train.early_stop", "true");
    assert_refused(&[
        (&[("train.steps", "0")], ZERO),
        (&[("train.batch_size", "0")], ZERO),
        (&[("train.seq_len", "0")], ZERO),
        (&[("train.micro_batch_size", "3")], "does not divide"),
        (&[("train.batch_size", "9000000000000000")], "are too many"),
        (&[("eval.batch_size", "9000000000000000")], "are too many"),
        (&[("run.threads", "1025")], "use 0 for all cores"),
        (&[("train.lr", "0")], "must be above 0"),
        (&[("train.beta2", "1")], "at least 0 and below 1"),
        (&[("train.min_lr_ratio", "1.5")], "at least 0 and at most 1"),
        (
            &[("train.warmup_steps", "201")],
            "half of train.steps = 400",
        ),
        (
            &[COSINE, ("train.warmup_steps", "401")],
            "train.steps = 400",
        ),
        (&[WSD, ("train.warmup_steps", "321")], "train.decay_start"),
        (&[("train.second_peak_ratio", "0.05")], "would rise"),
        (&[EARLY, ("eval.every", "0")], "eval.every = 0"),
        (&[("checkpoint.keep", "0")], ZERO),
        (&[("log.every", "0")], ZERO),
        (&[("sample.top_p", "0")], "is not above 0"),
        (&[("sample.prompt_tokens", "0")], ZERO),
        (&[("sample.max_tokens", "1020")], "samples of 1032 tokens"),
    ]);
}

#[test]
fn dense_models_get_their_own_defaults() {
    let settings = load(&[("model.ternary", "false")]).unwrap();
    assert_eq!(settings.numerics(), Numerics::Bf16);
    assert_eq!(settings.model.numerics, NumericsChoice::Bf16);
    let hf = Format::HuggingFace(setun_io::ExportDtype::Bf16);
    assert_eq!(settings.export.formats, [hf]);
}

fn model_file() -> Qwen3Config {
    Qwen3Config {
        vocab_size: 512,
        hidden_size: 96,
        intermediate_size: 192,
        num_hidden_layers: 3,
        num_attention_heads: 6,
        num_key_value_heads: 3,
        head_dim: 16,
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        rope: RopeConfig {
            rope_theta: 1e4,
            yarn: None,
        },
        bos_token_id: None,
        eos_token_ids: vec![0],
    }
}

#[test]
fn the_shape_of_an_initial_model_is_adopted() {
    let mut settings = load(&[("model.init_from", "m"), ("train.seq_len", "2048")]).unwrap();
    settings.adopt_model(&model_file(), "m").unwrap();
    assert_eq!(settings.model.hidden_size, 96);
    assert_eq!(settings.model.rms_norm_eps, 1e-5);
    assert!(!settings.model.tie_word_embeddings);
}

#[test]
fn a_shape_that_contradicts_the_initial_model_is_refused() {
    let mut settings = load(&[("model.init_from", "m"), ("model.hidden_size", "128")]).unwrap();
    let message = settings
        .adopt_model(&model_file(), "m")
        .unwrap_err()
        .to_string();
    assert_eq!(
        message,
        "model.hidden_size is set to 128, but m has 96; \
         leave model.hidden_size out, or set it to 96"
    );
    let mut settings = load(&[("model.init_from", "m"), ("train.seq_len", "4097")]).unwrap();
    let message = settings
        .adopt_model(&model_file(), "m")
        .unwrap_err()
        .to_string();
    assert!(message.contains("train.seq_len = 4097"), "{message}");
}

#[test]
fn edit_distance_counts_single_changes() {
    assert_eq!(edit_distance("", "abc"), 3);
    assert_eq!(edit_distance("kitten", "sitting"), 3);
    assert_eq!(edit_distance("lr", "lr"), 0);
}

#[test]
fn documents_are_read_alike_with_and_without_a_recipe() {
    let data = DataSettings::default();
    let options = crate::data::DocumentOptions::default();
    assert_eq!(data.split_on, options.split_on);
    assert_eq!(data.text_field, options.text_field);
    assert_eq!(data.min_document_chars, options.min_document_chars);
}
