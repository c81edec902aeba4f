//! From token ids to bytes, and from bytes to whole characters.

use super::Tokenizer;

/// Decodes a sequence of tokens as it grows; see [`Tokenizer::stream`].
#[derive(Clone, Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The start of a character that is not complete, at most three bytes.
    pending: Vec<u8>,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        let pending = Vec::new();
        Self { tokenizer, pending }
    }

    /// Takes the next token and returns the characters that it completes, if any. Bytes
    /// that cannot become a character come out as U+FFFD.
    pub fn push(&mut self, id: u32) -> Option<String> {
        self.tokenizer.append_bytes(id, &mut self.pending);
        let text = take_complete(&mut self.pending);
        (!text.is_empty()).then_some(text)
    }

    /// Ends the sequence: U+FFFD for a character that was never completed.
    pub fn finish(self) -> Option<String> {
        (!self.pending.is_empty()).then(|| char::REPLACEMENT_CHARACTER.to_string())
    }
}

impl Tokenizer {
    /// Appends the bytes that token `id` stands for; nothing for an id without a token.
    pub(super) fn append_bytes(&self, id: u32, bytes: &mut Vec<u8>) {
        let added = self
            .special
            .get_added_vocabulary()
            .get_added_tokens_decoder();
        if let Some(token) = added.get(&id) {
            bytes.extend_from_slice(token.content.as_bytes());
            return;
        }
        let Some(token) = self.special.id_to_token(id) else {
            return;
        };
        let start = bytes.len();
        for c in token.chars() {
            let Some(byte) = byte_of(c) else {
                // Not in the alphabet of bytes: the token stands for itself.
                bytes.truncate(start);
                bytes.extend_from_slice(token.as_bytes());
                return;
            };
            bytes.push(byte);
        }
    }
}

/// The byte behind a character of a byte-level token. GPT-2's map: printable Latin-1
/// characters stand for their own byte, the other 68 bytes follow from U+0100 in order.
pub(super) fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121) as u8 + 0x7f),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Takes all of `pending` except the start of a character that may still be completed;
/// replaces what is not UTF-8 as [`String::from_utf8_lossy`] does.
fn take_complete(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        let error = match std::str::from_utf8(pending) {
            Ok(valid) => {
                text.push_str(valid);
                pending.clear();
                return text;
            }
            Err(error) => error,
        };
        let valid = pending.drain(..error.valid_up_to()).collect::<Vec<u8>>();
        text.push_str(&String::from_utf8_lossy(&valid));
        let Some(bad) = error.error_len() else {
            return text;
        };
        text.push(char::REPLACEMENT_CHARACTER);
        pending.drain(..bad);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn the_map_is_that_of_the_byte_level_pre_tokenizer() {
        let alphabet: BTreeSet<char> = ByteLevel::alphabet().into_iter().collect();
        let bytes: BTreeSet<u8> = alphabet.iter().filter_map(|&c| byte_of(c)).collect();
        assert_eq!((alphabet.len(), bytes.len()), (256, 256));
        let mapped = (0..0x400)
            .filter_map(char::from_u32)
            .filter(|&c| byte_of(c).is_some());
        assert_eq!(mapped.collect::<BTreeSet<char>>(), alphabet);
        for (c, byte) in [
            ('a', b'a'),
            ('Ġ', b' '),
            ('Ċ', b'\n'),
            ('é', 0xe9),
            ('Ń', 0xad),
        ] {
            assert_eq!(byte_of(c), Some(byte));
        }
    }

    #[test]
    fn pieces_of_characters_are_kept_and_garbage_is_replaced() {
        let mut inputs: Vec<Vec<u8>> = vec![
            "aé€😀z".into(),
            vec![0xff, b'a', 0xc3, 0x28, 0xe2, 0x82, 0xf0, 0x9f, 0x98, 0x80],
            vec![0xe2, 0x82],
            vec![0xf0, 0x9f, 0xff],
        ];
        inputs.push((0..=255).collect());
        for input in inputs {
            let (mut pending, mut text) = (Vec::new(), String::new());
            for &byte in &input {
                pending.push(byte);
                text.push_str(&take_complete(&mut pending));
                assert!(pending.len() <= 3);
            }
            if !pending.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
            assert_eq!(text, String::from_utf8_lossy(&input));
        }
    }
}
