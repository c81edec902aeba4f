//! Makes a template from a stranger safe to compile and to run.
//!
//! Fuel counts instructions, but one instruction can double a text, so forty can fill any
//! memory; values can nest until dropping them overflows the stack; and constants are
//! folded while compiling, before any fuel is spent. So
//!
//! * [`check_source`] refuses, from the tokens alone, what makes the compiler recurse
//!   deeply or fold large constants;
//! * [`guard`] rewrites the instructions: operators that build values become calls of
//!   functions that know the limits, raw text is written through the same counted door as
//!   values, and every value that a filter or a function returns is measured.

use super::{ChatError, ChatLimits};
use minijinja::Value;
use minijinja::machinery::{Instruction, Instructions, Token, tokenize};
use minijinja::syntax::SyntaxConfig;

/// `+`, as a function. No template can use or hide these names, for none is a name.
pub(super) const ADD: &str = "a + b";
/// `*`
pub(super) const MULTIPLY: &str = "a * b";
/// `~`
pub(super) const CONCAT: &str = "a ~ b";
/// Measures the value on top of the stack.
pub(super) const MEASURE: &str = "measured!";
/// The same for what goes into a namespace.
pub(super) const STORE: &str = "stored!";

/// A filter that is looked up by its name and not by its place in a cache.
const NO_CACHE: u8 = u8::MAX;
/// Largest count that a text may be repeated by as a constant.
const MAX_REPEAT: u64 = 1000;

/// Refuses what would overflow the stack or the memory of the compiler.
///
/// # Errors
/// Too many bytes, too long tags, too deeply nested blocks, products of constant texts,
/// and text that has no tokens.
pub(super) fn check_source(
    source: &str,
    syntax: &SyntaxConfig,
    limits: &ChatLimits,
) -> Result<(), ChatError> {
    let (found, max) = (source.len(), limits.template_bytes);
    if found > max {
        return Err(ChatError::TooLong { found, max });
    }
    let mut tag: Vec<Token> = Vec::new();
    let mut blocks = Blocks::default();
    for token in tokenize(source, false, syntax.clone()) {
        let (token, span) = token.map_err(|e| failed_at(&e))?;
        let line = usize::from(span.start_line);
        let too_large = |what, max: usize| ChatError::TooLarge {
            line,
            what,
            max: max as u64,
        };
        match token {
            Token::TemplateData(_) => {}
            Token::VariableStart | Token::BlockStart => tag.clear(),
            Token::VariableEnd | Token::BlockEnd => {
                let is_block = matches!(token, Token::BlockEnd);
                let other = is_block.then(|| other_template(&tag)).flatten();
                if let Some(reason) = other.or_else(|| bad_product(&tag)) {
                    return Err(ChatError::Failed { line, reason });
                }
                if is_block && !blocks.enter(&tag, limits.nested_blocks) {
                    return Err(too_large("nested blocks", limits.nested_blocks));
                }
            }
            token => {
                tag.push(token);
                if tag.len() > limits.tag_tokens {
                    return Err(too_large("the tokens of a tag", limits.tag_tokens));
                }
            }
        }
    }
    Ok(())
}

/// The failure that an error of the engine stands for.
pub(super) fn failed_at(error: &minijinja::Error) -> ChatError {
    let reason = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    let line = error.line().unwrap_or(1);
    ChatError::Failed { line, reason }
}

/// How deep the blocks of a template are nested.
#[derive(Default)]
struct Blocks {
    open: usize,
    /// Each lies inside the one before it when it is compiled.
    num_elif: usize,
}

impl Blocks {
    /// Takes the tokens of a `{% %}`; false if the nesting is too deep.
    fn enter(&mut self, tag: &[Token], max: usize) -> bool {
        let name = match tag.first() {
            Some(Token::Ident(name)) => *name,
            _ => return true,
        };
        let captures = name == "set" && !tag.iter().any(|t| matches!(t, Token::Assign));
        match name {
            "elif" => self.num_elif += 1,
            "for" | "if" | "with" | "filter" | "macro" | "call" | "autoescape" => self.open += 1,
            "set" if captures => self.open += 1,
            name if name.starts_with("end") => self.open = self.open.saturating_sub(1),
            _ => {}
        }
        self.open <= max && self.num_elif <= max
    }
}

/// What is wrong with a `{% %}` that needs other templates: there are none, and the parts
/// of an inherited one are compiled apart.
fn other_template(tag: &[Token]) -> Option<String> {
    match tag.first() {
        Some(Token::Ident(name @ ("block" | "extends" | "include" | "import" | "from"))) => {
            Some(format!("{{% {name} %}} has no place in a chat template"))
        }
        _ => None,
    }
}

