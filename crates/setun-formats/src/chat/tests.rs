use super::*;

fn template(source: &str) -> Result<ChatTemplate, ChatError> {
    ChatTemplate::from_text(source, ChatLimits::default())
}

/// Renders `source` for one message of a user.
fn render(source: &str) -> Result<String, ChatError> {
    let messages = [Message::new("user", "Grüße <&> 東京")];
    let request = ChatRequest {
        messages: &messages,
        clock: Some(Clock { unix_seconds: 0 }),
        ..ChatRequest::default()
    };
    template(source)?.render(&request)
}

#[test]
fn templates_behave_as_in_transformers() {
    // Expected: jinja2 with the settings of transformers.
    for (source, expected) in [
        ("{{ messages[0].content }}", "Grüße <&> 東京"),
        (
            "{{ messages[0] | tojson }}",
            r#"{"role": "user", "content": "Grüße <&> 東京"}"#,
        ),
        (
            "{{ [1, 2.0, none, true, 'a\"\n'] | tojson }}",
            r#"[1, 2.0, null, true, "a\"\n"]"#,
        ),
        (
            "{{ {'b': [1], 'a': {}} | tojson(indent=2) }}",
            "{\n  \"b\": [\n    1\n  ],\n  \"a\": {}\n}",
        ),
        (
            "{{ {'b': 'é', 'a': 1} | tojson(sort_keys=true, ensure_ascii=true, \
             separators=[',', ':']) }}",
            r#"{"a":1,"b":"\u00e9"}"#,
        ),
        (
            "{{ true }} {{ none }} {{ [1, 'x'] }} {{ 1.0 }}",
            "True None [1, 'x'] 1.0",
        ),
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc", "a\n  b\nc"),
        ("{{ missing }}|{{ missing is defined }}", "|False"),
        (
            "{% for m in messages[::-1] %}{{ loop.index0 }}{{ m.role }}{% endfor %}",
            "0user",
        ),
        (
            "{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}\
             {% endfor %}{{ ns.n }}",
            "3",
        ),
        (
            "{% macro f(x, y='!') %}<{{ x }}{{ y }}>{% endmacro %}{{ f('a') }}",
            "<a!>",
        ),
        ("{{ 'a,b'.split(',')[-1].strip() ~ 1 ~ none }}", "b1None"),
        (
            "{{ 'aXbX'.replace('X', '--') }}{{ 'x' | upper }}",
            "a--b--X",
        ),
        (
            "{{ ['a', 1] | join('-') }}{{ '+'.join(['x', 'y']) }}",
            "a-1x+y",
        ),
        ("{{ 'ab' * 3 }}{{ 2 * 3 }}{{ [1] + [2] }}", "ababab6[1, 2]"),
        (
            "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}",
            "a1",
        ),
        (
            "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "1",
        ),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x | length }}", "2"),
        (
            "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
            "1",
        ),
        ("{{ strftime_now('%d %b %Y') }}", "01 Jan 1970"),
        ("{{ tools is none }}{{ tools }}", "TrueNone"),
    ] {
        assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
    }
}

#[test]
fn failures_name_the_line() {
    let failed = |source: &str| match render(source) {
        Err(ChatError::Failed { line, reason }) => (line, reason),
        other => panic!("{source}: {other:?}"),
    };
    assert_eq!(failed("a\n\n{{ nothing.field }}").0, 3);
    assert_eq!(failed("\n{{ 'a' + nothing }}").0, 2);
    assert_eq!(
        failed("\n{{ 1 + 'a' }}"),
        (
            2,
            "invalid operation: cannot add number and string".to_owned()
        )
    );
    assert_eq!(failed("\n\n\n{% if %}").0, 4);
    assert_eq!(failed("{{ 'x' | no_such_filter }}").0, 1);
    assert_eq!(failed("\n{% include 'other' %}").0, 2);
    assert_eq!(failed("\n{{ strftime_now('%Q') }}").0, 2);
    assert_eq!(failed("{{ 'unclosed }}").0, 1);
    let raised = render("\n{{ raise_exception('no ' ~ messages[0].role) }}");
    let message = "no user".to_owned();
    assert_eq!(raised, Err(ChatError::Raised { line: 2, message }));
    let without_clock = template("{{ strftime_now('%Y') }}").unwrap();
    assert!(without_clock.render(&ChatRequest::default()).is_err());
}

