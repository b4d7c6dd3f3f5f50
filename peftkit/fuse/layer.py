"""Whole decoder layers of the Llama kind as one op on a GPU, so that a layer costs one plan and one autograd function.

A layer is recognised by the text of the code that it runs: the forwards of the layer and of its attention, and the rotation. Its norms
and its MLP are recognised by ``peftkit.fuse.recognise``. A call that does anything else (padding, a cache with content, hooks on a
part) runs the layer's own forward, whose parts are fused on their own.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from peftkit.fuse.adapter import has_hooks
from peftkit.fuse.attention import call_dropout_reason, replaced_reason
from peftkit.fuse.compute import LinearParts, draw_seeds
from peftkit.fuse.linear import plan_linear
from peftkit.fuse.mlp import FusedGatedMLP, share_weights
from peftkit.fuse.norm import FusedNorm
from peftkit.fuse.plan import Fused, Reason, decline, forget_declined
from peftkit.fuse.recognise import NormFormula
from peftkit.swap import own_class, swap_in
from peftkit_kernels.core.dispatch import is_transformed
from peftkit_kernels.core.launch import is_counting
from peftkit_kernels.ops.lora_decoder_layer import Norm, Remake, lora_decoder_layer, obstacle

METHOD = "decoder layer"

# hashes of code (``digest``), the same in transformers 5.10 to 5.23
_LAYER = "015580e5443c6d2a"
_ATTENTION = frozenset(
    (
        "682c67e3e5fb39b5",  # Llama
        "ef1d70be15a2c305",  # Mistral, which passes a sliding window that sdpa does not use
        "a1392a861452e726",  # Qwen2, the same
    )
)
_NORMED_ATTENTION = frozenset(
    ("d7acad34b204253e",)  # Qwen3: Qwen2's with a norm of each head of queries and keys
)
_ROTATION = "928b1b071cc104d5", "a68a16140f32af85"

_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("q_norm", "k_norm")
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HARMLESS = frozenset(
    (
        *("position_ids", "use_cache", "cache_position", "num_items_in_batch", "logits_to_keep"),
        *("output_hidden_states", "return_dict"),
    )
)
"""Arguments that neither the layer nor ``sdpa`` attention uses."""

_CHECKPOINT = "_gradient_checkpointing_func"
"""The attribute in which transformers keeps the checkpointing function of a layer."""
_SHARE_OF_FREE_MEMORY = 0.5
"""How much of the free memory the layers that follow may keep under checkpointing."""

_PREFIX = Reason("its attention has a prefix")
_NOT_CAUSAL = Reason("its attention is not causal")
_TRANSFORMED = Reason("under torch.compile and torch.func the layer runs its own operations")


class LayerParts(NamedTuple):
    """A decoder layer as the op takes it.

    Attributes:
        norms: The norms before attention and before the MLP, then those of the heads of queries and keys if they have any.
        linears: q, k, v, o, gate, up, down.
        act: The activation of the MLP.
        scale: Factor on the scores of attention.
    """

    norms: list[Norm]
    linears: list[LinearParts]
    act: str
    scale: float


class FusedDecoderLayer(Fused):
    """The forward of a decoder layer as one ``lora_decoder_layer``; mixed into the layer's own class."""

    peftkit_method = METHOD

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output for ``hidden_states [B, S, D]``; its own forward if the call or ``peftkit_plan`` gives a reason."""
        parts = self._plan_of_call(*args, **kwargs)
        if parts is None:
            return super().forward(*args, **kwargs)
        return self._run(parts, "", *args, **kwargs)

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        """What transformers calls instead of the forward if checkpointing is on. It sets this attribute when that is enabled."""
        if _CHECKPOINT not in self.__dict__:
            raise AttributeError(_CHECKPOINT)
        return self.__dict__[_CHECKPOINT] if is_transformed() else self._checkpointed

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable[..., Any]) -> None:
        self.__dict__[_CHECKPOINT] = function

    def _checkpointed(self, forward: Any, *args: Any) -> Any:
        """The layer's output; its backward makes again what is cheap. The last resort is the checkpointing that was enabled.

        Args:
            forward: The layer's forward with its keyword arguments, a ``functools.partial``.
            args: Its other arguments.
        """
        parts = None if has_hooks(self) else self._plan_of_call(*args, **forward.keywords)
        remake = None if parts is None else _affordable(args[0], parts, self._attention())
        if remake is None:
            return self.__dict__[_CHECKPOINT](forward, *args)
        return self._run(parts, remake, *args, **forward.keywords)

    def _plan_of_call(self, *args: Any, **kwargs: Any) -> LayerParts | None:
        """What the op computes this call with, or ``None`` if the layer's own forward runs."""
        # torch.compile could trace neither the reasons of a call nor the plan
        if is_transformed() or len(args) != 1 or not isinstance(args[0], Tensor):
            return None
        if _call_reason(self._attention(), args[0], **kwargs) is not None:
            return None
        parts = self.peftkit_plan(args[0])
        return None if isinstance(parts, Reason) else parts

    def _run(self, parts: LayerParts, remake: Remake, x: Tensor, **kwargs: Any) -> Tensor:
        cos, sin = kwargs["position_embeddings"]
        share_weights(x, parts.linears[4:6])
        linears = [draw_seeds(part) for part in parts.linears]
        y, k, v = lora_decoder_layer(
            *(x, cos, sin, parts.norms),
            [part.weight for part in linears],
            [part.bias for part in linears],
            [part.lora for part in linears],
            parts.act,
            scale=parts.scale,
            remake=remake,
        )
        cache = kwargs.get("past_key_values")
        if cache is not None:
            cache.update(k, v, self._attention().layer_idx)
        return y

    def peftkit_plan(self, x: Tensor) -> LayerParts | Reason:
        """The tensors of a forward on ``x [B, S, D]``, or why the layer's own forward runs."""
        if is_transformed():
            return _TRANSFORMED  # first, because torch.compile cannot trace the rest
        attention = self._attention()
        reason = _code_reason(*_code_of(self, attention))
        if reason is not None:
            return reason
        if has_hooks(attention):
            return Reason("its self_attn has hooks")
        if attention.is_causal is not True:
            return _NOT_CAUSAL
        if getattr(attention, "peftkit_dispatch", None) is not None:
            return _PREFIX
        reason = replaced_reason(attention) or call_dropout_reason(attention)
        if reason is not None:
            return reason
        norms = self._norms(x)
        if isinstance(norms, Reason):
            return norms
        linears = self._linears(x)
        if isinstance(linears, Reason):
            return linears
        ranks = [part.lora.A.shape[0] for part in linears if part.lora is not None]
        found = obstacle(x, x.shape[1], attention.head_dim, max([0, *ranks]))
        if found is not None:
            return Reason(found)
        mlp: Any = self._modules["mlp"]
        return LayerParts(norms, linears, mlp._peftkit_seal.answer, attention.scaling)

    def peftkit_example(self) -> Tensor:
        """Enough positions of a sequence that no length is too short, with the dtype and device of the first norm's weight."""
        weight: Any = self._modules["input_layernorm"]._parameters["weight"]  # pyright: ignore[reportOptionalMemberAccess]
        return weight.detach().new_ones(1, 512, weight.shape[0])

    def peftkit_backend(self, x: Tensor, parts: LayerParts) -> str:
        """``"triton"``."""
        return "triton"

    def _attention(self) -> Any:
        return self._modules["self_attn"]

    def _norms(self, x: Tensor) -> list[Norm] | Reason:
        norms, example = [], None
        for name, module in _norms_of(self).items():
            if not isinstance(module, FusedNorm) or has_hooks(module):
                return Reason(f"its {name} is not fused")
            if name in _HEAD_NORMS and example is None:
                example = x.new_empty(1, self._attention().head_dim)
            found = module.peftkit_plan(x if example is None else example)
            if isinstance(found, Reason):
                return Reason(f"{name}: {found}")
            weight, bias, formula = found
            if formula.kind != "rms" or bias is not None:
                return Reason(f"its {name} is no RMSNorm without bias")
            norms.append(Norm(weight, formula.eps, formula.offset, formula.round_first))
        if norms[2:] and (
            norms[2][1:] != norms[3][1:]
            or any(norm.weight.dtype is not x.dtype for norm in norms[2:])
        ):
            return Reason("the norms of queries and keys differ, or have another dtype")
        return norms

    def _linears(self, x: Tensor) -> list[LinearParts] | Reason:
        attention, mlp = self._attention(), self._modules["mlp"]
        linears = []
        for name in _LINEARS:
            part = plan_linear(attention._modules[name], x)
            if isinstance(part, Reason):
                return type(part)(f"{name}: {part}")
            linears.append(part)
        if not isinstance(mlp, FusedGatedMLP) or has_hooks(mlp):
            return Reason("its mlp is not fused")
        inner = mlp.peftkit_plan(x)
        if isinstance(inner, Reason):
            return Reason(f"mlp: {inner}")
        linears += inner
        for part in linears:
            if part.dtype is not None:
                return Reason(f"its linears compute in {part.dtype} and its input is {x.dtype}")
            if part.magnitude is not None:
                return Reason("DoRA runs each linear by itself")
            if part.bias is not None and part.bias.requires_grad:
                return Reason("a bias is trained")
        return linears


