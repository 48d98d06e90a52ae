"""One forward of the Transformers model for a mixed step: rows that decode and prompts that are being read.

Owns the weights' layout (fused projections), our attention function and what a step's batch looks like in tensors.
A step is ragged: all its tokens lie in one row of the model's input, so the matmuls see them together, and only the
attention knows which token belongs to which slot. Leaves out which rows run (scheduler) and what the logits become
(sampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, MistralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP, apply_rotary_pos_emb

from .cache import SlotCache

PACKABLE = (torch.float32, torch.bfloat16)
PACKED_FOR_ROWS = 8
"""How many rows the packed layout is made for; of 1, 8, 32 and 128 this one was never far from the best."""
LONG_ROW_TOKENS = 128
"""What a separate attention call costs, counted in tokens of a batched one (see `_split_at`)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one row: a chunk of its prompt, or the one token it decodes."""

    slot: int
    start: int
    """Position of the first token, counted from the row's beginning."""
    token_ids: Sequence[int]


class StepBatch:
    """A step in tensors: `decode` segments (one token each) first, then `prefill` segments.

    Passed to the model as its `past_key_values`; `attend` writes the step's keys and values and computes attention.
    """

    is_compileable = False

    def __init__(
        self,
        cache: SlotCache,
        decode: Sequence[Segment],
        prefill: Sequence[Segment],
        *,
        device: torch.device,
        sliding_window: int | None,
    ) -> None:
        self.cache = cache
        self.prefill = prefill
        self.num_decode = len(decode)
        self._window = sliding_window
        segments = [*decode, *prefill]
        token_ids = [t for s in segments for t in s.token_ids]
        positions = [p for s in segments for p in range(s.start, s.start + len(s.token_ids))]
        padding = [0] * (padded(len(token_ids), device) - len(token_ids))
        self.token_ids = torch.tensor(token_ids + padding, device=device)[None]
        self.positions = torch.tensor(positions + padding, device=device)[None]
        if decode:
            self._plan_decode(decode, device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def _plan_decode(self, decode: Sequence[Segment], device: torch.device) -> None:
        lengths = [s.start + 1 for s in decode]
        slots = [s.slot for s in decode]
        self._slots = torch.tensor(slots, device=device)
        self._last = torch.tensor([s.start for s in decode], device=device)
        self._num_slots = max(slots) + 1
        self._dense = slots == list(range(self._num_slots))
        split = _split_at(lengths, self._num_slots)
        self._short_len = split
        self._long = [(i, s.slot, s.start + 1) for i, s in enumerate(decode) if s.start + 1 > split]
        window = self._window if self._window is not None and max(lengths) > self._window else None
        self._mask: Tensor | None = None
        if split and not (self._dense and min(lengths) >= split and window is None):
            # A slot without a row shows its first key, so that its softmax stays finite; its output is not read.
            row_lengths = torch.ones((self._num_slots, 1), dtype=torch.long, device=device)
            row_lengths[self._slots, 0] = self._last + 1
            key_positions = torch.arange(split, device=device)
            self._mask = key_positions < row_lengths
            if window is not None:
                self._mask &= key_positions >= row_lengths - window
            self._mask = self._mask[:, None, None, :]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Write keys and values of this step and return attention's output.

        Shapes: q (1, heads, tokens, head_dim), k and v (1, kv_heads, tokens, head_dim); the output is
        (1, tokens, heads, head_dim).
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        _, num_heads, num_tokens, head_dim = q.shape
        kv_heads = k.shape[1]
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
        n = self.num_decode
        if n:
            keys[self._slots, :, self._last] = k[0, :, :n].transpose(0, 1)
            values[self._slots, :, self._last] = v[0, :, :n].transpose(0, 1)
            rows = q[0, :, :n].transpose(0, 1).reshape(n, kv_heads, num_heads // kv_heads, head_dim)
            self._attend_rows(rows, keys, values, scaling, out[:n].view(rows.shape))
        at = n
        for segment in self.prefill:
            length = len(segment.token_ids)
            piece = slice(at, at + length)
            end = segment.start + length
            keys[segment.slot, :, segment.start : end] = k[0, :, piece]
            values[segment.slot, :, segment.start : end] = v[0, :, piece]
            out[piece] = self._attend_chunk(
                q[:, :, piece],
                keys[segment.slot : segment.slot + 1, :, :end],
                values[segment.slot : segment.slot + 1, :, :end],
                segment.start,
                scaling,
            )
            at += length
        out[at:] = 0  # padding: nobody reads it, but it must stay finite
        return out[None]

    def _attend_rows(self, rows: Tensor, keys: Tensor, values: Tensor, scaling: float, out: Tensor) -> None:
        """Decode attention: rows (n, kv_heads, group, head_dim), one query token each; the group shares its keys."""
        if self._short_len:
            queries = rows
            if not self._dense:
                queries = rows.new_zeros((self._num_slots, *rows.shape[1:]))
                queries[self._slots] = rows
            found = F.scaled_dot_product_attention(
                queries,
                keys[: self._num_slots, :, : self._short_len],
                values[: self._num_slots, :, : self._short_len],
                attn_mask=self._mask,
                scale=scaling,
            )
            out.copy_(found if self._dense else found[self._slots])
        for i, slot, length in self._long:
            first = 0 if self._window is None else max(0, length - self._window)
            out[i] = F.scaled_dot_product_attention(
                rows[i : i + 1],
                keys[slot : slot + 1, :, first:length],
                values[slot : slot + 1, :, first:length],
                scale=scaling,
            )[0]

    def _attend_chunk(self, q: Tensor, keys: Tensor, values: Tensor, start: int, scaling: float) -> Tensor:
        """Prompt attention: q (1, heads, length, head_dim) over keys (1, kv_heads, start + length, head_dim)."""
        group = q.shape[1] // keys.shape[1]
        length, end = q.shape[2], keys.shape[2]
        mask = None
        if start or (self._window is not None and end > self._window):
            mask = torch.ones((length, end), dtype=torch.bool, device=q.device).tril(start)
            if self._window is not None:
                mask = mask.triu(start - self._window + 1)
        # The keys are repeated for the group: the CPU's fast attention wants as many key heads as query heads.
        found = F.scaled_dot_product_attention(
            q,
            keys.repeat_interleave(group, 1),
            values.repeat_interleave(group, 1),
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            scale=scaling,
        )
        return found[0].transpose(0, 1)


def padded(num_tokens: int, device: torch.device) -> int:
    """Return how many tokens a step of so many computes.

    A CPU's matmuls are compiled for each number of rows at first sight: milliseconds each, and memory that is kept. A
    few sizes cost less than every size once.
    """
    if device.type != "cpu" or num_tokens <= 2:
        return num_tokens
    granule = 4 if num_tokens <= 8 else 8 if num_tokens <= 32 else 16
    return -(-num_tokens // granule) * granule


def _split_at(lengths: Sequence[int], num_slots: int) -> int:
    """Return how many tokens of every slot the batched attention call should read.

    Rows that are longer get a call of their own: one long row must not make all the others pay for its length. The
    cheapest split is one of the lengths, or 0 (a call for each row).
    """
    best, best_cost = 0, sum(lengths) + LONG_ROW_TOKENS * len(lengths)
    rest, count = best_cost, len(lengths)
    for length in sorted(lengths):
        count -= 1
        rest -= length + LONG_ROW_TOKENS
        cost = num_slots * length + rest
        if cost <= best_cost:
            best, best_cost = length, cost
    return best


def slot_attention(
    module: MistralAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step: StepBatch,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend over the slots of a step: the function behind the attention implementation "slots"."""
    return step.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("slots", slot_attention)


class FusedAttention(MistralAttention):
    """Mistral's attention with one projection for queries, keys and values; serves both lanes."""

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q_size = self.config.num_attention_heads * self.head_dim
        kv_size = self.config.num_key_value_heads * self.head_dim
        q, k, v = self.qkv(hidden_states).split([q_size, kv_size, kv_size], dim=-1)
        q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))
        cos, sin = position_embeddings
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        if isinstance(past_key_values, StepBatch):
            implementation, kwargs["step"] = "slots", past_key_values
        else:
            implementation = self.config._attn_implementation
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx)
        out, weights = ALL_ATTENTION_FUNCTIONS[implementation](
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=getattr(self.config, "sliding_window", None),
            **kwargs,
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class FusedMLP(MistralMLP):
    """Mistral's gated MLP with one projection for gate and up."""

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


def fuse(model: MistralForCausalLM, device: torch.device | None = None) -> None:
    """Lay the projections that read the same input side by side, in place.

    The old parameters become views of the fused ones, so nothing is held twice and `state_dict` still names them. A
    model without memory (on the meta device) gets memory for them on `device`, to be filled.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.qkv = _side_by_side(device, attention.q_proj, attention.k_proj, attention.v_proj)
        mlp.gate_up = _side_by_side(device, mlp.gate_proj, mlp.up_proj)
        attention.__class__, mlp.__class__ = FusedAttention, FusedMLP


def _side_by_side(device: torch.device | None, *projections: nn.Linear) -> Projection:
    fused = torch.cat([p.weight.detach() for p in projections])
    if fused.is_meta:
        fused = torch.empty_like(fused, device=device)
    for projection, rows in zip(projections, fused.split([p.weight.shape[0] for p in projections]), strict=True):
        projection.weight = nn.Parameter(rows, requires_grad=False)
    return Projection(fused)


class Projection(nn.Module):
    """A matmul with a weight (outputs, inputs) that is laid out for the device it runs on; no bias."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight.detach()
        """Not a parameter: the modules that were fused name its rows."""
        self.packed = False

    def pack(self) -> None:
        """Lay the weight out in the blocks that oneDNN computes with, instead of again at every call."""
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_FOR_ROWS)
        self.packed = True

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)


