"""Masks that only hide keys are exact on kernels without masks; others are recognised as such."""

import pytest
import torch

from flux2_pack.attention import dispatch, masks, reference
from flux2_pack.attention.adapter import Adapter
from flux2_pack.attention.masks import MaskMemory, attend_kept, kept_keys, normalise


def keep_of(batch=2, keys=50, hidden=7):
    keep = torch.ones(batch, keys, dtype=torch.bool)
    keep[0, :hidden] = False
    return keep


def additive(keep, value):
    return torch.zeros(keep.shape).masked_fill(~keep, value)


@pytest.mark.parametrize(
    "form",
    [
        lambda keep: keep[:, None, None],
        lambda keep: keep[:, None, None].expand(2, 4, 30, 50),
        lambda keep: keep[:, None, None].expand(2, 4, 30, 50).contiguous(),
        lambda keep: additive(keep, float("-inf"))[:, None, None],
        lambda keep: additive(keep, torch.finfo(torch.float32).min)[:, None, None],
        lambda keep: additive(keep, -65504.0).half()[:, None, None],
        lambda keep: keep[:, None],
    ],
)
def test_masks_that_hide_keys_are_recognised_and_exact(form):
    mask = normalise(form(keep_of()), 30)
    kept, why = kept_keys(mask)
    assert kept is not None, why
    q, k, v = torch.randn(2, 30, 4, 16), torch.randn(2, 50, 4, 16), torch.randn(2, 50, 4, 16)
    exact, exact_lse = reference.attend(q, k, v, mask=mask)

    def maskless(q, k, v, *, scale, need_lse):
        return reference.attend(q, k, v, scale=scale)

    out, lse = attend_kept(maskless, q, k, v, kept, scale=None, need_lse=True)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(lse, exact_lse)


@pytest.mark.parametrize(
    "mask, words",
    [
        (torch.ones(30, 50).tril().bool()[None, None], "differs between queries"),
        (torch.randn(1, 1, 1, 50), "bias"),
        (torch.zeros(1, 1, 1, 50, dtype=torch.bool), "every key"),
        (torch.stack([torch.ones(30, 50), torch.zeros(30, 50)])[None].bool(), "differs between queries or heads"),
    ],
)
def test_masks_that_do_more_are_not(mask, words):
    kept, why = kept_keys(mask)
    assert kept is None and words in why


def test_one_index_serves_a_batch_that_hides_the_same_keys():
    same = kept_keys(keep_of(1).expand(3, 50)[:, None, None])[0]
    different = kept_keys(keep_of(2)[:, None, None])[0]
    assert len(same.indices) == 1 and len(different.indices) == 2


def test_two_axes_are_read_as_core_reads_them():
    assert normalise(torch.zeros(30, 50), 30).shape == (1, 1, 30, 50)
    assert normalise(torch.zeros(1, 50), 30).shape == (1, 1, 1, 50)
    assert normalise(torch.zeros(2, 50), 30).shape == (2, 1, 1, 50)


def test_a_mask_is_examined_once_until_it_changes(monkeypatch):
    examined = []
    monkeypatch.setattr(masks, "kept_keys", lambda mask: examined.append(1) or (None, "x"))
    memory, mask = MaskMemory(), keep_of()[:, None, None]
    for _ in range(3):
        memory(mask, 30)
    assert len(examined) == 1
    mask[0, 0, 0, 0] = True
    memory(mask, 30)
    assert len(examined) == 2
    del mask
    assert not memory._seen


def test_masks_of_inference_mode_have_no_version_and_are_examined_again_each_forward_pass(monkeypatch):
    with torch.inference_mode():
        memory, mask = MaskMemory(), keep_of()[:, None, None].clone()
        assert len(memory(mask, 30)[0].indices) == 2
        mask[:] = True
        memory.forget()
        assert len(memory(mask, 30)[0].indices) == 1


def test_a_mask_that_is_changed_in_place_between_two_steps_is_examined_again():
    dispatcher = dispatch.AttentionDispatcher("sdpa-flash")
    with torch.inference_mode():
        q, k, v = (torch.randn(1, length, 2, 16) for length in (30, 50, 50))
        mask = keep_of(1)[:, None, None].clone()
        for step in range(2):
            with dispatcher.forward(step, 2):
                out = dispatcher.attend(q, k, v, mask=mask)[0]
            assert reference.relative_error(out, reference.attend(q, k, v, mask=mask)[0]) < 1e-5
            mask.logical_not_()


def test_an_adapter_is_asked_for_an_implementation():
    with pytest.raises(NotImplementedError, match="Adapter.run"):
        Adapter().attend(*(torch.zeros(1, 2, 1, 8) for _ in range(3)))