def fuse_layers(model: nn.Module) -> int:
    """Fuse every decoder layer of the Llama kind that is on a GPU; returns their number. Others on a GPU keep a reason."""
    count = 0
    for module in list(model.modules()):
        if isinstance(module, FusedDecoderLayer) or not _looks_like_a_layer(module):
            continue
        weight = next(iter(module.parameters())).device
        if weight.type != "cuda" and not is_counting():
            continue
        reason = _code_reason(*_code_of(module, module._modules["self_attn"])) or _parts_reason(
            module
        )
        if reason is not None:
            decline(module, METHOD, reason)
            continue
        forget_declined(module)
        swap_in(module, FusedDecoderLayer)
        count += 1
    return count


def _affordable(x: Tensor, parts: LayerParts, attention: Any) -> Remake | None:
    """How little the backward may make again, so that all layers from this one on fit in memory; ``None`` if nothing fits.

    Args:
        x: The layer's input.
        parts: Its linears.
        attention: The attention of the layer, which knows its number and that of all layers.
    """
    if not x.is_cuda:
        return "gate"
    free = torch.cuda.mem_get_info(x.device)[0]
    free += torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    q, k, v, o, gate, *_ = (part.weight.shape for part in parts.linears)
    most = 2 * o[0] + o[1]
    kept: dict[Remake, int] = {"gate": most + q[0] + k[0] + v[0] + gate[0], "most": most}
    rows = x.shape[:-1].numel() * x.element_size()
    layers = attention.config.num_hidden_layers - (attention.layer_idx or 0)
    for remake, columns in kept.items():
        if layers * rows * columns <= _SHARE_OF_FREE_MEMORY * free:
            return remake
    return None


