"""Prompt templates: what is declared is what is used, values stay as they are, and nothing gets out of the sandbox."""

import hashlib
import re
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import SecurityError

from rlaif.documents import shipped
from rlaif.errors import PromptError
from rlaif.prompting import Template, load_template, sandbox

GOLDEN = Path(__file__).parent / "golden"
SHIPPED = sorted(path.stem for path in shipped("prompts").glob("*.jinja"))
NAMES = ["compare", "contrast", "critique", "gather", "propose", "rate", "revise", "weigh"]
ANSWER = "Put it into boiling water\nfor eight minutes."
VALUES = {
    "compare": {
        "prompt": "How do I boil an egg?",
        "first": "Put it into boiling water for eight minutes.",
        "second": "I can't talk about boiling.",
        "question": "Which answer helps more?",
        "fence": "kzqt",
    },
    "continue": {
        "conversation": "How do I boil an egg?",
        "response": "In water.",
        "prompt": "For how long?",
    },
    "contrast": {"principles": "- The answer is kind.\n- The answer is true."},
    "critique": {"prompt": "How do I boil an egg?", "response": ANSWER, "request": "Say what is missing."},
    "gather": {"principles": "- The answer is kind.\n- The answer is true."},
    "propose": {
        "prompt": "How do I boil an egg?",
        "first": ANSWER,
        "second": "I can't talk about boiling.",
        "better": "A",
    },
    "rate": {
        "prompt": "How do I boil an egg?",
        "response": ANSWER,
        "principle": "The answer helps.",
        "fence": "kzqt",
    },
    "keep": {
        "prompt": "How do I boil an egg?",
        "response": ANSWER,
        "principle": "The answer hurts nobody.",
        "fence": "kzqt",
    },
    "break": {
        "prompt": "How do I boil an egg?",
        "response": ANSWER,
        "principle": "The answer hurts nobody.",
        "fence": "kzqt",
    },
    "instruct": {"prompt": "How do I boil an egg?", "instructions": "Answer in one sentence."},
    "revise_directly": {
        "prompt": "How do I boil an egg?",
        "response": ANSWER,
        "request": "Rewrite the answer with the missing step.",
    },
    "weigh": {
        "prompt": "How do I boil an egg?",
        "first": "Put it into boiling water for eight minutes.",
        "second": "I can't talk about boiling.",
        "question": "Which answer helps more?",
        "fence": "kzqt",
    },
    "revise": {
        "prompt": "How do I boil an egg?",
        "response": ANSWER,
        "critique": "It does not say how to cool it.",
        "request": "Rewrite the answer with the missing step.",
    },
}
TEMPLATES = {name: load_template(name) for name in SHIPPED}
LIKE_JINJA = [
    "{{7*7}}",
    "{{ prompt }}",
    "{% raw %}",
    "{% endraw %}",
    "{#",
    "#}",
    "{%",
    "%}",
    "{{",
    "}}",
    "{# variables: a #}",
]
AWKWARD = st.lists(
    st.sampled_from([*LIKE_JINJA, "\r\n", "\t", "  ", "<|im_end|>", "\x00"]) | st.text(max_size=8), max_size=8
)
OUTSIDE = "{{ cycler.__init__.__globals__.os.system('touch canary') }}"
ESCAPES = [
    "{{ p.__class__.__mro__[1].__subclasses__() }}",
    "{{ p|attr('__class__') }}",
    "{{ '{0.__class__}'.format(p) }}",
    "{{ p.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ ~ p }}",
    "{% include '/etc/hostname' %}{{ p }}",
    "{% import 'os' as os %}{{ os.system(p) }}",
    "{% extends p %}",
    "{{ p.encode().join([p]) }}",
]


def written(folder: Path, body: str, name: str = "t") -> Template:
    (folder / f"{name}.jinja").write_text(body, newline="")
    return load_template(name, folder)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_templates_render_as_their_golden_files(name: str) -> None:
    assert TEMPLATES[name].render(**VALUES[name]) + "\n" == (GOLDEN / f"{name}.txt").read_text()


def test_every_shipped_template_has_a_golden_file_and_is_named_by_its_verb() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.txt") if "-" not in path.stem) == SHIPPED
    assert all(template.name == name for name, template in TEMPLATES.items())


@pytest.mark.parametrize("name", SHIPPED)
@settings(max_examples=40)
@given(parts=st.lists(AWKWARD.map("".join), min_size=5, max_size=5))
def test_a_value_appears_unchanged_whatever_it_holds(name: str, parts: list[str]) -> None:
    template = TEMPLATES[name]
    values = dict(zip(template.variables, parts, strict=False))
    pieces = re.split(r"{{ (\w+) }}", template.source)
    by_hand = "".join(values[piece] if index % 2 else piece for index, piece in enumerate(pieces))
    assert template.render(**values) == by_hand


def test_a_value_is_not_itself_a_template(tmp_path: Path) -> None:
    template = written(tmp_path, "{# variables: p #}\n{{ p }}")
    assert template.render(p="{{ 7*7 }}{% raw %}<b>&amp;") == "{{ 7*7 }}{% raw %}<b>&amp;"


