//! Exports hold what was trained, and what cannot be exported leaves nothing.

use super::*;
use crate::fixture::{DOWN, Dense, EMBED, Q_NORM, Scratch, Tiny};
use crate::{TensorFile, TernaryHasher, verify_manifest};
use setun_formats::gguf::GgufType;
use setun_formats::tokenizer::END_OF_TEXT;
use setun_ternary::blocks::BlockType;
use setun_ternary::{Numerics, ScaleRule};
use std::fs;

fn export(
    scratch: &Scratch,
    tiny: &Tiny,
    ternary: bool,
    dtype: ExportDtype,
    source: &dyn TensorSource,
) -> Result<PathBuf, IoError> {
    let tokenizer = Tiny::tokenizer().to_json();
    let ternary = ternary.then_some(tiny.ternary());
    let json = Some(tokenizer.as_bytes());
    export_huggingface(
        scratch.path(),
        "hf",
        tiny.config(),
        ternary,
        dtype,
        json,
        source,
    )
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_huggingface_export_holds_exact_values_and_its_number_format() {
    for dtype in [ExportDtype::Bf16, ExportDtype::F16, ExportDtype::F32] {
        let scratch = Scratch::new("export-hf");
        let tiny = Tiny::new(true, 16);
        let dir = export(&scratch, &tiny, true, dtype, &tiny).unwrap();
        let file = TensorFile::open(&dir.join("model.safetensors")).unwrap();
        assert_eq!(file.metadata()["setun.group_size"], "16");
        assert_eq!(file.metadata()["setun.scale_rule"], "mean");
        assert_eq!(file.metadata()["setun.numerics"], "int8");
        for (name, matrix) in &tiny.packed {
            let mut row = vec![0.0; matrix.cols];
            for r in 0..matrix.rows {
                matrix.dequantize_row(r, &mut row).unwrap();
                assert_eq!(file.float_rows(name, r..r + 1).unwrap(), row);
            }
        }
        file.expect(Q_NORM, &[Dtype::F32], &[10]).unwrap();
        assert_eq!(file.floats(Q_NORM).unwrap(), tiny.latents[Q_NORM]);
        assert_eq!(json(&dir.join("config.json"))["torch_dtype"], dtype.name());
    }
}

#[test]
fn the_files_around_the_weights() {
    let scratch = Scratch::new("export-files");
    let tiny = Tiny::new(false, 16);
    let dir = export(&scratch, &tiny, true, ExportDtype::Bf16, &tiny).unwrap();
    let end_of_text = Tiny::tokenizer().end_of_text().unwrap();
    let tokenizer = json(&dir.join("tokenizer_config.json"));
    assert_eq!(tokenizer["tokenizer_class"], "Qwen2Tokenizer");
    assert_eq!(tokenizer["eos_token"], END_OF_TEXT);
    assert_eq!(tokenizer["pad_token"], END_OF_TEXT);
    assert_eq!(tokenizer["model_max_length"], 64);
    assert!(tokenizer.get("chat_template").is_none());
    let id = end_of_text.to_string();
    assert_eq!(
        tokenizer["added_tokens_decoder"][id]["content"],
        END_OF_TEXT
    );
    let generation = json(&dir.join("generation_config.json"));
    assert_eq!(generation["eos_token_id"], 0);
    assert_eq!(generation["pad_token_id"], end_of_text);
    let manifest = verify_manifest(&dir).unwrap();
    assert_eq!(manifest.files.len(), 5);
    assert_eq!(manifest.extra["group_size"], 16);
}

#[test]
fn the_hash_does_not_depend_on_the_format() {
    let scratch = Scratch::new("export-hash");
    let tiny = Tiny::new(false, 16);
    let hf = export(&scratch, &tiny, true, ExportDtype::F16, &tiny).unwrap();
    let parent = scratch.path();
    let packed = export_packed(parent, "p", tiny.config(), tiny.ternary(), None, &tiny);
    let hash = |dir: &Path| verify_manifest(dir).unwrap().extra["ternary_hash"].clone();
    let mut hasher = TernaryHasher::new();
    for p in tiny.config().parameters().iter().filter(|p| p.is_matrix()) {
        hasher.add(&p.name, &tiny.packed[&p.name]);
    }
    assert_eq!(hash(&hf), hasher.finish());
    assert_eq!(hash(&hf), hash(&packed.unwrap()));
}

#[test]
fn dense_values_are_rounded_as_asked() {
    let scratch = Scratch::new("export-dense");
    let tiny = Tiny::new(false, 16);
    let dir = export(&scratch, &tiny, false, ExportDtype::Bf16, &Dense(&tiny)).unwrap();
    let file = TensorFile::open(&dir.join("model.safetensors")).unwrap();
    assert!(!file.metadata().contains_key("setun.group_size"));
    let rounded = tiny.latents[EMBED]
        .iter()
        .map(|&w| bf16::from_f32(w).to_f32());
    assert_eq!(file.floats(EMBED).unwrap(), rounded.collect::<Vec<_>>());
    assert_eq!(file.floats(Q_NORM).unwrap(), tiny.latents[Q_NORM]);
}

#[test]
fn what_cannot_be_exported_is_named_and_leaves_nothing() {
    let scratch = Scratch::new("export-refused");
    let good = Tiny::new(false, 16);
    let refused = |result: Result<PathBuf, IoError>, expected: &[&str]| {
        let error = result.unwrap_err().to_string();
        assert!(expected.iter().all(|e| error.contains(e)), "{error}");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    };
    let bf16 = ExportDtype::Bf16;
    refused(
        export(&scratch, &good, true, bf16, &Dense(&good)),
        &[EMBED, "float matrix"],
    );
    refused(
        export(&scratch, &good, false, bf16, &good),
        &[EMBED, "is ternary"],
    );

    let mut tiny = good.clone();
    // 1 + 2^-10 is an f16 and not a bf16.
    tiny.packed.get_mut(DOWN).unwrap().scales[9] = f16::from_f32(1.0 + 1.0 / 1024.0);
    let expected = [DOWN, "row 1 group 2", "not exact in bf16"];
    refused(
        export(&scratch, &tiny, true, ExportDtype::F16, &tiny),
        &expected,
    );
    let parent = scratch.path();
    let packed = export_packed(parent, "p", tiny.config(), tiny.ternary(), None, &tiny);
    refused(packed, &expected);

    let mut tiny = good.clone();
    tiny.latents.get_mut(DOWN).unwrap()[105] = 70_000.0;
    let dense = Dense(&tiny);
    let expected = [DOWN, "row 1 column 5", "float16 cannot hold 70000"];
    refused(
        export(&scratch, &tiny, false, ExportDtype::F16, &dense),
        &expected,
    );

    let mut tiny = good.clone();
    tiny.latents.get_mut(Q_NORM).unwrap()[3] = f32::NAN;
    let expected = [Q_NORM, "element 3 is NaN"];
    refused(export(&scratch, &tiny, true, bf16, &tiny), &expected);

    let mut tiny = good.clone();
    tiny.header.config.vocab_size = 100;
    let expected = ["tokenizer.json", "280 entries", "100"];
    refused(export(&scratch, &tiny, true, bf16, &tiny), &expected);
    let mut other = good.clone();
    other.header.ternary.group_size = 32;
    refused(
        export(&scratch, &other, true, bf16, &good),
        &[EMBED, "group size"],
    );
}

#[test]
fn an_earlier_export_is_kept() {
    let scratch = Scratch::new("export-again");
    let tiny = Tiny::new(false, 16);
    let dir = export(&scratch, &tiny, true, ExportDtype::Bf16, &tiny).unwrap();
    let again = export(&scratch, &tiny, true, ExportDtype::F16, &tiny).unwrap_err();
    assert!(matches!(again, IoError::Exists { .. }), "{again}");
    verify_manifest(&dir).unwrap();
}

/// The dense Qwen3 models with the vocabulary of PrismML's files (stock Qwen3 has 151,936).
fn qwen3(
    vocab_size: usize,
    (hidden_size, intermediate_size): (usize, usize),
    (num_hidden_layers, num_attention_heads): (usize, usize),
    tie_word_embeddings: bool,
) -> Qwen3Config {
    Qwen3Config {
        vocab_size,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: 8,
        head_dim: 128,
        tie_word_embeddings,
        ..Tiny::new(true, 128).config().clone()
    }
}

/// Bytes of all matrices in blocks of `block`, as the header of a GGUF file places them.
fn block_bytes(config: &Qwen3Config, block: BlockType) -> u64 {
    let parameters = config.parameters();
    let matrices = parameters.iter().filter(|parameter| parameter.is_matrix());
    let tensors: Vec<_> = matrices
        .map(|p| (p.name.clone(), p.shape.clone(), GgufType::Block(block)))
        .collect();
    let layout = setun_formats::gguf::write_header(&mut Vec::new(), &[], &tensors).unwrap();
    layout.tensors.iter().map(|tensor| tensor.num_bytes).sum()
}

#[test]
fn byte_counts_of_the_qwen3_models() {
    let ternary = TernaryInfo {
        group_size: 128,
        scale_rule: ScaleRule::Mean,
        numerics: Numerics::Int8,
    };
    type Row = (
        (usize, usize),
        (usize, usize),
        bool,
        u64,
        [(usize, [u64; 3]); 2],
    );
    // PQ2_0, PTQ1_0, and Q2_0 which is as large as MLX; for both vocabularies. The sums are
    // n / 128 * 34, n / 128 * 28 and n / 64 * 18 of the published models.
    let table: [Row; 4] = [
        (
            (1024, 3072),
            (28, 16),
            true,
            65_536,
            [
                (151_669, [158_235_728, 130_311_776, 167_543_712]),
                (151_936, [158_308_352, 130_371_584, 167_620_608]),
            ],
        ),
        (
            (2048, 6144),
            (28, 16),
            true,
            123_904,
            [
                (151_669, [456_849_568, 376_229_056, 483_723_072]),
                (151_936, [456_994_816, 376_348_672, 483_876_864]),
            ],
        ),
        (
            (2560, 9728),
            (36, 32),
            true,
            196_096,
            [
                (151_669, [1_068_234_440, 879_722_480, 1_131_071_760]),
                (151_936, [1_068_416_000, 879_872_000, 1_131_264_000]),
            ],
        ),
        (
            (4096, 12288),
            (36, 32),
            false,
            308_224,
            [
                (151_669, [2_175_001_216, 1_791_177_472, 2_302_942_464]),
                (151_936, [2_175_582_208, 1_791_655_936, 2_303_557_632]),
            ],
        ),
    ];
    for (widths, depths, tied, norms, counts) in table {
        for (vocab_size, [pq2_0, ptq1_0, q2_0]) in counts {
            let config = qwen3(vocab_size, widths, depths, tied);
            let norm_weights = |p: &&setun_formats::ParameterInfo| !p.is_matrix();
            let parameters = config.parameters();
            let found: usize = parameters
                .iter()
                .filter(norm_weights)
                .map(|p| p.numel())
                .sum();
            assert_eq!(found as u64, norms);
            assert_eq!(block_bytes(&config, BlockType::Pq2_0), pq2_0);
            assert_eq!(block_bytes(&config, BlockType::Ptq1_0), ptq1_0);
            assert_eq!(block_bytes(&config, BlockType::Q2_0), q2_0);
            let mlx = Encoding::Mlx { group_size: 128 };
            let items = items(&config, Some(&ternary), |_| mlx);
            let matrices = items.iter().filter(|item| item.parameter.is_matrix());
            assert_eq!(matrices.map(Item::num_bytes).sum::<u64>(), q2_0);
        }
    }
}
