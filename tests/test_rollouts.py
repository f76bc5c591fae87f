"""PPO's responses from a vLLM server: what is asked, what is believed, and what the difference in precision counts."""

import math
import threading
from types import SimpleNamespace

import pytest
import tiny_ppo
import tiny_runs
import torch
from hostile_server import Asked, HostileServer, Reply, error
from test_docs import PAGES, rows, ticked
from test_recipe import GOOD, complaint
from tiny_ppo import metrics
from vllm_server import SERVED, TinyVllm, completion, plain

from rlaif.endpoints import Endpoint
from rlaif.engines.asking import Asking
from rlaif.engines.rollouts import Drawing, RolloutEngine
from rlaif.errors import EngineError, StageError
from rlaif.maths.losses import Aggregation, clipped_policy_loss, truncated_weights
from rlaif.model.sampling import Batch, Sample
from rlaif.recipe import PpoSection
from rlaif.stages import ppo, rollouts
from rlaif.stages import run as run_module

pytestmark = pytest.mark.usefixtures("one_thread", "no_sync")
opened = tiny_ppo.opened
DRAWING = Drawing(4, 0.7, [2], 300)
SAMPLE = Sample([5, 6, 2], [-0.5, -1.5, -0.25], True)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    async def pause(delay):
        pass

    monkeypatch.setattr(Asking, "pause", staticmethod(pause))


def engine(*servers, say=lambda line: None, **settings):
    urls = [server.url for server in servers]
    return RolloutEngine(
        "fast", Endpoint.model_validate({"model": "m", "urls": urls, "max_retries": 1} | settings), say
    )


def drawn(server, prompts=((7, 8),), seeds=(3,), model="one", **settings):
    return engine(server, **settings).sample(model, prompts, seeds, DRAWING)


def answering(reply):
    return HostileServer(lambda asked: reply if isinstance(reply, Reply) else reply(asked))


def failure(act):
    with pytest.raises(EngineError) as caught:
        act()
    return str(caught.value)


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_a_prompt_goes_out_and_a_response_comes_back_as_token_ids():
    with answering(completion(SAMPLE.ids, SAMPLE.logprobs, "stop")) as server:
        assert drawn(server, seeds=[2**40 + 3], extra_body={"priority": 1, "top_k": 9}) == [SAMPLE]
    (asked,) = server.asked
    assert asked.path == "/v1/completions"
    assert asked.body == {
        "model": "one", "prompt": [7, 8], "seed": 3, "max_tokens": 4, "temperature": 0.7, "top_p": 1.0, "top_k": 0,
        "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True,
        "stop_token_ids": [2], "logprobs": 0, "return_token_ids": True, "stream": False, "priority": 1,
    }  # fmt: skip


def test_responses_belong_to_their_prompts_in_whatever_order_they_come():
    later = threading.Event()

    def last_first(asked: Asked) -> Reply:
        (first,) = asked.body["prompt"]
        if first == 13:
            later.set()
        return Reply(**{**vars(completion([first, 2], [-1.0, -1.0])), "wait": later})

    with HostileServer(last_first) as server:
        found = drawn(server, [[10], [11], [12], [13]], range(4), concurrency=4)
    assert [one.ids[0] for one in found] == [10, 11, 12, 13]


def test_an_adapter_is_loaded_into_every_server_and_taken_out_of_each(tmp_path):
    with answering(plain("Success")) as one, answering(plain("Success")) as other:
        who = engine(one, other)
        who.load("policy-1", tmp_path)
        who.unload("policy-1")
    for server in (one, other):
        assert [asked.path for asked in server.asked] == ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
        assert [asked.body for asked in server.asked] == [
            {"lora_name": "policy-1", "lora_path": str(tmp_path)},
            {"lora_name": "policy-1"},
        ]


def test_an_adapter_whose_first_loading_was_not_heard_of_is_loaded(tmp_path):
    known = error(400, "The lora adapter 'a' has already been loaded. If you want to load the adapter in place, ...")
    with HostileServer(lambda asked: Reply(body=b"Succ", cut=2) if asked.before == 0 else known) as server:
        engine(server).load("a", tmp_path)
    assert len(server.asked) == 2


def test_an_adapter_that_the_server_does_not_have_counts_as_unloaded():
    with answering(error(404, "The lora adapter 'a' cannot be found.")) as server:
        engine(server).unload("a")


