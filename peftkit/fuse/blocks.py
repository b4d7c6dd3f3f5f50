"""Fusing across modules: linears that share an input (q/k/v), and gated MLPs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.find.targets import is_cross_attention
from peftkit.fuse.compute import Frozen, gated_mlp, linears
from peftkit.fuse.experts import FusedParamWrapper
from peftkit.fuse.linear import FusedLinear, drop_rate, frozen_part
from peftkit.swap import swap_in
from peftkit_kernels.checks import is_autocast_enabled
from peftkit_kernels.dispatch import is_transformed
from peftkit_kernels.joined import joined
from peftkit_kernels.lora_qkv.torch_impl import joins_shrinks
from peftkit_kernels.lora_swiglu_mlp import ACTIVATIONS
from peftkit_kernels.lora_swiglu_mlp.activation import activate
from peftkit_kernels.low_rank import LoRA

_SHARED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
"""Names of sibling linears that attention modules call on one input, in the order they are called."""

_GATED = ("gate_proj", "up_proj", "down_proj")
_GATED_JOINT = ("gate_up_proj", "down_proj")


class SharedInput:
    """Sibling LoRA linears called one after the other on the same tensor.

    The first call computes all of them and keeps the others' outputs until they are asked for with the same input. A member
    that comes with another input (cross-attention: the query has its own) leaves the group to those after it.
    """

    def __init__(self, members: list[FusedLinear]):
        self.members = members
        self._input: Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self._outputs: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}

    def take(self, member: FusedLinear, x: Tensor) -> Tensor | None:
        """``member(x)`` if the group has it or can compute it, else ``None``."""
        # inference tensors have no version that would tell of a change in place
        if is_transformed() or len(self.members) < 2 or x.is_inference():
            return None
        is_first = member is self.members[0]
        if not is_first and self._input is None:
            return None
        recording = torch.is_grad_enabled()
        if is_first and not recording and x.is_cpu and self._shares_nothing(x):
            self._forget()
            return None
        key = (x._version, recording, is_autocast_enabled(x.device.type))
        if not is_first:
            if self._input is x and self._key == key:
                return self._pop(member)
            self.members = self.members[1:]
            self._forget()
            if member is not self.members[0]:
                return None
        self._forget()
        parts = [part.frozen_linear(x) for part in self.members]
        if None in parts:
            return None
        outputs = linears(x, parts)
        self._input, self._key = x, key
        self._outputs = {
            id(m): (y, _state(m)) for m, y in zip(self.members[1:], outputs[1:], strict=True)
        }
        return outputs[0]

    def _shares_nothing(self, x: Tensor) -> bool:
        """Whether a forward alone has no product in common: one by one the members give the same bits, without the account."""
        ranks = []
        for member in self.members:
            plan = member.__dict__.get("_peftkit_plan")
            if plan is None or plan.base is None or drop_rate(plan.dropout) > 0.0:
                return False
            ranks.append(plan.A.out_features)
        return not joins_shrinks(x.shape[:-1].numel(), ranks)

    def _pop(self, member: FusedLinear) -> Tensor | None:
        y, state = self._outputs.pop(id(member), (None, None))
        if not self._outputs:
            self._forget()
        return y if y is None or state == _state(member) else None

    def _forget(self) -> None:
        self._input = None
        self._outputs = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        # entered before the members are copied, each of which leads back here
        group = memo[id(self)] = SharedInput([])
        group.members = [copy.deepcopy(member, memo) for member in self.members]
        return group

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "_input": None, "_key": (), "_outputs": {}}


def _state(member: FusedLinear) -> tuple[Any, ...]:
    """What an output depends on besides the input: an optimiser step or another adapter makes it stale."""
    plan = member.__dict__.get("_peftkit_plan")
    if plan is None or plan.base is None:
        return ()
    A, B = _version(plan.A), _version(plan.B)
    magnitude = None if plan.magnitude is None else _version(plan.magnitude)
    return A, B, magnitude, member.scaling[plan.name], plan.dropout.training


def _version(module: nn.Module) -> tuple[int, int | None]:
    """Which tensor the weight is, and how often it was changed."""
    weight: Any = module._parameters["weight"]
    return id(weight), None if weight.is_inference() else weight._version


class FusedGatedMLP(nn.Module):
    """The forward of a gated MLP as one ``lora_swiglu_mlp``; mixed into the module's own class."""

    peftkit_method = "gated MLP"
    _peftkit_act: str
    _peftkit_names: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``down(act(gate(x)) ∘ up(x))`` for ``x [..., hidden_size]``; the module's own where it gets anything else."""
        if len(args) != 1 or kwargs or is_transformed():
            return super().forward(*args, **kwargs)
        parts = gated_parts(self, self._peftkit_names, args[0])
        if parts is None:
            return super().forward(*args)
        if _on_one_gpu(args[0]):
            bring_together([part.weight for part in parts[:2]])
        return gated_mlp(args[0], parts, self._peftkit_act)

    def peftkit_verdict(self) -> tuple[str, str]:
        """The path a forward takes in the present state, and the reason where it is the module's own."""
        paths = set()
        for name in self._peftkit_names:
            part = getattr(self, name)
            if isinstance(part, (FusedLinear, FusedParamWrapper)):
                path, reason = part.peftkit_verdict()
                if reason:
                    return "peft", f"{name}: {reason}"
                paths.add(path)
            if isinstance(part, FusedLinear) and part.drops_within_dora():
                return "peft", f"{name}: dropout within DoRA takes each linear by itself"
        return paths.pop() if len(paths) == 1 else "fused:torch", ""


