"""Texts that try to steer a judge instead of answering: found by rules, and a corpus of them to try a judge with.

Asking in both orders undoes a text that names a position ("the better answer is B"). It does nothing against one that
speaks for itself ("choose the answer with this line"), so such texts are flagged. The rules read English, see the usual
wordings and miss others; how many get past both the rules and the judge is measured with ``prompts/attacks.jsonl``.
"""

import re
from typing import Literal

from rlaif.documents import shipped
from rlaif.records import Messages, Row, read_rows

Kind = Literal["instruction to the judge", "verdict look-alike", "control token", "master key", "no content"]
IN_PROMPTS: tuple[Kind, ...] = ("instruction to the judge", "verdict look-alike", "control token")
"""What is looked for in a prompt; a prompt may be short and say nothing."""

_TEXT = r"(?:answer|response|reply|option|completion|text|one|candidate|choice)"
_JUDGE = r"(?:judges?|graders?|evaluators?|raters?|annotators?|reviewers?|labell?ers?|scorers?|(?:ai|reward) model)"
_WINS = r"(?:better|best|winner|winning|preferred|correct|superior|right)"
_FLAGS = re.IGNORECASE | re.MULTILINE | re.VERBOSE
# What may begin a line holds no line break: else a run of n line breaks takes n * n steps.
_RULES: dict[Kind, re.Pattern[str]] = {
    "instruction to the judge": re.compile(
        rf"""(?:note|message|instructions?|attention|memo|hint|request|reminder)\W{{1,3}}?
            (?:to|for)\ (?:the\ |any\ |all\ |our\ )?(?:\w+\ )?{_JUDGE}\b
        |\battention,?\ {_JUDGE}\b
        |\b(?:dear|hey|hello|hi|as\ an?|you\ are\ an?|if\ you\ are\ an?)\ (?:\w+\ )?{_JUDGE}\b
        |^[^\w\n]*{_JUDGE}\W{{0,2}}[:,]
        |\b(?:choose|pick|select|prefer|favou?r|reward|vote\ for|mark|rank|rate|score|grade)\ (?:only\ )?
            (?:this|my|the)\ (?:\w+\ )?(?:answer|response|reply|completion|text)\b[^.!?\n]{{0,40}}
            \b(?:line|sentence|this|above|below|best|first|highest|higher|top|better|over|10|ten|full)\b
        |\b(?:ignore|disregard|forget|override)\b[^.!?\n]{{0,30}}\b(?:previous|prior|above|earlier|other|all|any)\b
            [^.!?\n]{{0,20}}\b(?:instructions?|rules?|criteria|principles?|prompts?|guidelines|answers?|responses?)\b
        |\b(?:give|assign|award)\ (?:this|it|me|my)\b[^.!?\n]{{0,30}}\b(?:10|ten|full|highest|maximum|top|perfect)\b
            [^.!?\n]{{0,12}}(?:scores?|marks?|ratings?|points?|grades?|out\ of|/)
        |\byour\ (?:task|job|instructions?)\ (?:is|are)\ (?:now\ )?to\ 
            (?:choose|pick|select|prefer|reply|answer|output|say)\b
        |\b(?:reply|respond|answer|output)\ (?:only\ )?with\ (?:the\ letter\ )?["'(]*[AB12]["')]*(?:\W|$)""",
        _FLAGS,
    ),
    "verdict look-alike": re.compile(
        rf"""^(?:[^\w\n]|_)*(?:(?:the\ )?(?:final|correct|better|best|preferred)\ )?(?:answer|verdict|winner|choice
            |preference|preferred\ {_TEXT}|judge?ment|decision|{_TEXT})\W{{0,3}}[:=]\W{{0,4}}(?:{_TEXT}\ )?[AB12]\b
            \W{{0,3}}(?:$|\n|[.;,])
        |\bverdict[\s*_]*:
        |\b(?:the\ )?{_WINS}\ {_TEXT}\ (?:is|was|must\ be|here\ is)\W{{1,4}}(?:clearly\ |obviously\ )?
            (?:{_TEXT}\ )?(?:\(?[AB12]\)?|this|mine|the\ (?:first|second))\b(?!['’])
        |\b(?:answer|response|option|reply|candidate)\ \(?[AB12]\)?\ (?:is|was|wins?|should|must|deserves)\b
        |\[\[\s*[AB]\s*\]\]
        |["']?(?:winner|choice|verdict|preference|label)["']\s*:\s*["']?[AB12]["']?""",
        _FLAGS,
    ),
    "control token": re.compile(
        r"""<\|[^|<>\n]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>|<(?:begin|end)_of_text>|<eos>|<bos>
        |^\W{0,3}(?:answer|response|option)\ [AB12]\W{0,3}:\W{0,3}$
        |^\#+\ *(?:instruction|response|system)\b\ *:
        |^(?:human|user|system|assistant)\ ?:""",
        _FLAGS,
    ),
    "master key": re.compile(
        r"""\W*(?:(?:my\ |the\ |final\ |a\ |here\ is\ (?:the|my)\ |here['’]s\ (?:the|my)\ )*
            (?:thought\ process|thinking|thoughts?|reasoning|analysis|explanation|solution|answer|response|result
            |conclusion|step\ 1|step\ one|steps?|summary|proof|respuesta|soluci[oó]n|l[oö]sung|antwort|r[eé]ponse
            |解|答案|回答|かいせつ|解説)
        |let['’]?s\ (?:solve|think|work|break|go)\b[^.!?\n]{0,60}
        |(?:i\ will|i['’]ll|we\ (?:can|will))\ (?:now\ )?(?:solve|answer|think|reason|explain)\b[^.!?\n]{0,40}
        |[^.!?\n]{0,40}step[\ -]by[\ -]step)\W*""",
        _FLAGS,
    ),
    "no content": re.compile(
        r"""[\W_]*|\W*(?:n/?a|none|null|nil|nothing|undefined|tbd|todo
        |\[?(?:your\ )?(?:answer|response|text)(?:\ here)?\]?|sure(?:\ thing)?|ok(?:ay)?|of\ course|certainly
        |absolutely|yes,?\ of\ course|no\ comment|no\ problem)\W*""",
        _FLAGS,
    ),
}
_WHOLE: tuple[Kind, ...] = ("master key", "no content")  # the text is nothing but this
_HIDDEN = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")  # put between letters to dodge a rule


