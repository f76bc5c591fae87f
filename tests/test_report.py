"""The report of a run: what it says, what it leaves out, and that no text of a run becomes markup."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_run import make_run, mean, rate, results

from rlaif.errors import DataError
from rlaif.report import wording, write_report
from rlaif.report.reading import Chain, PpoSample
from rlaif.report.run import alternate, sample_chains, samples_over_time

PAYLOAD = '</div></style><script>window.__x=1</script><img src=x onerror="window.__x=1">\'"&amp;{{ 7*7 }}'
CHROMIUM = Path("/usr/bin/chromium")


class Page(HTMLParser):
    """The elements of a page, their attributes, its visible text by section."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.elements, self.text, self.sections, self._inside = html, [], "", {}, ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id", self._inside) if tag == "section" else self._inside

    def handle_data(self, data: str) -> None:
        self.text += data
        self.sections[self._inside] = self.sections.get(self._inside, "") + data


def read(folder: Path) -> Page:
    return Page(write_report(folder).read_text())


def plain(text: str) -> str:
    return text.replace("\u202f", " ").replace("\u00a0", " ")


def test_a_complete_run_gives_a_page_with_every_part(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path))
    page = Page(path.read_text())
    assert path == tmp_path / "report.html"
    assert "did not run" not in page.text and "left out" not in page.text
    parts = ("result", "evaluation", "labels", "reward", "sft", "ppo", "chains", "answers", "provenance")
    assert tuple(page.sections)[1:] == parts
    for words in (
        "harmless-demo",
        "smollm2-135m",
        "harmless 1.0",
        "Does no harm",
        "set aside: does not decline",
    ):
        assert words in page.text
    assert "quarantined by reason (repeats the response 4, does not decline 4)" in page.sections["result"]
    assert [tag for tag, _ in page.elements].count("svg") == 1 + 1 + 1 + 2 + 3 + 10


def test_the_page_asks_for_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = read(make_run(tmp_path, text=PAYLOAD))
    policy = [a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    ]
    assert not {tag for tag, _ in page.elements} & {
        "script",
        "img",
        "iframe",
        "link",
        "object",
        "form",
        "base",
    }
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in page.html and "@import" not in page.html


def test_texts_of_people_and_models_appear_only_escaped(tmp_path: Path) -> None:
    page = read(make_run(tmp_path, text=PAYLOAD))
    assert "<script" not in page.html and "<img" not in page.html and "49" not in page.sections["chains"]
    assert page.html.count("&lt;script&gt;window.__x=1&lt;/script&gt;") > 100
    assert PAYLOAD in page.sections["chains"] and PAYLOAD in page.sections["answers"]


def test_hidden_characters_are_shown(tmp_path: Path) -> None:
    page = read(make_run(tmp_path, text="\x00\x1b[31m\u202eabc\ufeff"))
    assert "\u2400\u241b[31m\u27e8U+202E\u27e9abc\u27e8U+FEFF\u27e9" in page.sections["chains"]
    assert wording.visible("a\tb\nc\x7f\ud800\r") == "a\tb\nc\u2421\u27e8U+D800\u27e9\u240d"


@pytest.mark.parametrize("stage", ["1-revise", "2-sft", "3-label", "4-reward", "5-ppo", "6-evaluate"])
def test_a_stage_that_did_not_run_or_finish_is_left_out_with_a_line(tmp_path: Path, stage: str) -> None:
    folder, name = make_run(tmp_path), stage[2:]
    (folder / stage / "manifest.json").unlink()
    (folder / stage / "metrics.jsonl").unlink(missing_ok=True)
    (folder / stage / "samples.jsonl").unlink(missing_ok=True)
    assert f"The stage \u201c{name}\u201d began but has not finished, so " in read(folder).text
    for file in (folder / stage).iterdir():
        file.unlink()
    (folder / stage).rmdir()
    page = read(folder)
    assert f"The stage \u201c{name}\u201d did not run, so " in page.text
    assert page.text.count("did not run") == (3 if name == "evaluate" else 2 if name == "ppo" else 1)


