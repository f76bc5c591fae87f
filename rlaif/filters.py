"""What makes a revised answer unfit as a demonstration, and the rule for what counts as a refusal.

Everything here is a pure function of strings, so the same text gets the same verdict on every machine. The
rules that read words (`is_refusal`, "critique leaked", "boilerplate opening") know English only.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection

REASONS: tuple[str, ...] = (
    "empty",
    "too short",
    "truncated",
    "unchanged",
    "critique leaked",
    "role markers",
    "repetition",
    "emoji run",
    "length ratio",
    "boilerplate opening",
)
"""Every value besides None that `problem_of` can return, in the order in which they are looked for."""

OPENING_CHARACTERS = 200  # a refusal is looked for in the sentences that begin within this many characters,
OPENING_SENTENCES = 2  # and in this many sentences however long they are;
SENTENCE_CHARACTERS = 400  # this much is read of one sentence
SAME_RATIO = 0.95  # two texts at least this similar, word by word, are the same text ...
EDITED_WORDS = 10  # ... unless at least this many words were taken out or put in
COPIED_SHARE = 0.6  # a revision must not hold this share of the critique's own word 4-grams
REPEATED_SHARE = 0.3  # more than this share of a text's word 4-grams stood in it before
REPEATED_LINES = 3  # a line of three words or more must not stand this often
FEW_GRAMS = 5  # with fewer 4-grams than this a share says nothing
FEW_WORDS = 10  # the length ratio takes a shorter response to have this many words

# The wordings of a refusal, as a small grammar: `<name>` stands for the entry of that name, and a line break
# with eight spaces for nothing. Texts are in lower case, with straight quotation marks.
_GRAMMAR = {
    "adverb": r"""(?:(?:really|simply|just|also|therefore|absolutely|actually|unfortunately|still|ethically
        |morally|legally|knowingly|possibly|definitely|certainly|personally|currently|directly|respectfully
        |ever|even|sadly|in good conscience|in any way|however),? )*""",
    "we": r"\b(?:i|we)(?:,? however,?)? ?<adverb>",
    # An inability or unwillingness of the writer, up to the space before its verb.
    "cannot": r"""<we>(?:(?:can'?t|cannot|can not|won't|will not|will never)(?: (?:and|or|nor) (?:can't
        |cannot|won't|will not|should not))?(?:,? <adverb>be able to)?
        |(?:am|are|'m|'re) <adverb>(?:unable|unwilling|not <adverb>(?:able|allowed|permitted|authori[sz]ed
        |willing|going|prepared|equipped|programmed|designed|trained|inclined|supposed|here
        |in a position))(?: or \w+)? to
        |(?:don't|do not) (?:want|wish|intend|plan|have the ability) to
        |(?:don't|do not) (?:think|believe|feel) (?:that )?i(?: can| could| should|(?:'m| am) (?:able
        |allowed) to)
        |(?:am|'m) not sure (?:that |if )?i(?: can| should| want to|(?:'m| am) (?:able|allowed
        |authori[sz]ed) to)
        |have no (?:intention of|desire to|interest in|plans to)),?""",
    # Weaker forms, which may be advice to the reader or a plain statement: few verbs make a refusal of them.
    "shouldnt": r"<we>(?:shouldn't|should not|wouldn't|would not|would never|don't|do not) <adverb>",
    "serveonly": r"""(?:help (?:you|with)|assist|aid you|comply|participate|engage in|condone|provide (?:you
        |that|this|any|instructions|information))\b""",
    # The verbs of doing what was asked.
    "serve": r"""(?:help(?:ing)?\b(?!,? (?:but|it|myself)\b)(?! (?!any|some|every)\w+ing\b)
        |(?:assist|aid|comply|participat|partak|condon|facilitat|cooperat|advis|instruct|impersonat
        |role-?play)(?:e|ing)?\b
        |(?:provid|engag|encourag|shar|writ|creat|generat|produc|describ|continu|endors|promot|disclos
        |fulfill?|answer|respond|reply|recommend|support|discuss|explain|teach|reveal|draft|compos|offer|giv
        |show you)(?:e|ing)?\b<hedge>
        |(?:tell(?:ing)? (?:you|anyone)|say(?:ing)? (?:that|this|it|those|such|anything)(?! i\b))\b<hedge>
        |(?:talk|speak)(?:ing)? (?:about|on)\b|go (?:along|there|through with)\b|(?:take part|play along)\b
        |(?:walk|guide) you\b|list\b(?! (?:them )?(?:all|every))|work with you\b
        |do(?:ing)? (?:that|this|it|so|what|anything|such|any of|those|these)\b
        |be (?:of (?:any )?(?:help|assistance|service)|(?:a )?party? (?:of|to)|helping|providing|giving
        |sharing|doing|writing|answering|discussing|participating|engaging|telling)\b
        |(?:complete|process|grant|honou?r|accept|entertain|accommodate|proceed with|act on|follow|perform
        |carry out) (?:this|that|your|the|such|any|those|these)\b
        |make (?:that kind|such|jokes?|a joke|fun of|light of|threats?|hateful|offensive|derogatory|racist
        |sexist|harmful|insulting|any (?:such|joke|statement|content))\b)""",
    # What makes an ordinary remark of "I can't tell you", "I can't recommend it" and their like.
    "hedge": r"""(?! ?(?:you )?(?:how (?:much|happy|glad|excited|proud|grateful|sorry|many|long|well|often
        |important)\b|for (?:sure|certain)\b|exactly\b|away\b|up\b|in\b|(?:it|this|that)(?:'s| is| will
        | was)\b|(?:an? |the |any )?(?:exact|precise|definit\w+|single|complete|full
        |guarantee)\b))(?![^.!?]{0,60}\benough\b)""",
    "apology": r"""(?:(?:i|we)(?:'m| am|'re| are)? )?(?:very |so |really |truly |deeply )?(?:sorry
        |apologi[sz]e|(?:my )?apologies)""",
    "sorry": r"""(?:(?:oh|well|hmm?|no),? )?(?:<apology>|(?:(?:i|we)(?:'m| am|'re| are)? )?(?:afraid|regret)
        |unfortunately|regrettably)""",
    # After "I'm sorry, but I can't": perceiving and knowing, which explain instead of declining.
    "other": r"""(?!(?:quite|really|yet)?\b ?(?:find|see|hear|understand|recall|remember|tell (?:if|whether
        |from|what|which)|be (?:sure|certain|there)|wait|agree|imagine|locate|open|read|recogni[sz]e|view
        |make (?:out|sense)|think|know|help but|say (?:for|i|if|whether)|feel|taste|smell|experience
        |have)\b)\w""",
    "bad": r"(?:inappropriate|unethical|irresponsible|immoral)",
    "good": r"(?:appropriate|ethical|acceptable|okay|ok)",
    "this": r"""(?:that|this|it|(?:your|the|this|that) (?:request|question|topic)|what you(?:'re
        | are) asking(?: for)?)""",
}


def _rules(*patterns: str) -> tuple[re.Pattern[str], ...]:
    """Compile patterns of the grammar above, deaf to case; `^` and `$` are the ends of a line."""
    expanded = []
    for pattern in patterns:
        while names := set(re.findall(r"<([a-z]+)>", pattern)):
            for name in names:
                pattern = pattern.replace(f"<{name}>", _GRAMMAR[name])
        expanded.append(re.compile(re.sub(r"\n {8}", "", pattern), re.IGNORECASE | re.MULTILINE))
    return tuple(expanded)


_DECLINING = _rules(  # anywhere in a sentence
    r"<cannot> <adverb><serve>",
    r"<shouldnt><serveonly>",
    r"<cannot>(?: (?:do|help|assist|comply|say|answer))?(?:,? sorry)?$",
    r"""<we>(?:(?:must|will|'ll|have to|need to|will have to|'ll have to|am obliged to|(?:am
        |'m) going to have to)? ?)(?:\w+ly )?(?:decline|refuse(?! to (?:believe|accept|give up))|refrain from
        |abstain from|pass on (?:this|that)|say no)\b""",
    r"""<we>(?:(?:don't|do not|wouldn't|would not|'d not) (?:really )?(?:feel|be)|(?:am
        |'m) not) (?:\w+ )?comfortable\b|<we>(?:feel|(?:am|'m)) (?:\w+ )?uncomfortable (?:with|helping|doing
        |answering|providing|discussing|writing|sharing)\b""",
    r"<we>(?:'d|would|'ll|will)? ?(?:much )?(?:rather|prefer) not\b(?! have to)",
    r"""(?:\bnot|n't) (?:something|(?:a|the|an) (?:topic|subject|request|question|(?:type|kind|sort) of \w+))
         (?:that )?(?:i|we)(?:'m|'ll|'d| am| can| could| will| would| want| wish| should| feel)\b
        |\b(?:something|request|question|topic|one|thing) (?:that )?i (?:can't|cannot|won't|will not
        |(?:'m| am) not (?:able|willing))\b|^that i (?:can't|cannot|won't|will not)\b""",
    r"""\b(?:against|violates?|outside(?: of)?|contrary to) (?:my|our|openai's) (?:\w+ )?(?:programming
        |guidelines|polic(?:y|ies)|values|principles|ethics|rules|terms|instructions)\b""",
    r"""\bmy (?:\w+ )?(?:guidelines|programming|policies|rules|principles|instructions) (?:\w+ )?(?:prevent
        |prohibit|forbid|do not|don't|doesn't|does not)""",
    r"\bthere(?:'s| is) no way (?:that )?i\b|\bdo(?:n't| not) ask me (?:to|for|that|about)\b",
    r"""\b(?:not|never|isn't|wouldn't be) (?:\w+ly )?(?:<good>|right|responsible|legal|possible) for me to\b
        |\b(?:be|is|it's|that's|feels?) (?:\w+ly )?(?:<bad>|wrong|illegal)(?: and \w+)? for me to\b""",
    r"""\b(?:let's|can we|could we|shall we|i'd prefer to|i'd rather) (?:please )?(?:(?:talk|chat
        |speak) about|discuss) (?:something|anything) (?:else|different)\b|\blet's change the subject\b
        |\bno can do\b|\b(?:i draw|i have to draw) the line\b""",
)
_DECLINING_FIRST = _rules(  # only where a sentence begins so
    r"""<sorry>,?(?: (?:for|if|about)[^,.]{0,50},)?(?: to (?:say|inform you))?(?: that)?(?: but
        | however)?,? (?:i'm afraid )?(?:that )?<cannot> <other>""",
    r"<sorry>,?(?: but)?,? (?:no|not)$",
    r"""<apology>,?(?: but)?,? <this>\b[^.!?]{0,60}\b(?:(?:not|n't) (?:<good>|allowed|permitted|a (?:topic
        |subject|request))|violat\w+|<bad>|illegal|against|harmful|unacceptable|off limits)\b""",
    r"""no,? (?:i|we) ?(?:can't|cannot|won't|will not|refuse|(?:am|'m|are|'re) (?:unable|not able
        |not going) to)\b""",
    r"""(?:it is|it's|it would be|that is|that would be) (?:(?:not|never) (?:\w+ly )?<good>|(?:\w+ly )?<bad>
        (?: and \w+)?) to (?:provide|share|give|make|create|write|discuss|engage|encourage|promote|generate
        |joke|mock|insult|stereotype|generali[sz]e|discriminate)\b""",
    r"""(?:<sorry>,? but )?as an? (?:\w+[- ]){0,3}(?:ai|assistant|language model|artificial intelligence
        |chatbot)\b[^.!?]{0,60}?<cannot> (?!(?:be|predict|guarantee|express|hold|form)\b)<other>""",
    r"<sorry>[^.!?]{0,60}\bi (?:must|have to|need to) (?:adhere|abide)\b",
)
_CONDITION = re.compile(
    r"\b(?:if|when|whenever|unless|until|in case|whether|what|(?:any|every)?things?|promise(?: \w+){0,2})$"
)
_LETTER = re.compile(r"dear\b|subject:|title:|to whom\b|once upon")
_ALIKE = str.maketrans(
    {**dict.fromkeys("’‘‛`´ʼ＇", "'"), **dict.fromkeys("“”„‟«»＂", '"'), "…": ".", "*": None, "_": None}
)


def is_refusal(text: str) -> bool:
    """Tell whether a reply opens by declining what was asked.

    The rule reads the opening only: the first two sentences, and any further one that begins within the first
    200 characters. Quotation marks, case, spaces and emphasis are made alike first, and quoted speech is left
    out. The reply refuses when a sentence of the opening

    - says in the first person that the writer cannot, will not, may not, or is unable to do one of the things
      an assistant is asked for (help, provide, write, tell you, discuss, ...), or would rather not;
    - declines, refuses, or names discomfort, the writer's own rules, or "not something I can do";
    - begins with an apology, "unfortunately" or "no", and goes on to an inability of any kind other than not
      finding, seeing or understanding something; or
    - begins by calling it inappropriate, unethical or the like to say such things.

    A clause after "if", "when" or "unless" is no refusal, nor is a letter ("Dear ..."). What is not seen: a
    reply that lectures, changes the subject or misses the question without saying that it declines.

    Args:
        text: the whole reply.

    Returns:
        True where the reply declines. An empty reply does not.
    """
    plain = re.sub(r"[^\S\n]+", " ", text.translate(_ALIKE).lower()).strip()
    if len(plain) > 1 and plain[0] == plain[-1] == '"' and '"' not in plain[1:-1]:
        plain = plain[1:-1].strip()
    if _LETTER.match(plain):
        return False
    return any(_declines(sentence) for sentence in _opening(re.sub(r'"[^"\n]{0,300}"', '""', plain)))


def _opening(text: str) -> list[str]:
    """Return the sentences that `is_refusal` reads, without the punctuation around them."""
    sentences: list[str] = []
    for found in re.finditer(r"[^.!?\n]+(?:[.!?](?=[^\s\"')\]])[^.!?\n]*)*", text):
        sentence = found.group().strip(" -–—>#\"'()[]:;,")
        if not sentence:
            continue
        if len(sentences) >= OPENING_SENTENCES and found.start() >= OPENING_CHARACTERS:
            break
        sentences.append(sentence[:SENTENCE_CHARACTERS])
    return sentences


def _declines(sentence: str) -> bool:
    if any(rule.match(sentence) for rule in _DECLINING_FIRST):
        return True
    hits = (found for rule in _DECLINING for found in rule.finditer(sentence))
    return any(not _CONDITION.search(sentence[: found.start()].rstrip()) for found in hits)


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff])[\w'])+")
# What a critic says of an answer; the group is what the prompt or the response may speak of too.
_CRITIC = _rules(
    r"\A\W*(the response)\b(?! (?:of|to|from|time|rate|variable)\b)",
    r"""\b(the response) (?:should|could|does|did|fail(?:s|ed)|contains?|provide[sd]|lack(?:s|ed)
        |encourage[sd]|promote[sd]|violate[sd]|assume[sd]|above|(?:is|was) (?:too|not|un\w+|in\w+|harmful
        |helpful|offensive|biased|toxic|dangerous|fine))\b""",
    r"""\b((?:the|this|my|your) (?:assistant's|ai's|model's|chatbot's|original|previous|above) (?:response
        |answer|reply))\b""",
    r"""\b(the (?:answer|reply) above|(?:revis|rewr[io]t|chang|improv|modif)\w* (?:the|my|this) (?:response
        |answer|reply)|(?:the|this) revised (?:response|answer|version) (?:is|avoids|no|now|does))\b""",
    r"^(?:[^\w\n]|_)*((?:critique|revision)(?: request)?)\s*:",
)
(_ROLE_MARKER,) = _rules(
    r"""^[ \t*_\#>\[]*(?:user|assistant|human|system)[\s*_\]]*:|<\||\[/?INST\]|<(?:start|end)_of_turn>
        |^\#+ *(?:instruction|response) *:"""
)
(_BOILERPLATE,) = _rules(
    r"""\W*(?:(?:sure|certainly|of course|absolutely|okay|ok|yes|understood|got it)[^\w\n]*)?(?:(?:(?:here
        |below)(?:'s| is)|this is|i have|i've|the following is) (?:(?:the|an?|my|your) )?(?:\w+ )?(?:
        (?:revised|rewritten|reworded|rephrased)\b|(?:improved|updated|corrected|edited|modified|refined|new
        |better) (?:\w+ )?(?:version|response|answer|reply|draft)\b)|(?:revised|rewritten|improved|updated
        |corrected|final) (?:response|answer|reply|version)\s*(?::|$))"""
)
(_EDITING,) = _rules(r"\b(?:re-?(?:writ|phras|word|vis)|edit|improv|correct|proofread|updat|modif|fix|polish|version)")
_PICTURE = (  # characters shown as a picture by default, and others where U+FE0F or a joiner follows
    r"(?:[\U0001f000-\U0001f1e5\U0001f200-\U0001faff\u231a\u231b\u23e9-\u23f3\u26a1\u26aa\u26ab\u26bd\u26be\u26c4"
    r"\u26c5\u2705\u270a\u270b\u2728\u274c\u274e\u2753-\u2755\u2757\u2795-\u2797\u2b50\u2b55]"
    r"|[\u2190-\u2bff\u3030\u303d\u3297\u3299](?=\ufe0f|\u200d))[\ufe0f\U0001f3fb-\U0001f3ff]*"
)
_EMOJI_RUN = re.compile(
    rf"(?:(?:[\U0001f1e6-\U0001f1ff]{{2}}|[0-9#*]\ufe0f?\u20e3|{_PICTURE}(?:\u200d{_PICTURE})*)\s*){{3}}"
)


def problem_of(
    revision: str,
    *,
    response: str,
    critique: str,
    prompt: str,
    ended: bool,
    min_words: int = 3,
    min_ratio: float = 0.1,
    max_ratio: float = 10.0,
    allow_unchanged: bool = False,
    wanted: Collection[str] = REASONS,
) -> str | None:
    """Name the first thing that makes a revised answer unfit to be imitated.

    - "empty": nothing but white space. "too short": fewer than `min_words` words.
    - "truncated": the model did not end the text itself (`ended` is False).
    - "unchanged": the response again, apart from case, spaces and less than a handful of words: similar to at
      least 95 % by difflib's ratio over words, with fewer than 10 words changed.
    - "critique leaked": it speaks about the response as a critic does, has a line "Critique:" or "Revision:",
      or holds at least 60 % of the word 4-grams that the critique has and neither prompt nor response has.
    - "role markers": a line that begins "User:", "Assistant:", "Human:" or "System:", or a token of a chat
      template.
    - "repetition": more than 30 % of its word 4-grams stood in it before, or one line of three words or more
      stands three times.
    - "emoji run": three emoji in a row.
    - "length ratio": more than `max_ratio` times the words of the response (or of ten words, if that is
      more), or less than `min_ratio` times; but a refusal may be as short as it likes.
    - "boilerplate opening": "Sure, here is the revised ...", "Revised response:". Not looked for where the
      prompt itself asks to revise, edit or improve something.

    What the prompt itself speaks of ("the response", "User:") is never held against the revision.

    Args:
        revision: the text in question.
        response: the answer that was revised.
        critique: what was said of that answer.
        prompt: what was asked.
        ended: whether the model ended the text itself, rather than being cut off.
        min_words: the fewest words of a fit text.
        min_ratio: the fewest words for each word of the response.
        max_ratio: the most words for each word of the response.
        wanted: the reasons to look for.
        allow_unchanged: whether an unchanged response is fit, as where the critique found nothing to change.

    Returns:
        One of `REASONS`, or None where the revision is fit.
    """
    words, plain = _WORD.findall(revision), revision.translate(_ALIKE)
    before = len(_WORD.findall(response))
    looks: dict[str, Callable[[], bool]] = {
        "empty": lambda: not revision.strip(),
        "too short": lambda: len(words) < min_words,
        "truncated": lambda: not ended,
        "unchanged": lambda: not allow_unchanged and is_same(revision, response),
        "critique leaked": lambda: _leaks(plain, critique, f"{prompt}\n{response}"),
        "role markers": lambda: _marks_roles(revision, prompt),
        "repetition": lambda: _repeats(revision),
        "emoji run": lambda: bool(_EMOJI_RUN.search(revision)),
        "length ratio": lambda: (
            len(words) > max_ratio * max(before, FEW_WORDS)
            or (len(words) < min_ratio * before and not is_refusal(revision))
        ),
        "boilerplate opening": lambda: bool(_BOILERPLATE.match(plain)) and not _EDITING.search(prompt),
    }
    return next((reason for reason, found in looks.items() if reason in wanted and found()), None)


def is_same(revision: str, response: str) -> bool:
    """Tell whether a revision is the response again, as `problem_of` describes it."""
    new, old = revision.casefold().split(), response.casefold().split()
    if new == old:
        return True
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if matcher.quick_ratio() < SAME_RATIO or matcher.ratio() < SAME_RATIO:
        return False
    edits = (max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in matcher.get_opcodes() if kind != "equal")
    return sum(edits) < EDITED_WORDS


def _grams(text: str) -> list[tuple[str, ...]]:
    """Return the word 4-grams of a text, in order."""
    words = _WORD.findall(text.casefold())
    return [tuple(words[start : start + 4]) for start in range(len(words) - 3)]


def _leaks(revision: str, critique: str, context: str) -> bool:
    known = context.translate(_ALIKE).casefold()
    if any(found.group(1).casefold() not in known for rule in _CRITIC for found in rule.finditer(revision)):
        return True
    own = set(_grams(critique)) - set(_grams(context))
    return len(own) >= FEW_GRAMS and len(own & set(_grams(revision))) >= COPIED_SHARE * len(own)


def _marks_roles(revision: str, prompt: str) -> bool:
    asked = prompt.casefold()
    return any(found.group().strip().casefold() not in asked for found in _ROLE_MARKER.finditer(revision))


def _repeats(text: str) -> bool:
    grams = _grams(text)
    if len(grams) >= FEW_GRAMS and 1 - len(set(grams)) / len(grams) > REPEATED_SHARE:
        return True
    lines = Counter(line.strip().casefold() for line in text.splitlines() if len(line.split()) >= 3)
    return any(times >= REPEATED_LINES for times in lines.values())
