from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

from apt_core.modeling import probe_layer
from apt_core.modeling.layers import RoPEProvider, TVAProvider
from apt_core.modeling.seeds import deterministic_kernels
from apt_plugins.flash_attn.layer import FlashTVAProvider
from apt_plugins.flash_attn.plugin import PLUGIN, apt_register_providers


def pair():
    settings = {"r": 2, "s": 2}
    sizes = {"d_model": 64, "num_heads": 4, "max_seq_len": 16, "position": RoPEProvider()}
    tva = TVAProvider(settings).create_layer(**sizes)
    flash = FlashTVAProvider(settings).create_layer(**sizes)
    return tva, flash


def test_flash_has_the_weights_of_tva_and_no_other():
    tva, flash = pair()
    shapes = {name: value.shape for name, value in tva.state_dict().items()}
    assert {name: value.shape for name, value in flash.state_dict().items()} == shapes
    flash.load_state_dict(tva.state_dict())


@pytest.fixture
def stub_kernel(monkeypatch):
    """A stand-in for the package: the kernel's layout, types and causality, on the CPU."""

    def flash_attn_func(q, k, v, *, dropout_p, causal, deterministic):
        asked.append(deterministic)
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert causal and dropout_p == 0
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2)

    asked: list[bool] = []
    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return asked


def test_flash_gives_what_tva_gives_to_the_kernels_precision(stub_kernel):
    tva, flash = pair()
    flash.load_state_dict(tva.state_dict())
    x = torch.randn(2, 9, 64)
    expected = tva(x)
    assert flash(x).dtype == torch.float32
    torch.testing.assert_close(flash(x), expected, rtol=0.02, atol=0.02)
    assert not torch.equal(flash(x), expected)


def test_the_kernel_is_deterministic_where_torch_is_to_be(stub_kernel):
    _, flash = pair()
    with deterministic_kernels(True):
        flash(torch.randn(1, 3, 64))
    flash(torch.randn(1, 3, 64))
    assert stub_kernel == [True, False]


def test_a_mask_goes_to_the_kernel_that_takes_one():
    tva, flash = pair()
    flash.load_state_dict(tva.state_dict())
    x, mask = torch.randn(2, 9, 64), torch.ones(9, 9, dtype=torch.bool)
    assert torch.equal(flash(x, mask=mask), tva(x, mask=mask))


def test_the_probe_finds_flash_unusable_on_a_cpu():
    assert "flash-attn runs on CUDA devices" in probe_layer(FlashTVAProvider(), "attention")


def test_the_plugin_says_what_its_provider_needs():
    spec, _ = apt_register_providers()
    assert (spec.key, spec.version, spec.section) == ("attention:flash_v2", "2.0.0", "model.tva")
    assert list(spec.requires) == ["flash-attn>=2.4"]
    assert not spec.default
    assert PLUGIN.version == "2.1.0"


def test_the_plugin_and_the_interfaces_are_read_without_torch():
    code = (
        "import sys, apt_plugins.flash_attn.plugin, apt_core.providers, apt_core.cache; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
