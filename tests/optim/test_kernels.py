"""The Triton kernel against plain PyTorch: on a GPU, through Triton's interpreter, and compiled for
GPUs that are not here."""

import functools
import importlib
import importlib.util

import numpy
import pytest
import torch

from archscale.optim import orthogonalize
from archscale.optim.orthogonalize import plain_symmetric_product
from tests.optim.apart import run_apart

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
# Relative to the largest entry: rounding of the result, and of float32 sums.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7, "tf32": 2e-3}


def gpu(test):
    available = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    return pytest.mark.gpu(
        pytest.mark.skipif(not available, reason="needs a CUDA device and Triton")(test)
    )


def kernels():
    return importlib.import_module("archscale.optim.kernels")


def inputs(k, m, n, dtype, layout, device="cpu"):
    """X (k, m, n) with entries near 1/√n in a layout, and a symmetric (k, m, m)."""
    generator = torch.Generator().manual_seed(0)
    stored = {"rows": (k, m, n), "transposed": (k, n, m), "strided": (k, 2 * m, 3 * n)}[layout]
    X = (torch.randn(stored, generator=generator) / n**0.5).to(device, dtype)
    X = {"rows": X, "transposed": X.mT, "strided": X[:, ::2, 1::3]}[layout]
    S = torch.randn(k, m, m, generator=generator).to(device)
    return X, (S + S.mT).to(dtype)


def check(X, S, tolerance, config=None):
    """Without and with an addend, against products in float64."""
    product = X.double() @ X.mT.double()
    for args, expected in (((), product), ((S, 0.3, -2.0), 0.3 * product - 2.0 * S.double())):
        out = kernels().symmetric_product(X, *args, config=config)
        assert (out.dtype, out.is_contiguous()) == (X.dtype, True)
        assert (out - expected).abs().max() <= tolerance * expected.abs().max()
        assert torch.equal(out, out.mT)


# --- on a GPU


@gpu
@pytest.mark.parametrize("layout", ["rows", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("k", "m", "n"),
    [(1, 1, 1), (2, 1, 300), (3, 97, 61), (2, 512, 512), (2, 1000, 1500), (1, 2048, 512)],
)
def test_gpu_kernel_equals_float64(k, m, n, dtype, layout):
    check(*inputs(k, m, n, dtype, layout, "cuda"), TOLERANCE[dtype])


@gpu
def test_gpu_float32_follows_the_tf32_setting():
    X, S = inputs(2, 512, 700, torch.float32, "rows", "cuda")
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        check(X, S, TOLERANCE["tf32"])
        rounded = kernels().symmetric_product(X)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    exact = X.double() @ X.mT.double()
    assert (rounded - exact).abs().max() > 10 * (kernels().symmetric_product(X) - exact).abs().max()


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_configurations_agree_bitwise(dtype):
    """Which one the tuner picks may differ from run to run; a resumed run must not."""
    X, S = inputs(2, 640, 900, dtype, "rows", "cuda")
    outs = [
        kernels().symmetric_product(X, S, 0.3, -2.0, config=config) for config in kernels().CONFIGS
    ]
    assert all(torch.equal(out, outs[0]) for out in outs)


@gpu
@pytest.mark.parametrize("transposed", [False, True])
def test_gpu_offsets_beyond_31_bits(transposed):
    m, n = 512, 2**22 + 64
    if torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs 8 GB of free GPU memory")
    X = torch.zeros((1, n, m) if transposed else (1, m, n), dtype=torch.bfloat16, device="cuda")
    X = X.mT if transposed else X
    X[..., -1] = 1.0
    assert bool((kernels().symmetric_product(X) == 1).all())


@gpu
@pytest.mark.parametrize("shape", [(2, 512, 1024), (2, 1500, 600), (1024, 1024)])
def test_gpu_orthogonalize_equals_its_plain_form(monkeypatch, shape):
    module = importlib.import_module("archscale.optim.orthogonalize")
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0)).cuda()
    assert module._kernels() is kernels()
    with_kernel = orthogonalize(M).float()
    monkeypatch.setattr(module, "symmetric_product", plain_symmetric_product)
    plain = orthogonalize(M).float()
    # Two bfloat16 iterations that round differently are 0.007 apart; a wrong tile would be an error
    # of order 1.
    assert (with_kernel - plain).norm() < 0.03 * plain.norm()


# --- without a GPU


def interpreted():
    """Runs in a process of its own, with TRITON_INTERPRET set. Its products are NumPy's, which has
    no bfloat16."""
    module, configs = importlib.import_module("archscale.optim.orthogonalize"), kernels().CONFIGS
    for dtype in (torch.float32, torch.float16):
        for layout in ("rows", "transposed", "strided"):
            check(*inputs(2, 97, 70, dtype, layout), TOLERANCE[dtype], configs[-1])
    for k, m, n in ((1, 1, 1), (3, 64, 5), (1, 600, 3)):  # 600: more rows of tiles than one group
        check(*inputs(k, m, n, torch.float32, "rows"), TOLERANCE[torch.float32], configs[-1])
    check(*inputs(1, 150, 70, torch.float32, "rows"), TOLERANCE[torch.float32], configs[0])
    M = torch.randn(2, 70, 100, generator=torch.Generator().manual_seed(0))
    plain = [orthogonalize(each, dtype=torch.float32) for each in (M, M.mT)]
    module.symmetric_product = functools.partial(kernels().symmetric_product, config=configs[-1])
    for each, expected in zip((M, M.mT), plain):
        torch.testing.assert_close(
            orthogonalize(each, dtype=torch.float32), expected, rtol=1e-4, atol=1e-5
        )
    print("interpreted")


def compiled(capability: int):
    """Compiles the largest and the smallest configuration in bfloat16 for GPUs of this compute
    capability; needs none."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernels()._kernel
    for config in (kernels().CONFIGS[0], kernels().CONFIGS[-1]):
        constants = {
            "HAS_ADD": True,
            "PRECISION": "ieee",
            "x_n": 1,
            "add_n": 1,
            "out_n": 1,
            **config.kwargs,
        }
        types = dict.fromkeys(kernel.arg_names, "i32") | {"alpha": "fp32", "beta": "fp32"}
        types |= dict.fromkeys(("X", "ADD", "OUT"), "*bf16") | dict.fromkeys(constants, "constexpr")
        divisible = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(kernel.arg_names)
            if types[name] in ("i32", "*bf16")
        }
        source = ASTSource(
            kernel,
            types,
            {(kernel.arg_names.index(name),): value for name, value in constants.items()},
            divisible,
        )
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm[
            "ptx"
        ]
        assert {80: "mma.sync", 90: "wgmma.mma_async"}[capability] in ptx, "no tensor cores"
        assert "cp.async" in ptx, "loads do not overlap products"
    print("compiled")


@needs_triton
def test_interpreted_kernel_equals_float64(tmp_path):
    import triton

    if triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip(
            "the interpreter of Triton 3.6 fails with NumPy 2.4: int() of an array of one element"
        )
    assert "interpreted" in run_apart(
        "test_kernels", "interpreted()", tmp_path, TRITON_INTERPRET="1"
    )


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernel_compiles_to_tensor_core_instructions(tmp_path, capability):
    assert "compiled" in run_apart(
        "test_kernels", f"compiled({capability})", tmp_path, TRITON_INTERPRET="0"
    )


def test_no_kernel_on_a_cpu(monkeypatch):
    module = importlib.import_module("archscale.optim.orthogonalize")
    monkeypatch.setattr(module, "_kernels", lambda: pytest.fail("the kernel was asked for"))
    module.symmetric_product(torch.ones(1, module.KERNEL, 2))