# --- what is believed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "advice"),
    [
        (Reply(404, {"detail": "Not Found"}), "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment and --enable"),
        (error(405, "Method Not Allowed"), "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        (error(500, "LoRA rank 64 is greater than max_lora_rank 16."), "Start the server with a --max-lora-rank (1, 8"),
        (error(404, "Loading lora a failed: No adapter found for /x"), "must see the run folder at the same path"),
        (error(500, "Loading lora a failed: No adapter found for /x"), "must see the run folder at the same path"),
    ],
)
def test_a_server_that_does_not_load_adapters_is_told_of_once_with_what_to_do(tmp_path, reply, advice):
    with answering(reply) as server:
        said = failure(lambda: engine(server, max_retries=5).load("a", tmp_path))
    assert len(server.asked) == 1
    assert said.startswith(f"engine `fast` ({server.url}) does not load the adapter in {tmp_path}: HTTP ")
    assert advice in said


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (completion(None, [-1.0] * 4), "sends no token ids"),
        (completion([5, 300, 6, 2], [-1.0] * 4), "wrote the token 300, and the model here has 300"),
        (completion([5, -1, 6, 2], [-1.0] * 4), "wrote the token -1"),
        (completion([5, 6], [-1.0] * 2), "after 2 of 4 tokens at token 6"),
        (completion([5, 2, 6, 7], [-1.0] * 4), "goes on after an end token"),
        (error(404, "The model `one` does not exist."), "--api-server-count 1"),
        (error(400, "maximum context length is 8 tokens"), "maximum context length is 8 tokens"),
    ],
)
def test_a_response_that_the_model_here_did_not_write_stops_the_run_at_once(reply, expected):
    with answering(reply) as server:
        assert expected in failure(lambda: drawn(server, max_retries=5))
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "broken",
    [
        Reply(body={}),
        Reply(body=b"{", headers={"content-type": "application/json"}),
        plain("Success"),
        completion([], []),
        completion([5, 2], [-1.0]),
        completion([5, 2], [-1.0, None]),
        completion([5, 2], [-1.0, 0.5]),
        completion([5, 2], [-1.0, True]),
        completion([5, True], [-1.0, -1.0]),
        completion("52", [-1.0, -1.0]),
        completion([5] * 5, [-1.0] * 5),
        completion([5, 6, 7, 8], [-1.0] * 4, "abort"),
        Reply(body={"choices": [{"token_ids": [5, 2], "logprobs": None}]}),
        error(503, "busy"),
    ],
)
def test_an_answer_that_cannot_be_read_is_asked_for_again(broken):
    good = completion(SAMPLE.ids, SAMPLE.logprobs, "stop")
    with HostileServer(lambda asked: broken if asked.before == 0 else good) as server:
        assert drawn(server) == [SAMPLE]
    assert len(server.asked) == 2


def test_a_server_that_is_gone_stops_the_run_after_so_many_attempts():
    with answering(error(500, "Internal Server Error")) as server:
        said = failure(lambda: drawn(server, max_retries=2))
    assert len(server.asked) == 3
    assert "attempt 3 of 3" in said and "The newest checkpoint is kept; when the server is well again" in said


def test_what_the_key_opens_never_shows_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FAST_KEY", "canary-7f3a9d52")
    with answering(error(400, "no adapter for canary-7f3a9d52")) as server:
        said = failure(lambda: engine(server, api_key_env="FAST_KEY").load("a", tmp_path))
    assert server.asked[0].headers["authorization"] == "Bearer canary-7f3a9d52"
    assert "canary" not in said and "[key removed]" in said


# --- what the difference counts --------------------------------------------------------------------------------------


def test_a_token_counts_its_probability_here_over_that_under_the_sampler_up_to_the_cap():
    p, q = [0.5, 0.1, 0.9], [0.25, 0.4, 0.3]  # ratios 2, 1/4 and 3
    logs = [torch.tensor([[math.log(value) for value in row]], dtype=torch.float64) for row in (p, q)]
    assert truncated_weights(*logs, 2.5).tolist() == [pytest.approx([2.0, 0.25, 2.5])]
    assert truncated_weights(*logs, math.inf).tolist() == [pytest.approx([2.0, 0.25, 3.0])]


def test_a_token_that_only_the_policy_writes_counts_the_cap():
    assert truncated_weights(torch.tensor([[-1.0]]), torch.tensor([[-9999.0]]), 2.0).tolist() == [[2.0]]


