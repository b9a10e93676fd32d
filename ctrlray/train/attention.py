"""Attention over packed tree rows: which path a network takes, and the kernels.

    packed row:  [prompt 1][branch][branch]...[prompt 2][branch]...      one row, no padding; a branch sees its own prompt

| path | where | how |
|---|---|---|
| segments | CPU | batched products for each prompt and each set of branches: little is computed that the mask would hide |
| flex | GPU | FlexAttention with a block mask |
| separate | any network that takes neither | one padded sequence per answer, under the network's own causal attention |

A network is asked once, after loading: a tree row must give the hidden states of its separate sequences (`choose_path`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ctrlray.train.batches import Branch, TreeRow, collate

TreePath = Literal["segments", "flex", "separate"]
IMPLEMENTATIONS = {"segments": "ctrlray_segments", "flex": "flex_attention"}
"""What transformers calls them."""
BLOCK = 128
"""FlexAttention works on blocks of so many tokens."""
MULTIPLES = {"segments": 32, "flex": BLOCK}
"""Packed rows are filled up to one. On a CPU because kernels and freed memory are kept by size: few sizes, much less of both."""
_TOLERATED = 0.2
"""A path may move hidden states by this share of what another prompt moves them by; bfloat16 alone moves some percent."""


class Group(NamedTuple):
    """Segments that share a prefix, brought to one length L: B segments behind a prefix of P tokens; or one prompt, P = 0."""

    first: int
    last: int
    """The prefix, positions `first` to `last`."""
    take_BL: Tensor
    """Position of each token; a short segment repeats its own beginning."""
    kept: Tensor
    """Flat indices into [B, L] of the tokens that are there."""
    hidden_BLM: Tensor
    """True where a query [L] must not see a key [M = P + L] of its own prefix and segment."""


class Segments:
    """Where prompts and branches lie in a packed row, ready for batched products."""

    def __init__(self, spans_K4: Tensor) -> None:
        together: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._device = spans_K4.device
        for start, stop, first, last in spans_K4.tolist():
            key = (first, last) if last > first else (start, start)
            together.setdefault(key, []).append((start, stop))
        self._members = together
        self._groups: dict[int, list[Group]] = {}

    def groups(self, window: int) -> list[Group]:
        """All groups, with masks for a sliding window; 0 is none."""
        if window not in self._groups:
            self._groups[window] = [self._group(*prefix, parts, window) for prefix, parts in self._members.items()]
        return self._groups[window]

    def _group(self, first: int, last: int, parts: Sequence[tuple[int, int]], window: int) -> Group:
        prefix, length = last - first, max(b - a for a, b in parts)
        at_L = torch.arange(length)
        start_B1 = torch.tensor([[a] for a, _ in parts])
        there_BL = at_L < torch.tensor([[b - a] for a, b in parts])
        query_L1, key_M = prefix + at_L[:, None], torch.arange(prefix + length)
        ahead_LM = key_M > query_L1
        if window:
            ahead_LM |= query_L1 - key_M >= window
        absent_BM = torch.cat([torch.zeros(len(parts), prefix, dtype=torch.bool), ~there_BL], 1)
        own = key_M == query_L1  # a token that is not there sees itself: a row without any key would give NaN
        hidden_BLM = (ahead_LM | absent_BM[:, None]) & ~own
        take_BL = start_B1 + torch.where(there_BL, at_L, 0)
        kept = there_BL.flatten().nonzero()[:, 0]
        return Group(first, last, *(t.to(self._device) for t in (take_BL, kept, hidden_BLM)))


class _SegmentAttention(torch.autograd.Function):
    """softmax(scale Q K^T) V within each group, by batched products; backward computes the weights again.

    On a CPU SDPA's flash kernel takes three times as long for the short segments of chats, its backward pass most of all.
    Products are taken in float32: in bfloat16 a CPU makes and keeps a kernel for every shape, and here shapes never end.
    Shapes: query [S, H, D], key and value [S, G, D]; H is a multiple of G (grouped queries share a key).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Segments, scale: float, window: int) -> Tensor:
        out = torch.empty(query.shape, dtype=_wide(query.dtype), device=query.device)
        with torch.autocast(query.device.type, enabled=False):
            for group in tree.groups(window):
                q, k, v = _gathered(group, query, key, value)
                _put(group, out, torch.matmul(_weights(group, q, k, scale), v))
        ctx.save_for_backward(query, key, value)
        ctx.rest = (tree, scale, window)
        return out.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        tree, scale, window = ctx.rest
        wide = _wide(query.dtype)
        d_query, d_key, d_value = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (query, key, value))
        for group in tree.groups(window):
            q, k, v = _gathered(group, query, key, value)
            weights = _weights(group, q, k, scale)
            absent = torch.ones(group.take_BL.numel(), dtype=torch.bool, device=query.device)
            absent[group.kept] = False
            pulled = grads[0][group.take_BL.flatten()].to(wide).masked_fill_(absent[:, None, None], 0)
            d_out = _folded(pulled, group, key.shape[1])
            d_weights = torch.matmul(d_out, v.transpose(-1, -2))
            inner = (d_weights * weights).sum(-1, keepdim=True)
            d_scores = d_weights.sub_(inner).mul_(weights).mul_(scale)
            _put(group, d_query, torch.matmul(d_scores, k))
            _add(group, d_key, torch.matmul(d_scores.transpose(-1, -2), q))
            _add(group, d_value, torch.matmul(weights.transpose(-1, -2), d_out))
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _gathered(group: Group, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, G, r L, D], where r = H / G heads share a key; keys and values [B, G, P + L, D]; float32 at least."""
    take, wide = group.take_BL.flatten(), _wide(query.dtype)
    size, length = group.take_BL.shape

    def with_prefix(what: Tensor) -> Tensor:
        own = what[take].view(size, length, *what.shape[1:])
        prefix = what[group.first : group.last].expand(size, -1, -1, -1)
        return torch.cat([prefix, own], 1).to(wide).transpose(1, 2)

    return _folded(query[take].to(wide), group, key.shape[1]), with_prefix(key), with_prefix(value)


def _folded(rows: Tensor, group: Group, keys: int) -> Tensor:
    """[B L, H, D] -> [B, G, r L, D]."""
    size, length = group.take_BL.shape
    heads, width = rows.shape[1:]
    split = rows.view(size, length, keys, heads // keys, width).permute(0, 2, 3, 1, 4)
    return split.reshape(size, keys, heads // keys * length, width)


def _put(group: Group, target: Tensor, made: Tensor) -> None:
    """Write [B, G, r L, D] to its positions in [S, H, D]."""
    size, length = group.take_BL.shape
    keys, width = made.shape[1], made.shape[3]
    rows = made.view(size, keys, -1, length, width).permute(0, 3, 1, 2, 4).reshape(size * length, -1, width)
    target[group.take_BL.flatten()[group.kept]] = rows[group.kept]


def _add(group: Group, target: Tensor, made: Tensor) -> None:
    """Add [B, G, P + L, D] to its positions in [S, G, D]: the prefix's over all segments, the others' each to its own."""
    prefix = group.last - group.first
    rows = made.transpose(1, 2)
    if prefix:
        target[group.first : group.last] += rows[:, :prefix].sum(0)
    own = rows[:, prefix:].flatten(0, 1)[group.kept]
    target[group.take_BL.flatten()[group.kept]] += own


def _weights(group: Group, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention weights [B, G, r L, P + L]."""
    size, keys, _, _ = q.shape
    length, seen = group.hidden_BLM.shape[1:]
    scores = torch.matmul(q * scale, k.transpose(-1, -2)).view(size, keys, -1, length, seen)
    scores.masked_fill_(group.hidden_BLM[:, None, None], float("-inf"))
    return torch.softmax(scores, -1).view(size, keys, -1, seen)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    tree: Segments | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers: query [1, H, S, D], key and value [1, G, S, D] -> [1, S, H, D].

    Raises ValueError for what it cannot do, or when the network keeps `tree` from its attention.
    """
    if tree is None or softcap is not None or dropout:
        raise ValueError("this network's attention takes no tree rows")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out: Tensor = _SegmentAttention.apply(q, k, v, tree, scale, sliding_window or 0)  # type: ignore[no-untyped-call]
    return out[None], None


def owners(spans_K4: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Of every position: the number of its segment, and that of its prefix (-1 for a prompt's tokens). Shapes [S], [S]."""
    start, stop, first, last = spans_K4.T.contiguous()
    number = torch.arange(len(spans_K4), device=spans_K4.device)
    segment_S = torch.repeat_interleave(number, stop - start, output_size=length)
    prefix_K = torch.where(last > first, torch.searchsorted(start, first), -1)
    return segment_S, prefix_K[segment_S]


