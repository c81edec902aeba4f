//! Chat: from messages to the text of a prompt.
//!
//! A model brings its own chat template, a Jinja program from a stranger, in
//! `tokenizer_config.json` (key `chat_template`) or in GGUF metadata
//! (`tokenizer.chat_template`). It runs in a sandbox: it sees only the messages, and its
//! work, its values and its output are bounded by [`ChatLimits`]. A model without one
//! gets [`ChatTemplate::ChatMl`], the format of Qwen3, written out in Rust.
//!
//! What a template sees follows transformers: `messages`, `tools`,
//! `add_generation_prompt`, `enable_thinking`, the special tokens of the tokenizer,
//! `raise_exception` and `strftime_now`; blocks are trimmed; `tojson` writes what
//! Python's `json.dumps` writes; values print as in Python.

mod chatml;
mod clock;
mod engine;
mod guard;
mod json;
mod text;

pub use clock::Clock;
pub use json::Json;

use serde::Deserialize;
use thiserror::Error;

/// What a chat template may use up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChatLimits {
    /// Bytes of the template.
    pub template_bytes: usize,
    /// Tokens within one `{{ }}` or `{% %}`.
    pub tag_tokens: usize,
    /// Blocks inside blocks, and `elif` branches in all.
    pub nested_blocks: usize,
    /// Macro calls inside macro calls.
    pub recursion: usize,
    /// Instructions that are executed.
    pub fuel: u64,
    /// Values that are built or walked through.
    pub work: u64,
    /// Lists and maps inside each other.
    pub nesting: usize,
    /// Bytes of one value, and bytes written in all, those in captured blocks included.
    pub output_bytes: usize,
}

impl Default for ChatLimits {
    fn default() -> Self {
        Self {
            template_bytes: 1 << 18,
            tag_tokens: 512,
            nested_blocks: 64,
            recursion: 64,
            fuel: 2_000_000,
            work: 1 << 24,
            nesting: 40,
            output_bytes: 8 << 20,
        }
    }
}

/// Why there is no prompt. Lines are those of the template, counted from 1.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ChatError {
    /// `tokenizer_config.json` cannot be read.
    #[error("not a tokenizer_config.json with a chat template: {0}; correct it or remove it")]
    BadConfig(String),
    /// A list of templates without the one that is wanted.
    #[error("no chat template is named {name:?} (there are: {known}); choose one of these")]
    UnknownName {
        /// What was asked for.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// More than [`ChatLimits::template_bytes`].
    #[error("the chat template has {found} bytes, more than {max}; it is none that Setun runs")]
    TooLong {
        /// Bytes of the template.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// The template does not parse, or fails on these messages.
    #[error("chat template line {line}: {reason}; correct the template or the messages")]
    Failed {
        /// Line of the template.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The template called `raise_exception`.
    #[error("chat template line {line} refuses the messages: {message}")]
    Raised {
        /// Line of the template.
        line: usize,
        /// What it says.
        message: String,
    },
    /// More instructions than [`ChatLimits::fuel`].
    #[error(
        "chat template line {line}: still running after {fuel} instructions; it may be endless"
    )]
    OutOfFuel {
        /// Line of the template.
        line: usize,
        /// The limit.
        fuel: u64,
    },
    /// More than one of the other limits.
    #[error("chat template line {line}: {what} exceed {max}; shorten the messages or the template")]
    TooLarge {
        /// Line of the template.
        line: usize,
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        max: u64,
    },
}

/// One message of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text; a template sees `none` where there is no text beside tool calls.
    #[serde(default)]
    pub content: Option<String>,
    /// What the model thought before it answered, without the think tags.
    #[serde(default)]
    pub reasoning_content: Option<String>,
    /// Calls of tools, as `{"name": .., "arguments": ..}`, or that under `function`.
    #[serde(default)]
    pub tool_calls: Option<Vec<Json>>,
}

impl Message {
    /// A message that is only text.
    pub fn new(role: &str, content: &str) -> Self {
        Self {
            role: role.to_owned(),
            content: Some(content.to_owned()),
            ..Self::default()
        }
    }
}