def test_with_its_weights_another_sampler_s_gradient_is_on_average_the_policy_s():
    """One token of three, over all of them at the sampler's probabilities; the policy's by differences."""
    logits, scores = [0.3, -0.8, 1.1], [1.0, -2.0, 0.5]
    sampler = [0.5, 0.3, 0.2]

    def expected(values):
        powers = [math.exp(value) for value in values]
        return sum(power * score for power, score in zip(powers, scores, strict=True)) / sum(powers)

    step = 1e-5
    exact = [
        (expected([v + step * (n == k) for n, v in enumerate(logits)])
         - expected([v - step * (n == k) for n, v in enumerate(logits)])) / (2 * step)
        for k in range(3)
    ]  # fmt: skip

    def mean_gradient(weigh):
        total = torch.zeros(3, dtype=torch.float64)
        for token, q in enumerate(sampler):
            leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
            logprob = torch.log_softmax(leaf, -1)[token].view(1, 1)
            weight = truncated_weights(logprob, torch.tensor([[math.log(q)]], dtype=torch.float64), math.inf)
            advantages = (weight if weigh else 1.0) * torch.full((1, 1), scores[token], dtype=torch.float64)
            mask, one = torch.ones(1, 1, dtype=torch.bool), Aggregation("constant", 1)
            loss = clipped_policy_loss(logprob, logprob.detach(), advantages, mask, 0.2, one).loss
            total -= q * torch.autograd.grad(loss, leaf)[0]
        return total.tolist()

    assert mean_gradient(True) == pytest.approx(exact, abs=1e-8)
    assert mean_gradient(False) != pytest.approx(exact, abs=0.05)


def compare(gap, **settings):
    """Two responses of 2 and 1 tokens whose sampler's log-probabilities are lower by `gap` for two of the three."""
    section = PpoSection.model_validate({"sampling_engine": "fast"} | settings)
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 7.0]])  # the last is outside of the mask
    samples = [Sample([5, 6], [-1.0 - gap, -2.0], False), Sample([2], [-3.0 - gap], True)]
    ids, mask = torch.tensor([[5, 6], [2, 0]]), torch.tensor([[True, True], [True, False]])
    actors = SimpleNamespace(settings=section, temperature=1.0, update=3)
    return rollouts.mismatch(actors, logprobs, samples, Batch(ids, mask, ids, ids, mask), torch.tensor([True, True]))


def test_figures_of_the_gap_are_over_real_tokens():
    found = compare(0.75)
    assert found.figures == pytest.approx({
        "rollout/logprob_gap": 0.75,
        "rollout/mean_logprob_gap": 0.5,
        "rollout/importance_weight": (2.0 + 1.0 + 2.0) / 3,
        "rollout/importance_cut": 2 / 3,
    })  # fmt: skip
    assert found.weights[0].tolist() == [2.0, 1.0] and found.weights[1, 0] == 2.0
    off = compare(0.75, importance_cap=None)
    assert off.weights == 1.0 and off.figures == pytest.approx(dict(list(found.figures.items())[:2]))


def test_here_nothing_is_corrected_and_the_figures_are_as_before():
    found = compare(5.0, sampling_engine="base")
    assert found == (1.0, {"rollout/logprob_gap": 5.0})


def test_a_gap_that_another_precision_does_not_explain_stops_the_run():
    with pytest.raises(StageError) as caught:
        compare(1.6)  # 3.2 over 3 tokens
    said = str(caught.value)
    assert "ppo: update 4: " in said and "1.07 nats a token" in said and "ppo.max_logprob_gap = 1" in said
    with pytest.raises(StageError):
        compare(math.nan)
    assert compare(1.6, max_logprob_gap=None).figures["rollout/mean_logprob_gap"] == pytest.approx(3.2 / 3)


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("sampling_engine: ray", "sampling_engine is `ray`"),
        ("sampling_engine: fats", "no engine `fats`; did you mean `fast`?"),
        ("importance_cap: 3", "importance_cap is read where a server samples"),
        ("max_logprob_gap: null", "max_logprob_gap is read where a server samples"),
    ],
)
def test_keys_that_do_not_fit_are_refused(tmp_path, keys, expected):
    engines = "engines: {fast: {model: m, urls: ['http://127.0.0.1:1/v1']}}\n"
    assert expected in complaint(tmp_path, GOOD + f"  {keys}\n" + engines)