def allowed(segment_S: Tensor, prefix_S: Tensor) -> Tensor:
    """The mask itself, [S, S]: True where a query (row) may see a key (column). For tests, and to read what the paths do."""
    at = torch.arange(len(segment_S))
    mine = segment_S[:, None] == segment_S[None]
    return (at[:, None] >= at[None]) & (mine | (prefix_S[:, None] == segment_S[None]))


def block_mask(spans_K4: Tensor, position_S: Tensor, window: int = 0) -> Any:
    """FlexAttention's mask of a packed row; with a window, keys further back than that in positions are hidden."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = len(position_S)
    segment_S, prefix_S = owners(spans_K4, length)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (segment_S[query] == segment_S[key]) | (prefix_S[query] == segment_S[key])
        near = position_S[query] - position_S[key] < window if window else inside
        return (query >= key) & inside & near

    return create_block_mask(seen, None, None, length, length, device=str(position_S.device), BLOCK_SIZE=BLOCK)


def flex_masks(settings: Any, spans_K4: Tensor, position_S: Tensor) -> Any:
    """What a network of this transformers config takes as its mask: one, or one per kind of layer."""
    window = getattr(settings, "sliding_window", None)
    kinds = set(getattr(settings, "layer_types", None) or ())
    if not window:
        return block_mask(spans_K4, position_S)
    if not kinds:
        return block_mask(spans_K4, position_S, window)
    sizes = {"full_attention": 0, "sliding_attention": window}
    return {kind: block_mask(spans_K4, position_S, sizes[kind]) for kind in kinds}


def choose_path(network: Any, gpu: bool) -> TreePath:
    """Set the network's attention to the fastest that it takes, and say which that is.

    It takes one when a tree row gives the hidden states of its separate sequences, up to a fifth of what another prompt
    does to them, and when it can be trained so (dropout of attention weights cannot). Networks with attention of their own
    raise, or answer otherwise, and keep what they had.
    """
    from transformers import AttentionInterface

    wanted: TreePath = "flex" if gpu else "segments"
    before, was_training = network.config._attn_implementation, network.training
    AttentionInterface.register(IMPLEMENTATIONS["segments"], segment_attention)
    network.eval()
    try:
        tree, apart, moved = _probe(network, wanted)
        fits = bool((tree - apart).norm() <= _TOLERATED * (moved - apart).norm())
        _probe(network.train(), wanted)  # raises where training differs from what was just compared
    except Exception:  # whatever a network says to a call that it was not made for, the answer is no
        fits = False
    network.train(was_training)
    network.set_attn_implementation(IMPLEMENTATIONS[wanted] if fits else before)
    return wanted if fits else "separate"


_PROBE_PROMPT, _PROBE_BRANCHES = 8, (5, 6)


@torch.no_grad()
def _probe(network: Any, path: TreePath) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of two branches, [tokens, D]: in one tree row, as separate sequences, and these after another prompt.

    Ordinary tokens: on a string of special ones bfloat16 alone moves hidden states by a third.
    """
    device, vocabulary = next(network.parameters()).device, network.get_input_embeddings().weight.shape[0]
    drawn = torch.Generator().manual_seed(0)
    prompt, other, *branches = (
        torch.randint(vocabulary // 8, vocabulary, (n,), generator=drawn).to(device)
        for n in (_PROBE_PROMPT, _PROBE_PROMPT, *_PROBE_BRANCHES)
    )
    rows = [TreeRow(tuple(prompt.tolist()), tuple(Branch((), tuple(b.tolist()), True, 1.0, 0) for b in branches))]
    batch = collate(rows, 0, multiple=MULTIPLES[path])
    before = network.config._attn_implementation
    network.set_attn_implementation(IMPLEMENTATIONS[path])
    packed = (batch.input_ids_RS[0], batch.position_ids_RS[0], batch.spans_K4)
    tree = run_packed(network, path, *(t.to(device) for t in packed))[0, _PROBE_PROMPT:][: sum(_PROBE_BRANCHES)]
    network.set_attn_implementation(before)

    def apart(start: Tensor) -> Tensor:
        each = [network.base_model(input_ids=torch.cat([start, b])[None], use_cache=False).last_hidden_state for b in branches]
        return torch.cat([hidden[0, len(start) :] for hidden in each]).float()

    return tree.float(), apart(prompt), apart(other)


def run_packed(network: Any, path: TreePath, ids_S: Tensor, position_S: Tensor, spans_K4: Tensor) -> Tensor:
    """Last hidden states of a packed row, [1, S, D]."""
    given = {"input_ids": ids_S[None], "position_ids": position_S[None], "use_cache": False}
    if path == "segments":
        out = network.base_model(**given, attention_mask=None, tree=Segments(spans_K4))
    else:
        out = network.base_model(**given, attention_mask=flex_masks(network.config, spans_K4, position_S))
    hidden: Tensor = out.last_hidden_state
    return hidden
