//! When a generation ends.

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model produced this end token. It is the last generated token; whoever shows
    /// the text leaves it out.
    EndToken(u32),
    /// [`StopRules::max_tokens`] tokens were generated.
    MaxTokens,
    /// Prompt and generated tokens fill the context.
    ContextFull,
    /// The caller wanted no more tokens.
    Stopped,
}

/// The rules that end a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopRules {
    /// Tokens that end the text (Hugging Face: `eos_token_id`). Empty: none does.
    pub end_tokens: Vec<u32>,
    /// Most tokens to generate, the end token included. 0 generates nothing.
    pub max_tokens: usize,
}

impl StopRules {
    /// Whether the generation is over, asked before the first token and after each one.
    ///
    /// `generated` holds the tokens after a prompt of `num_prompt` tokens; `context_size`
    /// is the most tokens that prompt and text may have together. Only the last generated
    /// token is looked at: an end token inside the prompt ends nothing. Where several
    /// rules hold at once, the text has ended before it is cut: the end token is named
    /// first, then [`FinishReason::MaxTokens`], then [`FinishReason::ContextFull`].
    pub fn finish_reason(
        &self,
        generated: &[u32],
        num_prompt: usize,
        context_size: usize,
    ) -> Option<FinishReason> {
        if let Some(&token) = generated.last()
            && self.end_tokens.contains(&token)
        {
            return Some(FinishReason::EndToken(token));
        }
        if generated.len() >= self.max_tokens {
            return Some(FinishReason::MaxTokens);
        }
        if num_prompt.saturating_add(generated.len()) >= context_size {
            return Some(FinishReason::ContextFull);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(end_tokens: &[u32], max_tokens: usize) -> StopRules {
        StopRules {
            end_tokens: end_tokens.to_vec(),
            max_tokens,
        }
    }

    #[test]
    fn goes_on_while_no_rule_holds() {
        assert_eq!(rules(&[9], 4).finish_reason(&[], 3, 16), None);
        assert_eq!(rules(&[9], 4).finish_reason(&[1, 2, 3], 3, 16), None);
        assert_eq!(rules(&[], 4).finish_reason(&[9], 3, 16), None);
    }

    #[test]
    fn any_end_token_ends_and_is_named() {
        let rules = rules(&[9, 7], 100);
        let ended = |generated: &[u32]| rules.finish_reason(generated, 3, 16);
        assert_eq!(ended(&[1, 9]), Some(FinishReason::EndToken(9)));
        assert_eq!(ended(&[7]), Some(FinishReason::EndToken(7)));
        assert_eq!(ended(&[9, 1]), None, "only the last token counts");
    }

    #[test]
    fn the_number_of_tokens_is_exact() {
        let max_two = rules(&[9], 2);
        assert_eq!(max_two.finish_reason(&[1], 3, 16), None);
        let full = max_two.finish_reason(&[1, 2], 3, 16);
        assert_eq!(full, Some(FinishReason::MaxTokens));
        let nothing = rules(&[9], 0).finish_reason(&[], 3, 16);
        assert_eq!(nothing, Some(FinishReason::MaxTokens));
    }

    #[test]
    fn the_context_is_filled_and_never_exceeded() {
        let rules = rules(&[9], usize::MAX);
        assert_eq!(rules.finish_reason(&[1, 2], 3, 6), None);
        for (generated, num_prompt) in [(&[1, 2, 3][..], 3), (&[][..], 6), (&[][..], 7)] {
            let full = rules.finish_reason(generated, num_prompt, 6);
            assert_eq!(full, Some(FinishReason::ContextFull));
        }
        let huge = rules.finish_reason(&[1], usize::MAX, usize::MAX);
        assert_eq!(huge, Some(FinishReason::ContextFull));
    }

    #[test]
    fn an_ended_text_is_not_called_cut() {
        let rules = rules(&[9], 2);
        let ended = rules.finish_reason(&[1, 9], 4, 6);
        assert_eq!(ended, Some(FinishReason::EndToken(9)));
        let cut = rules.finish_reason(&[1, 2], 4, 6);
        assert_eq!(cut, Some(FinishReason::MaxTokens));
    }
}
