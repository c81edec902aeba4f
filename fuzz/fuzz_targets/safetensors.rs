//! The safetensors parser: what it accepts must be readable to the last tensor.
#![no_main]

use libfuzzer_sys::fuzz_target;
use setun_formats::tensors;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = tensors::open(bytes) else {
        return;
    };
    tensors::metadata(bytes).expect("what opens has metadata");
    for (name, tensor) in file.tensors() {
        // Another type than a float is a refusal; a float must give one value an element.
        if let Ok(values) = tensors::f32_values(&name, &tensor) {
            assert_eq!(values.len(), tensor.shape().iter().product::<usize>());
        }
    }
});
