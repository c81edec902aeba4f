//! Hugging Face directories: the index of the shards, and the weights themselves.

use crate::exhibit::{Exhibit, Files, Item};
use crate::specimen::{DOWN, EMBED, NORM, Parts, config, huggingface};
use serde_json::{Map, Value, json};
use setun_formats::tensors::Dtype;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";

/// The model in two shards: the embedding, and everything else.
struct Sharded {
    first: Parts,
    second: Parts,
    map: Map<String, Value>,
}

impl Sharded {
    fn new() -> Self {
        let (mut first, mut second) = (Parts::dense(), Parts::dense());
        let mut map = Map::new();
        for parameter in config().parameters() {
            let in_first = parameter.name == EMBED;
            if in_first { &mut second } else { &mut first }.remove(&parameter.name);
            let shard = if in_first { FIRST } else { SECOND };
            map.insert(parameter.name, json!(shard));
        }
        Self { first, second, map }
    }

    fn files(self) -> Files {
        let index = json!({ "metadata": { "total_size": 0 }, "weight_map": self.map });
        let mut files = indexed(index.to_string().as_bytes());
        files.insert(FIRST.to_owned(), self.first.bytes());
        files.insert(SECOND.to_owned(), self.second.bytes());
        files
    }
}

fn sharded(change: impl FnOnce(&mut Sharded)) -> Files {
    let mut model = Sharded::new();
    change(&mut model);
    model.files()
}

/// A directory whose only weights are those of this index.
fn indexed(index: &[u8]) -> Files {
    let mut files = huggingface();
    files.remove(SINGLE);
    files.insert(INDEX.to_owned(), index.to_vec());
    files
}

/// The shards of an index that names another file for the embedding.
fn renamed(name: &str) -> Files {
    sharded(|model| model.map[EMBED] = json!(name))
}

/// One file of weights after a change.
fn single(change: impl FnOnce(&mut Parts)) -> Files {
    let mut parts = Parts::dense();
    change(&mut parts);
    let mut files = huggingface();
    files.insert(SINGLE.to_owned(), parts.bytes());
    files
}

/// Values that are ternary in groups of 8 and say so, after a change.
fn marked(change: impl FnOnce(&mut Parts)) -> Files {
    single(|parts| {
        for (info, payload) in parts.infos.iter().zip(&mut parts.payloads) {
            if info.shape.len() == 2 {
                *payload = 0.25f32.to_le_bytes().repeat(payload.len() / 4);
            }
        }
        for (key, value) in [
            ("setun.group_size", "8"),
            ("setun.scale_rule", "mean"),
            ("setun.numerics", "int8"),
        ] {
            parts.metadata.insert(key.to_owned(), value.to_owned());
        }
        change(parts);
    })
}

fn mark(key: &str, value: &str) -> Files {
    marked(|parts| {
        drop(
            parts
                .metadata
                .insert(format!("setun.{key}"), value.to_owned()),
        )
    })
}

pub fn good() -> Vec<Item> {
    let tied_head = |parts: &mut Parts| {
        parts.add(
            "lm_head.weight",
            Dtype::F32,
            &[280, 8],
            vec![0; 280 * 8 * 4],
        );
    };
    let files = [
        huggingface(),
        sharded(|_| {}),
        single(tied_head),
        marked(|_| {}),
    ];
    files.into_iter().map(Item::Directory).collect()
}

pub fn exhibits() -> Vec<Exhibit> {
    let mut all = indices();
    all.extend(names());
    all.extend(shards());
    all.extend(weights());
    all.extend(marks());
    all
}

fn exhibit(
    name: &'static str,
    wrong: &'static str,
    words: &'static [&'static str],
    files: Files,
) -> Exhibit {
    Exhibit::new(name, wrong, words, Item::Directory(files))
}

