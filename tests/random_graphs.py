"""Random CNNs as Python source: what fails can be pasted into a file and run.

A model is written line by line. Every tensor has a name, channels and a spatial size; each statement picks earlier tensors. In-place
operations are written only where eager allows them: on a tensor that nothing has read or saved yet.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from random_python import HELPERS, STATEMENTS
from torch import nn

__all__ = ["RandomModel", "Writer", "build_complete", "build_from_source", "write_model"]

_HEADER = """import torch
import torch.nn as nn
import torch.nn.functional as F

HELPERS

class RandomModel(nn.Module):
    def __init__(self):
        super().__init__()
"""
_SMOOTH = ("silu", "gelu", "tanh", "none")
_KINKED = ("relu", "relu", "relu", "relu6", "leaky", "hardswish")


@dataclass
class Var:
    """A tensor of the model: [batch, channels, size, size]. ``fresh``: nothing has read it, and what made it did not save it."""

    name: str
    channels: int
    size: int
    fresh: bool = False


@dataclass
class RandomModel:
    """The source of a random model and the input that it takes."""

    seed: int
    source: str
    batch: int
    channels: int
    size: int

    @property
    def reproducer(self) -> str:
        """A script that shows the difference between the model and its restructured copy."""
        return (
            f"{self.source}\n\n# seed {self.seed}\nimport bnrestructure, copy\n"
            f"torch.manual_seed({self.seed})\nmodel = RandomModel().double()\n"
            f"x = torch.randn({self.batch}, {self.channels}, {self.size}, {self.size}, dtype=torch.float64)\n"
            "rewritten = bnrestructure.restructure(copy.deepcopy(model), backend='reference')\n"
            "for m in (model, rewritten):\n    torch.manual_seed(0)\n    sum((o ** 2).sum() for o in m(x)).backward()\n"
            "for (name, p), q in zip(model.named_parameters(), rewritten.parameters()):\n"
            "    if p.grad is not None:\n        print(name, float((p.grad - q.grad).norm() / p.grad.norm()))\n"
        )


class Writer:
    """Writes one model, statement by statement."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.batch = self.rng.choice((2, 3, 4))
        self.size = self.rng.choice((6, 7, 8))
        self.layers: list[str] = []
        self.lines: list[str] = []
        self.vars = [Var("x", 3, self.size)]
        self.norms: dict[int, list[str]] = {}
        self.convs: list[tuple[str, int, int]] = []
        self.count = 0

    # Small parts

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def assign(self, expression: str, channels: int, size: int, *read: Var, fresh: bool = False) -> Var:
        for var in read:
            var.fresh = False
        made = Var(self.name("t"), channels, size, fresh)
        self.lines.append(f"{made.name} = {expression}")
        self.vars.append(made)
        return made

    def adopt(self, name: str, channels: int, size: int, *read: Var) -> Var:
        """A tensor that lines written otherwise have made."""
        for var in read:
            var.fresh = False
        self.vars.append(Var(name, channels, size))
        return self.vars[-1]

    def layer(self, expression: str, prefix: str = "m") -> str:
        name = self.name(prefix)
        self.layers.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def pick(self, channels: int | None = None, size: int | None = None) -> Var:
        fitting = [v for v in self.vars if channels in (None, v.channels) and size in (None, v.size)]
        recent = fitting[-4:]
        return self.rng.choice(recent if self.chance(0.7) else fitting)

    # Statements

    def conv(self, x: Var, out: int | None = None, kernel: int | None = None, stride: int = 1) -> Var:
        rng = self.rng
        reusable = [name for name, i, o in self.convs if i == x.channels and out in (None, o)]
        if stride == 1 and reusable and self.chance(0.15):
            name = rng.choice(reusable)
            out = next(o for n, _, o in self.convs if n == name)
            return self.assign(f"{name}({x.name})", out, x.size, x, fresh=True)
        depthwise = out is None and self.chance(0.2)
        out = x.channels if depthwise else out or rng.choice((2, 3, 4, 6))
        kernel = kernel or rng.choice((1, 1, 3, 3, 5))
        groups = x.channels if depthwise else 2 if x.channels % 2 == 0 and out % 2 == 0 and self.chance(0.2) else 1
        dilation = 2 if kernel == 3 and self.chance(0.15) else 1
        padding = dilation * (kernel // 2)
        bias = self.chance(0.4)
        size = (x.size - 1) // stride + 1
        if self.chance(0.2):
            weight = self.layer(f"nn.Parameter(torch.randn({out}, {x.channels // groups}, {kernel}, {kernel}) * 0.3)", "w")
            function = rng.choice(("F.conv2d", "torch.conv2d"))
            call = f"{function}({x.name}, {weight}, None, {stride}, {padding}, {dilation}, {groups})"
        else:
            layer = self.layer(
                f"nn.Conv2d({x.channels}, {out}, {kernel}, {stride}, {padding}, {dilation}, {groups}, bias={bias})", "conv"
            )
            if stride == 1:
                self.convs.append((layer, x.channels, out))
            call = f"{layer}({x.name})"
        return self.assign(call, out, size, x, fresh=True)

    def norm(self, x: Var) -> tuple[Var, bool]:
        """(the normalised tensor, whether an activation with a kink may follow)."""
        if self.batch * x.size * x.size < 8:
            return x, True
        kind = self.rng.random()
        known = self.norms.get(x.channels, [])
        if known and kind < 0.12:
            return self.assign(f"{self.rng.choice(known)}({x.name})", x.channels, x.size, x, fresh=True), True
        if kind < 0.22:
            gamma = self.layer(f"nn.Parameter(torch.rand({x.channels}) + 0.5)", "gamma")
            beta = self.layer(f"nn.Parameter(torch.randn({x.channels}))", "beta")
            call = f"F.batch_norm({x.name}, None, None, {gamma}, {beta}, True, 0.1, 1e-3)"
            return self.assign(call, x.channels, x.size, x, fresh=True), True
        if kind < 0.27:
            layer = self.layer(f"nn.BatchNorm2d({x.channels}, affine=False, eps=1e-2)", "bn")
            return self.assign(f"{layer}({x.name})", x.channels, x.size, x, fresh=True), False
        options = self.rng.choice(("", "", "", ", momentum=None", ", track_running_stats=False", ", eps=1e-2"))
        layer = self.layer(f"nn.BatchNorm2d({x.channels}{options})", "bn")
        self.layers.append(f"nn.init.normal_({layer}.bias); nn.init.uniform_({layer}.weight, -1, 1.5)")
        if self.chance(0.06):
            self.layers.append(f"{layer}.eval()")
        self.norms.setdefault(x.channels, []).append(layer)
        return self.assign(f"{layer}({x.name})", x.channels, x.size, x, fresh=True), True

    def act(self, x: Var, kinked: bool = True) -> Var:
        kind = self.rng.choice(_KINKED + _SMOOTH if kinked else _SMOOTH)
        if kind == "none":
            return x
        inplace = x.fresh and self.chance(0.4)
        spellings = {
            "relu": ["F.relu({})", "torch.relu({})", "{}.relu()", "nn.functional.relu({})", "MODULE:nn.ReLU()"],
            "relu6": ["F.relu6({})", "MODULE:nn.ReLU6()"],
            "silu": ["F.silu({})", "MODULE:nn.SiLU()", "{0} * torch.sigmoid({0})"],
            "hardswish": ["F.hardswish({})", "MODULE:nn.Hardswish()", "{0} * F.relu6({0} + 3) / 6"],
            "gelu": ["F.gelu({})", "F.gelu({}, approximate='tanh')", "MODULE:nn.GELU()"],
            "leaky": ["F.leaky_relu({}, 0.1)", "MODULE:nn.LeakyReLU(0.3)"],
            "tanh": ["torch.tanh({})", "{}.sigmoid()"],
        }
        overwriting = {
            "relu": ["F.relu({}, inplace=True)", "{}.relu_()", "torch.relu_({})", "MODULE:nn.ReLU(inplace=True)"],
            "relu6": ["MODULE:nn.ReLU6(inplace=True)"],
            "silu": ["F.silu({}, inplace=True)"],
            "hardswish": ["MODULE:nn.Hardswish(inplace=True)"],
            "leaky": ["MODULE:nn.LeakyReLU(0.3, inplace=True)", "F.leaky_relu({}, 0.1, True)"],
        }
        # eager's silu_ and hardswish_ save their input: on a batch norm's output that is overwritten, autograd keeps a copy
        choices = overwriting.get(kind) if inplace else None
        form = self.rng.choice(choices or spellings[kind])
        if form.startswith("MODULE:"):
            form = self.layer(form.removeprefix("MODULE:"), "act") + "({})"
        made = self.assign(form.format(x.name), x.channels, x.size, x)
        if choices:
            self.vars.remove(made)  # the same tensor under two names: go on using both
            self.vars.append(Var(made.name, x.channels, x.size))
            return self.vars[-1]
        return made

    def conv_norm_act(self, x: Var, out: int | None = None, stride: int = 1) -> Var:
        return self.act(*self.norm(self.conv(x, out, stride=stride)))

    def preact(self, x: Var, out: int | None = None) -> Var:
        return self.conv(self.act(*self.norm(x)), out)

    def join(self) -> None:
        a = self.pick()
        partners = [v for v in self.vars if v is not a and (v.channels, v.size) == (a.channels, a.size)]
        if partners and self.chance(0.6):  # noqa: SIM108  # in one line it would be too long to read
            b = self.rng.choice(partners)
        else:
            b = self.norm(self.conv(a, a.channels, self.rng.choice((1, 3))))[0]
        if self.chance(0.3):
            a = self.norm(self.conv(a, a.channels, 1))[0]
        if a.fresh and a is not b and self.chance(0.3):
            self.lines.append(f"{a.name} += {b.name}")
            b.fresh = False
            made = a
        else:
            form = self.rng.choice(("{} + {}", "torch.add({}, {})", "{}.add({})", "{} + {}"))
            made = self.assign(form.format(a.name, b.name), a.channels, a.size, a, b, fresh=True)
        if self.chance(0.7):
            self.act(made)

    def concat(self) -> None:
        first = self.pick()
        others = [v for v in self.vars if v.size == first.size and v is not first]
        parts = [first, *self.rng.sample(others, min(len(others), self.rng.choice((1, 2, 3))))]
        while len(parts) < 2 or self.chance(0.2):
            parts.append(self.conv_norm_act(first))
        self.rng.shuffle(parts)
        parts = [p for p in parts if p.size == first.size][:4]
        channels = sum(p.channels for p in parts)
        if channels > 24:
            return
        names = ", ".join(p.name for p in parts)
        made = self.assign(f"torch.cat([{names}], {self.rng.choice(('1', 'dim=1'))})", channels, first.size, *parts, fresh=True)
        if self.chance(0.6):
            self.preact(made) if self.chance(0.5) else self.conv_norm_act(made)

    def dense_block(self) -> None:
        features = [self.pick()]
        for _ in range(self.rng.choice((2, 3))):
            joined = features[0]
            if len(features) > 1:
                names = ", ".join(f.name for f in features)
                joined = self.assign(f"torch.cat([{names}], 1)", sum(f.channels for f in features), features[0].size, *features)
            grown = self.preact(joined, 2)
            if self.chance(0.4):
                grown = self.preact(grown, 2)
            features.append(grown)
        names = ", ".join(f.name for f in features)
        made = self.assign(f"torch.cat(({names}), 1)", sum(f.channels for f in features), features[0].size, *features)
        if self.chance(0.7):
            self.preact(made)

    def parts(self) -> None:
        """CSPNet's, YOLO's and Res2Net's: a tensor in parts, of which some go on and some are concatenated, or added, as they are."""
        x = self.conv_norm_act(self.pick(), self.rng.choice((4, 6)))
        in_three = x.channels % 3 == 0 and self.chance(0.4)
        even = ("{}.chunk(2, 1)", "torch.chunk({}, 2, dim=1)", f"torch.split({{}}, {x.channels // 2}, 1)", "{}.split({}.shape[1] // 2, 1)")
        uneven = (f"torch.split({{}}, [1, {x.channels - 1}], dim=1)", f"{{}}.split(({x.channels - 1}, 1), 1)")
        if in_three:
            form, sizes = "{}.chunk(3, dim=1)", [x.channels // 3] * 3
        elif self.chance(0.7):
            form, sizes = self.rng.choice(even), [x.channels // 2] * 2
        else:
            form = self.rng.choice(uneven)
            sizes = [1, x.channels - 1] if form.startswith("torch") else [x.channels - 1, 1]
        split = self.name("s")
        self.lines.append(f"{split} = {form.replace('{}', x.name)}")
        made = [self.assign(f"{split}[{i}]", size, x.size, x) for i, size in enumerate(sizes)]
        last = made[-1]
        for _ in range(self.rng.choice((1, 1, 2))):
            grown = self.conv_norm_act(last, last.channels)
            if grown.size == last.size and self.chance(0.5):
                grown = self.assign(f"{last.name} + {grown.name}", last.channels, last.size, last, grown, fresh=True)
            made, last = [*made, grown], grown
        kept = [v for v in made if v.size == x.size and self.chance(0.85)]
        if len(kept) > 1:
            joined = self.assign(f"torch.cat([{', '.join(v.name for v in kept)}], 1)", sum(v.channels for v in kept), x.size, *kept)
            if self.chance(0.8):
                self.conv_norm_act(joined)

    def aggregation(self) -> None:
        """Layers that read each other, and all of them concatenated: in one concat, or with a concat inside it."""
        features = [self.pick()]
        if self.chance(0.5):
            features.append(self.assign(f"F.relu({features[0].name})", features[0].channels, features[0].size, features[0]))
        for _ in range(self.rng.choice((2, 3))):
            normed = self.norm(self.conv(features[-1], self.rng.choice((2, 3)), self.rng.choice((1, 3))))[0]
            act = self.rng.choice(("F.relu", "F.relu", "F.silu", "F.gelu"))
            features.append(self.assign(f"{act}({normed.name})", normed.channels, normed.size, normed))
        chosen = features[self.rng.choice((0, 1)) :]
        names = [f.name for f in chosen]
        if self.chance(0.4) and len(names) > 2:
            names = [*names[:-2], f"torch.cat([{', '.join(names[-2:])}], 1)"]
        made = self.assign(f"torch.cat([{', '.join(names)}], 1)", sum(f.channels for f in chosen), chosen[0].size, *chosen)
        if self.chance(0.3):
            self.assign(f"F.avg_pool2d({made.name}, 3, 1, 1)", made.channels, made.size, made)
        if self.chance(0.8):
            self.conv_norm_act(made)

    def squeeze_excite(self) -> None:
        x = self.conv_norm_act(self.pick()) if self.chance(0.6) else self.norm(self.conv(self.pick()))[0]
        pool = self.rng.choice(("F.adaptive_avg_pool2d({}, 1)", "{}.mean((2, 3), keepdim=True)", "MODULE"))
        pool = self.layer("nn.AdaptiveAvgPool2d(1)") + "({})" if pool == "MODULE" else pool
        average = self.name("s")
        self.lines.append(f"{average} = {pool.format(x.name)}")
        fc1 = self.layer(f"nn.Conv2d({x.channels}, 2, 1)")
        fc2 = self.layer(f"nn.Conv2d(2, {x.channels if self.chance(0.85) else 1}, 1)")
        gate = self.rng.choice(("torch.sigmoid", "F.hardsigmoid"))
        self.lines.append(f"{average} = {gate}({fc2}(F.relu({fc1}({average}))))")
        product = self.rng.choice(("{0} * {1}", "{1} * {0}", "{1} * {0}.expand_as({1})")).format(average, x.name)
        made = self.assign(product, x.channels, x.size, x)
        if self.chance(0.5):
            self.norm(self.conv(made))
        elif self.chance(0.7):
            y = self.pick(made.channels, made.size)
            if self.chance(0.3):
                y = self.norm(self.conv(y, made.channels, 3))[0]
            total = f"{made.name} + {y.name}" if y.size == made.size and y.channels == made.channels else made.name
            act = self.rng.choice(("F.relu({})", "F.relu({})", "F.silu({})", "({})"))
            joined = self.assign(act.format(total), made.channels, made.size, made, y)
            if self.chance(0.5):
                self.norm(self.conv(joined))

    def bottleneck(self) -> None:
        """Darknet's: the branch is activated before it is added."""
        x = self.pick()
        act = self.rng.choice(("F.silu", "F.relu", "F.hardswish", "F.leaky_relu"))
        normed = self.norm(self.conv(self.conv_norm_act(x), x.channels, 3))[0]
        if normed.size == x.size:
            branch = f"{act}({normed.name})" if self.chance(0.7) else normed.name
            if self.chance(0.4):  # stochastic depth
                drawn = self.rng.choice(("{0}.new_empty({0}.shape[0], 1, 1, 1)", "torch.empty({0}.size(0), 1, 1, 1, dtype={0}.dtype)"))
                branch = f"{branch} * {drawn.format(normed.name)}.bernoulli_(0.6).div_(0.6)"
            order = self.rng.choice(("{0} + {1}", "{1} + {0}")).format(x.name, branch)
            self.assign(order, x.channels, x.size, x, normed)

    def plain_sum(self) -> None:
        """A pre-activation block: a convolution's result is added as it is, and what follows is a batch norm, a ReLU or both."""
        x = self.pick()
        y = self.conv(self.conv_norm_act(x), x.channels, 3)
        zero = self.rng.choice(("", "0 + ", "0.0 + "))
        made = self.assign(f"{zero}{self.rng.choice((f'{y.name} + {x.name}', f'{x.name} + {y.name}'))}", x.channels, x.size, x, y)
        for _ in range(self.rng.choice((0, 1, 2))):
            self.preact(made)
        if self.chance(0.4):
            self.assign(f"F.relu({made.name})", made.channels, made.size, made)

    def other(self) -> None:
        x = self.pick()
        kind = self.rng.choice(("max", "max", "avg", "chunk", "scale", "product", "dropout", "up", "gap", "detach", "slice"))
        if kind == "max" and x.size >= 3:
            k, s, p = self.rng.choice(((2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 1, 0)))
            form = self.rng.choice((f"F.max_pool2d({x.name}, {k}, {s}, {p})", f"{self.layer(f'nn.MaxPool2d({k}, {s}, {p})')}({x.name})"))
            self.assign(form, x.channels, (x.size + 2 * p - k) // s + 1, x)
        elif kind == "avg" and x.size >= 4:
            k, s, p = self.rng.choice(((2, 2, 0), (3, 1, 1), (3, 2, 1), (3, 2, 0)))
            included = "" if self.chance(0.7) else ", count_include_pad=False"
            form = self.rng.choice((f"F.avg_pool2d({{}}, {k}, {s}, {p}{included})", "MODULE"))
            form = self.layer(f"nn.AvgPool2d({k}, {s}, {p}{included})") + "({})" if form == "MODULE" else form
            self.assign(form.format(x.name), x.channels, (x.size + 2 * p - k) // s + 1, x)
        elif kind in ("chunk", "slice") and x.channels % 2 == 0:
            half = x.channels // 2
            part = f"{x.name}.chunk(2, 1)[{self.rng.choice((0, 1))}]" if kind == "chunk" else f"{x.name}[:, {half}:]"
            self.assign(part, half, x.size, x)
        elif kind == "scale":
            self.assign(f"{x.name} * 0.7 + 0.1", x.channels, x.size, x)
        elif kind == "product":
            y = self.pick(x.channels, x.size)
            self.assign(f"{x.name} * torch.sigmoid({y.name})", x.channels, x.size, x, y)
        elif kind == "dropout":
            self.assign(f"F.dropout({x.name}, 0.2, self.training)", x.channels, x.size, x)
        elif kind == "up" and x.size <= 4:
            self.assign(f"F.interpolate({x.name}, scale_factor=2)", x.channels, x.size * 2, x)
        elif kind == "gap":
            self.lines.append(f"extras.append(F.adaptive_avg_pool2d({x.name}, (1, 1)).flatten(1))")
            x.fresh = False
        elif kind == "detach":
            self.assign(f"{x.name}.detach() * 0.5", x.channels, x.size, x)

    def write(self) -> None:
        self.conv_norm_act(self.vars[0], stride=self.rng.choice((1, 1, 2)))
        for _ in range(self.rng.randint(3, 8)):
            statement = self.rng.choices(
                ("conv", "preact", "join", "concat", "dense", "aggregation", "se", "sum", "bottleneck", "parts", "other", "down", "python"),
                (4, 2, 4, 3, 1, 1, 2, 2, 1, 1, 3, 1, 4),
            )[0]
            if statement == "conv":
                self.conv_norm_act(self.pick())
            elif statement == "preact":
                self.preact(self.pick())
            elif statement == "join":
                self.join()
            elif statement == "concat":
                self.concat()
            elif statement == "dense":
                self.dense_block()
            elif statement == "aggregation":
                self.aggregation()
            elif statement == "se":
                self.squeeze_excite()
            elif statement == "bottleneck":
                self.bottleneck()
            elif statement == "parts":
                self.parts()
            elif statement == "sum":
                self.plain_sum()
            elif statement == "python":
                self.rng.choice(STATEMENTS)(self)
            elif statement == "down":
                self.conv_norm_act(self.pick(), stride=2)
            else:
                self.other()


def write_model(seed: int) -> RandomModel:
    """The random model of this seed; the same seed writes the same source."""
    writer = Writer(seed)
    writer.write()
    outputs = [writer.vars[-1].name]
    made = [v.name for v in writer.vars[1:-1]]
    if made and writer.chance(0.4):
        outputs += writer.rng.sample(made, min(len(made), writer.rng.choice((1, 2))))
    body = ["extras = []", *writer.lines, f"return [{', '.join(outputs)}, *extras]"]
    source = _HEADER.replace("HELPERS", HELPERS) + "".join(f"        {line}\n" for line in writer.layers)
    source += "\n    def forward(self, x):\n" + "".join(f"        {line}\n" for line in body)
    return RandomModel(seed, source, writer.batch, 3, writer.size)


def build_from_source(model: RandomModel) -> nn.Module:
    """An instance in float64 with its weights drawn from the model's seed. Flags set in __init__ (frozen layers) are kept."""
    namespace: dict[str, type[nn.Module]] = {"__name__": f"random_model_{model.seed}"}
    exec(compile(model.source, f"<random model {model.seed}>", "exec"), namespace)
    torch.manual_seed(model.seed)
    return namespace["RandomModel"]().double()


def build_complete(written: RandomModel) -> nn.Module:
    """The model behind its first call, which makes the tensors that its forward misses: it can be captured whole."""
    model = build_from_source(written)
    model(torch.randn(written.batch, written.channels, written.size, written.size, dtype=torch.float64))
    return model
