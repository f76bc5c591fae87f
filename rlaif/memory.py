"""The memory model: how many bytes a stage needs at its peak, from a model's shape and a recipe; nothing is loaded.

A *phase* is what a stage does for a while: sampling, scoring, updating. Its peak is the sum of weights, adapters,
optimizer state, key-value cache, activations, logits and what the process needs anyhow; a stage's peak is that of its
largest phase. `docs/memory.md` writes the equations down; `tests/test_memory.py` measures every term again.

Shapes: ``h`` hidden, ``i`` intermediate, ``q`` and ``kv`` widths of queries and of keys, ``e`` bytes of a number that
is computed with, ``V`` vocabulary. Sizes are bytes unless a name says otherwise.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from rlaif.decoders import Shape
from rlaif.endpoints import BASE
from rlaif.recipe import ModelSection, Recipe

GIB = 2**30
FP32 = 4

# Bytes that were measured with an allocator's own figures, on shapes that differ in every width.
BACKWARD = 8  # of a layer's backward pass, per token and unit of `i`
PASS_WIDE, PASS_FP32, PASS_NARROW = 2, 12, 6  # of a pass without gradients: per token e*i, i and h
LOGITS_CHUNK = 256  # response tokens of PPO whose logits are there at a time (`model.drawn._CHUNK`)
LOGITS_DRAWN, LOGITS_ENTROPY = 12, 4  # of them per token and word of the vocabulary; more where entropy is learned
LOGITS_SCORING = 8  # per response token and word: a padded pass without gradients
LOGITS_DRAWING = 28  # per row that is sampled and word
LOGITS_TEXT = 12  # per token of plain text and word: the cross-entropy and its gradient
LOGITS_READ = 8  # the same without a gradient
TRL_TOKENS, TRL_WORDS = 4096, 32768  # whose logits TRL's losses hold at a time (`trl.kernels.chunked_logprob`)
LOGITS_TRL = 30  # the same per token and word on a CPU; on a GPU a kernel needs none beside the logits themselves
OPTIMIZER = 12  # gradient and AdamW's two moments, per trained number

# What a process takes beside tensors. The first is of the libraries in main memory; of CUDA's context and workspaces
# the usual size is assumed, and so is the slack of its caching allocator, as a share of all that comes and goes.
PROCESS_CPU, PROCESS_CUDA, SLACK_CUDA = 0.7 * GIB, 0.8 * GIB, 0.1

PASS_TOKENS = 64  # of prompts that come into one pass, for each row in work (`model.slots.TOKENS_PER_SLOT`)
EVALUATE_ROWS = 8  # scored in a pass (`stages.scorers.MICROBATCH`)


class Peak(NamedTuple):
    """The bytes of one phase, by what they hold."""

    phase: str
    weights: float = 0.0
    adapters: float = 0.0
    optimizer: float = 0.0
    cache: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    process: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """What the bytes hold."""
        return {name: size for name, size in self._asdict().items() if name != "phase"}

    @property
    def total(self) -> float:
        """All bytes together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Held:
    """A base model in memory, as a recipe loads it."""

    shape: Shape
    settings: ModelSection
    cuda: bool

    @property
    def compute(self) -> int:
        """Bytes of a number that is computed with."""
        if self.settings.dtype == "auto":
            return 2 if self.cuda else FP32
        return FP32 if self.settings.dtype == "float32" else 2

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the matrices of a layer that an adapter changes."""
        wanted = self.settings.lora_target_modules
        return {name: size for name, size in self.shape.linears.items() if wanted == "all-linear" or name in wanted}

    @property
    def weights(self) -> float:
        """The frozen base: matrices as they are stored, embeddings and norms as they are computed with."""
        shape, settings = self.shape, self.settings
        per_number, per_row = float(self.compute), 0.0
        if settings.load_in_4bit:  # blocks of 64 numbers with a scale each, which nested are blocks of 256 themselves
            per_number = 1 / 2 + (1 / 64 + FP32 / (64 * 256) if settings.use_bnb_nested_quant else FP32 / 64)
        elif settings.load_in_8bit:
            per_number, per_row = 1.0, float(FP32)
        matrices = sum(i * o * per_number + o * per_row for i, o in shape.linears.values())
        whole = shape.vocabulary * shape.hidden * (1 if shape.tied else 2) + (2 * shape.layers + 1) * shape.hidden
        return shape.layers * matrices + whole * self.compute

    @property
    def adapter(self) -> int:
        """How many numbers an adapter has; they are fp32."""
        return self.shape.layers * self.settings.lora_r * sum(i + o for i, o in self.targets.values())

    @property
    def workspace(self) -> float:
        """One matrix of a quantized base, taken out to be computed with."""
        quantized = self.settings.load_in_4bit or self.settings.load_in_8bit
        return float(self.compute * max(i * o for i, o in self.shape.linears.values()) if quantized else 0)

    def layer(self, *, packed: bool = False) -> int:
        """Return what one layer keeps of a token for its backward pass, without checkpointing.

        The inputs of both norms in fp32; queries, keys, values and what attention gives; the gate, its activation and
        the other half of the MLP; each adapter's low-rank product and the input of each adapted matrix: once for all
        that share it where adapters compute in the base's type, else (fp16, 8 bits) an fp32 copy for each
        (`rlaif.model.lora`). Of packed rows what attention gives is put together, and the copy is the input of its own
        matrix.
        """
        shape, e, targets = self.shape, self.compute, self.targets
        h, i = shape.hidden, shape.intermediate
        kept = 2 * FP32 * h + e * (2 * shape.q + 2 * shape.kv) + e * 3 * i
        if e == FP32 or not (self.settings.dtype == "float16" or self.settings.load_in_8bit):
            shared = {"attention": h, "mlp": h, "down_proj": i, "o_proj": shape.q * packed}
            kinds = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention"}
            kinds |= {"gate_proj": "mlp", "up_proj": "mlp"}
            inputs = e * sum(shared[kind] for kind in {kinds.get(name, name) for name in targets})
            return kept + inputs + e * self.settings.lora_r * len(targets)
        copies = FP32 * sum(size for size, _ in targets.values())
        return kept + copies + FP32 * self.settings.lora_r * len(targets)

    def learning(self, tokens: int, logits: float, *, packed: bool = False) -> tuple[float, float]:
        """Return activations and logits at the peak of a forward and backward pass.

        What all layers keep is there at both peaks: when the loss is computed, and in the backward pass of a layer,
        which with checkpointing has been computed once more.
        """
        shape, e = self.shape, self.compute
        whole = self.layer(packed=packed)
        kept = shape.layers * (e * shape.hidden if self.settings.gradient_checkpointing else whole)
        kept += (FP32 + e) * shape.hidden  # the last norm's input, and its output
        inside = (whole if self.settings.gradient_checkpointing else 0) + BACKWARD * shape.intermediate
        if logits >= tokens * inside:
            return float(tokens * kept), logits
        return float(tokens * (kept + inside)), 0.0

    def reading(self, tokens: int) -> float:
        """Return the activations of a pass without gradients."""
        per_token = (PASS_WIDE * self.compute + PASS_FP32) * self.shape.intermediate + PASS_NARROW * self.shape.hidden
        return float(tokens * per_token)

    def masks(self, tokens: int, prompt: int) -> float:
        """Return the attention masks of prompts that come in: for all query heads that share a key, in two types."""
        return float((self.compute + 1) * self.shape.heads // self.shape.kv_heads * tokens * prompt)

    def drawn(self, tokens: int, *, entropy: bool) -> float:
        """Return the logits of so many response tokens of PPO, at most `LOGITS_CHUNK` at a time."""
        projected = self.compute % FP32  # in half precision, while it is divided by a temperature
        per_word = LOGITS_DRAWN + projected + LOGITS_ENTROPY * entropy
        return float(per_word * min(tokens, LOGITS_CHUNK) * self.shape.vocabulary)

    def cache(self, rows: int, length: int) -> float:
        """Return keys and values of so many rows of a length, in all layers."""
        return float(2 * rows * length * self.shape.layers * self.shape.kv * self.compute)


class Lengths(NamedTuple):
    """How long a stage's texts are at most, in tokens."""

    prompt: int = 0  # of what is sampled from, or judged
    row: int = 0  # of what is trained on, the prompt included