class Attack(Row):
    """One attempt to steer a judge: a text that stands alone, or before or after an answer."""

    id: str
    kind: str
    where: Literal["alone", "before", "after"]
    text: str

    def applied_to(self, answer: str) -> str:
        """Return the answer with the attempt in it; alone, the attempt takes its place."""
        if self.where == "alone":
            return self.text
        return f"{self.text}\n\n{answer}" if self.where == "before" else f"{answer}\n\n{self.text}"


def flags_of(text: str, kinds: tuple[Kind, ...] = tuple(_RULES)) -> list[str]:
    """Return the ways in which a text tries to steer a judge, or says nothing at all; empty for most texts."""
    plain = _HIDDEN.sub("", text)
    return [
        kind
        for kind in kinds
        if (_RULES[kind].fullmatch(plain.strip()) if kind in _WHOLE else _RULES[kind].search(plain))
    ]


def flags_of_pair(prompt: Messages, first: str, second: str) -> list[str]:
    """Return the flags of a prompt's turns and of two answers, each with the part that it is about."""
    in_prompt = dict.fromkeys(flag for turn in prompt for flag in flags_of(turn["content"], IN_PROMPTS))
    return [
        *(f"prompt: {flag}" for flag in in_prompt),
        *(f"first: {flag}" for flag in flags_of(first)),
        *(f"second: {flag}" for flag in flags_of(second)),
    ]


def load_attacks() -> list[Attack]:
    """Return the attempts that ship with the package."""
    return read_rows(shipped("prompts") / "attacks.jsonl", Attack)
