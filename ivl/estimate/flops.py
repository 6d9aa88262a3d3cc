"""FLOPs of a forward and of a training step, from dimensions and counts alone.

A multiplication with its addition counts as two. Only matrix products are counted (linear layers, attention, the
convolution that makes patches), as `torch.utils.flop_counter` does: norms, activations and the optimizer are left out.
Attention counts every pair of positions of a row, also those that the causal mask hides, as torch's counter does; a
kernel that skips them does up to half of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ivl.config import Config


@dataclass(frozen=True)
class Linear:
    """A linear layer: its name inside its block, and its widths."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Block:
    """The linear layers of a transformer block, in the order they are computed."""

    before: tuple[Linear, ...]
    """Layers in front of attention: queries, keys, values"""
    after: Linear
    up: tuple[Linear, ...]
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        return *self.before, self.after, *self.up, self.down


@dataclass(frozen=True)
class Adapter:
    """A LoRA: its rank, and the linear layers it covers by the ends of their names; None: all of a block."""

    rank: int
    targets: tuple[str, ...] | None = None

    def covers(self, linear: Linear) -> bool:
        return self.targets is None or any(linear.name == t or linear.name.endswith("." + t) for t in self.targets)


Mode = Literal["frozen", "full"] | Adapter


@dataclass(frozen=True)
class Trained:
    """Mode of each part (`ivl.finetune.tune.described` makes it)."""

    vision_model: Mode = "frozen"
    mlp1: Mode = "frozen"
    language_model: Mode = "frozen"
    """Blocks of the language model"""
    embeddings: Literal["frozen", "full"] = "frozen"
    head: Mode = "frozen"
    vision_blocks: int | None = None
    """Number of the tower's last blocks that train, where the tower is full; None: all, and its embeddings"""


@dataclass(frozen=True)
class Work:
    """Counts that operations follow from: of one batch, of a step, of an epoch."""

    tiles: int = 0
    tokens: int = 0
    """Positions of the language model, image tokens (and padding, where there is any) included"""
    pairs: int = 0
    """Sum of the squares of the rows' lengths, which attention costs"""
    supervised: int = 0


@dataclass(frozen=True)
class Recomputed:
    """Operations that backward computes a second time."""

    vision_model: bool = False
    """Activation checkpointing of the tower's blocks"""
    language_model: bool = False
    """Activation checkpointing of the language model's blocks"""
    head: float | None = None
    """Share of the supervised tokens whose logits are recomputed, chunk by chunk. None: as `unkept` has it"""
    scores: bool = True
    """Attention's scores: fused kernels do not keep them; attention written out does"""
    last_mlp: bool = False
    """Last block's MLP for all tokens; False: for supervised ones alone (`ivl.model.efficient.last_block`)"""


NOTHING = Recomputed(head=0.0, scores=False, last_mlp=True)
"""Operations of the model itself, whatever the implementation recomputes or leaves out: the basis of MFU"""


@dataclass(frozen=True)
class Flops:
    """Operations by place."""

    vision_model: float = 0
    mlp1: float = 0
    language_model: float = 0
    """Linear layers and attention"""
    head: float = 0

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


# Shapes