def pack(model: MistralForCausalLM) -> None:
    """Pack a fused model's projections, one after the other, each in place of what it was: a CPU only.

    The weights cannot be read back afterwards. Measured on two cores with AVX-512 BF16, all matmuls of a decode step:
    1.7 times as fast at 1 and 8 rows, 1.4 times at 32 (`docs/decisions.md`). What oneDNN does not pack stays as it is.
    """
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available() or model.dtype not in PACKABLE:
        return
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for module, names in ((attention, ("q_proj", "k_proj", "v_proj")), (mlp, ("gate_proj", "up_proj"))):
            for name in names:
                delattr(module, name)
        attention.o_proj, mlp.down_proj = Projection(attention.o_proj.weight), Projection(mlp.down_proj.weight)
        for projection in (attention.qkv, attention.o_proj, mlp.gate_up, mlp.down_proj):
            projection.pack()
    model.lm_head = Projection(model.lm_head.weight)
    model.lm_head.pack()


class Runner:
    """The model with its slots; `forward` is the only place where the shared lane computes."""

    def __init__(self, model: MistralForCausalLM, *, num_slots: int, slot_len: int) -> None:
        self.model = model
        self.device = model.device
        self.vocab_size = model.config.vocab_size
        self.cache = SlotCache(
            model.config, num_slots=num_slots, slot_len=slot_len, dtype=model.dtype, device=model.device
        )
        # Already a 4D mask: the model passes it on and builds none; the batch knows who may see what.
        self._no_mask = torch.zeros((1, 1, 1, 1), dtype=model.dtype, device=model.device)
        window = model.config.sliding_window
        self._window = window if window is not None and window < slot_len else None

    @torch.inference_mode()
    def forward(self, decode: Sequence[Segment], prefill: Sequence[Segment], wanted: Sequence[int]) -> Tensor:
        """Run one step and return the logits after each wanted token, (len(wanted), vocab_size) in float32.

        `wanted` counts tokens through the decode segments, then the prefill segments. Running a step again gives the
        same: keys and values are written to their positions, nothing is appended.
        """
        batch = StepBatch(self.cache, decode, prefill, device=self.device, sliding_window=self._window)
        output = self.model(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            attention_mask=self._no_mask,
            past_key_values=batch,
            use_cache=True,
            logits_to_keep=torch.tensor(
                [*wanted, *[0] * (padded(len(wanted), self.device) - len(wanted))],
                dtype=torch.long,
                device=self.device,
            ),
        )
        return output.logits[0, : len(wanted)].float()