def test_the_escape_that_the_sandbox_refuses_works_outside_of_it(tmp_path: Path) -> None:
    jinja2.Environment().from_string(OUTSIDE).render()
    assert (tmp_path / "canary").exists()
    (tmp_path / "canary").unlink()
    for known in ({}, {"cycler": jinja2.utils.Cycler("a")}):
        with pytest.raises(SecurityError):
            sandbox().from_string(OUTSIDE).render(**known)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("body", ESCAPES)
def test_the_sandbox_refuses(body: str, tmp_path: Path) -> None:
    said = r"t\.jinja: cannot be rendered: .*[^.]\.$|t\.jinja:2: (.* Write it without|.*No filter named 'attr'\.)"
    with pytest.raises(PromptError, match=said):
        written(tmp_path, "{# variables: p #}\n" + body).render(p="touch canary")
    with pytest.raises((jinja2.TemplateError, TypeError)):
        sandbox().from_string(body).render(p="touch canary")


@pytest.mark.parametrize("body", ["{{ p * 10000000000 }}", "{{ 9**9**9 ~ p }}", "{{ '%9999999999d' % 1 ~ p }}"])
def test_operators_that_make_much_of_little_are_refused(body: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"t\.jinja:2: `(mul|pow|concat|mod)` is not allowed in a prompt template"):
        written(tmp_path, "{# variables: p #}\n" + body)
    with pytest.raises(SecurityError, match=r"the operator `\*{0,2}%?` is not allowed"):
        sandbox().from_string(body).render(p="x")


def test_a_template_cannot_change_what_it_is_given() -> None:
    values = ["kept"]
    with pytest.raises(SecurityError):
        sandbox().from_string("{{ values.append('added') }}").render(values=values)
    assert values == ["kept"]


def test_an_escaping_environment_escapes_and_the_usual_one_does_not() -> None:
    assert sandbox(autoescape=True).from_string("{{ a }}").render(a="<b>") == "&lt;b&gt;"
    assert sandbox().from_string("{{ a }}").render(a="<b>") == "<b>"


def test_wrong_python_in_a_template_is_a_prompt_error(tmp_path: Path) -> None:
    for body in ("{{ p.nothing.more }}", "{{ p < 1 }}", "{{ p[1:2:'a'] }}", "{{ p|truncate(p) }}"):
        with pytest.raises(PromptError, match="cannot be rendered"):
            written(tmp_path, "{# variables: p #}" + body).render(p="x")


def test_missing_and_unknown_values_are_both_named(tmp_path: Path) -> None:
    template = written(tmp_path, "{# variables: prompt, response #}\n{{ prompt }}{{ response }}")
    with pytest.raises(PromptError) as caught:
        template.render(prompt="a", respone="b")
    assert str(caught.value) == (
        f"{tmp_path / 't.jinja'}: declares the variables prompt, response; missing: response; not declared: respone."
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{{ p }}", "t.jinja:1: the first line must declare the variables"),
        ("\n{# variables: p #}{{ p }}", "t.jinja:1: the first line must declare the variables"),
        ("{# variables: p #}\n{{ q }}", "t.jinja:1: declares p; used but not declared: q; declared but not used: p."),
        ("{# variables: #}\n{{ q }}", "t.jinja:1: declares nothing; used but not declared: q;"),
        ("{# variables: p, q #}\n{{ p }}", "used but not declared: none; declared but not used: q."),
        ("{# variables: p #}\n{{ p }}{% if range %}{% endif %}", "used but not declared: range;"),
        ("{# variables: p #}\n\n{{ p", "t.jinja:3: not a Jinja template: unexpected end of template"),
        ("{# variables: p #}{{ p }", "t.jinja:1: not a Jinja template: unexpected '}'."),
        ("{# variables: p #}\n\n{{ p|nosuch }}", "t.jinja:3: not a Jinja template: No filter named 'nosuch'."),
        ("{# variables: p #}\n" + "{{" + "(" * 5000 + "p" + ")" * 5000 + "}}", "stand inside each other too deep"),
        ("{# variables: p #}\n" + "{% if p %}" * 300 + "{% endif %}" * 300, "stand inside each other too deep"),
        ("{# variables: p #}\n{{ p }}" + "x" * 20_000, "20026 characters; a template may have 20000."),
    ],
)
def test_a_wrong_template_is_refused_when_it_is_loaded(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError) as caught:
        written(tmp_path, text)
    assert complaint in str(caught.value)


def test_a_template_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"nosuch\.jinja: no such file"):
        load_template("nosuch", tmp_path)


def test_a_text_of_more_than_four_hundred_thousand_characters_is_refused(tmp_path: Path) -> None:
    template = written(tmp_path, "{# variables: p #}\n>{{ p }}")
    assert len(template.render(p="x" * 399_999)) == 400_000
    with pytest.raises(PromptError, match="rendered to more than 400000 characters, the most allowed"):
        template.render(p="x" * 400_000)


def test_the_hash_is_of_the_text_and_not_of_the_declaration_or_line_ends(tmp_path: Path) -> None:
    first = written(tmp_path, "{# variables: a, b #}\n{{ a }}\n{{ b }}\n", "first")
    again = written(tmp_path, "{#- variables: b,a -#}\r\n{{ a }}\r\n{{ b }}", "again")
    other = written(tmp_path, "{# variables: a, b #}\n{{ b }}\n{{ a }}\n", "other")
    assert first.hash == again.hash == hashlib.sha256(b"{{ a }}\n{{ b }}").hexdigest() != other.hash
    assert again.render(a="1", b="2") == "1\n2"
