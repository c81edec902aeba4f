//! The GGUF parser, and everything that is read from its metadata. Tensors lie inside the
//! file, and blocks of trits decode or are refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use setun_formats::gguf::{self, GgufHeader, GgufLimits, GgufType};
use setun_ternary::blocks::decode_matrix;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = GgufHeader::parse(bytes, bytes.len() as u64, &GgufLimits::default()) else {
        return;
    };
    let _ = gguf::qwen3_config(&header);
    let _ = gguf::ternary_info(&header);
    let _ = gguf::tokenizer_from_metadata(&header);
    for tensor in &header.tensors {
        let end = tensor.offset.checked_add(tensor.num_bytes).expect("checked by the parser");
        assert!(end <= bytes.len() as u64, "{} leaves the file", tensor.name);
        let (GgufType::Block(block), &[rows, cols]) = (tensor.ggml_type, tensor.shape.as_slice())
        else {
            continue;
        };
        let payload = &bytes[tensor.offset as usize..end as usize];
        for group_size in [32, 64, 128, 256] {
            let _ = decode_matrix(block, rows, cols, payload, group_size);
        }
    }
});
