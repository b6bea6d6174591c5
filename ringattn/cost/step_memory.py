"""Predicts the bytes that one rank of a training step allocates, by playing the step.

The step is played on a `Ledger` operation by operation: forward through the layers, loss, backward
with what checkpointing computes again, optimizer. Bytes are those of tensors; what an allocator
wastes, the device context and communication libraries come on top.
"""

from dataclasses import dataclass

from ringattn.cost.layer_tape import WIDE, LayerOps, layer_tape
from ringattn.cost.ledger import Ledger, Peak
from ringattn.cost.loss_memory import loss_bytes
from ringattn.cost.state_memory import states_of
from ringattn.cost.step_shapes import AttentionBytes, ModelShape, StepSettings
from ringattn.cost.tape import Kinds, Played, Tape

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer states"
GATHERED, REDUCED = "gathered or cast weights", "gradients on their way"
KEPT, AT_WORK = "kept activations", "layer at work"
ARENA, LOSS, INPUTS = "attention buffers", "loss", "inputs and tables"

_LAYER = Kinds(tensors=AT_WORK, grads=AT_WORK, weights=REDUCED, retained=KEPT)
_WHOLE = Kinds(tensors=KEPT, grads=AT_WORK, weights=REDUCED, retained=KEPT)
_AHEAD = 2
"""Layers whose offloaded tensors are on the device: the one at work, and one on its way."""


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