#[test]
fn endless_templates_run_out_of_fuel() {
    let endless = "\n{% for a in range(99999) %}{% for b in range(99999) %}{% set x = b %}\
                   {% endfor %}{% endfor %}";
    assert!(matches!(
        render(endless),
        Err(ChatError::OutOfFuel { line: 2, .. } | ChatError::TooLarge { line: 2, .. })
    ));
    let plain =
        "{% macro f(n) %}{% for i in [1, 2] %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}";
    let error = render(plain).unwrap_err().to_string();
    assert!(error.contains("recursion"), "{error}");
    let limits = ChatLimits {
        fuel: 100,
        ..ChatLimits::default()
    };
    let template = ChatTemplate::from_text("{% for i in range(50) %}{{ i }}{% endfor %}", limits);
    let result = template.unwrap().render(&ChatRequest::default());
    assert_eq!(result, Err(ChatError::OutOfFuel { line: 1, fuel: 100 }));
}

/// Each would fill any memory or overflow the stack if the sandbox let it.
#[test]
fn exponential_templates_reach_a_limit() {
    let twice = |step: &str| {
        format!(
            "{{% set ns = namespace(x='abcdefgh') %}}{{% for i in range(90) %}}{step}{{% endfor %}}\
             {{{{ ns.x }}}}"
        )
    };
    for step in [
        "{% set ns.x = ns.x ~ ns.x %}",
        "{% set ns.x = ns.x + ns.x %}",
        "{% set ns.x = ns.x * 8 %}",
        "{% set ns.x = [ns.x, ns.x] %}",
        "{% set ns.x = (ns.x, ns.x) %}",
        "{% set ns.x = {'a': ns.x, 'b': ns.x} %}",
        "{% set ns.x = ns.x.replace('a', ns.x) %}",
        "{% set ns.x = ns.x | replace('a', ns.x) %}",
        "{% set ns.x = [ns.x, ns.x] | join('') %}",
        "{% set ns.x = ns.x | list | tojson %}",
        "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}",
        "{% set ns.x = namespace(a=ns.x, b=ns.x) | items | list %}",
        "{% set ns.x = ns.x | list + ns.x | list %}",
        "{% set ns.x = [ns.x] | map('list') | list %}",
    ] {
        let result = render(&twice(step));
        assert!(
            matches!(result, Err(ChatError::TooLarge { line: 1, .. })),
            "{step}: {:?}",
            result.map(|text| text.len())
        );
    }
    let raw = format!(
        "{{% for i in range(99999) %}}{}{{% endfor %}}",
        "raw text ".repeat(99)
    );
    assert!(matches!(render(&raw), Err(ChatError::TooLarge { .. })));
    let cycle = "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns }}";
    assert!(matches!(render(cycle), Err(ChatError::Failed { .. })));
}

#[test]
fn deep_templates_are_refused_before_they_are_compiled() {
    for source in [
        format!("{{{{ {}1 }}}}", "1 + ".repeat(60_000)),
        format!("{{{{ x{} }}}}", "|length".repeat(30_000)),
        format!("{{{{ {}1{} }}}}", "(".repeat(200), ")".repeat(200)),
        "{% if x %}".repeat(20_000),
        format!("{{% if x %}}{}{{% endif %}}", "{% elif y %}".repeat(20_000)),
        "{% set a %}".repeat(20_000),
        format!("{{{{ {} }}}}", "-".repeat(400)),
        format!("{{{{ {}x }}}}", "not ".repeat(600)),
        "{{ 'aaaaaaaaaa' * 99999999 }}".to_owned(),
        "{{ ('a') * 99999999 }}".to_owned(),
        "{{ 'a' * 900 * 900 * 900 }}".to_owned(),
        "{{ 10 * 10 * ['a'] }}".to_owned(),
        "x".repeat(300_000),
    ] {
        assert!(template(&source).is_err(), "{}", &source[..40]);
    }
}

