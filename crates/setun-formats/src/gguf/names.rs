//! The names of a Qwen3 model's tensors in GGUF and in Hugging Face's files.

/// Tensors outside of the layers: Hugging Face's name, GGUF's name.
const OUTER: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// Tensors of a layer, behind `model.layers.N.` and `blk.N.`.
const OF_LAYER: [(&str, &str); 11] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
];

const HF_LAYER: &str = "model.layers.";
const GGUF_LAYER: &str = "blk.";

/// GGUF's name of the parameter with Hugging Face's name `hf_name`; `None` for what is no
/// parameter of a Qwen3 model.
pub fn tensor_name(hf_name: &str) -> Option<String> {
    if let Some((_, name)) = OUTER.iter().find(|(hf, _)| *hf == hf_name) {
        return Some((*name).to_owned());
    }
    let (layer, part) = split_layer(hf_name, HF_LAYER)?;
    let (_, name) = OF_LAYER.iter().find(|(hf, _)| *hf == part)?;
    Some(format!("{GGUF_LAYER}{layer}.{name}"))
}

/// The inverse of [`tensor_name`].
pub fn hf_name(gguf_name: &str) -> Option<String> {
    if let Some((hf, _)) = OUTER.iter().find(|(_, name)| *name == gguf_name) {
        return Some((*hf).to_owned());
    }
    let (layer, part) = split_layer(gguf_name, GGUF_LAYER)?;
    let (hf, _) = OF_LAYER.iter().find(|(_, name)| *name == part)?;
    Some(format!("{HF_LAYER}{layer}.{hf}"))
}

/// Number of the layer and the rest behind `prefix`; a number has one spelling.
fn split_layer<'a>(name: &'a str, prefix: &str) -> Option<(u32, &'a str)> {
    let (digits, part) = name.strip_prefix(prefix)?.split_once('.')?;
    let layer: u32 = digits.parse().ok()?;
    (layer.to_string() == digits).then_some((layer, part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Qwen3Config;
    use crate::config::tests::tied;

    #[test]
    fn every_parameter_has_one_name_and_back() {
        let config = Qwen3Config {
            tie_word_embeddings: false,
            num_hidden_layers: 12,
            ..tied()
        };
        let parameters = config.parameters();
        assert_eq!(parameters.len(), 3 + 12 * 11);
        for parameter in parameters {
            let name = tensor_name(&parameter.name).unwrap();
            assert_eq!(hf_name(&name), Some(parameter.name));
        }
        let name = tensor_name("model.layers.11.self_attn.o_proj.weight");
        assert_eq!(name.as_deref(), Some("blk.11.attn_output.weight"));
    }

    #[test]
    fn other_names_are_none() {
        for name in [
            "",
            "blk.0.attn_q.bias",
            "blk.00.attn_q.weight",
            "blk.+1.attn_q.weight",
            "blk..attn_q.weight",
            "blk.99999999999.attn_q.weight",
            "rope_freqs.weight",
            "model.norm.weight",
        ] {
            assert_eq!(hf_name(name), None, "{name}");
        }
        for name in ["token_embd.weight", "model.layers.0.mlp.weight", "lm_head"] {
            assert_eq!(tensor_name(name), None, "{name}");
        }
    }
}
