"""Predicts the bytes that one rank of a training step allocates, by playing the step.

The step is played on a `Ledger` operation by operation: forward through the layers, loss, backward
with what checkpointing computes again, optimizer. Bytes are those of tensors; what an allocator
wastes, the device context and communication libraries come on top (`step_fit.Reserve`).
"""

from dataclasses import dataclass

from ringattn.cost.layer_tape import WIDE, LayerOps
from ringattn.cost.ledger import Ledger, Peak
from ringattn.cost.loss_memory import loss_bytes
from ringattn.cost.state_memory import States, states_of
from ringattn.cost.step_shapes import AttentionBytes, ModelShape, StepSettings
from ringattn.cost.tape import Played, Tape

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer"
GATHERED, KEPT, AT_WORK = "gathered weights", "kept activations", "layer at work"
ARENA, LOSS, INPUTS, REDUCED = "attention buffers", "loss", "inputs and tables", "reduced gradients"


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Predicted bytes of one rank.

    Attributes:
        peak: the moment with most device bytes, with its parts.
        moments: the largest total of every moment, in order.
        host: bytes in host memory: what is offloaded.
    """

    peak: Peak
    moments: tuple[Peak, ...]
    host: float


def step_memory(
    shape: ModelShape, settings: StepSettings, attention: AttentionBytes
) -> StepMemory:
    """Predicts a step from the second on, when optimizer states and buffers exist.

    Args:
        shape: the model. settings: how it is run. attention: of the plan, for one layer.
    """
    player = _Player(shape, settings, attention)
    player.play()
    ledger = player.ledger
    return StepMemory(
        peak=ledger.peak(),
        moments=tuple(ledger.peaks.values()),
        host=player.states.host + player.host,
    )


class _Player:
    """Plays one micro-batch and the optimizer step."""

    def __init__(
        self, shape: ModelShape, settings: StepSettings, attention: AttentionBytes
    ) -> None:
        self.shape, self.settings, self.attention = shape, settings, attention
        self.ledger, self.host = Ledger(), 0.0
        self.states: States = states_of(shape, settings)
        self.ops = LayerOps(shape, settings, settings.tokens)
        self.stream = float(settings.residual_bytes * settings.tokens * shape.dim)
        self.layer: Tape = self.ops.whole(attention)
        final = (self.ops.norm("x", "norm_out"),)
        self.final = Tape(ops=final, given=("x", self.stream))

    def play(self) -> None:
        """The whole step."""
        ledger, states, tokens = self.ledger, self.states, self.settings.tokens
        ledger.moment = "between steps"
        ledger.add(PARAMETERS, states.parameters)
        ledger.add(GRADIENTS, states.gradients)
        ledger.add(OPTIMIZER, states.optimizer)
        ledger.add(ARENA, self.attention.arena)
        ledger.moment = "forward"
        table = WIDE * tokens * self.shape.head_dim
        ledger.add(INPUTS, 3 * 8 * tokens)  # tokens, labels, positions
        ledger.touch(INPUTS, 7 * table)  # angles are float64
        ledger.add(INPUTS, 2 * table)
        ledger.add(GATHERED, states.outer)
        ledger.add(KEPT, self.stream)  # the embedding's output
        layers = [self._forward() for _ in range(self.shape.layers)]
        self._loss()
        for played in reversed(layers):
            self._backward(played)
        self._embedding()
        ledger.free(GATHERED, states.outer)
        ledger.free(INPUTS, 3 * 8 * tokens + 2 * table)
        ledger.moment = "optimizer"
        ledger.touch(OPTIMIZER, states.update)

    def _forward(self) -> Played:
        ledger, states = self.ledger, self.states
        ledger.add(GATHERED, states.layer * (1 + states.ahead))
        ledger.add(GATHERED, states.layer_kept)
        keep = self.settings.checkpointing == "none"
        played = self.layer.forward(ledger, KEPT, grad=keep, own_input=keep)
        ledger.free(GATHERED, states.layer * (1 + states.ahead))
        return played

    def _loss(self) -> None:
        """Final norm, head and loss, and their backward at once."""
        ledger, loss = self.ledger, loss_bytes(self.shape, self.settings)
        kept = self.states.layer_kept * self.shape.layers
        none = self.settings.checkpointing == "none"
        ledger.moment = "loss"
        played = self.final.forward(ledger, KEPT, grad=True)
        hidden = self.final.output[1]
        ledger.add(LOSS, loss.hidden_kept + loss.weight_kept)
        ledger.touch(LOSS, loss.work + loss.copy)
        ledger.free(KEPT, 0.0)
        if not none:
            ledger.free(GATHERED, kept)  # autocast drops its copies when the forward ends
        ledger.moment = "backward of the loss"
        ledger.free(KEPT, hidden)
        ledger.touch(LOSS, loss.back_work)
        # The gradient of the hidden states goes on; the weight's is added up, if tied at the end.
        ledger.free(LOSS, loss.hidden_kept)
        ledger.add(AT_WORK, hidden)
        if not self.shape.tied:
            ledger.free(LOSS, loss.weight_kept)
        self.final.backward(ledger, played, AT_WORK)

    def _backward(self, played: Played) -> None:
        ledger, states = self.ledger, self.states
        ledger.moment = "backward of a layer"
        ledger.add(GATHERED, states.layer * (1 + states.ahead))
        again = self.settings.checkpointing != "none"
        if again:
            ledger.add(GATHERED, states.layer_kept)
            played = self.layer.forward(ledger, AT_WORK, grad=True, own_input=False)
            ledger.free(AT_WORK, self.layer.output[1])
        ledger.add(REDUCED, states.layer_gradients)
        self.layer.backward(ledger, played, AT_WORK)
        if again:
            ledger.free(KEPT, self.stream)
        ledger.free(REDUCED, states.layer_gradients)
        ledger.free(GATHERED, states.layer * (1 + states.ahead) + states.layer_kept)

    def _embedding(self) -> None:
        """The embedding's gradient is dense, as large as its weight."""
        ledger, shape = self.ledger, self.shape
        ledger.moment = "backward of the embedding"
        ledger.touch(LOSS, (WIDE if self.settings.autocast else self.settings.compute_bytes)
                     * shape.head_parameters)
        ledger.touch(REDUCED, self.states.outer_gradients)
        ledger.free(AT_WORK, self.stream)
        if shape.tied:
            ledger.free(LOSS, WIDE * shape.head_parameters)
