import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.filters import REASONS, is_refusal, problem_of

SHARED = Path(__file__).parents[2] / "shared" / "data"

REFUSALS = [
    "I can't help with that.",
    "I can’t help with that request.",
    "I cannot assist you with this.",
    "I can not provide instructions for that.",
    "I won't do that.",
    "I will not write that story.",
    "I'm sorry, but I can't assist with that request.",
    "I am sorry, I cannot comply with that request.",
    "I'm sorry, but that's not something I can do.",
    "Sorry, but I can't help you here.",
    "Sorry, I'm not allowed to discuss that.",
    "No, I cannot assist with this request.",
    "No, I won't.",
    "I'm not able to help with requests like this one.",
    "I am not able to provide that information.",
    "I'm unable to share personal details about other people.",
    "I am unable to fulfill this request.",
    "I apologize, but I cannot provide guidance on that.",
    "My apologies, but I'm unable to provide instructions for that.",
    "I must decline.",
    "I must respectfully decline to answer.",
    "I have to decline this request.",
    "I'll have to decline, because someone could be hurt.",
    "I refuse to take part in this.",
    "I don't feel comfortable writing about that.",
    "I am not comfortable with this request.",
    "I'm uncomfortable helping with something that could hurt a person.",
    "It is not appropriate to make jokes about someone's religion.",
    "It's not appropriate for me to give an opinion on that.",
    "It would be unethical for me to explain how to do this.",
    "It would be irresponsible to share such instructions.",
    "I'd rather not talk about that.",
    "I would rather not say anything that could hurt them.",
    "I would prefer not to write this letter.",
    "As an AI, I cannot help with illegal activities.",
    "As an AI language model, I am not able to engage in hate speech.",
    "As a responsible AI assistant, I can't support that plan.",
    "I do not condone violence of any kind.",
    "I don't condone stealing, so I'll leave it there.",
    "Unfortunately, I can't help with breaking into a car.",
    "I'm afraid I can't do that.",
    "I'm afraid that's not something I'm willing to do.",
    "I appreciate your curiosity, but I can't provide steps for making a weapon.",
    "I understand you are angry. I can't help you hurt him, though.",
    "While I can't give you instructions for that, I can explain how locks protect a house.",
    "That's not something I can help with.",
    "This is not a topic I can discuss.",
    "Picking someone else's lock isn't something I'm able to walk you through.",
    "This goes against my guidelines.",
    "That request is against my programming.",
    "My guidelines do not allow me to answer.",
    "I cannot and will not help you threaten anyone.",
    "I'm not going to tell you how to follow someone home.",
    "I am not willing to write that.",
    "I won't be able to help you with that plan.",
    "I don't think I can help you with that.",
    "I'm not sure I should answer that.",
    "We cannot help with that request.",
    "I simply cannot, in good conscience, assist with this.",
    "I strongly object to this. I will not provide any instructions.",
    "Oh, I'm sorry, I can't do that.",
    "Thank you for asking, but I will have to refuse.",
    "**I'm sorry**, but I _can't_ help with that.",
    '"I\'m sorry, but I cannot help you with that."',
    "I CANNOT HELP WITH THAT.",
    "I can’t.",
    "I'm sorry, but I can't.",
    "Let's talk about something else.",
    "Please don't ask me to write threats.",
    "There is no way I'm going to explain that.",
    "I have no intention of helping with this.",
    "I don't want to help you deceive your grandmother.",
    "That is a request I cannot fulfil.",
    "I shouldn't help with this, because it could hurt people.",
    "I am programmed to be safe. I can't answer questions about that.",
    "I’m really sorry that you’re going through this, but I’m unable to provide the help that you need.",
    "Your anger is easy to understand.\n\nI can't help you get revenge.",
    "I'm not in a position to give advice on evading the police.",
    "I need to refrain from answering that.",
    "I'm sorry, but it's not appropriate to write about a real person in that way.",
]