def test_what_a_server_is_asked_counts_and_where_it_stands_does_not(opened, functions):
    def inputs(name, url="http://127.0.0.1:1/v1", model="m", **settings):
        sections = {"engines": {name: {"model": model, "urls": [url]}}}
        folder = f"{name}-{model}-{len(url)}-{len(settings)}"
        run = opened(
            folder, stages=["ppo"], reward_function="ones", sections=sections, sampling_engine=name, **settings
        )
        return ppo.inputs(run)

    one = inputs("fast")
    assert one == inputs("other", "http://127.0.0.1:10/v1") == inputs("fast", max_logprob_gap=2.0)
    assert one["sampling"] != inputs("fast", model="n")["sampling"]
    assert one["recipe.ppo"] != inputs("fast", importance_cap=3.0, max_logprob_gap=2.0)["recipe.ppo"]
    assert "sampling" not in ppo.inputs(opened("here", stages=["ppo"], reward_function="ones"))


# --- the stage -------------------------------------------------------------------------------------------------------


def served(opened, folder, server, **settings):
    engines = {"fast": {"model": SERVED, "urls": [server.url], "max_retries": 1}}
    return opened(folder, sections={"engines": engines}, sampling_engine="fast", **settings)


@pytest.fixture
def functions(monkeypatch):
    def letters(prompts, completions, **columns):
        return [float(sum(map(ord, text))) for text in completions]

    monkeypatch.setattr("rlaif.stages.judged_reward.find_function", lambda name, *_: letters)


@pytest.fixture
def small_seeds(monkeypatch):
    """Seeds that servers and the base take alike."""
    seed = run_module.Run.seed
    monkeypatch.setattr(run_module.Run, "seed", lambda *parts: seed(*parts) & 0x7FFFFFFF)


@pytest.mark.slow
def test_a_server_with_the_same_model_is_the_base_and_is_left_as_it_was(opened, tiny_model, small_seeds):
    """Every update samples with that update's adapter: a stale one has other responses and log-probabilities."""
    settings = {"learning_rate": 1e-2, "reference_share": 0.4, "final_temperature": 0.7}
    vllm = TinyVllm(tiny_model)
    with HostileServer(vllm) as server:
        one = served(opened, "served", server, **settings)
        ppo.ppo(one)
    other = opened("here", **settings)
    ppo.ppo(other)
    table = rows(PAGES["ppo.md"], "## Metrics")[1:]
    of_servers = {key for cells in table if "with `sampling_engine`" in cells[1] for key in ticked(cells[0])}
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        assert ours.keys() - theirs.keys() == of_servers
        assert ours["rollout/mean_logprob_gap"] < 1e-5
        assert ours["rollout/importance_weight"] == pytest.approx(1.0, abs=1e-5)
        assert ours["rollout/importance_cut"] == 0.0
        # Advantages times weights that are 1 but for rounding.
        assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert len(metrics(one)) == 3
    assert [row["response"] for row in tiny_runs.rows(one.stage_folder("ppo") / "samples.jsonl")] == [
        row["response"] for row in tiny_runs.rows(other.stage_folder("ppo") / "samples.jsonl")
    ]
    assert vllm.adapters == {} and not (one.stage_folder("ppo") / rollouts.SERVED).exists()
    assert len(set(vllm.loaded)) == len(vllm.loaded)
    assert {name.rpartition("-")[0] for name in vllm.loaded} >= {"tiny-policy-1", "tiny-policy-2", "tiny-policy-3"}


@pytest.mark.slow
def test_without_an_sft_adapter_the_reference_is_the_served_model_itself(opened, functions, tiny_model):
    vllm = TinyVllm(tiny_model)
    with HostileServer(vllm) as server:
        run = served(
            opened,
            "run",
            server,
            stages=["ppo"],
            reward_function="small_letters",
            reference_share=0.6,
            updates=2,
            health={"stop": []},
        )
        ppo.ppo(run)
    models = [asked.body["model"] for asked in server.asked if asked.path == "/v1/completions"]
    assert models.count(SERVED) == sum(1 for name in models if "policy" not in name) > 0
    assert all(row["rollout/mean_logprob_gap"] < 1e-5 for row in metrics(run))


