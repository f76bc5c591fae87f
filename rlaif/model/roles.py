"""One frozen base, every role an adapter: the only module that switches adapters.

Switching adapters in PEFT is a trap (each of these was reproduced): `set_adapter` makes a frozen adapter trainable; a
switch between forward and backward loses or misplaces gradients without an error. So a forward pass *and its backward
pass* happen inside one ``with base.acting_as(role)``, which does not nest; outside of one, the model refuses to run,
and gradient checkpointing refuses to recompute anywhere but in the one it computed in.
Which parameters are trainable is decided once, when a role is added, and restored after every switch.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save
from torch import Tensor, nn
from transformers import Cache

from rlaif import files
from rlaif.errors import ModelError, RoleError
from rlaif.model import attention, lora
from rlaif.model.adapters import SCORE_KEY, new_config, read_adapter, refuse_other_tokenizer
from rlaif.model.base import Base, load_base
from rlaif.model.recomputation import Recomputation
from rlaif.recipe import ModelSection

BASE = "base"  # the role without an adapter


class SharedBase:
    """A base model in memory and the roles that act on it."""

    def __init__(self, base: Base, settings: ModelSection):
        self.lm = base.lm
        self.tokenizer = base.tokenizer
        self.identity = base.identity
        self.max_length = base.max_length
        self.device = base.device
        self.ready_head = base.head  # of a base that is a reward model: ``[1, hidden]``
        self.heads = nn.ModuleDict()
        self._settings = settings
        self._peft: PeftModel | None = None
        self._trainable: dict[str, bool] = {BASE: False}
        self._has_adapter: dict[str, bool] = {BASE: False}
        self._look_over()
        self.acting: str | None = None
        self.turn = 0  # counts calls of `acting_as`
        self._trunk = getattr(self.lm, self.lm.base_model_prefix)
        # What transformers >= 5.24 calls `cache` was `past_key_values` before.
        takes = inspect.signature(self._trunk.forward).parameters
        self._cache_argument = "cache" if "cache" in takes else "past_key_values"
        self._trunk.register_forward_pre_hook(self._guard)
        if settings.gradient_checkpointing:
            self._enable_checkpointing()
        self._check_logits()

    @classmethod
    def load(cls, settings: ModelSection, *, classifier: bool = False) -> "SharedBase":
        """Load the base that a recipe names; `classifier`: it is a reward model, and writes no text."""
        return cls(load_base(settings, classifier=classifier), settings)

    # --- roles -----------------------------------------------------------------------------------------------

    def add_role(
        self,
        role: str,
        *,
        trainable: bool = False,
        adapter: Path | None = None,
        head: bool = False,
        outputs: int | None = None,
        like: str = "",
    ) -> None:
        """Add a role.

        Args:
            role: its name.
            trainable: whether its adapter and head may change.
            adapter: folder to load the adapter (and head) from; absent: a new adapter, which changes nothing yet
                because its B matrices are zero.
            head: give it a scalar head; a new one is zero, so that its first values are 0.
            outputs: how many numbers the head gives. A new head gives one where None. A head from `adapter` with more
                than `outputs` 1 becomes their mean, one with a single output is repeated; where None it stays as it is.
            like: start as a copy of this role instead of `adapter`.

        Raises:
            RoleError: the name is taken, or another role is acting.
            ModelError: the folder holds no adapter that fits this base, or one of another tokenizer.
        """
        if role in self._trainable or self.acting:
            raise RoleError(f"role `{role}` cannot be added: it exists already, or a role is acting.")
        if like:
            self._require_adapter(like)
            config = deepcopy(self.peft.peft_config[like])
            weights = get_peft_model_state_dict(self.peft, adapter_name=like, save_embedding_layers=False)
        else:
            config, weights = new_config(self.lm, self._settings), {}
            if adapter:
                refuse_other_tokenizer(adapter, self.tokenizer.raw)
                config, weights = read_adapter(adapter, self.device, self.hidden_size)
        score = weights.pop(SCORE_KEY, None)
        self._attach(role, config, weights, adapter)
        self._trainable[role], self._has_adapter[role] = trainable, True
        if head or score is not None:
            if score is not None and outputs and len(score) != outputs:
                if outputs > 1 < len(score):
                    raise ModelError(f"{adapter}: its head has {len(score)} outputs; {outputs} or 1 are expected.")
                score = score.mean(0, keepdim=True).expand(outputs, -1)
            self._add_head(role, score, like, outputs or 1)
        self._restore()

    def _attach(self, role: str, config: LoraConfig, weights: dict[str, Tensor], source: Path | None) -> None:
        """Put an adapter on the base, and take it off again where its weights do not fit."""
        try:
            if self._peft is None:
                self._peft = PeftModel(self.lm, config, adapter_name=role)
            else:
                self._peft.add_adapter(role, config)
        except ValueError as problem:
            what = source or "model.lora_target_modules"
            raise ModelError(f"{what}: the adapter does not fit this model: {problem}") from None
        lora.fuse(self.lm)
        self._look_over()
        if not weights:
            return
        own = get_peft_model_state_dict(self._peft, adapter_name=role, save_embedding_layers=False)
        expected, found = ({name: list(tensor.shape) for name, tensor in state.items()} for state in (own, weights))
        wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        if wrong:
            self._peft.delete_adapter(role)
            self._look_over()
            self._restore()
            raise ModelError(
                f"{source}: the adapter does not fit this model: {len(wrong)} tensors differ; {wrong[0]} has the shape "
                f"{found.get(wrong[0], 'absent')}; {expected.get(wrong[0], 'absent')} is expected."
            )
        set_peft_model_state_dict(self._peft, weights, adapter_name=role)

    def _require_adapter(self, role: str) -> None:
        if not self._has_adapter.get(role):
            names = ", ".join(name for name, has in self._has_adapter.items() if has) or "none yet"
            raise RoleError(f"unknown role `{role}`; roles with an adapter: {names}.")

    def add_head_on(self, role: str, name: str) -> None:
        """Add a zero scalar head `name` that reads the trunk of another role (a critic without an adapter)."""
        if name in self._trainable or role not in self._trainable:
            raise RoleError(f"head `{name}` on role `{role}`: the name is taken or the role is unknown.")
        self._trainable[name], self._has_adapter[name] = True, False
        self._add_head(name, None, "", 1)

    def _add_head(self, role: str, score: Tensor | None, like: str, outputs: int) -> None:
        if like in self.heads:
            score = self.head_weight(like)
        rows = outputs if score is None else len(score)
        layer = nn.Linear(self.hidden_size, rows, bias=False, device=self.device, dtype=torch.float32)
        with torch.no_grad():
            layer.weight.zero_()
            if score is not None:
                layer.weight.copy_(score)
        layer.requires_grad_(self._trainable[role])
        self.heads[role] = layer

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden state."""
        return int(self.lm.config.get_text_config().hidden_size)

    @property
    def peft(self) -> PeftModel:
        """The model with its adapters, for a trainer that wants a module."""
        if self._peft is None:
            raise RoleError("no role with an adapter has been added yet.")
        return self._peft

    @contextmanager
    def acting_as(self, role: str, *, training: bool = False) -> Iterator[None]:
        """Make one role's adapter the active one, for a forward pass and its backward pass.

        Args:
            role: an added role, or ``base`` for the model without an adapter.
            training: put the modules into training mode, which gradient checkpointing needs.

        Raises:
            RoleError: unknown role, or another role is acting.
        """
        if self.acting is not None:
            raise RoleError(f"`{role}` cannot act while `{self.acting}` does: acting_as does not nest.")
        if role != BASE:
            self._require_adapter(role)
        self._switch(role)
        self.acting = role
        self.turn += 1
        self.lm.train(training)
        try:
            yield
        finally:
            self.acting = None
            if training:
                self.lm.eval()
            self._restore()

    def _enable_checkpointing(self) -> None:
        # The first name is the newer one of the same method.
        enable = getattr(self.lm, "activation_checkpointing_enable", None) or self.lm.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": self._checkpoint_contexts})

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), Recomputation(self)

    def _switch(self, role: str) -> None:
        if self._peft is not None and not self._is_active(role):
            if role == BASE:
                self._peft.base_model.disable_adapter_layers()
            else:
                self._peft.base_model.enable_adapter_layers()
                self._peft.set_adapter(role)
        self._restore()

    def _is_active(self, role: str) -> bool:
        """Whether each layer computes with this role's adapter already; PEFT's switches walk the whole model."""
        if role == BASE:
            return all(layer.disable_adapters for layer in self._adapted)
        return all(layer.active_adapters == [role] and not layer.disable_adapters for layer in self._adapted)

    def _restore(self) -> None:
        """Set which parameters are trainable, whatever PEFT did to them in a switch."""
        for _, parameter, owner in self._owned:
            parameter.requires_grad_(self._trainable[owner])

    def _look_over(self) -> None:
        """Find the model's adapted layers, and its parameters with their names and roles."""
        self._adapted = [module for module in self.lm.modules() if isinstance(module, BaseTunerLayer)]
        self._owned: list[tuple[str, nn.Parameter, str]] = []
        for name, parameter in self.lm.named_parameters():
            parts = name.split(".")
            owner = next((parts[index + 1] for index, part in enumerate(parts) if part.startswith("lora_")), BASE)
            self._owned.append((name, parameter, owner))

    def named_parameters_of(self, role: str) -> list[tuple[str, nn.Parameter]]:
        """Return the adapter's and the head's parameters of one role, by name."""
        own = [(name, parameter) for name, parameter, owner in self._owned if owner == role]
        return own + (list(self.heads[role].named_parameters(f"heads.{role}")) if role in self.heads else [])

    def _guard(self, module: nn.Module, arguments: Any) -> None:
        if self.acting is None:
            raise RoleError("the model was run outside `with base.acting_as(role)`.")

    # --- forward passes --------------------------------------------------------------------------------------

    def trunk(self, *, cache: Cache | None = None, **inputs: Any) -> Any:
        """Run the acting role without the vocabulary projection; ``.last_hidden_state`` is ``[B, L, hidden]``."""
        return self._trunk(**inputs, **({} if cache is None else {self._cache_argument: cache}))

    def packed(self, layout: attention.Layout, ids: Sequence[int]) -> Tensor:
        """Run the acting role over rows side by side, without padding: the last hidden states, ``[N, hidden]``."""
        return attention.forward(self._trunk, self.lm.config.get_text_config(), layout, ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states ``[..., hidden]`` to vocabulary logits ``[..., V]`` in fp32."""
        logits: Tensor = self.lm.get_output_embeddings()(hidden).float()
        cap = getattr(self.lm.config.get_text_config(), "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def freeze(self, role: str) -> None:
        """Let a role that has been trained change no more, so that a trainer of the next one does not take it."""
        self._trainable[role] = False
        if role in self.heads:
            self.heads[role].requires_grad_(False)
        self._restore()

    def head_weight(self, role: str) -> Tensor:
        """Return the weight of a role's head, ``[K, hidden]``, fp32."""
        return self.heads[role].get_parameter("weight")

    def head(self, role: str, hidden: Tensor) -> Tensor:
        """Apply a role's head in fp32: ``[..., hidden]`` to ``[...]``, or to ``[..., K]`` where it has K outputs."""
        result: Tensor = self.heads[role](hidden.float())
        return result.squeeze(-1) if result.shape[-1] == 1 else result

    def _check_logits(self) -> None:
        """Refuse a model family whose logits are not what `trunk` and `logits` compute."""
        ids = torch.tensor([[self.tokenizer.end_of_turn, 1, 2, 3]], device=self.device)
        with torch.no_grad(), self.acting_as(BASE):
            hidden = self.trunk(input_ids=ids, use_cache=False).last_hidden_state
            project: Callable[[Tensor], Tensor] = self.logits if self.ready_head is None else Tensor.float
            ours = theirs = project(hidden)  # of a reward model: compared with its own score when it was loaded
            if self.ready_head is None:
                theirs = self.lm(input_ids=ids, use_cache=False).logits.float()
            self.packs = attention.replaceable(self.lm) and attention.agrees(self, project, ids[0].tolist(), theirs[0])
        if not torch.allclose(ours, theirs, atol=1e-2, rtol=1e-3):
            raise ModelError(
                f"model `{self.tokenizer.name}`: its logits are not a projection of its last hidden state; "
                f"the model type `{self.lm.config.model_type}` is not supported."
            )

    # --- adapter folders -------------------------------------------------------------------------------------

    def save_role(self, role: str, folder: Path) -> None:
        """Write a role as a plain PEFT folder: a causal model's adapter, or with a head a sequence classifier's.

        `AutoPeftModelForCausalLM`, or with ``num_labels`` as many as the head has outputs
        `AutoPeftModelForSequenceClassification`, loads it.
        """
        self._require_adapter(role)
        state = get_peft_model_state_dict(self.peft, adapter_name=role, save_embedding_layers=False)
        config = {
            **self.peft.peft_config[role].to_dict(),
            "inference_mode": True,
            "base_model_name_or_path": self.lm.name_or_path,
            "revision": self._settings.model_revision,
        }
        if role in self.heads:
            state[SCORE_KEY] = self.heads[role].weight
            config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        with files.fresh_folder(folder) as fresh:
            (fresh / "adapter_config.json").write_text(json.dumps(plain, indent=2, default=str) + "\n")
            (fresh / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
            self.tokenizer.raw.save_pretrained(fresh)
