//! Runs a Jinja template in its sandbox.

use super::guard::{self, ADD, CONCAT, MEASURE, MULTIPLY, STORE};
use super::json::{JsonStyle, write_json};
use super::text::{Limited, write_str};
use super::{ChatError, ChatLimits, ChatRequest, Clock, JinjaTemplate, Message};
use minijinja::machinery::{CodeGenerator, Instructions, eval, make_string_output, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Tuple, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// The engine puts it into its messages; lines are reported by [`ChatError`].
const NAME: &str = "chat_template";

/// Filters and functions that are left out: those whose result can be far larger than
/// what goes in, and that templates of models do not use.
const LEFT_OUT: [&str; 9] = [
    "batch", "chain", "format", "groupby", "indent", "pprint", "slice", "sum", "zip",
];

/// Refuses a template that does not compile.
///
/// # Errors
/// What [`guard::check_source`] refuses, and bad syntax.
pub(super) fn check(source: &str, limits: &ChatLimits) -> Result<(), ChatError> {
    compile(source, limits).map(|_| ())
}

/// The text that `template` makes of `request`.
///
/// # Errors
/// A template that fails, refuses the messages or exceeds a limit.
pub(super) fn render(template: &JinjaTemplate, request: &ChatRequest) -> Result<String, ChatError> {
    let limits = template.limits;
    let program = compile(&template.source, &limits)?;
    let meter = Arc::new(Meter::new(limits));
    let environment = environment(&meter, request.clock);
    let (no_blocks, mut text) = (BTreeMap::new(), String::new());
    let result = eval(
        &environment,
        &program,
        context(template, request),
        &no_blocks,
        &mut make_string_output(&mut text),
        AutoEscape::None,
    );
    match result {
        Ok(_) => Ok(text),
        Err(error) => Err(meter.explain(&error)),
    }
}

fn compile<'s>(source: &'s str, limits: &ChatLimits) -> Result<Instructions<'s>, ChatError> {
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|e| guard::failed_at(&e))?;
    guard::check_source(source, &syntax, limits)?;
    let tree = parse(source, NAME, syntax).map_err(|e| guard::failed_at(&e))?;
    let mut generator = CodeGenerator::new(NAME, source);
    generator.compile_stmt(&tree);
    // The second part are blocks of template inheritance, which were refused.
    let (program, _) = generator.finish();
    Ok(guard::guard(&program, NAME, source))
}

/// The variables that a template sees.
fn context(template: &JinjaTemplate, request: &ChatRequest) -> Value {
    let tools: Vec<Value> = request.tools.iter().map(Value::from).collect();
    let messages: Vec<Value> = request.messages.iter().map(message_value).collect();
    let mut variables = vec![
        ("messages", Value::from(messages)),
        (
            "tools",
            match tools.is_empty() {
                true => Value::from(()),
                false => Value::from(tools),
            },
        ),
        (
            "add_generation_prompt",
            Value::from(request.add_generation_prompt),
        ),
    ];
    if let Some(thinks) = request.enable_thinking {
        variables.push(("enable_thinking", Value::from(thinks)));
    }
    for (name, token) in &template.tokens {
        variables.push((name, Value::from(token.as_str())));
    }
    Value::from_pairs(variables)
}

/// A message as templates know it: keys that have no value are absent.
fn message_value(message: &Message) -> Value {
    let mut fields = vec![
        ("role", Value::from(message.role.as_str())),
        ("content", Value::from(message.content.as_deref())),
    ];
    if let Some(reasoning) = &message.reasoning_content {
        fields.push(("reasoning_content", Value::from(reasoning.as_str())));
    }
    if let Some(calls) = &message.tool_calls {
        let calls: Vec<Value> = calls.iter().map(Value::from).collect();
        fields.push(("tool_calls", Value::from(calls)));
    }
    Value::from_pairs(fields)
}