/// What is rendered.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChatRequest<'a> {
    /// The conversation.
    pub messages: &'a [Message],
    /// JSON schemas of the tools that the model may call.
    pub tools: &'a [Json],
    /// Whether the text ends where the assistant begins to answer.
    pub add_generation_prompt: bool,
    /// Whether the model may think first; `None` leaves it to the template.
    pub enable_thinking: Option<bool>,
    /// The time that a template may ask for; none is taken from the system.
    pub clock: Option<Clock>,
}

/// Turns messages into text.
#[derive(Clone, Debug)]
pub enum ChatTemplate {
    /// The format of Qwen3, built in.
    ChatMl,
    /// A template that came with a model.
    Jinja(JinjaTemplate),
}

/// A checked Jinja template with the special tokens that it may name.
#[derive(Clone, Debug)]
pub struct JinjaTemplate {
    source: String,
    limits: ChatLimits,
    /// `bos_token` and the like.
    tokens: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// Takes the text of a template, as in GGUF's `tokenizer.chat_template`.
    ///
    /// # Errors
    /// A template that is too large or does not parse.
    pub fn from_text(source: &str, limits: ChatLimits) -> Result<Self, ChatError> {
        Self::new(source, Vec::new(), limits)
    }

    /// Reads `tokenizer_config.json`; `None` if it has no template. From a list of named
    /// templates it takes `name`, or `default`.
    ///
    /// # Errors
    /// A file that is no such JSON, a name that it lacks, a template that is too large or
    /// does not parse.
    pub fn from_tokenizer_config(
        json: &[u8],
        name: Option<&str>,
        limits: ChatLimits,
    ) -> Result<Option<Self>, ChatError> {
        let bad = |e: serde_json::Error| ChatError::BadConfig(e.to_string());
        // Through an object: a struct would take a list of values as well.
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(json).map_err(bad)?;
        let config: TokenizerConfig =
            serde_json::from_value(serde_json::Value::Object(object)).map_err(bad)?;
        let source = match config.chat_template {
            None => return Ok(None),
            Some(Templates::One(source)) => source,
            Some(Templates::Named(list)) => choose(list, name.unwrap_or("default"))?,
        };
        let tokens = [
            ("bos_token", config.bos_token),
            ("eos_token", config.eos_token),
            ("pad_token", config.pad_token),
            ("unk_token", config.unk_token),
        ];
        let text = |token| match token {
            SpecialToken::Text(content) | SpecialToken::Added { content } => content,
        };
        let tokens = tokens.into_iter();
        let tokens = tokens.filter_map(|(name, token)| Some((name, text(token?))));
        Self::new(&source, tokens.collect(), limits).map(Some)
    }

    fn new(
        source: &str,
        tokens: Vec<(&'static str, String)>,
        limits: ChatLimits,
    ) -> Result<Self, ChatError> {
        engine::check(source, &limits)?;
        let source = source.to_owned();
        Ok(Self::Jinja(JinjaTemplate {
            source,
            limits,
            tokens,
        }))
    }

    /// The text of a conversation. The same request always gives the same text.
    ///
    /// # Errors
    /// Messages that the template refuses, and templates that fail or exceed a limit.
    pub fn render(&self, request: &ChatRequest) -> Result<String, ChatError> {
        match self {
            Self::ChatMl => Ok(chatml::render(request)),
            Self::Jinja(template) => engine::render(template, request),
        }
    }
}

fn choose(list: Vec<NamedTemplate>, name: &str) -> Result<String, ChatError> {
    let known: Vec<String> = list.iter().map(|t| format!("{:?}", t.name)).collect();
    let found = list.into_iter().find(|t| t.name == name);
    found
        .map(|t| t.template)
        .ok_or_else(|| ChatError::UnknownName {
            name: name.to_owned(),
            known: known.join(", "),
        })
}

/// The part of `tokenizer_config.json` that templates need.
#[derive(Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    chat_template: Option<Templates>,
    #[serde(default)]
    bos_token: Option<SpecialToken>,
    #[serde(default)]
    eos_token: Option<SpecialToken>,
    #[serde(default)]
    pad_token: Option<SpecialToken>,
    #[serde(default)]
    unk_token: Option<SpecialToken>,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "chat_template must be a string or a list of name and template"
)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "a special token must be a string or have a content"
)]
enum SpecialToken {
    Text(String),
    Added { content: String },
}

#[cfg(test)]
mod tests;