def _looks_like_a_layer(module: nn.Module) -> bool:
    attention = module._modules.get("self_attn")
    return (
        attention is not None
        and isinstance(module._modules.get("mlp"), FusedGatedMLP)
        and all(module._modules.get(name) is not None for name in _NORMS)
        and all(attention._modules.get(name) is not None for name in _LINEARS)
    )


def _code_of(module: nn.Module, attention: Any) -> tuple[Any, ...]:
    """The functions that make up the layer's formula: two forwards, and the rotation with its helper."""
    layer_class, attention_class = own_class(module), own_class(attention)
    space = vars(sys.modules[attention_class.__module__])
    rotation = space.get("apply_rotary_pos_emb"), space.get("rotate_half")
    return layer_class.forward, attention_class.forward, *rotation


@functools.lru_cache(maxsize=256)
def _code_reason(layer: Any, attention: Any, rotate: Any, half: Any) -> Reason | None:
    """Why these functions do not make up the formula of a Llama layer, or ``None``."""
    if digest(layer) != _LAYER:
        return Reason(f"{_name(layer)} is not the forward of a Llama layer")
    if digest(attention) not in _ATTENTION | _NORMED_ATTENTION:
        return Reason(f"{_name(attention)} is not the forward of Llama's attention")
    if (digest(rotate), digest(half)) != _ROTATION:
        return Reason(f"{_name(rotate)} is not Llama's rotation")
    return None


