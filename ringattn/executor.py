"""The executor: runs any plan. Per step it posts moves, launches kernels, applies what lands."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch.profiler import record_function

from ringattn.arena import Arena
from ringattn.errors import CommunicationError
from ringattn.kernels.block_matrix import Selection
from ringattn.kernels.merge import accumulator_dtype, merge_partial
from ringattn.parallel.fabric import Fabric, Handle
from ringattn.place import Place
from ringattn.program import Exchange, Message, Part, Program, Step
from ringattn.schedule import ACCUMULATORS, Channel, Lane, Op, Wire

Slot = tuple[torch.Tensor, ...]
Slots = dict[tuple[int, int], Slot]
_STATISTICS = {Channel.O: (1,), Channel.Q: (2, 3)}  # lse; lse and delta: no head dim, never rounded


def forward_home(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
) -> Slots:
    """Home slots of a forward run. A sink starts every row's lse at its logit, with value 0."""
    dtype = accumulator_dtype(q.dtype)
    out = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    if sinks is not None:
        lse.copy_(sinks)
    return {(Channel.Q, 0): (q,), (Channel.K, 0): (k, v), (Channel.O, 0): (out, lse)}


def backward_home(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
) -> Slots:
    """Home slots of a backward run; lse and delta = rowsum(dout * out) over the whole sequence."""
    dtype = accumulator_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    return {
        (Channel.Q, 0): (q, dout, lse, delta),
        (Channel.K, 0): (k, v),
        (Channel.DQ, 0): (dq,),
        (Channel.DKV, 0): (dk, dv),
    }


@dataclass(frozen=True)
class _Parcel:
    """A message's flat buffer, and its views: one list of tensors per part."""

    flat: torch.Tensor
    views: list[list[torch.Tensor]]


@dataclass(frozen=True)
class _Flight:
    """An exchange under way: its handle, and what is sent and received per peer."""

    handle: Handle
    exchange: Exchange
    sent: dict[int, _Parcel]
    inbox: dict[int, _Parcel]


