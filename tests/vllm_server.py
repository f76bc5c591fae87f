"""What a vLLM server does with adapters and token ids, done by the tiny model: a behaviour for `hostile_server`.

It reads adapter folders from disk and samples with them, in its own copy of the model, so a wrong or stale adapter
shows in the log-probabilities. Answers have the form of vLLM's ``/v1/load_lora_adapter`` and ``/v1/completions``.
"""

import threading
from pathlib import Path

from hostile_server import Asked, Reply, error

from rlaif.errors import ModelError
from rlaif.model import sampling
from rlaif.model.roles import SharedBase
from rlaif.recipe import ModelSection

SERVED, ROLE = "tiny", "adapter"


def plain(words: str) -> Reply:
    return Reply(body=words.encode(), headers={"content-type": "text/plain; charset=utf-8"})


class TinyVllm:
    """Behaves as a server would that was started with these options."""

    def __init__(self, model: Path, *, updating: bool = True, max_lora_rank: int = 16, raw: bool = False):
        self.model, self.updating, self.max_lora_rank, self.raw = model, updating, max_lora_rank, raw
        self.skew = 0.0  # nats that its log-probabilities are too low
        self.adapters: dict[str, SharedBase] = {}
        self.loaded: list[str] = []  # all that ever were
        self.base = SharedBase.load(ModelSection(model_name_or_path=str(model)))
        self._lock = threading.Lock()

    def __call__(self, asked: Asked) -> Reply:
        with self._lock:
            return getattr(self, asked.path.rpartition("/")[2])(asked.body)

    def load_lora_adapter(self, body) -> Reply:
        name, folder = body["lora_name"], Path(body["lora_path"])
        if not self.updating:
            return Reply(404, {"detail": "Not Found"})
        if name in self.adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        assert folder.is_absolute()
        base = SharedBase.load(ModelSection(model_name_or_path=str(self.model)))
        try:
            base.add_role(ROLE, adapter=folder)
        except ModelError:
            return error(404, f"Loading lora {name} failed: No adapter found for {folder}")
        rank = base.peft.peft_config[ROLE].r
        if rank > self.max_lora_rank:
            return error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}.")
        self.adapters[name] = base
        self.loaded.append(name)
        return plain(f"Success: LoRA adapter '{name}' added successfully.")

    def unload_lora_adapter(self, body) -> Reply:
        if self.adapters.pop(body["lora_name"], None) is None:
            return error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return plain("Success")

    def completions(self, body) -> Reply:
        name = body["model"]
        if name != SERVED and name not in self.adapters:
            return error(404, f"The model `{name}` does not exist.")
        base, role = (self.base, "base") if name == SERVED else (self.adapters[name], ROLE)
        assert body["ignore_eos"] and body["stop_token_ids"] == base.tokenizer.eos_ids
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
        with base.acting_as(role):
            (one,) = sampling.sample(
                base,
                [body["prompt"]],
                max_new_tokens=body["max_tokens"],
                seeds=[body["seed"]],
                temperature=body["temperature"],
            )
            logprobs = one.logprobs
            if self.raw:  # vLLM's default: before the temperature
                batch = sampling.pack(base, [body["prompt"]], [one.ids])
                logits = sampling.response_logits(base, batch, sampling.hidden_states(base, batch))
                logprobs = sampling.token_logprobs(logits, batch.response_ids)[0].tolist()
        logprobs = [value - self.skew for value in logprobs]
        return completion(one.ids, logprobs, "stop" if one.ended else "length")


def completion(ids, logprobs, reason="length") -> Reply:
    tokens = {"tokens": [""] * len(logprobs), "token_logprobs": logprobs}
    choice = {"index": 0, "text": "", "logprobs": tokens, "finish_reason": reason, "token_ids": ids}
    return Reply(body={"object": "text_completion", "choices": [choice]})