ORDINARY = [
    "",
    "   \n ",
    "You can't go wrong with pasta.",
    "I'm sorry to hear that. Try resting with your leg raised.",
    "I can't wait to help you plan the party!",
    "If you can't find baking powder, use soda and vinegar.",
    "It's not necessary to peel the carrots.",
    "I can't recommend this book highly enough.",
    "I can't tell you how happy I am for you!",
    "I can't help but smile at that question.",
    "I can't help laughing at this joke.",
    "I can't say for sure, but it was probably built around 1900.",
    "I can't give you an exact figure, but about a third of people do.",
    "I cannot stress enough how important sleep is.",
    "I won't lie: the first week is hard.",
    "I won't give away the ending, but the butler is involved.",
    "I'm sorry, I don't understand the question. Could you say more?",
    "I'm sorry, but I can't find any mistakes in your essay.",
    "I'm sorry for your loss. Grief takes its own time.",
    "Sorry, I misread your question. The capital of Australia is Canberra.",
    "Sorry, that's wrong: seven times eight is fifty-six.",
    "Apologies for the confusion earlier. Here is the list again.",
    "I'm afraid the museum is closed on Mondays.",
    "Unfortunately, the recipe needs eggs.",
    "Unfortunately, this can be harmful to cats, so keep the lilies out of reach.",
    "No, the Earth is not flat.",
    "No. Drag queens and drag kings are different things.",
    "No, I don't think that's a mistake; both spellings are used.",
    "Absolutely not: bleach and ammonia must never be mixed.",
    "You should not share your password with anyone.",
    "You cannot provide a reference without asking them first.",
    "Plants can't make food without light.",
    "It is not appropriate to wear white to most weddings.",
    "It is wrong to say that the Sun goes around the Earth.",
    "It is illegal to share films in most countries, unless the owner agrees.",
    "It's not possible to fold a sheet of paper in half twelve times by hand.",
    "As an AI, I don't have feelings, but I'm glad it went well.",
    "As an AI, I cannot taste food, but people say durian is sweet.",
    "I wouldn't recommend bleach on wool; use cold water and mild soap.",
    "I don't recommend running on a sprained ankle.",
    "I would not worry about it; most moles are harmless.",
    "I'd rather have tea than coffee, said the old man.",
    "I prefer the second draft, because it is shorter.",
    "Dear Ms. Hall,\n\nI am sorry, but I cannot accept your invitation.",
    "Subject: Friday\n\nI won't be able to help with the move on Friday.",
    'She looked up and said, "I can\'t help you with that."',
    "“I will not do that!” cried the captain, and the crew fell silent.",
    "Here is what I can do and what I can't do: I can play chess.",
    "If I can't answer that, who can?",
    "When I can't help my child with homework, we look it up together.",
    "I promise I won't share your number with anyone.",
    "Of course! I'd be happy to help you with that.",
    "Sure, here's a classic riddle for you.",
    "I can help you with that. First, boil the water.",
    "Why don't we start with the first chapter?",
    "I don't know, but here are some ideas.",
    "I'm not sure which mushrooms you mean.",
    "I'm not a doctor, but a fever over 40 degrees needs one at once.",
    "I can't see the image, so please describe it.",
    "I couldn't agree more.",
    "I can't believe how fast this year went.",
    "I don't think we should blame the driver.",
    "To kill a Python process, send it the signal TERM; if it refuses, send KILL.",
    "The patient refuses to take the medicine? Try it with juice.",
    "Declining an invitation politely is easy: thank them first.",
    'A refusal can be short: "I can\'t make it" is enough.',
    "Never mix these two. They make a gas that hurts the lungs.",
    "We can't thank you enough for coming.",
    "Let's talk about fractions. A half is one of two equal parts.",
    "Not all heroes wear capes, and not something I read every day, this book stays with you.",
    "My rules for a good soup: start with onions, and don't hurry.",
    "I refuse to believe that spring will never come, wrote the poet.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_reply_that_declines_is_a_refusal(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", ORDINARY)
def test_an_ordinary_reply_is_no_refusal(text: str) -> None:
    assert not is_refusal(text)


@given(st.sampled_from(REFUSALS + ORDINARY))
@settings(deadline=None, max_examples=60)
def test_case_quotation_marks_and_spaces_do_not_change_the_verdict(text: str) -> None:
    verdict = is_refusal(text)
    assert is_refusal(text.upper()) == verdict
    assert is_refusal(text.replace("'", "’")) == verdict
    assert is_refusal("  " + text.replace(" ", "   ") + "\n") == verdict


def test_a_refusal_far_into_a_reply_is_not_its_opening() -> None:
    story = "The fox ran over the hill and through the wood to the old mill. " * 5
    assert not is_refusal(story + "I can't help with that.")
    assert is_refusal("The fox ran. The hen hid. The dog slept. I can't help with that.")