def _norms_of(module: nn.Module) -> dict[str, Any]:
    """The norms of a layer by name: its own two, and those of its attention if the code of that uses them."""
    attention: Any = module._modules["self_attn"]
    norms: dict[str, Any] = {name: module._modules[name] for name in _NORMS}
    if digest(own_class(attention).forward) in _NORMED_ATTENTION:
        norms |= {name: attention._modules.get(name) for name in _HEAD_NORMS}
    return norms


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _parts_reason(module: nn.Module) -> Reason | None:
    """Why the attention or the norms of a layer are not those of the op, or ``None``."""
    attention: Any = module._modules["self_attn"]
    if getattr(attention, "is_causal", None) is not True:
        return _NOT_CAUSAL
    for name, norm in _norms_of(module).items():
        formula = norm._peftkit_seal.answer if isinstance(norm, FusedNorm) else None
        if not isinstance(formula, NormFormula) or formula.kind != "rms":
            return Reason(f"its {name} is no fused RMSNorm")
    return None


@functools.lru_cache(maxsize=1024)
def digest(function: Callable[..., Any] | None) -> str:
    """A short hash of the code of a function: its argument names and its body without docstring and annotations; empty if unreadable.

    Equal hashes mean equal text, whatever the formatting, so two functions with the same globals compute the same.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))  # pyright: ignore[reportArgumentType]
        (tree,) = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    names = [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args)]
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    plain = [ast.unparse(_WithoutAnnotations().visit(statement)) for statement in body]
    return hashlib.sha256("\n".join((*names, *plain)).encode()).hexdigest()[:16]


class _WithoutAnnotations(ast.NodeTransformer):
    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if node.value is None:
            return ast.Pass()
        return ast.copy_location(ast.Assign([node.target], node.value, lineno=node.lineno), node)


def _call_reason(
    attention: Any,
    x: Tensor,
    attention_mask: Any = None,
    past_key_values: Any = None,
    position_embeddings: Any = None,
    **others: Any,
) -> str | None:
    """Why one call runs the layer's own forward, or ``None``. Arguments as for the layer, whose attention this is."""
    if attention_mask is not None:
        return "the call has a mask"
    if x.dim() != 3 or x.shape[1] < 2 or not x.numel():
        return "the call has fewer than two positions"
    if past_key_values is not None and not (
        torch.is_grad_enabled()
        and type(past_key_values) is DynamicCache
        and past_key_values.get_seq_length(attention.layer_idx) == 0
    ):
        return "the call has a cache with content, or is part of a generation"
    for name, value in others.items():
        if name not in _HARMLESS and value is not None and value is not False:
            return f"the call has the argument {name}"
    if not isinstance(position_embeddings, tuple) or len(position_embeddings) != 2:
        return "the call has no position embeddings"
    B, S, _ = x.shape
    for t in position_embeddings:
        if not isinstance(t, Tensor) or t.dtype is not x.dtype or t.device != x.device:
            return "the position embeddings are no tensors of the input's dtype and device"
        if t.requires_grad or t.dim() != 3 or t.stride(2) != 1:
            return "the position embeddings are trained, or no [B, S, head size]"
        if t.shape[0] not in (1, B) or t.shape[1] != S or t.shape[2] != attention.head_dim:
            return f"the position embeddings have shape {tuple(t.shape)}"
    return None
