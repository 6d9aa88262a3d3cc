"""Attention by rows: equal to a square mask over all, and nothing computed for padding."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from ivl.model import attention
from ivl.model.attention import attend, by_row, by_varlen, visible
from ivl.model.decoder import LanguageModel
from ivl.model.sequence_layout import layout_of, lengths_of
from ivl.types import SequenceLayout
from tests.model.test_llm import tiny
from tests.tiny import FAMILIES

LENGTHS = (5, 1, 7)


def layout(*lengths: int) -> SequenceLayout:
    """Of one pack of these rows."""
    return SequenceLayout.of(torch.tensor(lengths), sum(lengths), packed=True)


@pytest.mark.parametrize("window", [None, 3])
def test_rows_see_themselves_alone(window):
    q, k, v = torch.randn(1, 4, 13, 8), torch.randn(1, 2, 13, 8), torch.randn(1, 2, 13, 8)
    rows = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    mask = visible(positions, positions, rows, window)
    square = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=mask)
    torch.testing.assert_close(by_row(q, k, v, LENGTHS, window=window), square.transpose(1, 2), atol=1e-6, rtol=1e-5)
    for kernel in ("sdpa", "eager"):
        found = attend(q, k, v, mask, kernel)
        torch.testing.assert_close(found, square.transpose(1, 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 3])
def test_a_row_without_a_mask_is_causal(window, kernel):
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    positions = torch.arange(9).expand(2, -1)
    expected = attend(q, k, v, visible(positions, positions, None, window))
    torch.testing.assert_close(attend(q, k, v, None, kernel, window=window), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_one_token_meets_the_keys_that_its_mask_shows(kernel):
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    seen = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()[:, None, None]
    found = attend(q, k, v, seen, kernel)
    for row, cut in ((0, slice(0, 3)), (1, slice(1, 6))):
        alone = attend(q[row : row + 1], k[row : row + 1, :, cut], v[row : row + 1, :, cut], None, kernel)
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-6, rtol=1e-5)


def by_mask(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, 0), enable_gqa=False):
    """torch's `varlen_attn` as documented, with a square mask."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert enable_gqa == (q.shape[1] != k.shape[1]) and window_size[1] == 0
    rows, places = [], []
    for ends in (cu_seq_q, cu_seq_k):
        rows.append(torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff()))
        places.append(torch.cat([torch.arange(-n, 0) for n in ends.diff().tolist()]))  # from the last of the row
    back = places[0][:, None] - places[1]
    seen = (rows[0][:, None] == rows[1]) & (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
    heads = (x.transpose(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=enable_gqa)
    return out.transpose(0, 1)


def without_groups(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, 0)):
    """As torch 2.11 has it."""
    return by_mask(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)


def first_form(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """As torch 2.10 has it: neither groups nor windows."""
    assert is_causal
    return by_mask(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k)


@pytest.fixture
def varlen(monkeypatch):
    """Put a function in the place of torch's kernel."""
    attention._varlen_arguments.cache_clear()
    pytest.importorskip("torch.nn.attention.varlen", reason="came with torch 2.10")
    yield lambda function: monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    attention._varlen_arguments.cache_clear()


@pytest.mark.parametrize("kernel", [by_mask, without_groups, first_form])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_all_rows_at_once_are_asked_for_as_torch_takes_them(window, groups, kernel, varlen, monkeypatch):
    varlen(kernel)
    monkeypatch.setattr(attention, "_is_recent", lambda device: True)
    has_kernel = attention.has_varlen(torch.device("cuda"), window)
    assert has_kernel == (window is None or kernel is not first_form)
    if not has_kernel:
        return
    q, k, v = (torch.randn(1, n, 13, 8) for n in (4, groups, groups))
    found = by_varlen(q, k, v, layout(*LENGTHS), window)
    torch.testing.assert_close(found, by_row(q, k, v, LENGTHS, 0.0, window), atol=1e-6, rtol=1e-5)


def test_a_layout_of_rows_that_share_their_beginning():
    """The one in the docstring of SequenceLayout."""
    found = SequenceLayout.of(torch.tensor([3, 4, 2]), 4, packed=False, shared=[0, 2, 0])
    assert (found.lengths, found.shared, found.max_length, found.max_keys) == ((3, 2, 2), (0, 2, 0), 3, 4)
    assert found.positions.tolist() == [[0, 1, 2, 2, 3, 0, 1]] and found.indices.tolist() == [0, 1, 2, 6, 7, 8, 9]
    assert found.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6] and found.cu_seqlens_k.tolist() == [0, 3, 7, 9]
    assert SequenceLayout.of(torch.tensor([3, 4, 2]), 9, True, [0, 2, 0]).indices.tolist() == [0, 1, 2, 5, 6, 7, 8]
    plain = SequenceLayout.of(torch.tensor([3, 4]), 7, True, [0, 0])
    assert (plain.shared, plain.keys, plain.indices, plain.max_keys) == ((), None, None, 4)


@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("way", ["by_row", "by_varlen"])
def test_rows_that_share_their_beginning_equal_whole_rows(window, way, varlen, monkeypatch):
    varlen(by_mask)
    lengths, shared = (6, 7, 2, 5, 3), (0, 4, 0, 0, 2)
    rows = SequenceLayout.of(torch.tensor(lengths), sum(lengths), packed=True, shared=shared)
    whole = [torch.randn(1, n, sum(lengths), 8) for n in (4, 2, 2)]
    for x in whole:
        for n, before in enumerate(shared):
            start = sum(lengths[:n])
            x[:, :, start : start + before] = x[:, :, start - lengths[n - 1] :][:, :, :before]
    expected = by_row(*whole, lengths, window=window)[:, rows.indices]
    parts = [x[:, :, rows.indices] for x in whole]
    if way == "by_row":
        found = attend(*parts, rows, window=window)
    else:
        found = by_varlen(*parts, rows, window)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_all_rows_at_once_where_there_is_a_kernel_for_it(monkeypatch):
    """On fake tensors of a GPU, which need none: torch's own operator takes what it is given."""
    monkeypatch.setattr(attention, "_is_recent", lambda device: True)
    called = []
    for name in ("by_varlen", "by_row"):
        real = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, n=name, real=real: called.append(n) or real(*a))
    with FakeTensorMode():
        ends = torch.empty(4, dtype=torch.int32, device="cuda")
        rows = SequenceLayout(LENGTHS, torch.empty(1, 13, dtype=torch.long, device="cuda"), ends)
        for dtype, width, dropout, expected in (
            (torch.bfloat16, 16, 0.0, "by_varlen"),
            (torch.float16, 128, 0.0, "by_varlen"),
            (torch.float32, 16, 0.0, "by_row"),
            (torch.bfloat16, 12, 0.0, "by_row"),
            (torch.bfloat16, 16, 0.1, "by_row"),
        ):
            q, k, v = (torch.empty(1, n, 13, width, device="cuda", dtype=dtype) for n in (4, 2, 2))
            found = attend(q, k, v, rows, dropout=dropout)
            assert found.shape == (1, 13, 4, width) and found.dtype == dtype and found.device.type == "cuda"
            assert called.pop() == expected and not called
    assert not attention.has_varlen(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("shared", [(0, 0, 0, 0), (0, 0, 0, 100)])
def test_all_rows_at_once_on_a_gpu(window, groups, shared):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    lengths, found = (300, 1, 129, 594 + shared[-1]), []
    assert attention.has_varlen(torch.device("cuda"), window)
    for way in (by_varlen, by_row):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, n, 1024, 64, device="cuda", dtype=torch.bfloat16) for n in (8, groups, groups))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        rows = SequenceLayout.of(torch.tensor(lengths), sum(lengths), True, shared).to("cuda")
        by_lengths = (q, k, v, rows.lengths, 0.0, window)
        out = way(q, k, v, rows, window) if way is by_varlen else way(*by_lengths, shared=rows.shared)
        (out.float() * torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape)).sum().backward()
        found.append([out, *(x.grad for x in leaves)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=3e-2, rtol=3e-2)


def hidden_states(llm: LanguageModel, embeds, mask=None, positions=None, rows=None, lengths=None, outputs=None):
    """As `InternVL.forward` has them."""
    found = layout_of(embeds[..., 0], mask, positions, rows, lengths)
    if found is not None and llm.config.attention != "eager":
        return llm.packed(embeds, found, outputs)
    hidden = llm.padded(embeds, mask, positions, rows)
    return hidden if outputs is None else hidden.flatten(0, 1)[outputs]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_padded_batch_a_pack_and_rows_alone_agree_with_their_gradients(architecture):
    llm = tiny(architecture).language_model
    lengths = torch.tensor([9, 4, 6])
    rows = [torch.randn(int(n), 64) for n in lengths]
    alone = torch.cat([hidden_states(llm, row[None])[0] for row in rows])
    alone.square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in llm.named_parameters() if p.grad is not None}
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(9) < lengths[:, None]
    ids = torch.repeat_interleave(torch.arange(3), lengths)
    ids = torch.cat([ids, torch.tensor([-1, -1])])[None]
    positions = torch.cat([torch.arange(int(n)) for n in lengths] + [torch.zeros(2, dtype=torch.long)])[None]
    pack = torch.cat([*rows, torch.zeros(2, 64)])[None]
    for given in (
        (padded, mask, None, None, lengths),
        (padded, mask, None, None, None),
        (pack, ids >= 0, positions, ids, lengths),
        (pack, ids >= 0, positions, ids, None),
    ):
        llm.zero_grad()
        seen = []
        hook = llm.model.layers[0].mlp.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[:2]))  # noqa: B023
        found = hidden_states(llm, *given)
        hook.remove()
        assert seen == [(1, 19)], "padding was computed"
        kept = found[given[1]]
        torch.testing.assert_close(kept, alone, atol=1e-5, rtol=1e-5)
        assert not found[~given[1]].any()
        kept.square().sum().backward()
        for name, gradient in wanted.items():
            torch.testing.assert_close(
                dict(llm.named_parameters())[name].grad,
                gradient,
                atol=1e-4,
                rtol=1e-4,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_a_pack_makes_nothing_square():
    """4 rows of 256: with a square mask attention alone would keep 4 x 1024 x 1024 numbers."""
    llm = tiny("Qwen2ForCausalLM").language_model
    ids = torch.repeat_interleave(torch.arange(4), 256)[None]
    positions = torch.arange(256).repeat(4)[None]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, value.numel()) if isinstance(value, torch.Tensor) else largest
            return out

    with Watch(), torch.no_grad():
        hidden_states(llm, torch.randn(1, 1024, 64), ids >= 0, positions, ids, torch.full((4,), 256))
    assert 1024 * 64 <= largest < 1024 * 1024