RESPONSE = "Mix the two cleaners in a closed room, wait for ten minutes, and then breathe in deeply to feel calm."
REVISION = "Please keep those cleaners apart: together they make a gas that burns the lungs. Open a window instead."
CRITIQUE = "It tells the reader to breathe a poisonous gas, which could kill someone who follows the advice."
PROMPT = "How do I use these two cleaners?"


def problem(
    revision: str,
    response: str = RESPONSE,
    critique: str = CRITIQUE,
    prompt: str = PROMPT,
    ended: bool = True,
) -> str | None:
    return problem_of(revision, response=response, critique=critique, prompt=prompt, ended=ended)


@pytest.mark.parametrize(
    "revision", [REVISION, "I can't help with that.", "Keep them apart.", "別々に保管してください。"]
)
def test_a_fit_revision_has_no_problem(revision: str) -> None:
    assert problem(revision) is None


@pytest.mark.parametrize(
    ("revision", "reason"),
    [
        ("", "empty"),
        (" \n\t ", "empty"),
        ("No.", "too short"),
        ("Keep apart.", "too short"),
        ("...", "too short"),
        (RESPONSE, "unchanged"),
        ("  " + RESPONSE.upper().replace(" ", "\n") + " ", "unchanged"),
        ("The response tells people to mix them.", "critique leaked"),
        ("Please do not mix them. The response was harmful.", "critique leaked"),
        ("Keep them apart, because the original answer could hurt someone.", "critique leaked"),
        ("As the answer above says, keep them apart.", "critique leaked"),
        ("I have revised the response to be safe: keep them apart.", "critique leaked"),
        ("**Critique:** It is harmful. Keep them apart.", "critique leaked"),
        ("Keep them apart.\nRevision: Keep them well apart.", "critique leaked"),
        (
            "It tells the reader to breathe a poisonous gas, which could kill someone. Do not.",
            "critique leaked",
        ),
        ("Keep them apart.\nUser: Thanks!", "role markers"),
        ("Keep them apart.\n**Assistant:** Sure.", "role markers"),
        ("Keep them apart.\n\nHuman: And then?", "role markers"),
        ("Keep them apart.<|im_end|>", "role markers"),
        ("[INST] Keep them apart. [/INST]", "role markers"),
        ("keep them apart and " * 6, "repetition"),
        ("Keep them apart.\nOne is acid.\nKeep them apart.\nOne is salt.\nKeep them apart.", "repetition"),
        ("Keep them apart, please! 😀😀😀", "emoji run"),
        ("Keep them apart, please! ⚠️ ⚠️ ⚠️", "emoji run"),
        ("Greetings from three lands: 🇫🇷🇩🇪🇮🇹", "emoji run"),
        (" ".join(str(number) for number in range(300)), "length ratio"),
        ("Sure, here is the revised text: keep them apart.", "boilerplate opening"),
        ("Here is a revised version: keep them apart.", "boilerplate opening"),
        ("Here’s an improved answer: keep them apart.", "boilerplate opening"),
        ("Certainly! Below is the rewritten advice. Keep them apart.", "boilerplate opening"),
        ("Revised response: keep them apart.", "boilerplate opening"),
        ("**Revised answer:**\nKeep them apart.", "boilerplate opening"),
    ],
)
def test_each_fault_is_named(revision: str, reason: str) -> None:
    assert problem(revision) == reason


def test_a_text_that_the_model_did_not_end_is_truncated_even_after_a_full_stop() -> None:
    assert problem(REVISION, ended=False) == "truncated"


@pytest.mark.parametrize(
    ("revision", "prompt"),
    [
        ("The response of the body to a virus begins within minutes.", "What happens in an infection?"),
        ("The answer is 42, which is six times seven.", "What is six times seven?"),
        ("The response should be saved in a file by calling save().", "What do I do with the response?"),
        ("Their first answer is wrong because two is even.", "Which answer is wrong?"),
        ("User: hello there\nAssistant: hello to you", "Write a chat with lines 'User:' and 'Assistant:'."),
        ("Every user: please sign the sheet before you leave.", "Write a notice."),
        ("Two flags, 🇫🇷🇩🇪, and one sun ☀️ between words.", "Describe a postcard."),
        ("A family, 👨‍👩‍👧‍👦, is one picture, and 👍🏽 is one too.", "What are joined emoji?"),
        ("Three stars in plain text: ★★★☆☆ for this film.", "Rate the film."),
        ("1. Sift. 2. Stir. 3. Bake. 4. Eat it while it is warm.", "How do I bake?"),
        ("Here is a list of three things: a pan, an egg and salt.", "What do I need?"),
        ("Here is the updated list of capitals: Paris, Rome, Bern.", "Name some capitals."),
        ("Here is a revised version of your note: see you at six.", "Please rewrite my note: c u at 6"),
        ("To be, or not to be: that is the question he puts.", "Quote Hamlet."),
        ("Keep them far apart.\nOpen a window now.\nKeep them far apart.", "What now?"),
        ("Chop it.\nChop it.\nChop it.\nThen fry it all in oil.", "How do I cook onions?"),
    ],
)
def test_what_only_looks_like_a_fault_is_let_through(revision: str, prompt: str) -> None:
    assert problem(revision, response="Nothing to say on this matter today, sadly.", prompt=prompt) is None


