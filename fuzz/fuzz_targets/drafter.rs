//! The file of a block drafter: whatever opens gives every parameter, or a refusal.
#![no_main]

use libfuzzer_sys::fuzz_target;
use setun_formats::DrafterFile;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = DrafterFile::parse(bytes) else {
        return;
    };
    for parameter in file.header.parameters() {
        if parameter.is_matrix() {
            let _ = file.tensors.matrix(&parameter.name);
        } else {
            let _ = file.tensors.norm(&parameter.name);
        }
    }
});
