"""The shape of a decoder, from its ``config.json``: what decides how much memory and work it needs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Decoders with grouped-query attention and a gated MLP of three matrices, for which the equations hold.
MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "seed_oss"),
    *("gemma", "gemma2", "gemma3_text"),
)


class Shape(NamedTuple):
    """What of a decoder's ``config.json`` decides how much memory it needs."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool  # whether the embedding is the vocabulary projection as well

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape | None":
        """Read a model's configuration; None for a kind of model that the equations are not written for."""
        config = config.get("text_config", config)
        if config.get("model_type") not in MODEL_TYPES:
            return None
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", config["model_type"].startswith("gemma"))),
        )

    @property
    def q(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_size

    @property
    def kv(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_size

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices."""
        h, i = self.hidden, self.intermediate
        return {
            "q_proj": (h, self.q),
            "k_proj": (h, self.kv),
            "v_proj": (h, self.kv),
            "o_proj": (self.q, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def parameters(self) -> int:
        """How many numbers the model has, but for biases and norms."""
        inner = self.layers * sum(rows * columns for rows, columns in self.linears.values())
        return inner + self.vocabulary * self.hidden * (1 if self.tied else 2)
