//! ChatML as Qwen3 uses it: `<|im_start|>role`, a line feed, the text, `<|im_end|>`, a
//! line feed.
//!
//! * Tools are listed in the system turn, and calls and results have tags of their own.
//! * An assistant's thoughts are kept only behind the last question of the user; those of
//!   earlier turns are left out, as the model was trained. The last answer has a think
//!   block even if it is empty.
//! * A prompt for an answer without thinking ends in an empty think block.

use super::json::{JsonStyle, write_json};
use super::text::Limited;
use super::{ChatRequest, Json, Message};
use minijinja::Value;

const START: &str = "<|im_start|>";
const END: &str = "<|im_end|>\n";

/// The text of the conversation.
pub(super) fn render(request: &ChatRequest) -> String {
    let messages = request.messages;
    let mut out = String::new();
    system_turn(request, &mut out);
    let question = last_question(messages);
    for (i, message) in messages.iter().enumerate() {
        let content = message.content.as_deref().unwrap_or_default();
        match message.role.as_str() {
            "system" if i == 0 => {}
            "user" | "system" => {
                let role = &message.role;
                out.push_str(&format!("{START}{role}\n{content}{END}"));
            }
            "assistant" => {
                let is_last = i + 1 == messages.len();
                assistant_turn(message, i > question, is_last, &mut out);
            }
            "tool" => {
                let is_tool = |m: Option<&Message>| m.is_some_and(|m| m.role == "tool");
                // Neighbouring results share one turn of the user.
                if i == 0 || !is_tool(messages.get(i - 1)) {
                    out.push_str(&format!("{START}user"));
                }
                out.push_str(&format!("\n<tool_response>\n{content}\n</tool_response>"));
                if !is_tool(messages.get(i + 1)) {
                    out.push_str(END);
                }
            }
            _ => {}
        }
    }
    if request.add_generation_prompt {
        out.push_str(&format!("{START}assistant\n"));
        if request.enable_thinking == Some(false) {
            out.push_str("<think>\n\n</think>\n\n");
        }
    }
    out
}

fn system_turn(request: &ChatRequest, out: &mut String) {
    let first = request.messages.first().filter(|m| m.role == "system");
    let content = first.map(|m| m.content.as_deref().unwrap_or_default());
    if request.tools.is_empty() {
        if let Some(content) = content {
            out.push_str(&format!("{START}system\n{content}{END}"));
        }
        return;
    }
    out.push_str(&format!("{START}system\n"));
    if let Some(content) = content {
        out.push_str(&format!("{content}\n\n"));
    }
    // The words that the model was trained with.
    out.push_str(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n\
         You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
    );
    for tool in request.tools {
        out.push('\n');
        out.push_str(&to_json(tool));
    }
    out.push_str(
        "\n</tools>\n\nFor each function call, return a json object with function name and \
         arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n\
         {\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>",
    );
    out.push_str(END);
}

/// Index of the last message in which the user asks, rather than hands in the result of a
/// tool; the last message if there is none.
fn last_question(messages: &[Message]) -> usize {
    let asks = |message: &Message| {
        let content = message.content.as_deref().unwrap_or_default();
        let is_result =
            content.starts_with("<tool_response>") && content.ends_with("</tool_response>");
        message.role == "user" && !is_result
    };
    let found = messages.iter().rposition(asks);
    found.unwrap_or(messages.len().saturating_sub(1))
}

fn assistant_turn(message: &Message, behind_question: bool, is_last: bool, out: &mut String) {
    let (reasoning, content) = thoughts(message);
    out.push_str(&format!("{START}assistant\n"));
    if behind_question && (is_last || !reasoning.is_empty()) {
        let (reasoning, content) = (
            reasoning.trim_matches('\n'),
            content.trim_start_matches('\n'),
        );
        out.push_str(&format!("<think>\n{reasoning}\n</think>\n\n{content}"));
    } else {
        out.push_str(content);
    }
    let calls = message.tool_calls.as_deref().unwrap_or_default();
    for (i, call) in calls.iter().enumerate() {
        if i > 0 || !content.is_empty() {
            out.push('\n');
        }
        let call = call.field("function").unwrap_or(call);
        let name = call.field("name").and_then(Json::as_str);
        let arguments = match call.field("arguments") {
            // Servers hand on the arguments as the JSON text that the model wrote.
            Some(Json::String(text)) => text.clone(),
            Some(arguments) => to_json(arguments),
            None => "{}".to_owned(),
        };
        let name = name.unwrap_or_default();
        out.push_str(&format!(
            "<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call>"
        ));
    }
    out.push_str(END);
}

/// The thoughts and the answer of a message: given apart, or as a think block in front.
fn thoughts(message: &Message) -> (&str, &str) {
    let content = message.content.as_deref().unwrap_or_default();
    if let Some(reasoning) = &message.reasoning_content {
        return (reasoning, content);
    }
    let (Some((before, _)), Some((_, answer))) = (
        content.split_once("</think>"),
        content.rsplit_once("</think>"),
    ) else {
        return ("", content);
    };
    let before = before.trim_end_matches('\n');
    let reasoning = before.rsplit_once("<think>").map_or(before, |(_, x)| x);
    (
        reasoning.trim_start_matches('\n'),
        answer.trim_start_matches('\n'),
    )
}

fn to_json(json: &Json) -> String {
    let mut out = Limited::new(usize::MAX);
    // Any JSON value has a JSON form, and this text has no limit.
    let _ = write_json(&Value::from(json), &JsonStyle::default(), 0, &mut out);
    out.into_text()
}