fn indices() -> Vec<Exhibit> {
    let bad = |text: &str| indexed(text.as_bytes());
    vec![
        exhibit("index-empty", "an empty index", &[INDEX, "line 1"], bad("")),
        exhibit(
            "index-cut",
            "a cut index",
            &[INDEX, "line 1"],
            bad("{\"weight_map\": {\"a\":"),
        ),
        exhibit(
            "index-html",
            "a web page",
            &[INDEX, "line 1"],
            bad("<html></html>"),
        ),
        exhibit("index-list", "a list", &[INDEX], bad("[]")),
        exhibit(
            "index-without-map",
            "no map",
            &[INDEX, "weight_map"],
            bad("{\"metadata\": {}}"),
        ),
        exhibit(
            "index-map-list",
            "a map that is a list",
            &[INDEX],
            bad("{\"weight_map\": [\"a\"]}"),
        ),
        exhibit(
            "index-map-number",
            "a file that is a number",
            &[INDEX],
            bad("{\"weight_map\": {\"a\": 1}}"),
        ),
        exhibit(
            "index-map-empty",
            "no shards",
            &[INDEX, "names no tensor"],
            bad("{\"weight_map\": {}}"),
        ),
        exhibit(
            "index-bomb",
            "nested lists",
            &[INDEX, "line 1"],
            bad(&format!("{{\"weight_map\": {}", "[".repeat(1 << 20))),
        ),
        exhibit(
            "index-bad-utf8",
            "not UTF-8",
            &[INDEX],
            indexed(b"{\"weight_map\": {\"\xff\": \"a\"}}"),
        ),
    ]
}

fn names() -> Vec<Exhibit> {
    let plain: &[&str] = &[INDEX, "plain file name"];
    vec![
        exhibit(
            "path-up",
            "a file above the directory",
            plain,
            renamed("../model.safetensors"),
        ),
        exhibit(
            "path-up-and-down",
            "a way out and back",
            plain,
            renamed("x/../../model.safetensors"),
        ),
        exhibit("path-dots", "the directory above", plain, renamed("..")),
        exhibit(
            "path-absolute",
            "an absolute path",
            plain,
            renamed("/etc/passwd"),
        ),
        exhibit(
            "path-below",
            "a directory below",
            plain,
            renamed("x/model.safetensors"),
        ),
        exhibit(
            "path-backslash",
            "a path of Windows",
            plain,
            renamed("..\\model.safetensors"),
        ),
        exhibit(
            "path-drive",
            "a drive of Windows",
            plain,
            renamed("C:model.safetensors"),
        ),
        exhibit(
            "path-nul",
            "a zero in the name",
            plain,
            renamed("model.safetensors\0.txt"),
        ),
        exhibit(
            "path-hidden",
            "a hidden file",
            plain,
            renamed(".model.safetensors"),
        ),
        exhibit("path-empty", "no name", plain, renamed("")),
    ]
}

fn shards() -> Vec<Exhibit> {
    let ghost = |model: &mut Sharded| drop(model.map.insert("ghost".to_owned(), json!(FIRST)));
    vec![
        exhibit("shard-missing", "a shard that is not there", &[SECOND], {
            let mut files = sharded(|_| {});
            files.remove(SECOND);
            files
        }),
        exhibit(
            "shard-empty",
            "a shard of no bytes",
            &[SECOND, "0 bytes"],
            {
                let mut files = sharded(|_| {});
                files.insert(SECOND.to_owned(), Vec::new());
                files
            },
        ),
        exhibit(
            "shard-cut",
            "a shard without its last byte",
            &[FIRST, "cut off"],
            {
                let mut files = sharded(|_| {});
                files.get_mut(FIRST).expect("a shard").pop();
                files
            },
        ),
        exhibit(
            "shard-pointer",
            "a pointer of Git LFS for a shard",
            &[FIRST],
            {
                let mut files = sharded(|_| {});
                let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
                files.insert(FIRST.to_owned(), pointer.into());
                files
            },
        ),
        exhibit(
            "shard-itself",
            "the index as a shard",
            &[INDEX],
            renamed(INDEX),
        ),
        exhibit(
            "in-two-shards",
            "a tensor in two shards",
            &[SECOND, NORM, "another shard"],
            sharded(|model| model.first.add(NORM, Dtype::F32, &[8], vec![0; 32])),
        ),
        exhibit(
            "in-no-shard",
            "a tensor in no shard",
            &[NORM, "it is not there"],
            sharded(|model| model.second.remove(NORM)),
        ),
        exhibit(
            "ghost",
            "a tensor that only the index knows",
            &["ghost"],
            sharded(ghost),
        ),
        exhibit(
            "unlisted",
            "a tensor that the index does not know",
            &[FIRST, "extra"],
            sharded(|model| model.first.add("extra", Dtype::F32, &[1], vec![0; 4])),
        ),
    ]
}

