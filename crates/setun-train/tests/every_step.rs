//! A checkpoint of any step leads to the same weights, whatever the number of threads; a
//! damaged one is noticed and named; one of an earlier version still reads.

mod tiny;

use setun_formats::PackedHeader;
use setun_formats::TernaryInfo;
use setun_io::{Matrix, RealOps, newest_valid_checkpoint};
use setun_model::Parameters;
use setun_ternary::PackedMatrix;
use setun_train::checkpoint::{Constants, DataIdentity, TrainState, restore, snapshot};
use setun_train::data::Batches;
use setun_train::settings::Settings;
use setun_train::trainer::Trainer;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tiny::{Random, Scratch};

type HostTrainer = Trainer<setun_backend::Host<f32>>;

const STEPS: u64 = 50;

fn identity() -> DataIdentity {
    DataIdentity {
        tokenizer: "t".to_owned(),
        train: "a".to_owned(),
        valid: "b".to_owned(),
    }
}

fn prepared(scratch: &Scratch) -> (Settings, Batches) {
    let corpus = scratch.join("corpus.txt");
    std::fs::write(&corpus, tiny::corpus()).unwrap();
    let settings = tiny::settings(&corpus, &[("train.steps", "50")]);
    let batches = tiny::batches(&settings);
    (settings, batches)
}

fn trainer(settings: &Settings, batches: &Batches, threads: usize) -> HostTrainer {
    tiny::trainer(settings, batches, threads, |host| host)
}

fn checkpoint(run: &Path, settings: &Settings, trainer: &mut HostTrainer) -> PathBuf {
    let mut state = TrainState::new(identity());
    state.step = trainer.step;
    state.updates = trainer.optimizer.updates;
    state.data_offset = trainer.data_offset;
    state.guard = trainer.guard.clone();
    let config = trainer.model.spec().config.clone();
    let constants = Constants {
        files: Arc::new([
            ("config.json", config.to_json().into_bytes()),
            ("tokenizer.json", b"{}".to_vec()),
        ]),
        ternary: Some(PackedHeader {
            config,
            ternary: TernaryInfo {
                group_size: settings.model.group_size,
                scale_rule: settings.model.scale_rule,
                numerics: settings.numerics(),
            },
        }),
        experiment: None,
    };
    let files: Arc<dyn setun_io::FileOps> = Arc::new(RealOps);
    let snapshot = snapshot(trainer, &state, constants).unwrap();
    snapshot.write(&files, run, || {}).unwrap().0
}

#[test]
fn stopping_at_any_step_changes_nothing() {
    let scratch = Scratch::new("every-step");
    let (settings, batches) = prepared(&scratch);
    let mut straight = trainer(&settings, &batches, 1);
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        losses.push(straight.step(&batches).unwrap().loss.to_bits());
        checkpoint(&scratch.0, &settings, &mut straight);
    }
    let expected = tiny::state(&straight);
    for from in 1..=STEPS {
        let threads = 1 + (from % 3) as usize;
        let mut resumed = trainer(&settings, &batches, threads);
        let dir = scratch.join(&format!("checkpoints/step-{from:08}"));
        restore(&dir, &mut resumed, &identity()).unwrap();
        for step in from..STEPS {
            let loss = resumed.step(&batches).unwrap().loss.to_bits();
            assert_eq!(loss, losses[step as usize], "step {step} from {from}");
        }
        assert!(
            tiny::state(&resumed) == expected,
            "from {from}, {threads} threads"
        );
    }
}