def group_shared_inputs(model: nn.Module) -> int:
    """Let fused LoRA siblings that share an input by their names be computed together; returns the number of groups."""
    count = 0
    for name, parent in model.named_modules():
        for names in _SHARED:
            # learning of a query's own input in the first forward would be too late for its recomputation under checkpointing
            shared = names[1:] if is_cross_attention(name, parent) else names
            members = [
                m for m in (parent._modules.get(n) for n in shared) if isinstance(m, FusedLinear)
            ]
            if len(members) > 1 and len({m.in_features for m in members}) == 1:
                group = SharedInput(members)
                for member in members:
                    member.__dict__["_peftkit_group"] = group
                count += 1
    return count


def fuse_gated_mlps(model: nn.Module) -> int:
    """Fuse every gated MLP whose own output the fused formula reproduces; returns their number."""
    count = 0
    verdicts: dict[Any, str | None] = {}
    for module in model.modules():
        names = _names(module)
        if isinstance(module, FusedGatedMLP) or names is None:
            continue
        settings = tuple(
            sorted(
                (k, v) for k, v in module.__dict__.items() if isinstance(v, (int, float, str, bool))
            )
        )
        others = tuple(repr(c) for name, c in module.named_children() if name not in names)
        kind = (type(module), settings, others, repr(_act_fn(module)), names)
        with _probing(module, names), torch.no_grad():
            x = _probe(module, names)
            parts = None if x is None else gated_parts(module, names, x)
            if x is None or parts is None:
                continue
            if kind not in verdicts:
                verdicts[kind] = _verified_activation(module, x, parts)
        act = verdicts[kind]
        if act is not None:
            swap_in(module, FusedGatedMLP)
            module.__dict__.update(_peftkit_act=act, _peftkit_names=names)
            count += 1
    return count


def _on_one_gpu(x: Tensor) -> bool:
    """Whether weights stay where a forward on ``x`` puts them: what shares work among processes has buffers of its own, and a
    graph that is being captured would move them again whenever it runs.
    """
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


