"""The straight line from the face code to a person's weights, by least squares.

Steps down the diffusion loss teach the line colours and hardly any of the small shapes of a face, which are a few pixels of
a photo. Least squares count every component of a portrait alike. Each equation is of one component of one answer of the
base model: how it moves with the person's weights, which is a row of the Jacobian, and how far it ought to move with the
face code. One backward pass gives the rows of a whole batch. The answers are to portraits under so much noise that nothing
else than the weights can tell the small shapes, for there a picture's shapes are decided. The solution is the smallest
change, and it leaves the answers to the class prompt where they are. It has seen portraits alone, and costs other prompts
some of their words: steps down the usual loss have to follow.

Shape symbols: N answers, B people of a batch, K numbers of the face code, C components of a portrait, L layers.
Source: Levenberg, A Method for the Solution of Certain Non-Linear Problems in Least Squares, 1944, a step at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion import NoiseLevels, draw
from ..hypernet import HyperNet
from ..lidb import Factors
from ..prompt import CLASS_PROMPT
from .data.photos import in_threads
from .face_code import MOST_PHOTOS, Components, ridge_weights, root_of_region, shown_of
from .predicted import PeopleInBase

Context = Callable[[], AbstractContextManager[object]]
_SLOPE_RIDGE = 0.02  # of what is missed on the face code, as a share of the answers


@dataclass(frozen=True)
class LineConfig:
    """A step of least squares.

    Attributes:
        rows: equations of people.
        kept: equations that keep the class prompt; 0 lets it go.
        looked: further answers, which only tell how what is missed depends on the face code.
        batch: people at once.
        bins: noise levels are looked at in so many parts, since more noise leaves more to be missed.
        ridge: how much a small change is preferred, as a share of the rows' mean square.
        share: of the solution that is taken; the base model is not linear.
        noise: part of the noise schedule, 0 to 1.
    """

    rows: int = 2048
    kept: int = 512
    looked: int = 3072
    batch: int = 64
    bins: int = 3
    ridge: float = 0.3
    share: float = 0.6
    noise: NoiseLevels = field(default_factory=lambda: NoiseLevels(0.65, 1.0))


class Answers(NamedTuple):
    """Some answers of the base model.

    Attributes:
        sigma: (N,), their noise levels.
        code: (N, K), the face codes of the people.
        missed: (N, C), what each component misses, in units of its deviation.
        of: (N,), the component whose row is known.
        rows: (N, L · outputs), how that one moves with the person's weights; (N, 0) if nobody asked.
    """

    sigma: Tensor
    code: Tensor
    missed: Tensor
    of: Tensor
    rows: Tensor


class LineStep:
    """Steps of least squares on `HyperNet.direct`.

    Args:
        net: the hypernetwork, which has been trained.
        base: people, whose first photos are portraits, and the base model.
        config: settings.
        seed: of everything that is drawn.
        computing: context in which the networks compute, such as autocast.
    """

    def __init__(
        self, net: HyperNet, base: PeopleInBase, config: LineConfig, seed: int = 0, computing: Context = nullcontext
    ) -> None:
        self.net, self.base, self.config, self.computing = net, base, config, computing
        self.generator = torch.Generator().manual_seed(seed)
        self.people = base.people[:MOST_PHOTOS]
        portraits = torch.stack(in_threads(lambda person: shown_of(person, 0), self.people)).to(base.device)
        self.components = Components.of(portraits)
        self.used = min(net.config.code, len(self.components.variance))
        self.truth = self.components.codes(portraits, self.used)
        self.levels = config.noise.of(base.denoiser.sigmas())

    def __call__(self) -> dict[str, float]:
        """Take a step.

        Returns:
            ``missed`` before it, the mean square in units of the components' deviations, and ``change``, its size as a
            share of what there was.
        """
        config, prompt = self.config, self.base.net.prompt
        asked, looked = self.answers(config.rows, prompt), self.answers(config.looked, prompt, rows=False)
        rows, targets = asked.rows, self._targets(asked, looked)
        if config.kept:
            kept = self.answers(config.kept, CLASS_PROMPT).rows
            still = targets.new_zeros(len(kept), targets.shape[1])
            rows, targets = torch.cat([rows, kept]), torch.cat([targets, still])
        change = least_squares(rows, targets, config.ridge)
        line = self.net.direct.detach()
        change = config.share * change.mT.unflatten(1, line[:, 0].shape).transpose(0, 1).to(line)
        size = float(change.norm() / line.norm().clamp(min=1e-12))
        self.net.direct.data.add_(change)
        return {"missed": float(torch.cat([asked.missed, looked.missed]).square().mean()), "change": size}

    def answers(self, count: int, prompt: str, rows: bool = True) -> Answers:
        """Answers to noisy portraits of people who are predicted from another photo, ``count`` rounded up to batches."""
        parts = [self._batch(prompt, rows) for _ in range(-(-count // self.config.batch))]
        return Answers(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _targets(self, asked: Answers, looked: Answers) -> Tensor:
        """How far each asked component (N,) ought to move with the face code, (N, K): as what all of them miss."""
        sigma, code, missed = (torch.cat([one, other]) for one, other in zip(asked[:3], looked[:3], strict=True))
        edges = sigma.quantile(torch.linspace(0, 1, self.config.bins + 1)[1:-1].to(sigma))
        targets = asked.code.new_zeros(asked.code.shape)
        for number in range(self.config.bins):
            among, own = torch.bucketize(sigma, edges) == number, torch.bucketize(asked.sigma, edges) == number
            slopes = ridge_weights(code[among], missed[among], _SLOPE_RIDGE * int(among.sum()))
            targets[own] = slopes.mT[asked.of[own]]
        return targets

    def _batch(self, prompt: str, rows: bool) -> Answers:
        base, net, generator = self.base, self.net, self.generator
        numbers = torch.randperm(len(self.people), generator=generator)[: self.config.batch].tolist()
        people = [self.people[number] for number in numbers]
        last = [len(own.person.photos) - 1 for own in people]
        seen = [int(torch.randint(min(1, n), n + 1, (), generator=generator)) for n in last]
        portraits = [(number, 0) for number in numbers]
        weight = torch.ones(len(people), device=base.device)
        batch = draw(self.levels, base.latents(portraits), weight, generator)
        of = torch.randint(self.used, (len(people),), generator=generator).to(base.device)
        faces = base.faces.read([(own.person, n) for own, n in zip(people, seen, strict=True)]).to(base.device)
        with torch.no_grad(), self.computing():
            tokens = (faces if net.encoder is None else net.encode(faces)).float()
        code = net.code(tokens).float().detach()
        theta = net.start(code).detach().requires_grad_(rows)
        region = torch.stack(in_threads(lambda own: root_of_region(own, 0), people)).to(base.device)
        with torch.set_grad_enabled(rows), self.computing():
            factors = Factors(*net.factors(net.refined(theta, tokens)[-1]))
            answer = base.denoised(factors, batch, portraits, prompt)
        found = self.components.codes(answer.float() * region, self.used)
        missed = self.truth[numbers] - found.detach()
        moved = theta[:, :, :0]
        if rows:
            (moved,) = torch.autograd.grad(found.gather(1, of[:, None]).sum(), theta)
        return Answers(batch.sigma, code, missed, of, moved.detach().flatten(1).float())


def least_squares(rows: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """The smallest (P, K) whose products with rows (N, P) come near targets (N, K), for N below P.

    The ridge is a share of the rows' mean square.
    """
    gram = rows @ rows.mT
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return rows.mT @ torch.linalg.solve(gram, targets)