/// Everything that a template can call.
fn environment<'e>(meter: &Arc<Meter>, clock: Option<Clock>) -> Environment<'e> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(meter.limits.fuel));
    environment.set_recursion_limit(meter.limits.recursion);
    for name in LEFT_OUT {
        environment.remove_filter(name);
    }
    environment.remove_global("debug");
    let m = Arc::clone(meter);
    environment.set_formatter(move |out, _, value| {
        let text = m.printed(value)?;
        out.write_str(&text).map_err(Error::from)
    });
    let m = Arc::clone(meter);
    environment.set_unknown_method_callback(move |state, value, method, args| {
        m.call_method(state, value, method, args)
    });
    let m = Arc::clone(meter);
    environment.add_filter(MEASURE, move |value: Value| m.measured(value));
    let m = Arc::clone(meter);
    environment.add_filter(STORE, move |value: Value| m.stored(value));
    let m = Arc::clone(meter);
    environment.add_filter("string", move |value: Value| m.text(&value));
    let m = Arc::clone(meter);
    environment.add_filter("join", move |list: Value, separator: Option<Value>| {
        m.join(&list, &separator.unwrap_or_else(|| Value::from("")))
    });
    let m = Arc::clone(meter);
    environment.add_filter("replace", move |text: Value, old: Value, new: Value| {
        m.replace(&text, &old, &new, None)
    });
    let m = Arc::clone(meter);
    environment.add_filter(
        "trim",
        move |text: Cow<'_, str>, chars: Option<Cow<'_, str>>| {
            let chars: Option<Vec<char>> = chars.map(|chars| chars.chars().collect());
            m.read(text.len(), chars.as_ref().map_or(0, Vec::len))?;
            let left = match &chars {
                None => text.trim(),
                Some(chars) => text.trim_matches(&chars[..]),
            };
            Ok::<String, Error>(left.to_owned())
        },
    );
    let m = Arc::clone(meter);
    environment.add_filter("tojson", move |value: Value, options: Kwargs| {
        m.to_json(&value, &options)
    });
    let m = Arc::clone(meter);
    environment.add_function(ADD, move |a: Value, b: Value| m.add(&a, &b));
    let m = Arc::clone(meter);
    environment.add_function(MULTIPLY, move |a: Value, b: Value| m.multiply(&a, &b));
    let m = Arc::clone(meter);
    environment.add_function(CONCAT, move |a: Value, b: Value| m.concat(&a, &b));
    let m = Arc::clone(meter);
    environment.add_function("raise_exception", move |message: Value| {
        let message = m.text(&message)?;
        Err::<Value, _>(m.stop(Stop::Raised(message)))
    });
    environment.add_function("strftime_now", move |format: String| {
        let missing = "the template asks for the time, but none was given";
        let clock = clock.ok_or_else(|| invalid(missing.to_owned()))?;
        clock.format(&format).map_err(invalid)
    });
    environment
}

/// Counts what a template uses up.
struct Meter {
    limits: ChatLimits,
    state: Mutex<Used>,
}

#[derive(Default)]
struct Used {
    work: u64,
    written: usize,
    /// Why the template was stopped, where the engine's error cannot tell.
    stop: Option<Stop>,
}

#[derive(Clone)]
enum Stop {
    Raised(String),
    Output,
    Work,
    Nesting,
}

impl Meter {
    fn new(limits: ChatLimits) -> Self {
        let state = Mutex::default();
        Self { limits, state }
    }

