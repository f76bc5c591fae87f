"""The section `engines`: addresses, keys and names; what is refused, and that no secret is shown."""

from pathlib import Path

import pytest
from test_recipe import complaint, recipe

from rlaif.endpoints import Endpoint
from rlaif.errors import ConfigError

ENGINE = "name: r\nmodel: tiny\nengines:\n  big:\n    model: m\n    urls: [http://127.0.0.1:8000/v1]\n"
SECRET = "hunter2-and-more"


def test_a_recipe_describes_engines_and_names_them_where_something_is_asked(tmp_path: Path) -> None:
    found = recipe(tmp_path, ENGINE + "revise: {critic: big}\nlabel: {judge: big}\n")
    assert found.engines_of("revise") == {"responder": "base", "critic": "big", "reviser": "base"}
    assert (found.engines_of("label"), found.engines_of("evaluate")) == ({"judge": "big"}, {})
    assert found.engines_of("sft") == {}
    assert found.engines["big"].concurrency == 16 and found.engines["big"].logprobs == "auto"


@pytest.mark.parametrize(
    ("addition", "expected"),
    [
        ("label: {judge: bog}", "r.yaml:7:9: label.judge: no engine `bog`; did you mean `big`?"),
        ("revise:\n  critic: nobody", "r.yaml:8:3: revise.critic: no engine `nobody`; known: base, ray, big."),
    ],
)
def test_an_engine_that_is_not_described_is_named_with_its_place(addition: str, expected: str, tmp_path: Path) -> None:
    assert complaint(tmp_path, f"{ENGINE}{addition}\n") == expected


@pytest.mark.parametrize("name", ["base", "ray", "a.b", "a b", '""'])
def test_names_that_cannot_be_told_from_others_are_refused(name: str, tmp_path: Path) -> None:
    text = ENGINE.replace("  big:", f"  {name}:")
    assert "key" in complaint(tmp_path, text) or "letters, digits, `_` and `-`" in complaint(tmp_path, text)


def test_a_misspelt_key_of_an_engine_names_the_nearest(tmp_path: Path) -> None:
    message = complaint(tmp_path, ENGINE + "    timeout: 3\n")
    assert message == "r.yaml:7:5: engines.big.timeout: unknown key; did you mean `timeout_seconds`?"


@pytest.mark.parametrize(
    "url",
    [
        f"http://me:{SECRET}@host/v1",
        f"http://{SECRET}@host/v1",
        f"http://host/v1?key={SECRET}",
        f"http://host/v1#{SECRET}",
        f"ftp://host/{SECRET}",
        f"file:///{SECRET}",
        f"{SECRET}.example/v1",
        f"http://host\\{SECRET}/v1",
        f"http://host:port{SECRET}/v1",
        f"http://ho st/{SECRET}",
        "http:///v1",
        "http://host:0/v1",
        "http://[::1/v1",
        "http://host/v1/chat/completions/",
        "",
    ],
)
def test_an_address_that_cannot_or_must_not_be_asked_is_refused_and_not_shown(url: str, tmp_path: Path) -> None:
    message = complaint(tmp_path, ENGINE.replace("http://127.0.0.1:8000/v1", f"'{url}'"))
    assert message.startswith("r.yaml:4:3: engines.big: urls.0: ")
    assert SECRET not in message


@pytest.mark.parametrize("key", [f"sk-{SECRET}", "hf_abcdefgh", "Bearer X", "[1]", "7"])
def test_a_key_in_the_place_of_a_variables_name_is_refused_and_not_shown(key: str, tmp_path: Path) -> None:
    message = complaint(tmp_path, f"{ENGINE}    api_key_env: {key}\n")
    assert "name of an environment variable in capital letters" in message
    assert SECRET not in message and "hf_" not in message


def test_a_key_under_a_key_of_its_own_is_refused_and_not_shown(tmp_path: Path) -> None:
    message = complaint(tmp_path, f"{ENGINE}    api_key: {SECRET}\n")
    assert "unknown key; did you mean `api_key_env`?" in message and SECRET not in message


@pytest.mark.parametrize("body", ["{messages: []}", "{stream: true}", "{logprobs: 3}", "{x: .inf}", "{n: 4}"])
def test_extra_keys_may_not_replace_what_the_question_says(body: str, tmp_path: Path) -> None:
    assert "engines.big.extra_body: " in complaint(tmp_path, f"{ENGINE}    extra_body: {body}\n")


def endpoint(**changes: object) -> Endpoint:
    return Endpoint.model_validate({"model": "m", "urls": ["http://a/v1"]} | changes)


def test_the_identity_is_what_is_asked_and_not_where_or_by_whom() -> None:
    plain = endpoint().identity(chooses=True)
    for same in ({"urls": ["http://b:1/v1"]}, {"api_key_env": "K"}, {"concurrency": 3}, {"timeout_seconds": 1}):
        assert endpoint(**same).identity(chooses=True) == plain
    for other in ({"model": "n"}, {"extra_body": {"top_k": 3}}, {"logprobs": "off"}, {"top_logprobs": 5}):
        assert endpoint(**other).identity(chooses=True) != plain
    assert endpoint(logprobs="off").identity(chooses=False) == endpoint().identity(chooses=False)


def test_addresses_lose_their_last_slash_and_stand_once() -> None:
    assert endpoint(urls=["http://a/v1/", "http://b", "http://a/v1"]).addresses == ["http://a/v1", "http://b"]


def test_the_key_comes_from_the_environment() -> None:
    assert endpoint().key("big", {}) is None
    assert endpoint(api_key_env="K").key("big", {"K": f" {SECRET}\n"}) == SECRET
    for value in (None, "", "  "):
        with pytest.raises(ConfigError, match=r"engines\.big\.api_key_env: the environment variable `K` is not set"):
            endpoint(api_key_env="K").key("big", {} if value is None else {"K": value})
    with pytest.raises(ConfigError, match="holds a space or a character outside of ASCII") as caught:
        endpoint(api_key_env="K").key("big", {"K": f"{SECRET}\r\nx: y"})
    assert SECRET not in str(caught.value)
