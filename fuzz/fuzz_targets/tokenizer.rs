//! `tokenizer.json`: what is accepted encodes any text with ids below its vocabulary.
#![no_main]

use libfuzzer_sys::fuzz_target;
use setun_formats::Tokenizer;

/// Letters of several scripts, digits, an emoji of two code points, spaces, a special token.
const TEXT: &str = "Setun, 1958: три, ３ 三\u{2003}🧑\u{200d}🔬 é\r\n\t<|endoftext|>";

fuzz_target!(|bytes: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_bytes(bytes) else {
        return;
    };
    if let Ok(batch) = tokenizer.encode_batch(&[TEXT]) {
        let num_ids = tokenizer.vocab_size() as u32;
        assert!(batch.iter().flatten().all(|&id| id < num_ids));
        let _ = tokenizer.decode(&batch[0]);
    }
});