fn weights() -> Vec<Exhibit> {
    let without = |name: &str| {
        let mut files = huggingface();
        files.remove(name);
        files
    };
    let replaced = |bytes: &[u8]| {
        let mut files = huggingface();
        files.insert(SINGLE.to_owned(), bytes.to_vec());
        files
    };
    vec![
        exhibit(
            "no-config",
            "weights without a configuration",
            &["config.json"],
            without("config.json"),
        ),
        exhibit(
            "no-weights",
            "a configuration without weights",
            &["not a model", SINGLE],
            without(SINGLE),
        ),
        exhibit(
            "nothing",
            "an empty directory",
            &["not a model"],
            Files::new(),
        ),
        exhibit(
            "weights-empty",
            "weights of no bytes",
            &[SINGLE, "0 bytes"],
            replaced(b""),
        ),
        exhibit(
            "weights-pickle",
            "a pickle",
            &[SINGLE],
            replaced(b"\x80\x02}q\x00X\x05\x00\x00\x00"),
        ),
        exhibit(
            "no-norm",
            "a norm is missing",
            &[NORM, "missing"],
            single(|parts| parts.remove(NORM)),
        ),
        exhibit(
            "bias",
            "a bias that would be dropped",
            &[SINGLE, "q_proj.bias"],
            {
                let name = "model.layers.0.self_attn.q_proj.bias";
                single(|parts| parts.add(name, Dtype::F32, &[8], vec![0; 32]))
            },
        ),
        exhibit(
            "second-layer",
            "a layer too many",
            &[SINGLE, "model.layers.1"],
            {
                let name = "model.layers.1.input_layernorm.weight";
                single(|parts| parts.add(name, Dtype::F32, &[8], vec![0; 32]))
            },
        ),
        exhibit(
            "integers",
            "weights that are integers",
            &[SINGLE, EMBED, "I32"],
            single(|parts| parts.retype(EMBED, Dtype::I32, &[280, 8])),
        ),
        exhibit(
            "turned",
            "a matrix the other way round",
            &[SINGLE, DOWN, "[16, 8]"],
            single(|parts| parts.retype(DOWN, Dtype::F32, &[16, 8])),
        ),
        exhibit(
            "no-words",
            "no rows",
            &["config.json", "vocab_size", "is 0"],
            single(|parts| parts.retype(EMBED, Dtype::F32, &[0, 8])),
        ),
        exhibit(
            "three-dimensions",
            "a matrix with a third size",
            &[SINGLE, EMBED, "[280, 8, 1]"],
            single(|parts| parts.retype(EMBED, Dtype::F32, &[280, 8, 1])),
        ),
    ]
}

fn marks() -> Vec<Exhibit> {
    vec![
        exhibit(
            "mark-group-zero",
            "groups of 0",
            &["group_size", "\"0\""],
            mark("group_size", "0"),
        ),
        exhibit(
            "mark-group-text",
            "groups of many",
            &["group_size", "many"],
            mark("group_size", "many"),
        ),
        exhibit(
            "mark-group-huge",
            "groups of 2^60",
            &["group_size"],
            mark("group_size", "1152921504606846976"),
        ),
        exhibit(
            "mark-rule",
            "an unknown rule",
            &["scale_rule", "median"],
            mark("scale_rule", "median"),
        ),
        exhibit(
            "mark-numerics",
            "unknown numerics",
            &["numerics", "fp8"],
            mark("numerics", "fp8"),
        ),
        exhibit(
            "mark-no-rule",
            "no rule",
            &["scale_rule"],
            marked(|parts| drop(parts.metadata.remove("setun.scale_rule"))),
        ),
        exhibit(
            "mark-is-a-lie",
            "a value that is not ternary",
            &[EMBED, "row 3 column 5", "0.125"],
            marked(|parts| parts.poke(EMBED, 4 * (3 * 8 + 5), &0.125f32.to_le_bytes())),
        ),
        exhibit(
            "mark-nan",
            "a value of NaN",
            &[EMBED, "row 3", "NaN"],
            marked(|parts| parts.poke(EMBED, 4 * (3 * 8 + 5), &f32::NAN.to_le_bytes())),
        ),
        exhibit(
            "mark-infinite",
            "an infinite value",
            &[EMBED, "row 3"],
            marked(|parts| parts.poke(EMBED, 4 * (3 * 8 + 5), &f32::INFINITY.to_le_bytes())),
        ),
    ]
}
