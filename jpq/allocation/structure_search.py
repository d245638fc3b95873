"""Search for each layer's mask structure by policy gradient over (scheme, block size) of every layer.

Y. Gong et al., arXiv:2111.11581, after R. J. Williams, "Simple Statistical Gradient-Following Algorithms", Machine
Learning 1992.

| symbol | here | value |
|---|---|---|
| theta_l: logits over the choices of layer l | `StructureSearchResult.logits` | from 0 |
| R = accuracy - mu max(0, ms / limit - 1) | `reward` | mu 1 |
| R_bar <- .9 R_bar + .1 R | the baseline; starts at the first R | |
| theta_l += lr (R - R_bar) / s * grad log pi_l(choice) | | lr .1, 200 samples |

We differ: the paper has a recurrent controller, these logits are independent of each other. The advantage is divided by
s, the root of its own running mean square, since rewards of real tasks lie within a few points. A mapping to start from
(that of the rules) is evaluated first, and the likeliest choices at the end: the best mapping evaluated is the result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jpq.allocation.structure_latency import Latency, layer_ms, mapping_ms
from jpq.allocation.structure_projection import kept_share, project
from jpq.allocation.structure_rules import allowed_structures, apply_rules, is_hard_task
from jpq.compression.batchnorm import start_training
from jpq.compression.calibration import reestimate_batchnorm
from jpq.methods.compatibility import is_allowed
from jpq.methods.structures import parse_structure
from jpq.methods.table import Method
from jpq.tasks.data import Data
from jpq.tracing.forward import call_model
from jpq.tracing.network import Network
from jpq.tracing.sites import weight_layout
from jpq.types import DENSE, JpqError

SAMPLES = 200  # mappings drawn in a search

LR = 0.1  # learning rate of the logits

LATENCY_PENALTY = 1.0  # mu: weight of the relative latency above the limit in the reward

BASELINE_DECAY = 0.9  # of the moving averages of reward and squared advantage

EVALUATED_SAMPLES = 512  # held-out samples that a mapping is evaluated on

BATCHNORM_BATCHES = 5  # training batches that BatchNorm's statistics are re-estimated on after a projection

TRAINED_SHARE = 0.1  # share of the training data that mappings are trained on before they are evaluated


def search_mapping(
    method: Method,
    network: Network,
    model: nn.Module,
    data: Data,
    density: float,
    skip: Collection[str],
    *,
    pretrain: bool = False,
    lr: float = 1e-3,
    seed: int = 0,
    samples: int = SAMPLES,
    latency: Latency = layer_ms,
) -> tuple[StructureSearchResult, float]:
    """Search the most accurate mapping as fast as that of the rules: (the result, the latency limit in ms).

    Args:
        model: the trained float model; it is not changed.
        data: mappings are evaluated on the held-out split; the test split is not read.
        density: share of the weights that stays.
        skip: layers that stay dense.
        pretrain: whether each mapping is trained for an epoch of a tenth of the data before it is evaluated.
        lr: learning rate of that training.
        seed, samples: of the search.
    """
    allowed = is_allowed(method)
    hard_task = is_hard_task(network, data.example)
    start = apply_rules(network, density, hard_task, is_allowed=allowed, skip=skip, latency=latency)
    limit_ms = sum(mapping_ms(network, start, density, latency).values())
    latencies: dict[str, dict[str, float]] = {}
    for layer in network.layers:
        schemes = {DENSE: (DENSE,)} if layer.name in skip else allowed_structures(layer, allowed)
        structures = [structure for scheme in schemes.values() for structure in scheme]
        latencies[layer.name] = {s: latency(layer, s, kept_share(layer, s, density)) for s in structures}
    evaluator = MappingEvaluator(network, model, data, density, pretrain=pretrain, lr=lr)
    return search_structures(latencies, evaluator, limit_ms, start=start, seed=seed, samples=samples), limit_ms


@dataclass(frozen=True)
class StructureSearchResult:
    """The best mapping of a search, and the learned logits."""

    mapping: Mapping[str, str]  # layer -> structure
    reward: float
    accuracy: float  # as the evaluator gives it, in [0, 1]
    ms: float  # latency of one sample
    logits: Mapping[str, Tensor]  # layer -> one logit for each of its choices
    judged: int  # number of different mappings evaluated


def reward(accuracy: float, latency_ms: float, limit_ms: float, mu: float = LATENCY_PENALTY) -> float:
    """R: accuracy, less mu times the relative latency above the limit."""
    return accuracy - mu * max(0.0, latency_ms / limit_ms - 1)


def search_structures(
    latencies: Mapping[str, Mapping[str, float]],
    accuracy: Callable[[Mapping[str, str]], float],
    limit_ms: float,
    *,
    start: Mapping[str, str] | None = None,
    samples: int = SAMPLES,
    lr: float = LR,
    mu: float = LATENCY_PENALTY,
    seed: int = 0,
) -> StructureSearchResult:
    """Search the mapping of the best reward by policy gradient.

    Args:
        latencies: layer -> its choices -> milliseconds.
        accuracy: mapping -> held-out accuracy in [0, 1]; called once for each mapping.
        limit_ms: latency of the whole network above which the reward falls.
        start: a mapping that is evaluated before the samples.
        samples: mappings drawn from the policy.
        lr, mu: as in the table above.
        seed: seeds the draws.

    Raises JpqError where a layer has no choice, or a number makes no sense.
    """
    if not samples >= 1 or not lr >= 0 or not mu >= 0 or not limit_ms > 0:
        numbers = f"samples {samples}, lr {lr}, mu {mu}, limit {limit_ms} ms"
        raise JpqError(f"A search needs samples >= 1, lr >= 0, mu >= 0 and a limit above 0 ms, not {numbers}.")
    if not latencies or not all(latencies.values()):
        raise JpqError("A search over schemes needs at least one choice for every layer.")
    generator = torch.Generator().manual_seed(seed)
    names = {layer: tuple(choices) for layer, choices in latencies.items()}
    logits = {layer: torch.zeros(len(choices), dtype=torch.float64) for layer, choices in names.items()}
    known: dict[tuple[str, ...], tuple[float, float, float]] = {}  # mapping -> reward, accuracy, ms

    def evaluate(mapping: Mapping[str, str]) -> float:
        key = tuple(mapping[layer] for layer in names)
        if key not in known:
            total_ms = sum(latencies[layer][mapping[layer]] for layer in names)
            held_out = accuracy(mapping)
            known[key] = reward(held_out, total_ms, limit_ms, mu), held_out, total_ms
        return known[key][0]

    if start is not None:
        evaluate(start)
    mean, square = None, 0.0
    for t in range(1, samples + 1):
        choices = {x: int(torch.multinomial(theta.softmax(0), 1, generator=generator)) for x, theta in logits.items()}
        sample_reward = evaluate({layer: names[layer][i] for layer, i in choices.items()})
        mean = sample_reward if mean is None else BASELINE_DECAY * mean + (1 - BASELINE_DECAY) * sample_reward
        advantage = sample_reward - mean
        square = BASELINE_DECAY * square + (1 - BASELINE_DECAY) * advantage**2
        spread = (square / (1 - BASELINE_DECAY**t)) ** 0.5
        if spread > 0:
            _step_logits(logits, choices, lr * advantage / spread)
    evaluate({layer: names[layer][int(theta.argmax())] for layer, theta in logits.items()})
    key, (best_reward, best_accuracy, best_ms) = max(known.items(), key=lambda entry: entry[1][0])
    mapping = dict(zip(names, key, strict=True))
    return StructureSearchResult(mapping, best_reward, best_accuracy, best_ms, logits, len(known))


def _step_logits(logits: Mapping[str, Tensor], choices: Mapping[str, int], size: float) -> None:
    """Add `size` times the gradient of log pi of the choices to the logits, in place."""
    for layer, i in choices.items():
        gradient = -logits[layer].softmax(0)
        gradient[i] += 1
        logits[layer] += size * gradient


class MappingEvaluator:
    """Held-out accuracy of the float model with a mapping's weakest units zeroed, a proxy for accuracy after training.

    BatchNorm's statistics are re-estimated on a few training batches: without that nearly every mapping is at chance.
    """

    def __init__(
        self,
        network: Network,
        model: nn.Module,
        data: Data,
        density: float,
        *,
        pretrain: bool = False,
        lr: float = 1e-3,
    ):
        self.network, self.density, self.pretrain, self.lr = network, density, pretrain, lr
        self.task = data.task
        self.model = copy.deepcopy(model).eval()
        self.before = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.train = [batch for _, batch in zip(range(BATCHNORM_BATCHES), data.train.epoch(0), strict=False)]
        self.lesson = list(data.train.fixed_part(TRAINED_SHARE).epoch(0)) if pretrain else []
        self.held_out = data.held_out.fixed_part(EVALUATED_SAMPLES / data.held_out.size)
        self.known: dict[tuple[str, str], Tensor] = {}  # (layer, structure) -> projected weight

    def __call__(self, mapping: Mapping[str, str]) -> float:
        """Accuracy in [0, 1] of a mapping, independent of earlier calls."""
        self.model.load_state_dict(self.before)
        masked = {name: s for name, s in mapping.items() if s != DENSE}
        for name, structure in masked.items():
            self.weight(name).data.copy_(self.projected(name, structure))
        if self.pretrain:
            self._train(masked)
        reestimate_batchnorm(self.model, self.train)
        return self.task.evaluate(self.model, self.held_out)

    def weight(self, name: str) -> Tensor:
        """The weight of a layer as it stands."""
        return self.model.get_parameter(self.network.layer(name).weight)

    def projected(self, name: str, structure: str) -> Tensor:
        """The float model's weight with the weakest units zeroed."""
        if (name, structure) not in self.known:
            layer = self.network.layer(name)
            mask_structure = parse_structure(structure, weight_layout(layer))
            self.known[name, structure] = project(self.before[layer.weight], mask_structure, self.density)
        return self.known[name, structure]

    def _train(self, masked: Mapping[str, str]) -> None:
        """Train for one short epoch; masked weights stay zero."""
        start_training(self.model)
        optim = torch.optim.AdamW(self.model.parameters(), lr=self.lr, weight_decay=0.0)
        zeros = {name: self.projected(name, s) == 0 for name, s in masked.items()}
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of dropout
            for x, y in self.lesson:
                optim.zero_grad()
                self.task.output_loss(call_model(self.model, x), y).backward()
                optim.step()
                for name, zero in zeros.items():
                    self.weight(name).data[zero] = 0
        self.model.eval()
