//! The packed file: whatever opens gives every parameter of its config, or a refusal.
#![no_main]

use libfuzzer_sys::fuzz_target;
use setun_formats::PackedFile;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = PackedFile::parse(bytes) else {
        return;
    };
    for parameter in file.header().config.parameters() {
        if parameter.is_matrix() {
            let _ = file.matrix(&parameter.name);
        } else {
            let _ = file.norm(&parameter.name);
        }
    }
});
