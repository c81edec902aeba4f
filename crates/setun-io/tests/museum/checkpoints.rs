//! Checkpoint directories: the manifest and the files that it answers for.

use crate::exhibit::{Exhibit, Files, Item};
use crate::specimen::{EMBED, NORM, Parts, checkpoint, committed, config_json, entries, manifest};
use serde_json::{Value, json};
use setun_formats::tensors::Dtype;

const MANIFEST: &str = "MANIFEST.json";
const LATENTS: &str = "latents.safetensors";
const PACKED: &str = "packed.safetensors";

fn good_extra() -> Value {
    json!({ "step": 7, "ternary_hash": "unchecked here", "group_size": 8,
        "scale_rule": "mean", "numerics": "int8" })
}

/// A checkpoint whose files change before the manifest is written.
fn before(change: impl FnOnce(&mut Files)) -> Files {
    let mut files = checkpoint();
    change(&mut files);
    committed(files, &good_extra())
}

/// A checkpoint whose files change afterwards.
fn after(change: impl FnOnce(&mut Files)) -> Files {
    let mut files = before(|_| {});
    change(&mut files);
    files
}

/// A checkpoint whose manifest says something else, with a right checksum.
fn saying(version: &str, change: impl FnOnce(&mut Value)) -> Files {
    let mut files = checkpoint();
    let mut listed = entries(&files);
    change(&mut listed);
    let extra = good_extra();
    let rest = format!("\"version\": {version}, \"files\": {listed}, \"extra\": {extra}");
    files.insert(MANIFEST.to_owned(), manifest(&rest));
    files
}

/// A manifest that lists a file under this name.
fn listing(name: &str) -> Files {
    saying("1", |listed| {
        let entry = listed["config.json"].clone();
        listed[name] = entry;
    })
}

/// A manifest of this text, with a right checksum.
fn rest(text: &str) -> Files {
    after(|files| drop(files.insert(MANIFEST.to_owned(), manifest(text))))
}

fn latents(change: impl FnOnce(&mut Parts)) -> Files {
    before(|files| {
        let mut parts = Parts::dense();
        change(&mut parts);
        files.insert(LATENTS.to_owned(), parts.bytes());
    })
}

pub fn good() -> Vec<Item> {
    let dense = {
        let mut files = checkpoint();
        files.remove(PACKED);
        committed(files, &json!({ "step": 7 }))
    };
    let files = [before(|_| {}), dense];
    files.into_iter().map(Item::Directory).collect()
}