    fn used(&self) -> std::sync::MutexGuard<'_, Used> {
        // Nothing panics while it holds the lock, and counters are never half changed.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn stop(&self, stop: Stop) -> Error {
        let shown = match &stop {
            Stop::Raised(message) => message.clone(),
            _ => "a limit of the sandbox is reached".to_owned(),
        };
        self.used().stop = Some(stop);
        invalid(shown)
    }

    /// The error that the caller sees.
    fn explain(&self, error: &Error) -> ChatError {
        let line = error.line().unwrap_or(1);
        let fuel = self.limits.fuel;
        let too_large = |what, max| ChatError::TooLarge { line, what, max };
        let stop = self.used().stop.clone();
        match stop {
            Some(Stop::Raised(message)) => ChatError::Raised { line, message },
            Some(Stop::Output) => too_large("bytes of text", self.limits.output_bytes as u64),
            Some(Stop::Work) => too_large("values that are walked through", self.limits.work),
            Some(Stop::Nesting) => too_large("lists inside each other", self.limits.nesting as u64),
            None if error.kind() == ErrorKind::OutOfFuel => ChatError::OutOfFuel { line, fuel },
            None => guard::failed_at(error),
        }
    }

    fn spend(&self, work: usize) -> Result<(), Error> {
        let mut used = self.used();
        used.work = used.work.saturating_add(work as u64);
        let is_over = used.work > self.limits.work;
        drop(used);
        match is_over {
            true => Err(self.stop(Stop::Work)),
            false => Ok(()),
        }
    }

    /// Counts the reading of a text of `len` bytes, each of which is compared with
    /// `compared` others.
    fn read(&self, len: usize, compared: usize) -> Result<(), Error> {
        // Reading is cheap beside an instruction.
        self.spend(len.saturating_mul(1 + compared) / 16)
    }

    /// `write` into a text that stays within the limit of a value.
    fn limited(
        &self,
        write: impl FnOnce(&mut Limited) -> Result<(), Error>,
    ) -> Result<String, Error> {
        let mut out = Limited::new(self.limits.output_bytes);
        match write(&mut out) {
            Ok(()) => {
                let text = out.into_text();
                // Copying is cheap beside an instruction.
                self.spend(text.len() / 16)?;
                Ok(text)
            }
            Err(e) if e.kind() == ErrorKind::WriteFailure => Err(self.stop(Stop::Output)),
            Err(e) => Err(e),
        }
    }

    fn text(&self, value: &Value) -> Result<String, Error> {
        self.limited(|out| write_str(value, out))
    }

    /// Text that goes to the output or into a captured block.
    fn printed(&self, value: &Value) -> Result<String, Error> {
        let text = self.text(value)?;
        let mut used = self.used();
        used.written = used.written.saturating_add(text.len());
        let is_over = used.written > self.limits.output_bytes;
        drop(used);
        match is_over {
            true => Err(self.stop(Stop::Output)),
            false => Ok(text),
        }
    }

    /// `value`, if it is not too large; lazy lists are made into lists.
    fn measured(&self, value: Value) -> Result<Value, Error> {
        let mut room = self.limits.output_bytes;
        let changed = self.measure(&value, 0, &mut room, false)?;
        Ok(changed.unwrap_or(value))
    }

    /// As [`measured`](Self::measured); a namespace in a namespace could contain itself.
    fn stored(&self, value: Value) -> Result<Value, Error> {
        let mut room = self.limits.output_bytes;
        let changed = self.measure(&value, 0, &mut room, true)?;
        Ok(changed.unwrap_or(value))
    }

    /// Walks through `value` and takes its size from `room`. Returns a list in its place
    /// if it, or something in it, is a list that is computed on demand.
    fn measure(
        &self,
        value: &Value,
        depth: usize,
        room: &mut usize,
        stores: bool,
    ) -> Result<Option<Value>, Error> {
        let size = 1 + value.as_str().map_or(0, str::len);
        self.spend(1)?;
        self.read(size, 0)?;
        *room = room
            .checked_sub(size)
            .ok_or_else(|| self.stop(Stop::Output))?;
        if depth > self.limits.nesting {
            return Err(self.stop(Stop::Nesting));
        }
        let Some(object) = value.as_object() else {
            return Ok(None);
        };
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                let is_plain = value.downcast_object_ref::<Vec<Value>>().is_some()
                    || value.downcast_object_ref::<Tuple>().is_some();
                let mut is_changed = !is_plain;
                let mut items = Vec::new();
                for item in value.try_iter()?.checked() {
                    let item = item?;
                    let changed = self.measure(&item, depth + 1, room, stores)?;
                    is_changed |= changed.is_some();
                    items.push(changed.unwrap_or(item));
                }
                Ok(is_changed.then(|| Value::from(items)))
            }
            ValueKind::Map => {
                if stores && object.type_name().ends_with("Namespace") {
                    return Err(invalid(
                        "a namespace cannot be kept in a namespace".to_owned(),
                    ));
                }
                for key in value.try_iter()?.checked() {
                    let key = key?;
                    self.measure(&key, depth + 1, room, stores)?;
                    self.measure(&value.get_item(&key)?, depth + 1, room, stores)?;
                }
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    fn add(&self, a: &Value, b: &Value) -> Result<Value, Error> {
        if let (Some(x), Some(y)) = (a.as_str(), b.as_str()) {
            let text = self.limited(|out| out.push(x).and_then(|()| out.push(y)))?;
            return Ok(Value::from(text));
        }
        let is_list = |v: &Value| matches!(v.kind(), ValueKind::Seq | ValueKind::Iterable);
        if is_list(a) && is_list(b) {
            let items = a.try_iter()?.checked().chain(b.try_iter()?.checked());
            let items = items.collect::<Result<Vec<_>, _>>()?;
            return self.measured(Value::from(items));
        }
        number(a, b, i128::checked_add, |x, y| x + y).ok_or_else(|| cannot("add", a, b))
    }

    fn multiply(&self, a: &Value, b: &Value) -> Result<Value, Error> {
        let (x, count) = match b.as_str() {
            Some(_) => (b, a),
            None => (a, b),
        };
        if let (Some(text), Some(count)) = (x.as_str(), count.as_i64()) {
            let count = if text.is_empty() { 0 } else { count.max(0) };
            let text = self.limited(|out| (0..count).try_for_each(|_| out.push(text)))?;
            return Ok(Value::from(text));
        }
        number(a, b, i128::checked_mul, |x, y| x * y).ok_or_else(|| cannot("multiply", a, b))
    }

    fn concat(&self, a: &Value, b: &Value) -> Result<Value, Error> {
        let both = |out: &mut Limited| write_str(a, out).and_then(|()| write_str(b, out));
        self.limited(both).map(Value::from)
    }

    fn join(&self, list: &Value, separator: &Value) -> Result<Value, Error> {
        let text = self.limited(|out| {
            for (i, item) in list.try_iter()?.checked().enumerate() {
                if i > 0 {
                    write_str(separator, out)?;
                }
                write_str(&item?, out)?;
            }
            Ok(())
        })?;
        Ok(Value::from(text))
    }

    fn replace(
        &self,
        text: &Value,
        old: &Value,
        new: &Value,
        count: Option<usize>,
    ) -> Result<Value, Error> {
        let (text, old, new) = (self.text(text)?, self.text(old)?, self.text(new)?);
        let replaced = self.limited(|out| {
            let mut end = 0;
            for (start, found) in text.match_indices(&old).take(count.unwrap_or(usize::MAX)) {
                out.push(&text[end..start])?;
                out.push(&new)?;
                end = start + found.len();
            }
            out.push(&text[end..])
        })?;
        Ok(Value::from(replaced))
    }

    fn to_json(&self, value: &Value, options: &Kwargs) -> Result<Value, Error> {
        let mut style = JsonStyle::default();
        if let Some(indent) = options.get::<Option<Value>>("indent")? {
            style.indent = match indent.as_str() {
                Some(text) => Some(text.to_owned()),
                None if indent.is_none() => None,
                None => Some(" ".repeat(indent.as_usize().unwrap_or(0).min(64))),
            };
        }
        if style.indent.is_some() {
            style.separators.0 = ",".to_owned();
        }
        if let Some(separators) = options.get::<Option<Vec<String>>>("separators")? {
            let [item, key] = <[String; 2]>::try_from(separators)
                .map_err(|_| invalid("separators must be two texts".to_owned()))?;
            style.separators = (item, key);
        }
        style.ensure_ascii = options
            .get::<Option<bool>>("ensure_ascii")?
            .unwrap_or(false);
        style.sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
        options.assert_all_used()?;
        let text = self.limited(|out| write_json(value, &style, 0, out))?;
        Ok(Value::from(text))
    }

    /// Methods of Python's types.
    fn call_method(
        &self,
        state: &mut State,
        value: &Value,
        method: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        let is_text = value.as_str().is_some();
        let len = |value: &Value| value.as_str().map_or(0, str::len);
        let compared = match method {
            "strip" | "lstrip" | "rstrip" => args.first().map_or(0, len),
            _ => 0,
        };
        self.read(len(value), compared)?;
        match (method, args) {
            ("join", [list]) if is_text => self.join(list, value),
            ("replace", [old, new]) if is_text => self.replace(value, old, new, None),
            ("replace", [old, new, count]) if is_text => {
                self.replace(value, old, new, count.as_usize())
            }
            // A width in a format is a size that no limit sees.
            ("format", _) => Err(Error::from(ErrorKind::UnknownMethod)),
            _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
        }
    }
}

/// An operation on two numbers; `None` if they are none, or the result is too large.
fn number(
    a: &Value,
    b: &Value,
    on_integers: fn(i128, i128) -> Option<i128>,
    on_floats: fn(f64, f64) -> f64,
) -> Option<Value> {
    if !(a.is_number() && b.is_number()) {
        return None;
    }
    if a.is_integer() && b.is_integer() {
        let (x, y) = (
            i128::try_from(a.clone()).ok()?,
            i128::try_from(b.clone()).ok()?,
        );
        return on_integers(x, y).map(Value::from);
    }
    let (x, y) = (
        f64::try_from(a.clone()).ok()?,
        f64::try_from(b.clone()).ok()?,
    );
    Some(Value::from(on_floats(x, y)))
}

fn cannot(verb: &str, a: &Value, b: &Value) -> Error {
    invalid(format!("cannot {verb} {} and {}", a.kind(), b.kind()))
}

fn invalid(reason: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}