def patches(config: Config) -> int:
    """L: positions of a tile in the tower, the class token included."""
    return (config.image_size // config.vision.patch_size) ** 2 + 1


def vision_depth(config: Config) -> int:
    """Blocks of the tower that are computed (`select_layer`)."""
    return config.select_layer % (config.vision.num_hidden_layers + 1)


def vision_block(config: Config) -> Block:
    """A block of the tower."""
    width, inner = config.vision.hidden_size, config.vision.intermediate_size
    return Block(
        before=(Linear("attn.qkv", width, 3 * width),),
        after=Linear("attn.proj", width, width),
        up=(Linear("mlp.fc1", width, inner),),
        down=Linear("mlp.fc2", inner, width),
    )


def projector(config: Config) -> tuple[Linear, Linear]:
    width = config.llm["hidden_size"]
    return Linear("1", config.projector_width, width), Linear("3", width, width)


def llm_widths(config: Config) -> tuple[int, int, int, int]:
    """Widths of the residual stream, of all queries, of all keys, and inside the MLP."""
    llm = config.llm
    heads, width = llm["num_attention_heads"], llm["hidden_size"]
    head = llm.get("head_dim") or width // heads
    return width, heads * head, (llm.get("num_key_value_heads") or heads) * head, llm["intermediate_size"]


def llm_block(config: Config) -> Block:
    """A block of the language model."""
    width, q, kv, inner = llm_widths(config)
    before: tuple[Linear, ...]
    up: tuple[Linear, ...]
    if config.llm_architecture == "Phi3ForCausalLM":  # fused, as its class has them
        before = (Linear("self_attn.qkv_proj", width, q + 2 * kv),)
        up = (Linear("mlp.gate_up_proj", width, 2 * inner),)
    else:
        before = tuple(Linear(f"self_attn.{n}_proj", width, w) for n, w in (("q", q), ("k", kv), ("v", kv)))
        up = tuple(Linear(f"mlp.{n}_proj", width, inner) for n in ("gate", "up"))
    return Block(before, Linear("self_attn.o_proj", q, width), up, Linear("mlp.down_proj", inner, width))


def unkept(supervised: int, chunk: int = 512) -> float:
    """The share of a batch's supervised tokens whose logits backward makes again: all but those of the last chunk
    (`ivl.model.loss.token_losses`)."""
    return max(supervised - 1, 0) // chunk * chunk / max(supervised, 1)


# Forward


def vision_flops(config: Config) -> float:
    """Operations of the tower, per tile."""
    vision, length = config.vision, patches(config)
    block = (
        sum(_product(linear) for linear in vision_block(config).linears) * length + 4 * length**2 * vision.hidden_size
    )
    return _embedding(config) + vision_depth(config) * block


# Training


def training_flops(config: Config, trained: Trained, work: Work, recomputed: Recomputed = Recomputed()) -> Flops:
    """Operations of forward and backward.

    A product whose input needs a gradient costs as much again, and as much again where its weights train: a frozen
    layer below everything that trains costs 1, one above something that trains 2, one that trains 3. `NOTHING` as
    `recomputed` gives the operations of the model, for MFU; the default, those of this program's kernels.
    """
    vision, vision_grad = _vision(config, trained, work.tiles, recomputed)
    projector, image_grad = _projector(config, trained.mlp1, vision_grad, work.tiles)
    embeds_grad = trained.embeddings == "full" or (image_grad and work.tiles > 0)
    llm, llm_grad = _llm(config, trained.language_model, embeds_grad, work, recomputed)
    llm_grad = llm_grad or trained.language_model == "full"  # the last norm
    layer = Linear("lm_head", config.llm["hidden_size"], config.llm["vocab_size"])
    head, _ = _linear(layer, trained.head, llm_grad)
    share = unkept(work.supervised) if recomputed.head is None else recomputed.head
    head += share * (_product(layer) + _low_rank(layer, trained.head))
    return Flops(vision, projector, llm, head * work.supervised)


def _vision(config: Config, trained: Trained, tiles: int, recomputed: Recomputed) -> tuple[float, bool]:
    depth, length, width = vision_depth(config), patches(config), config.vision.hidden_size
    mode = trained.vision_model
    if mode == "frozen":
        return tiles * vision_flops(config), False
    first = 0 if trained.vision_blocks is None else depth - trained.vision_blocks
    with_embeddings = mode == "full" and first <= 0
    total, grad = _embedding(config) * (1 + with_embeddings) * tiles, with_embeddings
    block, pairs = vision_block(config), 4 * length**2 * width * tiles
    for n in range(depth):
        block_mode: Mode = mode if n >= first else "frozen"
        cost, forward, grad = _block(block, block_mode, grad, length * tiles, pairs, recomputed.scores)
        total += cost + (forward if recomputed.vision_model else 0)
    return total, grad


def _projector(config: Config, mode: Mode, grad: bool, tiles: int) -> tuple[float, bool]:
    total, positions = 0.0, tiles * config.tokens_per_tile
    grad = grad or mode == "full"  # its norm
    for linear in projector(config):
        cost, grad = _linear(linear, mode, grad)
        total += cost * positions
    return total, grad


def _llm(config: Config, mode: Mode, grad: bool, work: Work, recomputed: Recomputed) -> tuple[float, bool]:
    block, pairs, total = llm_block(config), 4 * llm_widths(config)[1] * work.pairs, 0.0
    depth = config.llm["num_hidden_layers"]
    for n in range(depth):
        read = work.supervised if n == depth - 1 and not recomputed.last_mlp else None
        cost, forward, grad = _block(block, mode, grad, work.tokens, pairs, recomputed.scores, read)
        if recomputed.language_model:
            # Checkpointing stops where backward has all it needs: the result of the last product it does not, unless
            # that is one operation with a LoRA's.
            adapted = isinstance(mode, Adapter) and mode.covers(block.down)
            last = 0 if adapted else _product(block.down)
            total += max(0.0, forward - last * (work.tokens if read is None else read))
        total += cost
    return total, grad


def _block(
    block: Block, mode: Mode, grad: bool, positions: int, pairs: float, recomputed_scores: bool, read: int | None = None
) -> tuple[float, float, bool]:
    """Operations of a block; those of its forward, where backward needs it; True if its output needs a gradient.

    `grad`: True if its input does. `pairs`: operations of attention, forward. `read`: positions of its MLP, where they
    are not all.
    """
    read = positions if read is None else read
    grad = grad or mode == "full"  # its first norm
    before, inside = _linears(block.before, mode, grad)
    # Two products for each of the two, and the scores once more in a fused kernel.
    attention = pairs * (1 + (2 + recomputed_scores / 2) * inside)
    after, inside = _linears((block.after,), mode, inside)
    grad = grad or inside
    up, inside = _linears(block.up, mode, grad)
    down, inside = _linears((block.down,), mode, inside)
    grad = grad or inside
    of_mlp = sum(_product(x) + _low_rank(x, mode) for x in (*block.up, block.down))
    of_all = sum(_product(x) + _low_rank(x, mode) for x in (*block.before, block.after))
    forward = pairs + positions * of_all + read * of_mlp
    return attention + positions * (before + after) + read * (up + down), forward * grad, grad


def _linears(linears: tuple[Linear, ...], mode: Mode, grad: bool) -> tuple[float, bool]:
    """Sum of `_linear` over layers with the same input."""
    costs = [_linear(linear, mode, grad) for linear in linears]
    return sum(cost for cost, _ in costs), any(out for _, out in costs)


def _linear(linear: Linear, mode: Mode, grad: bool) -> tuple[float, bool]:
    """Operations per position of forward and backward, and True if the output needs a gradient."""
    if mode == "full":
        return _product(linear) * (2 + grad), True
    total = _product(linear) * (1 + grad)
    if isinstance(mode, Adapter) and mode.covers(linear):
        return total + 2 * mode.rank * (linear.inputs * (2 + grad) + 3 * linear.outputs), True
    return total, grad


def _product(linear: Linear) -> float:
    return 2 * linear.inputs * linear.outputs


def _low_rank(linear: Linear, mode: Mode) -> float:
    if isinstance(mode, Adapter) and mode.covers(linear):
        return 2 * mode.rank * (linear.inputs + linear.outputs)
    return 0


def _embedding(config: Config) -> float:
    vision = config.vision
    return 2 * (patches(config) - 1) * vision.num_channels * vision.patch_size**2 * vision.hidden_size
