"""Statements of random models that are Python before they are tensors: branches on types and sizes, lists, custom Functions, hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random_graphs import Writer

__all__ = ["HELPERS", "STATEMENTS"]

#: What the statements need beside torch, in front of the model's class.
HELPERS = """
class Tripled(torch.autograd.Function):
    \"\"\"Its backward is not the derivative of its forward: who looks into it computes something else.\"\"\"

    @staticmethod
    def forward(ctx, x):
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


class Sometimes(nn.Module):
    \"\"\"Returns a pair, or in eval mode a tensor.\"\"\"

    def forward(self, x):
        return (x * 0.5, None) if self.training else x


def halves(x):
    for part in x.chunk(2, 1):
        yield part
"""


def isinstance_branch(w: Writer) -> None:
    x = w.conv_norm_act(w.pick())
    layer = w.layer("Sometimes()")
    w.lines.append(f"pair = {layer}({x.name})")
    w.assign("pair[0] * 2 if isinstance(pair, tuple) else pair * 3", x.channels, x.size, x)


def recurrent(w: Writer) -> None:
    """A layer of PyTorch's that returns a tuple, over rows."""
    x = w.conv_norm_act(w.pick())
    kind = w.rng.choice(("GRU", "LSTM"))
    layer = w.layer(f"nn.{kind}({x.channels}, {x.channels}, batch_first=True)", "rnn")
    w.lines.append(f"rows = {layer}({x.name}.mean(3).transpose(1, 2))")
    w.lines.append("rows = rows[0] if isinstance(rows, tuple) else rows * 5")
    w.assign(f"{x.name} * rows.transpose(1, 2).unsqueeze(3)", x.channels, x.size, x)


def try_except(w: Writer) -> None:
    x = w.conv_norm_act(w.pick())
    layer = w.layer(f"nn.Conv2d({x.channels}, {x.channels}, 1)", "conv")
    made = w.name("t")
    w.lines += ["try:", f"    {made} = {layer}({x.name}, lengths=None)", "except TypeError:", f"    {made} = {layer}({x.name})"]
    w.adopt(made, x.channels, x.size, x)


def growing_list(w: Writer) -> None:
    """The two halves of a chunk, blocks appended to the list, and a concat of it."""
    x = w.pick()
    if x.channels % 2:
        return
    half, blocks = x.channels // 2, w.rng.choice((1, 2))
    parts = w.name("parts")
    spelling = w.rng.choice(("list({}.chunk(2, 1))", "list(torch.split({}, HALF, 1))", "[*halves({})]")).replace("HALF", str(half))
    w.lines.append(f"{parts} = {spelling.format(x.name)}")
    for _ in range(blocks):
        conv = w.layer(f"nn.Conv2d({half}, {half}, 3, padding=1)", "conv")
        norm = w.layer(f"nn.BatchNorm2d({half})", "bn")
        w.lines.append(f"{parts}.append(F.silu({norm}({conv}({parts}[-1]))))")
    w.assign(f"torch.cat({parts}, 1)", x.channels + half * blocks, x.size, x)


def custom_function(w: Writer) -> None:
    x = w.norm(w.conv(w.pick()))[0]
    w.assign(f"Tripled.apply({x.name})", x.channels, x.size, x)


def squeeze_by_hand(w: Writer) -> None:
    x = w.conv_norm_act(w.pick())
    layer = w.layer(f"nn.Linear({x.channels}, {x.channels})", "fc")
    w.lines.append(f"n, c, _, _ = {x.name}.{w.rng.choice(('shape', 'size()'))}")
    average = w.rng.choice(("{}.mean((2, 3))", "{}.flatten(2).mean(2)", "F.adaptive_avg_pool2d({}, 1).view(n, c)")).format(x.name)
    gate = f"{layer}({average}).sigmoid().view(n, c, 1, 1)"
    made = w.assign(f"{x.name} * {gate}{w.rng.choice(('', f'.expand_as({x.name})'))}", x.channels, x.size, x)
    if w.chance(0.6):
        w.norm(w.conv(made))


def tokens(w: Writer) -> None:
    """To tokens and back, which leaves the tensor in another order in memory, and perhaps dropout right behind."""
    x = w.conv_norm_act(w.pick())
    layer = w.layer(f"nn.Linear({x.channels}, {x.channels})", "fc")
    seen = f"{layer}({x.name}.flatten(2).transpose(1, 2))"
    made = w.assign(f"{seen}.transpose(1, 2).reshape({x.name}.shape)", x.channels, x.size, x)
    if w.chance(0.5):
        made = w.conv(made)
    drop = w.layer("nn.Dropout(0.3)", "drop")
    if w.chance(0.7):
        w.assign(f"{drop}({made.name})", made.channels, made.size, made)


def drop_path(w: Writer) -> None:
    x = w.norm(w.conv(w.pick()))[0]
    mask = w.name("mask")
    w.lines.append(f"{mask} = {x.name}.new_empty(({x.name}.shape[0],) + (1,) * ({x.name}.ndim - 1)).bernoulli_(0.8)")
    w.assign(f"{x.name} * {mask}.div_(0.8)", x.channels, x.size, x)


def size_branch(w: Writer) -> None:
    x = w.pick()
    if x.size > 8:
        return
    even = x.size + x.size % 2
    made = w.name("t")
    w.lines += [f"{made} = {x.name} * 1.0", f"if {x.name}.shape[2] % 2:", f"    {made} = F.pad({made}, (0, 1, 0, 1))"]
    w.conv_norm_act(w.adopt(made, x.channels, even, x))


def hook(w: Writer) -> None:
    """Hooks on a layer: one that keeps what it saw, or one that changes it."""
    made = w.conv_norm_act(w.pick())
    named = [line.split(" = ")[0] for line in w.layers if " = nn.BatchNorm2d" in line or " = nn.Conv2d" in line]
    effect = w.rng.choice(("None", "None", "o * 1.5"))
    if named and made is not None:
        w.layers.append(f"{w.rng.choice(named)}.register_forward_hook(lambda m, i, o: {effect})")


def plain_tensor(w: Writer) -> None:
    """A tensor of the module's that is no parameter and no buffer: there from the start, or made by the forward that misses it."""
    x = w.conv_norm_act(w.pick())
    factors = f"torch.linspace(0.5, 1.5, {x.channels}).view(-1, 1, 1)"
    if w.chance(0.5):
        table = w.layer(factors, "table")
    else:
        table = w.layer(w.rng.choice(("None", "torch.empty(0)")), "table")
        missing = f"{table} is None or {table}.shape[0] != {x.name}.shape[1]"
        w.lines += [f"if {missing}:", f"    {table} = {factors}"]
    w.assign(f"{x.name} * {table}", x.channels, x.size, x)


STATEMENTS = (
    isinstance_branch, recurrent, try_except, growing_list, custom_function, squeeze_by_hand, tokens, drop_path, size_branch, hook,
    plain_tensor,
)  # fmt: skip