@pytest.mark.slow
def test_the_weights_count_in_the_policy_s_loss(opened, functions, tiny_model):
    """Half as probable for the server as here: each token counts 2, or the cap."""
    vllm, norms = TinyVllm(tiny_model), []
    settings = {"stages": ["ppo"], "advantage_estimator": "reinforce", "reward_function": "letters", "updates": 1}
    with HostileServer(vllm) as server:
        for folder, skew, cap in (("same", 0.0, 2.0), ("half", math.log(2), 9.0), ("cut", math.log(2), 1.25)):
            vllm.skew = skew
            run = served(opened, folder, server, num_ppo_epochs=1, importance_cap=cap, **settings)
            ppo.ppo(run)
            norms.append(metrics(run)[0]["policy/gradient_norm"])
    assert metrics(run)[0]["rollout/importance_weight"] == 1.25 and metrics(run)[0]["rollout/importance_cut"] == 1.0
    assert norms == pytest.approx([norms[0], 2 * norms[0], 1.25 * norms[0]], rel=1e-4)
    assert norms[0] > 0


@pytest.mark.slow
def test_another_model_and_log_probabilities_before_the_temperature_are_noticed(opened, tiny_model, tmp_path):
    from conftest import build_tiny_model

    with HostileServer(TinyVllm(build_tiny_model(tmp_path / "other", seed=7))) as server:
        run = served(opened, "other", server, updates=1)
        with pytest.raises(StageError, match=r"update 1: the log-probabilities of the engine `fast` are [\d.]+ nats"):
            ppo.ppo(run)
        assert not (run.stage_folder("ppo") / "checkpoints").exists()
    hot = {"sampling": {"temperature": 1.5, "max_new_tokens": 8}, "updates": 1}
    vllm = TinyVllm(tiny_model, raw=True)
    with HostileServer(vllm) as server:
        run = served(opened, "raw", server, **hot)
        with pytest.raises(StageError, match=r"before the temperature of 1\.5\. Start the server with --logprobs-mode"):
            ppo.ppo(run)
        vllm.raw = False
        ppo.ppo(run)


@pytest.mark.slow
def test_an_adapter_of_an_earlier_update_is_noticed_in_the_gap(opened, tiny_model):
    class Stale(TinyVllm):
        def load_lora_adapter(self, body):
            reply = super().load_lora_adapter(body)
            self.adapters[body["lora_name"]] = self.first = getattr(self, "first", self.adapters[body["lora_name"]])
            return reply

    with HostileServer(Stale(tiny_model)) as server:
        run = served(opened, "run", server, learning_rate=3e-2, max_logprob_gap=0.02)
        with pytest.raises(StageError, match="ppo: update 2: the log-probabilities of the engine `fast`"):
            ppo.ppo(run)
    assert len(metrics(run)) == 1


@pytest.mark.slow
def test_a_run_that_fails_unloads_its_adapter_and_goes_on_where_it_was(opened, tiny_model):
    vllm = TinyVllm(tiny_model)

    def behave(asked: Asked) -> Reply:
        if behave.broken and asked.path == "/v1/completions" and "-policy-2-" in asked.body["model"]:
            return error(500, "out of memory")
        return vllm(asked)

    behave.broken = True
    with HostileServer(behave) as server:
        run = served(opened, "run", server)
        with pytest.raises(EngineError, match="out of memory"):
            ppo.ppo(run)
        assert vllm.adapters == {} and not (run.stage_folder("ppo") / rollouts.SERVED).exists()
        # What a killed run leaves: a folder whose adapter is loaded, and one that never was.
        left = run.stage_folder("ppo") / rollouts.SERVED
        for name in ("tiny-policy-2-dead", "tiny-policy-2-new"):
            (left / name).mkdir(parents=True)
        vllm.adapters["tiny-policy-2-dead"] = vllm.base
        behave.broken = False
        ppo.ppo(run)
    assert len(metrics(run)) == 3
    assert vllm.adapters == {} and not left.exists()
    assert [name.rpartition("-")[0] for name in vllm.loaded] == [f"tiny-policy-{n}" for n in (1, 2, 2, 3)]


@pytest.mark.slow
def test_an_adapter_that_cannot_be_unloaded_keeps_its_folder_until_it_can(opened, tiny_model):
    vllm = TinyVllm(tiny_model)

    def behave(asked: Asked) -> Reply:
        return error(500, "down") if behave.down and asked.path != "/v1/load_lora_adapter" else vllm(asked)

    behave.down = True
    with HostileServer(behave) as server:
        run = served(opened, "run", server, updates=1)
        with pytest.raises(EngineError, match="down"):
            ppo.ppo(run)
        (left,) = (run.stage_folder("ppo") / rollouts.SERVED).iterdir()
        assert list(vllm.adapters) == [left.name]
        behave.down = False
        ppo.ppo(run)
    assert vllm.adapters == {} and not left.parent.exists()