def step_memory(shape: ModelShape, settings: StepSettings, attention: AttentionBytes) -> StepMemory:
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
    """Plays one micro-batch and the optimizer step.

    Attributes:
        ledger: what is allocated. host: bytes of kept activations in host memory.
    """

    def __init__(
        self, shape: ModelShape, settings: StepSettings, attention: AttentionBytes
    ) -> None:
        self.shape, self.settings, self.attention = shape, settings, attention
        self.states = states_of(shape, settings)
        ops = LayerOps(shape, settings, settings.tokens)
        self.stream = ops.stream.nbytes
        self.first = layer_tape(shape, settings, attention)
        self.again = layer_tape(shape, settings, attention, again=True)
        self.final = Tape(ops=(ops.norm("x", "norm_out"),), given=(ops.stream,))
        self.keeps_all = settings.checkpointing == "none"
        self.ledger, self.host = Ledger(), 0.0
        if settings.offload_kept:
            self.host = shape.layers * (self.stream + self.first.retained)

    def play(self) -> None:
        """The whole step."""
        ledger, states, shape, tokens = self.ledger, self.states, self.shape, self.settings.tokens
        ledger.moment = "between steps"
        ledger.add(PARAMETERS, states.parameters)
        ledger.add(GRADIENTS, states.gradients)
        ledger.add(OPTIMIZER, states.optimizer)
        ledger.add(ARENA, self.attention.arena)
        if self.settings.device == "cpu":  # there host memory is the device's
            ledger.add(KEPT, self.host)
        ledger.moment = "forward"
        table = WIDE * tokens * shape.head_dim
        inputs = 3 * 8 * tokens + 2 * table  # tokens, labels, positions; cos, sin
        ledger.add(INPUTS, inputs - 2 * table)
        ledger.touch(INPUTS, 7 * table)  # angles are float64
        ledger.add(INPUTS, 2 * table)
        ledger.add(GATHERED, states.outer)
        ledger.add(KEPT, self.stream)  # the embedding's output
        layers = [self._forward(index) for index in range(shape.layers)]
        self._loss()
        ledger.add(REDUCED, states.bucket)
        for index in reversed(range(shape.layers)):
            self._backward(index, layers[index])
        self._embedding()
        ledger.free(REDUCED, states.bucket)
        ledger.free(INPUTS, inputs)
        ledger.moment = "optimizer"
        ledger.touch(OPTIMIZER, states.update)

    def _forward(self, index: int) -> Played:
        ledger, states = self.ledger, self.states
        if index == 0:
            ledger.add(GATHERED, states.behind)
        ledger.touch(GATHERED, states.behind)  # this gather's buffer, and the last one's
        ledger.add(GATHERED, states.layer + states.layer_kept)
        if self.keeps_all:
            played = self.first.forward(ledger, _WHOLE, grad=True, own_input=True)
        else:
            self._let_go(index)
            played = self.first.forward(ledger, _LAYER, grad=False, own_input=False)
            ledger.free(AT_WORK, self.first.output)
            ledger.add(KEPT, self.stream)
        if not states.stays:
            ledger.free(GATHERED, states.layer)
        return played

    def _let_go(self, index: int) -> None:
        """Offloaded tensors of the layer before the last one have left the device."""
        if self.settings.offload_kept and index >= _AHEAD:
            self.ledger.free(KEPT, self.stream + self.first.retained)

    def _loss(self) -> None:
        """Final norm, head and loss, and their backward at once."""
        ledger, loss = self.ledger, loss_bytes(self.shape, self.settings)
        ledger.moment = "loss"
        ledger.add(GATHERED, self.states.head)
        played = self.final.forward(ledger, _WHOLE, grad=True, own_input=True)
        hidden = self.final.output
        ledger.add(LOSS, loss.hidden_kept + loss.weight_kept)
        ledger.touch(LOSS, loss.work)
        ledger.free(KEPT, hidden)
        ledger.free(GATHERED, self.states.behind)
        if not self.keeps_all:  # autocast drops its copies when the forward ends
            ledger.free(GATHERED, self.states.layer_kept * self.shape.layers)
        ledger.moment = "backward of the loss"
        ledger.touch(LOSS, loss.back_work)
        ledger.free(GATHERED, self.states.head)
        # The gradient of the hidden states goes on. The weight's is added up: if tied, at the end.
        ledger.free(LOSS, loss.hidden_kept)
        ledger.add(AT_WORK, hidden)
        ledger.free(LOSS, loss.weight_kept)
        if self.shape.tied or self.settings.engine == "fsdp":
            ledger.add(REDUCED, self._head_gradient)
        self.final.backward(ledger, _WHOLE, played)

    @property
    def _head_gradient(self) -> float:
        """Bytes of the head's gradient as autograd passes it on."""
        narrow = self.settings.residual_bytes < WIDE
        return float((2 if narrow else WIDE) * self.shape.head_parameters)

    def _backward(self, index: int, played: Played) -> None:
        ledger, states = self.ledger, self.states
        ledger.moment = "backward of a layer"
        ahead = states.behind if index > 0 and not states.stays else 0.0
        ledger.add(GATHERED, ahead + (0.0 if states.stays else states.layer))
        tape, kinds = self.first, _WHOLE
        if not self.keeps_all:
            tape, kinds = self.again, _LAYER
            self._fetch(index)
            ledger.add(GATHERED, states.layer_kept)
            played = tape.forward(ledger, kinds, grad=True, own_input=False, stop=True)
        tape.backward(ledger, kinds, played)
        if not self.keeps_all:
            ledger.free(KEPT, self.stream + self.first.retained)
            ledger.free(KEPT, tape.retained)
        ledger.free(GATHERED, states.layer + ahead + states.layer_kept)
        self._reduce(tape.weight_gradients, states.layer_reduced, states.layer_shards, index)

    def _fetch(self, index: int) -> None:
        """The layer's offloaded tensors are there, and the next one's are fetched."""
        if self.settings.offload_kept and 0 < index <= self.shape.layers - _AHEAD:
            self.ledger.add(KEPT, self.stream + self.first.retained)

    def _reduce(self, made: float, buffer: float, shards: float, index: int) -> None:
        """Gradients on their way to their shards: the last buffer goes, a new one is filled."""
        ledger = self.ledger
        if index < self.shape.layers - 1:
            ledger.free(REDUCED, self.states.layer_reduced)
        ledger.add(REDUCED, buffer)
        ledger.free(REDUCED, made)
        ledger.add(GRADIENTS, shards)

    def _embedding(self) -> None:
        """The embedding's gradient is dense, as large as its weight."""
        ledger, shape, states = self.ledger, self.shape, self.states
        ledger.moment = "backward of the embedding"
        dense = self._head_gradient
        ledger.add(REDUCED, dense)
        ledger.free(AT_WORK, self.stream)
        held = dense
        if shape.tied:
            ledger.free(REDUCED, dense)  # added to the head's
        elif self.settings.engine == "fsdp":
            held = 2 * dense  # with the head's
        ledger.free(GATHERED, states.outer)
        self._reduce(held, states.outer_reduced, states.outer_shards, -1)
        ledger.touch(REDUCED, states.flush)
        ledger.free(REDUCED, states.outer_reduced)
