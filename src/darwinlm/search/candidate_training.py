"""Training before selection (section 3.2 of the paper): candidates a little, survivors on from where they stood."""

from __future__ import annotations

import copy
import tempfile
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.losses.gradients import CrossEntropyGradient, KLGradient
from darwinlm.losses.logits import Logits
from darwinlm.runtime import parallel
from darwinlm.training.optimizer_state import set_state, state_of
from darwinlm.types import Genome

KEPT_BYTES = 8 << 30  # of trained states in a GPU, or in all processes of a machine; the rest goes to temporary files


@dataclass
class Trained:
    """A candidate in training, and how many sequences it has seen.

    Weights that train are float32: at 1e-5 a bfloat16 step rounds away. All others are the candidate's, shared and
    frozen; embeddings and head always are.
    """

    model: PreTrainedModel
    optimizer: torch.optim.AdamW
    sequences: int

    @property
    def bytes(self) -> int:
        """Of the weights that train and of their two moments."""
        return 3 * sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)


class CandidateTrainer:
    """Trains candidates on prefixes of the same sequences, one AdamW step a sequence.

    A candidate trained on 10 and then on 50 sequences is, to the last bit, one that was trained on 50 at once. So what
    is kept saves time and decides nothing.

    Args:
        token_ids: to train on.
        learning_rate: constant.
        device: of the candidates.
        teacher: whose distribution they learn; None: the text's next tokens.
        trains: modules whose weights train; None: all of the blocks and the last norm.
    """

    def __init__(
        self,
        token_ids: Int[Tensor, "sequences length"],
        learning_rate: float,
        device: torch.device,
        teacher: PreTrainedModel | None = None,
        trains: Collection[str] | None = None,
    ):
        self.token_ids = token_ids
        self.learning_rate = learning_rate
        self.device = device
        self.teacher = teacher
        self.trains = trains
        self._wanted: dict[int, Tensor] = {}  # the teacher's last hidden states, by sequence: all candidates need them
        self._kept: dict[Genome, Trained] = {}
        self._spilled: dict[Genome, tuple[IO[bytes], int]] = {}

    def train(self, genome: Genome, candidate: PreTrainedModel, sequences: int) -> Trained:
        """The candidate after training on the first `sequences` sequences. Its own weights stay as they are."""
        trained = self._resume(genome, candidate, sequences)
        model: Any = trained.model.eval()  # no dropout: a score depends on the genome alone
        head = Logits(model)
        for sequence in range(trained.sequences, min(sequences, len(self.token_ids))):
            self._step(model, head, trained.optimizer, sequence, candidate.dtype)
        trained.sequences = sequences
        return trained

    def keep(self, genome: Genome, trained: Trained) -> None:
        """Remember where a candidate stands."""
        held = sum(state.bytes for state in self._kept.values())
        sharing = parallel.neighbours() if self.device.type == "cpu" else 1
        if held + trained.bytes <= KEPT_BYTES // sharing:
            self._kept[genome] = trained
        else:
            self._spill(genome, trained)

    def forget_all_but(self, genomes: Iterable[Genome]) -> None:
        """Forget where all other candidates stand."""
        wanted = set(genomes)
        self._kept = {genome: state for genome, state in self._kept.items() if genome in wanted}
        for genome in self._spilled.keys() - wanted:
            self._spilled.pop(genome)[0].close()

    def _resume(self, genome: Genome, candidate: PreTrainedModel, sequences: int) -> Trained:
        """Where the genome stood, if that is kept and is no further than `sequences`; else where it starts."""
        kept = self._kept.pop(genome, None)
        if kept is None and genome in self._spilled:
            kept = self._unspill(genome, candidate)
        return kept if kept is not None and kept.sequences <= sequences else self._start(candidate)

    def _start(self, candidate: PreTrainedModel) -> Trained:
        model = trainable_copy(candidate, self.trains)
        weights = [p for p in model.parameters() if p.requires_grad]
        return Trained(model, torch.optim.AdamW(weights, lr=self.learning_rate, weight_decay=0.0, fused=True), 0)

    def _step(self, model: Any, head: Logits, optimizer: torch.optim.AdamW, sequence: int, dtype: torch.dtype) -> None:
        ids, low = self.token_ids[sequence : sequence + 1].to(self.device), dtype == torch.bfloat16
        slope = self._slope(ids, sequence)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low):
            hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
            states = hidden[:, :-1].flatten(0, 1)
            gradient = head.gradient(states, slope)
        states.backward(gradient)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _slope(self, ids: Int[Tensor, "one length"], sequence: int) -> CrossEntropyGradient | KLGradient:
        """Of the mean loss over the tokens that have a next one."""
        if self.teacher is None:
            return CrossEntropyGradient(ids[:, 1:].flatten())
        if sequence not in self._wanted:
            with torch.no_grad():
                hidden = self.teacher.get_decoder()(ids, use_cache=False).last_hidden_state
            self._wanted[sequence] = hidden[:, :-1].flatten(0, 1)
        wanted = self._wanted[sequence]
        return KLGradient(Logits(self.teacher), wanted, len(wanted))

    def _spill(self, genome: Genome, trained: Trained) -> None:
        file = tempfile.TemporaryFile()  # noqa: SIM115, it has no name and is gone with the process
        weakref.finalize(self, file.close)
        torch.save(state_of(_training(trained.model), trained.optimizer), file)
        self._spilled[genome] = file, trained.sequences

    def _unspill(self, genome: Genome, candidate: PreTrainedModel) -> Trained:
        file, sequences = self._spilled.pop(genome)
        trained = self._start(candidate)
        with file:
            file.seek(0)
            set_state(_training(trained.model), trained.optimizer, torch.load(file, map_location=self.device))
        trained.sequences = sequences
        return trained


def _training(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_copy(candidate: PreTrainedModel, trains: Collection[str] | None = None) -> PreTrainedModel:
    """A copy with float32 weights of its own where it trains (`CandidateTrainer`); the rest shared and frozen."""
    ends = (candidate.get_input_embeddings(), candidate.get_output_embeddings())
    shared = {id(weight) for module in ends if module is not None for weight in module.parameters()}
    wanted = None if trains is None else {f"{path}.weight" for path in trains}
    shared |= {id(weight) for name, weight in candidate.named_parameters() if wanted is not None and name not in wanted}
    copies = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False)
        if id(weight) in shared
        else nn.Parameter(weight.detach().to(torch.float32, copy=True))
        for weight in candidate.parameters()
    }
    return copy.deepcopy(candidate, dict(copies))


@contextmanager
def rounded(trained: PreTrainedModel, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """The trained model as it is scored, in the precision of the search; afterwards it has its own weights again."""
    exact = [(weight, weight.data) for weight in trained.parameters() if weight.requires_grad]
    try:
        for weight, data in exact:
            weight.data = data.to(dtype)
        yield trained
    finally:
        for weight, data in exact:
            weight.data = data