pub fn exhibits() -> Vec<Exhibit> {
    let mut all = manifests();
    all.extend(names());
    all.extend(files());
    all.extend(contents());
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

fn manifests() -> Vec<Exhibit> {
    let edited =
        |edit: fn(&mut Vec<u8>)| after(|files| edit(files.get_mut(MANIFEST).expect("one")));
    vec![
        exhibit(
            "no-manifest",
            "no manifest",
            &[MANIFEST],
            after(|files| drop(files.remove(MANIFEST))),
        ),
        exhibit(
            "empty",
            "a manifest of no bytes",
            &[MANIFEST, "checksum"],
            edited(Vec::clear),
        ),
        exhibit(
            "cut",
            "a manifest without its end",
            &[MANIFEST, "checksum"],
            edited(|text| text.truncate(text.len() / 2)),
        ),
        exhibit(
            "cut-in-checksum",
            "not even a checksum",
            &[MANIFEST, "checksum"],
            edited(|text| text.truncate(40)),
        ),
        exhibit(
            "edited",
            "an edited manifest",
            &[MANIFEST, "checksum"],
            edited(|text| {
                let at = text
                    .windows(4)
                    .position(|four| four == b"step")
                    .expect("a step");
                text[at] = b'S';
            }),
        ),
        exhibit(
            "longer",
            "a space behind the manifest",
            &[MANIFEST, "checksum"],
            edited(|text| text.push(b' ')),
        ),
        exhibit(
            "not-json",
            "a right checksum over words",
            &[MANIFEST, "not a manifest"],
            rest("words"),
        ),
        exhibit(
            "no-files",
            "no list of files",
            &[MANIFEST, "`files`"],
            rest("\"version\": 1, \"extra\": {}"),
        ),
        exhibit(
            "no-version",
            "no version",
            &[MANIFEST, "`version`"],
            rest("\"files\": {}, \"extra\": {}"),
        ),
        exhibit(
            "files-list",
            "files that are a list",
            &[MANIFEST, "not a manifest"],
            rest("\"version\": 1, \"files\": [], \"extra\": {}"),
        ),
        exhibit("bomb", "a deep record", &[MANIFEST, "recursion limit"], {
            let bomb = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
            rest(&format!(
                "\"version\": 1, \"files\": {{}}, \"extra\": {bomb}"
            ))
        }),
        exhibit(
            "future",
            "version 2",
            &[MANIFEST, "version 2"],
            saying("2", |_| {}),
        ),
        exhibit(
            "version-zero",
            "version 0",
            &[MANIFEST, "version 0"],
            saying("0", |_| {}),
        ),
        exhibit(
            "version-text",
            "a version that is a text",
            &[MANIFEST, "not a manifest"],
            saying("\"1\"", |_| {}),
        ),
        exhibit(
            "version-negative",
            "version -1",
            &[MANIFEST, "-1"],
            saying("-1", |_| {}),
        ),
    ]
}

fn names() -> Vec<Exhibit> {
    let plain: &[&str] = &[MANIFEST, "plain file name"];
    vec![
        exhibit("path-up", "a file above", plain, listing("../config.json")),
        exhibit(
            "path-absolute",
            "an absolute path",
            plain,
            listing("/etc/passwd"),
        ),
        exhibit(
            "path-below",
            "a file below",
            plain,
            listing("x/config.json"),
        ),
        exhibit(
            "path-backslash",
            "a path of Windows",
            plain,
            listing("..\\config.json"),
        ),
        exhibit(
            "path-drive",
            "a drive of Windows",
            plain,
            listing("C:config.json"),
        ),
        exhibit(
            "path-hidden",
            "a hidden file",
            plain,
            listing(".config.json"),
        ),
        exhibit("path-empty", "no name", plain, listing("")),
        exhibit(
            "path-nul",
            "a zero in the name",
            plain,
            listing("config.json\0"),
        ),
        exhibit(
            "not-there",
            "a file that is not there",
            &["ghost.json", "missing"],
            listing("ghost.json"),
        ),
    ]
}

fn files() -> Vec<Exhibit> {
    let entry =
        |key: &'static str, value: Value| saying("1", |listed| listed["config.json"][key] = value);
    vec![
        exhibit(
            "flipped-bit",
            "one bit of the weights",
            &[LATENTS, "BLAKE3"],
            after(|files| {
                let bytes = files.get_mut(LATENTS).expect("the latents");
                *bytes.last_mut().expect("not empty") ^= 1;
            }),
        ),
        exhibit(
            "swapped-letter",
            "one letter of the configuration",
            &["config.json", "BLAKE3"],
            after(|files| {
                let bytes = files.get_mut("config.json").expect("the configuration");
                *bytes.last_mut().expect("not empty") = b' ';
            }),
        ),
        exhibit(
            "cut-file",
            "weights without their last byte",
            &[PACKED, "the manifest says"],
            after(|files| {
                files
                    .get_mut(PACKED)
                    .expect("the packed file")
                    .truncate(1000)
            }),
        ),
        exhibit(
            "longer-file",
            "a byte behind the tokenizer",
            &["tokenizer.json", "the manifest says"],
            after(|files| {
                files
                    .get_mut("tokenizer.json")
                    .expect("the tokenizer")
                    .push(b'\n')
            }),
        ),
        exhibit(
            "lost-file",
            "a file is gone",
            &["tokenizer.json", "missing"],
            after(|files| drop(files.remove("tokenizer.json"))),
        ),
        exhibit(
            "wrong-hash",
            "a hash of zeros",
            &["config.json", "BLAKE3"],
            entry("blake3", json!("0".repeat(64))),
        ),
        exhibit(
            "short-hash",
            "half a hash",
            &["config.json", "BLAKE3"],
            entry("blake3", json!("00ff")),
        ),
        exhibit(
            "hash-number",
            "a hash that is a number",
            &[MANIFEST, "not a manifest"],
            entry("blake3", json!(7)),
        ),
        exhibit(
            "size-2-60",
            "a file of 2^60 bytes",
            &["config.json", "1152921504606846976"],
            entry("bytes", json!(1u64 << 60)),
        ),
        exhibit(
            "size-negative",
            "a file of -1 bytes",
            &[MANIFEST, "-1"],
            entry("bytes", json!(-1)),
        ),
        exhibit(
            "size-fraction",
            "a file of half a byte",
            &[MANIFEST, "0.5"],
            entry("bytes", json!(0.5)),
        ),
    ]
}

/// Manifests that fit, over files that do not.
fn contents() -> Vec<Exhibit> {
    vec![
        exhibit(
            "config-empty",
            "a configuration of no bytes",
            &["config.json", "JSON"],
            before(|files| drop(files.insert("config.json".to_owned(), Vec::new()))),
        ),
        exhibit(
            "config-of-others",
            "a configuration unlike the packed one",
            &[PACKED, "config.json"],
            before(|files| {
                let mut config = config_json();
                config["rms_norm_eps"] = json!(1e-5);
                files.insert("config.json".to_owned(), config.to_string().into_bytes());
            }),
        ),
        exhibit(
            "packed-lost",
            "packed weights that were promised",
            &[PACKED, "missing"],
            before(|files| drop(files.remove(PACKED))),
        ),
        exhibit(
            "packed-is-dense",
            "latents for packed weights",
            &[PACKED, "format"],
            before(|files| drop(files.insert(PACKED.to_owned(), Parts::dense().bytes()))),
        ),
        exhibit(
            "latents-bf16",
            "latents of another type",
            &[LATENTS, EMBED, "BF16"],
            latents(|parts| parts.retype(EMBED, Dtype::BF16, &[280, 8])),
        ),
        exhibit(
            "latents-turned",
            "latents of another shape",
            &[LATENTS, EMBED, "[8, 280]"],
            latents(|parts| parts.retype(EMBED, Dtype::F32, &[8, 280])),
        ),
        exhibit(
            "latents-without-norm",
            "a norm is missing",
            &[LATENTS, NORM, "missing"],
            latents(|parts| parts.remove(NORM)),
        ),
        exhibit(
            "latents-extra",
            "a tensor of no one",
            &[LATENTS, "extra"],
            latents(|parts| parts.add("extra", Dtype::F32, &[1], vec![0; 4])),
        ),
    ]
}
