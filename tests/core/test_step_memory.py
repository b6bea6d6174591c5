"""The memory of a training step: what the player books, and how its sums behave."""

from dataclasses import replace

import pytest

from ringattn.cost.ledger import Ledger
from ringattn.cost.state_memory import states_of
from ringattn.cost.step_memory import step_memory
from ringattn.cost.step_shapes import AttentionBytes, Checkpointing, ModelShape, StepSettings
from ringattn.cost.tape import Kinds, Made, Op, Tape

SHAPE = ModelShape(
    layers=4, dim=256, heads=8, kv_heads=2, head_dim=32, ffn_dim=1024, vocab_size=1000, tied=False
)
SETTINGS = StepSettings(tokens=8192, ranks=4, engine="fsdp", device="cuda")
ATTENTION = AttentionBytes(arena=1e6, forward=4e6, backward=9e6, kept_rows=0.5)
MODES: tuple[Checkpointing, ...] = ("none", "attention", "sequence", "full")


def _variants() -> list[StepSettings]:
    made = []
    for engine in ("ddp", "fsdp", "deepspeed"):
        for mode in MODES:
            for tile in (None, 512):
                for bf16 in (False, True):
                    made.append(
                        replace(
                            SETTINGS,
                            engine=engine,
                            checkpointing=mode,
                            token_tile=tile,
                            bf16=bf16,
                            offload_kept=mode == "full",
                        )
                    )
    return made


def test_parameters_of_a_known_model() -> None:
    llama = ModelShape(
        layers=32, dim=4096, heads=32, kv_heads=8, head_dim=128, ffn_dim=14_336,
        vocab_size=128_256, tied=False,
    )  # fmt: skip
    assert llama.parameters == 8_030_261_248


@pytest.mark.parametrize("settings", _variants(), ids=lambda s: f"{s.engine}-{s.checkpointing}")
def test_everything_that_a_step_allocates_it_frees(settings: StepSettings) -> None:
    memory = step_memory(SHAPE, settings, ATTENTION)
    first, last = memory.moments[0], memory.moments[-1]
    assert first.moment == "between steps"
    assert last.moment == "optimizer"
    states = states_of(SHAPE, settings)
    grown = SHAPE.layers * states.layer_shards + states.outer_shards
    expected = first.nbytes + grown + states.update
    assert last.nbytes == pytest.approx(expected, abs=1.0)
    for moment in memory.moments:
        assert all(nbytes > -1e-3 for nbytes in moment.parts.values()), moment
        assert moment.nbytes == pytest.approx(sum(moment.parts.values()))
    assert memory.peak.nbytes == max(moment.nbytes for moment in memory.moments)


@pytest.mark.parametrize("mode", MODES)
def test_more_tokens_need_more(mode: Checkpointing) -> None:
    peaks = [
        step_memory(SHAPE, replace(SETTINGS, checkpointing=mode, tokens=tokens), ATTENTION)
        for tokens in (1024, 2048, 4096, 40_960)
    ]
    sizes = [memory.peak.nbytes for memory in peaks]
    assert sizes == sorted(set(sizes))


def test_what_is_kept_less_needs_less() -> None:
    def peak(**changes: object) -> float:
        return step_memory(SHAPE, replace(SETTINGS, **changes), ATTENTION).peak.nbytes

    by_mode = [peak(checkpointing=mode, token_tile=512) for mode in MODES]
    assert by_mode == sorted(by_mode, reverse=True)
    for mode in MODES[1:]:
        kept = peak(checkpointing=mode, token_tile=512)
        assert peak(checkpointing=mode, token_tile=512, offload_kept=True) < kept
        assert kept < peak(checkpointing=mode)
    assert peak(ranks=8) < peak(ranks=4) < peak(engine="ddp")


def test_offloaded_tensors_are_in_host_memory() -> None:
    plain = replace(SETTINGS, checkpointing="attention")
    inside = step_memory(SHAPE, plain, ATTENTION)
    outside = step_memory(SHAPE, replace(plain, offload_kept=True), ATTENTION)
    tokens = SETTINGS.tokens
    kept = 2 * tokens * (SHAPE.dim + SHAPE.q_width) + 4 * tokens * SHAPE.heads
    assert inside.host == 0
    assert outside.host == SHAPE.layers * kept
    # Two layers' worth stay on the device.
    loss = {m.moment: m.nbytes for m in inside.moments}["loss"]
    less = {m.moment: m.nbytes for m in outside.moments}["loss"]
    assert loss - less == (SHAPE.layers - 2) * kept


def test_a_tape_books_by_hand() -> None:
    """y = b(a(x)): a keeps its input and 5 bytes, b keeps its output."""
    tape = Tape(
        ops=(
            Op(takes=("x",), makes=(Made("h", 10.0),), keeps=("x",), saves=5.0, work=3.0),
            Op(takes=("h",), makes=(Made("y", 7.0),), keeps=("y",), back_work=20.0),
        ),
        given=(Made("x", 4.0),),
    )
    kinds = Kinds(tensors="t", grads="g", weights="w", retained="r")
    ledger = Ledger(moment="forward")
    ledger.add("t", 4.0)
    played = tape.forward(ledger, kinds, grad=True, own_input=True)
    assert ledger.live["t"] == 4 + 5 + 7  # x, what a saves, y
    assert ledger.peaks["forward"].nbytes == 4 + 10 + 5 + 7
    ledger.moment = "backward"
    ledger.add("g", 7.0)
    tape.backward(ledger, kinds, played)
    assert ledger.live == {"t": 7.0, "g": 4.0, "r": 0.0, "w": 0.0}  # y is its caller's; dx is left
    assert ledger.peaks["backward"].nbytes == 16 + 7 + 10 + 20
