"""Hugging Face checkpoints: the same logits, the same bits, and refusals."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ringattn.errors import UserError
from ringattn.launch import hf_weights
from ringattn.launch.hf_config import config_from_hf, config_to_hf, read_hf_config
from ringattn.launch.hf_rope import rope_from_hf, rope_to_hf
from ringattn.launch.hf_weights import HFWeights, parameter_shapes
from ringattn.launch.hf_writer import write_hf_folder
from ringattn.launch.model import Transformer, fill_weights, init_weights, random_weights
from ringattn.launch.model_config import ModelConfig, RopeScaling, model_config
from ringattn.launch.rope import rope_frequencies
from tests.launch.hf_checkpoints import (
    FAMILIES,
    build,
    logits_of,
    save,
)
from tests.ranks import run_ranks

TOKENS = torch.arange(2 * 24).view(2, 24) * 7 % 96


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, read by the package."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def load(folder: Path, cfg: ModelConfig | None = None) -> Transformer:
    cfg = cfg or read_hf_config(folder)
    model = Transformer(cfg)
    fill_weights(model, HFWeights(folder, cfg))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_bits(family: str, tmp_path: Path) -> None:
    """Theirs → ours → theirs: equal logits on both ways, equal bits at the end."""
    theirs = build(family)
    with torch.no_grad():
        expected = theirs(TOKENS, use_cache=False).logits
    ours = load(save(theirs, tmp_path / "theirs"))
    assert (logits_of(ours, TOKENS) - expected).abs().max() <= 1e-5 * expected.abs().max()

    state = dict(ours.named_parameters())
    shapes = parameter_shapes(ours.cfg)
    write_hf_folder(
        tmp_path / "ours", config_to_hf(ours.cfg, dtype="float32"), shapes, state.__getitem__,
        dtype=torch.float32, max_file_bytes=20_000,
    )  # fmt: skip
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    first, second = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    with torch.no_grad():
        assert torch.equal(again(TOKENS, use_cache=False).logits, expected)
    assert read_hf_config(tmp_path / "ours") == ours.cfg


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_bf16_bits(shard: str, tmp_path: Path) -> None:
    """bf16 files fill float32 parameters, and come out as they were."""
    folder = save(build("qwen2"), tmp_path / "theirs", torch.bfloat16, shard)
    ours = load(folder)
    state = dict(ours.named_parameters())
    write_hf_folder(
        tmp_path / "ours", config_to_hf(ours.cfg, dtype="bfloat16"), parameter_shapes(ours.cfg),
        state.__getitem__, dtype=torch.bfloat16,
    )  # fmt: skip
    first, second = stored(folder), stored(tmp_path / "ours")
    assert all(value.dtype == torch.bfloat16 for value in first.values())
    assert all(torch.equal(first[name], second[name]) for name in first)
    # With the checkpoint's dtype there is nothing to cast.
    half = Transformer(ours.cfg).to(torch.bfloat16)
    fill_weights(half, HFWeights(folder, ours.cfg))
    assert all(torch.equal(p, first[name]) for name, p in half.named_parameters())


def _fill_shards(rank: int, world: int, _group: Any, folder: Path) -> tuple[bool, int, int]:
    """Fills sharded parameters, both sources; counts the elements that the files gave."""
    mesh = init_device_mesh("cpu", (world,))
    cfg = read_hf_config(folder)
    whole, drawn, read = load(folder), Transformer(cfg), 0
    init_weights(drawn, 3)
    write = hf_weights.write_part

    def counting(tensor: torch.Tensor, source: Callable[..., torch.Tensor]) -> None:
        def counted(index: tuple[slice, ...]) -> torch.Tensor:
            nonlocal read
            values = source(index)
            read += values.numel()
            return values

        write(tensor, counted)

    hf_weights.write_part = counting
    try:
        equal, total = True, 0
        sources = (whole, HFWeights(folder, cfg)), (drawn, random_weights(cfg, 3))
        for model, fill in sources:
            for name, parameter in model.named_parameters():
                dim = 1 if name.endswith("o_proj.weight") else 0  # any dimension may be cut
                part = distribute_tensor(torch.full_like(parameter, math.nan), mesh, [Shard(dim)])
                assert isinstance(part, DTensor)
                fill(name, part)
                equal &= torch.equal(part.full_tensor(), parameter.detach())
                total += parameter.numel()
        return equal, read, total // len(sources)
    finally:
        hf_weights.write_part = write


def test_shards_read_their_own_rows(tmp_path: Path) -> None:
    model = build("qwen2, all window")
    folder = save(model, tmp_path / "theirs")
    results = run_ranks(3, _fill_shards, folder)  # 32 and 48 rows over 3: uneven shards
    assert all(equal for equal, _, _ in results)
    assert sum(read for _, read, _ in results) == results[0][2]
    assert max(read for _, read, _ in results) < 0.4 * results[0][2]


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {}}
    change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


_Q = "model.layers.0.self_attn.q_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: _edit(f, lambda s: s.pop(_Q)), f"{_Q}: is missing (1 of"),
    "unexpected": (
        lambda f: _edit(f, lambda s: s.update({"model.extra": torch.ones(1)})), "no parameter"
    ),
    "shape": (lambda f: _edit(f, lambda s: s.update({_Q: torch.ones(3, 2)})), "shape [3, 2]"),
    "dtype": (
        lambda f: _edit(f, lambda s: s.update({_Q: s[_Q].to(torch.int8)})), "dtype I8"
    ),
    "no file": (lambda f: (f / "model.safetensors").unlink(), "does not exist"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-9]
        ),
        "cannot be read",
    ),
    "a file elsewhere": (
        lambda f: _edit_index(f, lambda i: i["weight_map"].update({_Q: "../x.safetensors"})),
        "no file beside it",
    ),
    "a broken index": (lambda f: _edit_index(f, dict.clear), "cannot be read"),
    "a pickle": (
        lambda f: (
            (f / "model.safetensors").unlink(), torch.save({}, f / "pytorch_model.bin")
        ),
        "does not exist",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints(case: str, tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "theirs", shard="1GB")
    damage, words = DAMAGE[case]
    damage(folder)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_old_checkpoints_carry(tmp_path: Path) -> None:
    """Rotary buffers, and a copy of a tied head, are no parameters."""
    folder = save(build("llama tied, linear"), tmp_path / "theirs", shard="1GB")
    before = stored(folder)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": torch.ones(96, 32),
    }
    _edit(folder, lambda state: state.update(extra))
    model = load(folder)
    assert torch.equal(model.lm_head.weight, before["model.embed_tokens.weight"])


def test_digests_tell_weights_apart(tmp_path: Path) -> None:
    model = build("llama")
    folder, cfg = save(model, tmp_path / "theirs"), config_from_hf(model.config.to_dict() | {})
    before = HFWeights(folder, cfg).digest()
    assert HFWeights(folder, cfg).digest() == before
    with torch.no_grad():
        model.model.norm.weight += 1
    save(model, folder)
    assert HFWeights(folder, cfg).digest() != before


def test_ntk_scaling_is_a_larger_base() -> None:
    cfg = model_config("debug", rope_scaling=RopeScaling(kind="ntk", factor=8.0))
    theta, scaling = rope_from_hf(rope_to_hf(cfg), 64, "here")
    assert scaling is None
    torch.testing.assert_close(
        rope_frequencies(cfg.head_dim, theta, None),
        rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling),
    )


def test_shapes_without_a_type() -> None:
    with pytest.raises(UserError, match="qkv_bias and qk_norm"):
        config_to_hf(model_config("debug", qkv_bias=True, qk_norm=True), dtype="float32")
    # 5 heads of 16 over a width of 32: Llama's own check refuses that, Mistral has none.
    odd = model_config("debug", dim=32, heads=5, kv_heads=5, head_dim=16)
    assert config_to_hf(odd, dtype="float32")["model_type"] == "mistral"


def test_writing_over_something(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="not empty"):
        write_hf_folder(tmp_path, {}, {}, dict[str, torch.Tensor]().__getitem__,
                        dtype=torch.float32)  # fmt: skip
