"""Scaling laws at initialisation: norms, gradients and sensitivity against the skips' factors.

The abstract of ScaleLong (Huang et al. 2023) claims that the factors kappa_j of a U-Net's long
skips govern the norm of its features, the norm of its gradients, and the change of its output when
the input is perturbed. The form of its bounds on the first two is not among our sources. This probe
measures all three, first on a recursion that we built so that their means can be computed exactly,
then on the backbones of the study.

**The clean recursion** (network "recursion"). UNet(x) = h_0 with

    x_i = a_i(x_{i-1}),  x_0 = x;    h_N = middle(x_N);    h_{i-1} = b_i(kappa_i x_i + h_i)

for i = 1 .. N. Every block a_i, b_i and the middle one has l layers of width m without biases: all
but the last have weights N(0, 2/m) and a ReLU, the last is linear with weights N(0, 1/m). Each
layer then keeps the mean square of its input, in both directions, and nothing that is added is
correlated; so with S_i = sum of kappa_j^2 over j = i .. N, means over the weights are (a result
about this recursion, not a theorem of the paper)

====================================================  =========================================
value                                                 predicted
====================================================  =========================================
``forward`` ||h_0||^2 / ||x||^2                       1 + S_1
``forward_level`` ||h_i||^2 / ||x||^2                 1 + S_{i+1}
``gradient`` ||d loss / d b_1||^2 / (loss ||x||^2)    (l + 1) (1 + S_1)
``gradient_block`` the same of a_i, b_i, middle       (l + 1) (1 + S_i); the middle one: l + 1
``sensitivity`` ||UNet(x + d) - UNet(x)|| / ||d||     sqrt(1 + S_1), the root of the mean square
====================================================  =========================================

The first two are exact at any width, as is the last one for small d; the gradients' are exact but
for terms of order 1/m. Other blocks need other lines: a last layer with weights N(0, 2/m) doubles
the norm in every block, and one with a ReLU makes skip and main path correlate, so that norms grow
faster than S.

The loss is half the squared error ||h_0 - y||^2 whose error has length 1 and a random direction
that does not depend on the weights (the target y is put there), so that loss = 1/2. A block's
gradient is that of all its weights. The sensitivity of a draw is the root of the mean square over
``directions`` random d with ||d|| = ``perturbation`` ||x||.

``bound`` is a bound of the sensitivity as arXiv 2411.02149 restates ScaleLong's,

    sum over i of kappa_i M_0^i + c_0,    M_0 = max_i ||b_i o a_i||,    c_0 = M_0^N ||middle||,

where the choice of c_0 is ours and the norms are the largest singular values of Jacobians (by power
iteration, hence from below), b_i o a_i taken at x_{i-1}. ``operator_norm`` is M_0. No mean is
predicted for them. Random directions stay far below such a bound and are no test of it.

All scalings of one draw share their weights, input and directions.

**The backbones** (network = the backbone's name) at initialisation, each as training would start
it but with the skip scaling in question. They see ``samples`` images at noise levels drawn as in
training. Zero-initialised last layers let them output exactly or nearly zero, so everything is
measured on h, the output of the decoder block that consumes long skip 1 (per sample, all its
tokens or positions and channels): ``forward`` is the mean of ||h||^2 / ||x||^2, ``gradient`` the
squared norm of the gradient of all weights for an error of h as above (the mean of the loss over
the samples), divided by that loss and the mean of ||x||^2, and ``sensitivity`` the root of the mean
of ||h(x + d) - h(x)||^2 / ||d||^2, one random d per sample; x is the network's own input. Nothing
is predicted: blocks with normalisation and residual branches are not the recursion's, so only the
order of the scalings can be compared. ``sum_squares`` of learned scalings is that of the mean
gates.

Columns: network, family, skip_scaling, depth (number of long skips N), seed, quantity, where
(the feature h_i, block or weights that the row is about), sum_squares (of the factors that the
row's prediction is about: S_i), value, predicted, width and layers (of the recursion). All values
are without unit.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from study.backbones.base import Backbone
from study.diffusion import formulations
from study.files import canonical_json
from study.network import networks_of
from study.probes.base import DatasetSubject, Measured, StudySubject
from study.randomness import generator
from study.skips import constant_factors
from study.spec.probes import ScalingLaws
from study.spec.run import Spec
from study.spec.scalings import SkipScaling

ITERATIONS = 30
"""Steps of power iteration. The norms are then too small by 2 % at most, usually by far less."""

Block = Sequence[Tensor]
"""Weights [m, m] of a block, first layer first."""

Tape = list[tuple[Tensor, Tensor]]
"""(input, value before the nonlinearity) of layers, both [..., m], in order of execution."""


def measure(subject: StudySubject, options: ScalingLaws) -> Measured:
    """Rows of the clean recursion and of every backbone of the study (see the module)."""
    scalings = {text: SkipScaling.model_validate(text) for text in options.skip_scaling}
    backbones = _backbones(subject.specs)
    rows = []
    for depth in options.depths:
        for draw in range(options.draws):
            rows += _recursion_rows(subject, options, scalings, depth, draw)
    without = []
    for label, spec in backbones.items():
        found = [
            row
            for draw in range(options.backbone_draws)
            for row in _backbone_rows(subject, options, scalings, label, spec, draw)
        ]
        if options.backbone_draws and not found:
            without.append(label)
        rows += found
    return Measured.of_rows(rows, without_long_skips=without)


# --- the clean recursion -------------------------------------------------------------------------


def apply(block: Block, z: Tensor, tape: Tape | None = None) -> Tensor:
    """Output [..., m] of a block for inputs [..., m]; its layers are appended to ``tape``."""
    for number, weight in enumerate(block):
        before = z @ weight.T
        if tape is not None:
            tape.append((z, before))
        z = before if number == len(block) - 1 else before.relu()
    return z


class Recursion:
    """One draw of the clean recursion; its blocks by name: a_1 .. a_N, middle, b_1 .. b_N."""

    def __init__(
        self, subject: DatasetSubject, depth: int, width: int, layers: int, draw: int
    ) -> None:
        self.depth = depth
        indices = range(1, depth + 1)
        names = [*(f"a_{i}" for i in indices), "middle", *(f"b_{i}" for i in indices)]
        # Variance 2/m before a ReLU, which halves the mean square, and 1/m in the last layer.
        scale = torch.full((layers, 1, 1), (2 / width) ** 0.5, device=subject.device)
        scale[-1] = (1 / width) ** 0.5
        self.blocks = {
            name: subject.noise((layers, width, width), "recursion", depth, draw, name).mul_(scale)
            for name in names
        }

    def __call__(
        self, x: Tensor, factors: Tensor, tapes: Mapping[str, Tape] | None = None
    ) -> list[Tensor]:
        """h_0 .. h_N for inputs x [1 or S, V, m] and factors [S, N], each [S, V, m].

        h_N is [1, V, m] where x is. ``tapes``: a list for every block, which is filled.
        """

        def run(name: str, z: Tensor) -> Tensor:
            return apply(self.blocks[name], z, None if tapes is None else tapes[name])

        encoded = []
        for index in range(1, self.depth + 1):
            x = run(f"a_{index}", x)
            encoded.append(x)
        features = [run("middle", x)]
        for index in range(self.depth, 0, -1):
            skip = factors[:, index - 1, None, None] * encoded[index - 1]
            features.append(run(f"b_{index}", skip + features[-1]))
        return features[::-1]

    def gradients(self, x: Tensor, factors: Tensor, error: Tensor) -> dict[str, Tensor]:
        """||d loss / d block||^2 [S] by block, for an input x [m] and d loss / d h_0 = error [m].

        For one input the gradient of a layer is the outer product of its input and the gradient
        behind it, so its squared norm is the product of theirs.
        """
        tapes: dict[str, Tape] = defaultdict(list)
        inputs = x.expand(len(factors), 1, -1).clone().requires_grad_()
        with torch.enable_grad():
            output = self(inputs, factors, tapes)[0]
        layers = [(name, *layer) for name, tape in tapes.items() for layer in tape]
        behind = torch.autograd.grad(
            output, [before for _, _, before in layers], error.expand_as(output)
        )
        total = dict.fromkeys(self.blocks, torch.zeros(len(factors), device=x.device))
        for (name, z, _), gradient in zip(layers, behind, strict=True):
            product = z.detach().square().sum((1, 2)) * gradient.square().sum((1, 2))
            total[name] = total[name] + product
        return total

    def operator_norms(self, x: Tensor, start: Tensor) -> tuple[float, float]:
        """(M_0, ||middle||) at x [m]; ``start`` [N + 1, m] is where power iteration starts."""
        products = []
        for index in range(1, self.depth + 1):
            x, inner = jacobian(self.blocks[f"a_{index}"], x)
            _, outer = jacobian(self.blocks[f"b_{index}"], x)
            products.append(outer @ inner)
        products.append(jacobian(self.blocks["middle"], x)[1])
        matrices = torch.stack(products)
        v = start[:, :, None]
        for _ in range(ITERATIONS):
            v = matrices.mT @ (matrices @ (v / v.norm(dim=1, keepdim=True)))
        norms = (matrices @ (v / v.norm(dim=1, keepdim=True))).norm(dim=1).flatten()
        return norms[:-1].max().item(), norms[-1].item()


def jacobian(block: Block, z: Tensor) -> tuple[Tensor, Tensor]:
    """Output [m] of a block at z [m] and its Jacobian [m, m] there."""
    product: Tensor | None = None
    for number, weight in enumerate(block):
        product = weight if product is None else weight @ product
        z = weight @ z
        if number < len(block) - 1:
            product = product * (z > 0)[:, None]
            z = z.relu()
    return z, product


def bound(factors: Sequence[float], operator_norm: float, middle: float) -> float:
    """Bound of ||UNet(x + d) - UNet(x)|| / ||d||: sum kappa_i M_0^i + M_0^N ||middle||."""
    skips = sum(factor * operator_norm**i for i, factor in enumerate(factors, start=1))
    return skips + operator_norm ** len(factors) * middle


def _inner(depth: int) -> list[int]:
    """Levels i of inner features that are written down: a quarter, half, three quarters."""
    return sorted({depth * quarter // 4 for quarter in (1, 2, 3)} - {0})


@torch.no_grad()
def _recursion_rows(
    subject: DatasetSubject,
    options: ScalingLaws,
    scalings: Mapping[str, SkipScaling],
    depth: int,
    draw: int,
) -> Iterator[dict[str, Any]]:
    lists = {text: constant_factors(one, [0] * depth) for text, one in scalings.items()}
    constant = {text: factors for text, factors in lists.items() if factors is not None}
    if not constant:
        return
    network = Recursion(subject, depth, options.width, options.layers, draw)

    def noise(what: str, *shape: int) -> Tensor:
        return subject.noise((*shape, options.width), "recursion", depth, draw, what)

    factors = torch.tensor(list(constant.values()), device=subject.device)
    x, error = noise("input"), noise("error")
    size = x.square().sum()
    directions = noise("directions", options.directions)
    directions *= options.perturbation * x.norm() / directions.norm(dim=1, keepdim=True)
    # Index 0 is the input itself, the others are perturbed.
    features = network(torch.cat([x[None], x + directions])[None], factors)
    clean = [h[:, 0].square().sum(1).div(size).expand(len(constant)) for h in features]
    change = (features[0][:, 1:] - features[0][:, :1]).square().sum(2).mean(1)
    gain = (change.sqrt() / (options.perturbation * x.norm())).tolist()
    # loss = 1/2 for an error of length 1
    gradients = network.gradients(x, factors, error / error.norm())
    blocks = {name: (value / (0.5 * size)).tolist() for name, value in gradients.items()}
    largest, middle = network.operator_norms(x, noise("power iteration", depth + 1))

    inner, slope = _inner(depth), options.layers + 1
    for number, (text, kappas) in enumerate(constant.items()):
        tail = [sum(kappa**2 for kappa in kappas[start:]) for start in range(depth + 1)]
        whole = 1 + tail[0]
        found = [
            ("forward", "h_0", tail[0], clean[0][number].item(), whole),
            ("gradient", "b_1", tail[0], blocks["b_1"][number], slope * whole),
            ("sensitivity", "h_0", tail[0], gain[number], whole**0.5),
            ("bound", "h_0", tail[0], bound(kappas, largest, middle), None),
            ("operator_norm", "b_i a_i", tail[0], largest, None),
            ("gradient_block", "a_1", tail[0], blocks["a_1"][number], slope * whole),
            ("gradient_block", "middle", 0.0, blocks["middle"][number], float(slope)),
        ]
        for i in inner:
            predicted = 1 + tail[i]
            found.append(("forward_level", f"h_{i}", tail[i], clean[i][number].item(), predicted))
            for name in (f"a_{i + 1}", f"b_{i + 1}"):
                value = blocks[name][number]
                found.append(("gradient_block", name, tail[i], value, slope * predicted))
        for quantity, where, squares, value, predicted in found:
            yield {
                "network": "recursion",
                "family": "recursion",
                "skip_scaling": text,
                "depth": depth,
                "seed": draw,
                "quantity": quantity,
                "where": where,
                "sum_squares": squares,
                "value": value,
                "predicted": predicted,
                "width": options.width,
                "layers": options.layers,
            }


# --- the backbones -------------------------------------------------------------------------------


def _flat(content: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(content, dict) and content:
        return {
            k: v for key, one in content.items() for k, v in _flat(one, f"{prefix}{key} ").items()
        }
    return {prefix.strip(): content if isinstance(content, str) else canonical_json(content)}


def _backbones(specs: Sequence[Spec]) -> dict[str, Spec]:
    """One spec for every distinct network of the study, whatever its skips, target and seed.

    Names are families; where one has several networks, the settings in which they differ follow:
    options in brackets, formulation, conditions. The order does not depend on that of the specs.
    """
    distinct: dict[str, dict[str, Any]] = {}
    for spec in specs:
        training = spec.training
        parts = {
            "backbone": spec.backbone.model_dump(mode="json"),
            "formulation": spec.formulation.model_dump(mode="json"),
            "conditional": training.conditional,
            "augmented": bool(training.augment),
        }
        distinct.setdefault(canonical_json(parts), {"parts": parts, "spec": spec})
    families: dict[str, list[dict[str, Any]]] = {}
    for text in sorted(distinct):
        family = distinct[text]["spec"].backbone.family
        families.setdefault(family, []).append(distinct[text])
    named = {}
    for family, entries in sorted(families.items()):
        flat = [_flat(entry["parts"]) for entry in entries]
        for settings, entry in zip(flat, entries, strict=True):
            label = f"{family}{_differences(settings, flat)}"
            named[label] = entry["spec"]
    return named


def _differences(settings: Mapping[str, str], all_settings: Sequence[Mapping[str, str]]) -> str:
    """What tells one network from the others of its family: "(option=...) / formulation, ..."."""
    inside, behind = [], []
    for key in sorted({key for one in all_settings for key in one}):
        section, _, name = key.partition(" ")
        # Formulations of other kinds have other options; that is no difference of its own.
        others = [one.get(key) for one in all_settings if key in one or section != "formulation"]
        if len(set(others)) < 2 or (section == "formulation" and key not in settings):
            continue
        value = settings.get(key, "default")
        if section == "backbone":
            inside.append(f"{name.rpartition(' ')[2]}={value}")
        elif key == "formulation kind":
            behind.insert(0, value)
        elif section == "formulation":
            behind.append(f"{name}={value}")
        else:
            behind.append({"true": section, "false": f"not {section}"}[value])
    return (f"({', '.join(inside)})" if inside else "") + (
        f" / {', '.join(behind)}" if behind else ""
    )


def _initialised(subject: StudySubject, spec: Spec, scaling: SkipScaling, draw: int) -> Backbone:
    """The network of a spec with this skip scaling at initialisation ``draw``.

    With splits it is that of the first one; at initialisation all are alike.
    """
    # Every kernel of attention gives the same numbers, and this one runs everywhere.
    changed = spec.changed(seeds={"init": draw}, training={"attention": "sdpa"})
    changed = changed.model_copy(update={"skip_scaling": scaling})
    return networks_of(subject.arm(changed).network())[0].eval()


def _networks(
    subject: StudySubject,
    spec: Spec,
    scalings: Mapping[str, SkipScaling],
    draw: int,
) -> Iterator[tuple[str, Backbone]]:
    """The network with each scaling in turn; those with constant factors share their weights."""
    network = _initialised(subject, spec, SkipScaling(method="none"), draw)
    levels = [shape.level for shape in network.long_skips.shapes]
    if not levels:
        return
    for text, scaling in scalings.items():
        factors = constant_factors(scaling, levels)
        if factors is None:
            yield text, _initialised(subject, spec, scaling, draw)
        else:
            network.long_skips.factors = factors
            yield text, network


@torch.no_grad()
def _inputs(
    subject: StudySubject, spec: Spec, samples: int, draw: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What training hands a network for some images: (x [B, C, H, W], noise [B], label)."""
    formulation = formulations(spec.formulation, noise_scale=spec.backbone.noise_scale)[0]
    images, label = subject.arm(spec).images(samples, draw)
    names = ("scaling_laws", draw)
    random = torch.rand if formulation.draw == "uniform" else torch.randn
    levels = random(len(images), generator=generator(*names, "levels")).to(subject.device)
    seen = []

    def listen(x: Tensor, noise: Tensor, *_label: Any, **_conditioning: Any) -> Tensor:
        seen.append((x, noise))
        return x.new_zeros(len(x), x.shape[1] * formulation.output_multiplier, *x.shape[2:])

    # The loss knows how its formulation scales an image and names a noise level.
    formulation.loss(listen, images, levels, subject.noise(images.shape, *names, "noise"), label)
    return *seen[0], label


