"""Chat templates: where they come from, the names they may use, the sandbox, and clear errors."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
from standins import write_text_files

from cupyinfer.errors import CheckpointError, ConfigError, RequestError
from cupyinfer.text.chat import BUILTIN, ChatTemplate, load_chat_template, named_chat_template

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [{"role": "user", "content": "hello"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "how <are> you?"},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama2": "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
    "tools": "{% if tools is none %}no tools{% else %}{{ tools | tojson }}{% endif %}{{ messages | tojson(indent=2) }}",
    "control": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% if m.role == 'system' %}"
    "{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "blocks": "  {% set x = 'a' %}\n{{ x }}\n  {# note #}\n{% if true %}\nyes\n{% endif %}\n",
}


def test_chatml_by_hand():
    prompt = ChatTemplate("t", TEMPLATES["chatml"], SPECIAL).render(HELLO)
    assert prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.hf
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_what_transformers_renders(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(write_text_files(tmp_path)))
    ours = ChatTemplate(name, TEMPLATES[name], SPECIAL)
    for messages in (HELLO, TALK):
        for tools in (None, [{"type": "function", "function": {"name": "f", "description": "é <b>"}}]):
            want = theirs.apply_chat_template(
                messages, tools=tools, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
            )
            assert ours.render(messages, tools=tools) == want


def test_strftime_now_gives_today():
    assert re.fullmatch(r"\d{4}", ChatTemplate("t", "{{ strftime_now('%Y') }}").render(HELLO))


def test_further_variables_reach_the_template():
    template = ChatTemplate("t", "{{ enable_thinking }}")
    assert template.render(HELLO, enable_thinking=False) == "False"


def test_raise_exception_becomes_a_request_error_with_its_message():
    template = ChatTemplate("t", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="t refused them: roles must alternate"):
        template.render(HELLO)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(attack):
    template = ChatTemplate("t", "A" + attack)
    messages = [dict(HELLO[0])]
    with contextlib.suppress(RequestError):
        assert template.render(messages) == "A"  # an unsafe attribute reads as undefined
    assert messages == HELLO


def test_a_template_that_is_not_jinja_is_a_checkpoint_error():
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        ChatTemplate("model/x", "{% for %}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ({"role": "user"}, "non-empty list"),
        (["hello"], r"messages\[0\]='hello' is not allowed"),
        ([*HELLO, {"content": "x"}], r"messages\[1\]"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
    ],
)
def test_malformed_messages_are_named(messages, message):
    with pytest.raises(RequestError, match=message):
        ChatTemplate("t", "x").render(messages)


def test_the_jinja_file_wins_over_tokenizer_config(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert load_chat_template(tmp_path, SPECIAL).render(HELLO) == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_chat_template(tmp_path, SPECIAL).render(HELLO) == "file"


def test_of_several_named_templates_default_is_taken(tmp_path):
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert load_chat_template(tmp_path, SPECIAL).render(HELLO) == "plain"


def test_none_and_malformed(tmp_path):
    assert load_chat_template(tmp_path, SPECIAL) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 7}))
    with pytest.raises(CheckpointError, match="chat_template must be text, it is a int"):
        load_chat_template(tmp_path, SPECIAL)


def test_built_in_completion_runs_the_text_on():
    talk = [
        {"role": "user", "content": "def f("},
        {"role": "assistant", "content": "x):"},
        {"role": "user", "content": "def g("},
    ]
    assert named_chat_template("completion", {}).render(talk) == "def f(x):\ndef g("


def test_built_in_transcript_names_the_speakers_and_stops_at_the_next():
    template = named_chat_template("transcript", {})
    assert template.render(HELLO) == "User: hello\nAssistant:"
    assert "\nUser:" in template.stop


def test_a_template_by_name_or_file_or_an_error_that_lists_them(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ eos_token }}")
    assert named_chat_template(str(file), SPECIAL).render(HELLO) == "</s>"
    with pytest.raises(ConfigError, match="chat_template='nothing' is not allowed; allowed: completion, transcript"):
        named_chat_template("nothing", {})
    assert all(named_chat_template(name, {}).adds_special_tokens for name in BUILTIN)
