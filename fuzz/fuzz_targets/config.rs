//! `config.json` and `generation_config.json`: what is accepted is written back the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use setun_formats::Qwen3Config;
use setun_formats::generation_config::GenerationConfig;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(config) = Qwen3Config::parse(bytes) {
        let again = Qwen3Config::parse(config.to_json().as_bytes());
        assert_eq!(again.expect("what is written can be read"), config);
    }
    if let Ok(generation) = GenerationConfig::from_bytes(bytes) {
        let again = GenerationConfig::from_bytes(generation.to_json().as_bytes());
        assert_eq!(again.expect("what is written can be read"), generation);
    }
});