def test_lengths_are_only_found_where_rows_are_whole_runs():
    assert lengths_of(None, None, None, 2, 5).tolist() == [5, 5]
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    assert lengths_of(mask, None, None, 2, 3).tolist() == [3, 1]
    assert lengths_of(mask.flip(1), None, None, 2, 3) is None
    positions, rows = torch.tensor([[0, 1, 0, 0]]), torch.tensor([[0, 0, 1, -1]])
    assert lengths_of(rows >= 0, positions, rows, 1, 4).tolist() == [2, 1]
    assert lengths_of(None, torch.tensor([[1, 2, 0, 0]]), rows, 1, 4) is None
    assert lengths_of(None, positions, torch.tensor([[0, 1, 0, -1]]), 1, 4) is None
    assert lengths_of(None, positions, torch.tensor([[-1, 0, 0, 1]]), 1, 4) is None


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_asked_for_some_tokens_the_last_block_computes_no_others(architecture, kernel, again):
    llm = tiny(architecture, attention=kernel).language_model.train()
    llm.model.checkpointing = again
    lengths = torch.tensor([9, 4, 6])
    padded = torch.randn(3, 9, 64, requires_grad=True)
    mask = torch.arange(9) < lengths[:, None]
    wanted = torch.tensor([2, 5, 8, 12, 18, 23])  # flattened; all of them tokens
    found = []
    for asked in (None, wanted):
        llm.zero_grad()
        padded.grad = None
        seen = []
        hook = llm.model.layers[-1].mlp.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[-2]))  # noqa: B023
        hidden = hidden_states(llm, padded, mask, None, None, lengths, asked)
        hidden = hidden.flatten(0, 1)[wanted] if asked is None else hidden
        hidden.square().sum().backward()
        hook.remove()
        found.append([hidden, padded.grad, *(p.grad.clone() for p in llm.parameters() if p.grad is not None)])
        assert set(seen) == {9 if kernel == "eager" else 19 if asked is None else len(wanted)}
    assert len(found[0]) == len(found[1]) > 10
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