#[test]
fn tokenizer_configs_are_read() {
    let read = |json: &str, name| {
        ChatTemplate::from_tokenizer_config(json.as_bytes(), name, ChatLimits::default())
    };
    let text = |json: &str, name| read(json, name)?.unwrap().render(&ChatRequest::default());
    assert!(read(r#"{"eos_token": "x"}"#, None).unwrap().is_none());
    assert!(read(r#"{"chat_template": null}"#, None).unwrap().is_none());
    let one = r#"{"chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}",
        "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "pad_token": null}"#;
    assert_eq!(text(one, None).as_deref(), Ok("<s>|</s>|"));
    let named = r#"{"chat_template": [{"name": "default", "template": "a"},
        {"name": "tool_use", "template": "b"}]}"#;
    assert_eq!(text(named, None).as_deref(), Ok("a"));
    assert_eq!(text(named, Some("tool_use")).as_deref(), Ok("b"));
    let error = text(named, Some("rag")).unwrap_err().to_string();
    assert!(error.contains(r#""default", "tool_use""#), "{error}");
    for bad in [
        r#"{"chat_template": 1}"#,
        "[]",
        "{",
        r#"{"chat_template": [1]}"#,
    ] {
        assert!(
            matches!(read(bad, None), Err(ChatError::BadConfig(_))),
            "{bad}"
        );
    }
    let bad = r#"{"chat_template": "\n{% for %}"}"#;
    assert!(matches!(
        read(bad, None),
        Err(ChatError::Failed { line: 2, .. })
    ));
}

/// The expected texts come from the template that Qwen3 publishes; see the file.
#[test]
fn the_built_in_format_is_that_of_qwen3() {
    #[derive(Deserialize)]
    struct Case {
        name: String,
        messages: Vec<Message>,
        tools: Vec<Json>,
        add_generation_prompt: bool,
        enable_thinking: Option<bool>,
        text: String,
    }
    #[derive(Deserialize)]
    struct File {
        cases: Vec<Case>,
    }
    let file = include_bytes!("../../tests/data/chat_qwen3.json");
    let file: File = serde_json::from_slice(file).unwrap();
    assert!(file.cases.len() >= 15);
    for case in &file.cases {
        let request = ChatRequest {
            messages: &case.messages,
            tools: &case.tools,
            add_generation_prompt: case.add_generation_prompt,
            enable_thinking: case.enable_thinking,
            clock: None,
        };
        let text = ChatTemplate::ChatMl.render(&request);
        assert_eq!(text.as_ref(), Ok(&case.text), "{}", case.name);
    }
}

/// Each character of one text against each of the other, in a single instruction.
#[test]
fn long_sets_of_characters_cannot_hold_a_program_up() {
    for trim in ["ns.a.strip(ns.b)", "ns.a.rstrip(ns.b)", "ns.a|trim(ns.b)"] {
        let source = format!(
            "{{% set ns = namespace(a='aaaaaaaa', b='bbbbbbb') %}}{{% for i in range(17) %}}\
             {{% set ns.a = ns.a ~ ns.a %}}{{% set ns.b = ns.b ~ ns.b %}}{{% endfor %}}\
             {{% set ns.b = ns.b ~ 'a' %}}{{{{ {trim} }}}}"
        );
        let template = ChatTemplate::from_text(&source, ChatLimits::default()).unwrap();
        let result = template.render(&ChatRequest::default());
        assert!(matches!(result, Err(ChatError::TooLarge { .. })), "{trim}");
    }
    let short = "{{ ' xyx '.strip() }}{{ 'xyx'.strip('x') }}{{ '-a-'|trim('-') }}{{ ' b '|trim }}";
    let template = ChatTemplate::from_text(short, ChatLimits::default()).unwrap();
    assert_eq!(
        template.render(&ChatRequest::default()).as_deref(),
        Ok("xyxyab")
    );
}