@dataclass
class Run:
    """One execution of a program: its slots, and the exchanges under way.

    Attributes:
        program: this rank's steps.
        fabric: carries the messages.
        arena: memory of slots beyond home and of messages.
        slots: (channel, slot) -> tensors (B, rows, heads[, dim]); holds home slots at the start.
        scale, softcap: of the logits.
        selection: blocks selected at run time, for plans of routed masks.
        saved: the slots that the forward left, for a backward that starts from them.
        place: follows the run, also when it fails.
    """

    program: Program
    fabric: Fabric
    arena: Arena
    slots: Slots
    scale: float
    softcap: float | None
    selection: Selection | None = None
    saved: Slots = field(default_factory=dict)
    place: Place = field(default_factory=Place)
    _flying: dict[int, _Flight] = field(default_factory=dict)
    _spare: list[torch.Tensor] = field(default_factory=list)
    _whole: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.arena.reset(self._home(Channel.K)[0].device)
        for (channel, slot), rows, heads in self.program.slots:
            kept = self.saved.get((channel, slot), ())
            like = self._home(Channel(channel))[len(kept) :]
            made = kept + tuple(
                self.arena.take((t.shape[0], rows, heads, *t.shape[3:]), t.dtype, t.device)
                for t in like
            )
            self.slots[channel, slot] = made
            if channel in ACCUMULATORS:
                _clear(channel, made)
            elif self.program.kernel.reads_around:
                for tensor in made[len(kept) :]:
                    tensor.zero_()

    def _home(self, channel: Channel) -> Slot:
        return self.slots[int(channel), 0]

    def execute(self) -> None:
        """Runs every step."""
        name = self.program.schedule.direction
        for index, step in enumerate(self.program.steps):
            self.place.at(name, index)
            with record_function(f"ringattn {name} step {index} post"):
                self.post(index, step)
            with record_function(f"ringattn {name} step {index} compute"):
                self.compute(step)
            with record_function(f"ringattn {name} step {index} land"):
                self.land(index, step)
        self.place.leave()

    def post(self, index: int, step: Step) -> None:
        """Captures the sources of the step's moves and starts their exchanges."""
        rank = self.fabric.rank
        for exchange in step.posts:
            moved = f"ringattn move tag {exchange.tag} lane {Lane(exchange.lane).name.lower()}"
            with record_function(moved), self._naming(index, exchange):
                sent = {m.peer: self._pack(m) for m in exchange.sends}
                inbox = {m.peer: self._parcel(m) for m in exchange.recvs if m.peer != rank}
                handle = self.fabric.exchange(
                    [(peer, parcel.flat) for peer, parcel in sent.items() if peer != rank],
                    [(peer, parcel.flat) for peer, parcel in inbox.items()],
                    lane=exchange.lane,
                    long=exchange.long,
                    tag=exchange.tag,
                )
                if rank in sent:  # a local copy arrives from this rank itself
                    inbox[rank] = sent[rank]
            self._flying[exchange.tag] = _Flight(handle, exchange, sent, inbox)

    def compute(self, step: Step) -> None:
        """Launches the step's kernels, one per distinct operand tuple.

        None for a batch of no sequences: kernels need not bear tensors without elements.
        """
        if not self.slots[Channel.Q, 0][0].shape[0]:
            return
        self.place.move = None
        options = {"scale": self.scale, "softcap": self.softcap, "selection": self.selection}
        kernel = self.program.kernel
        for launch in step.launches:
            q, *rest = self.slots[Channel.Q, launch.qslot]
            k, v = self.slots[Channel.K, launch.kslot]
            if self.program.schedule.direction == "forward":
                out, lse = self.slots[Channel.O, launch.oslot]
                kernel.forward(q, k, v, launch.prepared, out, lse, **options)
            else:
                dout, lse, delta = rest
                (dq,) = self.slots[Channel.DQ, launch.oslot]
                dk, dv = self.slots[Channel.DKV, launch.gslot]
                kernel.backward(dout, q, k, v, lse, delta, launch.prepared, dq, dk, dv, **options)

    def land(self, index: int, step: Step) -> None:
        """Waits for the exchanges that end here; clears taken sources, then SETs, then ADDs."""
        flights = [self._flying.pop(tag) for tag in step.lands]
        arrived: list[tuple[Part, list[torch.Tensor]]] = []
        for flight in flights:
            with self._naming(index, flight.exchange):
                flight.handle.wait()
            for message in flight.exchange.recvs:
                arrived += zip(message.parts, flight.inbox[message.peer].views, strict=True)
            for part in (p for m in flight.exchange.sends for p in m.parts if p.take):
                _clear(part.key[0], self._select(part))
        arrived.sort(key=lambda pair: (pair[0].op, pair[0].order))
        for op, same in groupby(arrived, key=lambda pair: pair[0].op):
            if op == Op.SET:
                _copy((payload, self._select(part)) for part, payload in same)
            else:
                for part, payload in same:
                    _add(part, self._select(part), payload)
        for flight in flights:
            self._release([*flight.sent.values(), *flight.inbox.values()])

    @contextmanager
    def _naming(self, index: int, exchange: Exchange) -> Iterator[None]:
        """Turns a failure of the fabric into an error that names rank, step and move."""
        self.place.at(self.program.schedule.direction, index, exchange.tag)
        try:
            yield
        except RuntimeError as error:
            moves = ", ".join(
                f"{Channel(part.key[0]).name} rows {part.rows.start}:{part.rows.stop} "
                f"from rank {m.peer}"
                for m in exchange.recvs
                for part in m.parts[:1]
            )
            raise CommunicationError(
                f"rank {self.fabric.rank}: {self.program.schedule.direction} plan step {index}: "
                f"move {exchange.tag} ({moves or 'sends only'}) did not complete: {error}"
            ) from error

    def _select(self, part: Part) -> Slot:
        return tuple(t[:, part.rows, part.heads] for t in self.slots[part.key][part.skip :])

    def _layout(self, message: Message) -> list[tuple[int, int, torch.dtype, tuple[int, ...]]]:
        """(part, tensor, wire dtype, shape) of every piece, widest dtype first, so that each
        piece of the flat buffer is aligned."""
        pieces = []
        accumulator = self._home(_lse_channel(self.program.schedule.direction))[-1].dtype
        data = self._home(Channel.K)[0].dtype
        for number, part in enumerate(message.parts):
            for index, tensor in enumerate(self._select(part), start=part.skip):
                exact = index in _STATISTICS.get(Channel(part.key[0]), ())
                dtype = accumulator if exact or part.wire == Wire.ACCUMULATOR else data
                pieces.append((number, index, dtype, tuple(tensor.shape)))
        return sorted(pieces, key=lambda piece: -piece[2].itemsize)

    def _parcel(self, message: Message) -> _Parcel:
        """A flat buffer for a message, recycled from a landed one where that is large enough."""
        layout = self._layout(message)
        size = sum(_bytes(dtype, shape) for _, _, dtype, shape in layout)
        fitting = [b for b in self._spare if b.numel() >= size]
        if fitting:
            spare = min(fitting, key=torch.Tensor.numel)
            self._spare = [b for b in self._spare if b is not spare]
        else:
            spare = self.arena.take((size,), torch.uint8, self._home(Channel.K)[0].device)
        self._whole[spare.data_ptr()] = spare
        views: list[dict[int, torch.Tensor]] = [{} for _ in message.parts]
        offset = 0
        for number, index, dtype, shape in layout:
            end = offset + _bytes(dtype, shape)
            views[number][index] = spare[offset:end].view(dtype).view(shape)
            offset = end
        return _Parcel(spare[:size], [[part[index] for index in sorted(part)] for part in views])

    def _release(self, parcels: Iterable[_Parcel]) -> None:
        places = (parcel.flat.data_ptr() for parcel in parcels)
        self._spare += [self._whole.pop(place) for place in places if place in self._whole]

    def _pack(self, message: Message) -> _Parcel:
        parcel = self._parcel(message)
        parts = zip(message.parts, parcel.views, strict=True)
        _copy((self._select(part), views) for part, views in parts)
        return parcel


def _lse_channel(direction: str) -> Channel:
    """The home slot whose last tensor has the accumulators' dtype."""
    return Channel.O if direction == "forward" else Channel.Q


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count = dtype.itemsize
    for n in shape:
        count *= n
    return count


def _clear(channel: int, tensors: Slot) -> None:
    """Resets accumulators to the identity: zeros, and lse -inf."""
    for index, tensor in enumerate(tensors):
        exact = index in _STATISTICS.get(Channel(channel), ())
        tensor.fill_(-torch.inf if exact else 0.0)


def _copy(pairs: Iterable[tuple[Iterable[torch.Tensor], Iterable[torch.Tensor]]]) -> None:
    """Copies each source over its target, in one call: messages have many small parts, and a call
    for each would keep the host from running ahead of a GPU."""
    both = [(s, t) for sources, targets in pairs for s, t in zip(sources, targets, strict=True)]
    if both:
        torch._foreach_copy_([target for _, target in both], [source for source, _ in both])


def _add(part: Part, target: Slot, payload: list[torch.Tensor]) -> None:
    if part.key[0] == Channel.O:
        out, lse = target
        merge_partial(out, lse, payload[0].to(out.dtype), payload[1])
    else:
        for tensor, value in zip(target, payload, strict=True):
            tensor.add_(value)
