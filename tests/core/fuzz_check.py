"""Holds one random case against the dense float64 reference, its plan's proof and its bytes."""

import math
import re

import torch

import ringattn as ra
from ringattn import UserError
from tests.core.cases import Inputs
from tests.core.exactness import poisoned_memory, same_bits, simulate_plan
from tests.core.fuzz_cases import draw_case, rules_broken
from tests.core.fuzz_sound import FuzzCase, torch_dtype

ALLOWED = {"float64": 1e-13, "float32": 16 * 2**-24, "bfloat16": 2**-7, "float16": 2**-10}
"""Error of a tensor, relative to its own size and to that of the terms that it is a sum of."""
TERMS = 0.5
"""Weight of the terms' size: sums whose terms cancel are not held to their own size alone."""


def check_seed(seed: int) -> dict[str, float]:
    """The errors of a seed's case by tensor, in parts of what is allowed.

    Raises:
        UserError: the library refuses the case, by a rule that the case breaks.
        AssertionError: anything else that is wrong, naming the case.
    """
    case = draw_case(seed)
    try:
        return check_case(case)
    except UserError:
        raise
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{case}") from error


def check_case(case: FuzzCase) -> dict[str, float]:
    """As `check_seed`, for a case."""
    broken = rules_broken(case)
    try:
        errors = _errors(case)
    except UserError as error:
        parts = error.what, error.rule, error.fix
        if "\n" in str(error) or not all(part.strip() for part in parts):
            raise AssertionError(f"not one clear line: {error!r}") from error
        if not any(re.search(pattern, str(error)) for pattern in broken):
            raise AssertionError(f"refused, and not by one of {broken}: {error}") from error
        raise
    if broken:
        raise AssertionError(f"not refused, though it breaks {broken}")
    return errors


def plan_of(case: FuzzCase) -> ra.Plan:
    """The plan of a case over simulated ranks."""
    mask, layout = case.mask.build(), case.layout
    context = ra.ContextParallel(
        case.world,
        heads=case.heads,
        head_dim=case.head_dim,
        dtype=torch_dtype(case.dtype),
        method=case.method,
        layout=layout if isinstance(layout, str) else layout.build(mask.seq_len, case.world),
        kernel=case.kernel,
        wire_dtype=torch_dtype(case.wire),
        cluster=case.cluster,
        ranks_per_node=case.node,
        options=case.options or None,
        layout_options=case.layout_options or None,
    )
    return context.plan(mask)


def inputs_of(case: FuzzCase, tokens: int) -> Inputs:
    """q, k, v and dout of a case in its dtype."""
    generator, dtype = torch.Generator().manual_seed(case.seed), torch_dtype(case.dtype)
    (q_heads, kv_heads), (qk_dim, v_dim) = case.heads, case.head_dim

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    return Inputs(
        q=draw(case.batch, tokens, q_heads, qk_dim),
        k=draw(case.batch, tokens, kv_heads, qk_dim),
        v=draw(case.batch, tokens, kv_heads, v_dim),
        dout=draw(case.batch, tokens, q_heads, v_dim),
        sinks=draw(q_heads) if case.sinks else None,
        softcap=case.softcap,
    )


def _errors(case: FuzzCase) -> dict[str, float]:
    with poisoned_memory():
        plan = plan_of(case)
        ra.verify(plan)
        x = inputs_of(case, plan.mask.seq_len)
        got = simulate_plan(plan, x, case.scale)
        again = plan_of(case)
        assert again.digest == plan.digest, "two plans of one case differ"
        assert same_bits(got, simulate_plan(again, x, case.scale)), "two runs differ in bits"
    want = ra.reference(*x.tensors[:3], plan.mask, x.dout, scale=case.scale, **x.extras)
    sizes, logits = _term_sizes(case, x)
    # What a score is rounded by grows with it, and its exponential is off by as much.
    bar = ALLOWED[case.dtype] * (1 + logits / 16)
    return {n: _error(getattr(want, n), getattr(got, n), s) / bar for n, s in sizes.items()}


def _error(ref: torch.Tensor, got: torch.Tensor, size: float) -> float:
    """||got - ref|| relative to ||ref|| + TERMS size; infinite for misplaced infinities and NaN."""
    assert ref.shape == got.shape, f"shape {tuple(got.shape)}, reference {tuple(ref.shape)}"
    ref, got = ref.double(), got.double()
    infinite = ref.isinf()
    same = torch.equal(ref[infinite], got[infinite]) and not got[~infinite].isinf().any()
    if not same or ref.isnan().any() or got.isnan().any():
        return math.inf
    difference = (got - ref)[~infinite].norm().item()
    bar = ref[~infinite].norm().item() + TERMS * size
    return difference / bar if bar > 0 else difference


def _term_sizes(case: FuzzCase, x: Inputs) -> tuple[dict[str, float], float]:
    """The norm that the terms of each result's sums have, as of random inputs; |q| |k| scale."""

    def rms(t: torch.Tensor) -> float:
        """Of a vector of one token and head."""
        return t.double().square().sum(-1).mean().sqrt().item() if t.numel() else 0.0

    q, k, v, dout = (rms(t) for t in x.tensors)
    scale = abs(case.scale) if case.scale is not None else case.head_dim[0] ** -0.5
    rows, group = x.q.shape[0] * x.q.shape[1], case.heads[0] // case.heads[1]
    queries, keys = math.sqrt(rows * case.heads[0]), math.sqrt(rows * case.heads[1] * group)
    sizes = {
        "out": queries * v,
        "lse": queries * (1 + scale * q * k),
        "dq": queries * scale * dout * v * k,
        "dk": keys * scale * dout * v * q,
        "dv": keys * dout,
    }
    if case.sinks:
        sizes["dsinks"] = queries * dout * v
    return sizes, scale * q * k
