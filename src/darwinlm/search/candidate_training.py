"""Training of candidates before selection (section 3.2 of the paper), which survivors of a stage continue."""

from __future__ import annotations

import copy
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import IO, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.losses.gradients import CrossEntropyGradient, KLGradient
from darwinlm.losses.logits import Logits
from darwinlm.runtime import parallel
from darwinlm.runtime.scratch import scratch_writing
from darwinlm.training.optimizer_state import set_state, state_of
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
    once. The states that `keep` stores therefore save time and never change a result.

    Args:
        pieces: the text to train on. Candidates are trained on as many tokens as some of the first pieces have.
        learning_rate: the constant learning rate.
        device: where the candidates are.
        teacher: the model whose distribution the candidates learn; if None, they learn the text's next tokens.
        trains: paths of the modules whose weights train; if None, all weights of the blocks and of the final norm do.
        kept_bytes: the most that trained states take on the device; others go to temporary files.
    """

    def __init__(
        self,
        pieces: Sequence[Int[Tensor, "1 piece_length"]],
        learning_rate: float,
        device: torch.device,
        teacher: PreTrainedModel | None = None,
        trains: Collection[str] | None = None,
        kept_bytes: int = KEPT_BYTES,
    ):
        self.pieces = pieces
        self.learning_rate = learning_rate
        self.device = device
        self.teacher = teacher
        self.trains = trains
        self.kept_bytes = kept_bytes
        self._ends = list(accumulate(piece.numel() for piece in pieces))  # in tokens
        self._teacher_states: dict[int, Tensor] = {}  # its last hidden states by piece, which all candidates need
        self._kept: dict[Genome, Trained] = {}
        self._spilled: dict[Genome, tuple[IO[bytes], int]] = {}

    def train(self, genome: Genome, candidate: PreTrainedModel, tokens: int) -> Trained:
        """Return the candidate trained on the first `tokens` tokens. The weights of `candidate` do not change."""
        pieces = bisect_right(self._ends, tokens)
        trained = self._resume(genome, candidate, pieces)
        model: Any = trained.model.eval()  # no dropout: a score depends on the genome alone
        logits = Logits.of(model)
        for piece in range(trained.pieces, pieces):
            self._step(model, logits, trained.optimizer, piece, candidate.dtype)
        trained.pieces = pieces
        return trained

    def keep(self, genome: Genome, trained: Trained) -> None:
        """Keep the state of a candidate's training, so that a later `train` can continue from it."""
        held = sum(state.bytes for state in self._kept.values())
        sharing = parallel.neighbours() if self.device.type == "cpu" else 1
        if held + trained.bytes <= self.kept_bytes // sharing:
            self._kept[genome] = trained
        else:
            self._spill(genome, trained)

    def forget_all_but(self, genomes: Iterable[Genome]) -> None:
        """Drop the kept states of all candidates other than these."""
        survivors = set(genomes)
        self._kept = {genome: state for genome, state in self._kept.items() if genome in survivors}
        for genome in self._spilled.keys() - survivors:
            self._spilled.pop(genome)[0].close()

    def _resume(self, genome: Genome, candidate: PreTrainedModel, pieces: int) -> Trained:
        """Return the genome's kept state if it has seen at most `pieces` pieces, or else an untrained one."""
        kept = self._kept.pop(genome, None)
        if kept is None and genome in self._spilled:
            kept = self._unspill(genome, candidate)
        return kept if kept is not None and kept.pieces <= pieces else self._start(candidate)

    def _start(self, candidate: PreTrainedModel) -> Trained:
        model = trainable_copy(candidate, self.trains)
        weights = [p for p in model.parameters() if p.requires_grad]
        return Trained(model, torch.optim.AdamW(weights, lr=self.learning_rate, weight_decay=0.0, fused=True), 0)

    def _step(self, model: Any, logits: Logits, optimizer: torch.optim.AdamW, piece: int, dtype: torch.dtype) -> None:
        ids, low = self.pieces[piece].to(self.device), dtype == torch.bfloat16
        if ids.shape[1] == 1:  # no token is predicted from another
            return
        loss_gradient = self._loss_gradient(ids, piece)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low):
            hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
            states = hidden[:, :-1].flatten(0, 1)
            gradient = logits.gradient(states, loss_gradient)
        states.backward(gradient)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _loss_gradient(self, ids: Int[Tensor, "1 piece_length"], piece: int) -> CrossEntropyGradient | KLGradient:
        """Return the gradient, for logits, of the mean loss over all tokens of a piece but the last."""
        if self.teacher is None:
            return CrossEntropyGradient(ids[:, 1:].flatten())
        if piece not in self._teacher_states:
            with torch.no_grad():
                hidden = self.teacher.get_decoder()(ids, use_cache=False).last_hidden_state
            self._teacher_states[piece] = hidden[:, :-1].flatten(0, 1)
        states = self._teacher_states[piece]
        return KLGradient(Logits.of(self.teacher), states, len(states))

    def _spill(self, genome: Genome, trained: Trained) -> None:
        file = tempfile.TemporaryFile()  # noqa: SIM115, it has no name and disappears with the process
        weakref.finalize(self, file.close)
        with scratch_writing():
            torch.save(state_of(_training(trained.model), trained.optimizer), file)
        self._spilled[genome] = file, trained.pieces

    def _unspill(self, genome: Genome, candidate: PreTrainedModel) -> Trained:
        file, pieces = self._spilled.pop(genome)
        trained = self._start(candidate)
        with file:
            file.seek(0)
            set_state(_training(trained.model), trained.optimizer, torch.load(file, map_location=self.device))
        trained.pieces = pieces
        return trained


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