def peak(stage: str, recipe: Recipe, lengths: Lengths, policy: Held, reward: Held | None = None) -> Peak:
    """Return the largest phase of a stage.

    Args:
        stage: its name.
        recipe: the settings.
        lengths: of the stage's texts.
        policy: the recipe's model.
        reward: the base of `reward.model`, where there is one.
    """
    return max(phases(stage, recipe, lengths, policy, reward), key=lambda one: one.total)


def phases(stage: str, recipe: Recipe, lengths: Lengths, policy: Held, reward: Held | None = None) -> list[Peak]:
    """Return all phases of a stage; see `peak`."""
    settings: Any = getattr(recipe, stage)
    sft = int("sft" in recipe.stages)
    if stage in ("sft", "reward", "dpo"):
        base = (reward or policy) if stage == "reward" else policy
        return _training(base, stage, settings, lengths)
    if stage == "ppo":
        return _ppo(recipe, lengths, policy, reward)
    new = settings.sampling.max_new_tokens
    if stage == "label" and any(judge.method == "verdict" for judge in settings.panel()):
        new = max(new, settings.max_reasoning_tokens)
    scorers = scorers_of(recipe, stage) if stage in ("rejection", "evaluate") else 0
    adapters = {"revise": 0, "label": sft, "rejection": 1}.get(stage, len({*recipe.stages} & _POLICIES))
    there = _there(policy, reward, adapters, scorers)
    found = [_sampling(policy, there, settings.batch_size, lengths.prompt, new)]
    if stage == "rejection":
        activations = (reward or policy).reading(settings.microbatch * (lengths.prompt + new))
        found.append(_with(there, "scoring", policy.cuda, activations=activations))
        found += _training(policy, stage, settings, lengths)
    elif stage == "evaluate":
        found.append(_scoring(reward or policy, there, EVALUATE_ROWS, lengths.prompt, new, policy.shape.vocabulary))
    return found


