use setun_train::data::SplitOn;

use super::*;

fn parsed(line: &[&str]) -> Result<Command, clap::Error> {
    let program = ["setun"];
    parse(program.iter().chain(line).map(OsString::from))
}

fn train_args(line: &[&str]) -> TrainArgs {
    let mut all = vec!["train"];
    all.extend_from_slice(line);
    match parsed(&all).unwrap() {
        Command::Train(args) => args,
        other => panic!("{other:?} is not train"),
    }
}

/// The message and exit code of a wrong command line.
fn refusal(line: &[&str]) -> String {
    let error = parsed(line).expect_err("this is wrong usage");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

fn setting(key: &str, value: &str) -> Override {
    Override {
        key: key.to_owned(),
        value: value.to_owned(),
    }
}

#[test]
fn the_definition_is_consistent() {
    flags::definition().debug_assert();
}

#[test]
fn settings_are_flags_in_both_spellings() {
    let snake = train_args(&["r.toml", "--train.batch_size", "4", "--train.lr=1e-3"]);
    let kebab = train_args(&["--train.batch-size=4", "--train.lr", "1e-3", "r.toml"]);
    assert_eq!(snake, kebab);
    assert_eq!(snake.recipe, Some(PathBuf::from("r.toml")));
    let expected = [
        setting("train.batch_size", "4"),
        setting("train.lr", "1e-3"),
    ];
    assert_eq!(snake.overrides, expected);
}

#[test]
fn switches_work_bare_and_with_a_value() {
    let bare = train_args(&["--train.recompute", "r.toml", "--model.ternary", "false"]);
    let expected = [
        setting("model.ternary", "false"),
        setting("train.recompute", "true"),
    ];
    assert_eq!(bare.overrides, expected);
    assert_eq!(bare.recipe, Some(PathBuf::from("r.toml")));
    let dashed = train_args(&["--train.early-stop", "true", "--train.recompute=false"]);
    let expected = [
        setting("train.recompute", "false"),
        setting("train.early_stop", "true"),
    ];
    assert_eq!(dashed.overrides, expected);
}

#[test]
fn repeated_flags_add_to_lists_and_replace_single_values() {
    let args = train_args(&[
        "--data.train",
        "a,b",
        "--data.train",
        "c",
        "--train.lr",
        "1",
        "--train.lr",
        "2",
    ]);
    let expected = [setting("data.train", "a,b,c"), setting("train.lr", "2")];
    assert_eq!(args.overrides, expected);
}

#[test]
fn init_is_a_setting_and_resume_stands_alone() {
    let args = train_args(&["r.toml", "--init", "old", "--dry-run"]);
    assert_eq!(args.overrides, [setting("model.init_from", "old")]);
    assert!(args.dry_run);
    assert_eq!(
        train_args(&["--resume", "run"]).resume,
        Some(PathBuf::from("run"))
    );
    refusal(&["train", "r.toml", "--resume", "run"]);
    refusal(&["train", "--init", "old", "--resume", "run"]);
}

#[test]
fn wrong_usage_says_what_would_be_right() {
    let message = refusal(&["train", "--train.steeps", "3"]);
    assert!(message.contains("'--train.steps'"), "{message}");
    let message = refusal(&["train", "--data.train", "a.txt", "b.txt"]);
    assert!(message.contains("a recipe ends in .toml"), "{message}");
    let message = refusal(&["trian"]);
    assert!(message.contains("'train'"), "{message}");
    let message = refusal(&[
        "generate", "--model", "m", "--prompt", "p", "--top-p", "1.5",
    ]);
    assert!(message.contains("above 0 and at most 1"), "{message}");
    let message = refusal(&[
        "generate",
        "--model",
        "m",
        "--prompt",
        "p",
        "--checkpoint",
        "last",
    ]);
    assert!(
        message.contains("best, newest or a number of steps"),
        "{message}"
    );
    let message = refusal(&["convert", "m", "out", "--to", "q4_k"]);
    assert!(message.contains("one of hf, hf-f16"), "{message}");
    refusal(&["generate", "--model", "m"]);
    refusal(&["tokenize", "--output", "o", "a.txt"]);
    refusal(&[
        "tokenize",
        "--tokenizer",
        "t",
        "--model",
        "m",
        "--output",
        "o",
        "a.txt",
    ]);
    refusal(&[
        "tokenizer",
        "train",
        "--vocab-size",
        "0",
        "--output",
        "o",
        "a.txt",
    ]);
    refusal(&["tokenizer"]);
    refusal(&[]);
}

#[test]
fn help_and_version_are_no_errors() {
    for line in [&["--help"][..], &["--version"], &["train", "--help"]] {
        assert_eq!(parsed(line).unwrap_err().exit_code(), 0);
    }
    let help = parsed(&["train", "--help"]).unwrap_err().to_string();
    for key in schema::keys() {
        assert!(help.contains(&format!("--{} {}", key.path, key.placeholder)));
    }
}

#[test]
fn generate_reads_its_numbers() {
    let line = [
        "generate",
        "--model",
        "m",
        "--prompt",
        "p",
        "--temperature",
        "0",
        "--checkpoint",
        "200",
    ];
    let Command::Generate(args) = parsed(&line).unwrap() else {
        panic!("not generate");
    };
    assert_eq!(args.checkpoint, Some(CheckpointChoice::Step(200)));
    assert_eq!((args.temperature, args.top_p, args.min_p), (0.0, 0.95, 0.0));
    assert_eq!((args.max_tokens, args.top_k, args.threads), (100, 40, 0));
    assert_eq!(
        (args.repetition_penalty, args.seed, args.stats),
        (1.0, 1, false)
    );
    let others = (args.presence_penalty, args.frequency_penalty, args.logprobs);
    assert_eq!(others, (0.0, 0.0, None));
    assert_eq!(args.draft, Drafting::None);
    let drafting = |name: &str| match parsed(&[&line[..], &["--draft", name]].concat()) {
        Ok(Command::Generate(args)) => args.draft,
        other => panic!("{other:?}"),
    };
    assert_eq!(drafting("ngram"), Drafting::Ngram);
    assert_eq!(drafting("runs/small"), Drafting::Model("runs/small".into()));
}

#[test]
fn a_text_may_begin_with_a_hyphen() {
    let Command::Generate(args) =
        parsed(&["generate", "--model", "m", "--prompt", "- a list"]).unwrap()
    else {
        panic!("not generate");
    };
    assert_eq!(args.prompt.as_deref(), Some("- a list"));
    let expected = Command::TokenizerShow(TokenizerShowArgs {
        file: "t.json".into(),
        text: Some("-x".to_owned()),
    });
    let line = ["tokenizer", "show", "t.json", "--text", "-x"];
    assert_eq!(parsed(&line).unwrap(), expected);
}

#[test]
fn numbers_that_no_run_could_use_are_refused() {
    let generate = ["generate", "--model", "m", "--prompt", "p"];
    let eval = ["eval", "--model", "m", "--data", "d"];
    let cases: [(&[&str], [&str; 2], &str); 6] = [
        (&generate, ["--beams", "1025"], "from 0 to 1024"),
        (&generate, ["--threads", "1025"], "from 0 to 1024"),
        (&eval, ["--batch-size", "65537"], "from 1 to 65536"),
        (&eval, ["--batch-size", "0"], "from 1 to 65536"),
        (&generate, ["--repetition-penalty", "1e39"], "at most 3.4"),
        (&generate, ["--repetition-penalty", "1e-60"], "above 0"),
    ];
    for (command, flag, words) in cases {
        let message = refusal(&[command, &flag[..]].concat());
        assert!(message.contains(words), "{message}");
    }
    parsed(&[&generate[..], &["--beams", "1024", "--threads", "1024"]].concat()).unwrap();
    parsed(&[&eval[..], &["--batch-size", "65536"]].concat()).unwrap();
}

#[test]
fn sampling_flags_are_known_as_given() {
    let line = ["generate", "--model", "m", "--prompt", "p"];
    let sampling = |flags: &[&str]| match parsed(&[&line[..], flags].concat()) {
        Ok(Command::Generate(args)) => args.sampling,
        other => panic!("{other:?}"),
    };
    assert!(sampling(&["--max-tokens", "3"]).is_empty());
    // What is the default is given too.
    let given = sampling(&["--seed", "1", "--top-k=3"]);
    assert_eq!(given, ["top-k", "seed"]);
}

#[test]
fn benchmarks_of_decoding_have_the_flags_that_they_use() {
    for line in [
        ["bench", "kv", "--tokens", "5"],
        ["bench", "verify-width", "--batch", "2"],
        ["bench", "softmax-topk", "--kv", "int8"],
    ] {
        refusal(&line);
    }
    let Command::Bench(args) = parsed(&["bench", "softmax-topk", "--batch", "3"]).unwrap() else {
        panic!("not bench");
    };
    let expected = Benchmark::Decoding(DecodingArgs {
        what: Decoding::SoftmaxTopk,
        model: None,
        tokens: 0,
        batch: 3,
        forked: false,
        k: 64,
        kv: None,
    });
    assert_eq!((args.benchmark, args.repeat), (expected, 5));
    parsed(&["bench", "kv", "--kv", "int8"]).unwrap();
}

#[test]
fn tokenize_and_tokenizer_train_read_their_sources() {
    let line = [
        "tokenize", "--model", "run", "--output", "o.tokens", "a.txt", "b.txt",
    ];
    let expected = Command::Tokenize(TokenizeArgs {
        tokenizer: TokenizerSource::Model("run".into()),
        output: "o.tokens".into(),
        sources: vec!["a.txt".into(), "b.txt".into()],
        documents: DocumentOptions::default(),
    });
    assert_eq!(parsed(&line).unwrap(), expected);

    let line = [
        "tokenizer",
        "train",
        "--vocab-size",
        "512",
        "--output",
        "o",
        "--split-on",
        "file",
    ];
    let expected = Command::TokenizerTrain(TokenizerTrainArgs {
        vocab_size: 512,
        output: "o".into(),
        sources: vec!["a".into()],
        documents: DocumentOptions {
            split_on: SplitOn::File,
            ..DocumentOptions::default()
        },
    });
    let line: Vec<&str> = line.into_iter().chain(["a"]).collect();
    assert_eq!(parsed(&line).unwrap(), expected);
}

#[test]
fn eval_and_export_read_their_arguments() {
    let line = [
        "eval",
        "--data",
        "a.txt",
        "b.txt",
        "--model",
        "m",
        "--seq-len",
        "64",
        "--numerics",
        "f32",
        "--logits",
        "l.safetensors",
    ];
    let expected = Command::Eval(EvalArgs {
        model: "m".into(),
        checkpoint: None,
        data: vec!["a.txt".into(), "b.txt".into()],
        documents: DocumentOptions::default(),
        seq_len: Some(64),
        batch_size: 8,
        threads: 0,
        numerics: Some(Numerics::F32),
        kv: None,
        logits: Some("l.safetensors".into()),
        json: false,
    });
    assert_eq!(parsed(&line).unwrap(), expected);

    let line = ["convert", "m", "out", "--to", "mlx", "--checkpoint", "best"];
    let expected = Command::Convert(ConvertArgs {
        input: "m".into(),
        checkpoint: Some(CheckpointChoice::Best),
        output: "out".into(),
        format: Format::Mlx,
        ternarize: None,
        lossy: false,
        shard_bytes: 5_000_000_000,
    });
    assert_eq!(parsed(&line).unwrap(), expected);
}

/// Scripts depend on these names: adding one is fine, changing or removing one is not.
#[test]
fn the_list_of_flags_is_frozen() {
    let mut lines = Vec::new();
    for command in flags::definition().get_subcommands() {
        list_flags(command, command.get_name(), &mut lines);
    }
    assert_eq!(lines.join("\n"), FLAGS.trim());
}

fn list_flags(command: &clap::Command, name: &str, lines: &mut Vec<String>) {
    let mut line = format!("{name}:");
    for argument in command.get_arguments() {
        let (id, long) = (argument.get_id(), argument.get_long());
        if id.as_str().contains('.') {
            lines.push(std::mem::take(&mut line));
        }
        let positional = || argument.get_value_names().unwrap_or_default().join(" ");
        let text = long.map_or_else(positional, |long| format!("--{long}"));
        line = if line.is_empty() {
            format!("  {text}")
        } else {
            format!("{line} {text}")
        };
    }
    lines.push(line);
    for child in command.get_subcommands() {
        list_flags(child, &format!("{name} {}", child.get_name()), lines);
    }
}

const FLAGS: &str = "
train: RECIPE.toml --init --resume --drafter-for --dry-run --profile
  --run.name
  --run.output
  --run.seed
  --run.threads
  --data.train
  --data.valid
  --data.valid_fraction
  --data.split_on
  --data.format
  --data.text_field
  --data.min_document_chars
  --data.document_mask
  --data.drop_near_duplicates
  --tokenizer.path
  --tokenizer.vocab_size
  --model.hidden_size
  --model.intermediate_size
  --model.num_hidden_layers
  --model.num_attention_heads
  --model.num_key_value_heads
  --model.head_dim
  --model.tie_word_embeddings
  --model.max_position_embeddings
  --model.rope_theta
  --model.rms_norm_eps
  --model.ternary
  --model.group_size
  --model.scale_rule
  --model.scale_rounding
  --model.ternary_embedding
  --model.learned_scales
  --model.logit_softcap
  --model.numerics
  --model.init_std
  --model.init_depth_scale
  --model.init_from
  --train.steps
  --train.batch_size
  --train.micro_batch_size
  --train.seq_len
  --train.optimizer
  --train.lr
  --train.adamw_lr
  --train.muon_momentum
  --train.min_lr_ratio
  --train.warmup_steps
  --train.schedule
  --train.second_peak_ratio
  --train.decay_start
  --train.weight_decay
  --train.beta1
  --train.beta2
  --train.eps
  --train.optimizer_state
  --train.grad_clip
  --train.z_loss
  --train.dropout
  --train.ema_decay
  --train.ste
  --train.recompute
  --train.spike_sigma
  --train.max_bad_steps
  --train.rewind_steps
  --train.max_rewinds
  --train.head_chunk
  --train.freeze
  --train.blend_steps
  --train.early_stop
  --train.early_stop_patience
  --distill.weight
  --distill.teacher
  --distill.temperature
  --drafter.num_hidden_layers
  --drafter.block_size
  --drafter.num_target_layers
  --drafter.anchors
  --drafter.windows
  --drafter.valid_windows
  --drafter.prompt_tokens
  --eval.every
  --eval.batch_size
  --checkpoint.every
  --checkpoint.keep
  --checkpoint.keep_every
  --sample.prompts
  --sample.max_tokens
  --sample.temperature
  --sample.top_k
  --sample.top_p
  --sample.min_p
  --sample.prompt_tokens
  --export.formats
  --log.every
  --log.tensorboard
verify: PATH --json
generate: --model --prompt --prompts --beams --length-penalty --kv --draft --checkpoint --max-tokens --temperature --top-k --top-p --min-p --repetition-penalty --presence-penalty --frequency-penalty --logprobs --seed --threads --stats
eval: --model --data --checkpoint --seq-len --batch-size --threads --numerics --kv --logits --json --split-on --text-field --min-document-chars
tokenize: --tokenizer --model --output SOURCES --split-on --text-field --min-document-chars
tokenizer:
tokenizer train: --vocab-size --output SOURCES --split-on --text-field --min-document-chars
tokenizer show: FILE --text
convert: IN OUT --to --ternarize --group-size --scale-rule --numerics --lossy --shard-bytes --checkpoint
inspect: FILE --json
report: RUN
compare: RUNS --output
sweep: SPEC.toml --output --seeds --cells --set --dry-run --table
bench:
bench peak: --threads --repeat --json
bench bandwidth: --threads --repeat --json
bench matmul: --threads --repeat --json --shape
bench attention: --threads --repeat --json --seq --head-dim --heads
bench layer-norm: --threads --repeat --json --rows --width
bench train: --threads --repeat --json --shape --batch-size --seq-len --profile
bench speculate: --threads --repeat --json --model --draft --text --tokens
bench decode: --threads --repeat --json --model --tokens --batch --forked --kv
bench prefill: --threads --repeat --json --model --tokens --batch --kv
bench verify-width: --threads --repeat --json --model --tokens --kv
bench softmax-topk: --threads --repeat --json --model --batch --k
bench kv: --json --model --kv
";
