"""RMS norms on a GPU: PyTorch's kernel computes what transformers' modules do, and keeps less."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from job.train.norms import fuse_norms

ROUNDING = 1e-2  # relative, of bfloat16
HIDDEN = 4096


def test_one_kernel_computes_the_same_and_keeps_the_input_as_it_is() -> None:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 8}
    plain = LlamaForCausalLM(LlamaConfig(**sizes)).model.norm.to("cuda", torch.bfloat16)
    torch.nn.init.uniform_(plain.weight, 0.2, 2.0)
    fused = copy.deepcopy(plain)
    assert fuse_norms(fused) == 1
    found = []
    for norm in (plain, fused):
        torch.manual_seed(0)
        hidden = torch.randn(512, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            before = torch.cuda.memory_allocated()
            output = norm(hidden)
            kept = torch.cuda.memory_allocated() - before
        (gradient,) = torch.autograd.grad(output, hidden, torch.ones_like(output).mul_(torch.arange(HIDDEN).cuda() % 3))
        found.append((output, gradient, kept))
    (output, gradient, kept), (fused_output, fused_gradient, fused_kept) = found
    assert fused_output.dtype == torch.bfloat16
    for actual, expected in ((fused_output, output), (fused_gradient, gradient)):
        assert (actual - expected).float().norm() < ROUNDING * expected.float().norm()
    size = output.numel() * output.element_size()
    assert kept > 2 * size  # the input as float32, behind the output
    assert fused_kept < 1.1 * size
