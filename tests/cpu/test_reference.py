"""The reference against PyTorch's attention, against a row-by-row computation, and against numbers made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fi_prefetch import reference

LENGTHS = [1, 5, 0, 16, 17, 64]


def decode(batch, **options):
    k, v = batch.cache[:, 0], batch.cache[:, 1]
    return reference.batch_decode(
        batch.q, k, v, *batch.table, kv_layout=batch.kv_layout, q_len_per_req=batch.q_len, **options
    )


def test_one_key_by_hand():
    q = torch.tensor([[[2.0, 0.0]]])
    k = torch.tensor([[[[3.0, 1.0]]]])
    v = torch.tensor([[[[10.0, 20.0]]]])
    o, lse = reference.batch_decode(q, k, v, torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1]), sm_scale=0.5)
    assert o.tolist() == [[[10.0, 20.0]]]
    assert lse.item() == pytest.approx(3.0 / math.log(2))


def test_two_keys_by_hand():
    # Logits ln 3 and 0: weights 3/4 and 1/4, a sum of 4, so an LSE of 2 bits.
    q = torch.tensor([[[math.log(3.0)]]])
    k = torch.tensor([[[[1.0]], [[0.0]]]])
    v = torch.tensor([[[[4.0]], [[8.0]]]])
    table = torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([2])
    o, lse = reference.batch_decode(q, k, v, *table, sm_scale=1.0)
    assert o.item() == pytest.approx(5.0)
    assert lse.item() == pytest.approx(2.0)
    # A sink of logit ln 4 doubles the sum.
    o, lse = reference.batch_decode(q, k, v, *table, sm_scale=1.0, sinks=torch.tensor([math.log(4.0)]))
    assert o.item() == pytest.approx(2.5)
    assert lse.item() == pytest.approx(3.0)
    # Only the newest token within a window of 0.
    o, lse = reference.batch_decode(q, k, v, *table, sm_scale=1.0, window_left=0)
    assert o.item() == pytest.approx(8.0)
    assert lse.item() == pytest.approx(0.0)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1)])
def test_equals_pytorch(make_batch, kv_layout, page_size, heads):
    batch = make_batch(LENGTHS, kv_layout=kv_layout, page_size=page_size, num_qo_heads=heads[0], num_kv_heads=heads[1])
    o, lse = decode(batch)
    for request, length in enumerate(LENGTHS):
        if not length:
            assert not o[request].any() and (lse[request] == -torch.inf).all()
            continue
        group = heads[0] // heads[1]
        keys, values = (t[request].transpose(0, 1).repeat_interleave(group, 0) for t in (batch.keys, batch.values))
        expected = torch.nn.functional.scaled_dot_product_attention(batch.q[request][:, None], keys, values)
        torch.testing.assert_close(o[request], expected[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window_left", [-1, 0, 3, 16, 1000])
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_masks_caps_and_sinks(make_batch, dense_decode, window_left, soft_cap, q_len, with_sinks):
    batch = make_batch([4, 5, 16, 17, 40], q_len=q_len)
    sinks = torch.linspace(-1.0, 2.0, 4) if with_sinks else None
    options = {"window_left": window_left, "sinks": sinks}
    o, lse = decode(batch, logits_soft_cap=soft_cap, **options)
    expected, expected_lse = dense_decode(batch, soft_cap=soft_cap, **options)
    torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing(make_batch):
    batch = make_batch([2, 0], q_len=3)
    o, lse = decode(batch)
    assert (lse == -torch.inf).all(1).tolist() == [True, False, False, True, True, True]
    assert not o[0].any() and not o[3:].any() and o.isfinite().all()
    o, lse = decode(batch, sinks=torch.full((4,), 2.0))
    assert lse[0].tolist() == pytest.approx([2.0 * reference.LOG2_E] * 4)
    assert not o[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn, torch.float8_e5m2])
def test_low_precision_inputs_are_exact(make_batch, dense_decode, dtype, kv_dtype):
    batch = make_batch(LENGTHS, dtype=dtype, kv_dtype=kv_dtype)
    o, lse = decode(batch, out_dtype=torch.float32)
    expected, expected_lse = dense_decode(batch)
    torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    rounded, _ = decode(batch)
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded, o.to(dtype), rtol=0, atol=0)


def test_scales(batch, dense_decode):
    o, lse = decode(batch, sm_scale=0.25, q_scale=2.0, k_scale=0.5, v_scale=3.0)
    expected, expected_lse = dense_decode(batch, sm_scale=0.25)
    torch.testing.assert_close(o.double(), 3 * expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_float64(batch, dense_decode):
    o, _ = decode(batch, compute_dtype=torch.float64, out_dtype=torch.float64)
    torch.testing.assert_close(o, dense_decode(batch)[0], rtol=1e-12, atol=1e-12)


def test_nan_stays_in_its_request(make_batch):
    batch = make_batch([20, 20], page_size=4)
    clean, _ = decode(batch)
    batch.cache[batch.indices[2].long(), :, 1] = torch.nan
    o, _ = decode(batch)
    assert o[0].isnan().all()
    assert torch.equal(o[1], clean[1])
    # ... and out of what the window hides.
    o, _ = decode(batch, window_left=3)
    assert o.isfinite().all()


def test_rotation_by_hand():
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]]).expand(3, 1, 4)
    rotated = reference.rotate(x, torch.tensor([0, 1, 2]), rope_scale=1.0, rope_theta=100.0)
    # The pairs are (x0, x2) at frequency 1 and (x1, x3) at frequency 100^-(1/2) = 0.1.
    for position in range(3):
        slow = 0.1 * position
        expected = [math.cos(position), -2 * math.sin(slow), math.sin(position), 2 * math.cos(slow)]
        assert rotated[position, 0].tolist() == pytest.approx(expected, abs=1e-6)
    halved = reference.rotate(x, torch.tensor([0, 2, 4]), rope_scale=2.0, rope_theta=100.0)
    torch.testing.assert_close(halved, rotated)


def test_rope_depends_on_distance_only(make_batch):
    batch = make_batch([9])
    o, lse = decode(batch, pos_encoding_mode="ROPE_LLAMA", rope_theta=50.0)
    # Rotate everything by 100 more, then attend without a position encoding.
    positions = torch.arange(9) + 100
    keys = reference.rotate(batch.keys[0], positions, 1.0, 50.0)
    batch.q[:] = reference.rotate(batch.q, positions[-1:], 1.0, 50.0)
    for token in range(9):
        batch.cache[batch.indices[0].long(), 0, token] = keys[token]
    shifted, shifted_lse = decode(batch)
    torch.testing.assert_close(o, shifted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, shifted_lse, rtol=1e-4, atol=1e-4)


def test_alibi():
    assert reference.alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    # ALiBi's published slopes of a model with 12 heads: 8 of the power of two, 4 between them.
    assert reference.alibi_slopes(12)[8:].tolist() == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    q = torch.zeros(1, 2, 4)
    k, v = torch.zeros(1, 2, 1, 4), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4)
    table = torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([2])
    o, _ = reference.batch_decode(q, k, v, *table, pos_encoding_mode="ALIBI")
    for head, slope in enumerate((2.0**-4, 2.0**-8)):
        assert o[0, head, 0].item() == pytest.approx(1 / (1 + math.exp(-slope)))