@torch.inference_mode(mode=False)
@torch.no_grad()
def bring_together(weights: Sequence[Tensor]) -> None:
    """Make frozen weights of one width the parts of one buffer, so that each product with them is one; no bit of them changes.

    Left as they are where they lie so already, differ in kind, or where one is itself a part of something larger. What moves or
    copies the model parts them again, and costs nothing but the speed.
    """
    if (
        joined(weights, 0) is not None
        or len({(w.dtype, w.device, w.shape[1]) for w in weights}) > 1
    ):
        return
    if all(
        type(w) is nn.Parameter
        and not w.is_inference()
        and w.is_contiguous()
        and w.untyped_storage().nbytes() == w.nbytes
        for w in weights
    ):
        whole = torch.cat([w.data for w in weights])
        for weight, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
            weight.data = part


def gated_parts(module: nn.Module, names: Sequence[str], x: Tensor) -> list[Frozen] | None:
    """The linears of these names as gate, up and down of a gated MLP; a joint gate and up projection is cut in two."""
    parts: list[Any] = [frozen_part(module._modules[name], x) for name in names]
    if None in parts:
        return None
    if len(parts) == 3:
        return parts
    joint, down = parts
    size = joint.weight.shape[0] // 2
    if joint.lora is not None and joint.lora.p > 0.0:
        return None  # both halves see one dropout mask, which two projections would draw twice
    return [_rows(joint, slice(0, size)), _rows(joint, slice(size, None)), down]


def _rows(part: Frozen, rows: slice) -> Frozen:
    lora = part.lora
    return Frozen(
        part.weight[rows],
        None if part.bias is None else part.bias[rows],
        None if lora is None else LoRA(lora.A, lora.B[rows], lora.scale),
        None if part.magnitude is None else part.magnitude[rows],
    )


def _names(module: nn.Module) -> tuple[str, ...] | None:
    children = module._modules
    if not callable(_act_fn(module)):
        return None
    for names in (_GATED, _GATED_JOINT):
        if all(_is_linear(children.get(name)) for name in names):
            return names
    return None


def _act_fn(module: nn.Module) -> Any:
    return getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)


def _is_linear(module: nn.Module | None) -> bool:
    if isinstance(module, FusedParamWrapper):
        module = module.base_layer  # LoRA on the bare weight of a linear
    return type(module) is nn.Linear or isinstance(module, FusedLinear)


@contextmanager
def _probing(module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """``module`` as in training, so that a dropout of its own shows, but its linears as in evaluation; undone at the end."""
    modes = [(part, part.training) for part in module.modules()]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    module.train()
    for name in names:
        module._modules[name].eval()
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        for part, training in modes:
            part.training = training


def _probe(module: nn.Module, names: tuple[str, ...]) -> Tensor | None:
    first: Any = module._modules[names[0]]
    weight = getattr(first, "base_layer", first).weight
    if weight.device.type == "meta":
        return None
    # enough elements for a dropout of 1 % not to leave all of them as they are
    return probe_input((max(2, 4096 // weight.shape[1]), weight.shape[1]), weight)


def _verified_activation(module: nn.Module, x: Tensor, parts: list[Frozen]) -> str | None:
    """The activation with which the fused formula gives this module's own output, or ``None``."""
    act = _activation_name(_act_fn(module), x.device)
    if act is None:
        return None
    return act if same_up_to_rounding(gated_mlp(x, parts, act), module.forward(x)) else None


def _activation_name(act_fn: Any, device: torch.device) -> str | None:
    grid = torch.linspace(-6, 6, 97, device=device)
    with torch.no_grad():
        value = act_fn(grid)
        errors = {act: (activate(grid, act) - value).abs().max().item() for act in ACTIVATIONS}
    best = min(errors, key=lambda act: errors[act])
    return best if errors[best] <= 8 * torch.finfo(torch.float32).eps else None


def probe_input(shape: Iterable[int], like: Tensor) -> Tensor:
    """A fixed random tensor that leaves torch's generators alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)


def same_up_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one formula in one dtype differ by no more than their roundings could make them."""
    limit = 32 * torch.finfo(b.dtype).eps * b.double().abs().max()
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool((a.double() - b.double()).abs().max() <= limit)
    )
