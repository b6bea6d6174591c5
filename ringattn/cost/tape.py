"""A chain of operations played forward and backward on a ledger, as autograd would run it.

Sizes are all that it knows: which tensors an operation reads and makes, what its backward needs,
and its scratch. Lifetimes follow from that. A tensor goes when its last reader is done and no
backward needs it; a gradient goes when the operation that made its tensor has been differentiated;
what a backward needs goes once that backward has run.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from ringattn.cost.ledger import Ledger


@dataclass(frozen=True)
class Made:
    """A tensor: its name, the bytes of its gradient, and whether its own bytes are booked here."""

    name: str
    nbytes: float
    booked: bool = True

    @property
    def stored(self) -> float:
        """Bytes that it takes itself."""
        return self.nbytes if self.booked else 0.0


@dataclass(frozen=True, kw_only=True)
class Op:
    """One differentiable operation; sizes in bytes.

    Attributes:
        takes: tensors that it reads and that get gradients.
        makes: the tensors that it makes.
        keeps: tensors among `takes` and `makes` that its backward reads.
        saves: what its backward needs beside those.
        retains: what it leaves to a recomputation, whether or not a backward follows.
        holds: tensors that the caller still refers to while it runs.
        work, back_work: scratch of forward and backward, beyond operands and results.
        leaves: gradients of weights that stay when its backward is done.
        shares: its backward hands the gradient that it gets to every operand, and allocates none
            (a sum); operands in `casts` get a copy of their own.
        casts: see `shares`.
    """

    takes: tuple[str, ...]
    makes: tuple[Made, ...]
    keeps: tuple[str, ...] = ()
    saves: float = 0.0
    retains: float = 0.0
    holds: tuple[str, ...] = ()
    work: float = 0.0
    back_work: float = 0.0
    leaves: float = 0.0
    shares: bool = False
    casts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """The ledger's names for what a pass books.

    Attributes:
        tensors: operands, results, scratch and what is kept. grads: gradients of tensors.
        weights: gradients of weights. retained: see `Op.retains`.
    """

    tensors: str
    grads: str
    weights: str
    retained: str


@dataclass
class Played:
    """A tape between its forward and its backward.

    Attributes:
        kind: under which its tensors are booked.
        waiting: sizes of tensors that backwards need. readers: how many need each.
    """

    kind: str
    waiting: dict[str, float] = field(default_factory=dict)
    readers: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Tape:
    """Operations in order.

    Attributes:
        ops: the operations; what none of them takes is the output.
        given: tensors that they are given.
    """

    ops: tuple[Op, ...]
    given: tuple[Made, ...]

    @property
    def output(self) -> float:
        """Bytes of what the tape makes."""
        return sum(self._tensors[name].nbytes for name in self._outputs)

    @cached_property
    def _outputs(self) -> frozenset[str]:
        """Tensors that no operation takes."""
        taken = {name for op in self.ops for name in op.takes}
        return frozenset(made.name for op in self.ops for made in op.makes) - taken

    @property
    def weight_gradients(self) -> float:
        """Bytes that a backward leaves."""
        return sum(op.leaves for op in self.ops)

    @property
    def retained(self) -> float:
        """Bytes that a forward leaves to a recomputation."""
        return sum(op.retains for op in self.ops)

    @cached_property
    def _tensors(self) -> dict[str, Made]:
        return {m.name: m for m in (*self.given, *(m for op in self.ops for m in op.makes))}

    def forward(
        self, ledger: Ledger, kinds: Kinds, *, grad: bool, own_input: bool, stop: bool = False
    ) -> Played:
        """Plays the forward.

        Args:
            grad: keep what the backward needs.
            own_input: what is given is booked as `kinds.tensors` and goes when nothing needs it;
                else somebody else holds it.
            stop: end where the last tensor that a backward needs is there, as a checkpoint's
                recomputation does; then no output is booked.
        """
        kind, tensors, uses = kinds.tensors, self._tensors, Counter[str]()
        played = Played(kind)
        for op in self.ops:
            uses.update(op.takes + op.holds)
            played.readers.update(set(op.keeps) if grad else ())
        stays = self._outputs | ({made.name for made in self.given} if not own_input else set())
        last = max((i for i, op in enumerate(self.ops) if op.keeps or op.saves), default=0)
        there = {made.name for made in self.given}
        for index, op in enumerate(self.ops):
            if not stop or index < last:
                ledger.add(kinds.retained, op.retains)
                for made in op.makes:
                    ledger.add(kind, made.stored)
                    there.add(made.name)
                ledger.touch(kind, op.work)
            ledger.add(kind, op.saves if grad else 0.0)
            uses.subtract(op.takes + op.holds)
            for name in set(op.takes + op.holds) & there - stays:
                if not uses[name] and not played.readers[name]:
                    ledger.free(kind, tensors[name].stored)
        kept = {name for name, count in played.readers.items() if count}
        played.waiting = {name: tensors[name].stored for name in kept - stays}
        return played

    def backward(self, ledger: Ledger, kinds: Kinds, played: Played) -> None:
        """Plays the backward. The output's gradient is booked as `kinds.grads` before it, and those
        of what was given after it.

        What the forward retained stays for the caller to free, and so do gradients of weights.
        """
        tensors, kind = self._tensors, kinds.grads
        place: dict[str, str] = {name: name for name in self._outputs}
        owners = Counter(place.values())
        for op in reversed(self.ops):
            first = op.makes[0].name
            for name in op.takes:
                if op.shares and name not in op.casts and name not in place:
                    place[name] = place[first]
                    owners[place[first]] += 1
                elif name in place:  # the second gradient of a tensor is added to the first
                    ledger.touch(kind, 0.0 if op.shares else tensors[name].nbytes)
                else:
                    place[name] = name
                    owners[name] = 1
                    ledger.add(kind, tensors[name].nbytes)
            ledger.add(kinds.weights, op.leaves)
            ledger.touch(kind, op.back_work)
            for made in op.makes:
                where = place.pop(made.name)
                owners[where] -= 1
                if not owners[where]:
                    ledger.free(kind, tensors[where].nbytes)
            self._release(ledger, played, op)

    @staticmethod
    def _release(ledger: Ledger, played: Played, op: Op) -> None:
        ledger.free(played.kind, op.saves)
        for name in set(op.keeps):
            played.readers[name] -= 1
            if not played.readers[name] and name in played.waiting:
                ledger.free(played.kind, played.waiting.pop(name))