/// What is wrong with the `*` of a tag. A constant text or list beside one is folded by
/// the compiler; only a small constant count is let through.
fn bad_product(tag: &[Token]) -> Option<String> {
    let is_operator = |token: Option<&Token>| {
        matches!(
            token,
            Some(Token::Mul | Token::Div | Token::FloorDiv | Token::Mod | Token::Pow)
        )
    };
    let is_text = |token: &Token| matches!(token, Token::Str(_) | Token::String(_));
    let is_small = |token: &Token| matches!(token, Token::Int(n) if *n <= MAX_REPEAT);
    let may_be_text = |token: &Token| {
        let bracket = matches!(
            token,
            Token::ParenOpen
                | Token::ParenClose
                | Token::BracketOpen
                | Token::BracketClose
                | Token::BraceOpen
                | Token::BraceClose
        );
        is_text(token) || bracket
    };
    for (i, token) in tag.iter().enumerate() {
        if !matches!(token, Token::Mul) {
            continue;
        }
        let (Some(left), Some(right)) = (i.checked_sub(1).and_then(|i| tag.get(i)), tag.get(i + 1))
        else {
            continue;
        };
        let repeats = (is_text(left) && is_small(right)) || (is_small(left) && is_text(right));
        let before = i.checked_sub(2).and_then(|i| tag.get(i));
        let stands_alone = !is_operator(before) && !is_operator(tag.get(i + 2));
        if (may_be_text(left) || may_be_text(right)) && !(repeats && stands_alone) {
            return Some(format!(
                "* beside a text or a bracket; at most a text times a number up to \
                 {MAX_REPEAT} is allowed"
            ));
        }
    }
    None
}

/// The same program with every value and every output counted.
pub(super) fn guard<'s>(
    plain: &Instructions<'s>,
    name: &'s str,
    source: &'s str,
) -> Instructions<'s> {
    let mut starts = Vec::new();
    let mut next = 0u32;
    for at in 0.. {
        starts.push(next);
        let Some(instruction) = plain.get(at) else {
            break;
        };
        next += expand(instruction, &[]).len() as u32;
    }
    let mut guarded = Instructions::new(name, source);
    for at in 0.. {
        let Some(instruction) = plain.get(at) else {
            break;
        };
        let line = plain.get_line(at).unwrap_or(1) as u16;
        for instruction in expand(instruction, &starts) {
            guarded.add_with_line(instruction, line);
        }
    }
    guarded
}

/// What replaces one instruction. Jumps go to the place that `starts` gives their target;
/// without it they stay.
fn expand<'s>(instruction: &Instruction<'s>, starts: &[u32]) -> Vec<Instruction<'s>> {
    use Instruction as I;
    let to = |target: u32| starts.get(target as usize).copied().unwrap_or(target);
    let measure = I::ApplyFilter(MEASURE, Some(1), NO_CACHE);
    match instruction {
        I::EmitRaw(text) => vec![I::LoadConst(Value::from(*text)), I::Emit],
        I::Add => vec![I::CallFunction(ADD, Some(2))],
        I::Mul => vec![I::CallFunction(MULTIPLY, Some(2))],
        I::StringConcat => vec![I::CallFunction(CONCAT, Some(2))],
        I::BuildList(_)
        | I::BuildTuple(_)
        | I::BuildMap(_)
        | I::Slice
        | I::ApplyFilter(..)
        | I::CallFunction(..)
        | I::CallMethod(..)
        | I::CallObject(_) => vec![instruction.clone(), measure],
        // The value lies below the namespace.
        I::SetAttr(_) => vec![
            I::Swap,
            I::ApplyFilter(STORE, Some(1), NO_CACHE),
            I::Swap,
            instruction.clone(),
        ],
        I::Iterate(target) => vec![I::Iterate(to(*target))],
        I::Jump(target) => vec![I::Jump(to(*target))],
        I::JumpIfFalse(target) => vec![I::JumpIfFalse(to(*target))],
        I::JumpIfFalseOrPop(target) => vec![I::JumpIfFalseOrPop(to(*target))],
        I::JumpIfTrueOrPop(target) => vec![I::JumpIfTrueOrPop(to(*target))],
        I::BuildMacro(name, start, flags) => vec![I::BuildMacro(name, to(*start), *flags)],
        instruction => vec![instruction.clone()],
    }
}