@pytest.mark.parametrize("stage", ["2-sft", "4-reward", "5-ppo"])
def test_curves_of_a_stage_that_has_not_finished_are_drawn_up_to_a_torn_row(tmp_path: Path, stage: str) -> None:
    folder, name = make_run(tmp_path), stage[2:]
    whole = read(folder)
    (folder / stage / "manifest.json").unlink()
    with (folder / stage / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "')
    page = read(folder)
    said = f"The stage \u201c{name}\u201d began but has not finished: here is what it has written so far."
    assert page.sections[name].count(said) == 1
    figures = [one.html.partition(f'<section id="{name}">')[2].partition("</section>")[0] for one in (whole, page)]
    assert figures[0].count("<figure>") == figures[1].count("<figure>") > 0
    assert "Loss" in page.sections[name] or "loss" in page.sections[name]
    if name == "ppo":
        for sentence in ("no limit of ppo.health was passed", "Updates 1 to"):
            assert (sentence in page.text) == (sentence in whole.text)
        assert page.text.count("Reward") == whole.text.count("Reward")


def test_a_folder_with_a_recipe_alone_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: empty\nmodel: smollm2-135m\n")
    assert read(tmp_path).text.count("did not run") == 9


def test_a_folder_without_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: not a run folder")):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("6-evaluate/results.json", '{"policies": [', "results.json:1: not readable as JSON"),
        (
            "6-evaluate/results.json",
            '{"policies": ["base"], "metrics": {}}',
            "results.json: metrics.base: missing",
        ),
        ("6-evaluate/results.json", "[]", "results.json: (file): "),
        ("4-reward/calibration.json", '{"heldout": {}}', "calibration.json: train_pairs: field required"),
        ("3-label/quality.json", '{"judge": 3}', "quality.json: judge: "),
        ("5-ppo/metrics.jsonl", '{"update": 1}\n{"upd', "metrics.jsonl:2: not a JSON object"),
        ("1-revise/chains.jsonl", '{"id": "a"}\n', "chains.jsonl:1: prompt: field required"),
        ("2-sft/manifest.json", "", "manifest.json:1: not readable as JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str, expected: str) -> None:
    folder = make_run(tmp_path)
    write_report(folder)
    before = (folder / "report.html").read_bytes()
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=re.escape(expected)) as caught:
        write_report(folder)
    stage = file.partition("/")[0][2:]
    assert str(folder) in str(caught.value)
    assert "RECIPE --from " + stage in str(caught.value) or "complete object" in str(caught.value)
    assert (folder / "report.html").read_bytes() == before


def test_a_missing_file_of_a_finished_stage_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "5-ppo/samples.jsonl").unlink()
    with pytest.raises(DataError, match=r"samples\.jsonl: no such file"):
        write_report(folder)


def test_differences_of_means_stand_in_a_table_and_those_of_the_last_policy_in_a_sentence(tmp_path: Path) -> None:
    page = read(make_run(tmp_path / "scored"))
    assert "In reward score, PPO less the base model is +1.60\u00a0[1.41,\u00a01.79]." in page.text
    assert (
        "PPO less SFT is +0.12\u00a0[\u22120.04,\u00a00.28]: the interval includes zero, so no difference shown."
        in page.text
    )
    assert "Differences of these means between policies, prompt by prompt" in page.text
    found = results()
    found["differences"] = [one for one in found["differences"] if one["metric"] == "refusal"]
    folder = make_run(tmp_path / "refusals")
    (folder / "6-evaluate" / "results.json").write_text(json.dumps(found))
    assert "Differences of these means" not in read(folder).text and "In reward score" not in read(folder).text


def test_scores_beside_the_reward_are_shown_where_the_evaluation_has_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "plain")
    page = write_report(folder).read_text()
    assert "Judged unsafe" not in page and "Independent score" not in page
    found = results()
    for policy in ("sft", "ppo"):
        found["metrics"][policy]["cost"] = {"all": mean(-1.5, 0.25), "harmful": mean(2.5, 0.5)}
        found["metrics"][policy]["unsafe"] = {"all": rate(30, 150, 0.144, 0.271), "harmful": rate(28, 50, 0.42, 0.69)}
        found["metrics"][policy]["independent_score"] = {"all": mean(0.4, 0.1)}
    (folder / "6-evaluate" / "results.json").write_text(json.dumps(found))
    page = write_report(folder).read_text()
    assert page.count('<td class="n">\u22121.50\u00a0[\u22121.75,\u00a0\u22121.25]</td>') == 2
    assert "20\u202f%\u00a0[14,\u00a027]" in page and "56\u202f%\u00a0[42,\u00a069]" in page
    assert "Cost by kind of prompt" in page and "Independent score by kind of prompt" not in page
    assert "an answer is judged unsafe where its cost is above 0" in page