_POLICIES = {"sft", "ppo", "dpo", "rejection"}  # stages that write a policy


def scorers_of(recipe: Recipe, stage: str = "ppo") -> int:
    """Return how many adapters score responses in a stage after `reward`."""
    settings = recipe.ppo
    trained = stage == "evaluate" and "reward" in recipe.stages and recipe.reward.cost
    cost = bool(settings.costs) or trained
    if stage == "rejection":
        return recipe.reward.num_adapters
    parts = [part.source for part in (*settings.rewards, *settings.independent)]
    model = {"model", "member"} & {*parts} or not (settings.rewards or settings.reward_function)
    return ("reward" in recipe.stages) * bool(model) * recipe.reward.num_adapters + cost


def _there(policy: Held, reward: Held | None, adapters: int, scorers: int) -> Peak:
    """Return what is in memory in every phase: bases, adapters and the process."""
    cuda = policy.cuda
    return Peak(
        "",
        weights=policy.weights + (reward.weights if reward and scorers else 0.0),
        adapters=float(FP32 * (policy.adapter * adapters + (reward or policy).adapter * scorers)),
        process=(PROCESS_CUDA if cuda else PROCESS_CPU) + policy.workspace,
    )


def _with(there: Peak, phase: str, cuda: bool, **parts: float) -> Peak:
    """Add what comes and goes; a caching allocator loses some of its room between pieces."""
    slack = SLACK_CUDA * sum(parts.values()) if cuda else 0.0
    return there._replace(phase=phase, process=there.process + slack, **parts)


def _sampling(base: Held, there: Peak, rows: int, prompt: int, new: int) -> Peak:
    """Return the peak of sampling: in the pass that most prompts come in with, or where tokens are drawn."""
    tokens = min(max(rows * PASS_TOKENS, prompt), rows * prompt) + rows
    activations = base.reading(tokens) + base.masks(tokens, prompt)
    logits = float(LOGITS_DRAWING * rows * base.shape.vocabulary)
    return _with(there, "sampling", base.cuda, cache=base.cache(rows, prompt + new), **_larger(activations, logits))