/// An average is the recurrence of its definition; a checkpoint ships it, with its own
/// projection, and goes on with the latents.
#[test]
fn an_average_is_kept_shipped_and_resumed() {
    let scratch = Scratch::new("average");
    let corpus = scratch.join("corpus.txt");
    std::fs::write(&corpus, tiny::corpus()).unwrap();
    let settings = tiny::settings(
        &corpus,
        &[("train.steps", "50"), ("train.ema_decay", "0.6")],
    );
    let batches = tiny::batches(&settings);
    let new = || trainer(&settings, &batches, 1);
    let values = |trainer: &HostTrainer, parameters: &Parameters<f32>| -> Vec<Vec<f32>> {
        let each = parameters.list.iter();
        each.map(|p| parameters.read_values(&trainer.backend, p))
            .collect()
    };
    let latents = |t: &HostTrainer| values(t, &t.model.parameters);
    let averages = |t: &HostTrainer| {
        let average = t.optimizer.average.as_ref().expect("it was asked for");
        values(t, &average.parameters)
    };
    let mut straight = new();
    let mut expected = latents(&straight);
    assert_eq!(averages(&straight), expected);
    for n in 1..=8 {
        straight.step(&batches).unwrap();
        let share = (1.0 - 0.6f64.min((1.0 + n as f64) / (10.0 + n as f64))) as f32;
        for (average, latent) in expected.iter_mut().zip(latents(&straight)) {
            for (average, latent) in average.iter_mut().zip(latent) {
                *average = share.mul_add(latent - *average, *average);
            }
        }
        assert_eq!(averages(&straight), expected, "after {n} updates");
    }
    let dir = checkpoint(&scratch.0, &settings, &mut straight);
    let shipped = setun_io::OpenModel::open(&dir).unwrap();
    for (p, average) in straight.model.parameters.list.iter().zip(&expected) {
        if p.is_matrix {
            let rule = settings.model.scale_rule;
            let size = settings.model.group_size;
            let projected = PackedMatrix::from_latents(average, p.cols, size, rule).unwrap();
            let found = shipped.matrix(&p.name).unwrap();
            assert!(found == Matrix::Ternary(projected), "{}", p.name);
        } else {
            assert_eq!(&shipped.norm(&p.name).unwrap(), average);
        }
    }
    let mut resumed = new();
    restore(&dir, &mut resumed, &identity()).unwrap();
    for trainer in [&mut straight, &mut resumed] {
        for _ in 0..3 {
            trainer.step(&batches).unwrap();
        }
    }
    assert!(tiny::state(&resumed) == tiny::state(&straight));
    assert_eq!(averages(&resumed), averages(&straight));
}

#[test]
fn damage_is_noticed_named_and_passed_over() {
    let scratch = Scratch::new("flips");
    let (settings, batches) = prepared(&scratch);
    let mut trainer = trainer(&settings, &batches, 1);
    trainer.step(&batches).unwrap();
    checkpoint(&scratch.0, &settings, &mut trainer);
    trainer.step(&batches).unwrap();
    let newest = checkpoint(&scratch.0, &settings, &mut trainer);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&newest)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let mut random = Random::new(5);
    for case in 0..200 {
        let file = &files[case % files.len()];
        let good = std::fs::read(file).unwrap();
        let mut bad = good.clone();
        let place = random.below(good.len() as u64) as usize;
        if case % 4 == 3 {
            bad.truncate(place);
        } else {
            bad[place] ^= 1 << random.below(8);
        }
        std::fs::write(file, &bad).unwrap();
        let (_, step, skipped) = newest_valid_checkpoint(&scratch.0).unwrap();
        assert_eq!((step, skipped.len()), (1, 1), "{file:?} at {place}");
        let name = file.file_name().unwrap().to_str().unwrap();
        let told = skipped[0].contains(name)
            && (skipped[0].contains("offsets") || skipped[0].contains("bytes"));
        assert!(told, "{}", skipped[0]);
        std::fs::write(file, &good).unwrap();
    }
    assert_eq!(newest_valid_checkpoint(&scratch.0).unwrap().1, 2);
}

/// `data/state-2` is a checkpoint of Setun 0.1.0, the first one whose `state.json` has
/// version 2. It is never written anew: later versions must read it as it is.
#[test]
fn a_checkpoint_of_version_2_reads() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/state-2");
    let manifest = setun_io::verify_manifest(&dir).unwrap();
    let scratch = Scratch::new("old");
    let corpus = scratch.join("corpus.txt");
    std::fs::write(&corpus, tiny::corpus()).unwrap();
    let settings = tiny::settings(
        &corpus,
        &[
            ("tokenizer.vocab_size", "300"),
            ("model.hidden_size", "16"),
            ("model.intermediate_size", "24"),
            ("model.num_hidden_layers", "1"),
            ("model.num_attention_heads", "1"),
            ("model.head_dim", "16"),
            ("model.group_size", "16"),
        ],
    );
    let batches = tiny::batches(&settings);
    let mut old = trainer(&settings, &batches, 1);
    let json = std::fs::read(dir.join("state.json")).unwrap();
    let saved: TrainState = serde_json::from_slice(&json).unwrap();
    let state = restore(&dir, &mut old, &saved.data).unwrap();
    assert_eq!((state.step, state.updates, old.step), (4, 4, 4));
    // Saved again, it has the same weights, and the same trits and scales.
    let again = checkpoint(&scratch.0, &settings, &mut old);
    let again = setun_io::verify_manifest(&again).unwrap();
    for hash in ["params_hash", "ternary_hash"] {
        assert_eq!(manifest.extra[hash], again.extra[hash], "{hash}");
    }
    let moments = "optimizer.safetensors";
    assert_eq!(manifest.files[moments], again.files[moments]);
    for _ in 0..2 {
        assert_eq!(old.step(&batches).unwrap().skipped, None);
    }
    setun_io::OpenModel::open(&dir).unwrap();
}