def test_missing_numbers_become_dashes_and_never_nan(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    found = results()
    nothing = {"n": 0, "count": 0, "rate": None, "low": None, "high": None}
    found["metrics"]["base"] |= {
        "score": None,
        "kl_to_reference": {"n": 0, "mean": float("nan"), "low": None, "high": None},
    }
    found["metrics"]["ppo"]["refusal"]["harmful"] = nothing
    found["differences"][1] |= {"difference": None, "low": None, "high": None}
    found["win_rates"] = []
    (folder / "6-evaluate/results.json").write_text(json.dumps(found))
    (folder / "5-ppo/metrics.jsonl").write_text('{"update": 1, "rollout/score": null}\n{"update": 2}\n')
    quality = json.loads((folder / "3-label/quality.json").read_text()) | {"judge": None}
    (folder / "3-label/quality.json").write_text(json.dumps(quality))
    page = read(folder)
    assert not re.search(r"\b(nan|inf|none,|undefined)\b", page.html.replace("'none'", ""), re.IGNORECASE)
    assert "None" not in page.text and "No judge was measured" in page.text
    assert page.text.count("no values recorded") == 8  # and nothing of a critic or a text


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_the_result_is_said_in_plain_sentences(tmp_path: Path) -> None:
    text = plain(read(make_run(tmp_path)).sections["result"])
    assert "Compared with the base model, PPO refuses more harmful prompts (82 % against 14 %; +68 [54, 80] " in text
    assert "No difference shown on ordinary prompts (6 % against 4 %; +2 [\u22124, 8] points) and look-alike " in text
    assert "Compared with SFT, PPO refuses fewer harmful prompts (82 % against 56 %; \u221226 [\u221240, " in text
    assert "in 58 % [39, 76]: the interval includes one half, so no preference shown." in text


def test_the_labeller_and_the_reward_model_are_said_in_plain_sentences(tmp_path: Path) -> None:
    page = read(make_run(tmp_path))
    labels = plain(page.sections["labels"])
    assert "was right in 55 % [40, 69]; chance is 50 %. The interval includes chance" in labels
    assert "floor of 60 % was not met" in labels and "mostly the first one" in labels
    assert "The labels do not come from this judge but from the revisions" in labels
    assert "The 3 of 10 tests that the judge got wrong" in labels
    assert "Of 4 pairs with a known outcome planted among the others, the labeller got 75 % [30, 95] right." in labels
    assert "Of 24 answers that try to steer the judge, 38 % [21, 57] beat the better answer" in labels
    assert "[4, 31] won without being flagged; the same answers as they are win in 33 % [18, 53]" in labels
    assert "labels agree with theirs in 62 % [47, 76]. The interval does not lie above the best simple rule" in labels
    assert "safe, lawful75 % [60, 86]0.41" in labels and "Krippendorff’s alpha 0.42" in labels
    assert "Left out: 1 on which people were tied, 2 on which the labeller was undecided" in labels
    reward = plain(page.sections["reward"])
    assert "prefers the chosen answer in 78 % [69, 85]." in reward
    assert "Its interval lies above the best simple rule, \u201cthe one that refuses\u201d, at 66 %." in reward
    assert "floor of 70 % was missed for look-alike prompts" in reward


def test_samples_alternate_between_kinds_and_include_what_was_set_aside() -> None:
    rows = ["a1", "a2", "a3", "b1", "c1", "c2"]
    assert alternate(rows, lambda row: row[0], 5) == ["a1", "b1", "c1", "a2", "c2"]
    common = {"prompt": "", "response": "", "steps": []}
    kept = [Chain(id=f"k{n}", kept=True, tag="uv"[n > 9], **common) for n in range(20)]
    aside = [Chain(id=f"a{n}", kept=False, reason="rs"[n > 4], **common) for n in range(10)]
    picked = [chain.id for chain in sample_chains(kept + aside)]
    assert picked == ["k0", "k10", "k1", "k11", "k2", "k12", "k3", "k13", "a0", "a5", "a1", "a6"]
    assert len(sample_chains(aside)) == 10 and len(sample_chains(kept)) == 12


def test_samples_over_time_follow_a_prompt_from_first_to_last_update() -> None:
    def updates(rows: list[PpoSample]) -> list[list[int]]:
        return [[row.update for row in group] for group in samples_over_time(rows)]

    def sample(update: int, prompt: str) -> PpoSample:
        return PpoSample(update=update, prompt=prompt, response="", score=0.0, kl=None)

    twice = [sample(n, "ab"[n % 2]) for n in range(21)]
    assert updates(twice) == [[0, 4, 8, 12, 16, 20], [1, 5, 9, 11, 15, 19]]
    assert updates([sample(n, str(n)) for n in range(3)]) == [[0, 1, 2]]
    assert updates([]) == []


def test_the_report_does_not_import_torch() -> None:
    code = "import sys, rlaif.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_browser_opens_the_page_and_nothing_in_it_runs_or_loads(tmp_path: Path) -> None:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = write_report(make_run(tmp_path, text=PAYLOAD))
    flags = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
    seen: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*flags.split(), "--no-first-run", "--disable-quic"]
        )
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("dialog", lambda dialog: seen.append("dialog"))
        page.on("console", lambda message: seen.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url))
        page.goto(path.as_uri())
        page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
        assert page.evaluate("window.__x") is None
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert seen == [path.as_uri()]