def _per_sample(tensor: Tensor) -> Tensor:
    """Squared L2 norm of every sample [B]."""
    return tensor.float().flatten(1).square().sum(1)


def _backbone_rows(
    subject: StudySubject,
    options: ScalingLaws,
    scalings: Mapping[str, SkipScaling],
    label: str,
    spec: Spec,
    draw: int,
) -> Iterator[dict[str, Any]]:
    x, noise, classes = _inputs(subject, spec, options.samples, draw)
    size = _per_sample(x)
    shift = subject.noise(x.shape, "scaling_laws", draw, "perturbation")
    wanted = options.perturbation**2 * size
    shift = shift * (wanted / _per_sample(shift)).sqrt().reshape(-1, *[1] * (x.ndim - 1))
    for text, network in _networks(subject, spec, scalings, draw):
        features, factors = _features(network, x, noise, classes)
        error = subject.noise(features.shape, "scaling_laws", draw, "error")
        error = error / _per_sample(error).sqrt().reshape(-1, *[1] * (error.ndim - 1))
        # Errors of length 1 make the loss of every sample 1/2.
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        loss = (features.float() * error).sum() / len(x)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        gradient = sum(_norm(one) for one in gradients if one is not None)
        with torch.no_grad():
            moved, _ = _features(network, x + shift, noise, classes)
            features = features.detach()
            forward = (_per_sample(features) / size).mean()
            gain = (_per_sample(moved - features) / wanted).mean().sqrt()
        squares = sum(factor**2 for factor in factors)
        for quantity, where, value in (
            ("forward", "h", forward.item()),
            ("gradient", "all weights", gradient / (0.5 * size.mean().item())),
            ("sensitivity", "h", gain.item()),
        ):
            yield {
                "network": label,
                "family": spec.backbone.family,
                "skip_scaling": text,
                "depth": len(factors),
                "seed": draw,
                "quantity": quantity,
                "where": where,
                "sum_squares": squares,
                "value": value,
                "predicted": None,
                "width": None,
                "layers": None,
            }


def _norm(gradient: Tensor) -> float:
    return gradient.double().square().sum().item()


def _features(
    network: Backbone, x: Tensor, noise: Tensor, label: Tensor | None
) -> tuple[Tensor, list[float]]:
    """Output of the decoder block of long skip 1, and the factors (or mean gates) of all skips."""
    seen: list[Tensor] = []
    factors: dict[int, float] = {}

    def look(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    def fusion(index: int, _main: Any, _skip: Any, _scaled: Any, gate: Tensor | None) -> None:
        constant = network.long_skips.factors
        factors[index] = gate.mean().item() if constant is None else constant[index - 1]

    hook = network.decoder_blocks()[0].register_forward_hook(look)
    network.long_skips.observer = fusion
    try:
        network(x, noise, label)
    finally:
        hook.remove()
        network.long_skips.observer = None
    return seen[0], [factors[index] for index in sorted(factors)]