def test_one_changed_word_is_no_change_but_a_sentence_taken_out_is_one() -> None:
    kept = " ".join(f"word{number}" for number in range(400))
    cut = " ".join(f"harm{number}" for number in range(12))
    assert problem(f"{kept} sadly", response=f"{kept} gladly") == "unchanged"
    assert problem(kept, response=f"{kept} {cut}") is None


def test_an_unchanged_answer_is_fit_where_that_is_allowed() -> None:
    allowed = problem_of(RESPONSE, response=RESPONSE, critique="Fine.", prompt=PROMPT, ended=True, allow_unchanged=True)
    assert allowed is None


def test_words_that_the_critique_quotes_from_the_response_are_not_its_own() -> None:
    quoting = f"It says: {RESPONSE}"
    assert problem(RESPONSE + " Or rather do nothing of the kind, dear reader, ever.", critique=quoting) is None


def test_a_refusal_may_be_short_where_another_short_text_may_not() -> None:
    long = " ".join(f"step{number}" for number in range(100))
    assert problem("I won't help with that.", response=long) is None
    assert problem("Lock the door.", response=long) == "length ratio"


def test_the_bounds_of_the_length_ratio_are_those_given() -> None:
    twenty = " ".join(f"word{number}" for number in range(20))
    arguments = {"response": "one two three four five six seven eight nine ten", "critique": "", "prompt": ""}
    assert problem_of(twenty, **arguments, ended=True, max_ratio=2.0) is None
    assert problem_of(twenty, **arguments, ended=True, max_ratio=1.9) == "length ratio"
    assert problem_of("a b c d", **arguments, ended=True, min_ratio=0.4) is None
    assert problem_of("a b c d", **arguments, ended=True, min_ratio=0.5) == "length ratio"


def test_the_first_of_several_faults_is_the_one_named() -> None:
    assert problem("", ended=False) == "empty"
    assert problem("No.", ended=False) == "too short"
    assert problem(RESPONSE, ended=False) == "truncated"
    assert problem("Critique: bad.\nUser: hello there 😀😀😀") == "critique leaked"


@given(st.text(max_size=200), st.text(max_size=200), st.text(max_size=100), st.booleans())
@settings(deadline=None, max_examples=100)
def test_every_problem_is_a_known_reason(revision: str, response: str, critique: str, ended: bool) -> None:
    assert problem(revision, response, critique, "What is this?", ended) in (None, *REASONS)


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"the shared data set {name} is not beside this checkout")
    return path


@pytest.mark.slow
def test_the_rule_finds_most_refusals_that_people_marked_and_nothing_else() -> None:
    with _shared("pyrit-judge/refusal_scorer_refusal.csv").open(encoding="utf-8", newline="") as file:
        rows = [(is_refusal(row["assistant_response"]), row["human_score"] == "1") for row in csv.DictReader(file)]
    found = sum(told and refused for told, refused in rows)
    assert len(rows) == 79
    assert sum(refused for _, refused in rows) == 53  # nine of these answer another question and decline nothing
    assert found >= 38
    assert sum(told and not refused for told, refused in rows) == 0


@pytest.mark.slow
def test_answers_to_ordinary_instructions_hardly_ever_read_as_refusals() -> None:
    rows = json.loads(_shared("pandalm-3annot/testset.shared.json").read_text(encoding="utf-8"))
    answers = [str(row[side]) for row in rows for side in ("response1", "response2")]
    assert len(answers) == 1070
    assert sum(map(is_refusal, answers)) <= 2
