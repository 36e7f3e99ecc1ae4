"""Training of candidates before selection (section 3.2 of the paper), which survivors of a stage continue."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.losses.gradients import CrossEntropyGradient, KLGradient
from darwinlm.losses.logits import Logits
from darwinlm.model.states import States
from darwinlm.runtime import parallel
from darwinlm.training.activations import recompute
from darwinlm.types import Genome

KEPT_BYTES = 8 << 30  # of trained states stay on a GPU, or in the memory of one machine, at most


@dataclass
class Trained:
    """A candidate in training, and the number of pieces of text that it has been trained on.

    Weights that train are float32, because at a learning rate of 1e-5 rounding to bfloat16 would undo a step. All other
    weights are frozen and shared with the candidate; input and output embeddings always are.
    """

    model: PreTrainedModel
    optimizer: torch.optim.AdamW
    pieces: int

    @property
    def bytes(self) -> int:
        """The size of the weights that train and of their two moments."""
        return 3 * sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)


class CandidateTrainer:
    """Trains candidates on the same pieces of text, with one AdamW step for each piece.

    A candidate that is trained on 10 pieces and later up to 50 equals, to the last bit, one that is trained on 50 at
    once. The states that `keep` holds therefore save time and never change a result. Nothing is written to the disk: on
    a GPU, a survivor that is trained again has its state long before a file could be written and read.

    Args:
        pieces: the text to train on. Candidates are trained on as many tokens as some of the first pieces have.
        learning_rate: the constant learning rate.
        device: where the candidates are.
        teacher: the model whose distribution the candidates learn; if None, they learn the text's next tokens.
        taught: makes the teacher's last hidden states on all pieces, if its blocks are not on the device.
        trains: paths of the modules whose weights train; if None, all weights of the blocks and of the final norm do.
        kept_bytes: the most that trained states take on the device; other candidates are trained again.
        counts: for each piece, whether the prediction after each token counts; if None, all do. A piece in which none
            does makes no step.
    """

    def __init__(
        self,
        pieces: Sequence[Int[Tensor, "1 piece_length"]],
        learning_rate: float,
        device: torch.device,
        teacher: PreTrainedModel | None = None,
        trains: Collection[str] | None = None,
        kept_bytes: int = KEPT_BYTES,
        taught: Callable[[], States] | None = None,
        counts: Sequence[Bool[Tensor, "1 piece_length"]] | None = None,
    ):
        self.pieces = pieces
        self.counts = counts
        self.learning_rate = learning_rate
        self.device = device
        self.teacher = teacher
        self.trains = trains
        self.kept_bytes = kept_bytes
        self._ends = list(accumulate(piece.numel() for piece in pieces))  # in tokens
        self.taught = taught
        self._teacher_states: dict[int, Tensor] = {}  # its last hidden states by piece, which all candidates need
        self._all_states: States | None = None
        self._kept: dict[Genome, Trained] = {}

    def train(self, genome: Genome, stitch: Callable[[], PreTrainedModel], tokens: int) -> Trained:
        """Return a candidate trained on the first `tokens` tokens.

        Args:
            stitch: makes the candidate, whose weights do not change.
        """
        pieces = bisect_right(self._ends, tokens)
        kept = self._kept.pop(genome, None)
        trained = kept if kept is not None and kept.pieces <= pieces else self._start(stitch())
        model: Any = trained.model.eval()  # no dropout: a score depends on the genome alone
        if self.device.type != "cpu":
            recompute(model)
        logits = Logits.of(model)
        for piece in range(trained.pieces, pieces):
            self._step(model, logits, trained.optimizer, piece)
        trained.pieces = pieces
        model.eval()
        return trained

    def keep(self, genome: Genome, trained: Trained) -> None:
        """Keep the state of a candidate's training for a later `train` to continue from, if there is room for it."""
        held = sum(state.bytes for state in self._kept.values())
        sharing = parallel.neighbours() if self.device.type == "cpu" else 1
        if held + trained.bytes <= self.kept_bytes // sharing:
            self._kept[genome] = trained

    def forget_all_but(self, genomes: Iterable[Genome]) -> None:
        """Drop the kept states of all candidates other than these."""
        survivors = set(genomes)
        self._kept = {genome: state for genome, state in self._kept.items() if genome in survivors}

    def _start(self, candidate: PreTrainedModel) -> Trained:
        model = trainable_copy(candidate, self.trains)
        weights = [p for p in model.parameters() if p.requires_grad]
        return Trained(model, torch.optim.AdamW(weights, lr=self.learning_rate, weight_decay=0.0, fused=True), 0)

    def _step(self, model: Any, logits: Logits, optimizer: torch.optim.AdamW, piece: int) -> None:
        ids, low, rows = self.pieces[piece].to(self.device), model.dtype == torch.bfloat16, self._rows(piece)
        if not len(rows):  # no token is predicted from another
            return
        loss_gradient = self._loss_gradient(ids, piece, rows)
        # Without a cache of them, the weights in low precision are there for a block at a time.
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low, cache_enabled=False):
            hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
            states = hidden[0, rows]
            gradient = logits.gradient(states, loss_gradient)
        states.backward(gradient)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _rows(self, piece: int) -> Int[Tensor, " rows"]:
        """The places of a piece after which the prediction counts: at most all but the last."""
        count = self.pieces[piece].shape[1] - 1
        if self.counts is None:
            return torch.arange(count, device=self.device)
        return self.counts[piece][0, :count].nonzero().flatten().to(self.device)

    def _loss_gradient(
        self, ids: Int[Tensor, "1 piece_length"], piece: int, rows: Int[Tensor, " rows"]
    ) -> CrossEntropyGradient | KLGradient:
        """Return the gradient, for logits, of the mean loss over the predictions that count."""
        if self.teacher is None:
            return CrossEntropyGradient(ids[0, rows + 1])
        states = self._states(ids, piece, self.teacher)[rows]
        return KLGradient(Logits.of(self.teacher), states, len(states))

    @torch.no_grad()
    def _states(self, ids: Int[Tensor, "1 piece_length"], piece: int, teacher: Any) -> Tensor:
        """The teacher's last hidden states on all tokens of a piece but the last."""
        if self.taught is not None:
            self._all_states = self._all_states or self.taught()
            return self._all_states.read(piece)[:, :-1].flatten(0, 1)
        if piece not in self._teacher_states:
            hidden = teacher.get_decoder()(ids, use_cache=False).last_hidden_state
            self._teacher_states[piece] = hidden[:, :-1].flatten(0, 1)
        return self._teacher_states[piece]


def _training(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_copy(candidate: PreTrainedModel, trains: Collection[str] | None = None) -> PreTrainedModel:
    """Return a copy of a candidate whose training weights are its own and float32; others are shared and frozen.

    Args:
        trains: as for `CandidateTrainer`.
    """
    ends = (candidate.get_input_embeddings(), candidate.get_output_embeddings())
    shared = {id(weight) for module in ends if module is not None for weight in module.parameters()}
    names = None if trains is None else {f"{path}.weight" for path in trains}
    shared |= {id(weight) for name, weight in candidate.named_parameters() if names is not None and name not in names}
    copies = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False)
        if id(weight) in shared
        else nn.Parameter(weight.detach().to(torch.float32, copy=True))
        for weight in candidate.parameters()
    }
    return copy.deepcopy(candidate, dict(copies))


@contextmanager
def rounded(trained: PreTrainedModel, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """Round the trained weights of a model to `dtype`, as it is scored, and restore the exact weights afterwards."""
    exact = [(weight, weight.data) for weight in trained.parameters() if weight.requires_grad]
    try:
        for weight, data in exact:
            weight.data = data.to(dtype)
        yield trained
    finally:
        for weight, data in exact:
            weight.data = data