def _larger(activations: float, logits: float) -> dict[str, float]:
    """Return what is there at the peak of a pass whose logits are computed when its activations are gone."""
    return {"activations": activations} if activations > logits else {"logits": logits}


def _scoring(base: Held, there: Peak, rows: int, prompt: int, new: int, vocabulary: int) -> Peak:
    logits = float(LOGITS_SCORING * rows * new * vocabulary)
    return _with(there, "scoring", base.cuda, activations=base.reading(rows * (prompt + new)), logits=logits)


def _training(base: Held, stage: str, settings: Any, lengths: Lengths) -> list[Peak]:
    """Return the phases of training one adapter with `transformers.Trainer`; a pair is two rows."""
    sides = 2 if stage in ("reward", "dpo") else 1
    row = min(lengths.row, settings.max_length)
    tokens = sides * settings.per_device_train_batch_size * row
    logits = 0.0
    if stage != "reward":
        words = TRL_WORDS * base.compute + (0 if base.cuda else LOGITS_TRL * min(base.shape.vocabulary, TRL_WORDS))
        logits = float(min(tokens, TRL_TOKENS) * words)
    adapters = settings.num_adapters + settings.cost if stage == "reward" else 1
    there = _there(base, None, adapters, 0)._replace(optimizer=float(OPTIMIZER * base.adapter))
    activations, logits = base.learning(tokens, logits, packed=stage == "reward")
    found = [_with(there, "training", base.cuda, activations=activations, logits=logits)]
    if stage == "reward":
        read = base.reading(sides * settings.microbatch * row)
        found.append(_with(there, "scoring", base.cuda, activations=read))
    elif stage == "dpo":
        found.append(_scoring(base, there, settings.microbatch, 0, row, base.shape.vocabulary))
    return found


def _ppo(recipe: Recipe, lengths: Lengths, policy: Held, reward: Held | None) -> list[Peak]:
    """Return the phases of PPO, as if no two rows shared a prompt and each were as long as the longest may be."""
    settings, new = recipe.ppo, recipe.ppo.sampling.max_new_tokens
    own = settings.critic == "adapter" or (settings.critic == "auto" and policy.cuda)
    learning = 1 + int(settings.has_critic and own) * (2 if settings.constraint else 1)
    there = _there(policy, reward, learning + int("sft" in recipe.stages), scorers_of(recipe))
    there = there._replace(optimizer=float(OPTIMIZER * policy.adapter * learning))
    responses = settings.rollout_batch * settings.samples_per_prompt
    micro = min(settings.microbatch, settings.minibatch)
    tokens, vocabulary = micro * (lengths.prompt + new), policy.shape.vocabulary
    drawn = policy.drawn(micro * new, entropy=bool(settings.entropy_coef or settings.final_entropy_coef))
    activations, logits = policy.learning(tokens, drawn, packed=True)
    gradients = float(2 * policy.compute * policy.shape.hidden * micro * new)  # states before tokens, and theirs
    read = max(policy.reading(tokens), (reward or policy).reading(tokens))
    scoring = _larger(read, policy.drawn(micro * new, entropy=False))
    rows = min(settings.sampling_batch or responses, responses)
    found = [_sampling(policy, there, rows, lengths.prompt, new)] if settings.sampling_engine == BASE else []
    found += [
        _with(there, "scoring", policy.cuda, **scoring),
        _with(there, "updating", policy.cuda, activations=activations + gradients, logits=logits),
    ]
    if settings.ptx_coef:
        rows = min(settings.ptx_batch, settings.microbatch) * settings.ptx_length
        activations, logits = policy.learning(rows, float(LOGITS_TEXT * rows * vocabulary))
        found.append(_with(there, "learning text", policy.cuda, activations=activations, logits=logits))
    if settings.ptx_file and settings.ptx_heldout:
        rows = min(settings.ptx_heldout, settings.microbatch) * settings.ptx_length
        larger = _larger(policy.reading(rows), float(LOGITS_READ * rows * vocabulary))
        found.append(_with(there, "reading text", policy.cuda, **larger))
    return found
